"""Tiny models of other families beside the small world's, with their caches."""

from pathlib import Path


def make_backbone(world, kind):
    """A tiny folder of a kind, called like it, and its cache beside what the world has; made once in a session."""
    from ccmdist.config.data import PrecomputeConfig
    from ccmdist.config.loading import load
    from ccmdist.jobs.model import TINY
    from ccmdist.precompute.fill import fill_cache
    from tests.distributed.small_world import data_overrides

    folder = Path(world) / kind
    if not folder.exists():
        TINY[kind](folder, 0)
    fill_cache(load(PrecomputeConfig, [], [*data_overrides(world), f"data.model={folder}"]), 0, 1)
