"""How a confocal microscope shows the nerves of a phantom: beads, focus, other tissue, uneven light, speckle."""

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from ccmdist.ccm.phantom_defaults import GroupDefaults
from ccmdist.ccm.phantom_lanes import STEP_UM, Floats, Frame, kinked_noise, smooth_noise
from ccmdist.ccm.phantom_nerves import Fibre

FWHM_PER_SIGMA = 2.355
DOTS_PER_MM2 = 500
K_STRUCTURES_PER_MM2 = 3.0


def shown(
    fibres: tuple[Fibre, ...], defaults: GroupDefaults, frame: Frame, rng: Generator
) -> tuple[NDArray[np.uint8], Floats]:
    """The 8-bit image (H, W) of the fibres, and where in it dendritic cells lie, (N, 2) in micrometres."""
    focus = np.exp(-0.5 * (0.7 * smooth_field(rng, frame, 80)) ** 2)
    light = np.zeros((frame.size_px, frame.size_px))
    for fibre in fibres:
        _draw_fibre(light, fibre, defaults.beading, focus, frame, rng)
    background = _background(frame, rng)
    for _ in range(rng.poisson(K_STRUCTURES_PER_MM2 * frame.area_mm2)):
        fold = _fold(frame, rng)
        background *= 1 + fold
        light *= np.clip(1 + 2.2 * np.minimum(fold, 0), 0.3, 1)
    _draw_dots(light, frame, rng)
    num_cells = rng.poisson(defaults.dendritic_cells_per_mm2 * frame.area_mm2)
    cells_um = [_draw_dendritic_cell(light, frame, rng) for _ in range(num_cells)]
    return _exposed(background * (1 + light), rng), np.reshape(cells_um, (-1, 2))


def smooth_field(rng: Generator, frame: Frame, correlation_um: float) -> Floats:
    """Smooth random field (H, W), zero mean and unit variance in expectation."""
    sigma = correlation_um / frame.um_per_px
    # A field much smoother than its pixels is made coarse and stretched: far cheaper, and it looks the same.
    factor = max(int(sigma / 4), 1)
    sigma /= factor
    margin = int(3 * sigma) + 1
    num = frame.size_px // factor + 2 + 2 * margin
    smooth = gaussian_filter(rng.standard_normal((num, num)), sigma)[margin:-margin, margin:-margin]
    at = np.arange(frame.size_px) / factor
    low = np.floor(at).astype(int)
    part = at - low
    rows = smooth[low] * (1 - part)[:, None] + smooth[low + 1] * part[:, None]
    field: Floats = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    return field * (2 * sigma * np.sqrt(np.pi))


def stamp(light: Floats, points_px: Floats, amplitude: Floats, sigma_px: Floats) -> None:
    """Draw Gaussian spots; the brightest counts, not the sum, so a junction is no brighter than its fibres."""
    reach = int(np.ceil(2.6 * sigma_px.max(initial=0.5)))
    kept = ((points_px > -reach) & (points_px < len(light) - 1 + reach)).all(axis=1)
    points_px, amplitude, sigma_px = points_px[kept], amplitude[kept], sigma_px[kept]
    pixels = np.rint(points_px).astype(int)[:, :, None] + np.arange(-reach, reach + 1)
    profiles = np.exp(-0.5 * ((pixels - points_px[:, :, None]) / sigma_px[:, None, None]) ** 2)
    spots = amplitude[:, None, None] * profiles[:, 0, :, None] * profiles[:, 1, None, :]
    border = 2 * reach + 1
    canvas = np.zeros((len(light) + 2 * border, len(light) + 2 * border))
    at = (pixels[:, 0, :, None] + border) * len(canvas) + pixels[:, 1, None, :] + border
    np.maximum.at(canvas.reshape(-1), at.reshape(-1), spots.reshape(-1))
    inner = slice(border, border + len(light))
    np.maximum(light, canvas[inner, inner], out=light)


def _draw_fibre(light: Floats, fibre: Fibre, beading: float, focus: Floats, frame: Frame, rng: Generator) -> None:
    is_trunk = fibre.kind in ("main", "trunk")
    num = len(fibre.path_um)
    in_beads = beading * (0.55 if is_trunk else 0.9)
    beads = _beads(num, 2.5 if is_trunk else 3.5, 0.4 if is_trunk else 0.6, rng)
    envelope = np.exp(0.2 * smooth_noise(rng, num, 35) + 0.12 * smooth_noise(rng, num, 10))
    ragged_um = 0.22 * np.stack([kinked_noise(rng, num, 3) for _ in range(2)], axis=1)
    points_px = frame.pixels(fibre.path_um + ragged_um)
    nearest = np.clip(np.rint(points_px).astype(int), 0, frame.size_px - 1)
    sharpness = focus[tuple(nearest.T)]
    amplitude = fibre.contrast * (1 - in_beads + in_beads * beads) * envelope * (0.4 + 0.6 * sharpness)
    amplitude = np.clip(amplitude * _fading(fibre, num), 0, 4)
    sigma_um = fibre.fwhm_um / FWHM_PER_SIGMA * (1 + 0.12 * smooth_noise(rng, num, 8)) * (1.15 - 0.15 * sharpness)
    stamp(light, points_px, amplitude, np.maximum(sigma_um / frame.um_per_px, 0.5))


def _fading(fibre: Fibre, num: int) -> Floats:
    """Share of its light that a fibre keeps along its way: those that end in the tissue leave the plane slowly."""
    part = np.linspace(0, 1, num)
    if fibre.kind == "fork":
        return 1 - 0.5 * part
    if fibre.kind == "thin":
        return 0.55 + 0.45 * np.sin(np.pi * part)
    return np.ones(num)


def _beads(num: int, distance_um: float, spread: float, rng: Generator) -> Floats:
    """Brightness along a fibre that comes from beads of log-normal brightness at random distances; mean near 1."""
    beads = np.zeros(num)
    at = rng.integers(0, num, max(int(num * STEP_UM / distance_um), 1))
    np.add.at(beads, at, rng.lognormal(0, spread, len(at)))
    sigma = 0.8 / STEP_UM
    smooth: Floats = gaussian_filter1d(beads, sigma) * (distance_um / STEP_UM) * np.exp(-(spread**2) / 2)
    return smooth


def _draw_dots(light: Floats, frame: Frame, rng: Generator) -> None:
    """Isolated bright points: beads of fibres that lie just out of the plane."""
    num = int(rng.poisson(DOTS_PER_MM2 * frame.area_mm2))
    points_px = rng.uniform(0, frame.size_px - 1, (num, 2))
    stamp(light, points_px, 0.45 * rng.lognormal(0, 0.35, num), rng.uniform(0.6, 0.95, num))


def _draw_dendritic_cell(light: Floats, frame: Frame, rng: Generator) -> Floats:
    """A short bright body, with up to four crooked processes when it is a mature cell; where its middle is."""
    centre_um = rng.uniform(0, frame.edge_um, 2)
    brightness, heading = rng.uniform(1.3, 2.4), rng.uniform(0, 2 * np.pi)
    arms = [(heading, rng.uniform(4, 9), 1.8), (heading + rng.uniform(2, 4), rng.uniform(3, 8), 1.6)]
    arms += [(rng.uniform(0, 2 * np.pi), rng.uniform(7, 18), 1.0) for _ in range(int(rng.integers(0, 3)))]
    for angle, length_um, sigma_um in arms:
        num = int(length_um / STEP_UM)
        angles = angle + 0.5 * kinked_noise(rng, num, 5)
        path_um = centre_um + STEP_UM * np.cumsum(np.stack([np.sin(angles), np.cos(angles)], axis=1), axis=0)
        taper = np.linspace(1, 0.5, num)
        grain = np.exp(0.3 * smooth_noise(rng, num, 1.2))
        stamp(light, frame.pixels(path_um), brightness * taper * grain, sigma_um * taper / frame.um_per_px)
    return centre_um


def _fold(frame: Frame, rng: Generator) -> Floats:
    """A K-structure: a dark band (H, W) with a few paler strands in it, as a relative change of brightness."""
    angle, half_width_um = rng.uniform(0, np.pi), rng.uniform(11, 26)
    span_um = np.arange(-frame.edge_um, frame.edge_um, STEP_UM)
    along, across = np.array([np.sin(angle), np.cos(angle)]), np.array([np.cos(angle), -np.sin(angle)])
    axis_um = rng.normal(0, 0.25 * frame.edge_um) + 25 * smooth_noise(rng, len(span_um), 90)
    y_um, x_um = np.meshgrid(*[np.arange(frame.size_px) * frame.um_per_px - frame.edge_um / 2] * 2, indexing="ij")
    run_um, side_um = y_um * along[0] + x_um * along[1], y_um * across[0] + x_um * across[1]
    distance = (side_um - np.interp(run_um, span_um, axis_um)) / half_width_um
    band = np.exp(-(np.abs(distance) ** 2.2))
    strands = np.zeros_like(band)
    for _ in range(3):
        offset = rng.uniform(-0.6, 0.6) + 0.3 * np.interp(run_um, span_um, smooth_noise(rng, len(span_um), 40))
        strands = np.maximum(strands, np.exp(-0.5 * ((distance - offset) / 0.25) ** 2))
    return rng.uniform(0.25, 0.45) * band * (0.75 * strands - 1)


def _background(frame: Frame, rng: Generator) -> Floats:
    """Basal lamina and epithelium under uneven light, (H, W) in grey levels."""
    at = (np.arange(frame.size_px) - frame.size_px / 2) / (frame.size_px / 2)
    y, x = at[:, None] - rng.normal(0, 0.15), at - rng.normal(0, 0.15)
    vignette = np.clip(1 - rng.uniform(0.26, 0.44) * (y**2 + x**2), 0.30, None)
    haze = 0.11 * smooth_field(rng, frame, 55) + 0.05 * smooth_field(rng, frame, 14)
    cells = np.clip(0.5 + 0.5 * smooth_field(rng, frame, 60), 0, 1) * 0.05 * smooth_field(rng, frame, 2.4)
    return rng.lognormal(np.log(90), 0.13) * vignette * np.exp(haze + cells)


def _exposed(ideal: Floats, rng: Generator) -> NDArray[np.uint8]:
    """What the camera reads: speckle that grows with the signal, a soft shoulder instead of clipping, 8 bits."""
    speckle = gaussian_filter(rng.standard_normal(ideal.shape), (0.70, 0.66))
    speckle /= speckle.std()
    # Skewed like the sum of a few exponential speckle patterns.
    speckle = (speckle + 0.07 * (speckle**2 - 1)) * 0.125 * np.clip(ideal / 65, 0.3, 3) ** 0.22
    noisy = ideal * np.exp(speckle) + rng.normal(0, 1.5, ideal.shape)
    bright = np.maximum(noisy - 190, 0)
    return np.clip(np.minimum(noisy, 190) + 62 * -np.expm1(-bright / 62), 8, 255).round().astype(np.uint8)
