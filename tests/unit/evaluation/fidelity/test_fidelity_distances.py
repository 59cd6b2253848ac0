"""Distances with their context: none exists without it, halves are fair, and reasons stand for what is left out."""

from dataclasses import asdict, dataclass, fields

import numpy as np
import pytest

from ccmdist.config.evaluate import MinimumCounts
from ccmdist.errors import EvaluationError
from ccmdist.evaluation.fidelity.distances import (
    INCEPTION,
    MAX_IN_HALF,
    METRICS,
    Distance,
    Features,
    label_of,
    splits,
    whole,
)
from ccmdist.evaluation.fidelity.set_distances import (
    CMMD,
    EXTRAPOLATED,
    FRECHET,
    KERNEL,
    NEIGHBOURS,
    OF_ANY_EXTRACTOR,
    distances_between,
)


@dataclass(frozen=True)
class Seen:
    name: str = "six-numbers"
    sha256: str = "5" * 64


WHOLE = {
    "metric": "frechet",
    "value": 1.0,
    "interval": None,
    "of_halves": 1.0,
    "of_halves_range": (0.8, 1.2),
    "floor": 0.5,
    "floor_range": (0.1, 0.9),
    "num_real": 20,
    "num_synthetic": 20,
    "num_in_half": 10,
    "extractor": "six-numbers",
    "extractor_sha256": "5" * 64,
    "num_features": 6,
}


def features_of(num_subjects, frames, seed, shift=0.0, prefix="s", dim=3):
    values = np.random.default_rng(seed).normal(shift, 1, (num_subjects * frames, dim))
    return Features(values, np.repeat([f"{prefix}{index:03d}" for index in range(num_subjects)], frames))


def one_distance(real, synthetic, family=FRECHET, minimum=None, seed=0):
    (found, *_), left_out = distances_between(real, synthetic, Seen(), [family], minimum or MinimumCounts(), seed)
    assert not left_out
    return found


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"extractor_sha256": ""}, "without its extractor, that one's hash, the numbers of images and the real floor"),
        ({"num_real": 0}, "is not reported; give all of them"),
        ({"num_synthetic": None}, "the numbers of images"),
        ({"num_in_half": 0}, "the numbers of images"),
        ({"floor": float("nan")}, "the real floor"),
        ({"floor_range": (float("nan"), 1.0)}, "the real floor"),
        ({"of_halves": float("nan")}, "is not reported"),
        ({"extractor": ""}, "without its extractor"),
        ({"metric": "niceness"}, "is not reported"),
        ({"extractor": "FID-like"}, "only Inception's pool features make an FID"),
    ],
)
def test_a_distance_without_what_it_takes_to_read_it_cannot_be_made_or_printed(changed, message):
    Distance(**WHOLE)
    with pytest.raises(EvaluationError, match=message):
        Distance(**(WHOLE | changed))
    with pytest.raises(EvaluationError, match=message):
        whole([WHOLE, WHOLE | changed])


@pytest.mark.parametrize("name", [field.name for field in fields(Distance) if field.name != "fit_error"])
def test_a_table_is_refused_when_a_row_lacks_any_of_its_fields(name):
    row = {key: value for key, value in WHOLE.items() if key != name}
    with pytest.raises(EvaluationError, match=rf"a distance that is to be printed is not whole: .*{name}"):
        whole([row])


def test_a_distance_tells_its_counts_extractor_hash_and_floor():
    text = str(Distance(**(WHOLE | {"num_synthetic": 33})))
    assert text == ("Frechet distance 1 (n = 20 and 33); halves 1, real floor 0.5 (n = 10); six-numbers 555555555555")


def test_only_the_published_inception_makes_an_fid_or_a_kid():
    named = {metric: label_of(metric, INCEPTION) for metric in ("frechet", "frechet_infinity", "kernel")}
    assert named == {"frechet": "FID", "frechet_infinity": "FID, n → ∞", "kernel": "KID"}
    for extractor in ("weight-free-logbank-v1", "inception-v3-other-weights", "dinov2-class-token-1024"):
        assert not any(name in label_of(metric, extractor) for metric in METRICS for name in ("FID", "KID"))


def test_halves_share_no_subject_and_have_equal_counts():
    real, synthetic = features_of(7, 3, 1), features_of(7, 2, 2)
    for half in splits(real, synthetic, 2, np.random.default_rng(0)):
        assert len(half.first) == len(half.second) == len(half.synthetic)
        first = set(real.subjects[half.first])
        assert first.isdisjoint(real.subjects[half.second])
        assert first.isdisjoint(synthetic.subjects[half.synthetic])


def test_halves_of_many_images_are_drawn_from():
    real = features_of(30, 100, 3)
    assert {len(half.second) for half in splits(real, real, 2, np.random.default_rng(0))} == {MAX_IN_HALF}


def test_halves_need_four_subjects_and_enough_images():
    real = features_of(3, 10, 5)
    with pytest.raises(EvaluationError, match="3 real subjects, expected at least 4"):
        splits(real, real, 2, np.random.default_rng(0))
    real, foreign = features_of(5, 4, 5), features_of(1, 3, 6, prefix="foreign")
    with pytest.raises(EvaluationError, match="no half of the subjects has 4 real and 4 synthetic images beside it"):
        splits(real, foreign, 4, np.random.default_rng(0))


def test_identical_sets_lie_at_the_floor_and_shifted_ones_above_it():
    real = features_of(30, 2, seed=2)
    same = one_distance(real, real)
    assert same.value == pytest.approx(0, abs=1e-9)
    assert same.floor_range[0] < same.of_halves < same.floor_range[1]
    moved = one_distance(real, Features(real.values + np.eye(3)[0] * 2, real.subjects))
    assert moved.of_halves > 2 * moved.floor_range[1]
    assert moved.floor == same.floor


@pytest.mark.parametrize("family", [KERNEL, CMMD, EXTRAPOLATED])
def test_unbiased_distances_of_identical_sets_lie_at_a_floor_near_zero_and_shifted_ones_above_it(family):
    real, other = features_of(40, 2, 2, shift=0.5, dim=6), features_of(40, 2, 3, shift=0.5, prefix="t", dim=6)
    same, moved = one_distance(real, other, family), one_distance(real, features_of(40, 2, 3, shift=1.5, dim=6), family)
    assert same.floor_range[0] < 0 < same.floor_range[1]
    assert same.floor_range[0] < same.of_halves < same.floor_range[1]
    assert moved.of_halves > 2 * moved.floor_range[1]
    assert (family is EXTRAPOLATED) == (moved.fit_error is not None)


def test_neighbourhoods_of_identical_sets_lie_at_the_ceiling():
    real, other = features_of(30, 2, 2), features_of(30, 2, 4, prefix="t")
    found, left_out = distances_between(real, other, Seen(), [NEIGHBOURS], MinimumCounts(), 0)
    assert not left_out
    assert [one.metric for one in found] == ["precision", "recall", "density", "coverage"]
    assert all(one.floor_range[0] <= one.of_halves <= one.floor_range[1] for one in found)


def test_the_floor_falls_with_the_number_of_images_so_the_number_stands_beside_it():
    few, many = (one_distance(one, one) for one in (features_of(16, 2, 3), features_of(160, 2, 3)))
    assert many.floor < few.floor / 3
    assert (few.num_in_half, many.num_in_half) == (16, 160)


def test_a_set_with_few_images_gets_a_floor_at_its_own_number():
    real, synthetic = features_of(40, 2, 3), features_of(10, 2, 4, prefix="t")
    found = one_distance(real, synthetic)
    assert (found.num_real, found.num_synthetic, found.num_in_half) == (80, 20, 20)
    assert found.floor > 1.5 * one_distance(real, real).floor


def test_the_interval_of_a_kernel_distance_spreads_as_the_distance_itself_over_samples_of_subjects():
    rng = np.random.default_rng(6)

    def sampled(shift):
        # Frames of one subject resemble each other: an interval over frames would be far too narrow.
        values = np.repeat(rng.normal(shift, 1, size=(16, 4)), 6, axis=0) + rng.normal(0, 0.3, (96, 4))
        return Features(values, np.repeat([f"s{index:02d}" for index in range(16)], 6))

    def spread_and_told(shift):
        found = [one_distance(sampled(0), sampled(shift), KERNEL) for _ in range(40)]
        spread = np.subtract(*np.percentile([one.value for one in found], [95, 5]))
        return spread, np.median([one.interval[1] - one.interval[0] for one in found])

    spread, told = spread_and_told(shift=1.5)
    # 40 samples know the spread to about a quarter.
    assert told == pytest.approx(spread, rel=0.4)
    spread, told = spread_and_told(shift=0)
    assert spread < told < 3 * spread


def test_sets_of_too_few_subjects_have_no_interval():
    real = features_of(12, 4, 7, dim=4)
    assert one_distance(real, features_of(3, 16, 8, prefix="t", dim=4), KERNEL).interval is None


def test_what_rests_on_too_few_images_is_left_out_with_the_reason():
    real, few = features_of(10, 3, 8), features_of(5, 3, 9)
    found, left_out = distances_between(real, few, Seen(), OF_ANY_EXTRACTOR, MinimumCounts(kernel_images=10), 0)
    assert [one.metric for one in found] == ["kernel"]
    reasons = {omitted.what: omitted.reason for omitted in left_out}
    assert reasons["Frechet distance on six-numbers"] == "30 real and 15 synthetic images, at least 16 each are needed"
    assert "precision, recall, density, coverage on six-numbers" in reasons
    three = features_of(3, 30, 8)
    found, left_out = distances_between(three, three, Seen(), OF_ANY_EXTRACTOR, MinimumCounts(), 0)
    assert found == []
    assert {omitted.reason for omitted in left_out} == {
        "3 real subjects, expected at least 4 to take subject-disjoint halves of"
    }


def test_halves_below_the_minimum_are_not_read_either():
    real = features_of(10, 3, 8)
    found, left_out = distances_between(real, real, Seen(), [FRECHET, KERNEL], MinimumCounts(kernel_images=15), 0)
    assert [(one.metric, one.num_in_half) for one in found] == [("kernel", 15)]
    assert left_out[0].reason == "no half of the subjects has 16 real and 16 synthetic images beside it"


def test_an_extrapolation_needs_two_images_per_feature_in_halves_too():
    # 1.5 images per feature read 0.9 between samples of one distribution of 12 features.
    real = features_of(18, 2, 8, dim=12)
    found, left_out = distances_between(real, real, Seen(), [FRECHET, EXTRAPOLATED], MinimumCounts(), 0)
    assert [one.metric for one in found] == ["frechet"]
    assert left_out[0].reason == "no half of the subjects has 24 real and 24 synthetic images beside it"
    real = features_of(12, 3, 8, dim=24)
    found, left_out = distances_between(real, real, Seen(), [FRECHET, EXTRAPOLATED], MinimumCounts(), 0)
    assert [one.metric for one in found] == ["frechet"]
    assert left_out[0].reason == "36 real and 36 synthetic images, at least 48 each are needed"


def test_the_same_seed_gives_the_same_figures():
    real, other = features_of(12, 3, 10), features_of(12, 3, 11)
    twice = [distances_between(real, other, Seen(), OF_ANY_EXTRACTOR, MinimumCounts(), 3)[0] for _ in range(2)]
    assert [asdict(one) for one in twice[0]] == [asdict(one) for one in twice[1]]
