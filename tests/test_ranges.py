"""Never slower than not fusing: what no kernel wins at is left to the piece compiler, by range of token counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fake_flashinfer import FakeFlashInfer, installed
from torch import Tensor, nn

import ringfence
from ringfence import unfused
from ringfence.compile_passes import ranges
from ringfence.runtime.collectives import ops
from ringfence.runtime.collectives.size_table import SizeRow, write_table
from ringfence.runtime.collectives.workspace import close_workspaces
from ringfence.runtime.groups import Group
from ringfence.runtime.hazards.situation import Collective
from support import run_ranks

H = 256
#: One-shot up to 8 tokens of 256 float32, two-shot up to 16, all-reduces up to 4.
ROW = SizeRow(Collective.TRTLLM, "peer", (9, 0), 2, 8 << 10, 16 << 10, 4 << 10, "a test", bitwise=True)
OPS = ["ringfence::all_reduce_add_rms_norm", "ringfence::all_reduce_rms_norm", "ringfence::all_reduce"]
BEYOND = "beyond_table"


class Model(nn.Module):
    """A site without a residual, one with, each over a group; then a sum without a norm, where one is asked for."""

    def __init__(self, groups: tuple[str, str], *, plain: bool = False, narrow: bool = False) -> None:
        super().__init__()
        self.groups, self.plain, self.narrow = groups, plain, narrow
        torch.manual_seed(3)
        self.norms = nn.ModuleList(nn.RMSNorm(H, eps=1e-5) for _ in range(2))
        for norm in self.norms:
            nn.init.normal_(norm.weight, 1.0, 0.3)

    def reduced(self, x: Tensor, group: str) -> Tensor:
        return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", group))

    def forward(self, x: Tensor) -> Tensor:
        residual, x = x, self.norms[0](self.reduced(x.sin(), self.groups[0]))
        x = self.norms[1](residual + self.reduced(F.silu(x), self.groups[1]))
        if self.narrow:  # half as wide: twice as many tokens
            x = F.rms_norm(self.reduced(x[:, : H // 2].contiguous(), self.groups[0]), (H // 2,), None, 1e-5)
        return self.reduced(x.sigmoid(), self.groups[0]) * 2 if self.plain else x


def rows(n: int) -> Tensor:
    return torch.randn(n, H, generator=torch.Generator().manual_seed(n))


Mark = Callable[[Tensor], None]


def static(x: Tensor) -> None:
    torch._dynamo.mark_static(x, 0)


def range_of_ones_own(x: Tensor) -> None:
    torch._dynamo.mark_dynamic(x, 0, min=2, max=64)


def not_known(x: Tensor) -> None:
    torch._dynamo.decorators.mark_unbacked(x, 0)


class Job:
    """Runs a model compiled, and says of each call what ran: ops of ours, and which kernels served them."""

    def __init__(self, package: FakeFlashInfer, table: str) -> None:
        self.package, self.table = package, table

    def backend(self, **options: Any) -> ringfence.Backend:
        torch._dynamo.reset()
        given = {"piece_compiler": "eager", "size_table": self.table, "collective": "trtllm", "agree_seconds": 30}
        return ringfence.Backend(**{**given, **options})

    def fails(self, model: Model, tokens: int) -> str:
        compiled = torch.compile(model, backend=self.backend(), dynamic=True, fullgraph=True)
        try:
            compiled(rows(tokens))
        except Exception as error:
            inner = getattr(error, "inner_exception", error)
            return f"{type(inner).__name__}: {inner}"
        return "served"

    def run(self, model: Model, sizes: list[int], *, mark: Mark | None = None, **options: Any) -> dict[str, Any]:
        backend, dynamic = self.backend(**options), mark is None
        compiled = torch.compile(model, backend=backend, dynamic=dynamic or None, fullgraph=True)
        ran = []
        for n in sizes:
            x, calls = rows(n), len(self.package.calls)
            if mark is not None:
                mark(x)
            with mock.patch.object(ops, "_carried", side_effect=ops._carried) as carried:
                count = len(backend.reports)
                actual = compiled(x)
                compiles = len(backend.reports) > count  # then the self-test called the kernels, too
            torch.testing.assert_close(actual, model(x), msg=lambda m, n=n: f"{n} tokens: {m}")
            kernels = None if compiles else [shape for _, _, shape in self.package.calls[calls:]]
            ran.append((n, carried.call_count, kernels if kernels is None else len(kernels)))
        reports = [r.to_dict() for r in backend.reports]
        return {
            "ran": ran,
            "reasons": [[s["reason"] for s in r["sites"]] for r in reports],
            "most": [[s["most_tokens"] for s in r["sites"]] for r in reports],
            "ours": [sum(v["op"].startswith("ringfence") for v in r["verdicts"]) for r in reports],
            "notes": [r["notes"] for r in reports],
            "text": [str(r) for r in backend.reports],
            "fuses": [unfused.fuses(report) for report in backend.reports],
            "stats": [(g.captures, g.replays) for g in backend.stats.graphs],
        }


def _jobs(rank: int, table: str) -> dict[str, Any]:
    torch.set_grad_enabled(False)
    world = dist.group.WORLD.group_name
    other = dist.new_group([0, 1]).group_name
    found: dict[str, Any] = {}
    package = FakeFlashInfer(world)
    with installed(package):
        job = Job(package, table)
        model = Model((world, world))
        found["dynamic"] = job.run(model, [16, 17, 3, 40, 16, 17])
        found["inductor"] = job.run(model, [16, 17, 5, 18], piece_compiler="inductor")
        found["large first"] = job.run(model, [17, 16, 17])
        found["static"] = job.run(model, [16, 17], mark=static)
        found["captured"] = job.run(
            model, [4, 4, 20, 20, 4, 20], capture_sizes=[4, 20], graphs="simulated", split_ops=OPS
        )
        found["plain"] = job.run(Model((world, world), plain=True), [4, 5, 17, 4, 5, 17])
        found["two limits"] = job.run(Model((world, world), narrow=True), [16, 17, 33, 16, 17, 33])
        found["two groups"] = job.run(Model((world, other)), [16, 17, 16, 17])
        found["deterministic"] = job.run(model, [8, 3], max_tokens=8, deterministic=True)
        found["reference"] = job.run(model, [16, 17], collective="reference", size_table=None)
        found["a range of one's own"] = job.run(model, [16, 17], mark=range_of_ones_own)
        found["not known"] = job.run(model, [16, 17], mark=not_known)
        found["apart"] = job.fails(model, 16 + rank)
        close_workspaces(world)
        close_workspaces(other)
    return found


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    table = tmp_path_factory.mktemp("table") / "sizes.json"
    write_table(table, [ROW])
    yield run_ranks(2, _jobs, str(table))


#: Of each job: what ran in each call, as (tokens, ops of ours, calls of kernels, where the call did not compile).
RAN = {
    "dynamic": [(16, 2, None), (17, 0, None), (3, 2, 2), (40, 0, 0), (16, 2, 2), (17, 0, 0)],
    "inductor": [(16, 2, None), (17, 0, None), (5, 2, 2), (18, 0, 0)],
    "large first": [(17, 0, None), (16, 2, None), (17, 0, 0)],
    "static": [(16, 2, None), (17, 0, None)],
    "captured": [(4, 2, None), (4, 2, 2), (20, 0, None), (20, 0, 0), (4, 2, 2), (20, 0, 0)],
    "plain": [(4, 3, None), (5, 2, None), (17, 0, None), (4, 3, 3), (5, 2, 2), (17, 0, 0)],
    "two limits": [(16, 3, None), (17, 1, None), (33, 0, None), (16, 3, 3), (17, 1, 1), (33, 0, 0)],
    "two groups": [(16, 2, None), (17, 0, None), (16, 2, 2), (17, 0, 0)],
    "deterministic": [(8, 2, None), (3, 2, 2)],
    "reference": [(16, 2, None), (17, 2, 0)],
    "a range of one's own": [(16, 2, None), (17, 2, 0)],
    "not known": [(16, 2, None), (17, 2, 0)],
}


@pytest.mark.parametrize("name", RAN)
def test_what_no_kernel_wins_at_runs_without_an_op_of_ours(jobs: list[dict[str, Any]], name: str) -> None:
    for found in jobs:
        assert found[name]["ran"] == RAN[name]
        counts = {n: ours for n, ours, _ in RAN[name]}
        assert found[name]["ours"] == list(dict.fromkeys(counts.values())), "one graph for each range, and no more"


def test_the_report_says_up_to_where_and_what_comes_then(jobs: list[dict[str, Any]]) -> None:
    found = jobs[0]["dynamic"]
    assert found["reasons"] == [[None, None], [BEYOND, BEYOND]] and found["most"] == [[16, 16]] * 2
    serves = (
        "trtllm serves fused sites of up to 16 KiB on a rank (16 tokens of 256 float32), and larger ones are left to"
    )
    why = "site 0-1: this graph is for more than 16 tokens, and trtllm wins up to 16 tokens of 256 float32; all-reduce,"
    for text in found["text"]:
        assert serves in " ".join(text.split())
    assert why in " ".join(found["text"][1].split())
    assert jobs[0]["large first"]["fuses"] == [True, True], "no warning that nothing is fused"
    assert jobs[0]["two limits"]["reasons"] == [[None] * 3, [BEYOND, BEYOND, None], [BEYOND] * 3]
    assert jobs[0]["two limits"]["most"][0] == [16, 16, 32]
    assert "larger ones are refused" in " ".join(jobs[0]["deterministic"]["text"][0].split())
    assert jobs[0]["deterministic"]["most"] == jobs[0]["reference"]["most"] == [[None, None]]


def test_a_capture_beyond_the_limit_is_of_what_runs_there(jobs: list[dict[str, Any]]) -> None:
    for found in jobs:
        assert found["captured"]["stats"] == [(1, 2), (1, 2)]


@pytest.mark.parametrize(
    ("name", "why"), [("a range of one's own", "mark_dynamic with min"), ("not known", "unbacked")]
)
def test_a_token_count_that_may_not_be_guarded_keeps_one_graph_and_says_so(
    jobs: list[dict[str, Any]], name: str, why: str
) -> None:
    ((note,),) = jobs[0][name]["notes"]
    assert note.startswith("sites 0-1: more than 16 tokens run on the reference, inside the op:") and why in note


def test_ranks_on_two_sides_of_a_limit_are_told(jobs: list[dict[str, Any]]) -> None:
    for found in jobs:
        assert found["apart"].startswith("RankMismatch: the ranks do not agree on the compiled graph: call 0 differs: ")
        assert (
            "all_reduce_rms_norm.default by trtllm" in found["apart"] and "rank 1: sum over 2 ranks" in found["apart"]
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_two_strategies_may_leave_counts_between_them_that_no_kernel_takes(dynamic: bool, fake_group: None) -> None:
    """As two-shot does, which needs more tokens than ranks; and rows of two dimensions count as their product."""
    counts, found = (range(1, 5), range(9, 17)), []
    groups = {"0": Group("0", "fake", 2, 0)}

    def look(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        (node,) = [n for n in gm.graph.nodes if n.target is torch.sin]
        found.append(ranges.is_within(node.meta["example_value"], counts, "0", groups))
        return gm.forward

    torch._dynamo.reset()
    call = torch.compile(torch.sin, backend=look, dynamic=dynamic)
    asked = {(2, 2): True, (2, 3): False, (2, 4): False, (3, 3): True, (4, 4): True, (4, 5): False}
    for batch, tokens in asked:
        call(torch.ones(batch, tokens, 8))
    assert found == (list(asked.values()) if not dynamic else [True, False, True, False])
    for batch, tokens in asked:
        call(torch.ones(batch, tokens, 8))
    assert len(found) == (6 if not dynamic else 4), "each is served by the graph of its range"


@pytest.mark.parametrize(("others", "alone"), [({}, False), ({"pair": (0, 1)}, False), ({"all": (0, 1, 2, 3)}, True)])
def test_ranks_that_others_wait_for_do_not_compile_anew_without_them(others: dict[str, Any], alone: bool) -> None:
    """Of a mesh, the ranks of another group may have another token count: in a graph over both, none is guarded."""
    there, found = {"tp": (0, 1), **others}, []
    groups = {name: Group(name, "gloo", len(ranks), 0) for name, ranks in there.items()}

    def look(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        (node,) = [n for n in gm.graph.nodes if n.target is torch.sin]
        found.append(ranges.is_within(node.meta["example_value"], (range(1, 5),), "tp", groups))
        return gm.forward

    torch._dynamo.reset()
    with mock.patch.object(ranges, "ranks_of", there.get):
        call = torch.compile(torch.sin, backend=look, dynamic=True)
        for tokens in (3, 5, 4, 6):
            call(torch.ones(tokens, 8))
    if alone:
        assert len(found) == 1 and "ranks of group 'all' may have another token count" in found[0]
    else:
        assert found == [True, False]
