"""What draws: a protocol, and what all that draw have in common."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ccmdist.diffusion.seeding import generator
from ccmdist.errors import RunError
from ccmdist.synthesis.requests import Request


class Sampler(Protocol):
    """A model, loaded, and how the requests of a batch go through it."""

    def draw(self, requests: Sequence[Request]) -> NDArray[np.uint8]:
        """Grey images, uint8 (B, H, W), of the requests of one batch.

        Raises:
            RunError: If an image is not finite; names the request.
        """
        ...


def noise_of(seed: int, request: Request, shape: Sequence[int], denoise_step: int | None = None) -> Tensor:
    """The same for a request whatever batch it is in, and whoever draws it: sets can be compared in pairs.

    Args:
        seed: Of the plan.
        request: What is drawn.
        shape: Of the noise.
        denoise_step: Where it is added anew; None for the noise that drawing begins with.
    """
    place = (request.objective, request.source_key, request.image_number)
    return torch.randn(*shape, generator=generator(seed, *place, *(() if denoise_step is None else (denoise_step,))))


def refuse_non_finite(drawn: Tensor, requests: Sequence[Request], remedy: str) -> None:
    """Check that what was drawn for each request is finite; its first dimension is that of the requests.

    Raises:
        RunError: If something is not; names the first request.
    """
    finite = drawn.isfinite().flatten(1).all(dim=1).tolist()
    if bad := [request.key for request, is_finite in zip(requests, finite, strict=True) if not is_finite]:
        raise RunError(f"{len(bad)} of {len(requests)} images of a batch are not finite (first: {bad[0]})", remedy)
