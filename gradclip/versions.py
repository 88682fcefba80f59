"""Which versions are installed, for bug reports."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

__all__ = ["installed_versions"]

_PACKAGES = (
    "gradclip",
    "torch",
    "lightning",
    "pytorch-lightning",
    "accelerate",
    "transformers",
    "deepspeed",
    "peft",
    "trl",
    "pydantic",
    "PyYAML",
)


def installed_versions() -> dict[str, str]:
    """Versions of Python, the system, torch's build, and what gradclip works with.

    Returns:
        Text by name, without packages that aren't installed.
    """
    found = {"Python": platform.python_version(), "system": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    toolkits = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    build = [f"{kind} {number}" for kind, number in toolkits.items() if number] or ["CPU only"]
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    devices = [kind for kind, is_there in kinds.items() if is_there] or ["none"]
    found["torch build"] = f"{', '.join(build)}; accelerators found: {', '.join(devices)}"
    return found
