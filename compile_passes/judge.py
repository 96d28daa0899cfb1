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

from .all_reduce import is_all_reduce
from .fuse import SITE
from .roles import bound_arguments, c10d, calls, first_node, is_tensor, tensor


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
    touches_host: bool
    tagged_unsafe: bool


@dataclass(frozen=True)
class Rule:
    id: str
    applies: Callable[[OpFacts], bool]
    decision: Decision
    message: str
    source: str


_NAMESPACES = frozenset({"_c10d_functional", "_c10d_functional_autograd", "c10d", "_dtensor", "symm_mem"})

#: Control flow whose predicate the host reads.
_READS_A_PREDICATE = (torch.ops.higher_order.cond, torch.ops.higher_order.while_loop)

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
        "host_memory",
        lambda f: f.touches_host,
        Decision.SPLIT,
        "it moves a value between the host and the device; a replay would repeat the one seen at capture",
        "CUDA C++ Programming Guide, CUDA Graphs: kernel arguments are recorded, pageable copies synchronise",
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
    is whether any size will be captured.
    """
    given = _unbacked_inputs(gm)
    verdicts = []
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        facts = _facts(node, backends, capture, split_ops, all_reduce_ops, given)
        unsafe = facts.data_dependent or facts.touches_host or facts.tagged_unsafe
        if not (facts.named_split or facts.collective or unsafe):
            continue
        rule = next(r for r in rules if r.applies(facts))
        message = rule.message.format(backend=facts.backend)
        verdicts.append(Verdict(node.name, facts.op, rule.decision, rule.id, message, rule.source, node.meta.get(SITE)))
    return verdicts


def groups_of(gm: GraphModule) -> set[str]:
    """The names of the process groups that the graph's collectives run over."""
    return {name for node in gm.graph.nodes if (name := _group_of(node)) is not None}


def _group_of(node: Node) -> str | None:
    """The process group of a collective whose implementation is known; of an engine's own op it says nothing."""
    if calls(node, c10d.wait_tensor.default):
        source = first_node(node)
        return _group_of(source) if source is not None else None
    if SITE not in node.meta and _op_names(node)[0].split("::")[0] not in _NAMESPACES:
        return None
    bound = bound_arguments(node)
    group = bound.get("group_name", bound.get("group"))
    return group if isinstance(group, str) else None


def _facts(
    node: Node,
    backends: Mapping[str, str],
    capture: bool,
    split_ops: Collection[str],
    all_reduce_ops: Collection[str],
    given: Collection[object],
) -> OpFacts:
    op, full = _op_names(node)
    group = _group_of(node)
    collective = SITE in node.meta or is_all_reduce(node, all_reduce_ops) or op.split("::")[0] in _NAMESPACES
    tags = getattr(node.target, "tags", ())
    born = torch.Tag.data_dependent_output in tags or calls(node, *_READS_A_PREDICATE)
    return OpFacts(
        op=op,
        backend=backends.get(group) if group is not None else None,
        named_split=op in split_ops or full in split_ops,
        capture=capture,
        collective=collective,
        data_dependent=born or any(_unbacked(n) - set(given) for n in (node, *node.all_input_nodes)),
        touches_host=_touches_host(node),
        tagged_unsafe=torch.Tag.cudagraph_unsafe in tags,
    )


def _unbacked_inputs(gm: GraphModule) -> set[object]:
    """Unbacked sizes that the caller gives; the others are born from data in this graph."""
    return {symbol for node in gm.graph.find_nodes(op="placeholder") for symbol in _unbacked(node)}


def _unbacked(node: Node) -> set[object]:
    values = node.meta.get("val")
    return set(free_unbacked_symbols(list(values) if isinstance(values, tuple | list) else values))


def _touches_host(node: Node) -> bool:
    """Whether an op of an accelerator reads a value on the CPU that a caller can change, or writes one there."""
    values = node.meta.get("val")
    outputs = [v for v in (values if isinstance(values, tuple | list) else [values]) if isinstance(v, torch.Tensor)]
    inputs = [n for n in node.all_input_nodes if is_tensor(n)]
    devices = {v.device.type for v in outputs} | {tensor(n).device.type for n in inputs}
    if "cpu" not in devices or len(devices) == 1:
        return False
    if any(v.device.type == "cpu" for v in outputs):
        return True
    return any(tensor(n).device.type == "cpu" and not _is_constant(n) for n in inputs)


def _is_constant(node: Node) -> bool:
    """Whether a value is the same in every call."""
    if node.op == "placeholder":
        return False
    return all(map(_is_constant, node.all_input_nodes))


def _op_names(node: Node) -> tuple[str, str]:
    """``"ns::name"`` and ``"ns::name.overload"``; for a higher-order wrapper, of the op inside."""
    inner = node.args[0] if node.args else None
    higher_order = isinstance(node.target, torch._ops.HigherOrderOperator)
    target = inner if higher_order and isinstance(inner, torch._ops.OpOverload) else node.target
    if isinstance(target, torch._ops.OpOverload):
        schema = target._schema
        return schema.name, f"{schema.name}.{schema.overload_name or 'default'}"
    return str(target), str(target)
