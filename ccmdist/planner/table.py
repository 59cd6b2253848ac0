"""How a plan looks: for a person who asks whether it fits, how long it takes, and what to change."""

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ccmdist.planner.hardware import FABRICS, NETWORK_SHARE, NVLINK_SHARE, gpu_named
from ccmdist.planner.memory import HEADROOM, Memory, Sharding
from ccmdist.planner.plan import Plan
from ccmdist.planner.scaling import NUM_GPUS, Scaled
from ccmdist.planner.time import SETUP_S

PARTS = {
    "weights": "frozen weights",
    "gathered": "gathered from others",
    "adapter": "adapter, fp32",
    "gradients": "gradients, buffers",
    "moments": "optimizer",
    "activations": "activations",
    "libraries": "CUDA, libraries",
}


def page(plan: Plan) -> RenderableType:
    """The whole plan."""
    tables = Table.grid(padding=(0, 6))
    tables.add_row(_memory(plan), *([_traffic(plan)] if plan.machine.num_gpus > 1 else []))
    return Group(_head(plan), Text(), tables, Text(), _modes(plan), Text(), _variants(plan), Text(), *_notes(plan))


def needs_line(needs: Mapping[Sharding, Memory], is_set: bool = False) -> str:
    """Memory by mode in one line, for a dry run, which does not know the GPUs."""
    told = ", ".join(f"{mode} {need.total / 1e9:.1f}" for mode, need in needs.items())
    how = "as set:" if is_set else "auto, which takes the first that fits of"
    return f"sharding: {how} {told} GB per GPU (estimate); `ccmdist model plan` predicts time and traffic"


def scaling_page(rows: Sequence[Scaled], gpu: str, micro_batch_size: int, efficiency: float) -> RenderableType:
    """Predicted efficiency by fabric, mode and number of GPUs."""
    table = Table("fabric", "mode", *(f"{num} GPUs" for num in NUM_GPUS), box=None, padding=(0, 2, 0, 0))
    for fabric, sharding in dict.fromkeys((row.fabric, row.sharding) for row in rows):
        found = {row.num_gpus: row for row in rows if (row.fabric, row.sharding) == (fabric, sharding)}
        table.add_row(fabric, sharding, *(_efficiency(found.get(num)) for num in NUM_GPUS))
    return Group(
        f"predicted efficiency on {gpu}, micro_batch_size {micro_batch_size} on every GPU, one micro-step per step",
        "(1.00: images/s and GPU of one GPU alone; if sending hides behind computing / if nothing overlaps;",
        f"!: does not fit; {efficiency:.0%} of peak assumed; same as zero3 on one node where zero3_hpz is missing)",
        Text(),
        table,
        Text(),
        *(f"{name}: {FABRICS[name].meaning}" for name in dict.fromkeys(row.fabric for row in rows)),
    )


def duration(seconds: float) -> str:
    """Seconds for people: "0.42 s", "66 s", "35 min", "4.5 h", "12.3 d"."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    for limit, unit, name in ((100 * 60, 60, "min"), (100 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86400:.3g} d"


def _head(plan: Plan) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    for name, text in _facts(plan).items():
        table.add_row(name, text)
    return table


def _facts(plan: Plan) -> dict[str, str]:
    machine, step, flops = plan.machine, plan.chosen.step, plan.step_flops
    images_per_s = plan.chosen.images_per_s
    nodes = f", {machine.gpus_per_node} on each node: {FABRICS[machine.fabric].meaning}"
    told = {
        "machine": f"{machine.num_gpus} x {machine.gpu}{nodes if machine.num_gpus > 1 else ''}",
        "model": f"{_count(plan.num_parameters)} parameters, of which {_count(plan.num_resident_parameters)} are held, "
        f"in {plan.base}; {_trained(plan)}",
        "one image": f"{_tokens(plan)} {_tera(plan.forward_flops)} forward; {_tera(flops.executed)} to train: "
        f"forward {flops.forward / 1e12:.1f}, backward {flops.backward / 1e12:.1f}, "
        f"computed again {flops.recompute / 1e12:.1f}",
        "mode": f"{plan.sharding}: {plan.reason}",
        "fits": _verdict(plan),
        "step": f"{duration(step.overlapped_s)} predicted at {machine.efficiency:.0%} of peak (assumed), if sending "
        f"hides behind computing; {duration(step.in_turn_s)} if nothing overlaps",
        "images/s": f"{images_per_s:.1f} predicted, {images_per_s / machine.num_gpus:.2f} per GPU",
    }
    if machine.num_gpus > 1:
        told["break-even"] = f"micro-batch {step.break_even:.1f}: from there computing takes longer than sending"
    return told | _course(plan)


def _trained(plan: Plan) -> str:
    """How much is trained, in words."""
    if plan.does_grow:
        return f"up to {_count(plan.num_trained)} are trained, if all ranks grow to the largest"
    turns = f", in {plan.num_adapters} adapters, of which each step trains one" if plan.num_adapters > 1 else ""
    return f"{_count(plan.num_trained)} are trained{turns}"


def _tokens(plan: Plan) -> str:
    """Tokens of an image, in words; where some steps fill holes, of those too."""
    of, share = plan.tokens, plan.completion_share
    if not share:
        return f"{of.total} tokens (image {of.target}, mask {of.mask}, text {of.text});"
    whole = f"{of.total} tokens (image {of.target}, mask {of.mask}, image with a hole {of.holed}, text {of.text})"
    return f"{whole};" if share == 1 else f"{whole} in {share:.0%} of the steps, else {of.total - of.holed}; on average"


def _verdict(plan: Plan) -> str:
    memory = gpu_named(plan.machine.gpu).memory_bytes
    verdict = "yes" if plan.chosen.is_fitting else "NO"
    return (
        f"{verdict}: {plan.chosen.memory.total / 1e9:.1f} GB (estimate) of {memory / 1e9:.0f} GB, of which "
        f"{HEADROOM:.0%} are left free"
    )


def _course(plan: Plan) -> dict[str, str]:
    limit, course = duration(plan.time_limit_s), plan.finish
    if course is None:
        return {"finish": f"never: a time limit of {limit} ends each job before its first step; ask for more"}
    starts = "1 start" if course.num_starts == 1 else f"{course.num_starts} starts"
    return {
        "start": f"{duration(course.startup_s)} predicted: {course.startup_bytes / 1e9:.1f} GB per node at "
        f"{plan.machine.file_system_bytes_per_s / 1e9:.0f} GB/s and {SETUP_S:.0f} s of set-up (assumed)",
        "finish": f"{duration(course.total_s)} predicted in {starts} of at most {limit}, without waiting in the queue; "
        f"{course.gpu_hours:.4g} GPU-hours",
    }


def _memory(plan: Plan) -> Table:
    table = Table("memory per GPU (estimate)", "GB", box=None, padding=(0, 2, 0, 0))
    table.columns[1].justify = "right"
    for name, num_bytes in vars(plan.chosen.memory).items():
        table.add_row(PARTS[name], f"{num_bytes / 1e9:.2f}")
    table.add_row("in all", f"{plan.chosen.memory.total / 1e9:.2f}", style="bold")
    return table


def _traffic(plan: Plan) -> Table:
    sent = plan.traffic
    table = Table("received by each GPU in a step", "GB", box=None, padding=(0, 2, 0, 0))
    table.columns[1].justify = "right"
    times = f"{sent.num_micro_steps} x " if sent.num_micro_steps > 1 else ""
    table.add_row("frozen weights", f"{times}{sent.weights_per_micro_step / 1e9:.2f}")
    table.add_row("gradients of the adapter", f"{times}{sent.gradients_per_micro_step / 1e9:.2f}")
    table.add_row("adapter after its update", f"{sent.adapter_per_step / 1e9:.2f}")
    table.add_row("in all", f"{sent.per_step / 1e9:.2f}", style="bold")
    return table


def _modes(plan: Plan) -> Table:
    table = Table("mode", "GB per GPU", "s per step", "images/s", "", box=None, padding=(0, 2, 0, 0))
    for choice in plan.choices:
        told = choice.why_not or "chosen" if plan.reason != "as set" else choice.why_not or "as set"
        figures = (choice.memory.total / 1e9, choice.step.overlapped_s, choice.images_per_s)
        is_told = choice.is_possible or choice.sharding == plan.sharding
        shown = [f"{figure:.3g}" if is_told else "-" for figure in figures]
        table.add_row(choice.sharding, *shown, told, style="bold" if choice.sharding == plan.sharding else "")
    return table


def _variants(plan: Plan) -> Table:
    table = Table("the same with", "GB per GPU", "images/s", "", box=None, padding=(0, 2, 0, 0))
    for variant in plan.variants:
        told = "fits" if variant.is_fitting else "does not fit"
        table.add_row(variant.change, f"{variant.memory_bytes / 1e9:.3g}", f"{variant.images_per_s:.3g}", told)
    return table


def _notes(plan: Plan) -> list[str]:
    if plan.machine.num_gpus == 1:
        return []
    return [
        f"sending: {NVLINK_SHARE:.0%} of NVLink's and {NETWORK_SHARE:.0%} of the network's rate assumed; "
        f"source of the GPU's figures: {gpu_named(plan.machine.gpu).source}"
    ]


def _efficiency(row: Scaled | None) -> str:
    return "" if row is None else f"{row.overlapped:.2f} / {row.in_turn:.2f}{'' if row.is_fitting else ' !'}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.3g} M"


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.3g} TFLOP"
