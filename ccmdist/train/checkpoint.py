"""The commit protocol: a checkpoint is there when its folder has been renamed, and not before.

Every rank writes its slices into ``step-N.tmp-ATTEMPT/``, flushes them and reports name, size and hash; rank 0
writes ``manifest.json``, flushes, renames, and flushes the parent. Resume takes the newest folder whose manifest
verifies, falls back one by one, and sets what is broken aside without deleting it. Safetensors and JSON only.
"""

import json
import shutil
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ccmdist.cluster.best_checkpoint import BEST, read_best
from ccmdist.cluster.faults import fault_point
from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.cluster.run_directory import committed_paths
from ccmdist.commit import commit_json, committed_file, digest_of, make_folder, sha256_of_file, sync_folder
from ccmdist.console import log
from ccmdist.errors import CcmdistError, CheckpointError
from ccmdist.train.engine import LocalParameter

FORMAT_VERSION = 2
BROKEN_SUFFIX = ".broken"


class OtherFormat(CcmdistError):  # noqa: N818 (nothing is wrong with it)
    """A whole checkpoint of another version of ccmdist: neither to be loaded nor to be set aside."""


@dataclass(frozen=True)
class Checkpoint:
    """One committed checkpoint: its folder and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps that the state has seen."""
        return self.manifest["step"]

    @property
    def objective_state(self) -> dict[str, Any]:
        """What the objective keeps beside its parameters; empty of a checkpoint from before there was such."""
        state: dict[str, Any] = self.manifest.get("objective_state", {})
        return state

    def read(self, name: str, quantity: str, start: int, stop: int) -> torch.Tensor:
        """Elements ``start`` to ``stop`` of a flattened quantity, whichever ranks wrote them; 1-D fp32."""
        key = f"{name}|{quantity}"
        parts = []
        for file, slices in self.manifest["slices"].items():
            first, last = slices.get(name, (0, 0))
            low, high = max(start, first), min(stop, last)
            if low < high:
                with safe_open(self.path / file, "pt") as stored:
                    if key not in stored.keys():  # noqa: SIM118  (safe_open is not iterable)
                        raise CheckpointError(f"{self.path / file}: has no {quantity} of {name}")
                    parts.append((low, stored.get_slice(key)[low - first : high - first]))
        values = [part for _, part in sorted(parts, key=lambda part: part[0])]
        result = torch.cat(values) if values else torch.empty(0)
        if len(result) != stop - start:
            raise CheckpointError(f"{self.path}: holds {len(result)} of the {stop - start} elements asked of {name}")
        return result

    def whole(self, name: str, quantity: str) -> torch.Tensor:
        """A whole quantity of one parameter in its shape, fp32."""
        shape = self.manifest["parameters"][name]
        return self.read(name, quantity, 0, torch.Size(shape).numel()).reshape(shape)


def verified(path: Path) -> Checkpoint:
    """The checkpoint in ``path`` after comparing every file with the manifest.

    Raises:
        CheckpointError: If a file is missing, cannot be read, or differs from what was committed.
        OtherFormat: If it is whole, but not for this version.
        PermissionError: If it may be whole, but is not this user's to read.
    """
    try:
        return _verified(path)
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def _verified(path: Path) -> Checkpoint:
    manifest = json.loads((path / "manifest.json").read_text())
    if manifest != sealed(manifest):
        raise CheckpointError(f"{path}: manifest.json differs from what was committed")
    if manifest["format_version"] != FORMAT_VERSION:
        raise OtherFormat(
            f"{path}: is whole, but of format {manifest['format_version']}, and this version reads {FORMAT_VERSION}",
            "go on with the version of ccmdist that wrote it, or choose another run folder",
        )
    for name, facts in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        if file.stat().st_size != facts["num_bytes"] or sha256_of_file(file) != facts["sha256"]:
            raise CheckpointError(f"{path}: {name} differs from what was committed")
    return Checkpoint(path, manifest)


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the digest of all that it says: a flipped bit in it may otherwise be read as another number."""
    said = {name: value for name, value in manifest.items() if name != "digest"}
    return said | {"digest": digest_of(said)}


def newest_valid(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in ``folder`` that verifies; nothing is changed on disk."""
    for path in reversed(committed_paths(folder)):
        try:
            return verified(path)
        except CheckpointError as error:
            log.warning("%s; trying the one before", error)
    return None


class CheckpointStore:
    """Writes and finds the checkpoints of a run. Its public methods are collective."""

    def __init__(self, folder: Path, group: ProcessGroup, keep: int, attempt: int) -> None:
        self.folder, self.group, self.keep, self.attempt = folder, group, keep, attempt

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, the same on every rank; broken ones are set aside by rank 0."""
        found: list[Checkpoint | None] = [None]
        problem = self._on_first(lambda: found.append(self._found()))
        if problem:
            raise CheckpointError(problem)
        newest: Checkpoint | None = self.group.from_first(found[-1])
        return newest

    def _found(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, after leftovers were removed and broken ones set aside."""
        for leftover in self.folder.glob("step-*.tmp-*"):
            shutil.rmtree(leftover)  # never committed: the attempt that wrote it died
        try:
            checkpoint = newest_valid(self.folder)
        except PermissionError as error:
            remedy = "see that the run's folder can be read and written by this user"
            raise CheckpointError(f"{error.filename or self.folder}: {error.strerror}", remedy) from None
        for path in committed_paths(self.folder):
            if checkpoint is None or path.name > checkpoint.path.name:
                _set_aside(path)
        return checkpoint

    def save(self, step: int, local: dict[str, LocalParameter], facts: dict[str, Any]) -> str:
        """Commit the state of all ranks as the checkpoint of ``step``; an empty text, or why it failed.

        On a failure on any rank nothing is committed and everything that was committed before stays.

        Args:
            step: Optimizer steps done.
            local: This rank's slices.
            facts: Further entries of the manifest, equal on all ranks.
        """
        final = self.folder / f"step-{step:08d}"
        if self.group.from_first(final.exists()):
            return ""
        temporary = self.folder / f"step-{step:08d}.tmp-{self.attempt}"
        global_rank = self.group.ranks.global_rank
        fault_point("checkpoint.begin", global_rank, step)
        problem = self._on_first(lambda: _fresh(temporary))
        reports = self.group.gathered(problem or self._write_slices(temporary, step, local))
        problem = next((report for report in reports if isinstance(report, str)), "")
        fault_point("checkpoint.before_manifest", global_rank, step)
        if not problem:
            problem = self._on_first(lambda: self._commit(temporary, final, step, local, reports, facts))
        if problem and self.group.ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        fault_point("checkpoint.after_rename", global_rank, step)
        self.group.barrier()
        return problem

    def _on_first(self, action: Any) -> str:
        """Run ``action`` on rank 0; on every rank why it failed, or an empty text."""
        problem = ""
        if self.group.ranks.is_first:
            try:
                action()
            except CcmdistError as error:
                problem = str(error)
            except OSError as error:
                problem = f"{error.filename or self.folder}: {error.strerror}"
        return self.group.from_first(problem)

    def _write_slices(self, folder: Path, step: int, local: dict[str, LocalParameter]) -> dict[str, Any] | str:
        """Write and flush this rank's file; what the manifest says of it, or why it could not be written."""
        path = folder / f"slices-{self.group.ranks.global_rank:05d}.safetensors"
        tensors = {f"{name}|{q}": t.cpu() for name, p in local.items() for q, t in p.values.items() if len(t)}
        try:
            fault_point("checkpoint.write", self.group.ranks.global_rank, step)
            with committed_file(path) as temporary:
                save_file(tensors, temporary)
            facts = {"num_bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        except OSError as error:
            return f"{path}: {error.strerror or error}"
        except SafetensorError as error:
            return f"{path}: {error}"
        slices = {name: (p.start, p.start + len(p.values["weight"])) for name, p in local.items()}
        return {"name": path.name, "facts": facts, "slices": {n: s for n, s in slices.items() if s[0] < s[1]}}

    def _commit(
        self,
        temporary: Path,
        final: Path,
        step: int,
        local: dict[str, LocalParameter],
        reports: list[dict[str, Any]],
        facts: dict[str, Any],
    ) -> None:
        manifest = {
            **facts,
            "format_version": FORMAT_VERSION,
            "step": step,
            "parameters": {name: list(parameter.shape) for name, parameter in local.items()},
            "files": {report["name"]: report["facts"] for report in reports},
            "slices": {report["name"]: report["slices"] for report in reports},
        }
        commit_json(temporary / "manifest.json", sealed(manifest))
        fault_point("checkpoint.before_rename", self.group.ranks.global_rank, step)
        temporary.rename(final)
        sync_folder(self.folder)
        for path in self._outlived():
            shutil.rmtree(path, ignore_errors=True)  # what cannot be removed does not undo the commit

    def _outlived(self) -> list[Path]:
        """Checkpoints that need not be kept any longer: neither among the newest nor chosen as the best."""
        older = committed_paths(self.folder)[: -self.keep]
        pointer = self.folder.parent / BEST
        if not older or not pointer.exists():
            return older
        try:
            best = read_best(pointer)
        except CheckpointError as error:
            log.warning("%s; old checkpoints are kept, one of them may be the best", error)
            return []
        return [path for path in older if path != self.folder.parent / best.checkpoint]


def _set_aside(path: Path) -> None:
    """Rename a broken checkpoint, so that it is neither found nor lost."""
    names = (f"{path.name}{BROKEN_SUFFIX}{f'-{number}' if number else ''}" for number in count())
    aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    path.rename(aside)
    log.warning("%s: set aside as %s", path, aside.name)


def _fresh(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    make_folder(folder.parent)
    folder.mkdir()
