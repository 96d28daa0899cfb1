"""Judge: may this op be inside a captured piece?

Rules are rows of data, read top down by one engine; the first that applies
decides. A rule names its source, and its verdict says what it rests on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ..runtime.errors import OptionsError
from .all_reduce import is_all_reduce
from .fuse import SITE
from .roles import bound_arguments, c10d, calls


class Decision(StrEnum):
    """Where an op runs: inside a piece, eagerly between pieces, or not at all."""

    IN_GRAPH = "IN_GRAPH"
    SPLIT = "SPLIT"
    REFUSE = "REFUSE"


@dataclass(frozen=True)
class Verdict:
    """What was decided for one node. ``rule`` is the id of the row that decided.

    ``site`` is the index of the fused site, None for other ops.
    """

    node: str
    op: str
    decision: Decision
    rule: str
    message: str
    source: str
    site: int | None = None


@dataclass(frozen=True)
class OpFacts:
    """What the rules may ask about a node."""

    op: str
    backend: str | None
    named_split: bool
    capture: bool
    collective: bool
    data_dependent: bool
    tagged_unsafe: bool


@dataclass(frozen=True)
class Rule:
    id: str
    applies: Callable[[OpFacts], bool]
    decision: Decision
    message: str
    source: str


#: Backends whose collectives are carried out by the host, or by nobody.
_HOST_BACKENDS = frozenset({"gloo", "mpi", "ucc", "fake", "threaded"})

RULES: tuple[Rule, ...] = (
    Rule(
        "split_op",
        lambda f: f.named_split,
        Decision.SPLIT,
        "named in split_ops",
        "option split_ops",
    ),
    Rule(
        "no_capture",
        lambda f: not f.capture,
        Decision.IN_GRAPH,
        "nothing is captured, so nothing needs to be split off",
        "option capture_sizes",
    ),
    Rule(
        "data_dependent",
        lambda f: f.data_dependent,
        Decision.SPLIT,
        "a shape or value that it reads or returns depends on data; a replay would repeat the one seen at capture",
        "CUDA C++ Programming Guide, CUDA Graphs: a synchronising call invalidates the capture",
    ),
    Rule(
        "cudagraph_unsafe",
        lambda f: f.tagged_unsafe,
        Decision.SPLIT,
        "it carries torch.Tag.cudagraph_unsafe",
        "torch/_C Tag.cudagraph_unsafe: its author says that it cannot be captured",
    ),
    Rule(
        "host_collective",
        lambda f: f.collective and f.backend in _HOST_BACKENDS,
        Decision.SPLIT,
        "runs on the host over {backend}; a replayed piece would not run it again",
        "docs/design.md, what decides capture",
    ),
    Rule(
        "nccl",
        lambda f: f.collective and f.backend == "nccl",
        Decision.IN_GRAPH,
        "over NCCL it is stream work with its epoch on the device",
        "NCCL user guide, Using NCCL with CUDA Graphs (2.9 and later)",
    ),
    Rule(
        "unknown_collective",
        lambda f: f.collective,
        Decision.SPLIT,
        "nothing is known about it under capture; an epoch held by the host would be baked into the graph",
        "docs/design.md, what decides capture",
    ),
)


def judge(
    gm: GraphModule,
    *,
    backends: Mapping[str, str],
    capture: bool,
    split_ops: Collection[str] = (),
    all_reduce_ops: Collection[str] = (),
    rules: Sequence[Rule] = RULES,
) -> list[Verdict]:
    """A verdict for every op that a rule has something to say about, in graph order.

    ``backends`` maps the names of process groups to "gloo", "nccl", ...; ``capture``
    is whether any size will be captured. Raises :class:`OptionsError` when an op
    named in ``split_ops`` is not registered with torch.
    """
    for name in split_ops:
        _check_registered(name)
    verdicts = []
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        facts = _facts(node, backends, capture, split_ops, all_reduce_ops)
        if not (facts.named_split or facts.collective or facts.data_dependent or facts.tagged_unsafe):
            continue
        rule = next(r for r in rules if r.applies(facts))
        message = rule.message.format(backend=facts.backend)
        verdicts.append(Verdict(node.name, facts.op, rule.decision, rule.id, message, rule.source, node.meta.get(SITE)))
    return verdicts


def group_of(node: Node) -> str | None:
    """The name of the process group that a collective runs over."""
    if calls(node, c10d.wait_tensor.default):
        source = node.args[0]
        return group_of(source) if isinstance(source, Node) else None
    bound = bound_arguments(node)
    group = bound.get("group_name", bound.get("group"))
    return group if isinstance(group, str) else None


def _facts(
    node: Node,
    backends: Mapping[str, str],
    capture: bool,
    split_ops: Collection[str],
    all_reduce_ops: Collection[str],
) -> OpFacts:
    op, full = _op_names(node)
    group = group_of(node)
    collective = (
        is_all_reduce(node, all_reduce_ops)
        or SITE in node.meta
        or op.split("::")[0] in ("_c10d_functional", "_c10d_functional_autograd", "c10d", "_dtensor", "symm_mem")
    )
    tags = getattr(node.target, "tags", ())
    values = (node, *node.all_input_nodes)
    return OpFacts(
        op=op,
        backend=backends.get(group) if group is not None else None,
        named_split=op in split_ops or full in split_ops,
        capture=capture,
        collective=collective,
        data_dependent=torch.Tag.data_dependent_output in tags or any(map(_has_unbacked_size, values)),
        tagged_unsafe=torch.Tag.cudagraph_unsafe in tags,
    )


def _has_unbacked_size(node: Node) -> bool:
    """Whether a size of the value was born from data in this graph."""
    values = node.meta.get("val")
    born = free_unbacked_symbols(list(values) if isinstance(values, tuple | list) else values)
    if not born:
        return False
    given: set[object] = set()
    for placeholder in node.graph.find_nodes(op="placeholder"):
        given |= free_unbacked_symbols(placeholder.meta.get("val"))
    return bool(born - given)


def _op_names(node: Node) -> tuple[str, str]:
    """``"ns::name"`` and ``"ns::name.overload"``; for a higher-order wrapper, of the op inside."""
    inner = node.args[0] if node.args else None
    higher_order = isinstance(node.target, torch._ops.HigherOrderOperator)
    target = inner if higher_order and isinstance(inner, torch._ops.OpOverload) else node.target
    if isinstance(target, torch._ops.OpOverload):
        schema = target._schema
        return schema.name, f"{schema.name}.{schema.overload_name or 'default'}"
    return str(target), str(target)


def _check_registered(name: str) -> None:
    namespace, _, op = name.partition("::")
    packet, _, overload = op.partition(".")
    found = getattr(getattr(torch.ops, namespace), packet, None)
    if found is None or (overload and overload not in found.overloads()):
        raise OptionsError(f"split_ops holds '{name}', and no such op is registered with torch")
