"""The processes that train together, and the small messages by which they agree.

Model collectives run on NCCL (or gloo on CPU). Agreements run on a gloo group of their own, so that a hang in
one is not blamed on the other and a GPU is never needed to say "stop".
"""

import datetime
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ccmdist.cluster.deepspeed_on_cpu import disable_shm_op
from ccmdist.cluster.device import take_device
from ccmdist.cluster.ranks import Ranks


def is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone or does not answer."""
    # gloo raises plain RuntimeErrors that name the file of its transport.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


class ProcessGroup:
    """All ranks of a run. Every method is collective: each rank calls it, in the same order."""

    def __init__(self, ranks: Ranks, timeout_min: float, rendezvous: str = "env://") -> None:
        """Join the other ranks.

        Args:
            ranks: The place of this process.
            timeout_min: After this long without an answer a collective fails; libraries' defaults differ.
            rendezvous: "env://" (MASTER_ADDR, MASTER_PORT) or "file://..." for processes of one machine.
        """
        if not torch.accelerator.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found nothing better
        import deepspeed  # seconds of import that help and dry runs must not pay

        self.ranks = ranks
        self.device = take_device(ranks)
        # DeepSpeed's zero.Init asks the environment, not the process group; LOCAL_RANK means a device to it.
        local_rank = ranks.local_rank if self.device.index is None else self.device.index
        for name, value in (("RANK", ranks.global_rank), ("LOCAL_RANK", local_rank), ("WORLD_SIZE", ranks.world_size)):
            os.environ[name] = str(value)
        disable_shm_op()
        timeout = datetime.timedelta(minutes=timeout_min)
        dist.init_process_group(
            backend="nccl" if self.device.type == "cuda" else "gloo",
            init_method=rendezvous,
            rank=ranks.global_rank,
            world_size=ranks.world_size,
            timeout=timeout,
        )
        deepspeed.init_distributed(dist_backend=dist.get_backend(), timeout=timeout, verbose=False)
        self.side = dist.new_group(backend="gloo", timeout=timeout)

    def maximum(self, values: Sequence[float]) -> list[float]:
        """The largest of all ranks' values, element by element; the same list on every rank."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum of all ranks' values, element by element; the same list on every rank."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def gathered(self, value: Any) -> list[Any]:
        """What every rank gave, in the order of ranks; for small plain Python values."""
        values: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(values, value, group=self.side)
        return values

    def from_first(self, value: Any) -> Any:
        """What rank 0 gave; for small plain Python values."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.side)
        return values[0]

    def barrier(self) -> None:
        """Return when every rank has called this."""
        dist.barrier(group=self.side)

    def close(self) -> None:
        """Leave the group; afterwards no collective may be called."""
        dist.destroy_process_group()

    def _reduced(self, values: Sequence[float], operation: Any) -> list[float]:
        tensor = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(tensor, op=operation, group=self.side)
        return tensor.tolist()
