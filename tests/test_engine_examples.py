"""The programs in docs/engines.md run, over stand-ins of the engines' modules and ops."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import engine_ops
import pytest
import torch
from torch import Tensor

import ringfence
from support import TOLERANCE, aot_graph, relative_error

PAGE = Path(__file__).parent.parent / "docs" / "engines.md"
H = 64
INTERFACE = "tensorrt_llm._torch.auto_deploy.transform.interface"


def programs(title: str) -> list[str]:
    section = PAGE.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return [part.partition("\n```")[0] for part in section.split("```python\n")[1:]]


def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    for _ in range(2):
        r = r + engine_ops.op("auto_deploy::trtllm_dist_all_reduce")(x.sin(), "AUTO")
        x = engine_ops.op("auto_deploy::torch_rmsnorm")(r, w, 1e-6)
    return x, r


@pytest.mark.usefixtures("fake_group")
def test_the_transform_of_auto_deploy() -> None:
    """The sums of the stand-ins are of one rank, as those of the fake group are."""
    libraries = engine_ops.define()
    registered: dict[str, Any] = {}

    def register(name: str) -> Any:
        return lambda cls: registered.setdefault(name, cls)

    names = INTERFACE.split(".")
    modules = {".".join(names[:end]): types.ModuleType(".".join(names[:end])) for end in range(1, len(names) + 1)}
    modules[INTERFACE].__dict__.update(
        BaseTransform=object, TransformInfo=SimpleNamespace, TransformRegistry=SimpleNamespace(register=register)
    )
    (program,) = programs("TensorRT-LLM")
    with mock.patch.dict(sys.modules, modules):
        exec(compile(program, str(PAGE), "exec"), {"__name__": "program"})
    (transform,) = registered.values()
    given = torch.randn(4, H), torch.randn(4, H), torch.rand(H) + 0.5
    gm = aot_graph(model, *given)
    wanted = model(*given)
    ringfence.prepare(None, H, torch.float32, 4)
    same, info = transform()._apply(gm, None, None, None)
    assert (same, info.num_matches, info.is_clean, info.has_valid_shapes) == (gm, 2, False, False)
    assert gm.code.count("'world', 'prepared'") == 2 and "auto_deploy" not in gm.code, gm.code
    with torch.no_grad():
        for ours, theirs in zip(gm(*given), wanted, strict=True):
            assert relative_error(ours, theirs.double()) <= 4 * TOLERANCE[torch.float32]
    assert transform()._apply(aot_graph(lambda x: x + 1, given[0]), None, None, None)[1].is_clean
    del libraries  # the ops go with them
