"""Which samples a run sees, and when: a pure function of the samples, the seed and the position in the run.

The atom is a cell: ``micro_batch_size`` samples of equal text length, so that nothing is ever padded. Cells are
numbered over the whole run; sample j of cell k stands at position k * micro_batch_size + j. Ranks, workers and
restarts only choose which cells they look at, so they cannot change what a cell holds.

* An epoch draws every clinical group a fixed number of times: as often as it has samples, or, balanced, as often as
  the largest group has. A group's draws fall to its text lengths in proportion, by exact integer arithmetic.
* Samples of one group and one text length are a stratum. It walks through the shards in an order that is random per
  epoch, shuffled over a window so that reads stay local, and its draws are spread evenly over the epoch. Any stretch
  of an epoch therefore holds the groups in their proportions, however the shards are sorted.
* Each sample goes into the open cell of its text length; a full cell is given out, open ones are carried into the
  next epoch.

How often a stratum has been drawn before an epoch has a closed form, so any cell of any epoch can be asked for
without walking through the epochs before it.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ccmdist.data.cache_index import CacheEntry
from ccmdist.data.cached_samples import CachedSamples
from ccmdist.errors import ConfigError

Balance = Literal["natural", "clinical_groups"]
Indices = NDArray[np.integer]
Places = NDArray[np.float64]

NUM_EPOCHS_HELD = 2
SHARDS, WINDOW, PLACE, ROUND = range(4)
"""What random bits are for; with the seed, the epoch and the stratum, their whole address."""


@dataclass(frozen=True)
class _Stratum:
    """The samples of one clinical group that have one text length."""

    number: int
    num_text_tokens: int
    members: Indices
    num_before: int
    """Samples in the earlier strata of the group."""
    num_in_group: int
    group_draws: int
    """Draws of the whole group per epoch, never fewer than it has samples."""

    def num_drawn(self, epoch: int) -> int:
        """Draws before the epoch begins. Those of a group's strata add up to exactly epoch * group_draws."""
        drawn, last = epoch * self.group_draws, self.num_before + len(self.members)
        return drawn * last // self.num_in_group - drawn * self.num_before // self.num_in_group


@dataclass(frozen=True)
class _Epoch:
    """One epoch: its draws, per text length in their order, and the cells that become full in it."""

    draws: dict[int, Indices]
    cell_lengths: Indices
    """Text length of each cell, in the order in which they become full."""
    cell_numbers: Indices
    """Number of each cell among those of its text length over the whole run."""


class Order:
    """The endless order of the samples of a run.

    Args:
        entries: The samples. Their order in this sequence is the order in which shards are read.
        seed: Of the run.
        micro_batch_size: Samples per cell.
        balance: "natural" draws every sample once per epoch; "clinical_groups" draws every group as often as the
            largest one, its samples in turn.
        shuffle_window: Samples over which an epoch's walk through the shards is shuffled. A window of an epoch or
            more shuffles fully.

    Raises:
        ConfigError: If there are no samples, or groups are to be balanced and a sample has none.
    """

    def __init__(
        self, entries: Sequence[CacheEntry], seed: int, micro_batch_size: int, balance: Balance, shuffle_window: int
    ) -> None:
        if not entries:
            raise ConfigError("order: there are no samples", "use a shard set whose train split is not empty")
        if balance == "clinical_groups":
            _refuse_unlabelled(entries)
        self.seed, self.micro_batch_size, self.shuffle_window = seed, micro_batch_size, shuffle_window
        samples = CachedSamples.of(entries)
        self.num_samples = len(samples)
        self._shard_of, self._num_shards = samples.shard_numbers, len(samples.shards)
        strata = _strata(samples, balance)
        lengths = sorted({stratum.num_text_tokens for stratum in strata})
        self._strata = {length: [s for s in strata if s.num_text_tokens == length] for length in lengths}
        self.samples_per_epoch = sum(stratum.num_drawn(1) for stratum in strata)
        self._held: dict[int, _Epoch] = {}

    def cell(self, index: int) -> tuple[int, ...]:
        """The samples of a cell, as indices into the entries.

        Args:
            index: Number of the cell in the run, from 0.
        """
        epoch = self.epoch_of(index)
        at = index - self._num_cells(epoch)
        plan = self._epoch(epoch)
        first = int(plan.cell_numbers[at]) * self.micro_batch_size
        return self._samples(int(plan.cell_lengths[at]), first, first + self.micro_batch_size, epoch)

    def epoch_of(self, index: int) -> int:
        """The epoch in which a cell becomes full."""
        # Each text length leaves less than one cell open, which bounds how far cells lag behind the samples.
        enough = (index + 1 + len(self._strata)) * self.micro_batch_size // self.samples_per_epoch + 2
        return bisect_right(range(enough + 1), index, key=self._num_cells) - 1

    def cells_of_step(self, step: int, global_batch_size: int, global_rank: int, world_size: int) -> tuple[int, ...]:
        """Numbers of the cells that a rank takes at an optimizer step, one for each of its accumulation indices.

        Raises:
            ConfigError: If a global batch is larger than the set, is no whole number of cells, or its cells do not
                divide over the ranks.
        """
        num_cells = self._cells_per_step(global_batch_size, world_size)
        return tuple(range(step * num_cells + global_rank, (step + 1) * num_cells, world_size))

    def _cells_per_step(self, global_batch_size: int, world_size: int) -> int:
        size = self.micro_batch_size
        if self.num_samples < global_batch_size:
            raise ConfigError(
                f"global_batch_size {global_batch_size}: there are only {self.num_samples} training samples",
                f"use global_batch_size {fitting}"
                if (fitting := self.num_samples // size * size)
                else f"use micro_batch_size and global_batch_size of at most {self.num_samples}",
            )
        if global_batch_size % size:
            raise ConfigError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {size}",
                f"use {_multiples_around(global_batch_size, size)}",
            )
        num_cells = global_batch_size // size
        if num_cells % world_size:
            counts = [str(ranks) for ranks in range(1, num_cells + 1) if num_cells % ranks == 0]
            smaller = [one for one in range(size - 1, 0, -1) if global_batch_size % (one * world_size) == 0][:1]
            raise ConfigError(
                f"global_batch_size {global_batch_size} is {num_cells} times micro_batch_size {size}, "
                f"which does not divide over {world_size} ranks",
                "".join(f"use micro_batch_size {one}, or " for one in smaller)
                + f"use global_batch_size {_multiples_around(global_batch_size, size * world_size)}, or "
                f"{', '.join(counts)} {'rank' if counts == ['1'] else 'ranks'}",
            )
        return num_cells

    def _num_drawn(self, num_text_tokens: int, epoch: int) -> int:
        """Draws of a text length before the epoch begins."""
        return sum(stratum.num_drawn(epoch) for stratum in self._strata[num_text_tokens])

    def _num_cells(self, epoch: int) -> int:
        """Cells that are full before the epoch begins."""
        return sum(self._num_drawn(length, epoch) // self.micro_batch_size for length in self._strata)

    def _samples(self, num_text_tokens: int, first: int, last: int, epoch: int) -> tuple[int, ...]:
        """Draws ``first`` to ``last`` of a text length, counted over the run; the latest falls into ``epoch``."""
        found: list[int] = []
        draws = self._epoch(epoch).draws[num_text_tokens]
        while True:
            start = self._num_drawn(num_text_tokens, epoch)
            found = draws[max(first - start, 0) : last - start].tolist() + found
            if start <= first:
                return tuple(found)
            last, epoch = start, epoch - 1
            draws, _ = self._draws(num_text_tokens, epoch)

    def _epoch(self, epoch: int) -> _Epoch:
        if (plan := self._held.get(epoch)) is None:
            plan = self._planned(epoch)
            latest = list(self._held.items())[-(NUM_EPOCHS_HELD - 1) :]
            self._held = dict([*latest, (epoch, plan)])  # put in place at once: two threads may ask
        return plan

    def _planned(self, epoch: int) -> _Epoch:
        size = self.micro_batch_size
        draws, lengths, numbers, places = {}, [], [], []
        for length in self._strata:
            draws[length], places_of_length = self._draws(length, epoch)
            before = self._num_drawn(length, epoch)
            last_of_cells = np.arange(size - 1 - before % size, len(draws[length]), size)
            lengths.append(np.full(len(last_of_cells), length, dtype=np.min_scalar_type(length)))
            numbers.append(before // size + np.arange(len(last_of_cells)))
            places.append(places_of_length[last_of_cells])
        order = np.argsort(np.concatenate(places), kind="stable")
        return _Epoch(draws, np.concatenate(lengths)[order], np.concatenate(numbers)[order])

    def _draws(self, num_text_tokens: int, epoch: int) -> tuple[Indices, Places]:
        """The samples of one text length in the order of an epoch, and their places in it, in [0, 1)."""
        strata = [self._draws_of(stratum, epoch) for stratum in self._strata[num_text_tokens]]
        samples, places = (np.concatenate(parts) for parts in zip(*strata, strict=True))
        order = np.argsort(places, kind="stable")
        return samples[order], places[order]

    def _draws_of(self, stratum: _Stratum, epoch: int) -> tuple[Indices, Places]:
        """A stratum's samples in the order of an epoch, and their places in it, in [0, 1)."""
        walk = self._walk(stratum, epoch)
        num = len(walk)
        start = np.arange(num) if self.shuffle_window < self.samples_per_epoch else np.zeros(num)
        window = max(self.shuffle_window * num / self.samples_per_epoch, 1.0)
        shuffled = walk[np.argsort(start + window * self._uniform(num, WINDOW, epoch, stratum.number), kind="stable")]
        return shuffled, (np.arange(num) + self._uniform(num, PLACE, epoch, stratum.number)) / max(num, 1)

    def _walk(self, stratum: _Stratum, epoch: int) -> Indices:
        """The draws of a stratum in an epoch, round by round, each round in the epoch's order of shards."""
        place_of_shard = np.argsort(np.argsort(self._uniform(self._num_shards, SHARDS, epoch, 0), kind="stable"))
        num = len(stratum.members)
        first, last = stratum.num_drawn(epoch), stratum.num_drawn(epoch + 1)
        rounds = [np.empty(0, dtype=stratum.members.dtype)]
        for number in range(first // num, -(-last // num)):
            turn = np.argsort(self._uniform(num, ROUND, number, stratum.number), kind="stable")
            drawn = np.sort(turn[max(first - number * num, 0) : last - number * num])
            members = stratum.members[drawn]
            rounds.append(members[np.argsort(place_of_shard[self._shard_of[members]], kind="stable")])
        return np.concatenate(rounds)

    def _uniform(self, num: int, purpose: int, epoch: int, stratum: int) -> Places:
        """Random numbers in [0, 1) that depend on their address alone.

        NumPy promises the raw bits of a bit generator for ever, but not what its distributions make of them.
        """
        bits = np.random.PCG64([self.seed, purpose, epoch, stratum]).random_raw(num)
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _strata(samples: CachedSamples, balance: Balance) -> tuple[_Stratum, ...]:
    """The strata, group by group in the order of the names, each group's by text length."""
    named = sorted(range(len(samples.groups)), key=lambda number: samples.groups[number] or "")
    sizes = np.bincount(samples.group_numbers, minlength=len(named)).tolist()
    strata: list[_Stratum] = []
    for group in named:
        members = np.flatnonzero(samples.group_numbers == group)
        lengths = samples.num_text_tokens[members]
        draws, num_before = sizes[group] if balance == "natural" else max(sizes), 0
        for length in np.unique(lengths).tolist():
            alike = members[lengths == length].astype(np.min_scalar_type(len(samples)))
            strata.append(_Stratum(len(strata), length, alike, num_before, sizes[group], draws))
            num_before += len(alike)
    return tuple(strata)


def _refuse_unlabelled(entries: Sequence[CacheEntry]) -> None:
    unlabelled = [entry for entry in entries if entry.clinical_group is None]
    if unlabelled:
        raise ConfigError(
            f"balance=clinical_groups: sample {unlabelled[0].key} of subject {unlabelled[0].subject} has no clinical "
            f"group, nor have {len(unlabelled) - 1} other samples of {len(entries)}",
            "label them in the source table, leave them out, or use balance=natural",
        )


def _multiples_around(value: int, factor: int) -> str:
    below, above = value // factor * factor, -(-value // factor) * factor
    return f"{below} or {above}" if below else str(above)
