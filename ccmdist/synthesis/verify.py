"""The proof that a synthetic set is what its plan asked for: nothing missing, nothing twice, nothing else."""

from pathlib import Path

from ccmdist.data.manifest import Manifest, read_manifest
from ccmdist.data.reader import read_shard
from ccmdist.data.triple import Triple
from ccmdist.errors import ShardError
from ccmdist.synthesis.output import misfit
from ccmdist.synthesis.plan import Plan, Request, read_plan

NUM_NAMED = 10


def verify_against_plan(folder: Path) -> str:
    """Compare every sample of a set with its plan; what was found to be right.

    Raises:
        ShardError: Naming the first samples that are missing, twice, foreign, or not as the plan asked for.
    """
    plan, manifest = read_plan(folder), read_manifest(folder)
    problems = list(_problems(folder, plan, manifest))
    if problems:
        more = [f"... and {len(problems) - NUM_NAMED} more"] if len(problems) > NUM_NAMED else []
        told = "\n  ".join([*problems[:NUM_NAMED], *more])
        raise ShardError(
            f"{folder}: {len(problems)} samples are not as in the plan\n  {told}", "draw the set anew in another folder"
        )
    return (
        f"{folder}: all {plan.num_images} images of plan {plan.digest[:12]} are there once, "
        f"in {len(manifest.shards)} shards, and nothing else"
    )


def _problems(folder: Path, plan: Plan, manifest: Manifest) -> list[str]:
    if manifest.kind != "synthetic":
        return [f"the set is of kind {manifest.kind}, expected synthetic"]
    planned = {
        request.key: (number, request) for number, batch in enumerate(plan.batches) for request in batch.requests
    }
    seen: dict[str, str] = {}
    problems = []
    for shard in manifest.shards:
        for triple in read_shard(folder, shard):
            if problem := _problem(plan, planned, seen, triple):
                problems.append(f"{shard.name}: {triple.key} {problem}")
            seen.setdefault(triple.key, shard.name)
    return problems + [f"{key} of batch {number} is missing" for key, (number, _) in planned.items() if key not in seen]


def _problem(plan: Plan, planned: dict[str, tuple[int, Request]], seen: dict[str, str], triple: Triple) -> str:
    if triple.key not in planned:
        return "is not in the plan"
    if triple.key in seen:
        return f"is in {seen[triple.key]} too"
    return misfit(plan, *planned[triple.key], triple)
