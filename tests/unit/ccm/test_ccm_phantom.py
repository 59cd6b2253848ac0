import hashlib
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from scipy.ndimage import binary_dilation
from scipy.spatial import cKDTree

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.ccm.phantom import make_nerves, make_phantom
from ccmdist.ccm.phantom_defaults import GROUP_DEFAULTS
from ccmdist.ccm.phantom_lanes import MIN_GAP_UM, STEP_UM, Frame, Lanes, kinked_noise, smooth_noise
from ccmdist.ccm.phantom_nerves import Fibre, drawn
from ccmdist.ccm.phantom_optics import smooth_field, stamp
from ccmdist.ccm.units import UM_PER_PX_HRT3

FRAME = Frame(384, UM_PER_PX_HRT3)
SEEDS = range(6)


def digest(clinical_group, seed, size_px):
    phantom = make_phantom(clinical_group, seed, size_px)
    parts = phantom.image.tobytes() + phantom.nerve_mask.tobytes() + phantom.centreline.tobytes()
    return hashlib.sha256(parts + repr(phantom.labels).encode()).hexdigest()


def test_another_process_makes_the_same_bytes():
    program = (
        "import hashlib\n"
        "from ccmdist.ccm.phantom import make_phantom\n"
        "p = make_phantom('T1DPN', 7, 96)\n"
        "parts = p.image.tobytes() + p.nerve_mask.tobytes() + p.centreline.tobytes()\n"
        "print(hashlib.sha256(parts + repr(p.labels).encode()).hexdigest())\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest("T1DPN", 7, 96)


def test_every_group_seed_and_size_is_another_frame():
    cases = [("Control", 1, 64), ("T1DPN", 1, 64), ("T1NoDPN", 1, 64), ("Control", 2, 64), ("Control", 1, 65)]
    assert len({digest(*case) for case in cases}) == len(cases)


def test_the_nerves_alone_are_those_of_the_phantom():
    nerves, phantom = make_nerves("Control", 3, 128), make_phantom("Control", 3, 128)
    assert np.array_equal(nerves.nerve_mask, phantom.nerve_mask)
    assert np.array_equal(nerves.centreline, phantom.centreline)
    assert nerves.labels == phantom.labels


@pytest.mark.parametrize("size_px", [64, 101, 384])
@pytest.mark.parametrize("clinical_group", CLINICAL_GROUPS)
def test_image_mask_and_centreline_have_the_asked_for_size_and_belong_together(clinical_group, size_px):
    phantom = make_phantom(clinical_group, 0, size_px)
    assert phantom.image.shape == phantom.nerve_mask.shape == phantom.centreline.shape == (size_px, size_px)
    assert phantom.image.dtype == np.uint8
    assert phantom.nerve_mask.dtype == phantom.centreline.dtype == bool
    assert phantom.nerve_mask.any()
    assert not (phantom.centreline & ~phantom.nerve_mask).any()
    assert set(phantom.labels) == {"cnfd", "cnbd", "cnfl", "cnfa"}


@pytest.mark.parametrize("clinical_group", CLINICAL_GROUPS)
def test_nerves_are_bright_exactly_where_the_mask_says(clinical_group):
    # The same lines moved by 6 px see the same uneven light, so only nerves make the difference.
    for seed in SEEDS:
        phantom = make_phantom(clinical_group, seed)
        on_nerves = phantom.image[phantom.centreline].mean()
        tissue = ~binary_dilation(phantom.nerve_mask, iterations=2)
        for rows, columns in ((6, 0), (-6, 0), (0, 6), (0, -6)):
            moved = np.roll(phantom.centreline, (rows, columns), axis=(0, 1)) & tissue
            assert on_nerves > 1.25 * phantom.image[moved].mean()
        for rows, columns in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            assert on_nerves > phantom.image[np.roll(phantom.centreline, (rows, columns), axis=(0, 1))].mean()


def test_the_expected_biomarkers_are_those_of_the_group():
    # 40 frames: three standard errors of the mean, and 4 % for the clipping of negative draws.
    for clinical_group, defaults in GROUP_DEFAULTS.items():
        labels = [make_nerves(clinical_group, seed).labels for seed in range(40)]
        for name, (mean, deviation) in {
            "cnfd": defaults.cnfd,
            "cnbd": defaults.cnbd,
            "cnfl": defaults.cnfl,
        }.items():
            measured = np.mean([label[name] for label in labels])
            assert measured == pytest.approx(mean, abs=0.55 * deviation + 0.04 * mean), (clinical_group, name)


def test_a_smaller_frame_is_a_smaller_field_of_view_with_nerves_of_the_same_width():
    def mean_width_um(size_px):
        nerves = [make_nerves("Control", seed, size_px).labels for seed in range(12)]
        return 1000 * np.mean([labels["cnfa"] / labels["cnfl"] for labels in nerves])

    # Trunks, which are wider, take a larger share of a small frame: hence 12 %.
    assert mean_width_um(96) == pytest.approx(mean_width_um(384), rel=0.12)


def test_labels_are_exact_for_a_frame_drawn_by_hand():
    frame = Frame(100, 2.0)  # 200 um, 0.04 mm2
    along = np.arange(-50, 250, STEP_UM)
    trunk = Fibre(np.stack([along, np.full_like(along, 100.0)], axis=1), "main", 8.0, 1.0)
    short = np.arange(100, 130, STEP_UM)
    fork = Fibre(np.stack([np.full_like(short, 60.0), short], axis=1), "fork", 2.0, 1.0, 1)
    nerves = drawn((trunk, fork), frame)
    assert nerves.labels["cnfd"] == 1 / 0.04
    assert nerves.labels["cnbd"] == 1 / 0.04
    assert nerves.labels["cnfl"] == pytest.approx((0.200 + 0.0295) / 0.04, rel=1e-9)
    assert nerves.labels["cnfa"] == nerves.nerve_mask.mean()
    # The trunk's middle lies between the centres of columns 49 and 50; 4 um on each side hold two centres each.
    assert nerves.nerve_mask[90].nonzero()[0].tolist() == [48, 49, 50, 51]
    assert nerves.centreline[:, 49:51].any(axis=1).all()


def test_the_labelled_length_agrees_with_the_pixels_of_the_centreline():
    # A digital line has between 1/sqrt(2) and about 1.27 pixels for each pixel edge of its length.
    for seed in SEEDS:
        nerves = make_nerves("Control", seed)
        length_px = nerves.labels["cnfl"] * FRAME.area_mm2 * 1000 / UM_PER_PX_HRT3
        assert 0.7 * length_px < nerves.centreline.sum() < 1.3 * length_px


def test_junctions_lie_on_trunks_and_are_what_cnbd_counts():
    num_connections = 0
    for seed in SEEDS:
        nerves = make_nerves("Control", seed)
        trunks = cKDTree(np.concatenate([f.path_um for f in nerves.fibres if f.kind in ("main", "trunk")]))
        for fibre in nerves.fibres:
            num_connections += fibre.kind == "connection"
            ends = {"fork": [0], "connection": [0, -1], "loop": [0, -1]}.get(fibre.kind, [])
            ends = [end for end in ends if FRAME.holds(fibre.path_um[[end]]).all()]
            assert fibre.num_junctions <= len(ends)
            if ends:
                assert trunks.query(fibre.path_um[ends])[0].max() < 1.5 * STEP_UM
        total = sum(fibre.num_junctions for fibre in nerves.fibres)
        assert nerves.labels["cnbd"] == pytest.approx(total / 0.16)
    assert num_connections > 0


def test_trunks_come_close_but_never_cross():
    defaults = GROUP_DEFAULTS["Control"]
    for seed in SEEDS:
        lanes = Lanes(FRAME, 9, defaults.wander_um, np.random.default_rng(seed))
        gaps_um = np.diff(lanes.smooth_um + lanes.jitter_um, axis=0)
        assert gaps_um.min() >= MIN_GAP_UM - 1e-9


def test_a_point_of_the_frame_is_found_in_its_lane():
    lanes = Lanes(FRAME, 5, 8.0, np.random.default_rng(2))
    lanes.jitter_um[:] = 0
    lanes.shift_um[:] = 0
    for point_um in np.random.default_rng(3).uniform(0, FRAME.edge_um, (20, 2)):
        lane, index, share = lanes.at(point_um)
        found_um = lanes.between(lane, 1, np.array([index]), np.array([share]))[0]
        assert np.linalg.norm(found_um - point_um) < 2 * STEP_UM


def test_points_of_a_fibre_are_evenly_spaced():
    for fibre in make_nerves("T1DPN", 1).fibres:
        gaps_um = [np.linalg.norm(b - a) for a, b in pairwise(fibre.path_um)]
        assert max(gaps_um) <= STEP_UM * (1 + 1e-9)


def test_noises_have_zero_mean_and_unit_variance():
    # About 2500 independent values each: three standard errors of the variance are 0.085.
    rng = np.random.default_rng(0)
    smooth = np.stack([smooth_noise(rng, 400, correlation_um) for correlation_um in (3, 20) * 400])
    fields = np.stack([smooth_field(rng, Frame(96, 1.0), correlation_um) for correlation_um in (3, 9) * 40])
    for noise in (smooth[::2], smooth[1::2], fields[::2], fields[1::2]):
        assert abs(noise.mean()) < 0.1
        assert noise.var() == pytest.approx(1, abs=0.085)
    # The variance of a polyline dips between its corners, so it is only about one.
    kinked = np.stack([kinked_noise(rng, 400, 20) for _ in range(400)])
    assert abs(kinked.mean()) < 0.1
    assert kinked.var() == pytest.approx(1, abs=0.2)


def test_overlapping_spots_are_no_brighter_than_the_brightest():
    light = np.zeros((32, 32))
    stamp(light, np.array([[16.0, 16.0], [16.0, 16.0], [0.0, 31.0]]), np.array([1.0, 0.8, 0.5]), np.full(3, 1.2))
    assert light.max() == light[16, 16] == 1.0
    assert light[0, 31] == 0.5
    assert light[16, 18] == pytest.approx(np.exp(-0.5 * (2 / 1.2) ** 2))
