"""Clinical groups and how they are spelt: the one place that turns a table's text into a group."""

import difflib
from collections.abc import Iterable
from typing import Final, Literal, get_args

from ccmdist.errors import ShardError

ClinicalGroup = Literal["Control", "T1NoDPN", "T1DPN"]
"""Healthy; type 1 diabetes without, and with, diabetic peripheral neuropathy."""

CLINICAL_GROUPS: Final[tuple[ClinicalGroup, ...]] = get_args(ClinicalGroup)
UNLABELLED: Final = "unlabelled"
_MAX_SHOWN = 24


def parse_group(text: str | None, where: str) -> ClinicalGroup | None:
    """The clinical group that ``text`` names; None if it is None, blank or ``unlabelled``.

    Args:
        text: Spelling of a group; only the exact one is taken, because a guess could mislabel a patient.
        where: What the error message should point at, such as a file and its line.

    Raises:
        ShardError: If ``text`` is no known group.
    """
    code = (text or "").strip()
    if code in ("", UNLABELLED):
        return None
    for clinical_group in CLINICAL_GROUPS:
        if code == clinical_group:
            return clinical_group
    raise unknown_code(where, "clinical_group", code, (*CLINICAL_GROUPS, UNLABELLED))


def next_group(clinical_group: ClinicalGroup) -> ClinicalGroup:
    """The group after this one in the order of :data:`CLINICAL_GROUPS`; the first after the last."""
    return CLINICAL_GROUPS[(CLINICAL_GROUPS.index(clinical_group) + 1) % len(CLINICAL_GROUPS)]


def unknown_code(where: str, name: str, got: str, known: Iterable[str]) -> ShardError:
    """The error for a value outside a closed vocabulary, with the nearest code and the whole list."""
    codes = {code.lower(): code for code in known}
    close = difflib.get_close_matches(got.strip().lower(), codes, n=1)
    hint = f"did you mean '{codes[close[0]]}'? " if close else ""
    # Whatever stands in a patient table may be personal: the message repeats no more of it than a code is long.
    shown = got if len(got) <= _MAX_SHOWN else got[:_MAX_SHOWN] + "..."
    message = f"{where}: {name} {shown!r} is not a known code"
    return ShardError(message, f"{hint}known: {', '.join(codes.values())}")
