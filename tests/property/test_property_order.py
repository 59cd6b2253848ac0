"""Laws of the order of samples, for all sets, seeds and sizes."""

import itertools
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from ccmdist.data.cache_index import CacheEntry, Member
from ccmdist.data.order import Order

NOWHERE = Member(0, 0, 0)
GROUPS = ("Control", "T1NoDPN", "T1DPN")


def entries_of(rows):
    return [
        CacheEntry(f"k{i}", f"train-{shard:06d}.tar", group, f"s{i}", length, NOWHERE, NOWHERE)
        for i, (shard, group, length) in enumerate(sorted(rows, key=lambda row: row[0]))
    ]


rows = st.tuples(st.integers(0, 4), st.sampled_from(GROUPS), st.integers(20, 23))
sets = st.lists(rows, min_size=1, max_size=40).map(entries_of)
natural = st.tuples(sets, st.integers(0, 9), st.integers(1, 7), st.just("natural"), st.sampled_from([1, 5, 100]))
balanced = st.tuples(
    sets, st.integers(0, 9), st.integers(1, 7), st.just("clinical_groups"), st.sampled_from([1, 5, 100])
)


@settings(max_examples=60)
@given(natural)
def test_the_draws_of_a_text_length_are_its_samples_once_per_epoch(arguments):
    entries = arguments[0]
    order = Order(*arguments)
    draws = {}
    for index in itertools.takewhile(lambda index: order.epoch_of(index) < 4, itertools.count()):
        cell = order.cell(index)
        draws.setdefault(entries[cell[0]].num_text_tokens, []).extend(cell)
    for length, samples in draws.items():
        members = [i for i, entry in enumerate(entries) if entry.num_text_tokens == length]
        whole = len(samples) // len(members) * len(members)
        for start in range(0, whole, len(members)):
            assert sorted(samples[start : start + len(members)]) == members
        assert len(samples) > 4 * len(members) - arguments[2]


@settings(max_examples=60)
@given(st.data(), sets, st.integers(0, 9), st.integers(1, 7), st.sampled_from(["natural", "clinical_groups"]))
def test_any_cell_asked_for_alone_is_the_one_of_the_sequence(data, entries, seed, micro_batch_size, balance):
    sequence = Order(entries, seed, micro_batch_size, balance, 10)
    cells = [sequence.cell(index) for index in range(120)]
    asked = data.draw(st.lists(st.integers(0, 119), min_size=1, max_size=8))
    other = Order(entries, seed, micro_batch_size, balance, 10)
    assert [other.cell(index) for index in asked] == [cells[index] for index in asked]


@settings(max_examples=60)
@given(st.one_of(natural, balanced), st.integers(0, 10**6))
def test_the_samples_of_a_cell_have_one_text_length(arguments, index):
    entries, _, micro_batch_size, _, _ = arguments
    cell = Order(*arguments).cell(index)
    assert len(cell) == micro_batch_size
    assert len({entries[sample].num_text_tokens for sample in cell}) == 1


@settings(max_examples=100)
@given(st.integers(1, 6), st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 8))
def test_all_numbers_of_ranks_together_take_the_same_cells_in_the_same_order(size, step, accumulation, world_size):
    num_cells = accumulation * world_size
    entries = entries_of([(0, "Control", 20)] * (num_cells * size))
    order = Order(entries, 0, size, "natural", 10)
    alone = order.cells_of_step(step, num_cells * size, 0, 1)
    ranks = [order.cells_of_step(step, num_cells * size, rank, world_size) for rank in range(world_size)]
    assert [cell for cells in zip(*ranks, strict=True) for cell in cells] == list(alone)
    assert alone == tuple(range(step * num_cells, (step + 1) * num_cells))


@settings(max_examples=60)
@given(balanced)
def test_balance_draws_each_group_as_often_as_the_largest_and_its_samples_evenly(arguments):
    entries = arguments[0]
    order = Order(*arguments[:2], 1, *arguments[3:])
    sizes = Counter(entry.clinical_group for entry in entries)
    largest = max(sizes.values())
    assert order.samples_per_epoch == largest * len(sizes)
    num_epochs = 5
    samples = [order.cell(index)[0] for index in range(num_epochs * order.samples_per_epoch)]
    for epoch in range(num_epochs):
        part = samples[epoch * order.samples_per_epoch : (epoch + 1) * order.samples_per_epoch]
        assert Counter(entries[i].clinical_group for i in part) == dict.fromkeys(sizes, largest)
    counts = Counter(samples)
    for index, entry in enumerate(entries):
        assert abs(counts[index] - num_epochs * largest / sizes[entry.clinical_group]) < 2


one_length = st.lists(st.tuples(st.integers(0, 4), st.sampled_from(GROUPS), st.just(20)), min_size=30, max_size=90)


@settings(max_examples=60)
@given(
    one_length.map(entries_of), st.integers(0, 9), st.sampled_from([1, 5, 100]), st.integers(0, 90), st.integers(1, 60)
)
def test_every_stretch_of_an_epoch_holds_the_groups_in_equal_parts(entries, seed, window, start, length):
    order = Order(entries, seed, 1, "clinical_groups", window)
    groups = {entry.clinical_group for entry in entries}
    epoch = [entries[order.cell(index)[0]].clinical_group for index in range(order.samples_per_epoch)]
    stretch = epoch[start : start + length]
    for group in groups:
        # The j-th of q draws falls between j/q and (j+1)/q of the epoch: two too many or too few, here and elsewhere.
        assert abs(stretch.count(group) - len(stretch) / len(groups)) <= 4
