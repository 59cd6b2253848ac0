"""The blocks of the MMDiT in 4 bits, for cards that cannot hold them in bf16: to draw with, not to train.

NF4 with double quantization: Dettmers et al., "QLoRA" (arXiv 2305.14314), section 3, as bitsandbytes implements it.
"""

from types import ModuleType
from typing import Final

import torch
from torch import nn

from ccmdist.errors import ModelError
from ccmdist.models.mmdit import QwenImageTransformer2DModel, skeleton
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.modulation_table import is_tabled

BYTES_PER_WEIGHT: Final = 4 / 8 + 1 / 64 + 4 / (64 * 256)
"""Four bits, an 8-bit scale for 64 weights, and a 32-bit scale for 256 of those scales."""


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


def num_bytes(folder: ModelFolder, dtype: torch.dtype, in_nf4: bool, has_modulation: bool = True) -> int:
    """Bytes of the MMDiT's weights on the device that draws, with or without the layers that a table replaces."""
    weights = {n: w.numel() for n, w in skeleton(folder).named_parameters() if has_modulation or not is_tabled(n)}
    num_weights = sum(weights.values())
    if not in_nf4:
        return num_weights * dtype.itemsize
    linears = {
        f"transformer_blocks.{index}.{name}.weight"
        for index, block in enumerate(skeleton(folder).transformer_blocks)
        for name in _linears(block)
    }
    num_quantized = sum(count for name, count in weights.items() if name in linears)
    return round(num_quantized * BYTES_PER_WEIGHT) + (num_weights - num_quantized) * dtype.itemsize


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
