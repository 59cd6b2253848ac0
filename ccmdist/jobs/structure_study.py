"""Which picture stands best for the nerves: a chain of stages for each one, and one evaluation that compares them all.

Each structure has a cache, a run and a synthetic set of its own; seeds, masks and holes are the same. Imports no torch.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

from ccmdist.commit import commit_json
from ccmdist.config.data import Structure
from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.config.loading import resolved, validate
from ccmdist.config.settings import Settings
from ccmdist.config.slurm import SlurmSettings
from ccmdist.config.stages import result_folder
from ccmdist.errors import ConfigError, RunError
from ccmdist.jobs.launching import Request, evaluate_jobs
from ccmdist.jobs.pipeline import Chain, connected, loaded

STRUCTURES: Final[tuple[Structure, ...]] = get_args(Structure)


@dataclass(frozen=True)
class Study:
    """What is to be done.

    Attributes:
        chains: One for each structure.
        evaluate: Compares what they draw.
        slurm: Of the evaluation.
    """

    chains: dict[Structure, Chain]
    evaluate: EvaluateConfig
    slurm: SlurmSettings

    def jobs(self) -> tuple[list[list[Request]], list[Request]]:
        """Those of the chains, which may run at the same time, and those that come after all of them.

        Raises:
            CcmdistError: If the shards or the model are not there.
        """
        before = [chain.jobs_before_evaluation() for chain in self.chains.values()]
        return before, evaluate_jobs(self.evaluate, self.slurm)

    def stages(self) -> Iterator[tuple[str, Settings]]:
        """Names and settings of all stages, in an order in which each finds what it needs."""
        for chain in self.chains.values():
            yield from ((stage, config) for stage, config in chain.configs.items() if stage != "evaluate")
        yield "evaluate", self.evaluate

    def described(self) -> str:
        """Which structure is trained and drawn where."""
        lines = [
            f"{structure}: trains {chain.configs['train'].run}, draws {chain.configs['synthesize'].out}"
            for structure, chain in self.chains.items()
        ]
        return "\n".join([*lines, f"compared in {self.evaluate.out}"])


def study_of(arguments: Sequence[str]) -> Study:
    """A study from the words of a command line, which are those of one chain.

    The run and the set of a structure are called as the words say, with the name of the structure behind.

    Raises:
        ConfigError: If a word means no stage, a setting is wrong or not left to the study, or what one stage leaves is
            not what the next takes.
    """
    shared = loaded(arguments)
    train, synthesize, evaluate = (shared.configs[stage] for stage in ("train", "synthesize", "evaluate"))
    for name in ("adapter", "network"):
        if getattr(synthesize, name) is not None:
            raise ConfigError(
                f"synthesize.{name}: each structure draws with what its own run has trained", "leave it out"
            )
    sets = {structure: _named(synthesize.out, structure) for structure in STRUCTURES}
    chains: dict[Structure, Chain] = {}
    for structure, out in sets.items():
        own = (
            f"data.structure={structure}",
            f"train.run={_named(train.run, structure)}",
            f"synthesize.out={out}",
            f"evaluate.synthetic.{structure}={out}",
        )
        chains[structure] = connected(loaded([*arguments, *own]))
    compared = resolved(evaluate) | {"synthetic": {structure: str(out) for structure, out in sets.items()}}
    return Study(chains, validate(EvaluateConfig, compared, "the command line"), shared.slurm["evaluate"])


def _named(folder: Path, structure: Structure) -> Path:
    return folder.with_name(f"{folder.name}_{structure}")


def run_here(study: Study) -> Iterator[str]:
    """Run all stages on this machine, one after the other; what to tell of each. What is done is not done again.

    Raises:
        RunError: If one does not end well.
    """
    with tempfile.TemporaryDirectory(prefix="ccmdist-") as folder:
        path = Path(folder) / "config.json"
        for stage, config in study.stages():
            yield f"{stage}: {result_folder(config)}"
            commit_json(path, resolved(config))
            code = subprocess.run([sys.executable, "-m", "ccmdist", stage, str(path)], check=False).returncode
            if code:
                raise RunError(
                    f"{stage}: {result_folder(config)}: ended with exit code {code}",
                    "read the lines above; the same command goes on from what is done",
                )
