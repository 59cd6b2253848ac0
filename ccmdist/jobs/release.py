"""Releasing a synthetic set that passed the gate: its shards, a manifest that names nobody, and a data card."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Final

from ccmdist.commit import commit_json, commit_text, committed_file, make_folder, sync_folder, temporary_name
from ccmdist.console import log
from ccmdist.data.audit import audit_set
from ccmdist.data.manifest import Manifest, commit_manifest, read_manifest
from ccmdist.data.reader import read_shard
from ccmdist.errors import RunError
from ccmdist.evaluation.memorisation.data_card import card_of, card_text, public_about

CARD_JSON: Final = "data_card.json"
CARD_TEXT: Final = "README.md"
REPORT_JSON: Final = "report.json"
LICENCE_CHARACTERS: Final = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-+"
EVALUATE: Final = "judge it with `ccmdist evaluate`"


def release(folder: Path, report: Path, out: Path, licence: str = "", dry_run: bool = False) -> None:
    """Write the set to ``out`` if it passed, or find it written there already.

    Args:
        folder: Of the synthetic set.
        report: Folder of the report that judged it, or its report.json.
        out: Folder to write; it appears complete or not at all.
        licence: Name of a licence for the card; left open if empty.
        dry_run: Check all, tell what would be written, and write nothing.

    Raises:
        RunError: If the set did not pass, was never judged, was changed since, has masks or prompts that are not those
            of its images, or ``out`` holds something else.
        ShardError: If a shard is damaged, or holds what a set may not hold.
    """
    if set(licence) - set(LICENCE_CHARACTERS):
        raise RunError(f"licence: {licence!a} is no name of a licence", "write it like CC-BY-NC-4.0")
    manifest = _synthetic(folder)
    judged = _passed(folder, manifest, report)
    told = audit_set(folder, manifest)
    card = card_of(manifest, judged, next(read_shard(folder, manifest.shards[0])).image.shape, licence)
    if out.exists():
        _refuse_another(out, card)
        log.info("%s: already released, %d images", out, manifest.num_samples)
        return
    if dry_run:
        sys.stdout.write(f"{told}\n{out}: would hold {manifest.num_samples} images, {CARD_TEXT} and {CARD_JSON}\n")
        sys.stdout.write("dry run: nothing was done\n")
        return
    _write(folder, manifest, card, out)
    log.info("%s", told)
    sys.stdout.write(f"{out}: released {manifest.num_samples} images; read {out / CARD_TEXT} before you publish it\n")


def _synthetic(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if manifest.kind != "synthetic":
        raise RunError(
            f"{folder}: is a {manifest.kind} set, expected one drawn by a model", "real frames are never released"
        )
    return manifest


def _passed(folder: Path, manifest: Manifest, report: Path) -> dict[str, Any]:
    """What the report says of the set as it is now, and whether phantoms are what it was compared with."""
    path = report / REPORT_JSON if report.is_dir() else report
    try:
        values = json.loads(path.read_bytes())
        sets, folders = dict(values["synthetic"]), dict(values["settings"]["synthetic"])
    except OSError as error:
        raise RunError(
            f"{path}: {error.strerror}", "name the folder of a report; `ccmdist evaluate` makes one"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{path}: is not the report of an evaluation", "make it anew with `ccmdist evaluate`") from None
    gates = {name: one.get("gate") for name, one in sets.items()}
    name = next((name for name, gate in gates.items() if gate and gate["set_digest"] == manifest.digest), None)
    if name is None:
        raise RunError(f"{folder}: {_why_not_judged(folder, gates, folders)}", EVALUATE)
    gate: dict[str, Any] = gates[name] or {}
    if not gate["passed"] or gate["reasons"] or not gate["figures"]:
        reasons = "".join(f"\n  {reason}" for reason in gate["reasons"] or ["it was not judged"])
        raise RunError(f"{folder}: is withheld by the gate and not released:{reasons}\nread {path.parent}/report.html")
    if not manifest.follows_masks:
        raise RunError(
            f"{folder}: was drawn from prompts alone, so its masks do not show the nerves of its images",
            "release a set of a network that sees masks (objective.mask_condition=true)",
        )
    if sets[name].get("control"):
        raise RunError(
            f"{folder}: is a control, drawn with the prompts of other clinical groups than its samples",
            "release the set that it controls",
        )
    return dict(sets[name]) | {"of_phantoms": dict(values.get("real", {})).get("kind") == "phantom"}


def _why_not_judged(folder: Path, gates: dict[str, Any], folders: dict[str, str]) -> str:
    names = [name for name, where in folders.items() if Path(where).resolve() == folder.resolve()]
    if not names:
        return "this report does not judge it"
    if not any(gates.get(name) for name in names):
        return "this report was made without a gate (memorisation: null)"
    return "was changed since this report judged it"


def _refuse_another(out: Path, card: dict[str, Any]) -> None:
    """Check that what lies there is this very release."""
    try:
        is_same = json.loads((out / CARD_JSON).read_bytes()) == card and read_manifest(out).digest == card["set_digest"]
    except (OSError, ValueError):
        is_same = False
    if not is_same or not all((out / entry.name).is_file() for entry in read_manifest(out).shards):
        raise RunError(f"{out}: holds something else", "choose another folder; nothing is overwritten")


def _write(folder: Path, manifest: Manifest, card: dict[str, Any], out: Path) -> None:
    make_folder(out.absolute().parent)
    temporary = temporary_name(out)
    temporary.mkdir()
    try:
        for entry in manifest.shards:
            _link(folder / entry.name, temporary / entry.name)
        released = commit_manifest(temporary, "synthetic", manifest.shards, public_about(manifest))
        commit_json(temporary / CARD_JSON, card)
        commit_text(temporary / CARD_TEXT, card_text(card))
        # Of what was written, not of what it was made from.
        audit_set(temporary, released)
        temporary.rename(out)
        sync_folder(out.absolute().parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    """A second name of the file where the file system can, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        with committed_file(target) as temporary:
            shutil.copyfile(source, temporary)
