"""Is this machine, cluster and file system fit for a run: ``ccmdist doctor``. A failing check is a finding.

``--json`` prints one object:

    format       1
    verdict      "OK", "WARN" or "MISS": the worst state found
    exit_code    78 if something that is required is missing, else 0
    required     what was asked for by --require
    findings     list of area, what, state, found, remedy

Keys are only ever added; ``format`` is raised when one changes its meaning.
"""

import dataclasses
import difflib
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from ccmdist.cluster.ranks import ranks_from_environment
from ccmdist.config.loading import load
from ccmdist.diagnostics import doctor_view
from ccmdist.diagnostics.checks import file_system, gpu, host, nodes, ranks, settings, slurm, versions
from ccmdist.diagnostics.checks.finding import REQUIREMENTS, DoctorConfig, Finding, Findings, Request, State
from ccmdist.errors import EXIT_DONE, EXIT_REFUSED, ConfigError, RunError

FORMAT: Final = 1

Report = dict[str, list[Finding]]
"""Area -> findings, in the order in which they are shown."""


def run(arguments: list[str], require: str, as_json: bool) -> int:
    """Look at everything, print it, and return the exit code: 0, or 78 if something that is required is missing.

    Of several tasks that srun has started only the first one looks; it reaches the other nodes by itself.

    Raises:
        ConfigError: If a requirement has no such name, or the settings are wrong.
    """
    request = Request(requirements(require), config(arguments))
    if is_second():
        return EXIT_DONE
    begin = time.monotonic()
    report = examine(request)
    if as_json:
        sys.stdout.write(json.dumps(as_object(report, request), indent=2) + "\n")
    else:
        doctor_view.show(report, request, time.monotonic() - begin)
    return exit_code(report)


def requirements(text: str) -> frozenset[str]:
    """The names in a comma-separated list.

    Raises:
        ConfigError: If one is not known.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in REQUIREMENTS:
            close = difflib.get_close_matches(name, REQUIREMENTS, n=1)
            remedy = f"did you mean '{close[0]}'?" if close else f"choose of {', '.join(REQUIREMENTS)}"
            raise ConfigError(f"--require: there is no {name!r}", remedy)
    return frozenset(names)


def config(arguments: list[str]) -> DoctorConfig | None:
    """The settings that `ccmdist train` would run with; None without arguments."""
    if not arguments:
        return None
    files = [Path(argument) for argument in arguments if "=" not in argument]
    return load(DoctorConfig, files, [argument for argument in arguments if "=" in argument])


def is_second() -> bool:
    """Whether another task of the same step does the work."""
    try:
        found = ranks_from_environment()
    except RunError:
        return False
    return found is not None and not found.is_first


def examine(request: Request) -> Report:
    """Look at every area. Torch is imported by another process meanwhile."""
    with doctor_view.waiting(), gpu.TorchProbe() as probe:
        first = {
            "software": gather(lambda: versions.check(request)),
            "host": gather(lambda: host.check(request)),
            "files": gather(lambda: file_system.check(request)),
            "settings": gather(lambda: settings.check(request)),
            "Slurm": gather(lambda: slurm.check(request)),
            "nodes": gather(lambda: nodes.check(request)),
        }
        facts = probe.facts()
        gpus = gather(lambda: gpu.judge(request, facts, gpu.nvidia_driver()))
        num_gpus = len(facts["torch"].get("devices", ()))
        report = {"software": first.pop("software"), "GPU": gpus, **first}
        report["ranks"] = gather(lambda: ranks.check(request, num_gpus))
    return {area: findings for area, findings in report.items() if findings}


def gather(check: Callable[[], Findings]) -> list[Finding]:
    """All findings of a check; where it breaks off, one more says why. No check ends the others."""
    found: list[Finding] = []
    try:
        found.extend(check())
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        remedy = "the other findings stand; if it stays, report it with this line"
        found.append(Finding("the rest", "WARN", f"could not be checked: {reason}", remedy))
    return found


def worst(findings: Iterable[Finding]) -> State:
    """MISS if one of the findings is, else WARN if one is, else OK."""
    states = {finding.state for finding in findings}
    return "MISS" if "MISS" in states else "WARN" if "WARN" in states else "OK"


def exit_code(report: Report) -> int:
    """0, or 78 if anything is missing that is required."""
    missing = worst(finding for findings in report.values() for finding in findings) == "MISS"
    return EXIT_REFUSED if missing else EXIT_DONE


def as_object(report: Report, request: Request) -> dict[str, Any]:
    """The report as JSON types."""
    rows = [{"area": area, **dataclasses.asdict(finding)} for area, findings in report.items() for finding in findings]
    return {
        "format": FORMAT,
        "verdict": worst(finding for findings in report.values() for finding in findings),
        "exit_code": exit_code(report),
        "required": sorted(request.required),
        "findings": rows,
    }
