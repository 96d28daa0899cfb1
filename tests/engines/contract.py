"""What the vLLM that is installed has, beside what ringfence and its tests take for granted: one line of differences.

Its hooked functions; its norms and its all-reduce by their schemas, which are those of tests/engine_ops.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import engine_ops

from ringfence.compile_passes.norm_ops import installed_ops
from ringfence.integrations.targets import moved
from ringfence.integrations.vllm.hooked import TARGETS


def arguments(schema: Any) -> list[tuple[str, str, bool]]:
    return [(a.name, str(a.type), a.is_write) for a in schema.arguments]


def differences() -> Iterator[str]:
    import vllm.distributed.parallel_state
    import vllm.ir.ops  # noqa: F401
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    for targets in TARGETS.values():
        yield from moved(targets)
    for row in installed_ops().values():
        if isinstance(row, str):
            yield row
    for text in (*engine_ops.ALL_REDUCES, *engine_ops.NORMS, engine_ops.MAYBE_IN_PLACE):
        wanted = torch._C.parse_schema(text)
        namespace, _, name = wanted.name.partition("::")
        if namespace not in ("vllm", "vllm_ir", "_C"):
            continue
        packet = getattr(getattr(torch.ops, namespace), name, None)
        op = getattr(packet, wanted.overload_name or "default", None)
        if op is None:
            yield f"{wanted.name}.{wanted.overload_name or 'default'} is not there"
        elif arguments(op._schema) != arguments(wanted) or len(op._schema.returns) != len(wanted.returns):
            yield f"{op._schema}, and the stand-in is {text}"


if __name__ == "__main__":
    raise SystemExit("; ".join(differences()) or 0)
