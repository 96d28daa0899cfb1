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
from dataclasses import dataclass, field

from .calls import Call, Calls
from .compiler import Compiler
from .machine import Machine, Op, OpKind, flag
from .rules import MoeRules

#: Where calls are counted from when the counts of a long run are brought back.
_CALLS_AT_FIRST = 64


def moe_a2a(programs: Sequence[Calls], rules: MoeRules) -> Machine:
    """The machine that these programs of dispatches and combines, one per rank, make."""
    return MoeCompiler(len(programs), rules=rules).machine(programs)


@dataclass(frozen=True)
class MoeCompiler(Compiler[int]):
    """The all-to-all; the one control word is the number of calls that a rank has made."""

    rules: MoeRules = field(kw_only=True)

    def initial(self) -> int:
        return 0

    def kind(self, call: Call) -> Call:
        return Call(0, call.strategy, active=call.active)

    def after(self, words: int, call: Call) -> int:
        return words + 1

    def rebased(self, words: int) -> tuple[int, int]:
        return _CALLS_AT_FIRST, words - _CALLS_AT_FIRST

    def ops(self, rank: int, words: int, call: Call) -> tuple[Op, ...]:
        def cell(owner: int, source: int) -> int:
            array = call.strategy if self.rules.separate_flags else "completion"
            copy = "" if self.rules.shared_memory else f", as rank {rank} sees it"
            return self.memory.cell(owner, f"{array} flag of rank {source}{copy}")

        number = words + 1
        active = range(self.world_size) if call.active is None else call.active
        due = (flag(number, call.id),)
        peers = [peer for peer in active if peer != rank] if rank in active else []
        return (
            *(Op(OpKind.RAISE, (cell(peer, rank),), due, detail=f"flag of rank {peer} to {number}") for peer in peers),
            *(
                Op(OpKind.AWAIT_EQUAL, (cell(rank, peer),), due, detail=f"flag of rank {peer} for {number}")
                for peer in peers
            ),
        )
