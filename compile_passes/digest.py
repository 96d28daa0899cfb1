"""Digest: everything about a compiled graph that must be the same on all ranks, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..runtime.groups import Group
from ..runtime.replay.program import SizeRule
from ..runtime.watch.agree import PlanDigest
from .groups import collectives_of, group_of
from .host import op_names
from .judge import Verdict
from .roles import dtype_text
from .split import SplitPlan

#: Options that may differ between ranks: whom they tell, how long they wait; names of groups, which do differ; and
#: the path of a size table, whose rows were compared when the collective was chosen.
_OWN = frozenset(
    {"on_report", "on_hang", "step_seconds", "warm_up_seconds", "agree_seconds", "journal_dir", "groups", "size_table"}
)
_PACKAGES = ("torch", "ringfence", "flashinfer-python")

#: Where a rule for the token count is tried: rules that agree here are taken for equal.
_SAMPLES = (2, 3, 7, 64)


def digest(
    gm: GraphModule,
    plan: SplitPlan,
    verdicts: Sequence[Verdict],
    sizes: SizeRule,
    groups: Mapping[str, Group],
    *,
    collective: str,
    options: Mapping[str, Any],
    versions: Mapping[str, str | None],
    device: torch.device,
) -> PlanDigest:
    """What the ranks compare before the graph is used.

    gm: the graph before the cut. options: JSON-ready.
    """
    parts = [
        *((f"version of {name}", str(versions.get(name))) for name in _PACKAGES),
        ("device", _device_text(device)),
        *((f"option {key}", _option_text(key, value)) for key, value in sorted(options.items()) if key not in _OWN),
        ("collective", collective),
        ("sizes", _sizes_text(sizes)),
        *_calls(gm, groups),
        *((f"op {v.op} at {v.node}", f"{v.decision} ({v.rule})") for v in verdicts),
        *(
            (f"piece {p.index}", f"{p.name}, {'island' if p.island else 'captured'}, {p.nodes} nodes")
            for p in plan.pieces
        ),
    ]
    return PlanDigest(tuple(parts))


def _calls(gm: GraphModule, groups: Mapping[str, Group]) -> Iterator[tuple[str, str]]:
    """One part per collective call. Groups are numbered as they come: their names are each rank's own."""
    numbers: dict[str, int] = {}
    for i, node in enumerate(collectives_of(gm)):
        name = group_of(node)
        number = numbers.setdefault(name, len(numbers))
        size = groups[name].size if name in groups else "?"
        yield f"call {i}", f"{op_names(node)[1]} over {size} ranks (group {number}) of {_value_text(node)}"


def _value_text(node: Node) -> str:
    value = node.meta.get("val")
    value = value[0] if isinstance(value, tuple | list) and value else value
    if not isinstance(value, Tensor):
        return "no tensor"
    hidden = value.shape[-1] if value.ndim else 1
    return f"{dtype_text(value.dtype)} [..., {hidden}]"


def _option_text(key: str, value: Any) -> str:
    return str(sorted(value)) if key == "all_reduce_ops" else str(value)


def _sizes_text(sizes: SizeRule) -> str:
    if sizes.tokens is None:
        return f"{sizes.bindings}, tokens unknown"
    tried = [sizes.tokens((n,) * len(sizes.bindings)) for n in _SAMPLES]
    return f"{sizes.bindings}, tokens {tried} at {list(_SAMPLES)}"


def _device_text(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    about = torch.cuda.get_device_properties(device)
    return f"{about.name}, capability {about.major}.{about.minor}, {about.multi_processor_count} multiprocessors"
