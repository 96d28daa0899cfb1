"""Show a graph to whoever is watching."""

from __future__ import annotations

from torch._dynamo.utils import lazy_format_graph_code  # type: ignore[attr-defined]
from torch.fx import GraphModule


def dump_graph(stage: str, gm: GraphModule) -> None:
    """Offer ``gm`` under the name ``ringfence.<stage>``.

    ``depyf.prepare_debug`` writes it to a file that a person can read; outside of it
    the text is never made. This function is where depyf listens.
    """
    lazy_format_graph_code(f"ringfence.{stage}", gm)
