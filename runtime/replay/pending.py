"""Functional collectives that were issued and that nobody has waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Pending:
    """Waits for values before they are copied.

    A copy of what a collective still writes into would be read by nobody who waits: its result is
    registered by its memory, and the copy has other memory.
    """

    def __init__(self) -> None:
        #: How many there are; false in nearly every call, so it is asked first.
        self.any = _counter()

    def wait(self, values: Iterable[Any]) -> None:
        """Wait for those of ``values`` that a collective has yet to write."""
        if not self.any():
            return
        for value in values:
            if isinstance(value, Tensor):
                torch.ops._c10d_functional.wait_tensor(value)


def _counter() -> Callable[[], int]:
    """How many collectives are not waited for, as torch counts; where it does not say, there may always be one."""
    if not torch.distributed.is_available():
        return lambda: 0
    count: Callable[[], int] = getattr(torch._C._distributed_c10d, "_get_work_registry_size", lambda: 1)
    return count
