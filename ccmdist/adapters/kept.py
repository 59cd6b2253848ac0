"""Products that a block keeps from its first forward for the second: selective activation checkpointing.

A block that is computed again in the backward pass does its norms, activations and modulation again, but takes the
outputs of its matrix products from a :class:`Tape`. Layers ask for their products in the same order both times. PyTorch
can keep outputs of single operations too, by looking at every operation of a block in Python; here nothing is looked
at, and a layer keeps what it has made of several operations, in place. Attention alone is left to PyTorch's way.
"""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

from torch import Tensor

Context = AbstractContextManager[Any]
Compute = Callable[[], tuple[Tensor, ...]]

_thread = threading.local()  # the backward pass of a GPU has a thread of its own


class Tape:
    """Outputs of the products of one forward of one block, oldest first."""

    def __init__(self, attention_contexts: Callable[[], tuple[Context, Context]]) -> None:
        """An empty tape.

        Args:
            attention_contexts: Makes those in which one attention is computed, in the first and in the second forward.
                Each has its own, for PyTorch counts from the start when one is entered, and a block may attend twice.
        """
        self._outputs: deque[tuple[Tensor, ...]] = deque()
        self._attend_again: deque[Context] = deque()
        self._attention_contexts = attention_contexts

    def recording(self) -> "_OnTape":
        """A context in which products are kept."""
        return _OnTape(self._keep, self._attend_first)

    def replaying(self) -> "_OnTape":
        """A context in which products are taken from the tape, which forgets them."""
        return _OnTape(lambda compute: self._outputs.popleft(), self._attend_again.popleft)

    def _keep(self, compute: Compute) -> tuple[Tensor, ...]:
        self._outputs.append(compute())
        return self._outputs[-1]

    def _attend_first(self) -> Context:
        first, again = self._attention_contexts()
        self._attend_again.append(again)
        return first


class _OnTape:
    """Lets the products of this thread go through ``product``."""

    def __init__(self, product: Callable[[Compute], tuple[Tensor, ...]], attend: Callable[[], Context]) -> None:
        self.product, self.attend = product, attend

    def __enter__(self) -> None:
        self._before = getattr(_thread, "now", None)
        _thread.now = self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _thread.now = self._before


def is_on_tape() -> bool:
    """Whether products are kept at the moment; then nobody may change one in place."""
    return getattr(_thread, "now", None) is not None


def kept(compute: Compute) -> tuple[Tensor, ...]:
    """What ``compute`` returns, or has returned in the first forward; called without gradients."""
    now = getattr(_thread, "now", None)
    return compute() if now is None else now.product(compute)


def attending() -> AbstractContextManager[Any]:
    """The context in which a block computes its attention."""
    now = getattr(_thread, "now", None)
    return nullcontext() if now is None else now.attend()
