"""What became of a graph's calls: how many captured, how many were replays, and why the others were neither."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Uncaptured(StrEnum):
    """Why a call of a graph ran uncaptured."""

    OFF = "nothing is captured"
    SIZE = "not a token count of capture_sizes"
    BUSY = "another call of the graph was under way"
    POOL = "the memory of captures was in use"
    SHARED = "an input lies in memory that the model writes"
    SIZES = "too many sizes besides the token count"
    CACHES = "too many caches"
    PARAMETERS = "parameters move"
    FAILED = "a capture of these sizes failed"


@dataclass
class Counts:
    """Of one graph, while it runs. replayed: captures that were replayed at least once."""

    captures: int = 0
    replayed: int = 0
    replays: int = 0
    uncaptured: Counter[Uncaptured] = field(default_factory=Counter)


@dataclass(frozen=True)
class GraphStats:
    """Of one compiled graph.

    name: the compiled function and Dynamo's number of the graph. serves: the shapes that it was compiled for. captures,
    replays: calls that were served so. never_replayed: so many of the captures. uncaptured: calls by reason.
    bytes_held: of the buffers and outputs of its captures.
    """

    name: str
    serves: str
    captures: int
    replays: int
    never_replayed: int
    uncaptured: Mapping[str, int]
    bytes_held: int

    def __str__(self) -> str:
        said = [f"{_number(self.captures, 'capture')}, {_number(self.replays, 'replay')}"]
        said += [f"{count} uncaptured ({why})" for why, count in self.uncaptured.items()]
        if self.never_replayed:
            said.append(f"{self.never_replayed} of the captures never replayed")
        return f"{self.name or 'graph'} serves {self.serves or 'fixed shapes'}: {'; '.join(said)}"


@dataclass(frozen=True)
class Stats:
    """Of a backend: of each graph, and in all. recompilations: graphs that Dynamo made after a function's first."""

    graphs: tuple[GraphStats, ...] = ()
    recompilations: int = 0

    @property
    def captures(self) -> int:
        return sum(graph.captures for graph in self.graphs)

    @property
    def replays(self) -> int:
        return sum(graph.replays for graph in self.graphs)

    @property
    def never_replayed(self) -> int:
        return sum(graph.never_replayed for graph in self.graphs)

    @property
    def bytes_held(self) -> int:
        return sum(graph.bytes_held for graph in self.graphs)

    @property
    def uncaptured(self) -> Mapping[str, int]:
        """Calls by reason."""
        total: Counter[str] = Counter()
        for graph in self.graphs:
            total.update(graph.uncaptured)
        return dict(total)

    def __str__(self) -> str:
        said = [
            f"{_number(len(self.graphs), 'graph')} ({_number(self.recompilations, 'recompilation')})",
            _number(self.captures, "capture"),
            _number(self.replays, "replay"),
            f"{sum(self.uncaptured.values())} uncaptured",
            f"{self.bytes_held / 2**20:.1f} MiB held",
        ]
        return "\n".join([", ".join(said), *(f"  {graph}" for graph in self.graphs)])


def graph_stats(counts: Counts, name: str, serves: str, bytes_held: int) -> GraphStats:
    uncaptured = {str(why): count for why, count in counts.uncaptured.items()}
    never = counts.captures - counts.replayed
    return GraphStats(name, serves, counts.captures, counts.replays, never, uncaptured, bytes_held)


def _number(count: int, of: str) -> str:
    return f"{count} {of}{'' if count == 1 else 's'}"
