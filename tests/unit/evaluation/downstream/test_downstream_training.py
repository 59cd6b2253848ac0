"""A training is a function of its seed, takes its groups in turn, is chosen on validation images, and can learn."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ccmdist.config.evaluate import NetworkSettings
from ccmdist.evaluation.downstream.augmentation import augmented, transforms
from ccmdist.evaluation.downstream.examples import Examples
from ccmdist.evaluation.downstream.networks import as_input, built, parameter_count
from ccmdist.evaluation.downstream.training import batch_of, train_and_test

CPU = torch.device("cpu")
SETTINGS = NetworkSettings(
    size_px=32, unet_channels=(8, 16), num_steps=30, batch_size=9, lrs=(0.01,), validate_every_steps=10
)


def stripes(num, seed):
    """Images that are easy to tell apart and to segment: two, four or eight bright lines."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num) % 3
    masks = np.zeros((num, 32, 32), bool)
    for mask, label in zip(masks, labels, strict=True):
        mask[rng.integers(0, 4) :: (16, 8, 4)[label]] = True
    images = np.clip(60 + 100 * masks + rng.normal(0, 20, masks.shape), 0, 255).astype(np.uint8)
    return Examples(images, masks, labels.astype(np.int64))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(2, 9), st.integers(0, 5))
def test_batches_take_the_groups_in_turn_and_each_image_once_per_round(labels, batch_size, seed):
    labels = np.array(labels)
    drawn = np.concatenate([batch_of(labels, batch_size, seed, step) for step in range(1, 60)])
    groups = np.unique(labels)
    assert (labels[drawn] == groups[np.arange(len(drawn)) % len(groups)]).all()
    for group in groups:
        members = drawn[labels[drawn] == group]
        num = (labels == group).sum()
        for first in range(0, len(members) - num, num):
            assert len(set(members[first : first + num])) == num


@pytest.mark.parametrize("task", ["diagnosis", "segmentation"])
def test_a_training_learns_and_is_a_function_of_its_seed(task):
    sets = [stripes(num, seed) for seed, num in enumerate((24, 12, 12))]
    settings = SETTINGS.model_copy(update={"num_steps": 60})
    found = train_and_test(task, settings, *sets, seed=1, device=CPU)
    torch.manual_seed(99)
    assert np.array_equal(found.probabilities, train_and_test(task, settings, *sets, 1, CPU).probabilities)
    assert not np.array_equal(found.probabilities, train_and_test(task, settings, *sets, 2, CPU).probabilities)
    if task == "diagnosis":
        assert (found.probabilities.argmax(1) == sets[2].labels).mean() >= 0.9
    else:
        assert ((found.probabilities >= 0.5) == sets[2].masks).mean() >= 0.95


def test_neither_the_number_of_cores_nor_other_random_numbers_change_a_result():
    sets = [stripes(num, seed) for seed, num in enumerate((12, 6, 6))]
    threads = torch.get_num_threads()
    found = []
    try:
        for num in (1, 2):
            torch.set_num_threads(num)
            state = torch.get_rng_state()
            found.append(train_and_test("diagnosis", SETTINGS, *sets, 1, CPU).probabilities)
            assert torch.get_num_threads() == num
            assert torch.equal(torch.get_rng_state(), state)
            torch.rand(3)
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(*found)


def test_what_is_tested_is_the_rate_and_the_step_that_were_best_on_validation_images():
    sets = [stripes(num, seed) for seed, num in enumerate((12, 6, 6))]
    settings = SETTINGS.model_copy(update={"lrs": (1e-6, 0.01, 30.0)})
    found = train_and_test("diagnosis", settings, *sets, 1, CPU)
    assert [curve.lr for curve in found.curves] == [1e-6, 0.01, 30.0]
    assert all(curve.steps == (10, 20, 30) for curve in found.curves)
    lowest = {
        (curve.lr, step): loss
        for curve in found.curves
        for step, loss in zip(curve.steps, curve.validation, strict=True)
    }
    assert (found.lr, found.step) == min(lowest, key=lowest.get)
    assert found.lr == 0.01
    # The state, not only its name: training to that step alone gives the same network.
    alone = settings.model_copy(update={"lrs": (found.lr,), "num_steps": found.step})
    assert np.array_equal(found.probabilities, train_and_test("diagnosis", alone, *sets, 1, CPU).probabilities)


def test_the_test_images_do_not_take_part_in_the_choice():
    training, validation, test = (stripes(num, seed) for seed, num in enumerate((12, 6, 6)))
    found = train_and_test("diagnosis", SETTINGS, training, validation, test, 1, CPU)
    wrong = Examples(test.images, ~test.masks, (test.labels + 1) % 3)
    other = train_and_test("diagnosis", SETTINGS, training, validation, wrong, 1, CPU)
    assert (other.lr, other.step, other.curves) == (found.lr, found.step, found.curves)


@pytest.mark.parametrize("name", ["small", "resnet18", "resnet50", "swin"])
def test_every_network_of_the_settings_answers_with_three_logits(name):
    settings = NetworkSettings(diagnosis=name, size_px=64)
    network = built("diagnosis", settings).eval()
    images = torch.randint(0, 256, (2, 64, 64), dtype=torch.uint8)
    assert network(as_input(images)).shape == (2, 3)
    assert parameter_count(network) > 1000


def test_the_networks_see_neither_brightness_nor_contrast():
    images = torch.from_numpy(stripes(3, 0).images)
    dimmer = (images.float() * 0.5 + 20).round().to(torch.uint8)
    assert torch.allclose(as_input(images), as_input(dimmer), atol=0.05)
    assert as_input(torch.full((1, 4, 4), 7, dtype=torch.uint8)).abs().max() == 0


def test_augmentation_is_a_function_of_its_seed_and_moves_image_and_mask_alike():
    examples = stripes(6, 0)
    images, masks = torch.from_numpy(examples.images), torch.from_numpy(examples.masks)
    chain = transforms(32)
    first, moved = augmented(images, masks, chain, 5)
    augmented(images, masks, chain, 6)
    again, same = augmented(images, masks, chain, 5)
    assert torch.equal(first, again)
    assert torch.equal(moved, same)
    assert not torch.equal(moved, masks)
    assert (moved.dtype, first.shape) == (torch.bool, images.shape)
    bright = [image[mask].mean() - image[~mask].mean() for image, mask in zip(first, moved, strict=True)]
    assert min(bright) > 30
    assert first.max() < 400


def test_a_network_that_gets_worse_is_tested_as_it_was_before():
    training, validation, test = (stripes(num, seed) for seed, num in enumerate((12, 6, 6)))
    misled = Examples(training.images, training.masks, (training.labels + 1) % 3)
    found = train_and_test("diagnosis", SETTINGS, misled, validation, test, 1, CPU)
    losses = found.curves[0].validation
    assert losses[0] < losses[1] < losses[2]
    assert found.step == 10
    short = SETTINGS.model_copy(update={"num_steps": 10})
    alone = train_and_test("diagnosis", short, misled, validation, test, 1, CPU)
    assert np.array_equal(found.probabilities, alone.probabilities)
