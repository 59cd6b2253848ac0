"""What each process of a job that was submitted through Submitit runs: one stage, as its command would.

Submitit's signal handler saves, requeues and exits inside the handler, on rank 0 alone: a run whose ranks must save
together would lose its steps. It is installed before the work is called and never reached once the work has begun:
stop signals are held back until the stage takes them with its own :class:`~ccmdist.cluster.preemption.StopFlag`, and
whatever the stage restores afterwards does nothing. Requeueing is left to the batch script, after the commit.
"""

import importlib
import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ccmdist.cluster.job_folder import JobFolder
from ccmdist.cluster.preemption import STOP_SIGNALS, hold_back_stop_signals
from ccmdist.console import start_logging

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission


@dataclass(frozen=True)
class SubmittedStage:
    """The work of one process. Pickled by reference: the code is the snapshot's, the settings are the folder's.

    Attributes:
        stage: Name of a stage.
        folder: Of the job.
        options: Further words of the command.
    """

    stage: str
    folder: str
    options: tuple[str, ...] = ()

    def __call__(self) -> None:
        """Run the stage.

        Raises:
            SystemExit: With the stage's exit code, unless all is done. Submitit then writes no result: the job will be
                requeued, or has failed.
        """
        hold_back_stop_signals()
        _replace_handlers()
        start_logging()
        # The command line stands above the jobs; what was submitted is one of its commands.
        run = importlib.import_module("ccmdist.cli").exit_code
        code = run([self.stage, str(JobFolder(Path(self.folder)).config), *self.options])
        if code or not self._is_done():
            sys.exit(code)

    def checkpoint(self) -> "DelayedSubmission":
        """For Submitit, when a signal comes just before the work is called: the same job again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _is_done(self) -> bool:
        """Whether this attempt was the last. Training ends with 0 also when it asks to be started again."""
        try:
            state = json.loads(JobFolder(Path(self.folder)).outcome.read_text())["state"]
        except FileNotFoundError:
            return True
        return bool(state == "done")


def _replace_handlers() -> None:
    """Forget Submitit's handlers. Not by SIG_IGN, which would discard a signal that is being held back."""
    for number in STOP_SIGNALS:
        signal.signal(number, _do_nothing)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)


def _do_nothing(number: int, frame: object) -> None:
    pass
