"""A rank that hangs is named in the log within its section's timeout, all end, and the next start goes on."""

import functools
import os
import re
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


def meet_alone(folder):
    """Be rank 0 of two; the other never comes."""
    from ccmdist.cluster.process_group import MissingRanks, ProcessGroup
    from ccmdist.cluster.ranks import Ranks

    try:
        ProcessGroup(Ranks(0, 0, 2), 1.0, f"file://{folder}/rendezvous", meet_min=0.02)
    except MissingRanks as error:
        (Path(folder) / "error").write_text(str(error))
        os._exit(error.exit_code)


def test_ranks_that_never_come_are_named(forkserver, tmp_path):
    child = forkserver.Process(target=meet_alone, args=(str(tmp_path),))
    child.start()
    child.join(timeout=100)
    assert child.exitcode == 70
    error = (tmp_path / "error").read_text()
    assert error.startswith("rank 0 waited 0.02 min and did not meet rank 1 of 2; look for the last lines")
