"""ringfence: a torch.compile backend that fuses all-reduce + residual add + RMSNorm.

    backend = ringfence.Backend(capture_sizes=[1, 16])
    model = torch.compile(model, backend=backend)
    ...
    print(backend.reports[0])

:mod:`ringfence.compile_passes` holds the passes, each usable alone;
:mod:`ringfence.runtime` what runs.
"""

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "ringfence":  # the clone's root is on the path: every module would be there twice
    raise ImportError("import ringfence, not front")

if TYPE_CHECKING:
    from .backend import Backend
    from .compile_passes.report import CompileReport, assert_fused
    from .options import Options
    from .runtime.collectives.workspace import close_workspaces
    from .runtime.errors import HangError, RankMismatch, RingfenceError

__all__ = [
    "Backend",
    "CompileReport",
    "HangError",
    "Options",
    "RankMismatch",
    "RingfenceError",
    "assert_fused",
    "close_workspaces",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """On first use, because torch takes seconds to import and ``ringfence hazards`` does not need it."""
    homes = {
        "Backend": ".backend",
        "CompileReport": ".compile_passes.report",
        "HangError": ".runtime.errors",
        "Options": ".options",
        "RankMismatch": ".runtime.errors",
        "RingfenceError": ".runtime.errors",
        "assert_fused": ".compile_passes.report",
        "close_workspaces": ".runtime.collectives.workspace",
    }
    if name not in homes:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(homes[name], __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
