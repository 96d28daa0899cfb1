"""What an integration calls or replaces in its engine, compared with what it was written for."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """A function of an engine. path: ``"package.module.function"``, or of a class's method.

    parameters: as Python prints them, without annotations: ``"x, eps=1e-06, *, group=None"``. None: it is no function,
    and has to be there. also: what they are in other releases that were read.
    """

    path: str
    parameters: str | None = None
    also: tuple[str, ...] = ()


def parameters_of(function: Any) -> str:
    """The parameters of a function as :class:`Target` has them. Raises ValueError and TypeError as inspect does."""
    signature = inspect.signature(function, follow_wrapped=True)
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))[1:-1]


def resolve(path: str) -> Any:
    """What is at a dotted path. Raises ImportError and AttributeError."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
                raise  # the module is there, and lacks another one
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(f"No module named '{parts[0]}'")


def moved(targets: Sequence[Target]) -> tuple[str, ...]:
    """For each target that is not what it was: what is there instead. Imports the engine's modules."""
    found = []
    for target in targets:
        try:
            thing = resolve(target.path)
            there = parameters_of(thing) if target.parameters is not None else None
        except Exception as error:  # an engine's import may raise anything
            found.append(f"{target.path} cannot be had ({type(error).__name__}: {error})")
            continue
        if there not in (target.parameters, *target.also):
            found.append(f"{target.path} takes ({there}), not ({target.parameters})")
    return tuple(found)


def why_not_there(package: str) -> str | None:
    """Why an engine cannot be hooked at all; None where it is installed."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package:
            return f"no package '{package}' is installed here"
    return None


def version_of(package: str) -> str:
    """As it is installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(of no known version)"
