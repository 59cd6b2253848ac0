"""Mask and prompt to image: an adapter on the frozen MMDiT, trained by rectified flow on cached latents.

Shape suffixes: B samples, S packed latent tokens, C channels, L text tokens, D text width, h w latent rows and columns.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ccmdist.adapters.frozen import freeze_linears
from ccmdist.adapters.injection import AdaptedLinears, RowSquares, inject, row_squares_of
from ccmdist.cluster.preemption import ignore_stop_signals
from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.config.data import PX_PER_TOKEN
from ccmdist.config.train import TrainConfig
from ccmdist.console import log
from ccmdist.data.latent_cache import CacheEntry, LatentCache
from ccmdist.data.order import Order
from ccmdist.data.stream import SampleStream, batches
from ccmdist.diffusion import flow
from ccmdist.diffusion.sampler import sample
from ccmdist.diffusion.seeding import generator
from ccmdist.errors import RunError
from ccmdist.models import attention, mmdit
from ccmdist.models.encoders import LatentCodec
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.modulation_table import ModulationTable, is_tabled
from ccmdist.models.quantized import build_quantized
from ccmdist.models.staging import staged
from ccmdist.models.tabulation import table_for
from ccmdist.train.flat_blocks import flatten_blocks
from ccmdist.train.objectives.objective import Batch
from ccmdist.train.recompute import set_recompute
from ccmdist.train.sharding import forget_node_copies, hide_frozen_weights

ADAPTER_SET = "adapter"
MIN_UPDATES_TO_JUDGE = 10
"""Updates after which a magnitude that has not moved at all counts as frozen."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "nf4": torch.bfloat16, "int8": torch.bfloat16}
"""Of activations, beside each form of the base."""


class EditObjective:
    """Learns ``noise - x`` on the target tokens, given the mask's latents and the cached prompt embeddings."""

    def __init__(self, config: TrainConfig, group: ProcessGroup) -> None:
        """Open the cache and plan the order; no weights are read yet.

        Raises:
            CacheError: If the cache is missing or was made for something else.
            ConfigError: If there are too few samples, or the batch does not divide over the ranks.
        """
        self.config, self.group = config, group
        self.folder = ModelFolder.open(config.data.model)
        self.cache = LatentCache.open(config.data, self.folder.encoder_identity())
        self.entries = self.cache.entries("train")
        self.order = Order(self.entries, config.seed, config.micro_batch_size, config.balance, config.shuffle_window)
        self.order.cells_of_step(0, config.global_batch_size, group.ranks.global_rank, group.ranks.world_size)
        self.base_digest = self.folder.transformer_digest()
        self.data_digest = self.cache.digest
        self.token_hw = 2 * (config.data.image_size_px // PX_PER_TOKEN,)
        self.latent_hw = (2 * self.token_hw[0], 2 * self.token_hw[1])
        self.noise_schedule = self.folder.noise_schedule()
        self.shift = flow.resolution_shift(self.token_hw[0] * self.token_hw[1], self.noise_schedule)
        self.grid = flow.training_sigmas(self.shift)
        self.dtype = DTYPES[config.base]
        self._drawn: list[float] = []
        self._is_tabled = False
        self._num_updates = -1  # the first call of after_step only says that the state was loaded

    def build(self, zero_config: dict[str, Any]) -> torch.nn.Module:
        """The MMDiT with its base where ``sharding`` says and the adapter injected. Collective."""
        if self.config.data.stage_model:
            self.folder = staged(self.folder, self.base_digest)
        names = mmdit.linear_names(mmdit.skeleton(self.folder), self.config.adapter.targets)
        table = self._table(names)
        self._is_tabled = table is not None
        model, row_squares = self._base(names, table, zero_config)
        return self.adapt(model, names, row_squares)

    def _base(
        self, names: list[str], table: ModulationTable | None, zero_config: dict[str, Any]
    ) -> tuple[mmdit.QwenImageTransformer2DModel, Mapping[str, torch.Tensor]]:
        """The base in its form and place, and the squared norms of the linears called ``names``. Collective."""
        if self.config.is_quantized:
            model = build_quantized(self.folder, self.dtype, self.config.base, self.group.device, table)
            return model, row_squares_of(model, names)  # of the weights that the adapter computes with
        is_whole, squares = self.config.sharding == "replicated", RowSquares(names)
        partition_as = None if is_whole else zero_config
        model = mmdit.build(self.folder, self.dtype, partition_as, squares.on_rows, self.group.device, table)
        forget_node_copies(model.parameters())
        return model, squares.whole() if is_whole else squares.reduce()

    def adapt(
        self, model: mmdit.QwenImageTransformer2DModel, names: list[str], row_squares: Mapping[str, torch.Tensor]
    ) -> torch.nn.Module:
        """A model with its weights, made ready to be trained: frozen, with the adapter, computing as the settings say.

        Args:
            model: Changed in place.
            names: Linears that get an adapter.
            row_squares: Their squared norms, as :func:`ccmdist.adapters.injection.inject` takes them.
        """
        model.requires_grad_(False)
        if self.config.sharding != "replicated":
            flatten_blocks(model.transformer_blocks)
        self.adapted: AdaptedLinears = inject(model, names, self.config.adapter, row_squares, self.config.seed)
        hide_frozen_weights(model, vectors_alone=self.config.sharding != "replicated")
        model.train()
        freeze_linears(model)
        set_recompute(model, self.config.activation_checkpointing)
        attention.set_backend(model, self.group.device, self.dtype)
        mmdit.make_blocks_leaves(model)
        return model

    def _table(self, adapted: list[str]) -> ModulationTable | None:
        """What takes the place of the modulation layers, unless the adapter changes them."""
        if not self.config.tabulate_modulation:
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

    def batches(self, first_step: int) -> Iterable[Batch]:
        """This rank's micro-batches from ``first_step`` on."""
        ranks = self.group.ranks
        stream = SampleStream(
            self.cache,
            self.entries,
            self.order,
            self.config.global_batch_size,
            ranks.global_rank,
            ranks.world_size,
            first_step,
        )
        return batches(stream, self.config.num_loader_workers, ignore_stop_signals)

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Mean squared error of the predicted velocity over the target tokens of a micro-batch."""
        x_BSC = flow.pack_latents(batch["image_latents"].float())
        noise, sigmas = zip(*(self._draw(position, x_BSC.shape[1:]) for position in batch["positions"]), strict=True)
        self._drawn += [float(sigma) for sigma in sigmas]
        return self._flow_loss_B(model, batch, x_BSC, torch.stack(noise), torch.stack(sigmas)).mean()

    def after_step(self) -> None:
        """Let every adapted linear compute its norms anew, once."""
        self.adapted.advance()
        self._num_updates += 1

    def validate(self, model: torch.nn.Module) -> dict[str, float]:
        """Held-out loss at each fixed noise level and their mean; noise is fixed per sample. Collective."""
        entries = self._held_out(self.config.validation.num_samples)
        if not entries:
            return {}
        sigmas_Q = torch.stack([flow.nearest_on_grid(s, self.grid) for s in self.config.validation.sigmas])
        sums = [0.0] * len(sigmas_Q)
        # Every rank runs equally many forwards, for each of them is a collective; what is one too many weighs nothing.
        ranks = self.group.ranks
        for index in range(
            ranks.global_rank, -(-len(entries) // ranks.world_size) * ranks.world_size, ranks.world_size
        ):
            losses_Q = self._held_out_losses(model, entries[index % len(entries)], sigmas_Q)
            if index < len(entries):
                sums = [total + float(loss) for total, loss in zip(sums, losses_Q, strict=True)]
        losses = [total / len(entries) for total in self.group.total(sums)]
        named = {f"sigma_{s:g}": loss for s, loss in zip(self.config.validation.sigmas, losses, strict=True)}
        return {"mean": sum(losses) / len(losses)} | named

    def describe(self) -> dict[str, float]:
        """How far magnitudes and directions have moved, per group of blocks.

        Raises:
            RunError: If no magnitude has moved at all: what is called WDLoRA would then be a LoRA of fixed norms.
        """
        if self._num_updates >= MIN_UPDATES_TO_JUDGE and self.adapted.has_frozen_magnitudes():
            raise RunError(
                f"not one magnitude has moved in {self._num_updates} updates: they are smaller than its last bit",
                "raise optim.lr, or train kind: lora, which has no magnitude",
            )
        return {f"moved/{name}": value for name, value in self.adapted.movement().items()}

    def images(self, model: torch.nn.Module) -> torch.Tensor | None:
        """Rows of mask, real and sampled image for some held-out samples, on rank 0. Collective."""
        entries = self._held_out(self.config.monitor.num_images) or self.entries[: self.config.monitor.num_images]
        rows = []
        for entry in entries:
            batch = self._collated([entry])
            noise_BSC = torch.randn(
                (1, self.token_hw[0] * self.token_hw[1], 64),
                generator=generator(self.config.seed, "images", entry.key),
            )
            sigmas = flow.sampling_sigmas(self.config.monitor.denoise_steps, self.shift, self.noise_schedule)

            def velocity(
                latents_BSC: torch.Tensor, sigma_B: torch.Tensor, batch: Batch = batch
            ) -> tuple[torch.Tensor, ...]:
                return (self._velocity(model, batch, latents_BSC, sigma_B),)

            sampled = flow.unpack_latents(
                sample(velocity, noise_BSC.to(self.group.device), sigmas, 1.0), *self.latent_hw
            )
            rows.append((batch["mask_latents"], batch["image_latents"], sampled))
        return self._decoded_grid(rows) if self.group.ranks.is_first else None

    def first_batch_image(self) -> torch.Tensor:
        """Rows of mask, target and noisy target of the first samples of the run; local."""
        rows = []
        for position, index in enumerate(self.order.cell(0)[: self.config.monitor.num_images]):
            batch = self._collated([self.entries[index]])
            x_BSC = flow.pack_latents(batch["image_latents"].float())
            noise, sigma = self._draw(position, x_BSC.shape[1:])
            noisy = flow.interpolate(x_BSC, noise[None], sigma[None])
            rows.append((batch["mask_latents"], batch["image_latents"], flow.unpack_latents(noisy, *self.latent_hw)))
        return self._decoded_grid(rows)

    def drawn_sigmas(self) -> torch.Tensor:
        """Noise levels drawn by this rank since the last call."""
        drawn, self._drawn = self._drawn, []
        return torch.tensor(drawn)

    def _draw(self, position: int, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise and noise level of the sample at ``position`` of the run, whichever rank it falls to."""
        source = generator(self.config.seed, "train", position)
        sigma = flow.draw_sigma(self.config.sigma_sampling, self.grid, source)
        return torch.randn(shape, generator=source), sigma

    def _held_out_losses(self, model: torch.nn.Module, entry: CacheEntry, sigmas_Q: torch.Tensor) -> torch.Tensor:
        batch = self._collated([entry] * len(sigmas_Q))
        x_BSC = flow.pack_latents(batch["image_latents"].float())
        noise = torch.randn(x_BSC.shape[1:], generator=generator(self.config.seed, "held out", entry.key))
        return self._flow_loss_B(model, batch, x_BSC, noise.expand_as(x_BSC), sigmas_Q)

    def _flow_loss_B(
        self,
        model: torch.nn.Module,
        batch: Batch,
        x_BSC: torch.Tensor,
        noise_BSC: torch.Tensor,
        sigma_B: torch.Tensor,
    ) -> torch.Tensor:
        device = self.group.device
        x_BSC, noise_BSC = x_BSC.to(device), noise_BSC.to(device)
        predicted_BSC = self._velocity(model, batch, flow.interpolate(x_BSC, noise_BSC, sigma_B), sigma_B)
        return (predicted_BSC.float() - flow.velocity_target(x_BSC, noise_BSC)).square().mean(dim=(1, 2))

    def _velocity(
        self, model: torch.nn.Module, batch: Batch, latents_BSC: torch.Tensor, sigma_B: torch.Tensor
    ) -> torch.Tensor:
        device = self.group.device
        return mmdit.velocity(
            model,
            latents_BSC.to(device, self.dtype),
            flow.pack_latents(batch["mask_latents"]).to(device, self.dtype),
            batch["prompt_embeds"].to(device, self.dtype),
            sigma_B.to("cpu" if self._is_tabled else device),  # the host looks into the table, and never waits
            self.token_hw,
            self.token_hw,
        )

    def _held_out(self, count: int) -> Sequence[CacheEntry]:
        """Up to ``count`` samples of the val split, evenly spread over it."""
        entries = self.cache.entries("val")
        return tuple(entries[i * len(entries) // count] for i in range(count)) if len(entries) > count else entries

    def _collated(self, entries: list[CacheEntry]) -> Batch:
        samples = [self.cache.read(entry) for entry in entries]
        return {name: torch.stack([sample_[name] for sample_ in samples]) for name in samples[0]}

    def _decoded_grid(self, rows: Iterable[tuple[torch.Tensor, ...]]) -> torch.Tensor:
        """Decode latents row by row and set them in a grid, uint8 (H, W)."""
        codec = LatentCodec.load(self.folder, torch.float32, self.group.device)
        pictures = [[codec.decode(latents.float().to(self.group.device))[0] for latents in row] for row in rows]
        return torch.from_numpy(np.vstack([np.hstack(row) for row in pictures]))
