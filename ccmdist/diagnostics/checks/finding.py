"""What a check is asked and what it answers."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from ccmdist.config.slurm import SlurmSettings
from ccmdist.config.train import TrainConfig

State = Literal["OK", "WARN", "MISS"]

REQUIREMENTS: Final = ("gpu", "slurm", "flash", "quant", "ranks")
"""What `--require` may name."""


class DoctorConfig(TrainConfig):
    """The settings of `ccmdist train`, and the `slurm` section with which launch/train.py would submit them."""

    slurm: SlurmSettings = SlurmSettings()


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: Its name.
        state: OK; WARN: works, but; MISS: something that is required is absent or does not work.
        found: What is the case.
        remedy: A command or a setting, with the reason; of an OK finding a note, often empty.
    """

    what: str
    state: State
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Request:
    """What doctor was asked.

    Attributes:
        required: Names out of :data:`REQUIREMENTS`.
        config: Settings of a run, or None when only the machine is looked at.
        environment: Variables of this process.
    """

    required: frozenset[str] = frozenset()
    config: DoctorConfig | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def lacking(self, *requirements: str) -> State:
        """The state of something that is not there: MISS if one of the requirements was asked for, else WARN."""
        return "MISS" if self.required.intersection(requirements) else "WARN"

    @property
    def in_job(self) -> bool:
        """Whether this process runs inside a Slurm job, so that the batch script has already set what it sets."""
        return bool(self.environment.get("SLURM_JOB_ID"))


Findings = Iterator[Finding]


class NoAnswerError(Exception):
    """A program is not there, failed, or did not answer in time."""


def answer(command: Sequence[str], timeout_s: float, environment: Mapping[str, str] | None = None) -> str:
    """What ``command`` prints.

    Raises:
        NoAnswerError: If it is not installed, ends with an error or takes longer than ``timeout_s``.
    """
    if shutil.which(command[0]) is None:
        raise NoAnswerError(f"{command[0]} is not installed")
    try:
        done = subprocess.run(
            command, env=environment, timeout=timeout_s, check=True, capture_output=True, text=True, errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"`{' '.join(command)}` did not answer in {timeout_s:.0f} s") from None
    except subprocess.CalledProcessError as error:
        raise NoAnswerError(last_line(error.stderr) or f"exit code {error.returncode}") from None
    return done.stdout


def last_line(text: str) -> str:
    """The last line that says something; of a traceback that is the error itself."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def size(num_bytes: float) -> str:
    """A number of bytes for people, such as "71.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1000:  # three digits are shown
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TiB"
