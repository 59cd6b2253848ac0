"""What activation_checkpointing keeps and what it costs: bytes per token of a block, and time, in all three ways.

    python benchmarks/activation_memory.py [--dim 1024] [--tokens 1152 256] [--lora-rank 64] [--repeats 5]

One QwenImageTransformerBlock with WDLoRA and random bf16 weights: the bytes that a forward leaves for the backward
pass, by token and by the width of the model, on which they do not depend (the default is a third of the real 3,072, for
time); and the process CPU time of forward and backward, in turn. Anchor of both is to keep everything. From the bytes
follow those of the 60-block model per 384 px image.
"""

import argparse
import gc
import sys
from collections.abc import Callable

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from measure.memory import LiveBytes
from measure.rows import Row, finish
from measure.timing import in_turn, median_ratio
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ccmdist.adapters.frozen import freeze_linears
from ccmdist.adapters.injection import inject, row_squares_of
from ccmdist.adapters.wdlora import WDLoRALinear
from ccmdist.config.train import WDLoRASettings
from ccmdist.train.recompute import attend_on_tape, selective_contexts

HEAD_DIM, WIDTH, BLOCKS, TOKENS = 128, 3072, 60, 1408
"""Of a head; and width, blocks and tokens of a 384 px image in the 20 B model."""
BATCH, ROOM_GB = 8, 141 - 41
"""What selective recompute has to fit: samples at once beside 41 GB of weights on a GPU of 141 GB."""
DISCARDED = ("img_mod", "txt_mod")

Run = Callable[[], tuple[Tensor, Tensor]]


def block_with_wdlora(dim: int, lora_rank: int) -> QwenImageTransformerBlock:
    torch.manual_seed(0)
    block = QwenImageTransformerBlock(dim, dim // HEAD_DIM, HEAD_DIM).bfloat16().requires_grad_(False)
    names = [n for n, m in block.named_modules() if isinstance(m, torch.nn.Linear) and not n.startswith(DISCARDED)]
    inject(block, names, WDLoRASettings(lora_rank=lora_rank), row_squares_of(block, names), seed=0)
    freeze_linears(block)
    return block.train()


def forwards(block: QwenImageTransformerBlock, tokens: list[int]) -> tuple[dict[str, Run], list[Tensor]]:
    """The block's forward in the three ways, and its inputs."""
    dim = block.dim
    image, text = (torch.randn(1, count, dim, dtype=torch.bfloat16, requires_grad=True) for count in tokens)
    temb = torch.randn(1, dim, dtype=torch.bfloat16)
    rotary = tuple(torch.polar(torch.ones(count, HEAD_DIM // 2), torch.rand(count, HEAD_DIM // 2)) for count in tokens)
    given = (image, text, None, temb, rotary)
    attend_on_tape()
    runs: dict[str, Run] = {
        "none": lambda: block(*given),
        "selective": lambda: checkpoint(block, *given, use_reentrant=False, context_fn=selective_contexts),
        "full": lambda: checkpoint(block, *given, use_reentrant=False),
    }
    return runs, [image, text, temb, *rotary]


def held_bytes(run: Run, block: QwenImageTransformerBlock, inputs: list[Tensor]) -> int:
    """Bytes that stay when a forward is done, its inputs and outputs and what the layers know of their rows aside."""
    run()  # evaluates the norms, once
    rows = [value for m in block.modules() if isinstance(m, WDLoRALinear) for value in vars(m.rows).values()]
    known = [*block.parameters(), *block.buffers(), *inputs, *(value for value in rows if isinstance(value, Tensor))]
    gc.collect()
    with LiveBytes(known) as counted:
        outputs = run()
    gc.collect()
    return counted.live - sum(output.nbytes for output in outputs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--tokens", type=int, nargs=2, default=[1152, 256], help="of images and of text")
    parser.add_argument("--lora-rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    block = block_with_wdlora(options.dim, options.lora_rank)
    runs, inputs = forwards(block, options.tokens)
    return finish("activation_memory", [*memory_rows(runs, block, inputs), *time_rows(runs, options.repeats)])


def memory_rows(runs: dict[str, Run], block: QwenImageTransformerBlock, inputs: list[Tensor]) -> list[Row]:
    num_tokens = inputs[0].shape[1] + inputs[1].shape[1]
    # A block's input is kept in every way: it is the output of the block before.
    held = {how: held_bytes(run, block, inputs) / num_tokens / block.dim + 2 for how, run in runs.items()}
    image_gb = {how: value * WIDTH * TOKENS * BLOCKS / 1e9 for how, value in held.items()}
    return [
        *(Row(f"bytes kept per token and block, by the width: {how}", held[how], held["none"]) for how in held),
        *(
            Row(f"GB kept of a 384 px image by all {BLOCKS} blocks: {how}", image_gb[how], image_gb["none"])
            for how in held
        ),
        Row(f"GB kept at micro-batch {BATCH} beside weights, selective", BATCH * image_gb["selective"], None, ROOM_GB),
    ]


def time_rows(runs: dict[str, Run], repeats: int) -> list[Row]:
    def backward(run: Run) -> Callable[[], None]:
        return lambda: torch.autograd.backward([output.float().mean() for output in run()])

    seconds = in_turn({how: backward(run) for how, run in runs.items()}, repeats)
    return [
        Row(
            "CPU time of forward and backward, by that of keeping everything: " + how,
            median_ratio(seconds[how], seconds["none"]),
        )
        for how in ("selective", "full")
    ]


if __name__ == "__main__":
    sys.exit(main())
