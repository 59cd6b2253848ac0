"""A person at a terminal sees a bar, a log file gets plain lines; rank 0 speaks for all."""

import io
import logging
import re
import sys

import pytest

from ccmdist import console
from ccmdist.console import log, start_logging, tracked


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stderr(capsys):
    """What was written to a stderr that is no terminal, since the last call."""
    return lambda: capsys.readouterr().err


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when a test says so."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_rank_0_tells_all_and_the_others_warn_with_their_rank(stderr):
    start_logging(0)
    log.info("made %d shards", 3)
    start_logging(5)
    log.info("not said")
    log.warning("low on space")
    lines = stderr().splitlines()
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in lines] == ["made 3 shards", "rank 5 low on space"]
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)


def test_starting_twice_says_everything_once(stderr):
    start_logging()
    start_logging()
    log.info("once")
    assert stderr().count("once") == 1


def test_records_do_not_reach_handlers_of_other_libraries(stderr):
    others = io.StringIO()
    handler = logging.StreamHandler(others)
    logging.getLogger().addHandler(handler)
    try:
        start_logging()
        log.info("ours")
    finally:
        logging.getLogger().removeHandler(handler)
    assert others.getvalue() == ""


def test_a_log_file_gets_a_line_now_and_then_with_rate_and_time_left(stderr, clock):
    start_logging()
    seen = []
    for item in tracked(range(100), "shards", total=100):
        seen.append(item)
        clock[0] += 2.0
    assert seen == list(range(100))
    text = stderr()
    lines = [line.split(" ", 1)[1] for line in text.splitlines()]
    assert lines[0] == "shards: 15 of 100, 0.5 per second, 170 s left"
    assert lines[-1] == "shards: 100 of 100, 0.5 per second, 0 s left"
    assert len(lines) == 7, "one per 30 s and the last"
    assert "\r" not in text
    assert "\x1b" not in text


def test_work_of_an_instant_is_told_in_one_line(stderr, clock):
    start_logging()
    assert list(tracked("ab", "shards", total=2)) == ["a", "b"]
    lines = stderr().splitlines()
    assert len(lines) == 1
    assert "shards: 2 of 2, " in lines[0]


def test_no_work_says_nothing(stderr):
    start_logging()
    assert list(tracked([], "shards", total=0)) == []
    assert stderr() == ""


def test_an_item_counts_as_done_when_the_next_is_asked_for(stderr, clock):
    start_logging()
    items = tracked([1, 2], "shards", total=2)
    next(items)
    next(items)
    assert stderr() == "", "the second is still being worked on"
    assert next(items, None) is None
    assert "2 of 2" in stderr()


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    assert list(tracked(iter([3, 1, 2]), "shards", total=3)) == [3, 1, 2]
    assert "shards" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()
    assert "per second" not in terminal.getvalue()


def test_an_error_in_the_work_is_not_swallowed_by_the_bar(monkeypatch):
    def failing():
        yield 1
        raise ValueError("broken shard")

    for file in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", file)
        with pytest.raises(ValueError, match="broken shard"):
            list(tracked(failing(), "shards", total=2))
