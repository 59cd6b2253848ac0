"""The device of this process."""

import torch

from ccmdist.cluster.ranks import Ranks


def take_device(ranks: Ranks | None) -> torch.device:
    """Make one device the current one of this process, and return it: a GPU of its own, or the CPU.

    Args:
        ranks: The place of this process, or None when it was started alone. Where Slurm gives each task one GPU, a
            task sees one device whatever its local rank is.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = (ranks.local_rank if ranks else 0) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
