"""Cases of a benchmark, on a GPU each in a process of its own: what one allocates or lacks is not the next one's.

A script calls :func:`results` with its cases. It starts itself again for each, and reads results as lines of JSON.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ccmdist.console import start_logging

Case = Mapping[str, Any]
Result = dict[str, Any]
Measure = Callable[[Case], Iterable[Result]]

MARK: Final = "RESULT "
PROBLEM: Final = "problem"
"""Key of a result that says why there is none."""
DIED: Final = "died"
"""Key of a result of a process that has ended on its own."""
ENVIRONMENT: Final = {
    # Batches of several sizes follow each other: without it, memory that one leaves in pieces is lost to the next.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "HF_HUB_OFFLINE": "1",
}


def results(script: str, cases: Sequence[Case], measure: Measure, is_apart: bool) -> Iterator[Result]:
    """What ``measure`` gives for each case, as soon as it is known.

    Args:
        script: ``__file__`` of the caller, whose ``main`` calls :func:`serve` for ``--case``.
        cases: Of plain values.
        measure: Yields the results of a case; a result has the keys of its case.
        is_apart: Run each case in a process of its own. One that dies gives a result with a problem.
    """
    start_logging()
    for case in cases:
        yield from _in_child(script, case) if is_apart else measure(case)


def serve(case: str, measure: Measure) -> int:
    """Be the process of one case."""
    start_logging()
    for result in measure(json.loads(case)):
        print(MARK + json.dumps(result), flush=True)
    return 0


def _in_child(script: str, case: Case) -> Iterator[Result]:
    command = [sys.executable, str(Path(script).resolve()), "--case", json.dumps(case)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT | os.environ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith(MARK):
                yield json.loads(line.removeprefix(MARK))
            else:
                sys.stderr.write(line)
    if child.returncode:
        yield {**case, DIED: True, PROBLEM: f"the process ended with {child.returncode}"}
