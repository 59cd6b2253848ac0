"""A rank's batches are those of the order, from any step on, with any number of workers; a damaged sample is told."""

import threading
from itertools import islice

import pytest
import torch
import webdataset

from ccmdist.data.cache_index import CacheEntry, Member
from ccmdist.data.order import Order
from ccmdist.data.stream import SampleStream, batches
from ccmdist.errors import CacheError, ConfigError

NOWHERE = Member(0, 0, 0)
ENTRIES = [CacheEntry(f"k{i}", f"train-{i // 4:06d}.tar", "Control", f"s{i}", 5, NOWHERE, NOWHERE) for i in range(12)]


class Numbers:
    """A cache whose tensors say which sample they belong to."""

    def __init__(self, damaged=None):
        self.damaged = damaged

    def read(self, entry):
        if entry.key == self.damaged:
            raise CacheError(f"member {entry.key}.safetensors is damaged", "run `ccmdist precompute`")
        return {"prompt_embeds": torch.full((5, 2), float(entry.key[1:])), "image_latents": torch.zeros(3, 1, 1)}


def stream(rank=0, world_size=1, first_step=0, cache=None, micro_batch_size=2):
    order = Order(ENTRIES, 0, micro_batch_size, "natural", 4)
    return SampleStream(cache or Numbers(), ENTRIES, order, 4, rank, world_size, first_step)


def taken(source, num):
    return [
        (batch["step"], batch["accumulation_index"], batch["positions"], batch["keys"]) for batch in islice(source, num)
    ]


def test_batches_hold_the_cells_of_the_order_with_their_positions():
    source = stream()
    found = list(islice(source, 6))
    order = source.order
    for number, batch in enumerate(found):
        assert (batch["step"], batch["accumulation_index"]) == divmod(number, 2)
        assert batch["positions"] == [2 * number, 2 * number + 1]
        assert batch["keys"] == [f"k{index}" for index in order.cell(number)]
        assert batch["prompt_embeds"].shape == (2, 5, 2)
        assert batch["prompt_embeds"][:, 0, 0].tolist() == [float(key[1:]) for key in batch["keys"]]
        assert batch["image_latents"].shape == (2, 3, 1, 1)
    assert sorted(key for batch in found for key in batch["keys"]) == sorted(entry.key for entry in ENTRIES)


def test_a_stream_that_starts_later_goes_on_exactly_there():
    assert taken(stream(first_step=5), 8) == taken(stream(), 18)[10:]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_ranks_together_see_what_one_rank_sees(world_size):
    alone = taken(stream(), 8)
    together = [taken(stream(rank, world_size), 8 // world_size) for rank in range(world_size)]
    seen = {tuple(positions): keys for of_rank in together for _, _, positions, keys in of_rank}
    assert seen == {tuple(positions): keys for _, _, positions, keys in alone}


def _nothing(worker):
    pass


def test_the_number_of_workers_does_not_change_the_batches():
    alone = taken(batches(stream(first_step=1), 0, _nothing), 7)
    assert alone == taken(stream(first_step=1), 7)
    assert alone == taken(batches(stream(first_step=1), 2, _nothing), 7)


def test_the_next_batch_is_read_while_this_one_is_used():
    class Watched(Numbers):
        num_read, has_read_next = 0, threading.Event()

        def read(self, entry):
            self.num_read += 1
            if self.num_read == 4:
                self.has_read_next.set()
            return super().read(entry)

    cache = Watched()
    source = batches(stream(cache=cache), 0, _nothing)
    assert next(source)["positions"] == [0, 1]
    assert cache.has_read_next.wait(20), "nobody reads the second batch of two samples"
    source.close()
    assert cache.num_read == 4


def test_a_stream_is_a_source_of_a_webdataset_pipeline():
    pipeline = webdataset.DataPipeline(stream(), webdataset.map(lambda batch: batch["keys"]))
    assert list(islice(pipeline, 5)) == [keys for *_, keys in taken(stream(), 5)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_sample_is_told_as_it_is_without_the_traceback_of_a_worker(num_workers):
    source = stream(cache=Numbers(damaged="k7"))
    with pytest.raises(CacheError) as error:
        list(islice(batches(source, num_workers, _nothing), 6))
    assert str(error.value) == "member k7.safetensors is damaged; run `ccmdist precompute`"


def test_a_global_batch_that_does_not_divide_is_refused_when_the_stream_is_made():
    with pytest.raises(ConfigError, match="does not divide over 3 ranks"):
        stream(world_size=3)
