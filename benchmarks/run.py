"""`make bench`: what the compile path costs, each figure beside its peer in the same run.

Prints a table and exits with 1 when a target is missed. docs/measurements.md keeps the figures.
"""

from __future__ import annotations

import copy
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import caches
import passes
import runner
import torch
import torch.distributed as dist
from passes import HIDDEN, TOKENS, eighty_layers, site, traced
from runner import PIECES
from tabulate import tabulate
from torch import Tensor
from torch._inductor import pattern_matcher
from torch.fx import GraphModule
from torch.testing._internal.distributed.fake_pg import FakeStore

import ringfence
from ringfence.compile_passes import find, fuse
from ringfence.compile_passes.assignment import Assignment
from ringfence.compile_passes.in_place import write_in_place
from ringfence.compile_passes.judge import judge
from ringfence.compile_passes.lower import eager_piece, lower
from ringfence.compile_passes.parts import cut
from ringfence.compile_passes.split import split
from ringfence.runtime.collectives import ops
from ringfence.runtime.groups import Group
from ringfence.runtime.hazards.situation import Strategy
from ringfence.runtime.protocol import plan
from ringfence.runtime.protocol.calls import program
from ringfence.runtime.protocol.explore import ModelFailure, explore
from ringfence.runtime.protocol.mnnvl import mnnvl
from ringfence.runtime.protocol.rules import mnnvl_rules
from ringfence.runtime.watch.journal import REPLAY, Journal, PieceNote, ProgramNote


@dataclass(frozen=True)
class Row:
    """One measurement: ours, the peer's, and what was asked for."""

    what: str
    ours: str
    peer: str
    target: str
    met: bool


def median_ms(body: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        body()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


# -- find and fuse -------------------------------------------------------------------


def ringfence_pass(gm: GraphModule) -> int:
    return sum(s.fused for s in fuse(gm, find(gm)))


def inductor_pass(gm: GraphModule) -> int:
    def replacement(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return ops.all_reduce_add_rms_norm(x, residual, weight, 1e-6, 0.0, "0", "reference")

    patterns = pattern_matcher.PatternMatcherPass()
    inputs = [torch.randn(s) for s in ((TOKENS, HIDDEN), (TOKENS, HIDDEN), (HIDDEN,))]
    pattern_matcher.register_replacement(site, replacement, inputs, traced, patterns, skip_duplicates=True)
    return int(patterns.apply(gm.graph))


def bench_passes() -> Row:
    graph = eighty_layers()
    ours_ms, peer_ms = [], []
    for _ in range(5):
        for run, times in ((ringfence_pass, ours_ms), (inductor_pass, peer_ms)):
            gm = copy.deepcopy(graph)
            start = time.perf_counter()
            count = run(gm)
            times.append((time.perf_counter() - start) * 1e3)
            assert count == 2 * passes.LAYERS, f"{run.__name__} fused {count} of {2 * passes.LAYERS} sites"
    ours, peer = statistics.median(ours_ms), statistics.median(peer_ms)
    return Row(
        f"find + fuse, {passes.LAYERS} layers ({2 * passes.LAYERS} sites); peer: Inductor register_replacement",
        f"{ours:.1f} ms",
        f"{peer:.0f} ms ({peer / ours:.0f}x)",
        "<= 50 ms, >= 20x",
        ours <= 50 and peer / ours >= 20,
    )


def bench_split() -> Row:
    gm = eighty_layers()
    fuse(gm, find(gm))
    verdicts = judge(gm, Assignment({"0": Group("0", "gloo", 2, 0)}), capture=True)
    start = time.perf_counter()
    plan, whole = split(gm, write_in_place(gm, cut(gm, verdicts), eager_pieces=True))
    lower(plan, whole, eager_piece, [n.name for n in gm.graph.find_nodes(op="placeholder")], frozenset())
    spent = (time.perf_counter() - start) * 1e3
    return Row(f"cut + split + lower into {len(plan.pieces)} parts", f"{spent:.0f} ms", "", "", True)


# -- the runner ------------------------------------------------------------------------


def bench_runner() -> list[Row]:
    """CPU time, and the least of many: what `benchmarks/runner.py --against COMMIT` compares with another commit's."""
    least = runner.cost(400)
    bare = least.pop("bare")
    named = {
        **{name: f"per piece of {runner.PIECES} with {runner.PARAMETERS} parameters, {name}" for name in least},
        "one piece": f"of a replay of one piece with {runner.LAYER_PARAMETERS} parameters, inputs and outputs copied",
    }
    return [
        Row(
            f"runner {named[name]}; peer: a bare call",
            f"{us:.2f} us",
            f"{bare:.2f} us ({us / bare:.1f}x)",
            f"<= {runner.TARGETS[name]}x",
            us <= runner.TARGETS[name] * bare,
        )
        for name, us in least.items()
    ]


def bench_journal() -> Row:
    """What the journal adds to each piece: two marks, and its share of the step's own."""
    journal = Journal()
    notes = tuple(PieceNote(f"submod_{i}", i % 2 == 1, ("0",) if i % 2 else ()) for i in range(PIECES))
    program, sizes = journal.register(ProgramNote(notes)), (TOKENS,)

    def marked() -> None:
        marks = journal.begin(program, sizes, REPLAY)
        for _ in marks.each(notes):
            pass
        marks.end()

    def unmarked() -> None:
        for _ in notes:
            pass

    each = (median_ms(marked, 500) - median_ms(unmarked, 500)) / PIECES * 1e3
    return Row(f"journal per piece of {PIECES}, host side", f"{each:.2f} us", "", "<= 1 us", each <= 1)


# -- the protocol models -----------------------------------------------------------------


def bench_models() -> list[Row]:
    """Exploring small programs exhaustively, and deciding the plan of 80 layers on 4 ranks."""
    small = mnnvl([program([2, 1, 2, 1])] * 2, mnnvl_rules("0.7.0"))
    start = time.perf_counter()
    states = explore(small).states
    rows = [
        Row(
            "states per second, every order of 4 one-shot calls on 2 ranks",
            f"{states / (time.perf_counter() - start):,.0f}",
            f"{states} states",
            "",
            True,
        )
    ]
    for collective in ("mnnvl", "trtllm"):
        for strategy in (Strategy.ONE_SHOT, Strategy.TWO_SHOT):
            rank = plan.PlannedRank(plan.even_pieces(passes.LAYERS, 2, 33, strategy), (16, 8, 8, 16), (8, 16))
            start = time.process_time()
            result = plan.check(collective, "0.7.0", plan.programs([rank] * 4))
            spent = time.process_time() - start
            # Sizes change between the steps, and with them the grids of trtllm's two-shot: that is not safe (M58).
            unsafe = ModelFailure.STALE_READ if (collective, strategy) == ("trtllm", Strategy.TWO_SHOT) else None
            what = f"{collective} {strategy}: {passes.LAYERS} layers x 2 sites x 33 pieces, 4 steps, 4 ranks"
            rows.append(
                Row(
                    what,
                    f"{spent:.2f} s",
                    f"{result.states} states, {result.failure or 'safe'}",
                    f"<= 2 s, {unsafe or 'safe'}",
                    result.failure is unsafe and spent <= 2,
                )
            )
    return rows


# -- islands that write ------------------------------------------------------------------


def bench_caches() -> list[Row]:
    """Four caches of 64 MB that a split-off op writes: no step may copy one."""
    library = caches.register()
    split = f"{library.ns}::attention"
    with torch.no_grad():
        spent = caches.step_ms(
            {
                "peer": "inductor",
                "uncaptured": ringfence.Backend(split_ops=[split]),
                "captured": ringfence.Backend(split_ops=[split], capture_sizes=[caches.TOKENS], graphs="simulated"),
            }
        )
    rows = []
    for how, target in (("uncaptured", 1.5), ("captured", None)):
        ours, peer = spent[how], spent["peer"]
        what = f"step with {caches.LAYERS} caches of 64 MB, each written by a split-off op, {how}; peer: 'inductor'"
        shown = f"<= {target}x" if target else ""
        rows.append(
            Row(
                what,
                f"{ours:.2f} ms",
                f"{peer:.2f} ms ({ours / peer:.2f}x)",
                shown,
                not target or ours <= target * peer,
            )
        )
    return rows


# -- compile time ------------------------------------------------------------------------

_COMPILE = """
import os, sys, time, torch
from torch.testing._internal.distributed.fake_pg import FakeStore
torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig
import ringfence
plan = DistributedConfig(tp_plan="auto", tp_size=2)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=plan, dtype=torch.float32).eval()
backend = sys.argv[2]
if backend != "inductor":
    backend = ringfence.Backend(capture_sizes=eval(sys.argv[3]), graphs="simulated")
with torch.no_grad():
    torch.compile(lambda x: x + 1)(torch.ones(3))  # imports and worker processes
    tokens = torch.randint(0, 128, (1, 4))
    start = time.perf_counter()
    torch.compile(model, backend=backend, fullgraph=True, dynamic=True)(tokens, use_cache=False)
    print("seconds", time.perf_counter() - start)
"""


def compile_seconds(folder: str, backend: str, sizes: str = "[]") -> float:
    """In a process and with a cache of its own."""
    with tempfile.TemporaryDirectory() as cache:
        result = subprocess.run(
            [sys.executable, "-c", _COMPILE, folder, backend, sizes],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "LOCAL_RANK": "0"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    seconds = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("seconds")]
    assert seconds, result.stderr
    return float(seconds[0])


def bench_compile(repeats: int = 3) -> list[Row]:
    sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "examples"))
    from demo import save_model

    peers: list[float] = []
    whole: list[float] = []
    pieces: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        for _ in range(repeats):  # interleaved, so that a slow moment of the machine hits all three
            peers.append(compile_seconds(folder, "inductor"))
            whole.append(compile_seconds(folder, "ringfence"))
            pieces.append(compile_seconds(folder, "ringfence", "[4]"))
    peer = statistics.median(peers)
    rows = []
    for what, times in (("in one piece", whole), ("in pieces, with one capture", pieces)):
        ours = statistics.median(times)
        rows.append(
            Row(
                f"compile the demo model {what}; peer: backend='inductor'",
                f"{ours:.1f} s",
                f"{peer:.1f} s ({ours / peer:.2f}x)",
                "<= 1.15x",
                ours <= 1.15 * peer,
            )
        )
    return rows


def main() -> int:
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    rows = [bench_passes(), bench_split(), *bench_runner(), bench_journal(), *bench_caches(), *bench_models()]
    rows += bench_compile()
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}"
    )
    print(
        tabulate(
            [(r.what, r.ours, r.peer, r.target, "met" if r.met else "MISSED") for r in rows],
            ("what", "ours", "peer", "target", ""),
        )
    )
    dist.destroy_process_group()
    return 0 if all(r.met for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
