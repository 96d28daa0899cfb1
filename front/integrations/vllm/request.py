"""What is asked of the adapter: by the environment, or by ``additional_config``, in which it travels to workers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ...keywords import WatchKeywords
from ...options import Options
from ...runtime.errors import OptionsError
from .. import environment

MODES = ("pass", "backend", "guard")
#: In ``additional_config``.
KEY = "ringfence"

WATCH = tuple(WatchKeywords.__annotations__)
PREPARE = ("collective", "transport", "size_table", "max_tokens", "on_hazard", "agree_seconds")
FIND = ("numerics", "skip_sites", "norm_ops")
#: Of the backend, these are vLLM's to say, or cannot be written as JSON.
_NOT_GIVEN = ("all_reduce_ops", "group_names", "groups", "outer_capture", "on_report")

#: In a pattern of skip_sites: a module with a number, or with some of several characters.
_ONE_LAYER = re.compile(r"(^|\.)\d+(\.|$)|\[")

#: The options of each mode.
OF_MODE: dict[str, tuple[str, ...]] = {
    "pass": tuple(dict.fromkeys((*FIND, *PREPARE, *WATCH))),
    "backend": tuple(name for name in Options.__dataclass_fields__ if name not in _NOT_GIVEN),
    "guard": ("on_hazard", *WATCH),
}


@dataclass(frozen=True)
class Request:
    """mode: one of :data:`MODES`. options: of :class:`ringfence.Options`, as far as the mode takes them.

    digest: of what a compiled graph rests on, for vLLM's caches. sizes: token counts that vLLM would capture.
    up_to: the largest token count of a graph that the pass fuses in; None for any. prepared: who carries out what the
    pass fuses; None until a worker knows.
    """

    mode: str
    options: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""
    sizes: tuple[int, ...] = ()
    up_to: int | None = None
    prepared: str | None = None

    def for_config(self) -> dict[str, Any]:
        """As it stands in ``additional_config``."""
        return asdict(self) | {"sizes": list(self.sizes)}

    @property
    def fuses(self) -> bool:
        """Whether the pass fuses: by kernels, or by the reference where it was asked for by name.

        The reference is NCCL, add and norm. vLLM's own all-reduce is faster, which it would displace.
        """
        return self.asks_for_reference or self.prepared not in (None, "reference")

    @property
    def asks_for_reference(self) -> bool:
        return self.options.get("collective") == "reference"

    def only(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Those of the options that are given and named here."""
        return {name: self.options[name] for name in names if name in self.options}


def of_environment() -> Request | str | None:
    """What ``RINGFENCE`` and ``RINGFENCE_OPTIONS`` ask for; "off" where they forbid it, None where they are silent.

    Raises :class:`OptionsError`.
    """
    if environment.is_off(os.environ):
        return "off"
    if environment.is_silent(os.environ):
        return None
    mode, options = environment.asked_in(os.environ, MODES)
    return _checked(mode, options, environment.MODE, environment.OPTIONS)


def of_config(vllm_config: Any) -> Request | None:
    """What ``additional_config`` asks for: ``{"ringfence": "pass"}``, or ``{"mode": ..., "options": {...}}`` there.

    Raises :class:`OptionsError`.
    """
    more = getattr(vllm_config, "additional_config", None)
    given = more.get(KEY) if isinstance(more, Mapping) else None
    if given is None or given in environment.OFF:
        return None
    if isinstance(given, str):
        given = {"mode": given}
    where = f"additional_config['{KEY}']"
    known = [one.name for one in fields(Request)]
    if not isinstance(given, Mapping) or any(key not in known for key in given):
        raise OptionsError(f"{where} is {given!r}; it is a mode, or {{'mode': ..., 'options': {{...}}}}")
    asked = _checked(given.get("mode"), given.get("options", {}), f"{where}['mode']", f"{where}['options']")
    digest, sizes = str(given.get("digest", "")), tuple(given.get("sizes", ()))
    return replace(asked, digest=digest, sizes=sizes, up_to=given.get("up_to"), prepared=given.get("prepared"))


def _checked(mode: object, options: object, mode_is: str, options_are: str) -> Request:
    if not isinstance(mode, str) or mode not in MODES:
        raise OptionsError(f"{mode_is}={mode!r} is none of {', '.join(MODES)}, nor 'off'")
    if not isinstance(options, dict):
        raise OptionsError(f'{options_are} holds {options!r}, and is an object of options: {{"on_hang": "abort"}}')
    others = [name for name in options if name not in OF_MODE[mode]]
    if others and (others[0] in Options.__dataclass_fields__):
        raise OptionsError(
            f"{options_are} holds '{others[0]}', which is nothing that mode '{mode}' takes: {', '.join(OF_MODE[mode])}"
        )
    try:
        Options.parse(options)  # names the nearest for a word that is none
    except OptionsError as error:
        raise OptionsError(f"{options_are}: {error}") from None
    if mode != "backend" and options.get("on_hazard") == "clean":
        raise OptionsError(f"{options_are}: on_hazard='clean' is the backend's; use 'split', 'refuse' or 'raise'")
    one = next((p for p in options.get("skip_sites", ()) if _ONE_LAYER.search(p)), None)
    if mode == "pass" and one is not None:
        raise OptionsError(
            f"{options_are}: skip_sites tells layers apart ('{one}'), and vLLM compiles those that are alike once: "
            "name what they have in common ('*.o_proj'), or use RINGFENCE=backend"
        )
    return Request(mode, options)
