"""What can be wrong with a user's input, and the exit codes by which programs tell each other how they ended."""

import errno
from typing import Final

EXIT_DONE: Final = 0
EXIT_INTERNAL: Final = 70
EXIT_REQUEUE: Final = 75
EXIT_REFUSED: Final = 78

OF_THE_MACHINE: Final = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EREMOTEIO)
"""Errors of a disk or a file server, not of what somebody wrote: never a refusal, as another start or node may do."""


class CcmdistError(Exception):
    """A problem that the user can mend; printed as one line without a traceback, exit code 78.

    The message says where the problem is, what was got and what was expected; the remedy says what to do.
    """

    exit_code: int = EXIT_REFUSED

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}; {remedy}" if remedy else message)
        self.message, self.remedy = message, remedy


class ConfigError(CcmdistError):
    """A setting is unknown, has the wrong type or contradicts another one."""


class ShardError(CcmdistError):
    """A source table, a shard or its manifest does not hold what it should."""


class ModelError(CcmdistError):
    """A model folder is missing, incomplete or of a kind that is not supported."""


class CacheError(CcmdistError):
    """The cache of embeddings and latents is missing, incomplete or was made for something else."""


class CheckpointError(CcmdistError):
    """A checkpoint cannot be written or cannot be resumed from."""


class AdapterError(CcmdistError):
    """An adapter cannot be applied, exported or reloaded without loss."""


class RunError(CcmdistError):
    """A run cannot start or go on: its folder is in use, its ranks disagree, its loss is not finite."""


class EvaluationError(CcmdistError):
    """Two sets cannot be compared in the way that was asked for."""


class Preempted(CcmdistError):  # noqa: N818 (no error: the work is safe)
    """The work was stopped by a signal after it was committed; the same command continues it. Exit code 75."""

    exit_code = EXIT_REQUEUE
