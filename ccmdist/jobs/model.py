"""Model folders that need no download."""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import torch

from ccmdist.cluster.device import current_device
from ccmdist.config.data import PX_PER_TOKEN
from ccmdist.console import log
from ccmdist.diffusion import flow
from ccmdist.errors import ConfigError, ModelError
from ccmdist.models.backbones.choice import backbone_of
from ccmdist.models.convert import convert_model
from ccmdist.models.make import make_model
from ccmdist.models.make_flux import make_flux
from ccmdist.models.make_kandinsky import make_kandinsky
from ccmdist.models.make_mllm import make_mllm
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.tabulation import LEVELS_AT_ONCE
from ccmdist.precompute.fill import DTYPES
from ccmdist.train.fit.run import FULL, QUICK
from ccmdist.train.fit.run import fit as fit_components

TINY: Final[dict[str, Callable[[Path, int], None]]] = {
    "flux": make_flux,
    "flux_control": partial(make_flux, is_control=True),
    "kandinsky5": make_kandinsky,
}
"""Kinds of backbones besides Qwen-Image-Edit -> what writes a small folder of them."""
TINY_TO_DIAGNOSE: Final[dict[str, Callable[[Path, int], None]]] = {
    kind: partial(make_mllm, kind) for kind in ("mllama", "qwen2_5_vl")
}
"""The same of multimodal language models."""
USUAL_VERSION: Final = "2509"


def make(size: str, version: str | None, out: Path, seed: int, fitted: bool, kind: str = "qwen") -> None:
    """Write a complete checkpoint folder with random or fitted weights.

    Raises:
        ConfigError: If the kind is not known, or there is none of this size or version.
        ModelError: If ``out`` already holds a model.
    """
    if kind not in MAKERS:
        raise ConfigError(f"--kind: {kind!r} is not known", f"use one of {', '.join(MAKERS)}")
    MAKERS[kind](size, version, out, seed, fitted)


def _made_in_all_sizes(size: str, version: str | None, out: Path, seed: int, fitted: bool) -> None:
    make_model(size, version or USUAL_VERSION, out, seed, fitted)


def _made_small(kind: str, size: str, version: str | None, out: Path, seed: int, fitted: bool) -> None:
    if size != "tiny" or version or fitted:
        raise ConfigError(
            f"--kind {kind}: is made in size tiny and one version alone, with random weights",
            "leave out --size, --version and --fitted",
        )
    (TINY | TINY_TO_DIAGNOSE)[kind](out, seed)
    log.info("%s: random model of size tiny, of kind %s", out, kind)


MAKERS: Final[dict[str, Callable[[str, str | None, Path, int, bool], None]]] = {
    "qwen": _made_in_all_sizes,
    **{kind: partial(_made_small, kind) for kind in TINY | TINY_TO_DIAGNOSE},
}
"""Kind of model -> what writes a folder of it: size, version, folder, seed, whether fitted."""


def convert(
    model: Path, out: Path, image_size_px: int, denoise_steps: Sequence[int], dtype: str, micro_batch_size: int
) -> None:
    """Write a folder of the same model with a table of its modulation, for training and for these numbers of steps.

    Raises:
        ConfigError: If the size or the dtype is not one of a run.
        ModelError: If ``model`` is none whose modulation can be tabulated, or ``out`` already holds one.
    """
    if image_size_px % 16 or not 32 <= image_size_px <= 2048:
        raise ConfigError(
            f"--image-size-px: {image_size_px} is not a multiple of 16 from 32 to 2048", "use data.image_size_px"
        )
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: {dtype!r} is not known", f"use {' or '.join(DTYPES)}")
    folder = ModelFolder.open(model)
    if not backbone_of(folder).can_tabulate:
        raise ModelError(
            f"{model}: modulation of {folder.title} depends on the text too, so that there is no table of it",
            "train on the folder as it is",
        )
    noise_schedule = folder.noise_schedule()
    shift = flow.resolution_shift((image_size_px // PX_PER_TOKEN) ** 2, noise_schedule)
    sampling = [flow.sampling_sigmas(steps, shift, noise_schedule) for steps in denoise_steps]
    sigmas = torch.cat([flow.training_sigmas(shift), *sampling])
    # In bf16 a table may be made in another shape than it is used in, and many levels at once take less time.
    samples_at_once = micro_batch_size if dtype == "fp32" else LEVELS_AT_ONCE
    convert_model(folder, out, sigmas, DTYPES[dtype], samples_at_once, current_device())


def fit(out: Path, seed: int, quick: bool) -> None:
    """Fit the tiny VAE and MMDiT on phantoms; ``out`` gets what `model make --fitted` copies.

    The MMDiT learns with the text encoder of the random tiny model of seed 0, which fitted models have too.
    """
    with tempfile.TemporaryDirectory(prefix="ccmdist-") as temporary:
        encoder_folder = Path(temporary) / "tiny"
        make_model("tiny", "2509", encoder_folder)
        fit_components(out, ModelFolder.open(encoder_folder), seed, QUICK if quick else FULL)
