"""Do the nerves of an image lie where its mask wanted them: overlap of areas and of centrelines."""

from ccmdist.ccm.skeleton import Bools, centreline_of


def dice(found: Bools, wanted: Bools) -> float:
    """Twice the common area over the sum of the areas; 1 if both are empty."""
    total = int(found.sum()) + int(wanted.sum())
    return 2 * int((found & wanted).sum()) / total if total else 1.0


def centreline_dice(found: Bools, wanted: Bools) -> float:
    """clDice: harmonic mean of the share of each mask's centreline that lies in the other mask; 1 if both are empty.

    Thin nerves that lie one pixel beside the wanted place cost Dice a third, and clDice little.

    Source:
        Shit et al., CVPR 2021 (arXiv:2003.07311), Eq. 1 and 2.
    """
    if not found.any() and not wanted.any():
        return 1.0
    precision, sensitivity = _share_inside(found, wanted), _share_inside(wanted, found)
    total = precision + sensitivity
    return 2 * precision * sensitivity / total if total else 0.0


def _share_inside(mask: Bools, other: Bools) -> float:
    centreline = centreline_of(mask)
    return float(other[centreline].mean()) if centreline.any() else 0.0
