"""Does stock diffusers make of an exported adapter what was trained? Nothing that fails here is published.

Compared on fixed random inputs, in fp32 on the CPU. What the stock loader has put into the model must be our tensors
bit for bit, at our linears and no others, with our scale. The outputs can then only differ by rounding, for PEFT adds
the same terms in another order.

Of a large model only the first and the last block are compared (some 4 GB instead of 80 GB): all blocks are of one
class, their adapters are written by one rule, and names and shapes are checked in all of them.
"""

import inspect
import logging
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn

from ccmdist.adapters.injection import inject, row_squares_of
from ccmdist.adapters.merge import merge_into
from ccmdist.adapters.state import WEIGHTS_FILE, AdapterState, read_adapter, write_adapter
from ccmdist.errors import AdapterError
from ccmdist.models.backbones.choice import backbone_of, probe
from ccmdist.models.building import allocate
from ccmdist.models.model_folder import ModelFolder

LARGE_BYTES: Final = 4 << 30
"""Size of weight files above which only two blocks are compared."""


@dataclass(frozen=True)
class Agreement:
    """How well stock diffusers and the merged weights agree with the adapted model, relative to its largest output."""

    stock: float
    merged: float
    blocks: tuple[int, ...]
    num_blocks: int

    def __str__(self) -> str:
        which = "all blocks" if len(self.blocks) == self.num_blocks else f"blocks {', '.join(map(str, self.blocks))}"
        return (
            f"stock diffusers loads the same tensors, bit for bit; its output differs by {self.stock:.1e}, "
            f"that of merged weights by {self.merged:.1e} (relative, {which} of {self.num_blocks})"
        )


def compare(folder: ModelFolder, adapter: Path) -> Agreement:
    """Compare an adapter loaded by stock diffusers, the same applied by us, and the same merged.

    Args:
        folder: The base.
        adapter: Folder of the exported adapter.

    Raises:
        AdapterError: If the loaded tensors, the scale or the adapted linears differ, or outputs by more than rounding.
    """
    state = read_adapter(adapter)
    state.check_fits(linear_shapes(folder), folder.path)
    counts = block_counts(folder)
    num_blocks = sum(counts.values())
    is_large = sum(file.stat().st_size for file in set(folder.weight_files("transformer").values())) > LARGE_BYTES
    blocks = _ends(counts) if is_large else tuple(range(num_blocks))
    with tempfile.TemporaryDirectory(prefix="ccmdist-") as temporary:
        if len(blocks) < num_blocks:
            state, adapter = part_of(state, blocks, counts), Path(temporary)
            write_adapter(adapter, state)
        stock = _stock_output(base_blocks(folder, blocks), folder, adapter, state)
    ours, merged = _our_output(base_blocks(folder, blocks), state), _merged_output(base_blocks(folder, blocks), state)
    agreement = Agreement(_difference(stock, ours), _difference(merged, ours), blocks, num_blocks)
    for what, difference in (("stock diffusers", agreement.stock), ("the merged model", agreement.merged)):
        # Written so that a NaN is refused.
        if not difference <= folder.layout.output_tolerance:
            raise _mismatch(
                f"the output of {what} differs by {difference:.1e}, expected at most {folder.layout.output_tolerance}"
            )
    return agreement


def linear_shapes(folder: ModelFolder) -> dict[str, tuple[int, ...]]:
    """Name of every linear of a folder's transformer -> (out, in)."""
    modules = backbone_of(folder).skeleton().named_modules()
    return {name: tuple(module.weight.shape) for name, module in modules if isinstance(module, nn.Linear)}


def block_counts(folder: ModelFolder) -> dict[str, int]:
    """Name of each list of blocks of a folder's transformer -> how many it has."""
    skeleton = backbone_of(folder).skeleton()
    return {name: len(getattr(skeleton, name)) for name in folder.layout.blocks}


def base_blocks(folder: ModelFolder, blocks: tuple[int, ...]) -> Any:
    """The model of a folder in fp32 with only some of its blocks, numbered anew.

    Args:
        folder: The folder.
        blocks: Which; counted through all of its lists.
    """
    counts = block_counts(folder)
    new_of = _numbered_anew(blocks, counts)
    sizes = {key: sum(old.startswith(f"{name}.") for old in new_of) for name, key in folder.layout.blocks.items()}
    config = folder.config("transformer") | sizes
    with init_empty_weights():
        model = getattr(diffusers, folder.config("transformer")["_class_name"]).from_config(config)
    allocate(model, dict.fromkeys((name for name, _ in model.named_parameters()), torch.float32), "cpu")
    files = folder.weight_files("transformer")
    for name, tensor in model.state_dict().items():
        stored_name = renumbered(name, {new: old for old, new in new_of.items()})
        with safe_open(files[stored_name], "pt") as stored:
            tensor.copy_(stored.get_tensor(stored_name))
    return model.requires_grad_(False).eval()


def part_of(state: AdapterState, blocks: tuple[int, ...], counts: Mapping[str, int]) -> AdapterState:
    """The adapter of some blocks, numbered anew as in :func:`base_blocks`.

    Args:
        state: The adapter.
        blocks: Which.
        counts: Of the model that it belongs to, see :func:`block_counts`.
    """
    new_of = _numbered_anew(blocks, counts)
    kept = {name: tensors for name, tensors in state.tensors.items() if _block_of(name) in new_of}
    return replace(state, tensors={renumbered(name, new_of): tensors for name, tensors in kept.items()})


def renumbered(name: str, new_of: Mapping[str, str]) -> str:
    """The name of a block's part with another block, such as "transformer_blocks.3"; other names as they are."""
    block = _block_of(name)
    return new_of[block] + name.removeprefix(block) if block in new_of else name


def _block_of(name: str) -> str:
    return ".".join(name.split(".")[:2])


def _numbered_anew(blocks: tuple[int, ...], counts: Mapping[str, int]) -> dict[str, str]:
    """Old name of each chosen block -> its new one."""
    found: dict[str, str] = {}
    first = 0
    for name, count in counts.items():
        chosen = [block - first for block in blocks if first <= block < first + count]
        found |= {f"{name}.{old}": f"{name}.{new}" for new, old in enumerate(chosen)}
        first += count
    return found


def _ends(counts: Mapping[str, int]) -> tuple[int, ...]:
    """The first and the last block of each list."""
    ends, first = list[int](), 0
    for count in counts.values():
        ends += sorted({first, first + count - 1}) if count else []
        first += count
    return tuple(ends)


def _stock_output(model: nn.Module, folder: ModelFolder, adapter: Path, state: AdapterState) -> Tensor:
    for library in ("diffusers", "transformers", "bitsandbytes"):  # they warn of what is not there, and not needed here
        logging.getLogger(library).setLevel(logging.ERROR)
    pipeline = getattr(diffusers, folder.pipeline)
    asked = set(inspect.signature(pipeline.__init__).parameters) - {"self", "transformer", "scheduler"}
    schedule = diffusers.FlowMatchEulerDiscreteScheduler(**_public(folder.noise_schedule()))
    pipe = pipeline(transformer=model, scheduler=schedule, **dict.fromkeys(asked))
    pipe.load_lora_weights(str(adapter), weight_name=WEIGHTS_FILE)
    _check_loaded(model, state)
    return _output(model)


def _check_loaded(model: nn.Module, state: AdapterState) -> None:
    """Compare bit for bit what PEFT holds with what was trained."""
    from peft.tuners.lora import LoraLayer  # seconds of import that training must not pay

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if different := sorted(layers.keys() ^ state.tensors.keys()):
        raise _mismatch(f"{different[0]} is adapted by only one of the two ({len(different)} such linears)")
    for name, layer in layers.items():
        (loaded_as,) = layer.lora_A.keys()
        held = {"lora_A": layer.lora_A[loaded_as].weight, "lora_B": layer.lora_B[loaded_as].weight}
        if layer.use_dora.get(loaded_as, False):
            held["magnitude"] = layer.lora_magnitude_vector[loaded_as].weight
        # Alpha = s r, divided by r again, may be off by its last bit.
        if not math.isclose(layer.scaling[loaded_as], state.scale, rel_tol=1e-15):
            raise _mismatch(f"{name} has scale {layer.scaling[loaded_as]} there, {state.scale} here")
        if held.keys() != state.tensors[name].keys():
            raise _mismatch(f"{name} has {', '.join(held)} there, {', '.join(state.tensors[name])} here")
        for kind, tensor in held.items():
            if not torch.equal(tensor, state.tensors[name][kind]):
                raise _mismatch(f"{kind} of {name} differs")


def _our_output(model: nn.Module, state: AdapterState) -> Tensor:
    names = list(state.tensors)
    inject(model, names, state.settings, row_squares_of(model, names), seed=0).load(state.tensors)
    return _output(model)


def _merged_output(model: nn.Module, state: AdapterState) -> Tensor:
    merge_into(model, state)
    return _output(model)


def _output(model: nn.Module) -> Tensor:
    """What the model predicts on inputs that are always the same."""
    return probe(model)


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _public(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _mismatch(what: str) -> AdapterError:
    return AdapterError(
        f"stock diffusers does not make of this adapter what was trained: {what}",
        "do not use it with that loader; `ccmdist adapter merge` needs none. Please report it with the versions of "
        "diffusers and peft",
    )
