"""Plain LoRA: its start, its formula, and PEFT's."""

import pytest
import torch
from torch import nn

from ccmdist.adapters.lora import LoRALinear
from ccmdist.config.train import LoRASettings, WDLoRASettings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_as_its_base_bit_for_bit(dtype):
    torch.manual_seed(0)
    base, x = nn.Linear(48, 80, dtype=dtype), torch.randn(3, 48, dtype=dtype)
    assert torch.equal(LoRALinear(base, 4, 0.5, "layer", seed=0)(x), base(x))


def test_output_and_gradients_equal_those_of_the_lora_of_peft():
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(24, 40, dtype=torch.float64)})
    ours = LoRALinear(model["linear"], 4, 0.5, "layer", seed=0)
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["linear"])
    theirs = inject_adapter_in_model(config, model, adapter_name="a")["linear"]
    with torch.no_grad():
        ours.lora_B.normal_()
        theirs.lora_A["a"].weight.copy_(ours.lora_A)
        theirs.lora_B["a"].weight.copy_(ours.lora_B)
    x, dy = torch.randn(6, 24, dtype=torch.float64), torch.randn(6, 40, dtype=torch.float64)
    y_ours, y_theirs = ours(x), theirs(x)
    y_ours.backward(dy)
    y_theirs.backward(dy)
    torch.testing.assert_close(y_ours, y_theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.lora_A.grad, theirs.lora_A["a"].weight.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.lora_B.grad, theirs.lora_B["a"].weight.grad, rtol=1e-12, atol=1e-12)


def test_its_scale_is_alpha_over_the_rank_and_one_by_default():
    assert LoRASettings(lora_rank=4, alpha=6.0).scale == 1.5
    assert WDLoRASettings(lora_rank=4).scale == 1.0
