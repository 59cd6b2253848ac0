"""The only source of randomness in training and synthesis: a generator for a place, never a generator's history."""

import hashlib

import torch

MAX_SKIPPED = 1 << 16


def generator(seed: int, *position: int | str) -> torch.Generator:
    """A CPU generator that depends on the seed and the position alone, on every machine.

    A sample drawn here is the same whichever rank, worker or restart draws it, and on CPU and GPU alike.

    Args:
        seed: Seed of the run.
        position: What the randomness is for, such as ``("train", 17)``.
    """
    text = "/".join([str(seed), *(f"{type(part).__name__}:{part}" for part in position)])
    return generator_of_bits(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big"))


def generator_of_bits(bits: int) -> torch.Generator:
    """A CPU generator that depends on the lowest 48 of ``bits``."""
    source = torch.Generator().manual_seed(bits % (1 << 32))
    # PyTorch's CPU generator looks at 32 bits of a seed only: among 100 000 places, two would draw the same noise.
    torch.empty((bits >> 32) % MAX_SKIPPED, dtype=torch.uint8).random_(generator=source)
    return source
