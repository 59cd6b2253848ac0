"""A process of its own that imports torch and what is built against it, and prints what it finds as JSON lines.

A broken build may raise, hang or take the process down; each line says what was reached before that.
"""

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Final

COMPILED: Final = ("torchvision", "flash_attn", "bitsandbytes")
"""Packages that hold code compiled against one torch. transformers and peft import the first and the last by themselves
wherever they are installed, so a broken one breaks those as well."""


def main() -> None:
    """Print one JSON object per thing that was looked at."""
    _tell("torch", _torch)
    for package in COMPILED:
        if importlib.util.find_spec(package) is not None:
            _tell(package, partial(_version, package))


def _tell(name: str, look: Callable[[], dict[str, Any]]) -> None:
    sys.stdout.write(json.dumps({"begun": name}) + "\n")
    sys.stdout.flush()
    try:
        found = look()
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    sys.stdout.write(json.dumps({name: found}) + "\n")
    sys.stdout.flush()


def _version(package: str) -> dict[str, Any]:
    return {"version": getattr(importlib.import_module(package), "__version__", "?")}


def _torch() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda or torch.version.hip or ""}
    count = torch.cuda.device_count()
    found["devices"] = [_device(index) for index in range(count)]
    if count:
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["peer_access"] = all(
            torch.cuda.can_device_access_peer(a, b) for a in range(count) for b in range(count) if a != b
        )
    return found


def _device(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        free, total = torch.cuda.mem_get_info()
        return {"name": properties.name, "free": free, "total": total, "bf16": torch.cuda.is_bf16_supported(False)}


if __name__ == "__main__":
    main()
