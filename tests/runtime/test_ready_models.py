"""A compiled model gets the collective that is ready: what is made, what serves a site, what is reported."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fake_flashinfer import SMALL, FakeFlashInfer, installed
from torch import Tensor, nn

import ringfence
from ringfence.runtime.collectives import ops
from ringfence.runtime.collectives.size_table import write_table
from ringfence.runtime.collectives.workspace import close_workspaces, workspaces_of
from ringfence.runtime.errors import InputError, WorkspaceReplacedError
from support import run_ranks

H = 256
#: Simulated graphs replay by calling, and refuse what the host carries out.
OPS = ["ringfence::all_reduce_add_rms_norm", "ringfence::all_reduce_rms_norm", "ringfence::all_reduce"]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(H, eps=1e-5) for _ in range(2))
        for norm in self.norms:
            nn.init.normal_(norm.weight, 1.0, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = x.sin()
        dist.all_reduce(y)
        residual, x = x, self.norms[0](y)  # a norm without a residual
        y = F.silu(x)
        dist.all_reduce(y)
        x = self.norms[1](residual + y)
        y = x.sigmoid()
        dist.all_reduce(y)  # an all-reduce without a norm
        return y * 2


def _serve(
    rank: int, options: dict[str, Any], fault: dict[str, Any], sizes: list[int], own: bool = False
) -> dict[str, Any]:
    torch.manual_seed(5)
    model = Layers()
    backend = ringfence.Backend(**{"piece_compiler": "eager", "max_tokens": 64, **options})
    package = FakeFlashInfer(dist.group.WORLD.group_name, own=own, **(fault if rank == 1 else {}))
    with installed(package), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
        for n in sizes:
            x = torch.randn(n, H, generator=torch.Generator().manual_seed(n))
            torch.testing.assert_close(compiled(x), model(x))
        served = package.calls[-3 * sum(n <= 64 for n in sizes) :]  # the self-test's come before
        open_now = [w.transport and str(w.collective) for w in workspaces_of(package.group).open]
        close_workspaces(package.group)
        for n in sizes[:1]:  # without a workspace, the reference, and never nothing
            x = torch.randn(n, H, generator=torch.Generator().manual_seed(n))
            if not options.get("capture_sizes"):
                torch.testing.assert_close(compiled(x), model(x))
            else:
                with pytest.raises(WorkspaceReplacedError, match=r"torch\._dynamo\.reset"):
                    compiled(x)
    report = backend.reports[0]
    return {
        "reports": [r.to_dict() for r in backend.reports],
        "collective": report.collective,
        "candidates": list(report.candidates),
        "text": str(report),
        "fused_bytes": report.to_dict()["fused_bytes"],
        "served": served,
        "made": package.made,
        "closed": [k.closed for k in package.kernels],
        "open": open_now,
        "ops": [v.op for v in report.verdicts],
    }


def serve(rank: int, *args: Any) -> Any:
    return [_serve(rank, *a) for a in args] if isinstance(args[0], tuple) else _serve(rank, *args)


@pytest.mark.parametrize("piece_compiler", ["eager", "inductor"])
def test_auto_takes_what_is_first_and_serves_what_the_table_says(piece_compiler: str) -> None:
    results = run_ranks(2, serve, {"piece_compiler": piece_compiler}, {}, [4, 2, 65])
    for result in results:
        assert result["collective"] == "mnnvl"
        assert result["candidates"] == [
            "mnnvl/multicast: multicast is turned off (NCCL_NVLS_ENABLE=0 on rank 0)",
            "mnnvl/peer: chosen",
        ]
        assert result["made"] == [("mnnvl/peer", 64, H)]
        assert result["fused_bytes"] == 64 * H * 4
        assert (
            f"mnnvl serves fused sites of up to 64 KiB on a rank (64 tokens of {H} float32), and larger ones are left "
            "to the piece compiler, in a graph of their own" in result["text"]
        )
        fused, left = (report["sites"] for report in result["reports"])
        assert [(s["reason"], s["most_tokens"]) for s in fused] == [(None, 64), (None, 64), ("escapes_graph", None)]
        assert [s["reason"] for s in left] == ["beyond_table", "beyond_table", "escapes_graph"]
        assert not [v for v in result["reports"][1]["verdicts"] if v["op"].startswith("ringfence")]
        assert [c for c in result["served"] if c[1] == "all_reduce"], "the all-reduce without a norm"
        assert {c[2][0] for c in result["served"]} == {4, 2}
        assert result["closed"] == [True]
        assert result["ops"].count("ringfence::all_reduce") == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"wrong": ("mnnvl/peer",)}, "mnnvl/peer: its self-test failed: rank 1: eager, payload ordinary: norm of"),
        ({"broken": ("mnnvl/peer",)}, "its workspace could not be created (rank 1: no memory left)"),
    ],
    ids=["wrong", "broken"],
)
def test_what_fails_on_one_rank_is_passed_over_on_all(fault: dict[str, Any], reason: str) -> None:
    for result in run_ranks(2, serve, {}, fault, [4]):
        assert result["collective"] == "trtllm" and result["open"] == ["trtllm"]
        assert any(reason in c for c in result["candidates"]), result["candidates"]
        assert all(result["closed"])


def test_where_nothing_works_the_reference_does() -> None:
    fault = {"broken": ("ringfence/peer", "mnnvl/peer"), "wrong": ("trtllm",)}
    for result in run_ranks(2, serve, {}, fault, [4], True):
        assert result["collective"] == "reference" and result["candidates"][-1] == "reference: chosen"
        passed_over = [c.partition(":")[0] for c in result["candidates"][:-1]]
        assert passed_over == ["mnnvl/multicast", "ringfence/peer", "mnnvl/peer", "trtllm/peer"]
        sites = result["reports"][0]["sites"]
        assert [s["reason"] for s in sites] == ["no_kernel", "no_kernel", "escapes_graph"], "slower than not fusing"
        assert (
            "no kernels are to be had over group 'world'; all-reduce, add and norm are left to" in sites[0]["message"]
        )
        assert all(result["closed"])


def test_a_closed_workspace_ends_its_captures() -> None:
    for result in run_ranks(
        2, serve, {"capture_sizes": [4], "graphs": "simulated", "split_ops": OPS}, {}, [4, 4, 2, 4]
    ):
        assert result["collective"] == "mnnvl"


def test_a_table_of_ones_own_decides_and_a_transport_is_insisted_on(tmp_path: Path) -> None:
    own = str(tmp_path / "sizes.json")
    write_table(own, [SMALL])
    table = {"size_table": own, "collective": "trtllm"}, {}, [4]
    transport = {"transport": "peer", "collective": "mnnvl"}, {}, [4]
    for by_table, by_transport in run_ranks(2, serve, table, transport):
        assert by_table["fused_bytes"] == SMALL.fused
        assert by_transport["candidates"] == ["mnnvl/peer: chosen"]
        assert by_transport["made"] == [("mnnvl/peer", 64, H)]


def test_plain_all_reduces_can_be_left_alone() -> None:
    for result in run_ranks(2, serve, {"plain_all_reduce": False, "collective": "trtllm"}, {}, [4]):
        assert result["collective"] == "trtllm" and "ringfence::all_reduce" not in result["ops"]
        assert not [c for c in result["served"] if c[1] == "all_reduce"]


class Forms(nn.Module):
    """The first norm of a model has no residual, another one no weight, a third neither; Gemma's adds one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.weight = nn.Parameter(torch.randn(H) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        for residual, weight, bias in ((False, True, 1), (True, False, 0), (False, False, 0), (True, True, 0)):
            y = x.sin()
            dist.all_reduce(y)
            y = y + x if residual else y
            x = F.rms_norm(y, (H,), self.weight + bias if weight else None, 1e-5)
            x = x * 1.5 + y
        return x


def _forms(rank: int, collective: str) -> dict[str, Any]:
    package, model = FakeFlashInfer(dist.group.WORLD.group_name, own=True), Forms()
    backend = ringfence.Backend(piece_compiler="eager", collective=collective, max_tokens=8)
    with installed(package), torch.no_grad():
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        x = torch.randn(4, H, generator=torch.Generator().manual_seed(1))
        compiled(x)
        tested, count = set(package.epilogues[: -len(model_sites(backend))]), len(package.epilogues)
        torch.testing.assert_close(compiled(x), model(x))
        (workspace,) = workspaces_of(package.group).open
        served = package.epilogues[count:]
        found = {
            "served": [(e.residual, e.norm.has_weight) for e in served if e.norm is not None],
            "tested": sorted({(e.residual, e.norm.has_weight) for e in tested if e.norm is not None}),
            "constants": sorted(name for name, _ in workspace._constants),
            "message": "",
        }
        try:
            bad = torch.ones(H, dtype=torch.float64)
            ops.all_reduce_rms_norm(x, bad, 1e-6, 0.0, package.group, collective)
        except InputError as error:
            found["message"] = str(error)
        close_workspaces(package.group)
    return found


def model_sites(backend: ringfence.Backend) -> list[Any]:
    ringfence.assert_fused(backend.reports[0], count=4)
    return list(backend.reports[0].sites)


@pytest.mark.parametrize("collective", ["ringfence", "trtllm"])
def test_kernels_are_asked_for_what_a_site_has_and_for_no_more(collective: str) -> None:
    exact = [(False, True), (True, False), (False, False), (True, True)]
    for found in run_ranks(2, _forms, collective):
        assert "but it is torch.float64 [256] on cpu" in found["message"]
        if collective == "ringfence":
            assert found["served"] == exact and found["constants"] == [] and found["tested"] == sorted(exact)
        else:
            assert found["served"] == [(True, True)] * 4 and found["constants"] == ["ones", "zeros"]
            assert found["tested"] == [(True, True)]


def _conservative(rank: int, collective: str) -> tuple[Any, ...]:
    backend = ringfence.Backend(
        collective=collective,
        profile="conservative",
        capture_sizes=[4],
        graphs="simulated",
        max_tokens=64,
        piece_compiler="eager",
    )
    package = FakeFlashInfer(dist.group.WORLD.group_name)
    with installed(package), torch.no_grad():
        torch.compile(Layers(), backend=backend)(torch.randn(4, H))
        close_workspaces(package.group)
    (report,) = backend.reports
    rules = {(v.op, v.rule) for v in report.verdicts if v.op.startswith("ringfence")}
    return report.graphs, report.captured, [n for n in report.notes if "captured" in n], sorted(rules)


@pytest.mark.parametrize("collective", ["mnnvl", "trtllm"])
def test_the_conservative_profile_captures_nothing_of_a_graph_with_mnnvl(collective: str) -> None:
    """The rule of the field; it is about every call over the collective, with a norm or without."""
    for graphs, captured, notes, rules in run_ranks(2, _conservative, collective):
        if collective == "trtllm":
            assert (graphs, captured, notes) == ("simulated", (4,), [])
            continue
        names = ("all_reduce", "all_reduce_add_rms_norm", "all_reduce_rms_norm")
        assert rules == [(f"ringfence::{name}", "field") for name in names]
        assert (graphs, captured) == (None, ()) and "between them too" in notes[0] and len(notes) == 1


def _deterministic(rank: int) -> str:
    """A site that the kernel cannot carry out, among those that it can."""

    class Mixed(Layers):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            y = x[:, : H // 2].contiguous() * 2
            dist.all_reduce(y)
            return F.rms_norm(y, (H // 2,), None, 1e-6) + F.rms_norm(y[:, ::2].contiguous(), (H // 4,)).sum()

    class Narrow(Layers):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            y = x[:, :36].contiguous()
            dist.all_reduce(y)
            return F.rms_norm(y, (36,), None, 1e-6)

    package = FakeFlashInfer(dist.group.WORLD.group_name)
    with installed(package), torch.no_grad():
        options = {"deterministic": True, "max_tokens": 64, "piece_compiler": "eager"}
        torch.compile(Mixed(), backend=ringfence.Backend(**options))(torch.randn(4, H))
        with pytest.raises(Exception, match="does not carry out site 3") as caught:
            torch.compile(Narrow(), backend=ringfence.Backend(**options))(torch.randn(4, H))
        close_workspaces(package.group)
    return str(getattr(caught.value, "inner_exception", caught.value))


def test_deterministic_refuses_a_site_that_another_kernel_would_carry_out() -> None:
    for message in run_ranks(2, _deterministic):
        assert message.startswith("deterministic=True: mnnvl does not carry out site 3")
