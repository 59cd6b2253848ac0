"""Images measured by the workers of an array, and compared by one: the report of a single run, to the last byte."""

import json
import shutil

import numpy as np
import pytest

from ccmdist.commit import commit_json
from ccmdist.config.data import PhantomShardsConfig
from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.config.loading import load, resolved
from ccmdist.data.manifest import read_manifest
from ccmdist.data.phantom_shards import write_phantom_set
from ccmdist.data.reader import read_keys, read_split
from ccmdist.data.writer import write_set
from ccmdist.errors import Preempted, ShardError
from ccmdist.evaluation.comparison import units
from ccmdist.evaluation.measures import Measuring
from ccmdist.evaluation.work import do_share, open_units
from ccmdist.jobs import evaluate
from tests.unit.evaluation.drawn_images import drawn

SIZE_PX = 64


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A dozen phantoms in three shards, and two images for each, in five; every third is one of a flipped view."""
    root = tmp_path_factory.mktemp("sets")
    phantoms = {"subjects_per_group": 4, "frames_per_subject": 2, "test_fraction": 0.5, "val_fraction": 0}
    write_phantom_set(PhantomShardsConfig(out=root / "real", size_px=SIZE_PX, samples_per_shard=4, **phantoms))
    rng = np.random.default_rng(0)

    def images():
        for index, triple in enumerate(read_split(root / "real", "test")):
            for number in range(2):
                noisy = triple.image + rng.normal(0, 6, triple.image.shape)
                if (index + number) % 3:
                    yield "test", drawn(triple, noisy, number)
                else:
                    yield "test", drawn(triple, noisy[:, ::-1], number, source_key=f"{triple.key}-hflip")

    write_set(root / "close", "synthetic", images(), 5)
    return root


def config_of(sets, out):
    values = [f"real={sets}/real", f"synthetic.close={sets}/close", f"out={out}", "num_bootstrap=100"]
    return load(EvaluateConfig, [], [*values, "num_grid_images=2", "minimum.frechet_images=10"])


def run(config, monkeypatch, worker=None, num_workers=3):
    """Run the stage alone, or as a worker of a Slurm array."""
    commit_json(config.out / "config.json", resolved(config))
    with monkeypatch.context() as patch:
        if worker is not None:
            patch.setenv("SLURM_ARRAY_TASK_ID", str(worker))
            patch.setenv("SLURM_ARRAY_TASK_COUNT", str(num_workers))
        evaluate.run(str(config.out / "config.json"))


def measured(out):
    """The file that each unit of work leaves, by name."""
    return {path.name: path.read_bytes() for path in out.glob("*/*") if path.is_file()}


def test_an_array_and_one_who_compares_give_the_report_of_a_single_run(sets, tmp_path, monkeypatch, capsys):
    single = config_of(sets, tmp_path / "single")
    run(single, monkeypatch)
    report = json.loads((single.out / "report.json").read_text())
    assert report["synthetic"]["close"]["fidelity"]["paired"][0]["num_images"] == 24
    capsys.readouterr()

    shared = config_of(sets, tmp_path / "shared")
    # What is measured depends on nobody else: the images that are drawn of a mask do not wait for the real frames.
    num_units, num_done = len(units(shared)), 0
    for worker in (2, 0, 1):
        run(shared, monkeypatch, worker)
        num_done += len(range(worker, num_units, 3))
        assert len(measured(shared.out)) == num_done
        assert not (shared.out / "report.json").exists()
    assert capsys.readouterr().out == ""
    files = {path: path.stat().st_mtime_ns for path in shared.out.glob("*/*")}

    run(shared, monkeypatch)
    assert measured(shared.out) == measured(single.out)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    told, of_single = (json.loads((out / "report.json").read_text()) for out in (shared.out, single.out))
    assert told.pop("made_at") > of_single.pop("made_at")
    # The folder of the report is one of the settings.
    assert told.pop("settings_digest") != of_single.pop("settings_digest")
    assert json.dumps(told).replace(str(shared.out), str(single.out)) == json.dumps(of_single)
    assert "report: " in capsys.readouterr().out.splitlines()[-1]


def test_who_compares_measures_what_a_killed_worker_has_left(sets, tmp_path, monkeypatch):
    config = config_of(sets, tmp_path)
    run(config, monkeypatch, worker=1)
    run(config, monkeypatch)
    assert len(measured(tmp_path)) == len(units(config))
    assert (tmp_path / "report.html").exists()


def test_a_stop_between_shards_keeps_what_is_measured(sets, tmp_path, monkeypatch):
    config = config_of(sets, tmp_path)
    with pytest.raises(Preempted) as stop:
        do_share(units(config), 0, 1, should_stop=iter([False] * 3 + [True]).__next__)
    told = f"evaluate: stopped with 3 of {len(units(config))} units done and committed; run the same command again"
    assert str(stop.value) == told
    assert stop.value.exit_code == 75
    assert len(open_units(units(config))) == len(units(config)) - 3
    again = []
    table = Measuring.table
    monkeypatch.setattr(Measuring, "table", lambda *arguments: again.append(arguments) or table(*arguments))
    do_share(units(config), 0, 1)
    assert len(again) == 5


def test_the_keys_of_a_shard_are_read_without_its_contents(sets, tmp_path):
    shard = read_manifest(sets / "real").of_split("test")[1]
    triples = list(read_split(sets / "real", "test"))
    assert read_keys(sets / "real", shard) == [triple.key for triple in triples[4:8]]
    shutil.copy(sets / "real" / shard.name, tmp_path)
    with (tmp_path / shard.name).open("r+b") as tar:
        tar.truncate(512)
    with pytest.raises(ShardError, match=rf"{shard.name}: byte \d+: the tar ends without its end mark"):
        read_keys(tmp_path, shard)
