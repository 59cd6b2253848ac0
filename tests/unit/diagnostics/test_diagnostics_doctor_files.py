"""What a run needs of a file system is really tried, on good ones and on ones that are full, read-only or leaky."""

import os
import tempfile
from pathlib import Path

import pytest

from ccmdist.data.manifest import ShardEntry, commit_manifest
from ccmdist.diagnostics.checks import file_system, trial
from ccmdist.diagnostics.checks.file_system import Folder, judge, readable_by_all
from ccmdist.diagnostics.checks.mounts import mount_of, nearest_existing
from ccmdist.diagnostics.checks.trial import Unlike, clock_skew_s, failures, trial_folder
from tests.unit.diagnostics.doctored import request, settings, tmpfs

TABLE = r"""22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:40 / /lustre/fs1 rw,flock shared:3 - lustre 10.0.0.1@o2ib:/fs1 rw
31 22 0:41 / /home rw - nfs4 server:/home rw
32 30 0:42 / /lustre/fs1/my\040data rw - tmpfs tmpfs rw
"""


def test_on_a_sound_file_system_all_trials_pass_and_nothing_is_left(tmp_path):
    finding = judge(Folder("run", tmp_path / "runs" / "a", is_written=True))
    assert finding.state == "OK", finding
    assert "will be made" in finding.found
    assert list(tmp_path.iterdir()) == []


def test_a_full_file_system_is_told_with_what_failed(tmp_path):
    with tmpfs(tmp_path / "full", "size=64k") as full:
        finding = judge(Folder("run", full, is_written=True))
        assert finding.state == "MISS"
        assert "write: No space left on device" in finding.found
        assert finding.remedy.startswith("free space or choose another folder")
        assert list(full.iterdir()) == []


def test_a_file_system_without_free_inodes_is_told(tmp_path):
    with tmpfs(tmp_path / "full", "size=64m,nr_inodes=1") as full:
        finding = judge(Folder("run", full, is_written=True))
    assert (finding.state, finding.found) == ("MISS", f"{full}: nothing can be written (No space left on device)")


def test_few_inodes_and_a_file_system_in_memory_are_risks(tmp_path):
    with tmpfs(tmp_path / "small", "size=8g,nr_inodes=500") as small:
        finding = judge(Folder("run", small, is_written=True))
    assert finding.state == "WARN"
    assert "a reboot empties this one" in finding.remedy
    assert "without a free inode" in finding.remedy


def test_a_read_only_file_system_is_told(tmp_path):
    with tmpfs(tmp_path / "read", "ro,size=1m") as read:
        finding = judge(Folder("cache", read / "cache", is_written=True))
    assert (finding.state, finding.found) == ("MISS", f"{read}: nothing can be written (Read-only file system)")


def test_too_little_space_for_the_checkpoints_is_told_before_the_run(tmp_path):
    finding = judge(Folder("run", tmp_path, is_written=True, num_bytes=1 << 60))
    assert finding.state == "MISS"
    assert finding.found.endswith("about 1.05e+06 TiB needed")
    assert "checkpoint.keep" in finding.remedy


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    finding = judge(Folder("run", tmp_path / "file" / "run", is_written=True))
    assert (finding.state, finding.remedy) == ("MISS", "choose another folder")


@pytest.mark.parametrize(
    ("call", "broken", "name"),
    [
        ("ccmdist.diagnostics.checks.trial.fcntl.flock", lambda *_: None, "flock"),
        ("ccmdist.diagnostics.checks.trial.os.link", lambda *_: None, "link"),
        ("ccmdist.diagnostics.checks.trial.sync_folder", lambda *_: (_ for _ in ()).throw(OSError(22, "no")), "fsync"),
    ],
)
def test_a_file_system_that_behaves_otherwise_is_named_by_what_does_not_hold(tmp_path, monkeypatch, call, broken, name):
    monkeypatch.setattr(call, broken)
    finding = judge(Folder("run", tmp_path, is_written=True))
    assert finding.state == "MISS"
    assert f"{name}: " in finding.found
    assert file_system.REMEDIES[name] in finding.remedy


def test_a_folder_that_may_be_renamed_over_a_full_one_is_no_place_for_checkpoints(tmp_path, monkeypatch):
    real = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: None if to.name == "taken" else real(self, to))
    assert failures(tmp_path)["rename"].startswith("a folder can be renamed over one that holds files")


def test_lines_that_overwrite_each_other_are_noticed(tmp_path, monkeypatch):
    real = os.open
    monkeypatch.setattr(trial.os, "open", lambda path, flags, mode=0o777: real(path, flags & ~os.O_APPEND, mode))
    with pytest.raises(Unlike, match="overwrite each other"):
        trial.TRIALS["append"](tmp_path)


def test_the_trial_folder_goes_away_when_a_trial_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), trial_folder(tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_clocks_that_disagree_with_the_file_system_are_measured(tmp_path, monkeypatch):
    assert abs(clock_skew_s(tmp_path)) < 1
    real = trial.time.time
    monkeypatch.setattr(trial.time, "time", lambda: real() + 100)
    assert 99 < clock_skew_s(tmp_path) < 101
    finding = judge(Folder("run", tmp_path, is_written=True))
    assert finding.state == "WARN"
    assert "clocks +100 s apart" in finding.found
    monkeypatch.setattr(trial.time, "time", lambda: real() - 100)
    assert -101 < clock_skew_s(tmp_path) < -99


@pytest.mark.parametrize(
    ("path", "kind", "is_shared"),
    [
        ("/lustre/fs1/me/run", "lustre", True),
        ("/home/me", "nfs4", True),
        ("/homes/me", "ext4", False),
        ("/lustre/fs1/my data/x", "tmpfs", False),
    ],
)
def test_the_file_system_of_a_path_is_that_of_its_innermost_mount(path, kind, is_shared):
    mount = mount_of(Path(path), TABLE)
    assert (mount.kind, mount.is_shared) == (kind, is_shared)


def test_a_folder_that_has_to_be_made_lies_where_its_nearest_parent_lies(tmp_path):
    assert nearest_existing(tmp_path / "a" / "b") == tmp_path
    assert nearest_existing(tmp_path) == tmp_path


def test_a_folder_is_readable_by_all_only_if_the_way_to_it_is_open_too():
    with tempfile.TemporaryDirectory() as outside:  # pytest's own folders are closed to others
        way, folder = Path(outside), Path(outside) / "frames"
        folder.mkdir()
        for modes, expected in {(0o755, 0o755): True, (0o755, 0o750): False, (0o750, 0o755): False}.items():
            way.chmod(modes[0])
            folder.chmod(modes[1])
            assert readable_by_all(folder) is expected, modes
    assert not readable_by_all(folder)


def test_folders_of_patients_that_everybody_may_read_are_told_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(file_system, "readable_by_all", lambda path: path.name == "shards")
    config = settings(f"run={tmp_path}/run", f"data.shards={tmp_path}/shards", f"data.cache={tmp_path}/cache")
    findings = {finding.what: finding for finding in file_system.check(request(config=config))}
    assert findings["shards folder"].state == "WARN"
    assert findings["shards folder"].remedy.startswith(f"chmod o-rwx {tmp_path}/shards: ")
    assert "run folder" not in findings


def test_phantoms_may_be_read_by_everybody(tmp_path, monkeypatch):
    monkeypatch.setattr(file_system, "readable_by_all", lambda path: True)
    (tmp_path / "shards").mkdir()
    shard = ShardEntry("train-000000.tar", "train", 1, 1, "0" * 64, ("a",), {"Control": 1})
    config = settings(f"run={tmp_path}/run", f"data.shards={tmp_path}/shards", f"data.cache={tmp_path}/cache")
    for kind, expected in {"phantom": False, "real": True, "synthetic": True}.items():
        commit_manifest(tmp_path / "shards", kind, [shard])
        names = {finding.what for finding in file_system.check(request(config=config))}
        assert ("shards folder" in names) is expected, kind


def test_a_scratch_folder_and_a_shared_one_come_with_what_no_call_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(file_system, "mount_of", lambda path: mount_of(Path("/lustre/fs1/a"), TABLE))
    config = settings(f"run={tmp_path}/scratch2/run")
    findings = {finding.what: finding for finding in file_system.check(request(config=config))}
    assert "run (" in findings["purge"].found
    assert findings["quota"].remedy == "look with `lfs quota -h -u $USER /lustre/fs1`"


def test_without_settings_a_present_folder_that_cannot_be_written_is_only_a_warning(tmp_path, monkeypatch):
    with tmpfs(tmp_path / "read", "ro,size=1m") as read:
        monkeypatch.chdir(read)
        (finding,) = file_system.check(request())
        assert (finding.what, finding.state) == ("here", "WARN")
        monkeypatch.chdir(tmp_path)
