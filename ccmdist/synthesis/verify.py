"""The proof that a synthetic set is what its plan asked for: nothing missing, nothing twice, nothing else."""

from pathlib import Path

import numpy as np

from ccmdist.data.manifest import Manifest, read_manifest
from ccmdist.data.reader import read_shard
from ccmdist.data.triple import Triple
from ccmdist.errors import RunError, ShardError
from ccmdist.synthesis.output import misfit
from ccmdist.synthesis.plan import Plan, read_plan
from ccmdist.synthesis.requests import Request
from ccmdist.synthesis.sources import Sources

NUM_NAMED = 10


def verify_against_plan(folder: Path, source: Path | None = None) -> str:
    """Compare every sample of a set with its plan; what was found to be right.

    Args:
        folder: Of the set.
        source: Folder of the set that it was drawn from: to compare masks and holes with it too, and, where holes were
            filled, every byte outside of them.

    Raises:
        ShardError: Naming the first samples that are missing, twice, foreign, or not as the plan asked for.
        RunError: If ``source`` is another set.
    """
    plan, manifest = read_plan(folder), read_manifest(folder)
    problems = list(_problems(folder, plan, manifest, None if source is None else _sources(source, plan)))
    if problems:
        more = [f"... and {len(problems) - NUM_NAMED} more"] if len(problems) > NUM_NAMED else []
        told = "\n  ".join([*problems[:NUM_NAMED], *more])
        raise ShardError(
            f"{folder}: {len(problems)} samples are not as in the plan\n  {told}", "draw the set anew in another folder"
        )
    return (
        f"{folder}: all {plan.num_images} images of plan {plan.digest[:12]} are there once, "
        f"in {len(manifest.shards)} shards, and nothing else{_told(plan, source)}"
    )


def _told(plan: Plan, source: Path | None) -> str:
    """What else was found to be right."""
    num_filled = sum(request.hole is not None for batch in plan.batches for request in batch.requests)
    if source is None:
        return f"; whether {num_filled} of the images are their frames outside of their holes takes --source" * bool(
            num_filled
        )
    filled = f"; {num_filled} of the images are their frames, byte by byte, outside of their holes" * bool(num_filled)
    return f"; their masks are those of {source}{filled}"


def _sources(source: Path, plan: Plan) -> Sources:
    if (found := read_manifest(source).digest) != plan.settings.source_set_digest:
        raise RunError(
            f"{source}: is the set {found[:12]}, the plan draws from {plan.settings.source_set_digest[:12]}",
            "name the set that was given as data.shards",
        )
    return Sources.of_plan(source, plan)


def _problems(folder: Path, plan: Plan, manifest: Manifest, sources: Sources | None) -> list[str]:
    if manifest.kind != "synthetic":
        return [f"the set is of kind {manifest.kind}, expected synthetic"]
    planned = {
        request.key: (number, request) for number, batch in enumerate(plan.batches) for request in batch.requests
    }
    seen: dict[str, str] = {}
    problems = []
    for shard in manifest.shards:
        for triple in read_shard(folder, shard):
            if problem := _problem(plan, planned, seen, triple) or _unlike(sources, *planned[triple.key], triple):
                problems.append(f"{shard.name}: {triple.key} {problem}")
            seen.setdefault(triple.key, shard.name)
    return problems + [f"{key} of batch {number} is missing" for key, (number, _) in planned.items() if key not in seen]


def _problem(plan: Plan, planned: dict[str, tuple[int, Request]], seen: dict[str, str], triple: Triple) -> str:
    if triple.key not in planned:
        return "is not in the plan"
    if triple.key in seen:
        return f"is in {seen[triple.key]} too"
    return misfit(plan, *planned[triple.key], triple)


def _unlike(sources: Sources | None, _batch: int, request: Request, triple: Triple) -> str:
    """How a sample differs from the one that it was drawn from; an empty text if it does not, or none is at hand."""
    if sources is None:
        return ""
    source, hole = sources.triple(request.source_key), sources.hole(request)
    if not np.array_equal(triple.nerve_mask, source.nerve_mask):
        return f"has another nerve mask than {source.key}"
    if hole is None:
        return ""
    if triple.inpaint_mask is None or not np.array_equal(triple.inpaint_mask, hole):
        return "has another hole than the plan cuts"
    if num := int((triple.image != source.image)[~hole].sum()):
        return f"differs from {source.key} in {num} pixels outside of its hole"
    return ""
