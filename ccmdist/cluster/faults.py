"""Named points at which a drill may kill, stop or fail a process; without the variable they do nothing.

CCMDIST_FAULT="sigkill@checkpoint.before_rename:rank=1,step=3" kills rank 1 there at step 3; "enospc@..." raises
the error of a full disk. Several faults are separated by ";".
"""

import errno
import os
import re
import signal

from ccmdist.errors import RunError

VARIABLE = "CCMDIST_FAULT"
FORM = re.compile(
    r"(?P<action>sigkill|sigusr2|sigterm|enospc)@(?P<point>[a-z_.]+):rank=(?P<rank>\d+),step=(?P<step>\d+)"
)


def fault_point(name: str, global_rank: int, step: int) -> None:
    """Suffer here what the variable asks for, if it names this point, rank and step.

    Raises:
        OSError: ENOSPC, when the fault is "enospc".
        RunError: If the variable cannot be read.
    """
    for text in filter(None, os.environ.get(VARIABLE, "").split(";")):
        match = FORM.fullmatch(text.strip())
        if match is None:
            raise RunError(f"{VARIABLE}: cannot read {text!r}", "write ACTION@POINT:rank=R,step=S")
        if (match["point"], int(match["rank"]), int(match["step"])) == (name, global_rank, step):
            if match["action"] == "enospc":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"fault at {name}")
            os.kill(os.getpid(), getattr(signal, match["action"].upper()))
