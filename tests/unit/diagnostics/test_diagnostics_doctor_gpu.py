"""GPUs are described, and a torch that cannot be imported is a finding whatever it does to its process."""

import pytest

from ccmdist.diagnostics.checks.gpu import TorchProbe, judge
from tests.unit.diagnostics.doctored import one, request

CPU = {"torch": {"version": "2.13.0+cpu", "cuda": "", "devices": []}}
GIB = 2**30


def devices(count=2, free=79, bf16=True, peer_access=True):
    device = {"name": "NVIDIA H100", "free": free * GIB, "total": 80 * GIB, "bf16": bf16}
    facts = {"version": "2.13.0", "cuda": "13.0", "nccl": "2.28.9", "peer_access": peer_access}
    return {"torch": facts | {"devices": [device] * count}}


def package(folder, name, text):
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)


def probed(folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.chdir(folder)
    with TorchProbe() as probe:
        return probe.facts()


def test_gpus_are_told_with_memory_driver_and_nccl():
    findings = list(judge(request("gpu"), devices(), "580.65"))
    assert [finding.state for finding in findings] == ["OK", "OK"]
    assert findings[0].found == "2 x NVIDIA H100, 80 GiB, driver 580.65, CUDA 13.0, NCCL 2.28.9"
    assert findings[1].found == "not installed; PyTorch's own flash attention is used"


def test_a_machine_without_gpus_is_fit_for_what_needs_none():
    (finding,) = judge(request(), CPU, "")
    assert (finding.state, finding.found) == ("WARN", "none; torch 2.13.0+cpu computes on the CPU")
    assert "srun --gpus-per-node=1 ccmdist doctor --require gpu" in finding.remedy
    (finding,) = judge(request("gpu"), CPU, "")
    assert finding.state == "MISS"


def test_a_cpu_build_beside_a_driver_is_told_apart_from_a_gpu_that_is_hidden():
    (finding,) = judge(request("gpu"), CPU, "580.65")
    assert finding.found == "driver 580.65, but torch 2.13.0+cpu is a CPU build"
    (finding,) = judge(request("gpu"), {"torch": CPU["torch"] | {"cuda": "13.0"}}, "580.65")
    assert "CUDA_VISIBLE_DEVICES" in finding.remedy


@pytest.mark.parametrize(
    ("facts", "what", "state"),
    [
        (devices(bf16=False), "bf16", "MISS"),
        (devices(free=40), "GPU memory", "WARN"),
        (devices(peer_access=False), "peer access", "WARN"),
    ],
)
def test_what_is_wrong_with_gpus_is_told(facts, what, state):
    assert one(list(judge(request(), facts, "580.65")), what).state == state


def test_a_broken_torchvision_is_worse_than_none(tmp_path, monkeypatch):
    package(tmp_path, "torch", "__version__ = '2.13.0'\nfrom . import version, cuda\n")
    (tmp_path / "torch/version.py").write_text("cuda = hip = None")
    (tmp_path / "torch/cuda.py").write_text("device_count = lambda: 0")
    package(tmp_path, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    package(tmp_path, "bitsandbytes", "__version__ = '0.50.2'")
    facts = probed(tmp_path, monkeypatch)
    assert facts["torch"] == {"version": "2.13.0", "cuda": "", "devices": []}
    finding = one(list(judge(request(), facts, "")), "torchvision")
    assert finding.state == "MISS"
    assert finding.found.endswith("RuntimeError: operator torchvision::nms does not exist")
    assert finding.remedy.startswith("pip uninstall torchvision")


def test_a_torch_that_cannot_be_imported_is_a_finding(tmp_path, monkeypatch):
    package(tmp_path, "torch", "raise ImportError('libcudart.so.13: cannot open shared object file')")
    (finding,) = judge(request(), probed(tmp_path, monkeypatch), "")
    assert finding.state == "MISS"
    assert finding.found == "cannot be imported: ImportError: libcudart.so.13: cannot open shared object file"


def test_a_package_that_takes_its_process_down_is_named(tmp_path, monkeypatch):
    package(
        tmp_path,
        "torch",
        "__version__ = '2'\nclass version: cuda = hip = None\nclass cuda: device_count = lambda: 1 - 1",
    )
    package(tmp_path, "flash_attn", "import os\nos.kill(os.getpid(), 11)")
    facts = probed(tmp_path, monkeypatch)
    assert facts["flash_attn"] == {"error": "the process ended with code -11"}
    assert one(list(judge(request(), facts, "")), "flash-attn").state == "MISS"


def test_a_package_that_prints_and_a_probe_that_dies_at_once_are_survived(tmp_path, monkeypatch):
    package(tmp_path, "torch", "print('hello'); import os; os._exit(3)")
    assert probed(tmp_path, monkeypatch)["torch"] == {"error": "the process ended with code 3"}
