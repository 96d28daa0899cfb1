"""ringfence's own kernels, run from their sources on the CPU: ranks, memory, and an order that a seed decides."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ringfence.runtime.collectives.epilogue import Epilogue, RmsNorm
from ringfence.runtime.collectives.forms import GRANULE, CallArguments, Form, granules_of_token
from ringfence.runtime.collectives.lost import Lost
from ringfence.runtime.collectives.ringfence import MOST_BLOCKS, buffer_bytes
from ringfence.runtime.hazards.situation import Strategy

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "runtime/collectives/cuda"
ONE, TWO = Strategy.ONE_SHOT, Strategy.TWO_SHOT
EPS = 1e-6
SUM = Epilogue()
NORM = Epilogue(norm=RmsNorm(EPS))
FUSED = Epilogue(True, RmsNorm(EPS))
GEMMA = Epilogue(True, RmsNorm(EPS, 1.0))
BARE = Epilogue(True, RmsNorm(EPS, has_weight=False))


def missing() -> str | None:
    return None if shutil.which("g++") else "needs g++"


@dataclass(frozen=True)
class Step:
    """A call of all ranks that are ``present``. blocks: that share a token; grid: tokens at a time, by rank."""

    tokens: int
    strategy: Strategy = ONE
    hidden: int = 224
    epilogue: Epilogue = FUSED
    blocks: int = 1
    grid: tuple[int, ...] = (8,)
    dtype: torch.dtype = torch.bfloat16
    payload: str = "ordinary"
    present: tuple[int, ...] | None = None

    def granules(self, world_size: int) -> int:
        """That a token needs of an inbox."""
        return granules_of_token(self.strategy, self.hidden * self.dtype.itemsize, world_size)

    def form(self, world_size: int) -> Form:
        norm = self.epilogue.norm
        row_bytes = self.hidden * self.dtype.itemsize
        weight = norm is not None and norm.has_weight
        shape = (self.strategy, self.dtype, world_size, row_bytes)
        return Form(*shape, self.epilogue.residual, norm is not None, weight, self.blocks)


def library(forms: Sequence[Form], folder: Path, *changes: tuple[str, str]) -> Any:
    """The kernels of these forms, from their sources. changes: texts of them, and what to put in their places."""
    files = ("elements.cuh", "protocol.cuh", "common.cuh", "one_shot.cu", "two_shot.cu")
    source = "\n".join((SOURCES / name).read_text() for name in files)
    for before, after in changes:
        assert source.count(before) == 1, f"{source.count(before)} of {before!r}"
        source = source.replace(before, after)
    shared = "__shared__ Shared<F> shared;"
    assert source.count(shared) == 2
    source = source.replace(shared, "Shared<F> &shared = cpu::block_shared<Shared<F>>();")
    kinds = ",\n".join(
        f"{{{form.body}, {form.threads}, {form.blocks if form.norm else 1}, "
        f"sizeof(Shared<{form.body.split('<', 1)[1][:-1]}>)}}"
        for form in forms
    )
    parts = ['#include "cuda_on_cpu.h"', source, f"static const cpu::Kind KINDS[] = {{\n{kinds}\n}};"]
    text = "\n".join([*parts, '#include "cuda_on_cpu_end.h"', ""])
    place = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if not place.exists():
        code = place.with_suffix(".cpp")
        code.write_text(text)
        compiler = ["g++", "-std=c++17", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing", "-fPIC", "-w"]
        ranks = folder / "ranks_on_cpu.o"  # what runs them is most of what there is to compile, and the same for all
        if not ranks.exists():
            subprocess.run([*compiler, "-O2", "-c", str(HERE / "ranks_on_cpu.cpp"), "-o", str(ranks)], check=True)
        subprocess.run([*compiler, "-O0", "-shared", f"-I{HERE}", str(code), str(ranks), "-o", str(place)], check=True)
    return ctypes.CDLL(str(place))


class Asked(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("kind", "grid", "rank", "index")),
        *((name, ctypes.c_ulonglong) for name in ("input", "residual", "bytes", "used")),
    )


class Schedule(ctypes.Structure):
    """What a run is like: ``cpu::Schedule``."""

    _fields_ = (
        ("seed", ctypes.c_uint),
        *((name, ctypes.c_int) for name in ("waits", "torn", "slots", "late", "drowsy", "slow")),
        ("held", ctypes.c_longlong),
        *((name, ctypes.c_ulonglong) for name in ("held_for", "most")),
    )


@dataclass
class Outcome:
    """fault: what no run may do; None where it was right. lost: by rank, what its kernels reported.

    early: how many kernels began while blocks of the one before worked. held: the address of the line that was held up.
    """

    fault: str | None
    turns: int
    lost: list[Lost | None]
    outputs: list[list[tuple[Tensor, Tensor]]]
    counts: list[tuple[int, int]]
    early: int
    held: int | None


@dataclass
class Ranks:
    """The memory of all ranks. A program may be run after another. made: how many calls were made before the first."""

    world_size: int
    steps: Sequence[Step]
    folder: Path
    changes: Sequence[tuple[str, str]] = ()
    bound: int = 1 << 40
    made: int = 0
    buffers: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.forms = list(dict.fromkeys(step.form(self.world_size) for step in self.steps))
        self.library = library(self.forms, self.folder, *self.changes)
        self.size = max(buffer_bytes(self.world_size, s.tokens, s.hidden * s.dtype.itemsize) for s in self.steps)
        self.inboxes = [self._memory(2 * self.size) for _ in range(self.world_size)]
        counted = torch.tensor([self.made * MOST_BLOCKS])
        self.begun = [counted.clone() for _ in range(self.world_size)]
        self.received = [counted.clone() for _ in range(self.world_size)]
        self.broken = [torch.zeros(1, dtype=torch.int32) for _ in range(self.world_size)]
        self.bounds = [torch.full((1,), self.bound, dtype=torch.int64) for _ in range(self.world_size)]
        self.reports = [torch.zeros(8, dtype=torch.int32) for _ in range(self.world_size)]
        self.inputs = [make_inputs(step, self.world_size, i) for i, step in enumerate(self.steps)]

    def _memory(self, size: int) -> int:
        self.buffers.append(torch.zeros(size + 128, dtype=torch.uint8))
        return -(-self.buffers[-1].data_ptr() // 128) * 128

    def run(
        self,
        seed: int,
        *,
        waits: bool = True,
        torn: bool = False,
        slots: int = 0,
        asleep: int = -1,
        drowsy: int = 0,
        slow: int = 0,
        held: tuple[int, int] = (-1, 0),
        most: int = 400_000,
    ) -> Outcome:
        """Once, in the order that the seed decides. The rest is as in ``cpu::Schedule``; held: a line, and how long."""
        count = len(self.steps)
        asked, calls = (Asked * (count * self.world_size))(), (CallArguments * (count * self.world_size))()
        outputs: list[list[tuple[Tensor, Tensor]]] = []
        read: list[Tensor] = []
        for rank in range(self.world_size):
            outputs.append([])
            for i, step in enumerate(self.steps):
                inputs, residual, weight = self.inputs[i]
                norm, out, *reads = (torch.full_like(residual, 7.0) for _ in range(4))
                outputs[-1].append((norm, out))
                read += reads
                call = calls[rank * count + i]
                call.input, call.residual, call.weight = (t.data_ptr() for t in (*reads, weight))
                call.norm, call.out, call.inbox = norm.data_ptr(), out.data_ptr(), self.inboxes[rank]
                call.peers[: self.world_size - 1] = [a for r, a in enumerate(self.inboxes) if r != rank]
                call.begun, call.received = self.begun[rank].data_ptr(), self.received[rank].data_ptr()
                call.broken = self.broken[rank].data_ptr()
                call.bound, call.report = self.bounds[rank].data_ptr(), self.reports[rank].data_ptr()
                call.buffer_bytes, call.tokens, call.rank = self.size, step.tokens, rank
                after = step.epilogue.norm
                call.eps, call.weight_bias = EPS, after.weight_bias if after else 0.0
                here = step.present is None or rank in step.present
                grid = min(step.tokens, step.grid[rank % len(step.grid)]) * step.blocks if here else 0
                kind, size = self.forms.index(step.form(self.world_size)), residual.nbytes
                used = step.tokens * step.granules(self.world_size) * GRANULE
                fed = inputs[rank].data_ptr(), residual.data_ptr(), size, used
                asked[rank * count + i] = Asked(kind, grid, rank, i, *fed)
        schedule = Schedule(seed, waits, torn, slots, asleep, drowsy, slow, *held, most)
        turns, early, line, fault = ctypes.c_ulonglong(), ctypes.c_ulonglong(), ctypes.c_void_p(), ctypes.c_char_p()
        told = map(ctypes.byref, (schedule, turns, early, line, fault))
        code = self.library.play(self.world_size, count, asked, calls, *told)
        said = {0: None, 1: f"not done within {most} turns", 2: (fault.value or b"").decode()}[code]
        counts = [(int(b), int(r)) for b, r in zip(self.begun, self.received, strict=True)]
        reports = [[w & 0xFFFFFFFF for w in report.tolist()] for report in self.reports]
        lost = [Lost.read(report) if report[0] else None for report in reports]
        return Outcome(said, turns.value, lost, outputs, counts, early.value, line.value)

    def wrong(self, outcome: Outcome, *steps: int) -> str | None:
        """The first output, of ``steps`` or of all, that is not what plain torch makes of the inputs."""
        for i, step in enumerate(self.steps):
            if steps and i not in steps:
                continue
            for rank in step.present or range(self.world_size):
                norm, out = outcome.outputs[rank][i]
                if trouble := self._trouble(i, step, norm, out, outcome.outputs[(step.present or (0,))[0]][i]):
                    return f"rank {rank}, step {i}: {trouble}"
        return None

    def row_of(self, line: int, step: Step) -> tuple[int, bool]:
        """Of a line at this address, in a call of ``step``: its token, and whether it is of a sum."""
        at = next(line - inbox for inbox in self.inboxes if 0 <= line - inbox < 2 * self.size) % self.size
        token, granule = divmod(at // GRANULE, step.granules(self.world_size))
        sums = step.strategy is TWO and granule >= step.granules(self.world_size) - step.form(self.world_size).granules
        return token, sums

    def silent(self, outcome: Outcome) -> str | None:
        """The first row that is neither right nor all NaN, or is NaN without a report, or is not NaN after one."""
        for rank, lost in enumerate(outcome.lost):
            for i, step in enumerate(self.steps):
                late = lost is not None and i + self.made + 1 > lost.call
                if step.present is not None and rank not in step.present:
                    continue
                if trouble := self._silence(step, i, outcome.outputs[rank][i], lost is not None, late):
                    return f"rank {rank}, step {i}: {trouble}"
        return None

    def _silence(self, step: Step, i: int, outputs: tuple[Tensor, Tensor], told: bool, late: bool) -> str | None:
        right_norm, right = expected(step, *self.inputs[i])
        norm, out = outputs
        nan = out.isnan().all(-1)
        whole = ~nan & ~out.isnan().any(-1)
        if step.epilogue.norm is not None:
            close = (norm.double() - right_norm).abs() <= 2.0**-8 * right_norm.abs() + 1e-6
            nan, whole = nan & norm.isnan().all(-1), whole & close.all(-1)
        if not (nan | whole & (bits(out) == bits(right)).all(-1)).all():
            return "a row is neither right nor NaN"
        if nan.any() and not told:
            return "NaN that nobody reports"
        return "a call after one that was lost returns something" if late and not nan.all() else None

    def _trouble(self, i: int, step: Step, norm: Tensor, out: Tensor, first: tuple[Tensor, Tensor]) -> str | None:
        right_norm, right = expected(step, *self.inputs[i])
        if not same(out, right):
            return f"the sum differs in {int((bits(out) != bits(right)).sum())} elements"
        if step.epilogue.norm is None:
            return None
        if not same(norm, first[0]):
            return "the norm has other bits than on the first rank"
        error = (norm.double() - right_norm).abs() / (right_norm.abs() + torch.finfo(norm.dtype).smallest_normal)
        rounding = 2.0**-8 if norm.dtype == torch.bfloat16 else 2.0**-19
        finite = right_norm.isfinite()
        if not torch.equal(norm.isfinite(), finite):
            return "the norm is finite elsewhere"
        worst = float(error[finite].max()) if finite.any() else 0.0
        return f"the norm is off by {worst:.3g}" if worst > rounding else None


def make_inputs(step: Step, world_size: int, seed: int) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 100)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(step.dtype)  # noqa: E731
    inputs = [draw(step.tokens, step.hidden) for _ in range(world_size)]
    for rank, x in enumerate(inputs):
        words = bits(x)
        match step.payload:
            case "nan":
                x[:, rank::5] = float("nan")
            case "infinite":
                x[0] = float("inf")
            case "negative zero":
                x[:] = -0.0
            case "0x8005":
                words[:] = -32763 if x.element_size() == 2 else -2147155963
            case "numbers":  # what a flag looks like
                words[:] = 1
    return inputs, draw(step.tokens, step.hidden), draw(step.hidden)


def expected(step: Step, inputs: list[Tensor], residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = inputs[0].float()
    for x in inputs[1:]:
        total = total + x.float()
    out = total.to(step.dtype)
    if step.epilogue.residual:
        out = (out.float() + residual.float()).to(step.dtype)
    after = step.epilogue.norm or RmsNorm(EPS)
    norm = out.double() * torch.rsqrt(out.double().square().mean(-1, keepdim=True) + EPS)
    return (norm * (weight.double() + after.weight_bias) if after.has_weight else norm), out


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


def same(a: Tensor, b: Tensor) -> bool:
    return bool(((bits(a) == bits(b)) | (a.isnan() & b.isnan())).all())


__all__ = ["BARE", "FUSED", "GEMMA", "NORM", "ONE", "SUM", "TWO", "Outcome", "Ranks", "Step", "make_inputs", "missing"]
