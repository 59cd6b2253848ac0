"""The folder of a synthetic set while it grows, and how it becomes a set.

OUT/
  plan.json                what is to be drawn
  batches/test-000123.tar  images of batch 123, until its shard is there
  claims/000124            locked by the worker that draws batch 124
  test-000004.tar          shard 4: the images of ``batches_per_shard`` consecutive batches
  manifest.json            when all shards are there

A file is committed when it has its name, and no list beside it could disagree. Any number of workers may write here
without talking to each other: whoever finds all batches of a shard makes the shard, and whoever finds all shards
makes the manifest. Two who do so at once write the same bytes.
"""

import contextlib
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from ccmdist.ccm.groups import UNLABELLED
from ccmdist.commit import left_overs, sha256_of_file
from ccmdist.data.given_prompts import given_prompt
from ccmdist.data.manifest import MANIFEST, ShardEntry, commit_manifest, read_manifest
from ccmdist.data.reader import read_shard
from ccmdist.data.trained_on import TRAINING, Training
from ccmdist.data.triple import Triple, mask_sha256, prompt_for
from ccmdist.data.writer import write_shard
from ccmdist.errors import ShardError
from ccmdist.synthesis.claims import claimed, order_of_help, share
from ccmdist.synthesis.plan import Plan, accept_plan
from ccmdist.synthesis.requests import Request

BATCHES: Final = "batches"
CLAIMS: Final = "claims"


class SyntheticSet:
    """The files of one plan.

    Args:
        folder: Of the set.
        plan: Of the set.
        training: Whom its generator has seen, as :mod:`~ccmdist.data.trained_on` tells it; needed by whoever finishes
            the set.
    """

    def __init__(self, folder: Path, plan: Plan, training: Training | None = None) -> None:
        self.folder, self.plan, self.training = folder, plan, training
        self._batches, self._claims = folder / BATCHES, folder / CLAIMS

    def accept(self) -> None:
        """Begin the set, or check that it was begun with the same plan.

        Raises:
            RunError: If the folder holds something else.
        """
        accept_plan(self.folder, self.plan)

    def is_committed(self, batch: int) -> bool:
        """Whether the images of a batch are on the disk, by themselves or in their shard."""
        shard = batch // self.plan.settings.batches_per_shard
        return (self._batches / self._name(batch)).exists() or (self.folder / self._name(shard)).exists()

    def open_batches(self, worker_index: int = 0, num_workers: int = 1) -> list[int]:
        """The batches ``worker_index::num_workers`` that are not committed."""
        mine = share(len(self.plan.batches), worker_index, num_workers)
        return [batch for batch in mine if not self.is_committed(batch)]

    def open_for_help(self, worker_index: int, num_workers: int) -> list[int]:
        """All batches that are not committed, in the order in which this worker helps with them."""
        order = order_of_help(len(self.plan.batches), worker_index, num_workers)
        return [batch for batch in order if not self.is_committed(batch)]

    @contextlib.contextmanager
    def claim(self, batch: int) -> Iterator[bool]:
        """Whether the batch is open and this process has it to itself while the body runs."""
        if self.is_committed(batch):
            yield False
            return
        with claimed(self._claims, batch) as is_mine:
            # Whoever had the claim before may have committed the batch.
            yield is_mine and not self.is_committed(batch)

    def is_free(self, batch: int) -> bool:
        """Whether the batch is open and no live process draws it."""
        with self.claim(batch) as is_mine:
            return is_mine

    def commit_batch(self, batch: int, triples: Iterable[Triple]) -> None:
        """Commit the images of a batch and, if they were the last ones of their shard, the shard."""
        write_shard(self._batches, self._name(batch), self.plan.settings.split, triples)
        self.assemble(batch // self.plan.settings.batches_per_shard)

    def assemble(self, shard: int) -> None:
        """Make a shard of its batches if they are all there, and remove them.

        Raises:
            ShardError: If the file of a batch is damaged or belongs to another plan.
        """
        path, batches = self.folder / self._name(shard), self.plan.batches_of_shard(shard)
        if not path.exists():
            if not all((self._batches / self._name(batch)).exists() for batch in batches):
                return
            try:
                write_shard(self.folder, path.name, self.plan.settings.split, self._images(batches))
            except (OSError, ShardError):
                # Another worker was faster and has removed the batches; else the error is one.
                if not path.exists():
                    raise
        for batch in batches:
            (self._batches / self._name(batch)).unlink(missing_ok=True)

    def finish(self) -> bool:
        """Make what a stopped worker has left unmade, and the manifest if all shards are there; whether they are."""
        for shard in range(self.plan.num_shards):
            self.assemble(shard)
        if not all((self.folder / self._name(shard)).exists() for shard in range(self.plan.num_shards)):
            return False
        if not self._has_manifest():
            self._commit_manifest()
        for folder in (self._batches, self._claims):
            shutil.rmtree(folder, ignore_errors=True)
        for left_over in left_overs(self.folder):
            left_over.unlink(missing_ok=True)
        return True

    def num_committed(self) -> int:
        """Batches whose images are on the disk."""
        return len(self.plan.batches) - len(self.open_batches())

    def shard_entry(self, shard: int) -> ShardEntry:
        """What the manifest says of a shard: the plan's contents, the file's bytes."""
        requests = [
            request for batch in self.plan.batches_of_shard(shard) for request in self.plan.batches[batch].requests
        ]
        return self._entry(self.folder / self._name(shard), requests)

    def _commit_manifest(self) -> None:
        about = {"plan_digest": self.plan.digest, **self.plan.settings_values(), TRAINING: self.training}
        try:
            commit_manifest(self.folder, "synthetic", map(self.shard_entry, range(self.plan.num_shards)), about)
        except FileNotFoundError:
            # Another worker has finished the set and cleared our temporary file away.
            if not self._has_manifest():
                raise

    def _entry(self, path: Path, requests: list[Request]) -> ShardEntry:
        counts = Counter(request.clinical_group or UNLABELLED for request in requests)
        subjects = tuple(sorted({request.subject for request in requests}))
        split, size, sha256 = self.plan.settings.split, path.stat().st_size, sha256_of_file(path)
        return ShardEntry(path.name, split, len(requests), size, sha256, subjects, dict(sorted(counts.items())))

    def _images(self, batches: Iterable[int]) -> Iterator[Triple]:
        """The images of committed batches, each compared with its request."""
        for batch in batches:
            path, requests = self._batches / self._name(batch), list(self.plan.batches[batch].requests)
            remedy = f"remove {path} and run the same command again"
            try:
                triples = list(read_shard(self._batches, self._entry(path, requests)))
            except ShardError as error:
                raise ShardError(error.message, remedy) from None
            for request, triple in zip(requests, triples, strict=True):
                if problem := misfit(self.plan, batch, request, triple):
                    raise ShardError(f"{path}: sample {triple.key}: {problem}", remedy)
                yield triple

    def _has_manifest(self) -> bool:
        """Whether the manifest is there and names the files that are there."""
        if not (self.folder / MANIFEST).exists():
            return False
        sizes = {shard.name: shard.num_bytes for shard in read_manifest(self.folder).shards}
        names = [self._name(shard) for shard in range(self.plan.num_shards)]
        return sizes == {name: (self.folder / name).stat().st_size for name in names}

    def _name(self, number: int) -> str:
        return f"{self.plan.settings.split}-{number:06d}.tar"


def misfit(plan: Plan, batch: int, request: Request, triple: Triple) -> str:
    """How a sample differs from what the plan asked for; an empty text if it does not."""
    if triple.key != request.key:
        return f"stands where the plan has {request.key}"
    if (triple.meta.subject, triple.meta.clinical_group) != (request.subject, request.clinical_group):
        return "has another subject or clinical group than in the plan"
    source = replace(triple.meta, prompt=prompt_for(request.clinical_group, triple.meta.eye, triple.meta.fields))
    if triple.meta.prompt != given_prompt(source, plan.settings.prompts, f"sample {request.source_key}"):
        return "has another prompt than in the plan"
    hole = triple.inpaint_mask
    if (hole is None) != (request.hole is None):
        return "has no hole that was filled" if hole is None else "has a hole, and the plan fills none"
    hole_sha256 = None if hole is None else mask_sha256(hole)
    expected = plan.provenance(batch, request, mask_sha256(triple.nerve_mask), hole_sha256)
    found = triple.meta.provenance or {}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            return f"provenance {name} is {found.get(name)!r}, the plan has {expected.get(name)!r}"
    return ""
