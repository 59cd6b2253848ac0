"""Arms are read as people write them, and a slip is told with what was probably meant."""

import pytest

from ccmdist.config.arms import Arm, expanded
from ccmdist.config.evaluate import DownstreamSettings, EvaluateConfig
from ccmdist.config.loading import load
from ccmdist.errors import ConfigError


def config_of(*more):
    return load(EvaluateConfig, [], ["out=r", "real=s", "synthetic.wdlora=a", "synthetic.spade=b", *more])


def test_the_arms_of_the_settings_are_those_of_the_protocol_for_each_set():
    arms = expanded(DownstreamSettings().arms, ["wdlora"])
    assert [arm.text for arm in arms] == [
        *("real", "augmented", "phantom:1", "wdlora:0.5", "wdlora:1", "wdlora:2", "wdlora:5"),
        *("only wdlora", "shuffled wdlora:1"),
    ]
    by_text = {arm.text: arm for arm in arms}
    assert by_text["real"] == Arm("real")
    assert by_text["augmented"] == Arm("augmented", is_augmented=True)
    assert by_text["phantom:1"] == Arm("phantom:1", "phantom", 1.0)
    assert by_text["only wdlora"] == Arm("only wdlora", "wdlora")
    assert by_text["shuffled wdlora:1"] == Arm("shuffled wdlora:1", "wdlora", 1.0, is_shuffled=True)
    assert [arm.text for arm in arms if not arm.has_real] == ["only wdlora"]


def test_name_stands_for_each_set_and_real_images_come_first():
    assert [arm.text for arm in expanded(["NAME:0.50", "only NAME", "real"], ["a", "b"])] == [
        *("real", "a:0.5", "b:0.5", "only a", "only b")
    ]


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ("[real,wdlroa:1]", "downstream.arms: 'wdlroa:1': no synthetic set is called 'wdlroa'; did you mean 'wdlora'?"),
        ("[real,only x]", "no synthetic set is called 'x'; known: phantom, wdlora, spade"),
        ("[real,augmentd]", "'augmentd' is no arm; did you mean 'augmented'?; known forms: real, augmented, NAME:R"),
        ("[real,'wdlora:two']", "'wdlora:two': 'two' is no ratio, expected a number above 0 and at most 100"),
        ("[real,'wdlora:0']", "'0' is no ratio"),
        ("[real,'wdlora:1','wdlora:1.0']", "'wdlora:1' stands there twice"),
        ("[augmented]", "'real' is missing, with which the others are compared"),
    ],
)
def test_an_arm_that_cannot_be_read_is_told(arms, message):
    with pytest.raises(ConfigError) as problem:
        config_of(f"downstream.arms={arms}")
    assert message in str(problem.value)


def test_settings_of_the_grid_that_contradict_each_other_are_told():
    for more, message in {
        "downstream.synthetic.x=c": "downstream.synthetic: 'x' is not among the compared sets: wdlora, spade",
        "downstream.networks.size_px=100": "size_px: 100 is no multiple of 8, as unet_channels needs it",
        "downstream.networks.lrs=[0]": "lrs: 0.0 is no learning rate",
        "downstream.tasks=[diagnosis,diagnosis]": "must name each task at most once",
        "downstream.folds=[{real: f}]": "folds: one fold is none, expected at least two",
        "downstream.folds=[{real: f},{real: g,synthetic: {x: y}}]": "folds.1.synthetic: has ['x'], folds.0 has []",
        "synthetic.real=c": "a set cannot be called 'real', which is the name of an arm",
    }.items():
        with pytest.raises(ConfigError) as problem:
            config_of("downstream.num_seeds=5", more)
        assert message in str(problem.value)
    assert config_of("synthetic.real=c").downstream is None


def test_only_work_of_networks_wants_a_gpu():
    assert not config_of().runs_networks
    assert config_of("downstream.num_seeds=2").runs_networks
    assert config_of("extractors.dinov2=models/dinov2").runs_networks
