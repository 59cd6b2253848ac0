"""Repaired frames to look at: what stood for the nerves, the frame with its hole, what filled it, the real frame."""

from collections.abc import Iterator
from typing import Any, Final

import pandas as pd

from ccmdist.ccm.groups import UNLABELLED
from ccmdist.ccm.structure import structure_picture
from ccmdist.evaluation.comparison import Comparison, SetReport
from ccmdist.evaluation.fidelity.fills import DRAWN
from ccmdist.evaluation.fidelity.in_hole import IN_HOLE, SHARE, column
from ccmdist.evaluation.report.pictures import jpeg, outlined
from ccmdist.evaluation.sets import SourceFrames

NUM_ROWS: Final = 3


def repaired_frames(comparison: Comparison) -> dict[str, list[dict[str, Any]]]:
    """Of each set that repairs frames, a few of them by the size of the hole: pictures as data URLs, and figures."""
    frames = SourceFrames(comparison.real, comparison.shape)
    return {one.name: list(_rows(comparison, one, frames)) for one in comparison.sets if one.completion}


def _rows(comparison: Comparison, one: SetReport, frames: SourceFrames) -> Iterator[dict[str, Any]]:
    from ccmdist.data.holes import holed_image  # which takes torch, and most reports have no holes

    drawn = SourceFrames(one.images, comparison.shape)
    for row in _chosen(one.table).to_dict("records"):
        image, frame = drawn.find(row["key"]), frames.find(row["source_key"])
        assert image is not None and image.inpaint_mask is not None and frame is not None, "it was compared"
        structure = (image.meta.provenance or {}).get("structure", "mask")
        hole = image.inpaint_mask
        yield {
            "key": row["key"],
            "clinical_group": row["clinical_group"] or UNLABELLED,
            "share": row[SHARE],
            **{measure: row[column(DRAWN, measure)] for measure in IN_HOLE},
            "pictures": [
                ("structure", jpeg(structure_picture(image.nerve_mask, image.points, structure))),
                ("frame with its hole", jpeg(holed_image(frame.image, hole))),
                ("filled", jpeg(outlined(image.image, hole))),
                ("real frame", jpeg(outlined(frame.image, hole))),
            ],
        }


def _chosen(table: pd.DataFrame) -> pd.DataFrame:
    """Rows with a real frame to compare with, evenly from the smallest hole to the largest."""
    known = table.dropna(subset=[column(DRAWN, "ssim")]).sort_values([SHARE, "key"], kind="stable")
    places = {round(place * (len(known) - 1) / (NUM_ROWS - 1)) for place in range(NUM_ROWS)} if len(known) else set()
    return known.iloc[sorted(places)]
