"""What tests of MDF-MLLM share: tiny language models, and the settings of a small network."""

from pathlib import Path

from ccmdist.config.objectives.mdf_mllm import DiagnoseSettings
from ccmdist.models.make_mllm import TINY, make_mllm

CHANNELS = (4, 4, 8, 8, 16, 4)
KINDS = tuple(TINY)


def make_mllms(folder):
    """A tiny language model of each kind in a folder of its name."""
    for kind in KINDS:
        make_mllm(kind, Path(folder) / kind)


def small(mllm, **changed):
    """Settings for images of 64 px."""
    usual = {"llm_dtype": "fp32", "token_grid": 4, "channels": CHANNELS, "lora_rank": 2, "fusion_heads": 4}
    return DiagnoseSettings(**{"mllm": mllm, **usual, **changed})
