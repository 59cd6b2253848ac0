"""A rank that hangs is named in the log within its section's timeout, all end, and the next start goes on."""

import functools
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from ccmdist.cluster.ledger import buckets, ettr, read_ledger
from ccmdist.cluster.run_directory import Outcome, RunDirectory
from tests.distributed.small_world import weights

pytestmark = pytest.mark.distributed

SHORT = ("timeouts.step_min=0.15", "timeouts.answer_s=4")
"""Nine seconds: a step takes a fraction of one, but the machine may be busy."""


def keep_stderr(folder, rank):
    file = os.open(Path(folder) / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 2)


def hang_while_reading(folder, rank):
    """Let rank 1 hang in reading the data of its third step; its other threads live."""
    from ccmdist.train.objectives.edit import EditObjective

    keep_stderr(folder, rank)
    original = EditObjective.batches

    def batches(self, first_step):
        for batch in original(self, first_step):
            if rank == 1 and batch["step"] == 2:
                time.sleep(600)  # as a read from a file server that is gone
            yield batch

    EditObjective.batches = batches


def assert_equal_weights(found, straight):
    expected, actual = weights(straight), weights(found)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_a_stopped_rank_is_named_and_the_run_goes_on_from_its_commit(train_ranks):
    folder = train_ranks.folder
    assert train_ranks("straight", 2) == [0, 0]
    patch = functools.partial(keep_stderr, str(folder))
    codes = train_ranks("stopped", 2, *SHORT, fault="sigstop@step:rank=1,step=3", patch=patch)
    assert codes == [70, -9], "rank 0 ends by force; who started the ranks then kills the stopped one"
    log = (folder / "stderr-0").read_text()
    line = re.search(
        r"hang: compute after step 3 for (\d+) s, longer than timeouts.step_min allows; main thread at ", log
    )
    assert line, log
    assert int(line[1]) >= 9
    assert "hang: rank 1 does not answer (stopped, dead or unreachable)" in log
    assert "rank 0: stacks of all threads" in log
    assert "train/loop.py" in log, "the dump does not show the main thread"
    assert train_ranks("stopped", 2) == [0, 0]
    assert RunDirectory(folder / "stopped").outcome() == Outcome("done", "all 6 steps are done", 6)
    assert_equal_weights(folder / "stopped", folder / "straight")
    spent = buckets(read_ledger(folder / "stopped" / "ledger.jsonl"))
    assert spent["wasted"] > 9, "the time of the hang was not told by the rank that ended itself"
    assert 0 < ettr(spent) < ettr(spent, with_queue=False) < 1


def test_a_rank_that_hangs_in_reading_data_is_named_although_it_answers(train_ranks):
    folder = train_ranks.folder
    codes = train_ranks("reading", 2, *SHORT, patch=functools.partial(hang_while_reading, str(folder)))
    assert codes == [70, 70]
    log = (folder / "stderr-0").read_text()
    assert "hang: the others wait in compute after step 2 for rank 1, since " in log
    assert "s in data_wait after step 2 at batches (distributed/test_distributed_hang.py:" in log
    assert "rank 1 hang: data_wait after step 2 for" in (folder / "stderr-1").read_text()


def meet(folder, rank, port, world_size=2):
    """Be a rank that only meets the others, through a host and port as under srun; rank 0 keeps their store."""
    from ccmdist.cluster.process_group import MissingRanks, ProcessGroup
    from ccmdist.cluster.ranks import Ranks

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        return ProcessGroup(Ranks(rank, rank, world_size), timeout_min=1.0, meet_min=0.02 if folder else 2.0)
    except MissingRanks as error:
        (Path(folder) / f"error-{rank}").write_text(str(error))
        os._exit(error.exit_code)


def free_port():
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (0, "rank 0 did not meet rank 1 of 2 within 0.02 min; look for the last lines of who is missing"),
        (1, "rank 1 did not find rank 0 at 127.0.0.1:"),
    ],
)
def test_ranks_that_never_come_are_named(forkserver, tmp_path, rank, expected):
    child = forkserver.Process(target=meet, args=(str(tmp_path), rank, free_port()))
    child.start()
    child.join(timeout=100)
    assert child.exitcode == 70
    assert (tmp_path / f"error-{rank}").read_text().startswith(expected)


def test_ranks_of_different_worlds_are_told(forkserver, tmp_path):
    port = free_port()
    children = [forkserver.Process(target=meet, args=(str(tmp_path), rank, port, 2 + rank)) for rank in (0, 1)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=100)
    assert [child.exitcode for child in children] == [70, 70]
    error = (tmp_path / "error-0").read_text()
    assert error.startswith("rank 0 was started as one of 2 ranks, rank 1 as one of 3; start all ranks by one command")


def test_a_port_that_is_in_use_is_told(forkserver, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        child = forkserver.Process(target=meet, args=(str(tmp_path), 0, port))
        child.start()
        child.join(timeout=100)
    assert child.exitcode == 70
    error = (tmp_path / "error-0").read_text()
    assert error.startswith(f"rank 0: cannot listen on 127.0.0.1:{port} (")
    assert "take another MASTER_PORT if the port is in use" in error


def stop_one_of_two(folder, rank, port, stopped):
    """Two ranks that meet; one is then stopped, and the other waits for it in a collective."""
    from ccmdist.cluster.ranks import Ranks
    from ccmdist.cluster.sections import Sections
    from ccmdist.cluster.watchdog import Watchdog
    from ccmdist.config.train import TimeoutSettings
    from ccmdist.console import start_logging

    keep_stderr(folder, rank)
    start_logging(rank)
    sections = Sections(time.time())
    timeouts = TimeoutSettings(setup_min=1.0, step_min=0.05, answer_s=2.0)
    with Watchdog(sections, timeouts, Ranks(rank, rank, 2), lambda: None) as watchdog:
        group = meet("", rank, port)
        watchdog.listen(group.store)
        for step in (0, 1):
            with sections("compute", step):
                if step == 1 and rank == stopped:
                    os.kill(os.getpid(), signal.SIGSTOP)
                group.barrier()


@pytest.mark.parametrize("stopped", [0, 1])
def test_also_the_rank_that_keeps_the_store_may_be_the_stopped_one(forkserver, tmp_path, stopped):
    port = free_port()
    children = [
        forkserver.Process(target=stop_one_of_two, args=(str(tmp_path), rank, port, stopped)) for rank in (0, 1)
    ]
    for child in children:
        child.start()
    children[1 - stopped].join(timeout=100)
    children[stopped].kill()
    assert children[1 - stopped].exitcode == 70
    log = (tmp_path / f"stderr-{1 - stopped}").read_text()
    assert "hang: compute after step 1 for" in log
    assert f"hang: rank {stopped} does not answer (stopped, dead or unreachable)" in log
