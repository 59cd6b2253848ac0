"""The lora_ranks of an adapter as a map: projections down, blocks across, as in the figures of SeLoRA's paper."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

INCHES: Final = {"per_block": 0.28, "around": 3.4, "widest": 16.0, "per_projection": 0.3, "above_and_below": 1.3}
DOTS_PER_INCH: Final = 100
NUMBERED_BLOCKS: Final = 40
"""Up to so many, cells are wide enough for their number."""


@dataclass(frozen=True)
class RankMap:
    """The rank of every adapted linear.

    Attributes:
        blocks: Number of each block, ascending: the columns.
        projections: Names of linears in their block, such as "attn.to_q", in the order of the model: the rows. Where
            a model has more than one list of blocks they begin with its name, such as "single_attn.to_q".
        ranks: (projections, blocks); 0 where a block's projection is not adapted.
    """

    blocks: tuple[int, ...]
    projections: tuple[str, ...]
    ranks: NDArray[np.int64]

    @classmethod
    def of(cls, ranks: Mapping[str, int]) -> Self:
        """The map of some ranks.

        Args:
            ranks: Name of linear, such as "transformer_blocks.3.attn.to_q" -> its rank; in the order of the model.
        """
        places = {name: _place(name) for name in ranks}
        blocks = tuple(sorted({block for block, _ in places.values()}))
        projections = tuple(dict.fromkeys(projection for _, projection in places.values()))
        values = np.zeros((len(projections), len(blocks)), dtype=np.int64)
        for name, (block, projection) in places.items():
            values[projections.index(projection), blocks.index(block)] = ranks[name]
        return cls(blocks, projections, values)

    def picture(self) -> NDArray[np.uint8]:
        """The map in colours, uint8 of shape (H, W, 3); what is not adapted is left white."""
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        largest = max(int(self.ranks.max(initial=1)), 2)
        width = min(INCHES["around"] + INCHES["per_block"] * len(self.blocks), INCHES["widest"])
        height = INCHES["above_and_below"] + INCHES["per_projection"] * len(self.projections)
        figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
        canvas, axes = FigureCanvasAgg(figure), figure.subplots()
        image = axes.imshow(
            np.ma.masked_equal(self.ranks, 0), cmap=mpl.colormaps["viridis"], vmin=1, vmax=largest, aspect="auto"
        )
        axes.set_yticks(range(len(self.projections)), self.projections)
        every = -(-len(self.blocks) // 20)
        axes.set_xticks(range(0, len(self.blocks), every), [str(block) for block in self.blocks[::every]])
        axes.set_xlabel("block")
        axes.set_title(f"lora_rank of each linear, {int(self.ranks.sum())} in all", fontsize=10)
        axes.tick_params(labelsize=8, length=0)
        if len(self.blocks) <= NUMBERED_BLOCKS:
            for (row, column), rank in np.ndenumerate(self.ranks):
                if rank:
                    shade = "black" if rank > 0.6 * largest else "white"
                    axes.text(column, row, str(rank), ha="center", va="center", fontsize=7, color=shade)
        figure.colorbar(image, ax=axes, ticks=MaxNLocator(integer=True), pad=0.02, label="lora_rank")
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _place(name: str) -> tuple[int, str]:
    """Number of the block, and name in the block, of a linear called ``name``; what its list is called besides."""
    found = re.search(r"(?:(\w*)transformer_blocks)?\.(\d+)\.(.+)$", name)
    assert found, f"{name} is in no block"
    return int(found[2]), f"{found[1] or ''}{found[3]}"
