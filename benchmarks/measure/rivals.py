"""Other ways to give ranks to layers, beside those of the product: AdaLoRA as PEFT has it, and DyLoRA.

Both learn what `EditObjective` learns: the same samples in the same order, with the same noise.
"""

from collections.abc import Mapping
from typing import Final

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraModel
from torch import Tensor, nn

from ccmdist.adapters.frozen import frozen_product
from ccmdist.adapters.injection import AdaptedLinears
from ccmdist.adapters.lora import LoRALinear
from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.config.train import TrainConfig
from ccmdist.diffusion.seeding import generator
from ccmdist.models import attention
from ccmdist.train.objectives.edit import EditObjective
from ccmdist.train.objectives.objective import Batch

NAME: Final = "default"
"""Of the adapter in PEFT."""
START_OVER_TARGET: Final = 1.5
"""Rank at the start by that at the end, as in most runs of the AdaLoRA paper and PEFT's own default (12 by 8)."""
FIRST, LAST, EVERY = 0.1, 0.3, 5
"""Share of the steps before ranks are taken away and after it, and steps between two times. Ours."""


class AdaLoRA(EditObjective):
    """Singular values that matter least are taken away, on a falling budget, until ranks are `lora_rank` on average.

    PEFT's own layers and allocator, with its defaults where there are no steps in them: weight of the orthogonal
    regulariser 0.5, both moving averages 0.85, normal A and B of SD 0.02. Its allocator reads gradients off the
    parameters, where DeepSpeed leaves none.

    Source: Zhang et al. 2023 (arXiv:2303.10512).
    """

    def adapt(
        self, model: QwenImageTransformer2DModel, names: list[str], row_squares: Mapping[str, Tensor]
    ) -> nn.Module:
        """See :meth:`EditObjective.adapt`."""
        target, num_steps = self.config.adapter.lora_rank, self.config.num_steps
        start = round(START_OVER_TARGET * target)
        settings = AdaLoraConfig(
            init_r=start,
            target_r=target,
            lora_alpha=start,  # is divided by the rank at the start: s = 1, as that of the others
            target_modules=names,
            tinit=round(FIRST * num_steps),
            tfinal=round(LAST * num_steps),
            deltaT=EVERY,
            total_step=num_steps,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.tuner = AdaLoraModel(model.requires_grad_(False), settings, NAME)
        attention.set_backend(model, self.group.device, self.dtype)
        return model.train()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """That of the flow, and what keeps singular vectors orthogonal: PEFT adds it only to outputs with a loss."""
        apart = [parameter for name, parameter in self.tuner.named_parameters() if "lora_A" in name or "lora_B" in name]
        products = [p @ p.T if p.shape[0] < p.shape[1] else p.T @ p for p in apart]
        distances = [torch.linalg.norm(product - torch.eye(len(product))) for product in products]
        weight = self.tuner.peft_config[NAME].orth_reg_weight
        return super().loss(model, batch) + weight * torch.stack(distances).mean()

    def after_step(self) -> None:
        """Nothing is computed once per step."""

    def allocate(self, step: int) -> None:
        """Take ranks away after optimizer step ``step``, while its gradients are there."""
        self.tuner.update_and_allocate(step)

    def in_use(self) -> tuple[int, dict[str, int]]:
        """Parameters of the ranks that were kept, and linear -> its rank."""
        pattern: dict[str, list[bool]] = self.tuner.peft_config[NAME].rank_pattern
        ranks = {name.split(".lora_E")[0]: sum(is_kept) for name, is_kept in pattern.items()}
        layers = {name: self.tuner.model.get_submodule(name) for name in ranks}
        size = sum((layers[name].in_features + layers[name].out_features + 1) * rank for name, rank in ranks.items())
        return size, ranks


class DrawnRank:
    """The rank of the step that is under way, shared by all layers; None where all of it is used."""

    def __init__(self) -> None:
        self.of_step: int | None = None


class NestedLinear(LoRALinear):
    """Uses its first b ranks alone, scaled by r / b: as if its rank were b with the same alpha."""

    drawn: DrawnRank

    def forward(self, x: Tensor) -> Tensor:
        """See :class:`LoRALinear`."""
        rank = len(self.lora_A)
        b = self.drawn.of_step or rank
        y = frozen_product(x, self.weight, self.bias)
        return y + self.scale * rank / b * F.linear(F.linear(x, self.lora_A[:b]), self.lora_B[:, :b])


class DyLoRA(EditObjective):
    """LoRA of which every step uses and trains the first b ranks alone, b being drawn between 1 and `lora_rank`.

    The variant whose ranks below b are trained too. It is measured with all of its ranks.

    Source: Valipour et al. 2022 (arXiv:2210.07558), scaled as in the authors' code.
    """

    def __init__(self, config: TrainConfig, group: ProcessGroup) -> None:
        """See :class:`EditObjective`."""
        super().__init__(config, group)
        self.drawn = DrawnRank()

    def adapt(
        self, model: QwenImageTransformer2DModel, names: list[str], row_squares: Mapping[str, Tensor]
    ) -> nn.Module:
        """See :meth:`EditObjective.adapt`."""
        adapted = super().adapt(model, names, row_squares)
        modules: AdaptedLinears = self.adapted
        for module in modules.modules.values():
            module.__class__, module.drawn = NestedLinear, self.drawn
        return adapted

    def sets_of_step(self, step: int) -> frozenset[str]:
        """The adapter, as always, of which the step uses a part."""
        source = generator(self.config.seed, "ranks", step)
        self.drawn.of_step = int(torch.randint(1, self.config.adapter.lora_rank + 1, (), generator=source))
        return super().sets_of_step(step)

    def after_step(self) -> None:
        """Use all ranks until the next step begins."""
        super().after_step()
        self.drawn.of_step = None
