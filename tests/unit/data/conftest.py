"""A small shard set of phantoms, made once per session and copied by tests that damage it."""

import shutil

import pytest

from ccmdist.config.data import PhantomShardsConfig
from ccmdist.data.phantom_shards import write_phantom_set


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """Folder of 18 phantoms of 64 px in 6 shards; must not be changed."""
    out = tmp_path_factory.mktemp("sets") / "phantoms"
    fractions = {"val_fraction": 0.33, "test_fraction": 0.33}
    write_phantom_set(
        PhantomShardsConfig(
            out=out, subjects_per_group=3, frames_per_subject=2, size_px=64, samples_per_shard=4, **fractions
        )
    )
    return out


@pytest.fixture
def damaged(phantoms, tmp_path):
    """A copy of the set, to be damaged."""
    return shutil.copytree(phantoms, tmp_path / "set")
