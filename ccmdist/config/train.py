"""Settings of a training run. What other values imply (world size, accumulation) is not a field."""

from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import Discriminator, Field, SerializerFunctionWrapHandler, Tag, model_serializer, model_validator

from ccmdist.config.data import DataSettings
from ccmdist.config.objectives.adapters import EditSettings
from ccmdist.config.objectives.choice import ObjectiveSettings, objective_kind
from ccmdist.config.objectives.objective import NetworkKind
from ccmdist.config.settings import Settings, free
from ccmdist.errors import ConfigError

QUANTIZED: Final = ("nf4", "int8")
"""Forms of the base that are not cut over ranks."""
OF_EDIT: Final = ("adapter", "base", "activation_checkpointing", "tabulate_modulation")
"""Fields that mean nothing where there is no frozen model; null, as a YAML file may say, is not set."""


class GrowthSettings(Settings):
    """Ranks that grow, layer by layer, where the Fisher information says that one more would help (SeLoRA)."""

    start_rank: int = Field(1, ge=1, le=1024)
    """Of every layer. `adapter.lora_rank` is then the largest that a layer may reach."""
    fisher_ratio: float = Field(1.3, gt=1)
    """Of a layer with one more rank over the layer as it is, at which it grows: lambda in the paper. The default and
    that of every_steps are those of the authors' released code."""
    every_steps: int = Field(40, ge=1)
    """Optimizer steps between two tests, over which the ratio is averaged: t in the paper."""
    rank_budget: int | None = Field(None, ge=1)
    """Ranks of all layers together; the largest ratios get what is left. None: as many as `lora_rank` lets. Ours."""

    def check_budget(self, num_linears: int) -> None:
        """Refuse a budget that does not suffice for the ranks with which the adapted linears start.

        Raises:
            ConfigError: With both numbers.
        """
        needed = num_linears * self.start_rank
        if self.rank_budget is not None and self.rank_budget < needed:
            raise ConfigError(
                f"adapter.growth.rank_budget: {self.rank_budget} ranks do not suffice for {num_linears} adapted "
                f"linears of start_rank {self.start_rank}",
                f"set adapter.growth.rank_budget to more than {needed}, or name fewer adapter.targets",
            )


class LowRankSettings(Settings):
    """What low-rank adapters of both kinds have in common."""

    lora_rank: int = Field(16, ge=1, le=1024)
    alpha: float | None = Field(None, gt=0)
    """Scale s = alpha / lora_rank; by default alpha = lora_rank, so s = 1. Where ranks grow, s = alpha / start_rank
    and stays as it is. Ours, not the paper's."""
    targets: tuple[str, ...] = ("attn", "mlp")
    """Which linears of every block: the groups "attn" and "mlp", or suffixes of module names such as "attn.to_q"."""
    growth: GrowthSettings | None = None
    """Let ranks grow: with kind lora SeLoRA, with kind wdlora the same with weight decomposition."""

    @property
    def scale(self) -> float:
        """s, by which B A is multiplied."""
        return (self.alpha or self._scaled_rank) / self._scaled_rank

    def alpha_of(self, lora_rank: int) -> float:
        """Alpha of a layer of this rank, as PEFT and ComfyUI name it: s times the rank."""
        return (self.alpha or self._scaled_rank) * (lora_rank / self._scaled_rank)

    @property
    def _scaled_rank(self) -> int:
        """The rank that `alpha` is meant for."""
        return self.growth.start_rank if self.growth else self.lora_rank

    @model_validator(mode="after")
    def _ranks_can_grow(self) -> Self:
        if self.growth and self.growth.start_rank >= self.lora_rank:
            raise ValueError(
                f"growth.start_rank {self.growth.start_rank} must be below lora_rank {self.lora_rank}, the largest "
                "rank that a layer may reach"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_growth_where_there_is_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Written as before ranks could grow, and so with the same digest, unless they do."""
        values: dict[str, Any] = handler(self)
        return {name: value for name, value in values.items() if name != "growth" or value is not None}


class WDLoRASettings(LowRankSettings):
    """Weight-decomposed low-rank adaptation: W' = m (W + s BA) / ||W + s BA||."""

    kind: Literal["wdlora"] = "wdlora"


class LoRASettings(LowRankSettings):
    """Plain low-rank adaptation: W' = W + s BA."""

    kind: Literal["lora"] = "lora"


def _adapter_kind(values: Any) -> str:
    """WDLoRA unless another kind is named, so that `adapter.lora_rank=8` alone is enough."""
    kind = values.get("kind", "wdlora") if isinstance(values, dict) else getattr(values, "kind", "wdlora")
    return str(kind)


AdapterSettings = Annotated[
    Annotated[WDLoRASettings, Tag("wdlora")] | Annotated[LoRASettings, Tag("lora")], Discriminator(_adapter_kind)
]


def system_of(settings: AdapterSettings) -> str:
    """What an adapter is called: its kind or, where ranks grow, "selora" or "se-wdlora"."""
    return {"lora": "selora", "wdlora": "se-wdlora"}[settings.kind] if settings.growth else settings.kind


class OptimSettings(Settings):
    """AdamW with warm-up and cosine decay."""

    kind: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps the two moments in 8 bits (bitsandbytes): a quarter of their memory, and small deviations."""
    lr: float = Field(1e-4, gt=0, le=1)
    min_lr_fraction: float = Field(0.0, ge=0, le=1)
    """Learning rate at the end, as a fraction of `lr`."""
    warmup_steps: int = Field(100, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay per step of an exponential moving average of the adapter, which is then what is exported."""


class CheckpointSettings(Settings):
    """When state is committed and how much of it is kept."""

    every_steps: int = free(200, ge=1)
    keep: int = free(3, ge=2)
    """Newest checkpoints that are kept; never fewer than two."""
    max_failed_saves: int = free(3, ge=1)
    """Failed saves in a row after which the run stops."""


class ValidationSettings(Settings):
    """Held-out loss at fixed noise levels, so that curves of different runs can be compared."""

    every_steps: int = free(100, ge=1)
    num_samples: int = free(16, ge=1)
    """Samples of the val split that are used; all ranks share them."""
    sigmas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Noise levels in (0, 1), snapped to the training grid."""


class MonitorSettings(Settings):
    """What is written to the log and to TensorBoard, and how often."""

    log_every_steps: int = free(10, ge=1)
    images_every_steps: int = free(200, ge=0)
    """Optimizer steps between two grids of sampled images; 0 for none."""
    num_images: int = free(4, ge=1, le=64)
    denoise_steps: int = free(8, ge=2)


class TimeoutSettings(Settings):
    """How long a rank may stay in one place before it counts as hung: it says so, names who is waited for, and ends."""

    setup_min: float = free(60.0, gt=0)
    """Of loading and restoring, and of all in the first step, where kernels are built."""
    step_min: float = free(15.0, gt=0)
    """Of a step, of reading its data, and of what lies between steps."""
    validation_min: float = free(30.0, gt=0)
    """Of held-out losses and sampled images."""
    checkpoint_min: float = free(20.0, gt=0)
    meet_min: float = free(10.0, gt=0)
    """Within which all ranks must have come together."""
    answer_s: float = free(20.0, gt=0)
    """Seconds that other ranks have to answer when one hangs."""

    @property
    def collective_min(self) -> float:
        """Minutes after which a collective fails by itself: more than all others, so that a hang is first explained."""
        return max(self.setup_min, self.step_min, self.validation_min, self.checkpoint_min) + 1 + self.answer_s / 20


class TrainConfig(Settings):
    """`ccmdist train`: fine-tune an adapter on cached embeddings and latents, or train a baseline from scratch."""

    run: Path
    """Folder of the run: checkpoints, TensorBoard events, adapter, resolved config."""
    data: DataSettings
    objective: ObjectiveSettings = EditSettings()
    """What is learnt. Fields of an adapter and its base are those of `edit` alone."""
    adapter: AdapterSettings = WDLoRASettings()
    optim: OptimSettings = OptimSettings()
    num_steps: int = Field(1000, ge=1, le=10_000_000)
    global_batch_size: int = Field(16, ge=1)
    """Samples per optimizer step, over all ranks and accumulation."""
    micro_batch_size: int = Field(1, ge=1)
    """Samples per forward pass of one rank. They have one text length, so nothing is padded."""
    balance: Literal["natural", "clinical_groups"] = "natural"
    """Draw samples as often as they occur, or every clinical group equally often."""
    shuffle_window: int = Field(4096, ge=1)
    """Samples over which the order is shuffled within an epoch's order of shards; small windows read locally."""
    sigma_sampling: Literal["logit_normal", "uniform"] = "logit_normal"
    base: Literal["bf16", "fp32", "nf4", "int8"] = "bf16"
    """How the frozen weights are held. Activations are fp32 beside fp32, else bf16; the adapter is always fp32.
    nf4 and int8 are kept whole on every rank (sharding: replicated); nf4 needs bitsandbytes."""
    sharding: Literal["auto", "zero3", "zero3_hpz", "replicated"] = free("auto")
    """Where the frozen weights lie: cut over all ranks, cut over the ranks of each node (zero3_hpz), or whole on every
    rank. auto: the fastest that fits, by the rules of `ccmdist model plan`; zero3 on CPUs."""
    activation_checkpointing: Literal["full", "selective", "none"] = free("full")
    """What is computed again in the backward pass instead of being kept: every block, all but its matrix products
    and attention, or nothing. Costs time or memory, never changes a result."""
    tabulate_modulation: bool = free(True)
    """Replace the modulation layers, a third of all weights, by a table over the noise levels that the run uses."""
    seed: int = Field(0, ge=0)
    checkpoint: CheckpointSettings = CheckpointSettings()
    validation: ValidationSettings = ValidationSettings()
    monitor: MonitorSettings = MonitorSettings()
    max_nonfinite_in_a_row: int = free(5, ge=1)
    """Steps in a row with a non-finite loss after which the run stops and names the samples."""
    processes: int = free(1, ge=1, le=64)
    """Local processes to start when no cluster has started any; each is one rank."""
    num_loader_workers: int = free(0, ge=0, le=64)
    timeouts: TimeoutSettings = TimeoutSettings()
    forced_exit_s: float = free(240.0, gt=0)
    """Seconds after a stop signal at which a process that still hangs in a collective ends itself."""

    @property
    def is_quantized(self) -> bool:
        """Whether the frozen weights are held in 4 or 8 bits."""
        return self.base in QUANTIZED

    @model_validator(mode="before")
    @classmethod
    def _nothing_of_edit_is_set_for_others(cls, values: Any) -> Any:
        """Refuse what would be ignored; so a file that sets an adapter can be followed by one that sets it to null."""
        kind = objective_kind(values.get("objective")) if isinstance(values, dict) else "edit"
        if kind not in get_args(NetworkKind):
            return values
        given = [name for name in OF_EDIT if values.get(name) is not None]
        if given:
            raise ValueError(
                f"{', '.join(given)}: objective.kind {kind} adapts no frozen model; leave out, or set to null"
            )
        return {name: value for name, value in values.items() if name not in OF_EDIT}

    @model_serializer(mode="wrap")
    def _what_applies(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What applies. Settings of `edit` are written as before there were other objectives: so are their digests."""
        values: dict[str, Any] = handler(self)
        silent = OF_EDIT if self.objective.trains == "network" else ("objective",) * (self.objective.kind == "edit")
        return {name: value for name, value in values.items() if name not in silent}

    @model_validator(mode="after")
    def _settings_fit_the_objective(self) -> Self:
        kind = self.objective.kind
        if self.objective.trains == "network" and self.sharding not in ("auto", "zero3"):
            raise ValueError(
                f"sharding: {self.sharding}, but objective.kind {kind} adapts no frozen model; set it to auto"
            )
        if self.objective.sees == "pixels" and self.data.structure != "mask":
            raise ValueError(
                f"data.structure: {self.data.structure}, but objective.kind {kind} sees the masks themselves; leave out"
            )
        self.objective.refuse_size(self.data.image_size_px)
        are_set = self.sigma_sampling != "logit_normal" or self.validation.sigmas != ValidationSettings().sigmas
        if are_set and not self.objective.has_noise_levels:
            raise ValueError(f"sigma_sampling, validation.sigmas: objective.kind {kind} has no noise levels; leave out")
        return self

    @model_validator(mode="after")
    def _growth_can_be_carried_out(self) -> Self:
        if self.objective.trains != "adapter" or self.adapter.growth is None:
            return self
        if self.objective.kind == "dual":
            raise ValueError("adapter.growth: ranks of objective.kind dual do not grow; leave out, or train edit")
        if self.optim.kind == "adamw8bit":
            raise ValueError(
                "adapter.growth: a new rank counts its own steps, which optim.kind adamw8bit cannot; set adamw"
            )
        return self

    @model_validator(mode="after")
    def _holes_are_cached(self) -> Self:
        if self.objective.kind != "dual" or self.data.holes is not None:
            return self
        if "completion" in self.objective.adapters:
            raise ValueError(
                "data.holes: objective.adapters has completion, which needs images with holes in the cache; set "
                "data.holes, for precompute too"
            )
        if self.objective.layout_weight:
            raise ValueError(
                f"objective.layout_weight: {self.objective.layout_weight:g} needs the layout, which is cached where "
                "data.holes is set; set data.holes, for precompute too, or layout_weight=0"
            )
        return self

    @model_validator(mode="after")
    def _prompts_are_those_of_the_masks(self) -> Self:
        if self.data.prompts != "given":
            raise ValueError(
                f"data.prompts: {self.data.prompts} is a control of synthesis; training wants the given prompts"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} must be a multiple of "
                f"micro_batch_size {self.micro_batch_size}"
            )
        if self.is_quantized and self.sharding in ("zero3", "zero3_hpz"):
            raise ValueError(
                f"base {self.base} cannot be cut over ranks (sharding: {self.sharding}): DeepSpeed's partitions lose "
                "the scales of quantised weights; set sharding=replicated, or base=bf16"
            )
        if any(not 0 < sigma < 1 for sigma in self.validation.sigmas):
            raise ValueError(f"validation.sigmas {list(self.validation.sigmas)} must lie between 0 and 1")
        return self
