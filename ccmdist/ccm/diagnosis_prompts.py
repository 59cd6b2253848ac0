"""What a model that diagnoses is asked about a frame. No function here takes a clinical group: it is what is asked for.

The wording is one sentence around closed codes of the frame; none of its words tells, or names, a condition.
"""

from collections.abc import Mapping
from itertools import product
from typing import Final

from ccmdist.ccm.groups import unknown_code
from ccmdist.ccm.prompts import FIELD_WORDS

_TEMPLATE: Final = (
    "Corneal confocal microscopy frame of the subbasal nerves{fields}. Look at their length, density, branches and "
    "curves, and decide on its class."
)


def diagnosis_prompt(fields: Mapping[str, str]) -> str:
    """What is asked about a frame.

    Args:
        fields: The codes of those fields of :data:`~ccmdist.ccm.prompts.FIELD_WORDS` that are known, in any order.

    Raises:
        ShardError: If the name of a field or its code is outside the closed vocabularies.
    """
    for name, code in fields.items():
        if name not in FIELD_WORDS:
            raise unknown_code("diagnosis prompt", "field", name, FIELD_WORDS)
        if code not in FIELD_WORDS[name]:
            raise unknown_code("diagnosis prompt", f"field {name}", code, FIELD_WORDS[name])
    words = "".join(f", {FIELD_WORDS[name][fields[name]]}" for name in FIELD_WORDS if name in fields)
    return _TEMPLATE.format(fields=words)


def all_diagnosis_prompts() -> list[str]:
    """Every prompt that there is, without and with each code of each field."""
    choices = [[None, *codes] for codes in FIELD_WORDS.values()]
    return [
        diagnosis_prompt({name: code for name, code in zip(FIELD_WORDS, codes, strict=True) if code is not None})
        for codes in product(*choices)
    ]
