"""Prompts to embeddings by a clinical text encoder: any BERT or CLIP text model in transformers layout, frozen.

As the stock pipelines of diffusers do it: texts are padded to the length that the tokenizer states, the U-Net sees the
padding, and encoders that want to know what is padding (`use_attention_mask` in their config) are told.

Shape suffixes: B samples, L text tokens, D text width.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertModel, BertTokenizer
from transformers.utils import logging

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.ccm.prompts import FIELD_WORDS, prompt
from ccmdist.errors import ConfigError, ModelError

CLASSES: Final = {
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "distilbert": "DistilBertModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}
"""`model_type` of a config -> the class of transformers that reads it."""
MASKED: Final = ("bert", "roberta", "distilbert")
"""Read texts both ways, and so must be told what is padding; CLIP reads from left to right."""
POOLER: Final = "pooler."
"""Weights that many checkpoints lack and that nothing here reads."""
MAX_KNOWN: Final = 128
"""Texts of which embeddings are remembered: more than our wording has, and T5 takes 4 MB for each."""
TINY_LENGTH: Final = 48
TINY: Final = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
REMEDY: Final = (
    "name a local folder of a BERT or CLIP text model with its tokenizer, as `hf download REPOSITORY --local-dir "
    "FOLDER` leaves it"
)


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder and the tokenizer that belongs to it.

    Attributes:
        model: Of transformers, frozen.
        tokenizer: Its `model_max_length` is the length of every encoded text.
    """

    sees_pictures: ClassVar[bool] = False
    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, encoder: Path, tokenizer: Path, dtype: torch.dtype, device: torch.device | str) -> "TextEncoder":
        """The text encoder in two folders; nothing is fetched.

        Raises:
            ModelError: If a file is missing, the model is of another kind, or weights do not fit the config. Those that
                are missing transformers would draw at random.
        """
        for folder in (encoder, tokenizer):
            if not folder.is_dir():
                raise ModelError(f"{folder}: there is no such folder", REMEDY)
        logging.disable_progress_bar()
        _refuse_pickle(encoder)
        try:
            kind = AutoConfig.from_pretrained(str(encoder), local_files_only=True).model_type
            if kind not in CLASSES:
                raise ModelError(f"{encoder}: is a model of type {kind}, expected {', '.join(CLASSES)}", REMEDY)
            model, loading = getattr(transformers, CLASSES[kind]).from_pretrained(
                str(encoder),
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            read = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ModelError(f"{encoder}: cannot be read ({str(error).splitlines()[0]})", REMEDY) from None
        missing = [name for name in map(str, loading["missing_keys"]) if not name.startswith(POOLER)]
        for problem, names in (("missing", missing), ("mismatched", list(map(str, loading["mismatched_keys"])))):
            if names:
                raise ModelError(f"{encoder}: {problem} weights, such as {min(names)}", REMEDY)
        for name, parameter in model.named_parameters():
            if name in loading["missing_keys"]:
                torch.nn.init.zeros_(parameter)  # equal in every process, which a random draw is not
        model.config.use_attention_mask = kind in MASKED
        return cls(model.to(device).eval().requires_grad_(False), read)

    @property
    def num_tokens(self) -> int:
        """L, the length of every encoded text, padding included."""
        return int(self.tokenizer.model_max_length)

    def limited(self, max_tokens: int) -> "TextEncoder":
        """The same, for texts of at most so many tokens, and of no more than it has positions for."""
        config = self.model.config
        positions = getattr(config, "max_position_embeddings", max_tokens)
        positions -= config.pad_token_id + 1 if config.model_type == "roberta" else 0  # it counts from there on
        self.tokenizer.model_max_length = min(max_tokens, positions, self.num_tokens)
        return self

    def encode(self, prompts: list[str], pictures: list[np.ndarray]) -> list[Tensor]:
        """Embeddings of each prompt, shape (L, D) each, padded as the U-Net is to see them.

        Args:
            prompts: One per sample.
            pictures: Of each; not looked at, for no text encoder sees images.

        Raises:
            ConfigError: If a prompt is longer than the encoder takes.
        """
        return [self._remembered(text) for text in prompts]

    def pooled(self, prompts: list[str]) -> list[Tensor | None]:
        """Nothing: this model has no second text encoder."""
        return [None] * len(prompts)

    def refuse_longer(self, prompts: Iterable[str]) -> None:
        """Check that no prompt would be cut.

        Raises:
            ConfigError: If one is longer than the encoder takes.
        """
        for text in prompts:
            if (count := len(self.tokenizer(text, verbose=False)["input_ids"])) > self.num_tokens:
                name = type(self.model).__name__
                raise ConfigError(
                    f"the prompt {text[:40]!r}... has {count} tokens, the text encoder ({name}) takes "
                    f"{self.num_tokens}",
                    "train msdm_vae with a larger objective.max_text_tokens, or with a text encoder that takes more",
                )

    @cached_property
    def _remembered(self) -> Callable[[str], Tensor]:
        return lru_cache(MAX_KNOWN)(self._embeddings_LD)

    @torch.no_grad()
    def _embeddings_LD(self, text: str) -> Tensor:
        """Of one prompt by itself, so that they do not depend on a batch."""
        self.refuse_longer([text])
        given = self.tokenizer([text], padding="max_length", max_length=self.num_tokens, return_tensors="pt")
        given = given.to(next(self.model.parameters()).device)
        is_told = getattr(self.model.config, "use_attention_mask", False)
        states_1LD: Tensor = self.model(
            given["input_ids"], attention_mask=given["attention_mask"] if is_told else None
        )[0]
        return states_1LD[0]


def _refuse_pickle(folder: Path) -> None:
    """Refuse weights that only code can read, as many published BERTs have them.

    Raises:
        ModelError: If there are no others.
    """
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if pickles and not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder}: has its weights as {pickles[0].name} alone, a pickle, and pickles are not read",
            f"""once convert them to safetensors: python -c "from transformers import AutoModel as A; """
            f"""A.from_pretrained('{folder}').save_pretrained('{folder}')\"""",
        )


def chosen_text_encoder(folder: Path | None, max_tokens: int) -> TextEncoder:
    """The text encoder of a local folder, with its tokenizer beside the weights; or a tiny one, for trials.

    Raises:
        ModelError: If there is none that can be used.
    """
    if folder is None:
        return tiny_text_encoder().limited(max_tokens)
    return TextEncoder.load(folder, folder, torch.float32, "cpu").limited(max_tokens)


def tiny_text_encoder() -> TextEncoder:
    """A BERT of two layers with random weights, the same everywhere; its vocabulary has every word of our prompts."""
    tokenizer = tiny_tokenizer()
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=TINY_LENGTH, **TINY)
    config.use_attention_mask = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TextEncoder(BertModel(config).eval().requires_grad_(False), tokenizer)


def tiny_tokenizer() -> BertTokenizer:
    """Of whole words for our prompts, of single characters for all else in ASCII; made without a download."""
    texts = [prompt(group, {}) for group in (None, *CLINICAL_GROUPS)]
    texts += [words for codes in FIELD_WORDS.values() for words in codes.values()]
    found = {word for text in texts for word in re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower())}
    characters = {chr(code) for code in range(33, 127)}
    pieces = sorted(found | characters | {f"##{one}" for one in characters})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)}, model_max_length=TINY_LENGTH)
