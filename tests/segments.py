"""An engine's capture in segments, as vLLM and SGLang have, over the simulation of captures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ringfence.runtime.replay.capture import SimulatedGraphs
from ringfence.runtime.replay.tape import Tape


class Segments:
    """What runs between two segments is run again in replays."""

    def __init__(self) -> None:
        self.actions: list[Callable[[], Any]] = []
        self.breaks = 0
        self._graphs = SimulatedGraphs()
        self._open: contextlib.ExitStack | None = None

    def record(self, call: Callable[..., Any], *args: Tensor) -> Any:
        self._begin(args)
        try:
            return call(*args)
        finally:
            self._end()

    def replay(self) -> None:
        for action in self.actions:
            action()

    def _begin(self, args: tuple[Tensor, ...]) -> None:
        tape = Tape(self._graphs.pool_for(args), lambda tensor: True)
        self._open = contextlib.ExitStack()
        self._open.callback(tape.undo)
        self._open.enter_context(tape)
        self.actions.append(tape.replay)

    def _end(self) -> None:
        assert self._open is not None
        self._open.close()
        self._open = None

    def eager(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            if self._open is None:
                return function(*args)
            self._end()
            self.breaks += 1
            result = function(*args)
            self.actions.append(lambda: function(*args))
            self._begin(tuple(a for a in args if isinstance(a, Tensor)))
            return result

        return wrapper
