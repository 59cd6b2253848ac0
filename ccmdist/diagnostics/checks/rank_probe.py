"""One rank of a small all-reduce; the first one prints what it found as JSON.

RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python -m ccmdist.diagnostics.checks.rank_probe gloo
"""

import datetime
import json
import os
import socket
import sys
import time
from typing import Any, Final

import psutil

from ccmdist.cluster.ranks import ranks_from_environment

TIMEOUT_S: Final = 60
NUM_VALUES: Final = 4 << 20
"""16 MiB of fp32."""


def main() -> None:
    """Join the others, sum, and tell."""
    import torch
    import torch.distributed as dist

    ranks, backend = ranks_from_environment(), sys.argv[1]
    assert ranks is not None, "doctor starts ranks, never one process"
    if backend == "nccl":
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    dist.init_process_group(
        backend, rank=ranks.global_rank, world_size=ranks.world_size, timeout=datetime.timedelta(seconds=TIMEOUT_S)
    )
    values = torch.full((NUM_VALUES,), ranks.global_rank + 1.0, device="cuda" if backend == "nccl" else "cpu")
    dist.all_reduce(values.clone())
    begin = time.monotonic()
    dist.all_reduce(values)
    total = values[-1].item()
    seconds = time.monotonic() - begin
    if ranks.is_first:
        expected = ranks.world_size * (ranks.world_size + 1) / 2
        found = {"is_right": total == expected, "seconds": seconds, "interface": interface(backend)}
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
    dist.destroy_process_group()


def interface(backend: str) -> str:
    """The network interface that ranks of this host talk over, as far as it can be known."""
    if named := os.environ.get("NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"):
        return named
    if backend == "nccl":
        return "one that NCCL chose"
    try:  # gloo binds to what the host's own name resolves to
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return "lo"
    return interface_of(address, psutil.net_if_addrs())


def interface_of(address: str, interfaces: dict[str, Any]) -> str:
    """Name of the interface with ``address``."""
    if address.startswith("127."):
        return "lo"
    return next((name for name, given in interfaces.items() if any(a.address == address for a in given)), address)


if __name__ == "__main__":
    main()
