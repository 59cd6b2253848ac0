"""Several ranks on one machine without torchrun, so that exit codes, error texts and signals survive.

The processes are forked from a server that has imported the heavy libraries once: an import of torch,
diffusers and DeepSpeed costs seconds of CPU per process.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from ccmdist import console
from ccmdist.cluster.preemption import STOP_SIGNALS, hold_back_stop_signals
from ccmdist.cluster.ranks import Ranks
from ccmdist.errors import EXIT_DONE, EXIT_INTERNAL

SECONDS_FOR_THE_OTHERS = 5.0


def launch(module: str, function: str, config_path: str, processes: int) -> int:
    """Run ``function(config_path, ranks, rendezvous)`` in several processes; the exit code of the first that failed.

    Args:
        module: Name of a module, which the fork server imports beforehand and this process does not.
        function: Name of a function in it, which returns the exit code of its rank.
        config_path: Handed to every rank.
        processes: Number of ranks.

    A stop signal to this process is passed on to every rank, also one that comes while they are being started. When
    one rank dies the others, who would wait for it in a collective, are ended as well, and the death is told in one
    line. When this process is killed, the ranks stop as on a signal.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([console.__name__, module])
    with tempfile.TemporaryDirectory(prefix="ccmdist-") as folder:
        rendezvous = f"file://{Path(folder) / 'rendezvous'}"
        ranks = [Ranks(rank, rank, processes) for rank in range(processes)]
        children = [
            context.Process(target=_rank, args=(module, function, config_path, rank, rendezvous)) for rank in ranks
        ]
        # The fork server inherits what is held back here, and so does each rank until it has a StopFlag.
        hold_back_stop_signals()
        before = {number: signal.signal(number, lambda n, _: _pass_on(children, n)) for number in STOP_SIGNALS}
        try:
            for child in children:
                child.start()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            return _wait(children)
        finally:
            for child in children:
                if child.is_alive():
                    child.kill()
            for number, handler in before.items():
                signal.signal(number, handler)


def _rank(module: str, function: str, config_path: str, ranks: Ranks, rendezvous: str) -> None:
    # A terminal sends ctrl-C to a whole process group; in a group of its own, a rank gets it from the launcher alone.
    os.setpgid(0, 0)
    threading.Thread(target=_stop_without_launcher, daemon=True, name="launcher-watch").start()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    sys.exit(getattr(importlib.import_module(module), function)(config_path, ranks, rendezvous))


def _stop_without_launcher() -> None:
    """When the launcher was killed, stop as on a signal: commit, and leave the run to whoever starts it again."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None, "a rank is a child of the launcher"
    launcher.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _pass_on(children: Sequence[BaseProcess], number: int) -> None:
    for child in children:
        if child.pid is not None and child.is_alive():
            os.kill(child.pid, number)


def _wait(children: Sequence[BaseProcess]) -> int:
    while all(child.exitcode in (None, EXIT_DONE) for child in children):
        if all(child.exitcode == EXIT_DONE for child in children):
            return EXIT_DONE
        time.sleep(0.05)
    _give_time(children)
    failed = [
        (rank, child.exitcode or 0) for rank, child in enumerate(children) if child.exitcode not in (None, EXIT_DONE)
    ]
    for rank, code in failed:
        if code < 0:
            sys.stderr.write(
                f"rank {rank} was killed by {signal.Signals(-code).name}; "
                "run the same command again to continue from the last checkpoint\n"
            )
    codes = [code for _, code in failed]
    return next((code for code in codes if code > 0 and code != EXIT_INTERNAL), EXIT_INTERNAL)


def _give_time(children: Sequence[BaseProcess]) -> None:
    """Wait a little for ranks that end by themselves, for instance all with the same refusal."""
    deadline = time.monotonic() + SECONDS_FOR_THE_OTHERS
    while time.monotonic() < deadline and any(child.exitcode is None for child in children):
        time.sleep(0.05)
