"""Synthetic sets as the gate may meet them: independent phantoms, and copies of training frames in every disguise."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, rotate, shift

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.config.data import PhantomShardsConfig
from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.config.loading import load
from ccmdist.data.manifest import Manifest
from ccmdist.data.phantom_shards import sample, write_phantom_set
from ccmdist.data.reader import read_split
from ccmdist.data.triple import Triple
from ccmdist.data.writer import write_set
from ccmdist.evaluation.memorisation.gate import GateVerdict, verdict_of
from ccmdist.evaluation.sets import open_sets

Frame = NDArray[Any]


def _noise(frame: Frame, sd: float) -> Frame:
    return frame + np.random.default_rng(int(frame.sum())).normal(0, sd, frame.shape)


def _turned(frame: Frame, deg: float) -> Frame:
    return rotate(frame, deg, reshape=False, order=1, mode="reflect")


def _moved(frame: Frame, fraction: float) -> Frame:
    by = fraction * len(frame)
    return shift(frame, (by, -by), order=1, mode="reflect")


DISGUISES: dict[str, Callable[[Frame], Frame]] = {
    "verbatim": lambda frame: frame,
    "flipped left to right": lambda frame: frame[:, ::-1],
    "flipped upside down": lambda frame: frame[::-1],
    "turned by 180 deg": lambda frame: frame[::-1, ::-1],
    "brightened": lambda frame: 1.3 * frame + 25,
    "darkened": lambda frame: 0.6 * frame,
    "noisy (SD 12)": lambda frame: _noise(frame, 12),
    "noisy (SD 20)": lambda frame: _noise(frame, 20),
    "blurred (1.5 px)": lambda frame: gaussian_filter(frame, 1.5),
    "turned by 4 deg": lambda frame: _turned(frame, 4),
    "shifted by 6 %": lambda frame: _moved(frame, 0.06),
    "flipped, turned, shifted, blurred, dimmed, noisy": lambda frame: _noise(
        0.8 * gaussian_filter(_moved(_turned(frame[:, ::-1], 3.5), 0.04), 0.8) + 20, 10
    ),
}
"""By name; frames are grey, as floats from 0 to 255."""


def real_set(folder: Path, subjects_per_group: int, size_px: int, seed: int) -> Manifest:
    """Phantoms of a train, a val and a test split, two frames of each subject."""
    settings = {"subjects_per_group": subjects_per_group, "frames_per_subject": 2, "size_px": size_px, "seed": seed}
    return write_phantom_set(PhantomShardsConfig(out=folder, **settings))


def stranger(seed: int, number: int, size_px: int) -> Triple:
    """A phantom of a subject that no other set has."""
    group = CLINICAL_GROUPS[number // 2 % len(CLINICAL_GROUPS)]
    phantom = sample(seed, group, number // 2, number % 2, size_px)
    meta = replace(phantom.meta, subject=f"stranger-{seed}-{number // 2:04d}")
    return replace(phantom, key=f"stranger-{seed}-{number:04d}", meta=meta)


def training_frames(folder: Path) -> list[Triple]:
    """The train split."""
    return list(read_split(folder, "train"))


def drawn(triple: Triple, key: str, image: Frame | None = None) -> Triple:
    """A sample that says of itself that a model drew it."""
    about = dict.fromkeys(("seed", "denoise_steps", "guidance_scale"), 0) | {
        "source_key": triple.key,
        "source_set_digest": "d" * 64,
        "adapter_digest": "a" * 64,
        "base_digest": "b" * 64,
    }
    pixels = triple.image if image is None else np.clip(image, 0, 255).round().astype(np.uint8)
    meta = replace(triple.meta, source="synthetic", labels={}, provenance=about)
    return replace(triple, key=key, image=np.ascontiguousarray(pixels), meta=meta)


def copies(frames: Iterable[Triple], disguise: str, seed: int, size_px: int) -> dict[str, Triple]:
    """Copies of training frames by the key of what they copy, with masks of strangers, as if drawn from those."""
    change = DISGUISES[disguise]
    return {
        frame.key: drawn(
            replace(stranger(seed, number, size_px), image=frame.image), f"copy-{number:04d}", change(frame.image * 1.0)
        )
        for number, frame in enumerate(frames)
    }


def write_synthetic(folder: Path, triples: Iterable[Triple], real: Manifest) -> Manifest:
    """A set that says that its generator was trained on the train split of a real set."""
    subjects = sorted({subject for shard in real.of_split("train") for subject in shard.subjects})
    training = {"set_digest": real.digest, "split": "train", "subjects": subjects}
    return write_set(folder, "synthetic", (("test", triple) for triple in triples), 256, {"training": training})


def judged(real: Path, synthetic: Path, out: Path, *more: str) -> GateVerdict:
    """The gate's verdict."""
    overrides = [f"real={real}", f"synthetic.one={synthetic}", f"out={out}", "num_bootstrap=200", *more]
    sets = open_sets(load(EvaluateConfig, [], overrides))
    verdict = verdict_of(sets, sets.synthetic[0], num_repaired=0)
    assert verdict is not None, "the settings want a gate"
    return verdict
