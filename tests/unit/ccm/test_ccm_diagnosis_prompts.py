"""The diagnosis prompt says nothing of what is asked for, and those who diagnose never look at any other prompt."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import ccmdist
from ccmdist.ccm.diagnosis_prompts import all_diagnosis_prompts, diagnosis_prompt
from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.errors import ShardError

TELLING = (
    "diabet neuropath dpn positive negative possible control healthy patient disease normal abnormal type t1 group "
    "condition diagnos loss damage"
)
SOURCES = Path(ccmdist.__file__).parent
WHO_DIAGNOSE = [
    *("train/objectives/diagnose.py", "train/objectives/pixel_samples.py", "train/mdf_network.py"),
    "ccm/diagnosis_prompts.py",
    *("models/mdf_mllm.py", "models/mllm.py", "models/fusion.py"),
    *(f"evaluation/downstream/{name}.py" for name in ("networks", "training", "examples", "looks", "cells")),
]


def test_no_function_here_can_be_told_a_group():
    for function in (diagnosis_prompt, all_diagnosis_prompts):
        assert set(inspect.signature(function).parameters) <= {"fields"}
    with pytest.raises(ShardError, match="diagnosis prompt: field 'clinical_group' is not a known code"):
        diagnosis_prompt({"clinical_group": "T1DPN"})


@pytest.mark.parametrize("text", all_diagnosis_prompts())
def test_no_prompt_holds_a_group_or_a_word_that_tells_one(text):
    assert not [group for group in CLINICAL_GROUPS if group.lower() in text.lower()]
    assert not [word for word in TELLING.split() if re.search(rf"\b{word}", text.lower())]


def test_there_is_a_prompt_of_every_choice_of_codes_and_they_differ():
    found = all_diagnosis_prompts()
    assert len(set(found)) == len(found) == 3 * 2 * 3
    assert diagnosis_prompt({}) in found
    assert diagnosis_prompt({"region": "central", "eye": "OD"}) in found
    with pytest.raises(ShardError, match="diagnosis prompt: field eye 'left' is not a known code"):
        diagnosis_prompt({"eye": "left"})


@pytest.mark.parametrize("name", WHO_DIAGNOSE)
def test_who_diagnose_never_look_at_the_prompt_of_a_sample_or_at_that_of_synthesis(name):
    tree = ast.parse((SOURCES / name).read_text())
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.Attribute) and node.attr in ("prompt", "prompt_for")), ast.unparse(node)
        if isinstance(node, ast.ImportFrom):
            assert not {"prompt", "prompt_for", "NEGATIVE_PROMPT"} & {alias.name for alias in node.names}, name
        if isinstance(node, ast.Constant):
            assert node.value != "prompt", name
