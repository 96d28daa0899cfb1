"""The report as a person reads it: equal layers are folded, and what is printed fits the terminal."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from ..runtime.spelling import group_word
from .match import Site
from .moe_sites import MoeSite
from .split import Piece

_LAYER = re.compile(r"(?P<before>(?:.*?\.)?)(?P<number>\d+)(?P<after>(?:\..*)?)")
#: The narrowest that a column becomes; what is cut is replaced by an ellipsis at the left, where paths are alike.
_NARROW = 12
#: The longest sequence of parts that is looked for again behind itself.
_PERIOD = 8

Row = tuple[str, ...]
S = TypeVar("S", bound=Site | MoeSite)


def terminal_width() -> int | None:
    """Columns of the terminal that standard output is; None where it is none, as a file has no width."""
    return shutil.get_terminal_size().columns if sys.stdout is not None and sys.stdout.isatty() else None


def sites_table(sites: Sequence[Site], width: int | None) -> str:
    """A row for each site; layers that are like the one before are one row."""
    headers = ("site", "outcome", "fused op", "group", "dtype", "hidden", "eps", "module", "source")
    rows = _folded(sites, _row)
    full = table(headers, rows, width, cut=("module", "source"))
    if width is None or max(map(len, full.splitlines())) <= width:
        return full
    return _without_what_is_alike(headers, rows, width)


def moe_sites_table(sites: Sequence[MoeSite], width: int | None) -> str:
    """The same of MoE sites."""
    headers = ("MoE site", "outcome", "group", "dtype", "hidden", "experts", "payloads", "module", "source")
    return table(headers, _folded(sites, _moe_row), width, cut=("module", "source"))


def _folded(sites: Sequence[S], row: Callable[[S], Row]) -> list[Row]:
    """row: of one site, nine cells, of which the last two are its module and source."""
    rows: list[Row] = []
    for run in _runs(_layers(sites), row):
        first = run[0]
        rows += [row(site) for site in first[2]]
        if len(run) > 1:
            begin, end = run[1][2][0].index, run[-1][2][-1].index
            name = first[0].rstrip(".").rpartition(".")[2]
            as_one = f"{name}.{_range(run[1][1], run[-1][1])}: as {name}.{first[1]}".lstrip(".")
            rows.append((_range(begin, end), *[""] * 6, as_one, ""))
    return rows


def _without_what_is_alike(headers: Row, rows: Sequence[Row], width: int) -> str:
    """What all sites have alike is said in a line of its own."""
    alike = {i: {row[i] for row in rows if row[i]} for i in range(3, 7)}  # group, dtype, hidden, eps
    said = [f"{headers[i]} {next(iter(values))}" for i, values in alike.items() if len(values) == 1]
    keep = [i for i in range(len(headers)) if len(alike.get(i, "two")) > 1]
    cells = [tuple(row[i] for i in keep) for row in rows]
    rest = table(tuple(headers[i] for i in keep), cells, width, cut=("module", "source"))
    return "\n".join([*lines([f"sites: {', '.join(said)}"], width), rest] if said else [rest])


def parts_table(pieces: Sequence[Piece], width: int | None) -> str:
    """A row for each part; a sequence that comes again is one row."""
    headers = ("part", "runs as", "nodes", "because of")
    rows = [(p.name, "eager" if p.island else "piece", str(p.nodes), ", ".join(p.ops)) for p in pieces]
    return table(headers, list(_without_repeats(rows)), width, cut=("because of",))


def lines(texts: Iterable[str], width: int | None) -> list[str]:
    """Wrapped at words, what follows indented."""
    if width is None:
        return list(texts)
    wrap = textwrap.TextWrapper(width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return [line for text in texts for line in wrap.wrap(text) or [""]]


def ranges(numbers: Iterable[int]) -> str:
    """``0-3, 7``."""
    said: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if said and number == said[-1][1] + 1:
            said[-1] = said[-1][0], number
        else:
            said.append((number, number))
    return ", ".join(_range(a, b) for a, b in said)


def table(headers: Row, rows: Sequence[Row], width: int | None, cut: Sequence[str] = ()) -> str:
    """cut: the columns that may be cut to the width, by their headers."""
    from tabulate import tabulate

    widths = [
        max(map(len, column)) for column in zip([f"{h}  " for h in headers], *rows, strict=True)
    ]  # tabulate's own
    if width is not None:
        widths = _fitted(widths, width, [i for i, name in enumerate(headers) if name in cut])
    short = [tuple(_cut(cell, most) for cell, most in zip(row, widths, strict=True)) for row in rows]
    text = tabulate(short, headers, disable_numparse=True)
    return "\n".join(line.rstrip() for line in text.splitlines())


def _fitted(widths: list[int], width: int, may_be_cut: Sequence[int]) -> list[int]:
    """Cut what is widest, as far as it goes."""
    widths = list(widths)
    while sum(widths) + 2 * (len(widths) - 1) > width:
        widest = max(may_be_cut, key=lambda i: widths[i])
        if widths[widest] <= _NARROW:
            break
        widths[widest] -= 1
    return widths


def _cut(cell: str, most: int) -> str:
    return cell if len(cell) <= most else f"…{cell[len(cell) - most + 1 :]}"


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _row(site: Site) -> Row:
    return (
        str(site.index),
        "fused" if site.fused else str(site.decline.reason) if site.decline else "",
        site.kind or "",
        group_word(site.group),
        site.dtype,
        str(site.hidden_size) if site.hidden_size is not None else "",
        f"{site.eps:.3g}" if site.eps is not None else "",
        site.module or "",
        short(site.source),
    )


def _moe_row(site: MoeSite) -> Row:
    return (
        str(site.index),
        "dispatch and combine" if site.decline is None else str(site.decline.reason),
        group_word(site.group),
        site.dtype,
        str(site.hidden_size) if site.hidden_size is not None else "",
        str(site.num_experts) if site.num_experts is not None else "",
        str(site.payloads),
        site.module or "",
        short(site.source),
    )


def short(source: str | None) -> str:
    """The last two parts of a path: enough to recognise, short enough for a table."""
    return "/".join(source.replace("\\", "/").split("/")[-2:]) if source else ""


#: The path before a layer's number, the number (-1: none), the sites.
_Layer = tuple[str, int, list[S]]


def _layers(sites: Sequence[S]) -> list[_Layer[S]]:
    """Sites that follow each other in one layer."""
    layers: list[_Layer[S]] = []
    for site in sites:
        found = _LAYER.fullmatch(site.module or "")
        before, number = (found["before"], int(found["number"])) if found else ("", -1)
        if layers and number >= 0 and layers[-1][:2] == (before, number):
            layers[-1][2].append(site)
        else:
            layers.append((before, number, [site]))
    return layers


def _runs(layers: Sequence[_Layer[S]], row: Callable[[S], Row]) -> list[list[_Layer[S]]]:
    """Layers that follow each other and are alike but for their number."""
    runs: list[list[_Layer[S]]] = []
    for layer in layers:
        last = runs[-1] if runs else None
        follows = last is not None and layer[1] >= 0 and layer[1] == last[-1][1] + 1
        if last is not None and follows and _alike(layer, row) == _alike(last[0], row):
            last.append(layer)
        else:
            runs.append([layer])
    return runs


def _alike(layer: _Layer[S], row: Callable[[S], Row]) -> list[tuple[object, ...]]:
    """What of a layer is the same in another that does the same."""
    path = len(f"{layer[0]}{layer[1]}")
    found: list[tuple[object, ...]] = [(layer[0],)]
    for site in layer[2]:
        found.append((*row(site)[1:7], (site.module or "")[path:], site.source, site.roundings))
    return found


def _without_repeats(rows: Sequence[Row]) -> Iterable[Row]:
    i = 0
    while i < len(rows):
        period, times = max(
            ((p, _times(rows, i, p)) for p in range(1, _PERIOD + 1)), key=lambda found: found[0] * (found[1] - 1)
        )
        if period * (times - 1) < 3:
            yield rows[i]
            i += 1
            continue
        yield from rows[i : i + period]
        end = i + period * times
        yield f"{rows[i + period][0]} to {rows[end - 1][0]}", "", "", f"the same {_count(times - 1)} more"
        i = end


def _times(rows: Sequence[Row], begin: int, period: int) -> int:
    """How often the next ``period`` rows come one after the other, but for their names."""
    first = [row[1:] for row in rows[begin : begin + period]]
    times = 0
    while len(first) == period and [row[1:] for row in rows[begin + times * period :][:period]] == first:
        times += 1
    return max(times, 1)


def _count(times: int) -> str:
    return "once" if times == 1 else f"{times} times"
