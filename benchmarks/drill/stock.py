"""Stock DeepSpeed under one of the same faults: a rank is killed amid the write of its part of a checkpoint."""

import os
import resource
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WIDTH = 256
DEFAULT_THRESHOLD = 100_000
CASES = ((1, 0), (0, 0), (1, DEFAULT_THRESHOLD))
"""Killed rank, and ``stage3_param_persistence_threshold``: 0 as this project sets it, or DeepSpeed's default, under
which gathering small parameters after a save happens to hold rank 0 back until the others have written."""


@dataclass(frozen=True)
class StockCase:
    """A rank of stock DeepSpeed that was killed when half of its optimizer file was written, and what came of it.

    Attributes:
        rank: The killed rank.
        threshold: The setting ``stage3_param_persistence_threshold``.
        latest: What the file "latest" names afterwards; the save before was of step1.
        resumed: Whether the plain resume came through with the weights of a step that was saved.
    """

    rank: int
    threshold: int
    latest: str
    resumed: bool


def stock_cases(context: Any, folder: Path) -> list[StockCase]:
    """Save twice with two ranks of stock ZeRO-3, kill one amid its second write, resume from "latest"; per case."""
    cases = []
    for rank, threshold in CASES:
        place = folder / f"stock-{rank}-{threshold}"
        place.mkdir()
        _ranks(context, place, threshold, rank)
        codes = _ranks(context, place, threshold, None)
        cases.append(StockCase(rank, threshold, (place / "latest").read_text(), codes == [0, 0]))
    return cases


def _ranks(context: Any, folder: Path, threshold: int, killed: int | None) -> list[int]:
    (folder / "rendezvous").unlink(missing_ok=True)
    children = [context.Process(target=_rank, args=(rank, folder, threshold, killed)) for rank in (0, 1)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=30)
    for child in children:
        child.kill()
        child.join()
    return [child.exitcode for child in children]


def _rank(rank: int, folder: Path, threshold: int, killed: int | None) -> None:
    import torch

    from ccmdist.cluster.process_group import ProcessGroup
    from ccmdist.cluster.ranks import Ranks
    from ccmdist.train.engine import quiet_libraries

    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    quiet_libraries()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ProcessGroup(Ranks(rank, rank, 2), timeout_min=0.2, rendezvous=f"file://{folder}/rendezvous")
    engine = _engine(torch, threshold)
    if killed is None:
        path, _ = engine.load_checkpoint(str(folder))
        sys.exit(0 if path else 1)
    for step in (1, 2):
        loss = engine(torch.randn(4, WIDTH)).square().mean()
        engine.backward(loss)
        engine.step()
        if step == 2 and rank == killed:
            _limit_files(max(file.stat().st_size for file in (folder / "step1").iterdir()) // 2)
        engine.save_checkpoint(str(folder), tag=f"step{step}")


def _engine(torch: Any, threshold: int) -> Any:
    import deepspeed

    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH))
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": threshold},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 10**9,
    }
    return deepspeed.initialize(model=model, config=config)[0]


def _limit_files(num_bytes: int) -> None:
    """Let the kernel kill this process amid the write of a file that grows beyond ``num_bytes``."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
