"""The folder of a Slurm job: what was submitted, how often it was started, and how its ranks ended.

OUT/jobs/NAME/          beside the results of the stage, so that what made them can be found
  code/ccmdist/ slurm/    the code as it was when the job was submitted; a requeued job runs this, not a later edit
  config.json             the resolved settings
  job.json                stage, arguments, versions
  starts-TASK.json        committed progress at each start of the job (of one array task)
  outcome.json            how the last attempt ended, for the batch script, which may not have Python at hand
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ccmdist.cluster.run_directory import Outcome
from ccmdist.commit import commit_json

VARIABLE: Final = "CCMDIST_JOB"
"""Environment variable with the job's folder, set by batch scripts."""


class JobFolder:
    """Paths of one job."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.code = path / "code"
        self.config = path / "config.json"
        self.about = path / "job.json"
        self.outcome = path / "outcome.json"

    def starts(self, array_task: str) -> Path:
        """Where the starts of an array task are counted; "" for a job without tasks."""
        return self.path / f"starts-{array_task or '0'}.json"


def tell_job(outcome: Outcome, environment: Mapping[str, str] = os.environ) -> None:
    """Leave the outcome where the batch script that started this process looks for it, if there is one."""
    if folder := environment.get(VARIABLE):
        values = {"state": outcome.state, "reason": outcome.reason, "step": outcome.step}
        commit_json(JobFolder(Path(folder)).outcome, values)
