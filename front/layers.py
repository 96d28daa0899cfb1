"""Layers: which decoder layers of a model are equal, so that one speaks for all of its kind.

Every layer is run once on fake tensors, and what it does is written down: each op, on which of its parameters and of
the values before it, with what shapes and constants. Layers with the same record are the same graph. A model is then
traced with a few layers of each kind, so chosen that every layer and every pair of neighbours of the whole is among
them; what is between two all-reduces of a decoder is in one layer or in two neighbours.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

#: Blocks of a period that are kept: the first, the last, and one between equal ones, which speaks for those left out.
_BLOCKS = 3

#: Objects that name an address print it.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True)
class Cut:
    """A stretch of equal blocks that is left out: ``count`` layers from ``first`` on, in blocks of ``period``."""

    first: int
    count: int
    period: int


@dataclass(frozen=True)
class Folding:
    """Which layers are traced. path: of the list of layers in the model. kinds: by layer; equal layers have the same.

    kept: the layers that are traced, in order. cuts: those that are not, in order, whose block before speaks for them.
    """

    path: str
    kinds: tuple[int, ...]
    kept: tuple[int, ...]
    cuts: tuple[Cut, ...]


def fold(path: str, records: Sequence[str]) -> Folding:
    """Leave out blocks of layers that repeat. records: what each layer does."""
    numbers: dict[str, int] = {}
    kinds = tuple(numbers.setdefault(record, len(numbers)) for record in records)
    kept: list[int] = []
    cuts: list[Cut] = []
    at = 0
    while at < len(kinds):
        period, length = _longest_repeat(kinds, at)
        left_out = (length // period - _BLOCKS) * period
        if left_out > 0:
            # The last block, and what is begun of another, stay: what follows them may be another.
            front = (_BLOCKS - 1) * period
            kept += range(at, at + front)
            cuts.append(Cut(at + front, left_out, period))
            kept += range(at + front + left_out, at + length)
            at += length
        else:
            kept.append(at)
            at += 1
    return Folding(path, kinds, tuple(kept), tuple(cuts))


def _longest_repeat(kinds: Sequence[int], start: int) -> tuple[int, int]:
    """The period with which ``kinds`` repeats from ``start`` on for longest, and for how many layers."""
    best = (1, 1)
    for period in range(1, (len(kinds) - start) // 2 + 1):
        end = start + period
        while end < len(kinds) and kinds[end] == kinds[end - period]:
            end += 1
        if end - start >= 2 * period and end - start > best[1]:
            best = (period, end - start)
    return best


# -- what a layer does ----------------------------------------------------------------------------


def record_layers(model: nn.Module, layers: nn.ModuleList, *args: Any, **kwargs: Any) -> list[str]:
    """What each layer does in a call of the model on fake tensors, as a digest."""
    recorder = _Recorder()
    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_pre_hook(_begin(recorder, index), with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(_end(recorder)).remove)
        with recorder:
            model(*args, **kwargs)
    return [recorder.digest(index) for index in range(len(layers))]


def _begin(recorder: _Recorder, index: int) -> Any:
    def begin(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder.begin(index, layer, {str(i): value for i, value in enumerate(args)} | kwargs)

    return begin


def _end(recorder: _Recorder) -> Any:
    def end(layer: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        recorder.end(result)

    return end


class _Recorder(TorchDispatchMode):
    """The ops between the beginning and the end of each layer, with values named by what made them."""

    def __init__(self) -> None:
        super().__init__()
        self._digests: dict[int, Any] = {}
        self._now: Any = None
        self._names: dict[int, str] = {}
        self._alive: list[Any] = []  # an id means something as long as its object lives

    def begin(self, index: int, layer: nn.Module, given: Mapping[str, Any]) -> None:
        self._now = self._digests.setdefault(index, hashlib.sha256())
        self._names, self._alive = {}, []
        for name, value in (*layer.named_parameters(), *layer.named_buffers()):
            self._name(getattr(value, "_local_tensor", value), name)
        for name, value in given.items():  # what is in a container is known by when it is used, as a layer's cache
            if isinstance(value, Tensor):
                self._name(getattr(value, "_local_tensor", value), f"given {name}")
        self._say(type(layer).__qualname__)

    def end(self, result: Any) -> None:
        self._say("returns", tree_map(self._describe, result))
        self._now = None

    def digest(self, index: int) -> str:
        """Of a layer that was not called, one that no other has."""
        return self._digests[index].hexdigest() if index in self._digests else f"layer {index} was not called"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._now is not None:
            self._say(str(func), tree_map(self._describe, (args, kwargs)))
            for i, value in enumerate(tree_leaves(result)):
                if isinstance(value, Tensor) and id(value) not in self._names:
                    self._name(value, f"{len(self._names)}.{i}")
        return result

    def _say(self, *what: object) -> None:
        self._now.update(_ADDRESS.sub("", repr(what)).encode())

    def _name(self, value: Tensor, name: str) -> None:
        self._names[id(value)] = name
        self._alive.append(value)

    def _describe(self, value: object) -> object:
        """A tensor by its name and form; what was never seen in the layer comes from outside, as a cache does."""
        if not isinstance(value, Tensor):
            return value if isinstance(value, int | float | str | bool | type(None)) else repr(value)
        value = cast(Tensor, getattr(value, "_local_tensor", value))
        if id(value) not in self._names:
            self._name(value, f"outside {len(self._names)}")
        form = (tuple(value.shape), tuple(value.stride()), str(value.dtype))
        return self._names[id(value)], form


def keep_layers(model: Any, layers: nn.ModuleList, kept: Sequence[int], cache: Any = None) -> None:
    """Only these layers stay in the model, its config and its cache, and each knows its new place."""
    every, count = list(layers), len(layers)
    layers._modules = {str(place): every[layer] for place, layer in enumerate(kept)}
    for place, layer in enumerate(kept):
        for module in every[layer].modules():
            if getattr(module, "layer_idx", None) == layer:
                module.layer_idx = place  # type: ignore[assignment]
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        for name, value in vars(config).items():  # as layer_types, which says what mask a layer gets
            if isinstance(value, list | tuple) and len(value) == count:
                vars(config)[name] = [value[layer] for layer in kept]
    if cache is not None and len(cache.layers) == count:
        cache.layers = [cache.layers[layer] for layer in kept]
