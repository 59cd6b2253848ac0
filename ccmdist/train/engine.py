"""DeepSpeed ZeRO-3 around a model: forward, backward, step, and the trainable state as slices of each rank.

* The DeepSpeed configuration is derived here from ours; there is no second file.
* ``bf16.enabled`` is never set: it would round the fp32 adapter to bf16 in the forward, where a magnitude never moves.
* The trainable state is world-size free: every parameter is a flat fp32 vector of which each rank holds a slice.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch

from ccmdist.adapters.growth import Piece, RankGrowth
from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.config.train import TrainConfig
from ccmdist.console import log
from ccmdist.planner.memory import LIVE_BLOCKS, REDUCE_BUCKET
from ccmdist.train.optim import MOMENTS, GrowingAdamW, optimizer, update_average
from ccmdist.train.sharding import forget_node_copies


@dataclass(frozen=True)
class LocalParameter:
    """This rank's slice of one trainable parameter and of what the optimizer knows of it.

    Attributes:
        shape: Shape of the whole parameter.
        start: Where the slice begins in the flattened parameter.
        values: "weight", "exp_avg", "exp_avg_sq" and, if there is one, "average": 1-D fp32 tensors of equal length
            that share memory with the optimizer's state if that is fp32.
    """

    shape: tuple[int, ...]
    start: int
    values: dict[str, torch.Tensor]


NAMED: Final = 4
"""Layers that have grown which a line of the log names."""

# (parameter name, quantity, start, stop) -> that stretch of the flattened quantity
ReadStretch = Callable[[str, str, int, int], torch.Tensor]


def zero_config(config: TrainConfig, world_size: int, ranks_per_node: int | None = None) -> dict[str, Any]:
    """The DeepSpeed configuration that ``config`` implies.

    Args:
        config: Settings of the run, its sharding decided.
        world_size: Number of ranks.
        ranks_per_node: How many of them share a node, for zero3_hpz.
    """
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.global_batch_size // (config.micro_batch_size * world_size),
        "gradient_clipping": config.optim.max_grad_norm,
        "zero_optimization": {
            "stage": 3,
            # Else PyTorch's own linear is replaced in the whole process, by one that costs the host more.
            "memory_efficient_linear": False,
            # By size nothing persists; the adapter does by name, see Engine.
            "stage3_param_persistence_threshold": 0,
            "zero_hpz_partition_size": (ranks_per_node or 1) if config.sharding == "zero3_hpz" else 1,
            # Allocated whole, in fp32: DeepSpeed's own 5e8 would take 2 GB of every GPU, more than most adapters do.
            "reduce_bucket_size": REDUCE_BUCKET,
            # One flat tensor per parameter set, however large: its Adam state is found by the set's name.
            "sub_group_size": 10**15,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class Engine:
    """A model under ZeRO-3 with the optimizer of its named parameter sets."""

    def __init__(
        self,
        model: torch.nn.Module,
        parameter_sets: dict[str, dict[str, torch.nn.Parameter]],
        config: TrainConfig,
        group: ProcessGroup,
        growth: RankGrowth | None = None,
        cut_sets: frozenset[str] = frozenset(),
    ) -> None:
        """Partition ``model`` over the ranks. Collective.

        Args:
            model: Possibly built under zero.Init; only the parameters in the sets are trained.
            parameter_sets: Name of set -> parameter name -> parameter.
            config: Settings of the run.
            group: The ranks.
            growth: What decides of the lora_ranks of the one set there is, if they grow.
            cut_sets: Sets that are gathered module by module in each pass, for whole they would not fit. The others
                are whole on every rank, gathered once per optimizer step. One set at least is among these.
        """
        import deepspeed

        self.parameter_sets, self._group, self._growth, self._cut_sets = parameter_sets, group, growth, cut_sets
        sets = {name: list(parameters.values()) for name, parameters in parameter_sets.items()}
        self.optimizer = optimizer(sets, config.optim, grows=growth is not None)
        self.module, self._zero, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            config=_gathering_one_block_ahead(
                zero_config(config, group.ranks.world_size, group.ranks_per_node), model, self._persistent()
            ),
        )
        for flat in self._flat_by_set().values():
            self.optimizer.begin(flat)
        self._places = self._places_in_flats()
        if growth is not None:
            ((_, flat),) = self._flat_by_set().items()
            growth.place({name: place.piece for name, place in self._places.items()}, flat)
            assert isinstance(self.optimizer, GrowingAdamW)
            self.optimizer.set_births(flat, growth.born)
        self._ema_decay = config.optim.ema_decay
        self._averages = self._started_averages()
        self._let_adapter_persist()

    @property
    def local(self) -> dict[str, LocalParameter]:
        """This rank's slices: views of the optimizer's state, or copies where it holds it in 8 bits."""
        return self._slices(self._quantities())

    def begin_step(self, active_sets: frozenset[str], lr: float) -> None:
        """Let the optimizer step that begins train these parameter sets, and no other, with this learning rate.

        The others get no gradients, so they have no part in the norm by which gradients are clipped.
        """
        self.optimizer.active = active_sets
        self.optimizer.set_lr(lr)
        for name, parameters in self.parameter_sets.items():
            for parameter in parameters.values():
                parameter.requires_grad_(name in active_sets)

    def backward(self, loss_: torch.Tensor) -> None:
        """Accumulate gradients of ``loss_``, divided by the number of accumulations. Collective."""
        self.module.backward(loss_)

    def step(self) -> float:
        """End one micro-step; at the last of an optimizer step clip, update, and return the gradient norm, else 0.

        Collective. Every micro-step ends with this call. When the norm of all ranks' gradients is not finite,
        no rank updates anything and the norm is infinite.
        """
        if not self.is_last_accumulation:
            self.module.step()
            return 0.0  # without asking the device for anything
        # DeepSpeed takes norm and update from this buffer, which holds the averages over all micro-steps and ranks.
        squares = self._growth.look(self._zero.grad_partitions_flat_buffer) if self._growth else None
        self.module.step()
        self._gather_adapter()  # a step without an update, for a norm that is not finite, leaves it cut
        found = self.module.get_global_grad_norm()
        norm = float(found) if found is not None else 0.0
        if squares is not None and math.isfinite(norm):
            self._grow(squares)
        return norm

    @property
    def is_last_accumulation(self) -> bool:
        """Whether the next :meth:`step` updates the parameters."""
        return self.module.is_gradient_accumulation_boundary()

    def update_average(self) -> None:
        """Let the moving averages of the sets that were trained follow their parameters by one step."""
        if self._ema_decay is not None:
            flats = self._flat_by_set()
            moved = [name for name in self._averages if self._places[name].set_name in self.optimizer.active]
            weights = [self._places[name].of(flats) for name in moved]
            update_average([self._averages[name] for name in moved], weights, self._ema_decay)

    def adam_steps(self) -> dict[str, int]:
        """How often each parameter set has been updated."""
        return {name: int(self.optimizer.state[flat]["step"]) for name, flat in self._flat_by_set().items()}

    @torch.no_grad()
    def load(self, read: ReadStretch, adam_steps: dict[str, int]) -> None:
        """Take over a state that any number of ranks has written; every rank reads its own stretches. Collective."""
        quantities = self._quantities()
        slices = self._slices(quantities)
        for name, parameter in self._named_parameters():
            local = slices[name]
            for quantity, values in local.values.items():
                values.copy_(read(name, quantity, local.start, local.start + len(values)))
            # Copies must agree: what forward gathers, the fp32 master, and the moments.
            parameter.ds_tensor.data[: len(local.values["weight"])].copy_(local.values["weight"])
            parameter.partition()  # what was gathered before is out of date
        # Outside of blocks DeepSpeed lets go what persists until it has traced a forward, and gathers it from these.
        forget_node_copies(parameter for _, parameter in self._named_parameters())
        self._gather_adapter()
        for name, flat in self._flat_by_set().items():
            self.optimizer.set_moments(flat, {moment: quantities[moment][name] for moment in MOMENTS})
            self.optimizer.state[flat]["step"].fill_(float(adam_steps[name]))

    def _grow(self, squares: torch.Tensor) -> None:
        """Count a step that was taken among those that decide which ranks grow; let them if it is time. Collective."""
        assert self._growth is not None
        self._growth.add(squares, self._group.total)
        (num_steps,) = self.adam_steps().values()
        if grown := self._growth.grow(num_steps):
            named = ", ".join(f"{name} (ratio {ratio:.2f})" for name, ratio in list(grown.items())[:NAMED])
            more = f" and {len(grown) - NAMED} more" if len(grown) > NAMED else ""
            total = sum(self._growth.active.values())
            spent = "; rank_budget is used up" if total == self._growth.settings.rank_budget else ""
            log.info("one rank more, %d in all, after %d updates: %s%s%s", total, num_steps, named, more, spent)

    def _let_adapter_persist(self) -> None:
        """Gather what is trained once per optimizer step, instead of twice per block and micro-step. Collective."""
        for parameter in self._persistent():
            parameter.ds_persist = True
            self._zero.persistent_parameters.append(parameter)
        for block in _blocks(self.module):
            _walk_once(block)
        self._gather_adapter()

    def _gather_adapter(self) -> None:
        """Have what is trained whole on every rank; nothing to do where it is. Collective."""
        persistent = self._zero.persistent_parameters
        persistent[0].all_gather(persistent)

    def _named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [item for parameters in self.parameter_sets.values() for item in parameters.items()]

    def _persistent(self) -> list[torch.nn.Parameter]:
        """What is trained, and whole on every rank."""
        sets = self.parameter_sets.items()
        return [p for name, parameters in sets if name not in self._cut_sets for p in parameters.values()]

    def _flat_by_set(self) -> dict[str, torch.Tensor]:
        flats = self._zero.fp32_partitioned_groups_flat
        ids = [self._zero.sub_group_to_group_id[i] for i in range(len(flats))]
        assert len(set(ids)) == len(ids), "DeepSpeed has split a parameter set"
        return {self.optimizer.param_groups[group]["name"]: flat for group, flat in zip(ids, flats, strict=True)}

    def _quantities(self) -> dict[str, dict[str, torch.Tensor]]:
        """Quantity -> name of set -> flat fp32 tensor."""
        flats = self._flat_by_set()
        moments = {name: self.optimizer.moments(flat) for name, flat in flats.items()}
        return {"weight": flats} | {moment: {name: of[moment] for name, of in moments.items()} for moment in MOMENTS}

    def _slices(self, quantities: dict[str, dict[str, torch.Tensor]]) -> dict[str, LocalParameter]:
        """Views into flat quantities, and the averages."""
        slices = {}
        for name, place in self._places.items():
            values = {quantity: place.of(flats) for quantity, flats in quantities.items()}
            if name in self._averages:
                values["average"] = self._averages[name]
            slices[name] = LocalParameter(place.piece.shape, place.piece.start, values)
        return slices

    def _places_in_flats(self) -> dict[str, "_Place"]:
        from deepspeed.utils import safe_get_local_fp32_param

        places = {}
        for set_name, parameters in self.parameter_sets.items():
            first = self._flat_by_set()[set_name].storage_offset()
            for name, parameter in parameters.items():
                length, rank = parameter.ds_tensor.ds_numel, parameter.ds_zero_partition_rank
                start = min(rank * length, parameter.ds_numel)
                count = min(start + length, parameter.ds_numel) - start  # the last slices are padded
                offset = safe_get_local_fp32_param(parameter).storage_offset() - first
                places[name] = _Place(set_name, Piece(offset, count, start, tuple(parameter.ds_shape)))
        return places

    def _started_averages(self) -> dict[str, torch.Tensor]:
        """Moving averages as they begin; none if the settings want none."""
        flats = self._flat_by_set()
        return {} if self._ema_decay is None else {n: place.of(flats).clone() for n, place in self._places.items()}


@dataclass(frozen=True)
class _Place:
    """Where this rank's slice of a parameter lies in the flat tensors of its set."""

    set_name: str
    piece: Piece

    def of(self, flats: dict[str, torch.Tensor]) -> torch.Tensor:
        """The slice."""
        return self.piece.of(flats[self.set_name].detach())


def _gathering_one_block_ahead(
    zero_config: dict[str, Any], model: torch.nn.Module, persistent: Iterable[torch.nn.Parameter]
) -> dict[str, Any]:
    """The configuration with which a block is gathered while the one before computes, and freed when it has computed.

    DeepSpeed's default prefetches the seventh part of a block of the 20 B model, and waits for the rest.
    """
    always_there = set(map(id, persistent))
    # Where there are no blocks, a module is gathered for what it owns itself: a bound of the model would keep it whole.
    gathered = [block.parameters() for block in _blocks(model)]
    gathered = gathered or [module.parameters(recurse=False) for module in model.modules()]
    largest = max(
        sum(getattr(p, "ds_numel", p.numel()) for p in together if id(p) not in always_there) for together in gathered
    )
    ahead = {
        "stage3_prefetch_bucket_size": max(largest, 1),
        "stage3_max_reuse_distance": max(largest, 1),
        # Without a bound every hook, those of layers around the blocks too, would fetch one more.
        "stage3_max_live_parameters": LIVE_BLOCKS * max(largest, 1),
    }
    return zero_config | {"zero_optimization": zero_config["zero_optimization"] | ahead}


def _blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules whose weights are gathered together."""
    from deepspeed.utils import get_z3_leaf_modules

    return get_z3_leaf_modules(model)


def _walk_once(block: torch.nn.Module) -> None:
    """Let DeepSpeed's hooks see a list of the frozen parameters of a block; they walk its modules in every pass.

    What is trained is always there, so the hooks need not ask for it.
    """
    frozen = tuple((name, parameter) for name, parameter in block.named_parameters() if not parameter.requires_grad)
    block.__dict__["named_parameters"] = lambda prefix="", recurse=True, remove_duplicate=True: iter(frozen)


def quiet_libraries() -> None:
    """Keep DeepSpeed's banners and torch's notices about DeepSpeed's calls out of the log."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed|torch.distributed")
    warnings.filterwarnings("ignore", category=UserWarning, module="deepspeed|torch")
