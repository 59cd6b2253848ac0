"""Plain sentences: what the figures of a report allow to conclude, and what they do not."""

from collections.abc import Iterator

from ccmdist.data.trained_on import why_unknown
from ccmdist.evaluation.comparison import Comparison
from ccmdist.evaluation.report.conclusions_biomarkers import biomarker_limits, biomarker_sentences
from ccmdist.evaluation.report.conclusions_completion import completion_limits, completion_sentences
from ccmdist.evaluation.report.conclusions_downstream import downstream_sentences
from ccmdist.evaluation.report.conclusions_fidelity import fidelity_limits, fidelity_sentences
from ccmdist.evaluation.report.conclusions_gate import gate_limits, gate_sentences


def may_be_concluded(comparison: Comparison) -> list[str]:
    """One sentence for each set on its biomarkers and on where its nerves lie, and one for each downstream task."""
    sentences = [*completion_sentences(comparison), *biomarker_sentences(comparison), *fidelity_sentences(comparison)]
    return [*sentences, *downstream_sentences(comparison), *gate_sentences(comparison)]


def _seen(comparison: Comparison) -> Iterator[str]:
    num_subjects = comparison.counts["num_subjects"]
    for one in comparison.sets:
        if one.num_reference_seen is None:
            yield f"{one.name} {why_unknown(one.images.manifest)}: it may have seen the reference itself."
        elif one.num_reference_seen:
            yield (
                f"The generator of {one.name} was trained on {one.num_reference_seen} of the {num_subjects} subjects "
                "of the reference. That its images are near to these says nothing about other people."
            )


def may_not_be_concluded(comparison: Comparison) -> list[str]:
    """What a reader might take from the report and must not."""
    sentences = []
    if comparison.real.manifest.kind == "phantom":
        sentences.append(
            "The reference set consists of phantoms: computer-drawn frames whose clinical groups differ by "
            "construction. Nothing in this report says anything about patients, corneas or real images."
        )
    sentences += [
        *completion_limits(comparison),
        *_seen(comparison),
        *biomarker_limits(comparison),
        *fidelity_limits(comparison),
        *gate_limits(comparison),
    ]
    if comparison.downstream is None:
        sentences.append("Nothing here tests whether the images help a diagnosis or a segmentation.")
    return sentences
