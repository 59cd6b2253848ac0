"""Plain sentences of the second pillar: what biomarkers allow to conclude, and what they do not."""

import math
from collections.abc import Iterator
from typing import Final

from ccmdist.ccm.biomarkers import QUANTITIES
from ccmdist.ccm.segmenter import SEGMENTER_VERSION
from ccmdist.evaluation.biomarkers.equivalence import ALL_SUBJECTS, Equivalence
from ccmdist.evaluation.biomarkers.summary import Control
from ccmdist.evaluation.comparison import Comparison, SetReport

LOW_POWER: Final = 0.5
"""Below it "inconclusive" was to be expected even of a set without any difference."""


def biomarker_sentences(comparison: Comparison) -> Iterator[str]:
    """For each set what its biomarkers are and where its nerves lie; for each control what it shows of the prompt."""
    for one in comparison.sets:
        if one.control:
            yield _control(one, one.control)
        else:
            yield _equivalence(comparison, one)
            yield _adherence(one)


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
    return sentence + _power(rows)


def _power(rows: list[Equivalence]) -> str:
    inconclusive = [row for row in rows if row.verdict == "inconclusive"]
    weak = [row for row in inconclusive if row.power < LOW_POWER]
    if not weak:
        return ""
    names = _listed([QUANTITIES[row.biomarker].label for row in weak])
    which = "every inconclusive one" if len(weak) == len(inconclusive) else names
    return (
        f" With so few subjects, the verdict on {which} would more likely than not be inconclusive without any "
        f"difference too; it takes up to {max(row.subjects_needed for row in weak)} subjects per set."
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "none"


def _adherence(one: SetReport) -> str:
    found, chance = one.adherence, one.adherence.chance
    if math.isnan(found.dice):
        return f"{one.name}: too few images to say whether nerves lie where they were wanted."
    if not one.images.manifest.follows_masks:
        return (
            f"{one.name} was drawn from prompts alone. That the nerves of its images lie elsewhere than in the masks "
            f"beside them is no fault (Dice {found.dice:.2f}, {chance.dice:.2f} by chance), and what sets an image "
            "beside a mask or a frame says nothing of it."
        )
    by_chance = [f" ({value:.2f} by chance)" if value == value else "" for value in (chance.dice, chance.cldice)]
    return (
        f"{one.name}: the nerves that the segmenter finds overlap with the wanted ones by Dice {found.dice:.2f}"
        f"{by_chance[0]} and clDice {found.cldice:.2f}{by_chance[1]}, means of {found.num_images} images."
    )


def _control(one: SetReport, control: Control) -> str:
    about = f"{one.name} is a control, drawn with the prompts of other clinical groups than those of its masks"
    if control.of is None:
        return f"{about}; the set that it controls is not compared here."
    effects = {name: effect for name, effect in control.prompt_effect.items() if effect}
    changed = [name for name, effect in effects.items() if effect.bias_interval[0] * effect.bias_interval[1] > 0]
    told = _listed([QUANTITIES[name].label for name in changed])
    return (
        f"{about}. Against {control.of}, from the same masks and noise, the prompt alone changes {told}, of "
        f"{len(effects)} biomarkers (95 % intervals without zero, uncorrected)."
    )


def biomarker_limits(comparison: Comparison) -> Iterator[str]:
    """What a reader might take from biomarkers and must not."""
    yield (
        "Images drawn from a nerve mask inherit its nerves, and with them its CNFD, CNBD, CNFL and CTBD. Equivalent "
        "biomarkers show that the images follow their masks, not that the model knows what a disease does to nerves; "
        "only width, contrast and grain are its own."
    )
    if any(one.shares_subjects for one in comparison.sets):
        yield (
            "The masks come from subjects of the reference set itself, so agreement between the sets is expected, and "
            "the two sets are not independent."
        )
    yield (
        "“Inconclusive” is neither equivalent nor different: these subjects cannot tell, be they too few for the "
        "margin or the difference near to it. A difference that is not significant is not equivalence."
    )
    yield (
        f"Biomarkers are ACCMetrics-style values of one automatic segmenter ({SEGMENTER_VERSION}), applied to all "
        "images alike. They are not ACCMetrics values and not those of an expert; its own error is the first table."
    )
