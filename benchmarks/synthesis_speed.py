"""Synthesis against the stock pipeline: CPU time in the transformer per image, at equal steps and output size.

python benchmarks/synthesis_speed.py [--target-px 384] [--batch 4] [--denoise-steps 2] [--text 256 214] [--blocks 2]

A full-width MMDiT of two blocks (random bf16 weights, in memory) draws with guidance by diffusers'
QwenImageEditPlusPipeline, one image at a time as that demands, and by our sampler; one thread. Compared are

    as it comes   the pipeline enlarges its condition image to about a megapixel, whatever its size; ours does not
    equal sizes   the same pipeline, made to leave the condition image at the size of the output
    latents       what both draw from the same noise at equal sizes, with weights and inputs the same
    FLOPs         counted on the meta device, for these blocks and for the 60 of the real model
    host          60 very narrow blocks at batch 1, where nearly all of the time is Python's and the dispatcher's

Of the pipeline only the calls of its transformer are timed; of ours also what is done once per batch. Both keep freed
memory, as on a GPU: else the C library hands large tensors back to the kernel, which fills them with zeros each time.
The exit code is 1 if a limit does not hold.
"""

import argparse
import copy
import ctypes
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from diffusers.utils import logging
from measure.rows import Row, finish
from measure.timing import in_turn, median_ratio
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ccmdist.diffusion import flow
from ccmdist.diffusion.sampler import sample
from ccmdist.models.encoders import LatentCodec
from ccmdist.models.make import make_transformer, make_vae
from ccmdist.models.sampling import GuidedVelocity
from ccmdist.models.sizes import NOISE_SCHEDULE, SIZES, TINY_TRANSFORMER, Size
from ccmdist.models.template import Version

GUIDANCE_SCALE = 4.0
FORCED_PX = 1024
LIMIT_AS_IT_COMES, LIMIT_EQUAL_SIZES = 5.0, 1.3
LATENTS_LIMIT = 0.02
"""bf16 rounds by up to 0.4 %, and guidance of scale 4 weighs that of its branches by 4 and 3, in each of the steps."""
PIPELINE = "QwenImageEditPlusPipeline, same run"


@dataclass(frozen=True)
class Inputs:
    """Of a batch: noise (B, T, 64), masks (B, H, W), embeddings of prompt and negative prompt (B, L, 3584)."""

    noise: Tensor
    masks: np.ndarray
    embeds: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, batch: int, target_px: int, text: tuple[int, int], width: int) -> "Inputs":
        source = torch.Generator().manual_seed(0)
        noise = torch.randn(batch, (target_px // 16) ** 2, 64, generator=source)
        embeds = [torch.randn(batch, length, width, generator=source).bfloat16() for length in text]
        masks = (np.random.default_rng(0).random((batch, target_px, target_px)) > 0.9).astype(np.uint8) * 255
        return cls(noise, masks, (embeds[0], embeds[1]))

    def first(self, batch: int) -> "Inputs":
        return Inputs(self.noise[:batch], self.masks[:batch], (self.embeds[0][:batch], self.embeds[1][:batch]))


class Timed(nn.Module):
    """Sums up the CPU time of the calls of a transformer that a pipeline makes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seconds = model, 0.0
        self.config, self.dtype = model.config, model.dtype

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return self.model(*args, **kwargs)
        finally:
            self.seconds += time.process_time() - start


class Sides:
    """The stock pipeline and our sampler around one transformer."""

    def __init__(self, num_blocks: int, version: Version, denoise_steps: int) -> None:
        size = Size({"num_layers": num_blocks}, {}, {})
        torch.manual_seed(0)
        with init_empty_weights():
            model = make_transformer(size, version)
        self.model = nn.Module.to(model, torch.bfloat16).to_empty(device="cpu").eval()
        first, *others = self.model.transformer_blocks
        for name, parameter in self.model.named_parameters():
            if not name.startswith("transformer_blocks.") or name.startswith("transformer_blocks.0."):
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
        for block in others:
            block.load_state_dict(first.state_dict())
        vae = make_vae(SIZES["tiny"]).eval().bfloat16()
        self.codec = LatentCodec(copy.deepcopy(vae))
        self.denoise_steps = denoise_steps
        self.timed = Timed(self.model)
        absent = dict.fromkeys(("text_encoder", "tokenizer", "processor"))
        scheduler = FlowMatchEulerDiscreteScheduler(**NOISE_SCHEDULE)
        self.pipeline = QwenImageEditPlusPipeline(
            scheduler=scheduler, vae=vae, transformer=self.timed, **absent
        )  # fmt: skip
        self.pipeline.set_progress_bar_config(disable=True)

    def stock(self, inputs: Inputs, condition_px: int) -> tuple[Tensor, float]:
        """Latents of the first image, and the seconds that the transformer took."""
        stock.VAE_IMAGE_SIZE = condition_px**2
        self.timed.seconds = 0.0
        latents = self.pipeline(
            image=[Image.fromarray(inputs.masks[0]).convert("RGB")],
            prompt_embeds=inputs.embeds[0][:1],
            negative_prompt_embeds=inputs.embeds[1][:1],
            latents=inputs.noise[:1].bfloat16(),
            height=inputs.masks.shape[1],
            width=inputs.masks.shape[2],
            num_inference_steps=self.denoise_steps,
            true_cfg_scale=GUIDANCE_SCALE,
            output_type="latent",
        ).images
        return latents, self.timed.seconds

    def ours(self, inputs: Inputs, branches_at_once: bool = True) -> tuple[Tensor, float]:
        """Latents of a batch, and the seconds that all of it took but the VAE."""
        edge = inputs.masks.shape[1] // 16
        mask_latents = flow.pack_latents(self.codec.encode(inputs.masks)).bfloat16()
        shift = flow.resolution_shift(edge * edge, NOISE_SCHEDULE)
        sigmas = flow.sampling_sigmas(self.denoise_steps, shift, NOISE_SCHEDULE)
        start = time.process_time()
        groups = [inputs.embeds] if branches_at_once else [[one] for one in inputs.embeds]
        passes = [GuidedVelocity(self.model, mask_latents, group, (edge, edge), (edge, edge)) for group in groups]

        def velocity(latents_BSC: Tensor, sigma_B: Tensor) -> tuple[Tensor, ...]:
            return tuple(one for predict in passes for one in predict(latents_BSC.bfloat16(), sigma_B))

        latents = sample(velocity, inputs.noise.bfloat16(), sigmas, GUIDANCE_SCALE)
        return latents, time.process_time() - start


def main() -> int:
    """Measure both sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target-px", type=int, default=384)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--denoise-steps", type=int, default=2)
    parser.add_argument("--text", type=int, nargs=2, default=(256, 214), help="tokens of prompt and negative prompt")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--version", choices=("2509", "2511"), default="2511")
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    logging.set_verbosity_error()
    keep_freed_memory()
    rows = speed_rows(given) + flop_rows(given) + host_rows(given)
    return finish("synthesis_speed", rows)


def keep_freed_memory() -> None:
    """Let glibc give tensors of up to a gigabyte out of memory that it has; elsewhere nothing is changed."""
    mmap_threshold, trim_threshold = -3, -1
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


def speed_rows(given: argparse.Namespace) -> list[Row]:
    """Seconds in the transformer per image, and how many times less ours are."""
    sides = Sides(given.blocks, given.version, given.denoise_steps)
    inputs = Inputs.of(given.batch, given.target_px, tuple(given.text), sides.model.config.joint_attention_dim)
    small = Inputs.of(1, 64, (9, 7), sides.model.config.joint_attention_dim)
    for warm_up in (lambda: sides.stock(small, 64), lambda: sides.ours(small)):
        warm_up()
    one = inputs.first(1)
    seconds: dict[str, list[float]] = {name: [] for name in ("stock", "one", "apart", "batch")}
    for _ in range(given.repeats):
        expected, elapsed = sides.stock(inputs, given.target_px)
        seconds["stock"].append(elapsed)
        found, elapsed = sides.ours(one)
        seconds["one"].append(elapsed)
        seconds["apart"].append(sides.ours(one, branches_at_once=False)[1])
        seconds["batch"].append(sides.ours(inputs)[1] / given.batch)
    forced = sides.stock(inputs, FORCED_PX)[1]

    about = f"{given.blocks} blocks, {given.denoise_steps} steps, {given.target_px} px, guidance"
    of = {name: statistics.median(values) for name, values in seconds.items()}
    faster = {name: 1 / median_ratio(seconds[name], seconds["stock"]) for name in ("one", "batch")}
    error = float((found - expected.float()).norm() / expected.float().norm())
    at_batch = f"batch {given.batch}"
    return [
        Row(
            f"as it comes (condition {FORCED_PX} px there): times faster per image, {at_batch}; {about}",
            forced / of["batch"], PIPELINE, LIMIT_AS_IT_COMES, at_least=True,
        ),
        Row(
            f"equal condition size: times faster per image, {at_batch}; {about}",
            faster["batch"], PIPELINE, LIMIT_EQUAL_SIZES, at_least=True,
        ),
        Row(f"equal condition size: times faster, batch 1; {about}", faster["one"], PIPELINE),
        Row(f"as it comes: CPU s per image in the transformer, {at_batch}", of["batch"], forced),
        Row(f"equal condition size: CPU s per image in the transformer, {at_batch}", of["batch"], of["stock"]),
        Row("equal condition size: CPU s per image in the transformer, batch 1", of["one"], of["stock"]),
        Row(
            "both branches in one pass / in two passes of ours, batch 1",
            median_ratio(seconds["one"], seconds["apart"]), "two passes of ours",
        ),
        Row("equal condition size: relative difference of the drawn latents, bf16", error, limit=LATENTS_LIMIT),
    ]  # fmt: skip


def flop_rows(given: argparse.Namespace) -> list[Row]:
    """Operations per image: where the time of two blocks goes, and what is left of it at 60."""
    rows = []
    for num_blocks in (given.blocks, 60):
        ours = flops_of_blocks(num_blocks, given, given.target_px, True)
        for px, name in ((given.target_px, "equal condition size"), (FORCED_PX, "as it comes")):
            claim = f"{name}: TFLOPs per image in the transformer, {num_blocks} blocks"
            rows.append(Row(claim, ours / 1e12, flops_of_blocks(num_blocks, given, px, False) / 1e12))
    return rows


def flops_of_blocks(num_blocks: int, given: argparse.Namespace, condition_px: int, is_ours: bool) -> int:
    """Counted for two and for three blocks; all but the first and the last are alike."""
    two, three = (flops(number, given, condition_px, is_ours) for number in (2, 3))
    return two + (num_blocks - 2) * (three - two)


def flops(num_blocks: int, given: argparse.Namespace, condition_px: int, is_ours: bool) -> int:
    """Of all denoise steps of one image, by the shapes of the operands; nothing is computed."""
    edge, condition_edge = given.target_px // 16, condition_px // 16
    target_hw, mask_hw = (edge, edge), (condition_edge, condition_edge)
    with torch.device("meta"):
        model = make_transformer(Size({"num_layers": 1}, {}, {}), given.version).eval()
        model.transformer_blocks = nn.ModuleList(list(model.transformer_blocks) * num_blocks)
    with torch.device("meta"), FlopCounterMode(display=False) as counted:
        latents, mask_latents = torch.empty(1, edge**2, 64), torch.empty(1, condition_edge**2, 64)
        embeds = [torch.empty(1, length, 3584) for length in given.text]
        sigma = torch.empty(1)
        if is_ours:
            predict = GuidedVelocity(model, mask_latents, embeds, target_hw, mask_hw)
        for _ in range(given.denoise_steps):
            if is_ours:
                predict(latents, sigma)
            else:
                asked_twice(model, latents, mask_latents, embeds, sigma, target_hw, mask_hw)
    return counted.get_total_flops()


def asked_twice(
    model: nn.Module,
    latents: Tensor,
    mask_latents: Tensor,
    embeds: list[Tensor],
    sigma: Tensor,
    target_hw: tuple[int, int],
    mask_hw: tuple[int, int],
) -> None:
    """A denoise step as the pipeline makes it."""
    for one in embeds:
        model(
            hidden_states=torch.cat([latents, mask_latents], dim=1),
            encoder_hidden_states=one,
            timestep=sigma,
            img_shapes=[[(1, *target_hw), (1, *mask_hw)]] * len(latents),
            return_dict=False,
        )


def host_rows(given: argparse.Namespace, num_blocks: int = 60, repeats: int = 7) -> list[Row]:
    """Time of a denoise step that does not depend on the width of the model."""
    torch.manual_seed(0)
    narrow = TINY_TRANSFORMER | {"num_layers": num_blocks, "num_attention_heads": 1}
    model = make_transformer(Size(narrow, {}, {}), given.version).eval()
    latents, mask_latents, sigma = torch.randn(1, 16, 64), torch.randn(1, 16, 64), torch.rand(1)
    embeds, hw = [torch.randn(1, length, 64) for length in (9, 7)], (4, 4)
    predict = GuidedVelocity(model, mask_latents, embeds, hw, hw)
    stock_step = lambda: asked_twice(model, latents, mask_latents, embeds, sigma, hw, hw)  # noqa: E731
    seconds = in_turn({"ours": lambda: predict(latents, sigma), "stock": stock_step}, repeats)
    ours, anchor = (1e3 * statistics.median(seconds[name]) for name in ("ours", "stock"))
    return [Row(f"host: CPU ms per denoise step, {num_blocks} narrow blocks, batch 1, guidance", ours, anchor)]


if __name__ == "__main__":
    sys.exit(main())
