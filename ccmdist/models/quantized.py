"""The linears of the MMDiT's blocks in 4 or 8 bits, for cards that cannot hold them in bf16.

To draw with, or frozen beneath an adapter that is trained.

NF4 with double quantization: Dettmers et al., "QLoRA" (arXiv 2305.14314), section 3, as bitsandbytes implements it.
int8 with one scale per row: Dettmers et al., "LLM.int8()" (arXiv 2208.07339), section 2.2, of weights alone, for a
product is that of the dense weight. It needs no other library.
"""

from types import ModuleType
from typing import Final

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import Tensor, nn

from ccmdist.errors import ModelError
from ccmdist.models.backbones.choice import backbone_of
from ccmdist.models.building import dtype_of
from ccmdist.models.checkpoint_io import check_names, load_weights
from ccmdist.models.mmdit import QwenImageTransformer2DModel, skeleton, weight_files
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.modulation_table import ModulationTable, is_tabled
from ccmdist.models.sizes import NF4_BYTES


def quantize_blocks(model: QwenImageTransformer2DModel, device: torch.device | str) -> QwenImageTransformer2DModel:
    """The model on a device, every linear of its blocks in NF4; changed in place.

    The linears go to the device one by one, so that it never holds more than one of them in full.

    Args:
        model: Whole, in host memory, with whatever is to be merged into it merged.
        device: Where it is to draw.

    Raises:
        ModelError: If bitsandbytes is not installed.
    """
    library = _bitsandbytes()
    for block in model.transformer_blocks:
        for name in _linears(block):
            block.set_submodule(name, _quantized(library, block.get_submodule(name), device))
    return nn.Module.to(model, device)


class NF4Weight(nn.Module):
    """A weight in 4 bits that gives the dense one when asked."""

    def __init__(self, weight: Tensor, device: torch.device | str) -> None:
        """Quantize ``weight``, (out, in), on a device."""
        super().__init__()
        library = _bitsandbytes()
        self.dtype, self._make = weight.dtype, library.functional.dequantize_4bit
        codes, self._state = library.functional.quantize_4bit(
            weight.to(device), compress_statistics=True, quant_type="nf4"
        )
        self.register_buffer("codes", codes, persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return self.codes.device

    def dense(self) -> Tensor:
        """The weight, (out, in)."""
        return self._make(self.codes, self._state)


class Int8Weight(nn.Module):
    """A weight in 8 bits with one scale per row, which gives the dense one when asked."""

    def __init__(self, weight: Tensor, device: torch.device | str) -> None:
        """Quantize ``weight``, (out, in), on a device."""
        super().__init__()
        self.dtype, rows = weight.dtype, weight.to(device).float()
        scales = (rows.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        self.register_buffer("codes", (rows / scales).round().to(torch.int8), persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return self.codes.device

    def dense(self) -> Tensor:
        """The weight, (out, in)."""
        return torch.mul(self.codes, self.scales, out=torch.empty_like(self.codes, dtype=self.dtype))


FORMS: Final = {"nf4": NF4Weight, "int8": Int8Weight}


def build_quantized(
    folder: ModelFolder, dtype: torch.dtype, form: str, device: torch.device | str, table: ModulationTable | None
) -> QwenImageTransformer2DModel:
    """The model of a folder on a device, to be trained: the weights of its blocks' linears give dense ones when asked.

    A block is read, quantized and sent before the next one is: host memory holds one block. The linears themselves
    cannot be called; ``ccmdist.adapters`` takes their weights over.

    Args:
        folder: Where the weights are.
        dtype: Of all that is not quantized, and of the dense weights.
        form: "nf4" or "int8".
        device: Where it is to be trained.
        table: Takes the place of the modulation layers.

    Raises:
        ModelError: If the weights do not fit the config, or nf4 is asked for and bitsandbytes is not installed.
    """
    model = skeleton(folder)
    if table is not None:
        table.install(model)
    model, files = nn.Module.to(model, dtype), weight_files(folder, table)
    check_names(model, files)
    for prefix, part in _parts(model):
        part.to_empty(device="cpu")
        load_weights(part, files, prefix=prefix)
        if isinstance(part, QwenImageTransformerBlock):
            _hold_quantized(part, form, device)
        part.to(device)
    return model.eval()


def _parts(model: QwenImageTransformer2DModel) -> list[tuple[str, nn.Module]]:
    """All parts that have weights, each with how the names of these begin: the blocks, and the layers around them."""
    children = [(f"{name}.", child) for name, child in model.named_children() if name != "transformer_blocks"]
    blocks = [(f"transformer_blocks.{index}.", block) for index, block in enumerate(model.transformer_blocks)]
    return blocks + [(prefix, child) for prefix, child in children if any(True for _ in child.parameters())]


def _hold_quantized(block: nn.Module, form: str, device: torch.device | str) -> None:
    for name in _linears(block):
        linear = block.get_submodule(name)
        weight = FORMS[form](linear.weight.data, device)
        del linear.weight
        linear.weight = weight


def num_bytes(folder: ModelFolder, dtype: torch.dtype, in_nf4: bool, has_modulation: bool = True) -> int:
    """Bytes of a transformer's weights on the device that draws, with or without the layers that a table replaces."""
    backbone = backbone_of(folder)
    model = backbone.skeleton()
    weights = {n: w.numel() for n, w in model.named_parameters() if has_modulation or not is_tabled(n)}
    if not in_nf4:
        return sum(count * dtype_of(name, dtype, backbone.in_fp32).itemsize for name, count in weights.items())
    linears = {
        f"transformer_blocks.{index}.{name}.weight"
        for index, block in enumerate(model.transformer_blocks)
        for name in _linears(block)
    }
    num_quantized = sum(count for name, count in weights.items() if name in linears)
    return round(num_quantized * NF4_BYTES) + (sum(weights.values()) - num_quantized) * dtype.itemsize


def _linears(block: nn.Module) -> list[str]:
    return [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]


def _quantized(library: ModuleType, linear: nn.Linear, device: torch.device | str) -> nn.Module:
    weight, bias = linear.weight.data, linear.bias
    made = library.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=bias is not None,
        compute_dtype=weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    made.weight = library.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=made)
    made.bias = None if bias is None else nn.Parameter(bias.data, requires_grad=False)
    # To move it is to quantize it.
    return made.to(device).eval()


def _bitsandbytes() -> ModuleType:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ModelError(
            f"base: nf4 needs bitsandbytes, which cannot be imported ({error})", 'run `pip install "ccmdist[quant]"`'
        ) from None
    return bitsandbytes
