"""This machine and the environment of this process: cores, memory, limits, who may read new files, variables."""

import os
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import psutil

from ccmdist.diagnostics.checks.finding import Finding, Findings, Request, size
from ccmdist.diagnostics.checks.mounts import mount_of

SHM: Final = Path("/dev/shm")  # noqa: S108 (nothing is written to it)
INFINIBAND: Final = Path("/sys/class/infiniband")
CGROUP_MEMORY: Final = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
SMALL_SHM: Final = 1 << 30
FEW_FILES: Final = 4096
OTHERS: Final = 0o007


def check(request: Request) -> Findings:
    """Everything but the file systems of a run."""
    yield _cores(request)
    yield _shm()
    yield from _limits()
    yield _umask(os.umask(0o077))
    yield from variables(request, set(psutil.net_if_addrs()))
    yield _extensions(request)


def _cores(request: Request) -> Finding:
    cores = len(os.sched_getaffinity(0))
    memory = psutil.virtual_memory()
    total = min([memory.total, *_cgroup_limits()])
    found = f"{cores} cores, {size(total)} of memory, {size(min(memory.available, total))} free"
    processes = request.config.processes if request.config else 1
    if processes > cores:
        return Finding(
            "machine", "WARN", found, f"processes={processes} is more than {cores} cores: set processes={cores}"
        )
    return Finding("machine", "OK", found)


def _cgroup_limits() -> list[int]:
    """Limits of this container or job, where there are any."""
    texts = [path.read_text().strip() for path in CGROUP_MEMORY if path.is_file()]
    return [int(text) for text in texts if text.isdigit()]


def _shm() -> Finding:
    if not SHM.is_dir():
        remedy = "mount a tmpfs there: loader workers and NCCL hand data over in it"
        return Finding(str(SHM), "WARN", "there is none", remedy)
    status = os.statvfs(SHM)
    free = status.f_bavail * status.f_frsize
    if free < SMALL_SHM:
        remedy = "start the container with --shm-size=8g: loader workers and NCCL die when it is full"
        return Finding(str(SHM), "WARN", f"{size(free)} free", remedy)
    return Finding(str(SHM), "OK", f"{size(free)} free")


def _limits() -> Findings:
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < FEW_FILES:
        remedy = f"`ulimit -n {most if most > files else FEW_FILES}` in slurm/env.sh: workers and shards need more"
        yield Finding("open files", "WARN", f"limited to {files}", remedy)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked != resource.RLIM_INFINITY and INFINIBAND.is_dir() and any(INFINIBAND.iterdir()):
        remedy = "`ulimit -l unlimited`, or ask the site for it: without pinned memory NCCL fails or is slow"
        yield Finding("locked memory", "WARN", f"limited to {size(locked)}", remedy)


def _umask(umask: int) -> Finding:
    os.umask(umask)  # it can only be read by setting it
    if umask & OTHERS != OTHERS:
        remedy = "`umask 027` (or 077) in slurm/env.sh and your shell: caches, runs and reports hold images of patients"
        return Finding("umask", "WARN", f"{umask:04o}: every user of the cluster may read new files", remedy)
    return Finding("umask", "OK", f"{umask:04o}")


def variables(request: Request, interfaces: set[str]) -> Findings:
    """Variables that decide speed, or whether ranks find each other. No value that may hold a secret is shown.

    Args:
        request: What was asked.
        interfaces: Names of the network interfaces.
    """
    environment = request.environment
    yield _threads(request)
    yield _offline(request)
    if environment.get("NCCL_SOCKET_IFNAME"):
        yield _nccl_interface(request, environment["NCCL_SOCKET_IFNAME"], interfaces)
    if environment.get("GLOO_SOCKET_IFNAME"):
        yield _gloo_interface(request, environment["GLOO_SOCKET_IFNAME"], interfaces)
    yield from _proxies(environment)


def _threads(request: Request) -> Finding:
    threads = request.environment.get("OMP_NUM_THREADS", "")
    processes, cores = request.config.processes if request.config else 1, len(os.sched_getaffinity(0))
    if not threads.isdigit():
        if request.in_job or processes > 1:
            wanted = "$SLURM_CPUS_PER_TASK" if request.in_job else str(max(1, cores // processes))
            remedy = f"export OMP_NUM_THREADS={wanted}: else each rank computes with all {cores} cores"
            return Finding("OMP_NUM_THREADS", "WARN", "not set, or no number", remedy)
        return Finding("OMP_NUM_THREADS", "OK", "not set; the batch scripts set it")
    if int(threads) * processes > cores:
        where = f" in each of {processes} processes, on" if processes > 1 else " on"
        found = f"{threads}{where} {cores} cores"
        return Finding("OMP_NUM_THREADS", "WARN", found, f"export OMP_NUM_THREADS={max(1, cores // processes)}")
    return Finding("OMP_NUM_THREADS", "OK", threads)


def _offline(request: Request) -> Finding:
    value = request.environment.get("HF_HUB_OFFLINE", "")
    if value.lower() in ("1", "true", "yes", "on"):
        return Finding("HF_HUB_OFFLINE", "OK", value)
    if request.in_job:
        remedy = "export HF_HUB_OFFLINE=1: without internet, an import that asks the hub waits on every rank"
        return Finding("HF_HUB_OFFLINE", "WARN", value or "not set", remedy)
    return Finding("HF_HUB_OFFLINE", "OK", "not set; the batch scripts set it")


def _nccl_interface(request: Request, value: str, interfaces: set[str]) -> Finding:
    """NCCL takes prefixes; "=" asks for exact names and "^" excludes."""
    names = [name for name in value.lstrip("^=").split(",") if name]
    exact = value.lstrip("^").startswith("=")
    fits = {i for i in interfaces if any(i == name if exact else i.startswith(name) for name in names)}
    left = interfaces - fits - {"lo"} if value.startswith("^") else fits
    if left:
        return Finding("NCCL_SOCKET_IFNAME", "OK", f"{value}: {', '.join(sorted(left))}")
    return _no_interface(request, "NCCL_SOCKET_IFNAME", value, interfaces)


def _gloo_interface(request: Request, value: str, interfaces: set[str]) -> Finding:
    if set(value.split(",")) <= interfaces:
        return Finding("GLOO_SOCKET_IFNAME", "OK", value)
    return _no_interface(request, "GLOO_SOCKET_IFNAME", value, interfaces)


def _no_interface(request: Request, variable: str, value: str, interfaces: set[str]) -> Finding:
    state = "MISS" if request.in_job else request.lacking("ranks")
    remedy = f"set it to one of {', '.join(sorted(interfaces))}, or unset it: ranks cannot talk over what is not there"
    return Finding(variable, state, f"{value} is no interface of this machine", remedy)


def _proxies(environment: Mapping[str, str]) -> Findings:
    proxies = [name for name in ("http_proxy", "https_proxy", "all_proxy") if _either(environment, name)]
    excepted = _either(environment, "no_proxy").split(",")
    if proxies and "*" not in excepted and (lacking := _lacking(excepted)):
        remedy = f"export no_proxy=$no_proxy,{','.join(lacking)}: else what talks to this machine asks the proxy"
        yield Finding("proxy", "WARN", f"{', '.join(proxies)} set, {' and '.join(lacking)} not excepted", remedy)


def _lacking(excepted: Sequence[str]) -> list[str]:
    return [name for name in ("localhost", "127.0.0.1") if name not in (entry.strip() for entry in excepted)]


def _either(environment: Mapping[str, str], name: str) -> str:
    return environment.get(name) or environment.get(name.upper()) or ""


def _extensions(request: Request) -> Finding:
    """Where torch and DeepSpeed compile to; one that is killed meanwhile leaves a lock at which later ones wait."""
    named = request.environment.get("TORCH_EXTENSIONS_DIR")
    folder = Path(named) if named else Path.home() / ".cache" / "torch_extensions"
    if locks := sorted(folder.glob("**/lock")) if folder.is_dir() else []:
        remedy = f"if nothing is being compiled now: rm {locks[0]}; every later start waits for it without a word"
        return Finding("TORCH_EXTENSIONS_DIR", "WARN", f"{len(locks)} locks in {folder}", remedy)
    mount = mount_of(folder)
    if mount.is_shared and not request.in_job:
        return Finding("TORCH_EXTENSIONS_DIR", "OK", f"{folder} ({mount.kind}); the batch scripts set another")
    if mount.is_shared:
        remedy = "export TORCH_EXTENSIONS_DIR=/tmp/..., per job: one that is killed while it compiles blocks all others"
        return Finding("TORCH_EXTENSIONS_DIR", "WARN", f"{folder} is shared by all nodes ({mount.kind})", remedy)
    return Finding("TORCH_EXTENSIONS_DIR", "OK", f"{folder} ({mount.kind})")
