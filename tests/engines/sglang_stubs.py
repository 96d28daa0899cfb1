"""Stubs for packages that SGLang imports and that cannot be had, or are not needed, on a CPU without its kernels."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

#: Top-level packages, of which each module imports and each name is a :class:`Anything`.
STUBBED = (
    "IPython",
    "anthropic",
    "compressed_tensors",
    "cuda",
    "decord",
    "flash_attn",
    "flashinfer",
    "gguf",
    "interegular",
    "llguidance",
    "modelscope",
    "outlines",
    "pynvml",
    "sentencepiece",
    "sgl_kernel",
    "soundfile",
    "tiktoken",
    "torch_memory_saver",
    "torchao",
    "torchcodec",
    "torchvision",
    "triton_kernels",
    "tvm_ffi",
    "vllm",
    "xgrammar",
)


class _Meta(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything

    def __or__(cls, other: Any) -> Any:
        return Any

    __ror__ = __or__


class Anything(metaclass=_Meta):
    """A class, a decorator, a function or a constant: whatever is asked of a stub while modules are imported."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and callable(args[0]):  # a decorator
            return args[0]
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything

    def __class_getitem__(cls, item: Any) -> Any:
        return cls

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.any_schema()


class _Module(types.ModuleType):
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


class StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Last in ``sys.meta_path``, so that a package that is installed is taken."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in STUBBED or _is_a_probe():
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _is_a_probe() -> bool:
    """Whether somebody asks if a package is there, and does not import it: he is to hear that it is not."""
    frame = sys._getframe(2)
    while frame is not None and "importlib" in frame.f_code.co_filename:
        if "importlib.util" in frame.f_code.co_filename or frame.f_code.co_filename.endswith("importlib/util.py"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def install() -> None:
    """Before SGLang is imported. transformers asks for packages when its classes are imported, so it is first."""
    from transformers import AutoProcessor, PreTrainedModel  # noqa: F401

    if not any(isinstance(finder, StubFinder) for finder in sys.meta_path):
        sys.meta_path.append(StubFinder())
