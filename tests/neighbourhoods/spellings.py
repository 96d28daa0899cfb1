"""How a program may spell a view, a layout, an add and a root."""

from __future__ import annotations

from collections.abc import Callable

import torch
from neighbourhoods.programs import Block
from neighbourhoods.stand_in import aten
from torch import Tensor

ROUND_TRIPS = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "int32": torch.int32,
    "float8": torch.float8_e4m3fn,
    "bool": torch.bool,
}


def view_of(kind: str, x: Tensor, hidden: int) -> Tensor:
    if kind == "to_3d":
        return x.reshape(-1, 2, hidden) if x.numel() // hidden % 2 == 0 else x.reshape(-1, 1, hidden)
    if kind == "to_2d":
        return x.reshape(-1, hidden)
    if kind == "unsqueeze":
        return x.unsqueeze(1) if x.ndim < 4 else x
    if kind == "unsqueeze_squeeze":
        return x.unsqueeze(0).squeeze(0)
    if kind == "copy":
        copied: Tensor = aten.copy(torch.zeros(x.shape, dtype=x.dtype), x)
        return copied
    if kind == "clone":
        return x.clone()
    if kind == "alias":
        aliased: Tensor = aten.alias(x)
        return aliased
    if kind == "rounded":
        return x.to(torch.float16 if x.dtype is torch.bfloat16 else torch.bfloat16).to(x.dtype)
    return x.reshape(1, -1, hidden).reshape(x.shape)


def first_rows(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the shape of ``like``; a broadcast add may have given it more rows."""
    if x.numel() != like.numel():
        x = x.reshape(-1, like.shape[-1])[: like.numel() // like.shape[-1]]
    return x.reshape(like.shape)


def laid_out(kind: str, x: Tensor) -> Tensor:
    if kind == "scaled":
        return torch.tanh(x)
    if kind == "transposed":
        return x.transpose(-1, -2).clone(memory_format=torch.contiguous_format).transpose(-1, -2)
    if kind == "sliced":
        return torch.cat([x, -x], -2)[..., : x.shape[-2], :]
    if kind == "expanded":
        return x[..., :1, :].expand(x.shape)
    return x


def fits(root: Tensor | None, s: Tensor, r: Tensor) -> bool:
    return root is not None and root.ndim == s.ndim and root.shape[:-1] == s.shape[:-1] and r.numel() == s.numel()


def broadcasts(a: Tensor, b: Tensor) -> bool:
    return all(m in (1, n) for m, n in zip(a.shape[::-1], b.shape[::-1], strict=False))


def added_to(kind: str, v: Tensor, residual: Tensor | float | None) -> Tensor:
    if residual is None:
        return v
    if kind == "alpha":
        return torch.add(v, residual, alpha=2)
    if kind == "alpha_third":
        return torch.add(v, residual, alpha=1 / 3)
    if kind == "scaled":
        return (v + residual) * 0.6
    if kind == "sub":
        return v - residual
    if not isinstance(residual, Tensor):
        return residual + v if kind == "swapped" else v + residual
    if kind == "swapped":
        return residual + v
    if kind == "alpha_swapped":
        return torch.add(residual, v, alpha=2)
    if kind == "rsub":
        return residual - v
    if kind == "wide":
        return v.to(torch.float32) + residual.to(torch.float32)
    if kind == "wide_mixed":
        return residual + v.to(torch.float32)
    if kind == "float64":
        return v.to(torch.float64) + residual
    if kind == "wide_view":
        return (v.to(torch.float32).unsqueeze(0) + residual.to(torch.float32).unsqueeze(0)).squeeze(0)
    return v + residual


def root_of(block: Block, statistic: Tensor) -> tuple[Tensor, bool]:
    """What ``x`` is multiplied or divided by, and whether it is divided."""
    eps = (block.eps or 0.0) if block.eps_form == "outside" else 0.0
    roots: dict[str, Callable[[], Tensor]] = {
        "pow": lambda: statistic.pow(-0.5),
        "reciprocal": lambda: statistic.sqrt().reciprocal(),
        "one_over": lambda: 1.0 / statistic.sqrt(),
        "div": lambda: statistic.sqrt(),
        "div_swapped": lambda: statistic.sqrt(),
        "div_pow": lambda: statistic.pow(0.5),
        "sqrt": lambda: statistic.sqrt(),
    }
    root = roots.get(block.root, lambda: torch.rsqrt(statistic))()
    return root + eps if eps else root, block.root.startswith("div")
