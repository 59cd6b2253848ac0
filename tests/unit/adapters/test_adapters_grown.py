"""An adapter whose layers differ in rank: what its file says of each, and that others without growth are as before."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from ccmdist.adapters.state import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterState,
    peft_settings,
    read_adapter,
    write_adapter,
)
from ccmdist.config.train import GrowthSettings, LoRASettings, WDLoRASettings, system_of
from ccmdist.errors import AdapterError

LARGEST = 9
BEFORE_RANKS_GREW = {
    "wdlora": "a4c7afbeeb6d4629b5057912ff880b880799fcf43a23ad66a947a166dcf1585f",
    "lora": "3abe81fd0dd80e8051d4863ec0815ead79b4c9a111faa7df2dab0079266ee91f",
}


def grown(ranks, alpha=None, start_rank=1, of=LoRASettings):
    """An adapter of as many blocks as there are ranks."""
    chosen = of(lora_rank=LARGEST, alpha=alpha, growth=GrowthSettings(start_rank=start_rank))
    tensors = {}
    for block, rank in enumerate(ranks):
        values = torch.arange(1.0, 1 + 9 * rank)
        tensors[f"transformer_blocks.{block}.attn.to_q"] = {
            "lora_A": values[: 4 * rank].view(rank, 4),
            "lora_B": values[4 * rank :].view(5, rank),
            **({"magnitude": torch.ones(5)} if of is WDLoRASettings else {}),
        }
    return AdapterState(chosen, tensors, {"step": "7"})


def without_growth():
    for of, alpha in ((WDLoRASettings, 0.1), (LoRASettings, None)):
        tensors = {}
        for block in (10, 2):
            values = {"lora_A": torch.arange(12.0).view(3, 4), "lora_B": torch.arange(15.0).view(5, 3)}
            magnitude = {"magnitude": torch.arange(5.0)} if of is WDLoRASettings else {}
            tensors[f"transformer_blocks.{block}.attn.to_q"] = values | magnitude
        yield AdapterState(of(lora_rank=3, alpha=alpha), tensors, {"step": "7", "base_in_training": "nf4"})


@pytest.mark.parametrize("state", without_growth(), ids=lambda state: state.settings.kind)
def test_an_adapter_that_has_not_grown_is_written_as_before_ranks_could(state, tmp_path):
    """Everything but the order of keys in the header of safetensors, which is not the same twice."""
    write_adapter(tmp_path, state)
    told = {name: (tmp_path / name).read_text() for name in (CARD_FILE, CONFIG_FILE)}
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        told |= {"metadata": file.metadata()}
    told |= {"tensors": {name: [str(tensor.dtype), tensor.tolist()] for name, tensor in tensors.items()}}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    assert digest == BEFORE_RANKS_GREW[state.settings.kind]


def test_only_linears_of_an_uncommon_rank_have_patterns():
    told = peft_settings(grown([2, 1, 1, 5], alpha=8.0))
    assert (told["r"], told["lora_alpha"]) == (1, 8.0)
    assert told["rank_pattern"] == {"transformer_blocks.0.attn.to_q": 2, "transformer_blocks.3.attn.to_q": 5}
    assert told["alpha_pattern"] == {"transformer_blocks.0.attn.to_q": 16.0, "transformer_blocks.3.attn.to_q": 40.0}
    assert peft_settings(grown([3, 3])).keys() & {"rank_pattern", "alpha_pattern"} == set()


@settings(max_examples=25)
@given(
    ranks=st.lists(st.integers(1, LARGEST), min_size=12, max_size=14),
    alpha=st.none() | st.floats(0.01, 100),
    start_rank=st.integers(1, LARGEST - 1),
    of=st.sampled_from([LoRASettings, WDLoRASettings]),
)
def test_what_was_written_is_read_and_peft_finds_each_rank_and_the_one_scale(
    tmp_path_factory, ranks, alpha, start_rank, of
):
    """As PEFT matches: in its own function, with blocks 1 and 11, of which one's name lies in the other's."""
    from peft import PeftConfig
    from peft.utils.other import get_pattern_key

    folder, state = tmp_path_factory.mktemp("grown"), grown(ranks, alpha, start_rank, of)
    write_adapter(folder, state)
    found = read_adapter(folder)
    assert (found.settings, found.facts, found.lora_ranks) == (state.settings, state.facts, state.lora_ranks)
    for name, tensors in state.tensors.items():
        assert all(torch.equal(values, found.tensors[name][kind]) for kind, values in tensors.items())
    config = PeftConfig.from_pretrained(str(folder))
    for name, rank in state.lora_ranks.items():
        r = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
        alpha_of = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
        assert r == rank
        assert alpha_of / r == pytest.approx(state.scale, rel=1e-15, abs=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"lora_A": torch.ones(LARGEST + 1, 4), "lora_B": torch.ones(5, LARGEST + 1)}, "has rank 10"),
        (lambda t: {"lora_A": torch.ones(0, 4), "lora_B": torch.ones(5, 0)}, "has rank 0, expected 1 to 9"),
        (lambda t: t | {"lora_B": torch.ones(5, 1)}, "lora_B is 5 x 1, expected 5 x 3"),
        (lambda t: t | {"lora_A": t["lora_A"][0]}, "lora_A is 4, expected 4 x 4"),
    ],
)
def test_ranks_that_cannot_be_are_refused(tmp_path, change, message):
    state = grown([2, 3])
    name = "transformer_blocks.1.attn.to_q"
    broken = replace(state, tensors={**state.tensors, name: change(dict(state.tensors[name]))})
    with pytest.raises(AdapterError, match=f"{name}: {message}"):
        write_adapter(tmp_path, broken)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("of", "system", "word"), [(LoRASettings, "selora", "SeLoRA"), (WDLoRASettings, "se-wdlora", "Se-WDLoRA")]
)
def test_the_card_says_how_it_was_grown(tmp_path, of, system, word):
    state = grown([2, 1, 4], alpha=8.0, of=of)
    write_adapter(tmp_path, state)
    card = (tmp_path / CARD_FILE).read_text()
    assert system_of(state.settings) == system
    for text in (
        f"\n{word}: `W' = ",
        "grown layer by layer while the Fisher information",
        f"| kind | {system} |",
        f"- {system}\n",
        "| lora_rank r, scale s = alpha / r | 1 to 4 (7 in all), 8 |",
    ):
        assert text in card


def test_the_card_of_a_completion_adapter_says_what_it_wants_to_see(tmp_path):
    state = next(iter(without_growth()))
    write_adapter(tmp_path, replace(state, facts={"adapter_name": "completion"}))
    assert "It fills holes, seeing two images: the structure and" in (tmp_path / CARD_FILE).read_text()
