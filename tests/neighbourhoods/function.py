"""A program as a Python function: what is traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from neighbourhoods.programs import Block, Program
from neighbourhoods.spellings import ROUND_TRIPS, added_to, broadcasts, first_rows, fits, laid_out, root_of, view_of
from neighbourhoods.stand_in import all_reduced, aten
from torch import Tensor


@dataclass
class State:
    """What earlier and later blocks may read."""

    reduced: Tensor
    residual: Tensor | None
    sum: Tensor


class Function:
    """The program as a function of its inputs; :meth:`__call__` is what is traced."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.hidden = program.hidden
        self.decomposed = program.front == "inductor"

    def shape(self) -> tuple[int, ...]:
        p = self.program
        return (p.tokens, p.hidden) if p.batch is None else (p.batch, p.tokens, p.hidden)

    def inputs(self) -> list[Tensor]:
        """For each block: partial sum, residual, weight, epsilon."""
        p, tensors = self.program, []
        g = torch.Generator().manual_seed(p.seed)
        for block in p.blocks:
            x, r = (torch.randn(self.shape(), generator=g) * p.scale for _ in range(2))
            w = torch.rand(p.hidden, generator=g) + 0.5
            tensors += [x.to(p.dtype), r.to(p.dtype), w.to(p.dtype), torch.tensor(block.eps or 1e-6)]
        return tensors

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        p = self.program
        arguments = [inputs[4 * i : 4 * i + 4] for i in range(len(p.blocks))]
        states: list[State] = []
        outputs: list[Tensor] = []
        h: Tensor | None = None
        if p.order == "phased":
            states = [s for b, a in zip(p.blocks, arguments, strict=True) for s in [self._sum(b, a, None, states)]]
        for i, (block, given_) in enumerate(zip(p.blocks, arguments, strict=True)):
            if p.order == "sequential":
                states.append(self._sum(block, given_, h, states))
            other = states[(i + 1) % len(states)] if p.order == "phased" else states[i - 1]
            outputs += self._norm(block, given_, states[i], other if other is not states[i] else None)
            h = first_rows(outputs[-1], given_[0]).to(p.dtype)
            if "norm_read" in block.readers and i + 1 < len(p.blocks):
                outputs[-1] = -outputs[-1]
        return outputs

    # the all-reduce and the add

    def _reduce(self, block: Block, x: Tensor) -> Tensor:
        if block.collective == "custom":
            reduced: Tensor = torch.ops.neighbourhoods.all_reduce(x, "0")
            return reduced
        if block.collective == "custom_inplace":
            buffer = x.clone()
            torch.ops.neighbourhoods.all_reduce_inplace(buffer)
            return buffer
        if block.collective == "in_float32":
            wide = all_reduced(x.to(torch.float32))
            return wide.to(self.program.dtype)
        if block.collective == "flat":
            return all_reduced(x.reshape(-1)).reshape(x.shape)
        op = "avg" if block.collective == "avg" else "sum"
        group = "1" if block.collective == "other_group" else "0"
        v = all_reduced(x, group, op)
        if block.collective == "twice":
            v = all_reduced(v, group, op)
        if block.collective == "unused_twin":
            all_reduced(x * 2, group, op)
        return v

    def _behind(self, block: Block, v: Tensor, r: Tensor, w: Tensor, e: Tensor) -> Tensor:
        """What stands between the all-reduce and the residual: scales, a bias, another sum."""
        another: Callable[[str], Tensor] = lambda group="0": all_reduced(torch.tanh(r).reshape(v.shape), group)  # noqa: E731
        choices: dict[str, Callable[[], Tensor]] = {
            "scaled": lambda: v * 0.22,
            "halved": lambda: v * 0.5,
            "divided": lambda: v / 3,
            "negated": lambda: -v,
            "huge": lambda: v * 3.0,
            "by_constant": lambda: v * torch.full((), 0.3, dtype=v.dtype),
            "by_tensor": lambda: v * e,
            "gated": lambda: v * torch.sigmoid(r.reshape(v.shape)[..., :1]),
            "biased": lambda: v + w,
            "shared": lambda: v + torch.sin(r).reshape(v.shape),
            "doubled": lambda: v + another("0"),
            "doubled_first": lambda: another("0") + v,
            "doubled_scaled": lambda: v + another("0") * 0.7,
            "doubled_over_other_group": lambda: another("1") + v,
            "doubled_read": lambda: (a := another("0")) + v + torch.relu(a),
            "less_another": lambda: v - another("0"),
            "scaled_sum": lambda: (v + w) * 0.4,
        }
        return choices.get(block.behind, lambda: v)()

    def _sum(self, block: Block, given_: Sequence[Tensor], h: Tensor | None, earlier: Sequence[State]) -> State:
        x, r, w, e = given_
        if block.input == "previous" and h is not None:
            x = h
        v = self._reduce(block, laid_out(block.layout, x))
        if block.mutate == "input":
            x.mul_(2)
        if block.mutate == "scratch":
            e.clone().add_(1)
        v = self._behind(block, v, r, w.to(self.program.dtype), e)
        for kind in block.after_reduce:
            v = view_of(kind, v, self.hidden)
        residual = self._residual(block, v, x if block.residual == "input" else r, e, earlier)
        s = added_to(block.add, v, residual)
        if block.mutate == "sum":
            s = s.mul_(2)
        if block.mutate == "weight":
            w.mul_(2)
        for kind in block.before_norm:
            s = view_of(kind, s, self.hidden)
        return State(v, residual if isinstance(residual, Tensor) else None, s)

    def _residual(
        self, block: Block, v: Tensor, r: Tensor, e: Tensor, earlier: Sequence[State]
    ) -> Tensor | float | None:
        kind, rows = block.residual, r.reshape(-1, self.hidden)
        if kind == "none":
            return None
        if kind == "previous":
            return first_rows(earlier[-1].sum, v) if earlier else r.reshape(v.shape)
        if kind in ("other_reduce", "other_reduce_view"):
            reduced = all_reduced(torch.tanh(r))
            return (
                reduced.view(-1, self.hidden).view(v.shape) if kind == "other_reduce_view" else reduced.reshape(v.shape)
            )
        if kind == "other_group":
            return all_reduced(torch.tanh(r), "1").reshape(v.shape)
        if kind == "reduced":
            return v
        if kind == "number":
            return 0.5
        choices: dict[str, Callable[[], Tensor]] = {
            "late": lambda: torch.sin(r).reshape(v.shape),
            "transposed": lambda: laid_out("transposed", r).reshape(v.shape),
            "row": lambda: rows[:1],
            "column": lambda: r.reshape(v.shape)[..., :1],
            "bias": lambda: rows[0],
            "zero_dim": lambda: e,
            "wider": lambda: torch.stack([r.reshape(v.shape), -r.reshape(v.shape)]),
            "of_reduced": lambda: torch.tanh(v),
            "float32": lambda: r.reshape(v.shape).to(torch.float32) * 1.001,
            "float64": lambda: r.reshape(v.shape).to(torch.float64),
        }
        return choices.get(kind, lambda: r.reshape(v.shape))()

    # the norm

    def _norm(self, block: Block, given_: Sequence[Tensor], state: State, other: State | None) -> list[Tensor]:
        """What the block returns; its norm is the last."""
        s, w, eps, last = state.sum, given_[2], block.eps, (self.hidden,)
        early = torch.cos(w) if block.weight == "early" else w
        seen: dict[str, Tensor] = {}
        if block.norm == "none":
            y = torch.tanh(s)
        elif block.norm == "sum":
            y = s
        elif block.norm == "rms_norm":
            weight = None if block.weight == "none" else early
            y = F.rms_norm(s, last, weight if weight is None else weight.to(s.dtype), eps)
        elif block.norm == "rms_norm_wide":
            y = F.rms_norm(s.to(torch.float32), last, None if block.weight == "none" else early.to(torch.float32), eps)
        elif block.norm in ("fused_op", "fused_op_root"):
            weight = None if block.weight == "none" else early.to(s.dtype)
            y, seen["root"] = aten._fused_rms_norm(s, list(last), weight, eps)
        elif block.norm == "layer_norm":
            y = F.layer_norm(s, last, early.to(s.dtype), None, eps or 1e-5)
        elif block.norm == "heads":
            heads = s.reshape(*s.shape[:-1], 2, self.hidden // 2)
            y = F.rms_norm(heads, heads.shape[-1:], early[: self.hidden // 2].to(s.dtype), eps).reshape(s.shape)
        elif block.norm == "two_dims":
            y = F.rms_norm(s, s.shape[-2:], None, eps)
        else:
            y = self._chain(block, s, given_, early, state, other, seen)
        y = self._end(block, y)
        returned = [value for name in block.readers for value in self._read(block, name, given_, state, seen)]
        if block.norm == "fused_op_root":
            returned.append(seen["root"])
        return [*returned, y]

    def _end(self, block: Block, y: Tensor) -> Tensor:
        dtype = self.program.dtype
        if block.end in ROUND_TRIPS:
            return y.to(ROUND_TRIPS[block.end]).to(dtype)
        if block.end == "relu":
            return torch.relu(y).to(dtype)
        return y if block.end == "stay" else y.to(dtype)

    def _read(
        self, block: Block, name: str, given_: Sequence[Tensor], state: State, seen: Mapping[str, Tensor]
    ) -> Iterator[Tensor]:
        s, last = state.sum, (self.hidden,)
        readers: dict[str, Callable[[], Tensor | None]] = {
            "sum": lambda: s,
            "sum_read": lambda: -s,
            "sum_float": lambda: s.to(torch.float32) * 3,
            "sum_low": lambda: s.to(self.program.dtype),
            "sum_view": lambda: s.reshape(-1, self.hidden),
            "sum_transposed": lambda: s.transpose(-1, -2).reshape(-1, s.shape[-2]) * 2,
            "sum_again": lambda: added_to(block.add, state.reduced, state.residual),
            "sum_again_read": lambda: torch.exp(-added_to(block.add, state.reduced, state.residual).abs()),
            "reduced": lambda: state.reduced,
            "reduced_read": lambda: -state.reduced,
            "residual": lambda: None if state.residual is None else -state.residual,
            "residual_norm": lambda: (
                None
                if state.residual is None or state.residual.shape[-1:] != s.shape[-1:]
                else F.rms_norm(state.residual, last, None, 1e-5)
            ),
            "wide": lambda: -seen["wide"] if "wide" in seen else None,
            "root": lambda: seen["root"] if "root" in seen and block.norm != "fused_op" else None,
            "root_of_other": lambda: (
                given_[1].reshape(s.shape) * seen["root"] if fits(seen.get("root"), s, given_[1]) else None
            ),
            "normed": lambda: -seen["normed"] if "normed" in seen else None,
            "second_norm": lambda: F.rms_norm(s, last, None, 1e-3),
            "second_norm_wide": lambda: F.rms_norm(s.to(torch.float32), last, None, 1e-3).to(self.program.dtype),
        }
        value = readers.get(name, lambda: None)()
        if value is not None:
            yield value

    def _chain(
        self,
        block: Block,
        s: Tensor,
        given_: Sequence[Tensor],
        early: Tensor,
        state: State,
        other: State | None,
        seen: dict[str, Tensor],
    ) -> Tensor:
        compute = {"float32": torch.float32, "float64": torch.float64}.get(block.compute, s.dtype)
        wide = s.to(compute)
        low = s.to(self.program.dtype).to(compute) if block.norm == "of_two_casts" else wide
        statistic = self._statistic(block, s, low, given_)
        factor, divides = root_of(block, statistic)
        if block.factor == "scaled":
            factor = factor * 2
        elif block.factor != "as_is":
            factor = factor.to(ROUND_TRIPS.get(block.factor, self.program.dtype))
        if block.mean in ("lost", "rows_lost") and not broadcasts(factor, wide):
            factor = factor.unsqueeze(-1) if block.mean == "lost" else factor.mean()
        if block.product == "weighted_root":
            factor = factor * early
        products = {"narrow": lambda: s, "other": lambda: torch.sin(wide), "weighted": lambda: wide * early}
        x = products.get(block.product, lambda: wide)()
        if divides:  # factor / x has a pole, which is no place to compare what came through another site
            y = factor / x if block.root == "div_swapped" and len(self.program.blocks) == 1 else x / factor
        else:
            y = factor * x if block.product == "wide_swapped" else x * factor
        seen |= {"wide": wide, "root": factor, "normed": y}
        before = y.dtype
        if block.middle == "dtype":
            y = y.to(self.program.dtype)
        elif block.middle in ROUND_TRIPS:
            y = y.to(ROUND_TRIPS[block.middle]).to(before)
        weight = self._weight(block, y, early, given_, state, other)
        if weight is None:
            return y
        y = weight * y if block.weight_swapped else y * weight
        return y * early if block.weight == "twice" else y

    def _weight(
        self, block: Block, y: Tensor, w: Tensor, given_: Sequence[Tensor], state: State, other: State | None
    ) -> Tensor | float | None:
        r, e, wide = given_[1], given_[3], w.to(torch.float32)
        of_other = other.sum if other is not None else r
        choices: dict[str, Callable[[], Tensor | float | None]] = {
            "none": lambda: None,
            "plain": lambda: w,
            "early": lambda: w,
            "gemma": lambda: 1 + w,
            "gemma_wide": lambda: 1.0 + wide,
            "gemma_scalar_op": lambda: self._add_scalar(wide, 1.0, 1),
            "gemma_alpha": lambda: self._add_scalar(wide, 1.0, 2),
            "gemma_half": lambda: torch.full((), 0.1, dtype=torch.float16) + wide,
            "gemma_twice": lambda: 1.0 + (1.0 + wide),
            "sum_of_two": lambda: w + r.reshape(-1, self.hidden)[0],
            "shifted": lambda: 1.0 - w,
            "rounded": lambda: w.to(torch.bfloat16 if w.dtype is torch.float32 else torch.float32).to(torch.float16),
            "row": lambda: w.view(1, -1),
            "late": lambda: torch.cos(w),
            "of_other": lambda: of_other.reshape(-1, self.hidden)[0].to(self.program.dtype),
            "of_sum": lambda: state.sum.reshape(-1, self.hidden)[0],
            "of_reduced": lambda: state.reduced.reshape(-1, self.hidden)[0],
            "matrix": lambda: torch.stack([w]),
            "column": lambda: y[..., :1] * 0 + r.reshape(-1)[0],
            "number": lambda: 0.7,
            "zero_dim": lambda: e,
            "float32": lambda: wide * 1.001,
            "gate": lambda: r.reshape(-1, self.hidden)[:1].expand(y.shape),
        }
        return choices.get(block.weight, lambda: wide)()

    def _add_scalar(self, x: Tensor, number: float, alpha: int) -> Tensor:
        """Through the overload whose alpha is a positional argument, which Inductor cannot decompose."""
        return torch.add(x, number, alpha=alpha) if self.decomposed else aten.add.Scalar(x, number, alpha)

    def _statistic(self, block: Block, s: Tensor, wide: Tensor, given_: Sequence[Tensor]) -> Tensor:
        """The mean square with its epsilon, rightly or wrongly."""
        compute, hidden, eps = wide.dtype, s.shape[-1], 0.0 if block.eps is None else block.eps
        squares: dict[str, Callable[[], Tensor]] = {
            "mul": lambda: wide * wide,
            "square": lambda: torch.square(wide),
            "mul_two_casts": lambda: s.to(compute) * s.to(compute),
            "cube": lambda: wide.abs().pow(3),
            "abs": lambda: wide.abs(),
            "other": lambda: torch.sin(wide).pow(2),
            "low": lambda: s.pow(2).to(compute),
        }
        square = squares.get(block.square, lambda: wide.pow(2))()
        if block.eps_form == "in_mean":
            square = square + eps
        means: dict[str, Callable[[], Tensor]] = {
            "unsqueeze": lambda: square.mean(-1).unsqueeze(-1),
            "sum_div": lambda: square.sum(-1, keepdim=True) / hidden,
            "sum_mul": lambda: square.sum(-1, keepdim=True) * (1 / hidden),
            "lost": lambda: square.mean(-1),
            "sum_wrong": lambda: square.sum(-1, keepdim=True) / (hidden + 1),
            "sum_rows": lambda: square.sum(-2, keepdim=True) / s.shape[-2],
            "rows": lambda: square.mean(-2, keepdim=True),
            "rows_lost": lambda: square.mean(-2).unsqueeze(-1),
            "two_dims": lambda: square.mean((-2, -1), keepdim=True),
            "all": lambda: square.mean(dim=None, keepdim=True),
            "half": lambda: square.mean(-1, keepdim=True, dtype=torch.float16),
            "sum_half": lambda: square.sum(-1, keepdim=True, dtype=torch.bfloat16) / hidden,
            "median": lambda: square.amax(-1, keepdim=True),
        }
        mean = means.get(block.mean, lambda: square.mean(-1, keepdim=True))()
        forms: dict[str, Callable[[], Tensor]] = {
            "swapped": lambda: eps + mean,
            "full": lambda: mean + torch.full((), eps, dtype=torch.float32),
            "full_half": lambda: mean + torch.full((), eps, dtype=torch.float16),
            "tensor": lambda: mean + given_[3],
            "alpha": lambda: torch.add(mean, eps, alpha=2),
            "scalar_alpha": lambda: self._add_scalar(mean, eps, 2),
            "clamp": lambda: mean.clamp(min=eps or 1e-6),
            "per_row": lambda: mean + mean * eps,
            "outside": lambda: mean,
            "in_mean": lambda: mean,
            "absent": lambda: mean,
        }
        return forms.get(block.eps_form, lambda: mean + eps)()
