"""The file for ComfyUI, against its formula stated anew."""

import pytest
import torch
from safetensors.torch import load_file

from ccmdist.adapters.comfyui import COMFYUI_FILE, write_comfyui
from ccmdist.adapters.merge import merged_rows
from ccmdist.jobs.adapter import rows_of
from ccmdist.models import mmdit


def as_comfyui_computes(W, file, linear):
    """The weight that ComfyUI's LoRA loader makes at strength 1: scaled rows are divided by the norm of the base."""
    key = f"diffusion_model.{linear}"
    up, down = file.pop(f"{key}.lora_up.weight"), file.pop(f"{key}.lora_down.weight")
    adapted = W + file.pop(f"{key}.alpha").item() / len(down) * up @ down
    if (dora_scale := file.pop(f"{key}.dora_scale", None)) is None:
        return adapted
    assert dora_scale.shape == (len(W), 1), "a scale of shape (out,) is broadcast along the wrong axis"
    return adapted * (dora_scale / (W.norm(dim=1, keepdim=True) + torch.finfo(W.dtype).eps))


@pytest.fixture
def written(tiny, trained, tmp_path):
    write_comfyui(tmp_path, trained, rows_of(trained, tiny))
    return load_file(tmp_path / COMFYUI_FILE)


def test_comfyui_makes_the_weights_that_merging_makes(tiny, trained, written):
    model = mmdit.build(tiny, torch.float32, None)
    for name, tensors in trained.tensors.items():
        W = model.get_submodule(name).weight.detach()
        expected = merged_rows(W, tensors, slice(0, len(W)), trained.scale)
        torch.testing.assert_close(as_comfyui_computes(W, written, name), expected, rtol=1e-5, atol=1e-6)
    assert not written, "every key belongs to a linear"
