"""The VAE of MSDM from scratch, on crops of frames and of nerve masks, which it will encode as conditions.

Shape suffixes: B samples, C latent channels, H W rows and columns, h w latent rows and columns.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from ccmdist.ccm.overlap import centreline_dice
from ccmdist.ccm.prompts import longest_prompts
from ccmdist.ccm.segmenter import segment
from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.commit import digest_of, sha256_of_file
from ccmdist.config.objectives.msdm import MsdmVaeSettings
from ccmdist.config.train import TrainConfig
from ccmdist.console import log
from ccmdist.data.stream import collated
from ccmdist.diffusion.seeding import generator
from ccmdist.errors import ModelError
from ccmdist.models.msdm import make_vae
from ccmdist.models.perceptual import REMEDY, SMALLEST_PX, Perceptual
from ccmdist.models.text_encoders import chosen_text_encoder
from ccmdist.train.objectives.objective import Batch
from ccmdist.train.objectives.one_network import OneNetwork
from ccmdist.train.objectives.ordered_samples import shared_by_ranks, spread_over
from ccmdist.train.objectives.pixel_samples import NO_BASE, PixelSamples, as_grey

PARTS: Final = ("mse", "l1", "ssim", "kl", "perceptual")
HELD_OUT: Final = ("mask_l1", "mask_ssim", "l1", "ssim", "cl_dice")
RANGE: Final = 2.0
"""Of pixels, which lie in [-1, 1]."""


class _Autoencoding(torch.nn.Module):
    """Encode, draw and decode in one forward: under ZeRO-3 weights are there within the model's forward alone."""

    def __init__(self, vae: torch.nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pictures_B3HW: Tensor, noise_BChw: Tensor | None) -> tuple[Tensor, Tensor]:
        """The pictures as they come back, and the divergence of each one's latents from a normal distribution, (B,).

        Without noise, those of the most likely latents.
        """
        posterior = self.vae.encode(pictures_B3HW).latent_dist
        latents_BChw = posterior.mode() if noise_BChw is None else posterior.mean + posterior.std * noise_BChw
        return self.vae.decode(latents_BChw).sample, posterior.kl()


class MsdmVaeObjective(OneNetwork, PixelSamples):
    """Learns to give pictures back through few latents: MSE, SSIM, LPIPS where weights are given, and a little KL."""

    figures = tuple(f"vae/{part}" for part in PARTS)
    set_name = "vae"
    columns = "mask_returned_real_returned"

    def __init__(self, config: TrainConfig, group: ProcessGroup) -> None:
        """Look through the shards, plan the order, and read what is frozen. Neither cache nor model folder is needed.

        Raises:
            ShardError: If a tar of the shard set is not the one that its manifest names.
            ConfigError: If there are too few samples, the batch does not divide over the ranks, or the text encoder
                takes fewer tokens than a prompt may have.
            ModelError: If the text encoder or the perceptual weights cannot be used.
        """
        assert isinstance(config.objective, MsdmVaeSettings), config.objective
        super().__init__(config, group)
        self.settings = config.objective
        # Not part of the model: the engine would cut it over the ranks.
        self.perceptual = _perceptual(self.settings, group)
        self.base_digest = _digest_of_frozen(self.settings)

    def build(self, zero_config: dict[str, Any]) -> torch.nn.Module:
        """The VAE, every weight of it trained; the engine cuts it over the ranks."""
        self.network = make_vae(self.settings, self.config.seed)
        return _Autoencoding(self.network).to(self.group.device).train()

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """The weighted sum of the parts, on one crop of each sample."""
        crops_B3HW = self._crops(batch, batch["positions"]).to(self.group.device)
        returned_B3HW, kl_B = model(crops_B3HW, self._noise(batch["positions"]))
        parts = self._losses(crops_B3HW, returned_B3HW, kl_B)
        for name, part in parts.items():
            self._note(f"vae/{name}", part)
        return torch.stack([part * getattr(self.settings, name) for name, part in parts.items()]).sum()

    def validate(self, model: torch.nn.Module) -> dict[str, float]:
        """How held-out frames and masks come back whole. Collective.

        Mean absolute difference, in [0, 2], and SSIM; and clDice of the nerves that are found in returned frames with
        those of their masks: a VAE that halves edges too often loses thin nerves long before the other figures tell.
        """
        entries = spread_over(self.samples.entries("val"), self.config.validation.num_samples)
        sums = [0.0] * len(HELD_OUT)
        for entry, weight in shared_by_ranks(entries, self.group):
            found = self._held_out(model, collated(self.source, [entry]))
            sums = [total + weight * value for total, value in zip(sums, found, strict=True)]
        if not entries:
            return {}
        return {name: total / len(entries) for name, total in zip(HELD_OUT, self.group.total(sums), strict=True)}

    def _shown(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """Mask and frame, each beside what comes back."""
        row = []
        for pictures_B1HW in (_as_pictures(batch["nerve_masks"]), batch["images"]):
            returned, _ = model(_coloured(pictures_B1HW).to(self.group.device), None)
            row += [pictures_B1HW[0, 0], returned[0].mean(dim=0).cpu()]
        return torch.cat([as_grey(picture) for picture in row], dim=1)

    def first_batch_images(self) -> dict[str, Tensor]:
        """The first crops of the run, side by side; local."""
        chosen = self.order.cell(0)[: self.config.monitor.num_images]
        batch = collated(self.source, [self.entries[index] for index in chosen])
        crops = [as_grey(crop[0]) for crop in self._crops(batch, range(len(chosen)))]
        return {"first_batch/crops": torch.cat(crops, dim=1)}

    def _held_out(self, model: torch.nn.Module, batch: Batch) -> list[float]:
        """Figures of one sample, as HELD_OUT names them."""
        found: list[float] = []
        for pictures_B1HW in (_as_pictures(batch["nerve_masks"]), batch["images"]):
            wanted = _coloured(pictures_B1HW).to(self.group.device)
            returned, _ = model(wanted, None)
            found += [float((returned - wanted).abs().mean()), float(_similarity(returned, wanted))]
        nerves = segment(as_grey(returned[0].mean(dim=0)).cpu().numpy())
        return [*found, centreline_dice(nerves, batch["nerve_masks"][0].numpy())]

    def _crops(self, batch: Batch, positions: Sequence[int]) -> Tensor:
        """One square of each sample, of its frame or of its mask, flipped or not; (B, 3, crop, crop) in [-1, 1]."""
        edge, masks_B1HW = self.settings.crop_px, _as_pictures(batch["nerve_masks"])
        crops = []
        for image_1HW, mask_1HW, position in zip(batch["images"], masks_B1HW, positions, strict=True):
            source = generator(self.config.seed, "crop", position)
            shows_mask = float(torch.rand((), generator=source)) < self.settings.mask_share
            room = image_1HW.shape[-1] - edge + 1
            top, left = (int(torch.randint(room, (), generator=source)) for _ in range(2))
            crop = (mask_1HW if shows_mask else image_1HW)[:, top : top + edge, left : left + edge]
            axes = [axis for axis in (1, 2) if float(torch.rand((), generator=source)) < 0.5]
            crops.append(crop.flip(axes))
        return _coloured(torch.stack(crops))

    def _noise(self, positions: Sequence[int]) -> Tensor:
        """Noise of each sample's latents, whichever rank it falls to, (B, C, h, w)."""
        edge = self.settings.crop_px // 2 ** (len(self.settings.channels) - 1)
        shape = (self.settings.latent_channels, edge, edge)
        drawn = [torch.randn(shape, generator=generator(self.config.seed, "train", place)) for place in positions]
        return torch.stack(drawn).to(self.group.device)

    def _losses(self, wanted_B3HW: Tensor, returned_B3HW: Tensor, kl_B: Tensor) -> dict[str, Tensor]:
        """Each part by its name, its weight not yet applied."""
        difference_B3HW = returned_B3HW - wanted_B3HW
        parts = {
            "mse": difference_B3HW.square().mean(),
            "l1": difference_B3HW.abs().mean(),
            "ssim": 1 - _similarity(returned_B3HW, wanted_B3HW),
            "kl": kl_B.mean(),
        }
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual(returned_B3HW, wanted_B3HW).mean()
        return parts


def _perceptual(settings: MsdmVaeSettings, group: ProcessGroup) -> Perceptual | None:
    """LPIPS, if it has a weight and a file."""
    if not settings.perceptual:
        return None
    if settings.perceptual_weights is None:
        log.info("objective.perceptual: no LPIPS in the loss, for objective.perceptual_weights names no file")
        return None
    if settings.crop_px < SMALLEST_PX:
        raise ModelError(f"objective.crop_px: LPIPS needs {SMALLEST_PX} px, not {settings.crop_px}", REMEDY)
    return Perceptual(settings.perceptual_weights).to(group.device)


def _digest_of_frozen(settings: MsdmVaeSettings) -> str:
    """Identity of the contents of the files that the settings name; where they lie does not matter."""
    found: dict[str, Any] = {}
    # What cannot be used is refused now, and not after days by precompute.
    chosen_text_encoder(settings.text_encoder, settings.max_text_tokens).refuse_longer(longest_prompts())
    if settings.text_encoder is not None:
        found["text_encoder"] = _digests(settings.text_encoder)
    if settings.perceptual and settings.perceptual_weights is not None:
        found["perceptual"] = sha256_of_file(settings.perceptual_weights)
    return digest_of(found) if found else NO_BASE


def _digests(folder: Path) -> dict[str, str]:
    wanted = (".json", ".txt", ".safetensors")
    return {file.name: sha256_of_file(file) for file in sorted(folder.iterdir()) if file.suffix in wanted}


def _as_pictures(masks_BHW: Tensor) -> Tensor:
    """Nerve masks as pictures in [-1, 1], (B, 1, H, W)."""
    return (masks_BHW.float() * 2 - 1).unsqueeze(1)


def _coloured(grey_B1HW: Tensor) -> Tensor:
    return grey_B1HW.expand(-1, 3, -1, -1)


def _similarity(first_B3HW: Tensor, second_B3HW: Tensor) -> Tensor:
    found = structural_similarity_index_measure(first_B3HW, second_B3HW, data_range=RANGE)
    assert isinstance(found, Tensor), "no more than the mean was asked for"
    return found
