"""The flush in front of a collective whose receiver compares the sentinel as a float."""

from __future__ import annotations

import struct

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ringfence.compile_passes.clean import LARGEST_CHANGE, clean_payload
from ringfence.compile_passes.fuse import SITE
from ringfence.runtime.collectives import reference
from support import aot_graph, fuse_graph

H = 16
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def looks_absent(x: Tensor) -> Tensor:
    """FlashInfer before 0.6.12, by word: ``value == 0.f && signbit(value)`` with flush-to-zero."""
    words = x.contiguous().view(torch.int32)
    return (words < 0) & ((words >> 23) & 0xFF == 0)


def sanitised(x: Tensor) -> Tensor:
    """What the kernel does to its input: an element that is bitwise -0.0 becomes +0.0."""
    return torch.where(x == 0, torch.zeros_like(x), x)


def every_pattern(dtype: torch.dtype) -> Tensor:
    """Every 16-bit element next to a few others in both columns; for float32, the words around each limit."""
    if dtype is torch.float32:
        near = [0, 1, 2, 0x7FFFFE, 0x7FFFFF, 0x800000, 0x800001, 0x3F800000]
        words = [sign | word for word in near for sign in (0, 0x80000000)]
        return torch.tensor([struct.unpack("<i", struct.pack("<I", w))[0] for w in words], dtype=torch.int32).view(
            dtype
        )
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    others = torch.tensor([0, -(2**15), 1, -(2**15) + 1, 0x3C00], dtype=torch.int16)
    pairs = [torch.stack([every, o.expand_as(every)], -1) for o in others]
    return torch.cat([*pairs, *(p.flip(-1) for p in pairs)]).view(dtype)


def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 1
    dist.all_reduce(y)
    h = y + r
    return F.rms_norm(h, (H,), w, 1e-6), h


def cleaned(x: Tensor) -> Tensor:
    """What the pass puts in front of the collective, applied to ``x``."""
    width = x.shape[-1]
    gm = aot_graph(lambda x, r: F.rms_norm(reduced(x) + r, (width,)), torch.zeros_like(x), torch.zeros_like(x))
    (site,) = fuse_graph(gm)
    assert site.fused
    clean_payload(gm, {0})
    (fused,) = [n for n in gm.graph.nodes if SITE in n.meta]
    gm.graph.erase_node(gm.graph.find_nodes(op="output")[0])
    gm.graph.output(fused.args[0])
    gm.graph.eliminate_dead_code()
    gm.recompile()
    out: Tensor = gm(x, torch.zeros_like(x))
    return out


def reduced(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", "0"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("fake_group")
def test_no_cleaned_word_looks_absent(dtype: torch.dtype) -> None:
    x = every_pattern(dtype).reshape(-1, 2)
    assert looks_absent(sanitised(x)).any(), "without the pass the kernel would hang, or this test shows nothing"
    clean = cleaned(x)
    assert not looks_absent(sanitised(clean)).any()
    same = (clean == x) | (clean.isnan() & x.isnan())
    assert ((clean.double() - x.double()).abs()[~same] < LARGEST_CHANGE[dtype]).all()
    assert (x[~same] < 0).all() and (clean[~same] == 0).all() and not same.all()


@pytest.mark.usefixtures("fake_group")
def test_only_the_sites_that_are_named_are_cleaned() -> None:
    def two(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return model(*model(x, r, w), w)

    gm = aot_graph(two, *(torch.randn(s) for s in ((3, H), (3, H), (H,))))
    assert all(s.fused for s in fuse_graph(gm))
    clean_payload(gm, {1})
    inputs = {n.meta[SITE]: n.args[0].target for n in gm.graph.nodes if SITE in n.meta}
    assert inputs[1] is torch.ops.aten.view.dtype and inputs[0] is not torch.ops.aten.view.dtype
    gm.graph.lint()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("fake_group")
def test_answer_changes_by_less_than_the_bound_for_each_rank(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = 4
    monkeypatch.setattr(reference, "all_reduce", lambda x, group: x * ranks)
    x, r, w = torch.randn(5, H).to(dtype), torch.randn(5, H).to(dtype), torch.randn(H).to(dtype)
    x[0] = -LARGEST_CHANGE[dtype] / 2
    gm = aot_graph(model, x, r, w)
    fuse_graph(gm)
    before = gm(x, r, w)
    clean_payload(gm, {0})
    after = gm(x, r, w)
    assert torch.equal(after[1][1:], before[1][1:]) and torch.equal(after[0][1:], before[0][1:])
    change = (after[1].double() - before[1].double()).abs().max()
    rounding = r[0].double().abs().max() * torch.finfo(dtype).eps
    assert change <= ranks * LARGEST_CHANGE[dtype] + rounding
