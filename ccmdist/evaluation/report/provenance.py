"""What the figures depend on besides the images: versions of code and libraries, settings, identities of sets."""

import platform
from importlib import metadata
from typing import Final

PACKAGES: Final = (
    "ccmdist",
    "torch",
    "monai",
    "numpy",
    "scipy",
    "scikit-image",
    "skan",
    "statsmodels",
    "pandas",
    "transformers",
    "diffusers",
)


def versions() -> dict[str, str]:
    """Python's version and those of the packages that compute figures or draw images."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # some sites build PyTorch without saying
        return "unknown"
