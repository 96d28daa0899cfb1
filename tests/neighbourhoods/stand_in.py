"""The all-reduce without a process group: an elementwise function, and a run of a graph that checks its metadata."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

aten = torch.ops.aten

c10d = torch.ops._c10d_functional


def all_reduced(x: Tensor, group: str = "0", op: str = "sum") -> Tensor:
    reduced: Tensor = c10d.wait_tensor(c10d.all_reduce(x, op, group))
    return reduced


#: By group: what an element is multiplied by. No two are alike, nor is one the other's multiple by a small number.
_SLOPES = {"0": 1.75, "1": 0.6875}


def stand_in(x: Tensor, group: str, op: str = "sum") -> Tensor:
    """An elementwise function in place of the sum over the ranks of ``group``; contiguous, as the sum is."""
    return (x * (_SLOPES[group] * (1.0 if op == "sum" else 0.5))).contiguous()


@torch.library.custom_op("neighbourhoods::all_reduce", mutates_args=())
def custom_all_reduce(x: Tensor, group: str) -> Tensor:
    return stand_in(x, group)


@custom_all_reduce.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("neighbourhoods::all_reduce_inplace", mutates_args=("x",))
def custom_all_reduce_inplace(x: Tensor) -> None:
    x.copy_(stand_in(x, "0"))


CUSTOM_OPS = {"neighbourhoods::all_reduce": None, "neighbourhoods::all_reduce_inplace": "0"}


class Run(Interpreter):
    """Runs a graph with :func:`stand_in` for its collectives, and compares each value with what its node promises."""

    untrue: frozenset[str] = frozenset()

    def run_node(self, n: Node) -> Any:
        result, promised = super().run_node(n), n.meta.get("val")
        if isinstance(result, Tensor) and isinstance(promised, Tensor) and n.name not in self.untrue:
            assert result.dtype == promised.dtype, f"'{n.name}' is {result.dtype}, and its metadata {promised.dtype}"
            if all(isinstance(d, int) for d in promised.shape):
                assert result.shape == promised.shape and strides_of(result) == strides_of(promised), (
                    f"'{n.name}' is {list(result.shape)} with strides {result.stride()}, and its metadata "
                    f"{list(promised.shape)} with {promised.stride()}"
                )
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is c10d.all_reduce.default:
            return stand_in(args[0], args[2], args[1])
        if target is c10d.wait_tensor.default:
            return args[0]
        return super().call_function(target, args, kwargs)


def strides_of(x: Tensor) -> list[int]:
    """The strides that matter: those of dimensions with several elements."""
    return [s for n, s in zip(x.shape, x.stride(), strict=True) if n > 1] if x.numel() else []
