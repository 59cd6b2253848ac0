"""The MMDiT as a sampler asks for it: all branches of guidance in one pass, and no number computed twice or unread.

Guidance has two branches, the prompt and the negative prompt, which share latents, mask and noise level and differ in
their text, also in its length. Here the tokens of all branches stand in one row: every linear runs once over all of
them, and attention runs branch by branch, so that nothing is padded or masked. What is saved beside that is exact:

* what no denoise step changes is computed once per batch: the mask's tokens and the texts before the first block,
  rotary angles;
* up to the attention of the first block the image tokens of the branches are equal, and computed once;
* of the last block only the target tokens are read: queries, projections and MLPs of all others are left out.

Shape suffixes: B samples, T target tokens, M mask tokens, L text tokens, S tokens of a stream, N branches, C channels,
D width of the model, H heads, E channels of a head. A stream of image tokens holds the target's tokens of all branches,
then the mask's of all branches; a stream of text tokens the text of all branches. Where there are several condition
images, the mask's tokens are those of all of them, one image after the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from torch import Tensor, nn

from ccmdist.models.mmdit import image_shapes


@dataclass(frozen=True)
class Tokens:
    """How many tokens of each kind a branch has."""

    num_target: int
    num_mask: int
    num_text: tuple[int, ...]
    """Of each branch."""

    @property
    def num_branches(self) -> int:
        """1 without guidance, 2 with it."""
        return len(self.num_text)

    def joint(self, text_BLHE: Tensor | None, image_BSHE: Tensor, num_copies: int) -> list[Tensor]:
        """The tokens of each branch, in the model's order: text, target, mask.

        Args:
            text_BLHE: Of all branches; None to leave the text out.
            image_BSHE: Target and mask of ``num_copies`` branches; without a mask, its tokens are left out.
            num_copies: 1 where the branches share their image tokens, else the number of branches.
        """
        num_targets, N = num_copies * self.num_target, self.num_branches
        targets = image_BSHE[:, :num_targets].split(self.num_target, dim=1) * N
        masks = image_BSHE[:, num_targets:].split(self.num_mask, dim=1) * N
        texts = () if text_BLHE is None else text_BLHE.split(self.num_text, dim=1)
        return [torch.cat([*texts[i : i + 1], targets[i], masks[i]], dim=1) for i in range(N)]

    def parted(self, joint: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`joint`: the streams of text and of image tokens, (B, L, D) and (B, S, D)."""
        parts = [
            one.split([num_text, self.num_target, self.num_mask], dim=1)
            for one, num_text in zip(joint, self.num_text, strict=True)
        ]
        texts, targets, masks = zip(*parts, strict=True)
        return torch.cat(texts, dim=1), torch.cat([*targets, *masks], dim=1)


@dataclass(frozen=True)
class Place:
    """What a block has to know beside its inputs.

    Attributes:
        tokens: Of a branch.
        text_angles: Cosine and sine of the rotary angles of the text, (L, E/2, 2).
        image_angles: Of the image tokens, (S, E/2, 2).
        is_first: The branches still share their image tokens.
        is_last: Only the target's tokens are wanted of it.
    """

    tokens: Tokens
    text_angles: Tensor
    image_angles: Tensor
    is_first: bool
    is_last: bool

    @property
    def num_copies(self) -> int:
        """Of the image tokens, in the stream that comes in."""
        return 1 if self.is_first else self.tokens.num_branches

    @property
    def seen(self) -> tuple[int, int]:
        """Tokens of the target and of the mask that come in."""
        return self.num_copies * self.tokens.num_target, self.num_copies * self.tokens.num_mask

    @property
    def wanted(self) -> tuple[int, int]:
        """Tokens of the target and of the mask that go out."""
        N = self.tokens.num_branches
        return N * self.tokens.num_target, 0 if self.is_last else N * self.tokens.num_mask


BlockPass = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor, Place], tuple[Tensor, Tensor]]


def block_pass(
    block: nn.Module,
    text_BLD: Tensor,
    image_BSD: Tensor,
    text_mod_BM: Tensor,
    image_mod_RM: Tensor,
    place: Place,
) -> tuple[Tensor, Tensor]:
    """One block over all branches: the streams of text and of image tokens after it; the last leaves the text as it is.

    Args:
        block: A QwenImageTransformerBlock.
        text_BLD: Of all branches.
        image_BSD: Of all branches; in the first block of one, for they are equal.
        text_mod_BM: What the block's `txt_mod` returns, M = 6 D. Not asked for here: in a tabled model it is the one
            thing in which blocks differ beside their weights, and each would be compiled by itself.
        image_mod_RM: Of its `img_mod`; in 2511 the rows of the samples are followed by as many for their masks.
        place: Which block it is.

    Source: forward of diffusers' QwenImageTransformerBlock and of its attention processor.
    """
    seen, wanted = place.seen, place.wanted
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = image_mod_RM.chunk(6, dim=-1)
    text_mod = text_mod_BM.unsqueeze(1).chunk(6, dim=-1)

    shift, scale = (_spread(block, rows_RD, seen) for rows_RD in (shift_1, scale_1))
    image_in_BSD = _plus(shift, 1 + scale, block.img_norm1(image_BSD))
    text_in_BLD = _plus(text_mod[0], 1 + text_mod[1], block.txt_norm1(text_BLD))
    text_out_BLD, image_out_BSD = _attended(block.attn, text_in_BLD, image_in_BSD, place)
    if place.is_first:
        N = place.tokens.num_branches
        image_BSD = torch.cat([part for part in image_BSD.split(seen, dim=1) for _ in range(N)], dim=1)
    image_BSD = _plus(image_BSD[:, : sum(wanted)], _spread(block, gate_1, wanted), image_out_BSD)
    shift, scale = (_spread(block, rows_RD, wanted) for rows_RD in (shift_2, scale_2))
    image_in_BSD = _plus(shift, 1 + scale, block.img_norm2(image_BSD))
    image_BSD = _plus(image_BSD, _spread(block, gate_2, wanted), block.img_mlp(image_in_BSD))
    if text_out_BLD is not None:
        text_BLD = _plus(text_BLD, text_mod[2], text_out_BLD)
        text_in_BLD = _plus(text_mod[3], 1 + text_mod[4], block.txt_norm2(text_BLD))
        text_BLD = _plus(text_BLD, text_mod[5], block.txt_mlp(text_in_BLD))
    return text_BLD, image_BSD


class GuidedVelocity:
    """Predictions of noise - x for one batch of images, of all branches in one pass.

    Args:
        model: The MMDiT, whole, in this process; not one that DeepSpeed has partitioned.
        mask_latents_BMC: Packed latents of the mask images, in the model's dtype; or of several condition images for
            each sample, one after the other.
        prompt_embeds: (B, L, D) for each branch, the prompt first; unpadded, of any lengths.
        target_hw: Rows and columns of the target's tokens.
        mask_hw: Rows and columns of the mask's tokens, and of those of every other condition image.
        run_block: :func:`block_pass`, or what compiles to the same; for all blocks but the first and the last, whose
            shapes are others, so that there is one thing to compile.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: QwenImageTransformer2DModel,
        mask_latents_BMC: Tensor,
        prompt_embeds: Sequence[Tensor],
        target_hw: tuple[int, int],
        mask_hw: tuple[int, int],
        run_block: BlockPass = block_pass,
    ) -> None:
        self.model, self.run_block = model, run_block
        num_text = tuple(embeds_BLD.shape[1] for embeds_BLD in prompt_embeds)
        num_mask = mask_latents_BMC.shape[1]
        self.tokens = Tokens(target_hw[0] * target_hw[1], num_mask, num_text)
        self.mask_BMD = model.img_in(mask_latents_BMC)
        self.text_BLD = torch.cat([model.txt_in(model.txt_norm(embeds_BLD)) for embeds_BLD in prompt_embeds], dim=1)
        self.places = self._places(
            *model.pos_embed(
                [image_shapes(target_hw, mask_hw, num_mask)],
                max_txt_seq_len=max(num_text),
                device=mask_latents_BMC.device,
            )
        )

    @torch.no_grad()
    def __call__(self, latents_BTC: Tensor, sigma_B: Tensor) -> tuple[Tensor, ...]:
        """The prediction of each branch, (B, T, C).

        Args:
            latents_BTC: Noisy packed latents of the target, in the model's dtype.
            sigma_B: Noise level of each sample, in [0, 1].
        """
        model, text_BLD, B = self.model, self.text_BLD, len(latents_BTC)
        image_BSD = torch.cat([model.img_in(latents_BTC), self.mask_BMD], dim=1)
        timestep_R = sigma_B.to(latents_BTC.dtype)
        if model.zero_cond_t:
            timestep_R = torch.cat([timestep_R, torch.zeros_like(timestep_R)])
        time_RD = model.time_text_embed(timestep_R, image_BSD, None)
        for block, place in zip(model.transformer_blocks, self.places, strict=True):
            run_block = block_pass if place.is_first or place.is_last else self.run_block
            mods = block.txt_mod(time_RD[:B]), block.img_mod(time_RD)
            text_BLD, image_BSD = run_block(block, text_BLD, image_BSD, *mods, place)
        predicted_BSC = model.proj_out(model.norm_out(image_BSD, time_RD[:B]))
        return predicted_BSC.split(self.tokens.num_target, dim=1)

    def _places(self, image_SE: Tensor, text_LE: Tensor) -> list[Place]:
        """Of all blocks. The text of every branch is turned as if it stood alone: from the first angle on."""
        num_blocks, N = len(self.model.transformer_blocks), self.tokens.num_branches
        target_TE, mask_ME = image_SE.split([self.tokens.num_target, self.tokens.num_mask])
        text = torch.view_as_real(torch.cat([text_LE[:length] for length in self.tokens.num_text]))
        image = torch.view_as_real(torch.cat([target_TE] * N + [mask_ME] * N))
        shared = torch.view_as_real(image_SE)
        return [
            Place(self.tokens, text, image if index else shared, index == 0, index == num_blocks - 1)
            for index in range(num_blocks)
        ]


def _plus(base: Tensor, factor: Tensor, values: Tensor) -> Tensor:
    """Base + factor values: in fp32 rounded as the stock class does, else in one pass over memory, rounded once."""
    return base + factor * values if base.dtype == torch.float32 else torch.addcmul(base, factor, values)


def _spread(block: nn.Module, rows_RD: Tensor, counts: tuple[int, int]) -> Tensor:
    """Rows of a modulation over the image tokens: (B, 1, D), or (B, S, D) where the mask has a noise level of its own.

    Args:
        block: Knows which of the two it is.
        rows_RD: Of the samples; then of their masks.
        counts: Tokens of the target and of the mask.
    """
    if not block.zero_cond_t:
        return rows_RD.unsqueeze(1)
    parts = zip(rows_RD.chunk(2), counts, strict=True)
    return torch.cat([rows_BD.unsqueeze(1).expand(-1, count, -1) for rows_BD, count in parts], dim=1)


def _attended(attn: Any, text_BLD: Tensor, image_BSD: Tensor, place: Place) -> tuple[Tensor | None, Tensor]:
    """Joint attention of each branch, projected; no text, and the target's tokens alone, in the last block."""
    tokens, num_copies = place.tokens, place.num_copies
    asking_BSD = image_BSD[:, : place.seen[0]] if place.is_last else image_BSD
    image_q = _rotated(attn.norm_q, _heads(attn, attn.to_q(asking_BSD)), place.image_angles)
    image_k = _rotated(attn.norm_k, _heads(attn, attn.to_k(image_BSD)), place.image_angles)
    text_k = _rotated(attn.norm_added_k, _heads(attn, attn.add_k_proj(text_BLD)), place.text_angles)
    text_q = None
    if not place.is_last:
        text_q = _rotated(attn.norm_added_q, _heads(attn, attn.add_q_proj(text_BLD)), place.text_angles)
    image_v, text_v = _heads(attn, attn.to_v(image_BSD)), _heads(attn, attn.add_v_proj(text_BLD))

    streams = ((text_q, image_q), (text_k, image_k), (text_v, image_v))
    branches = zip(*(tokens.joint(text, image, num_copies) for text, image in streams), strict=True)
    backend = attn.processor._attention_backend
    outs = [dispatch_attention_fn(q, k, v, backend=backend).flatten(2).to(q.dtype) for q, k, v in branches]
    if place.is_last:
        return None, attn.to_out[1](attn.to_out[0](torch.cat(outs, dim=1)))
    text_out_BLD, image_out_BSD = tokens.parted(outs)
    return attn.to_add_out(text_out_BLD), attn.to_out[1](attn.to_out[0](image_out_BSD))


def _heads(attn: Any, stream_BSD: Tensor) -> Tensor:
    return stream_BSD.unflatten(-1, (-1, attn.inner_dim // attn.heads))


def _rotated(norm: RMSNorm, stream_BSHE: Tensor, angles_SE2: Tensor) -> Tensor:
    """Queries or keys, normed and turned; those that are left out would stand at the end of the stream."""
    # One kernel on a GPU, where diffusers' module takes seven.
    normed_BSHE = F.rms_norm(stream_BSHE, (stream_BSHE.shape[-1],), norm.weight, norm.eps)
    angles_SE2 = angles_SE2[: stream_BSHE.shape[1]]
    if not torch.compiler.is_compiling():
        return apply_rotary_emb_qwen(normed_BSHE, torch.view_as_complex(angles_SE2), use_real=False)
    # Inductor generates no code for complex numbers.
    cos_S1E, sin_S1E = angles_SE2.unsqueeze(1).unbind(-1)
    even, odd = normed_BSHE.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos_S1E - odd * sin_S1E, even * sin_S1E + odd * cos_S1E], dim=-1)
    return turned.flatten(-2).type_as(normed_BSHE)
