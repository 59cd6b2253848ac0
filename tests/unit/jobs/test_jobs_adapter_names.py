"""A dry run of synthesis knows from the settings of a run what its adapters were trained for."""

import pytest

from ccmdist.cluster.run_directory import RunDirectory
from ccmdist.config.loading import load
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.config.train import TrainConfig
from ccmdist.errors import AdapterError, ConfigError
from ccmdist.jobs.adapter_names import refuse_what_was_not_trained

DATA = ["data.shards=shards/x", "data.model=models/x"]


def refused(run, *overrides):
    refuse_what_was_not_trained(load(SynthesizeConfig, [], ["out=out", f"adapter={run}", *DATA, *overrides]))


@pytest.fixture
def trained(tmp_path):
    def begun(*overrides):
        config = load(TrainConfig, [], [f"run={tmp_path / 'run'}", *DATA, *overrides])
        RunDirectory(config.run).accept(config, frozenset())
        return config.run

    return begun


@pytest.mark.parametrize("inside", [".", "adapter", "adapter/synthesis", "checkpoints/step-00000004", "best.json"])
def test_a_run_without_an_adapter_for_holes_is_refused_wherever_in_it_one_points(trained, inside):
    run = trained()
    refused(run / inside)
    with pytest.raises(AdapterError, match="holds the adapter synthesis, none called completion"):
        refused(run / inside, "objective=both", "data.holes={}")


def test_what_stood_for_the_nerves_in_training_is_what_is_shown(trained):
    run = trained("data.structure=points")
    refused(run, "data.structure=points")
    with pytest.raises(ConfigError, match=r"data\.structure: mask, but .* was trained on points"):
        refused(run)


def test_of_two_adapters_each_objective_has_its_own(trained):
    run = trained("objective.kind=dual", "data.holes={}")
    for objective in ("synthesis", "completion", "both"):
        refused(run, f"objective={objective}", "data.holes={}")


@pytest.mark.parametrize(
    ("objective", "remedy"),
    [
        (["objective.kind=maisi"], "give it as network= to `ccmdist synthesize`"),
        (["objective.kind=diagnose", "objective.mllm=m"], "it tells groups of frames; draw with another network"),
    ],
)
def test_a_run_that_trained_a_network_has_no_adapter(objective, remedy, trained):
    run, kind = trained(*objective), objective[0].partition("=")[2]
    with pytest.raises(AdapterError, match=f"is of a {kind} network, not of an adapter; {remedy}$"):
        refused(run)


def test_an_adapter_outside_of_a_run_is_looked_into_by_whoever_draws(tmp_path):
    refused(tmp_path / "exported", "objective=completion", "data.holes={}")
