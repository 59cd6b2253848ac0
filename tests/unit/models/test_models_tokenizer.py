"""The small tokenizer counts as the published one does where a pipeline counts tokens."""

import itertools
import json

import pytest

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.ccm.prompts import FIELD_WORDS, NEGATIVE_PROMPT, prompt
from ccmdist.models.template import EDIT_SYSTEM, NUM_DROPPED_TOKENS, encoder_text, template_digest
from ccmdist.models.tokenizer import SPECIAL_TOKENS, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def tokens(tokenizer, text):
    return tokenizer(text)["input_ids"]


def test_the_dropped_prefix_takes_exactly_64_tokens(tokenizer):
    assert NUM_DROPPED_TOKENS == 64
    assert len(tokens(tokenizer, EDIT_SYSTEM)) == 64


@pytest.mark.parametrize("version", ["v1", "2509", "2511"])
def test_the_prefix_ends_on_the_border_of_a_token_of_the_whole_text(tokenizer, version):
    whole = tokens(tokenizer, encoder_text(prompt("Control", {}), version))
    assert whole[:NUM_DROPPED_TOKENS] == tokens(tokenizer, EDIT_SYSTEM)


def test_prompts_of_all_groups_take_equally_many_tokens(tokenizer):
    choices = [[None, *codes] for codes in FIELD_WORDS.values()]
    for codes in itertools.product(*choices):
        fields = {name: code for name, code in zip(FIELD_WORDS, codes, strict=True) if code is not None}
        lengths = {len(tokens(tokenizer, prompt(group, fields))) for group in (None, *CLINICAL_GROUPS)}
        assert len(lengths) == 1, fields


def test_special_tokens_are_one_token_each_and_any_text_comes_back(tokenizer):
    for token in SPECIAL_TOKENS:
        assert tokens(tokenizer, token) == [tokenizer.convert_tokens_to_ids(token)]
    text = NEGATIVE_PROMPT + "corneal nerves, 0.4 \u00b5m \u89d2\u819c"
    assert tokenizer.decode(tokens(tokenizer, text)) == text


def test_every_call_makes_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "a")
    make_tokenizer().save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    assert len(json.loads((tmp_path / "a/tokenizer.json").read_text())["model"]["vocab"]) == len(tokenizer)


def test_versions_that_are_told_the_same_share_a_template_digest():
    v1, plus, newest = (template_digest(version) for version in ("v1", "2509", "2511"))
    assert plus == newest != v1
