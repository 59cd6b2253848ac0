"""Ranks really meet and add; nodes really exchange files; what fails is told with what to look at."""

import fcntl
import os
import subprocess
import sys

import pytest

from ccmdist.diagnostics.checks import node_probe, nodes, rank_probe, ranks
from ccmdist.diagnostics.checks.file_system import Folder
from tests.unit.diagnostics.doctored import request

FACTS = {"num_unseen": 0, "round_trip_s": 0.05, "lockless": [], "clock_spread_s": 0.01}


def test_two_ranks_on_this_machine_add_up():
    (finding,) = ranks.check(request("ranks"), num_gpus=0)
    assert finding.state == "OK", finding
    assert finding.found.startswith("2 ranks here on gloo over lo, ")


def test_ranks_are_started_only_when_asked_for():
    assert list(ranks.check(request(), num_gpus=0)) == []


def test_ranks_that_do_not_meet_are_told_with_the_last_line_and_the_variable_to_set():
    finding = ranks.judge("2 ranks here", "gloo", [1, 0], "", "Traceback ...\nRuntimeError: Connection refused\n\n")
    assert finding.state == "MISS"
    assert finding.found == "2 ranks here on gloo failed: RuntimeError: Connection refused"
    assert "GLOO_SOCKET_IFNAME" in finding.remedy
    assert "NCCL_SOCKET_IFNAME" in ranks.judge("", "nccl", [-9], "", "").remedy


def test_a_sum_that_is_wrong_is_not_fit():
    told = '{"is_right": false, "seconds": 1.0, "interface": "ib0"}'
    assert ranks.judge("2 ranks", "nccl", [0, 0], told, "").state == "MISS"


def test_ranks_that_cannot_use_the_named_interface_fail_in_truth(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    (finding,) = ranks.check(request("ranks"), num_gpus=0)
    assert finding.state == "MISS"
    assert "nowhere0" in finding.found or "device" in finding.found


def test_a_meeting_point_that_does_not_resolve_is_told():
    (finding,) = ranks.check(request(MASTER_ADDR="no-such-host.invalid"), num_gpus=0)
    assert (finding.what, finding.state) == ("MASTER_ADDR", "MISS")
    assert finding.found.startswith("no-such-host.invalid cannot be resolved")
    (finding,) = ranks.check(request(MASTER_ADDR="127.0.0.1"), num_gpus=0)
    assert (finding.state, finding.found) == ("OK", "127.0.0.1 is 127.0.0.1")


def test_the_interface_of_an_address_is_named():
    class Address:
        address = "10.0.0.7"

    assert rank_probe.interface_of("10.0.0.7", {"ib0": [Address]}) == "ib0"
    assert rank_probe.interface_of("127.0.1.1", {}) == "lo"
    assert rank_probe.interface_of("10.0.0.8", {"ib0": [Address]}) == "10.0.0.8"


def exchange(folder, num_nodes):
    """Two or more tasks as srun would start them."""
    command = [sys.executable, "-m", "ccmdist.diagnostics.checks.node_probe", str(folder)]
    tasks = [
        subprocess.Popen(
            command,
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(num_nodes)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_nodes)
    ]
    return [task.communicate(timeout=100)[0] for task in tasks]


def test_nodes_exchange_files_and_respect_locks(tmp_path):
    told, *others = exchange(tmp_path, 3)
    assert set(others) == {""}
    facts = node_probe.json.loads(told)
    assert (facts["num_unseen"], facts["lockless"]) == (0, [])
    assert facts["round_trip_s"] < 30
    assert nodes.judge(Folder("run", tmp_path), 3, facts).state == "OK"


def test_a_node_that_is_never_seen_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(node_probe, "TIMEOUT_S", 0.2)
    facts = node_probe.first(tmp_path, world_size=3)
    assert facts == {"num_unseen": 2}
    finding = nodes.judge(Folder("run", tmp_path), 3, facts)
    assert (finding.state, finding.what) == ("MISS", "run on 3 nodes")
    assert finding.found == "2 nodes do not see what another one writes"


def test_a_lock_that_another_node_can_take_is_noticed(tmp_path):
    (tmp_path / "lock").write_bytes(b"")
    assert not node_probe._is_refused(tmp_path / "lock")
    with (tmp_path / "lock").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert node_probe._is_refused(tmp_path / "lock")


@pytest.mark.parametrize(
    ("change", "state", "text"),
    [
        ({}, "OK", "a file goes there and back in 0.05 s, locks hold, clocks within 0.01 s"),
        ({"lockless": ["n2"]}, "MISS", "locks do not hold between nodes (n2)"),
        ({"clock_spread_s": 9.0}, "WARN", "clocks within 9.00 s"),
        ({"round_trip_s": 31.0}, "WARN", "there and back in 31.00 s"),
    ],
)
def test_what_nodes_find_is_judged(tmp_path, change, state, text):
    finding = nodes.judge(Folder("run", tmp_path), 2, FACTS | change)
    assert finding.state == state
    assert text in finding.found


def test_outside_of_a_job_no_node_is_looked_at():
    assert list(nodes.check(request())) == []
