"""Sentences of the first pillar: which distances lie beyond their real floor, and what that does not show."""

from collections.abc import Iterable, Iterator

from ccmdist.evaluation.comparison import Comparison, SetReport
from ccmdist.evaluation.fidelity.distances import INCEPTION, METRICS, Distance, label_of
from ccmdist.evaluation.report.formatting import joined, told_once


def fidelity_sentences(comparison: Comparison) -> Iterator[str]:
    """One for the synthetic sets with distances of which the same is to be told."""
    told = ((one.name, _beyond(one)) for one in comparison.sets if one.fidelity.distances)
    return (f"{joined(names)}: {text}" for names, text in told_once(told))


def _beyond(one: SetReport) -> str:
    beyond = [distance for distance in one.fidelity.distances if is_beyond_floor(distance)]
    within = [distance for distance in one.fidelity.distances if not is_beyond_floor(distance)]
    return (
        "further from the real images than these are among themselves (real floor of subject halves, 95th "
        f"percentile) by {_listed(beyond)}; within that floor by {_listed(within)}."
    )


def is_beyond_floor(distance: Distance) -> bool:
    """Whether the mean over halves is worse than 95 % of the splits between real halves."""
    low, high = distance.floor_range
    return distance.of_halves < low if METRICS[distance.metric].higher_is_better else distance.of_halves > high


def _listed(distances: Iterable[Distance]) -> str:
    by_extractor: dict[str, list[str]] = {}
    for one in distances:
        by_extractor.setdefault(one.extractor, []).append(label_of(one.metric, one.extractor))
    told = [f"{', '.join(labels)} (on {extractor})" for extractor, labels in by_extractor.items()]
    return "; ".join(told) if told else "none"


def fidelity_limits(comparison: Comparison) -> Iterator[str]:
    """What the distances and the paired measures do not show."""
    distances = [distance for one in comparison.sets for distance in one.fidelity.distances]
    if distances:
        fewest = min(distance.num_in_half for distance in distances)
        yield (
            f"A distance within its real floor says that {fewest} images a side do not tell the sets apart, not that "
            "they are alike. Distances of other reports compare at equal n, extractor and hash alone."
        )
    if similarity := next(filter(None, (one.fidelity.measure("ssim") for one in comparison.sets)), None):
        yield (
            "A high SSIM, MS-SSIM or PSNR is no realism: it rewards denoising. A real frame against its own blur "
            f"reaches SSIM {similarity.of_blur:.2f}, so the grain and the spectrum have to be read beside it."
        )
    if not any(distance.extractor == INCEPTION for distance in distances):
        yield "No distance here is taken on the published Inception: none is an FID or KID, or compares with one."
