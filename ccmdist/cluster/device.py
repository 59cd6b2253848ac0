"""The device of this process."""

import os
import socket
from typing import Final

import torch

from ccmdist.cluster.ranks import Ranks, gpus_from_environment
from ccmdist.errors import EXIT_INTERNAL, CcmdistError

VARIABLE: Final = "CCMDIST_DEVICE"
"""Environment variable; "cpu" leaves GPUs alone."""


class BrokenNode(CcmdistError):  # noqa: N818 (named after what is wrong, as the others)
    """This node has not what the job was promised. Another node may have: exit code 70."""

    exit_code = EXIT_INTERNAL


def take_device(ranks: Ranks | None) -> torch.device:
    """Make one device the current one of this process, and return it: a GPU of its own, or the CPU.

    Args:
        ranks: The place of this process, or None when it was started alone. Where Slurm gives each task one GPU, a
            task sees one device whatever its local rank is.

    Raises:
        BrokenNode: If Slurm has given this process GPUs and PyTorch can use none of them.
    """
    if is_gpu_usable():
        torch.cuda.set_device((ranks.local_rank if ranks else 0) % torch.cuda.device_count())
    elif torch.backends.cuda.is_built() and (given := gpus_from_environment()) and os.environ.get(VARIABLE) != "cpu":
        # On the CPU a worker would draw for weeks, and a rank would wait for others that are on NCCL.
        raise BrokenNode(
            f"{socket.gethostname()}: Slurm has given this process the GPUs {given}, and PyTorch can use none",
            f"exclude the node (sbatch --exclude) and tell the site; {VARIABLE}=cpu computes without GPUs",
        )
    return current_device()


def current_device() -> torch.device:
    """The device that :func:`take_device` has made the current one."""
    return torch.device("cuda", torch.cuda.current_device()) if is_gpu_usable() else torch.device("cpu")


def is_gpu_usable() -> bool:
    """Whether this process computes on a GPU."""
    return os.environ.get(VARIABLE) != "cpu" and torch.cuda.is_available()
