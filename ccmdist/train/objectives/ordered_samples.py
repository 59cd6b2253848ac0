"""What all objectives have in common: samples, and the order in which a run sees them."""

from collections.abc import Iterable, Sequence

from ccmdist.adapters.growth import RankGrowth
from ccmdist.cluster.preemption import ignore_stop_signals
from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.config.train import TrainConfig
from ccmdist.data.cache_index import CacheEntry
from ccmdist.data.order import Order
from ccmdist.data.stream import SampleSource, SampleStream, batches
from ccmdist.train.objectives.objective import Batch


class OrderedSamples:
    """The training samples, in the order of the run."""

    growth: RankGrowth | None = None
    """Of ranks that grow; see :class:`Objective`."""
    cut_sets: frozenset[str] = frozenset()
    """None; see :class:`Objective`."""

    def __init__(
        self, config: TrainConfig, group: ProcessGroup, source: SampleSource, entries: Sequence[CacheEntry]
    ) -> None:
        """Plan the order.

        Args:
            config: Of the run.
            group: The ranks.
            source: Where samples are read.
            entries: Those of the train split.

        Raises:
            ConfigError: If there are too few samples, or the batch does not divide over the ranks.
        """
        self.config, self.group, self.source, self.entries = config, group, source, entries
        self.order = Order(entries, config.seed, config.micro_batch_size, config.balance, config.shuffle_window)
        self.order.cells_of_step(0, config.global_batch_size, group.ranks.global_rank, group.ranks.world_size)

    def batches(self, first_step: int) -> Iterable[Batch]:
        """This rank's micro-batches from ``first_step`` on."""
        ranks = self.group.ranks
        share = (self.config.global_batch_size, ranks.global_rank, ranks.world_size)
        stream = SampleStream(self.source, self.entries, self.order, *share, first_step)
        return batches(stream, self.config.num_loader_workers, ignore_stop_signals)


def spread_over(entries: Sequence[CacheEntry], count: int) -> Sequence[CacheEntry]:
    """Up to ``count`` of the samples, evenly spread."""
    return tuple(entries[i * len(entries) // count] for i in range(count)) if len(entries) > count else entries


def shared_by_ranks(entries: Sequence[CacheEntry], group: ProcessGroup) -> Iterable[tuple[CacheEntry, int]]:
    """The samples of this rank, each with its weight in a sum.

    Every rank runs equally many forwards, for each of them is a collective; what is one too many weighs nothing.
    """
    ranks, num = group.ranks, len(entries)
    for index in range(ranks.global_rank, -(-num // ranks.world_size) * ranks.world_size, ranks.world_size):
        yield entries[index % num], int(index < num)
