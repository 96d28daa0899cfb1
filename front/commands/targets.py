"""What ``ringfence explain`` compiles where it is no folder: what a function of the user's returns."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..runtime.errors import TargetError


def load_function(target: str) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
    """The model of ``module:function`` and its inputs. Raises :class:`TargetError`."""
    module_name, _, function_name = target.partition(":")
    with _importable_from_here():
        try:
            function = getattr(importlib.import_module(module_name), function_name)
        except (ImportError, AttributeError) as error:
            path = module_name.removesuffix(".py").replace("/", ".")
            hint = f"; a module is named without its suffix: {path}:{function_name}" if path != module_name else ""
            raise TargetError(f"'{module_name}:{function_name}' cannot be imported: {error}{hint}") from error
        try:
            result = function()
        except Exception as error:  # whatever the user's function raises
            raise TargetError(f"'{module_name}:{function_name}()' raised {type(error).__name__}: {error}") from error
    if not (isinstance(result, tuple) and len(result) == 2 and callable(result[0])):
        types = [type(r).__name__ for r in result] if isinstance(result, tuple) else type(result).__name__
        raise TargetError(f"'{module_name}:{function_name}' must return (model, example_inputs), and returned {types}")
    model, inputs = result
    if isinstance(inputs, Mapping):
        return model, (), inputs
    return model, tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {}


@contextlib.contextmanager
def _importable_from_here() -> Iterator[None]:
    """As with ``python -m``: modules of the current folder can be named."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
