from itertools import product

import pytest

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.ccm.prompts import FIELD_WORDS, NEGATIVE_PROMPT, longest_prompts, prompt
from ccmdist.errors import ShardError


def test_the_wording_is_fixed():
    assert prompt("T1NoDPN", {"eye": "OS"}) == (
        "Turn this nerve mask into a corneal confocal microscopy image with every nerve where the mask shows it: "
        "type 1 diabetes positive, peripheral neuropathy negative, eye OS."
    )
    assert NEGATIVE_PROMPT == " "


@pytest.mark.parametrize("fields", [{}, {"eye": "OD", "region": "inferior_whorl"}])
def test_groups_and_the_neutral_prompt_differ_but_have_equal_numbers_of_words_and_characters(fields):
    prompts = [prompt(clinical_group, fields) for clinical_group in (*CLINICAL_GROUPS, None)]
    assert len(set(prompts)) == 4
    assert len({len(text) for text in prompts}) == 1
    assert len({len(text.split()) for text in prompts}) == 1


def test_the_neutral_prompt_takes_no_side():
    assert "positive" not in prompt(None, {})
    assert "negative" not in prompt(None, {})


def test_every_code_gives_its_own_prompt():
    combinations = list(product(*[[None, *codes] for codes in FIELD_WORDS.values()]))
    prompts = {
        prompt("Control", {name: code for name, code in zip(FIELD_WORDS, codes, strict=True) if code})
        for codes in combinations
    }
    assert len(prompts) == len(combinations) == 18


def test_codes_of_one_field_have_prompts_of_equal_length():
    for name, codes in FIELD_WORDS.items():
        assert len({len(prompt("Control", {name: code})) for code in codes}) == 1


def test_the_order_of_the_fields_does_not_matter():
    assert prompt("T1DPN", {"eye": "OD", "layer": "subbasal"}) == prompt("T1DPN", {"layer": "subbasal", "eye": "OD"})


@pytest.mark.parametrize(
    ("clinical_group", "fields", "message"),
    [
        (
            "T1DNP",
            {},
            "prompt: clinical_group 'T1DNP' is not a known code; did you mean 'T1DPN'? known: Control, ",
        ),
        ("Control", {"eye": "od"}, "prompt: field eye 'od' is not a known code; did you mean 'OD'? known: OD, OS"),
        ("Control", {"eye": ""}, "prompt: field eye '' is not a known code; known: OD, OS"),
        ("Control", {"eye": "OD. Ms X"}, "prompt: field eye 'OD. Ms X' is not a known code; "),
        ("Control", {"regoin": "central"}, "prompt: field 'regoin' is not a known code; did you mean 'region'? "),
        ("Control", {"notes": "numb feet"}, "prompt: field 'notes' is not a known code; "),
        ("Control", {"{eye}": "OD"}, "prompt: field '{eye}' is not a known code; "),
    ],
)
def test_nothing_but_closed_codes_gets_into_a_prompt(clinical_group, fields, message):
    with pytest.raises(ShardError) as error:
        prompt(clinical_group, fields)
    assert str(error.value).startswith(message)


def test_no_prompt_is_longer_than_the_longest_ones():
    longest = longest_prompts()
    assert len({len(text) for text in longest}) == 1
    fields = [dict(zip(FIELD_WORDS, codes, strict=True)) for codes in product(*FIELD_WORDS.values())]
    assert max(len(prompt(group, known)) for group in (*CLINICAL_GROUPS, None) for known in fields) == len(longest[0])
