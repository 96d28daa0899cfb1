"""Launches through the CUDA driver, over a fake of its library."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from ringfence.runtime.collectives.cuda_driver import Driver
from ringfence.runtime.collectives.forms import CallArguments
from ringfence.runtime.errors import WorkspaceError


class Library:
    """Keeps what was launched: the grid, the threads, the attributes and the first argument's token count."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.code = 0

    def cuLaunchKernelEx(self, config: Any, function: Any, arguments: Any, extra: None) -> int:
        one = config._obj
        attributes = [(one.attributes[i].id, one.attributes[i].value.number) for i in range(one.attribute_count)]
        call = CallArguments.from_address(arguments[0])
        shape = (one.grid_x, one.grid_y, one.grid_z, one.block_x, one.block_y, one.block_z)
        self.launched.append((shape, one.shared_bytes, one.stream, attributes, call.tokens))
        return self.code

    def cuGetErrorString(self, code: Any, text: Any) -> int:
        text._obj.value = b"too many resources"
        return 0


@pytest.mark.parametrize("dependent", [True, False])
def test_a_launch_says_whether_it_may_begin_before_the_kernel_before_has_ended(
    dependent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    driver, call = Driver(), CallArguments(tokens=7)
    driver.launch(ctypes.c_void_p(5), 80, 320, call, 77, dependent=dependent)
    attributes = [(6, 1)] if dependent else []  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert library.launched == [((80, 1, 1, 320, 1, 1), 0, 77, attributes, 7)]
    library.code = 701
    with pytest.raises(WorkspaceError, match="cuLaunchKernelEx failed: CUDA error 701, too many resources"):
        driver.launch(ctypes.c_void_p(5), 80, 320, call, 77, dependent=dependent)
