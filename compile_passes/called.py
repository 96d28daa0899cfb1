"""Called: fused ops that a model calls by itself (``ringfence.all_reduce_add_rms_norm``), as sites of its graph."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import GraphModule, Node

from ..runtime.collectives import ops
from ..runtime.errors import InputError
from ..runtime.groups import ByGroup
from .fuse import SITE
from .match import Candidate, Site
from .op_calls import op_arguments
from .provenance import label, module_of, source_of
from .roles import calls, dtype_text, first_node, tensor


def called_sites(gm: GraphModule, first: int) -> list[Candidate]:
    """One candidate for each, numbered from ``first``; their nodes know it from now on.

    Raises :class:`InputError` for operands that do not fit: from here on nobody looks at them any more.
    """
    for node in gm.graph.nodes:
        if calls(node, *ops.OPS) and node.args[-1] == ops.PREPARED:
            _check(node)
    nodes = [n for n in gm.graph.nodes if calls(n, *ops.FUSED) and SITE not in n.meta]
    return [
        Candidate(_site(node, first + i), None, called=True, weighted=op_arguments(node)["weight"] is not None)
        for i, node in enumerate(nodes)
    ]


def _check(node: Node) -> None:
    given = {k: v.meta["val"] if isinstance(v, Node) else v for k, v in op_arguments(node).items()}
    try:
        ops.check_operands(**{k: v for k, v in given.items() if k not in ("group", "collective")})
    except InputError as error:
        raise InputError(f"{label(node)}: {error}") from error


def _site(node: Node, index: int) -> Site:
    node.meta[SITE] = index
    arguments, source = op_arguments(node), first_node(node)
    assert source is not None, "a fused op takes its input first"
    last = tensor(source).shape[-1]
    return Site(
        index,
        node.name,
        kind=str(node.target).split(".")[1],
        decline=None,
        group=arguments["group"],
        dtype=dtype_text(tensor(source).dtype),
        hidden_size=last if isinstance(last, int) else None,
        eps=arguments["eps"],
        has_residual="residual" in arguments,
        source=source_of(node),
        module=module_of(node),
    )


def name_prepared(gm: GraphModule, collectives: Mapping[str, str]) -> int:
    """Let calls that name no collective name that of their group; how many did not."""
    carriers = ByGroup(collectives)
    nodes = [n for n in gm.graph.nodes if calls(n, *ops.OPS) and n.args[-1] == ops.PREPARED]
    for node in nodes:
        node.args = (*node.args[:-1], str(carriers.get(str(op_arguments(node)["group"]), "reference")))
    return len(nodes)
