"""Processes for distributed tests are forked from one server that has imported the heavy libraries once."""

import atexit
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import hypothesis
import pytest

from tests.distributed.small_world import make_world

for name, value in {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GLOO_SOCKET_IFNAME": "lo",
    "DS_ACCELERATOR": "cpu",
    "TORCH_EXTENSIONS_DIR": tempfile.gettempdir() + f"/ccmdist-test-extensions-{os.getpid()}",
    "CCMDIST_NODE_TMP": tempfile.gettempdir() + f"/ccmdist-test-node-{os.getpid()}",
}.items():
    os.environ.setdefault(name, value)
atexit.register(shutil.rmtree, tempfile.gettempdir() + f"/ccmdist-test-node-{os.getpid()}", ignore_errors=True)


def pytest_configure(config):
    """Processes that share the tests have a folder of a node each: what a test finds must not depend on their order."""
    if worker := getattr(config, "workerinput", None):
        os.environ["CCMDIST_NODE_TMP"] += f"-{worker['workerid']}"
        atexit.register(shutil.rmtree, os.environ["CCMDIST_NODE_TMP"], ignore_errors=True)


# The time that an example takes says nothing here: cores are shared.
hypothesis.settings.register_profile("ccmdist", deadline=None)
hypothesis.settings.load_profile("ccmdist")

PRELOADED = [
    "torch",
    "deepspeed",
    "diffusers.models.transformers.transformer_qwenimage",
    "transformers",
    "ccmdist.jobs.train_rank",
]


@pytest.fixture(scope="session")
def forkserver():
    """A multiprocessing context whose processes start with the heavy imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@pytest.fixture(scope="session")
def world(forkserver, tmp_path_factory):
    """Folder with shards/, model/ and cache/."""
    folder = tmp_path_factory.mktemp("world")
    child = forkserver.Process(target=make_world, args=(str(folder),))
    child.start()
    child.join(timeout=300)
    assert child.exitcode == 0, "the test world could not be made"
    return folder


@pytest.fixture
def run_ranks(forkserver, tmp_path_factory):
    """Run ``function(group, *arguments)`` on several ranks; their return values, or the first failure's traceback."""

    def run(function, world_size, *arguments, expect_exit_codes=None):
        folder = tmp_path_factory.mktemp("ranks")
        children = [
            forkserver.Process(target=_rank, args=(function, rank, world_size, str(folder), arguments))
            for rank in range(world_size)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(timeout=240)
            if child.is_alive():
                child.kill()
        codes = [child.exitcode for child in children]
        if expect_exit_codes is not None:
            assert codes == expect_exit_codes, _failures(folder)
            return None
        assert codes == [0] * world_size, f"exit codes {codes}\n{_failures(folder)}"
        import torch

        return [torch.load(folder / f"result-{rank}", weights_only=True) for rank in range(world_size)]

    return run


def _rank(function, rank, world_size, folder, arguments):
    import torch

    from ccmdist.cluster.process_group import ProcessGroup
    from ccmdist.cluster.ranks import Ranks

    torch.set_num_threads(1)
    try:
        group = ProcessGroup(Ranks(rank, rank, world_size), timeout_min=2, rendezvous=f"file://{folder}/rendezvous")
        torch.save(function(group, *arguments), Path(folder) / f"result-{rank}")
        group.barrier()
        group.close()
    except BaseException:
        (Path(folder) / f"failure-{rank}").write_text(traceback.format_exc())
        sys.exit(1)


def _failures(folder):
    return "\n".join(f"rank {path.name[-1]}:\n{path.read_text()}" for path in sorted(Path(folder).glob("failure-*")))


@pytest.fixture(autouse=True)
def _logging_as_before():
    """A command that a test runs in this process logs to that test's stderr, which is closed after it."""
    log = logging.getLogger("ccmdist")
    handlers, level, propagate = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.propagate = handlers, propagate
    log.setLevel(level)
