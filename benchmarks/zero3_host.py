"""Host time of ZeRO-3 per block and micro-step: our engine, and PEFT LoRA under DeepSpeed's default hooks.

    python benchmarks/zero3_host.py [--repeats 15]

With real widths a GPU computes while the host issues its work; at small batches the host is the slower of the two. Here
tensors are tiny, so that CPU time is host time: one micro-step forward and backward with recompute, at 4 and at 12
blocks; the slope is the cost of a block. Compared with the same model in plain eager mode, in turn in one process.
Settings of DeepSpeed that count elements are scaled with the block, so that blocks are gathered, prefetched and
released as at full width: default hooks have DeepSpeed's defaults.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import deepspeed
import torch
from diffusers import QwenImageTransformer2DModel
from measure.rows import Row, finish
from measure.timing import in_turn
from peft import LoraConfig, inject_adapter_in_model

from ccmdist.adapters.frozen import freeze_linears
from ccmdist.adapters.injection import inject, row_squares_of
from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.cluster.ranks import Ranks
from ccmdist.config.loading import load
from ccmdist.config.train import TrainConfig, WDLoRASettings
from ccmdist.models import mmdit
from ccmdist.train.engine import Engine, quiet_libraries, zero_config
from ccmdist.train.flat_blocks import flatten_blocks
from ccmdist.train.sharding import hide_frozen_weights

FEW, MANY = 4, 12
LORA_RANK, HW, TEXT_TOKENS, TEXT_WIDTH = 8, (2, 4), 4, 64
FULL_BLOCK = 339_831_296
"""Weights of a block of the 20 B model, by which DeepSpeed's defaults are meant."""
ACCUMULATION = 10**6  # micro-steps alone, never the optimizer's
LIMIT, GOAL = 1.5, 1.2

LINEAR = torch.nn.functional.linear
"""PyTorch's own; by default DeepSpeed replaces it for all that runs in the process."""

MicroStep = Callable[[], object]


def bare(num_blocks: int) -> QwenImageTransformer2DModel:
    """A frozen model of width 128 that recomputes."""
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        num_layers=num_blocks, num_attention_heads=1, joint_attention_dim=TEXT_WIDTH
    ).requires_grad_(False)
    model.enable_gradient_checkpointing()
    return model.train()


def with_wdlora(
    num_blocks: int, is_flat: bool = False
) -> tuple[QwenImageTransformer2DModel, dict[str, torch.nn.Parameter]]:
    model = bare(num_blocks)
    names = mmdit.linear_names(model, ("attn", "mlp"))
    squares = row_squares_of(model, names)
    if is_flat:
        flatten_blocks(model.transformer_blocks)
    adapted = inject(model, names, WDLoRASettings(lora_rank=LORA_RANK), squares, seed=0)
    freeze_linears(model)
    return model, adapted.parameters


def with_peft(num_blocks: int) -> QwenImageTransformer2DModel:
    model = bare(num_blocks)
    names = mmdit.linear_names(model, ("attn", "mlp"))
    return inject_adapter_in_model(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=names), model)


def loss_of(model: Any) -> torch.Tensor:
    """Of one sample, always the same."""
    source = torch.Generator().manual_seed(1)
    latents, mask = torch.randn(2, 1, HW[0] * HW[1], 64, generator=source)
    prompt = torch.randn(1, TEXT_TOKENS, TEXT_WIDTH, generator=source)
    return mmdit.velocity(model, latents, mask, prompt, torch.tensor([0.5]), HW, HW).square().mean()


def plain(model: torch.nn.Module) -> MicroStep:
    return lambda: loss_of(model).backward()


def settings() -> TrainConfig:
    folders = [f"data.{name}=unused" for name in ("shards", "model", "cache")]
    overrides = ["run=unused", *folders, "base=fp32", "sharding=zero3", f"global_batch_size={ACCUMULATION}"]
    return load(TrainConfig, [], overrides)


def ours(num_blocks: int, group: ProcessGroup) -> MicroStep:
    model, parameters = with_wdlora(num_blocks, is_flat=True)
    hide_frozen_weights(model, vectors_alone=True)
    mmdit.make_blocks_leaves(model)
    engine = Engine(model, {"adapter": parameters}, settings(), group)

    def micro_step() -> None:
        engine.backward(loss_of(engine.module))
        engine.step()

    return micro_step


def by_default_hooks(num_blocks: int) -> MicroStep:
    model = with_peft(num_blocks)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    block = sum(parameter.numel() for parameter in model.transformer_blocks[0].parameters())
    config = zero_config(settings(), 1)
    config["zero_optimization"] = {"stage": 3} | {
        f"stage3_{name}": max(round(default * block / FULL_BLOCK), 1)
        for name, default in (
            ("param_persistence_threshold", 1e5),
            ("prefetch_bucket_size", 5e7),
            ("max_reuse_distance", 1e9),
            ("max_live_parameters", 1e9),
        )
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained), config=config)
    default, torch.nn.functional.linear = torch.nn.functional.linear, LINEAR

    def micro_step() -> None:
        torch.nn.functional.linear = default
        engine.backward(loss_of(engine))
        engine.step()
        torch.nn.functional.linear = LINEAR

    return micro_step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="micro-steps of each side, in turn")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", folder)
        group = ProcessGroup(Ranks(0, 0, 1), timeout_min=10, rendezvous=f"file://{folder}/rendezvous")
        quiet_libraries()
        rows = measured(group, repeats)
        group.close()
    return finish("zero3_host", rows)


def measured(group: ProcessGroup, repeats: int) -> list[Row]:
    sides: dict[str, MicroStep] = {}
    for count in (FEW, MANY):
        sides[f"plain {count}"] = plain(with_wdlora(count)[0])
        sides[f"ours {count}"] = ours(count, group)
        sides[f"plain peft {count}"] = plain(with_peft(count))
        sides[f"default peft {count}"] = by_default_hooks(count)
    seconds = in_turn(sides, repeats, warm_up=4)  # DeepSpeed's first micro-steps trace the model
    ms = {name: 1e3 * slope(seconds, name) for name in ("plain", "ours", "plain peft", "default peft")}
    what = "host ms per block and micro-step, world 1"
    return [
        Row(
            "host time of a block and micro-step, world 1: WDLoRA in our engine, by plain eager",
            ms["ours"] / ms["plain"],
            None,
            LIMIT,
            GOAL,
        ),
        Row(f"{what}: WDLoRA, our engine against plain eager", ms["ours"], ms["plain"]),
        Row(f"{what}: PEFT LoRA, default hooks against plain eager", ms["default peft"], ms["plain peft"]),
        Row(f"{what}: our engine with WDLoRA against PEFT LoRA under default hooks", ms["ours"], ms["default peft"]),
    ]


def slope(seconds: dict[str, list[float]], name: str) -> float:
    """Cost of one more block, by the medians: differences of single runs carry the noise of both."""
    few, many = (statistics.median(seconds[f"{name} {count}"]) for count in (FEW, MANY))
    return (many - few) / (MANY - FEW)


if __name__ == "__main__":
    sys.exit(main())
