"""The same adapter as a file for ComfyUI's LoRA loader.

Source: ComfyUI's comfy/lora.py, comfy/weight_adapter/lora.py and base.py (checked in August 2026).

* Its Qwen-Image has the module names of diffusers, behind "diffusion_model.".
* A `dora_scale` of shape (out, 1) is divided by ||W|| + eps of each row, not by ||W + s B A|| as in the paper and in
  PEFT: ComfyUI computes  dora_scale (W + s B A) / (||W|| + eps).  So the file holds m (||W|| + eps) / ||W + s B A||,
  with which that is W' exactly, at strength 1. Should ComfyUI ever divide by ||W + s B A|| (its pull request 15458
  would), these files would be off by that ratio: ``dora_scale_divisor`` in the metadata tells which is meant.
* A `dora_scale` of shape (out,) would be broadcast along the wrong axis.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from ccmdist.adapters.state import AdapterState
from ccmdist.adapters.wdlora import RowState
from ccmdist.commit import committed_file

COMFYUI_FILE: Final = "comfyui.safetensors"
PREFIX: Final = "diffusion_model."
EPS: Final = torch.finfo(torch.float32).eps


def write_comfyui(folder: Path, state: AdapterState, rows: Mapping[str, RowState]) -> None:
    """Write ``comfyui.safetensors`` to the folder of an adapter.

    Args:
        folder: Where to.
        state: The adapter.
        rows: For WDLoRA, name of linear -> what its norms are on the base.
    """
    metadata = {"format": "pt", "dora_scale_divisor": "norm of the base weight", **state.facts}
    with committed_file(folder / COMFYUI_FILE) as temporary:
        save_file(comfyui_tensors(state, rows), temporary, metadata=metadata)


def comfyui_tensors(state: AdapterState, rows: Mapping[str, RowState]) -> dict[str, Tensor]:
    """All tensors under ComfyUI's names; arguments as of :func:`write_comfyui`."""
    found: dict[str, Tensor] = {}
    for name, tensors in state.tensors.items():
        key = PREFIX + name
        found[f"{key}.lora_down.weight"] = tensors["lora_A"].contiguous()
        found[f"{key}.lora_up.weight"] = tensors["lora_B"].contiguous()
        found[f"{key}.alpha"] = torch.tensor(state.settings.alpha_of(len(tensors["lora_A"])))
        if "magnitude" in tensors:
            base_norm = rows[name].base_squares.sqrt()
            found[f"{key}.dora_scale"] = (rows[name].gain * (base_norm + EPS)).float()[:, None].contiguous()
    return found
