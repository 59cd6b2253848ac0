"""Which device a process takes, and when it takes none."""

import pytest
import torch

from ccmdist.cluster.device import BrokenNode, current_device, take_device
from ccmdist.cluster.ranks import Ranks, gpus_from_environment
from ccmdist.errors import EXIT_INTERNAL


@pytest.fixture
def broken_node(monkeypatch):
    """A PyTorch for GPUs in a job that has been given two, on a node whose driver does not answer."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")


def test_a_process_that_was_given_gpus_does_not_compute_on_the_cpu_instead(broken_node):
    with pytest.raises(BrokenNode, match="given this process the GPUs 0,1, and PyTorch can use none; exclude") as error:
        take_device(Ranks(0, 0, 2))
    assert error.value.exit_code == EXIT_INTERNAL


def test_without_gpus_in_the_job_or_in_pytorch_the_cpu_is_taken(broken_node, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "NoDevFiles")
    assert take_device(None) == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert take_device(None) == torch.device("cpu")


def test_the_cpu_can_be_asked_for(broken_node, monkeypatch):
    monkeypatch.setenv("CCMDIST_DEVICE", "cpu")
    assert take_device(None) == current_device() == torch.device("cpu")


def test_devices_count_only_inside_a_job():
    assert gpus_from_environment({"CUDA_VISIBLE_DEVICES": "0,1"}) == ""
    assert gpus_from_environment({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_JOB_ID": "7"}) == "0,1"
