"""Two ranks whose local work differs, an engine's own all-reduce, collectives that nobody waits for."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
import torch.nn.functional as F
from cases.ranks import CAPTURED, H, Layer, all_reduced, data, program, ranks_serve
from cases.serve import difference
from torch import Tensor, nn

import ringfence

# -- ranks whose local work differs ----------------------------------------------------------


class BiasInTheLinear(Layer):
    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        y = F.linear(x, self.w[0], self.b if dist.get_rank() == 0 else None)
        return self.norm(r + all_reduced(y))


class BiasBehind(Layer):
    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ self.w[0]
        if dist.get_rank() == 0:
            y = y + self.b
        return self.norm(r + all_reduced(y))


class UnevenExperts(Layer):
    def __init__(self) -> None:
        super().__init__(experts=3 - dist.get_rank())

    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.stack([F.silu(x @ e) for e in self.w]).sum(0)
        return self.norm(r + all_reduced(y))


class NoExpertOnRank1(Layer):
    def __init__(self) -> None:
        super().__init__(experts=1 - dist.get_rank())

    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.zeros_like(x)
        for e in self.w:
            y = y + torch.tanh(x @ e)
        return self.norm(r + all_reduced(y))


class LogitsOnRank0(Layer):
    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        h, r = self.norm(r + all_reduced(x @ self.w[0]))
        return (h, r, h @ self.w[1].t()) if dist.get_rank() == 0 else (h, r)


class ResidualOnRank0(Layer):
    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ self.w[0]
        return self.norm(all_reduced(y + r if dist.get_rank() == 0 else y * 1))


class UnevenShards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = 24 + 16 * dist.get_rank()
        torch.manual_seed(dist.get_rank())
        self.a = nn.Parameter(torch.randn(H, width) / 8, requires_grad=False)
        self.z = nn.Parameter(torch.randn(width, H) / 8, requires_grad=False)

    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        r = r + all_reduced((x @ self.a) @ self.z)
        return F.rms_norm(r, (H,), None, 1e-6), r


LOCAL_WORK = [
    BiasInTheLinear, BiasBehind, UnevenExperts, NoExpertOnRank1, LogitsOnRank0, ResidualOnRank0, UnevenShards,
]  # fmt: skip


@program
def local_work(rank: int) -> dict[str, Any]:
    found = {}
    for model in LOCAL_WORK:
        for name, options in (("", {}), (" captured", CAPTURED)):
            try:
                found[model.__name__ + name] = ranks_serve(model(), data(4, 4, 2, 4), dynamic=True, **options)
            except Exception as error:
                found[model.__name__ + name] = {"error": repr(error)}
    return found


# -- an engine's own all-reduce ---------------------------------------------------------------


def _engine_ops() -> torch.library.Library:
    library = torch.library.Library("casering", "FRAGMENT")

    def outplace(x: Tensor, group_name: str) -> Tensor:
        y = x.clone()
        dist.all_reduce(y)
        return y

    def inplace(x: Tensor, group_name: str) -> None:
        dist.all_reduce(x)

    def bare(x: Tensor) -> Tensor:
        return outplace(x, "")

    for schema, body, fake in (
        ("all_reduce(Tensor x, str group_name) -> Tensor", outplace, lambda x, group_name: torch.empty_like(x)),
        ("all_reduce_(Tensor(a!) x, str group_name) -> ()", inplace, lambda x, group_name: None),
        ("bare_all_reduce(Tensor x) -> Tensor", bare, torch.empty_like),
    ):
        name = library.define(schema)
        library.impl(name, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"casering::{name}", fake, lib=library)
    return library


class EngineOp(Layer):
    def __init__(self, op: str, group: str) -> None:
        super().__init__()
        self.op, self.group = op, group

    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ self.w[0]
        if self.op == "all_reduce_":
            torch.ops.casering.all_reduce_(y, self.group)
        elif self.op == "bare_all_reduce":
            y = torch.ops.casering.bare_all_reduce(y)
        else:
            y = torch.ops.casering.all_reduce(y, self.group)
        return self.norm(r + y)


@program
def engine_op(rank: int) -> dict[str, Any]:
    library = _engine_ops()
    real = dist.group.WORLD.group_name  # type: ignore[union-attr]
    found = {}
    for name, op, group, ops in (
        ("torch's name", "all_reduce", real, ["casering::all_reduce"]),
        ("torch's name, captured", "all_reduce", real, ["casering::all_reduce"]),
        ("mapped", "all_reduce", "tp:0", {"casering::all_reduce": real}),
        ("without a group", "bare_all_reduce", "", {"casering::bare_all_reduce": real}),
        ("in place", "all_reduce_", real, ["casering::all_reduce_"]),
        ("unknown name", "all_reduce", "pp:0", ["casering::all_reduce"]),
        ("not listed", "all_reduce", real, []),
    ):
        options = CAPTURED if "captured" in name else {}
        try:
            found[name] = ranks_serve(EngineOp(op, group), data(4, 4, 2), all_reduce_ops=ops, **options)
        except Exception as error:
            found[name] = {"error": repr(getattr(error, "inner_exception", None) or error)}
    library._destroy()
    return found


# -- collectives that nobody waits for ----------------------------------------------------------------


def _big(step: int, rank: int) -> Tensor:
    return torch.randn(384, 384, generator=torch.Generator().manual_seed(10 * step + rank))


def unwaited_result(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.all_reduce(x @ x, "sum", "0")


def unwaited_argument(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(x) * 2


def functional(x: Tensor) -> Tensor:
    return fc.all_reduce(x @ x, "sum", dist.group.WORLD)


def waited_late(x: Tensor) -> Tensor:
    y = torch.ops._c10d_functional.all_reduce(x @ x, "sum", "0")
    z = torch.sin(x) @ x
    return torch.ops._c10d_functional.wait_tensor(y) + z


def rows_in_place(x: Tensor) -> Tensor:
    y = x @ x
    dist.all_reduce(y[:100])
    return y


def columns_in_place(x: Tensor) -> Tensor:
    y = x @ x
    dist.all_reduce(y[:, :2])
    return y


@program
def unwaited(rank: int) -> dict[str, Any]:
    def both(step: int) -> tuple[Tensor, Tensor]:
        a, b = _big(step, 0), _big(step, 1)
        return a @ a, b @ b

    def argument(step: int) -> Tensor:
        x = _big(step, rank)
        return torch.ops._c10d_functional.all_reduce(x @ x, "sum", "0")

    def mine(step: int, whole: Tensor, cut: Any) -> Tensor:
        y = both(step)[rank].clone()
        y[cut] = whole[cut]
        return y

    programs: dict[str, tuple[Any, Any, Any]] = {
        "result": (unwaited_result, None, lambda s: sum(both(s))),
        "argument": (unwaited_argument, argument, lambda s: sum(both(s)) * 2),
        "functional": (functional, None, lambda s: sum(both(s))),
        "late": (waited_late, None, lambda s: sum(both(s)) + torch.sin(_big(s, rank)) @ _big(s, rank)),
        "rows": (rows_in_place, None, lambda s: mine(s, sum(both(s)), slice(0, 100))),  # type: ignore[arg-type]
        "columns": (columns_in_place, None, lambda s: mine(s, sum(both(s)), (slice(None), slice(0, 2)))),  # type: ignore[arg-type]
    }
    found: dict[str, Any] = {}
    for name, (function, make, right) in programs.items():
        for setting, options in (("", {}), (" captured", {"capture_sizes": [384], "graphs": "simulated"})):
            torch._dynamo.reset()
            backend = ringfence.Backend(piece_compiler="eager", agree_seconds=180, **options)
            call = torch.compile(function, backend=backend, fullgraph=True)
            off = []
            with torch.no_grad():
                for step in range(5):
                    given = make(step) if make is not None else _big(step, rank)
                    seen = call(given)
                    if name == "result":
                        seen = torch.ops._c10d_functional.wait_tensor(seen)
                    off.append(difference(seen + 0, right(step)))
            found[name + setting] = off
    return found
