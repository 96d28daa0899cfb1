"""Guard mode: vLLM's own fused all-reduce, whose workspace is made by vote, judged by the hazard table, and tested.

vLLM makes it on each rank alone: where that fails on one, this one falls back, and its peers wait for it in the kernel.
Here every rank keeps its workspace, or none does and all of them all-reduce without it.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ...installed import versions
from ...runtime.channel import Channel
from ...runtime.collectives import mnnvl, trtllm
from ...runtime.collectives.epilogue import Epilogue
from ...runtime.collectives.kernels import EndlessWaits, Implementation
from ...runtime.collectives.opt_outs import own_opt_outs
from ...runtime.collectives.self_test import self_test
from ...runtime.collectives.size_table import SizeRow
from ...runtime.collectives.workspace import Workspace
from ...runtime.errors import HazardError, WorkspaceError
from ...runtime.hazards.catalogue import applicable
from ...runtime.hazards.hazard import Action, Hazard
from ...runtime.hazards.situation import Fact, Situation, Strategy
from ...runtime.hazards.table import HAZARDS
from ...runtime.spelling import failures_text

log = logging.getLogger("vllm.ringfence")

_OURS: dict[str, Implementation] = {"mnnvl": mnnvl.MULTICAST, "trtllm": trtllm.IMPLEMENTATION}
#: What is only to be known of a row, and bars nothing.
_KNOWN = (Action.CAPTURE, Action.WARN, Action.RUNTIME_GUARD)
#: Token counts that are tried, as far as the workspace takes them.
_TESTED = (1, 2, 8, 64)


@dataclass
class Guarded:
    """What was found of vLLM's workspaces. why_not: why there is none."""

    collective: str = "none"
    hazards: tuple[str, ...] = ()
    why_not: str | None = None


def create_workspace(
    guarded: Guarded,
    open_channel: Callable[[Any], Channel],
    device: torch.device,
    on_hazard: str,
    captured: bool,
    original: Callable[..., Any],
    backend: str,
    world_size: int,
    rank: int,
    max_token_num: int,
    hidden_dim: int,
    dtype: torch.dtype,
    group: Any,
) -> Any:
    """Around vLLM's ``_create_workspace``. Every rank must call; None on all of them where one cannot have it.

    open_channel: among the ranks of the process group that vLLM gives. device: this worker's. captured: whether vLLM
    captures what uses it. Raises :class:`HazardError` where that was asked for.
    """
    arguments = (backend, world_size, rank, max_token_num, hidden_dim, dtype, group)
    one = _OURS.get(backend)
    if one is None:
        return original(*arguments)
    channel = open_channel(group)
    made: list[Any] = []
    why_not = (
        _barred(guarded, channel, one, dtype, on_hazard, captured, device)
        or _made(channel, made, lambda: original(*arguments))
        or _failed(channel, one, made, (max_token_num, hidden_dim, dtype), captured, device)
    )
    guarded.why_not = why_not
    if why_not is None:
        guarded.collective = str(one)
        return made[0]
    channel.barrier("vLLM's workspace given back")
    for workspace in made:
        workspace.destroy()
    log.warning("ringfence: no rank uses vLLM's %s workspace: %s", backend, why_not)
    return None


def make_ahead(config: Any, group: Any) -> None:
    """Have vLLM make the workspace of its fusion pass now. Every rank must call.

    vLLM makes it where it compiles, and a rank that loads its graphs does not come there: the vote would wait for it.
    """
    from vllm.config import CompilationMode
    from vllm.distributed.device_communicators import flashinfer_all_reduce

    compilation = config.compilation_config
    fuses = compilation.mode == CompilationMode.VLLM_COMPILE and compilation.pass_config.fuse_allreduce_rms
    if not fuses or not flashinfer_all_reduce.fi_ar_available:
        return
    most = compilation.pass_config.flashinfer_max_size(group.world_size)
    if not most:
        return
    from vllm.compilation.passes.fusion import allreduce_rms_fusion  # of CUDA's build

    hidden, dtype = allreduce_rms_fusion._fused_ar_workspace_hidden_dim(config), config.model_config.dtype
    flashinfer_all_reduce.get_fi_ar_workspace(
        world_size=group.world_size,
        rank=group.rank_in_group,
        max_token_num=min(most // (hidden * dtype.itemsize), config.scheduler_config.max_num_batched_tokens),
        hidden_dim=hidden,
        dtype=dtype,
        group=group.cpu_group,
    )


def _made(channel: Channel, made: list[Any], make: Callable[[], Any]) -> str | None:
    """The vote: why not all ranks have made it."""

    def attempt() -> None:
        workspace = make()
        if workspace is None:
            raise WorkspaceError("vLLM could not make it, and its log says why")
        made.append(workspace)

    return failures_text(channel.attempt("vLLM's workspace", attempt)[1]) or None


def _failed(
    channel: Channel,
    one: Implementation,
    made: list[Any],
    largest: tuple[int, int, torch.dtype],
    captured: bool,
    device: torch.device,
) -> str | None:
    """What the self-test found, eager and, where vLLM captures, replayed. largest: tokens, hidden size and dtype."""
    tokens, hidden, dtype = largest
    capacity = tokens * hidden * dtype.itemsize
    world_size = channel.size
    row = SizeRow(one.name, one.transport, (0, 0), world_size, capacity, capacity, 0, "vLLM's own choice")
    workspace = Workspace(one, row, _Theirs(made[0]), device, world_size, capacity, (dtype,))
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with _disable_current_modes(), torch._C._DisablePythonDispatcher(), torch.no_grad(), here:  # it may be compiling
        tried = [n for n in _TESTED if n <= tokens]
        result = self_test(workspace, channel, hidden, dtype, tried, capture=captured)
    failure = result.eager or (result.captured if captured else None)
    return f"its self-test failed: {failure}" if failure else None


def _barred(
    guarded: Guarded,
    channel: Channel,
    one: Implementation,
    dtype: torch.dtype,
    on_hazard: str,
    captured: bool,
    device: torch.device,
) -> str | None:
    """Why it must not even be made: multicast is forbidden on some rank, or a hazard applies on some rank.

    Only what all ranks said is looked at: a rank that went by its own would part from the others.
    """
    mine = (socket.gethostname(), own_opt_outs(), versions()["flashinfer-python"], _capability(device))
    ranks = channel.exchange("facts for vLLM's workspace", mine)
    off = next(((r, o) for r, (_, o, _, _) in zip(channel.ranks, ranks, strict=True) if o), None)
    if one.transport == "multicast" and off is not None:
        return f"rank {off[0]} forbids NVLink multicast ({', '.join(off[1])})"
    nodes = len({host for host, _, _, _ in ranks})
    found: set[str] = set()
    for flashinfer, capability in dict.fromkeys((release, capability) for _, _, release, capability in ranks):
        situation = Situation(
            one.name,
            flashinfer,
            len(ranks),
            nodes=nodes,
            capability=capability,
            multicast=True if one.transport == "multicast" else None,
            dtype=str(dtype).removeprefix("torch."),
            capture=captured,
            facts=one.facts | {Fact.PDL},
        )
        found.update(row.id for row in applicable(situation))
    rows = tuple(row for row in HAZARDS if row.id in found)
    guarded.hazards = tuple(row.id for row in rows)
    return _decided(rows, on_hazard)


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _decided(rows: tuple[Hazard, ...], on_hazard: str) -> str | None:
    """What a row bars that would be split off a graph of ours: vLLM's has the call where it has it."""
    row = next((row for row in rows if row.decides not in _KNOWN), None)
    if row is None:
        return None
    sentence = f"{row.id}, {row.title.lower()}: {row.remedy}"
    if on_hazard == "raise":
        raise HazardError(f"vLLM's workspace: {sentence}")
    return sentence


class _Theirs(EndlessWaits):
    """vLLM's workspace as the self-test calls it: as vLLM does, with programmatic launch."""

    strategies: tuple[Strategy, ...] = (Strategy.ONE_SHOT, Strategy.TWO_SHOT)
    memory = None

    def __init__(self, workspace: Any) -> None:
        import flashinfer.comm

        self._api, self._workspace = flashinfer.comm, workspace

    def run(
        self,
        x: Tensor,
        epilogue: Epilogue,
        strategy: Strategy,
        operands: tuple[Tensor | None, Tensor | None] | None,
        norm: Tensor | None,
        out: Tensor,
    ) -> None:
        assert epilogue.norm is not None and operands is not None, "the self-test calls no other"
        self._api.allreduce_fusion(
            input=x,
            workspace=self._workspace,
            pattern=self._api.AllReduceFusionPattern.kARResidualRMSNorm,
            launch_with_pdl=True,
            trigger_completion_at_end=True,
            residual_out=out,
            norm_out=norm,
            residual_in=operands[0],
            rms_gamma=operands[1],
            rms_eps=epilogue.norm.eps,
            use_oneshot=strategy is Strategy.ONE_SHOT,
            fp32_acc=True,
        )

    def control_words(self) -> tuple[int, ...]:
        """vLLM's workspaces differ in where they keep them; the replays are looked at instead."""
        return ()

    def close(self) -> None:
        """vLLM's to do."""
