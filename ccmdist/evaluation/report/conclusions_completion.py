"""Sentences on repaired frames: what fills their holes is worth, and what the other figures then do not show."""

from collections.abc import Iterator

from ccmdist.evaluation.comparison import Comparison
from ccmdist.evaluation.fidelity.completion import Completion
from ccmdist.evaluation.fidelity.fills import DRAWN, FILLS
from ccmdist.evaluation.fidelity.in_hole import IN_HOLE
from ccmdist.evaluation.report.formatting import joined, told_once


def completion_sentences(comparison: Comparison) -> Iterator[str]:
    """One for the sets of repaired frames of which the same is to be told: which simple fills the model beats."""
    told = ((one.name, _told(one.completion)) for one in comparison.sets if one.completion)
    return (f"{joined(names)}: {text}" for names, text in told_once(told))


def _told(found: Completion) -> str:
    drawn = next((measure for measure in found.measures if measure.fill == DRAWN), None)
    if drawn is None:
        return "too few repaired frames have a real one to say how good what fills their holes is."
    outcomes = ((label, _outcome(found, fill)) for fill, label in FILLS.items() if found.measure(fill, "ssim"))
    against = "; ".join(f"{text} than {joined(labels)}" for labels, text in told_once(outcomes) if text)
    return (
        f"inside the holes of {drawn.num_images} repaired frames of {drawn.num_subjects} subjects, the model is "
        f"{against or 'compared with nothing, for want of simple fills'} (95 % intervals without zero, uncorrected)."
    )


def _outcome(found: Completion, fill: str) -> str:
    rows = [(measure, row.gain_interval) for measure in IN_HOLE if (row := found.measure(fill, measure))]
    known = [(IN_HOLE[measure].removesuffix(", dB"), interval) for measure, interval in rows if interval]
    better = [label for label, (low, _) in known if low > 0]
    worse = [label for label, (_, high) in known if high < 0]
    told = [f"{word} in {joined(labels)}" for word, labels in (("better", better), ("worse", worse)) if labels]
    return (", ".join(told) or "neither better nor worse") if known else ""


def completion_limits(comparison: Comparison) -> Iterator[str]:
    """What the figures of whole images do not show of repaired frames."""
    told = ((one.name, _limit(one.completion)) for one in comparison.sets if one.completion)
    return (f"{joined(names)}: {text}" for names, text in told_once(told))


def _limit(found: Completion) -> str:
    mixed = (
        f" They take in {found.num_whole_images} images that were drawn whole too: draw the two apart to tell."
        if found.num_whole_images
        else ""
    )
    return (
        f"{found.num_images} images are repaired frames, {100 * found.share:.0f} % of each drawn on average and the "
        "rest the real frame. All other figures (agreement with masks, biomarkers, distances, whole-image SSIM, "
        f"downstream tasks, the gate's search) are of whole images, and so of real pixels.{mixed} Only “Inside the "
        "holes” is about the model."
    )
