"""Compiler: from a rank's calls to its launches, each made when somebody looks at it.

A call becomes the same ops wherever the call and the control words are the same: only the number of the call
differs, and that of a barrier. So a plan of ten thousand calls is a few dozen kinds of launch, and what is
kept of it is a number per call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, TypeVar, overload

from .calls import Call, Calls
from .machine import CellTable, Launch, Machine, Op

Words = TypeVar("Words")


@dataclass(frozen=True)
class Compiler(ABC, Generic[Words]):
    """One protocol among ``world_size`` ranks: what a call becomes, given a rank's control words before it."""

    world_size: int
    memory: CellTable = field(default_factory=CellTable, compare=False)

    @abstractmethod
    def initial(self) -> Words:
        """The control words of a new workspace."""

    @abstractmethod
    def kind(self, call: Call) -> Call:
        """The call with nothing but what the protocol reads of it: calls of one kind become the same ops."""

    @abstractmethod
    def after(self, words: Words, call: Call) -> Words:
        """The control words once the call is complete."""

    @abstractmethod
    def ops(self, rank: int, words: Words, call: Call) -> tuple[Op, ...]:
        """What the call makes a rank do; nothing where the rank takes no part."""

    def rebased(self, words: Words) -> tuple[Words, int]:
        """The words with what only grows brought back to the beginning, and by how much flags were moved back."""
        return words, 0

    def machine(self, programs: Sequence[Calls]) -> CompiledMachine:
        """The machine that these programs, one per rank, make of a workspace."""
        return CompiledMachine(self, programs)


class History(Generic[Words]):
    """The kind of each call of a program, and the control words before it."""

    def __init__(self, compiler: Compiler[Words], calls: Calls) -> None:
        self.compiler, self.calls = compiler, calls
        self.kinds: list[Call] = []
        self.words: list[Words] = []
        now: dict[int, Words] = {}
        kinds: dict[Call, Call] = {}
        for call in calls:
            plain = replace(call, id=0, where="")
            kind = kinds.get(plain)
            if kind is None:
                kind = kinds[plain] = compiler.kind(call)
            words = now.get(kind.workspace)
            if words is None:
                words = compiler.initial()
            self.kinds.append(kind)
            self.words.append(words)
            now[kind.workspace] = compiler.after(words, call)

    @cached_property
    def pairs(self) -> tuple[list[int], list[int]]:
        """A number for what decides the ops of each call, and a call with each of these numbers: many are the same."""
        numbers: dict[tuple[Call, Words], int] = {}
        number_of: list[int] = []
        first: list[int] = []
        for place, (kind, words) in enumerate(zip(self.kinds, self.words, strict=True)):
            number = numbers.setdefault((kind, self.compiler.rebased(words)[0]), len(numbers))
            if number == len(first):
                first.append(place)
            number_of.append(number)
        return number_of, first


class CompiledProgram(Sequence[Launch]):
    """The launches of one rank. All cells that they use are numbered before the first is looked at."""

    def __init__(self, compiler: Compiler[Words], rank: int, history: History[Words]) -> None:
        self._compiler, self._rank, self._history = compiler, rank, history
        self._launches: dict[int, Launch] = {}
        number_of, first = history.pairs
        widths = [len(compiler.ops(rank, history.words[place], history.calls[place])) for place in first]
        self.width = max(widths, default=0)
        self._places: Sequence[int] = range(len(number_of))
        if not all(widths):
            self._places = [place for place, number in enumerate(number_of) if widths[number]]

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, at: int) -> Launch: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Launch, ...]: ...
    def __getitem__(self, at: int | slice) -> Launch | tuple[Launch, ...]:
        if isinstance(at, slice):
            return tuple(self[i] for i in range(*at.indices(len(self))))
        if at not in self._launches:
            place = self._places[at]
            call = self._history.calls[place]
            ops = self._compiler.ops(self._rank, self._history.words[place], call)
            self._launches[at] = Launch(call.id, call.title, ops)
        return self._launches[at]


class CompiledMachine(Machine):
    """A machine that knows the calls it is made of, and makes launches of them when it is asked for one."""

    def __init__(self, compiler: Compiler[Any], calls: Sequence[Calls]) -> None:
        histories: dict[int, History[Any]] = {}
        for program in calls:
            if id(program) not in histories:
                histories[id(program)] = History(compiler, program)
        super().__init__((), compiler.memory.names)
        self.compiler = compiler
        self.histories = tuple(histories[id(program)] for program in calls)

    @cached_property
    def _compiled(self) -> tuple[CompiledProgram, ...]:
        return tuple(CompiledProgram(self.compiler, rank, history) for rank, history in enumerate(self.histories))

    @property
    def programs(self) -> Sequence[Sequence[Launch]]:
        return self._compiled

    @property
    def names(self) -> Sequence[str]:
        assert self._compiled is not None  # names all cells
        return self.compiler.memory.names

    @property
    def width(self) -> int:
        return max((program.width for program in self._compiled), default=0)
