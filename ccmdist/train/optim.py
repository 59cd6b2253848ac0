"""AdamW over named parameter sets, in 32 or 8 bits, and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ccmdist.config.train import OptimSettings
from ccmdist.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK = 256
"""Numbers that share a scale."""
ELEMENTS_AT_ONCE = 1 << 24
"""Which are updated together where each counts its own steps: what is computed on the way takes 0.3 GB."""


class SetwiseAdamW(torch.optim.AdamW):
    """AdamW whose step moves only the parameter sets named in ``active``.

    A set is a parameter group with the key "name". Sets that are not active stay bit for bit as they are:
    weights, moments, weight decay and step counters. Under DeepSpeed a zero gradient would still move them by
    their old moments.
    """

    def __init__(self, sets: dict[str, list[torch.nn.Parameter]], settings: OptimSettings) -> None:
        groups = [{"params": parameters, "name": name} for name, parameters in sets.items()]
        super().__init__(groups, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
        self.active: frozenset[str] = frozenset(sets)

    def begin(self, flat: torch.Tensor) -> None:
        """Make the state of a tensor that was never updated."""
        self.state[flat] = {"step": torch.tensor(0.0), **{moment: torch.zeros_like(flat) for moment in MOMENTS}}

    def moments(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The moments of a tensor by name, fp32, in its shape."""
        return {moment: self.state[flat][moment] for moment in MOMENTS}

    def set_moments(self, flat: torch.Tensor, moments: dict[str, torch.Tensor]) -> None:
        """Replace the moments of a tensor."""
        self.state[flat].update(moments)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the active sets."""
        resting = [group for group in self.param_groups if group["name"] not in self.active]
        held = [group["params"] for group in resting]
        for group in resting:
            group["params"] = []
        try:
            return self._update(closure)
        finally:
            for group, parameters in zip(resting, held, strict=True):
                group["params"] = parameters

    def _update(self, closure: Callable[[], Any] | None) -> Any:
        return super().step(closure)

    def set_lr(self, lr: float) -> None:
        """Use ``lr`` for all sets from now on."""
        for group in self.param_groups:
            group["lr"] = lr


class GrowingAdamW(SetwiseAdamW):
    """The same where elements become active at steps of their own, and each counts its own steps from there.

    A new element moves as under an AdamW that starts with it. With the steps of the others its moments would be taken
    for whole when they have hardly begun: with betas of 0.9 and 0.999 its first update would be three times too large.
    What is not active stays as it is; it must have no gradient.
    """

    def set_births(self, flat: torch.Tensor, births: torch.Tensor) -> None:
        """Say after which step each element of ``flat`` became active, int32; later changes of it are followed."""
        self.state[flat]["births"] = births

    @torch.no_grad()
    def _update(self, closure: Callable[[], Any] | None) -> Any:
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    state = self.state[flat]
                    state["step"] += 1
                    tensors = (flat, flat.grad, state["births"], *(state[moment] for moment in MOMENTS))
                    for parts in zip(*(tensor.split(ELEMENTS_AT_ONCE) for tensor in tensors), strict=True):
                        _update_by_own_steps(parts, int(state["step"]), group)


def _update_by_own_steps(parts: tuple[torch.Tensor, ...], step: int, group: dict[str, Any]) -> None:
    """AdamW as PyTorch has it, with a number of steps for each element.

    Args:
        parts: Values, gradient, births and both moments, 1-D; values and moments are changed in place.
        step: The number of this update, from 1.
        group: Settings.
    """
    values, gradient, births, first, second = parts
    beta1, beta2 = group["betas"]
    steps = step - births  # not positive where nothing is active: there moments are zero, whatever divides them
    if group["weight_decay"]:
        values.mul_((steps > 0).to(values.dtype).mul_(-group["lr"] * group["weight_decay"]).add_(1))
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    counts = steps.clamp_min_(1).to(values.dtype)
    divisor = second.sqrt().div_(_share_seen(counts, beta2).sqrt_()).add_(group["eps"])
    values.addcdiv_(first, divisor.mul_(_share_seen(counts, beta1)), value=-group["lr"])


def _share_seen(counts: torch.Tensor, beta: float) -> torch.Tensor:
    """1 - beta^counts: which share of a moment its first updates make up. Exact for few of them, too."""
    return (counts * (math.log(beta) if beta else -math.inf)).expm1_().neg_()


class SetwiseAdamW8bit(SetwiseAdamW):
    """The same with moments in 8 bits: codes of 256 values each, with one fp32 scale for every 256 numbers.

    The fp32 numbers that :meth:`moments` gives determine codes and scales, so a state that is stored as fp32 and
    taken up again with equal blocks is the same bit for bit. With other blocks, that is on other ranks, numbers are
    rounded once more.

    Source: Dettmers et al. 2021 (arXiv:2110.02861), sections 2 and 3, as bitsandbytes implements them.
    """

    def __init__(self, sets: dict[str, list[torch.nn.Parameter]], settings: OptimSettings) -> None:
        super().__init__(sets, settings)
        self._library = _bitsandbytes().functional
        signed, unsigned = (self._library.create_dynamic_map(signed=signed) for signed in (True, False))
        # bitsandbytes' own ends at -0.993: a largest number that is negative would shrink with every load.
        signed[0] = -1.0
        self._codes = {"exp_avg": signed, "exp_avg_sq": unsigned}

    def begin(self, flat: torch.Tensor) -> None:
        """Make the state of a tensor that was never updated."""
        self.state[flat] = {"step": torch.tensor(0.0)}
        self.set_moments(flat, {moment: torch.zeros_like(flat) for moment in MOMENTS})

    def moments(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The moments of a tensor by name, fp32, in its shape; copies."""
        state = self.state[flat]
        return {
            moment: self._library.dequantize_blockwise(
                state[moment], absmax=state[f"{moment}_scales"], code=self._code(moment, flat), blocksize=BLOCK
            )
            for moment in MOMENTS
        }

    def set_moments(self, flat: torch.Tensor, moments: dict[str, torch.Tensor]) -> None:
        """Replace the moments of a tensor by what 8 bits hold of them."""
        for moment, values in moments.items():
            codes, scales = in_8_bits(values, self._code(moment, flat))
            self.state[flat].update({moment: codes, f"{moment}_scales": scales})

    def _code(self, moment: str, flat: torch.Tensor) -> torch.Tensor:
        self._codes[moment] = self._codes[moment].to(flat.device)
        return self._codes[moment]

    @torch.no_grad()
    def _update(self, closure: Callable[[], Any] | None) -> Any:
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self._update_one(flat, group)

    def _update_one(self, flat: torch.Tensor, group: dict[str, Any]) -> None:
        if flat not in self.state:
            self.begin(flat)
        state = self.state[flat]
        state["step"] += 1
        (first, second), (beta1, beta2) = MOMENTS, group["betas"]
        self._library.optimizer_update_8bit_blockwise(
            "adam",
            flat.grad,
            flat.data,
            state[first],
            state[second],
            beta1,
            beta2,
            0.0,
            0.0,
            group["eps"],
            int(state["step"]),
            group["lr"],
            self._code(first, flat),
            self._code(second, flat),
            state[f"{first}_scales"],
            state[f"{second}_scales"],
            group["weight_decay"],
        )


def in_8_bits(values: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest codes of numbers, uint8, and the largest of each block, fp32.

    bitsandbytes' own function does not find the nearest near zero on a CPU, and a state would change with every load.

    Args:
        values: 1-D fp32.
        code: What the 256 codes stand for, ascending, in units of the largest of a block.
    """
    blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    between = (code[1:] + code[:-1]) / 2
    codes = torch.bucketize(blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None], between)
    return codes.to(torch.uint8).view(-1)[: len(values)].clone(), scales


def optimizer(sets: dict[str, list[torch.nn.Parameter]], settings: OptimSettings, grows: bool = False) -> SetwiseAdamW:
    """The optimizer that the settings name; one that counts steps by element if something grows.

    Raises:
        ConfigError: If it needs bitsandbytes, and that is not installed.
    """
    if grows:
        assert settings.kind == "adamw", "settings refuse the others"
        return GrowingAdamW(sets, settings)
    return (SetwiseAdamW8bit if settings.kind == "adamw8bit" else SetwiseAdamW)(sets, settings)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            f"optim.kind: adamw8bit needs bitsandbytes, which cannot be imported ({error})",
            'run `pip install "ccmdist[quant]"`, or set optim.kind=adamw',
        ) from None
    return bitsandbytes


def learning_rate(step: int, num_steps: int, settings: OptimSettings) -> float:
    """Learning rate of optimizer step ``step`` (from 0): linear warm-up, then a cosine down to the minimum.

    A pure function of its arguments, so a resumed run needs no state of a schedule.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(num_steps - settings.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return settings.lr * (settings.min_lr_fraction + (1 - settings.min_lr_fraction) * cosine)


@torch.no_grad()
def update_average(average: Iterable[torch.Tensor], current: Iterable[torch.Tensor], decay: float) -> None:
    """Move every average towards its current value: average = decay x average + (1 - decay) x current."""
    for mean, value in zip(average, current, strict=True):
        mean.lerp_(value, 1 - decay)
