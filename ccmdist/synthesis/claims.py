"""Who draws which batch right now, and in which order a worker looks for work; imports no torch.

A claim is a lock on a file of its own. The kernel holds it and gives it up when the process ends, however it ends, so
no claim outlives its worker and there is no list that could disagree with the batches on the disk. A claim only saves
work: two who draw one batch write the same bytes. Mind that a stopped process (SIGSTOP) keeps its claim, and that a
node which loses power keeps it until the file server notices, in about two minutes (the lease of NFS 4).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock


@contextlib.contextmanager
def claimed(folder: Path, batch: int) -> Iterator[bool]:
    """Whether this process has the batch to itself while the body runs; False if another live process has it.

    On a file system without locks everybody has everything.
    """
    path = folder / f"{batch:06d}"
    # Not a soft lock, should the kernel have none: that one would outlive a worker that was killed.
    lock = filelock.FileLock(path, timeout=0, fallback_to_soft=False)
    with contextlib.ExitStack() as held:
        try:
            lock.acquire()
        except filelock.Timeout:
            yield False
            return
        except OSError:
            yield True
            return
        held.callback(lock.release)
        held.callback(path.unlink, missing_ok=True)
        yield True


def share(num_batches: int, worker_index: int, num_workers: int) -> range:
    """The batches of a worker: ``worker_index::num_workers``."""
    return range(worker_index, num_batches, num_workers)


def order_of_help(num_batches: int, worker_index: int, num_workers: int) -> Iterator[int]:
    """All batches, in the order in which a worker whose own ones are done looks for work that others have left.

    Each helper begins with another worker's share, and at its far end, so that it rarely meets its owner or a helper.
    """
    for distance in range(1, num_workers + 1):
        yield from reversed(share(num_batches, (worker_index + distance) % num_workers, num_workers))
