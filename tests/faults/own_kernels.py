"""Faults among kernels that end their waits by themselves: on GPUs ringfence's own, without one stand-ins of torch.

They wait for half of the step's deadline. So the watch comes to its verdict because one has given up, and says what
that one reported. Whoever is late by less is no culprit, and who is late by more is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from faults.catalogue import DEADLINE, HARD_END, Fault, faults

#: How long the kernels wait, unless they are told otherwise.
BOUND = DEADLINE / 2
#: After a warm-up that was heard of, kernels are patient for a bound more, and a beat is a quarter of a second.
SETTLES = BOUND + 0.75

#: A rank waits there for the other one in a call.
_IN_A_CALL = ("killed", "stopped", "stuck", "skipped call", "skipped step", "disk full")
#: Ranks that are later than the bound, and none is to be called lost.
_PATIENT = ("slow", "paused")


def of_own_kernels(some: Sequence[Fault]) -> tuple[Fault, ...]:
    """The same faults, as such kernels meet them, and those that only they can meet."""
    like = replace(some[0], rank=1, journal=None, on_hang="raise", settles=SETTLES)
    too_late = rf"rank 1 did not come to call 14 .*in which ranks? 0.* waits?: rank 1 is in step 7.*{_waited(like)}"
    late = (
        replace(like, name="late", says=None, late=BOUND / 2),
        replace(like, name="late", says=too_late, late=1.6 * BOUND),
    )
    known = (_as_they_meet_it(fault) for fault in some)
    return (*known, *late, *(() if like.device == "cpu" else _other_sizes(like)))  # gloo ends who receives more


def _other_sizes(like: Fault) -> tuple[Fault, ...]:
    """Both sizes are captured before: a rank that captured one alone would wait in an exchange.

    Of two ranks that differ, none is the odd one: both are named, and whose kernels give up first is chance.
    """
    like = replace(like, name="other size", sizes=(4, 8))
    if like.ranks > 2:
        return (replace(like, says=rf"rank {like.rank} came with 4 tokens, the others with 8.*waited in vain"),)
    came = {r: f"rank 0 came with {one} tokens, rank 1 with {12 - one}.*waited in vain" for r, one in ((0, 4), (1, 8))}
    return tuple(replace(like, rank=r, says=came[r], blamed=(0, 1)) for r in came)


def _waited(fault: Fault) -> str:
    others = "".join(str(rank) for rank in range(fault.ranks) if rank != fault.rank)
    return rf"rank [{others}] waited in vain for the \w+ of rank {fault.rank} \(call \d+"


def on_gpus(collective: str, first_device: int, ranks: int = 2) -> tuple[Fault, ...]:
    """The faults on so many GPUs. The reference makes no workspace, so it cannot fail at that."""
    some = faults(ranks, "cuda", first_device, collective=collective)
    if collective == "ringfence":
        return of_own_kernels(some)
    return tuple(f for f in some if collective != "reference" or "preparing" not in f.name)


def without_gpus() -> tuple[Fault, ...]:
    """Some of them, one of each kind of verdict, with stand-ins for the kernels."""
    of_two = faults(2, collective="ringfence", max_tokens=8)
    wanted = [("killed", 0), ("skipped call", 1)]
    some = of_own_kernels([f for f in of_two if (f.name, f.rank) in wanted])
    return tuple(f for f in some if f.name != "late" or f.says is not None)


def _as_they_meet_it(fault: Fault) -> Fault:
    if fault.name in _PATIENT:
        return replace(fault, options={**fault.options, "kernel_wait_seconds": HARD_END})
    if fault.name not in _IN_A_CALL or "check_every_step" in fault.options:
        return fault
    said = f".*{_waited(fault)}"
    says, journal = f"{fault.says}{said}", f"{fault.journal or fault.says}{said}"
    return replace(fault, says=says, journal=journal, settles=SETTLES)
