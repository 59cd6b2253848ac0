"""The machine and the environment: what slows ranks down or keeps them from meeting, never a secret."""

import os
import resource

import pytest

from ccmdist.diagnostics.checks import host
from ccmdist.diagnostics.checks.mounts import Mount
from tests.unit.diagnostics.doctored import one, request, settings

INTERFACES = {"lo", "eth0", "ib0", "ib1"}


def variable(name, required=(), config=None, **environment):
    return one(list(host.variables(request(*required, config=config, **environment), INTERFACES)), name)


@pytest.mark.parametrize(
    ("value", "state", "found"),
    [
        ("ib", "OK", "ib: ib0, ib1"),
        ("=ib0", "OK", "=ib0: ib0"),
        ("=ib", "WARN", "=ib is no interface of this machine"),
        ("^lo,eth", "OK", "^lo,eth: ib0, ib1"),
        ("hsn0", "WARN", "hsn0 is no interface of this machine"),
    ],
)
def test_nccl_takes_prefixes_exact_names_and_exclusions(value, state, found):
    finding = variable("NCCL_SOCKET_IFNAME", NCCL_SOCKET_IFNAME=value)
    assert (finding.state, finding.found) == (state, found)


def test_gloo_takes_exact_names():
    assert variable("GLOO_SOCKET_IFNAME", GLOO_SOCKET_IFNAME="ib0").state == "OK"
    finding = variable("GLOO_SOCKET_IFNAME", GLOO_SOCKET_IFNAME="ib")
    assert finding.remedy.startswith("set it to one of eth0, ib0, ib1, lo, or unset it")


def test_an_interface_that_is_not_there_stops_a_job():
    assert variable("GLOO_SOCKET_IFNAME", GLOO_SOCKET_IFNAME="x", SLURM_JOB_ID="1").state == "MISS"
    assert variable("GLOO_SOCKET_IFNAME", ("ranks",), GLOO_SOCKET_IFNAME="x").state == "MISS"


def test_a_proxy_that_catches_local_addresses_is_told_but_never_shown():
    finding = variable("proxy", https_proxy="http://me:secret@proxy:3128", no_proxy="localhost,.site")
    assert finding.state == "WARN"
    assert finding.found == "https_proxy set, 127.0.0.1 not excepted"
    assert "secret" not in finding.found + finding.remedy
    everything = request(HTTP_PROXY="http://proxy", NO_PROXY="*")
    assert not [finding for finding in host.variables(everything, INTERFACES) if finding.what == "proxy"]


def test_threads_matter_where_several_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: set(range(8)))
    assert variable("OMP_NUM_THREADS").state == "OK"
    assert "export OMP_NUM_THREADS=4:" in variable("OMP_NUM_THREADS", config=settings("processes=2")).remedy
    assert "OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK" in variable("OMP_NUM_THREADS", SLURM_JOB_ID="1").remedy
    finding = variable("OMP_NUM_THREADS", config=settings("processes=2"), OMP_NUM_THREADS="8")
    assert (finding.state, finding.found) == ("WARN", "8 in each of 2 processes, on 8 cores")


def test_a_job_should_not_ask_the_hub():
    assert variable("HF_HUB_OFFLINE", SLURM_JOB_ID="1").state == "WARN"
    assert variable("HF_HUB_OFFLINE", SLURM_JOB_ID="1", HF_HUB_OFFLINE="1").state == "OK"


def test_a_lock_of_a_compiler_that_was_killed_is_found(tmp_path):
    (tmp_path / "py311_cpu" / "fused_adam").mkdir(parents=True)
    lock = tmp_path / "py311_cpu" / "fused_adam" / "lock"
    lock.write_text("")
    finding = host._extensions(request(TORCH_EXTENSIONS_DIR=str(tmp_path)))
    assert finding.state == "WARN"
    assert f"rm {lock}; every later start waits for it" in finding.remedy
    lock.unlink()
    assert host._extensions(request(TORCH_EXTENSIONS_DIR=str(tmp_path))).state == "OK"


def test_a_shared_folder_to_compile_in_matters_in_a_job(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "mount_of", lambda _: Mount(tmp_path, "lustre"))
    named = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    assert host._extensions(request(**named)).state == "OK"
    assert "shared by all nodes (lustre)" in host._extensions(request(**named, SLURM_JOB_ID="1")).found


def test_a_umask_that_opens_new_files_to_everybody_is_told_and_not_changed():
    before = os.umask(0o022)
    try:
        findings = list(host.check(request()))
        assert one(findings, "umask").found == "0022: every user of the cluster may read new files"
        assert os.umask(0o027) == 0o022
        assert one(list(host.check(request())), "umask").state == "OK"
    finally:
        os.umask(before)


def test_a_low_limit_of_open_files_comes_with_the_one_that_is_allowed(monkeypatch):
    monkeypatch.setattr(host.resource, "getrlimit", lambda kind: (1024, 8192))
    findings = list(host._limits())
    assert one(findings, "open files").remedy.startswith("`ulimit -n 8192` in slurm/env.sh")


def test_pinned_memory_matters_where_there_is_infiniband(tmp_path, monkeypatch):
    limits = {resource.RLIMIT_NOFILE: (1 << 20, 1 << 20), resource.RLIMIT_MEMLOCK: (64 << 10, 64 << 10)}
    monkeypatch.setattr(host.resource, "getrlimit", limits.__getitem__)
    monkeypatch.setattr(host, "INFINIBAND", tmp_path)
    assert list(host._limits()) == []
    (tmp_path / "mlx5_0").mkdir()
    assert one(list(host._limits()), "locked memory").found == "limited to 64 KiB"


def test_more_processes_than_cores_are_told(monkeypatch):
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: {0, 1})
    finding = one(list(host.check(request(config=settings("processes=4")))), "machine")
    assert (finding.state, finding.remedy) == ("WARN", "processes=4 is more than 2 cores: set processes=2")
