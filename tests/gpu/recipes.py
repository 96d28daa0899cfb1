"""The recipes of docs/reproduce.md: mnnvl's fused op in a model that the backend splits, captures and replays.

Both ranks are here, in one process and on one GPU (:mod:`.emulate`): the op of the model is the call of both, each on
its own stream. So a step is what the report describes, piece after piece, and what may hang is FlashInfer's own kernel.

:func:`run` is called in a child (:mod:`.children`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

import ringfence
from gpu import emulate
from gpu.cases import BOUND, DEADLINE, NEVER, RETURNED, WRONG, flush
from gpu.children import progress

LAYERS, TOKENS, HIDDEN, STEPS = 2, 16, 4096, 4
#: Of the tokens of the last step so many are somebody's; the rows after them are padding that nobody writes.
ASKED = 13
#: What lies in memory that nobody writes: of a pair of bfloat16 that is a word, the second is a negative subnormal.
LEFT_OVER = (0x3F80, 0x8005 - 2**16)

ATTENTION, FUSED, REFERENCE = (f"reproduce::{name}" for name in ("attention", "all_reduce_add_rms_norm", "reference"))


@dataclass(frozen=True)
class Recipe:
    """capture: whether sizes are captured at all. split: whether the fused op runs between the pieces."""

    title: str
    capture: bool
    split: bool


RECIPES = {
    "A": Recipe("mnnvl fusion captured inside the pieces", True, False),
    "B": Recipe("the fused op as a split op between captured pieces", True, True),
    "eager": Recipe("nothing captured", False, False),
}

#: How the op is carried out, and what the padding holds.
PUBLISHED, CLEANED, BY_REFERENCE, NO_LEFT_OVERS = "as published", "payload cleaned", "by the reference", "no padding"


class Kernels(Protocol):
    """Carries out the call of both ranks, on the current stream. Pairs are by rank, of (tokens, HIDDEN)."""

    weight: Tensor

    def launch(self, x: Sequence[Tensor], residual: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """out: the norm of both ranks, then the residual of both."""

    def returned(self) -> bool:
        """Whether all that was launched completes in time."""


class RealKernels:
    """FlashInfer's, of one release."""

    def __init__(self, release: str, weight: Tensor) -> None:
        self.weight = weight
        self._emulation = emulate.Mnnvl(release, weight, TOKENS, aliased=release != "0.6.18.post1")

    def launch(self, x: Sequence[Tensor], residual: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        here = torch.cuda.current_stream()
        for stream in emulate.streams():
            stream.wait_stream(here)
        for rank, stream in enumerate(emulate.streams()):
            with torch.cuda.stream(stream):
                self._emulation.launch(rank, emulate.Step(False, x[rank], residual[rank], out[rank], out[2 + rank]))
        for stream in emulate.streams():
            here.wait_stream(stream)

    def returned(self) -> bool:
        return all(emulate.poll([torch.cuda.current_stream().record_event()], DEADLINE))


def run(fields: dict[str, Any]) -> dict[str, Any]:
    """``kind`` of what the kernels did, the ``step`` in which, and the ``plan`` that the backend made of the model."""
    device = torch.device("cuda", torch.cuda.current_device())
    weight = _weight(device)
    return serve(RealKernels(fields["release"], weight), fields["recipe"], fields["how"], device)


def serve(kernels: Kernels, recipe: str, how: str, device: torch.device) -> dict[str, Any]:
    """Compile the model, run its steps, compare what they return. Ops and graphs are this process's."""
    bench = _Bench(kernels, RECIPES[recipe], how, device)
    outcome: dict[str, Any] = {"recipe": recipe, "how": how, "plan": ""}
    for step in range(STEPS):
        outcome |= {"step": step}
        progress(**outcome)
        right = bench.step(step)
        outcome |= {"plan": bench.plan}
        if not kernels.returned():
            return outcome | {"kind": NEVER, "stuck": True}
        if not right():
            return outcome | {"kind": WRONG}
    return outcome | {"kind": RETURNED}


class _Bench:
    def __init__(self, kernels: Kernels, recipe: Recipe, how: str, device: torch.device) -> None:
        self._kernels, self._how, self._device = kernels, how, device
        self._asked = TOKENS
        #: What the backend would put in front of a fused site of its own.
        self._clean: Callable[[Tensor], Tensor] = flush(torch.bfloat16) if how == CLEANED else torch.clone
        self._left_over = torch.tensor(LEFT_OVER, dtype=torch.int16, device=device).view(torch.bfloat16)
        self._define_ops()
        gc.collect()  # the ops of these names that a bench before had take the names along when they die, in mid-run
        split = [ATTENTION, REFERENCE, *[FUSED] * recipe.split]
        self._backend = ringfence.Backend(
            capture_sizes=[TOKENS] if recipe.capture else (),
            split_ops=split,
            piece_compiler="eager",
            graphs="auto" if device.type == "cuda" else "simulated",
        )
        torch._dynamo.reset()
        self._model = torch.compile(self._layers, backend=self._backend, fullgraph=True)

    @property
    def plan(self) -> str:
        (report,) = self._backend.reports
        islands = sum(piece.island for piece in report.pieces)
        captured = f"{len(report.pieces) - islands} captured pieces" if report.captured else "nothing captured"
        return f"{captured}, {islands} islands"

    def _layers(self, *x: Tensor) -> tuple[Tensor, ...]:
        """x: the input of both ranks, then the residual of both. Between ops that split there is work of a piece.

        It only moves what the padding holds: arithmetic might flush it.
        """
        ops = torch.ops.reproduce
        fused = ops.reference if self._how == BY_REFERENCE else ops.all_reduce_add_rms_norm
        for _ in range(LAYERS):
            attended = [ops.attention(part) for part in x[:2]]  # both before what follows, or there are pieces between
            y = [self._clean(part) for part in attended]
            norm0, norm1, *residual = fused(*y, *x[2:])
            x = (norm0 + 0.25, norm1 + 0.25, *residual)
        return x

    def step(self, step: int) -> Callable[[], bool]:
        """Run one; the answer, once it has returned, is whether the rows that somebody asked for are right."""
        last = step == STEPS - 1
        self._asked = ASKED if last and self._how != NO_LEFT_OVERS else TOKENS
        generator = torch.Generator().manual_seed(step)
        rows = [emulate.ordinary(generator, TOKENS, HIDDEN).bfloat16() for _ in range(3)]
        rows.append(rows[2])
        here = [tensor.to(self._device) for tensor in rows]
        with torch.no_grad():
            found = self._model(*here)
        asked = self._asked
        return lambda: _close([f[:asked].cpu() for f in found], _expected(rows, self._kernels.weight.cpu(), asked))

    def _define_ops(self) -> None:
        """Ops that a compiler cannot look into, as an engine's are."""

        @torch.library.custom_op(ATTENTION, mutates_args=())
        def attention(x: Tensor) -> Tensor:
            """Writes the rows that somebody asked for into memory that holds what was left there."""
            out = torch.empty_like(x)
            out.view(TOKENS, -1, 2).copy_(self._left_over)
            out[: self._asked] = x[: self._asked]
            return out

        @torch.library.custom_op(FUSED, mutates_args=())
        def fused(x0: Tensor, x1: Tensor, r0: Tensor, r1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            out = torch.empty_like(x0), torch.empty_like(x0), torch.empty_like(x0), torch.empty_like(x0)
            self._kernels.launch((x0, x1), (r0, r1), out)
            return out

        @torch.library.custom_op(REFERENCE, mutates_args=())
        def by_reference(x0: Tensor, x1: Tensor, r0: Tensor, r1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            norm, added = (t.to(x0.dtype) for t in emulate.reference(x0 + x1, r0, self._kernels.weight))
            return norm, norm.clone(), added, added.clone()

        for op in (attention, fused, by_reference):
            op.register_fake(_like_the_input if op is attention else _four_like_the_input)


def _like_the_input(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _four_like_the_input(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for _ in range(4))


def _weight(device: torch.device) -> Tensor:
    return (1 + emulate.ordinary(torch.Generator().manual_seed(7), HIDDEN) / 4).to(device, torch.bfloat16)


def _expected(rows: Sequence[Tensor], weight: Tensor, asked: int) -> list[Tensor]:
    """In float32, of the rows that somebody asked for: each is on its own."""
    x0, x1, residual = (tensor[:asked].float() for tensor in rows[:3])
    for _ in range(LAYERS):
        norm, residual = emulate.reference(x0 + x1, residual, weight)
        x0 = x1 = norm + 0.25
    return [x0, x1, residual, residual]


def _close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Each layer rounds as often as a call of :mod:`.cases`."""
    bound = LAYERS * BOUND[torch.bfloat16]
    scales = [e.square().mean(-1, keepdim=True).sqrt() + e.abs() for e in expected]
    return all(
        bool(((f.float() - e).abs() <= bound * s).all()) for f, e, s in zip(found, expected, scales, strict=True)
    )
