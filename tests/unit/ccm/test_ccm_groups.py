import pytest

from ccmdist.ccm.groups import CLINICAL_GROUPS, parse_group
from ccmdist.ccm.units import UM_PER_PX_HRT3, frame_area_mm2
from ccmdist.errors import ShardError


@pytest.mark.parametrize("clinical_group", CLINICAL_GROUPS)
def test_every_group_is_read_back_from_its_own_spelling(clinical_group):
    assert parse_group(clinical_group, "table.csv:2") == clinical_group
    assert parse_group(f" {clinical_group}\t", "table.csv:2") == clinical_group


@pytest.mark.parametrize("text", [None, "", "  ", "unlabelled"])
def test_a_frame_without_a_label_has_no_group(text):
    assert parse_group(text, "table.csv:2") is None


@pytest.mark.parametrize(
    ("text", "hint"),
    [("control", "Control"), ("T1-DPN", "T1DPN"), ("T1NoDPM", "T1NoDPN"), ("unlabeled", "unlabelled")],
)
def test_a_misspelt_group_is_refused_with_the_nearest_one_and_the_list(text, hint):
    with pytest.raises(ShardError) as error:
        parse_group(text, "table.csv:2")
    assert str(error.value) == (
        f"table.csv:2: clinical_group '{text}' is not a known code; "
        f"did you mean '{hint}'? known: Control, T1NoDPN, T1DPN, unlabelled"
    )


def test_a_group_that_resembles_none_is_refused_without_a_guess():
    with pytest.raises(ShardError, match=r"clinical_group 'xyz' is not a known code; known: Control, T1"):
        parse_group("xyz", "table.csv:2")


def test_the_message_does_not_repeat_a_long_cell_of_a_patient_table():
    with pytest.raises(ShardError) as error:
        parse_group("seen on the 3rd of May, complains of numb feet", "table.csv:2")
    assert "numb feet" not in str(error.value)


def test_an_hrt3_frame_shows_0_16_mm2():
    assert frame_area_mm2(384, 384, UM_PER_PX_HRT3) == pytest.approx(0.16, rel=1e-12)
    assert frame_area_mm2(192, 384, UM_PER_PX_HRT3) == pytest.approx(0.08, rel=1e-12)
