"""One command line makes a chain for each structure, and one evaluation that waits for all of them."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from ccmdist.config.loading import resolved
from ccmdist.errors import ConfigError, RunError
from ccmdist.jobs import launching, structure_study
from ccmdist.jobs.launching import carry_out
from ccmdist.jobs.structure_study import STRUCTURES, run_here, study_of

WORDS = [
    *("precompute=p.yaml", "train=t.yaml", "synthesize=s.yaml", "evaluate=e.yaml"),
    *("data.shards=shards/a", "data.model=models/a", "data.holes.per_sample=2"),
]


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """Configs of a chain in the working folder; nothing of it is done yet."""
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text("batch_size: 4\n")
    Path("t.yaml").write_text("run: runs/a\nobjective:\n  kind: dual\nadapter:\n  kind: lora\n")
    Path("s.yaml").write_text("out: synthetic/a\nobjective: completion\n")
    Path("e.yaml").write_text("out: reports/a\nreal: shards/a\nsynthetic: {a: synthetic/a, b: synthetic/b}\n")
    for stage, number in (("precompute", 3), ("synthesize", 40), ("evaluate", 5)):
        monkeypatch.setattr(importlib.import_module(f"ccmdist.jobs.{stage}"), "open_units", lambda config, n=number: n)


def test_each_structure_has_a_cache_a_run_and_a_set_of_its_own_and_one_report_compares_the_three(chain):
    study = study_of([*WORDS, "train.num_steps=7", "evaluate.num_bootstrap=200"])
    assert list(study.chains) == ["mask", "points", "mask_and_points"] == list(STRUCTURES)
    for structure, one in study.chains.items():
        train, synthesize = one.configs["train"], one.configs["synthesize"]
        assert {str(config.data.structure) for config in (one.configs["precompute"], train, synthesize)} == {structure}
        assert (train.run, train.num_steps) == (Path(f"runs/a_{structure}"), 7)
        assert synthesize.out == Path(f"synthetic/a_{structure}")
        assert synthesize.adapter == Path(f"runs/a_{structure}/adapter")
        assert synthesize.data.holes.per_sample == 2
    assert study.evaluate.synthetic == {one: Path(f"synthetic/a_{one}") for one in STRUCTURES}
    assert (study.evaluate.out, study.evaluate.num_bootstrap) == (Path("reports/a"), 200)
    assert [stage for stage, _ in study.stages()] == ["precompute", "train", "synthesize"] * 3 + ["evaluate"]
    assert study.described().splitlines()[1] == "points: trains runs/a_points, draws synthetic/a_points"


def test_the_chains_run_at_the_same_time_and_the_evaluation_waits_for_all_of_them(chain, monkeypatch, tmp_path):
    jobs = []

    def submit(job, work):
        jobs.append((work.stage, job.after))
        return str(100 + len(jobs))

    monkeypatch.setattr(launching, "submit", submit)
    monkeypatch.setattr(launching, "refuse_without_slurm", lambda: None)
    monkeypatch.setattr(launching, "snapshot", lambda stage, config, arguments: tmp_path / stage)
    chains, last = study_of(WORDS).jobs()
    list(carry_out(last, WORDS, False, chains))
    starts = [("precompute", ()), ("train", ("101",)), ("synthesize", ("102",))]
    assert jobs[:3] == starts
    assert jobs[3:5] == [("precompute", ()), ("train", ("104",))]
    assert jobs[9:] == [("evaluate", ("103", "106", "109")), ("evaluate", ("110",))]


def test_a_dry_run_shows_the_batch_files_of_all_jobs_and_does_nothing(chain, tmp_path):
    before = sorted(tmp_path.iterdir())
    chains, last = study_of(WORDS).jobs()
    told = list(carry_out(last, WORDS, True, chains))
    assert len(told) == 12
    assert "#SBATCH --dependency=afterok:JOB_3:JOB_6:JOB_9\n" in told[9]
    assert "#SBATCH --dependency=afterok:JOB_10\n" in told[10]
    assert not any("--dependency" in told[place] for place in (0, 3, 6))
    assert told[-1] == "dry run: nothing was done"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "synthesize.adapter=mine",
            "synthesize.adapter: each structure draws with what its own run has trained; leave",
        ),
        ("num_steps=5", "'num_steps=5' belongs to no stage; write STAGE=FILE.yaml"),
        ("train.data.image_size_px=64", "train.data.image_size_px is 64, but precompute fills the cache for 384"),
        ("evaluate.real=shards/b", "evaluate.real is shards/b, but the images are drawn for masks of shards/a"),
    ],
)
def test_what_is_not_left_to_the_study_or_does_not_fit_is_refused(chain, word, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        study_of([*WORDS, word])


def test_without_slurm_every_stage_is_a_command_of_its_own_and_the_first_that_fails_ends_it(chain, monkeypatch):
    ran, settings = [], []

    class Done:
        def __init__(self, words, check):
            assert words[:3] == [sys.executable, "-m", "ccmdist"]
            ran.append(words[3])
            settings.append(Path(words[4]).read_text())
            self.returncode = 70 if len(ran) == 5 else 0

    monkeypatch.setattr(structure_study.subprocess, "run", Done)
    study = study_of(WORDS)
    with pytest.raises(
        RunError, match=r"train: runs/a_points: ended with exit code 70; read the lines above; the same"
    ):
        list(run_here(study))
    assert ran == ["precompute", "train", "synthesize", "precompute", "train"]
    assert '"structure": "points"' in settings[3]
    assert '"structure"' not in settings[0], "as every cache of masks is told"
    assert resolved(study.chains["mask"].configs["train"])["run"] in settings[1]
