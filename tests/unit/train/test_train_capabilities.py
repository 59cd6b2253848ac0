"""What a frozen model cannot do is refused in a sentence, before a cache is filled for it."""

import re
from types import SimpleNamespace

import pytest

from ccmdist.cluster.ranks import Ranks
from ccmdist.config.loading import load
from ccmdist.config.train import TrainConfig
from ccmdist.diagnostics.checks.finding import DoctorConfig, Request
from ccmdist.diagnostics.checks.settings import check
from ccmdist.errors import ConfigError
from ccmdist.models.make_flux import make_flux
from ccmdist.train.objectives.choice import objective_of

HOLES = "data.holes.per_sample=1"


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "flux"
    make_flux(folder)
    return folder


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["base=nf4"], r"base: nf4 is for Qwen-Image-Edit alone, .*flux holds FLUX.1 Kontext; set base=bf16 or fp32"),
        (["base=int8"], r"base: int8 is for Qwen-Image-Edit alone, .*flux holds FLUX.1 Kontext"),
        (
            ["objective.kind=dual", HOLES],
            r"objective.adapters: completion shows a model two condition images, FLUX.1 Kontext takes 1; set "
            r"data.model to a folder of Qwen-Image-Edit, or train objective.kind edit",
        ),
        (
            ["adapter.kind=lora", "adapter.growth.rank_budget=40"],
            r"adapter.growth.rank_budget: cannot be checked for FLUX.1 Kontext, whose size the planner does",
        ),
    ],
)
def test_what_flux_cannot_do_is_refused_before_its_cache_is_asked_for(flux, overrides, problem, tmp_path):
    given = [
        f"run={tmp_path}/run",
        f"data.model={flux}",
        f"data.shards={tmp_path}/none",
        f"data.cache={tmp_path}/cache",
    ]
    config = load(TrainConfig, [], [*given, *overrides])
    with pytest.raises(ConfigError, match=problem):
        objective_of(config, SimpleNamespace(ranks=Ranks(0, 0, 1)))
    (told,) = [
        one for one in check(Request(config=load(DoctorConfig, [], [*given, *overrides]))) if "files" in one.what
    ]
    assert told.state == "MISS"
    assert re.search(problem, f"{told.found}; {told.remedy}"), "doctor says it too"
