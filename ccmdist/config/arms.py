"""The arms of the downstream tasks: what a network is trained on, as the settings spell it."""

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

REAL, AUGMENTED, PHANTOM = "real", "augmented", "phantom"
EACH: Final = "NAME"
"""Stands for each synthetic set in turn."""
ONLY, SHUFFLED = "only ", "shuffled "
FORMS: Final = "real, augmented, NAME:R, only NAME, shuffled NAME:R, with phantom or a synthetic set as NAME"


@dataclass(frozen=True)
class Arm:
    """What is trained on.

    Attributes:
        text: As it is spelled, such as "wdlora:0.5".
        name: Synthetic set, or phantom; None for real images alone.
        ratio: Synthetic images per real one; None where there are no real ones, or no synthetic ones.
        is_shuffled: Labels of the synthetic images are dealt out anew among them.
        is_augmented: Images are flipped, moved and brightened as they are drawn.
    """

    text: str
    name: str | None = None
    ratio: float | None = None
    is_shuffled: bool = False
    is_augmented: bool = False

    @property
    def has_real(self) -> bool:
        """Whether real images are trained on."""
        return self.name is None or self.ratio is not None


def expanded(arms: Sequence[str], names: Iterable[str]) -> tuple[Arm, ...]:
    """The arms that the settings want, NAME replaced by each synthetic set; real images alone come first.

    Args:
        arms: As the settings spell them.
        names: Of the synthetic sets.

    Raises:
        ValueError: If one cannot be read, names no set, stands there twice, or ``real`` is missing.
    """
    sets = list(names)
    if taken := sorted({REAL, AUGMENTED, PHANTOM, EACH} & set(sets)):
        raise ValueError(f"synthetic: a set cannot be called {taken[0]!r}, which is the name of an arm")
    found = [_arm(text, sets) for arm in arms for text in _with_each(arm, sets)]
    if twice := [arm.text for place, arm in enumerate(found) if arm in found[:place]]:
        raise ValueError(f"arms: {twice[0]!r} stands there twice")
    if not any(arm.text == REAL for arm in found):
        raise ValueError("arms: 'real' is missing, with which the others are compared")
    return tuple(sorted(found, key=lambda arm: arm.text != REAL))


def _with_each(arm: str, sets: list[str]) -> list[str]:
    words = arm.strip().split(" ")
    is_each = words[-1].partition(":")[0] == EACH
    return [" ".join([*words[:-1], words[-1].replace(EACH, name, 1)]) for name in sets] if is_each else [arm.strip()]


def _arm(text: str, sets: list[str]) -> Arm:
    if text in (REAL, AUGMENTED):
        return Arm(text, is_augmented=text == AUGMENTED)
    known = [PHANTOM, *sets]
    if text.startswith(ONLY):
        return Arm(text, _known(text, text.removeprefix(ONLY), known))
    name, colon, ratio = text.removeprefix(SHUFFLED).partition(":")
    if not colon:
        raise ValueError(f"arms: {text!r} is no arm{_meant(text, [REAL, AUGMENTED])}; known forms: {FORMS}")
    _known(text, name, known)
    return Arm(f"{text.partition(':')[0]}:{_ratio(text, ratio):g}", name, _ratio(text, ratio), SHUFFLED in text)


def _ratio(text: str, ratio: str) -> float:
    try:
        value = float(ratio)
    except ValueError:
        value = math.nan
    if not 0 < value <= 100:
        raise ValueError(f"arms: {text!r}: {ratio!r} is no ratio, expected a number above 0 and at most 100")
    return value


def _known(text: str, name: str, known: list[str]) -> str:
    if name not in known:
        hint = _meant(name, known) or f"; known: {', '.join(known)}"
        raise ValueError(f"arms: {text!r}: no synthetic set is called {name!r}{hint}")
    return name


def _meant(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
