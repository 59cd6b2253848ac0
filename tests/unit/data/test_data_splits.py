"""Splits are by subject, drawn by the seed, fair to the clinical groups, and never leave train empty."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.data.splits import Subject, assigned_splits
from ccmdist.errors import ConfigError


def cohort(*sizes, num_frames=2):
    groups = (*CLINICAL_GROUPS, None)
    return {
        f"{group}-{i}": Subject(group, num_frames)
        for group, size in zip(groups, sizes, strict=False)
        for i in range(size)
    }


def counts(subjects, splits):
    return Counter((subjects[name].clinical_group, split) for name, split in splits.items())


def test_each_group_gives_its_share():
    subjects = cohort(20, 40, 10)
    found = counts(subjects, assigned_splits(subjects, 0.1, 0.2, 0))
    for group, size in zip(CLINICAL_GROUPS, (20, 40, 10), strict=True):
        assert found[group, "val"] == size * 0.1
        assert found[group, "test"] == size * 0.2


def test_six_subjects_per_group_give_one_of_each_group_to_val_and_test():
    subjects = cohort(6, 6, 6)
    found = counts(subjects, assigned_splits(subjects, 0.15, 0.15, 3))
    assert all(found[group, split] == (4 if split == "train" else 1) for group, split in found)
    assert len(found) == 9


def test_a_group_does_not_give_its_only_subject_while_another_can_spare_one():
    subjects = cohort(1, 4)
    for seed in range(10):
        found = counts(subjects, assigned_splits(subjects, 0.3, 0, seed))
        assert found == {("Control", "train"): 1, ("T1NoDPN", "train"): 2, ("T1NoDPN", "val"): 2}


def test_the_split_is_a_function_of_the_subjects_and_the_seed_not_of_their_order():
    subjects = cohort(9, 7, 5, 3)
    backwards = dict(reversed(subjects.items()))
    assert assigned_splits(subjects, 0.2, 0.2, 1) == assigned_splits(backwards, 0.2, 0.2, 1)
    assert assigned_splits(subjects, 0.2, 0.2, 1) != assigned_splits(subjects, 0.2, 0.2, 2)


@pytest.mark.parametrize(("num_subjects", "expected"), [(1, "train"), (2, "train val"), (3, "train val test")])
def test_few_subjects_go_to_train_first_then_val_then_test(num_subjects, expected):
    splits = assigned_splits(cohort(num_subjects), 0.1, 0.1, 0)
    assert Counter(splits.values()) == Counter(expected.split())


def test_a_subject_with_most_of_the_frames_is_trained_on_whatever_the_seed():
    subjects = {"a": Subject(None, 20)} | {name: Subject(None, 1) for name in "bcde"}
    for seed in range(50):
        splits = assigned_splits(subjects, 0.15, 0.15, seed)
        assert splits["a"] == "train"
        assert Counter(splits.values()) == {"train": 3, "val": 1, "test": 1}


def test_a_fraction_of_zero_gets_nothing_and_two_that_leave_nothing_for_train_are_refused():
    assert set(assigned_splits(cohort(9), 0, 0.2, 0).values()) == {"train", "test"}
    with pytest.raises(ConfigError, match=r"val_fraction 0.5 and test_fraction 0.5 leave nothing for train"):
        assigned_splits(cohort(9), 0.5, 0.5, 0)


@given(
    st.lists(st.tuples(st.sampled_from([*CLINICAL_GROUPS, None]), st.integers(1, 30)), min_size=1, max_size=30),
    st.floats(0, 0.6),
    st.floats(0, 0.39),
    st.integers(0, 5),
)
def test_every_subject_gets_one_split_and_the_sizes_are_as_asked_for(people, val, test, seed):
    subjects = {f"s{i}": Subject(*person) for i, person in enumerate(people)}
    splits = assigned_splits(subjects, val, test, seed)
    assert splits.keys() == subjects.keys()
    found = Counter(splits.values())
    assert found["train"] >= 1
    assert (val > 0 or not found["val"]) and (test > 0 or not found["test"])
    total = sum(subject.num_frames for subject in subjects.values())
    if all(2 * subject.num_frames <= total for subject in subjects.values()) and len(subjects) >= 3:
        assert (found["val"] > 0) == (val > 0)
        wanted = min(max(round(val * len(subjects)), val > 0), len(subjects) - 1)
        assert found["val"] == wanted
        if len(subjects) - wanted >= 2:
            assert (found["test"] > 0) == (test > 0)
