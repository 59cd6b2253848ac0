"""The picture grid: the mask, the real frame, what each set drew from the mask, and where its nerves came to lie."""

import base64
import io
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_dilation, distance_transform_edt

from ccmdist.ccm.groups import CLINICAL_GROUPS, UNLABELLED
from ccmdist.ccm.segmenter import segment
from ccmdist.ccm.skeleton import Bools, centreline_of
from ccmdist.data.triple import Triple
from ccmdist.evaluation.comparison import Comparison, SetReport
from ccmdist.evaluation.sets import ImageSet

SETS_ABREAST: Final = 3
"""Sets that one grid shows beside each other; more make a second grid below."""
REACH_PX: Final = 3.0
"""How far a found centreline may lie from the wanted one to be drawn as lying on it."""
LINE_COLOURS: Final = {"kept": (88, 196, 120), "missed": (226, 88, 150), "added": (240, 158, 56)}
"""Of wanted centrelines that were found, of wanted ones that were not, and of found ones that nobody wanted."""
HOLE_COLOUR: Final = (92, 172, 238)
"""Of the outline of a hole that was filled."""


def picture_grids(comparison: Comparison) -> list[dict[str, Any]]:
    """One grid for every :data:`SETS_ABREAST` synthetic sets: their names, and rows of pictures as data URLs."""
    chosen = _chosen(comparison)
    real = _loaded(comparison.real, comparison.table, chosen["key"], comparison.shape)
    columns = {one.name: _drawn(comparison, one, list(chosen["key"])) for one in comparison.sets}
    names = list(columns)
    return [
        {"names": some, "rows": list(_rows(chosen, real, {name: columns[name] for name in some}))}
        for some in (names[first : first + SETS_ABREAST] for first in range(0, len(names), SETS_ABREAST))
    ]


def _rows(
    chosen: pd.DataFrame, real: dict[str, Triple], columns: dict[str, dict[str, Triple]]
) -> Iterator[dict[str, Any]]:
    for key, group in chosen[["key", "clinical_group"]].itertuples(index=False):
        pictures = [("mask", _png(real[key].nerve_mask)), ("real", _png(real[key].image))]
        for name, drawn in columns.items():
            triple = drawn.get(key)
            pictures.append((name, _png(triple.image) if triple else ""))
            pictures.append((f"nerves of {name}", jpeg(overlay(triple)) if triple else ""))
        yield {"key": key, "clinical_group": group or UNLABELLED, "pictures": pictures}


def _drawn(comparison: Comparison, one: SetReport, keys: list[str]) -> dict[str, Triple]:
    """The first image that a set has of each real frame, by the key of that frame."""
    of_key = one.table.drop_duplicates("source_key").set_index("source_key")["key"]
    wanted = {key: of_key[key] for key in keys if key in of_key}
    images = _loaded(one.images, one.table, wanted.values(), comparison.shape)
    return {key: images[synthetic_key] for key, synthetic_key in wanted.items()}


def overlay(triple: Triple) -> NDArray[np.uint8]:
    """An image with the centrelines of its mask and of the nerves found in it, in LINE_COLOURS; its hole is outlined.

    Returns:
        RGB, shape (H, W, 3).
    """
    found, wanted = segment(triple.image), triple.nerve_mask
    picture = outlined(triple.image, triple.inpaint_mask)
    wanted_line, near_found = centreline_of(wanted), _near(found)
    picture[centreline_of(found) & ~_near(wanted)] = LINE_COLOURS["added"]
    picture[wanted_line & near_found] = LINE_COLOURS["kept"]
    picture[wanted_line & ~near_found] = LINE_COLOURS["missed"]
    return picture


def outlined(image: NDArray[np.uint8], hole: Bools | None) -> NDArray[np.uint8]:
    """A grey image (H, W) as RGB, with the innermost pixels of what surrounds its hole in HOLE_COLOUR."""
    picture = np.repeat(image[..., None], 3, axis=2)
    if hole is not None:
        picture[binary_dilation(hole) & ~hole] = HOLE_COLOUR
    return picture


def _near(mask: Bools) -> Bools:
    """Pixels within REACH_PX of a mask."""
    if not mask.any():
        return mask
    distance_px: NDArray[np.float64] = distance_transform_edt(~mask)
    return distance_px <= REACH_PX


def _chosen(comparison: Comparison) -> pd.DataFrame:
    """Real frames to show: first those that every set was drawn from, the clinical groups in turn, one per subject."""
    table = comparison.table.copy()
    drawn = sum(table["key"].isin(one.table["source_key"]).astype(int) for one in comparison.sets)
    table["missing"] = len(comparison.sets) - drawn
    table["repeat"] = table.groupby("subject").cumcount()
    table["turn"] = table.sort_values(["missing", "repeat"], kind="stable").groupby("clinical_group").cumcount()
    order = {group: place for place, group in enumerate([*CLINICAL_GROUPS, ""])}
    table["place"] = table["clinical_group"].map(order)
    chosen = table.sort_values(["turn", "place"], kind="stable").head(comparison.config.num_grid_images)
    return chosen.sort_values(["place", "turn"], kind="stable")


def _loaded(images: ImageSet, table: pd.DataFrame, keys: Iterable[str], shape: tuple[int, int]) -> dict[str, Triple]:
    """The samples with these keys; only their shards are read."""
    wanted = set(keys)
    shards = set(table.loc[table["key"].isin(wanted), "shard"])
    triples = (t for entry in images.shards if entry.name in shards for t in images.triples(entry, shape))
    return {triple.key: triple for triple in triples if triple.key in wanted}


def _png(pixels: NDArray[Any]) -> str:
    buffer = io.BytesIO()
    # A mask keeps one bit per pixel, which makes the page a good deal smaller.
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return data_url(buffer.getvalue())


def jpeg(pixels: NDArray[np.uint8]) -> str:
    """A picture with soft edges, grey (H, W) or RGB (H, W, 3), as data URL."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90, subsampling=0)
    return data_url(buffer.getvalue(), "jpeg")


def data_url(data: bytes, kind: str = "png") -> str:
    """The image within the page itself."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
