"""Walk: the watched run of :mod:`.order`, in which equal calls are made once.

A plan of 80 layers makes the same call 160 times, and a serving engine makes the plan again and again. Between
two calls, when every rank has made as many, all that the rest of the run depends on is the ranks' control words,
the memory, and what :class:`~.order.Past` keeps. Told from the next call instead of from the first, these come
back. So from each such state each kind of call is made once; where the plan comes to the two again, the state
that follows is known.

Why that is the same run. The words of calls are numbered by the call that sent them, and nothing in
:mod:`.machine` looks at a number but to compare it with another: for equality, or, for barriers, modulo 3 and
by order. Counting calls from another one, and barriers from another multiple of 3, keeps all of these. Words
from more than :data:`_REMEMBERED` calls ago are told as equally old: none of them is what a later poll is meant
to find. What an order forgets is what no later step asks for: see :meth:`.order.Order.past`.

A walk goes as far as all ranks make the same calls and every one of them ends without a doubt.
:mod:`.decide` takes over there, with the states and the order that the run had come to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .bound import Bound
from .calls import Call
from .compiler import CompiledMachine, Compiler, History
from .machine import EMPTY, Launch, Machine, State, call_of, renumbered
from .order import Order, Past
from .run import run_order

#: The call that is made from a state has this number; earlier ones count down to 0, which stands for all before.
_REMEMBERED = 4

#: As many look-ups cost what a state does.
_LOOKED_UP_FOR_A_STATE = 32


@dataclass(frozen=True)
class Between:
    """All ranks between two calls. Values are told as if the next call were number ``_REMEMBERED``."""

    words: Any
    memory: tuple[tuple[int, int], ...]
    past: Past


@dataclass
class Walk:
    """States between calls, and where each kind of call leads from them. Shared by plans of one compiler."""

    compiler: Compiler[Any]
    bound: Bound = field(default_factory=Bound)
    steps: int = 0
    looked_up: int = 0
    states: list[Between] = field(default_factory=list)
    _flags: set[int] = field(default_factory=set)
    _numbers: dict[Between, int] = field(default_factory=dict)
    _leads: dict[tuple[int, Call], int | None] = field(default_factory=dict)
    _follows: dict[tuple[int, Call, int], int | None] = field(default_factory=dict)

    def start(self) -> int:
        words, _ = self.compiler.rebased(self.compiler.initial())
        return self._number(Between(words, (), Past.nothing(self.compiler.world_size)))

    def lead(self, state: int, kind: Call) -> int | None:
        """The state after a call of this kind on every rank; None where that does not go without a doubt."""
        try:
            return self._leads[state, kind]
        except KeyError:
            after = self._made(self.states[state], kind)
            self._leads[state, kind] = number = self._number(after) if after is not None else None
            return number

    def follow(self, state: int, kind: Call, count: int) -> int | None:
        """As :meth:`lead`, of ``count`` calls one after another."""
        key = state, kind, count
        if key not in self._follows:
            self._follows[key] = self._followed(state, kind, count)
        self.looked_up += 1
        self.bound.visit(self.looked_up % _LOOKED_UP_FOR_A_STATE == 0)
        return self._follows[key]

    def _followed(self, state: int, kind: Call, count: int) -> int | None:
        way: dict[int, None] = {}  # in order
        now: int | None = state
        for made in range(count):
            if now in way:  # and round again
                states = list(way)
                first = states.index(now)
                return states[first + (count - made) % (made - first)]
            assert now is not None
            way[now] = None
            now = self.lead(now, kind)
            if now is None:
                return None
        return now

    def _number(self, state: Between) -> int:
        number = self._numbers.setdefault(state, len(self.states))
        if number == len(self.states):
            self.states.append(state)
        return number

    def _made(self, state: Between, kind: Call) -> Between | None:
        compiler = self.compiler
        call = replace(kind, id=_REMEMBERED)
        launches = [[Launch(call.id, "", compiler.ops(rank, state.words, call))] for rank in range(compiler.world_size)]
        if not all(launch.ops for (launch,) in launches):
            return None
        machine = Machine(launches, compiler.memory.names)
        memory = list(machine.initial()[1])
        for cell, value in state.memory:
            memory[cell] = value
        order = Order.after(state.past, machine.width)
        start = ((0, 0),) * compiler.world_size, tuple(memory)
        run = run_order(machine, start, order=order, bound=self.bound)
        self.steps += len(run.trace)
        if run.failure is not None or run.suspicion is not None:
            return None
        words, back = compiler.rebased(compiler.after(state.words, call))

        def moved(value: int, is_flag: bool) -> int:
            return renumbered(value, is_flag, lambda made_in: max(made_in - 1, 0), -back)

        past = order.past(1, moved)
        if past.reach >= _REMEMBERED:  # nobody learns of anybody: a run in which nothing can be forgotten
            return None
        for (launch,) in launches:
            self._flags.update(cell for op in launch.ops if op.kind.is_flag for cell in op.cells)
        cells = tuple((i, moved(v, i in self._flags)) for i, v in enumerate(run.end[1]) if v != EMPTY)
        return Between(words, cells, past)

    def absolute(self, way: Sequence[int], history: History[Any]) -> tuple[State, Past]:
        """The state at the end of ``way``, told from the first call of this history."""
        between, calls, made = self.states[way[-1]], history.calls, len(way) - 1
        words = self.compiler.after(history.words[made - 1], calls[made - 1]) if made else self.compiler.initial()
        numbers = self.compiler.rebased(words)[1]

        def there(value: int, is_flag: bool, cell: int | None = None) -> int:
            def number(call: int) -> int:
                if call == 0 and cell is not None:
                    return calls[self._since(way, cell)].id
                return calls[max(made - _REMEMBERED + call, 0)].id

            return renumbered(value, is_flag, number, numbers)

        memory = [EMPTY] * len(self.compiler.memory.names)
        for cell, value in between.memory:
            memory[cell] = there(value, cell in self._flags, cell)
        cells = [
            replace(
                past,
                writes=tuple((place, there(value, past.is_flag), knows) for place, value, knows in past.writes),
                polls=tuple((place, kind, there(value, past.is_flag)) for place, kind, value in past.polls),
            )
            for past in between.past.cells
        ]
        progress = ((made, 0),) * self.compiler.world_size
        return (progress, tuple(memory)), replace(between.past, cells=tuple(cells))

    def _since(self, way: Sequence[int], cell: int) -> int:
        """The call that wrote what a cell has held for longer than is remembered."""
        for made in range(len(way) - 1, 0, -1):
            value = dict(self.states[way[made]].memory).get(cell, EMPTY)
            call = call_of(value, cell in self._flags)
            if call is not None and call > 0:
                return made - _REMEMBERED + call
        return 0


@dataclass(frozen=True)
class Begun:
    """How far a walk went. ``states``: the last ones between calls, oldest first; ``order``: of the run until there."""

    finished: bool
    steps: int
    states: tuple[State, ...]
    order: Order


def begin(machine: Machine, walk: Walk | None, bound: Bound) -> Begun:
    """Walk as far as the ranks of a machine make the same calls. ``walk`` may know some of it already."""
    way, steps = [], 0
    if isinstance(machine, CompiledMachine):
        walk = walk or Walk(machine.compiler, bound)
        before, first = walk.steps, machine.histories[0]
        way = [walk.start()]
        for kind in first.kinds[: _alike(machine.histories)]:
            after = walk.lead(way[-1], kind)
            if after is None:
                break
            way.append(after)
        made, steps = len(way) - 1, walk.steps - before
        if all(len(history.calls) == made for history in machine.histories):
            return Begun(True, steps, (), Order(0, 0))
    if walk is None or len(way) < 2:
        return Begun(False, steps, (machine.initial(),), Order(machine.width, len(machine.programs)))
    assert machine.names  # every cell has its number
    found = [walk.absolute(way[: at + 1], first) for at in range(max(made - 2, 0), made + 1)]
    return Begun(False, steps, tuple(state for state, _ in found), Order.after(found[-1][1], machine.width, made))


def _alike(histories: Sequence[History[Any]]) -> int:
    """How many calls all ranks have in common from the beginning, in one workspace and each of its own number."""
    first = histories[0]
    if len({call.id for call in first.calls}) < len(first.calls):
        return 0
    others = [history for history in histories if history is not first]
    most = min(len(history.calls) for history in histories)
    for at in range(most):
        kind, id = first.kinds[at], first.calls[at].id
        if kind.workspace != first.kinds[0].workspace:
            return at
        if any(other.kinds[at] != kind or other.calls[at].id != id for other in others):
            return at
    return most
