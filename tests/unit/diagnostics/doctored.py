"""Things that doctor looks at, made sound or broken: model folders without weights in them, mounts, settings."""

import contextlib
import json
import os
import subprocess

import pytest

from ccmdist.config.loading import load
from ccmdist.diagnostics.checks.finding import DoctorConfig, Request

LINEARS = {
    "attn.to_q": (1, 1),
    "attn.to_k": (1, 1),
    "attn.to_v": (1, 1),
    "attn.to_out.0": (1, 1),
    "attn.add_q_proj": (1, 1),
    "attn.add_k_proj": (1, 1),
    "attn.add_v_proj": (1, 1),
    "attn.to_add_out": (1, 1),
    "img_mlp.net.0.proj": (4, 1),
    "img_mlp.net.2": (1, 4),
    "txt_mlp.net.0.proj": (4, 1),
    "txt_mlp.net.2": (1, 4),
    "img_mod.1": (6, 1),
    "txt_mod.1": (6, 1),
}
"""Linears of an MMDiT block, and their shapes in widths."""


def model_folder(path, num_blocks=1, width=8):
    """A complete model folder of any size; its weights are holes that take no space on the disk."""
    texts = {
        "model_index.json": {"_class_name": "QwenImageEditPlusPipeline"},
        "scheduler/scheduler_config.json": {"max_shift": 0.9},
        "processor/preprocessor_config.json": {},
        "tokenizer/tokenizer_config.json": {},
        "tokenizer/tokenizer.json": {},
        **{f"{component}/config.json": {} for component in ("transformer", "vae", "text_encoder")},
    }
    for name, values in texts.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps(values))
    weights = {
        f"transformer_blocks.{block}.{name}.weight": [rows * width, columns * width]
        for block in range(num_blocks)
        for name, (rows, columns) in LINEARS.items()
    }
    safetensors(path / "transformer/diffusion_pytorch_model.safetensors", weights)
    safetensors(path / "vae/diffusion_pytorch_model.safetensors", {"decoder.weight": [4, 4]})
    safetensors(path / "text_encoder/model.safetensors", {"model.weight": [4, 4]})
    return path


def safetensors(file, shapes):
    """A file with bf16 tensors of these shapes, all zero."""
    header, offset = {}, 0
    for name, (rows, columns) in shapes.items():
        end = offset + 2 * rows * columns
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + offset)


def settings(*overrides):
    """Settings of a run with the given overrides."""
    return load(DoctorConfig, [], ["run=runs/a", "data.shards=shards/a", "data.model=models/a", *overrides])


def request(*required, config=None, **environment):
    return Request(frozenset(required), config, environment)


@contextlib.contextmanager
def tmpfs(folder, options):
    """A small file system of its own; skips where it cannot be mounted."""
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def one(findings, what):
    """The only finding of that name."""
    found = [finding for finding in findings if finding.what == what]
    assert len(found) == 1, findings
    return found[0]
