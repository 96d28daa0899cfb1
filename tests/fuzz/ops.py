"""Ops like those that engines register: they write into arguments, return pairs, count on the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LIBRARY = torch.library.Library("fz", "DEF")

#: How often each op ran, by name. A split-off op runs in every step, a captured one in none.
calls: Counter[str] = Counter()

#: Ops that write nothing: where nobody reads the result, they need not run.
PURE = ("pure_unsafe", "peek_unsafe", "parts_unsafe", "inside_unsafe", "turned_unsafe", "either_unsafe")


def _define(schema: str, fake: Callable[..., Any], *, unsafe: bool = False) -> Callable[[Callable[..., Any]], None]:
    """Register an op; ``unsafe`` registers a twin ``NAME_unsafe`` with the tag that bars it from captures."""
    name, _, signature = schema.partition("(")

    def register(body: Callable[..., Any]) -> None:
        for op, tags in ((name, ()), (f"{name}_unsafe", (torch.Tag.cudagraph_unsafe,)))[: 2 if unsafe else 1]:

            def run(*args: Any, _op: str = op, **kwargs: Any) -> Any:
                calls[_op] += 1
                return body(*args, **kwargs)

            _LIBRARY.define(f"{op}({signature}", tags=tags)
            _LIBRARY.impl(op, run, "CompositeExplicitAutograd")
            torch.library.register_fake(f"fz::{op}", fake, lib=_LIBRARY)

    return register


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@_define("attn(Tensor q, Tensor(a!) cache, Tensor(b!) out) -> ()", _nothing, unsafe=True)
def _attn(q: Tensor, cache: Tensor, out: Tensor) -> None:
    cache[: q.shape[0]].mul_(0.5).add_(q)
    out.copy_(q + cache.mean(0))


@_define("append(Tensor(a!) cache, Tensor x, Tensor pos) -> ()", _nothing, unsafe=True)
def _append(cache: Tensor, x: Tensor, pos: Tensor) -> None:
    cache[pos] = x


@_define("pure(Tensor x) -> Tensor", _like, unsafe=True)
def _pure(x: Tensor) -> Tensor:
    return torch.cos(x)


@_define("pair(Tensor x) -> (Tensor, Tensor)", lambda x: (torch.empty_like(x), x.new_empty(x.shape[-1:])))
def _pair(x: Tensor) -> tuple[Tensor, Tensor]:
    return x * 0.5, x.reshape(-1, x.shape[-1]).mean(0)


@_define("exchange(Tensor x, Tensor(a!) state) -> Tensor", lambda x, state: torch.empty_like(state), unsafe=True)
def _exchange(x: Tensor, state: Tensor) -> Tensor:
    old = state.clone()
    state.copy_(x)
    return old


@_define("maybe(Tensor x, Tensor(a!)? cache) -> Tensor", _like)
def _maybe(x: Tensor, cache: Tensor | None) -> Tensor:
    if cache is None:
        return x + 1
    cache.mul_(0.5).add_(x.mean())
    return x + cache.mean()


@_define("many(Tensor x, Tensor(a!)[] caches) -> ()", _nothing, unsafe=True)
def _many(x: Tensor, caches: Sequence[Tensor]) -> None:
    for i, cache in enumerate(caches):
        cache.mul_(0.5).add_(x.mean() + i)


@_define("out(Tensor x, *, Tensor(a!) out) -> ()", _nothing)
def _out(x: Tensor, *, out: Tensor) -> None:
    out.copy_(torch.sin(x) + 1)


@_define("add_norm_(Tensor(a!) x, Tensor(b!) residual, Tensor weight) -> ()", _nothing)
def _add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> None:
    residual.add_(x)
    x.copy_(F.rms_norm(residual, (residual.shape[-1],), weight, 1e-5))


@_define("scale_(Tensor(a!) x, float by) -> ()", _nothing)
def _scale(x: Tensor, by: float) -> None:
    x.mul_(by)


@_define("two(Tensor x, Tensor(a!) a, Tensor(b!) b) -> Tensor", _like)
def _two(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    old = a.mean()
    a.mul_(0.5).add_(b.mean())
    b.mul_(0.5).add_(old)
    return x + old


@_define(
    "tally(Tensor x, Tensor(a!) a) -> (Tensor, Tensor)",
    lambda x, a: (torch.empty_like(x), a.new_empty(())),
    unsafe=True,
)
def _tally(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    a.mul_(0.5).add_(x.mean())
    return x + a.mean(), a.sum()


@_define("head(Tensor x, SymInt rows) -> Tensor", lambda x, rows: x.new_empty((rows, *x.shape[1:])))
def _head(x: Tensor, rows: int) -> Tensor:
    return x[:rows] * 2


@_define("peek(Tensor x) -> Tensor", _like, unsafe=True)
def _peek(x: Tensor) -> Tensor:
    return x + float(x.sum() > 0)


@_define("parts(Tensor x) -> Tensor[]", lambda x: [torch.empty_like(x), x.new_empty(x.shape[1:])], unsafe=True)
def _parts(x: Tensor) -> list[Tensor]:
    return [x * 0.5, torch.tanh(x.sum(0))]


@_define(
    "keep(Tensor x, Tensor(a!)[] caches) -> Tensor[]",
    lambda x, caches: [torch.empty_like(c) for c in caches],
    unsafe=True,
)
def _keep(x: Tensor, caches: Sequence[Tensor]) -> list[Tensor]:
    """What was there before, of each cache."""
    old = [cache.clone() for cache in caches]
    for cache in caches:
        cache.mul_(0.5).add_(x.mean())
    return old


@_define(
    "either(Tensor?[] xs) -> Tensor", lambda xs: torch.empty_like(next(x for x in xs if x is not None)), unsafe=True
)
def _either(xs: Sequence[Tensor | None]) -> Tensor:
    """The sum of a tensor and of what is broadcast to it; None is nothing."""
    first, *rest = (x for x in xs if x is not None)
    return torch.tanh(first) + sum(x.mean() for x in rest)


@_define("nothing(Tensor x, Tensor(a!)? out) -> ()", _nothing, unsafe=True)
def _nothing_or_out(x: Tensor, out: Tensor | None) -> None:
    if out is not None:
        out.add_(x.mean())


def _make_inside(x: Tensor) -> Tensor:
    return x.new_zeros((x.shape[0] + 3, *x.shape[1:]))[3:]


@_define("inside(Tensor x) -> Tensor", _make_inside, unsafe=True)
def _inside(x: Tensor) -> Tensor:
    """What begins inside of its storage."""
    return _make_inside(x).copy_(torch.cos(x))


def _make_turned(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[1], x.shape[0])).t()


@_define("turned(Tensor x) -> Tensor", _make_turned, unsafe=True)
def _turned(x: Tensor) -> Tensor:
    return _make_turned(x).copy_(torch.cos(x))
