"""Operations that `ccmdist model plan` counts, against torch's FlopCounterMode on the whole 60-block model.

    python benchmarks/planner_flops.py

The real class of 20.4 B parameters on the meta device, where nothing is computed: a forward pass at 384, 512, 768 and
1024 px of each version, and a training step of LoRA at 384 px with and without computing every block again. Attention
is counted by its plain products, for that is what the meta device runs. Then rows of predicted efficiency at 8, 64 and
512 GPUs: of a model of the machine, not of a machine.
"""

import sys
from collections.abc import Callable, Iterator

import torch
from measure.rows import Row, finish
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ccmdist.adapters.injection import inject
from ccmdist.config.loading import load
from ccmdist.config.train import LoRASettings, TrainConfig
from ccmdist.models import mmdit
from ccmdist.models.make import make_transformer
from ccmdist.models.sizes import SIZES
from ccmdist.models.template import Version
from ccmdist.planner.flops import PLAIN_BACKWARD, Recompute, Tokens, forward_flops, step_flops, tokens
from ccmdist.planner.scaling import scaling
from ccmdist.planner.transformer import Transformer

SIZES_PX = (384, 512, 768, 1024)
VERSIONS: tuple[Version, ...] = ("v1", "2509", "2511")
TARGETS, LORA_RANK = ("attn", "mlp"), 64
LIMIT = 0.01
FABRICS = ("nvlink-8x400g", "nvlink-2x200g")


def main() -> int:
    """Measure, and the exit code."""
    return finish("planner_flops", [*forward_rows(), *training_rows(), *scaling_rows()])


def forward_rows() -> Iterator[Row]:
    """One forward pass of each version and size."""
    for version in VERSIONS:
        model = on_meta(version)
        sizes = Transformer.from_config(dict(model.config))
        for size_px in SIZES_PX:
            of = tokens(size_px, version)
            with torch.no_grad():
                found = counted(lambda model=model, of=of: asked(model, of))
            yield from compared(f"forward, {version} at {size_px} px", forward_flops(sizes, of), found)


def training_rows() -> Iterator[Row]:
    """A training step with and without computing blocks again."""
    model, of = on_meta("2509").requires_grad_(False), tokens(384)
    names = mmdit.linear_names(model, TARGETS)
    squares = {name: torch.zeros(model.get_submodule(name).out_features) for name in names}
    inject(model, names, LoRASettings(kind="lora", lora_rank=LORA_RANK), squares, 0)
    sizes = Transformer.from_config(dict(model.config))
    modes: tuple[Recompute, ...] = ("none", "full")
    for recompute in modes:
        if recompute == "full":
            model.train().enable_gradient_checkpointing()
        found = counted(lambda: asked(model, of).sum().backward())
        planned = step_flops(sizes, of, LORA_RANK, TARGETS, recompute, attention_backward=PLAIN_BACKWARD)
        yield from compared(f"training step at 384 px, recompute {recompute}", planned.executed, found)


def scaling_rows() -> Iterator[Row]:
    """Predicted, not measured: efficiency of each mode on the 20.4 B model at micro-batch 4."""
    needed = ["run=r", "data.shards=s", "data.model=m", "micro_batch_size=4", "global_batch_size=4"]
    for row in scaling(load(TrainConfig, [], needed), {}, "h200"):
        if row.fabric in FABRICS:
            about = f"{row.sharding}, {row.num_gpus} H200, {row.fabric}, micro-batch 4, 40 % of peak assumed"
            yield Row(
                f"predicted efficiency if sending hides behind computing (anchor: if not), {about}",
                row.overlapped,
                row.in_turn,
            )


def compared(what: str, planned: float, found: int) -> list[Row]:
    """The deviation, and the two figures."""
    return [
        Row(f"|planned / counted - 1|, {what}", abs(planned / found - 1), "0: exact", LIMIT, 0),
        Row(f"TFLOP, planned against counted, {what}", planned / 1e12, found / 1e12),
    ]


def on_meta(version: Version) -> mmdit.QwenImageTransformer2DModel:
    """The whole model without weights."""
    with torch.device("meta"):
        return make_transformer(SIZES["full"], version).to(torch.bfloat16)


def asked(model: torch.nn.Module, of: Tokens) -> torch.Tensor:
    """The model's answer for one sample with these tokens."""
    edge = round(of.target**0.5)
    shapes = ((1, of.target, 64), (1, of.mask, 64), (1, of.text, 3584), (1,))
    with torch.device("meta"):
        inputs = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
        return mmdit.velocity(model, *inputs, (edge, edge), (edge, edge))


def counted(run: Callable[[], object]) -> int:
    """Operations that torch counts, and of products that are added in place, which it leaves out."""
    in_place = {torch.ops.aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


if __name__ == "__main__":
    sys.exit(main())
