"""Versions are judged by what pyproject asks for and by what is known to be bad, each with its reason."""

import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from ccmdist.diagnostics.checks import versions
from ccmdist.diagnostics.checks.versions import KNOWN_BAD, NEEDED, OPTIONAL, judge, parsed
from tests.unit.diagnostics.doctored import request

PYPROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    ("package", "version", "state", "reason"),
    [
        ("deepspeed", "0.19.2", "MISS", "#8072"),
        ("deepspeed", "0.18.9", "MISS", "#8148"),
        ("torch", "2.5.1+cu124", "WARN", "CVE-2025-32434"),
        ("torch", "2.9.1", "WARN", "CVE-2026-24747"),
        ("transformers", "5.2.9", "WARN", "CVE-2026-4372"),
        ("pillow", "12.2.0", "WARN", "14 advisories"),
        ("flash-attn", "2.6.1", "MISS", "diffusers refuses"),
        ("python", "3.11.7", "WARN", "CVE-2025-4517"),
    ],
)
def test_a_version_that_is_known_to_be_bad_is_told_with_the_reason(package, version, state, reason):
    finding = judge(package, version, "", "MISS")
    assert (finding.state, finding.found) == (state, version)
    assert reason in finding.remedy


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("deepspeed", "0.19.8"),
        ("torch", "2.10.0"),
        ("torch", "2.13.0+cpu"),
        ("pillow", "12.3.0"),
        ("python", "3.11.13"),
    ],
)
def test_good_versions_are_not_blamed(package, version):
    assert judge(package, version, "", "MISS").state == "OK"


def test_two_reasons_against_one_version_are_both_told():
    assert all(reason in judge("torch", "2.5.0", "", "MISS").remedy for reason in ("CVE-2025-32434", "CVE-2026-24747"))


def test_a_version_outside_of_what_pyproject_asks_for_is_told_with_the_command_that_mends_it():
    finding = judge("torch", "2.15.0", "<2.14,>=2.10", "MISS")
    assert (finding.state, finding.found) == ("WARN", "2.15.0, expected <2.14,>=2.10")
    assert finding.remedy == "pip install 'torch<2.14,>=2.10': ccmdist was not tested with other versions"


def test_a_package_that_is_not_there_is_missing_only_if_it_is_needed():
    assert judge("peft", None, "", "MISS").state == "MISS"
    assert judge("flash-attn", None, "", request().lacking("flash")).state == "WARN"
    assert judge("flash-attn", None, "", request("flash").lacking("flash")).state == "MISS"


def test_what_pyproject_asks_for_is_never_on_the_list_of_bad_versions():
    extras = [line for lines in PYPROJECT["optional-dependencies"].values() for line in lines]
    wanted = parsed(PYPROJECT["dependencies"] + extras)
    for known in (known for known in KNOWN_BAD if known.package != "python"):
        least = min(Version(s.version) for s in SpecifierSet(wanted[known.package]) if s.operator == ">=")
        assert not SpecifierSet(known.versions).contains(least), known


def test_everything_that_is_looked_at_is_in_pyproject():
    wanted = parsed(PYPROJECT["dependencies"] + PYPROJECT["optional-dependencies"]["quant"])
    assert set(NEEDED) | {"bitsandbytes"} <= wanted.keys()
    assert set(OPTIONAL) == {"bitsandbytes", "flash-attn"}


def test_this_environment_has_what_is_needed_in_one_row(monkeypatch):
    monkeypatch.setattr(versions.platform, "python_version", lambda: "3.11.14")
    findings = list(versions.check(request()))
    assert [finding.what for finding in findings if finding.state != "OK"] == []
    assert all(package in findings[-1].found for package in NEEDED)


def test_a_requirement_that_is_not_installed_is_missing(monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda: dict.fromkeys(["python", *NEEDED], "99") | {"flash-attn": None})
    monkeypatch.setattr(versions, "ranges", dict)
    monkeypatch.setattr(versions, "OPTIONAL", {"flash-attn": "flash"})
    (flash, _) = versions.check(request("flash"))
    assert (flash.what, flash.state) == ("flash-attn", "MISS")
    assert flash.remedy.startswith("last of all: pip install --no-build-isolation")
    assert [finding.what for finding in versions.check(request())] == ["versions"]
