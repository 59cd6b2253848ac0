"""The numbers by which the phantoms of the clinical groups differ: working defaults, not a citation."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from ccmdist.ccm.groups import ClinicalGroup


@dataclass(frozen=True)
class GroupDefaults:
    """What the phantoms of one clinical group look like on average.

    **Working defaults written from memory: not a citation, and no evidence of anything clinical.** The mean
    densities merely respect published cut-offs (CNFL 15.8, 14.0 and 11.5 mm/mm2, Ahmed 2012; CNFD 27.8 and 20.8 per
    mm2, Tavakoli 2010). Their spreads, and everything from ``wander_um`` on, are invented.
    """

    cnfd: tuple[float, float]
    """Main nerves per mm2 in the field of an HRT3-RCM: mean, standard deviation between frames."""
    cnbd: tuple[float, float]
    """Likewise of branch points on main nerves per mm2."""
    cnfl: tuple[float, float]
    """Likewise of nerve length in mm per mm2."""
    wander_um: float
    """Size of a trunk's own sideways excursions."""
    fwhm_um: float
    """Full width at half maximum of a trunk, before the optics."""
    contrast: float
    """Brightness of a trunk above its background, as a fraction of the background."""
    beading: float
    """Share of a thin fibre's light that is in its beads."""
    dendritic_cells_per_mm2: float


GROUP_DEFAULTS: Final[Mapping[ClinicalGroup, GroupDefaults]] = MappingProxyType(
    {
        "Control": GroupDefaults((29, 6.5), (38, 18), (17.5, 3.5), 8.0, 2.4, 1.15, 0.60, 8),
        "T1NoDPN": GroupDefaults((24, 7.0), (27, 16), (14.5, 3.5), 9.0, 2.3, 1.05, 0.65, 14),
        "T1DPN": GroupDefaults((16, 7.0), (15, 12), (10.5, 3.5), 11.0, 2.2, 0.95, 0.75, 20),
    }
)
