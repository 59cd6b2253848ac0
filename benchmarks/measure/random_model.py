"""The MMDiT with random weights made on the device itself, in seconds: no folder, no cache, the code of the product.

Weights are normal with variance 1 / fan-in, gains of norms 1, biases 0, as `ccmdist model make` writes them. A table in
place of the modulation has as many rows as a run's, of normal values: what lies in it changes no time and no memory.
Unlike a run's it is no file in memory, and samples are drawn, not read.
"""

import atexit
import dataclasses
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ccmdist.adapters.injection import row_squares_of
from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.cluster.ranks import Ranks
from ccmdist.config.loading import load
from ccmdist.config.train import TrainConfig
from ccmdist.diffusion import flow
from ccmdist.models import attention, mmdit
from ccmdist.models.backbones.qwen import Qwen
from ccmdist.models.modulation_table import ModulationTable, levels, row_length
from ccmdist.models.quantized import FORMS
from ccmdist.train.engine import Engine, quiet_libraries, zero_config
from ccmdist.train.objectives.edit import ADAPTER_SET, DTYPES, EditObjective
from ccmdist.train.objectives.objective import Batch

from .scale import RandomFolder, Scale

LORA_RANK, LR, TABLE_STD = 64, 1e-4, 0.1
Weights = Mapping[str, Tensor]


def skeleton(scale: Scale, table: ModulationTable | None) -> nn.Module:
    """The model without weights, with its table."""
    model = mmdit.skeleton(RandomFolder(scale))
    if table is not None:
        table.install(model)
    return model


@torch.no_grad()
def hold_random(model: nn.Module, form: str, dtype: torch.dtype, device: torch.device) -> None:
    """Random values for a model without weights, the linears of its blocks in 4 or 8 bits.

    They are made and rounded one by one: the model never exists in ``dtype`` as a whole.
    """
    source = torch.Generator(device).manual_seed(0)
    linears = {f"{name}.weight": module for name, module in model.named_modules() if _is_in_block(name, module)}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    rest = {name: random_weight(name, shape, dtype, source) for name, shape in shapes.items() if name not in linears}
    model.load_state_dict(rest, assign=True, strict=False)
    for name, linear in linears.items():
        held = FORMS[form](random_weight(name, shapes[name], dtype, source), device)
        del linear.weight
        linear.weight = held


def _is_in_block(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and name.startswith("transformer_blocks.")


@torch.no_grad()
def random_weights(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Weights:
    """Random values for all parameters of a model without weights."""
    source = torch.Generator(device).manual_seed(0)
    return {name: random_weight(name, p.shape, dtype, source) for name, p in model.named_parameters()}


def random_weight(name: str, shape: torch.Size, dtype: torch.dtype, source: torch.Generator) -> Tensor:
    """One weight, on the generator's device."""
    weight = torch.empty(shape, dtype=dtype, device=source.device)
    if name.endswith("bias"):
        return weight.zero_()
    return weight.fill_(1) if len(shape) < 2 else weight.normal_(0, math.prod(shape[1:]) ** -0.5, generator=source)


def random_table(scale: Scale, sigmas: Tensor, dtype: torch.dtype, device: torch.device) -> ModulationTable:
    """A table for some noise levels, in host memory; made on the device, which is faster."""
    levels_N = levels(sigmas, dtype)
    shape = len(levels_N), row_length(mmdit.skeleton(RandomFolder(scale)))
    rows_NR = torch.empty(shape, dtype=dtype, device=device).normal_(0, TABLE_STD).cpu()
    return ModulationTable(levels_N, rows_NR, "a random table")


def train_settings(scale: Scale, **changes: Any) -> TrainConfig:
    """Settings of a run: WDLoRA of rank 64, the base whole in this process, one micro-batch per step, no pictures."""
    size = changes.pop("micro_batch_size", 1)
    values = {
        "run": "unused",
        **{f"data.{name}": "unused" for name in ("shards", "model", "cache")},
        "data.image_size_px": scale.image_size_px,
        "micro_batch_size": size,
        "global_batch_size": size,
        "adapter.lora_rank": LORA_RANK,
        "sharding": "replicated",
        "monitor.images_every_steps": 0,
        **changes,
    }
    return load(TrainConfig, [], [f"{name}={value}" for name, value in values.items()])


class RandomEdit(EditObjective):
    """The objective of training, on random weights and random samples."""

    def __init__(self, config: TrainConfig, group: ProcessGroup, scale: Scale, weights: Weights | None = None) -> None:
        """Take the weights of another objective, or make some."""
        self.config, self.group, self.scale, self.weights = config, group, scale, weights
        self.folder = RandomFolder(scale)
        self.backbone = Qwen(self.folder)
        self.latent_hw, self.token_hw = (2 * scale.edge, 2 * scale.edge), (scale.edge, scale.edge)
        self.noise_schedule = self.folder.noise_schedule()
        self.shift = flow.resolution_shift(scale.edge**2, self.noise_schedule)
        self.grid = flow.training_sigmas(self.shift)
        self.dtype = DTYPES[config.base]
        self._drawn: list[float] = []
        self._is_tabled = config.tabulate_modulation
        self._num_updates = -1

    def build(self, zero_config: dict[str, Any]) -> nn.Module:
        """The model, ready to be trained."""
        names = mmdit.linear_names(skeleton(self.scale, None), self.config.adapter.targets)
        model = skeleton(self.scale, self._table(names))
        if self.config.base in FORMS:
            hold_random(model, self.config.base, self.dtype, self.group.device)
        else:
            self.weights = self.weights or random_weights(model, self.dtype, self.group.device)
            model.load_state_dict(self.weights, assign=True)
        return self.adapt(model, names, row_squares_of(model, names))

    def batch(self, micro_batch_size: int) -> Batch:
        """Samples as the cache gives them, in host memory."""
        source = torch.Generator().manual_seed(1)
        latents = torch.randn(2, micro_batch_size, 16, *self.latent_hw, generator=source).to(self.dtype)
        text = (micro_batch_size, self.scale.text_tokens, self.scale.transformer.text_width)
        embeds = torch.randn(text, generator=source).to(self.dtype)
        names = {"image_latents": latents[0], "mask_latents": latents[1], "prompt_embeds": embeds}
        return names | {"positions": list(range(micro_batch_size))}

    def _table(self, adapted: list[str]) -> ModulationTable | None:
        if not self._is_tabled:
            return None
        sampling = flow.sampling_sigmas(self.config.monitor.denoise_steps, self.shift, self.noise_schedule)
        return random_table(self.scale, torch.cat([self.grid, sampling]), self.dtype, self.group.device)


class Training:
    """Steps of training by the product's objective and engine."""

    def __init__(self, config: TrainConfig, group: ProcessGroup, scale: Scale, weights: Weights | None = None) -> None:
        self.objective = RandomEdit(config, group, scale, weights)
        model = self.objective.build(zero_config(config, group.ranks.world_size, group.ranks_per_node))
        self.engine = Engine(model, self.objective.parameter_sets(), config, group)
        self.objective.after_step()

    def step(self, batch: Batch) -> float:
        """One optimizer step of one micro-batch, as the training loop makes it; the loss."""
        self.engine.begin_step(frozenset({ADAPTER_SET}), LR)
        loss = self.objective.loss(self.engine.module, batch)
        told = float(loss.detach())
        self.engine.backward(loss)
        self.engine.step()
        self.objective.after_step()
        return told


@cache
def one_rank(device: str) -> ProcessGroup:
    """The process group of a run of one process, always the same: DeepSpeed keeps the first that it has seen."""
    if device == "cpu":
        os.environ |= {"CCMDIST_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", folder)
    group = ProcessGroup(Ranks(0, 0, 1), timeout_min=10, rendezvous=f"file://{folder}/rendezvous")
    atexit.register(group.close)
    quiet_libraries()
    return group


def scale_of(case: Mapping[str, Any]) -> Scale:
    """The scale that a case names."""
    return Scale(**{field.name: case[field.name] for field in dataclasses.fields(Scale)})


@dataclasses.dataclass(frozen=True)
class InUse:
    """Most bytes in use at once.

    Attributes:
        allocated: That tensors took; on a CPU by how much the process has grown.
        reserved: That PyTorch's allocator kept from others; on a CPU the same.
        libraries: That CUDA and its libraries took beside it, if no other process uses the GPU; on a CPU 0.
    """

    allocated: int
    reserved: int
    libraries: int


class Watch:
    """Watches the memory of a device from now on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the most that was resident is forgotten
            self.before = _status_bytes("VmRSS")

    def most(self) -> InUse:
        """Most bytes in use at once since then."""
        if self.device.type != "cuda":
            grown = _status_bytes("VmHWM") - self.before
            return InUse(grown, grown, 0)
        free, total = torch.cuda.mem_get_info(self.device)
        libraries = total - free - torch.cuda.memory_reserved(self.device)
        allocated, reserved = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        return InUse(allocated, reserved, libraries)


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def chosen_attention(scale: Scale, device: torch.device) -> str:
    """The backend on which the model would attend here, by diffusers' name."""
    return attention.set_backend(skeleton(scale, None), device, torch.bfloat16).name
