"""What the backward pass computes again: every block, all but its products and attention, or nothing."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Final, Literal

from diffusers.models.transformers import transformer_flux, transformer_kandinsky, transformer_qwenimage
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ccmdist.adapters.kept import Tape, attending

MODELS: Final = (transformer_qwenimage, transformer_flux, transformer_kandinsky)
"""Modules of diffusers whose blocks attend."""
ATTEND: Final[Callable[..., Any]] = transformer_qwenimage.dispatch_attention_fn


def set_recompute(model: Any, how: Literal["full", "selective", "none"]) -> None:
    """Let a model compute again what the settings say; changes no result.

    Args:
        model: Its products are layers of ``ccmdist.adapters``.
        how: As ``activation_checkpointing`` of the settings.
    """
    # Nothing in a block is random, so the states of generators need not be kept for every block.
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if how == "full":
        model.enable_gradient_checkpointing(again)
    if how == "selective":
        attend_on_tape()
        model.enable_gradient_checkpointing(partial(again, context_fn=selective_contexts))


def attend_on_tape() -> None:
    """Let blocks compute their attention in the context that the tape names, if there is one; for this process."""
    for module in MODELS:
        module.dispatch_attention_fn = _attend


def selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For the first forward of a block and for the second, as ``torch.utils.checkpoint`` asks for them."""
    tape = Tape(partial(create_selective_checkpoint_contexts, _keep_attention))
    return tape.recording(), tape.replaying()


def _keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what an attention kernel gives, which is small; products of a plain attention would be large."""
    is_kernel = "attention" in str(operation) or "flash" in str(operation)
    return CheckpointPolicy.MUST_SAVE if is_kernel else CheckpointPolicy.PREFER_RECOMPUTE


def _attend(*args: Any, **kwargs: Any) -> Any:
    with attending():
        return ATTEND(*args, **kwargs)
