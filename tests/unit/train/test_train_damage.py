"""A checkpoint of which any byte has changed is never taken for the one that was committed."""

import pytest

from ccmdist.errors import CheckpointError
from ccmdist.train.checkpoint import CheckpointStore, newest_valid, verified
from tests.unit.train.one_rank import OneRank, holds, state

FACTS = {"adam_steps": {"adapter": 51}, "samples_seen": 204, "base_digest": "5f" * 32}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with checkpoints of steps 50 and 51."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (50, 51):
        assert CheckpointStore(folder, OneRank(), keep=2, attempt=0).save(step, state(step), FACTS) == ""
    return folder


@pytest.mark.parametrize("name", ["manifest.json", "slices-00000.safetensors"])
def test_a_flipped_bit_anywhere_is_seen(two, name):
    file = two / "step-00000051" / name
    data = file.read_bytes()
    try:
        for position in range(len(data)):
            bit = 1 << (position % 7)
            file.write_bytes(data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :])
            with pytest.raises(CheckpointError, match="step-00000051"):
                verified(file.parent)
        assert holds(newest_valid(two), 50)
    finally:
        file.write_bytes(data)
    assert holds(newest_valid(two), 51)


def test_a_number_that_a_flipped_bit_made_another_number_is_seen(two):
    file = two / "step-00000051" / "manifest.json"
    data = file.read_text()
    try:
        file.write_text(data.replace('"adapter": 51', '"adapter": 50'))
        with pytest.raises(CheckpointError) as caught:
            verified(file.parent)
    finally:
        file.write_text(data)
    assert str(caught.value) == f"{file.parent}: manifest.json differs from what was committed"
