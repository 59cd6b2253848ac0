"""What agreement is worth: the nerves of an image against the mask of another one, which a set reaches by chance."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ccmdist.ccm.overlap import centreline_dice, dice
from ccmdist.ccm.skeleton import Bools


@dataclass(frozen=True)
class Nerves:
    """Found and wanted nerves of one image, eight pixels to a byte: those of a whole shard are held at once."""

    key: str
    subject: str
    source: str
    """Frame that the mask belongs to; images of one mask have the same."""
    shape: tuple[int, int]
    found: NDArray[np.uint8]
    wanted: NDArray[np.uint8]

    @classmethod
    def packed(cls, key: str, subject: str, source: str, found: Bools, wanted: Bools) -> "Nerves":
        """Of two masks (H, W)."""
        height, width = found.shape
        return cls(key, subject, source, (height, width), np.packbits(found), np.packbits(wanted))

    def mask(self, bits: NDArray[np.uint8]) -> Bools:
        """One of the two masks again."""
        return np.unpackbits(bits, count=self.shape[0] * self.shape[1]).reshape(self.shape).astype(bool)


def with_other_masks(shard: Sequence[Nerves]) -> Iterator[dict[str, str | float]]:
    """For each image of a shard the key of its partner, and Dice and clDice against the partner's mask.

    The partner is the next image of another subject, the last followed by the first; if there is none, the next one
    with another mask; if there is none either, the key is empty and the figures are NaN.
    """
    for index, image in enumerate(shard):
        others = [*shard[index + 1 :], *shard[:index]]
        partner = next((other for other in others if other.subject != image.subject), None)
        partner = partner or next((other for other in others if other.source != image.source), None)
        if partner is None:
            yield {"partner_key": "", "chance_dice": float("nan"), "chance_cldice": float("nan")}
            continue
        found, wanted = image.mask(image.found), partner.mask(partner.wanted)
        yield {
            "partner_key": partner.key,
            "chance_dice": dice(found, wanted),
            "chance_cldice": centreline_dice(found, wanted),
        }
