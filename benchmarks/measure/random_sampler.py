"""The product's sampler of images on a model with random weights, made on the device itself."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ccmdist.diffusion import flow
from ccmdist.models import attention
from ccmdist.models.backbones.qwen import Qwen
from ccmdist.models.compiling import compiled_block_pass
from ccmdist.models.encoders import LatentCodec
from ccmdist.models.make import make_vae
from ccmdist.models.sampling import block_pass
from ccmdist.models.sizes import SIZES
from ccmdist.synthesis.generate import ImageSampler
from ccmdist.synthesis.plan import Request

from .random_model import random_table, random_weights, skeleton
from .scale import FULL, RandomFolder, Scale

GUIDANCE_SCALE = 4.0
NEGATIVE_SHARE = 214 / 256
"""Tokens of the negative prompt with the mask, by those of a prompt of ours."""


class RandomCache:
    """Stands for a latent cache: every entry is the same random sample, in host memory."""

    def __init__(self, scale: Scale, dtype: torch.dtype) -> None:
        source, width = torch.Generator().manual_seed(2), scale.transformer.text_width
        num_negative = round(NEGATIVE_SHARE * scale.text_tokens)
        self._latents = torch.randn(16, 2 * scale.edge, 2 * scale.edge, generator=source).to(dtype)
        self._prompt = torch.randn(scale.text_tokens, width, generator=source).to(dtype)
        self._negative = torch.randn(num_negative, width, generator=source).to(dtype)

    def read(self, entry: Any) -> dict[str, Tensor]:
        """Of the prompt and the mask."""
        return {"mask_latents": self._latents, "prompt_embeds": self._prompt}

    def read_negatives(self, entry: Any) -> dict[str, Tensor]:
        """Of the negative prompt."""
        return {"prompt_embeds": self._negative}


class RandomSampler(ImageSampler):
    """Draws as synthesis does, in bf16, with the table of modulation on the device; a narrow model has a narrow VAE."""

    def __init__(self, scale: Scale, device: torch.device, denoise_steps: int, is_compiled: bool) -> None:
        self.device, self.dtype = device, torch.bfloat16
        self.backbone = Qwen(RandomFolder(scale))
        schedule = RandomFolder(scale).noise_schedule()
        self.sigmas = flow.sampling_sigmas(denoise_steps, flow.resolution_shift(scale.edge**2, schedule), schedule)
        model = skeleton(scale, random_table(scale, self.sigmas, self.dtype, device))
        model.load_state_dict(random_weights(model, self.dtype, device), assign=True)
        self.model = model.requires_grad_(False).eval()
        attention.set_backend(self.model, device, self.dtype)
        self.run_block = compiled_block_pass(device) if is_compiled else block_pass
        with torch.device(device):
            vae = make_vae(SIZES["full" if scale.heads == FULL["heads"] else "tiny"])
        self.codec = LatentCodec(nn.Module.to(vae, self.dtype).eval())
        self.cache = RandomCache(scale, self.dtype)
        self.settings = SimpleNamespace(seed=0, guidance_scale=GUIDANCE_SCALE)
        self.adapters, self.merged = {}, None
        self.token_hw = (scale.edge, scale.edge)

    def requests(self, batch_size: int) -> list[Request]:
        """A batch of images of one mask."""
        self.entries = {"sample": SimpleNamespace(key="sample")}
        return [Request(f"sample-{number}", "sample", number, "subject", None) for number in range(batch_size)]

    def warm_up(self, batch_size: int, num_steps: int = 3) -> None:
        """Draw a batch in a few steps, at the same noise levels: a table has no others."""
        whole = self.sigmas
        self.sigmas = torch.cat([whole[: min(num_steps, len(whole) - 1)], whole[-1:]])
        self.draw(self.requests(batch_size))
        self.sigmas = whole
