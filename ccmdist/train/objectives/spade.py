"""SPADE from scratch: a generator and its discriminators take turns, step by step, on pixels read from the shards.

Shape suffixes: B samples, K channels of the label map, H W rows and columns, Z length of the noise.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch

from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.config.objectives.baselines import SpadeSettings
from ccmdist.config.train import TrainConfig
from ccmdist.data.stream import collated
from ccmdist.diffusion.seeding import generator
from ccmdist.models import spade
from ccmdist.train.objectives.objective import Batch
from ccmdist.train.objectives.ordered_samples import shared_by_ranks, spread_over
from ccmdist.train.objectives.pixel_samples import NO_BASE, PixelSamples, as_grey, shown_frame, shown_mask

GENERATOR_SET: Final = spade.GENERATOR
DISCRIMINATOR_SET: Final = "discriminator"


class _Pair(torch.nn.Module):
    """Both networks as one model, as the engine wants it."""

    def __init__(self, drawing: torch.nn.Module, judging: torch.nn.Module) -> None:
        super().__init__()
        self.generator, self.discriminator = drawing, judging

    def forward(self, labels_BKHW: torch.Tensor, noise_BZ: torch.Tensor, images_B1HW: torch.Tensor | None) -> Any:
        """Drawn images and, if there are real ones beside them, how real and drawn ones are judged.

        Real and drawn images are judged in one pass: under ZeRO-3 a step uses each weight once.
        """
        drawn_B1HW = self.generator(labels_BKHW, noise_BZ)
        if images_B1HW is None:
            return drawn_B1HW
        both = torch.cat([images_B1HW, drawn_B1HW]), torch.cat([labels_BKHW, labels_BKHW])
        return spade.halves(*spade.judged(self.discriminator, *both))


class SpadeObjective(PixelSamples):
    """Even steps train the discriminators, odd ones the generator; all in fp32. A step sees samples of its own."""

    figures = ("generator/adversarial", "generator/features", "discriminator/real", "discriminator/drawn")
    columns = "mask_real_sampled"

    def __init__(self, config: TrainConfig, group: ProcessGroup) -> None:
        """Look through the shards and plan the order. Neither the cache nor the model folder is needed.

        Raises:
            ShardError: If a tar of the shard set is not the one that its manifest names.
            ConfigError: If there are too few samples, or the batch does not divide over the ranks.
        """
        assert isinstance(config.objective, SpadeSettings), config.objective
        super().__init__(config, group)
        self.settings = config.objective
        self.base_digest = NO_BASE

    def build(self, zero_config: dict[str, Any]) -> torch.nn.Module:
        """Both networks, every weight of them trained; the engine cuts them over the ranks."""
        size_px, seed = self.config.data.image_size_px, self.config.seed
        drawing = spade.make_generator(self.settings, size_px, seed)
        judging = spade.make_discriminators(self.settings, size_px, seed)
        self.model = _Pair(drawing, judging).to(self.group.device).train()
        return self.model

    def parameter_sets(self) -> dict[str, dict[str, torch.nn.Parameter]]:
        """Two sets, of which each step trains one."""
        networks = {GENERATOR_SET: self.model.generator, DISCRIMINATOR_SET: self.model.discriminator}
        return {
            name: {f"{name}.{parameter}": value for parameter, value in network.named_parameters()}
            for name, network in networks.items()
        }

    def sets_of_step(self, step: int) -> frozenset[str]:
        """The discriminators first, for an untrained judge teaches nothing."""
        return frozenset({GENERATOR_SET if step % 2 else DISCRIMINATOR_SET})

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """The loss of the networks that the step of the batch trains."""
        device = self.group.device
        noise_BZ = self._noise("train", batch["positions"])
        real, drawn = model(self._labels(batch), noise_BZ, batch["images"].to(device))
        if GENERATOR_SET not in self.sets_of_step(batch["step"]):
            self._note("discriminator/real", torch.stack([scores.mean() for scores in real[0]]).mean())
            self._note("discriminator/drawn", torch.stack([scores.mean() for scores in drawn[0]]).mean())
            return spade.discriminator_loss(real[0], drawn[0])
        adversarial, features = spade.generator_loss(drawn[0]), spade.feature_distance(real[1], drawn[1])
        self._note("generator/adversarial", adversarial)
        self._note("generator/features", features)
        return adversarial + self.settings.feature_matching * features

    def after_step(self) -> None:
        """Nothing depends on the weights but what is computed with them."""

    def validate(self, model: torch.nn.Module) -> dict[str, float]:
        """Mean absolute difference of drawn from real held-out images, in [0, 2]. Collective.

        The discriminators move with the generator, so losses by them cannot be compared from step to step.
        """
        entries = spread_over(self.samples.entries("val"), self.config.validation.num_samples)
        total = 0.0
        for entry, weight in shared_by_ranks(entries, self.group):
            batch = collated(self.source, [entry])
            drawn = self._drawn(model, batch)
            total += weight * float((drawn - batch["images"].to(drawn)).abs().mean())
        return {"l1": self.group.total([total])[0] / len(entries)} if entries else {}

    def _shown(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        drawn = as_grey(self._drawn(model, batch)[0, 0].cpu())
        return torch.cat([shown_mask(batch), shown_frame(batch), drawn], dim=1)

    def _drawn(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        drawn: torch.Tensor = model(self._labels(batch), self._noise("images", batch["keys"]), None)
        return drawn

    def _labels(self, batch: Batch) -> torch.Tensor:
        return spade.label_map(batch["nerve_masks"].to(self.group.device), batch["clinical_groups"])

    def _noise(self, purpose: str, places: Sequence[int | str]) -> torch.Tensor:
        """Noise of each sample, whichever rank it falls to, (B, Z)."""
        sources = [generator(self.config.seed, purpose, place) for place in places]
        drawn = [torch.randn(self.settings.noise_dim, generator=source) for source in sources]
        return torch.stack(drawn).to(self.group.device)
