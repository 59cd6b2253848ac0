"""With which prompt a mask is given to a model: its own, or a wrong one that serves as a control."""

from ccmdist.ccm.groups import ClinicalGroup, next_group
from ccmdist.config.data import Prompts
from ccmdist.data.triple import TripleMeta, prompt_for
from ccmdist.errors import ShardError


def prompted_group(clinical_group: ClinicalGroup | None, prompts: Prompts, where: str) -> ClinicalGroup | None:
    """The clinical group that the prompt speaks of.

    Args:
        clinical_group: Of the frame.
        prompts: As the settings have it.
        where: The sample, for messages.

    Raises:
        ShardError: If a wrong prompt is wanted for a frame without a clinical group.
    """
    if prompts == "given":
        return clinical_group
    if clinical_group is None:
        raise ShardError(
            f"{where}: is unlabelled, and data.prompts next_group needs a clinical group to have a next one",
            "leave unlabelled frames out of the set, or set data.prompts=given",
        )
    return next_group(clinical_group)


def given_prompt(meta: TripleMeta, prompts: Prompts, where: str) -> str:
    """The prompt that is given beside a frame's mask; arguments and errors as of :func:`prompted_group`."""
    if prompts == "given":
        return meta.prompt
    return prompt_for(prompted_group(meta.clinical_group, prompts, where), meta.eye, meta.fields)
