"""Sentences on repaired frames: what fills their holes is worth, and what the other figures then do not show."""

from collections.abc import Iterator

from ccmdist.evaluation.comparison import Comparison, SetReport
from ccmdist.evaluation.fidelity.completion import Completion
from ccmdist.evaluation.fidelity.fills import DRAWN, FILLS
from ccmdist.evaluation.fidelity.in_hole import IN_HOLE
from ccmdist.evaluation.report.formatting import joined


def completion_sentences(comparison: Comparison) -> Iterator[str]:
    """One for each set that repairs frames: by which measures the model beats which simple fill."""
    for one in comparison.sets:
        if one.completion:
            yield _told(one, one.completion)


def _told(one: SetReport, found: Completion) -> str:
    drawn = next((measure for measure in found.measures if measure.fill == DRAWN), None)
    if drawn is None:
        return f"{one.name}: too few repaired frames have a real one to say how good what fills their holes is."
    told = []
    for fill, label in FILLS.items():
        rows = {measure: found.measure(fill, measure) for measure in IN_HOLE}
        known = {measure: row.gain_interval for measure, row in rows.items() if row and row.gain_interval}
        if known:
            better = [IN_HOLE[measure].removesuffix(", dB") for measure, (low, _) in known.items() if low > 0]
            worse = [IN_HOLE[measure].removesuffix(", dB") for measure, (_, high) in known.items() if high < 0]
            told.append(f"against {label}: better in {_listed(better)}, worse in {_listed(worse)}")
    return (
        f"{one.name}, inside the holes of {drawn.num_images} repaired frames of {drawn.num_subjects} subjects (95 % "
        f"intervals without zero, uncorrected), {'; '.join(told) or 'no simple fill to compare with'}."
    )


def _listed(labels: list[str]) -> str:
    return joined(labels) if labels else "nothing"


def completion_limits(comparison: Comparison) -> Iterator[str]:
    """What the figures of whole images do not show of repaired frames."""
    for one in comparison.sets:
        if one.completion is None:
            continue
        whole = one.completion.num_whole_images
        mixed = (
            f" and {whole} whole images together (draw the two in sets of their own to tell them apart)"
            if whole
            else ""
        )
        yield (
            f"{one.name}: {one.completion.num_images} images are repaired frames, {100 * one.completion.share:.0f} % "
            "of each drawn on average and the rest the real frame itself. Agreement with masks, biomarkers, distances, "
            "whole-image SSIM, downstream tasks and what the gate searches are of those whole images"
            f"{mixed}: what is good about them may be the real pixels. Only “Inside the holes” is about the model."
        )
