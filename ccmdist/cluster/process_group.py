"""The processes that train together, and the small messages by which they agree.

Model collectives run on NCCL (or gloo on CPU). Agreements run on a gloo group of their own, so that a hang in
one is not blamed on the other and a GPU is never needed to say "stop".
"""

import datetime
import os
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.distributed as dist

from ccmdist.cluster.deepspeed_on_cpu import disable_shm_op
from ccmdist.cluster.device import take_device
from ccmdist.cluster.ranks import Ranks, common_ranks_per_node
from ccmdist.errors import EXIT_INTERNAL, CcmdistError


class MissingRanks(CcmdistError):  # noqa: N818 (named after what is wrong, as the others)
    """Not all ranks have come together. Another start may do: exit code 70."""

    exit_code = EXIT_INTERNAL


ALL_HERE: Final = "all here"


def is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone or does not answer."""
    # gloo raises plain RuntimeErrors that name the file of its transport.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


class ProcessGroup:
    """All ranks of a run. Every method is collective: each rank calls it, in the same order.

    Attributes:
        ranks: The place of this process.
        device: Where this process computes.
        ranks_per_node: How many consecutive ranks share each node; None where nodes differ in that.
    """

    def __init__(self, ranks: Ranks, timeout_min: float, rendezvous: str = "env://", meet_min: float = 10.0) -> None:
        """Join the other ranks.

        Args:
            ranks: The place of this process.
            timeout_min: After this long without an answer a collective fails; libraries' defaults differ.
            rendezvous: "env://" (MASTER_ADDR, MASTER_PORT) or "file://..." for processes of one machine.
            meet_min: Within this time all ranks must be here.

        Raises:
            MissingRanks: If some are not, or cannot be reached.
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
        timeout, to_meet = datetime.timedelta(minutes=timeout_min), datetime.timedelta(minutes=meet_min)
        self.store = _meet(ranks, rendezvous, to_meet)
        self.store.set_timeout(timeout)
        dist.init_process_group(
            backend="nccl" if self.device.type == "cuda" else "gloo",
            store=self.store,
            rank=ranks.global_rank,
            world_size=ranks.world_size,
            timeout=timeout,
        )
        deepspeed.init_distributed(dist_backend=dist.get_backend(), timeout=timeout, verbose=False)
        self.side = dist.new_group(backend="gloo", timeout=timeout)
        try:
            dist.monitored_barrier(self.side, to_meet, wait_all_ranks=True)
        except RuntimeError as error:
            raise MissingRanks(
                f"ranks found each other but do not reach each other: {str(error).splitlines()[0]}",
                "name the interface that joins the nodes in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
            ) from None
        self.ranks_per_node = common_ranks_per_node(self.gathered(ranks.local_rank))

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


def _meet(ranks: Ranks, rendezvous: str, timeout: datetime.timedelta) -> Any:
    """The store that all ranks share, once each of them has been there; it names those that do not come."""
    store = _store(ranks, rendezvous, timeout)
    store.set(_here(ranks.global_rank), str(ranks.world_size))
    try:
        if ranks.is_first:
            store.wait([_here(global_rank) for global_rank in range(ranks.world_size)], timeout)
            _check_worlds([int(store.get(_here(global_rank))) for global_rank in range(ranks.world_size)])
            store.set(ALL_HERE, "")
        else:
            store.wait([ALL_HERE], timeout)
    except RuntimeError:
        raise MissingRanks(
            f"rank {ranks.global_rank} did not meet {_missing(store, ranks.world_size)} of {ranks.world_size} "
            f"within {_minutes(timeout)}",
            "look for the last lines of who is missing and at their nodes; "
            "ranks that only start slowly need a larger timeouts.meet_min",
        ) from None
    return store


def _check_worlds(world_sizes: list[int]) -> None:
    """Raise if some ranks were told of another number of ranks than rank 0."""
    if others := [rank for rank, size in enumerate(world_sizes) if size != world_sizes[0]]:
        raise MissingRanks(
            f"rank 0 was started as one of {world_sizes[0]} ranks, rank {others[0]} as one of {world_sizes[others[0]]}",
            "start all ranks by one command; MASTER_ADDR and MASTER_PORT of another job would also do this",
        )


def _missing(store: Any, world_size: int) -> str:
    try:
        missing = [str(rank) for rank in range(world_size) if not store.check([_here(rank)])]
    except RuntimeError:
        missing = ["0"]  # who keeps the store
    return f"rank {', '.join(missing[:16])}{' ...' if len(missing) > 16 else ''}"


def _store(ranks: Ranks, rendezvous: str, timeout: datetime.timedelta) -> Any:
    if rendezvous.startswith("file://"):
        return dist.FileStore(rendezvous.removeprefix("file://"), ranks.world_size)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # Under torchrun its agent keeps the store.
    is_host = ranks.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return dist.TCPStore(host, port, ranks.world_size, is_host, timeout, wait_for_workers=False)
    except RuntimeError as error:
        if is_host:
            raise MissingRanks(
                f"rank 0: cannot listen on {host}:{port} ({str(error).splitlines()[0]})",
                "see that MASTER_ADDR names this node, and take another MASTER_PORT if the port is in use",
            ) from None
        raise MissingRanks(
            f"rank {ranks.global_rank} did not find rank 0 at {host}:{port} within {_minutes(timeout)}",
            "look for the last lines of rank 0, and see that MASTER_ADDR names its node and the nodes reach each other",
        ) from None


def _here(global_rank: int) -> str:
    return f"here/{global_rank}"


def _minutes(duration: datetime.timedelta) -> str:
    return f"{duration.total_seconds() / 60:g} min"
