"""Journal and watchdog around steps that an engine runs by itself."""

from __future__ import annotations

from typing import Unpack

import torch
import torch.distributed as dist
from torch import nn

from .keywords import WatchKeywords
from .options import Options
from .runtime.errors import OptionsError
from .runtime.groups import device_for, device_of_group, name_of_group
from .runtime.watch.refusal import refused_by_all
from .runtime.watch.settings import OF_PROCESS
from .runtime.watch.steps import Watch, watch_group
from .runtime.watch.supervision import Asked
from .runtime.watch.supervisor import supervisor_for

_OPTIONS = tuple(WatchKeywords.__annotations__)


def watch_of_model(model: nn.Module, asked: Asked) -> Watch | None:
    """Watch steps of a model among the ranks that share it, which all call; None where those ranks are not known.

    They are the mesh of the first parameter that has one, of one dimension. Whether to watch goes by that alone: a rank
    may be the only one with ``on_hang``, which is told then, or with a ``journal_dir``, and would meet nobody.
    """
    for parameter in model.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None and mesh.ndim == 1:
            name = name_of_group(mesh.get_group())
            return watch_group(name, device_of_group(name), asked)
    return None


def watch(
    group: dist.ProcessGroup | str | None = None,
    *,
    device: torch.device | str | None = None,
    **options: Unpack[WatchKeywords],
) -> Watch:
    """Journal, agreement and watchdog for the steps of a group's ranks, whoever runs them. Every rank must call.

        with watch.step("decode", tokens):
            engine.execute(...)

    group: a process group, or its name; None is the default group. device: where steps run; the current CUDA device
    where the group serves one, else the CPU. options: ``on_hang``, ``step_seconds``, ``warm_up_seconds``,
    ``journal_dir``, ``agree_seconds`` and ``check_every_step`` of :class:`ringfence.Options`; the process has one
    journal and one watchdog, so these are the same for all that ask. Ranks may differ in ``journal_dir``, and with a
    warning in ``agree_seconds``.

    Raises :class:`OptionsError`, :class:`GroupError`, and :class:`RankMismatch` where ranks ask for different things.
    """
    with refused_by_all(group, "ringfence.watch", options.get("agree_seconds")):
        if unknown := [name for name in options if name not in _OPTIONS]:
            raise OptionsError(f"watch takes no {', '.join(unknown)}; its options are {', '.join(_OPTIONS)}")
        given = Options(**options)
        name = name_of_group(group)
        on = device_for(name, device)
        process = {key: getattr(given, key) for key in OF_PROCESS if key in options}
        asked = Asked(process, agree_seconds=given.agree_seconds, every_step=given.check_every_step)
        supervisor_for(asked)  # where it differs from what else asks, it is told here
    return watch_group(name, on, asked)
