"""A transformer of full width and two blocks on the disk: 1.44 GB in exact diffusers layout, made once and kept."""

import json
import tempfile
from pathlib import Path
from typing import Final

import torch

from ccmdist.commit import commit_json
from ccmdist.models.make import make_transformer, parts_of, random_tensor, write_parts
from ccmdist.models.model_folder import WEIGHT_FILES, ModelFolder
from ccmdist.models.sizes import NOISE_SCHEDULE, SIZES

SIZE, VERSION = "full-width-2-blocks", "2511"
DEFAULT_FOLDER: Final = Path(tempfile.gettempdir()) / f"ccmdist-bench-{SIZE}-{VERSION}"
"""Where it stays for the next run."""


def full_width_folder(path: Path = DEFAULT_FOLDER) -> ModelFolder:
    """The folder; only its transformer and noise schedule are there."""
    folder = ModelFolder(path, VERSION)
    if not (path / "model_index.json").is_file():
        with torch.device("meta"):
            model = make_transformer(SIZES[SIZE], VERSION)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        names = parts_of(shapes, SIZES[SIZE].bytes_per_file)
        # Not zero, as biases of `model make` are: a bias that gets lost shall be seen.
        parts = ({n: random_tensor(f"{n}.weight", torch.Size([1, *shapes[n]]), 0)[0] for n in part} for part in names)
        write_parts(path / "transformer", WEIGHT_FILES["transformer"], parts, len(names))
        config = {name: value for name, value in model.config.items() if not name.startswith("_")}
        commit_json(path / "transformer" / "config.json", json.loads(json.dumps(config)))
        commit_json(path / "scheduler" / "scheduler_config.json", NOISE_SCHEDULE)
        commit_json(path / "model_index.json", {"_class_name": "QwenImageEditPlusPipeline"})
    return folder


def num_bytes(folder: ModelFolder) -> int:
    """Of all weight files of the transformer."""
    return sum(file.stat().st_size for file in set(folder.weight_files("transformer").values()))
