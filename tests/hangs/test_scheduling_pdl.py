"""Programmatic dependent launch: M16, M17, M18."""

from __future__ import annotations

import pytest

from hangs.models.device import Devices
from hangs.models.instructions import (
    Add,
    Await,
    Grid,
    Kernel,
    Launch,
    Read,
    Write,
    all_reduce,
    kernel,
    launch,
    replay,
)
from hangs.scheduling import PAIR, assert_fails, assert_safe
from ringfence.runtime.protocol.explore import ModelFailure

TRIGGER, WAIT = Grid.TRIGGER, Grid.WAIT


# -- M16: the trigger comes before the output (V#45448, TS#842, SGL#29274) ------------------


def early_trigger(*, at_end: bool = False, reader_waits: bool = False, reader_pdl: bool = True) -> Devices:
    def program(rank: int) -> list[Launch]:
        output = Write("norm_out", "h")
        call = all_reduce(rank, PAIR, "x")
        fused = kernel("fused", *((*call, output, TRIGGER) if at_end else (TRIGGER, *call, output)))
        reader = kernel("qkv", *((WAIT,) if reader_waits else ()), Read("norm_out", "h"), pdl=reader_pdl)
        return [replay(fused, reader)]

    return Devices([program(rank) for rank in PAIR])


def test_m16_early_trigger_lets_the_next_kernel_read_what_is_not_there() -> None:
    assert_fails(early_trigger(), ModelFailure.STALE_READ, "fused[0] trigger", "qkv[0] read 'h' in 'norm_out'")


@pytest.mark.parametrize("policy", ["at_end", "reader_waits"])
def test_m16_completion_at_the_end_or_a_reader_that_waits_is_safe(policy: str) -> None:
    assert_safe(early_trigger(**{policy: True}))


def test_m16_no_programmatic_launch_of_the_reader_is_safe() -> None:
    assert_safe(early_trigger(reader_pdl=False))


def chain(*, middle_waits: bool) -> Devices:
    """The reader does wait, but for a kernel that did not: the wait is not transitive."""
    first = kernel("fused", TRIGGER, Write("norm_out", "h"))
    middle = kernel("quantise", TRIGGER, *((WAIT,) if middle_waits else ()), Write("scale", "s"), pdl=True)
    last = kernel("gemm", WAIT, Read("norm_out", "h"), pdl=True)
    return Devices([[replay(first, middle, last)]])


def test_m16_a_wait_covers_only_the_kernel_directly_before() -> None:
    assert_fails(
        chain(middle_waits=False), ModelFailure.STALE_READ, "gemm[0] pass its grid-dependency wait", "gemm[0] read"
    )


def test_m16_a_chain_in_which_everyone_waits_is_safe() -> None:
    assert_safe(chain(middle_waits=True))


# -- M17: loads before the grid-dependency wait (FI#5081) -----------------------------------


def early_load(*, pdl: bool, between: bool = False) -> Devices:
    def program(rank: int) -> list[Launch]:
        embedding = kernel("embedding", TRIGGER, Write("residual", "r"))
        quiet = [kernel("copy", Write("other", "o"))] if between else []  # it never triggers
        fused = kernel("fused", Read("residual", "r"), WAIT, *all_reduce(rank, PAIR, "x"), pdl=pdl)
        return [replay(embedding, *quiet, fused)]

    return Devices([program(rank) for rank in PAIR])


def test_m17_residual_is_loaded_before_its_producer_wrote_it() -> None:
    assert_fails(
        early_load(pdl=True), ModelFailure.STALE_READ, "embedding[0] trigger", "fused[0] read 'r' in 'residual'"
    )


def test_m17_without_pdl_behind_the_producer_is_safe() -> None:
    assert_safe(early_load(pdl=False))


def test_m17_a_kernel_in_between_that_never_triggers_is_safe() -> None:
    assert_safe(early_load(pdl=True, between=True))


def test_m17_eager_launches_are_paired_as_captured_ones_are_and_a_piece_boundary_is_not() -> None:
    """M20: programmatic edges end at a graph's border, whichever side the graph is on."""
    embedding = kernel("embedding", TRIGGER, Write("residual", "r"))
    fused = kernel("fused", Read("residual", "r"), pdl=True)
    assert_fails(Devices([[launch(embedding), launch(fused)]]), ModelFailure.STALE_READ)
    assert_safe(Devices([[replay(embedding), replay(fused)]]))
    assert_safe(Devices([[launch(embedding), replay(fused)]]))
    assert_safe(Devices([[replay(embedding), launch(fused)]]))


# -- M18: waiting dependents starve a producer (SGL#34789) ----------------------------------


def starved(*, pdl: bool, side_first: bool = False, slots: int = 2) -> Devices:
    """Rank 0: a collective over chunks that a GEMM of another stream hands over, and a dependent with a big grid."""
    chunks = kernel("chunks", TRIGGER, Await("chunk", 1), Write("y", "y"))
    finalize = kernel("finalize", WAIT, Read("y", "y"), blocks=2, pdl=pdl)
    gemm = launch(kernel("gemm", Add("chunk")), stream="side")
    main = replay(chunks, finalize, kernel("reduce", *all_reduce(0, PAIR, "x")))
    stalled = [gemm, main] if side_first else [main, gemm]
    return Devices([stalled, [replay(kernel("reduce", *all_reduce(1, PAIR, "x")))]], slots=slots)


def test_m18_waiting_dependents_hold_the_slot_that_their_producer_needs() -> None:
    assert_fails(
        starved(pdl=True),
        ModelFailure.DEADLOCK,
        "rank 0: ",
        "'chunks' waits to see 'chunk' at least 1",
        "'finalize' waits for 'chunks' to end",
        "'gemm' waits for a slot; they are held by 'chunks', 'finalize'",
        "rank 1: 'reduce' waits to take 'x' of rank 0",
    )


def test_m18_launching_the_other_stream_first_does_not_help() -> None:
    assert_fails(starved(pdl=True, side_first=True), ModelFailure.DEADLOCK, "'gemm' waits for a slot")


def test_m18_a_big_grid_that_is_no_programmatic_dependent_is_safe() -> None:
    assert_safe(starved(pdl=False))


def test_m18_a_grid_that_leaves_slots_free_is_safe() -> None:
    assert_safe(starved(pdl=True, slots=4))


def core_dump(*, pdl: bool = True, early: bool = True) -> Devices:
    """One stream. The producer has more blocks than there are slots."""
    gemm: Kernel = kernel("gemm", TRIGGER, Add("tiles"), blocks=4)
    finalize = kernel("finalize", WAIT, Await("tiles", 4), blocks=2, pdl=pdl)
    return Devices([[replay(gemm, finalize)]], slots=2, early_dependents=early)


def test_m18_as_in_the_core_dump_most_of_the_producer_has_no_slot() -> None:
    assert_fails(
        core_dump(), ModelFailure.DEADLOCK, "'gemm' waits for a slot; they are held by 'finalize'", "'gemm' to end"
    )


def test_m18_the_core_dump_cannot_be_had_by_the_rule_of_the_guide() -> None:
    """Dependents come in when all blocks have triggered, and a block without a slot has not."""
    assert_safe(core_dump(early=False))


def test_m18_the_core_dump_cannot_be_had_without_pdl() -> None:
    assert_safe(core_dump(pdl=False))
