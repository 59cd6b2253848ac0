"""Names, birthdays and hospital numbers that come in with frames are nowhere in what the chain leaves or says."""

import base64
import csv
import os
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.ccm.phantom import make_phantom
from ccmdist.data.audit import audit_set
from ccmdist.data.manifest import read_manifest
from ccmdist.data.reader import read_split
from tests.unit.data.test_data_dicom import dicom

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
SIZE_PX, NUM_FRAMES = 64, 24
NAME, BIRTH, NUMBER = "Kunigunde Müßiggang-Zwetschgenmeier", "1933-12-24", "H-4711-0815"
PLANTED = ("Kunigunde", "Müßiggang", "Zwetschgenmeier", BIRTH, "19331224", "24.12.1933", NUMBER, "4711-0815")
TEXT = f"{NAME} * {BIRTH} 19331224 24.12.1933 {NUMBER}"
ENCODINGS = ("utf-8", "utf-16-le", "utf-16-be", "latin-1")
PATTERNS = {text.lower().encode(encoding) for text in PLANTED for encoding in ENCODINGS}
TRAINING = ["num_steps=2", "global_batch_size=2", "micro_batch_size=2", "base=fp32", "checkpoint.every_steps=2"]
SHOWN = ["validation.every_steps=2", "validation.num_samples=1", "validation.sigmas=[0.5]", "adapter.lora_rank=4"]
SHOWN += ["monitor.images_every_steps=2"]
EVALUATION = ["num_bootstrap=100", "minimum.memorisation_held_out_images=10"]


def texts_of_a_png():
    info = PngInfo()
    info.add_text("Patient", TEXT)
    info.add_text("Comment", TEXT * 20, zip=True)
    info.add_itxt("Description", TEXT, zip=True)
    return info


def exif():
    found = Image.Exif()
    found[0x010E], found[0x013B], found[0x9286] = TEXT.encode(), NAME.encode(), TEXT.encode()
    return found.tobytes()


def saved(path, pixels, number):
    """A frame as one of the formats that come in, with the identifiers wherever the format has a place for them."""
    image, kind = Image.fromarray(pixels), ("png", "jpg", "tif", "dcm")[number % 4]
    path = path.with_suffix(f".{kind}")
    if kind == "png":
        image.save(path, pnginfo=texts_of_a_png(), exif=exif())
    elif kind == "jpg":
        image.save(path, exif=exif(), comment=TEXT.encode(), quality=95)
    elif kind == "tif":
        image.save(path, tiffinfo={270: TEXT, 315: NAME, 305: NUMBER, 306: BIRTH})
    else:
        plain = NAME.encode("ascii", "ignore").decode()
        about = {
            "PatientID": NUMBER,
            "PatientBirthDate": "19331224",
            "PatientComments": plain,
            "StudyDescription": NUMBER,
        }
        path.write_bytes(dicom(pixels, PatientName=f"Zwetschgenmeier^{plain.split()[0]}", **about))
    return path


def frames(folder):
    """A folder of frames, masks and a table in which nothing is not personal."""
    folder.mkdir()
    columns = ["image", "mask", "subject", "eye", "um_per_px", "clinical_group", "name", "born", "hospital number"]
    with (folder / "table.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for number in range(NUM_FRAMES):
            group = CLINICAL_GROUPS[number % 3]
            phantom = make_phantom(group, number, SIZE_PX)
            stem = folder / f"{NAME} {NUMBER} {BIRTH} {number:02d}"
            image = saved(stem, phantom.image, number)
            mask = folder / f"mask of {stem.name}.png"
            Image.fromarray(phantom.nerve_mask.astype(np.uint8) * 255).save(mask, pnginfo=texts_of_a_png())
            subject = f"{NAME} {NUMBER} {number // 2}-{number % 3}"
            table.writerow([image.name, mask.name, subject, "OD", "1.0417", group, NAME, BIRTH, NUMBER])
    return folder


def run(arguments, log):
    import torch

    from ccmdist.cli import exit_code
    from ccmdist.console import start_logging

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    start_logging()
    os.chdir(ROOT)
    sys.exit(exit_code(list(arguments)))


@pytest.fixture(scope="module")
def chain(forkserver, tmp_path_factory):
    """What a whole chain leaves of such frames, and all that it said."""
    source = frames(tmp_path_factory.mktemp("source") / "frames")
    out = tmp_path_factory.mktemp("chain")

    def ccmdist(*arguments, code=0):
        child = forkserver.Process(target=run, args=(arguments, str(out / "log.txt")))
        child.start()
        child.join(timeout=200)
        assert child.exitcode == code, (out / "log.txt").read_text()

    data = [f"data.shards={out}/shards", f"data.model={out}/model", f"data.cache={out}/cache"]
    data += [f"data.image_size_px={SIZE_PX}", "data.dtype=fp32"]
    training = [str(ROOT / "configs/train/tiny.yaml"), f"run={out}/run", *data, *TRAINING, *SHOWN]
    fractions = ["val_fraction=0.3", "test_fraction=0.3"]
    ccmdist("shards", "folders", f"source={source}", f"out={out}/shards", *fractions)
    ccmdist("model", "make", "--size", "tiny", "--fitted", "--out", f"{out}/model")
    ccmdist("precompute", *data)
    ccmdist("job", "snapshot", "train", *training)
    ccmdist("train", *training)
    ccmdist("synthesize", *data, f"adapter={out}/run/adapter", f"out={out}/synthetic", "denoise_steps=2")
    report = [f"real={out}/shards", f"synthetic.one={out}/synthetic", f"out={out}/report", *EVALUATION]
    ccmdist("evaluate", *report)
    ccmdist("job", "snapshot", "evaluate", *report)
    released = ["release", f"{out}/synthetic", "--report", f"{out}/report", "--out", f"{out}/released"]
    ccmdist(*released)
    return source, out


def places(data, depth=0):
    """The bytes, and those that are packed in them: zlib streams, and pictures in pages."""
    yield data
    if depth > 2:
        return
    for match in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", data):
        stream = zlib.decompressobj()
        try:
            inflated = stream.decompress(data[match.start() :], 1 << 22)
        except zlib.error:
            continue
        if len(inflated) > 8:
            yield from places(inflated, depth + 2)
    for match in re.finditer(rb"base64,([A-Za-z0-9+/=]+)", data):
        yield from places(base64.b64decode(match[1]), depth + 1)


def leaks(path):
    return [pattern for part in places(path.read_bytes()) for pattern in PATTERNS if pattern in part.lower()]


def files(folder):
    # Code and the base's weights are ours and know of no frame; whatever was made from frames is looked at.
    ours = {"model", "code"}
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not ours & set(path.parts)]


def test_the_search_finds_every_identifier_where_it_was_planted(chain):
    source, _ = chain
    planted = [path for path in files(source) if path.suffix != ".csv"]
    assert len(planted) == 2 * NUM_FRAMES
    assert all(leaks(path) for path in planted), [path.name for path in planted if not leaks(path)]
    found = {pattern for path in files(source) for pattern in leaks(path)}
    assert found >= {text.lower().encode() for text in ("Kunigunde", "Zwetschgenmeier", BIRTH, "19331224", NUMBER)}


def test_no_byte_of_an_identifier_leaves_the_source_folder(chain):
    _, out = chain
    looked_at = files(out)
    assert {path: found for path in looked_at if (found := leaks(path))} == {}
    assert not [path for path in out.rglob("*") if any(text.lower() in path.name.lower() for text in PLANTED)]
    kinds = {str(path.relative_to(out)).split("/")[0] for path in looked_at}
    assert kinds >= {"shards", "cache", "run", "synthetic", "report", "released", "log.txt"}
    names = [path.name for path in looked_at]
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert {"report.html", "report.json", "config.json", "plan.json"} <= set(names)


def test_what_was_said_names_columns_and_counts_and_nobody(chain):
    told = (chain[1] / "log.txt").read_text()
    assert "columns that are not packed: name, born, hospital number" in told
    assert "gate: one passes" in told
    assert f"released: released {len(list(read_split(chain[1] / 'released', 'test')))} images" in told


def test_what_was_packed_is_clean_in_every_byte(chain):
    for name in ("shards", "synthetic", "released"):
        folder = chain[1] / name
        assert "pixels, codes, numbers and digests only" in audit_set(folder, read_manifest(folder))
