"""`ccmdist select`: every checkpoint draws the same masks, whoever draws them, and the best is pointed at."""

import json
import re
import shutil
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

from ccmdist.cli import exit_code
from ccmdist.cluster.best_checkpoint import BEST, read_best
from ccmdist.config.loading import load, resolved, validate
from ccmdist.config.select import SelectConfig
from ccmdist.config.train import LoRASettings, TrainConfig
from ccmdist.data.manifest import read_manifest
from ccmdist.data.reader import read_split
from ccmdist.errors import CheckpointError, EvaluationError, Preempted, RunError, ShardError
from ccmdist.jobs import adapter, select
from ccmdist.jobs.adapter_check import linear_shapes
from ccmdist.jobs.candidates import Candidates, open_candidates
from ccmdist.jobs.network import find_network
from ccmdist.models.model_folder import ModelFolder
from ccmdist.synthesis import generate
from ccmdist.synthesis.output import SyntheticSet
from ccmdist.synthesis.plan import read_plan
from tests.unit.jobs.small_run import SIZE_PX, add_checkpoint, data_overrides, make_network_run, make_run, make_sources
from tests.unit.jobs.test_jobs_units import counts

NUM_STEPS = ["denoise_steps=2", "guidance_scale=1", "batch_size=4"]
STEPS = (10, 20, 30)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    make_sources(folder)
    return folder


@pytest.fixture
def run(sources, tmp_path):
    """A run with three checkpoints."""
    return make_run(tmp_path / "run", sources, {step: step / 100 for step in STEPS})


def config_of(run, *more):
    return load(SelectConfig, [], [f"run={run}", *NUM_STEPS, *more])


def chosen(config, monkeypatch, worker=None, num_workers=3):
    """Run the stage alone, or as a worker of a Slurm array; the step that is pointed at, if it has chosen."""
    path = config.run.parent / "select.json"
    path.write_text(json.dumps(resolved(config)))
    with monkeypatch.context() as patch:
        if worker is not None:
            patch.setenv("SLURM_ARRAY_TASK_ID", str(worker))
            patch.setenv("SLURM_ARRAY_TASK_COUNT", str(num_workers))
        select.run(str(path))
    return read_best(config.run / BEST).step if (config.run / BEST).exists() else None


def contents(run):
    """Every file of a selection, and the pointer."""
    files = [path for path in sorted((run / "selection").rglob("*")) if path.is_file()]
    return {str(path.relative_to(run)): path.read_bytes() for path in [*files, run / BEST]}


@pytest.fixture
def sampler(sources, monkeypatch):
    """Draws the real frame of a mask, mixed with noise by the share of noise of the step; remembers what it drew."""
    frames = {triple.key: triple.image for triple in read_split(sources / "shards", "val")}

    class Sampler:
        noise_of_step: ClassVar = {10: 0.3, 20: 0.02, 30: 0.9}
        drawn: ClassVar = []
        before = staticmethod(lambda: None)

        def __init__(self, plan, model, cache, adapters, objective):
            self.step = int(adapters[objective].facts["step"])

        def draw(self, requests):
            type(self).before()
            self.drawn.append(self.step)
            return np.stack([self.image(request.source_key) for request in requests])

        def image(self, key):
            noise = np.random.default_rng(0).normal(0, 255, (SIZE_PX, SIZE_PX))
            share = self.noise_of_step[self.step]
            return np.clip((1 - share) * frames[key] + share * noise, 0, 255).astype(np.uint8)

    monkeypatch.setattr(generate, "ImageSampler", Sampler)
    return Sampler


def test_the_checkpoint_that_draws_best_is_pointed_at_though_later_ones_are_damaged(run, sampler, monkeypatch):
    for metric, names in (
        ("cnfl_agreement", ("agreement", "cnfl")),
        ("cnfl_bias", ("bias", "cnfl")),
        ("cnfl_equivalence", ("cnfl_equivalence",)),
        ("cldice", ("cldice",)),
    ):
        (run / BEST).unlink(missing_ok=True)
        assert chosen(config_of(run, f"metric={metric}"), monkeypatch) == 20, metric
        assert adapter.find(run / BEST).facts["step"] == "20"
        pointer = json.loads((run / BEST).read_text())
        assert (pointer["checkpoint"], pointer["metric"]) == ("checkpoints/step-00000020", metric)
        assert (pointer["num_images"], pointer["num_subjects"]) == (6, 3)
        told = json.loads((run / "selection" / "selection.json").read_text())
        assert told["best_step"] == 20
        assert [one["step"] for one in told["checkpoints"]] == list(STEPS)
        value = told["checkpoints"][1]
        for name in names:
            value = value[name]
        assert pointer["value"] == value
    # What the segmenter reaches on the frames themselves stands beside it.
    assert told["real"]["num_images"] == 6
    assert told["real"]["cldice"] > 0.7
    assert len(sampler.drawn) == 3 * 2, "another metric needs no new images"


def test_of_two_adapters_the_one_for_whole_images_is_chosen_by(sources, sampler, tmp_path, monkeypatch):
    dual, names = ["objective={kind: dual}", "data.holes={}"], ("synthesis", "completion")
    run = make_run(tmp_path / "run", sources, {step: step / 100 for step in STEPS}, more=dual, names=names)
    assert chosen(config_of(run, *data_overrides(sources)), monkeypatch) == 20
    for name in names:
        found = adapter.find(run / BEST, name)
        assert (found.facts["step"], found.facts["adapter_name"]) == ("20", name)


def test_a_run_without_an_adapter_for_whole_images_is_refused(sources, tmp_path):
    completion = ["objective={kind: dual, adapters: [completion]}", "data.holes={}"]
    run = make_run(tmp_path / "run", sources, {10: 0.1}, more=completion, names=("completion",))
    with pytest.raises(EvaluationError, match="has trained completion alone, and a checkpoint is chosen by the whole"):
        open_candidates(config_of(run))


def test_checkpoints_of_an_adapter_that_grows_are_chosen_from(sources, sampler, tmp_path, monkeypatch):
    model = ModelFolder.open(sources / "model")
    births = {name: [0, 8] for name in linear_shapes(model) if ".attn." in name}
    nothing = {name: [0.0, 0.0] for name in births}
    growth = {"growth": {"births": births, "sums": nothing, "tested": nothing}}
    run = make_run(
        tmp_path / "run",
        sources,
        {step: step / 100 for step in STEPS},
        more=["adapter.growth={}"],
        objective_state=growth,
    )
    assert chosen(config_of(run), monkeypatch) == 20
    assert set(adapter.find(run / BEST).lora_ranks.values()) == {2}


def test_of_equal_checkpoints_the_earliest_is_chosen(run, sampler, monkeypatch, capsys):
    sampler.noise_of_step = {10: 0.02, 20: 0.02, 30: 0.5}
    assert chosen(config_of(run), monkeypatch) == 10
    assert re.search(r"│ +10 │ 6 │ .* best │", capsys.readouterr().out)


def test_an_array_makes_the_bytes_of_a_single_worker(run, sources, tmp_path, monkeypatch):
    """With the model itself."""
    step = chosen(config_of(run), monkeypatch)
    other = make_run(tmp_path / "other" / "run", sources, {step: step / 100 for step in STEPS})
    for worker in (3, 0, 4, 1, 2):
        assert chosen(config_of(other), monkeypatch, worker, num_workers=5) == step
    assert contents(other) == contents(run)


def test_the_worker_that_finishes_last_chooses(run, sampler, monkeypatch, tmp_path):
    config, ended = config_of(run), []

    def another_worker():
        sampler.before = staticmethod(lambda: None)
        ended.append(chosen(config, monkeypatch, worker=1, num_workers=2))

    sampler.before = staticmethod(another_worker)
    assert chosen(config, monkeypatch, worker=0, num_workers=2) == 20
    assert ended == [None], "a batch was still being drawn"
    assert sorted(sampler.drawn) == sorted(2 * STEPS), "no batch was drawn twice"


def test_a_stop_keeps_what_is_drawn_and_measured(run, sampler, monkeypatch, sources, tmp_path):
    config, drawing = config_of(run), []
    sampler.before = staticmethod(lambda: drawing.append(1))
    candidates = open_candidates(config)
    with pytest.raises(Preempted) as stop:
        # Stopped before the last of two batches of the second checkpoint.
        select.do_share(candidates, 0, 1, should_stop=lambda: len(drawing) == 3)
    assert stop.value.exit_code == 75
    assert [candidates.is_measured(one) for one in candidates.checkpoints] == [True, False, False]
    assert select.open_units(config) == 2
    assert chosen(config, monkeypatch) == 20
    assert sampler.drawn == [10, 10, 20, 20, 30, 30]
    assert select.open_units(config) == 0

    undisturbed = make_run(tmp_path / "other" / "run", sources, {step: step / 100 for step in STEPS})
    chosen(config_of(undisturbed), monkeypatch)
    assert contents(undisturbed) == contents(run)


def test_a_signal_ends_it_with_the_command_to_go_on(run, sampler, monkeypatch):
    monkeypatch.setattr(select.StopFlag, "__bool__", lambda self: len(sampler.drawn) > 1)
    with pytest.raises(Preempted) as stop:
        chosen(config_of(run), monkeypatch)
    assert str(stop.value) == (
        "select: stopped with 0 of 3 checkpoints drawn and measured; what else is drawn is committed too; "
        "run the same command again"
    )
    assert not (run / BEST).exists()


def test_checkpoints_that_come_later_are_compared_with_those_that_are_measured(run, sampler, sources, monkeypatch):
    config = config_of(run, "metric=cnfl_equivalence")
    assert chosen(config, monkeypatch) == 20
    sampler.noise_of_step = {**sampler.noise_of_step, 40: 0.0}
    add_checkpoint(run, sources, LoRASettings(lora_rank=2), 40, 0.1, keep=2)
    assert [path.name for path in open_candidates(config).checkpoints] == [f"step-{step:08d}" for step in (20, 30, 40)]
    assert select.open_units(config) == 1
    assert chosen(config, monkeypatch) == 40
    assert sampler.drawn[6:] == [40, 40]
    add_checkpoint(run, sources, LoRASettings(lora_rank=2), 50, 0.1, keep=1)
    assert [path.name for path in open_candidates(config).checkpoints] == ["step-00000040", "step-00000050"]
    assert sorted(path.name for path in (run / "selection").glob("step-*")) == [f"step-{s:08d}" for s in (*STEPS, 40)]


def test_a_checkpoint_that_training_removes_meanwhile_is_not_pointed_at(run, sampler, monkeypatch):
    def removed():
        shutil.rmtree(run / "checkpoints" / "step-00000020", ignore_errors=True)

    sampler.before = staticmethod(removed)
    assert chosen(config_of(run), monkeypatch) == 10
    steps = json.loads((run / "selection" / "selection.json").read_text())["checkpoints"]
    assert [one["step"] for one in steps] == [10, 30]


def test_a_broken_checkpoint_is_named_when_all_others_are_drawn(run, sampler, monkeypatch):
    broken = run / "checkpoints" / "step-00000010"
    (broken / "slices-00000.safetensors").write_bytes(b"")
    with pytest.raises(EvaluationError) as problem:
        chosen(config_of(run), monkeypatch)
    assert str(problem.value) == (
        f"1 of 3 checkpoints cannot be drawn with: {broken}: slices-00000.safetensors differs from what was committed; "
        f"set it aside (mv {broken} {broken}.broken) and run the same command again"
    )
    broken.rename(f"{broken}.broken")
    assert chosen(config_of(run), monkeypatch) == 20
    assert sampler.drawn == [20, 20, 30, 30]


def test_a_metric_that_cannot_be_taken_chooses_nothing(run, sampler, monkeypatch):
    no_nerve = np.zeros((SIZE_PX, SIZE_PX), bool)
    monkeypatch.setattr("ccmdist.evaluation.measures.segment", lambda image: no_nerve)
    with pytest.raises(EvaluationError, match="cnfl_equivalence: could not be taken of the images of any of 3 check"):
        chosen(config_of(run, "metric=cnfl_equivalence"), monkeypatch)
    assert not (run / BEST).exists()
    told = json.loads((run / "selection" / "selection.json").read_text())
    assert told["best_step"] is None
    assert told["checkpoints"][0]["cnfl_equivalence"] is None


def test_other_settings_need_another_folder(run, sampler, monkeypatch):
    chosen(config_of(run), monkeypatch)
    other = config_of(run, "denoise_steps=3")
    for act in (lambda: select.describe(other), lambda: chosen(other, monkeypatch)):
        with pytest.raises(RunError, match=r"begun with other settings:\n  denoise_steps: 2 -> 3\nchoose another out"):
            act()
    assert chosen(config_of(run, "denoise_steps=3", f"out={run}/other"), monkeypatch) == 20
    assert (run / "other" / "selection.json").is_file()


def test_sets_that_were_drawn_with_the_base_in_two_forms_are_not_compared(run, sampler, monkeypatch):
    candidates = open_candidates(config_of(run))
    chosen(candidates.config, monkeypatch)
    plan = read_plan(run / "selection" / "step-00000020")
    changed = plan.model_copy(update={"settings": replace(plan.settings, base="nf4")})
    whole = select.read_plan
    monkeypatch.setattr(select, "read_plan", lambda out: changed if out.name == "step-00000020" else whole(out))
    with pytest.raises(EvaluationError, match=r"were not drawn alike: .*30 with base=fp32, .*20 with base=nf4; say"):
        select.conclude(candidates)


def test_a_set_that_is_begun_says_how_the_base_is_held(run, sampler, monkeypatch):
    candidates = open_candidates(config_of(run))
    first, second, _ = candidates.checkpoints
    assert candidates.drawing(first).base == "auto"
    monkeypatch.setattr(generate.base, "base_for_card", lambda *_: "nf4")
    monkeypatch.setattr(generate.base, "refuse_small_card", lambda *_: None)
    generate.synthesize(candidates.drawing(first), adapter.find(first))
    assert read_plan(candidates.out(first)).settings.base == "nf4"
    assert candidates.drawing(second).base == "nf4"


def test_a_dry_run_tells_the_plan_and_does_nothing(run, sources, capsys):
    assert exit_code(["select", f"run={run}", *NUM_STEPS, "--dry-run"]) == 0
    checkpoints, drawing, pointer, last = capsys.readouterr().out.splitlines()[-4:]
    assert checkpoints == (
        f"{run}: 3 checkpoints (step 10, 20, 30); the run keeps its newest 9 and the chosen one; "
        "checkpoint.keep=20 keeps more"
    )
    assert drawing == (
        f"{run}/selection: each draws 6 images for masks of 3 subjects (val of {sources}/shards) in 2 batches; "
        "0 of 3 are drawn and measured"
    )
    assert pointer.startswith(f"{run}/best.json: by cnfl_agreement, ICC(2,1) of CNFL found in the images with that of ")
    assert last == "dry run: nothing was done"
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.json"]


def test_launchers_count_checkpoints_without_torch(run, sampler, monkeypatch):
    command = ["select", f"run={run}", *NUM_STEPS]
    assert counts(command) == [3]
    chosen(config_of(run), monkeypatch)
    # All is measured; another metric leaves the choice alone to be made.
    assert counts(command, [*command, "metric=cldice"]) == [0, 1]


def test_what_cannot_be_chosen_from_is_refused_before_anything_is_drawn(run, sources, tmp_path, monkeypatch):
    empty = make_run(tmp_path / "empty", sources, {})
    cases = [
        (config_of(tmp_path / "none"), "none is not the folder of a training run .*No such file or directory.*; name"),
        (config_of(empty), "empty has no checkpoint yet; let it train until it has saved one; see `ccmdist status`"),
        (config_of(run, "split=test"), "split: .*shards has no samples in test; set split to one of: train, val"),
        (config_of(run, "min_images=7"), "val of .*shards makes 6 images, at least 7 are needed to choose by; pack"),
        (config_of(run, "min_subjects=4"), "val of .*shards makes 3 subjects, at least 4 are needed to choose by"),
        (config_of(run, "eta=0.5"), "eta: 0.5, but a run of edit draws without noise of its own; leave eta out"),
        (config_of(tmp_path / "vae"), "vae has trained msdm_vae, which draws no images of masks; .* draws; give it as"),
    ]
    make_network_run(tmp_path / "vae", sources, (), {"kind": "msdm_vae", "crop_px": 32})
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "config.json").write_text('{"settings": {"out": "x"}}')
    cases.append((config_of(tmp_path / "set"), "set is not the folder of a training run .*run: is required"))
    for config, message in cases:
        for act in (lambda config=config: select.describe(config), lambda config=config: chosen(config, monkeypatch)):
            with pytest.raises(EvaluationError, match=f"(?s){message}"):
                act()
    assert not (run / "selection").exists()
    moved = config_of(run, f"data.shards={tmp_path}/gone", f"data.model={sources}/model")
    with pytest.raises(ShardError, match=r"gone/manifest\.json: No such file or directory"):
        select.describe(moved)


def test_a_checkpoint_that_is_gone_is_not_taken_for_another(run, sampler, monkeypatch):
    chosen(config_of(run), monkeypatch)
    shutil.rmtree(run / "checkpoints" / "step-00000020")
    with pytest.raises(CheckpointError, match=r"points at .*step-00000020, which is not there; choose anew"):
        adapter.find(run / BEST)


def test_a_baseline_is_chosen_from_as_an_adapter_is(sources, tmp_path, monkeypatch, capsys):
    """With the networks themselves, which need neither cache nor model."""
    run = make_network_run(tmp_path / "spade", sources, (1, 2))
    config = config_of(run)
    assert "each draws 6 images for masks of 3 subjects" in select.describe(config)
    step = chosen(config, monkeypatch)
    assert find_network(run / BEST).about.facts["step"] == str(step)
    assert f"use it as network={run}/best.json" in capsys.readouterr().out
    weights = [one["weights"] for one in json.loads((run / "selection" / "selection.json").read_text())["checkpoints"]]
    assert len(set(weights)) == 2
    assert find_network(run / BEST).about.digest == weights[step - 1]


def test_checkpoints_of_msdm_draw_with_noise_of_their_own_where_that_is_wanted(sources, tmp_path):
    run = make_network_run(tmp_path / "msdm", sources, (), {"kind": "msdm"})
    trained = validate(TrainConfig, json.loads((run / "config.json").read_text())["settings"], "here")
    for overrides, eta in (((), 0), (("eta=0.5",), 0.5)):
        config, step = config_of(run, *overrides), run / "checkpoints" / "step-00000010"
        candidates = Candidates(config, trained, trained.data, read_manifest(sources / "shards"), (step,))
        assert (candidates.drawing(step).eta, candidates.drawing(step).network) == (eta, step)
        assert ("eta" in select._compared(config)) == bool(eta)


def test_the_test_split_can_be_chosen_on_and_is_warned_of(run, sampler, caplog, capsys):
    with pytest.raises(EvaluationError, match="has no samples in test"):
        open_candidates(config_of(run, "split=test"))
    assert "split=test: what is reported of the chosen checkpoint on the test split will be too good" in (
        caplog.text + capsys.readouterr().err
    )


def test_a_claimed_batch_is_left_to_who_has_it(run, sampler, monkeypatch):
    config = config_of(run)
    first = open_candidates(config).out(open_candidates(config).checkpoints[0])
    with pytest.raises(Preempted):
        select.do_share(open_candidates(config), 0, 1, should_stop=lambda: bool(list(run.glob("selection/step-*"))))
    with SyntheticSet(first, read_plan(first)).claim(1) as is_mine:
        assert is_mine
        assert chosen(config, monkeypatch, worker=1, num_workers=2) is None
    assert select.open_units(config) == 1
    assert chosen(config, monkeypatch, worker=1, num_workers=2) == 20
