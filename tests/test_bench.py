"""``ringfence bench``: what timings say, two ranks whose kernels are torch, and who cannot measure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_flashinfer import FakeFlashInfer, installed

from ringfence.cli import main
from ringfence.commands.terminal import USAGE
from ringfence.runtime.collectives.measure import Timing, as_text, measure, row_of, worth_up_to
from ringfence.runtime.collectives.measure_moe import measure_moe
from ringfence.runtime.collectives.size_table import read_table, write_table
from ringfence.runtime.collectives.workspace import workspaces_of
from ringfence.runtime.groups import describe_group
from ringfence.runtime.hazards.situation import Collective
from support import run_python, run_ranks

CPU = torch.device("cpu")
TRTLLM, SM90 = Collective.TRTLLM, (9, 0)


@pytest.mark.parametrize(
    ("ours", "up_to"),
    [
        ((1, 1, 1, 1), 8),
        ((1, 1, 3, 4), 2),
        ((3, 3, 3, 3), 0),
        ((2, 2, 2, 2), 0),  # nothing is gained
        ((2.1, 1, 1, 3), 4),  # noise at the smallest size does not cost the others
        ((1, 1, 4, 1.9), 2),  # nor does noise at the largest one bring a loss between
        ((1, 1, math.inf, math.inf), 2),
        ((math.inf, math.inf, math.inf, math.inf), 0),
    ],
)
def test_worth_up_to_the_size_that_gains_most(ours: tuple[float, ...], up_to: int) -> None:
    assert worth_up_to(zip((1, 2, 4, 8), ours, (2, 2, 2, 2), strict=True)) == up_to


def test_a_way_that_alone_exists_is_taken() -> None:
    assert worth_up_to([(1, 5.0, math.inf), (2, 5.0, math.inf), (4, 5.0, 4.0)]) == 2
    assert worth_up_to([(1, math.inf, math.inf), (2, 1.0, 2.0)]) == 2
    assert worth_up_to([]) == 0


def _timing(size: int, times: tuple[float, ...], bits: str = "same", hidden: int = 64) -> Timing:
    return Timing(hidden, size, *times, bits=frozenset([bits]))


#: size: NCCL with add and norm, NCCL; one-shot, two-shot, and both without a norm.
TIMES = {
    1: (10.0, 8.0, 4.0, math.inf, 4.0, math.inf),
    2: (10.0, 8.0, 5.0, 7.0, 5.0, 7.0),
    4: (11.0, 8.0, 8.0, 7.5, 8.0, 7.5),
    8: (15.0, 8.0, 20.0, 12.0, 19.0, 12.0),
    16: (20.0, 8.0, 40.0, 25.0, 40.0, 25.0),
}


def test_a_row_of_timings() -> None:
    row = row_of(TRTLLM, SM90, 4, [_timing(s, t) for s, t in TIMES.items()], "made up")
    assert (row.one_shot, row.fused, row.all_reduce, row.bitwise) == (2, 8, 4, True)
    assert (row.transport, row.world_size, row.source) == ("peer", 4, "made up")


def test_one_shot_ends_where_nothing_is_fused() -> None:
    without_two_shot = [
        _timing(s, (n, a, one, math.inf, plain, math.inf)) for s, (n, a, one, _, plain, _) in TIMES.items()
    ]
    row = row_of(TRTLLM, SM90, 2, without_two_shot, "made up")
    assert (row.one_shot, row.fused, row.all_reduce) == (4, 4, 2)
    slow = [_timing(s, (1.0, 1.0, *t[2:])) for s, t in TIMES.items()]
    row = row_of(TRTLLM, SM90, 2, slow, "made up")
    assert (row.one_shot, row.fused, row.all_reduce) == (0, 0, 0)


def test_bits_count_where_one_shot_serves() -> None:
    timings = [_timing(s, t, "same" if s < 16 else "other") for s, t in TIMES.items()]
    assert row_of(TRTLLM, SM90, 2, timings, "").bitwise  # 16 is by NCCL
    timings[1] = _timing(2, TIMES[2], "other")
    assert not row_of(TRTLLM, SM90, 2, timings, "").bitwise
    two_models = [_timing(s, t, str(h), h) for s, t in TIMES.items() for h in (64, 128)]
    row = row_of(TRTLLM, SM90, 2, two_models, "")
    assert row.bitwise and (row.one_shot, row.fused) == (2, 8)
    nothing = [_timing(s, (1.0, 1.0, *t[2:])) for s, t in TIMES.items()]
    assert not row_of(TRTLLM, SM90, 2, nothing, "").bitwise  # shown by nothing


def _measure(rank: int, fault: dict[str, Any]) -> dict[str, Any]:
    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    package = FakeFlashInfer(name, own=True, **(fault if rank == 1 else {}))
    sizes = [500, *(1 << power for power in range(10, 16))]
    with installed(package), torch.no_grad():
        measured = measure(
            describe_group(name, CPU), CPU, SM90, sizes, [256, 512], torch.float32, "a test", seconds=600
        )
    return {
        "measured": measured,
        "text": as_text(measured),
        "made": package.made,
        "closed": [k.closed for k in package.kernels],
        "open": len(workspaces_of(name).open),
    }


@pytest.mark.slow
def test_two_ranks_measure_what_they_have(tmp_path: Path) -> None:
    first, second = run_ranks(2, _measure, {})
    assert first["measured"] == second["measured"], "the slowest rank's times, on all ranks"
    measured = first["measured"]
    assert {row.collective for row in measured.rows} == {Collective.RINGFENCE, Collective.MNNVL, TRTLLM}
    assert not measured.missing
    sizes = [1 << power for power in range(10, 16)]
    for collective in (Collective.MNNVL, TRTLLM):  # fakes of FlashInfer's
        timings = measured.timings[collective]
        assert [t.size for t in timings] == sizes + sizes[1:]  # the second hidden size has rows of 2 KiB
        for t in timings:
            assert 0 < t.nccl < math.inf and 0 < t.nccl_all_reduce < math.inf
            assert 0 < t.one_shot < math.inf and 0 < t.all_reduce_one_shot < math.inf
            two_shot = collective is TRTLLM and t.size // (4 * t.hidden) > 2
            assert math.isfinite(t.two_shot) == math.isfinite(t.all_reduce_two_shot) == two_shot
        assert {len(t.bits) for t in timings} == {1}
    ways = ("ringfence/peer", "mnnvl/peer", "trtllm")
    assert first["made"] == [(n, 32 << 10 >> p, h) for h, p in ((256, 10), (512, 11)) for n in ways]
    assert all(first["closed"]) and first["open"] == 0
    assert "trtllm/peer: one-shot up to" in first["text"] and "mnnvl two-shot" in first["text"]
    write_table(tmp_path / "table.json", measured.rows)
    assert read_table(tmp_path / "table.json") == measured.rows


def test_what_cannot_be_had_is_named() -> None:
    for result in run_ranks(2, _measure, {"broken": ("mnnvl/peer",)}):
        measured = result["measured"]
        collectives = [row.collective for row in measured.rows]
        assert TRTLLM in collectives and Collective.MNNVL not in collectives
        assert "no memory left" in measured.missing[Collective.MNNVL]
        assert "mnnvl was not measured: " in result["text"]


@pytest.mark.parametrize(
    ("arguments", "ranks", "message"),
    [
        ((), None, "torchrun --nproc-per-node N -m ringfence bench"),
        ((), "1", "two or more ranks"),
        (("--sizes", "8Q"), None, "'8Q' is no size"),
        (("--sizes", "0"), None, "'0' is no size"),
        (("--hidden", "0"), None, "not a positive integer"),
        (("--dtype", "int8"), None, "is no value of"),
    ],
)
def test_bad_usage(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: tuple[str, ...],
    ranks: str | None,
    message: str,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    if ranks is not None:
        for name, value in (("RANK", "0"), ("WORLD_SIZE", ranks), ("LOCAL_RANK", "0")):
            monkeypatch.setenv(name, value)
    table = tmp_path / "table.json"
    try:
        code = main(["bench", "--write-table", str(table), *arguments])
    except SystemExit as usage:
        code = int(str(usage.code))
    out, err = capsys.readouterr()
    assert code == USAGE and message in err and not out and not table.exists()


def test_the_table_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench"])
    assert ended.value.code == USAGE and "--write-table" in capsys.readouterr().err


def test_the_first_rank_that_fails_speaks_for_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in (("USE_AGENT_STORE", "True"), ("RESTART_COUNT", "0")):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")  # a world of one, which is refused

    def said() -> int:
        assert main(["bench", "--write-table", str(tmp_path / "table.json")]) == USAGE
        return capsys.readouterr().err.count("two or more ranks")

    assert [said() for _ in range(3)] == [1, 0, 0]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun has started all of them again
    assert [said() for _ in range(2)] == [1, 0]
    for port in ("", "no port"):
        monkeypatch.setenv("MASTER_PORT", port)
        assert said() == 1, "without a store, each says it"
    monkeypatch.delenv("MASTER_PORT")
    assert said() == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_torchrun_without_a_gpu_is_refused(tmp_path: Path) -> None:
    """As a user starts it: none waits for the other, and it is said once."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ringfence", "bench")
    result = run_python(*launch, "--write-table", str(tmp_path / "table.json"))
    assert result.returncode and result.stderr.count("bench measures CUDA devices") == 1, result.stderr
    assert "exitcode  : 2" in result.stderr and "exitcode  : 1" not in result.stderr
    assert not (tmp_path / "table.json").exists()


@pytest.mark.parametrize("asked", [[], ["--moe"]])
def test_dispatch_and_combine_are_measured_where_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, asked: list[str]
) -> None:
    given: list[Any] = []
    monkeypatch.setattr("ringfence.runtime.collectives.measure.bench", lambda *args: given.extend(args) or "said")
    assert main(["bench", "--write-table", str(tmp_path / "table.json"), *asked]) == 0
    assert given[-1] is (measure_moe if asked else None) and "said" in capsys.readouterr().out
