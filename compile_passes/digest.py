"""Digest: what of a compiled graph must be the same on all ranks, in words.

Ranks may do different work between their collectives: a bias that one of them adds, experts that another has more
of, an output that only the first returns. What is compared is what a peer waits for: which collectives are called,
in which order, over which groups, of how much, by whom, and which of them are captured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..runtime.collectives.moe import KNOWN_IDS
from ..runtime.groups import Group
from ..runtime.hazards.situation import Collective
from ..runtime.replay.program import SizeRule
from ..runtime.watch.agree import PlanDigest
from .fuse import FACTORS, SITE
from .groups import collectives_of, group_of
from .judge import Decision, Verdict
from .moe_calls import capacity_of, is_moe
from .op_calls import op_arguments, op_calls, op_names
from .provenance import module_of, source_of
from .roles import arguments, bound_arguments, c10d, calls, dtype_text, is_tensor, tensor

#: Options that are not compared here: those that may differ between ranks, and those of the process, which the
#: supervisor compares whoever gave them (runtime/watch/settings.py says which is which); names of groups, which do
#: differ; and the path of a size table, whose rows were compared when the collective was chosen.
_OWN = frozenset(
    {
        "on_report",
        "on_hang",
        "step_seconds",
        "warm_up_seconds",
        "agree_seconds",
        "kernel_wait_seconds",
        "journal_dir",
        "groups",
        "group_names",
        "size_table",
    }
)
_PACKAGES = ("torch", "ringfence", "flashinfer-python")

#: Sizes with which a rule for the token count is tried: rules that agree here are taken for equal.
_SAMPLES = (2, 3, 7, 64)

#: Collectives in which ranks may send different amounts.
_UNEVEN = ("all_to_all", "alltoall")


def digest(
    gm: GraphModule,
    verdicts: Sequence[Verdict],
    sizes: SizeRule,
    groups: Mapping[str, Group],
    *,
    options: Mapping[str, Any],
    versions: Mapping[str, str | None],
    device: torch.device,
    captures: bool,
    pads: bool,
    inputs: Sequence[str],
) -> PlanDigest:
    """What the ranks compare before the graph is used.

    gm: the graph before the cut. options: JSON-ready. captures, pads: whether sizes are captured, and smaller ones
    padded to them. inputs: names of the graph's inputs.
    """
    told = _Symbols(gm, sizes)
    shared = _shared(gm, groups)
    in_graph = {v.node for v in verdicts if v.decision is Decision.IN_GRAPH} if captures else set()
    captured = {call.node.name for n in gm.graph.nodes if n.name in in_graph for call in op_calls(n)}
    calls = {f"call {i}": node for i, node in enumerate(shared)}
    texts = _calls(shared, groups, captured, {v.node for v in verdicts if v.clean}, told)
    lockstep = any(node.name in captured for node in shared)
    parts = [
        *((f"version of {name}", str(versions.get(name))) for name in _PACKAGES),
        ("device", _device_text(device)),
        *((f"option {key}", _option_text(key, value)) for key, value in sorted(options.items()) if key not in _OWN),
        *zip(calls, texts, strict=True),
        ("token count", told.tokens() if captures else "not read"),
        ("padding", "smaller sizes are padded to captured ones" if pads else "none"),
    ]
    if lockstep:  # ranks capture these in the same steps, so no size may change on one of them alone
        parts.append(("sizes that a capture is for", ", ".join(told.names(inputs)) or "none"))
    sources = tuple((name, _where(node)) for name, node in calls.items())
    return PlanDigest(tuple(parts), sources, lockstep)


def with_shared_sizes(gm: GraphModule, sizes: SizeRule, groups: Mapping[str, Group]) -> SizeRule:
    """The rule, knowing which sizes are the same on all ranks: those that the shapes of collectives depend on."""
    told = _Symbols(gm, sizes)
    for node in _shared(gm, groups):
        told.count(node)
    told.tokens()
    return replace(sizes, shared=tuple(told.bindings[s] for s in told.numbers if s in told.bindings))


def _shared(gm: GraphModule, groups: Mapping[str, Group]) -> list[Node]:
    """The collectives with other ranks, in order."""
    return [n for n in collectives_of(gm) if group_of(n) not in groups or groups[group_of(n)].size > 1]


class _Symbols:
    """Sizes of a graph under names that all ranks share: numbered as collectives first depend on them."""

    def __init__(self, gm: GraphModule, sizes: SizeRule) -> None:
        self._placeholders = placeholders = gm.graph.find_nodes(op="placeholder")
        self._rule = sizes
        self._symbols: list[sympy.Symbol] = []
        for i, d in sizes.bindings:
            value = placeholders[i].meta["val"]
            self._symbols.append((value if d is None else value.shape[d]).node.expr)
        self.bindings = {symbol: i for i, symbol in enumerate(self._symbols)}
        self.numbers: dict[sympy.Symbol, sympy.Symbol] = {}

    def names(self, inputs: Sequence[str]) -> list[str]:
        """``tokens.shape[0]``, ...: for each size the first tensor that has it; its own name where none does."""
        of_tensors: dict[sympy.Symbol, str] = {}
        for name, node in zip(inputs, self._placeholders, strict=True):
            for d, size in enumerate(tensor(node).shape if is_tensor(node) else ()):
                if isinstance(size, torch.SymInt):
                    of_tensors.setdefault(size.node.expr, f"{name}.shape[{d}]")
        return [of_tensors.get(s, inputs[i]) for s, (i, _) in zip(self._symbols, self._rule.bindings, strict=True)]

    def text(self, size: object) -> str:
        expression = size.node.expr if isinstance(size, torch.SymInt) else sympy.sympify(size)
        self._number(expression.free_symbols)
        return str(expression.xreplace(self.numbers))

    def _number(self, symbols: Iterable[sympy.Symbol]) -> None:
        for symbol in sorted(symbols, key=lambda s: (self.bindings.get(s, len(self.bindings)), str(s))):
            self.numbers.setdefault(symbol, sympy.Symbol(f"n{len(self.numbers)}", integer=True, positive=True))

    def count(self, node: Node) -> str:
        """How much a collective sends, as far as it is the same on all ranks."""
        if is_moe(node):
            return self._of_moe(node)
        value = node.args[0].meta["val"] if SITE in node.meta and is_tensor(node.args[0]) else node.meta.get("val")
        values = [v for v in (value if isinstance(value, tuple | list) else [value]) if isinstance(v, Tensor)]
        if any(word in op_names(node)[0] for word in _UNEVEN):
            return ", ".join(f"{dtype_text(v.dtype)} [..., {v.shape[-1] if v.ndim else 1}]" for v in values)
        return ", ".join(f"{self.text(v.numel())} {dtype_text(v.dtype)}" for v in values) or "no tensor"

    def _of_moe(self, node: Node) -> str:
        """A rank has tokens of its own, and a capacity that is everybody's."""
        given = op_arguments(node)
        if "partial" in given:
            partial = tensor(given["partial"])
            return f"{self.text(partial.numel())} {dtype_text(partial.dtype)}"
        head = f"capacity {self.text(capacity_of(node))}, {given['num_experts']} experts"
        sent = (*(tensor(payload) for payload in given["payloads"]), tensor(given["topk_ids"]))
        rows = ", ".join(f"{dtype_text(t.dtype)} [..., {self.text(t.shape[-1])}]" for t in sent)
        return f"{head}: {rows}"

    def tokens(self) -> str:
        """The token count as a function of the shared sizes; one that it alone depends on is shared, too."""
        rule, symbols = self._rule.tokens, self._symbols
        if rule is None:
            return "unknown"
        base = range(11, 11 + len(symbols))
        tried = ({rule((*base[:i], n, *base[i + 1 :])) for n in _SAMPLES} for i in range(len(symbols)))
        self._number(symbol for symbol, counts in zip(symbols, tried, strict=True) if len(counts) > 1)
        order = list(self.numbers)
        place = [order.index(s) if s in self.numbers else 0 for s in symbols]
        return f"{[rule(tuple(n + k for k in place)) for n in _SAMPLES]} at {list(_SAMPLES)}"


def _calls(
    nodes: Sequence[Node], groups: Mapping[str, Group], captured: set[str], cleaned: set[str], told: _Symbols
) -> Iterator[str]:
    """A text per collective call. Groups are numbered as they come: their names are each rank's own."""
    numbers: dict[str, int] = {}
    for node in nodes:
        name = group_of(node)
        number = numbers.setdefault(name, len(numbers))
        size = groups[name].size if name in groups else "?"
        yield (
            f"{_what(node)} over {size} ranks (group {number}) of {told.count(node)}"
            f"{f', scaled by {node.meta[FACTORS]}' if FACTORS in node.meta else ''}"
            f"{', captured' if node.name in captured else ''}{', cleaned' if node.name in cleaned else ''}"
        )


def _what(node: Node) -> str:
    """What a peer meets: of the reference collective that is torch's all-reduce, whatever follows it."""
    name = op_names(node)[1]
    if is_moe(node):
        by = str(op_arguments(node)["collective"]).removesuffix(KNOWN_IDS)  # each rank may know more of its own ids
        return f"{op_names(node)[0]} by {by}"
    if name.startswith("ringfence::"):
        collective = str(arguments(node)[-1])
        return "sum" if collective == Collective.REFERENCE else f"{name} by {collective}"
    if calls(node, c10d.all_reduce.default):
        return str(bound_arguments(node)["reduce_op"])
    return name


def _where(node: Node) -> str:
    """Where the user's code makes the call."""
    return " in ".join(filter(None, (source_of(node), module_of(node)))) or f"node '{node.name}'"


def _option_text(key: str, value: Any) -> str:
    return str(sorted(value)) if key == "all_reduce_ops" else str(value)


def _device_text(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    about = torch.cuda.get_device_properties(device)
    return f"{about.name}, capability {about.major}.{about.minor}, {about.multi_processor_count} multiprocessors"
