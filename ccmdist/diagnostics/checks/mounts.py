"""Which file system a path lies on, read from the kernel's table of mounts."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MOUNTS: Final = Path("/proc/self/mountinfo")
SHARED: Final = (
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "beegfs_nodev", "ceph", "glusterfs", "afs", "cifs", "smb3", "panfs",
    "wekafs", "pvfs2", "orangefs", "9p", "virtiofs", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.juicefs",
)  # fmt: skip
"""Kinds of file systems that several nodes can see."""
IN_MEMORY: Final = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Mount:
    """A mounted file system.

    Attributes:
        point: Where it is mounted.
        kind: Such as "ext4" or "lustre".
    """

    point: Path
    kind: str

    @property
    def is_shared(self) -> bool:
        """Whether other nodes can see it."""
        return self.kind in SHARED

    @property
    def is_in_memory(self) -> bool:
        """Whether it is gone after a reboot."""
        return self.kind in IN_MEMORY


def mount_of(path: Path, table: str | None = None) -> Mount:
    """The file system of ``path``, which need not exist yet.

    Args:
        path: A file or folder.
        table: Contents of /proc/self/mountinfo; read from there by default.
    """
    resolved = path.expanduser().resolve()
    found = Mount(Path("/"), "unknown")
    for mount in _mounts(MOUNTS.read_text() if table is None else table):
        # Of several mounts on one point, the last one hides the others.
        if resolved.is_relative_to(mount.point) and len(mount.point.parts) >= len(found.point.parts):
            found = mount
    return found


def _mounts(table: str) -> list[Mount]:
    """``36 35 98:0 /root /point options optional - kind source options``; spaces in paths are octal."""
    lines = [line.partition(" - ") for line in table.splitlines()]
    return [Mount(Path(_plain(left.split()[4])), right.split()[0]) for left, _, right in lines if right]


def _plain(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def nearest_existing(path: Path) -> Path:
    """``path`` itself, or the folder in which it would have to be made."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
