"""Which graph Dynamo compiles now, and which guard on which value made it compile again.

Asked while a backend is called: Dynamo has worked out by then why none of the graphs that it has serves the call.
Two things are read that torch does not document: a metric that it logs, and the frame that it traces. Where another
release has neither, less is said.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._guards import CompileContext

from .position import COMPILES


@dataclass(frozen=True)
class CompiledGraph:
    """name: ``forward 0/1``; empty outside of Dynamo. guard: what failed, and on which value; empty the first time."""

    name: str = ""
    guard: str = ""

    @property
    def why(self) -> str:
        """For whoever waits in vain: ``compiles forward 0/2 anew, because ...``."""
        if not self.name:
            return COMPILES
        if not self.guard:
            return f"compiles {self.name} for the first time"
        return f"compiles {self.name} anew, because of a guard that failed: {self.guard}"


def graph_being_compiled() -> CompiledGraph:
    """The graph that Dynamo compiles on this thread."""
    number = CompileContext.current_compile_id()
    if number is None:
        return CompiledGraph()
    code, variables = _frame()
    name = code.co_qualname.rpartition("<locals>.")[2] if code is not None else "graph"
    return CompiledGraph(f"{name} {number}", _guard(_reason(), variables))


def _frame() -> tuple[Any, Mapping[str, Any]]:
    with contextlib.suppress(ImportError, AttributeError, RuntimeError, AssertionError):
        from torch._dynamo.symbolic_convert import InstructionTranslator

        tx = InstructionTranslator.current_tx()
        return tx.f_code, tx.f_locals
    return None, {}


def _reason() -> str:
    with contextlib.suppress(ImportError, AttributeError):
        from torch._dynamo.utils import get_metrics_context

        return str(get_metrics_context()._metrics.get("recompile_reason") or "")
    return ""


def _guard(reason: str, variables: Mapping[str, Any]) -> str:
    """``2 <= x.size()[0] (x is of shape [1, 64])``, of what Dynamo says in several lines."""
    lines = reason.splitlines()
    if not lines:
        return ""
    guard = re.sub(r"^\d+/\d+(_\d+)?: ", "", lines[0].partition("  #")[0]).strip()
    values = "; ".join(dict.fromkeys(_values(guard, variables)))
    return f"{guard} ({values})" if values else guard


def _values(guard: str, variables: Mapping[str, Any]) -> Iterator[str]:
    """What the guard speaks of, as it is now. A sentence such as "tensor 'x' size mismatch ..., actual 1" says it."""
    try:
        tree = ast.parse(guard, mode="eval")
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute | ast.Subscript):
            with contextlib.suppress(Exception):  # it is the user's object that is asked
                value = _value(node, variables)
                if isinstance(value, Tensor):
                    yield f"{ast.unparse(node)} is of shape {list(value.shape)}"
                elif value is None or isinstance(value, bool | int | float | str):
                    yield f"{ast.unparse(node)} is {value!r}"


def _value(node: ast.expr, variables: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return variables[node.id]
    if isinstance(node, ast.Attribute):
        return getattr(_value(node.value, variables), node.attr)
    if isinstance(node, ast.Subscript):
        return _value(node.value, variables)[ast.literal_eval(node.slice)]
    raise LookupError(node)
