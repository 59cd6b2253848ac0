"""What fused levels of the U-Net give MDF-MLLM over the bare language model, level by level, on phantoms, on a CPU.

Every arm trains for equal steps on the same batches from the same seeds: bare, each level alone, all four, all four
without FiLM, all four without pretraining of the U-Net by `segment`. Figures are of test frames of subjects that no arm
has seen; the intervals are of the difference from the bare model, over subjects, of the mean over the seeds.

All but the bare one have a U-Net, and learn nerve masks by it beside the groups, as the objective has it.

Phantoms are separable by construction, the language models are tiny and have random weights: no outcome is asserted,
and none says which model is better on patients. The table is written as it comes out.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from measure.rows import ROOT, Row, finish, write

from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.cluster.ranks import Ranks
from ccmdist.config.data import PhantomShardsConfig
from ccmdist.config.loading import load
from ccmdist.config.objectives.mdf_mllm import SegmentSettings
from ccmdist.config.train import TrainConfig
from ccmdist.data.phantom_shards import write_phantom_set
from ccmdist.data.shard_samples import ShardSamples
from ccmdist.data.stream import collated
from ccmdist.models.make_mllm import TINY, make_mllm
from ccmdist.models.network_state import NetworkState, write_network
from ccmdist.train.objectives.choice import objective_of
from ccmdist.train.objectives.diagnose import labels_of
from ccmdist.train.objectives.group_scores import group_scores
from ccmdist.train.optim import learning_rate

ARMS: Final[Mapping[str, Sequence[str]]] = {
    "bare": ("objective.fusion_levels=[]", "objective.unet=null"),
    **{f"level {level}": (f"objective.fusion_levels=[{level}]",) for level in (1, 2, 3, 4)},
    "all levels": (),
    "all levels, no FiLM": ("objective.film=false",),
    "all levels, no pretraining": ("objective.unet=null",),
}
SCORES: Final = ("balanced_accuracy", "macro_auc")
NUM_RESAMPLED: Final = 1000
TEST_BATCH: Final = 16
BATCHES: Final = ("global_batch_size=6", "micro_batch_size=6")


def config_of(folder: Path, size_px: int, names: Sequence[str], *overrides: str) -> TrainConfig:
    files = [ROOT / f"configs/train/{name}.yaml" for name in ("tiny", "segment", *names)]
    given = [f"data.shards={folder}/shards", f"data.image_size_px={size_px}", f"run={folder}/run"]
    return load(TrainConfig, files, [*given, *overrides])


def trained(config: TrainConfig, group: ProcessGroup) -> tuple[Any, torch.nn.Module]:
    """The objective and its model after all steps of the settings, in the order and with the losses of the loop."""
    objective = objective_of(config, group)
    model = objective.build({})
    parameters = [p for of_set in objective.parameter_sets().values() for p in of_set.values()]
    optimizer = torch.optim.AdamW(parameters, betas=config.optim.betas, weight_decay=config.optim.weight_decay)
    batches = iter(objective.batches(0))
    objective.after_step()
    for step in range(config.num_steps):
        for chosen in optimizer.param_groups:
            chosen["lr"] = learning_rate(step, config.num_steps, config.optim)
        optimizer.zero_grad()
        for _ in range(config.global_batch_size // config.micro_batch_size):
            loss = objective.loss(model, next(batches))
            (loss * config.micro_batch_size / config.global_batch_size).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.optim.max_grad_norm)
        optimizer.step()
        objective.after_step()
    return objective, model.eval()


@torch.no_grad()
def tested(objective: Any, model: torch.nn.Module, samples: ShardSamples) -> np.ndarray:
    """Probabilities of the groups of all test frames, (N, 3)."""
    objective.source._samples = samples
    entries = list(samples.entries("test"))
    parts = [entries[first : first + TEST_BATCH] for first in range(0, len(entries), TEST_BATCH)]
    found = [objective._diagnosed(model, collated(objective.source, part))[0] for part in parts]
    return torch.cat(found).softmax(dim=1).double().numpy()


def scores_of(labels: np.ndarray, of_seeds: Sequence[np.ndarray], chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Each score of the chosen frames, one of each seed."""
    found = [group_scores(labels[chosen], probabilities[chosen]) for probabilities in of_seeds]
    return {name: np.array([scores.get(name, np.nan) for scores in found]) for name in SCORES}


def interval_of_difference(
    labels: np.ndarray, subjects: np.ndarray, ours: Sequence[np.ndarray], bare: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """2.5 and 97.5 % of ours minus bare, subjects drawn with replacement within their groups."""
    rng, drawn = np.random.default_rng(0), []
    of_group = {one: np.unique(subjects[labels == one]) for one in np.unique(labels)}
    frames_of = {subject: np.flatnonzero(subjects == subject) for subject in np.unique(subjects)}
    for _ in range(NUM_RESAMPLED):
        some = [subject for all_of in of_group.values() for subject in rng.choice(all_of, len(all_of))]
        chosen = np.concatenate([frames_of[subject] for subject in some])
        first, second = (scores_of(labels, of, chosen) for of in (ours, bare))
        drawn.append([first[name].mean() - second[name].mean() for name in SCORES])
    return dict(zip(SCORES, np.quantile(np.array(drawn), [0.025, 0.975], axis=0).T, strict=True))


def with_unet(folder: Path, size_px: int, num_steps: int, group: ProcessGroup) -> None:
    """Pretrain the U-Net once, and leave it as a run of `segment` does."""
    config = config_of(folder, size_px, ["tiny_segment"], f"num_steps={num_steps}")
    assert isinstance(config.objective, SegmentSettings)
    _, model = trained(config, group)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write_network(folder / "unet", NetworkState.of(config.objective, size_px, tensors, {}))


def rows_of(kind: str, folder: Path, given: argparse.Namespace, group: ProcessGroup) -> list[Row]:
    """The table of a language model."""
    found: dict[str, list[np.ndarray]] = {}
    samples: ShardSamples | None = None
    for arm, overrides in ARMS.items():
        for seed in range(given.seeds):
            said = (f"objective.mllm={folder}/{kind}", f"objective.unet={folder}/unet", f"seed={seed}")
            steps = (f"num_steps={given.steps}", f"optim.warmup_steps={given.steps // 10}")
            names = ["mdf_mllm", "tiny_mdf_mllm"]
            config = config_of(folder, given.size_px, names, *said, *steps, *BATCHES, *overrides)
            samples = samples or ShardSamples(config.data, ("test",))
            start = time.monotonic()
            found.setdefault(arm, []).append(tested(*trained(config, group), samples))
            print(f"{kind}, {arm}, seed {seed}: {time.monotonic() - start:.0f} s", flush=True)
    assert samples is not None
    entries = samples.entries("test")
    labels = labels_of([entry.clinical_group for entry in entries]).numpy()
    subjects, everything = np.array([entry.subject for entry in entries]), np.arange(len(entries))
    bare = scores_of(labels, found["bare"], everything)
    rows = []
    for arm, of_seeds in found.items():
        scores = scores_of(labels, of_seeds, everything)
        between = {} if arm == "bare" else interval_of_difference(labels, subjects, of_seeds, found["bare"])
        for name in SCORES:
            low, high = between.get(name, (0.0, 0.0))
            told = "" if arm == "bare" else f", 95 % of ours - bare over subjects: {low:+.2f} to {high:+.2f}"
            spread = f"SD of {given.seeds} seeds {scores[name].std(ddof=1):.2f}" if given.seeds > 1 else "one seed"
            about = f"{given.steps} steps, {given.subjects} subjects at {given.size_px} px"
            claim = f"{kind}, {arm}: {name.replace('_', ' ')}, {about}, {spread}{told}"
            rows.append(Row(claim, float(scores[name].mean()), float(bare[name].mean())))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=list(TINY), choices=list(TINY))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--subjects", type=int, default=40, help="of each group")
    parser.add_argument("--size-px", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        group = ProcessGroup(Ranks(0, 0, 1), 10, f"file://{folder}/rendezvous")
        phantoms = {
            "subjects_per_group": given.subjects,
            "size_px": given.size_px,
            "test_fraction": 0.4,
            "val_fraction": 0.1,
        }
        write_phantom_set(PhantomShardsConfig(out=folder / "shards", **phantoms))
        with_unet(folder, given.size_px, 100 if given.steps >= 60 else given.steps, group)
        rows: list[Row] = []
        for kind in given.kinds:
            make_mllm(kind, folder / kind)
            rows += rows_of(kind, folder, given, group)
            write("fusion_ablation", rows)
        group.close()
    sys.exit(finish("fusion_ablation", rows))


if __name__ == "__main__":
    main()
