"""The verdict on a synthetic set: may it be released. What cannot be judged is withheld."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import pandas as pd

from ccmdist.commit import digest_of
from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.data.trained_on import subjects_trained_on, why_unknown
from ccmdist.evaluation.left_out import LeftOut
from ccmdist.evaluation.memorisation.chance import HIGHEST_COPY_LIMIT, ShareTest, copy_limit, share_test
from ccmdist.evaluation.memorisation.figures import (
    DuplicateRate,
    Membership,
    authentic,
    copying_statistic,
    duplicate_rates,
    membership,
)
from ccmdist.evaluation.memorisation.likeness import LIKENESS_VERSION
from ccmdist.evaluation.memorisation.search import Duplicates, Neighbour, Searching, searching_of
from ccmdist.evaluation.sets import ImageSet, OpenedSets

NUM_SHOWN: Final = 6
NUM_NAMED: Final = 5
BIN_EDGES: Final = tuple(round(-0.1 + 0.02 * step, 2) for step in range(56))
"""Of the histograms of NCC."""
C_T_LIMIT: Final = -3.0
"""Below it C_T is a concern: three SD."""
P_OF_CONCERN: Final = 0.05
"""Of near images, below which it is said that a set, though it passes, has more than one in twenty sets would."""


@dataclass(frozen=True)
class Nearness:
    """How near the images of one kind come to training frames."""

    num_images: int
    num_subjects: int
    median_ncc: float
    highest_ncc: float
    histogram: tuple[int, ...]
    """Images in each bin of BIN_EDGES."""
    authentic_share: float
    """Of images that are farther from their training frame than that is from the next one."""


@dataclass(frozen=True)
class GateFigures:
    """What the verdict rests on, and what else is told."""

    synthetic: Nearness
    held_out: Nearness
    num_training_images: int
    num_training_subjects: int
    copy_limit: float
    share: ShareTest
    copies: tuple[Neighbour, ...]
    """Every image that is a copy of a training frame, the nearest first."""
    closest: tuple[Neighbour, ...]
    """The nearest pairs, copies or not, for people to look at."""
    c_t: float | None
    membership: Membership | None
    duplicates: tuple[DuplicateRate, ...]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True)
class GateVerdict:
    """Pass or withhold, and why."""

    passed: bool
    reasons: tuple[str, ...]
    """Why the set is withheld; none if it passed."""
    concerns: tuple[str, ...]
    """What does not decide, and is to be looked at."""
    set_digest: str
    """Of the synthetic set's manifest: the verdict is on this very set."""
    training_digest: str | None
    """Of the training frames that were searched; None if there are none."""
    likeness: str
    """Version of the measure."""
    nerves_blanked: bool
    """Whether frames were compared without their nerves, as images may share masks with training frames."""
    num_training_masks: int
    """Images drawn from the nerve mask of a training subject."""
    figures: GateFigures | None
    """None if the set could not be judged."""


def verdict_of(sets: OpenedSets, one: ImageSet, num_repaired: int) -> GateVerdict | None:
    """The verdict on one synthetic set; None if the settings want no gate.

    Args:
        sets: What is compared.
        one: The set.
        num_repaired: Of its images, those that are frames with a filled hole.

    Raises:
        EvaluationError: If a frame cannot be compared.
        ShardError: If a shard is damaged.
    """
    if sets.config.memorisation is None:
        return None
    searching = searching_of(sets)
    reasons = [*_real_pixels(one, num_repaired), *_cannot_be_judged(sets, one, searching)]
    figures, concerns, num_masks = None, [], 0
    if searching is not None and searching.held_out:
        rows = [row for entry in one.shards for row in searching.neighbours(one, entry)]
        trained = (_trained_on(sets, one) or frozenset()) | searching.training.subjects
        num_masks = sum(row.has_training_mask or row.subject in trained for row in rows)
        reasons += _training_masks(num_masks, len(rows), sets.config)
        figures = _figures(sets, one, searching, rows)
        reasons += _found(figures, sets.config)
        concerns = [*_concerns(figures, num_masks), *_people(sets, one)]
    return GateVerdict(
        passed=not reasons,
        reasons=tuple(reasons),
        concerns=tuple(concerns),
        set_digest=one.manifest.digest,
        training_digest=digest_of([shard.sha256 for shard in searching.training.shards]) if searching else None,
        likeness=LIKENESS_VERSION,
        nerves_blanked=sets.config.memorisation.allow_training_masks,
        num_training_masks=num_masks,
        figures=figures,
    )


def _trained_on(sets: OpenedSets, one: ImageSet) -> frozenset[str] | None:
    return subjects_trained_on(one.manifest, [sets.real.manifest])


def _cannot_be_judged(sets: OpenedSets, one: ImageSet, searching: Searching | None) -> Iterator[str]:
    """Why no search can tell whether the set copies what its generator was trained on."""
    if searching is None:
        yield "it cannot be judged: the real set has no train split to compare it with"
        return
    if len(one.shards) < len(one.manifest.shards):
        yield f"it cannot be judged: only its split {one.split} was compared, and it has others"
    minimum = sets.config.minimum.memorisation_held_out_images
    num_held_out = sum(entry.num_samples for split in searching.held_out for entry in split.shards)
    if num_held_out < minimum:
        yield (
            f"it cannot be judged: {num_held_out} real images of subjects outside of training, at least {minimum} "
            "are needed to know how near images come by chance"
        )
    trained = _trained_on(sets, one)
    if trained is None:
        yield f"it cannot be judged: it {why_unknown(one.manifest)}"
        return
    if missing := trained - searching.training.subjects:
        yield (
            f"it cannot be judged: its generator was trained on {len(missing)} subjects that are not in the train "
            "split of the real set"
        )


def _real_pixels(one: ImageSet, num_repaired: int) -> Iterator[str]:
    """Nothing that a search finds can make up for it: such an image is not near to a frame, it is one."""
    if num_repaired:
        yield (
            f"{num_repaired} of {sum(entry.num_samples for entry in one.shards)} images contain real pixels of "
            "subjects: they are frames of which a hole was filled, and outside of it they are the frame itself"
        )


def _training_masks(num_masks: int, num_images: int, config: EvaluateConfig) -> Iterator[str]:
    if num_masks and config.memorisation and not config.memorisation.allow_training_masks:
        yield (
            f"{num_masks} of {num_images} images were drawn from nerve masks of training subjects; a nerve map is "
            "personal itself, and the image of one is near its frame whether it is copied or not"
        )


def _figures(sets: OpenedSets, one: ImageSet, searching: Searching, rows: list[Neighbour]) -> GateFigures:
    config = sets.config
    assert config.memorisation is not None, "there is a gate"
    spacing = searching.spacing()
    synthetic = _table(rows, spacing)
    others = [row for part in searching.held_out for entry in part.shards for row in searching.neighbours(part, entry)]
    held_out = _table(others, spacing)
    limit = copy_limit(held_out, len(synthetic), config.memorisation.alpha)
    ordered = sorted(rows, key=lambda row: (-row.ncc, row.key))
    member, left_out = _membership(config, searching.nearest_likeness(one), set(synthetic["subject"]), one.name)
    return GateFigures(
        synthetic=_nearness(synthetic),
        held_out=_nearness(held_out),
        num_training_images=len(spacing),
        num_training_subjects=len(searching.training.subjects),
        copy_limit=limit,
        share=share_test(held_out, synthetic, config.memorisation.false_alarm_rate),
        copies=tuple(row for row in ordered if row.ncc >= limit),
        closest=tuple(ordered[:NUM_SHOWN]),
        c_t=copying_statistic(*(table[name].to_numpy() for table in (synthetic, held_out) for name in DISTANCES)),
        membership=member,
        duplicates=duplicate_rates(Duplicates(sets, one).table()),
        left_out=tuple(left_out),
    )


DISTANCES: Final = ("distance", "cell")


def _table(rows: list[Neighbour], spacing: pd.DataFrame) -> pd.DataFrame:
    """A row per image, with the spacing and the cell of the training frame that is nearest at the coarse look."""
    table = pd.DataFrame([asdict(row) for row in rows])
    nearest = spacing.loc[table["coarse_key"]]
    return table.assign(spacing=nearest["distance"].to_numpy(), cell=nearest["cell"].to_numpy())


def _nearness(table: pd.DataFrame) -> Nearness:
    counts, _ = np.histogram(table["ncc"].clip(BIN_EDGES[0], BIN_EDGES[-1]), BIN_EDGES)
    return Nearness(
        num_images=len(table),
        num_subjects=int(table["subject"].nunique()),
        median_ncc=float(table["ncc"].median()),
        highest_ncc=float(table["ncc"].max()),
        histogram=tuple(int(count) for count in counts),
        authentic_share=float(authentic(table["distance"].to_numpy(), table["spacing"].to_numpy()).mean()),
    )


def _membership(
    config: EvaluateConfig, likeness: pd.DataFrame, mask_subjects: set[Any], name: str
) -> tuple[Membership | None, list[LeftOut]]:
    # Images are near the frames whose masks they were drawn from, and that says nothing on training.
    free = likeness[~likeness["subject"].isin(mask_subjects)]
    counts = free.groupby("is_training")["subject"].nunique()
    num_training, num_held_out = int(counts.get(True, 0)), int(counts.get(False, 0))
    minimum = config.minimum.membership_subjects
    if min(num_training, num_held_out) < minimum:
        reason = (
            f"{num_training} training and {num_held_out} held-out subjects whose masks were not drawn from, at least "
            f"{minimum} each are needed"
        )
        return None, [LeftOut("membership test", reason)]
    rng = np.random.default_rng([config.seed, *name.encode()])
    return membership(free, config.num_bootstrap, rng), []


def _found(figures: GateFigures, config: EvaluateConfig) -> Iterator[str]:
    """What the search has found against the set."""
    assert config.memorisation is not None, "there is a gate"
    alpha, share = config.memorisation.alpha, figures.share
    if figures.held_out.highest_ncc >= min(figures.copy_limit, HIGHEST_COPY_LIMIT):
        yield (
            f"it cannot be judged: a held-out frame is as near to a training frame as a copy (NCC "
            f"{figures.held_out.highest_ncc:.2f}): one person is in two splits, or frames show too little to tell"
        )
    if figures.copies:
        names = ", ".join(row.key for row in figures.copies[:NUM_NAMED])
        more = ", ..." if len(figures.copies) > NUM_NAMED else ""
        verb = "images are copies" if len(figures.copies) > 1 else "image is a copy"
        yield (
            f"{len(figures.copies)} {verb} of training frames, NCC {figures.copy_limit:.2f} or more after "
            f"registration: {names}{more}"
        )
    if share.p < alpha:
        yield (
            f"{share.num_near_images} of {figures.synthetic.num_images} images come nearer to a training frame than "
            f"held-out frames do (NCC above {share.limit:.2f}); {100 * share.expected_share:.1f} % would by chance "
            f"(p = {share.p:.1g})"
        )
    if share.lowest_p >= alpha:
        yield (
            f"it cannot be judged: with {share.num_subjects} synthetic and {figures.held_out.num_subjects} held-out "
            f"subjects no share of near images would be significant at {alpha:g}"
        )


def _concerns(figures: GateFigures, num_masks: int) -> Iterator[str]:
    """What does not decide, and is to be looked at."""
    if num_masks:
        yield (
            f"{num_masks} images have nerve masks of training subjects, whose nerves they show by design; frames were "
            "compared without nerves, so only what lies between them was searched for copies"
        )
    if figures.share.p < P_OF_CONCERN:
        yield (
            f"{figures.share.num_near_images} of {figures.synthetic.num_images} images come nearer to a training frame "
            f"than held-out frames do (NCC above {figures.share.limit:.2f}, p = {figures.share.p:.1g})"
        )
    if figures.c_t is not None and figures.c_t < C_T_LIMIT:
        yield f"images lie nearer to training frames than held-out frames do as a whole (C_T = {figures.c_t:.1f})"
    if figures.membership is not None and figures.membership.interval[0] > 0.5:
        yield (
            "training subjects are nearer to the set than held-out ones are: whether a subject was trained on can be "
            f"told with AUC {figures.membership.auc:.2f}"
        )
    num_images = sum(rate.num_images for rate in figures.duplicates)
    if num_duplicates := sum(rate.num_duplicates for rate in figures.duplicates):
        yield f"{num_duplicates} of {num_images} images show what another image of the set shows"


def _people(sets: OpenedSets, one: ImageSet) -> Iterator[str]:
    real = frozenset(subject for entry in sets.real.manifest.shards for subject in entry.subjects)
    if sets.real.manifest.kind == "real" and (num := len(one.subjects & real)):
        yield f"the nerve masks are those of {num} people of the real set, and a nerve map is personal"
