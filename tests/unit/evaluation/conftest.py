"""What more than one module compares."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from ccmdist.config.data import PhantomShardsConfig
from ccmdist.data.phantom_shards import write_phantom_set
from ccmdist.data.reader import read_split
from ccmdist.data.writer import write_set
from tests.unit.evaluation.resembling_sets import drawn, provenance

SIZE_PX = 96


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """Phantoms; a set that resembles them; one whose nerves lie 4 px too low."""
    root = tmp_path_factory.mktemp("sets")
    settings = {
        "subjects_per_group": 6,
        "frames_per_subject": 2,
        "test_fraction": 0.6,
        "val_fraction": 0,
        "size_px": SIZE_PX,
    }
    manifest = write_phantom_set(PhantomShardsConfig(out=root / "real", **settings))
    rng = np.random.default_rng(0)
    real = list(read_split(root / "real", "test"))
    close = (drawn(t, t.image + rng.normal(0, 4, t.image.shape), provenance(t, manifest.digest)) for t in real)
    write_set(root / "close", "synthetic", close, 16)

    def moved(triple):
        nerves = np.roll(gaussian_filter(triple.nerve_mask.astype(float), 1), 4, axis=0)
        return 60 + 120 * nerves + rng.normal(0, 12, nerves.shape)

    far = (drawn(t, moved(t), provenance(t, manifest.digest, "untuned")) for t in real)
    write_set(root / "far", "synthetic", far, 16)
    return root
