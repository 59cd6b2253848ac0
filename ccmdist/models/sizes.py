"""Sizes of the Qwen-Image-Edit stack that `model make` writes: the same classes, from a laptop's to the published.

What a size does not name is the default of the class, which for transformer and VAE is the published model's.
The published VL encoder is Qwen2.5-VL-7B. The small sizes are ours.
"""

from dataclasses import dataclass, field
from typing import Any, Final

from ccmdist.models.template import Version

NF4_BYTES: Final = 4 / 8 + 1 / 64 + 4 / (64 * 256)
"""Of a weight in NF4: four bits, an 8-bit scale for 64, and a 32-bit scale for 256 of those scales (bitsandbytes)."""


@dataclass(frozen=True)
class Size:
    """Configurations of the parts of a model folder.

    Attributes:
        transformer: Arguments of QwenImageTransformer2DModel.
        text: Of the language part of Qwen2.5-VL. Without a vocabulary size it has that of our tokenizer.
        vision: Of its vision part.
        vae: Arguments of AutoencoderKLQwenImage.
        max_pixels: To which the processor scales an image down; a square of 28 x 28 px makes one token.
        bytes_per_file: Weight files are split at this size.
    """

    transformer: dict[str, Any]
    text: dict[str, Any]
    vision: dict[str, Any]
    vae: dict[str, Any] = field(default_factory=dict)
    max_pixels: int = 28 * 28 * 16384
    bytes_per_file: int = 1 << 30


FULL_TEXT: Final = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "mrope_section": [16, 24, 24],
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128000,
}
FULL_VISION: Final = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
TINY_TEXT: Final = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mrope_section": [2, 3, 3],
    "max_position_embeddings": 4096,
}
TINY_VISION: Final = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [1],
}
TINY_TRANSFORMER: Final = {
    "num_layers": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "joint_attention_dim": 64,
    "axes_dims_rope": (8, 28, 28),
}
TINY_VAE: Final = {
    "base_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}

SIZES: Final[dict[str, Size]] = {
    # 16 image tokens per mask, and no file above 1.9 MB, so that fitted weights can lie in the repository.
    "tiny": Size(TINY_TRANSFORMER, TINY_TEXT, TINY_VISION, TINY_VAE, 28 * 28 * 16, 1_800_000),
    "small": Size(
        TINY_TRANSFORMER | {"num_layers": 8, "num_attention_heads": 6},
        TINY_TEXT,
        TINY_VISION,
        TINY_VAE | {"base_dim": 32},
        28 * 28 * 64,
    ),
    "full-width-2-blocks": Size(
        {"num_layers": 2},
        FULL_TEXT | {"num_hidden_layers": 2},
        FULL_VISION | {"depth": 2, "fullatt_block_indexes": [1]},
    ),
    "full": Size({}, FULL_TEXT | {"vocab_size": 152064}, FULL_VISION),
}

PIPELINES: Final[dict[Version, str]] = {
    "v1": "QwenImageEditPipeline",
    "2509": "QwenImageEditPlusPipeline",
    "2511": "QwenImageEditPlusPipeline",
}
"""The pipeline class that each version of Qwen-Image-Edit names in its model_index.json."""

NOISE_SCHEDULE: Final = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
"""The published scheduler config, with the constants that independent ports of Qwen-Image-Edit (mflux) use."""
