"""Operations are those that torch's FlopCounterMode counts in the real class, to the last one."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ccmdist.adapters.injection import inject, row_squares_of
from ccmdist.config.train import LoRASettings, WDLoRASettings
from ccmdist.models import mmdit
from ccmdist.planner.flops import (
    PLAIN_BACKWARD,
    Tokens,
    forward_flops,
    norm_flops,
    step_flops,
    tokens,
    vision_tokens,
)
from ccmdist.planner.transformer import Transformer
from tests.unit.planner.planned import PUBLISHED, on_meta

TARGETS = ("attn", "mlp")
SMALL = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
SMALL |= {"joint_attention_dim": 24}


def asked(model, of, device):
    """The model's answer for one sample with these tokens."""
    edge, conditions = round(of.target**0.5), of.mask + of.holed
    width = model.config.joint_attention_dim
    dtype = next(model.parameters()).dtype
    shapes = ((1, of.target, 64), (1, conditions, 64), (1, of.text, width), (1,))
    with torch.device(device):
        inputs = [torch.ones(shape, dtype=dtype) for shape in shapes]
        return mmdit.velocity(model, *inputs, (edge, edge), (edge, edge))


def product_flops(_, left, right, **__):
    """Of the product that addmm_ adds in place, given shapes; torch does not count it."""
    return 2 * left[0] * left[1] * right[1]


def counted(run):
    """Operations that torch counts, products in place among them; attention by its plain products."""
    in_place = {torch.ops.aten.addmm_: product_flops}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def small(adapter, version="2509"):
    """A small model on the CPU with an adapter."""
    torch.manual_seed(0)
    model = mmdit.QwenImageTransformer2DModel(**SMALL, zero_cond_t=version == "2511").requires_grad_(False)
    names = mmdit.linear_names(model, TARGETS)
    inject(model, names, adapter, row_squares_of(model, names), 0)
    return model.train()


@pytest.mark.parametrize("size_px", [384, 512, 768, 1024])
@pytest.mark.parametrize("version", ["v1", "2509", "2511"])
def test_a_forward_pass_of_the_real_width_has_exactly_the_planned_operations(version, size_px):
    model, of = on_meta(version, num_layers=2), tokens(size_px, version)
    with torch.no_grad():
        found = counted(lambda: asked(model, of, "meta"))
    assert forward_flops(Transformer.from_config(dict(model.config)), of) == found


@pytest.mark.parametrize("version", ["2509", "2511"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_training_step_of_lora_has_exactly_the_planned_operations(version, recompute):
    adapter = LoRASettings(kind="lora", lora_rank=8)
    model, of = small(adapter, version), Tokens(16, 16, 5)
    if recompute == "full":
        model.enable_gradient_checkpointing()
    found = counted(lambda: asked(model, of, "cpu").sum().backward())
    sizes = Transformer.from_config(dict(model.config))
    flops = step_flops(sizes, of, 8, TARGETS, recompute, attention_backward=PLAIN_BACKWARD)
    assert flops.executed == found


def test_a_training_step_that_fills_a_hole_sees_one_image_more():
    model, of = small(LoRASettings(kind="lora", lora_rank=8)), Tokens(16, 16, 5, holed=16)
    found = counted(lambda: asked(model, of, "cpu").sum().backward())
    sizes = Transformer.from_config(dict(model.config))
    flops = step_flops(sizes, of, 8, TARGETS, "none", attention_backward=PLAIN_BACKWARD)
    assert flops.executed == found
    assert tokens(384, is_holed=True) == Tokens(576, 576, 256, 576)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_training_step_of_wdlora_has_those_and_one_evaluation_of_its_norms(recompute):
    model, of = small(WDLoRASettings(lora_rank=8)), Tokens(16, 16, 5)
    if recompute == "full":
        model.enable_gradient_checkpointing()
    found = counted(lambda: asked(model, of, "cpu").sum().backward())
    sizes = Transformer.from_config(dict(model.config))
    flops = step_flops(sizes, of, 8, TARGETS, recompute, attention_backward=PLAIN_BACKWARD)
    assert flops.executed + norm_flops(sizes, 8, TARGETS) == found


def test_an_adapter_in_the_modulation_is_counted():
    adapter = LoRASettings(kind="lora", lora_rank=4, targets=("img_mod.1", "attn.to_q"))
    torch.manual_seed(0)
    model = mmdit.QwenImageTransformer2DModel(**SMALL, zero_cond_t=True).requires_grad_(False)
    names = mmdit.linear_names(model, adapter.targets)
    inject(model, names, adapter, row_squares_of(model, names), 0)
    of = Tokens(16, 16, 5)
    found = counted(lambda: asked(model, of, "cpu").sum().backward())
    sizes = Transformer.from_config(dict(model.config))
    flops = step_flops(sizes, of, 4, adapter.targets, "none", attention_backward=PLAIN_BACKWARD)
    assert flops.executed == found


def test_a_table_saves_the_modulation_and_the_time_embedding_only():
    of = tokens(384)
    saved = forward_flops(PUBLISHED, of) - forward_flops(PUBLISHED, of, is_tabled=True)
    modulation = 2 * 60 * 2 * 6 * 3072**2
    assert saved == modulation + 2 * (256 * 3072 + 3072**2)


def test_figures_of_the_published_model_at_384_px():
    of = tokens(384)
    assert (of.target, of.mask, of.text, of.total) == (576, 576, 256, 1408)
    flops = step_flops(PUBLISHED, of, 64, TARGETS, "full")
    assert forward_flops(PUBLISHED, of) == pytest.approx(20.6e12, rel=2e-3)
    assert flops.executed == pytest.approx(66.4e12, rel=2e-3)
    assert step_flops(PUBLISHED, of, 64, TARGETS, "selective").executed == flops.model


def test_the_vl_model_sees_the_mask_at_the_size_of_each_version():
    assert [vision_tokens(version) for version in ("v1", "2509", "2511")] == [37**2, 14**2, 14**2]


def test_a_known_length_of_the_text_goes_before_the_assumed_one():
    assert tokens(384, "v1", 77).text == 77
