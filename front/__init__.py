"""ringfence: a torch.compile backend that fuses all-reduce + residual add + RMSNorm.

    backend = ringfence.Backend(capture_sizes=[1, 16])
    model = torch.compile(model, backend=backend)
    ...
    print(backend.reports[0])

What ``ringfence.__all__`` lists is public and stays as it is within a minor version (``ringfence docs api``); what
other modules hold may change. Every error that is raised on purpose is here too, and derives from
:class:`RingfenceError`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "ringfence":  # the clone's root is on the path: every module would be there twice
    raise ImportError("import ringfence, not front")

if TYPE_CHECKING:
    from . import moe
    from .backend import Backend
    from .callable import all_reduce, all_reduce_add_rms_norm, prepare
    from .compile_model import compile
    from .compile_passes.assignment import Assignment
    from .compile_passes.engine_ops import AllReduceOp
    from .compile_passes.find import find
    from .compile_passes.functional import written_inputs
    from .compile_passes.fuse import fuse
    from .compile_passes.groups import describe_groups
    from .compile_passes.in_place import write_in_place
    from .compile_passes.judge import Verdict, judge
    from .compile_passes.lower import eager_piece, inductor_piece, lower
    from .compile_passes.match import Candidate, Match, Site
    from .compile_passes.moe_sites import MoeSite
    from .compile_passes.norm_ops import NormOp
    from .compile_passes.parts import GraphPart, cut
    from .compile_passes.prove import PlanVerdict
    from .compile_passes.reasons import Decline, Reason, Rounding
    from .compile_passes.report import CompileReport, assert_fused
    from .compile_passes.rules import Decision
    from .compile_passes.sizes import size_rule
    from .compile_passes.split import Piece, SplitPlan, split
    from .explaining import explain
    from .options import Options
    from .runtime.collectives.prepared import Prepared
    from .runtime.collectives.workspace import close_workspaces
    from .runtime.errors import (
        AddressChangedError,
        ArgumentError,
        CaptureError,
        CaptureFailedWarning,
        CapturesWastedWarning,
        ChangingFloatWarning,
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
        ModelError,
        MovedInputWarning,
        NestedCaptureError,
        NotDecidedError,
        NotFusedError,
        NotFusedWarning,
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
    from .runtime.groups import Group, register_group
    from .runtime.replay.capture import CudaGraphs, SimulatedGraphs
    from .runtime.replay.program import Program, SizeRule, Step
    from .runtime.replay.runner import PiecewiseRunner
    from .runtime.watch.steps import Watch
    from .watching import watch

__all__ = [
    "AddressChangedError",
    "AllReduceOp",
    "ArgumentError",
    "Assignment",
    "Backend",
    "Candidate",
    "CaptureError",
    "CaptureFailedWarning",
    "CapturesWastedWarning",
    "ChangingFloatWarning",
    "ChannelTimeoutError",
    "CollectiveUnavailableError",
    "CompileReport",
    "ConcurrentCallError",
    "CudaGraphs",
    "DataDependentValueError",
    "Decision",
    "Decline",
    "GradModeError",
    "GraphMetadataError",
    "GraphPart",
    "Group",
    "GroupError",
    "GroupFailureError",
    "HangError",
    "HazardError",
    "InputError",
    "JournalError",
    "LinksUnknownError",
    "Match",
    "ModelError",
    "MoeSite",
    "MovedInputWarning",
    "NestedCaptureError",
    "NormOp",
    "NotDecidedError",
    "NotFusedError",
    "NotFusedWarning",
    "NotSavableError",
    "Options",
    "OptionsError",
    "PartSpecError",
    "PeerFailedError",
    "Piece",
    "PiecewiseRunner",
    "PlanError",
    "PlanVerdict",
    "PoisonedError",
    "Prepared",
    "Program",
    "RankLeftError",
    "RankMismatch",
    "Reason",
    "RecompiledAloneError",
    "RefusedError",
    "RingfenceError",
    "Rounding",
    "SelfTestHungError",
    "SimulatedGraphs",
    "Site",
    "SizeRule",
    "SizeTableError",
    "SplitPlan",
    "Step",
    "TargetError",
    "TooManyStatesError",
    "TraceError",
    "UnknownHazardError",
    "Verdict",
    "VersionError",
    "Watch",
    "WorkspaceError",
    "WorkspaceReplacedError",
    "all_reduce",
    "all_reduce_add_rms_norm",
    "assert_fused",
    "close_workspaces",
    "compile",
    "cut",
    "describe_groups",
    "eager_piece",
    "explain",
    "find",
    "fuse",
    "inductor_piece",
    "judge",
    "lower",
    "moe",
    "prepare",
    "register_group",
    "size_rule",
    "split",
    "watch",
    "write_in_place",
    "written_inputs",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """On first use, because torch takes seconds to import and ``ringfence hazards`` does not need it."""
    homes = {
        "AllReduceOp": ".compile_passes.engine_ops",
        "Assignment": ".compile_passes.assignment",
        "Backend": ".backend",
        "Candidate": ".compile_passes.match",
        "CompileReport": ".compile_passes.report",
        "CudaGraphs": ".runtime.replay.capture",
        "Decision": ".compile_passes.rules",
        "Decline": ".compile_passes.reasons",
        "GraphPart": ".compile_passes.parts",
        "Group": ".runtime.groups",
        "Match": ".compile_passes.match",
        "MoeSite": ".compile_passes.moe_sites",
        "NormOp": ".compile_passes.norm_ops",
        "Options": ".options",
        "Piece": ".compile_passes.split",
        "PiecewiseRunner": ".runtime.replay.runner",
        "PlanVerdict": ".compile_passes.prove",
        "Prepared": ".runtime.collectives.prepared",
        "Program": ".runtime.replay.program",
        "Reason": ".compile_passes.reasons",
        "Rounding": ".compile_passes.reasons",
        "SimulatedGraphs": ".runtime.replay.capture",
        "Site": ".compile_passes.match",
        "SizeRule": ".runtime.replay.program",
        "SplitPlan": ".compile_passes.split",
        "Step": ".runtime.replay.program",
        "Verdict": ".compile_passes.judge",
        "Watch": ".runtime.watch.steps",
        "all_reduce": ".callable",
        "all_reduce_add_rms_norm": ".callable",
        "assert_fused": ".compile_passes.report",
        "compile": ".compile_model",
        "close_workspaces": ".runtime.collectives.workspace",
        "cut": ".compile_passes.parts",
        "describe_groups": ".compile_passes.groups",
        "eager_piece": ".compile_passes.lower",
        "find": ".compile_passes.find",
        "fuse": ".compile_passes.fuse",
        "inductor_piece": ".compile_passes.lower",
        "judge": ".compile_passes.judge",
        "explain": ".explaining",
        "lower": ".compile_passes.lower",
        "moe": ".moe",
        "prepare": ".callable",
        "register_group": ".runtime.groups",
        "size_rule": ".compile_passes.sizes",
        "split": ".compile_passes.split",
        "watch": ".watching",
        "write_in_place": ".compile_passes.in_place",
        "written_inputs": ".compile_passes.functional",
    }
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    home = homes.get(name, ".runtime.errors")
    module = importlib.import_module(home, __name__)
    return module if home == f".{name}" else getattr(module, name)


def __dir__() -> list[str]:
    """What is public; an interactive session completes these."""
    return sorted([*__all__, "__version__", "__doc__", "__file__", "__path__"])
