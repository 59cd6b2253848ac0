"""What all benchmarks of a GPU do: measure cases, each in a process of its own, and write rows as they come.

On a GPU what one case allocates or lacks is not the next one's: a script starts itself again for each, and reads its
results as lines of JSON. On a CPU all is done in one process.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

from ccmdist.console import start_logging

from .rows import Row, finish, write
from .scale import Scale

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


def run(
    script: str,
    about: str | None,
    options: Callable[[argparse.ArgumentParser], object],
    cases_of: Callable[[argparse.Namespace, Scale], Sequence[Case]],
    measure: Measure,
    rows_of: Callable[[Result, Scale], list[Row]],
    variant: Callable[[argparse.Namespace], str] = lambda _: "",
) -> int:
    """A whole script: its command line, its cases, its table and its results; the exit code.

    Args:
        script: ``__file__`` of the caller; its name is that of the results.
        about: What ``--help`` says.
        options: Adds the script's own options.
        cases_of: What is to be measured, without the scale.
        measure: Yields the results of a case; a result has the keys of its case.
        rows_of: Of one result.
        variant: Is added to the name of the results.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    Scale.add_to(parser)
    options(parser)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        return serve(arguments.case, measure)
    scale = Scale.of(arguments)
    name = scale.file(Path(script).stem) + variant(arguments)
    cases = [{**asdict(scale), **case} for case in cases_of(arguments, scale)]
    rows: list[Row] = []
    has_died = False
    for result in results(script, cases, measure, is_apart=scale.device == "cuda"):
        rows += rows_of(result, scale)
        has_died |= DIED in result
        write(name, rows)
    return finish(name, rows) or int(has_died or not rows)


def each(about: Result, key: str, values: Iterable[int], measured: Callable[[int], Result]) -> Iterator[Result]:
    """Results for some values, such as sizes of a batch, until one does not fit into the memory.

    Args:
        about: What stands in every result.
        key: Name of the value in a result.
        values: In the order in which they are measured.
        measured: What is measured for one.
    """
    for value in values:
        try:
            yield {**about, key: value, **measured(value)}
        except torch.OutOfMemoryError:
            yield {**about, key: value, PROBLEM: "out of memory"}
            return  # what a library has begun cannot be taken back


def results(script: str, cases: Sequence[Case], measure: Measure, is_apart: bool) -> Iterator[Result]:
    """What ``measure`` gives for each case, as soon as it is known.

    Args:
        script: ``__file__`` of the caller, which :func:`run` has started.
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
