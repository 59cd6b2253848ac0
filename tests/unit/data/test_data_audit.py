"""Whatever a byte of a shard could hold besides pixels, codes and numbers is found, wherever it stands."""

import hashlib
import json
import struct
import tarfile
import zlib
from dataclasses import replace

import pytest

from ccmdist.config.data import PhantomShardsConfig
from ccmdist.data.audit import WORDS, audit_set
from ccmdist.data.manifest import commit_manifest, read_manifest
from ccmdist.data.phantom_shards import sample, write_phantom_set
from ccmdist.data.triple import members_of
from ccmdist.data.writer import write_set
from ccmdist.errors import ShardError
from ccmdist.synthesis.plan import Batch, Plan, PlanSettings, Request

NAME = b"Kunigunde Zwetschgenmeier"


def plain_header(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunk(png, new, at=33):
    return png[:at] + new + png[at:]


def hidden_in_pixels(png):
    start = png.index(b"IDAT") - 4
    length = struct.unpack(">I", png[start : start + 4])[0]
    body = png[start + 8 : start + 8 + length]
    return png[:start] + chunk(b"IDAT", zlib.compress(zlib.decompress(body) + NAME)) + png[start + length + 12 :]


def changed_fields(text, **changes):
    return (json.dumps(json.loads(text) | changes, sort_keys=True) + "\n").encode()


def packed(folder, members, header=plain_header, padding=b"\0", tail=b""):
    """A set of one sample, whose tar holds what its manifest promises and a little more."""
    folder.mkdir()
    data = b""
    for ending, content in members.items():
        data += header(f"a-0.{ending}", len(content)) + content
        data += (padding * 512)[: -len(content) % 512]
    data += bytes(1024) + tail
    (folder / "test-000000.tar").write_bytes(data)
    subject = json.loads(members["json"])["subject"]
    entry = write_set(folder.with_name("pattern"), "phantom", [("test", sample(0, "Control", 0, 0, 64))], 4).shards[0]
    sha256 = hashlib.sha256(data).hexdigest()
    commit_manifest(folder, "phantom", [replace(entry, num_bytes=len(data), sha256=sha256, subjects=(subject,))])
    return folder


def members():
    return members_of(sample(0, "Control", 0, 0, 64))


CASES = {
    "PNG text": (
        lambda m: m | {"image.png": with_chunk(m["image.png"], chunk(b"tEXt", b"Name\0" + NAME))},
        "chunk tEXt",
    ),
    "compressed PNG text": (
        lambda m: m | {"mask.png": with_chunk(m["mask.png"], chunk(b"zTXt", b"Name\0\0" + zlib.compress(NAME)))},
        "chunk zTXt",
    ),
    "EXIF": (lambda m: m | {"image.png": with_chunk(m["image.png"], chunk(b"eXIf", NAME))}, "chunk eXIf"),
    "behind a picture": (lambda m: m | {"image.png": m["image.png"] + NAME}, "behind the end of its picture"),
    "in the pixels' stream": (lambda m: m | {"image.png": hidden_in_pixels(m["image.png"])}, "more than the picture"),
    "between fields": (lambda m: m | {"json": b" " * 9 + m["json"]}, "not written as we write it"),
    "a field twice": (
        lambda m: m | {"json": m["json"].replace(b'{"', b'{"eye": "OS", "', 1)},
        "not written as we write it",
    ),
    "name of a label": (
        lambda m: m | {"json": changed_fields(m["json"], labels={NAME.decode(): 1.0})},
        "labels: a name is not made of",
    ),
}


@pytest.mark.parametrize(("change", "told"), CASES.values(), ids=CASES)
def test_what_hides_in_a_member_is_found(tmp_path, change, told):
    folder = packed(tmp_path / "set", change(members()))
    with pytest.raises(ShardError, match=told):
        audit_set(folder, read_manifest(folder))


def test_what_hides_in_the_tar_is_found(tmp_path):
    def owned(name, size):
        info = tarfile.TarInfo(name)
        info.size, info.uname = size, "kunigunde"
        return info.tobuf(tarfile.USTAR_FORMAT)

    cases = {
        "says more than a name and a size": {"header": owned},
        "between it and the next": {"padding": b"Z"},
        "behind its end": {"tail": NAME},
    }
    for number, (told, where) in enumerate(cases.items()):
        folder = (
            packed(tmp_path / str(number) / "set", members(), **where)
            if (tmp_path / str(number)).mkdir() is None
            else 0
        )
        with pytest.raises(ShardError, match=told):
            audit_set(folder, read_manifest(folder))


def test_sets_as_we_write_them_are_clean(tmp_path):
    settings = PhantomShardsConfig(out=tmp_path / "real", subjects_per_group=2, size_px=64, samples_per_shard=4)
    manifest = write_phantom_set(settings)
    assert "pixels, codes, numbers and digests only" in audit_set(tmp_path / "real", manifest)
    triple = sample(0, "T1DPN", 0, 0, 64)

    def drawn(**about):
        provenance = plan().provenance(0, plan().batches[0].requests[0], "e" * 64) | about
        meta = replace(triple.meta, source="synthetic", labels={}, provenance=provenance)
        return replace(triple, key=f"{triple.key}-0000", meta=meta)

    clean = write_set(tmp_path / "drawn", "synthetic", [("test", drawn())], 4)
    assert audit_set(tmp_path / "drawn", clean)
    for number, about in enumerate(
        ({"source_key": NAME.decode()}, {"note": NAME.decode()}, {"a": ["b"]}, {"O'Neil": 1})
    ):
        dirty = write_set(tmp_path / f"dirty-{number}", "synthetic", [("test", drawn(**about))], 4)
        with pytest.raises(ShardError, match="provenance"):
            audit_set(tmp_path / f"dirty-{number}", dirty)


def plan():
    """A plan of one image; the audit has to know every word that its provenance may hold."""
    values = {
        "source_set_digest": "a" * 64,
        "cache_digest": "b" * 64,
        "base_digest": "c" * 64,
        "adapter_digest": "untuned",
        "noise_schedule_digest": "d" * 64,
        "base": "nf4",
        "split": "test",
        "image_size_px": 64,
        "dtype": "bf16",
        "images_per_mask": 1,
        "batch_size": 1,
        "batches_per_shard": 1,
        "denoise_steps": 4,
        "guidance_scale": 2.0,
        "seed": 0,
        "compile_blocks": False,
        "prompts": "next_group",
    }
    request = Request("t1dpn-0000-00-0000", "t1dpn-0000-00", 0, "t1dpn-0000", "T1DPN")
    return Plan(settings=PlanSettings(**values), batches=(Batch(9, (request,)),))


def test_every_word_that_is_allowed_is_one_of_ours():
    assert all(word.isascii() and " " not in word for word in WORDS)
