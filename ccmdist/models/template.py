"""What is said to the vision-language encoder around a prompt; imports no torch.

The words, the number of dropped tokens and the sizes are those of diffusers' QwenImageEditPipeline (v1) and
QwenImageEditPlusPipeline (2509, 2511), with which Qwen-Image-Edit was trained.
"""

from typing import Final, Literal

from ccmdist.commit import digest_of

Version = Literal["v1", "2509", "2511"]
"""Of Qwen-Image-Edit."""

EDIT_SYSTEM: Final = (
    "<|im_start|>system\n"
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then "
    "explain how the user's text instruction should alter or modify the image. Generate a new image that meets "
    "the user's requirements while maintaining consistency with the original input where appropriate.<|im_end|>\n"
    "<|im_start|>user\n"
)
IMAGE: Final = "<|vision_start|><|image_pad|><|vision_end|>"
PICTURE: Final = "Picture 1: "
END: Final = "<|im_end|>\n<|im_start|>assistant\n"

NUM_DROPPED_TOKENS: Final = 64
"""Tokens of EDIT_SYSTEM, which the MMDiT never sees."""

CONDITION_EDGE_PX: Final = {"v1": 1024, "2509": 384, "2511": 384}
"""Edge of the square whose area the encoder's copy of the mask image is scaled to."""

KANDINSKY_BEFORE: Final = (
    "<|im_start|>system\nYou are a prompt engineer. Based on the provided source image (first image) and target image "
    "(second image), create an interesting text prompt that can be used together with the source image to create the "
    "target image:<|im_end|><|im_start|>user"
)
KANDINSKY_AFTER: Final = f"{IMAGE}<|im_end|>"
"""Around the prompt, in diffusers' Kandinsky5I2IPipeline."""
KANDINSKY_NUM_DROPPED_TOKENS: Final = 54
"""What that pipeline drops: five more than come before the prompt, so its first words are not seen."""

ENCODER_CALL_VERSION: Final = 1
"""Raised when our call of the encoder changes what it returns; part of every cache's fingerprint."""


def encoder_text(prompt: str, version: Version) -> str:
    """The whole text given to the encoder for one prompt with one image."""
    picture = "" if version == "v1" else PICTURE
    return f"{EDIT_SYSTEM}{picture}{IMAGE}{prompt}{END}"


def template_digest(version: Version) -> str:
    """Identity of everything here that decides an embedding."""
    text, edge_px = encoder_text("", version), CONDITION_EDGE_PX[version]
    return digest_of([text, NUM_DROPPED_TOKENS, edge_px, ENCODER_CALL_VERSION])
