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
    from .callable import all_reduce, all_reduce_add_rms_norm, prepare
    from .compile_passes.engine_ops import AllReduceOp
    from .compile_passes.norm_ops import NormOp
    from .compile_passes.report import CompileReport, assert_fused
    from .options import Options
    from .runtime.collectives.prepared import Prepared
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
        LinksUnknownError,
        MovedInputWarning,
        NestedCaptureError,
        NotDecidedError,
        NotFusedError,
        NotSavableError,
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
    from .runtime.groups import register_group
    from .watching import watch

__all__ = [
    "AddressChangedError",
    "AllReduceOp",
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
    "LinksUnknownError",
    "MovedInputWarning",
    "NestedCaptureError",
    "NormOp",
    "NotDecidedError",
    "NotFusedError",
    "NotSavableError",
    "Options",
    "OptionsError",
    "PartSpecError",
    "PeerFailedError",
    "PlanError",
    "PoisonedError",
    "Prepared",
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
    "all_reduce",
    "all_reduce_add_rms_norm",
    "assert_fused",
    "close_workspaces",
    "prepare",
    "register_group",
    "watch",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """On first use, because torch takes seconds to import and ``ringfence hazards`` does not need it."""
    homes = {
        "AllReduceOp": ".compile_passes.engine_ops",
        "Backend": ".backend",
        "CompileReport": ".compile_passes.report",
        "NormOp": ".compile_passes.norm_ops",
        "Options": ".options",
        "Prepared": ".runtime.collectives.prepared",
        "all_reduce": ".callable",
        "all_reduce_add_rms_norm": ".callable",
        "assert_fused": ".compile_passes.report",
        "close_workspaces": ".runtime.collectives.workspace",
        "prepare": ".callable",
        "register_group": ".runtime.groups",
        "watch": ".watching",
    }
    if name == "moe":
        return importlib.import_module(".moe", __name__)
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(homes.get(name, ".runtime.errors"), __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
