"""Ledgers written by hand, with figures that can be worked out in the head."""

import json

from ccmdist.synthesis.output import BATCHES
from ccmdist.synthesis.plan import Batch, Plan, PlanSettings, Request, accept_plan

T0 = 1_700_000_000.0


class Ledger:
    """Lines of a ledger; the time of each is when the one before ended, plus what it took."""

    def __init__(self):
        self.lines, self.now, self.number = [], T0, -1

    def attempt(self, step, queue_s=0.0, gpus=0, host="n1", job=""):
        """A job that begins ``queue_s`` after the last line, 10 s of startup and 5 s of restoring."""
        self.now += queue_s
        self.number += 1
        begin = {"step": step, "began": self.now, "job": job, "restart": 0, "ranks": 2, "gpus": gpus, "host": host}
        self.now += 15.0
        self._add("attempt", **begin)
        self._add("section", section="startup", seconds=10.0, step=step, last_step=step)
        self._add("section", section="restore", seconds=5.0, step=step, last_step=step)
        return self

    def steps(self, first, last, step_s=2.0, wait_s=0.0):
        """Steps after ``first`` up to ``last``, in one line."""
        self.now += (last - first) * (step_s + wait_s)
        self._add("section", section="compute", seconds=(last - first) * step_s, step=first, last_step=last)
        if wait_s:
            self._add("section", section="data_wait", seconds=(last - first) * wait_s, step=first, last_step=last)
        return self

    def commit(self, step, seconds=1.0):
        """A save that keeps the ranks from training."""
        self.now += seconds
        self._add("section", section="checkpoint", seconds=seconds, step=step - 1, last_step=step)
        self._add("commit", step=step, seconds=seconds)
        return self

    def end(self, state, reason, step):
        """The last line of an attempt that ends by itself."""
        self._add("end", state=state, reason=reason, step=step)
        return self

    def _add(self, event, **values):
        self.lines.append({"time": self.now, "attempt": self.number, "event": event, **values})


def straight():
    """20 steps of 2 s without an incident: 15 s to start, 40 s of steps, 2 saves of 1 s."""
    ledger = Ledger().attempt(0).steps(0, 10).commit(10).steps(10, 20).commit(20)
    return ledger.end("done", "all 20 steps are done", 20)


def preempted():
    """Stopped by a signal at step 6, 30 s of queue, then to the end: nothing is lost."""
    ledger = Ledger().attempt(0, gpus=4, job="7").steps(0, 6).commit(6).end("requeue", "stopped by SIGUSR2", 6)
    ledger.attempt(6, queue_s=30.0, gpus=4, job="7").steps(6, 20).commit(20)
    return ledger.end("done", "all 20 steps are done", 20)


def killed():
    """Killed at step 14 of which 10 are committed, 30 s of queue, now at step 18: 4 steps of 2 s are wasted."""
    ledger = Ledger().attempt(0).steps(0, 10).commit(10).steps(10, 14)
    return ledger.attempt(10, queue_s=30.0, host="n2").steps(10, 14).steps(14, 18)


def refused():
    """Gave up at step 12 because of its losses; 10 were committed."""
    ledger = Ledger().attempt(0).steps(0, 10).commit(10).steps(10, 12)
    return ledger.end("refused", "step 12: the loss is not finite (samples: a-1)", 12)


def write(folder, ledger, num_steps=20, owner=None, outcome=None, shift_s=0.0):
    """A run folder as rank 0 leaves it behind: ``ledger``, settings, commits, its holder and how it ended."""
    folder.mkdir(parents=True, exist_ok=True)
    if owner is not None:
        (folder / "owner.json").write_text(json.dumps(owner))
    settings = {
        "num_steps": num_steps,
        "checkpoint": {"every_steps": 10},
        "timeouts": {"step_min": 15.0, "meet_min": 30.0},
    }
    (folder / "config.json").write_text(json.dumps({"digest": "d", "settings": settings}))
    for line in ledger.lines:
        if line["event"] == "commit":
            (folder / "checkpoints" / f"step-{line['step']:08d}").mkdir(parents=True, exist_ok=True)
    if outcome is not None:
        (folder / "outcome.json").write_text(json.dumps(outcome))
    moved = [
        {name: value + shift_s if name in ("time", "began") else value for name, value in line.items()}
        for line in ledger.lines
    ]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in moved))
    return folder


def begin_set(folder):
    """A synthetic set of three batches of two images, two batches to a shard, of which nothing is drawn yet."""
    digests = ("source_set_digest", "cache_digest", "base_digest", "adapter_digest", "noise_schedule_digest")
    sizes = {"image_size_px": 64, "images_per_mask": 1, "batch_size": 2, "batches_per_shard": 2, "denoise_steps": 2}
    kinds = {"base": "fp32", "split": "test", "dtype": "fp32", "compile_blocks": False}
    settings = PlanSettings(**dict.fromkeys(digests, "0" * 64), **sizes, **kinds, guidance_scale=1.0, seed=0)
    batches = [Batch(9, tuple(Request(f"k{b}{i}", "k", 0, "s", "Control") for i in range(2))) for b in range(3)]
    folder.mkdir(parents=True)
    accept_plan(folder, Plan(settings=settings, batches=tuple(batches)))
    (folder / BATCHES).mkdir()
    return folder
