"""Installed: the versions of what a compiled graph rests on."""

from __future__ import annotations

import importlib.metadata
import platform

import torch


def versions() -> dict[str, str | None]:
    """Package to version; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("ringfence", "transformers", "flashinfer-python"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
