"""Bytes of tensors that live at once while something runs, counted where PyTorch dispatches operations.

It sees every storage that an operation returns, on any device, and when it dies. It does not see what a kernel
allocates and frees within itself; on a GPU, ``torch.cuda.max_memory_allocated`` sees that too.
"""

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are made under it.

    Attributes:
        live: Bytes alive now.
        peak: Most bytes that were alive at once.
    """

    def __init__(self, resident: Iterable[Tensor]) -> None:
        """Count what is made beside ``resident``, tensors that are there before."""
        super().__init__()
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in resident}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._born(value.untyped_storage())
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known or not storage.nbytes():
            return
        self._known.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._dead, storage._cdata, storage.nbytes())

    def _dead(self, address: int, num_bytes: int) -> None:
        self._known.discard(address)
        self.live -= num_bytes


def peak_bytes(run: Callable[[], object], resident: Iterable[Tensor]) -> int:
    """Most bytes alive at once while ``run`` runs, beside ``resident``."""
    gc.collect()
    with LiveBytes(resident) as counted:
        run()
    return counted.peak
