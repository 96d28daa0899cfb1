"""Two ranks: what is fused behind a sum, and what the report says where nothing is."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
import torch.nn.functional as F
from cases.ranks import H, Layer, all_reduced, data, program, ranks_serve
from cases.serve import difference, serve
from torch import Tensor, nn

import ringfence

# -- sums that are added, scaled, biased ----------------------------------------------------------


class Granite(Layer):
    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(r + all_reduced(x @ self.w[0]) * 0.22)


class ScaleFirst(Layer):
    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(0.3 * all_reduced(x @ self.w[0]) + r)


class LeftToRight(Layer):
    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(r + all_reduced(x @ self.w[0]) + all_reduced(x @ self.w[1]))


class SumFirst(Layer):
    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(r + (all_reduced(x @ self.w[0]) + all_reduced(x @ self.w[1])))


class ScaledBranch(Layer):
    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(r + (all_reduced(x @ self.w[0]) + 2.0 * all_reduced(x @ self.w[1])))


class SharedExpert(Layer):
    """What every rank computes whole is added to the sum, before the residual."""

    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm((all_reduced(x @ self.w[0]) + torch.tanh(x)) + r)


class OneAllReduce(Layer):
    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(r + all_reduced(x @ self.w[0] + x @ self.w[1]))


SUMS = [Granite, ScaleFirst, LeftToRight, SumFirst, ScaledBranch, SharedExpert, OneAllReduce]


class BiasAfter(Layer):
    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(r + (all_reduced(x @ self.w[0]) + self.b))


class BiasOfResidual(Layer):
    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm((r + self.b) + all_reduced(x @ self.w[0]))


class BiasWithoutResidual(Layer):
    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(all_reduced(x @ self.w[0]) + self.b)


class BiasBeforeLayerNorm(Layer):
    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        r = r + (all_reduced(x @ self.w[0]) + self.b)
        return F.layer_norm(r, (H,), self.g, self.b), r


BIASES = [BiasAfter, BiasOfResidual, BiasWithoutResidual, BiasBeforeLayerNorm]


@program
def sums(rank: int) -> dict[str, Any]:
    found = {}
    for model in (*SUMS, *BIASES):
        for numerics in ("kernel", "strict"):
            found[f"{model.__name__} {numerics}"] = ranks_serve(model(), data(4, 2), numerics=numerics)
        half = model(dtype=torch.bfloat16)
        found[f"{model.__name__} bfloat16"] = ranks_serve(half, data(4, 2, dtype=torch.bfloat16)) | {
            "exact": _exact(half)
        }
    return found


def _exact(model: nn.Module) -> tuple[float, float]:
    """Errors against float32, of what is compiled and of eager."""
    wide = copy.deepcopy(model).float()
    ours = torch.compile(model, backend=ringfence.Backend(piece_compiler="eager"), fullgraph=True)
    ((x, r),) = data(8, dtype=torch.bfloat16)
    right = wide(x.float(), r.float())
    return tuple(difference([t.float() for t in call(x, r)], list(right)) for call in (ours, model))  # type: ignore


# -- engines' norm ops -----------------------------------------------------------------------------


class NormOp(Layer):
    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        r = r + all_reduced(x @ self.w[0])
        return torch.ops.casenorm.rms_norm(r, self.g, 1e-6), r


class AddNormInPlace(Layer):
    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        y, r = all_reduced(x @ self.w[0]), r.clone()
        torch.ops.casenorm.fused_add_rms_norm(y, r, self.g, 1e-6)
        return y, r


class AddNormOfCaller(Layer):
    """The residual is the caller's own, and is written."""

    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        y = all_reduced(x @ self.w[0])
        torch.ops.casenorm.fused_add_rms_norm(y, r, self.g, 1e-6)
        return y, r


NORM_OPS = [NormOp, AddNormInPlace, AddNormOfCaller]


@program
def norm_ops(rank: int) -> dict[str, Any]:
    library = torch.library.Library("casenorm", "FRAGMENT")

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
        residual.add_(x)
        x.copy_(F.rms_norm(residual, (x.shape[-1],), weight, eps))

    for schema, body, fake in (
        (
            "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
            rms_norm,
            lambda x, weight, eps: torch.empty_like(x),
        ),
        (
            "fused_add_rms_norm(Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps) -> ()",
            fused_add_rms_norm,
            lambda x, residual, weight, eps: None,
        ),
    ):
        name = library.define(schema)
        library.impl(name, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"casenorm::{name}", fake, lib=library)
    listed = {"norm_ops": ["casenorm::rms_norm", "casenorm::fused_add_rms_norm"]}
    options = listed if hasattr(ringfence.Options(), "norm_ops") else {}
    found = {m.__name__: ranks_serve(m(), data(4, 4, 2), **options) for m in NORM_OPS}
    library._destroy()
    return found


# -- what the recogniser is told by, and what it says ------------------------------------------------


class Modulated(Layer):
    def forward(self, x: Tensor, r: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        r = r + all_reduced(x @ self.w[0])
        return F.rms_norm(r, (H,)) * (1 + scale), r


@program
def modulated(rank: int) -> dict[str, Any]:
    found = {}
    for name, shape in (("adaLN", (1, 1, H)), ("gate", (1, 4, 1)), ("vector", (H,)), ("whole", (1, 4, H))):
        torch.manual_seed(3)
        given = [(torch.randn(1, 4, H), torch.randn(1, 4, H), torch.randn(shape)) for _ in range(2)]
        found[name] = ranks_serve(Modulated(), given, dynamic=None)
    return found


class PlainWeights:
    """No module: to Dynamo its weights are arguments, and dynamic."""

    def __init__(self) -> None:
        torch.manual_seed(dist.get_rank())
        self.w, self.g = torch.randn(H, H) / 8, torch.ones(H)

    def __call__(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        r = r + all_reduced(x @ self.w)
        return r * torch.rsqrt(r.pow(2).mean(-1, keepdim=True) + 1e-6) * self.g, r


def counters(x: Tensor, r: Tensor) -> Tensor:
    count = (x[:, 0] > 0).long()
    dist.all_reduce(count)
    return count + 1


@program
def plain_weights(rank: int) -> dict[str, Any]:
    layer = PlainWeights()
    return {
        "dynamic": ranks_serve(layer.__call__, data(4, 2), dynamic=True),
        "static": ranks_serve(layer.__call__, data(4, 4), dynamic=None),
        "counters": ranks_serve(counters, data(4, 2), dynamic=True),
    }


class NormFirst(Layer):
    """As most models have it: the layer ends with an add, whose norm is in the next layer."""

    def forward(self, x: Tensor, r: Tensor | None = None) -> Tensor:
        x = x + all_reduced(F.rms_norm(x, (H,), self.g, 1e-6) @ self.w[0])
        return x + all_reduced(F.rms_norm(x, (H,), self.g, 1e-6) @ self.w[1])


class SumLast(Layer):
    """As engines have it: the residual travels beside, the layer ends with its all-reduce."""

    def forward(self, x: Tensor, r: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r = x if r is None else x + r
        x = all_reduced(F.rms_norm(r, (H,), self.g, 1e-6) @ self.w[0])
        x, r = self.norm(r + x)
        return all_reduced(x @ self.w[1]), r


@program
def layers_one_by_one(rank: int) -> dict[str, Any]:
    found = {}
    for kind in (NormFirst, SumLast):
        torch._dynamo.reset()
        backend = ringfence.Backend(piece_compiler="eager", agree_seconds=180)
        layers = [kind() for _ in range(2)]
        twins = copy.deepcopy(layers)
        for layer in layers:
            layer.compile(backend=backend, fullgraph=True)
        ((x, _),) = data(4)
        seen = right = (x,)
        with torch.no_grad():
            for layer, twin in zip(layers, twins, strict=True):
                seen, right = _tuple(layer(*seen)), _tuple(twin(*right))
        found[kind.__name__] = {
            "off": difference(list(seen), list(right)),
            "sites": [["fused" if s.fused else str(s.decline.reason) for s in r.sites] for r in backend.reports],  # type: ignore[union-attr]
            "messages": [s.decline.message for r in backend.reports for s in r.sites if s.decline],
        }
    return found


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


class SequenceParallel(Layer):
    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        h, r = self.norm(r + fc.reduce_scatter_tensor(x @ self.w[0], "sum", 0, dist.group.WORLD))
        return fc.all_gather_tensor(h, 0, dist.group.WORLD), r


class Autograd(Layer):
    """torch.distributed.nn's all-reduce, which Dynamo leaves out of the graph."""

    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        import torch.distributed.nn.functional as dnn

        return self.norm(r + dnn.all_reduce(x @ self.w[0]))


@program
def no_all_reduce_in_the_graph(rank: int) -> dict[str, Any]:
    found = {}
    for model, rows in ((SequenceParallel, 2), (Autograd, 4)):
        ((x, r),) = data(4)
        served = serve(
            model(), [(x, r[:rows])], dynamic=None, fullgraph=False, piece_compiler="eager", agree_seconds=180
        )
        notes = [note for report in served.reports for note in report.notes]
        found[model.__name__] = {"off": max(served.off), "notes": notes, "reports": len(served.reports)}
        try:
            ringfence.assert_fused(served.reports[0], count=1)
        except Exception as error:
            found[model.__name__]["error"] = repr(error)
    return found
