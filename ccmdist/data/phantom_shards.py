"""Shard sets of procedural phantoms: several frames of each subject, split by subject within each clinical group."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ccmdist.ccm.groups import CLINICAL_GROUPS, ClinicalGroup
from ccmdist.ccm.phantom import make_phantom
from ccmdist.ccm.units import UM_PER_PX_HRT3
from ccmdist.config.data import PhantomShardsConfig, Split
from ccmdist.config.loading import resolved
from ccmdist.console import tracked
from ccmdist.data.manifest import SPLITS, Manifest
from ccmdist.data.splits import Subject, assigned_splits
from ccmdist.data.triple import EYES, Triple, TripleMeta, prompt_for
from ccmdist.data.writer import existing_set, write_set


def write_phantom_set(config: PhantomShardsConfig) -> Manifest:
    """Make the set that ``config`` describes, or find it made already. The same settings give the same bytes.

    Raises:
        ShardError: If the folder holds another set.
        ConfigError: If the fractions leave nothing for train.
    """
    about = {"made_by": "ccmdist shards phantom", "settings": _settings(config)}
    if (manifest := existing_set(config.out, about)) is not None:
        return manifest
    frames = list(_frames(config))
    samples = (
        sample(config.seed, *frame, config.size_px, config.with_points)
        for frame in tracked(frames, "phantoms", len(frames))
    )
    splits = phantom_splits(config)
    return write_set(
        config.out,
        "phantom",
        ((splits[triple.meta.subject], triple) for triple in samples),
        config.samples_per_shard,
        about,
    )


def phantom_splits(config: PhantomShardsConfig) -> dict[str, Split]:
    """The split of each subject of the set."""
    subjects = {
        _subject(group, number): Subject(group, config.frames_per_subject)
        for group in CLINICAL_GROUPS
        for number in range(config.subjects_per_group)
    }
    return assigned_splits(subjects, config.val_fraction, config.test_fraction, config.seed)


def describe_phantom_set(config: PhantomShardsConfig) -> str:
    """What the set would hold."""
    counts = Counter(phantom_splits(config).values())
    told = ", ".join(
        f"{split} {num * config.frames_per_subject} of {num} subjects" for split in SPLITS if (num := counts[split])
    )
    return f"{config.out}: {counts.total() * config.frames_per_subject} phantoms of {config.size_px} px; {told}"


def sample(
    seed: int, clinical_group: ClinicalGroup, number: int, frame: int, size_px: int, with_points: bool = False
) -> Triple:
    """One phantom of a set; it depends on the arguments alone, not on how large the set is.

    Args:
        seed: Of the set.
        clinical_group: Of the subject.
        number: Of the subject in its group.
        frame: Of the subject.
        size_px: Edge of the frame.
        with_points: Add the map of points; nothing else changes.
    """
    subject = _subject(clinical_group, number)
    key = f"{subject}-{frame:02d}"
    drawn = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    phantom = make_phantom(clinical_group, int.from_bytes(drawn[:8]), size_px)
    eye = EYES[frame % len(EYES)]
    meta = TripleMeta(
        prompt=prompt_for(clinical_group, eye, {}),
        clinical_group=clinical_group,
        subject=subject,
        eye=eye,
        um_per_px=UM_PER_PX_HRT3,
        source="phantom",
        labels={name: float(value) for name, value in phantom.labels.items()},
    )
    return Triple(key, phantom.image, phantom.nerve_mask, meta, points=phantom.points if with_points else None)


def _frames(config: PhantomShardsConfig) -> Iterator[tuple[ClinicalGroup, int, int]]:
    """Subject by subject, the clinical groups in turn, so that each stretch of a shard holds all of them."""
    for number in range(config.subjects_per_group):
        for group in CLINICAL_GROUPS:
            for frame in range(config.frames_per_subject):
                yield group, number, frame


def _subject(clinical_group: ClinicalGroup, number: int) -> str:
    return f"{clinical_group.lower()}-{number:04d}"


def _settings(config: PhantomShardsConfig) -> dict[str, Any]:
    """As they were written before points could be asked for, where they are not."""
    left_out = {"out"} if config.with_points else {"out", "with_points"}
    return {name: value for name, value in resolved(config).items() if name not in left_out}
