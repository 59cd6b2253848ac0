"""Two adapters on one frozen MMDiT (Dual-LoRA): one draws whole images, one fills holes in them.

Each optimizer step trains one of them. To the completion adapter the model shows two condition images, the structure
and the image with its hole. What it is to draw are the image's tokens in the hole; around it the target has the tokens
of the image *with* the hole, for these are what is known when a frame is repaired. The loss looks at the hole alone.

What is carried over from the paper, whose equations were not found: two adapters, one active at a time; a weight of
noise levels (Min-SNR, for the flow); instead of a layout regulariser, which would need a decoder in the loss, a weight
of tokens by how much of the structure lies on them. There is no perceptual loss.

Shape suffixes: B samples, S packed latent tokens, C channels, K holes of a sample, H W pixels, h w latent rows and
columns.

Source: Xu and Prasanna 2026 (arXiv:2603.04565), of which only abstract and summaries could be read; Hang et al. 2023
(arXiv:2303.09556).
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from typing import Final

import torch

from ccmdist.adapters.named import NamedAdapters, inject_named
from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.config.objectives.adapters import DualSettings
from ccmdist.config.objectives.objective import AdapterName
from ccmdist.config.train import TrainConfig
from ccmdist.data.holes import hole_tokens, unpacked
from ccmdist.diffusion import flow
from ccmdist.diffusion.sampler import Known
from ccmdist.diffusion.seeding import generator
from ccmdist.errors import CacheError
from ccmdist.train.objectives.edit import EditObjective, movement_of
from ccmdist.train.objectives.objective import Batch

PHASES: Final = 1 << 20
PICTURES: Final[dict[str, str]] = {
    "synthesis": "samples/synthesis_structure_real_sampled",
    "completion": "samples/completion_structure_holed_real_filled",
}
"""Names of the grids, which tell their columns."""
FIRST_BATCH: Final[dict[str, str]] = {
    "synthesis": "first_batch/synthesis_structure_target_input",
    "completion": "first_batch/completion_structure_holed_target_input",
}
"""The same of the first samples of a run."""


def adapter_of_step(seed: int, step: int, settings: DualSettings) -> AdapterName:
    """The adapter that optimizer step ``step`` trains: a pure function, equal on all ranks.

    With f the share of completion and a phase u from the seed, completion is trained where floor(k f + u) grows from
    k = step to k = step + 1: in any n steps in a row that is n f times, rounded up or down. In whole numbers, so that
    it is exact and the same on every machine.
    """
    if len(settings.adapters) == 1:
        return settings.adapters[0]
    share, phase = Fraction(settings.completion_fraction), Fraction(_phase(seed), PHASES)
    before, after = (math.floor(k * share + phase) for k in (step, step + 1))
    return "completion" if after > before else "synthesis"


@cache
def _phase(seed: int) -> int:
    return int(torch.randint(PHASES, (), generator=generator(seed, "adapter of step")))


class DualObjective(EditObjective):
    """Learns ``noise - x`` with the adapter whose turn it is; the parameter sets are called like the adapters."""

    def __init__(self, config: TrainConfig, group: ProcessGroup) -> None:
        """Open the cache and plan the order; see :class:`EditObjective`."""
        super().__init__(config, group)
        assert isinstance(config.objective, DualSettings), config.objective
        self.settings = config.objective
        self._updates: dict[str, int] = dict.fromkeys(self.settings.adapters, 0)
        self._trained = ""  # the first call of after_step only says that the state was loaded
        self._mean_weight = 1.0
        if gamma := self.settings.min_snr_gamma:
            shares = flow.sigma_shares(config.sigma_sampling, self.grid)
            self._mean_weight = float((shares * flow.min_snr_weights(self.grid.double(), gamma)).sum())

    def _inject(self, model: torch.nn.Module, names: list[str], row_squares: Mapping[str, torch.Tensor]) -> None:
        settings, seed = self.config.adapter, self.config.seed
        self.named: NamedAdapters = inject_named(model, names, settings, row_squares, seed, self.settings.adapters)

    def parameter_sets(self) -> dict[str, dict[str, torch.nn.Parameter]]:
        """One set for each adapter."""
        return {name: adapted.parameters for name, adapted in self.named.of.items()}

    def sets_of_step(self, step: int) -> frozenset[str]:
        """Every step trains one adapter."""
        return frozenset({adapter_of_step(self.config.seed, step, self.settings)})

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Weighted squared error of the velocity that the adapter of the batch's step predicts."""
        self._trained = adapter_of_step(self.config.seed, batch["step"], self.settings)
        self.named.activate(self._trained)
        return super().loss(model, batch)

    def after_step(self) -> None:
        """Let the linears of the adapter that was trained compute their norms anew; after a load those of both."""
        if self._trained:
            self.named.of[self._trained].advance()
            self._updates[self._trained] += 1
        else:
            for adapted in self.named.of.values():
                adapted.advance()

    def validate(self, model: torch.nn.Module) -> dict[str, float]:
        """Held-out losses of each adapter, unweighted, and their mean. Collective.

        Those of completion are in the hole, which is fixed per sample.
        """
        figures: dict[str, float] = {}
        for adapter in self.named.of:
            self.named.activate(adapter)
            figures |= {f"{adapter}/{name}": value for name, value in super().validate(model).items()}
        means = [value for name, value in figures.items() if name.endswith("/mean")]
        return {"mean": sum(means) / len(means)} | figures if means else {}

    def describe(self) -> dict[str, float]:
        """How far magnitudes and directions of each adapter have moved, per group of blocks.

        Raises:
            RunError: If no magnitude of an adapter has moved at all.
        """
        return {
            f"{name}/{adapter}": value
            for adapter, adapted in self.named.of.items()
            for name, value in movement_of(adapted, self._updates[adapter], adapter).items()
        }

    def images(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """For some held-out samples and each adapter a grid of what it is shown, the real and the drawn image.

        Collective; there are pictures on rank 0 alone.
        """
        pictures = {}
        for adapter in self.named.of:
            self.named.activate(adapter)
            rows = self._sampled_rows(model)
            if self.group.ranks.is_first:
                pictures[PICTURES[adapter]] = self._decoded_grid(rows)
        return pictures

    def first_batch_images(self) -> dict[str, torch.Tensor]:
        """Rows of what the first samples of the run look like to the adapter of the first step; local."""
        first = adapter_of_step(self.config.seed, 0, self.settings)
        self.named.activate(first)
        return {FIRST_BATCH[first]: self._first_batch_grid()}

    def _posed(self, batch: Batch, places: Sequence[int | str]) -> Batch:
        """The samples as the active adapter is asked about them: for completion with one of their holes.

        Then ``image_latents`` are what is noised, and ``holed_latents`` (B, C, h, w) the second condition image.
        ``is_open`` (B, S) tells the tokens that are drawn.
        """
        posed = batch | {"real_latents": batch["image_latents"]}
        if self.named.active == "synthesis":
            return posed | {"is_open": torch.ones(len(places), self.token_hw[0] * self.token_hw[1], dtype=torch.bool)}
        chosen = torch.tensor([self._hole_of(place, batch["holes"].shape[1]) for place in places])
        rows = torch.arange(len(chosen))
        is_open_BS = hole_tokens(unpacked(batch["holes"][rows, chosen], self.config.data.image_size_px))
        if not is_open_BS.any(dim=1).all():
            key = batch["keys"][int(is_open_BS.any(dim=1).logical_not().nonzero()[0])]
            raise CacheError(
                f"sample {key}: a hole of it covers nothing, so there is nothing to fill",
                f"remove the cache {self.cache.folder} and run `ccmdist precompute` with the same data section",
            )
        holed = batch["holed_latents"][rows, chosen]
        is_open = is_open_BS.unflatten(1, (1, *self.token_hw))
        is_open = is_open.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)
        image_latents = torch.where(is_open, batch["image_latents"], holed)
        return posed | {"image_latents": image_latents, "holed_latents": holed, "is_open": is_open_BS}

    def _hole_of(self, place: int | str, num_holes: int) -> int:
        """Which of its holes a sample gets: drawn anew for each position in the run; fixed for a key."""
        source = generator(self.config.seed, "hole", place)
        return int(torch.randint(num_holes, (), generator=source))

    def _conditions_BSC(self, batch: Batch) -> torch.Tensor:
        conditions = [batch["mask_latents"]]
        if self.named.active == "completion":
            conditions.append(batch["holed_latents"])
        return torch.cat([flow.pack_latents(condition) for condition in conditions], dim=1)

    def _training_loss(self, errors_BSC: torch.Tensor, batch: Batch, sigma_B: torch.Tensor) -> torch.Tensor:
        """The mean over samples, weighted by noise level; in each over its open tokens, weighted by structure."""
        weight_BS = batch["is_open"].float()
        if self.settings.layout_weight:
            weight_BS = weight_BS * (1 + self.settings.layout_weight * batch["layout"].flatten(1) / 255)
        return (self._sigma_weight_B(sigma_B).to(errors_BSC) * _weighted_mean_B(errors_BSC, weight_BS)).mean()

    def _held_out_loss_B(self, errors_BSC: torch.Tensor, batch: Batch) -> torch.Tensor:
        return _weighted_mean_B(errors_BSC, batch["is_open"].float())

    def _sigma_weight_B(self, sigma_B: torch.Tensor) -> torch.Tensor:
        """Weights of noise levels, with mean 1 over the levels that the run draws: a learning rate means the same."""
        gamma = self.settings.min_snr_gamma
        return flow.min_snr_weights(sigma_B, gamma) / self._mean_weight if gamma else torch.ones_like(sigma_B)

    def _known(self, batch: Batch) -> Known | None:
        if self.named.active == "synthesis":
            return None
        holed_BSC, device = flow.pack_latents(batch["holed_latents"]), self.group.device
        return Known(holed_BSC.to(device), batch["is_open"].to(device))

    def _shown(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        holed = (batch["holed_latents"],) if self.named.active == "completion" else ()
        return batch["mask_latents"], *holed, batch["real_latents"]


def _weighted_mean_B(errors_BSC: torch.Tensor, weight_BS: torch.Tensor) -> torch.Tensor:
    """The mean of each sample over channels and tokens, which count by their weight."""
    weight_BS = weight_BS.to(errors_BSC)
    return (errors_BSC.mean(dim=2) * weight_BS).sum(dim=1) / weight_BS.sum(dim=1)
