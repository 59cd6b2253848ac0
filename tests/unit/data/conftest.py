"""A small set of phantoms, copied by tests that damage it, and a folder of frames, spoilt by tests that pack it."""

import csv
import io
import logging
import shutil

import numpy as np
import pytest
from PIL import Image

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.config.data import FolderShardsConfig, PhantomShardsConfig
from ccmdist.data.folder_shards import write_folder_set
from ccmdist.data.phantom_shards import write_phantom_set
from ccmdist.errors import ShardError

COLUMNS = ("image", "mask", "subject", "eye", "um_per_px", "clinical_group")
NAMES = ("Zephyrina Quix", "MRN-88412", "1961-02-03", "Élodie SS", "p5", "p6", "p7", "p8", "p9")


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


class Source:
    """A folder of frames that a test may spoil before it is packed."""

    def __init__(self, folder):
        self.folder = folder
        self.rows = []
        for name in ("images", "masks"):
            (folder / name).mkdir(parents=True)

    def add(self, subject="p1", clinical_group="Control", eye="OD", image_options=None, **cells):
        number = len(self.rows)
        rng = np.random.default_rng(number)
        image, mask = rng.integers(1, 256, (48, 48), dtype=np.uint8), np.zeros((48, 48), np.uint8)
        mask[number % 40 : number % 40 + 3] = 255
        row = {"image": f"images/{subject}_{number}.png", "mask": f"masks/{subject}_{number}.png", "subject": subject}
        Image.fromarray(image).save(self.folder / row["image"], **image_options or {})
        Image.fromarray(mask).save(self.folder / row["mask"])
        self.rows.append(row | {"eye": eye, "um_per_px": "1.0417", "clinical_group": clinical_group} | cells)
        return self

    def add_cohort(self):
        for number, name in enumerate(NAMES):
            for eye in ("OD", "OS"):
                self.add(name, CLINICAL_GROUPS[number % 3], eye, region="central" if eye == "OD" else "")
        return self

    def write_table(self, rows=None, delimiter=",", encoding="utf-8"):
        rows = self.rows if rows is None else rows
        buffer = io.StringIO()
        writer = csv.DictWriter(
            buffer, dict.fromkeys([*COLUMNS, *[name for row in rows for name in row]]), delimiter=delimiter
        )
        writer.writeheader()
        writer.writerows(rows)
        (self.folder / "table.csv").write_bytes(buffer.getvalue().encode(encoding))

    def config(self, **changes):
        return FolderShardsConfig(source=self.folder, out=self.folder.parent / "sets" / "out", **changes)

    def pack(self, **changes):
        self.write_table()
        return write_folder_set(self.config(**changes))

    def refusal(self, **changes):
        with pytest.raises(ShardError) as error:
            self.pack(**changes)
        assert not (self.folder.parent / "sets").exists()
        return str(error.value).removeprefix(f"{self.folder / 'table.csv'}: ")


@pytest.fixture
def source(tmp_path):
    return Source(tmp_path / "source")


@pytest.fixture
def logged(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ccmdist"), "propagate", True)
    caplog.set_level(logging.INFO, "ccmdist")
    return caplog
