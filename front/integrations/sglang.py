"""ringfence in SGLang: entry point ``sglang.srt.plugins``, loaded in each of its processes.

    RINGFENCE=fuse python -m sglang.launch_server ... --flashinfer-allreduce-fusion-backend auto

SGLang hands an all-reduce that a residual add and an RMSNorm follow to one function,
``flashinfer_allreduce_residual_rmsnorm``, and does the three by itself where that returns ``(None, None)``. ``fuse``
puts the fused op there, prepared where SGLang would make its workspaces, and watches the replays of its graphs;
``guard`` leaves SGLang's kernels and only watches. ``RINGFENCE_OPTIONS`` is a JSON object of options.

Whether a call is served is decided by values that are equal on all ranks: what they prepared together, shapes and
dtypes, and whether SGLang captures. A rank that went another way than its peers would wait for them for ever.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from . import environment
from .sglang_targets import FUSED, PREPARE, REPLAYS, TARGETS, TESTED, Settings
from .targets import moved, resolve, version_of, why_not_there

_MODES = {"1": "fuse", "fuse": "fuse", "guard": "guard"}
_OF_PREPARE = ("collective", "transport", "size_table", "on_hazard", "agree_seconds")

_log = logging.getLogger(__name__)


def register() -> None:
    """What SGLang calls in each of its processes. Ends the process, with one line, where the options are wrong."""
    if environment.is_off(os.environ) or environment.is_silent(os.environ):
        return
    from ..runtime.errors import OptionsError

    try:
        settings = settings_of(os.environ)
    except OptionsError as error:
        raise SystemExit(f"ringfence: {error}") from None
    if (missing := why_not_there("sglang")) is not None:
        environment.warn(_log, "ringfence does nothing: it is asked for in SGLang, and %s", missing)
        return
    if found := moved(TARGETS[settings.mode]):
        environment.warn(
            _log,
            "ringfence does nothing in SGLang %s, which is not the one that it was written for (%s): %s",
            version_of("sglang"),
            ", ".join(TESTED),
            "; ".join(found),
        )
        return
    registry, kinds = (resolve(f"sglang.srt.plugins.hook_registry.{name}") for name in ("HookRegistry", "HookType"))
    if hasattr(registry, "ringfence"):  # called again: a replay in two steps would be counted twice
        return
    from .sglang_hooks import Adapter

    adapter = registry.ringfence = Adapter(settings)
    for target in REPLAYS:
        registry.register(target.path, adapter.replay, kinds.AROUND)
    if settings.mode == "fuse":
        registry.register(PREPARE.path, adapter.pre_initialize_workspaces, kinds.REPLACE)
        registry.register(FUSED.path, adapter.all_reduce_residual_rms_norm, kinds.REPLACE)


def settings_of(given_by: Mapping[str, str]) -> Settings:
    """What is asked for. Raises :class:`OptionsError`."""
    from ..keywords import WatchKeywords
    from ..options import Options
    from ..runtime.errors import OptionsError

    asked, given = environment.asked_in(given_by, tuple(_MODES))
    mode = _MODES[asked]
    of_watch = tuple(WatchKeywords.__annotations__)
    known = tuple(dict.fromkeys((*of_watch, *(_OF_PREPARE if mode == "fuse" else ()))))
    if unknown := [name for name in given if name not in known]:
        raise OptionsError(
            f"RINGFENCE_OPTIONS holds {', '.join(unknown)}; with RINGFENCE={mode} it takes {', '.join(known)}"
        )
    if given.get("on_hazard") == "clean":
        raise OptionsError("on_hazard='clean' rewrites a graph, and SGLang has none; use 'split', 'refuse' or 'raise'")
    Options.parse(given)
    prepare, watch = ({name: given[name] for name in names if name in given} for names in (_OF_PREPARE, of_watch))
    return Settings(mode, prepare, watch)
