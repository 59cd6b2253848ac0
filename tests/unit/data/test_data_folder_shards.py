"""A folder of frames becomes a set: de-identified, split by subject, or refused with every problem by its line."""

import csv
import io
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.cli import exit_code
from ccmdist.config.data import FolderShardsConfig
from ccmdist.data.folder_shards import default_key_file, describe_folder_set, write_folder_set
from ccmdist.data.manifest import SPLITS
from ccmdist.data.reader import read_split, verify_set
from ccmdist.data.triple import is_marked_synthetic, members_of
from ccmdist.errors import ShardError


def all_of(folder):
    return [(split, triple) for split in SPLITS for triple in read_split(folder, split)]


def test_frames_masks_and_codes_arrive_unchanged(source):
    source.add_cohort().pack()
    found = {triple.image.tobytes(): triple for _, triple in all_of(source.config().out)}
    assert len(found) == 18
    for row in source.rows:
        triple = found[np.asarray(Image.open(source.folder / row["image"])).tobytes()]
        np.testing.assert_array_equal(triple.nerve_mask * 255, np.asarray(Image.open(source.folder / row["mask"])))
        about = triple.meta
        assert (about.clinical_group, about.eye, about.um_per_px) == (row["clinical_group"], row["eye"], 1.0417)
        assert about.fields == ({"region": "central"} if row["eye"] == "OD" else {})
        assert (about.source, about.labels, about.provenance) == ("folders", {}, None)
        assert about.prompt.endswith(f"eye {row['eye']}{', central cornea' if about.fields else ''}.")
    report = verify_set(source.config().out)
    assert "real set" in str(report)
    assert report.group_counts == {"Control": 6, "T1DPN": 6, "T1NoDPN": 6}


def test_a_subject_is_in_one_split_and_each_group_in_all(source):
    source.add_cohort().pack(val_fraction=0.33, test_fraction=0.33)
    splits = {}
    for split, triple in all_of(source.config().out):
        splits.setdefault(triple.meta.subject, set()).add((split, triple.meta.clinical_group))
    assert len(splits) == 9
    assert sorted(pair for pairs in splits.values() for pair in pairs) == sorted(
        (split, group) for split in SPLITS for group in CLINICAL_GROUPS
    )


def test_the_same_source_and_key_give_the_same_bytes_and_another_key_other_names(source, tmp_path):
    source.add_cohort().pack()
    out = source.config().out
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    shutil.rmtree(out)
    source.pack()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    moved = type(source)(tmp_path / "moved" / "elsewhere")
    shutil.rmtree(moved.folder)
    shutil.copytree(source.folder, moved.folder)
    key = default_key_file(out)
    write_folder_set(moved.config(pseudonym_key_file=key))
    assert {path.name: path.read_bytes() for path in moved.config().out.iterdir()} == first
    before = {triple.meta.subject for _, triple in all_of(out)}
    shutil.rmtree(out)
    key.unlink()
    source.pack()
    assert before.isdisjoint({triple.meta.subject for _, triple in all_of(out)})


def test_a_set_that_is_there_is_left_alone_and_a_changed_source_refused(source, logged):
    written = source.add_cohort().pack()
    assert source.pack() == written
    assert "already there, 18 samples in 3 shards" in logged.text
    source.rows[0]["um_per_px"] = "1.05"
    with pytest.raises(ShardError, match=r"holds a set that was made with other source_digest .* choose another out"):
        source.pack()


def test_nothing_that_names_a_person_gets_into_a_set_or_a_log(source, tmp_path, logged, capfd):
    (tmp_path / "key").write_bytes(b"the same pseudonyms in each test")
    text, exif = PngInfo(), Image.Exif()
    text.add_text("Patient", "Zephyrina Quix"), text.add_itxt("Comment", "MRN-88412")
    exif[0x010E] = "Zephyrina Quix"
    source.add_cohort().add(
        "Zephyrina Quix", "Control", image_options={"pnginfo": text, "exif": exif}, note="born 1961-02-03"
    )
    source.pack(pseudonym_key_file=tmp_path / "key")
    out = source.config().out
    describe_folder_set(source.config())
    packed = b"".join(path.read_bytes() for path in out.iterdir()).lower()
    printed = "".join(capfd.readouterr())
    for secret in ("zephyrina", "quix", "mrn-", "88412", "1961-02-03", "born", "élodie", "images/"):
        assert secret.encode() not in packed
        assert secret not in logged.text.lower().replace(str(source.folder), "")
        assert secret not in printed.lower()
    assert "columns that are not packed: note" in logged.text
    for _, triple in all_of(out):
        with Image.open(io.BytesIO(members_of(triple)["image.png"])) as image:
            assert image.info == {}
    assert str(source.folder).encode().lower() not in packed


def test_the_key_is_made_beside_the_set_for_its_owner_only(source):
    source.add_cohort().pack()
    key = default_key_file(source.config().out)
    assert key == source.config().out.parent / "out.pseudonym-key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert len(key.read_bytes()) == 32
    assert key.read_bytes() not in b"".join(path.read_bytes() for path in source.config().out.iterdir())


def test_a_key_file_that_is_named_has_to_be_there_and_long_enough(source, tmp_path, logged):
    key = tmp_path / "key"
    with pytest.raises(ShardError, match=r"key: No such file or directory; make one with `\(umask 077; head -c 32"):
        source.add_cohort().pack(pseudonym_key_file=key)
    key.write_bytes(b"short")
    with pytest.raises(ShardError, match="a key of 5 bytes, expected at least 16"):
        source.pack(pseudonym_key_file=key)
    key.write_bytes(b"k" * 16)
    key.chmod(0o644)
    source.pack(pseudonym_key_file=key)
    assert "others on this machine can read the key" in logged.text
    assert not default_key_file(source.config().out).exists()


def test_spellings_of_one_subject_are_one_subject(source):
    for name in ("Anna  Ek", " anna ek", "ANNA EK"):
        source.add(name)
    assert source.pack().shards[0].num_samples == 3
    assert len({triple.meta.subject for triple in read_split(source.config().out, "train")}) == 1


def test_few_subjects_stay_in_train_and_it_is_said(source, logged):
    source.add().add()
    manifest = source.pack()
    assert [shard.split for shard in manifest.shards] == ["train"]
    assert "too few subjects for a val split, it stays empty" in logged.text
    assert "too few subjects for a test split, it stays empty" in logged.text


def test_unlabelled_frames_are_packed_with_the_neutral_prompt(source):
    source.add(clinical_group="").add("p2", clinical_group="unlabelled", eye="unknown")
    source.pack(val_fraction=0, test_fraction=0)
    for triple in read_split(source.config().out, "train"):
        assert triple.meta.clinical_group is None
        assert "diabetes possible" in triple.meta.prompt


def test_native_exports_and_sixteen_bits_are_told(source, logged):
    source.add().add("p2")
    rng = np.random.default_rng(9)
    mask = np.zeros((484, 384), np.uint8)
    mask[7:9] = 255
    Image.fromarray(rng.integers(0, 256, (484, 384), dtype=np.uint8)).save(source.folder / source.rows[0]["image"])
    Image.fromarray(mask).save(source.folder / source.rows[0]["mask"])
    deep = rng.integers(0, 65536, (48, 48), dtype=np.uint16)
    Image.fromarray(deep).save(source.folder / source.rows[1]["image"], "TIFF")
    source.pack(val_fraction=0, test_fraction=0)
    assert "1 frames of 384x484 px cropped to 384x384, footer dropped" in logged.text
    assert "1 frames of 16 bits brought to 8, 0..65535 to 0..255" in logged.text
    assert sorted(triple.image.shape for triple in read_split(source.config().out, "train")) == [(48, 48), (384, 384)]


def test_an_empty_mask_is_packed_with_a_warning(source, logged):
    source.add()
    Image.fromarray(np.zeros((48, 48), np.uint8)).save(source.folder / source.rows[0]["mask"])
    source.pack()
    assert "table.csv: line 2: mask is empty, the frame is packed as one without nerves" in logged.text


def test_semicolons_tabs_and_a_byte_order_mark_are_taken(source):
    source.add_cohort()
    for delimiter, encoding in ((";", "utf-8-sig"), ("\t", "utf-8")):
        source.write_table(delimiter=delimiter, encoding=encoding)
        assert "18 frames; train 14 of 7 subjects" in describe_folder_set(source.config())


def test_all_problems_of_a_table_are_told_together_by_line_and_without_the_cells(source):
    source.add_cohort()
    changes = [
        {"image": ""},
        {"image": "../other/secret.png"},
        {"image": "/etc/passwd"},
        {"mask": "masks/Zephyrina.png"},
        {"mask": "masks"},
        {"subject": " "},
        {"clinical_group": "T1DNP"},
        {"eye": "od"},
        {"um_per_px": "1,04"},
        {"um_per_px": "400"},
        {"region": "whorl"},
        {"mask": source.rows[11]["image"]},
    ]
    for row, change in zip(source.rows, changes, strict=False):
        row.update(change)
    assert source.refusal() == (
        "13 problems, nothing was packed\n"
        "  line 2: image is empty\n"
        "  line 3: image leads out of the source folder; write a path relative to it, without ..\n"
        "  line 4: image leads out of the source folder; write a path relative to it, without ..\n"
        "  line 5: mask is a file that does not exist in the source folder\n"
        "  line 6: mask is no file\n"
        "  line 7: subject is empty, and splits are made by subject\n"
        "  line 8: clinical_group is not a known code; did you mean 'T1DPN'? "
        "known: Control, T1NoDPN, T1DPN, unlabelled\n"
        "  line 9: eye is not a known code; did you mean 'OD'? known: OD, OS; or leave it blank\n"
        "  line 10: um_per_px is no number from 0.1 to 10.0; write micrometres per pixel such as 1.0417\n"
        "  line 11: um_per_px is no number from 0.1 to 10.0; write micrometres per pixel such as 1.0417\n"
        "  ... and 3 more"
    )


def test_problems_of_files_are_told_with_those_of_the_table(source):
    source.add().add("p2").add("p3").add("p4", eye="left")
    shutil.copy(source.folder / source.rows[0]["image"], source.folder / source.rows[1]["image"])
    Image.new("L", (40, 40)).save(source.folder / source.rows[2]["mask"])
    assert source.refusal() == (
        "3 problems, nothing was packed\n"
        "  line 3: the image shows the same as that of line 2; keep one of them\n"
        "  line 4: image is 48x48 px and mask 40x40, expected one size; make the mask from the frame as it is\n"
        "  line 5: eye is not a known code; known: OD, OS; or leave it blank"
    )


def test_rows_that_contradict_each_other_are_told(source):
    source.add().add(clinical_group="T1DPN").add("p2")
    source.rows.append(dict(source.rows[2]))
    assert source.refusal() == (
        "3 problems, nothing was packed\n"
        "  line 3: the subject has another clinical_group than in line 2\n"
        "  line 5: the image is that of line 4; keep one row for each frame\n"
        "  line 5: the image shows the same as that of line 4; keep one of them"
    )


def test_a_link_out_of_the_source_folder_is_refused_and_one_inside_it_taken(source, tmp_path):
    source.add().add("p2")
    outside = tmp_path / "outside.png"
    shutil.move(source.folder / source.rows[0]["image"], outside)
    (source.folder / source.rows[0]["image"]).symlink_to(outside)
    assert source.refusal().endswith(
        "line 2: image is a link that leads out of the source folder; copy the file into it"
    )
    shutil.move(outside, source.folder / "inside.png")
    (source.folder / source.rows[0]["image"]).unlink()
    (source.folder / source.rows[0]["image"]).symlink_to(source.folder / "inside.png")
    assert source.pack().num_samples == 2


def test_images_marked_as_synthetic_are_refused_unless_allowed_and_stay_marked(source, phantoms):
    source.add()
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia")
    path = source.folder / source.rows[0]["image"]
    with Image.open(path) as image:
        image.save(path, pnginfo=info)
    assert (
        "line 2: image is marked as synthetic; remove the row, or allow it with allow_synthetic=true"
        in source.refusal()
    )
    source.pack(allow_synthetic=True)
    triple = next(read_split(source.config().out, "train"))
    assert triple.meta.source == "synthetic"
    assert is_marked_synthetic(members_of(triple)["image.png"])
    verify_set(source.config().out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            b"image,mask\n",
            "has no column subject, eye, um_per_px, clinical_group; expected image, mask, subject, eye, ",
        ),
        (b"", "has no column image, mask, subject"),
        (b"image,mask,subject,eye,um_per_px,clinical_group\n", "has no rows; add one row for each frame"),
        (b"image,mask,subject,eye,um_per_px,clinical_group,eye\n", "has several columns eye; keep one of each"),
        (
            b"image,mask,subject,eye,um_per_px,clinical_group\na,b\n",
            "1 problems, nothing was packed\n  line 2: has another",
        ),
        (
            b"image,mask,subject,eye,um_per_px,clinical_group\na,b,c,d,e,f,g\n",
            "1 problems, nothing was packed\n  line 2: h",
        ),
        (b"image,mask,subject,eye,um_per_px,clinical_group\n\xff\n", "is not UTF-8; save the table as CSV in UTF-8"),
        (b'image,mask,subject,eye,um_per_px,clinical_group\n"a"b,c\n', "line 1: ',' expected after"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(source, text, message):
    (source.folder / "table.csv").write_bytes(text)
    with pytest.raises(ShardError) as error:
        write_folder_set(source.config())
    assert str(error.value).startswith(f"{source.folder / 'table.csv'}: {message}")


def test_a_folder_without_a_table_is_told(source):
    with pytest.raises(ShardError, match=r"table.csv: No such file or directory; source is a folder with a table"):
        write_folder_set(source.config())


def test_the_command_packs_and_a_dry_run_only_counts(source, capsys):
    source.add_cohort().write_table()
    out = source.config().out
    words = ["shards", "folders", f"source={source.folder}", f"out={out}"]
    assert exit_code([*words, "--dry-run"]) == 0
    assert (
        "18 frames; train 14 of 7 subjects, val 2 of 1 subjects, test 2 of 1 subjects; Control 6"
        in capsys.readouterr().out
    )
    assert not out.parent.exists()
    assert exit_code(words) == 0
    assert exit_code(["shards", "verify", str(out)]) == 0
    assert "18 samples" in capsys.readouterr().out


@pytest.mark.skipif(
    "CCMDIST_REAL_FRAMES" not in os.environ, reason="CCMDIST_REAL_FRAMES names no folder of real frames"
)
def test_real_frames_are_packed_and_verified(tmp_path):
    real = Path(os.environ["CCMDIST_REAL_FRAMES"])
    manifest = write_folder_set(FolderShardsConfig(source=real, out=tmp_path / "real"))
    with (real / "table.csv").open(encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert verify_set(tmp_path / "real").manifest.num_samples == manifest.num_samples == len(rows)
    assert manifest.of_split("train")
    packed = b"".join(path.read_bytes() for path in (tmp_path / "real").iterdir())
    for row in rows:
        assert row["image"].encode() not in packed
