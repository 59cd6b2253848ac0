"""All benchmarks of a GPU, the most important first, in at most 15 minutes.

    python benchmarks/gpu/run_all.py [--only training memory] [--blocks 60 ...]

Each script has a time limit of its own; what it has measured until then stays in its results. A failure does not stop
the others. What is not known here, such as --blocks, goes to every script.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

LIMITS_S: Final = {
    "training": 240,
    "memory": 105,
    "adapter_ratio": 105,
    "synthesis": 240,
    "planner": 105,
    "attention": 45,
    "compose": 60,
}
"""Scripts in the order of importance, with seconds that each may take."""
WITHOUT_SIZES: Final = frozenset({"compose"})
"""Scripts that measure no model, and have no options for one."""
GRACE_S: Final = 5


def run(name: str, arguments: list[str], limit_s: float) -> str:
    """Run one script in a session of its own, so that its children end with it; how it ended."""
    script = Path(__file__).parent / f"{name}.py"
    process = subprocess.Popen([sys.executable, str(script), *arguments], start_new_session=True)
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s:g} s; its results hold what it had measured"
    finally:
        _end(process)
    return {0: "all limits hold", 1: "a limit does not hold, or it failed"}.get(code, f"failed with {code}")


def _end(process: subprocess.Popen) -> None:
    """End a script and its children, if they are still there."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=LIMITS_S, default=tuple(LIMITS_S), help="of the scripts")
    parser.add_argument("--limit-s", type=float, default=None, help="for each; by default as an H200 needs")
    given, others = parser.parse_known_args()
    ended = {}
    for name in given.only:
        start = time.monotonic()
        print(f"== {name}", flush=True)
        how = run(name, [] if name in WITHOUT_SIZES else others, given.limit_s or LIMITS_S[name])
        ended[name] = f"{time.monotonic() - start:4.0f} s: {how}"
    print("\n".join(f"{name:14} {how}" for name, how in ended.items()), flush=True)
    return int(not all(how.endswith("all limits hold") for how in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
