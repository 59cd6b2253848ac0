"""A byte-level BPE of the real tokenizer class, trained in memory on the templates and prompts of this package.

Its merges make one token of every word of the templates, so the prefix that the pipelines drop takes exactly as
many tokens as with the published tokenizer.
"""

import json
import re
from typing import Final

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.ccm.prompts import FIELD_WORDS, prompt
from ccmdist.models.template import EDIT_SYSTEM, END, PICTURE

SPECIAL_TOKENS: Final = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""As in Qwen2.5-VL."""


def make_tokenizer(*more: str) -> Qwen2Tokenizer:
    """The small tokenizer, which also knows the words of ``more``; the same on every call."""
    model = _trained_bpe(more)
    vocabulary = model["vocab"]
    vocabulary |= {token: len(vocabulary) + index for index, token in enumerate(SPECIAL_TOKENS)}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[tuple(merge) for merge in model["merges"]],
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=4096,
    )


def _trained_bpe(more: tuple[str, ...]) -> dict:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4000, min_frequency=1, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(_texts(more), trainer)
    return json.loads(tokenizer.to_str())["model"]


def _texts(more: tuple[str, ...]) -> list[str]:
    """What is said to the encoder, without the special tokens, which are no words."""
    prompts = [prompt(group, {}) for group in (None, *CLINICAL_GROUPS)]
    fields = [f", {words}" for codes in FIELD_WORDS.values() for words in codes.values()]
    special = "|".join(re.escape(token) for token in SPECIAL_TOKENS)
    texts = (EDIT_SYSTEM, PICTURE, END, *prompts, *fields, *more)
    return [part for text in texts for part in re.split(special, text) if part]
