"""Inductor's compiled code under a tape: its kernels and its allocations dispatch nothing that a mode could see."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor

from .tape import Tape


class CompiledKernels:
    """Inductor's kernels by module: while a capture runs they go over its tape.

    Compiled code calls its kernels, and allocates, by the globals of the module that it was written into.
    """

    #: Modules are everybody's, so one thread at a time may change them.
    _lock = threading.Lock()

    def __init__(self) -> None:
        self._names: dict[int, tuple[str, ...]] = {}

    @contextlib.contextmanager
    def over(self, tape: Tape) -> Iterator[None]:
        from torch._inductor.codecache import PyCodeCache

        thread = threading.get_ident()

        def on_tape(kernel: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if threading.get_ident() != thread:
                    return kernel(*args, **kwargs)
                return tape.compiled(kernel, args, kwargs)

            return call

        def buffer(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def call(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
                if threading.get_ident() != thread:
                    return allocate(size, stride, dtype)
                return tape.buffer(size, stride, dtype)

            return call

        with self._lock:
            restore: list[tuple[dict[str, Any], str, Any]] = []
            try:
                for module in list(PyCodeCache.modules):
                    names = vars(module)
                    for name in self._kernels(module):
                        value = names[name]
                        restore.append((names, name, value))
                        if name.startswith("empty_strided"):
                            names[name] = buffer(value)
                        elif callable(value):
                            names[name] = on_tape(value)
                        else:
                            names[name] = _Launcher(value, on_tape(value.run))
                yield
            finally:
                for names, name, value in restore:
                    names[name] = value

    def _kernels(self, module: Any) -> tuple[str, ...]:
        found = self._names.get(id(module))
        if found is None:
            found = tuple(name for name, value in vars(module).items() if _is_kernel(name, value))
            allocates = ("empty_strided_cpu", "empty_strided_cuda")  # code without kernels calls ops on what it makes
            found += tuple(name for name in allocates if name in vars(module))
            self._names[id(module)] = found
        return found


class _Launcher:
    """A Triton kernel, whose ``run`` goes over the tape."""

    def __init__(self, kernel: Any, run: Callable[..., Any]) -> None:
        self._kernel = kernel
        self.run = run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


def _is_kernel(name: str, value: Any) -> bool:
    if isinstance(value, BuiltinFunctionType):
        return name.startswith("cpp_")
    return type(value).__name__ == "CachingAutotuner"
