"""How figures and lists are worded for reading."""

from ccmdist.evaluation.report.formatting import (
    ABSENT,
    MINUS,
    by_reason,
    fixed,
    joined,
    like,
    number,
    p_value,
    percent,
    signed,
    told_once,
)


def test_numbers_are_worded_for_reading():
    assert [number(v) for v in (None, 0.0, 0.01234, 12.345, 1234.5, -0.5)] == [
        ABSENT,
        "0",
        "0.0123",
        "12.3",
        "1234",
        f"{MINUS}0.500",
    ]
    assert [like(12.3456, scale) for scale in (0.77, 12, None)] == ["12.35", "12", "12.3"]
    assert (fixed(None, 2), fixed(-1.0, 1), signed(0.26), signed(-3.0)) == (
        ABSENT,
        f"{MINUS}1.0",
        "+0.3",
        f"{MINUS}3.0",
    )
    assert (percent(0.123), percent(-0.2), percent(None)) == ("+12 %", f"{MINUS}20 %", ABSENT)
    assert list(told_once([("a", "x"), ("b", "y"), ("c", "x")])) == [(["a", "c"], "x"), (["b"], "y")]
    omitted = [{"what": what, "reason": why} for what, why in (("a, x", "1"), ("b, x", "1"), ("c", "2"), ("d", "2"))]
    assert list(by_reason(omitted)) == [("a, b: x", "1"), ("c; d", "2")]
    assert [joined(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
    assert [p_value(p) for p in (None, 0.0001, 0.0306)] == [ABSENT, "< 0.001", "0.031"]
