"""Rows of the tensors in a safetensors file, by plain reads: what is asked for is read, and nothing else.

A memory map would count every page of the file that was looked at as memory of this process, and asks file servers for
small pieces.
"""

import json
import math
import os
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from ccmdist.errors import ModelError

DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""How safetensors names dtypes."""
REMEDY: Final = "copy it again; `ccmdist doctor` checks all files of a model folder"


class StoredTensors:
    """A safetensors file that is open for reading; a context manager."""

    def __init__(self, file: Path) -> None:
        """Read the header of ``file``, which :meth:`ModelFolder.weight_files` has checked."""
        self.file = file
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            self._entries = json.loads(stream.read(length))
        self._start = 8 + length
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._descriptor = os.open(file, os.O_RDONLY)

    def __enter__(self) -> "StoredTensors":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a whole tensor."""
        return tuple(self._entries[name]["shape"])

    def rows(self, name: str, first: int, stop: int) -> Tensor:
        """Rows ``first`` to ``stop`` of a tensor of at least one dimension, as stored; valid until the next call.

        Raises:
            ModelError: If the file ends before, or the dtype is not known.
        """
        entry = self._entries[name]
        if (dtype := DTYPES.get(entry["dtype"])) is None:
            raise ModelError(f"{self.file}: {name} has dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}")
        shape = (stop - first, *entry["shape"][1:])
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        if len(self._buffer) < (num_bytes := (stop - first) * row_bytes):
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8)
        values = self._buffer[:num_bytes]
        self._read(memoryview(values.numpy()), self._start + entry["data_offsets"][0] + first * row_bytes)
        return values.view(dtype).view(shape)

    def _read(self, target: memoryview, position: int) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self._descriptor, [target[done:]], position + done)
            if count == 0:
                raise ModelError(f"{self.file}: ends after {position + done} bytes, while it is read", REMEDY)
            done += count
