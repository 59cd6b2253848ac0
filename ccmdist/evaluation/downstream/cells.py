"""One cell of the grid: an arm in a fold with a seed, trained and tested once; and the file that it leaves."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from ccmdist.commit import commit_json, digest_of
from ccmdist.config.arms import Arm
from ccmdist.config.evaluate import NetworkSettings, Task
from ccmdist.console import log
from ccmdist.errors import EvaluationError
from ccmdist.evaluation.downstream.choice import Chosen, chosen, usable
from ccmdist.evaluation.downstream.folds import Fold, Sample
from ccmdist.evaluation.stored import read_json, stored_path
from ccmdist.models.mdf_base import base_digest

CELLS_VERSION: Final = 1
"""Raised whenever the same cell gives other numbers; older files are then made anew."""
PROBABILITIES: Final = ("p_control", "p_t1nodpn", "p_t1dpn")
"""Columns of a diagnosis, in the order of CLINICAL_GROUPS."""


@dataclass(frozen=True)
class CellResult:
    """What a cell found."""

    num_real: int
    """Images that it was trained on."""
    num_synthetic: int
    num_parameters: int
    lr: float
    step: int
    """Of the network that was tested."""
    curves: list[dict[str, Any]]
    """Of every learning rate."""
    table: pd.DataFrame
    """A row per test image: key, subject, clinical_group, and probabilities or overlaps."""
    looks: list[dict[str, Any]] = field(default_factory=list)
    """Key of a test image, and pictures of where the network looked; none in files of before there were any."""


@dataclass(frozen=True)
class Cell:
    """A unit of work.

    Attributes:
        folder: Where files of cells lie.
        task: What is learnt.
        fold: Who is trained on, validated on and tested.
        arm: What is trained on.
        seed_number: Counted from 0.
        seed: Of the evaluation.
        networks: What is trained, and how.
    """

    folder: Path
    task: Task
    fold: Fold
    arm: Arm
    seed_number: int
    seed: int
    networks: NetworkSettings

    @property
    def path(self) -> Path:
        """Of its file; another one for whatever would give other numbers."""
        arm = re.sub(r"[^a-z0-9.]+", "-", self.arm.text.lower())
        stem = f"{self.task}-{arm}-fold{self.fold.number}-seed{self.seed_number}"
        return stored_path(self.folder, stem, self.digest, "json")

    @cached_property
    def digest(self) -> str:
        """Identity of all that decides what it finds.

        Raises:
            ModelError: If a folder of the networks' settings cannot be used.
        """
        source = self.fold.synthetic.get(self.arm.name or "")
        arm = asdict(self.arm) | {"text": "", "name": source.manifest.digest if source else self.arm.name}
        return digest_of(
            [CELLS_VERSION, self.task, self.fold.digest, arm, self.seed_number, self.seed, self._networks_values]
        )

    @property
    def _networks_values(self) -> dict[str, Any]:
        """What of the networks' settings counts for the task; folders by what is in them, wherever they lie."""
        unused = {"segmentation": {"diagnosis", "mdf"}, "diagnosis": {"unet_channels"}}[self.task]
        values = self.networks.model_dump(mode="json", exclude=unused)
        if (mdf := self.networks.mdf) is not None and self.task == "diagnosis":
            known = mdf.model_dump(mode="json", exclude=set(mdf.files))
            values["mdf"] = known | {"base_digest": base_digest(mdf)}
        return values

    def is_done(self) -> bool:
        """Whether its file is there, and can be read."""
        return self.read() is not None

    def read(self) -> CellResult | None:
        """What an earlier run found; None if there is none that can be read."""
        if (values := read_json(self.path)) is None:
            return None
        return CellResult(table=pd.DataFrame(values.pop("images")), **values)

    def result(self) -> CellResult:
        """What it found, now or in an earlier run."""
        if (found := self.read()) is None:
            self.run()
            found = self.read()
        assert found is not None, f"{self.path} was just written"
        return found

    def run(self) -> None:
        """Train, choose, test, and commit.

        Raises:
            EvaluationError: If there are too few images, or a frame is not square.
            ShardError: If a shard is damaged.
        """
        # Here, for planning and reporting need no torch.
        from ccmdist.cluster.device import current_device
        from ccmdist.evaluation.downstream.examples import real_examples, training_examples
        from ccmdist.evaluation.downstream.training import hash_of, train_and_test

        log.info("%s, %s: fold %d, seed %d", self.task, self.arm.text, self.fold.number, self.seed_number)
        # The same in every arm and fold: all begin with the same weights.
        seed = hash_of(self.seed, self.seed_number)
        images, size_px = self._chosen(seed), self.networks.size_px
        shuffle = seed if self.arm.is_shuffled else None
        training = training_examples(images, self.fold.real, size_px, self.seed, shuffle)
        held_out = {split: usable(self.fold.samples(split), self.task) for split in ("val", "test")}
        validation, test = (real_examples(self.fold.real, samples, size_px) for samples in held_out.values())
        found = train_and_test(
            self.task, self.networks, training, validation, test, seed, current_device(), self.arm.is_augmented
        )
        scores = _scores(self.task, found.probabilities, test.masks)
        values = {
            "num_real": len(images.real),
            "num_synthetic": images.num_synthetic,
            "num_parameters": found.num_parameters,
            "lr": found.lr,
            "step": found.step,
            "curves": [asdict(curve) for curve in found.curves],
            "looks": [{"key": held_out["test"][one.index].key, "pictures": one.pictures} for one in found.looks],
            "images": [_described(one) | row for one, row in zip(held_out["test"], scores, strict=True)],
        }
        commit_json(self.path, values)

    def _chosen(self, seed: int) -> Chosen:
        found = chosen(self.fold, self.arm, self.task, seed)
        if isinstance(found, str):
            raise EvaluationError(f"downstream, {self.arm.text}: {found}", "leave the arm out")
        return found


def _described(sample: Sample) -> dict[str, str]:
    return {"key": sample.key, "subject": sample.subject, "clinical_group": sample.clinical_group or ""}


def _scores(task: Task, probabilities: Any, masks: Any) -> Sequence[dict[str, float]]:
    if task == "diagnosis":
        return [dict(zip(PROBABILITIES, map(float, row), strict=True)) for row in probabilities]
    from ccmdist.evaluation.downstream.scores import overlaps

    return [overlaps(found, wanted) for found, wanted in zip(np.asarray(probabilities) >= 0.5, masks, strict=True)]
