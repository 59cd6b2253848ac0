"""Plain sentences: what the figures of a report allow to conclude, and what they do not."""

from ccmdist.ccm.biomarkers import QUANTITIES
from ccmdist.ccm.segmenter import SEGMENTER_VERSION
from ccmdist.evaluation.biomarkers.equivalence import ALL_SUBJECTS
from ccmdist.evaluation.comparison import Comparison, SetReport
from ccmdist.evaluation.report.conclusions_downstream import downstream_sentences
from ccmdist.evaluation.report.conclusions_fidelity import fidelity_limits, fidelity_sentences
from ccmdist.evaluation.report.conclusions_gate import gate_limits, gate_sentences


def may_be_concluded(comparison: Comparison) -> list[str]:
    """One sentence for each set on its biomarkers and on where its nerves lie, and one for each downstream task."""
    sentences = [sentence for one in comparison.sets for sentence in (_equivalence(comparison, one), _adherence(one))]
    sentences += [*fidelity_sentences(comparison), *downstream_sentences(comparison)]
    return [*sentences, *gate_sentences(comparison)]


def _equivalence(comparison: Comparison, one: SetReport) -> str:
    rows = [row for row in one.equivalence if row.clinical_group == ALL_SUBJECTS]
    if not rows:
        return f"{one.name}: no biomarker could be tested for equivalence; the reasons stand with the table."
    verdicts = {
        verdict: [QUANTITIES[row.biomarker].label for row in rows if row.verdict == verdict]
        for verdict in ("equivalent", "equivalent, but different", "different", "inconclusive")
    }
    told = "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in verdicts.items() if names)
    sentence = (
        f"{one.name}, over all subjects, within the stated margins at level {comparison.config.alpha:g} after Holm's "
        f"correction: {told}."
    )
    if any(row.equivalent_when_paired is not None for row in rows):
        paired = [QUANTITIES[row.biomarker].label for row in rows if row.equivalent_when_paired]
        sentence += f" Subject by subject, images against their own real frames: equivalent in {_listed(paired)}."
    return sentence


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "none"


def _adherence(one: SetReport) -> str:
    return (
        f"{one.name}: the nerves that the segmenter finds overlap with the wanted ones by Dice "
        f"{one.adherence.dice:.2f} and clDice {one.adherence.cldice:.2f}, mean over {one.adherence.num_images} images."
    )


def may_not_be_concluded(comparison: Comparison) -> list[str]:
    """What a reader might take from the report and must not."""
    sentences = []
    if comparison.real.manifest.kind == "phantom":
        sentences.append(
            "The reference set consists of phantoms: computer-drawn frames whose clinical groups differ by "
            "construction. Nothing in this report says anything about patients, corneas or real images."
        )
    sentences.append(
        "Images drawn from a nerve mask inherit its nerves. Equivalent biomarkers show that the images follow their "
        "masks, not that the model knows what a disease does to nerves; only width, contrast and grain are its own."
    )
    if any(one.shares_subjects for one in comparison.sets):
        sentences.append(
            "The masks come from subjects of the reference set itself, so agreement between the sets is expected, and "
            "the two sets are not independent."
        )
    sentences += [
        "“Inconclusive” is neither equivalent nor different: there are too few subjects for the margin. A difference "
        "that is not significant is not equivalence.",
        f"Biomarkers are ACCMetrics-style values of one automatic segmenter ({SEGMENTER_VERSION}), applied to all "
        "images alike. They are not ACCMetrics values and not those of an expert; its own error is the first table.",
        *fidelity_limits(comparison),
        *gate_limits(comparison),
    ]
    if comparison.downstream is None:
        sentences.append("Nothing here tests whether the images help a diagnosis or a segmentation.")
    return sentences
