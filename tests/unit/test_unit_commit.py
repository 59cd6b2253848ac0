"""What is committed is there as a whole or not at all, whatever ends the process and whenever it does."""

import hashlib
import io
import json
import os
import sys
from pathlib import Path

import pytest

from ccmdist import commit
from ccmdist.commit import commit_bytes, commit_json, commit_text, committed_file, digest_of, left_overs, sha256_of_file

OLD, NEW = b"old " * 1000, b"new " * 3000


def is_file_operation(function):
    return getattr(function, "__module__", None) in ("posix", "_io") or isinstance(
        getattr(function, "__self__", None), io.IOBase
    )


def operations_of(function):
    """Names of the file operations that ``function`` makes, in order."""
    names = []

    def note(frame, event, called):
        if event == "c_call" and is_file_operation(called):
            names.append(called.__name__)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return names


def killed_before(index, function):
    """Run ``function`` in a forked process that ends, as of SIGKILL, before its file operation number ``index``."""
    child = os.fork()
    if child == 0:
        left = [index]

        def kill(frame, event, called):
            if event == "c_call" and is_file_operation(called):
                if left[0] == 0:
                    os._exit(9)
                left[0] -= 1

        sys.setprofile(kill)
        function()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def write_in_halves(path):
    with committed_file(path) as temporary, temporary.open("wb") as file:
        file.write(NEW[:5000])
        file.flush()
        file.write(NEW[5000:])


@pytest.mark.parametrize("before", [None, OLD], ids=["nothing before", "an older file before"])
def test_a_kill_at_any_operation_leaves_the_old_or_the_new_file_never_half_of_one(tmp_path, before):
    path = tmp_path / "result.bin"
    operations = operations_of(lambda: write_in_halves(path))
    assert {"open", "write", "fsync", "replace"} <= set(operations)
    found = []
    for index in range(len(operations)):
        for leftover in tmp_path.iterdir():
            leftover.unlink()
        if before is not None:
            path.write_bytes(before)
        assert killed_before(index, lambda: write_in_halves(path)), operations[index]
        found.append(path.read_bytes() if path.exists() else None)
        others = [file.name for file in tmp_path.iterdir() if file != path]
        assert all(name.startswith(".result.bin.tmp-") for name in others), "nobody mistakes it for a result"
        assert sorted(file.name for file in left_overs(tmp_path, "*.bin")) == sorted(others), "all of it is found"
    assert set(found) == {before, NEW}
    assert found == sorted(found, key=lambda content: content == NEW), "once it is new it stays new"
    assert found.index(NEW) == operations.index("replace") + 1, "the rename is the commit"


def test_the_contents_are_flushed_before_the_rename_and_the_rename_after_it(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor):
        done.append(("flush", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def noted_replace(self, target):
        done.append(("rename", self.name))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    commit_text(tmp_path / "a.txt", "text")
    temporary = done[0][1]
    assert done == [("flush", temporary), ("rename", temporary), ("flush", tmp_path.name)]


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="halfway"), committed_file(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError("halfway")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.txt", "old")]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(5, "Input/output error")])
def test_a_flush_that_fails_is_a_commit_that_fails(tmp_path, monkeypatch, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def refuse(descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=error.strerror):
        commit_text(path, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.txt", "old")]


def test_a_writer_that_hides_its_file_from_others_commits_it_as_readable_as_any(tmp_path):
    commit_text(tmp_path / "plain", "text")
    with committed_file(tmp_path / "hidden") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT, 0o600))
    assert (tmp_path / "hidden").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "a.txt"
    with committed_file(path) as first, committed_file(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first", "the one that ends last"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_are_made_on_the_way(tmp_path):
    commit_bytes(tmp_path / "a" / "b" / "c.bin", b"x")
    assert (tmp_path / "a" / "b" / "c.bin").read_bytes() == b"x"


def test_json_has_the_same_bytes_whatever_the_order_of_its_keys(tmp_path):
    commit_json(tmp_path / "a.json", {"b": 1, "a": {"y": "\u00b5m", "x": [1.5, None, True]}})
    commit_json(tmp_path / "b.json", {"a": {"x": [1.5, None, True], "y": "\u00b5m"}, "b": 1})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text == (tmp_path / "b.json").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert "\u00b5m" in text, "readable, not escaped"
    assert json.loads(text)["a"]["x"] == [1.5, None, True]


def test_digests_do_not_change_from_version_to_version():
    """Caches, checkpoints and runs on users' disks are known by these."""
    assert digest_of({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    value = {"b": [1, 2.5, None, True], "a": {"text": "\u00b5m"}}
    assert digest_of(value) == digest_of(dict(reversed(value.items())))
    text = '{"a":{"text":"\u00b5m"},"b":[1,2.5,null,true]}'
    assert digest_of(value) == hashlib.sha256(text.encode()).hexdigest()
    assert digest_of([1, 2]) != digest_of([2, 1])
    assert digest_of(1) != digest_of("1")


def test_the_digest_of_a_file_is_the_one_that_sha256sum_prints(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of_file(tmp_path / "a") == expected


def test_a_temporary_name_is_never_used_twice(tmp_path):
    names = {commit.temporary_name(tmp_path / "a.json") for _ in range(100)}
    assert len(names) == 100
    assert all(name.parent == tmp_path for name in names)
