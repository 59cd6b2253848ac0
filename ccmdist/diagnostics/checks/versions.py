"""Installed packages against what pyproject asks for and against versions that are known to be bad."""

import importlib.metadata
import platform
from dataclasses import dataclass
from typing import Final

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from ccmdist.diagnostics.checks.finding import Finding, Findings, Request, State

NEEDED: Final = (
    "torch",
    "deepspeed",
    "diffusers",
    "transformers",
    "peft",
    "safetensors",
    "webdataset",
    "submitit",
    "pillow",
)
OPTIONAL: Final = {"bitsandbytes": "quant", "flash-attn": "flash"}
"""Packages of the extras, and the requirement that asks for each."""


@dataclass(frozen=True)
class KnownBad:
    """Versions that should not be used.

    Attributes:
        package: Its name, or "python".
        versions: Which, such as "<2.10".
        state: MISS where training does not work with them, WARN where it is a risk.
        reason: One sentence.
    """

    package: str
    versions: str
    state: State
    reason: str


KNOWN_BAD: Final = (
    KnownBad("deepspeed", "==0.19.2", "MISS", "it breaks ZeRO-3 with fp32 adapters on a bf16 base (DeepSpeed #8072)"),
    KnownBad(
        "deepspeed",
        "<0.19.3",
        "MISS",
        "ZeRO-3 crashes when activations of frozen weights are recomputed without re-entry (DeepSpeed #8148)",
    ),
    KnownBad("torch", "<2.6", "WARN", "a checkpoint file can run code even with weights_only (CVE-2025-32434)"),
    KnownBad("torch", "<2.10", "WARN", "weights_only can be bypassed by a prepared file (CVE-2026-24747)"),
    KnownBad("transformers", "<5.3", "WARN", "a prepared config.json can run code (CVE-2026-4372)"),
    KnownBad("pillow", "<12.3", "WARN", "prepared images exploit its FITS, EPS, PDF and font readers (14 advisories)"),
    KnownBad("flash-attn", "<2.6.3", "MISS", "diffusers refuses flash attention with it"),
    KnownBad(
        "python",
        "<3.11.13",
        "WARN",
        "tarfile can be made to write outside its folder (CVE-2025-4517); ccmdist never unpacks a tar with it, "
        "your other tools may",
    ),
)
"""Every line that fits an installed version is told."""


def check(request: Request) -> Findings:
    """Python and every package that matters; what is in order is one row."""
    versions = installed()
    wanted = ranges()
    findings = [judge("python", versions["python"], wanted.get("python", ""), "MISS")]
    findings += [judge(package, versions[package], wanted.get(package, ""), "MISS") for package in NEEDED]
    for package, requirement in OPTIONAL.items():
        if versions[package] is not None or requirement in request.required:
            findings.append(judge(package, versions[package], wanted.get(package, ""), request.lacking(requirement)))
    yield from (finding for finding in findings if finding.state != "OK")
    fine = [f"{finding.what} {finding.found}" for finding in findings if finding.state == "OK"]
    if fine:
        yield Finding("versions", "OK", f"as pyproject asks: {', '.join(fine)}")


def installed() -> dict[str, str | None]:
    """Package -> version, None if it is not installed; read without importing any of them."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in (*NEEDED, *OPTIONAL):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def ranges() -> dict[str, str]:
    """Package -> versions that pyproject asks for; empty where ccmdist itself is not installed."""
    try:
        metadata = importlib.metadata.metadata("ccmdist")
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {"python": metadata["Requires-Python"] or "", **parsed(metadata.get_all("Requires-Dist") or [])}


def parsed(requirements: list[str]) -> dict[str, str]:
    """``{"torch": "<2.14,>=2.10"}`` of ``["torch<2.14,>=2.10"]``; lines that cannot be understood are left out."""
    found = {}
    for line in requirements:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        found[requirement.name.lower().replace("_", "-")] = str(requirement.specifier)
    return found


def judge(package: str, version: str | None, wanted: str, absent: State) -> Finding:
    """What to say of one package.

    Args:
        package: Its name, or "python".
        version: Installed version; None if there is none.
        wanted: Versions that pyproject asks for; "" for any.
        absent: State of the finding if it is not installed.
    """
    if version is None:
        return Finding(package, absent, "not installed", install(package, wanted))
    try:
        number = Version(version)
    except InvalidVersion:
        return Finding(package, "WARN", f"{version!r} is no version", install(package, wanted))
    if bad := [known for known in KNOWN_BAD if known.package == package and _fits(number, known.versions)]:
        state: State = "MISS" if any(known.state == "MISS" for known in bad) else "WARN"
        return Finding(package, state, version, f"{install(package, wanted)}: {'; '.join(k.reason for k in bad)}")
    if not _fits(number, wanted):
        reason = f"{install(package, wanted)}: ccmdist was not tested with other versions"
        return Finding(package, "WARN", f"{version}, expected {wanted}", reason)
    return Finding(package, "OK", version)


def install(package: str, wanted: str) -> str:
    """The command that brings a good version."""
    if package == "python":
        return "use the newest Python 3.11, or a later one"
    if package == "flash-attn":
        return f"last of all: pip install --no-build-isolation '{package}{wanted}'"
    return f"pip install '{package}{wanted}'"


def _fits(version: Version, versions: str) -> bool:
    return SpecifierSet(versions).contains(version, prereleases=True)
