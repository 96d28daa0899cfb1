"""The functions that stand in SGLang where :mod:`.sglang` puts them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..callable import all_reduce_add_rms_norm, prepare
from ..runtime.capturing import is_capturing
from ..runtime.collectives import ops
from ..runtime.collectives.prepared import Prepared
from ..runtime.collectives.workspace import workspaces_of
from ..runtime.groups import group_exists, register_group
from ..runtime.seams import run_between
from ..runtime.watch.steps import Watch
from ..watching import watch
from .sglang_targets import GROUP, PARALLEL, TESTED, Settings
from .targets import resolve, version_of

_log = logging.getLogger(__name__)


class Adapter:
    """The functions that stand in SGLang, and what they share in a process. settings: what was asked for."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._watch: tuple[Any, Watch] | None = None  # with the process group that it is for
        self._said: set[str] = set()

    # -- in place of SGLang's functions, with their parameters -----------------------------------

    def all_reduce_residual_rms_norm(
        self,
        input_tensor: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float = 1e-6,
        max_token_num: int = 2048,
        use_oneshot: bool | None = None,
        trigger_completion_at_end: bool = False,
        fp32_acc: bool = True,
        use_attn_tp_group: bool = True,
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """``(norm, residual)``, both new; ``(None, None)`` where SGLang is to do it by itself.

        input_tensor, residual: ``[tokens, hidden]``. The arguments between eps and the last are about SGLang's own
        kernels. Raises as :func:`ringfence.all_reduce_add_rms_norm`.
        """
        if torch.compiler.is_compiling() or {residual.dtype, weight.dtype} != {input_tensor.dtype}:
            return None, None
        size, _, coordinator = resolve(GROUP.path)(use_attn_tp_group=use_attn_tp_group)
        prepared = self._prepared(coordinator, input_tensor) if size > 1 else None
        if prepared is None:
            return None, None

        def call(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            return all_reduce_add_rms_norm(x, r, w, eps, group=prepared.group)

        operands = (input_tensor, residual, weight)
        if prepared.captured or not is_capturing(input_tensor.device):
            return call(*operands)
        between = run_between(call, operands, input_tensor.device)
        return between if between is not None else (None, None)

    def pre_initialize_workspaces(
        self, max_token_num: int, hidden_dim: int, dtype: Any, use_oneshot: bool | None = None
    ) -> None:
        """Prepare the groups of both kinds of calls, in place of SGLang's workspaces, which nobody would use.

        Every rank calls it, ahead of captures. Raises as :func:`ringfence.prepare`.
        """
        done: list[Any] = []
        for attention in (False, True):
            size, rank, coordinator = resolve(GROUP.path)(use_attn_tp_group=attention)
            if size < 2 or any(coordinator.device_group is group for group in done):
                continue
            done.append(coordinator.device_group)
            name = str(coordinator.unique_name)
            register_group(name, coordinator.device_group)
            found = prepare(name, hidden_dim, dtype, max_token_num, **self.settings.prepare)
            if rank == 0 and str(found) not in self._said:
                self._said.add(str(found))
                _log.info("%s", self._first_line(found))
                for line in str(found).splitlines()[1:]:
                    _log.info("ringfence: %s", line)
        self._watched()

    def replay(
        self, original: Callable[..., Any], backend: Any, shape_key: Any, static_forward_batch: Any, **kwargs: Any
    ) -> Any:
        """A replay of SGLang's graph as one step: what is written down, compared and watched."""
        watched = self._watched()
        if watched is None:
            return original(backend, shape_key, static_forward_batch, **kwargs)
        mode = getattr(getattr(static_forward_batch, "forward_mode", None), "name", "replay")
        with watched.step(str(mode).lower(), int(getattr(shape_key, "size", 0)), replay=True):
            return original(backend, shape_key, static_forward_batch, **kwargs)

    # -- what they share ---------------------------------------------------------------------------

    def _prepared(self, coordinator: Any, x: Tensor) -> Prepared | None:
        """What carries out a call with ``x`` over SGLang's group, where it is worth it or was asked for by name."""
        name = str(coordinator.unique_name)
        if not group_exists(name):
            return None
        prepared = workspaces_of(name).prepared.get(x.dtype)
        if prepared is None or not x.numel():
            return None
        by_name = self.settings.prepare.get("collective") == "reference"
        return prepared if by_name or ops.by_kernels(x, name) else None

    def _watched(self) -> Watch | None:
        """The watch of the tensor-parallel group, made with the first call; None for a rank by itself.

        A process may end one engine and begin another, with groups of its own.
        """
        group = resolve(PARALLEL.path)().tp_group
        if group.world_size < 2:
            return None
        if self._watch is None or self._watch[0] is not group.device_group:
            name = str(group.unique_name)
            register_group(name, group.device_group)
            self._watch = group.device_group, watch(name, **self.settings.watch)
            if group.rank_in_group == 0 and self.settings.mode == "guard":
                _log.info("%s", self._first_line(None))
        return self._watch[1]

    def _first_line(self, found: Prepared | None) -> str:
        """Of the log, on the first rank."""
        release = version_of("sglang")
        tested = "" if release in TESTED else f" (not tried: {', '.join(TESTED)} was)"
        on_hang = self.settings.watch.get("on_hang") or "nothing"
        head = f"ringfence {version_of('ringfence')} in SGLang {release}{tested}, RINGFENCE={self.settings.mode}: "
        tail = f"; replays are watched, on a hang: {on_hang}"
        if found is None:
            return f"{head}SGLang's own kernels{tail}"
        first = str(found).splitlines()[0].removeprefix("ringfence: ")
        if self.settings.prepare.get("collective") == "reference":
            return f"{head}{first}, in place of SGLang's own{tail}"
        rest = "larger calls are" if found.largest else "nothing is fused, all calls are"
        return f"{head}{first}; {rest} SGLang's own all-reduce and norm{tail}"
