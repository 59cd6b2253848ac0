"""Making and checking shard sets."""

import sys
from pathlib import Path

from ccmdist.config.data import FolderShardsConfig, FoldShardsConfig, PhantomShardsConfig
from ccmdist.config.loading import read_resolved
from ccmdist.console import log
from ccmdist.data.fold_shards import describe_fold_set, write_fold_set
from ccmdist.data.folder_shards import describe_folder_set, write_folder_set
from ccmdist.data.manifest import Manifest
from ccmdist.data.phantom_shards import describe_phantom_set, write_phantom_set
from ccmdist.data.reader import SetReport, verify_set


def phantom(config_path: str) -> None:
    """Make a set of phantoms."""
    config = read_resolved(PhantomShardsConfig, Path(config_path))
    _tell(config.out, write_phantom_set(config))


def folders(config_path: str) -> None:
    """Pack a folder of images, masks and a table."""
    config = read_resolved(FolderShardsConfig, Path(config_path))
    _tell(config.out, write_folder_set(config))


def fold(config_path: str) -> None:
    """Split a set anew for one fold."""
    config = read_resolved(FoldShardsConfig, Path(config_path))
    _tell(config.out, write_fold_set(config))


def verify(folder: Path) -> None:
    """Compare every shard of a set with its manifest, and print what the set holds.

    Raises:
        ShardError: With the first problem of each shard.
    """
    sys.stdout.write(f"{verify_set(folder)}; every sample is as the manifest says\n")


def describe(config: PhantomShardsConfig | FolderShardsConfig | FoldShardsConfig) -> str:
    """What the command would pack."""
    if isinstance(config, FoldShardsConfig):
        return describe_fold_set(config)
    if isinstance(config, PhantomShardsConfig):
        return describe_phantom_set(config)
    return describe_folder_set(config)


def _tell(folder: Path, manifest: Manifest) -> None:
    log.info("%s", SetReport(folder, manifest))
