"""What differs between frozen models stands in tables: no line of the package asks which of them it has."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

import ccmdist
from ccmdist.config.objectives.objective import ModelKind
from ccmdist.models import layout
from ccmdist.models.backbones.backbone import Backbone
from ccmdist.models.backbones.choice import BACKBONES, PROBES
from ccmdist.models.backbones.flux import FluxControl, FluxKontext
from ccmdist.models.backbones.kandinsky import Kandinsky
from ccmdist.models.backbones.qwen import Qwen
from ccmdist.models.encoder_choice import ENCODERS

PACKAGE = Path(ccmdist.__file__).parent
KINDS = set(get_args(ModelKind)) | set(layout.LAYOUTS)
CLASSES = {one.__name__ for one in (Backbone, Qwen, FluxKontext, FluxControl, Kandinsky)} | set(PROBES)
LAYOUT_NAMES = {name for name, value in vars(layout).items() if isinstance(value, layout.FolderLayout)}
NAMED = (ast.Name, ast.Attribute)


def asked(source: str) -> Iterator[int]:
    """Lines that compare something with a kind, a pipeline, a layout or a class of frozen models; not those assert."""
    tree = ast.parse(source)
    asserted = {inner for node in ast.walk(tree) if isinstance(node, ast.Assert) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        match node:
            case ast.Compare():
                parts = [node.left, *node.comparators]
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass")):
                parts = node.args[1:]
            case ast.MatchValue() | ast.MatchClass():
                parts = [node]
            case _:
                continue
        inner = [one for part in parts for one in ast.walk(part)]
        told = {one.value for one in inner if isinstance(one, ast.Constant) and isinstance(one.value, str)}
        names = {one.id if isinstance(one, ast.Name) else one.attr for one in inner if isinstance(one, NAMED)}
        if node not in asserted and (told & KINDS or names & (CLASSES | LAYOUT_NAMES)):
            yield node.lineno


def test_no_line_of_the_package_asks_which_frozen_model_it_has():
    found = [f"{path.relative_to(PACKAGE)}:{at}" for path in PACKAGE.rglob("*.py") for at in asked(path.read_text())]
    assert found == [], "say it in models/layout.py, a Backbone or a table under the same keys"


@pytest.mark.parametrize(
    "line",
    [
        'if folder.kind == "flux": pass',
        'x = 1 if kind in ("flux", "flux_control") else 2',
        "if isinstance(self.backbone, FluxKontext): pass",
        "if isinstance(model, (diffusers.FluxTransformer2DModel, int)): pass",
        "if folder.layout is KANDINSKY: pass",
        'if folder.pipeline != "FluxKontextPipeline": pass',
        'match kind:\n    case "qwen": pass',
        "match backbone:\n    case Kandinsky(): pass",
        "if type(backbone) is Qwen: pass",
    ],
)
def test_a_line_that_asks_would_be_found(line):
    assert list(asked(line))


def test_an_assertion_for_the_type_checker_is_no_question():
    assert not list(asked("assert isinstance(model, QwenImageTransformer2DModel)"))


def test_all_tables_have_the_same_kinds():
    assert set(ENCODERS) == {one.kind for one in layout.LAYOUTS.values()} == set(get_args(ModelKind))
    assert set(BACKBONES) == {one.kind for one in layout.LAYOUTS.values() if one.blocks}
