"""The VAE on single frames, where each of its causal 3-D convolutions is a 2-D one.

Such a convolution sees only zeros before the one frame there is, so all but the last temporal tap of its kernel
multiply zeros. Leaving them out gives the same numbers, up to the order of float additions, at about a third of
the cost, in the forward and in the backward pass.

Shape suffixes: B samples, C channels, H W rows and columns, T = 1 frame.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor

from ccmdist.models.checkpoint_io import load_weights
from ccmdist.models.model_folder import ModelFolder


class SingleFrameConvolution(QwenImageCausalConv3d):
    """The same layer with the same parameters, for one frame."""

    def forward(self, x_BCTHW: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """Convolve the frame with the last temporal tap of the kernel."""
        assert x_BCTHW.shape[2] == 1, f"single frames only, got {x_BCTHW.shape[2]}"
        assert cache_x is None, "a single frame has no past"
        left, right, top, bottom, *_ = self._padding
        assert (left, top) == (right, bottom), "padding is symmetric"
        y_BCHW = F.conv2d(
            x_BCTHW[:, :, 0], self.weight[:, :, -1], self.bias, stride=self.stride[1:], padding=(top, left)
        )
        return y_BCHW.unsqueeze(2)


def for_single_frames(vae: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    """The same VAE, changed in place: cheaper on single frames, still trainable, no longer for films."""
    for module in vae.modules():
        if type(module) is QwenImageCausalConv3d:
            module.__class__ = SingleFrameConvolution
    return vae


def normalised(latents: Tensor, vae: AutoencoderKLQwenImage) -> Tensor:
    """(z - mean) / std with the VAE's statistics per channel, for latents of shape (B, C, ...)."""
    mean, std = _statistics(latents, vae)
    return (latents - mean) / std


def denormalised(latents: Tensor, vae: AutoencoderKLQwenImage) -> Tensor:
    """The inverse of :func:`normalised`."""
    mean, std = _statistics(latents, vae)
    return latents * std + mean


def _statistics(latents: Tensor, vae: AutoencoderKLQwenImage) -> tuple[Tensor, Tensor]:
    shape = (1, -1, *[1] * (latents.dim() - 2))
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    return mean.view(shape).to(latents), std.view(shape).to(latents)


def loaded_vae(kind: Any, folder: ModelFolder, dtype: torch.dtype, device: torch.device | str) -> Any:
    """The VAE of a model folder, of whatever class it is; nothing is fetched.

    Args:
        kind: The class, of diffusers.
        folder: The model.
        dtype: Of its weights.
        device: Where they lie.

    Raises:
        ModelError: If the weights do not fit the config.
    """
    with no_init_weights():
        vae = kind.from_config(folder.config("vae"))
    torch.nn.Module.to(vae, device, dtype)
    load_weights(vae, folder.weight_files("vae"))
    return vae.eval()
