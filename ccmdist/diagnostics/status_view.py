"""How ``ccmdist status`` looks: a panel on the run, its attempts, and where its time went, within 80 columns."""

from collections.abc import Iterable, Iterator
from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ccmdist.diagnostics.goodput import Advice, Attempt, Goodput
from ccmdist.diagnostics.standing import Standing

WIDTH: Final = 80
HOUR_S: Final = 3600
DAY_S: Final = 86400
NAME_WIDTH: Final = 11
BAR_WIDTH: Final = 40
MAX_ATTEMPTS: Final = 6
"""Newest attempts that are shown; the others are counted."""
MAX_REASON: Final = 120
"""Characters of an attempt's reason; a run's last one is shown whole above."""
SMALLEST_SHARE: Final = 0.0005
"""Of the wall time, below which a bucket is not shown: it would read 0.0 %."""
STYLES: Final = {
    "new": "cyan",
    "running": "green",
    "waiting": "yellow",
    "done": "green",
    "refused": "red",
    "killed": "red",
}
NAME_OF_DETAIL: Final = {
    "new": "start",
    "running": "holder",
    "waiting": "next",
    "done": "end",
    "refused": "reason",
    "killed": "end",
}


def page(now: Standing) -> RenderableType:
    """All that is known, for a person."""
    parts: list[RenderableType] = [_head(now)]
    if now.attempts:
        parts.append(_attempts(now))
    if now.goodput is not None and now.goodput.wall_s > 0:
        parts += [
            Text(),
            _facts([("goodput", _share(now.goodput))]),
            _time(now.goodput),
            _facts(_costs(now, now.goodput)),
        ]
    return Group(*parts)


def line(now: Standing) -> str:
    """The same in one line, for a log."""
    told = [now.state, f"{_unit(now)} {_known(now.step)}/{_known(now.num_steps)}"]
    if now.kind == "training run":
        told.append(f"committed {_known(now.committed_step)}")
    if now.seconds_left is not None and now.state == "running":
        told.append(f"{duration(now.seconds_left)} left")
    if now.goodput is not None and now.goodput.wall_s > 0:
        told.append(f"goodput {now.goodput.share:.0%}")
    if now.attempts:
        told.append(f"attempt {len(now.attempts)}")
    return "  ".join([*told, now.detail] if now.state not in ("running", "done") else told)


def duration(seconds: float) -> str:
    """Seconds for people: "0.42 s", "3 min 05 s", "8 h", "3 d 04 h"."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 or seconds < 0.005 else f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < HOUR_S:
        return _two(*divmod(whole, 60), "min", "s")
    if whole < DAY_S:
        return _two(whole // HOUR_S, whole % HOUR_S // 60, "h", "min")
    return _two(whole // DAY_S, whole % DAY_S // HOUR_S, "d", "h")


def _two(large: int, small: int, large_unit: str, small_unit: str) -> str:
    return f"{large} {large_unit} {small:02d} {small_unit}" if small else f"{large} {large_unit}"


def _ago(seconds: float) -> str:
    return f"{duration(seconds)} ago" if seconds >= 1 else "just now"


def _head(now: Standing) -> Panel:
    style = STYLES[now.state]
    room = WIDTH - len(now.state) - 10
    run = now.run if len(now.run) <= room else f"…{now.run[1 - room :]}"
    title = Text.assemble((f"● {now.state}", f"bold {style}"), f"  {run}")
    facts = _facts(_rows(now), left=0)
    return Panel(facts, title=title, title_align="left", box=box.ROUNDED, border_style=style)


def _facts(rows: Iterable[tuple[str, RenderableType]], left: int = 2) -> RenderableType:
    """Names and values below each other, in line with the text of the panel."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=NAME_WIDTH)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value) if isinstance(value, str) else value)
    return Padding(table, (0, 1, 0, left))


def _rows(now: Standing) -> Iterator[tuple[str, RenderableType]]:
    if now.detail:
        yield NAME_OF_DETAIL[now.state], now.detail
    if now.step is not None and now.num_steps:
        yield _unit(now), _progress(now.step, now.num_steps, STYLES[now.state])
    if now.goodput and now.goodput.step_s and now.state in ("running", "waiting", "killed"):
        yield "time left", f"{duration(now.seconds_left or 0)} at {now.goodput.step_s:.3g} s per step"
    if now.committed_step:
        age = "" if now.committed_age_s is None else f", {_ago(now.committed_age_s)}"
        yield "last commit", f"step {now.committed_step}{age}"
    if now.last_exit is not None and now.last_exit.state == "requeue":
        yield "last exit", f"at step {now.last_exit.step}: {now.last_exit.reason}"
    if now.state == "running" and now.quiet_s is not None:
        yield "last sign", _ago(now.quiet_s)
    if now.attempts_without_progress > 1:
        yield "no progress", Text(f"in the last {now.attempts_without_progress} attempts", style="yellow")


def _progress(done: int, total: int, style: str) -> Table:
    row = Table.grid(padding=(0, 2))
    bar = ProgressBar(total, min(done, total), width=BAR_WIDTH, complete_style=style, finished_style=style)
    row.add_row(f"{done}/{total}", bar, f"{done / total:.0%}")
    return row


def _attempts(now: Standing) -> RenderableType:
    """The newest attempts, one line each where the reason is short."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    with_jobs = any(attempt.job for attempt in now.attempts)
    for name in ["attempt", "steps", "took", *(["job"] if with_jobs else []), "host"]:
        table.add_column(name, justify="left" if name == "host" else "right", no_wrap=True, max_width=16)
    table.add_column("ended", overflow="fold")
    hidden = max(len(now.attempts) - MAX_ATTEMPTS, 0)
    if hidden:
        table.add_row(f"1 - {hidden}", "...")
    for attempt in now.attempts[hidden:]:
        quiet_s = now.quiet_s or 0.0 if attempt.state == "running" else 0.0
        steps, took = f"{attempt.first_step} → {attempt.last_step}", duration(attempt.seconds + quiet_s)
        cells = [str(attempt.number + 1), steps, took, *([attempt.job] if with_jobs else []), attempt.host]
        table.add_row(*map(Text, cells), _ending(attempt))
    return Padding(table, (0, 0, 0, 2))


def _ending(attempt: Attempt) -> Text:
    lost = f"; {_count(attempt.lost_steps, 'step')} lost" if attempt.lost_steps else ""
    told = f"refused: {attempt.reason}" if attempt.state == "refused" else attempt.reason or attempt.state
    told = told if len(told) <= MAX_REASON else told[: MAX_REASON - 1] + "…"
    return Text(told + lost, style=STYLES.get(attempt.state, ""))


def _share(figures: Goodput) -> str:
    told = f"{figures.share:.1%} of {duration(figures.wall_s)}"
    told += f", {figures.share_without_queue:.1%} without queue" if figures.buckets_s["queue"] else ""
    return told + (f", {figures.gpu_hours:,.2f} GPU-hours" if figures.gpu_hours else "")


def _costs(now: Standing, figures: Goodput) -> Iterator[tuple[str, RenderableType]]:
    """What failures cost, and how often to save."""
    told = "none seen"
    if figures.mean_s_between_failures is not None:
        running_s = figures.num_failures * figures.mean_s_between_failures
        told = f"{figures.num_failures} in {duration(running_s)} of running"
        told += f", {figures.lost_steps_per_failure:.3g} steps lost each" if figures.lost_steps_per_failure else ""
    yield "failures", told
    if num_restarts := len(now.attempts) - 1:
        stops = f", {figures.num_stops} after a clean stop" if figures.num_stops else ""
        took = f", {duration(figures.recovery_s)} until a new step" if figures.recovery_s is not None else ""
        yield "restarts", f"{num_restarts}{stops}{took}"
    if figures.advice is not None:
        yield "saves", _advice(figures.advice, now.commit_every_steps)


def _advice(advice: Advice, every_steps: int | None) -> str:
    steps = f" = {_count(advice.interval_steps, 'step')}" if advice.interval_steps else ""
    now = f" (now {every_steps})" if every_steps else ""
    rate = f"assuming a failure per {duration(advice.failure_every_s)}" if advice.is_assumed else "at this rate"
    return f"{duration(advice.save_s)} each, {rate} best every {duration(advice.interval_s)}{steps}{now}"


def _time(figures: Goodput) -> RenderableType:
    """The buckets, largest first."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=NAME_WIDTH)
    table.add_column(width=BAR_WIDTH)
    for _ in range(2):
        table.add_column(justify="right", no_wrap=True)
    for name, seconds in sorted(figures.buckets_s.items(), key=lambda item: -item[1]):
        share = seconds / figures.wall_s
        if share >= SMALLEST_SHARE:
            style = {"compute": "green", "wasted": "red"}.get(name, "cyan")
            bar = ProgressBar(1.0, share, width=BAR_WIDTH, complete_style=style, finished_style=style)
            table.add_row(name.replace("_", " "), bar, f"{seconds:,.1f} s", f"{share:.1%}")
    return Padding(table, (0, 0, 0, 2))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _unit(now: Standing) -> str:
    return "step" if now.kind == "training run" else "batch"


def _known(number: int | None) -> str:
    return "?" if number is None else str(number)
