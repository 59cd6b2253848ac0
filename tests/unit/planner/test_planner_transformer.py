"""What is read off a config.json is what the real class has."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccmdist.errors import ConfigError, ModelError
from ccmdist.models import mmdit
from ccmdist.planner import transformer
from ccmdist.planner.transformer import Transformer
from tests.unit.planner.planned import PUBLISHED, on_meta

SMALL = st.fixed_dictionaries(
    {
        "num_layers": st.integers(1, 3),
        "num_attention_heads": st.integers(1, 3),
        "attention_head_dim": st.sampled_from([16, 64]),
        "joint_attention_dim": st.integers(1, 40),
        "in_channels": st.sampled_from([16, 64]),
        "out_channels": st.sampled_from([None, 4, 16]),
        "axes_dims_rope": st.just((4, 6, 6)),
        "zero_cond_t": st.booleans(),
        "use_additional_t_cond": st.booleans(),
    }
)


def counted(module):
    return sum(parameter.numel() for parameter in module.parameters())


@settings(max_examples=15)
@given(SMALL)
def test_parameters_are_counted_as_the_class_has_them(config):
    with mmdit.torch.device("meta"):
        model = mmdit.QwenImageTransformer2DModel(**config)
    sizes = Transformer.from_config(config)
    assert sizes.num_parameters == counted(model)
    modulation = sum(counted(block.img_mod) + counted(block.txt_mod) for block in model.transformer_blocks)
    assert sizes.num_modulation_parameters == modulation
    assert sizes.num_time_parameters == counted(model.time_text_embed)
    assert sizes.num_resident_parameters(True) == counted(model) - modulation - counted(model.time_text_embed)
    assert sizes.num_resident_parameters(False) == counted(model)
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    assert sizes.num_resident_vectors(False) == vectors
    removed = [*(b.img_mod for b in model.transformer_blocks), *(b.txt_mod for b in model.transformer_blocks)]
    removed = [p for module in [*removed, model.time_text_embed] for p in module.parameters() if p.ndim == 1]
    assert sizes.num_resident_vectors(True) == vectors - sum(parameter.numel() for parameter in removed)


def test_the_published_model_has_20_430_401_088_parameters():
    assert PUBLISHED.num_parameters == 20_430_401_088
    assert PUBLISHED.parameters_per_block == 339_831_296
    assert PUBLISHED.width == 3072


@pytest.mark.parametrize("version", ["v1", "2509", "2511"])
def test_a_saved_config_is_understood(version):
    model = on_meta(version, num_layers=1)
    sizes = Transformer.from_config(dict(model.config))
    assert sizes.num_parameters == counted(model)
    assert sizes.is_clean_mask_timed == (version == "2511")


@pytest.mark.parametrize(
    "targets",
    [
        ("attn", "mlp"),
        ("attn",),
        ("mlp",),
        ("attn.to_q", "txt_mlp.net.2"),
        ("img_mod.1",),
        ("to_out.0", "proj"),
        ("1",),
    ],
    ids=" ".join,
)
def test_the_linears_with_an_adapter_are_those_that_training_chooses(targets):
    model = on_meta(num_layers=2, num_attention_heads=1)
    expected = mmdit.linear_names(model, targets)
    sizes = Transformer.from_config(dict(model.config))
    found = {f"transformer_blocks.{index}.{linear.name}": linear for index, linear in sizes.adapted(targets)}
    assert list(found) == expected
    for name, linear in found.items():
        assert (linear.num_out, linear.num_in) == tuple(model.get_submodule(name).weight.shape)


def test_a_target_that_selects_nothing_is_refused_as_in_training():
    model = on_meta(num_layers=1, num_attention_heads=1)
    with pytest.raises(ConfigError) as ours:
        list(Transformer.from_config(dict(model.config)).adapted(("attn.to_x",)))
    with pytest.raises(ConfigError) as trained:
        mmdit.linear_names(model, ("attn.to_x",))
    assert ours.value.remedy == trained.value.remedy
    assert str(ours.value).startswith("adapter.targets: 'attn.to_x' matches none of the linear layers in the blocks")


def test_linears_that_reach_nothing_are_those_of_training():
    assert list(transformer.DEAD_IN_LAST_BLOCK) and set(
        mmdit.dead_in_last_block(on_meta(num_layers=1, num_attention_heads=1))
    ) == set(transformer.DEAD_IN_LAST_BLOCK)


@pytest.mark.parametrize("value", [0, -1, "60", 2.5, True])
def test_a_size_that_is_no_positive_whole_number_is_refused(value):
    with pytest.raises(
        ModelError, match=r"transformer/config.json: num_layers is .*, expected a positive whole number"
    ):
        Transformer.from_config({"num_layers": value})
