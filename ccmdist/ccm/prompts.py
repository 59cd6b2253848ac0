"""The prompt of a frame: fixed wording around closed codes, so that no free text of a patient reaches a model.

The prompts of all clinical groups, and the neutral one of an unlabelled frame, have the same number of words and
of characters, and the words that differ are common ones. Frames of different groups can so share micro-batches,
and the length of a prompt says nothing about the group.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from ccmdist.ccm.groups import ClinicalGroup, parse_group, unknown_code

TEMPLATE_VERSION: Final = 1
"""Changes whenever the wording does; part of a cache's fingerprint."""

NEGATIVE_PROMPT: Final = " "
"""What classifier-free guidance leads away from; Qwen-Image's own pipelines use a single space."""

_TEMPLATE: Final = (
    "Turn this nerve mask into a corneal confocal microscopy image with every nerve where the mask shows it: "
    "type 1 diabetes {diabetes}, peripheral neuropathy {neuropathy}{fields}."
)
_STATUS: Final[Mapping[ClinicalGroup | None, tuple[str, str]]] = MappingProxyType(
    {
        "Control": ("negative", "negative"),
        "T1NoDPN": ("positive", "negative"),
        "T1DPN": ("positive", "positive"),
        None: ("possible", "possible"),
    }
)
FIELD_WORDS: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        "eye": MappingProxyType({"OD": "eye OD", "OS": "eye OS"}),
        "layer": MappingProxyType({"subbasal": "subbasal plexus"}),
        "region": MappingProxyType({"central": "central cornea", "inferior_whorl": "inferior whorl"}),
    }
)
"""The optional fields, ``{field: {code: words in the prompt}}``, in the order in which a prompt names them."""


def prompt(clinical_group: ClinicalGroup | None, fields: Mapping[str, str]) -> str:
    """The prompt for a frame; without a clinical group, neutral wording of the same length.

    Args:
        clinical_group: Fills the one slot of the template.
        fields: The codes of those fields of :data:`FIELD_WORDS` that are known, in any order.

    Raises:
        ShardError: If the group, the name of a field or its code is outside the closed vocabularies.
    """
    diabetes, neuropathy = _STATUS[parse_group(clinical_group, "prompt")]
    for name in fields:
        if name not in FIELD_WORDS:
            raise unknown_code("prompt", "field", name, FIELD_WORDS)
    words = "".join(f", {_words_of(name, fields[name])}" for name in FIELD_WORDS if name in fields)
    return _TEMPLATE.format(diabetes=diabetes, neuropathy=neuropathy, fields=words)


def longest_prompts() -> tuple[str, ...]:
    """Of each clinical group and of unlabelled frames, the prompt that names every field, by its longest code."""
    fields = {name: max(codes, key=lambda code: len(codes[code])) for name, codes in FIELD_WORDS.items()}
    return tuple(prompt(group, fields) for group in _STATUS)


def _words_of(name: str, code: str) -> str:
    known = FIELD_WORDS[name]
    if code not in known:
        raise unknown_code("prompt", f"field {name}", code, known)
    return known[code]
