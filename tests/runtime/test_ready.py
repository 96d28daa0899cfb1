"""From facts to a collective that is ready, on gloo ranks with kernels that are torch."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fake_flashinfer import FACTS, SMALL, FakeFlashInfer, installed

from ringfence.runtime.channel import open_channel
from ringfence.runtime.collectives import group_facts, ops, ready
from ringfence.runtime.collectives.choice import choose
from ringfence.runtime.collectives.kernels import Implementation
from ringfence.runtime.collectives.ready import Wanted, prepare, situation_of
from ringfence.runtime.collectives.ringfence import IMPLEMENTATION as OWN
from ringfence.runtime.collectives.tested import SelfTest
from ringfence.runtime.collectives.workspace import close_workspaces, workspaces_of
from ringfence.runtime.errors import CollectiveUnavailableError, InputError, RingfenceError, WorkspaceError
from ringfence.runtime.groups import describe_group
from ringfence.runtime.hazards.catalogue import applicable
from ringfence.runtime.hazards.situation import Collective, Situation, Strategy
from ringfence.runtime.watch.health import Health
from support import run_ranks

H = 256
CPU = torch.device("cpu")


def _sizes(rank: int) -> dict[str, Any]:
    name = dist.group.WORLD.group_name
    group = describe_group(name, CPU)
    package = FakeFlashInfer(name)
    seen: dict[str, Any] = {}
    with installed(package):
        wanted = Wanted("trtllm", "auto", H, torch.float32, table=(SMALL,))
        carrier = prepare(open_channel(group.name, seconds=120), group, CPU, wanted)
        tested = len(package.calls)
        weight = torch.ones(H)
        for tokens in (1, 8, 9, 16, 17):
            x = torch.randn(tokens, H)
            before = len(package.calls)
            norm, out = ops.all_reduce_add_rms_norm(x, x, weight, 1e-6, 0.0, name, "trtllm")
            assert norm.shape == out.shape == x.shape
            seen[f"fused {tokens}"] = package.calls[before][1] if len(package.calls) > before else "reference"
        for tokens in (4, 5):
            before = len(package.calls)
            ops.all_reduce(torch.randn(tokens, H), name, "trtllm")
            seen[f"sum {tokens}"] = package.calls[before][1] if len(package.calls) > before else "reference"
        before = len(package.calls)
        ops.all_reduce_rms_norm(torch.randn(2, 2, H), None, 1e-6, 1.0, name, "trtllm")
        seen["three dimensions"] = package.calls[before][2]
        ops.all_reduce_rms_norm(torch.randn(2, H, dtype=torch.float64), None, 1e-6, 0.0, name, "trtllm")
        seen["float64"] = len(package.calls) - before - 1
        for bad in (weight.double(), torch.ones(H // 2)):
            with pytest.raises(InputError, match="weight must be"):
                ops.all_reduce_add_rms_norm(torch.randn(2, H), torch.randn(2, H), bad, 1e-6, 0.0, name, "trtllm")
        calls = len(package.calls)
        again = prepare(open_channel(group.name, seconds=120), group, CPU, wanted)
        seen["tested once"] = tested > 0 and len(package.calls) == calls
        seen["largest"] = carrier.workspace.largest
        carrier.workspace.kernels.strategies = (Strategy.ONE_SHOT,)
        seen["largest by one-shot"] = carrier.workspace.largest
        carrier.workspace.kernels.strategies = (Strategy.ONE_SHOT, Strategy.TWO_SHOT)
        seen["shared"] = again.workspace is carrier.workspace and len(package.made) == 1
        more = Wanted("trtllm", "auto", H, torch.bfloat16, table=(SMALL,))
        larger = prepare(open_channel(group.name, seconds=120), group, CPU, more)
        seen["another dtype"] = larger.workspace is not carrier.workspace and len(package.made) == 2
        for limit, expected in ((4, True), (9, False)):
            deterministic = Wanted(
                "trtllm", "auto", H, torch.float32, max_tokens=limit, deterministic=True,
                table=(SMALL,),
            )  # fmt: skip
            if expected:
                assert prepare(open_channel(group.name, seconds=120), group, CPU, deterministic).collective == "trtllm"
            else:
                with pytest.raises(CollectiveUnavailableError, match="beyond the 8 tokens that one strategy"):
                    prepare(open_channel(group.name, seconds=120), group, CPU, deterministic)
        with pytest.raises(CollectiveUnavailableError, match="multiple of 512 bytes"):
            prepare(open_channel(group.name, seconds=120), group, CPU, Wanted("trtllm", "auto", 100, torch.float32))
        close_workspaces(name)
    return seen


def test_sizes_and_shapes_go_where_the_table_says() -> None:
    for seen in run_ranks(2, _sizes):
        assert seen == {
            "fused 1": "one-shot",
            "fused 8": "one-shot",
            "fused 9": "two-shot",
            "fused 16": "two-shot",
            "fused 17": "reference",
            "sum 4": "all_reduce",
            "sum 5": "reference",
            "largest": 16 * H * 4,
            "largest by one-shot": 8 * H * 4,
            "three dimensions": (4, H),
            "float64": 0,
            "shared": True,
            "tested once": True,
            "another dtype": True,
        }


def _half(rank: int, guarded: bool) -> Any:
    """Float16 on two ranks whose mnnvl kernel squares in float16, as FlashInfer's does."""
    name = dist.group.WORLD.group_name
    group = describe_group(name, CPU)
    package = FakeFlashInfer(name)
    seen: dict[str, Any] = {}
    with installed(package), contextlib.ExitStack() as stack:
        if not guarded:
            stack.enter_context(mock.patch.object(Implementation, "unmet", lambda *_: None))
            stack.enter_context(mock.patch("ringfence.runtime.collectives.choice.applicable", lambda _: ()))
        made = prepare(
            open_channel(name, seconds=120), group, CPU, Wanted("auto", "auto", H, torch.float16, max_tokens=8)
        )
        seen["collective"], seen["candidates"] = str(made.collective), [str(c) for c in made.candidates]
        seen["made"] = [m[0] for m in package.made]
        x, residual, weight = torch.randn(4, H).half(), torch.zeros(4, H).half(), torch.ones(H).half()
        residual[1, 3], residual[2, 0], residual[3, 9] = 300, 5000, 60000
        norm, out = ops.all_reduce_add_rms_norm(x, residual, weight, 1e-6, 0.0, name, seen["collective"])
        right = F.rms_norm(out.float(), (H,), None, 1e-6)
        seen["error"] = float((norm.float() - right).abs().max() / right.abs().max())
        close_workspaces(name)
    return seen


def test_float16_is_never_carried_out_by_mnnvl() -> None:
    for seen in run_ranks(2, _half, True):
        assert seen["collective"] == "trtllm" and seen["made"] == ["trtllm"]
        assert "mnnvl/peer: M49, a row with a large element has the norm 0: Use bfloat16" in str(seen["candidates"])
        assert seen["error"] < 2e-3


def test_the_self_test_finds_it_where_no_table_does() -> None:
    for seen in run_ranks(2, _half, False):
        assert seen["collective"] == "trtllm" and seen["made"] == ["mnnvl/peer", "trtllm"]
        lost = "payload large: norm of 1 x 256 torch.float16 one-shot is wrong: row 0 is lost"
        assert f"rank 0: eager, {lost}" in str(seen["candidates"]) and f"rank 1: eager, {lost}" in str(
            seen["candidates"]
        )
        assert seen["error"] < 2e-3


def _dtypes(rank: int, collective: str) -> Any:
    """A workspace for bfloat16, and calls of other dtypes over the same group."""
    name = dist.group.WORLD.group_name
    package = FakeFlashInfer(name)
    others = (torch.float16, torch.float32)
    with installed(package):
        wanted = Wanted(collective, "auto", H, torch.bfloat16, max_tokens=8, other_dtypes=others)
        made = prepare(open_channel(name, seconds=120), describe_group(name, CPU), CPU, wanted)
        seen: dict[str, Any] = {"notes": made.notes, "dtype": made.situation.dtype}
        for dtype in (torch.bfloat16, *others):
            before, residual = len(package.calls), torch.zeros(4, H, dtype=dtype)
            residual[1, 3] = 300
            x = torch.randn(4, H).to(dtype)
            norm, out = ops.all_reduce_add_rms_norm(x, residual, None, 1e-6, 0.0, name, collective)
            ops.all_reduce(x, name, collective)
            assert norm.abs().amax(-1).gt(1).all() and out.dtype == dtype
            seen[str(dtype)] = len(package.calls) - before
        close_workspaces(name)
    return seen


def test_a_workspace_serves_the_dtypes_that_were_tested_and_no_other() -> None:
    for seen in run_ranks(2, _dtypes, "mnnvl"):
        assert seen["torch.bfloat16"] == seen["torch.float32"] == 2 and seen["torch.float16"] == 0
        (note,) = seen["notes"]
        assert note.startswith("calls of torch.float16 are carried out by the reference: one-shot squares in float16")
        assert seen["dtype"] == "bfloat16"
    for seen in run_ranks(2, _dtypes, "trtllm"):
        assert seen["torch.bfloat16"] == seen["torch.float16"] == 2 and seen["torch.float32"] == 0
        assert seen["notes"] == (
            "calls of torch.float32 are carried out by the reference: the workspace of trtllm is for torch.bfloat16",
        )


def _unlike(rank: int, what: str) -> str:
    """Ranks that ask for different things, and a rank that cannot even look at itself."""
    name = dist.group.WORLD.group_name
    group = describe_group(name, CPU)
    sizes = (4, 8) if what == "sizes" and rank == 1 else (4,)
    collective = {"forced": "trtllm"}.get(what, "auto")
    with installed(FakeFlashInfer(name)):
        broken = mock.patch.object(group_facts, "probe", side_effect=RuntimeError("no driver"))
        with broken if rank == 1 and what != "sizes" else contextlib.nullcontext():
            try:
                wanted = Wanted(collective, "auto", H, torch.float32, sizes=sizes, max_tokens=8)
                return str(prepare(open_channel(group.name, seconds=120), group, CPU, wanted).candidates[0])
            except RingfenceError as error:
                return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("sizes", "RankMismatch: the ranks want different collectives: sizes differs: rank 0: "),
        ("auto", "mnnvl: rank 1: RuntimeError: no driver"),
        ("forced", "CollectiveUnavailableError: collective='trtllm' cannot be had: rank 1: RuntimeError: no driver"),
    ],
)
def test_ranks_that_are_unlike_end_alike(what: str, said: str) -> None:
    for answer in run_ranks(2, _unlike, what):
        assert answer.startswith(said)


def _transports(rank: int) -> str:
    name = dist.group.WORLD.group_name
    facts = dataclasses.replace(FACTS, capability=(10, 0), multicast=True, opt_outs=())
    with installed(FakeFlashInfer(name), facts):
        wanted = Wanted("mnnvl", "peer", H, torch.float32, max_tokens=8)
        prepare(open_channel(name, seconds=120), describe_group(name, CPU), CPU, wanted)
        with pytest.raises(CollectiveUnavailableError, match=r"close_workspaces") as caught:
            wanted = dataclasses.replace(wanted, transport="multicast")
            prepare(open_channel(name, seconds=120), describe_group(name, CPU), CPU, wanted)
    return str(caught.value)


def test_a_group_does_not_mix_transports() -> None:
    for message in run_ranks(2, _transports):
        assert message.startswith("mnnvl over multicast was asked for, and the group uses it over peer")


def _facts(rank: int) -> str:
    name = dist.group.WORLD.group_name
    facts = FACTS if rank == 0 else type(FACTS)(**(vars(FACTS) | {"flashinfer": "0.7.0"}))
    with installed(FakeFlashInfer(name), facts):
        wanted = Wanted("auto", "auto", H, torch.float32)
        return str(prepare(open_channel(name, seconds=120), describe_group(name, CPU), CPU, wanted).candidates[1])


def test_ranks_with_other_packages_do_not_share_a_kernel() -> None:
    assert run_ranks(2, _facts) == ["mnnvl/peer: ranks differ in flashinfer: rank 0: 0.7.2.post1; rank 1: 0.7.0"] * 2


def _sparks(rank: int) -> Any:
    name = dist.group.WORLD.group_name
    facts = dataclasses.replace(FACTS, host=f"spark{rank}", capability=(12, 1))
    with installed(FakeFlashInfer(name), facts):
        wanted = Wanted("auto", "auto", H, torch.float32)
        return prepare(open_channel(name, seconds=120), describe_group(name, CPU), CPU, wanted).situation


def test_the_reference_knows_the_machines_that_it_runs_on() -> None:
    """No row of the size table is about them; what stays with NCCL is judged by them all the same."""
    expected = Situation(Collective.REFERENCE, world_size=2, nodes=2, capability=(12, 1))
    assert run_ranks(2, _sparks) == [expected] * 2


def _small(rank: int) -> Any:
    name = dist.group.WORLD.group_name
    with installed(FakeFlashInfer(name)):
        wanted = Wanted("trtllm", "auto", H, torch.float32, max_tokens=8)
        return prepare(open_channel(name, seconds=120), describe_group(name, CPU), CPU, wanted).situation


def test_a_workspace_of_small_calls_serves_one_strategy() -> None:
    """So one-shot and two-shot share no counter (M12): what max_tokens can do about that row."""
    for situation in run_ranks(2, _small):
        assert situation.collective is Collective.TRTLLM and situation.strategy is Strategy.ONE_SHOT
        assert "M12" not in [hazard.id for hazard in applicable(situation)]
    choice = choose([FACTS] * 2, wanted="trtllm")
    assert "M12" in [hazard.id for hazard in applicable(situation_of(choice, [FACTS] * 2, dtype="bfloat16"))]


def _invalid(rank: int, stuck: bool) -> Any:
    """A failure on one rank; then the next graph of the group, and what became of the workspaces."""
    name = dist.group.WORLD.group_name
    group, package = describe_group(name, CPU), FakeFlashInfer(name)
    wanted = Wanted("trtllm", "auto", H, torch.float32, max_tokens=8)
    workspaces, mine, other = workspaces_of(name), Health(), Health()
    for health in (mine, other):
        health.share(workspaces)
    with installed(package):
        first = prepare(open_channel(name, seconds=120), group, CPU, wanted).workspace
        assert first is not None
        if rank == 1:
            mine.poison("rank 1 failed in step 3")
            if stuck:
                error = WorkspaceError("cuda:1 does not come back; end the process")
                workspaces._wait_for_device = mock.Mock(side_effect=error)  # type: ignore[method-assign]
        try:
            second = prepare(open_channel(name, seconds=120), group, CPU, wanted).workspace
        except WorkspaceError as error:
            return str(error)
        assert second is not None
        x, weight = torch.randn(4, H), torch.ones(H)
        norm, _ = ops.all_reduce_add_rms_norm(x, x, weight, 1e-6, 0.0, name, "trtllm")
        return {
            "new": second is not first,
            "closed": (first.closed, second.closed),
            "open": len(workspaces.open),
            "poisoned": (mine.poisoned, other.poisoned),
            "finite": bool(norm.isfinite().all()),
            "invalid": workspaces.invalid,
        }


def test_a_failure_makes_invalid_the_workspaces_and_the_next_graph_makes_new_ones_on_all_ranks() -> None:
    fine, failed = run_ranks(2, _invalid, False)
    same = {"new": True, "closed": (True, False), "open": 1, "finite": True, "invalid": None}
    assert fine == {**same, "poisoned": (None, None)}
    why = "rank 1 failed in step 3"
    assert failed == {**same, "poisoned": (why, why)}  # and with it whoever shares them


def test_where_a_kernel_still_polls_no_rank_makes_new_ones() -> None:
    for message in run_ranks(2, _invalid, True):
        assert message == (
            "the workspaces of this group cannot be made anew after a failure (rank 1 failed in step 3): "
            "rank 1: cuda:1 does not come back; end the process"
        )


@pytest.mark.parametrize(
    ("most", "tried"), [(4096, (1, 2, 4, 8, 9, 10, 11, 17, 65, 129, 4096)), (64, (1, 4, 17, 32, 64))]
)
def test_every_count_at_which_the_kernel_changes_is_tried(most: int, tried: tuple[int, ...]) -> None:
    """Also where many sizes are captured, of which only some are."""
    sizes = (2, 8, 9, 10, 11, 12, 13, 14, 4096) if most == 4096 else ()
    wanted = Wanted("ringfence", "peer", H, torch.float32, sizes=sizes)
    workspace = mock.Mock(implementation=OWN, tested={}, passed=set())
    with mock.patch.object(ready, "self_test", return_value=SelfTest(None, None, 1)) as asked:
        ready._tested(workspace, mock.Mock(), wanted, torch.float32, most * H * 4)
    assert asked.call_args.args[4] == tried and asked.call_args.kwargs["alone"] is True
    assert workspace.passed == {torch.float32}
