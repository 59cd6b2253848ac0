"""Mask and prompt to image: an adapter on a frozen transformer, trained by rectified flow on cached latents.

Shape suffixes: B samples, S packed latent tokens, C channels, L text tokens, D text width, h w latent rows and columns.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ccmdist.adapters.frozen import freeze_linears
from ccmdist.adapters.growth import RankGrowth
from ccmdist.adapters.injection import AdaptedLinears, RowSquares, inject, row_squares_of
from ccmdist.adapters.rank_map import RankMap
from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.config.train import TrainConfig
from ccmdist.console import log
from ccmdist.diffusion import flow
from ccmdist.errors import RunError
from ccmdist.models import attention
from ccmdist.models.backbones.choice import backbone_of
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.modulation_table import ModulationTable, is_tabled
from ccmdist.models.quantized import build_quantized
from ccmdist.models.staging import staged
from ccmdist.models.tabulation import table_for
from ccmdist.planner.plan import check_growth
from ccmdist.planner.transformer import Transformer
from ccmdist.train.capabilities import refuse_unable
from ccmdist.train.flat_blocks import flatten_blocks
from ccmdist.train.objectives.latent_flow import LatentFlow
from ccmdist.train.objectives.objective import Batch
from ccmdist.train.recompute import set_recompute
from ccmdist.train.sharding import forget_node_copies, hide_frozen_weights

ADAPTER_SET = "adapter"
MIN_UPDATES_TO_JUDGE = 10
"""Updates after which a magnitude that has not moved at all counts as frozen."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "nf4": torch.bfloat16, "int8": torch.bfloat16}
"""Of activations, beside each form of the base."""


class EditObjective(LatentFlow):
    """Learns ``noise - x`` on the target tokens, given the mask's latents and the cached prompt embeddings."""

    def __init__(self, config: TrainConfig, group: ProcessGroup) -> None:
        """Open the cache and plan the order; no weights are read yet.

        Raises:
            CacheError: If the cache is missing or was made for something else.
            ConfigError: If there are too few samples, the batch does not divide over the ranks, or a budget of ranks
                does not suffice.
        """
        # First, for a cache that is asked for would be filled in vain.
        refuse_unable(config, ModelFolder.open(config.data.model, *config.objective.model_kinds))
        super().__init__(config, group)
        if self.folder.layout.is_planned:
            check_growth(config, Transformer.from_config(self.folder.config("transformer")))
        self.backbone = backbone_of(self.folder)
        self.base_digest = self.folder.transformer_digest()
        self.dtype = DTYPES[config.base]
        self._is_tabled = False
        self._num_updates = -1  # the first call of after_step only says that the state was loaded
        self._told_ranks: dict[str, int] = {}

    def build(self, zero_config: dict[str, Any]) -> torch.nn.Module:
        """The transformer with its base where ``sharding`` says and the adapter injected. Collective."""
        if self.config.data.stage_model:
            self.folder = staged(self.folder, self.base_digest)
            self.backbone = backbone_of(self.folder)
        names = self.backbone.linear_names(self.backbone.skeleton(), self.config.adapter.targets)
        table = self._table(names)
        self._is_tabled = table is not None
        model, row_squares = self._base(names, table, zero_config)
        return self.adapt(model, names, row_squares)

    def _base(
        self, names: list[str], table: ModulationTable | None, zero_config: dict[str, Any]
    ) -> tuple[torch.nn.Module, Mapping[str, torch.Tensor]]:
        """The base in its form and place, and the squared norms of the linears called ``names``. Collective."""
        if self.config.is_quantized:
            model = build_quantized(self.folder, self.dtype, self.config.base, self.group.device, table)
            return model, row_squares_of(model, names)  # of the weights that the adapter computes with
        is_whole, squares = self.config.sharding == "replicated", RowSquares(names)
        partition_as = None if is_whole else zero_config
        model = self.backbone.build(self.dtype, partition_as, squares.on_rows, self.group.device, table)
        forget_node_copies(model.parameters())
        return model, squares.whole() if is_whole else squares.reduce()

    def adapt(
        self, model: torch.nn.Module, names: list[str], row_squares: Mapping[str, torch.Tensor]
    ) -> torch.nn.Module:
        """A model with its weights, made ready to be trained: frozen, with the adapter, computing as the settings say.

        Args:
            model: Changed in place.
            names: Linears that get an adapter.
            row_squares: Their squared norms, as :func:`ccmdist.adapters.injection.inject` takes them.
        """
        model.requires_grad_(False)
        if self.config.sharding != "replicated":
            for blocks in self.backbone.block_lists(model):
                flatten_blocks(blocks)
        self._inject(model, names, row_squares)
        if settings := self.config.adapter.growth:
            self.growth = RankGrowth(names, self.config.adapter.lora_rank, settings)
        hide_frozen_weights(model, vectors_alone=self.config.sharding != "replicated")
        model.train()
        freeze_linears(model)
        set_recompute(model, self.config.activation_checkpointing)
        attention.set_backend(model, self.group.device, self.dtype)
        self.backbone.make_blocks_leaves(model)
        return model

    def _inject(self, model: torch.nn.Module, names: list[str], row_squares: Mapping[str, torch.Tensor]) -> None:
        self.adapted: AdaptedLinears = inject(model, names, self.config.adapter, row_squares, self.config.seed)

    def _table(self, adapted: list[str]) -> ModulationTable | None:
        """What takes the place of the modulation layers, unless the adapter changes them."""
        if not self.config.tabulate_modulation:
            return None
        if not self.backbone.can_tabulate:
            log.info("modulation is not tabulated: in %s it depends on the text too", self.folder.title)
            return None
        if changed := [name for name in adapted if is_tabled(name)]:
            log.info("modulation is not tabulated, for the adapter changes it: %s", changed[0])
            return None
        steps = self.config.monitor.denoise_steps
        sampling = flow.sampling_sigmas(steps, self.shift, self.noise_schedule)
        sigmas, samples = torch.cat([self.grid, sampling]), self.config.micro_batch_size
        return table_for(self.folder, sigmas, self.dtype, samples, self.group.device, self.base_digest)

    def parameter_sets(self) -> dict[str, dict[str, torch.nn.Parameter]]:
        """One set: the adapter."""
        return {ADAPTER_SET: self.adapted.parameters}

    def sets_of_step(self, step: int) -> frozenset[str]:
        """Every step trains the adapter."""
        return frozenset({ADAPTER_SET})

    def after_step(self) -> None:
        """Let every adapted linear compute its norms anew, once."""
        self.adapted.advance()
        self._num_updates += 1

    def describe(self) -> dict[str, float]:
        """How far magnitudes and directions have moved, per group of blocks; and how far ranks have grown.

        The rank of a layer is told when it has changed, and once in every attempt.

        Raises:
            RunError: If no magnitude has moved at all: what is called WDLoRA would then be a LoRA of fixed norms.
        """
        return movement_of(self.adapted, self._num_updates) | self._ranks()

    def images(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """See :meth:`LatentFlow.images`; and a map of the ranks, if they grow."""
        pictures = super().images(model)
        if self.growth and self.group.ranks.is_first:
            pictures["lora_rank/map"] = torch.from_numpy(RankMap.of(self.growth.active).picture())
        return pictures

    def _ranks(self) -> dict[str, float]:
        """Figures on ranks that grow."""
        if self.growth is None:
            return {}
        active, ratios = self.growth.active, list(self.growth.ratios().values())
        changed = {name: rank for name, rank in active.items() if self._told_ranks.get(name) != rank}
        self._told_ranks = active
        return {
            "lora_ranks/mean": sum(active.values()) / len(active),
            "lora_ranks/max": max(active.values()),
            "lora_ranks/total": sum(active.values()),
            **({"lora_ranks/fisher_ratio": sum(ratios) / len(ratios)} if ratios else {}),
            **{f"lora_rank/{name}": rank for name, rank in changed.items()},
        }

    def _velocity(
        self, model: torch.nn.Module, batch: Batch, latents_BSC: torch.Tensor, sigma_B: torch.Tensor
    ) -> torch.Tensor:
        device = self.group.device
        return self.backbone.velocity(
            model,
            latents_BSC.to(device, self.dtype),
            self._conditions_BSC(batch).to(device, self.dtype),
            {name: batch[name].to(device, self.dtype) for name in self.backbone.text},
            sigma_B.to("cpu" if self._is_tabled else device),  # the host looks into the table, and never waits
            self.token_hw,
        )

    def _conditions_BSC(self, batch: Batch) -> torch.Tensor:
        """Packed latents of all condition images of the samples, one image after the other: here of the mask alone."""
        return flow.pack_latents(batch["mask_latents"])


def movement_of(adapted: AdaptedLinears, num_updates: int, name: str = "") -> dict[str, float]:
    """Figures on how far an adapter has moved, see :meth:`AdaptedLinears.movement`; of one of several, with its name.

    Raises:
        RunError: If no magnitude has moved at all in more than a few updates.
    """
    if num_updates >= MIN_UPDATES_TO_JUDGE and adapted.has_frozen_magnitudes():
        one = f"one magnitude of {name}" if name else "one magnitude"
        raise RunError(
            f"not {one} has moved in {num_updates} updates: they are smaller than its last bit",
            "raise optim.lr, or train kind: lora, which has no magnitude",
        )
    return {f"moved/{name}": value for name, value in adapted.movement().items()}
