"""Agreement of the nerves found in the images of a set with their masks, beside what it would be by chance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd

from ccmdist.ccm.biomarkers import QUANTITIES
from ccmdist.errors import EvaluationError
from ccmdist.evaluation.biomarkers.agreement import BlandAltman, absolute_agreement, limits_of_agreement
from ccmdist.evaluation.columns import FOUND, GIVEN
from ccmdist.evaluation.left_out import LeftOut
from ccmdist.evaluation.sets import PIXEL_TOLERANCE
from ccmdist.evaluation.statistics import interval

MIN_PAIRS: Final = 3
MIN_SUBJECTS: Final = 2
OVERLAP: Final = "Dice, clDice and offset"


@dataclass(frozen=True)
class ByChance:
    """The nerves found in images against the masks of other images of the same set, of other subjects where it has any.

    An image that took no notice of its mask would reach about this much.
    """

    num_images: int
    num_of_other_subjects: int
    dice: float
    """Mean over images; NaN for too few of them."""
    cldice: float
    agreement: dict[str, float]
    """ICC(2,1) of each biomarker; NaN for too few images."""


@dataclass(frozen=True)
class Adherence:
    """How the nerves found in images of a set agree with the masks that came with them."""

    num_images: int
    num_without_nerves: int
    """Images whose mask is empty. Dice and clDice of such an image are 1 if nothing is found in it and else 0."""
    dice: float
    """Mean over images, as everything here that is not said to be otherwise; NaN for too few of them."""
    cldice: float
    dice_range: tuple[float, float]
    """5th and 95th percentile over images."""
    cldice_range: tuple[float, float]
    offset_px: float
    """Median over images."""
    agreement: dict[str, float]
    """ICC(2,1) of each biomarker: found nerves against the mask; NaN for too few images."""
    bias: dict[str, float]
    """Of each biomarker: mean of found minus mean of the mask's, as a fraction of the latter; NaN for too few."""
    limits: dict[str, BlandAltman | None]
    """Bland and Altman's, of found minus the mask's; None for too few images or subjects."""
    chance: ByChance
    left_out: list[LeftOut]


def adherence_of(table: pd.DataFrame, min_images: int = MIN_PAIRS) -> Adherence:
    """Agreement of found nerves and given masks over the images of a set.

    Args:
        table: A row per image, as :class:`~ccmdist.evaluation.measures.Measuring` gives them.
        min_images: Below which overlap and offset are left out, and, counting images with a value on both sides, the
            bias, ICC and limits of agreement of a biomarker.
    """
    overlap = table[["dice", "cldice", "offset_px"]]
    too_few = (
        [] if len(table) >= min_images else [LeftOut(OVERLAP, f"{len(table)} images, at least {min_images} are needed")]
    )
    if too_few:
        overlap = overlap * np.nan
    limits = {name: _limits(table, name, min_images) for name in QUANTITIES}
    return Adherence(
        num_images=len(table),
        num_without_nerves=int((table[f"{GIVEN}cnfa"] == 0).sum()),
        dice=float(overlap["dice"].mean()),
        cldice=float(overlap["cldice"].mean()),
        dice_range=interval(overlap["dice"], 0.9),
        cldice_range=interval(overlap["cldice"], 0.9),
        offset_px=float(overlap["offset_px"].median()),
        agreement={name: _agreement(table, table, name, min_images) for name in QUANTITIES},
        bias={name: _bias(table, name, min_images) for name in QUANTITIES},
        limits={name: found for name, found in limits.items() if not isinstance(found, str)}
        | {name: None for name, found in limits.items() if isinstance(found, str)},
        chance=_by_chance(table, min_images),
        left_out=too_few
        + [
            LeftOut(f"{QUANTITIES[name].label}, ICC and limits of agreement", reason)
            for name, reason in limits.items()
            if isinstance(reason, str)
        ],
    )


def _by_chance(table: pd.DataFrame, min_images: int) -> ByChance:
    drawn = table[table["partner_key"] != ""]
    partners = table.set_index("key").loc[drawn["partner_key"]]
    return ByChance(
        num_images=len(drawn),
        num_of_other_subjects=int((drawn["subject"].to_numpy() != partners["subject"].to_numpy()).sum()),
        dice=float(drawn["chance_dice"].mean()) if len(drawn) >= min_images else float("nan"),
        cldice=float(drawn["chance_cldice"].mean()) if len(drawn) >= min_images else float("nan"),
        agreement={name: _agreement(drawn, partners, name, min_images) for name in QUANTITIES},
    )


def _agreement(found: pd.DataFrame, given: pd.DataFrame, name: str, min_images: int) -> float:
    pairs = found[FOUND + name].to_numpy(), given[GIVEN + name].to_numpy()
    if (pd.notna(pairs[0]) & pd.notna(pairs[1])).sum() < min_images:
        return float("nan")
    return absolute_agreement(*pairs)


def _limits(table: pd.DataFrame, name: str, min_images: int) -> BlandAltman | str:
    """The limits of agreement of one biomarker, or why there are none."""
    pairs = table[["subject", FOUND + name, GIVEN + name]].dropna()
    num_subjects = pairs["subject"].nunique()
    if len(pairs) < min_images:
        return (
            f"{len(pairs)} of {len(table)} images have a value of their nerves and one of their mask, at least "
            f"{min_images} are needed"
        )
    if num_subjects < MIN_SUBJECTS:
        return f"all images are of one subject, at least {MIN_SUBJECTS} are needed"
    return limits_of_agreement(pairs[FOUND + name].to_numpy(), pairs[GIVEN + name].to_numpy(), num_subjects)


def _bias(table: pd.DataFrame, name: str, min_images: int) -> float:
    values = table[[FOUND + name, GIVEN + name]]
    found, given = values.mean()
    return float(found / given - 1) if given and values.count().min() >= min_images else float("nan")


def refuse_other_pixels(real: pd.DataFrame, synthetic: pd.DataFrame, name: str) -> None:
    """Refuse a set whose pixels are of a size that no real frame has: its densities would be of another scale.

    Args:
        real: A row per real image.
        synthetic: A row per image of the set.
        name: Of the set.

    Raises:
        EvaluationError: If its pixels differ.
    """
    low, high = real["um_per_px"].min(), real["um_per_px"].max()
    for key, um_per_px in zip(synthetic["key"], synthetic["um_per_px"], strict=True):
        if not low * (1 - PIXEL_TOLERANCE) <= um_per_px <= high * (1 + PIXEL_TOLERANCE):
            told = f"{low:.4f}" if high - low < 1e-4 else f"{low:.4f} to {high:.4f}"
            raise EvaluationError(
                f"synthetic.{name}: sample {key} has {um_per_px:.4f} um per px, expected {told} as the real frames at "
                "this size have: their biomarkers are on another scale",
                "compare it with the set whose masks it was drawn from, or correct um_per_px and pack that set again",
            )


def refuse_without_masks(table: pd.DataFrame, name: str) -> None:
    """Refuse a set in which no mask shows a nerve.

    Raises:
        EvaluationError: If all of its masks are empty.
    """
    if (table[f"{GIVEN}cnfa"] == 0).all():
        raise EvaluationError(
            f"{name}: the masks of all {len(table)} samples are empty, expected nerves to compare with",
            "pack the set with its nerve masks, 255 on nerves",
        )


@dataclass(frozen=True)
class Control:
    """A set that was drawn to be compared with another one, and not to be used."""

    prompts: str
    """As the settings that drew it call them: next_group, the prompt of the next clinical group than the mask's."""
    of: str | None
    """Name of the set that was drawn alike but with the given prompts; None if it is not compared here."""
    prompt_effect: dict[str, BlandAltman | None]
    """Of each biomarker: found in that set minus found in the control, from the same mask and noise, image by image.
    None for too few pairs."""


def controls(
    origins: Mapping[str, Sequence[Mapping[str, Any]]], tables: Mapping[str, pd.DataFrame], min_images: int
) -> dict[str, Control]:
    """Which of the sets are controls, and what the prompt does.

    Args:
        origins: Of each set by its name, the distinct origins that its images tell.
        tables: Of each set, a row per image.
        min_images: Pairs below which differences are left out.
    """
    as_given = {name: _but_for_prompts(told) for name, told in origins.items() if not _prompts(told)}
    found = {}
    for name, told in origins.items():
        if prompts := _prompts(told):
            alike = [other for other, its in as_given.items() if its == _but_for_prompts(told)]
            found[name] = Control(
                prompts,
                of=alike[0] if alike else None,
                prompt_effect=_prompt_effect(tables[alike[0]], tables[name], min_images) if alike else {},
            )
    return found


def _prompt_effect(given: pd.DataFrame, control: pd.DataFrame, min_images: int) -> dict[str, BlandAltman | None]:
    pairs = given.merge(control, on=["key", "subject"], suffixes=("", "_control"))
    effects: dict[str, BlandAltman | None] = {}
    for name in QUANTITIES:
        both = pairs[["subject", FOUND + name, f"{FOUND}{name}_control"]].dropna()
        num_subjects = both["subject"].nunique()
        if len(both) < min_images or num_subjects < MIN_SUBJECTS:
            effects[name] = None
        else:
            given_values, control_values = both[FOUND + name].to_numpy(), both[f"{FOUND}{name}_control"].to_numpy()
            effects[name] = limits_of_agreement(given_values, control_values, num_subjects)
    return effects


def _prompts(origins: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(sorted({str(origin["prompts"]) for origin in origins if "prompts" in origin}))


def _but_for_prompts(origins: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in origin.items() if name != "prompts"} for origin in origins]
