"""Samples that are read one by one off the tars are those that are read in their order."""

import numpy as np
import pytest

from ccmdist.config.data import DataSettings, PhantomShardsConfig
from ccmdist.data.manifest import read_manifest
from ccmdist.data.phantom_shards import write_phantom_set
from ccmdist.data.reader import read_split
from ccmdist.data.shard_samples import ShardSamples
from ccmdist.data.views import views
from ccmdist.errors import ShardError


@pytest.fixture
def data(tmp_path):
    """Settings of a set of phantoms of 96 px, seen at 64 px and from two sides."""
    frames = {"subjects_per_group": 3, "frames_per_subject": 1, "val_fraction": 0.3, "test_fraction": 0}
    write_phantom_set(PhantomShardsConfig(out=tmp_path / "shards", size_px=96, samples_per_shard=4, **frames))
    return DataSettings(shards=tmp_path / "shards", model=tmp_path / "none", image_size_px=64, flips=("hflip",))


def test_samples_are_found_one_by_one_in_any_order(data):
    samples = ShardSamples(data)
    assert samples.digest == read_manifest(data.shards).digest
    for split, flips in (("train", data.flips), ("val", ())):
        expected = [view for triple in read_split(data.shards, split) for view in views(triple, 64, flips, "")]
        entries = samples.entries(split)
        assert [entry.key for entry in entries] == [view.key for view in expected]
        for entry, view in reversed(list(zip(entries, expected, strict=True))):
            found = samples.triple(entry)
            assert np.array_equal(found.image, view.image)
            assert np.array_equal(found.nerve_mask, view.nerve_mask)
            assert (found.key, found.meta.subject) == (view.key, entry.subject)
            assert found.meta.um_per_px == samples.um_per_px[entry.key] == pytest.approx(400 / 384 * 96 / 64)
            assert entry.clinical_group == view.meta.clinical_group
            assert entry.num_text_tokens == 0


def test_a_tar_that_is_not_the_one_of_the_manifest_is_refused_and_so_is_one_that_changes_later(data):
    samples = ShardSamples(data)
    entry = samples.entries("train")[-1]
    path = data.shards / entry.shard
    content = bytearray(path.read_bytes())
    content[entry.sample.offset + 600] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match=f"{entry.shard}: sample {entry.key} has changed since the run began"):
        samples.triple(entry)
    with pytest.raises(ShardError, match=f"{entry.shard}: sha256"):
        ShardSamples(data)
    path.unlink()
    with pytest.raises(ShardError, match=f"sample {entry.key} cannot be read"):
        samples.triple(entry)
