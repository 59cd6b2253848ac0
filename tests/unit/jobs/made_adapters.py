"""Adapters that nobody trained, away from their base, and runs whose checkpoints hold them as two ranks write them."""

import json

import torch
from safetensors.torch import save_file

from ccmdist.adapters.state import AdapterState
from ccmdist.commit import sha256_of_file
from ccmdist.config.loading import load, resolved
from ccmdist.config.train import GrowthSettings, LoRASettings, TrainConfig, WDLoRASettings
from ccmdist.jobs.adapter_check import linear_shapes
from ccmdist.train.checkpoint import FORMAT_VERSION, sealed

SETTINGS = {
    "wdlora": WDLoRASettings(lora_rank=4, alpha=8.0),
    "lora": LoRASettings(lora_rank=4, alpha=8.0),
    "selora": LoRASettings(lora_rank=6, alpha=8.0, growth=GrowthSettings()),
    "se-wdlora": WDLoRASettings(lora_rank=6, alpha=0.7, growth=GrowthSettings(start_rank=3)),
}
DUAL = "objective={kind: dual, completion_fraction: 0.3}"
HOLES = "data.holes={}"


def moved_state(folder, kind, seed=5):
    """An adapter whose alpha is not its rank; where ranks grow, they are random from 1 to the largest."""
    settings = SETTINGS[kind]
    source = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (num_out, num_in) in linear_shapes(folder).items():
        if name.startswith("transformer_blocks.") and "mod" not in name:
            rank = settings.lora_rank
            if settings.growth:
                rank = int(torch.randint(1, rank + 1, (), generator=source))
            tensors[name] = {
                "lora_A": torch.randn(rank, num_in, generator=source) / num_in**0.5,
                "lora_B": 0.05 * torch.randn(num_out, rank, generator=source),
            }
            if settings.kind == "wdlora":
                tensors[name]["magnitude"] = 1 + 0.1 * torch.randn(num_out, generator=source)
    return AdapterState(settings, tensors, {"base_digest": folder.transformer_digest(), "step": "7"})


def make_run(folder, tiny, state, steps=(3, 7), average=False, overrides=()):
    """A run folder with checkpoints as two ranks write them.

    Args:
        folder: Of the run.
        tiny: Folder of its base.
        state: What step 7 has trained; or name -> that, of two adapters.
        steps: Of the checkpoints, whose tensors are in proportion.
        average: Keep a moving average too, of half of that.
        overrides: Further settings of the run.
    """
    states = state if isinstance(state, dict) else {"": state}
    adapter = next(iter(states.values())).settings
    data = [f"data.{name}={tiny.path}" for name in ("shards", "model", "cache")]
    adapted = [f"adapter={json.dumps(resolved(adapter))}", "data.image_size_px=64"]
    config = load(TrainConfig, [], [f"run={folder}", *data, *adapted, *overrides])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"digest": "c" * 64, "settings": resolved(config)}))
    for step in steps:
        parameters = {
            f"{name}.{adapter_name}.{kind}".replace("..", "."): values * (step / 7)
            for adapter_name, one in states.items()
            for name, tensors in one.tensors.items()
            for kind, values in as_trained(tensors, adapter.lora_rank).items()
        }
        growth = {}
        if adapter.growth:
            births = {name: [0] * rank for name, rank in states[""].lora_ranks.items()}
            nothing = {name: [0.0, 0.0] for name in births}
            growth = {"growth": {"births": births, "sums": nothing, "tested": nothing}}
        facts = {"base_digest": tiny.transformer_digest(), "has_average": average, "objective_state": growth}
        _write_checkpoint(folder / "checkpoints" / f"step-{step:08d}", step, parameters, facts)
    return folder


def as_trained(tensors, lora_rank):
    """The tensors of a linear in the static shapes of training: inactive rows of A are random, columns of B zero."""
    A, B = tensors["lora_A"], tensors["lora_B"]
    more = lora_rank - len(A)
    return {
        **tensors,
        "lora_A": torch.cat([A, torch.randn(more, A.shape[1])]),
        "lora_B": torch.cat([B, torch.zeros(len(B), more)], dim=1),
    }


def _write_checkpoint(checkpoint, step, parameters, facts):
    checkpoint.mkdir(parents=True)
    slices, entries = {}, {}
    for rank in range(2):
        file = checkpoint / f"slices-{rank:05d}.safetensors"
        cut = {
            name: (0, t.numel() // 2) if rank == 0 else (t.numel() // 2, t.numel()) for name, t in parameters.items()
        }
        quantities = {"weight": 1.0, **({"average": 0.5} if facts["has_average"] else {})}
        tensors = {
            f"{name}|{quantity}": factor * parameters[name].flatten()[first:last].clone()
            for quantity, factor in quantities.items()
            for name, (first, last) in cut.items()
        }
        save_file(tensors, file)
        slices[file.name] = cut
        entries[file.name] = {"num_bytes": file.stat().st_size, "sha256": sha256_of_file(file)}
    manifest = facts | {
        "format_version": FORMAT_VERSION,
        "step": step,
        "samples_seen": step * 16,
        "config_digest": "c" * 64,
        "data_digest": "d" * 64,
        "parameters": {name: list(t.shape) for name, t in parameters.items()},
        "files": entries,
        "slices": slices,
    }
    (checkpoint / "manifest.json").write_text(json.dumps(sealed(manifest)))
