"""What a power cut may leave of a folder: a worst case computed from the operations that were really made.

POSIX promises little: the contents of a file are there once it was flushed, its name (or another one after a rename)
once the folder was. Everything else may be there or not. Two extremes are built: nothing but what was promised, and
all names with only the flushed contents, as file systems with delayed allocation leave it.
"""

import contextlib
import os
import sys
from pathlib import Path

FOLDER = None


class RecordedDisk:
    """Follows every operation below ``root``; a context manager."""

    def __init__(self, root):
        self.root = Path(root).resolve()
        self.events = []
        self._is_on = False

    def __enter__(self):
        sys.addaudithook(self._hook)
        self._is_on = True
        return self

    def __exit__(self, *_):
        self._is_on = False

    def note(self, value):
        """Put a mark between the operations."""
        self.events.append(("mark", value))

    def _hook(self, event, arguments):
        if not self._is_on:
            return
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self._add("create", arguments[0])
        elif event == "os.rename":
            self._add("rename", *arguments[:2])
        elif event == "os.mkdir":
            self._add("mkdir", arguments[0])
        elif event in ("os.remove", "os.rmdir"):
            self._add("remove", arguments[0], folder=arguments[1])
        elif event == "ccmdist.sync":
            path = Path(arguments[0])
            self._add("sync", path, content=FOLDER if path.is_dir() else path.read_bytes())

    def _add(self, kind, *paths, folder=-1, content=FOLDER):
        names = []
        for path in paths:
            whole = Path(os.fsdecode(path))
            if folder != -1 and not whole.is_absolute():
                whole = Path(f"/proc/self/fd/{folder}").readlink() / whole
            whole = whole.absolute()
            if not whole.is_relative_to(self.root):
                return
            names.append(whole.relative_to(self.root).parts)
        self.events.append((kind, *names, content))

    def after(self, number):
        """The disk after the first ``number`` events."""
        disk = _Disk()
        for event in self.events[:number]:
            disk.apply(event)
        return disk


class _Disk:
    """Folders (dicts from name to node) and files (lists of one content), each once as now and once as flushed."""

    def __init__(self):
        self.root = ({}, {})

    def _folder(self, parts):
        node = self.root
        for part in parts:
            node = node[0][part]
        return node

    def apply(self, event):
        kind, *rest = event
        if kind == "mark":
            return
        *paths, content = rest
        *above, name = paths[0] or ("",)
        if kind == "sync" and content is FOLDER:
            node = self._folder(paths[0])
            node[1].clear()
            node[1].update(node[0])
        elif kind == "sync":
            self._folder(above)[0][name][0] = content
        elif kind == "create":
            self._folder(above)[0].setdefault(name, [b""])
        elif kind == "mkdir":
            with contextlib.suppress(KeyError):  # told before it fails because a folder above is not there yet
                self._folder(above)[0].setdefault(name, ({}, {}))
        elif kind == "remove":
            self._folder(above)[0].pop(name, None)
        elif kind == "rename":
            moved = self._folder(above)[0].pop(name)
            self._folder(paths[1][:-1])[0][paths[1][-1]] = moved

    def write(self, folder, only_flushed_names):
        """Make what the power cut left in the empty ``folder``."""
        _write(self.root, Path(folder), 1 if only_flushed_names else 0)


def _write(node, folder, which):
    folder.mkdir(exist_ok=True)
    for name, child in node[which].items():
        if isinstance(child, tuple):
            _write(child, folder / name, which)
        else:
            (folder / name).write_bytes(child[0])
