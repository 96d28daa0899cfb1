"""Rows: what a graph computes of gathered tokens, row by row.

Between a gather and a reduce-scatter the experts of one rank look at the tokens of all ranks. A dispatch brings fewer
rows, in another order, with rows of rubbish among them: that changes nothing exactly where each row of the result
depends on its own row alone, and where a token that asks for none of this rank's experts adds nothing.

:func:`~.expert_rows.silent_experts` follows the gathered values forwards and says of each how its rows are arranged:

    TOKENS  a row for each token, ``[N, ...]``; where it has ``k`` columns, one for each choice of an expert
    CHOICES a row for each choice of each token, ``[N * k, ...]``
    SORTED  the same in the order of a sort of the choices by expert
    ORDER, ORDER_TOKEN, INVERSE  the permutation of that sort, the tokens that it names, the way back
    COUNTS  how many choices each expert has, or the sums of these: what a grouped matrix product goes by

Beside it goes what follows from the expert of a choice alone: ``table[e]`` is the value for expert ``e`` (masks, local
numbers), and ``zero[e]`` says that it is zero there, whatever the token. Both are found by running the graph's own ops
on the numbers of all experts, so how a model spells its mask does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .op_calls import op_names
from .provenance import label
from .roles import same_size


class Arrangement(Enum):
    """In which order the rows of a value are; see above."""

    TOKENS = "tokens"
    CHOICES = "choices"
    SORTED = "sorted"
    ORDER = "order"
    ORDER_TOKEN = "order_token"
    INVERSE = "inverse"
    COUNTS = "counts"


A = Arrangement
WITH_ROWS = (A.TOKENS, A.CHOICES, A.SORTED)
#: Dtypes that hold places and counts as they are.
WHOLE = (torch.int32, torch.int64, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Of one value. order: the sort whose order its rows are in. table, zero: by expert, of a choice.

    silent: by expert: a row all of whose choices are such experts is zero.
    """

    arrangement: Arrangement
    order: Node | None = None
    table: Tensor | None = None
    zero: Tensor | None = None
    silent: Tensor | None = None

    def plain(self) -> TokenRows:
        """In the same order; nothing else is known."""
        return TokenRows(self.arrangement, self.order)


class NotRowWise(Exception):
    """A node of which it is not known that each row of its value depends on its own row alone."""

    def __init__(self, node: Node, why: str) -> None:
        super().__init__(f"{label(node)}: {op_names(node)[0]} {why}")


@dataclass(frozen=True)
class RowReading:
    """What is known so far. tokens, choices: the shape of the ids. mine: the experts of this rank."""

    tokens: Any
    choices: Any
    num_experts: int
    experts_ops: frozenset[str]
    mine: range
    known: dict[Node, TokenRows] = field(default_factory=dict)

    def source(self, node: Node) -> tuple[Node, TokenRows]:
        """The first argument of ``node``, which alone has rows. Raises :class:`NotRowWise`."""
        source = node.args[0]
        others = (n for n in node.all_input_nodes if n is not source)
        if not isinstance(source, Node) or source not in self.known or any(n in self.known for n in others):
            raise NotRowWise(node, "reads rows as something else than its first argument")
        return source, self.known[source]


def unit(shape: Iterable[Any]) -> list[Any]:
    """Without dimensions of one element."""
    return [d for d in shape if not same_size(d, 1)]


def alike(a: Iterable[Any], b: Iterable[Any]) -> bool:
    a, b = list(a), list(b)
    return len(a) == len(b) and all(map(same_size, a, b))
