"""A program in the making, and the moves that lengthen it. One seed draws one program."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from .data import CONTIGUOUS, LAYOUTS, OVERLAPPING
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
        "pool": f"keep {t}[24,16]",
        "wide": f"{t}[4,q]",
        "total": f"keep {t}[]",
        "none": f"{t}[0,16]",
        "count": "keep int64[]",
        "number": "number",
        "scale": f"keep {t}[]",
    }
    buffers = ("w", "g", "buffer", "stack", "last", "scale")
    shapes |= _parts_of_others(d)
    if d.chance(0.5):
        caches = ("c0", "c1", "kv", "caches", "stack", "pool")
        for name in ("x", "r", "y", *caches, "state", "buffer", "wide"):
            if not shapes[name].startswith("=") and d.chance(0.7 if name in caches else 0.3):
                shapes[name] = _laid_out(d, name, shapes[name])
    names = list(shapes)
    if d.chance(0.5):  # Dynamo gives inputs in order of use, AOT in order of the signature
        d.draw.shuffle(names)
    names.sort(key=lambda name: -1 if shapes[name][0] != "=" else list(shapes).index(name))  # parts after their whole
    for name in names:
        spec = shapes[name]
        (d.buffers if name in buffers else d.inputs)[name] = spec
        *words, last = spec.split(" ")
        kind, _, dims = last.partition("[")
        if kind != t or name == "caches" or spec[0] == "=":
            continue
        shape = tuple(size for size in dims[:-1].split(",") if size)
        kept = name in ("c0", "c1", "kv", "state", "pool", "total") or name in buffers
        layout = next((word for word in words if word in LAYOUTS), "")
        written = name not in ("w", "g") and layout not in OVERLAPPING and (kept or d.chance(0.25))
        called = f"self.{name}" if name in buffers else name
        d.values.append(Value(called, shape, t, written, _is_plain(shapes, name)))
    for name, shape in (("c0", ("8", "16")), ("c1", ("8", "16")), ("kv", ("2", "8", "16")), ("r", ("n", "16"))):
        if shapes[name].startswith("="):
            shape = ("4", "16") if shapes[name] == "= c0[:4]" else shape
            contiguous = _is_plain(shapes, name)
            d.values.append(Value(name, shape, t, name != "r" or d.chance(0.5), contiguous))
    plain = _is_plain(shapes, "caches")
    d.values.extend(Value(f"caches[{i}]", ("8", "16"), t, contiguous=plain) for i in range(2))
    d.statements.append(Statement("n = x.shape[0]"))
    d.statements.append(Statement("m = y.shape[0]"))
    d.statements.append(Statement("p = past.shape[0]"))


def _parts_of_others(d: Draft) -> dict[str, str]:
    """Inputs that are one tensor, or lie in one storage, beside each other or not."""
    parts = {}
    if d.chance(0.06):
        parts["c1"] = "= c0"  # two layers share one cache
    if d.chance(0.03):
        parts["c1"] = d.one("= c0[:]", "= kv[0]", "= c0[:4]")
    if d.chance(0.12):
        parts["c0"] = d.one("= pool[3:11]", "= pool[1:9]", "= pool.view(-1)[5:133].view(8, 16)", "= pool[::3]")
        if d.chance(0.6):
            parts["c1"] = d.one("= pool[12:20]", "= pool[16:]", "= pool[7:15]", "= pool.view(12, 32)[:8, 16:]")
        if d.chance(0.3):
            parts["kv"] = d.one("= pool[4:20].view(2, 8, 16)", "= pool[8:].view(2, 8, 16)")
    if d.chance(0.05):
        parts["r"] = d.one("= x", "= x[:]")
    return parts


def _is_plain(shapes: dict[str, str], name: str) -> bool:
    """Whether an input is contiguous, which a part of one is that is and takes no columns or steps."""
    spec = shapes[name]
    if spec[0] == "=":
        whole = re.findall(r"\w+", spec)[0]
        return not {"::", ", "} & set(re.findall(r"::|, ", spec.split(".view(2")[0])) and _is_plain(shapes, whole)
    return not set(spec.split(" ")) & (set(LAYOUTS) - set(CONTIGUOUS))


def _laid_out(d: Draft, name: str, spec: str) -> str:
    """The same behind the word of a layout, which a tensor that is written holds each element of once."""
    *words, last = spec.split(" ")
    there = [word for word in LAYOUTS if word not in OVERLAPPING or name in ("y", "wide")] + [*CONTIGUOUS]
    if name == "pool":  # whose parts are views of other shapes
        there = list(CONTIGUOUS)
    if name == "state":
        there = ["inside", "odd", "gaps"]
    return " ".join([*words, d.one(*there), last])


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
        there = "x", "c0", "self.buffer", "kv[0]", "c0[2:4]", "self.last", "state", "x[1:]", "none", "pool[2:4]", "kv"
        chosen.append(d.one(*there, "caches[1][:, 4:8]", "total", "count", "r", "self.scale"))
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
