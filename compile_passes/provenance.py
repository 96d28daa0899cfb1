"""Where in the user's code a node comes from."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch.fx import GraphModule, Node

_FRAME = re.compile(r'^\s*File "(?P<file>.+?)", line (?P<line>\d+), in ', re.MULTILINE)

#: Frames that carry out the user's wish but are not the user's code: torch where it is installed, whatever folders
#: of that name a user has, the tensor parallelism of transformers and of engines, and our own function.
_TORCH = str(Path(torch.__file__).parent)
_PLUMBING = re.compile(
    r"/transformers/(distributed|integrations)/|/vllm/distributed/|/sglang/srt/distributed/"
    r"|/tensorrt_llm/_torch/distributed/|/(ringfence|front)/callable\.py$"
)

#: Key of ``node.meta`` under which an input keeps the name that a person knows it by.
NAME = "ringfence_name"


def _is_library(file: str) -> bool:
    return file.startswith((f"{_TORCH}/", f"{_TORCH}\\")) or _PLUMBING.search(file.replace("\\", "/")) is not None


def source_of(node: Node) -> str | None:
    """``file:line`` of the innermost frame outside torch and the TP plumbing of transformers and engines."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f for f in frames if not _is_library(f[0])] or frames
    return f"{own[-1][0]}:{own[-1][1]}" if own else None


def label(node: Node) -> str:
    """A node in a message: an input by its name, any other by its own and the line that it comes from."""
    if node.op == "placeholder":
        return f"'{node.meta.get(NAME, node.name)}'"
    source = source_of(node)
    where = "/".join(source.replace("\\", "/").split("/")[-2:]) if source else node.target
    return f"'{node.name}' ({where})"


def name_inputs(gm: GraphModule, dynamo_names: Sequence[str]) -> None:
    """Let :func:`label` call the inputs by the names of :func:`input_names`."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node, name in zip(placeholders, input_names(gm, dynamo_names), strict=True):
        node.meta[NAME] = name


def input_names(gm: GraphModule, dynamo_names: Sequence[str]) -> tuple[str, ...]:
    """Names that a person knows for the inputs of an AOT graph.

    AOT calls them ``arg0_1``, ...; Dynamo's placeholders carry the path of the parameter.
    """
    names = []
    for name in names_by_dynamo(gm, dynamo_names):
        names.append(re.sub(r"_(modules|parameters|buffers)_", ".", name.removeprefix("l_self_modules_")).strip("_"))
    return tuple(_by_shape(gm, names))


def _by_shape(gm: GraphModule, names: Sequence[str]) -> Iterator[str]:
    """Sizes are called by the tensor that has them, ``x.shape[0]``: Dynamo numbers them."""
    nodes = gm.graph.find_nodes(op="placeholder")
    shapes: dict[object, str] = {}
    for node, name in zip(nodes, names, strict=True):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            for d, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt):
                    shapes.setdefault(size.node.expr, f"{name}.shape[{d}]")
    for node, name in zip(nodes, names, strict=True):
        value = node.meta.get("val")
        yield shapes.get(value.node.expr, name) if isinstance(value, torch.SymInt) else name


def inputs_of_modules(gm: GraphModule, dynamo_names: Sequence[str]) -> frozenset[int]:
    """The inputs of an AOT graph that are a module's parameters and buffers, by the names that Dynamo gave them."""
    return frozenset(
        i for i, name in enumerate(names_by_dynamo(gm, dynamo_names)) if "_parameters_" in name or "_buffers_" in name
    )


def served(gm: GraphModule, names: Sequence[str], stay: Collection[int]) -> str:
    """The shapes of a graph's inputs, without those that stay where they are (parameters, caches); the first three."""
    shapes = []
    for i, (node, name) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), names, strict=True)):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and i not in stay:
            said = without_scope(name)
            said = f"argument {said}" if said.isdigit() else said
            shapes.append(f"{said} [{', '.join(map(str, value.shape))}]")
    more = f" and {len(shapes) - 3} more" if len(shapes) > 3 else ""
    return ", ".join(shapes[:3]) + more


def without_scope(name: str) -> str:
    """The name of an input of :func:`input_names`, as the function that is compiled calls it."""
    return re.sub("^l_(kwargs_|args_)?", "", name)


def names_by_dynamo(gm: GraphModule, dynamo_names: Sequence[str]) -> Iterator[str]:
    """What Dynamo calls the inputs of an AOT graph; ``dynamo_names`` are all of its names."""
    for node in gm.graph.find_nodes(op="placeholder"):
        origin = node.meta.get("desc")
        while hasattr(origin, "base"):  # the local tensor of a DTensor parameter
            origin = origin.base
        index = getattr(origin, "idx", None)
        yield dynamo_names[index] if isinstance(index, int) and index < len(dynamo_names) else node.name


def module_of(node: Node) -> str | None:
    """The innermost ``nn.Module`` of the model that the node belongs to, as a dotted path."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    if not paths:
        return None
    # Dynamo writes L['self']._modules['layers']._modules['0'] or L['self'].layers[0].
    path = re.sub(r"\._modules\['([^']+)'\]|\[['\"]?([^'\"\]]+)['\"]?\]", r".\1\2", paths[-1])
    return re.sub(r"^L\.self\.?|^L\.\w+\.?", "", path) or None
