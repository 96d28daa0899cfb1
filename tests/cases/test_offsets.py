"""Caches that begin inside of other memory, as slices of a pool do: right however they are written and looked at."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from cases.serve import SETTINGS, attend, difference, name_of, serve, whole_copies, write_each
from torch import Tensor

import ringfence
from support import engine_library

H, ROWS, BEFORE = 16, 64, 3
pytestmark = pytest.mark.usefixtures("fake_group")


@pytest.fixture(scope="module", autouse=True)
def engine() -> Iterator[None]:
    def rows(x: Tensor, caches: list[Tensor]) -> Tensor:
        """As many rows as the first cache has: its shape is taken for the output's."""
        write_each(x, caches)
        return caches[0] * 2

    def inside(x: Tensor) -> Tensor:
        return x.new_ones(x.shape[0] + 3, H)[3:]

    ops = (
        ("attend(Tensor q, Tensor(a!) cache, Tensor(b!) out) -> ()", attend, lambda *_: None),
        ("inside(Tensor x) -> Tensor", inside, inside),
        ("rows(Tensor x, Tensor(a!)[] caches) -> Tensor", rows, lambda x, caches: torch.empty_like(caches[0])),
    )
    with engine_library("pool", *ops):
        yield


op = torch.ops.pool


def whole(x: Tensor, kv: Tensor, c: Tensor) -> Any:
    out = torch.empty_like(x)
    op.attend(x, c, out)
    return out + c[:4].sum(0), kv[0, :2] * 1


def slices(x: Tensor, kv: Tensor, c: Tensor) -> Any:
    """Slices of one cache by one op after the other, and what was there before."""
    old, out = c[5].clone(), torch.empty_like(x)
    op.attend(x, c[4:12], out)
    y = torch.tanh(out)
    op.attend(y, c[:8], out)
    return y + out + c[:12].sum(0) + old


def shape_of_a_slice(x: Tensor, kv: Tensor, c: Tensor) -> Any:
    """The op returns as many rows as the slice has."""
    return op.rows(x, [c[4:], kv[1]]) + 1, kv[1, :6].sum(0)


def layers(x: Tensor, kv: Tensor, c: Tensor) -> Any:
    """A view is read after the layers beside it were written, and views are returned."""
    old, out = kv[0, 1:3], torch.empty_like(x)
    op.attend(x, kv[0], out)
    y = torch.sin(out)
    op.attend(y, kv[1], out)
    return y + out + old.sum(0), kv[1, 2:5] * 2, c[1:3]


def by_aten(x: Tensor, kv: Tensor, c: Tensor) -> Any:
    rows = c[2:6]
    before = rows.sum(0)
    c[4 : 4 + x.shape[0]] = x
    kv[1, 3:5].mul_(0.5).add_(x[:2])
    return x + rows.sum(0) + before, kv[:, :6].sum((0, 1))


def by_place(x: Tensor, kv: Tensor, c: Tensor) -> Any:
    """Looked at from the start of the storage, of a view, and of where that begins."""
    c.as_strided((2, H), (2 * H, 1), c.storage_offset() + 3 * H).mul_(0.5)
    return x + c.as_strided((4, 8), (H, 2)).sum() + c[4:].as_strided((2, H), (H, 1)).sum(0), c[:8].sum(0)


def what_is_before(x: Tensor, kv: Tensor, c: Tensor) -> Any:
    """No code of Inductor's can look there: it is not given that memory."""
    return x + c.as_strided((2, H), (H, 1), c.storage_offset() - H).sum(0), torch.cos(c[4:]).sum(0)


def made_inside(x: Tensor, kv: Tensor, c: Tensor) -> Any:
    """What an op returns may begin inside of memory too."""
    y, out = op.inside(x), torch.empty_like(x)
    op.attend(x[:1], y[1:], out[:1])
    return out[:1] + y[:2], torch.cos(c[:2])


PROGRAMS = (whole, slices, shape_of_a_slice, layers, by_aten, by_place, what_is_before, made_inside)


def given(steps: int, *, rows: int = ROWS) -> Iterator[tuple[Any, ...]]:
    caches = torch.randn(BEFORE + 2, rows, H)[BEFORE:], torch.randn(BEFORE + rows, H)[BEFORE:]
    for i in range(steps):
        yield torch.randn((4, 2)[i % 2], H), *caches


@pytest.mark.parametrize(
    ("program", "setting"),
    [(p, s) for p in PROGRAMS for s in SETTINGS if s is not SETTINGS[2] or p in (slices, layers)],
    ids=lambda each: name_of(each) if isinstance(each, dict) else each.__name__,
)
def test_caches_inside_of_other_memory(program: Callable[..., Any], setting: dict[str, Any]) -> None:
    """As islands where pieces are captured, inside of a piece where they are not."""
    split_ops = ["pool::attend", "pool::rows"] if "capture_sizes" in setting else []
    served = serve(program, given(4), split_ops=split_ops, **setting)
    assert max(served.off) < 1e-5, served.off


def rows_from(c: Tensor, n: int) -> Tensor:
    return c[n : n + 8]


def narrowed(c: Tensor, n: int) -> Tensor:
    return c.narrow(0, n, 8)


def all_from(c: Tensor, n: int) -> Tensor:
    return c[n:]


def columns_from(c: Tensor, n: int) -> Tensor:
    return c.t()[:, n:].t()


@pytest.mark.parametrize("setting", SETTINGS[:2], ids=name_of)
@pytest.mark.parametrize(
    ("part", "before", "dynamic"),
    [
        *((rows_from, before, dynamic) for before in (0, BEFORE) for dynamic in (False, True)),
        (narrowed, 0, True),
        (all_from, 0, False),
        (columns_from, BEFORE, True),
    ],
)
def test_a_slice_by_a_number_of_the_data(
    part: Callable[[Tensor, int], Tensor], before: int, dynamic: bool, setting: dict[str, Any]
) -> None:
    """Its size is a minimum of two others, and only its own offset is no size of the inputs.

    torch refuses most of it: it asks whether the slice is all of the cache, which no size tells.
    """

    def run(x: Tensor, c: Tensor, position: Tensor) -> Tensor:
        n, out = int(position.item()), torch.empty_like(x)
        torch._check(n >= 0)
        torch._check(n < 8)
        op.attend(x, part(c, n), out)
        return out + c[:8].sum(0)

    cache = torch.randn(before + ROWS, H)[before:]
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        steps = [(torch.randn(4, H), cache, torch.tensor(n)) for n in (2, 4, 3)]
        served = serve(run, steps, dynamic=dynamic, **setting)
    assert max(served.off) < 1e-5, served.off


def test_what_begins_elsewhere_is_another_cache() -> None:
    """Its place is a number here, and no part of what Inductor's own cache finds code by."""
    for before in (3, 0, 5):
        cache = torch.randn(before + ROWS, H)[before:]
        served = serve(slices, [(torch.randn(4, H), torch.randn(2, ROWS, H), cache)] * 2, dynamic=False)
        assert max(served.off) < 1e-5, (before, served.off)


def from_the_storage(x: Tensor, c: Tensor) -> Tensor:
    return x + c.as_strided((2, H), (H, 1), 0).sum(0)


def from_where_it_begins(x: Tensor, c: Tensor) -> Tensor:
    return x + c.as_strided((2, H), (H, 1), c.storage_offset() + H).sum(0)


@pytest.mark.parametrize(
    ("program", "order", "dynamic"),
    [
        (from_the_storage, (0, 4, 8, 2), False),
        (from_the_storage, (4, 8, 0, 2), True),
        (from_where_it_begins, (4, 8, 12, 2), True),
    ],
)
def test_what_is_looked_at_by_place_may_move(program: Callable[..., Any], order: Sequence[int], dynamic: bool) -> None:
    """Nothing guards where an input begins, so a graph is called with others than it was traced with."""
    pool = torch.randn(20 + ROWS, H)
    served = serve(program, [(torch.randn(4, H), pool[i : i + ROWS]) for i in order], dynamic=dynamic)
    assert max(served.off) < 1e-5, served.off
    assert len(served.reports) < len(order)


def overlapping(x: Tensor, c: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.tanh(part @ part.t()).sum()
    c[1:3] = x[:2]
    return x + y, part * 2


@pytest.mark.parametrize("setting", SETTINGS, ids=name_of)
def test_inputs_that_share_memory_may_move_in_it(setting: dict[str, Any]) -> None:
    """AOT rebuilds them where they were traced, which nothing guards: plain torch.compile is wrong."""
    torch._dynamo.reset()
    compiled = torch.compile(overlapping, backend=ringfence.Backend(**setting), dynamic=False, fullgraph=True)
    ours = torch.randn(20 + ROWS, H)
    theirs = ours.clone()
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ringfence.MovedInputWarning)
        for begin in (0, 3, 0, 5, 5, 0):
            x = torch.randn(4, H)
            seen, right = (
                f(x, pool[begin : begin + 8], pool[begin + 1 : begin + 5])
                for f, pool in ((compiled, ours), (overlapping, theirs))
            )
            assert difference([*seen, ours], [*right, theirs]) < 1e-5
    told = [str(w.message) for w in caught if w.category is ringfence.MovedInputWarning]
    assert len(told) == 1 and re.match(r"'(c_', 'part|part_', 'c)_' share memory", told[0]), told


def of_a_slice(x: Tensor, c: Tensor) -> Tensor:
    return x + c[4:].as_strided((2, H), (H, 1)).sum(0)


def of_what_is_computed(x: Tensor, c: Tensor) -> Tensor:
    return x + torch.cos(c)[4:].as_strided((2, H), (H, 1)).sum(0)


def of_what_was_written(x: Tensor, c: Tensor) -> Tensor:
    c[:2].mul_(0.5)
    return x + c[4:].as_strided((2, H), (H, 1)).sum(0)


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (
            what_is_before,
            r"'as_strided\w*' \(.*test_offsets.py:\d+\) looks at what lies before an input in its storage",
        ),
        (made_inside, r"what 'inside\w*' \(cases/test_offsets.py:\d+\) returns begins inside of a storage"),
        (by_aten, None),
    ],
)
def test_a_piece_that_runs_op_by_op_is_in_the_report(program: Callable[..., Any], why: str | None) -> None:
    (report,) = serve(program, given(1)).reports
    (piece,) = report.to_dict()["pieces"]
    if why is None:
        assert piece["op_by_op"] is None and "op by op" not in report.text()
    else:
        assert re.match(why, piece["op_by_op"]) and f"submod_0 runs op by op: {piece['op_by_op']}" in report.text()


def test_a_piece_that_is_compiled_for_one_place_is_in_the_report() -> None:
    served = serve(from_the_storage, [(torch.randn(4, H), torch.randn(ROWS, H))], dynamic=False)
    (piece,) = served.reports[-1].pieces
    assert str(piece.op_by_op).startswith("only where an input begins elsewhere in its storage than when")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("program", [of_a_slice, of_what_is_computed, of_what_was_written])
def test_a_strided_view_of_a_slice_begins_with_the_slice(program: Callable[..., Any], dynamic: bool) -> None:
    """It does not say so. Inductor of torch 2.11 has it begin with the storage."""
    for before in (0, 5):
        torch._dynamo.reset()
        cache = torch.randn(before + ROWS, H)[before:]
        served = serve(program, [(torch.randn(4, H), cache)] * 2, dynamic=dynamic)
        assert max(served.off) < 1e-5, (before, served.off)


@pytest.mark.parametrize("setting", SETTINGS[:2], ids=name_of)
def test_none_is_copied_whole(setting: dict[str, Any]) -> None:
    split_ops = ["pool::attend"] if "capture_sizes" in setting else []
    compiled = torch.compile(slices, backend=ringfence.Backend(split_ops=split_ops, **setting), dynamic=True)
    arguments = list(given(3, rows=1024))
    with torch.no_grad():
        for each in arguments[:2]:
            compiled(*each)
    assert not whole_copies(compiled, arguments[2], 1024 * H)


@pytest.mark.parametrize(("before", "told"), [(0, []), (4, []), (3, ["c"])])
def test_inductor_is_told_what_is_off_alignment(before: int, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it would copy a cache before each call that it takes for aligned and that is not."""
    from torch._inductor import compile_fx, utils

    compile_inner = compile_fx.compile_fx_inner
    seen = []

    def look(piece: Any, inputs: Sequence[Any], **options: Any) -> Any:
        named = zip(piece.graph.find_nodes(op="placeholder"), inputs, strict=True)
        tensors = [(n, value) for n, value in named if isinstance(value, Tensor)]
        assert all(value.storage_offset() == 0 for _, value in tensors)
        seen.extend(
            "c" if value.shape[0] == ROWS else "x" for _, value in tensors if not utils.tensor_is_aligned(value)
        )
        return compile_inner(piece, inputs, **options)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", look)
    cache = torch.randn(before + ROWS * H)[before:].view(ROWS, H)
    served = serve(of_what_was_written, [(torch.randn(4, H), cache)] * 2, dynamic=False)
    assert max(served.off) < 1e-5 and seen == told
