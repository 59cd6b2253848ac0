"""The cells that one rank trains on, from any step on, as micro-batches of tensors.

Worker i of n reads every n-th cell, and a loader takes from its workers in turn: the order of the batches is the
same for any number of workers. The stream knows its place from the step alone; it has no state to save.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ccmdist.data.cache_index import CacheEntry
from ccmdist.data.order import Order
from ccmdist.errors import CcmdistError


class SampleSource(Protocol):
    """Where samples are read: a latent cache, or the shards themselves."""

    def read(self, entry: CacheEntry) -> dict[str, Tensor]:
        """The tensors of a sample by name; of all samples of a cell they have the same shapes."""
        ...


def collated(source: SampleSource, entries: Sequence[CacheEntry]) -> dict[str, Any]:
    """Tensors of some samples, stacked, with their ``keys`` and ``clinical_groups``."""
    samples = [source.read(entry) for entry in entries]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]} | {
        "keys": [entry.key for entry in entries],
        "clinical_groups": [entry.clinical_group for entry in entries],
    }


class SampleStream(IterableDataset):
    """Micro-batches of one rank, without end.

    Each is a dictionary of what the source holds of the B samples of a cell (of a latent cache ``prompt_embeds``
    (B, L, D), ``image_latents`` and ``mask_latents`` (B, C, h, w)); ``keys`` and ``clinical_groups``; ``positions`` of
    the samples in the run, from which their randomness is drawn; ``step`` and ``accumulation_index``.

    It is the source of a webdataset.DataPipeline, or is read by :func:`batches`.

    Args:
        source: Where samples are read.
        entries: The samples that ``order`` was made for.
        order: Of the run.
        global_batch_size: Samples per step over all ranks.
        global_rank: Of this process.
        world_size: Number of ranks.
        first_step: Optimizer steps that are done.

    Raises:
        ConfigError: If a global batch does not divide over the ranks, or is larger than the set.
    """

    def __init__(
        self,
        source: SampleSource,
        entries: Sequence[CacheEntry],
        order: Order,
        global_batch_size: int,
        global_rank: int,
        world_size: int,
        first_step: int = 0,
    ) -> None:
        super().__init__()
        self.source, self.entries, self.order = source, entries, order
        self.share = (global_batch_size, global_rank, world_size)
        self.first_step = first_step
        self._cells_per_step = len(order.cells_of_step(first_step, *self.share))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            step, accumulation_index = divmod(number, self._cells_per_step)
            yield self._batch(self.first_step + step, accumulation_index)
            number += stride

    def _batch(self, step: int, accumulation_index: int) -> dict[str, Any]:
        cell = self.order.cells_of_step(step, *self.share)[accumulation_index]
        entries = [self.entries[index] for index in self.order.cell(cell)]
        first = cell * self.order.micro_batch_size
        return collated(self.source, entries) | {
            "positions": list(range(first, first + len(entries))),
            "step": step,
            "accumulation_index": accumulation_index,
        }


def batches(stream: SampleStream, num_workers: int, worker_init: Callable[[int], None]) -> Iterator[dict[str, Any]]:
    """The batches of ``stream``, read ahead by worker processes, and the next one taken over while this one is used.

    Args:
        stream: Of one rank.
        num_workers: 0 reads in this process.
        worker_init: Called in each worker with its number. It has to ignore the signals that stop a run: Slurm sends
            them to every process of a job step, and only the main one may react.

    Raises:
        CcmdistError: As in the worker, without its traceback.
    """
    loader = iter(DataLoader(_Told(stream), batch_size=None, num_workers=num_workers, worker_init_fn=worker_init))
    with ThreadPoolExecutor(1, "next-batch") as thread:
        coming = thread.submit(next, loader)
        while not isinstance(item := coming.result(), CcmdistError):
            coming = thread.submit(next, loader)
            yield item
        raise item


class _Told(IterableDataset):
    """A stream that ends with a user's error as its last item: a loader would wrap it into a traceback."""

    def __init__(self, stream: SampleStream) -> None:
        super().__init__()
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any] | CcmdistError]:
        try:
            yield from self.stream
        except CcmdistError as error:
            yield error
