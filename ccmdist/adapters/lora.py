"""Plain LoRA with the same ownership as WDLoRA: W' = W + s B A, the baseline without weight decomposition.

Shapes: x (..., in); T tokens, O out, R lora_rank, I in.

Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccmdist.adapters.frozen import frozen_product
from ccmdist.adapters.kept import is_on_tape
from ccmdist.adapters.wdlora import adapter_dtype, initial_down


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank addition; equals its base bit for bit at the start."""

    def __init__(self, base: nn.Linear, lora_rank: int, scale: float, name: str, seed: int) -> None:
        """Take over the base's parameters without looking at them; arguments as of WDLoRALinear."""
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scale = scale
        device, dtype = base.weight.device, adapter_dtype(base)
        self.lora_A = nn.Parameter(initial_down(lora_rank, base.in_features, name, seed).to(device, dtype))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, lora_rank, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """The product x W'^T + bias, in the dtype of ``x``."""
        x_TI = x.reshape(-1, x.shape[-1])
        h_TR = F.linear(x_TI, self.lora_A.to(x.dtype))
        y_TO = frozen_product(x_TI, self.weight, self.bias)
        add = torch.addmm if is_on_tape() else Tensor.addmm_
        return add(y_TO, h_TR, self.lora_B.to(x.dtype).T, alpha=self.scale).view(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.in_features}, {self.out_features}, lora_rank={self.lora_A.shape[0]}, scale={self.scale:g}"
