"""Rewritten graphs on ranks: what they compute, and that the ranks of a group decide alike."""

from __future__ import annotations

import moe_graphs
import moe_ranks
import pytest
import torch
import torch.distributed as dist
from moe_graphs import E, Layer, given

from ringfence.compile_passes.moe_rewrite import dispatch_experts
from ringfence.runtime.groups import Group
from support import aot_graph, run_ranks, run_threaded, start_fake_group

#: Of a result in bfloat16: the sum over the ranks and the residual are rounded once each.
ROUNDINGS = 1.0


@pytest.mark.slow
def test_through_the_backend_a_site_is_rewritten_on_all_ranks_or_on_none() -> None:
    for rank, found in enumerate(run_ranks(4, moe_ranks.rewritten)):
        excess, report = found["four"]
        assert max(excess) <= ROUNDINGS, excess
        (site,) = report["moe_sites"]
        assert site["rewritten"] and site["reason"] is None and site["num_experts"] == E
        ops = [op for piece in report["pieces"] for op in piece["ops"]]
        assert ops == ["ringfence::moe_dispatch", "ringfence::moe_combine"], "over gloo, between captured pieces"
        excess, report = found["pair"]
        assert max(excess) <= ROUNDINGS, excess
        (site,) = report["moe_sites"]
        assert site["reason"] == ("experts_not_row_wise" if rank % 2 else "declined_on_another_rank")
        assert rank % 2 or f"rank {rank + 1} leaves it as it is: the experts" in site["message"]


@pytest.mark.parametrize("form", moe_graphs.FORMS)
@pytest.mark.parametrize(("ranks", "k"), [(2, 2), (4, 3)])
def test_a_rewritten_graph_sums_in_float32_and_rounds_once(form: str, ranks: int, k: int) -> None:
    start_fake_group(ranks)
    graphs = []
    for rank in range(ranks):
        gm = aot_graph(Layer(form, rank, ranks, k=k), *given(6, 0))
        (site,) = dispatch_experts(gm, {"0": Group("0", "fake", ranks, rank)}, torch.device("cpu"), rewrite=True)
        assert site.rewritten, site.message
        graphs.append(gm)
    dist.destroy_process_group()

    def body(rank: int) -> tuple[list[float], bool]:
        with torch.no_grad():
            layer, gm = Layer(form, rank, ranks, k=k), graphs[rank]
            gate, up, down = layer.parameters()
            excess, differs = [], False
            for args in moe_ranks.steps(rank, given):
                (result,) = gm(gate, *args, up, down)
                excess.append(layer.excess(result, *args))
                differs |= not torch.equal(result, layer(*args))
            return excess, differs

    found = run_threaded(ranks, body)
    assert max(max(excess) for excess, _ in found) <= ROUNDINGS, found
    assert any(differs for _, differs in found) == (ranks > 2), "of more than two parts the dtype's own sum is another"
