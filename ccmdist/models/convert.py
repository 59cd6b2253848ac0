"""A model folder that is ready to be trained and drawn from without its modulation layers: `ccmdist model convert`.

What pays was measured (benchmarks/sharded_load.py). A table that lies ready saves every new node the reading of the
modulation layers, a third of all bytes, and the making. Weights written anew without them would save nothing, for the
bytes of layers that are not needed are not read anyway; nor would ||W||^2 of all rows, which costs 5 s of one core for
the 20 B model. So the files of the model are linked, not rewritten: modulation can be tabulated for other noise levels,
and adapters of one folder fit the other.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from ccmdist.commit import left_overs, make_folder, sync_folder
from ccmdist.console import log, tracked
from ccmdist.errors import ModelError
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.modulation_table import levels
from ccmdist.models.tabulation import IN_MODEL, NAMES, TableKind, write_table

INDEX = "model_index.json"


def convert_model(
    source: ModelFolder, out: Path, sigmas: Tensor, dtype: torch.dtype, samples_at_once: int, device: torch.device
) -> None:
    """Write the folder; when interrupted, the same call writes what is missing.

    Args:
        source: The model.
        out: Folder; must not hold a model yet.
        sigmas: Noise levels that are tabulated.
        dtype: Of the model that will run.
        samples_at_once: Samples of one forward.
        device: That makes the table.

    Raises:
        ModelError: If ``out`` already holds a model, or lies in ``source``.
    """
    if (out / INDEX).exists():
        raise ModelError(f"{out}: already holds a model", "choose another folder")
    if source.path.resolve() in (out.resolve(), *out.resolve().parents):
        raise ModelError(f"{out}: lies in the model that is converted", "choose a folder beside it")
    files = _files(source.path)
    for file in tracked(files, "files", len(files)):
        if (name := file.relative_to(source.path)) != Path(INDEX):
            _link(file, out / name)
    for left_over in left_overs(out / IN_MODEL, NAMES):
        left_over.unlink()
    kind = TableKind.of(source.transformer_digest(), dtype, samples_at_once, device)
    table = write_table(out / IN_MODEL, source, levels(sigmas, dtype), dtype, kind, device)
    # Last, for it makes the folder a model.
    _link(source.path / INDEX, out / INDEX)
    found = ModelFolder.open(out).transformer_digest()
    assert found == kind.base_digest, "files were linked as they are"
    log.info("%s: the same model with %s; give it as data.model", out, table.relative_to(out))
    log.info("its other files are those of %s under a second name: never write into them", source.path)


def _files(folder: Path) -> list[Path]:
    """Every file, also those of a component that is a link to a folder elsewhere."""
    found = (Path(place) / name for place, _, names in os.walk(folder, followlinks=True) for name in names)
    return sorted(file for file in found if file.is_file() and not _is_hidden(file, folder))


def _is_hidden(file: Path, folder: Path) -> bool:
    """Whether it is what a download leaves beside the model, such as .cache/."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _link(file: Path, target: Path) -> None:
    """Give a file a second name; a symbolic one on another file system, or where the file is not this user's."""
    make_folder(target.parent)
    target.unlink(missing_ok=True)
    try:
        os.link(file.resolve(), target)
    except OSError:
        target.symlink_to(file.resolve())
    sync_folder(target.parent)
