"""Settings of planned runs, and the published model without weights."""

import torch

from ccmdist.config.loading import load
from ccmdist.config.train import TrainConfig
from ccmdist.models.make import make_transformer
from ccmdist.models.sizes import SIZES, Size
from ccmdist.planner.transformer import Transformer

PUBLISHED = Transformer.from_config({})
NEEDED = ("run=runs/a", "data.shards=shards/a", "data.model=models/a")


def config(*overrides):
    """Settings of a training run with defaults: WDLoRA of rank 16, bf16, everything computed again."""
    return load(TrainConfig, [], [*NEEDED, *overrides])


def on_meta(version="2509", **sizes):
    """The real class without weights; sizes as in its config.json."""
    full = SIZES["full"]
    with torch.device("meta"):
        return make_transformer(Size(sizes, full.text, full.vision), version)
