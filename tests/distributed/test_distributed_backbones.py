"""Adapters on backbones of other families go through the same loop: killed, resumed, on other ranks."""

import math

import pytest
import torch

from tests.distributed.small_backbones import make_backbone
from tests.distributed.small_world import losses, weights

pytestmark = pytest.mark.distributed

KINDS = ["flux", "kandinsky5"]


@pytest.fixture(params=KINDS)
def model(request, forkserver, world):
    """Folder of a tiny model whose cache is filled."""
    child = forkserver.Process(target=make_backbone, args=(str(world), request.param))
    child.start()
    child.join(timeout=300)
    assert child.exitcode == 0, f"the tiny {request.param} could not be made"
    return world / request.param


def test_an_adapter_on_two_ranks_resumes_bitwise_after_a_kill_and_follows_the_curve_of_one(train_ranks, model):
    """With its base cut over two, in blocks whose products are computed again, and whole on one."""
    folder, settings = train_ranks.folder, ["num_steps=4", f"data.model={model}", "activation_checkpointing=selective"]
    assert train_ranks("straight", 2, *settings) == [0, 0]
    assert train_ranks("killed", 2, *settings, fault="sigkill@step:rank=1,step=3")[1] == -9
    assert train_ranks("killed", 2, *settings) == [0, 0]
    assert train_ranks("whole", 1, *settings) == [0]
    expected, found = weights(folder / "straight"), weights(folder / "killed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    assert losses(folder / "killed") == losses(folder / "straight")
    for tag in ("loss/mean", "held_out/mean"):
        for (_, two), (_, one) in zip(losses(folder / "straight", tag), losses(folder / "whole", tag), strict=True):
            assert math.isclose(two, one, rel_tol=1e-5), tag
