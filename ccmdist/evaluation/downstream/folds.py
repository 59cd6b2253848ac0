"""Who is trained on, validated on and tested in each fold, and that nothing has seen before whom a fold tests.

Every subject is in one split of a fold. Synthetic images count as their mask's subject, and a set says in its manifest
on whom its generator was trained; a set that does not say is refused. So is a U-Net with which a network begins.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Final

from ccmdist.ccm.groups import ClinicalGroup
from ccmdist.commit import digest_of
from ccmdist.config.data import Split
from ccmdist.config.evaluate import DownstreamSettings, FoldSets
from ccmdist.data.manifest import MANIFEST, Manifest, read_manifest
from ccmdist.data.reader import read_metas
from ccmdist.data.splits import Subject, fold_splits
from ccmdist.data.trained_on import subjects_behind, subjects_trained_on, why_unknown
from ccmdist.errors import EvaluationError
from ccmdist.evaluation.sets import OpenedSets, refuse_undrawn
from ccmdist.models.network_folder import read_about

NUM_REMEMBERED: Final = 64
"""Sets whose samples are listed once per process."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a set, without its pixels."""

    shard: str
    key: str
    subject: str
    """Of a synthetic image: that of its mask."""
    clinical_group: ClinicalGroup | None


@dataclass(frozen=True)
class Source:
    """A shard set, of which all splits may be used."""

    name: str
    folder: Path
    manifest: Manifest

    @property
    def samples(self) -> tuple[Sample, ...]:
        """All of them, shard by shard; read off the headers and fields of the tars."""
        return _samples(self.folder, self.manifest.digest)


@dataclass(frozen=True)
class Fold:
    """One division of the real subjects, and the synthetic sets that may be trained on in it."""

    number: int
    real: Source
    split_of: Mapping[str, Split]
    """By subject."""
    synthetic: Mapping[str, Source]

    @cached_property
    def digest(self) -> str:
        """Identity of who is in which split."""
        return digest_of([self.real.manifest.digest, dict(self.split_of)])

    def subjects(self, split: Split) -> frozenset[str]:
        """The subjects of one split."""
        return frozenset(name for name, found in self.split_of.items() if found == split)

    def samples(self, split: Split) -> list[Sample]:
        """The real images of one split."""
        return [sample for sample in self.real.samples if self.split_of[sample.subject] == split]


def folds_of(sets: OpenedSets, settings: DownstreamSettings) -> list[Fold]:
    """The folds that the settings name, or such over the subjects that no generator was trained on.

    Raises:
        EvaluationError: If a set is missing, does not say whom its generator has seen, or a generator or a pretrained
            U-Net has seen a subject that a fold tests.
        ModelError: If the folder of the U-Net cannot be read.
    """
    folds = _given(settings) if settings.folds else _made(sets, settings)
    known = [sets.real.manifest, *(fold.real.manifest for fold in folds)]
    for fold in folds:
        for source in fold.synthetic.values():
            _refuse_seen(
                fold,
                _seen(source, known),
                f"the generator of {source.name} ({source.folder})",
                "train a generator on the train split of each fold (`ccmdist shards fold`), and draw with that",
            )
        if unet := settings.pretrained_unet:
            remedy = "leave networks.mdf.unet out: the U-Net then begins anew in each fold"
            _refuse_seen(fold, _seen_by_unet(unet, known), f"the U-Net of {unet}", remedy)
    return folds


def _seen(source: Source, known: Sequence[Manifest]) -> frozenset[str]:
    """The subjects on whom the generator of a set was trained.

    Raises:
        EvaluationError: If the set does not say.
    """
    seen = subjects_trained_on(source.manifest, known)
    if seen is None:
        raise EvaluationError(
            f"synthetic.{source.name}: {source.folder} {why_unknown(source.manifest)}, so it may have seen "
            "those who are tested",
            "draw it from the shards that the generator was trained on, or leave the trainings out: downstream=null",
        )
    return seen


def _seen_by_unet(unet: Path, known: Sequence[Manifest]) -> frozenset[str]:
    """The subjects on whom a U-Net was trained that diagnosis begins with.

    Raises:
        EvaluationError: If it was trained on none of the known sets.
    """
    seen = subjects_behind(read_about(unet).facts, known)
    if seen is None:
        raise EvaluationError(
            f"downstream.networks.mdf.unet: {unet} was trained on another set, so it may have seen whom a fold tests",
            "train it on the real set that is given here, or leave it out: the U-Net then begins anew in each fold",
        )
    return seen


def _made(sets: OpenedSets, settings: DownstreamSettings) -> list[Fold]:
    """Folds of the real set; whoever was trained on is trained on in all of them."""
    real = _source("real", sets.real.folder)
    folders = {one.name: one.folder for one in sets.synthetic} | settings.synthetic
    wanted = {arm.name for arm in settings.arms_with(folders)}
    synthetic = {name: _synthetic(name, folder) for name, folder in folders.items() if name in wanted}
    seen = frozenset[str]().union(*(_seen(source, [real.manifest]) for source in synthetic.values()))
    if unet := settings.pretrained_unet:
        seen |= _seen_by_unet(unet, [real.manifest])
    groups = {sample.subject: sample.clinical_group for sample in real.samples}
    counts = Counter(sample.subject for sample in real.samples)
    subjects = {name: Subject(group, counts[name]) for name, group in groups.items()}
    seed, num_folds = sets.config.seed, settings.num_folds
    splits = (fold_splits(subjects, number, num_folds, seed, seen) for number in range(num_folds))
    return [Fold(number, real, split_of, synthetic) for number, split_of in enumerate(splits)]


def _given(settings: DownstreamSettings) -> list[Fold]:
    folds = [_given_fold(number, sets) for number, sets in enumerate(settings.folds)]
    tested_in: dict[str, int] = {}
    for fold in folds:
        for subject in sorted(fold.subjects("test")):
            if (other := tested_in.setdefault(subject, fold.number)) != fold.number:
                raise EvaluationError(
                    f"downstream.folds: subject {subject} is tested in fold {other} and in fold {fold.number}",
                    "make all folds with `ccmdist shards fold`, of one source, num_folds and seed",
                )
    return folds


def _given_fold(number: int, sets: FoldSets) -> Fold:
    real = _source(f"downstream.folds.{number}.real", sets.real)
    if real.manifest.kind == "synthetic":
        raise EvaluationError(
            f"{real.name}: {real.folder} is a synthetic set, expected real frames or phantoms",
            "`ccmdist shards fold` makes one",
        )
    split_of = {subject: shard.split for shard in real.manifest.shards for subject in shard.subjects}
    return Fold(number, real, split_of, {name: _synthetic(name, folder) for name, folder in sets.synthetic.items()})


def _refuse_seen(fold: Fold, seen: frozenset[str], what: str, remedy: str) -> None:
    if both := sorted(fold.subjects("test") & seen):
        raise EvaluationError(
            f"downstream, fold {fold.number}: subject {both[0]} is tested, and {what} was trained on it", remedy
        )


def _synthetic(name: str, folder: Path) -> Source:
    source = _source(name, folder)
    refuse_undrawn(f"synthetic.{name}", folder, source.manifest)
    return source


def _source(name: str, folder: Path) -> Source:
    if not (folder / MANIFEST).is_file():
        raise EvaluationError(
            f"{name}: {folder} holds no shard set (no {MANIFEST})", "`ccmdist shards` and `ccmdist synthesize` make one"
        )
    return Source(name, folder, read_manifest(folder))


@lru_cache(maxsize=NUM_REMEMBERED)
def _samples(folder: Path, digest: str) -> tuple[Sample, ...]:
    return tuple(_read_samples(folder))


def _read_samples(folder: Path) -> Iterator[Sample]:
    for entry in read_manifest(folder).shards:
        for key, meta in read_metas(folder, entry):
            yield Sample(entry.name, key, meta.subject, meta.clinical_group)
