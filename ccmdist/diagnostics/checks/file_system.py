"""The folders of a run: are they there, is there space, do renames and locks do what a commit needs."""

import dataclasses
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ccmdist.config.data import DataSettings
from ccmdist.data.manifest import read_manifest
from ccmdist.diagnostics.checks.adapter_size import checkpoint_bytes
from ccmdist.diagnostics.checks.finding import Finding, Findings, Request, State, size
from ccmdist.diagnostics.checks.mounts import Mount, mount_of, nearest_existing
from ccmdist.diagnostics.checks.trial import clock_skew_s, failures, trial_folder
from ccmdist.errors import ShardError

FEW_FILES: Final = 2000
"""Free inodes below which it is told: checkpoints, TensorBoard events and caches are some hundred files per run."""
SMALLEST_SPACE: Final = 1 << 30
TOLERATED_SKEW_S: Final = 2.0
REMEDIES: Final = {
    "write": "free space or choose another folder",
    "rename": "choose a folder on another file system: a checkpoint is committed by a rename",
    "fsync": "choose a folder on another file system: what is not flushed is lost in a power cut",
    "flock": "choose a folder with locks (Lustre: ask the site to mount with -o flock, not localflock): "
    "else two jobs can write to one run",
    "append": "choose a folder on another file system: the run's ledger would lose lines",
    "link": "choose a folder on another file system: the ranks decide by a link which of them tells why a run ended",
}
PURGED: Final = re.compile(r"(tmp|temp|.*scratch.*)", re.IGNORECASE)
QUOTA: Final = {
    "lustre": "lfs quota -h -u $USER {point}",
    "gpfs": "mmlsquota --block-size auto",
    "beegfs": "beegfs-ctl --getquota --uid $USER",
}


@dataclass(frozen=True)
class Folder:
    """A folder that the settings name.

    Attributes:
        role: "run", "cache", "shards" or "model".
        path: Where.
        is_written: Whether training or precompute writes to it.
        holds_patients: Whether images or what is computed from them lies in it.
        num_bytes: What is going to be written, as far as known.
    """

    role: str
    path: Path
    is_written: bool = False
    holds_patients: bool = False
    num_bytes: int = 0


def check(request: Request) -> Findings:
    """Every folder that the settings name; without settings, the present one as if a run was made in it."""
    folders = folders_of(request)
    for folder in folders:
        if folder.is_written or folder.path.expanduser().is_dir():  # what is not there is told by `settings`
            finding = judge(folder)
            # Without settings nobody has asked for this folder.
            asked = request.config is not None or finding.state != "MISS"
            yield finding if asked else dataclasses.replace(finding, state="WARN")
    for folder in folders:
        if folder.holds_patients and readable_by_all(folder.path):
            remedy = f"chmod o-rwx {folder.path}: it holds images of patients, or what was computed from them"
            yield Finding(f"{folder.role} folder", "WARN", "every user of this machine may read it", remedy)
    if request.config is not None:
        yield from _policies(folders)


def folders_of(request: Request) -> list[Folder]:
    """The folders that matter."""
    if request.config is None:
        return [Folder("here", Path.cwd(), is_written=True)]
    data: DataSettings = request.config.data
    real = _is_of_patients(data.shards)
    return [
        Folder("run", request.config.run, True, real, checkpoint_bytes(request.config)),
        Folder("cache", data.cache, True, real),
        Folder("shards", data.shards, holds_patients=real),
        Folder("model", data.model),
    ]


def _is_of_patients(shards: Path) -> bool:
    """Whether the set may hold frames of real people; one that cannot be read may."""
    try:
        return read_manifest(shards).kind != "phantom"
    except ShardError:
        return True


def judge(folder: Folder) -> Finding:
    """One row on a folder: where it lies, what is free, whether what is needed works in it."""
    mount, there = mount_of(folder.path), nearest_existing(folder.path)
    if not folder.is_written:
        if not os.access(folder.path, os.R_OK | os.X_OK):
            remedy = f"ask its owner for chmod g+rX {folder.path}"
            return Finding(folder.role, "MISS", f"{folder.path} may not be read", remedy)
        return Finding(folder.role, "OK", f"{folder.path} on {mount.kind}")
    if not there.is_dir():
        return Finding(folder.role, "MISS", f"{there} is a file, {folder.path} cannot be made", "choose another folder")
    try:
        with trial_folder(there) as place:
            problems = failures(place)
            skew = clock_skew_s(place) if "write" not in problems else 0.0
    except OSError as error:
        remedy = f"make {there} writable, free space in it, or choose another folder"
        return Finding(folder.role, "MISS", f"{there}: nothing can be written ({error.strerror})", remedy)
    return _written(folder, mount, there, problems, skew)


def _written(folder: Folder, mount: Mount, there: Path, problems: dict[str, str], skew: float) -> Finding:
    status = os.statvfs(there)
    free, files = status.f_bavail * status.f_frsize, status.f_favail
    # Some file systems have no fixed number of inodes and report 0 of 0.
    counts_files = status.f_files > 0
    space = size(free) + (f" and {_many(files)} files" if counts_files else "")
    about = f"{folder.path} on {mount.kind}, {space} free" + ("" if there == folder.path else ", will be made")
    if problems:
        found = "; ".join(f"{name}: {text}" for name, text in problems.items())
        return Finding(folder.role, "MISS", f"{about}; {found}", "; ".join(REMEDIES[name] for name in problems))
    if free < folder.num_bytes:
        remedy = "free space, choose another folder, or lower checkpoint.keep"
        return Finding(folder.role, "MISS", f"{about}, about {size(folder.num_bytes)} needed", remedy)
    return _with_risks(folder, mount, about, free, files if counts_files else FEW_FILES, skew)


def _many(number: int) -> str:
    return f"{number / 1e6:.3g} million" if number >= 1e6 else str(number)


def _with_risks(folder: Folder, mount: Mount, about: str, free: int, files: int, skew: float) -> Finding:
    risks = []
    if mount.is_in_memory:
        risks.append("it lies in memory: choose a folder on a disk, a reboot empties this one")
    if free < max(SMALLEST_SPACE, 2 * folder.num_bytes):
        risks.append(
            "free space: a save on a full disk fails, and a run stops after checkpoint.max_failed_saves of them"
        )
    if files < FEW_FILES:
        risks.append("remove files: a save without a free inode fails like one on a full disk")
    if abs(skew) > TOLERATED_SKEW_S:
        about += f", clocks {skew:+.0f} s apart"
        risks.append("have NTP set the clocks: times of checkpoints and of `ccmdist status` do not agree")
    needs = f", about {size(folder.num_bytes)} needed" if folder.num_bytes else ""
    state: State = "WARN" if risks else "OK"
    return Finding(folder.role, state, about + needs, "; ".join(risks))


def readable_by_all(path: Path) -> bool:
    """Whether every user may read the folder: the mode of the folder, and of all that lead to it, allow it."""
    resolved = path.expanduser().resolve()
    if not resolved.is_dir():
        return False
    return bool(resolved.stat().st_mode & stat.S_IROTH) and all(
        folder.stat().st_mode & stat.S_IXOTH for folder in (resolved, *resolved.parents)
    )


def _policies(folders: Sequence[Folder]) -> Findings:
    """What no call to the file system tells."""
    mounts = {mount_of(folder.path) for folder in folders if folder.is_written}
    for mount in sorted((mount for mount in mounts if mount.is_shared), key=lambda mount: str(mount.point)):
        remedy = QUOTA.get(mount.kind, "quota -s").format(point=mount.point)
        yield Finding("quota", "WARN", f"free space of {mount.point} is not your quota", f"look with `{remedy}`")
    purged = [f"{folder.role} ({folder.path})" for folder in folders if _is_purged(folder.path)]
    if purged:
        remedy = (
            "ask the site how long files live there (often 30 to 90 days from the last access), and keep the "
            "adapter and the shards elsewhere too"
        )
        yield Finding("purge", "WARN", f"looks like scratch: {', '.join(purged)}", remedy)


def _is_purged(path: Path) -> bool:
    return any(PURGED.fullmatch(part) for part in path.expanduser().resolve().parts)
