"""How a command ends: with 0 done, 75 run me again, 78 refused, 70 an error of ours, and one message that says why."""

import errno
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Final

import typer
from typer.exceptions import TyperException

from ccmdist.errors import EXIT_INTERNAL, EXIT_REFUSED, EXIT_REQUEUE, OF_THE_MACHINE, CcmdistError, Preempted

TYPER_CTRL_C: Final = 130
"""What typer makes of a KeyboardInterrupt."""
DISK_IS_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a write, which name no file."""


def code_of(command: Callable[[], int | None]) -> int:
    """Run a command; its exit code. What the user can mend is told in one message on stderr.

    Args:
        command: Raises what typer and ccmdist raise.
    """
    try:
        code = command() or 0
    except Preempted as stop:
        return _told(str(stop), EXIT_REQUEUE)
    except CcmdistError as error:
        return _told(str(error), error.exit_code)
    except TyperException as error:
        return _told(_usage(error), EXIT_REFUSED)
    except OSError as error:
        if error.errno and (error.filename or error.errno in DISK_IS_FULL):
            where = f"{error.filename}: " if error.filename else ""
            if error.errno in OF_THE_MACHINE:
                remedy = f"the file system failed on {socket.gethostname()}; run the same command again, or elsewhere"
                return _told(f"{where}{error.strerror}; {remedy}", EXIT_INTERNAL)
            remedy = "see that the path exists, can be written and has space left"
            return _told(f"{where}{error.strerror}; {remedy}", EXIT_REFUSED)
        return _ours()
    except (typer.Abort, KeyboardInterrupt):
        code = TYPER_CTRL_C
    except Exception:
        return _ours()
    if code == TYPER_CTRL_C:
        return _told("stopped by ctrl-C; run the same command again to go on", EXIT_REQUEUE)
    return code


def _usage(error: TyperException) -> str:
    message, context = error.format_message(), getattr(error, "ctx", None)
    if context is None or message.startswith("Usage:"):  # a group without a command tells its whole help
        return message
    return f"{message} (see `{context.command_path} --help`)"


def _ours() -> int:
    traceback.print_exc()
    return _told("this is an error of ours, not of your input; please report it with the lines above", EXIT_INTERNAL)


def _told(message: str, code: int) -> int:
    sys.stderr.write(f"ccmdist: {message}\n")
    return code
