"""What a checkpoint holds, read without the code that is drilled: digests of every tensor, whichever rank wrote it."""

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

NAME = re.compile(r"step-(\d{8})")


def committed_steps(run: Path) -> dict[int, Path]:
    """Step -> folder of every checkpoint that has been committed under its name, oldest first."""
    folders = sorted((run / "checkpoints").glob("step-*")) if (run / "checkpoints").is_dir() else []
    return {int(found[1]): folder for folder in folders if (found := NAME.fullmatch(folder.name))}


def newest_step(run: Path) -> int:
    """Of the checkpoints under ``run``; 0 if there is none."""
    return max(committed_steps(run), default=0)


def digests(checkpoint: Path) -> dict[str, str]:
    """Quantity -> SHA-256 of the whole tensor, put together from all ranks' slices; and of the optimizer's counts."""
    from safetensors.numpy import load_file

    manifest = json.loads((checkpoint / "manifest.json").read_text())
    pieces: dict[str, list[tuple[int, bytes]]] = {}
    for file, slices in manifest["slices"].items():
        for key, values in load_file(checkpoint / file).items():
            start = slices[key.split("|")[0]][0]
            pieces.setdefault(key, []).append((start, values.tobytes()))
    found = {key: _sha256(b"".join(data for _, data in sorted(parts))) for key, parts in pieces.items()}
    counts = {name: manifest[name] for name in ("step", "samples_seen", "adam_steps", "parameters")}
    return found | {"counts": _sha256(json.dumps(counts, sort_keys=True).encode())}


def adapter_digests(run: Path) -> dict[str, str]:
    """Name -> SHA-256 of every tensor of the exported adapter (its header also tells the settings of the run)."""
    from safetensors.numpy import load_file

    return {
        f"{file.name}|{name}": _sha256(values.tobytes())
        for file in sorted((run / "adapter").glob("*.safetensors"))
        for name, values in load_file(file).items()
    }


def damage(checkpoint: Path, how: str, fraction: float) -> str:
    """Damage one file of a checkpoint; which."""
    files = sorted(path for path in checkpoint.iterdir())
    file = files[int(fraction * 997) % len(files)]
    data = file.read_bytes()
    position = int(fraction * len(data))
    changes: dict[str, Any] = {
        "truncate": lambda: file.write_bytes(data[:position]),
        "empty": lambda: file.write_bytes(b""),
        "remove": file.unlink,
        "flip a bit of": lambda: file.write_bytes(_flipped(data, position)),
    }
    changes[how]()
    return file.name


def _flipped(data: bytes, position: int) -> bytes:
    bit = 1 << random.Random(position).randrange(8)
    return data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
