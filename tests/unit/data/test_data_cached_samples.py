"""Columns of a cache give back every entry as it was, take few bytes, and make the same order as the entries would."""

import copy
import hashlib
from dataclasses import replace

import numpy as np
import pytest

from ccmdist.data.cache_index import CacheEntry, Member
from ccmdist.data.cached_samples import CachedSamples
from ccmdist.data.order import Order


def entry(number, shard=None):
    """A sample with the keys of a pseudonymised set, in a shard of 3 GB."""
    name, subject = (hashlib.sha256(f"{kind}{number}".encode()).hexdigest()[:16] for kind in "fs")
    group = ("Control", "T1NoDPN", "T1DPN", None)[number % 7 % 4]
    shard = f"train-{number // 1000:06d}.tar" if shard is None else shard
    start = number % 1000 * 3_400_000
    negative = Member(start + 1_900_000, 1_400_000 + number % 5, number * 40_503 % 2**32)
    sample = Member(start, 1_840_000 + number % 3, number * 2_654_435_761 % 2**32)
    return CacheEntry(f"s-{subject}-{name}", shard, group, f"s-{subject}", 250 + number % 3, sample, negative)


@pytest.mark.parametrize("num_samples", [0, 1, 63, 64, 65, 5000])
def test_entries_come_back_as_they_were(num_samples):
    entries = [entry(number) for number in range(num_samples)]
    samples = CachedSamples(iter(entries))
    assert len(samples) == num_samples
    assert list(samples) == entries
    assert [samples[index] for index in range(num_samples)] == entries
    assert samples[-3:] == tuple(entries[-3:])
    assert samples[1:40:7] == tuple(entries[1:40:7])
    with pytest.raises(IndexError):
        samples[num_samples]


def test_one_entry_has_the_types_of_the_original():
    found = CachedSamples([entry(5)])[-1]
    assert found == entry(5)
    assert type(found.sample.offset) is type(found.num_text_tokens) is int
    assert copy.deepcopy(CachedSamples([entry(5)]))[0] == entry(5)  # as it goes to another process


def test_numbers_of_any_size_are_kept_whatever_the_others_are():
    large = CacheEntry("k", "t", None, "s", 70_000, Member(2**40, 2**33, 2**32 - 1), Member(0, 0, 0))
    shared = replace(entry(9002), text=Member(2**41, 2**22, 77))
    entries = [*(entry(number) for number in range(9000)), large, entry(9001), shared]
    assert list(CachedSamples(entries)) == entries


def test_a_sample_takes_at_most_64_bytes():
    samples = CachedSamples(entry(number) for number in range(20_000))
    assert samples.num_bytes / len(samples) <= 64


def test_columns_make_the_order_that_their_entries_make():
    entries = [entry(number, f"train-{number * 31 % 7:06d}.tar") for number in range(500)]
    samples = CachedSamples(entries)
    assert [samples.shards[number] for number in samples.shard_numbers] == [one.shard for one in entries]
    assert [samples.groups[number] for number in samples.group_numbers] == [one.clinical_group for one in entries]
    assert np.array_equal(samples.num_text_tokens, [one.num_text_tokens for one in entries])
    of_columns, of_entries = (Order(given, 3, 4, "natural", 50) for given in (samples, entries))
    assert [of_columns.cell(index) for index in range(300)] == [of_entries.cell(index) for index in range(300)]
