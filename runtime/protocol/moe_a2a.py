"""MoE all-to-all: one-sided dispatch and combine that meet by flags.

Each call adds one to a rank's flag value, stores it at every peer, and waits until every
peer's flag *equals* its own. Equality can miss a flag that has moved on. It does not here,
because dispatch and combine alternate and have flags of their own: to raise the flag of the
next dispatch a peer must have passed the combine between, and so have seen this rank's.

A rank with no tokens takes part all the same. A rank that is masked out does not, and is not
waited for; where the mask is a kernel argument, a captured call keeps the one it was captured with.

Source: moeAlltoAllKernels.cu and trtllm_moe_alltoall.py of FlashInfer 0.6.0 to 0.7.2.
"""

from __future__ import annotations

from collections.abc import Sequence

from .calls import Call, Calls
from .machine import CellTable, Launch, Machine, Op, OpKind, flag
from .rules import MoeRules


def moe_a2a(programs: Sequence[Calls], rules: MoeRules) -> Machine:
    """The machine that these programs of dispatches and combines, one per rank, make."""
    memory = CellTable()
    launches = [
        [_launch(rank, len(programs), call, number, rules, memory) for number, call in enumerate(calls, start=1)]
        for rank, calls in enumerate(programs)
    ]
    return Machine(launches, memory.names)


def _launch(rank: int, world_size: int, call: Call, number: int, rules: MoeRules, memory: CellTable) -> Launch:
    def cell(owner: int, source: int) -> int:
        array = call.strategy if rules.separate_flags else "completion"
        copy = "" if rules.shared_memory else f", as rank {rank} sees it"
        return memory.cell(owner, f"{array} flag of rank {source}{copy}")

    active = range(world_size) if call.active is None else call.active
    due = (flag(number, call.id),)
    peers = [peer for peer in active if peer != rank]
    ops = [
        *(Op(OpKind.RAISE, (cell(peer, rank),), due, detail=f"flag of rank {peer} to {number}") for peer in peers),
        *(
            Op(OpKind.AWAIT_EQUAL, (cell(rank, peer),), due, detail=f"flag of rank {peer} for {number}")
            for peer in peers
        ),
    ]
    return Launch(call.id, call.title, tuple(ops) if rank in active else ())
