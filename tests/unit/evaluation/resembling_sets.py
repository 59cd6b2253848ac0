"""Sets that resemble phantoms more and less, and settings that compare them."""

from dataclasses import replace

import numpy as np

from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.config.loading import load


def provenance(triple, digest, adapter="a" * 64):
    return {
        "source_key": triple.key,
        "source_set_digest": digest,
        "mask_sha256": "0" * 64,
        "seed": 3,
        "adapter_digest": adapter,
        "base_digest": "b" * 64,
        "denoise_steps": 12,
        "guidance_scale": 2.0,
        "plan_digest": "c" * 64,
        "batch": 0,
    }


def drawn(triple, image, about):
    meta = replace(triple.meta, source="synthetic", labels={}, provenance=about)
    image = np.clip(image, 0, 255).round().astype(np.uint8)
    return "test", replace(triple, key=f"{triple.key}-000", image=image, meta=meta)


def config_of(root, out, *more):
    overrides = [
        f"real={root / 'real'}",
        f"synthetic.close={root / 'close'}",
        f"synthetic.far={root / 'far'}",
        f"out={out}",
        *(f"minimum.{name}_images=10" for name in ("frechet", "kernel", "neighbour")),
    ]
    return load(EvaluateConfig, [], [*overrides, "num_bootstrap=200", "num_grid_images=4", *more])
