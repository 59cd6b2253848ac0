"""The clinical group of a frame, by MDF-MLLM: U-Net, fusion and language model trained together.

The model is given the frame and a prompt that is worded without the group; group and nerve mask are seen by the losses
alone.

Shape suffixes: B samples, N tokens of a level, H W rows and columns.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ccmdist.adapters.injection import AdaptedLinears
from ccmdist.ccm.diagnosis_prompts import all_diagnosis_prompts, diagnosis_prompt
from ccmdist.ccm.groups import CLINICAL_GROUPS, ClinicalGroup
from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.config.objectives.mdf_mllm import DiagnoseSettings
from ccmdist.config.train import TrainConfig
from ccmdist.data.cache_index import CacheEntry
from ccmdist.data.shard_samples import ShardSamples
from ccmdist.data.stream import collated
from ccmdist.models.fusion import overlay
from ccmdist.models.mdf_base import LLM, base_digest
from ccmdist.models.mdf_mllm import MdfMllm
from ccmdist.models.mllm import Prompts
from ccmdist.train.capabilities import refuse_missing_groups
from ccmdist.train.mdf_network import make_mdf_mllm, refuse_too_large
from ccmdist.train.objectives.edit import movement_of
from ccmdist.train.objectives.group_scores import group_scores
from ccmdist.train.objectives.objective import Batch
from ccmdist.train.objectives.ordered_samples import shared_by_ranks, spread_over
from ccmdist.train.objectives.pixel_samples import PixelSamples, pixels_of, shown_frame, shown_mask
from ccmdist.train.objectives.segment import mask_loss


class DiagnosisSource:
    """Frames, what is asked about them, and nerve masks."""

    def __init__(self, samples: ShardSamples, prompts: Prompts) -> None:
        """Read ``samples`` when they are asked for."""
        self._samples, self._prompts = samples, prompts

    def read(self, entry: CacheEntry) -> dict[str, Tensor]:
        """``images`` (1, H, W) in [-1, 1], ``nerve_masks`` (H, W), ``prompt_ids`` (L,) and ``prompt_last``.

        Raises:
            ShardError: If the sample has changed since the run began.
        """
        triple = self._samples.triple(entry)
        fields = {"eye": triple.meta.eye, **triple.meta.fields} if triple.meta.eye else triple.meta.fields
        asked = self._prompts.of(diagnosis_prompt(fields))
        return pixels_of(triple) | asked


class DiagnoseObjective(PixelSamples):
    """Learns groups by cross-entropy and, beside, nerve masks."""

    figures = ("parts/group", "parts/mask")

    def __init__(self, config: TrainConfig, group: ProcessGroup) -> None:
        """Look through the shards and plan the order; the language model is read later.

        Raises:
            ShardError: If a tar of the shard set is not the one that its manifest names.
            ConfigError: If a sample has no group, or a group no sample; or as :class:`PixelSamples`.
            ModelError: If a folder cannot be used.
        """
        assert isinstance(config.objective, DiagnoseSettings), config.objective
        self.settings = config.objective
        levels = [f"level{level}" for level in sorted(self.settings.fusion_levels)]
        found = ["found"] if levels and self.settings.mask_weight else []
        self.columns = "_".join(["mask", "frame", *found, *levels])
        self.cut_sets = frozenset({LLM} if self.settings.llm == "full" else ())
        super().__init__(config, group)
        refuse_missing_groups(self.entries)
        texts, size_px = all_diagnosis_prompts(), config.data.image_size_px
        self.source = DiagnosisSource(self.samples, Prompts(self.settings.mllm, texts, size_px))
        self.base_digest = base_digest(self.settings)
        self._num_updates = -1  # the first call of after_step only says that the state was loaded

    def build(self, zero_config: dict[str, Any]) -> torch.nn.Module:
        """The model; of the language model each rank reads its share, the engine cuts the rest over the ranks."""
        size_px, seed = self.config.data.image_size_px, self.config.seed
        refuse_too_large(self.settings, self.group.ranks.world_size)
        model = make_mdf_mllm(self.settings, size_px, seed, zero_config or None)
        self.model: MdfMllm = model.to(self.group.device).train()
        return self.model

    def parameter_sets(self) -> dict[str, dict[str, torch.nn.Parameter]]:
        """U-Net, fusion and language model, as far as they are trained."""
        return self.model.parameter_sets()

    def sets_of_step(self, step: int) -> frozenset[str]:
        """Every step trains all."""
        return frozenset(self.parameter_sets())

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of the groups plus, by its weight, the loss of the masks."""
        logits_B3, masks_B1HW, _ = self._diagnosed(model, batch)
        parts = {"group": F.cross_entropy(logits_B3, labels_of(batch["clinical_groups"]).to(logits_B3.device))}
        if masks_B1HW is not None:
            parts["mask"] = mask_loss(masks_B1HW, batch["nerve_masks"])
        for name, part in parts.items():
            self._note(f"parts/{name}", part)
        weights = {"group": 1.0, "mask": self.settings.mask_weight}
        return torch.stack([weights[name] * part for name, part in parts.items()]).sum()

    def after_step(self) -> None:
        """Let every adapted linear compute its norms anew, once."""
        if self.model.adapter is not None:
            self.model.adapter.advance()
        self._num_updates += 1

    def describe(self) -> dict[str, float]:
        """Parts of the loss since the last call, gates of the levels, and how far an adapter has moved.

        Raises:
            RunError: If no magnitude of the adapter has moved at all.
        """
        gates = {f"gate/level_{name}": value for name, value in self.model.gates().items()}
        adapter = self.model.adapter
        moved = movement_of(adapter, self._num_updates, LLM) if isinstance(adapter, AdaptedLinears) else {}
        return super().describe() | gates | moved

    def validate(self, model: torch.nn.Module) -> dict[str, float]:
        """Mean cross-entropy of held-out frames, and how well their groups are told apart. Collective."""
        labelled = [entry for entry in self.samples.entries("val") if entry.clinical_group is not None]
        entries = spread_over(labelled, self.config.validation.num_samples)
        mine: list[tuple[int, list[float]]] = []
        for entry, weight in shared_by_ranks(entries, self.group):
            logits_B3, _, _ = self._diagnosed(model, collated(self.source, [entry]))
            if weight:
                mine.append((int(labels_of([entry.clinical_group])), logits_B3[0].softmax(dim=0).double().tolist()))
        if not entries:
            return {}
        # Ranks take entries in turn; in one order, sums do not depend on how many ranks there are.
        told = sorted(one for some in self.group.gathered(mine) for one in some)
        labels, probabilities = np.array([label for label, _ in told]), np.array([found for _, found in told])
        mean = float(-np.log(probabilities[np.arange(len(labels)), labels].clip(1e-12)).mean())
        return {"mean": mean} | group_scores(labels, probabilities)

    def _shown(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        _, masks_B1HW, attended = self._diagnosed(model, batch)
        frame = shown_frame(batch)
        columns = [shown_mask(batch), frame]
        if masks_B1HW is not None:
            columns.append((masks_B1HW[0, 0].sigmoid() * 255).round().to(torch.uint8).cpu())
        columns += [overlay(frame, attended[name][0].cpu()) for name in sorted(attended)]
        return torch.cat(columns, dim=1)

    def _diagnosed(self, model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """What the model says of a batch: it is given images and prompts, and nothing else."""
        given = (batch[name].to(self.group.device) for name in ("images", "prompt_ids", "prompt_last"))
        found: tuple[Tensor, Tensor | None, dict[str, Tensor]] = model(*given)
        return found


def labels_of(groups: Sequence[ClinicalGroup | None]) -> Tensor:
    """Number of each group, (B,)."""
    return torch.tensor([CLINICAL_GROUPS.index(group) for group in groups if group is not None])
