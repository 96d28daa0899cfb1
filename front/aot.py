"""What AOT and torch's ``aot_compile`` expect of what a backend returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.aot_compile_types import SerializableCallable

from .runtime.errors import NotSavableError


class CompiledHere(SerializableCallable):
    """A compiled graph of this process: its pieces know workspaces, buffers and captures, so it cannot be saved."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    @classmethod
    def serialize_compile_artifacts(cls, fn: Any) -> bytes:
        raise NotSavableError(
            "what ringfence compiles cannot be saved: it knows this process's workspaces and captures. Compile it in "
            "each process (vLLM: VLLM_USE_AOT_COMPILE=0 leaves out the try)"
        )

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Any:
        raise NotSavableError("ringfence saves no compiled graphs, so these are somebody else's")


def compiled(compile_graph: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """What ``compile_graph()`` returns, as whoever called the backend wants it.

    torch's ``aot_compile`` has AOT return what Inductor makes, to save it; here AOT is told that nothing is saved.
    """
    config = torch._functorch.config
    if not config.force_autograd_cache and not config.bundled_autograd_cache:
        return compile_graph()
    with config.patch(force_autograd_cache=False, bundled_autograd_cache=False):
        return CompiledHere(compile_graph())


def inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    """What Inductor takes apart before it compiles."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def boxed(run: Callable[[list[Any]], Sequence[Any]]) -> Callable[[list[Any]], Sequence[Any]]:
    """AOT's calling convention: the arguments come in a list, which the callee empties. Marks what does so."""

    def call(args: list[Any]) -> Sequence[Any]:
        return run(args)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call
