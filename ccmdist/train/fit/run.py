"""The whole fit: VAE, then MMDiT, each written when it is done, with what was reached in ``fit.json``.

On one thread, so that the same versions of the libraries give the same bytes on machines with any number of cores.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, cast

import torch
from diffusers.configuration_utils import ConfigMixin

from ccmdist.commit import commit_json
from ccmdist.console import log
from ccmdist.errors import ModelError
from ccmdist.models.encoders import LatentCodec, PromptEncoder
from ccmdist.models.make import parts_of, write_parts
from ccmdist.models.model_folder import WEIGHT_FILES, ModelFolder
from ccmdist.models.sizes import SIZES
from ccmdist.train.fit.mmdit import MmditFit, encoded, fit_mmdit, held_out_losses
from ccmdist.train.fit.phantoms import fit_frames, held_out_frames
from ccmdist.train.fit.vae import VaeFit, correlation, fit_vae

NUM_THREADS: Final = 1
LIBRARIES: Final = ("torch", "diffusers", "transformers", "numpy", "scipy", "pillow")
RECORD: Final = "fit.json"


@dataclass(frozen=True)
class FitSettings:
    """Lengths of both fits, and of their trial."""

    vae: VaeFit
    mmdit: MmditFit
    num_held_out: int
    """Frames by which both are judged."""


FULL: Final = FitSettings(VaeFit(), MmditFit(), num_held_out=96)
QUICK: Final = FitSettings(
    VaeFit(num_frames=6, num_steps=4, num_decoder_steps=3, crops_per_step=4),
    MmditFit(num_frames=6, num_steps=4, batch_size=4),
    num_held_out=3,
)
"""A few steps, to see that it runs; the weights are of no use."""


def fit(out: Path, encoder_folder: ModelFolder, seed: int, settings: FitSettings) -> None:
    """Write ``out/vae``, ``out/transformer`` and ``out/fit.json``; when interrupted, the same call goes on.

    Args:
        out: Folder, new or of the same fit.
        encoder_folder: Whose text encoder the MMDiT is to go with.
        seed: Of everything.
        settings: Lengths.

    Raises:
        ModelError: If ``out`` holds another fit.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    try:
        record = _record_of(out, seed, settings)
        if "vae" not in record:
            record["vae"] = _timed(lambda: _fit_vae(out / "vae", seed, settings))
            commit_json(out / RECORD, record)
        if "transformer" not in record:
            record["transformer"] = _timed(lambda: _fit_mmdit(out, encoder_folder, seed, settings))
            commit_json(out / RECORD, record)
    finally:
        torch.set_num_threads(num_threads)
    log.info("%s: fitted; VAE %s, transformer %s", out, record["vae"], record["transformer"])


def write_component(folder: Path, component: str, model: torch.nn.Module) -> None:
    """Write a fitted model as bf16 files of the tiny size, with its config."""
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    names = parts_of({name: tensor.shape for name, tensor in tensors.items()}, SIZES["tiny"].bytes_per_file)
    parts = ({name: tensors[name] for name in part} for part in names)
    write_parts(folder, WEIGHT_FILES[component], parts, len(names))
    commit_json(folder / "config.json", json.loads(cast(ConfigMixin, model).to_json_string()))


def _record_of(out: Path, seed: int, settings: FitSettings) -> dict[str, Any]:
    wanted = {
        "seed": seed,
        "settings": asdict(settings),
        "num_threads": NUM_THREADS,
        "versions": {library: version(library) for library in LIBRARIES},
    }
    if not (out / RECORD).exists():
        return wanted
    found = json.loads((out / RECORD).read_text())
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ModelError(
                f"{out / RECORD}: is of another fit, with {name} {found.get(name)} instead of {value}",
                "choose another folder",
            )
    return found


def _timed(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    started = time.monotonic()
    return part() | {"minutes": round((time.monotonic() - started) / 60, 1)}


def _fit_vae(folder: Path, seed: int, settings: FitSettings) -> dict[str, Any]:
    vae = fit_vae(fit_frames(settings.vae.num_frames, seed), settings.vae, seed)
    write_component(folder, "vae", vae)
    return vae_figures(LatentCodec(vae), settings.num_held_out)


def vae_figures(codec: LatentCodec, num_held_out: int) -> dict[str, Any]:
    """Pearson's r of held-out frames and of their masks with their reconstructions."""
    held_out = held_out_frames(num_held_out)
    found = {"images": correlation(codec, held_out.images), "masks": correlation(codec, held_out.nerve_masks)}
    return {
        f"r_of_{name}": {"all_pixels": round(r, 4), "median_of_frames": round(m, 4)} for name, (r, m) in found.items()
    }


def _fit_mmdit(out: Path, encoder_folder: ModelFolder, seed: int, settings: FitSettings) -> dict[str, Any]:
    codec = LatentCodec.load(ModelFolder(out, encoder_folder.version), torch.float32, "cpu")
    encoder = PromptEncoder.load(encoder_folder, torch.float32, "cpu")
    samples = encoded(fit_frames(settings.mmdit.num_frames, seed), codec, encoder, seed)
    model = fit_mmdit(samples, settings.mmdit, seed)
    write_component(out / "transformer", "transformer", model)
    return held_out_losses(model, encoded(held_out_frames(settings.num_held_out), codec, encoder, seed))
