"""The Qwen2-VL processor without its video branch, which would need torchvision.

The same image code (PIL) runs whether torchvision is installed or not, so cached embeddings do not depend on it.
"""

from pathlib import Path
from typing import Any

from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil, Qwen2VLProcessor
from transformers.processing_utils import ProcessorMixin


class ImageTextProcessor(Qwen2VLProcessor):
    """Images and text to inputs of the encoder. Stock diffusers takes an instance as ``processor=``."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **_: Any) -> None:
        self.image_token = getattr(tokenizer, "image_token", "<|image_pad|>")
        self.video_token = getattr(tokenizer, "video_token", "<|video_pad|>")
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def make_processor(tokenizer: Qwen2Tokenizer, max_pixels: int) -> ImageTextProcessor:
    """A processor that scales images down to at most ``max_pixels``."""
    return ImageTextProcessor(Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=max_pixels), tokenizer)


def load_processor(path: Path, component: str = "processor") -> ImageTextProcessor:
    """The processor of the model folder at ``path``, ours or downloaded; nothing is fetched.

    Args:
        path: The folder.
        component: Where in it the processor of images lies.
    """
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(str(path / component), local_files_only=True)
    tokenizer = Qwen2Tokenizer.from_pretrained(str(path / "tokenizer"), local_files_only=True)
    return ImageTextProcessor(image_processor, tokenizer)
