"""A random program as data: what it takes, a few statements of Python, what it returns.

The statements are source, so a failure prints a program that can be read, run and kept. Their
values are typed (shape, dtype), so they can be put together at random and taken apart again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .data import LAYOUTS

#: The width of activations and the rows of a cache; every token count is smaller.
H, ROWS = 16, 8

_NAME = re.compile(r"(?<![\w.])(self\.\w+|[A-Za-z_]\w*)")


@dataclass(frozen=True)
class Value:
    """A tensor of the program. Dimensions are expressions over the sizes, as ``"n"`` or ``"n+m"``."""

    name: str
    shape: tuple[str, ...]
    dtype: str
    writable: bool = True
    contiguous: bool = True
    random: bool = False


@dataclass(frozen=True)
class Statement:
    """Lines of the program that belong together, and the values that they define."""

    text: str
    defines: tuple[Value, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """Every name that the text mentions."""
        return frozenset(_NAME.findall(self.text))

    def reads(self, names: Iterable[str]) -> bool:
        own = {v.name for v in self.defines}
        return bool(self.names & (set(names) - own))


@dataclass(frozen=True)
class Program:
    """inputs, buffers: (name, spec). A spec is ``[LAYOUT ]dtype[dimensions]`` (:mod:`fuzz.data`), a word of
    :mod:`fuzz.play`, or ``= EXPRESSION`` over earlier inputs; a leading ``keep`` means that the tensor lives on from
    step to step. moves: that made it."""

    inputs: tuple[tuple[str, str], ...]
    buffers: tuple[tuple[str, str], ...]
    statements: tuple[Statement, ...]
    returns: tuple[str, ...]
    moves: frozenset[str] = frozenset()

    @property
    def body(self) -> list[str]:
        return [line for statement in self.statements for line in statement.text.splitlines()]

    def source(self) -> str:
        """The function ``forward``, as a class body has it."""
        arguments = ", ".join(["self", *(name for name, _ in self.inputs)])
        lines = [*self.body, f"return ({', '.join(self.returns)},)"]
        return "\n".join([f"def forward({arguments}):", *(f"    {line}" for line in lines)]) + "\n"

    def without(self, dropped: Statement) -> Program:
        """This program without a statement and without what reads the values that it defines."""
        gone = {v.name for v in dropped.defines}
        kept = []
        for statement in self.statements:
            if statement is dropped or statement.reads(gone):
                gone |= {v.name for v in statement.defines}
            else:
                kept.append(statement)
        returns = tuple(r for r in self.returns if not gone & set(_NAME.findall(r)))
        return replace(self, statements=tuple(kept), returns=returns)

    def substituted(self, old: str, new: str) -> Program:
        """This program with every later mention of a value replaced by another value."""
        pattern = re.compile(rf"(?<![\w.]){re.escape(old)}(?!\w)")
        statements = [
            s if any(v.name == old for v in s.defines) else replace(s, text=pattern.sub(new, s.text))
            for s in self.statements
        ]
        return replace(self, statements=tuple(statements), returns=tuple(pattern.sub(new, r) for r in self.returns))

    def compact(self) -> Program:
        """This program with inputs that each fill a storage of their own."""
        specs = {name: " ".join(w for w in spec.split(" ") if w not in LAYOUTS) for name, spec in self.inputs}
        for name, spec in specs.items():
            if spec.startswith("= pool"):
                specs[name] = f"{specs['pool'].partition('[')[0]}[{'2,8,16' if name == 'kv' else '8,16'}]"
        buffers = tuple((n, " ".join(w for w in spec.split(" ") if w not in LAYOUTS)) for n, spec in self.buffers)
        return replace(self, inputs=tuple(specs.items()), buffers=buffers)

    def pruned(self) -> Program:
        """Without the inputs and buffers that nothing mentions."""
        used = {name for s in self.statements for name in s.names}
        used |= {name for r in self.returns for name in _NAME.findall(r)}
        for _, spec in self.inputs:
            used |= set(_NAME.findall(spec)) if "=" in spec else set()
        return replace(
            self,
            inputs=tuple((n, s) for n, s in self.inputs if n in used),
            buffers=tuple((n, s) for n, s in self.buffers if f"self.{n}" in used),
        )


def parse(inputs: dict[str, str], body: str, returns: str, buffers: dict[str, str] | None = None) -> Program:
    """A program from its text, for those that are kept."""
    lines = tuple(Statement(line) for line in body.strip("\n").splitlines())
    return Program(tuple(inputs.items()), tuple((buffers or {}).items()), lines, (returns.rstrip(","),))
