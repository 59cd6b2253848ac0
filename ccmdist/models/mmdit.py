"""The double-stream transformer (MMDiT) of Qwen-Image-Edit: built whole or partitioned, and asked for a velocity.

Shape suffixes: B samples, S packed latent tokens of target or mask, C channels, L text tokens, D text width.
"""

from pathlib import Path
from typing import Any, Final

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import Tensor, nn

from ccmdist.models.building import with_weights, without_weights
from ccmdist.models.checkpoint_io import OnRows
from ccmdist.models.layout import QWEN
from ccmdist.models.leaf_blocks import arguments_of, make_leaves, positional
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.modulation_table import ModulationTable, is_tabled
from ccmdist.models.target_linears import chosen_linears

BLOCK_ARGUMENTS: Final = arguments_of(QwenImageTransformerBlock)
STREAMS: Final = ("hidden_states", "encoder_hidden_states")
PositionalBlock: Final = positional(QwenImageTransformerBlock, STREAMS)


def skeleton(folder: ModelFolder) -> QwenImageTransformer2DModel:
    """The model of a folder without weights, to look at its structure."""
    model: QwenImageTransformer2DModel = without_weights(QwenImageTransformer2DModel, folder.config("transformer"))
    return model


def build(
    folder: ModelFolder,
    dtype: torch.dtype,
    zero_config: dict[str, Any] | None,
    on_rows: OnRows | None = None,
    device: torch.device | str = "cpu",
    table: ModulationTable | None = None,
) -> QwenImageTransformer2DModel:
    """The model of a folder with its weights.

    Args:
        folder: Where the weights are.
        dtype: Of the weights.
        zero_config: A DeepSpeed configuration: partition the weights over the ranks while they are read
            (collective). None: the whole model in this process.
        on_rows: Told the rows of all weights on the way.
        device: Of a whole model; a partitioned one lies where DeepSpeed puts it.
        table: Takes the place of the modulation layers, whose weights are neither allocated nor read.

    Raises:
        ModelError: If the weights do not fit the config.
    """
    model = skeleton(folder)
    if table is not None:
        table.install(model)
    with_weights(model, weight_files(folder, table), dtype, zero_config, on_rows, device)
    return model


def weight_files(folder: ModelFolder, table: ModulationTable | None) -> dict[str, Path]:
    """Tensor name -> file, of what a model with or without a table is loaded from."""
    files = folder.weight_files("transformer")
    return {name: file for name, file in files.items() if table is None or not is_tabled(name)}


def linear_names(model: QwenImageTransformer2DModel, targets: tuple[str, ...]) -> list[str]:
    """Names of the linears in the blocks that ``targets`` select, without those that never get a gradient.

    Args:
        model: With or without weights.
        targets: "attn", "mlp", or suffixes of names such as "attn.to_q".

    Raises:
        ConfigError: If a target selects nothing.
    """
    return chosen_linears(model, QWEN, targets, dead(model))


def dead(model: QwenImageTransformer2DModel) -> list[str]:
    """Full names of the linears of :func:`dead_in_last_block`."""
    last = len(model.transformer_blocks) - 1
    return [f"transformer_blocks.{last}.{layer}" for layer in dead_in_last_block(model)]


@torch.enable_grad()
def dead_in_last_block(model: QwenImageTransformer2DModel) -> list[str]:
    """Linears of the last block that reach only its text output, which nobody reads: they never get a gradient.

    Found by a backward pass through one narrow block of the same class and configuration.
    """
    # Without the private entry that says which values were defaults, for diffusers would take the defaults again.
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    narrow = {"num_layers": 1, "num_attention_heads": 1, "joint_attention_dim": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe = QwenImageTransformer2DModel.from_config({**config, **narrow})
        tokens = torch.randn(1, 8, probe.config.in_channels)
        latents, mask_latents = tokens.split(4, dim=1)
        # Flash kernels, which another model of this process may run on, take neither fp32 nor a CPU.
        with attention_backend("native"):
            predicted = velocity(probe, latents, mask_latents, torch.randn(1, 3, 8), torch.rand(1), (2, 2), (2, 2))
        predicted.square().sum().backward()
    linears = {n: m for n, m in probe.transformer_blocks[0].named_modules() if isinstance(m, nn.Linear)}
    return [name for name, linear in linears.items() if linear.weight.grad is None or not linear.weight.grad.any()]


def velocity(
    model: nn.Module,
    latents_BSC: Tensor,
    mask_latents_BSC: Tensor,
    prompt_embeds_BLD: Tensor,
    sigma_B: Tensor,
    target_hw: tuple[int, int],
    mask_hw: tuple[int, int],
) -> Tensor:
    """The model's prediction of noise - x for the target tokens, (B, S, C).

    One call serves all versions of Qwen-Image-Edit: they differ in the text before the embeddings, and the class
    itself gives the mask's tokens the time of clean images in 2511.

    Args:
        model: The MMDiT, or an engine around it.
        latents_BSC: Noisy packed latents of the target, in the model's dtype.
        mask_latents_BSC: Packed latents of the mask image; or of several condition images, one after the other.
        prompt_embeds_BLD: Embeddings of one length; there is no padding and so no padding mask.
        sigma_B: Noise level of each sample, in [0, 1]; 1 is pure noise.
        target_hw: Rows and columns of the target's tokens.
        mask_hw: Rows and columns of the mask's tokens, and of those of every other condition image.
    """
    B, S, _ = latents_BSC.shape
    tokens = torch.cat([latents_BSC, mask_latents_BSC], dim=1)
    if torch.is_grad_enabled():
        # ZeRO-3 gathers a leaf block again for its backward pass only if an input of the block has a gradient.
        tokens.requires_grad_()
    return model(
        hidden_states=tokens,
        encoder_hidden_states=prompt_embeds_BLD,
        timestep=sigma_B.to(tokens.dtype),  # the pipelines hand over t / 1000, which is sigma
        img_shapes=[image_shapes(target_hw, mask_hw, mask_latents_BSC.shape[1])] * B,
        return_dict=False,
    )[0][:, :S]


def image_shapes(
    target_hw: tuple[int, int], mask_hw: tuple[int, int], num_mask_tokens: int
) -> list[tuple[int, int, int]]:
    """Frames, rows and columns of the target and of each condition image, as the model asks for them.

    Args:
        target_hw: Rows and columns of the target's tokens.
        mask_hw: Of each condition image.
        num_mask_tokens: Of all condition images together.
    """
    num_images, rest = divmod(num_mask_tokens, mask_hw[0] * mask_hw[1])
    assert num_images and not rest, f"{num_mask_tokens} tokens are not whole images of {mask_hw}"
    return [(1, *target_hw), *[(1, *mask_hw)] * num_images]


def make_blocks_leaves(model: QwenImageTransformer2DModel) -> None:
    """Let ZeRO-3 gather a block at once."""
    make_leaves(model, {"transformer_blocks": PositionalBlock})
