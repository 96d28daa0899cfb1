"""The options as keyword arguments: what type checkers and editors see, and where :mod:`.options` reads the choices.

Annotations are values here, not strings: what may be None, a flag or one of several words is read from them.
"""

import os
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Literal, TypedDict

import torch.distributed as dist

from .compile_passes.op_options import OnHazard, Profile

if TYPE_CHECKING:
    from .compile_passes.engine_ops import GroupOf
    from .compile_passes.norm_ops import NormOp
    from .compile_passes.report import CompileReport

CollectiveName = Literal["auto", "reference", "trtllm", "mnnvl", "ringfence"]
Transport = Literal["auto", "peer", "multicast"]


class WatchKeywords(TypedDict, total=False):
    """Of :func:`ringfence.watch`."""

    on_hang: Literal["raise", "abort", "report"] | None
    step_seconds: float
    warm_up_seconds: float
    agree_seconds: float
    check_every_step: bool
    journal_dir: str | os.PathLike[str] | None


class OptionKeywords(WatchKeywords, total=False):
    """Of :class:`ringfence.Backend` and :class:`ringfence.Options`, which says what each means."""

    fuse: bool
    skip_sites: Collection[str]
    collective: CollectiveName
    transport: Transport
    deterministic: bool
    size_table: str | os.PathLike[str] | None
    plain_all_reduce: bool
    split_ops: Collection[str]
    capture_sizes: Collection[int]
    piece_compiler: Literal["inductor", "eager"]
    numerics: Literal["kernel", "strict"]
    verify: bool
    check_parts: bool
    max_tokens: int | None
    all_reduce_ops: "Collection[str] | Mapping[str, GroupOf]"
    moe_dispatch: bool
    moe_collective: Literal["auto", "reference", "moe_all_to_all"]
    moe_workspace_bytes: int
    experts_ops: Collection[str]
    group_names: Mapping[str, dist.ProcessGroup | str]
    norm_ops: "Collection[str] | Mapping[str, float | NormOp]"
    groups: Collection[dist.ProcessGroup | str] | None
    graphs: Literal["auto", "cuda", "simulated"]
    pad_to_capture_size: bool
    on_hazard: OnHazard
    profile: Profile
    outer_capture: bool
    static_outputs: bool
    on_report: "Callable[[CompileReport], None] | None"
    kernel_wait_seconds: float | None
    on_capture_failure: Literal["uncaptured", "raise"]
