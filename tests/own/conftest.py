from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kernels are kept that were compiled for the CPU."""
    return tmp_path_factory.mktemp("own")
