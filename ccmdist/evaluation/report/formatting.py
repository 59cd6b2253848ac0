"""Numbers as the page shows them; a number that does not exist is a dash."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

ABSENT: Final = "\u2013"
MINUS: Final = "\u2212"


def number(value: float | None, digits: int = 3) -> str:
    """With so many significant digits, and no exponent."""
    if value is None:
        return ABSENT
    if value == 0:
        return "0"
    return fixed(value, min(max(0, digits - 1 - math.floor(math.log10(abs(value)))), 6))


def fixed(value: float | None, decimals: int) -> str:
    """With so many decimals."""
    return ABSENT if value is None else f"{value:.{decimals}f}".replace("-", MINUS)


def like(value: float | None, scale: float | None) -> str:
    """With the decimals that show two digits of ``scale``, so that the numbers of a line can be compared."""
    return fixed(value, min(max(0, 1 - math.floor(math.log10(scale))), 6)) if scale else number(value)


def signed(value: float | None) -> str:
    """One decimal, and a sign in front of positive ones too."""
    text = fixed(value, 1)
    return f"+{text}" if value is not None and value > 0 else text


def percent(value: float | None) -> str:
    """A fraction as signed per cent."""
    return ABSENT if value is None else f"{100 * value:+.0f} %".replace("-", MINUS)


def p_value(value: float | None) -> str:
    """Three decimals, and nothing below a thousandth."""
    if value is None:
        return ABSENT
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def told_once(told: Iterable[tuple[str, str]]) -> Iterator[tuple[list[str], str]]:
    """Each text once, with the names of all sets of which it is told, in the order in which they come."""
    names: dict[str, list[str]] = {}
    for name, text in told:
        names.setdefault(text, []).append(name)
    return ((alike, text) for text, alike in names.items())


def by_reason(left_out: Iterable[Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    """What was left out for one reason, together: "CNFD, CNBD: limits" of "CNFD, limits" and "CNBD, limits"."""
    for names, reason in told_once((one["what"], one["reason"]) for one in left_out):
        parts = [name.partition(", ") for name in names]
        is_alike = len(names) > 1 and len({rest for _, _, rest in parts}) == 1 and parts[0][2]
        yield f"{', '.join(first for first, _, _ in parts)}: {parts[0][2]}" if is_alike else "; ".join(names), reason


def joined(names: Sequence[str]) -> str:
    """As in "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


FILTERS: Final[dict[str, Callable[..., Any]]] = {
    "number": number,
    "fixed": fixed,
    "percent": percent,
    "p_value": p_value,
    "signed": signed,
    "like": like,
    "by_reason": by_reason,
}
"""By the names that templates use."""
