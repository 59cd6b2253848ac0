"""Rows of results: what holds, what the file and the table say; and every script can at least be imported."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SCRIPTS = sorted(path.relative_to(BENCHMARKS) for path in [*BENCHMARKS.glob("*.py"), *BENCHMARKS.glob("gpu/*.py")])


@pytest.fixture
def rows(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("measure.rows")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(module, "command", lambda: "python benchmarks/one.py")
    return module


def row(rows, *values, **more):
    return rows.Row(*values, **more, command="python benchmarks/one.py")


@pytest.mark.parametrize(
    ("ours", "limit", "at_least", "holds"),
    [
        (1.0, None, False, None),
        (1.0, 1.0, False, True),
        (1.1, 1.0, False, False),
        (9, 10, True, False),
        (10, 10, True, True),
    ],
)
def test_a_row_holds_when_its_limit_does_or_when_it_has_none(rows, ours, limit, at_least, holds):
    assert row(rows, "it", ours, limit=limit, at_least=at_least).holds is holds


def test_what_does_not_hold_is_written_and_printed_and_fails_the_script(rows, tmp_path, capsys):
    some = [row(rows, "batches[i::n]", 3.0, 2.0, limit=1.0), row(rows, "only told", 1.0, "published: 2")]
    assert rows.finish("one", some) == 1
    written = json.loads((tmp_path / "one.json").read_text())
    assert list(written[0]) == ["claim", "ours", "anchor", "limit", "goal", "holds", "command"]
    assert [one["holds"] for one in written] == [False, None]
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("batches[i::n]", "1.5", "NO", "published: 2"))
    assert rows.finish("one", some[1:]) == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_every_script_can_be_imported(script, monkeypatch):
    monkeypatch.syspath_prepend(str((BENCHMARKS / script).parent))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, script.stem, raising=False)
    assert importlib.import_module(script.stem).main
