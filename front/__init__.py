"""ringfence: a torch.compile backend that fuses all-reduce + residual add + RMSNorm.

    backend = ringfence.Backend(capture_sizes=[1, 16])
    model = torch.compile(model, backend=backend)
    ...
    print(backend.reports[0])

Every error that is raised on purpose is here too, and derives from :class:`RingfenceError`.
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
    from .runtime.errors import (
        AddressChangedError,
        CaptureError,
        CaptureFailedWarning,
        ChannelTimeoutError,
        CollectiveUnavailableError,
        ConcurrentCallError,
        DataDependentValueError,
        GradModeError,
        GraphMetadataError,
        GroupError,
        GroupFailureError,
        HangError,
        HazardError,
        InputError,
        JournalError,
        MovedInputWarning,
        NestedCaptureError,
        NotFusedError,
        OptionsError,
        PartSpecError,
        PeerFailedError,
        PlanError,
        PoisonedError,
        RankLeftError,
        RankMismatch,
        RecompiledAloneError,
        RefusedError,
        RingfenceError,
        SelfTestHungError,
        SizeTableError,
        TargetError,
        TooManyStatesError,
        TraceError,
        UnknownHazardError,
        VersionError,
        WorkspaceError,
        WorkspaceReplacedError,
    )

__all__ = [
    "AddressChangedError",
    "Backend",
    "CaptureError",
    "CaptureFailedWarning",
    "ChannelTimeoutError",
    "CollectiveUnavailableError",
    "CompileReport",
    "ConcurrentCallError",
    "DataDependentValueError",
    "GradModeError",
    "GraphMetadataError",
    "GroupError",
    "GroupFailureError",
    "HangError",
    "HazardError",
    "InputError",
    "JournalError",
    "MovedInputWarning",
    "NestedCaptureError",
    "NotFusedError",
    "Options",
    "OptionsError",
    "PartSpecError",
    "PeerFailedError",
    "PlanError",
    "PoisonedError",
    "RankLeftError",
    "RankMismatch",
    "RecompiledAloneError",
    "RefusedError",
    "RingfenceError",
    "SelfTestHungError",
    "SizeTableError",
    "TargetError",
    "TooManyStatesError",
    "TraceError",
    "UnknownHazardError",
    "VersionError",
    "WorkspaceError",
    "WorkspaceReplacedError",
    "assert_fused",
    "close_workspaces",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """On first use, because torch takes seconds to import and ``ringfence hazards`` does not need it."""
    homes = {
        "Backend": ".backend",
        "CompileReport": ".compile_passes.report",
        "Options": ".options",
        "assert_fused": ".compile_passes.report",
        "close_workspaces": ".runtime.collectives.workspace",
    }
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(homes.get(name, ".runtime.errors"), __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
