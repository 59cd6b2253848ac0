"""One rank that loads a model, or a part of it, and what it used; forked from a server that has all imports behind it.

Imported by name, so that processes can be forked.
"""

import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ccmdist.models.model_folder import ModelFolder

PRELOADED = ["deepspeed", "ccmdist.train.engine", "ccmdist.models.tabulation", "measure.loading"]
HW, NUM_TEXT, LEVEL = (4, 4), 8, 0.5
BASE = "bench"
"""Stands for the digest of the model."""
ZERO = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}

Told = dict[str, Any]


def started(function: Callable[..., Told], world_size: int, *arguments: Any) -> list[Told]:
    """What ``function(group, *arguments)`` returns on each of some ranks that are processes of their own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="ccmdist-bench-") as folder:
        queue = context.Queue()
        node = os.environ["CCMDIST_NODE_TMP"]  # the server, from which they are forked, may have another one
        places = [(function, rank, world_size, folder, node, queue, arguments) for rank in range(world_size)]
        children = [context.Process(target=_rank, args=place) for place in places]
        for child in children:
            child.start()
        told = [queue.get(timeout=600) for _ in children]
        for child in children:
            child.join()
    return told


def _rank(
    function: Callable[..., Told],
    rank: int,
    world_size: int,
    folder: str,
    node: str,
    queue: Any,
    arguments: tuple[Any, ...],
) -> None:
    from ccmdist.cluster.process_group import ProcessGroup
    from ccmdist.cluster.ranks import Ranks
    from ccmdist.train.engine import quiet_libraries

    quiet_libraries()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["TORCH_EXTENSIONS_DIR"], os.environ["CCMDIST_NODE_TMP"] = folder, node
    group = ProcessGroup(Ranks(rank, rank, world_size), 10, f"file://{folder}/rendezvous")
    queue.put(function(group, *arguments))
    group.barrier()
    group.close()


def stock(group: Any, path: Path) -> Told:
    """The output of what diffusers loads, run by the same engine."""
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel.from_pretrained(path / "transformer", torch_dtype=torch.bfloat16).eval()
    return {"checksum": _output(model)}


def loaded(group: Any, path: Path, version: Any, levels: Tensor | None) -> Told:
    """Load this rank's share, with a table of noise levels or whole; peak memory, bytes, seconds and output."""
    from ccmdist.adapters.injection import RowSquares
    from ccmdist.models import mmdit
    from ccmdist.models.tabulation import table_for

    folder, bf16, cpu = ModelFolder(path, version), torch.bfloat16, torch.device("cpu")
    squares = RowSquares(mmdit.linear_names(mmdit.skeleton(folder), ("attn", "mlp")))
    group.barrier()
    start = _Usage.now()
    table = None if levels is None else table_for(folder, levels, bf16, 1, cpu, BASE)
    between = _Usage.now()
    model = mmdit.build(folder, bf16, ZERO, squares.on_rows, table=table)
    squares.reduce()
    end = _Usage.now()
    return {
        "memory": max(between.peak, end.peak) - start.resident,
        "read": end.read - between.read,
        "disk": end.disk - between.disk,
        "seconds": end.seconds - between.seconds,
        "cpu_seconds": end.cpu_seconds - between.cpu_seconds,
        "table_read": between.read - start.read,
        "table_seconds": between.seconds - start.seconds,
        "checksum": _output(model),
    }


class _Usage:
    """Bytes and seconds of this process up to now; the peak since the last time that it was asked."""

    def __init__(self) -> None:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        self.peak, self.resident = (int(status[name].split()[0]) << 10 for name in ("VmHWM", "VmRSS"))
        self.read, self.disk = int(io["rchar"]), int(io["read_bytes"])
        self.seconds, self.cpu_seconds = time.monotonic(), time.process_time()

    @classmethod
    def now(cls) -> "_Usage":
        found = cls()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        return found


def _output(model: Any) -> str:
    """Sums over the velocity of inputs that are always the same, the model being run by DeepSpeed's engine."""
    import deepspeed

    from ccmdist.models import mmdit

    engine, *_ = deepspeed.initialize(model=model.requires_grad_(False), config=ZERO | {"bf16": {"enabled": True}})
    source = torch.Generator().manual_seed(0)
    latents, mask_latents = torch.randn(2, 1, HW[0] * HW[1], 64, generator=source).bfloat16()
    embeds = torch.randn(1, NUM_TEXT, 3584, generator=source).bfloat16()
    with torch.no_grad():
        found: Tensor = mmdit.velocity(engine, latents, mask_latents, embeds, torch.tensor([LEVEL]), HW, HW).double()
    return f"{found.sum().item():.15g} {found.abs().sum().item():.15g} {found.square().sum().item():.15g}"
