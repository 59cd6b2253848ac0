"""Paired measures against torchmetrics and on cases with a known answer."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from ccmdist.ccm.phantom import make_phantom
from ccmdist.evaluation.fidelity.paired import (
    PAIRED,
    SCALE_WEIGHTS,
    blurred,
    ms_ssim,
    num_scales,
    psnr_db,
    similarity,
    ssim,
    without_similarity,
)


def noisy(image, seed=0, sd=25):
    noise = np.random.default_rng(seed).normal(0, sd, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def tensors(*images):
    return [torch.from_numpy(image.astype(np.float64))[None, None] for image in images]


def judged(first, second):
    """SSIM and its part without luminance by torchmetrics, where its window lies inside the image."""
    _, everywhere = structural_similarity_index_measure(first, second, data_range=255.0, return_full_image=True)
    _, structure = structural_similarity_index_measure(
        first, second, data_range=255.0, return_contrast_sensitivity=True
    )
    return float(everywhere[..., 5:-5, 5:-5].mean()), float(structure)


@pytest.mark.parametrize(("size", "scales"), [((192, 192), 5), ((176, 224), 5), ((128, 128), 4), ((64, 90), 3)])
def test_ms_ssim_is_that_of_torchmetrics_at_the_scales_that_fit(size, scales):
    image = make_phantom("Control", 1, 256).image[: size[0], : size[1]]
    other = noisy(image)
    weights = np.array(SCALE_WEIGHTS[:scales]) / sum(SCALE_WEIGHTS[:scales])
    pair, wanted = tensors(image, other), 1.0
    for scale, weight in enumerate(weights):
        whole, structure = judged(*pair)
        wanted *= (whole if scale == scales - 1 else structure) ** weight
        pair = [torch.nn.functional.avg_pool2d(one, 2) for one in pair]
    assert num_scales(size) == scales
    assert ms_ssim(image, other) == pytest.approx(wanted, abs=1e-6)
    assert ms_ssim(image, image) == pytest.approx(1)
    # Its own MS-SSIM also counts windows that reach over the border of the coarsest image, a few pixels wide.
    by_judge = multiscale_structural_similarity_index_measure(
        *tensors(image, other), data_range=255.0, betas=tuple(weights.tolist()), normalize="relu"
    )
    assert ms_ssim(image, other) == pytest.approx(float(by_judge), abs=0.03)


def test_images_too_small_for_two_scales_have_no_ms_ssim():
    image = make_phantom("Control", 1, 64).image
    assert (num_scales((21, 64)), num_scales((22, 64))) == (1, 2)
    assert np.isnan(ms_ssim(image[:21], image[:21]))
    assert ms_ssim(image[:22], image[:22]) == pytest.approx(1)


def test_ssim_is_that_of_torchmetrics():
    image = make_phantom("T1DPN", 2, 128).image
    assert ssim(image, noisy(image)) == pytest.approx(judged(*tensors(image, noisy(image)))[0], abs=1e-6)


def test_similarity_of_equal_and_of_noisy_frames():
    image = make_phantom("Control", 1, 96).image
    assert similarity(image, image) == pytest.approx({"ssim": 1, "ms_ssim": 1, "psnr_db": 100})
    assert psnr_db(np.full((9, 9), 100, np.uint8), np.full((9, 9), 110, np.uint8)) == pytest.approx(28.13, abs=0.01)
    brighter = np.clip(image.astype(int) + 10, 0, 255).astype(np.uint8)
    assert ssim(image, noisy(image)) < ssim(image, brighter) < 1
    assert set(without_similarity()) == set(PAIRED)


def test_a_frame_that_has_lost_its_grain_beats_another_scan_of_the_same_nerves():
    phantom = make_phantom("Control", 3, 192).image
    another = similarity(phantom, noisy(phantom, sd=12))
    wiped = similarity(phantom, blurred(phantom))
    # This is why the blur of real frames stands beside every paired measure.
    assert wiped["ssim"] > another["ssim"]
    assert np.diff(blurred(phantom).astype(float)).std() < 0.7 * np.diff(phantom.astype(float)).std()
