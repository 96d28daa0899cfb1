"""What the environment asks of an integration: ``RINGFENCE``, a mode, and ``RINGFENCE_OPTIONS``, a JSON object.

It imports nothing of ringfence until something is wrong: a process that asks for nothing pays for nothing.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
from collections.abc import Mapping
from typing import Any

MODE, OPTIONS = "RINGFENCE", "RINGFENCE_OPTIONS"
#: Words that ask for nothing.
OFF = ("off", "none", "0")


def warn(log: logging.Logger, message: str, *args: object) -> None:
    """Once for an engine: in the process that starts it. The others find the same, and it is news to nobody there."""
    level = logging.DEBUG if multiprocessing.parent_process() is not None else logging.WARNING
    log.log(level, message, *args)


def is_off(environment: Mapping[str, str]) -> bool:
    """Whether it forbids ringfence; without a mode it is only silent."""
    return environment.get(MODE, "").strip() in OFF


def is_silent(environment: Mapping[str, str]) -> bool:
    """Whether it says nothing at all."""
    return not any(environment.get(name, "").strip() for name in (MODE, OPTIONS))


def asked_in(environment: Mapping[str, str], modes: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """The mode and the options of an environment that is neither off nor silent.

    modes: of the engine. Raises :class:`OptionsError`.
    """
    from ..runtime.errors import OptionsError

    mode, text = (environment.get(name, "").strip() for name in (MODE, OPTIONS))
    if not mode:
        raise OptionsError(f"{OPTIONS} is set and {MODE} is not; {MODE} is one of {', '.join(modes)}")
    if mode not in modes:
        raise OptionsError(f"{MODE}='{mode}' is none of {', '.join(modes)}, nor 'off'")
    try:
        options = json.loads(text or "{}")
    except ValueError as error:
        raise OptionsError(f"{OPTIONS} is no JSON ({error}): {text!r}") from None
    if not isinstance(options, dict):
        raise OptionsError(f'{OPTIONS} holds {options!r}, and is an object of options: {{"on_hang": "abort"}}')
    return mode, options
