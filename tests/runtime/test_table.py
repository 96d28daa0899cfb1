"""A collective is a file and a row: one of our own, registered in a table of the test, without FlashInfer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from fake_flashinfer import FACTS, FakeFlashInfer, installed
from torch import Tensor

from ringfence.compile_passes.rules import _DEVICE_EPOCH
from ringfence.options import Options
from ringfence.runtime.channel import Channel, open_channel
from ringfence.runtime.collectives import group_facts, ops, reference, table
from ringfence.runtime.collectives.choice import choose
from ringfence.runtime.collectives.epilogue import Epilogue, RmsNorm
from ringfence.runtime.collectives.kernels import Implementation, KernelCall
from ringfence.runtime.collectives.ready import Wanted, prepare
from ringfence.runtime.collectives.size_table import TABLE, SizeRow
from ringfence.runtime.collectives.workspace import close_workspaces, workspaces_of
from ringfence.runtime.groups import describe_group
from ringfence.runtime.hazards.situation import Collective, Strategy
from ringfence.runtime.protocol.plan import MODELLED
from support import run_ranks

H = 256
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]

# -- the file


class GatherKernels:
    """One-shot by an all-gather: every rank adds the parts in the same order."""

    strategies = (Strategy.ONE_SHOT,)
    memory = None

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.calls, self.closed = group, 0, False

    def run(
        self,
        x: Tensor,
        epilogue: Epilogue,
        strategy: Strategy,
        operands: tuple[Tensor, Tensor] | None,
        norm: Tensor | None,
        out: Tensor,
    ) -> None:
        self.calls += 1
        parts = [torch.empty_like(x) for _ in range(self.group.size())]
        dist.all_gather(parts, x, group=self.group)
        total = torch.stack([p.float() for p in parts]).sum(0).to(x.dtype)
        results = reference.apply(epilogue, total, *(operands or (None, None)))
        for result, to in zip(reversed(results), (out, norm), strict=False):
            assert to is not None
            to.copy_(result)

    def holds(self, call: KernelCall) -> bool:
        return True

    def wait_for(self, seconds: float) -> None:
        self.seconds = seconds

    def check(self) -> None:
        pass

    def control_words(self) -> tuple[int, ...]:
        return ()

    def close(self) -> None:
        self.closed = True


def make(channel: Channel, group: dist.ProcessGroup, max_tokens: int, hidden: int, dtype: torch.dtype) -> GatherKernels:
    channel.barrier("gather: made")
    return GatherKernels(group)


# -- the row

GATHER = Implementation("gather", "gloo", make=make, strategies=(Strategy.ONE_SHOT,))


def _own(rank: int) -> Any:
    name = dist.group.WORLD.group_name
    facts = dataclasses.replace(FACTS, flashinfer=None, flashinfer_missing="FlashInfer is not installed")
    row = SizeRow("gather", "gloo", (9, 0), 2, 64 << 10, 64 << 10, 64 << 10, "a test")
    wanted = Wanted("auto", "auto", H, torch.bfloat16, max_tokens=8, table=(row,))
    with mock.patch.object(group_facts, "probe", lambda device: facts):
        made = prepare(open_channel(name, seconds=120), describe_group(name, CPU), CPU, wanted, (GATHER, *table.ALL))
    assert made.workspace is not None
    tested = made.workspace.kernels.calls
    generator = torch.Generator().manual_seed(rank)
    x, residual = torch.randn(4, H, generator=generator).bfloat16(), torch.full((4, H), 3.0).bfloat16()
    seen: dict[str, Any] = {
        "collective": made.collective,
        "situation": str(made.situation.collective),
        "tested": tested,
        "seconds": made.workspace.kernels.seconds,
    }
    norm, total = ops.all_reduce_add_rms_norm(x, residual, None, 1e-6, 0.0, name, "gather")
    right, sums = ops.all_reduce_add_rms_norm(x, residual, None, 1e-6, 0.0, name, "reference")
    seen["same"] = torch.equal(total, sums) and torch.equal(norm, right)
    seen["sum"] = torch.equal(ops.all_reduce(x, name, "gather"), ops.all_reduce(x, name, "reference"))
    seen["calls"] = made.workspace.kernels.calls - tested
    close_workspaces(name)
    seen["closed"] = made.workspace.kernels.closed
    return seen


def test_ones_own_collective_is_chosen_tested_called_and_closed() -> None:
    for seen in run_ranks(2, _own):
        assert seen["collective"] == seen["situation"] == "gather" and seen["tested"] > 7
        assert seen["seconds"] == 30.0, "how long a kernel may wait, before the first call"
        assert seen["same"] and seen["sum"] and seen["calls"] == 2 and seen["closed"]


def test_a_missing_flashinfer_bars_its_own_collectives_alone() -> None:
    ranks = [dataclasses.replace(FACTS, flashinfer=None, flashinfer_missing="not here")] * 2
    row = SizeRow("gather", "gloo", (9, 0), 2, 1, 1, 1, "a test", bitwise=True)
    failed = {("ringfence", "peer"): "its workspace could not be created"}
    among = (*table.ALL[:-1], GATHER, table.ALL[-1])
    found = choose(ranks, table=(row, *TABLE), among=among, failed=failed)
    assert choose(ranks, among=among).collective is Collective.RINGFENCE
    assert found.implementation is GATHER
    assert [(str(c.collective), c.why_not) for c in found.candidates] == [
        ("mnnvl", "not here"),
        ("ringfence", "its workspace could not be created"),
        ("mnnvl", "not here"),
        ("trtllm", "not here"),
        ("gather", None),
    ]
    assert choose(ranks, table=(row,), among=(GATHER,), deterministic=True).row is row


def test_every_row_of_the_table_is_whole() -> None:
    names = list(dict.fromkeys(str(one.name) for one in table.ALL))
    assert names == ["mnnvl", "ringfence", "trtllm", "reference"] and table.ALL[-1].make is None
    assert len({(one.name, one.transport) for one in table.ALL}) == len(table.ALL)
    for one in table.ALL:
        assert (one.make is None) == (one.model is None), "a protocol that hangs has a model"
        assert one.model is None or one.model in MODELLED
        assert (one.name in _DEVICE_EPOCH) == one.epoch_on_device
        assert Options.parse({"collective": str(one.name)}).collective == one.name


def test_nothing_but_its_file_and_tables_of_data_knows_a_collective_by_name() -> None:
    at_home = {f"runtime/collectives/{name}.py" for name in ("mnnvl", "trtllm", "ringfence", "table")}
    # sizes; the names that type checkers offer; what vLLM calls its own
    data = {"runtime/collectives/size_table.py", "front/keywords.py", "front/integrations/vllm/guard.py"}
    for folder in ("front", "compile_passes", "runtime/collectives", "runtime/watch", "runtime/replay"):
        for path in (ROOT / folder).rglob("*.py"):
            name, text = str(path.relative_to(ROOT)), path.read_text()
            if name not in at_home | data:
                for word in ("Collective.MNNVL", "Collective.TRTLLM", "Collective.RINGFENCE", '"mnnvl"', '"trtllm"'):
                    assert word not in text, f"{name} switches on {word}"


# -- several groups in one process


def _groups(rank: int) -> Any:
    """Three ranks, two groups with different ranks; rank 1 is in both."""
    both = [dist.new_group([0, 1]), dist.new_group([1, 2])]
    mine = [group for group, ranks in zip(both, ((0, 1), (1, 2)), strict=True) if rank in ranks]
    seen = []
    for group in mine:
        name = group.group_name
        package = FakeFlashInfer(name)
        with installed(package):
            wanted = Wanted("auto", "auto", H, torch.float32, max_tokens=8)
            made = prepare(open_channel(name, seconds=120), describe_group(name, CPU), CPU, wanted)
        assert made.workspace is not None
        seen.append((made.workspace, package, name))
    answers = []
    for workspace, package, name in seen:
        before = len(package.calls)
        x = torch.full((2, H), float(rank + 1))
        norm, total = ops.all_reduce_rms_norm(x, None, 1e-6, 0.0, name, str(workspace.collective))
        assert workspaces_of(name).open == (workspace,)
        answers.append((float(total[0, 0]), round(float(norm[0, 0]), 3), len(package.calls) - before))
    for place, (workspace, _, name) in enumerate(seen):
        close_workspaces(name)
        assert workspace.closed and all(not other.closed for other, *_ in seen[place + 1 :]), "that of the other stays"
    return answers


def test_two_groups_of_one_process_have_workspaces_of_their_own() -> None:
    first, second = (3.0, 1.0, 1), (5.0, 1.0, 1)
    assert run_ranks(3, _groups) == [[first], [first, second], [second]]


def test_the_meaning_of_an_epilogue() -> None:
    generator = torch.Generator().manual_seed(3)
    x, residual, weight = (torch.randn(n, H, generator=generator).double() for n in (4, 4, 1))
    (alone,) = reference.apply(Epilogue(), x)
    assert alone is x
    for bias, given in ((0.0, weight[0]), (1.0, weight[0]), (0.0, None)):
        for add in (True, False):
            epilogue = Epilogue(add, RmsNorm(1e-5, bias, given is not None))
            norm, total = reference.apply(epilogue, x, residual if add else None, given)
            right = x + residual if add else x
            scale = 1.0 if given is None else given + bias
            torch.testing.assert_close(total, right)
            torch.testing.assert_close(norm, right / torch.sqrt((right * right).mean(-1, keepdim=True) + 1e-5) * scale)
