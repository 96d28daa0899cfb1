"""Values of options: names of engines' ops, what their arguments and groups are, and counts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

from ..runtime.errors import OptionsError
from ..runtime.groups import name_of_group
from . import engine_ops
from . import norm_ops as norms
from .engine_ops import AllReduceOp, GroupOf
from .norm_ops import NormOp

OnHazard = Literal["split", "refuse", "raise", "clean"]
Profile = Literal["causes", "conservative"]

_ROWS: Mapping[str, Any] = {"all_reduce_ops": AllReduceOp, "norm_ops": NormOp}


def strings(key: str, value: object) -> tuple[str, ...]:
    """A list of strings, whatever kind of list it is. Raises :class:`OptionsError`, as all here."""
    if isinstance(value, str) or not isinstance(value, Sequence | set | frozenset):
        raise OptionsError(f"{key}={value!r} is not a list of strings")
    wrong = [v for v in value if not isinstance(v, str)]
    if wrong:
        raise OptionsError(f"{key} holds {wrong[0]!r}, which is not a string")
    return tuple(value)


def positive(key: str, value: object) -> int:
    """A positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionsError(f"{key}={value!r} is not a positive integer")
    return value


def one_of(key: str, value: object, choices: Sequence[object]) -> None:
    """One of these words."""
    if value not in choices:
        raise OptionsError(f"{key}={value!r} is not one of {list(choices)}")


def check_op_name(key: str, name: str) -> None:
    """``"namespace::name"`` or ``"namespace::name.overload"``."""
    namespace, _, rest = name.partition("::")
    if not namespace or not rest:
        raise OptionsError(f"{key} holds '{name}'; an op is named 'namespace::name' or 'namespace::name.overload'")


def registered(key: str, name: str) -> torch._ops.OpOverload:
    """The op of that name; of several overloads, the first."""
    namespace, _, op = name.partition("::")
    packet, _, overload = op.partition(".")
    found = getattr(getattr(torch.ops, namespace), packet, None)
    if found is None or (overload and overload not in found.overloads()):
        raise OptionsError(
            f"{key} holds '{name}', and no such op is registered with torch; import the package that registers it "
            "before the model is compiled"
        )
    named: torch._ops.OpOverload = getattr(found, overload or found.overloads()[0])
    return named


def all_reduce_ops(value: object) -> dict[str, GroupOf]:
    """By op, what is said of its groups or of all its arguments."""
    ops: dict[str, GroupOf]
    if isinstance(value, Mapping):
        ops = {k: _named(_roles("all_reduce_ops", v) if isinstance(v, Mapping) else v) for k, v in value.items()}
        if not all(isinstance(k, str) and _names_groups(v) for k, v in ops.items()):
            raise OptionsError(
                f"all_reduce_ops={value!r} does not map op names to groups (process groups, their group_name, None, or "
                "mappings to these from the names that the op takes), nor to ringfence.AllReduceOp, whose fields are "
                "names of arguments"
            )
    else:
        ops = dict.fromkeys(strings("all_reduce_ops", value))
    for name in ops:
        check_op_name("all_reduce_ops", name)
    return ops


def _named(value: Any) -> Any:
    """What is said of an op, with names in place of process groups."""
    if isinstance(value, dist.ProcessGroup):
        return name_of_group(value)
    if isinstance(value, Mapping):
        return {name: _named(group) for name, group in value.items()}
    if isinstance(value, AllReduceOp):
        return dataclasses.replace(value, over=_named(value.over))
    return value


def _names_groups(value: object) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(k, str) and isinstance(v, str) for k, v in value.items())
    if isinstance(value, AllReduceOp):
        names = (value.input, *([] if value.group is None else [value.group]))
        lists = isinstance(value.ignored, list | tuple) and isinstance(value.only, Mapping)
        return (
            lists
            and all(isinstance(name, str) for name in (*names, *value.ignored, *value.only))
            and (value.over is None or (_names_groups(value.over) and not isinstance(value.over, AllReduceOp)))
        )
    return isinstance(value, str | None)


def norm_ops(value: object) -> dict[str, float | NormOp]:
    """By op, what is added to its weight, or all its roles."""
    ops = dict(value) if isinstance(value, Mapping) else dict.fromkeys(strings("norm_ops", value), 0.0)
    ops = {name: _roles("norm_ops", said) if isinstance(said, Mapping) else said for name, said in ops.items()}
    for name, said in ops.items():
        if not isinstance(name, str) or not (_is_number(said) or _is_norm_op(said)):
            raise OptionsError(
                f"norm_ops={value!r} does not map op names to what is added to the weight (0.0, 1.0), nor to "
                "ringfence.NormOp, whose roles are names of arguments and whose weight_bias is such a number"
            )
        check_op_name("norm_ops", name)
    return {name: said if isinstance(said, NormOp) else float(said) for name, said in ops.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_norm_op(value: object) -> bool:
    if not isinstance(value, NormOp) or not _is_number(value.weight_bias):
        return False
    needed, others = (value.x, value.eps), (value.weight, value.residual, value.out)
    return all(isinstance(n, str) for n in needed) and all(isinstance(n, str | None) for n in others)


def check_roles(option: str, name: str, said: Any, op: torch._ops.OpOverload) -> None:
    """Raises :class:`OptionsError` where an option says of an op's arguments what its schema does not."""
    row = said[name] if isinstance(said, Mapping) else None
    wrong = None
    if isinstance(row, AllReduceOp):
        wrong = engine_ops.check_row(row, op._schema)
    elif isinstance(row, NormOp):
        wrong = norms.check_row(row, op._schema)
    if wrong is not None:
        raise OptionsError(f"{option} says of '{name}' what its schema does not: {wrong}")


def _roles(option: str, given: Mapping[str, Any]) -> Any:
    """Roles of an op's arguments that come as a mapping, as from the command line; names of groups as they are."""
    row = _ROWS[option]
    first = "input" if option == "all_reduce_ops" else "x"
    if option == "all_reduce_ops" and first not in given:
        return dict(given)
    known = [f.name for f in dataclasses.fields(row) if f.name not in ("name", "proven")]
    needed = [f.name for f in dataclasses.fields(row) if f.default is f.default_factory is dataclasses.MISSING]
    if not set(needed) <= given.keys() <= set(known):
        raise OptionsError(
            f"{option} holds the roles {dict(given)!r}; of {known}, it needs {needed} and may have the others"
        )
    return row(**{key: tuple(v) if isinstance(v, list) else v for key, v in given.items()})


def group_names(value: object) -> dict[str, Any]:
    """By an engine's name, a process group or torch's name of it."""
    if not isinstance(value, Mapping) or not all(
        isinstance(name, str) and name and isinstance(group, str | dist.ProcessGroup) for name, group in value.items()
    ):
        raise OptionsError(
            f"group_names={value!r} does not map an engine's names of groups to process groups, or to their names"
        )
    return dict(value)


def groups(value: object) -> tuple[str, ...]:
    """Names of process groups, of which some may be given as groups."""
    if isinstance(value, str | dist.ProcessGroup) or not isinstance(value, Sequence | set | frozenset):
        raise OptionsError(f"groups={value!r} is not a list of process groups, or of their names")
    wrong = next((v for v in value if not isinstance(v, str | dist.ProcessGroup)), None)
    if wrong is not None:
        raise OptionsError(f"groups holds {wrong!r}, which is no process group, nor the name of one")
    if not value:
        raise OptionsError("groups is empty, so nothing could be fused; None means every group")
    return tuple(map(name_of_group, value))
