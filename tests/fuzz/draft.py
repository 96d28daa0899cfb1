"""A program in the making, and the moves that lengthen it. One seed draws one program."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from .program import Program, Statement, Value

Move = Callable[["Draft"], bool]
MOVES: list[tuple[int, Move]] = []


def move(weight: int) -> Callable[[Move], Move]:
    """Register a move: it adds statements, or returns False where the values at hand do not allow it."""

    def register(body: Move) -> Move:
        MOVES.append((weight, body))
        return body

    return register


@dataclass
class Draft:
    """random_ops: whether random numbers may flow into other values: only where their bits are promised."""

    draw: random.Random
    dtype: str
    distributed: bool
    random_ops: bool
    inputs: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)
    values: list[Value] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    returned: list[str] = field(default_factory=list)
    count: int = 0

    # -- choosing ----------------------------------------------------------------------

    def chance(self, probability: float) -> bool:
        return self.draw.random() < probability

    def one(self, *choices: str) -> str:
        return self.draw.choice(choices)

    def value(self, fits: Callable[[Value], bool] = lambda v: True) -> Value | None:
        """A value that fits; the late ones are the likelier, so that chains become long."""
        there = [v for v in self.values if fits(v) and v.dtype == self.dtype and not v.random]
        if not there:
            return None
        return (
            there[-1 - min(int(self.draw.expovariate(0.4)), len(there) - 1)]
            if self.chance(0.6)
            else (self.draw.choice(there))
        )

    def rows(self) -> Value | None:
        """An activation: tokens by width."""
        return self.value(lambda v: len(v.shape) == 2 and v.shape[1] == "16" and not v.shape[0].isdigit())

    def tokens(self) -> Value | None:
        """An activation with one row for each position."""
        return self.value(lambda v: v.shape == ("n", "16"))

    def cache(self) -> Value | None:
        return self.value(lambda v: v.shape == ("8", "16") and v.writable)

    def row(self) -> Value | None:
        return self.value(lambda v: v.shape == ("16",))

    def target(self) -> Value | None:
        """What may be written into. What outlives the call is the likelier."""
        if self.chance(0.6):
            kept = self.value(lambda v: v.writable and (v.name.startswith("self.") or v.name in self.inputs))
            if kept is not None:
                return kept
        return self.value(lambda v: v.writable)

    def alike(self, shape: tuple[str, ...]) -> str | None:
        """An expression of a shape, or of one that is broadcast to it."""
        same = self.value(lambda v: v.shape == shape)
        row = self.value(lambda v: 0 < len(v.shape) < len(shape) and v.shape == shape[len(shape) - len(v.shape) :])
        scalar = self.value(lambda v: v.shape == ())
        there = [v for v in (same, same, row, scalar) if v is not None]
        if not there:
            return None
        chosen = self.draw.choice(there)
        return self.one(chosen.name, chosen.name, f"torch.sin({chosen.name})", f"{chosen.name} * 0.5")

    # -- writing -----------------------------------------------------------------------

    def new(
        self, shape: tuple[str, ...], *, of: Value | None = None, dtype: str | None = None, contiguous: bool = True
    ) -> Value:
        """A name for a result; ``of``: it is a view of that value."""
        self.count += 1
        writable = of.writable if of is not None else True
        contiguous = contiguous and (of is None or of.contiguous)
        return Value(f"v{self.count}", shape, dtype or self.dtype, writable, contiguous)

    def add(self, text: str, *defines: Value, hidden: bool = False) -> bool:
        """hidden: values that are no use to later statements."""
        self.statements.append(Statement(text, defines))
        if not hidden:
            self.values.extend(defines)
        return True

    def random_value(self, value: Value) -> Value:
        return replace(value, random=not self.random_ops)


def _inputs(d: Draft) -> None:
    """What every program may take; the unused ones are dropped at the end."""
    t = d.dtype
    shapes = {
        "x": f"{t}[n,16]",
        "r": f"{t}[n,16]",
        "y": f"{t}[m,16]",
        "past": f"{t}[p,16]",
        "pos": "positions[n]",
        "mask": "bool[n]",
        "holes": "bool[8]",
        "lens": "host int64[n]",
        "k": "int",
        "s": "float",
        "c0": f"keep {t}[8,16]",
        "c1": f"keep {t}[8,16]",
        "kv": f"keep {t}[2,8,16]",
        "caches": f"keep list {t}[8,16]",
        "state": f"keep {t}[16]",
        "w": f"weight {t}[16,16]",
        "g": f"norm {t}[16]",
        "buffer": f"keep {t}[8,16]",
        "stack": f"keep {t}[2,8,16]",
        "last": f"keep {t}[16]",
    }
    buffers = ("w", "g", "buffer", "stack", "last")
    if d.chance(0.06):
        shapes["c1"] = "= c0"  # two layers share one cache
    if d.chance(0.03):
        shapes["c1"] = d.one("= c0[:]", "= kv[0]", "= c0[:4]")
    names = list(shapes)
    if d.chance(0.5):  # Dynamo gives inputs in order of use, AOT in order of the signature
        d.draw.shuffle(names)
    if shapes["c1"].startswith("="):  # after what it is a part of
        names.append(names.pop(names.index("c1")))
    for name in names:
        spec = shapes[name]
        (d.buffers if name in buffers else d.inputs)[name] = spec
        kind, _, dims = spec.rpartition(" ")[2].partition("[")
        if kind != t or name == "caches":
            continue
        shape = tuple(dims[:-1].split(","))
        written = name not in ("w", "g") and (name in ("c0", "c1", "kv", "state") or name in buffers or d.chance(0.25))
        d.values.append(Value(f"self.{name}" if name in buffers else name, shape, t, written))
    if shapes["c1"] == "= c0[:4]":
        d.values.append(Value("c1", ("4", "16"), t))
    elif shapes["c1"].startswith("="):
        d.values.append(Value("c1", ("8", "16"), t))
    d.values.extend(Value(f"caches[{i}]", ("8", "16"), t) for i in range(2))
    d.statements.append(Statement("n = x.shape[0]"))
    d.statements.append(Statement("m = y.shape[0]"))
    d.statements.append(Statement("p = past.shape[0]"))


def draw_program(
    seed: int, length: int, *, dtype: str = "float32", distributed: bool = True, random_ops: bool = True
) -> Program:
    """A random program of about ``length`` statements."""
    d = Draft(random.Random(seed), dtype, distributed, random_ops)
    _inputs(d)
    weights = [weight for weight, _ in MOVES]
    moves = [body for _, body in MOVES]
    focus = d.draw.choices([1, 6], [2, 1], k=len(weights))  # each program is fond of some moves
    weights = [w * f for w, f in zip(weights, focus, strict=True)]
    tries, made = 0, set()
    while len(d.statements) < length + 3 and tries < 20 * length:
        tries += 1
        chosen = d.draw.choices(moves, weights)[0]
        if chosen(d):
            made.add(chosen.__name__)
    inputs, buffers, statements = tuple(d.inputs.items()), tuple(d.buffers.items()), tuple(d.statements)
    return _used(Program(inputs, buffers, statements, tuple(_returns(d)), frozenset(made)))


def _returns(d: Draft) -> list[str]:
    """A few values that nothing else reads, and what makes outputs alias each other and the inputs."""
    mentioned = {name for s in d.statements for name in s.names - {v.name for v in s.defines}}
    made = [v for s in d.statements for v in s.defines]
    leaves = [v.name for v in made if v.name not in mentioned]
    chosen = [*leaves[-4:], *d.returned]
    if made and d.chance(0.3):
        again = d.draw.choice(made)
        chosen.append(
            d.one(again.name, f"{again.name}[:]" if again.shape else again.name, f"{again.name}.view(-1)")
            if again.contiguous
            else again.name
        )
    if d.chance(0.15):
        chosen.append(d.one("x", "c0", "self.buffer", "kv[0]", "c0[2:4]", "self.last", "state"))
    if d.chance(0.15):
        chosen.append(d.one("n", "n + m", "n * 2", "None", "k", "p + 1", "3"))
    d.draw.shuffle(chosen)
    return chosen or ["x * 2"]


def _used(program: Program) -> Program:
    """Without size statements that nothing needs, and what they keep."""
    for statement in program.statements[:3]:
        name = statement.text[0]
        rest = [s for s in program.statements if s is not statement]
        text = " ".join([*(s.text for s in rest), *program.returns])
        if not Statement(text).names & {name}:
            program = replace(program, statements=tuple(rest))
    return program.pruned()
