"""In which form the base model draws: as it is, or in 4 bits where a card cannot hold it."""

from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from ccmdist.adapters.merge import merge_into
from ccmdist.adapters.state import AdapterState
from ccmdist.cluster.device import is_gpu_usable
from ccmdist.config.data import PX_PER_TOKEN
from ccmdist.diffusion import flow
from ccmdist.errors import RunError
from ccmdist.models import quantized
from ccmdist.models.backbones.choice import backbone_of
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.modulation_table import is_tabled, levels
from ccmdist.models.tabulation import table_for
from ccmdist.precompute.fill import DTYPES
from ccmdist.synthesis.plan import NF4, Base, PlanSettings

HEADROOM_BYTES: Final = 4 << 30
"""Left for activations, the table of modulation, the VAE and CUDA itself: an estimate for batches of 8 at 384 px, not
measured on a card."""
GIB: Final = 1 << 30


def base_for_card(model: ModelFolder, dtype: str, adapter: AdapterState | None = None) -> Base:
    """The form for this process's card: the base as it is, in ``dtype``, where it fits beside the head-room; else NF4.

    Without a card, that is on a CPU, the base as it is.
    """
    as_it_is: Base = "bf16" if dtype == "bf16" else "fp32"
    if not model.layout.can_quantize:
        return as_it_is
    return as_it_is if _shortage(model, as_it_is, dtype, adapter) is None else NF4


def refuse_small_card(folder: Path, model: ModelFolder, settings: PlanSettings, adapter: AdapterState | None) -> None:
    """Check that this process's card can hold the base of the set in ``folder``.

    Raises:
        RunError: If it cannot; with both sizes.
    """
    if shortage := _shortage(model, settings.base, settings.dtype, adapter):
        is_nf4_left = settings.base != NF4 and model.layout.can_quantize
        others = ", or draw another set, in another out, with base=nf4" if is_nf4_left else ""
        raise RunError(f"{folder}: {shortage}", f"run it on cards with more memory{others}")


def noise_levels(model: ModelFolder, settings: PlanSettings) -> Tensor:
    """The sampler's noise levels, from 1 down to 0."""
    noise_schedule = model.noise_schedule()
    shift = flow.resolution_shift((settings.image_size_px // PX_PER_TOKEN) ** 2, noise_schedule)
    return flow.sampling_sigmas(settings.denoise_steps, shift, noise_schedule)


def load(model: ModelFolder, settings: PlanSettings, adapter: AdapterState | None, device: torch.device) -> nn.Module:
    """The transformer on a device, the adapter merged, in the form that the plan asks for.

    For NF4 each process needs the host memory of the base in the plan's dtype while it loads: the adapter is merged
    before anything is rounded to 4 bits. Modulation, where it is tabulated, is not.
    """
    in_nf4 = settings.base == NF4
    dtype = DTYPES[settings.dtype]
    backbone, table = backbone_of(model), None
    if backbone.can_tabulate and is_tabulated(settings.base, adapter):
        sigmas = noise_levels(model, settings)
        table = table_for(model, sigmas, dtype, settings.batch_size, device, settings.base_digest)
        table = table.only(levels(sigmas, dtype))  # of a converted model it may be too large for the device
    built = backbone.build(dtype, None, device="cpu" if in_nf4 else device, table=table)
    if adapter is not None:
        merge_into(built, adapter)
    return quantized.quantize_blocks(built, device) if in_nf4 else built


def is_tabulated(base: Base, adapter: AdapterState | None) -> bool:
    """Whether a set is drawn with a table in place of the modulation layers: the plan and its adapter decide it.

    In bf16 the images are the same. In fp32 a table of another batch size changes the last bit, and the last batch of
    a set may be smaller than the others, so there the layers stay.
    """
    return base != "fp32" and (adapter is None or not any(map(is_tabled, adapter.tensors)))


def _shortage(model: ModelFolder, base: Base, dtype: str, adapter: AdapterState | None) -> str | None:
    """What does not fit, in words; None if it does, or if there is no card."""
    if not is_gpu_usable():
        return None
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    backbone = backbone_of(model)
    has_modulation = not (backbone.can_tabulate and is_tabulated(base, adapter))
    needed = quantized.num_bytes(model, DTYPES[dtype], in_nf4=base == NF4, has_modulation=has_modulation)
    if needed + HEADROOM_BYTES <= card.total_memory:
        return None
    return (
        f"the base in {base} has {needed / GIB:.1f} GiB and needs {HEADROOM_BYTES / GIB:.1f} GiB beside it, "
        f"{card.name} has {card.total_memory / GIB:.1f} GiB"
    )
