"""Images of a synthetic set, with all that an evaluation asks of their origin, as `ccmdist synthesize` leaves them."""

from dataclasses import replace

import numpy as np


def origin_of(triple, **more):
    """What an image drawn from the mask of ``triple`` says of its origin."""
    return {
        "source_key": triple.key,
        "source_set_digest": "d" * 64,
        "seed": 3,
        "adapter_digest": "a" * 64,
        "base_digest": "b" * 64,
        "denoise_steps": 12,
        "guidance_scale": 2.0,
    } | more


def drawn(triple, image, number=0, meta=None, **more):
    """The sample that was drawn from the mask of ``triple``, its grey values rounded and cut.

    Args:
        triple: Its source.
        image: Grey values.
        number: Of the images of this mask.
        meta: Changes of its fields.
        more: What else it says of its origin.
    """
    about = origin_of(triple, **more)
    changed = replace(triple.meta, source="synthetic", labels={}, provenance=about, **(meta or {}))
    pixels = np.ascontiguousarray(np.clip(image, 0, 255).round().astype(np.uint8))
    return replace(triple, key=f"{about['source_key']}-{number:04d}", image=pixels, meta=changed)
