"""verify must notice what a wrong recogniser would do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ringfence.compile_passes import Match, Reason, find
from ringfence.compile_passes.match import Candidate
from ringfence.compile_passes.verify import verify
from support import aot_graph

H = 16
CPU = torch.device("cpu")


def program(x: Tensor, r: Tensor, w: Tensor) -> object:
    y = x * 2
    dist.all_reduce(y)
    h = y + r
    return F.rms_norm(h, (H,), w, 1e-6), h


def candidate(dtype: torch.dtype, dynamic: bool = False) -> Candidate:
    args = [torch.randn(s).to(dtype) for s in ((5, H), (5, H), (H,))]
    (found,) = find(aot_graph(program, *args, dynamic=[(0, 0), (1, 0)] if dynamic else ()))
    return found


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("fake_group")
def test_right_rewrite_is_accepted(dtype: torch.dtype, dynamic: bool) -> None:
    given = candidate(dtype, dynamic)
    assert verify([given], CPU) == [given]


def with_norm(**changes: object) -> Callable[[Match], Match]:
    return lambda match: replace(match, norm=replace(match.norm, **changes))


@pytest.mark.parametrize(
    "wrong",
    [
        with_norm(eps=1e-5),
        with_norm(weight_bias=1.0),
        lambda m: replace(m, norm=replace(m.norm, out=m.sum)),
    ],
    ids=["epsilon", "weight bias", "norm"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("fake_group")
def test_wrong_rewrite_is_declined(dtype: torch.dtype, wrong: Callable[[Match], Match]) -> None:
    given = candidate(dtype)
    assert given.match is not None
    (checked,) = verify([Candidate(given.site, wrong(given.match))], CPU)
    assert checked.match is None
    assert checked.site.decline is not None and checked.site.decline.reason is Reason.VERIFY_FAILED
    assert not checked.site.fused and "differs" in checked.site.message


@pytest.mark.usefixtures("fake_group")
def test_same_subgraph_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def layers(x: Tensor, r: Tensor, w: Tensor) -> object:
        for _ in range(5):
            x, r = program(x, r, w)
        return x, r

    args = [torch.randn(s) for s in ((5, H), (5, H), (H,))]
    candidates = find(aot_graph(layers, *args))
    runs = []
    module = __import__("ringfence.compile_passes.verify", fromlist=["_compare"])
    compare = module._compare
    monkeypatch.setattr(module, "_compare", lambda *a: runs.append(1) or compare(*a))
    assert all(c.match for c in verify(candidates, CPU)) and len(candidates) == 5
    assert len(runs) == 1


@pytest.mark.usefixtures("fake_group")
def test_what_cannot_run_by_itself_is_declined() -> None:
    def program(x: Tensor, r: Tensor, w: Tensor) -> object:
        y = x * 2
        dist.all_reduce(y)
        h = (y + r).view(5, H)
        return F.rms_norm(h, (H,), w, 1e-6)

    args = [torch.randn(s) for s in ((5, H), (5, H), (H,))]
    (given,) = find(aot_graph(program, *args))
    assert given.match is not None
    (view,) = [n for n in given.match.sum.users if n.target is torch.ops.aten.view.default] or [None]
    if view is None:  # folded away: put one in by hand
        graph = given.match.sum.graph
        with graph.inserting_after(given.match.sum):
            view = graph.call_function(torch.ops.aten.view.default, (given.match.sum, [7, H]))
        view.meta["val"] = given.match.sum.meta["val"]
        given.match.sum.replace_all_uses_with(view, delete_user_cb=lambda n: n is not view)
    else:
        view.args = (view.args[0], [7, H])
    (checked,) = verify([given], CPU)
    assert checked.match is None and checked.site.decline is not None
    assert checked.site.decline.reason is Reason.VERIFY_FAILED
    assert "cannot be run by itself: RuntimeError" in checked.site.decline.message
