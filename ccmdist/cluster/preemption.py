"""Signals become a flag; nothing else ever happens inside a signal handler.

A collective that hangs blocks the interpreter in C, where Python handlers do not run. The C handler still
writes the signal's number into a pipe, so a thread that reads it sees every signal at once and can end the
process by force when the main thread never comes back.
"""

import faulthandler
import os
import signal
import sys
import threading
from types import TracebackType
from typing import Self

from ccmdist.errors import EXIT_INTERNAL

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """Remembers the first stop signal of this process; a context manager that restores the old handlers.

    Args:
        forced_exit_s: Seconds after the first signal at which the process ends itself with exit code 70.
    """

    def __init__(self, forced_exit_s: float) -> None:
        self.forced_exit_s = forced_exit_s
        self.signal_number = 0
        self._pid = os.getpid()
        self._finished = threading.Event()

    def __bool__(self) -> bool:
        return self.signal_number != 0

    @property
    def reason(self) -> str:
        """The name of the signal, or an empty text."""
        return signal.Signals(self.signal_number).name if self.signal_number else ""

    def __enter__(self) -> Self:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._old_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._old_handlers = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        threading.Thread(target=self._watch, daemon=True, name="stop-watch").start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finished.set()
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._write_end)

    def _handle(self, number: int, frame: object) -> None:
        # Forked children inherit this handler; only the process that made the flag has a loop that looks at it.
        if os.getpid() == self._pid:
            self.signal_number = self.signal_number or number

    def _watch(self) -> None:
        while data := os.read(self._read_end, 1):
            if data[0] in STOP_SIGNALS:
                self.signal_number = self.signal_number or data[0]
                if not self._finished.wait(self.forced_exit_s):
                    show_stacks(
                        f"forced exit: {self.reason} came {self.forced_exit_s:.0f} s ago and a step still hangs"
                    )
                    os._exit(EXIT_INTERNAL)
                break
        os.close(self._read_end)


def show_stacks(why: str) -> None:
    """Write to stderr why, and where each thread of this process is."""
    sys.stderr.write(f"{why}\n")
    faulthandler.dump_traceback(all_threads=True)


def hold_back_stop_signals() -> None:
    """Let stop signals wait until a :class:`StopFlag` or a launcher is there to take them; imports take seconds."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def ignore_stop_signals(worker_id: int = 0) -> None:
    """For data loader workers: Slurm signals every process of a job step, and only the main one may react."""
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
