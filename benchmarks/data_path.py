"""The data path feeds a GPU ten times over, hides behind it, and costs the same for a thousand samples and a million.

python benchmarks/data_path.py [--samples 128] [--steps 15] [--sizes 1000 10000 100000 1000000] [--workers 2]

    rate      a cache of full-size samples (prompt embeddings 256 x 3584 and two 384-px latents, bf16) is read by the
              SampleStream of a run, decoded, checked and collated to batches of 8: samples per second of CPU time of
              one process. The tars were just written, so they come from memory; a disk is not measured
    wait      a consumer that takes 8 images every 8/9 s, as the planner expects of an H200, reads through loader
              workers: share of its time that it waits for data
    scale     caches of growing numbers of samples (indexes as `precompute` writes them, tars that are only as long as
              they should be) are opened, put in order, and asked for samples: each in a process of its own
    raw       shards of 384-px frames are read with all checks, as `precompute` reads them

Anchor of the index's bytes is a list of the entries as objects. The exit code is 1 if a limit does not hold.
"""

import argparse
import hashlib
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from measure.rows import Row, finish

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.config.data import DataSettings, PhantomShardsConfig
from ccmdist.data.cache_index import CacheEntry, Member, cache_folder, commit_fingerprint, fingerprint, index_path
from ccmdist.data.latent_cache import EncodedSample, LatentCache, write_cache_shard
from ccmdist.data.manifest import ShardEntry, commit_manifest, read_manifest
from ccmdist.data.order import Order
from ccmdist.data.phantom_shards import write_phantom_set
from ccmdist.data.reader import read_shard
from ccmdist.data.stream import SampleStream, batches

ENCODERS = {"version": "2509"}
MICRO_BATCH_SIZE, SHUFFLE_WINDOW = 8, 4096
IMAGES_PER_S = 9.0
"""What one H200 trains on with selective recompute, as the planner expects."""
SAMPLES_PER_SHARD, SAMPLES_PER_SUBJECT = 1000, 20
TEXT_SHAPE, LATENT_SHAPE = (256, 3584), (16, 48, 48)
NUM_ASKED_FOR = 20_000


def settings(folder: Path) -> DataSettings:
    """Of a shard set and a cache in ``folder``."""
    return DataSettings(shards=folder / "shards", model=folder / "model", cache=folder / "cache")


def names_of(number: int) -> tuple[str, str]:
    """Key and subject of a sample, as the pseudonyms of real sets look."""
    subject, frame = (_hash("s", number // SAMPLES_PER_SUBJECT), _hash("f", number))
    return f"s-{subject}-{frame}", f"s-{subject}"


def _hash(kind: str, number: int) -> str:
    return hashlib.sha256(f"{kind}{number}".encode()).hexdigest()[:16]


def commit_set(data: DataSettings, counts: list[int]) -> Path:
    """A manifest of shards with ``counts`` train samples, without tars; the folder of the cache that fits it."""
    data.shards.mkdir(parents=True)
    entries, first = [], 0
    for number, count in enumerate(counts):
        subjects = sorted({names_of(index)[1] for index in range(first, first + count)})
        groups = {CLINICAL_GROUPS[0]: count}
        entries.append(ShardEntry(f"train-{number:06d}.tar", "train", count, 1, "0" * 64, tuple(subjects), groups))
        first += count
    wanted = fingerprint(data, commit_manifest(data.shards, "phantom", entries).digest, ENCODERS)
    folder = cache_folder(data, wanted)
    commit_fingerprint(folder, wanted)
    return folder


def full_size_cache(folder: Path, num_samples: int) -> LatentCache:
    """A cache of random tensors of the real size."""
    data = settings(folder)
    cache = commit_set(data, [num_samples])
    write_cache_shard(cache, "train-000000.tar", map(_encoded, range(num_samples)))
    return LatentCache.open(data, ENCODERS, ("train",))


def _encoded(number: int) -> EncodedSample:
    source = torch.Generator().manual_seed(number)
    shapes = (TEXT_SHAPE, TEXT_SHAPE, LATENT_SHAPE, LATENT_SHAPE)
    tensors = [torch.randn(shape, generator=source).bfloat16() for shape in shapes]
    key, subject = names_of(number)
    return EncodedSample(key, CLINICAL_GROUPS[number % len(CLINICAL_GROUPS)], subject, *tensors)


def stream(cache: LatentCache) -> SampleStream:
    """Of one rank, in batches of 8."""
    entries = cache.entries("train")
    order = Order(entries, 0, MICRO_BATCH_SIZE, "natural", SHUFFLE_WINDOW)
    return SampleStream(cache, entries, order, MICRO_BATCH_SIZE, 0, 1)


def samples_per_s(cache: LatentCache, num_batches: int = 40) -> float:
    """Samples per second of CPU time of this process."""
    source = iter(stream(cache))
    next(source)
    start = time.process_time()
    for _ in islice(source, num_batches):
        pass
    return num_batches * MICRO_BATCH_SIZE / (time.process_time() - start)


def waiting_share(cache: LatentCache, num_workers: int, num_steps: int) -> float:
    """Share of its time that a consumer of 9 images/s waits for batches, once its workers have begun."""
    source = iter(batches(stream(cache), num_workers, _nothing))
    next(source)
    time.sleep(MICRO_BATCH_SIZE / IMAGES_PER_S)
    waited, start = 0.0, time.perf_counter()
    for _ in range(num_steps):
        asked = time.perf_counter()
        next(source)
        waited += time.perf_counter() - asked
        time.sleep(MICRO_BATCH_SIZE / IMAGES_PER_S)
    return waited / (time.perf_counter() - start)


def _nothing(worker: int) -> None:
    pass


def entries_of(num_samples: int) -> Iterator[CacheEntry]:
    """Entries of a cache of full-size samples, group by group and over three text lengths."""
    sample, negative = 1_983_000, 1_836_000
    for number in range(num_samples):
        key, subject = names_of(number)
        shard, place = divmod(number, SAMPLES_PER_SHARD)
        start = place * (sample + negative)
        yield CacheEntry(
            key,
            f"train-{shard:06d}.tar",
            CLINICAL_GROUPS[number * 7 % len(CLINICAL_GROUPS)],
            subject,
            250 + number % 3,
            Member(start, sample + number % 3, number * 2_654_435_761 % 2**32),
            Member(start + sample, negative + number % 3, number * 40_503 % 2**32),
        )


def large_cache(folder: Path, num_samples: int) -> DataSettings:
    """A cache that can be opened and put in order, but not read."""
    data = settings(folder)
    counts = [min(SAMPLES_PER_SHARD, num_samples - first) for first in range(0, num_samples, SAMPLES_PER_SHARD)]
    cache, entries = commit_set(data, counts), entries_of(num_samples)
    for number, count in enumerate(counts):
        shard, num_bytes = f"train-{number:06d}.tar", 1 << 32
        with (cache / shard).open("wb") as tar:
            tar.truncate(num_bytes)
        listed = [_as_json(entry) for entry in islice(entries, count)]
        values = {"shard": shard, "num_bytes": num_bytes, "sha256": "0" * 64, "entries": listed}
        index_path(cache, shard).write_text(json.dumps(values))
    return data


def _as_json(entry: CacheEntry) -> dict[str, Any]:
    values = {name: getattr(entry, name) for name in ("key", "shard", "clinical_group", "subject", "num_text_tokens")}
    for name in ("sample", "negative"):
        member = getattr(entry, name)
        values[name] = {part: getattr(member, part) for part in ("offset", "size", "crc32")}
    return values


def of_size(num_samples: int) -> dict[str, float]:
    """What a cache of so many samples costs a rank, in this process, which has done nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        data = large_cache(Path(folder), num_samples)
        before, start = _resident(), time.process_time()
        entries = LatentCache.open(data, ENCODERS, ("train",)).entries("train")
        order = Order(entries, 0, MICRO_BATCH_SIZE, "natural", SHUFFLE_WINDOW)
        opened = time.process_time()
        order.cell(0)
        planned = time.process_time()
        num_cells = min(NUM_ASKED_FOR, num_samples) // MICRO_BATCH_SIZE
        stride = num_samples // MICRO_BATCH_SIZE // num_cells
        for index in range(0, num_cells * stride, stride):
            for sample in order.cell(index):
                _ = entries[sample]
        asked = (time.process_time() - planned) / (num_cells * MICRO_BATCH_SIZE)
        return {
            "start_s": planned - start,
            "plan_s": planned - opened,
            "us_per_sample": 1e6 * (asked + (planned - opened) / num_samples),
            "index_bytes": entries.num_bytes / num_samples,
            "resident_bytes": (_resident() - before) / num_samples,
        }


def of_objects(num_samples: int) -> float:
    """Bytes per sample of the entries as objects."""
    before = _resident()
    entries = list(entries_of(num_samples))
    return (_resident() - before) / len(entries)


def _resident() -> int:
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


def frames_per_s(folder: Path) -> float:
    """Frames of 384 px that are read from raw shards per second of CPU time, with every check."""
    write_phantom_set(PhantomShardsConfig(out=folder / "raw", subjects_per_group=3, frames_per_subject=2))
    shards = read_manifest(folder / "raw").shards
    start, num_frames = time.process_time(), 0
    while time.process_time() - start < 2:
        num_frames += sum(1 for shard in shards for _ in read_shard(folder / "raw", shard))
    return num_frames / (time.process_time() - start)


def alone(function: Any, *arguments: Any) -> Any:
    """The result of a function in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def measured(arguments: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """All rows."""
    cache = full_size_cache(folder / "full", arguments.samples)
    rate = samples_per_s(cache)
    yield Row("cached samples read, checked, collated, per s of a core", rate, IMAGES_PER_S, 90, at_least=True)
    for num_workers in (arguments.workers, 0):
        share = waiting_share(cache, num_workers, arguments.steps)
        limit = 0.01 if num_workers else None
        yield Row(f"share of time waited for data at 9 images/s, {num_workers} workers", share, None, limit)
    shutil.rmtree(folder / "full")
    found = {size: alone(of_size, size) for size in arguments.sizes}
    small, large = min(found), max(found)
    for size, costs in found.items():
        yield Row(f"order and look-up of a sample of {size:,}, us", costs["us_per_sample"])
    cost, anchor = found[large]["us_per_sample"], found[small]["us_per_sample"]
    yield Row(f"cost of a sample of {large:,} / of {small:,}", cost / anchor, 1.0, 1.5, 1.0)
    objects = alone(of_objects, min(large, 100_000))
    yield Row(
        f"index of {large:,} samples, bytes per sample (anchor: objects)", found[large]["index_bytes"], objects, 64
    )
    yield Row("process with index, order, an epoch's plan, bytes per sample", found[large]["resident_bytes"], objects)
    for size in (small, large):
        yield Row(
            f"start with {size:,} samples, CPU s (an epoch's plan: {found[size]['plan_s']:.2f})", found[size]["start_s"]
        )
    yield Row("raw 384-px frames read and checked per s of a core", frames_per_s(folder), IMAGES_PER_S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6])
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return finish("data_path", list(measured(arguments, Path(folder))))


if __name__ == "__main__":
    sys.exit(main())
