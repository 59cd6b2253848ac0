"""Can ranks find each other and add up: a real all-reduce, on this machine or on every node of this job."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from ccmdist.diagnostics.checks.allocation import Allocation, allocation
from ccmdist.diagnostics.checks.finding import Finding, Findings, Request, last_line
from ccmdist.diagnostics.checks.rank_probe import NUM_VALUES
from ccmdist.diagnostics.checks.rank_probe import TIMEOUT_S as COLLECTIVE_TIMEOUT_S

PROBE = "ccmdist.diagnostics.checks.rank_probe"
TIMEOUT_S = COLLECTIVE_TIMEOUT_S + 60.0
"""An import of torch comes first."""


def check(request: Request, num_gpus: int) -> Findings:
    """A sum over two local ranks, or over one rank per node in a job of several; only when it was asked for.

    Args:
        request: What was asked.
        num_gpus: GPUs of this machine.
    """
    nodes = allocation(request)
    many = nodes is not None and len(nodes.hosts) > 1
    if nodes is not None and many:
        finding = _over_nodes(nodes, "nccl" if num_gpus else "gloo")
        yield finding
        if finding.state == "OK":  # which proves that the nodes resolve where they meet; this machine need not
            return
    yield from _rendezvous(request, nodes)
    if "ranks" in request.required and not many:
        yield _here("nccl" if num_gpus > 1 else "gloo")


def judge(what: str, backend: str, codes: Sequence[int], told: str, complaint: str) -> Finding:
    """What to say of ranks that ended.

    Args:
        what: Who took part.
        backend: "gloo" or "nccl".
        codes: Exit codes.
        told: What the first rank printed.
        complaint: Their standard error.
    """
    lines = [line for line in told.splitlines() if line.startswith("{")]
    if any(codes) or not lines:
        variable = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
        remedy = (
            f"look for a firewall between the ranks, and set {variable} to the interface of the cluster's network "
            "(`ip -br addr`); NCCL_DEBUG=INFO tells more"
        )
        reason = last_line(complaint) or f"ended with codes {list(codes)}"
        return Finding("all-reduce", "MISS", f"{what} on {backend} failed: {reason}", remedy)
    facts: dict[str, Any] = json.loads(lines[-1])
    if not facts["is_right"]:
        return Finding("all-reduce", "MISS", f"{what} on {backend}: the sum is wrong", "test the network and the GPUs")
    rate = 4 * NUM_VALUES / max(facts["seconds"], 1e-9) / 2**30
    found = f"{what} on {backend} over {facts['interface']}, {rate:.2g} GiB/s"
    return Finding("all-reduce", "OK", found)


def _rendezvous(request: Request, nodes: Allocation | None) -> Findings:
    host = request.environment.get("MASTER_ADDR") or (nodes.hosts[0] if nodes is not None and nodes.hosts else "")
    if not host:
        return
    try:
        address = socket.getaddrinfo(host, None)[0][4][0]
    except OSError as error:
        remedy = (
            "export MASTER_ADDR=an address of the first node (`srun -N1 -n1 hostname -I`): ranks meet there, and the "
            "nodes' names must resolve on every node"
        )
        yield Finding("MASTER_ADDR", "MISS", f"{host} cannot be resolved ({error.strerror})", remedy)
    else:
        yield Finding("MASTER_ADDR", "OK", f"{host} is {address}")


def _here(backend: str) -> Finding:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**_plain(), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common.setdefault("GLOO_SOCKET_IFNAME", "lo")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", PROBE, backend],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=TIMEOUT_S) for rank in ranks]
    except subprocess.TimeoutExpired:
        return judge("2 ranks here", backend, [1], "", f"no answer after {TIMEOUT_S:.0f} s")
    finally:
        for rank in ranks:
            rank.kill()
    codes = [rank.returncode for rank in ranks]
    complaints = [complaint for code, (_, complaint) in zip(codes, outputs, strict=True) if code]
    return judge("2 ranks here", backend, codes, outputs[0][0], "\n".join(complaints))


def _over_nodes(nodes: Allocation, backend: str) -> Finding:
    what = f"a rank on each of {len(nodes.hosts)} nodes, which meet at {nodes.hosts[0]},"
    port = 25000 + int(nodes.job_id) % 5000  # above those that slurm/job.sh gives to a job's own ranks
    environment = {**nodes.environment, "MASTER_ADDR": nodes.hosts[0], "MASTER_PORT": str(port)}
    try:
        done = subprocess.run(
            nodes.on_each_node(PROBE, backend), env=environment, timeout=TIMEOUT_S, check=False,
            capture_output=True, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return judge(what, backend, [1], "", f"no answer after {TIMEOUT_S:.0f} s")
    return judge(what, backend, [done.returncode], done.stdout, done.stderr)


def _plain() -> dict[str, str]:
    """This environment without the ranks of a cluster, which would speak against the two that are started here."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PMI"))}
