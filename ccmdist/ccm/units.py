"""Lengths and areas of frames: the one place that knows how large a pixel is."""

from typing import Final

UM_PER_PX_HRT3: Final = 400 / 384
"""Micrometres per pixel of an HRT3-RCM frame, nominally 400 um over 384 px."""


def frame_area_mm2(height_px: int, width_px: int, um_per_px: float) -> float:
    """Area that a frame shows, in mm2; 0.16 for an HRT3-RCM frame."""
    return height_px * width_px * (um_per_px / 1000) ** 2
