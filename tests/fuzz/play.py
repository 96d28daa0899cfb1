"""Play a program for a few steps, as it is or compiled, and record all that it touched."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
import torch.nn.functional as F
from torch import Tensor, nn

from . import data, ops
from .program import Program

Compile = Callable[[nn.Module], Callable[..., Any]]


@dataclass(frozen=True)
class Plan:
    """The steps: the sizes of each, which of the caches it is given, and what it feeds back.

    alternate: caches come in two sets, which take turns. feed: an output becomes the next step's ``x``.
    vary: numbers that are arguments change from step to step.
    """

    steps: tuple[tuple[int, int, int], ...]
    alternate: bool = False
    feed: bool = False
    vary: bool = False
    mark_static: bool = False
    mark_dynamic: bool = False
    inference_mode: bool = False
    device: str = "cpu"


@dataclass
class Record:
    """What a step left: its outputs, what it was given, the module's buffers, the last step's outputs; op calls.

    around: the storages of tensors that lie inside of one.
    """

    outputs: list[Any]
    arguments: dict[str, Any]
    buffers: dict[str, Any]
    held: list[Any]
    around: dict[str, Any]
    counts: dict[str, int]

    def items(self) -> Iterator[tuple[str, Any]]:
        yield from ((f"output {i}", value) for i, value in enumerate(self.outputs))
        yield from ((f"argument '{name}'", value) for name, value in self.arguments.items())
        yield from ((f"buffer '{name}'", value) for name, value in self.buffers.items())
        yield from ((f"last step's output {i}", value) for i, value in enumerate(self.held))
        yield from ((f"the storage of {name}", value) for name, value in self.around.items())


class PlayError(Exception):
    """The program raised in a step."""


def make_module(program: Program, device: str = "cpu") -> nn.Module:
    """A module whose forward is the program, with buffers of fixed random data."""
    source = program.source()
    name = f"<fuzz {hash(source):x}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    scope: dict[str, Any] = {"torch": torch, "dist": dist, "fc": fc, "F": F, "GROUP": "0"}
    exec(compile(source, name, "exec"), scope)
    module = type("Model", (nn.Module,), {"forward": scope["forward"]})()
    rank = dist.get_rank() if dist.is_initialized() else 0
    for i, (buffer, spec) in enumerate(program.buffers):
        generator = torch.Generator().manual_seed(1000 * (rank if spec.startswith("weight") else 0) + i)
        kind, _, spec = spec.partition(" ")
        tensor = data.tensor(spec, {}, generator, device)
        tensor = tensor / 4 if kind == "weight" else tensor + 1 if kind == "norm" else tensor
        if kind == "keep":
            module.register_buffer(buffer, tensor, persistent=i % 2 == 0)
        else:
            module.register_parameter(buffer, nn.Parameter(tensor, requires_grad=False))
    return module.eval()


class Stage:
    """A module and the caches that it is given. Every play starts from the same values in the same memory."""

    def __init__(self, program: Program, plan: Plan) -> None:
        self.module = make_module(program, plan.device)
        self._program, self._plan = program, plan
        self._kept: dict[tuple[str, int], Any] = {}
        self._before = [data.whole(t).clone() for t in self.module.buffers()]

    def play(self, call: Callable[..., Any]) -> list[Record]:
        """Run the steps. The same data whoever calls. Raises :class:`PlayError` from what the program raised."""
        plan = self._plan
        records: list[Record] = []
        fed, last = None, []
        for buffer, before in zip(self.module.buffers(), self._before, strict=True):
            data.whole(buffer).copy_(before)
        started: set[tuple[str, int]] = set()
        with torch.inference_mode() if plan.inference_mode else torch.no_grad():
            for i, sizes in enumerate(plan.steps):
                arguments = self._arguments(i, started)
                inside = {name: t for name, t in arguments.items() if _lies_inside(t)}
                if fed is not None and plan.feed and "x" in arguments and fed.shape == arguments["x"].shape:
                    arguments["x"] = fed
                ops.calls.clear()
                torch.manual_seed(i)
                try:
                    outputs = list(call(*arguments.values()))
                except Exception as error:
                    raise PlayError(f"step {i}, sizes {sizes}: {_reason(error)}") from error
                counts = {k: n for k, n in ops.calls.items() if k.endswith("_unsafe") and k not in ops.PURE}
                outputs = [_waited(o) for o in outputs]
                buffers = dict(self.module.named_buffers())
                around = {n: data.whole(t) for n, t in (inside | buffers).items() if _lies_inside(t)}
                seen = (outputs, arguments, buffers, last, around)
                records.append(Record(*map(_copies, seen), counts))
                last = outputs
                fed = next((o for o in outputs if isinstance(o, Tensor) and o.ndim == 2 and o.shape[1] == 16), None)
                if fed is not None and _share_memory(arguments.get("x"), outputs):
                    fed = fed.clone()  # a static output is written again, and with it the view of it that is returned
        return records

    def _arguments(self, step: int, started: set[tuple[str, int]]) -> dict[str, Any]:
        plan, (n, m, p) = self._plan, self._plan.steps[step]
        sizes = {"n": n, "m": m, "p": p, "q": 2 * n + p}
        given: dict[str, Any] = {}
        rank = dist.get_rank() if dist.is_initialized() else 0
        for i, (name, spec) in enumerate(self._program.inputs):
            key = (name, step % 2 if plan.alternate else 0)
            generator = torch.Generator().manual_seed(100 * step + i + 7919 * (rank if name == "x" else 0))
            if spec.startswith("keep "):
                if key not in started:
                    self._start(key, _data(spec.removeprefix("keep "), sizes, generator, plan))
                    started.add(key)
                given[name] = self._kept[key]
            elif spec.startswith("="):
                given[name] = eval(spec[1:], {**given})
            else:
                given[name] = _data(spec, sizes, generator, plan)
                if plan.mark_dynamic and isinstance(given[name], Tensor):
                    for dim, size in enumerate(spec.partition("[")[2][:-1].split(",")):
                        if size in sizes:
                            torch._dynamo.maybe_mark_dynamic(given[name], dim)
        return given

    def _start(self, key: tuple[str, int], value: Any) -> None:
        """Give a cache its first values; a cache of an earlier play keeps its memory."""
        if key in self._kept:
            there = self._kept[key]
            for old, new in zip(*((v if isinstance(v, list) else [v]) for v in (there, value)), strict=True):
                data.whole(old).copy_(data.whole(new))
            return
        self._kept[key] = value
        if self._plan.mark_static:
            for tensor in value if isinstance(value, list) else [value]:
                torch._dynamo.mark_static_address(tensor)


def _waited(output: Any) -> Any:
    if isinstance(output, tuple) and output[0] == "unwaited":
        return torch.ops._c10d_functional.wait_tensor(output[1])
    return output


def _share_memory(given: Any, outputs: list[Any]) -> bool:
    known = [t for t in (given, *outputs) if type(t) is Tensor]  # one that is unwaited lies nowhere yet
    places = [t.untyped_storage().data_ptr() for t in known]
    return bool(known) and known[0] is given and places[0] in places[1:]


def _lies_inside(value: Any) -> bool:
    return isinstance(value, Tensor) and value.untyped_storage().nbytes() != value.numel() * value.itemsize


def _copies(values: Any) -> Any:
    """A snapshot of nested values."""
    if isinstance(values, Tensor):
        return values.detach().clone()
    if isinstance(values, list | tuple):
        return type(values)([_copies(v) for v in values])
    if isinstance(values, dict):
        return {name: _copies(v) for name, v in values.items()}
    return values


def _reason(error: BaseException) -> str:
    inner = getattr(error, "inner_exception", None) or error
    return f"{type(inner).__name__}: {str(inner)[:600]}"


def _data(spec: str, sizes: dict[str, int], generator: torch.Generator, plan: Plan) -> Any:
    if spec in ("int", "float"):
        second = plan.vary and float(torch.rand((), generator=generator)) < 0.5
        return {"int": (1, 2), "float": (0.5, 0.25)}[spec][second]
    if spec == "number":  # on the CPU, as "host"
        return torch.randint(0, 4, (), generator=generator)
    if spec.startswith("host "):  # on the CPU, whatever the device of the model
        return torch.randint(0, 100, (sizes["n"],), generator=generator)
    if spec.startswith("list "):
        return [data.tensor(spec.removeprefix("list "), sizes, generator, plan.device) for _ in range(2)]
    return data.tensor(spec, sizes, generator, plan.device)
