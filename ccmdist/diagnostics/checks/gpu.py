"""GPUs, and the compiled packages beside torch. Torch is imported by another process while the rest is looked at."""

import json
import os
import shutil
import subprocess
import sys
from types import TracebackType
from typing import Any, Final, Self

from ccmdist.diagnostics.checks.finding import Finding, Findings, NoAnswerError, Request, answer, last_line, size

PROBE: Final = "ccmdist.diagnostics.checks.torch_probe"
TIMEOUT_S: Final = 120.0
"""On a slow shared file system an import of torch takes a minute."""
MOSTLY_TAKEN: Final = 0.1
"""Share of a GPU's memory that others hold, above which it is told."""

Facts = dict[str, Any]


class TorchProbe:
    """The process that imports torch; a context manager that ends it."""

    def __init__(self, module: str = PROBE) -> None:
        """Look with ``module``."""
        self._command = [sys.executable, "-m", module]

    def __enter__(self) -> Self:
        # bitsandbytes may look for a kernel on the internet while it is imported.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            self._command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def facts(self) -> Facts:
        """What it found: name -> facts; of what took the process down {"error": how it ended}."""
        try:
            told, complaint = self._process.communicate(timeout=TIMEOUT_S)
            ended = last_line(complaint) or f"the process ended with code {self._process.returncode}"
        except subprocess.TimeoutExpired:
            self._process.kill()
            told, _ = self._process.communicate()
            ended = f"not imported after {TIMEOUT_S:.0f} s"
        facts: Facts = {}
        for line in filter(lambda line: line.startswith("{"), told.splitlines()):
            facts |= json.loads(line)
        if (begun := facts.pop("begun", "torch")) not in facts:
            facts[begun] = {"error": ended}
        return facts


def judge(request: Request, facts: Facts, driver: str) -> Findings:
    """What to say of GPUs and compiled packages.

    Args:
        request: What was asked.
        facts: Of the probe.
        driver: Version of the NVIDIA driver, "" where nvidia-smi finds none.
    """
    torch = facts["torch"]
    if "error" in torch:
        yield Finding(
            "torch", "MISS", f"cannot be imported: {torch['error']}", "install a torch that fits this machine, or "
            "load the modules and libraries that it was built with; nothing runs without it"
        )  # fmt: skip
        return
    if torch["devices"]:
        yield from _devices(torch, driver, request)
    else:
        yield _no_device(torch, driver, request)
    yield from _compiled(request, facts)


def nvidia_driver() -> str:
    """Version of the driver that nvidia-smi reports, or ""."""
    if shutil.which("nvidia-smi") is None:
        return ""
    try:
        return answer(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], 20).split("\n")[0].strip()
    except NoAnswerError:
        return ""


def _no_device(torch: Facts, driver: str, request: Request) -> Finding:
    state = request.lacking("gpu")
    if driver and not torch["cuda"]:
        remedy = "install a CUDA build of torch (`pip install torch --index-url <the site's CUDA index>`)"
        return Finding("GPU", state, f"driver {driver}, but torch {torch['version']} is a CPU build", remedy)
    if driver:
        remedy = "ask for a GPU (--gpus-per-node), unset CUDA_VISIBLE_DEVICES, or install a torch for an older CUDA"
        return Finding("GPU", state, f"driver {driver}, but torch (CUDA {torch['cuda']}) sees no device", remedy)
    remedy = (
        "enough for the demo, the tests and a login node; the 20 B model needs GPUs, so look where it will "
        "train: srun --gpus-per-node=1 ccmdist doctor --require gpu"
    )
    return Finding("GPU", state, f"none; torch {torch['version']} computes on the CPU", remedy)


def _devices(torch: Facts, driver: str, request: Request) -> Findings:
    devices = torch["devices"]
    names = ", ".join(sorted({device["name"] for device in devices}))
    smallest = min(device["total"] for device in devices)
    about = f"{len(devices)} x {names}, {size(smallest)}, driver {driver or '?'}, CUDA {torch['cuda']}"
    yield Finding("GPU", "OK", f"{about}, NCCL {torch['nccl']}")
    if not all(device["bf16"] for device in devices):
        yield Finding("bf16", "MISS", "not supported by every GPU", "use Ampere or newer, or base=fp32 for tests")
    if taken := [device for device in devices if device["free"] < (1 - MOSTLY_TAKEN) * device["total"]]:
        found = f"{len(taken)} in use by others, {size(min(device['free'] for device in taken))} free"
        yield Finding("GPU memory", "WARN", found, "ask Slurm for whole GPUs, or end what `nvidia-smi` shows")
    if len(devices) > 1 and not torch["peer_access"]:
        remedy = "ZeRO-3 gathers through host memory here: expect slow steps, prefer a larger micro_batch_size"
        yield Finding("peer access", "WARN", "the GPUs cannot read each other's memory", remedy)


def _compiled(request: Request, facts: Facts) -> Findings:
    if "error" in facts.get("torchvision", {}):
        remedy = "pip uninstall torchvision: a broken one breaks transformers, its absence does not"
        yield Finding("torchvision", "MISS", f"does not fit this torch: {facts['torchvision']['error']}", remedy)
    if "error" in facts.get("bitsandbytes", {}):
        remedy = "pip install --force-reinstall bitsandbytes, or uninstall it: peft imports it wherever it is installed"
        yield Finding("bitsandbytes", "MISS", f"cannot be imported: {facts['bitsandbytes']['error']}", remedy)
    yield from _flash(request, facts)


def _flash(request: Request, facts: Facts) -> Findings:
    remedy = 'pip install ninja packaging psutil && MAX_JOBS=8 pip install --no-build-isolation "ccmdist[flash]"'
    flash = facts.get("flash_attn", {})
    if "error" in flash:
        reason = f"rebuild it for this torch ({remedy}) or uninstall it: PyTorch's own flash attention is then used"
        yield Finding("flash-attn", "MISS", f"cannot be imported: {flash['error']}", reason)
    elif flash:
        yield Finding("flash-attn", "OK", f"{flash['version']}; attention runs on it")
    elif "flash" not in request.required and facts["torch"]["devices"]:
        yield Finding("flash-attn", "OK", "not installed; PyTorch's own flash attention is used")
