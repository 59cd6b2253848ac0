"""What is installed: one package, complete with the files that it reads."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_wheel_installs_one_package_with_its_templates_and_weights(tmp_path):
    source = tmp_path / "source"  # a build leaves files behind where it runs
    shutil.copytree(ROOT / "ccmdist", source / "ccmdist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w"]
    subprocess.run([*command, str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("ccmdist-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"ccmdist"}
    kept = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ccmdist").rglob("*") if _is_ours(path)}
    assert kept <= set(names)


def _is_ours(path):
    return path.is_file() and "__pycache__" not in path.parts
