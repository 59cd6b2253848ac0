"""The drill draws what its seed says, damages what it says it damages, and is not fooled by the code it judges."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", autouse=True)
def _benchmarks_are_importable():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


def test_equal_seeds_draw_equal_faults_and_every_kind_is_drawn():
    from drill.faults import KINDS, planned_faults

    first, again, other = (list(planned_faults(30, 2, seed)) for seed in (7, 7, 8))
    assert first == again != other
    assert {fault.kind for fault in first} == set(KINDS)


def test_what_a_drill_asks_of_a_rank_can_be_read_there():
    from drill.faults import planned_faults

    from ccmdist.cluster.faults import FORM

    texts = [
        text
        for seed in range(20)
        for fault in planned_faults(30, 3, seed)
        for text in filter(None, fault.variable(10, 3, 3).split(";"))
    ]
    assert len(texts) > 500
    assert all(FORM.fullmatch(text) for text in texts)
    assert all(int(FORM.fullmatch(text)["step"]) >= 10 for text in texts)


@pytest.mark.parametrize("how", ["truncate", "flip a bit of", "empty", "remove"])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.999])
def test_damage_changes_one_file(tmp_path, how, fraction):
    from drill.evidence import damage

    before = {name: bytes(range(256)) for name in ("manifest.json", "slices-00000.safetensors")}
    for name, data in before.items():
        (tmp_path / name).write_bytes(data)
    name = damage(tmp_path, how, fraction)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.get(name) != before.pop(name)
    assert all(after[other] == data for other, data in before.items())


def test_digests_do_not_depend_on_how_ranks_cut_a_tensor(tmp_path):
    from drill.evidence import digests
    from safetensors.torch import save_file

    def written(name, cut, values):
        folder = tmp_path / name
        folder.mkdir()
        slices = {f"{rank}.safetensors": {"w": span} for rank, span in enumerate(((0, cut), (cut, 10)))}
        for file, spans in slices.items():
            save_file({"w|weight": values[slice(*spans["w"])].clone()}, folder / file)
        counts = {"step": 3, "samples_seen": 12, "adam_steps": {"a": 3}, "parameters": {"w": [10]}}
        (folder / "manifest.json").write_text(json.dumps(counts | {"slices": slices}))
        return digests(folder)

    values = torch.arange(10.0)
    assert written("a", 4, values) == written("b", 7, values)
    values[5] += 1e-6
    assert written("c", 4, values) != written("d", 4, torch.arange(10.0))


@pytest.mark.parametrize("begun", [[27, 27, 27], [24, 27, 27], [27, 27]])
@pytest.mark.parametrize("state", ["requeue", "refused"])
def test_a_signal_puts_a_run_back_unless_its_last_attempts_brought_nothing_new(begun, state, tmp_path):
    from crash_drill import Record, wrong_ends
    from drill import faults as kinds
    from drill.attempt import Attempt

    from ccmdist.cluster.run_directory import RunDirectory

    (tmp_path / "attempts.json").write_text(json.dumps([{"first_step": step} for step in begun]))
    (tmp_path / "outcome.json").write_text(json.dumps({"state": state, "reason": "stopped", "step": 27}))
    fault = kinds.Fault(kinds.SIGNAL_ANYTIME, None, "sigterm", "any moment", fraction=0.1)
    record = Record(fault, Attempt(0.0, exit_codes=[0, 0], struck=0.1), 27, 0)
    is_stuck = begun == [27, 27, 27]
    assert (wrong_ends(record, RunDirectory(tmp_path)) == []) == ((state == "refused") == is_stuck)


def test_a_row_without_a_limit_is_told_and_does_not_fail():
    from drill.summary import VERDICTS
    from measure.rows import Row

    assert VERDICTS[Row("seconds", 3.3).holds] == "told "
    assert [VERDICTS[Row("lost", lost, limit=0).holds] for lost in (0, 1)] == ["holds", "FAILS"]
