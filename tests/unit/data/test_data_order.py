"""What an order gives for sets whose answer can be counted by hand, and the errors it raises."""

import hashlib
import time
from collections import Counter

import pytest

from ccmdist.data.cache_index import CacheEntry, Member
from ccmdist.data.order import Order
from ccmdist.errors import ConfigError

NOWHERE = Member(0, 0, 0)


def entry(index, shard="train-000000.tar", clinical_group="Control", num_text_tokens=10):
    return CacheEntry(f"k{index}", shard, clinical_group, f"s{index}", num_text_tokens, NOWHERE, NOWHERE)


def sharded(num_samples, samples_per_shard, clinical_group=lambda index: "Control"):
    return [entry(i, f"train-{i // samples_per_shard:06d}.tar", clinical_group(i)) for i in range(num_samples)]


def drawn(order, num_samples):
    cells = [order.cell(index) for index in range(num_samples // order.micro_batch_size)]
    return [sample for cell in cells for sample in cell]


def test_every_epoch_has_every_sample_once_and_another_order():
    order = Order(sharded(100, 10), 7, 1, "natural", 4096)
    epochs = [drawn(order, 300)[100 * epoch : 100 * (epoch + 1)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_is_this_one_on_every_machine():
    assert drawn(Order(sharded(12, 4), 3, 1, "natural", 4), 12) == [0, 1, 2, 3, 4, 6, 5, 7, 8, 9, 11, 10]
    assert drawn(Order(sharded(12, 4), 3, 1, "natural", 12), 12) == [0, 11, 6, 2, 1, 3, 7, 4, 10, 9, 8, 5]


def mixed(num_samples):
    """Samples of three groups and five text lengths over shards that are not sorted by either."""
    groups = ("Control", "T1NoDPN", "T1DPN", "Control")
    return [
        entry(i, f"train-{i // 37:06d}.tar", groups[i * i % 11 % 4], 200 + (i * 7919 % 101) ** 2 % 5)
        for i in range(num_samples)
    ]


@pytest.mark.parametrize(
    ("settings", "first", "digest"),
    [
        ((0, 1, "natural", 4096), 0, "a69134be9f0d1727"),
        ((7, 4, "natural", 64), 0, "0bca0af371bc2a7e"),
        ((7, 4, "natural", 64), 10**7, "e5931a371c987d3f"),
        ((3, 8, "clinical_groups", 200), 0, "6a6d32cad873377e"),
        ((3, 8, "clinical_groups", 200), 12_345, "d884264ca67c494f"),
        ((11, 3, "clinical_groups", 1), 999, "37b045053429f2ef"),
    ],
)
def test_cells_of_a_mixed_set_are_for_ever_these(settings, first, digest):
    """Runs that go on after an update must see what they would have seen."""
    order = Order(mixed(1500), *settings)
    cells = [order.cell(first + index) for index in range(1200)]
    assert hashlib.sha256(str(cells).encode()).hexdigest()[:16] == digest


def test_open_cells_are_carried_into_the_next_epoch():
    order = Order(sharded(10, 5), 0, 4, "natural", 10)
    samples = drawn(order, 20)
    assert Counter(samples) == Counter(2 * list(range(10)))
    assert sorted(samples[:10]) == list(range(10))
    assert [order.epoch_of(index) for index in range(6)] == [0, 0, 1, 1, 1, 2]


def test_a_text_length_rarer_than_a_cell_fills_one_over_several_epochs():
    entries = [entry(i) for i in range(8)] + [entry(8, num_text_tokens=99)]
    order = Order(entries, 1, 4, "natural", 100)
    cells = [order.cell(index) for index in range(2 * 8 + 2)]
    assert Counter(cell == (8, 8, 8, 8) for cell in cells) == {True: 2, False: 16}
    assert [order.epoch_of(index) for index, cell in enumerate(cells) if cell == (8, 8, 8, 8)] == [3, 7]


def test_a_small_window_reads_few_shards_at_a_time():
    entries = sharded(1000, 10)
    shards_of = [e.shard for e in entries]
    for window, most in ((1, 3), (20, 7)):
        samples = drawn(Order(entries, 5, 1, "natural", window), 1000)
        for start in range(0, 1000, 20):
            assert len({shards_of[i] for i in samples[start : start + 20]}) <= most
    wide = drawn(Order(entries, 5, 1, "natural", 1000), 1000)
    assert len({shards_of[i] for i in wide[:20]}) > 12


def test_a_window_of_an_epoch_shuffles_fully():
    # The mean place of a sample over many epochs is the middle one, wherever in its shard it lies.
    order = Order(sharded(20, 20), 2, 1, "natural", 20)
    samples = drawn(order, 20 * 400)
    for sample in (0, 19):
        mean = sum(place % 20 for place, found in enumerate(samples) if found == sample) / 400
        assert abs(mean - 9.5) < 4 * 5.77 / 400**0.5


def test_shards_sorted_by_group_are_mixed_in_every_stretch():
    entries = sharded(300, 10, lambda index: "Control" if index < 200 else "T1DPN")
    samples = drawn(Order(entries, 4, 1, "natural", 16), 300)
    for start in range(0, 300, 30):
        assert abs(sum(sample >= 200 for sample in samples[start : start + 30]) - 10) <= 3


def test_balanced_groups_are_drawn_equally_often_and_each_sample_of_one_in_turn():
    groups = ["Control"] * 12 + ["T1NoDPN"] * 5 + ["T1DPN"] * 3
    entries = [entry(i, f"train-{i // 4:06d}.tar", group, 10 + i % 2) for i, group in enumerate(groups)]
    order = Order(entries, 0, 1, "clinical_groups", 100)
    assert order.samples_per_epoch == 36
    samples = drawn(order, 36 * 15)
    for epoch in range(15):
        counts = Counter(groups[i] for i in samples[36 * epoch : 36 * (epoch + 1)])
        assert counts == {"Control": 12, "T1NoDPN": 12, "T1DPN": 12}
    assert Counter(samples) == {i: 15 if i < 12 else 36 if i < 17 else 60 for i in range(20)}


def test_a_global_batch_of_balanced_groups_mixes_them():
    groups = ["Control"] * 120 + ["T1NoDPN"] * 50 + ["T1DPN"] * 7
    entries = [entry(i, f"train-{i // 10:06d}.tar", group) for i, group in enumerate(groups)]
    samples = drawn(Order(entries, 0, 3, "clinical_groups", 30), 1080)
    for start in range(0, 1080, 36):
        counts = Counter(groups[i] for i in samples[start : start + 36])
        assert all(9 <= count <= 15 for count in counts.values()), counts


def test_ranks_take_the_cells_of_a_step_in_turn():
    order = Order(sharded(100, 10), 0, 2, "natural", 100)
    assert order.cells_of_step(3, 16, 1, 4) == (25, 29)
    assert order.cells_of_step(3, 16, 0, 1) == tuple(range(24, 32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"global_batch_size": 16, "world_size": 3},
            "global_batch_size 16 is 4 times micro_batch_size 4, which does not divide over 3 ranks; "
            "use global_batch_size 12 or 24, or 1, 2, 4 ranks",
        ),
        (
            {"global_batch_size": 4, "world_size": 2},
            "global_batch_size 4 is 1 times micro_batch_size 4, which does not divide over 2 ranks; "
            "use micro_batch_size 2, or use global_batch_size 8, or 1 rank",
        ),
        ({"global_batch_size": 18}, "global_batch_size 18 is not a multiple of micro_batch_size 4; use 16 or 20"),
        (
            {"global_batch_size": 32},
            "global_batch_size 32: there are only 30 training samples; use global_batch_size 28",
        ),
        (
            {"global_batch_size": 4, "num_samples": 3},
            "global_batch_size 4: there are only 3 training samples; "
            "use micro_batch_size and global_batch_size of at most 3",
        ),
    ],
)
def test_a_batch_that_does_not_fit_is_told_with_what_would(settings, message):
    order = Order(sharded(settings.get("num_samples", 30), 10), 0, 4, "natural", 100)
    with pytest.raises(ConfigError) as error:
        order.cells_of_step(0, settings["global_batch_size"], 0, settings.get("world_size", 1))
    assert str(error.value) == message


def test_unlabelled_samples_are_drawn_by_nature_and_refused_by_balance():
    entries = [entry(0), entry(1, clinical_group=None), entry(2, clinical_group=None)]
    assert sorted(drawn(Order(entries, 0, 1, "natural", 9), 3)) == [0, 1, 2]
    with pytest.raises(
        ConfigError, match="sample k1 of subject s1 has no clinical group, nor have 1 other samples of 3"
    ):
        Order(entries, 0, 1, "clinical_groups", 9)


def test_a_set_without_samples_is_refused():
    with pytest.raises(ConfigError, match="there are no samples"):
        Order([], 0, 1, "natural", 9)


def test_a_cell_of_a_late_epoch_costs_no_more_than_one_of_the_first():
    entries = sharded(20_000, 100, lambda index: "Control" if index % 5 else "T1DPN")
    order = Order(entries, 0, 4, "clinical_groups", 4096)
    start = time.process_time()
    cell = order.cell(10**9)
    assert time.process_time() - start < 1
    assert order.cell(10**9) == cell
    start = time.process_time()
    for index in range(10**9, 10**9 + 200):
        order.cell(index)
    assert time.process_time() - start < 1
