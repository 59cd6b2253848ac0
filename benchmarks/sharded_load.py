"""A rank loads its share of the weights and no more: memory, bytes read and output on 1, 2 and 4 real processes.

python benchmarks/sharded_load.py [--ranks 1 2 4] [--folder FOLDER]

The transformer of full width and two blocks (1.44 GB, bf16, random) is loaded under ZeRO-3 on gloo, whole and with its
modulation tabulated, by ranks that are processes of their own. Compared are, of the rank that is worst,

    memory    peak of its resident set above what it was after all imports and the process group; limit: 1.1 times its
              share of the bytes, and 0.4 GB
    bytes     read by system calls, as the kernel counts them (/proc/self/io); limit: 1.05 times its share
    disk      all ranks together from the disk, the files having been dropped from the page cache before
    output    sums over the velocity of fixed inputs, digit for digit those of diffusers' from_pretrained in one engine
    seconds   of loading; and of a node without a table that makes it or, from a converted model, maps it

The folder is made first and kept (measure/full_width.py). The exit code is 1 if a limit does not hold.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import measure.quiet  # noqa: F401  before torch
import torch
from measure.full_width import DEFAULT_FOLDER, full_width_folder, num_bytes
from measure.loading import BASE, LEVEL, loaded, started, stock
from measure.rows import Row, finish

from ccmdist.diffusion import flow
from ccmdist.models import mmdit
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.modulation_table import is_tabled, levels
from ccmdist.models.tabulation import IN_MODEL, LEVELS_AT_ONCE, TableKind, write_table

GB = 10**9
MEMORY_FACTOR, MEMORY_BESIDE_BYTES, READ_FACTOR = 1.1, 0.4 * GB, 1.05


def drop_from_cache(folder: ModelFolder) -> None:
    """Let the kernel forget the weight files, so that they come from the disk again."""
    for file in set(folder.weight_files("transformer").values()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def rows_of(folder: ModelFolder, world_size: int, tabled: bool, needed: int, expected: str) -> Iterator[Row]:
    """The claims about one number of ranks."""
    drop_from_cache(folder)
    level = torch.tensor([LEVEL]) if tabled else None
    told, share = started(loaded, world_size, folder.path, folder.version, level), needed / world_size
    about = f"{'tabled' if tabled else 'whole'}, ranks {world_size}"
    limit = (MEMORY_FACTOR * share + MEMORY_BESIDE_BYTES) / GB
    yield Row(f"{about}: peak memory of a rank, GB", max(one["memory"] for one in told) / GB, share / GB, limit)
    read = max(one["read"] for one in told) / GB
    yield Row(f"{about}: bytes that a rank reads, GB", read, share / GB, READ_FACTOR * share / GB)
    yield Row(f"{about}: bytes from the disk, all ranks, GB", sum(one["disk"] for one in told) / GB, needed / GB)
    yield Row(f"{about}: outputs that differ from diffusers'", sum(o["checksum"] != expected for o in told), 0, 0)
    yield Row(f"{about}: seconds of loading", max(one["seconds"] for one in told))


def on_new_nodes(folder: ModelFolder, world_size: int) -> Iterator[Row]:
    """What `ccmdist model convert` saves a node that has no table yet, for the noise levels of training at 384 px."""
    grid = torch.cat([torch.tensor([LEVEL]), flow.training_sigmas(flow.resolution_shift(576, folder.noise_schedule()))])
    found = {}
    with tempfile.TemporaryDirectory(prefix="ccmdist-bench-") as converted:
        for component in ("transformer", "scheduler"):
            (Path(converted) / component).symlink_to(folder.path / component)
        kind = TableKind.of(BASE, torch.bfloat16, LEVELS_AT_ONCE, torch.device("cpu"))
        levels_N = levels(grid, torch.bfloat16)
        write_table(Path(converted) / IN_MODEL, folder, levels_N, torch.bfloat16, kind, torch.device("cpu"))
        for name, path in (("made", folder.path), ("converted", Path(converted))):
            with tempfile.TemporaryDirectory(prefix="ccmdist-bench-") as node:
                os.environ["CCMDIST_NODE_TMP"] = node
                drop_from_cache(folder)
                found[name] = started(loaded, world_size, path, folder.version, grid)
    about = f"new node, ranks {world_size}, table of {len(levels_N)} levels: converted beside made"
    read = {name: sum(one["table_read"] for one in told) / GB for name, told in found.items()}
    yield Row(f"{about}: bytes read for the table, GB", read["converted"], read["made"], 0.1 * read["made"])
    for what, parts in (("table", ["table_seconds"]), ("table and weights", ["table_seconds", "seconds"])):
        seconds = {name: max(sum(one[part] for part in parts) for one in told) for name, told in found.items()}
        yield Row(f"{about}: seconds for {what}", seconds["converted"], seconds["made"])
    yield Row(f"{about}: outputs that differ", len({o["checksum"] for t in found.values() for o in t}) - 1, 0, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    given = parser.parse_args()
    folder = full_width_folder(given.folder)
    whole = num_bytes(folder)
    weights = mmdit.skeleton(folder).named_parameters()
    kept = whole - sum(2 * weight.numel() for name, weight in weights if is_tabled(name))
    with tempfile.TemporaryDirectory(prefix="ccmdist-bench-") as node:
        os.environ["CCMDIST_NODE_TMP"] = node
        expected = started(stock, 1, folder.path)[0]["checksum"]
        cases = [(tabled, world_size) for tabled in (False, True) for world_size in given.ranks]
        needed = {False: whole, True: kept}
        rows = [row for t, n in cases for row in rows_of(folder, n, t, needed[t], expected)]
        rows += on_new_nodes(folder, 2)
    sys.exit(finish("sharded_load", rows))


if __name__ == "__main__":
    main()
