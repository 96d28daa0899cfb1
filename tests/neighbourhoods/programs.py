"""Neighbourhoods of one to three all-reduces, as values to draw from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, TypeVar

import torch


@dataclass(frozen=True)
class Block:
    """One all-reduce and what follows it. The defaults are the plainest site that fuses."""

    input: str = "fresh"
    layout: str = "plain"
    collective: str = "sum"
    behind: str = "nothing"
    after_reduce: tuple[str, ...] = ()
    residual: str = "full"
    add: str = "plain"
    before_norm: tuple[str, ...] = ()
    mutate: str = "nothing"
    norm: str = "chain"
    compute: str = "float32"
    square: str = "pow"
    mean: str = "mean"
    eps: float | None = 1e-6
    eps_form: str = "number"
    root: str = "rsqrt"
    factor: str = "as_is"
    product: str = "wide"
    middle: str = "as_is"
    weight: str = "wide"
    weight_swapped: bool = False
    end: str = "dtype"
    readers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """Blocks, the tensors they work on, how the graph is traced and the options of ``find``."""

    blocks: tuple[Block, ...] = (Block(),)
    order: str = "sequential"
    dtype: torch.dtype = torch.float32
    batch: int | None = None
    tokens: int = 4
    hidden: int = 8
    scale: float = 1.0
    front: str = "aot"
    cse: bool = False
    dynamic: str = "nothing"
    strict: bool = False
    groups: tuple[str, ...] | None = None
    seed: int = 0

    def __repr__(self) -> str:
        """Only what differs from the plainest program: failures are read by people."""
        blocks = ", ".join(f"Block({_differences(b)})" for b in self.blocks)
        rest = _differences(replace(self, blocks=Program.blocks))
        return f"Program(({blocks},), {rest})"


_Value = TypeVar("_Value", Block, Program)


def _differences(value: Any) -> str:
    fields = dataclasses.fields(value)
    return ", ".join(f"{f.name}={getattr(value, f.name)!r}" for f in fields if getattr(value, f.name) != f.default)


_VIEWS = ("to_3d", "to_2d", "unsqueeze", "unsqueeze_squeeze", "copy", "clone", "alias", "reshape_back", "rounded")

#: For each field: choices that usually leave a site fusable, choices that usually do not, and how many
#: times likelier the former are.
_BLOCK: Mapping[str, tuple[Sequence[Any], Sequence[Any], int]] = {
    "input": (("fresh", "previous"), (), 1),
    "layout": (("plain", "scaled"), ("transposed", "sliced", "expanded"), 6),
    "collective": (
        ("sum", "sum", "sum", "custom", "custom_inplace", "flat"),
        ("avg", "other_group", "in_float32", "twice", "unused_twin"),
        12,
    ),
    "behind": (
        ("nothing",) * 16
        + ("scaled", "halved", "divided", "negated", "by_constant", "biased", "shared")
        + ("doubled", "doubled_first", "doubled_scaled", "less_another", "scaled_sum"),
        ("gated", "by_tensor", "doubled_over_other_group", "doubled_read", "huge"),
        8,
    ),
    "residual": (
        (
            *("full", "none", "previous", "late", "other_reduce", "other_reduce_view", "transposed", "input"),
            *("row", "column", "bias"),
        ),
        (
            "number",
            "zero_dim",
            "wider",
            "reduced",
            "of_reduced",
            "float32",
            "float64",
            "other_group",
        ),
        6,
    ),
    "add": (
        ("plain", "swapped", "wide", "wide_mixed", "alpha", "alpha_swapped", "sub", "rsub", "scaled"),
        ("float64", "wide_view", "alpha_third"),
        8,
    ),
    "mutate": (("nothing",), ("input", "scratch", "weight", "sum"), 40),
    "norm": (
        ("chain", "chain", "chain", "rms_norm", "rms_norm_wide", "fused_op"),
        ("none", "sum", "layer_norm", "two_dims", "heads", "fused_op_root", "of_two_casts"),
        6,
    ),
    "compute": (("float32",), ("activation", "float64"), 5),
    "square": (("pow", "mul", "square", "mul_two_casts"), ("cube", "abs", "other", "low"), 15),
    "mean": (
        ("mean", "unsqueeze", "sum_div", "sum_mul"),
        ("lost", "sum_wrong", "sum_rows", "rows", "rows_lost", "two_dims", "all", "half", "sum_half", "median"),
        10,
    ),
    "eps": ((1e-6, 1e-2, 1e-5, 0.0), (None,), 8),
    "eps_form": (
        ("number", "swapped", "full"),
        ("tensor", "full_half", "outside", "in_mean", "alpha", "scalar_alpha", "absent", "clamp", "per_row"),
        15,
    ),
    "root": (("rsqrt", "pow", "reciprocal", "one_over", "div", "div_pow"), ("div_swapped", "sqrt"), 20),
    "factor": (("as_is",), ("dtype", "bfloat16", "float16", "scaled"), 10),
    "product": (("wide", "wide_swapped", "narrow"), ("other", "weighted", "weighted_root"), 12),
    "middle": (("as_is", "dtype"), ("bfloat16", "float16", "float64", "int32", "float8", "bool"), 8),
    "weight": (
        ("wide", "plain", "none", "gemma", "gemma_wide", "row", "late", "early", "of_other", "gemma_scalar_op"),
        (
            "matrix",
            "column",
            "number",
            "zero_dim",
            "float32",
            "gate",
            "of_sum",
            "of_reduced",
            "gemma_half",
            "gemma_alpha",
            "gemma_twice",
            "sum_of_two",
            "shifted",
            "rounded",
            "twice",
        ),
        4,
    ),
    "weight_swapped": ((False, True), (), 1),
    "end": (("dtype",), ("stay", "int32", "float8", "bfloat16", "float16", "relu"), 10),
}

_READERS = (
    "sum",
    "sum_read",
    "sum_float",
    "sum_low",
    "sum_view",
    "sum_transposed",
    "sum_again",
    "sum_again_read",
    "reduced",
    "reduced_read",
    "residual",
    "residual_norm",
    "wide",
    "root",
    "root_of_other",
    "normed",
    "norm_read",
    "second_norm",
    "second_norm_wide",
)

_PROGRAM: Mapping[str, tuple[Sequence[Any], Sequence[Any], int]] = {
    "order": (("sequential",), ("phased",), 4),
    "dtype": ((torch.float32, torch.bfloat16, torch.float16), (), 1),
    "batch": ((None, 2), (4,), 4),
    "tokens": ((4,), (1, 6), 3),
    "hidden": ((8, 4), (), 1),
    "scale": ((1.0, 0.015625), (), 1),
    "front": (("aot", "inductor", "pre_dispatch"), ("plain",), 8),
    "cse": ((False, True), (), 1),
    "dynamic": (("nothing",), ("tokens", "everything"), 25),
    "strict": ((False, True), (), 1),
    "groups": ((None,), (("0",),), 3),
    "seed": (tuple(range(5)), (), 1),
}


def _pool(choices: tuple[Sequence[Any], Sequence[Any], int]) -> list[Any]:
    usual, odd, weight = choices
    return [*list(usual) * max(1, -(-weight * len(odd) // len(usual))), *odd]


def _draw(table: Mapping[str, tuple[Sequence[Any], Sequence[Any], int]], random: Random) -> dict[str, Any]:
    return {name: random.choice(_pool(choices)) for name, choices in table.items()}


_CHAIN_LENGTHS, _READER_COUNTS, _BLOCK_COUNTS = (0, 0, 0, 1, 2), (0, 0, 1, 1, 2, 3), (1, 1, 2, 3)


def _block(random: Random) -> Block:
    after, before = (tuple(random.choices(_VIEWS, k=random.choice(_CHAIN_LENGTHS))) for _ in range(2))
    readers = tuple(random.sample(_READERS, random.choice(_READER_COUNTS)))
    return Block(after_reduce=after, before_norm=before, readers=readers, **_draw(_BLOCK, random))


def draw(random: Random) -> Program:
    """Each choice for itself, so that few programs meet many pairs of choices."""
    blocks = tuple(_block(random) for _ in range(random.choice(_BLOCK_COUNTS)))
    return Program(blocks, **_draw(_PROGRAM, random))


def shrink(program: Program, fails: Callable[[Program], bool]) -> Program:
    """Drop blocks and make choices plain while ``fails`` holds, until nothing more can go."""
    smaller = next((p for p in _smaller(program) if fails(p)), None)
    return program if smaller is None else shrink(smaller, fails)


def _smaller(program: Program) -> Iterator[Program]:
    for i, block in enumerate(program.blocks):
        before, after = program.blocks[:i], program.blocks[i + 1 :]
        if before or after:
            yield replace(program, blocks=before + after)
        yield from (replace(program, blocks=(*before, b, *after)) for b in _plainer(block))
    yield from (p for p in _plainer(program) if p.blocks == program.blocks)


def _plainer(value: _Value) -> Iterator[_Value]:
    for field in dataclasses.fields(value):
        if getattr(value, field.name) != field.default:
            yield replace(value, **{field.name: field.default})
