"""Named points at which a drill may kill, stop or fail a process; without the variable they do nothing.

CCMDIST_FAULT="sigkill@checkpoint.before_rename:rank=1,step=3" kills rank 1 there at step 3; "enospc@..." raises
the error of a full disk. With ",operation=7" the fault strikes not there but at the seventh operation from there on
that changes a disk (create, flush, rename, remove, ...), so that a drill can try them all. Several faults are
separated by ";".
"""

import errno
import os
import re
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from ccmdist.errors import RunError

VARIABLE: Final = "CCMDIST_FAULT"
FORM: Final = re.compile(
    r"(?P<action>sigkill|sigstop|sigusr2|sigterm|enospc)@(?P<point>[a-z_.]+):rank=(?P<rank>\d+),step=(?P<step>\d+)"
    r"(,operation=(?P<operation>[1-9]\d*))?"
)
DISK_EVENTS: Final = frozenset(
    ("os.mkdir", "os.chmod", "os.link", "os.rename", "os.remove", "os.rmdir", "os.truncate", "ccmdist.sync")
)
"""Audit events of Python, and one of :mod:`ccmdist.commit`, that change what is on a disk; so does "open" to write."""


def fault_point(name: str, global_rank: int, step: int) -> None:
    """Suffer here, or some operations later, what the variable asks for, if it names this point, rank and step.

    Raises:
        OSError: ENOSPC, when the fault is "enospc".
        RunError: If the variable cannot be read.
    """
    for text in filter(None, os.environ.get(VARIABLE, "").split(";")):
        match = FORM.fullmatch(text.strip())
        if match is None:
            raise RunError(f"{VARIABLE}: cannot read {text!r}", "write ACTION@POINT:rank=R,step=S[,operation=K]")
        if (match["point"], int(match["rank"]), int(match["step"])) == (name, global_rank, step):
            if match["operation"]:
                sys.addaudithook(_at_operation(int(match["operation"]), partial(_strike, match)))
            else:
                _strike(match)


def _strike(match: re.Match[str]) -> None:
    sys.stderr.write(f"fault: {match[0]}\n")
    if match["action"] == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"fault at {match['point']}")
    os.kill(os.getpid(), getattr(signal, match["action"].upper()))


def _at_operation(number: int, strike: Callable[[], None]) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that calls ``strike`` before the ``number``-th operation that changes a disk."""
    left = number

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if left and (event in DISK_EVENTS or (event == "open" and _writes(arguments))):
            left -= 1
            if not left:
                strike()

    return hook


def _writes(arguments: tuple[Any, ...]) -> bool:
    """Whether the arguments of an "open" event ask for writing."""
    return isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
