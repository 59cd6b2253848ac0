"""SPADE in 2-D: MONAI's generator and multi-scale patch discriminators, from a nerve mask and a group to pixels.

* The label map has a channel for background, one for nerve, and a constant one for each clinical group; none of these
  is set for an unlabelled image. The mask is given at full resolution, so a nerve of two pixels is seen.
* The generator is the decoder half of MONAI's SPADENet: an image is drawn from a noise vector, so one mask has many.
  The encoder half would only copy the style of a given image.
* Instance norm everywhere: batch norm would let images depend on those beside them, and keep statistics that are no
  parameters. Without spectral norm for the same reason: its vectors are no parameters either, and whoever resumes would
  go on with others. That is a departure from the paper.
* The hinge loss is the paper's. MONAI's squashes scores by tanh first, where a hinge never reaches its corner.
* No VGG loss: its weights would have to be downloaded. Features are matched in the discriminators alone.

Source: Park et al. 2019 (arXiv:1903.07291); Wang et al. 2018, pix2pixHD (arXiv:1711.11585), for feature matching.

Shape suffixes: B samples, K channels of the label map, H W rows and columns, Z length of the noise.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

from ccmdist.ccm.groups import CLINICAL_GROUPS, ClinicalGroup
from ccmdist.config.objectives.baselines import SpadeSettings

NUM_LABELS: Final = 2 + len(CLINICAL_GROUPS)
GENERATOR: Final = "generator"
"""Name of the network that draws, of the two that are trained."""
Scores = list[Tensor]
Features = list[list[Tensor]]


def make_generator(settings: SpadeSettings, size_px: int, seed: int) -> nn.Module:
    """The generator, whose weights depend on the seed alone: (label map, noise) -> images in [-1, 1], (B, 1, H, W)."""
    from monai.networks.nets.spade_network import SPADEDecoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SPADEDecoder(
            label_nc=NUM_LABELS,
            spatial_dims=2,
            out_channels=1,
            input_shape=[size_px, size_px],
            channels=list(settings.channels),  # which the decoder changes
            z_dim=settings.noise_dim,
            spade_intermediate_channels=settings.norm_channels,
            norm="INSTANCE",
            last_act="TANH",
        )


def make_discriminators(settings: SpadeSettings, size_px: int, seed: int) -> nn.Module:
    """The discriminators, whose weights depend on the seed alone: image with label map -> scores and features."""
    from monai.networks.nets.patchgan_discriminator import MultiScalePatchDiscriminator

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MultiScalePatchDiscriminator(
            num_d=settings.num_discriminators,
            num_layers_d=settings.discriminator_layers,
            spatial_dims=2,
            channels=settings.discriminator_channels,
            in_channels=1 + NUM_LABELS,
            norm="INSTANCE",
            minimum_size_im=size_px,
        )


def label_map(nerve_mask_BHW: Tensor, groups: Sequence[ClinicalGroup | None]) -> Tensor:
    """Background, nerve and groups as channels, float32 (B, K, H, W).

    Args:
        nerve_mask_BHW: bool.
        groups: Of the samples.
    """
    nerve_BHW = nerve_mask_BHW.float()
    given = [[float(group == known) for known in CLINICAL_GROUPS] for group in groups]
    groups_BKHW = torch.tensor(given, device=nerve_BHW.device)[:, :, None, None].expand(-1, -1, *nerve_BHW.shape[1:])
    return torch.cat([1 - nerve_BHW[:, None], nerve_BHW[:, None], groups_BKHW], dim=1)


def judged(discriminators: nn.Module, images_B1HW: Tensor, labels_BKHW: Tensor) -> tuple[Scores, Features]:
    """Scores and features of each discriminator."""
    scores, features = discriminators(torch.cat([images_B1HW, labels_BKHW], dim=1))
    return scores, features


def halves(scores: Scores, features: Features) -> tuple[tuple[Scores, Features], tuple[Scores, Features]]:
    """What was judged at once, as its first and its second half of samples."""
    count = len(scores[0]) // 2
    first = [one[:count] for one in scores], [[layer[:count] for layer in one] for one in features]
    second = [one[count:] for one in scores], [[layer[count:] for layer in one] for one in features]
    return first, second


def discriminator_loss(real: Scores, drawn: Scores) -> Tensor:
    """Hinge loss: real images are to score above 1, drawn ones below -1; mean over patches and discriminators."""
    parts = [(1 - r).relu().mean() + (1 + d).relu().mean() for r, d in zip(real, drawn, strict=True)]
    return torch.stack(parts).mean() / 2


def generator_loss(drawn: Scores) -> Tensor:
    """What the generator lowers: minus the mean score of what it draws."""
    return -torch.stack([scores.mean() for scores in drawn]).mean()


def feature_distance(real: Features, drawn: Features) -> Tensor:
    """Mean absolute difference of the discriminators' features, the real ones as they are."""
    parts = [
        (d - r.detach()).abs().mean()
        for real_of_one, drawn_of_one in zip(real, drawn, strict=True)
        for r, d in zip(real_of_one, drawn_of_one, strict=True)
    ]
    return torch.stack(parts).mean()
