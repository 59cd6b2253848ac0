"""What the backward pass computes again changes its time and memory, and not one bit of a result."""

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode

from ccmdist.adapters.frozen import freeze_linears
from ccmdist.adapters.injection import inject, row_squares_of
from ccmdist.config.train import LoRASettings, WDLoRASettings
from ccmdist.models import mmdit
from ccmdist.train.recompute import set_recompute

SETTINGS = {
    "wdlora": WDLoRASettings(lora_rank=4),
    "lora": LoRASettings(lora_rank=4),
    "attention": WDLoRASettings(lora_rank=4, targets=("attn",)),
}


class Counted(TorchDispatchMode):
    """Counts products of matrices and calls of attention kernels."""

    def __init__(self):
        super().__init__()
        self.products = self.attentions = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.products += name.startswith(("aten.addmm.", "aten.mm."))
        self.attentions += "attention" in name and "backward" not in name
        return function(*args, **(kwargs or {}))


def made(settings, dtype):
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(num_layers=2, num_attention_heads=1, joint_attention_dim=64)
    model = model.to(dtype).requires_grad_(False)
    names = mmdit.linear_names(model, settings.targets)
    adapted = inject(model, names, settings, row_squares_of(model, names), seed=0)
    with torch.no_grad():
        for parameter in adapted.parameters.values():
            parameter.add_(0.01 * torch.randn_like(parameter))
    freeze_linears(model)
    return model.train(), adapted


def loss_and_gradients(settings, dtype, how):
    model, adapted = made(settings, dtype)
    set_recompute(model, how)
    latents = torch.randn(2, 1, 16, 64, dtype=dtype)
    prompt = torch.randn(1, 5, 64, dtype=dtype)
    loss = (
        mmdit.velocity(model, latents[0], latents[1], prompt, torch.tensor([0.5]), (4, 4), (4, 4))
        .float()
        .square()
        .mean()
    )
    with Counted() as counted:
        loss.backward()
    return loss, {name: parameter.grad for name, parameter in adapted.parameters.items()}, counted


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_the_same_bit_for_bit(kind, dtype):
    loss, gradients, _ = loss_and_gradients(SETTINGS[kind], dtype, "none")
    for how in ("selective", "full"):
        again, others, _ = loss_and_gradients(SETTINGS[kind], dtype, how)
        assert torch.equal(again, loss)
        for name, gradient in gradients.items():
            assert torch.equal(others[name], gradient), name


def test_selective_computes_neither_products_nor_attention_again():
    counts = {
        how: loss_and_gradients(SETTINGS["wdlora"], torch.float32, how)[2] for how in ("none", "selective", "full")
    }
    assert [counts[how].attentions for how in ("none", "selective", "full")] == [0, 0, 2]
    assert counts["selective"].products == counts["none"].products < counts["full"].products
