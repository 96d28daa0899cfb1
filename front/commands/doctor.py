"""``ringfence doctor``: what is here, what ``collective="auto"`` would choose, and which hazards apply."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..copies import NOT_TRIED
from .arguments import Commands
from .terminal import FAILED, OK, stage

if TYPE_CHECKING:
    from ..doctor import Advice, Facts
    from ..machine import Sight

#: Version of the JSON; docs/report.md describes it.
SCHEMA = 1


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="say what is here, what collective='auto' would choose, and which hazards apply",
        description="Look at this machine, with or without GPUs: exit 0 when it is healthy, 1 when a hazard that "
        "decides against capture applies, 2 on bad usage.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON (described by: ringfence docs report)")
    parser.add_argument(
        "--copies",
        action="store_true",
        help="try copies between all pairs of GPUs, both ways, in a process that is ended after a minute: peer access "
        "that the driver advertises may lose data (M51)",
    )
    parser.add_argument(
        "--journal-dir",
        type=Path,
        metavar="DIR",
        help="where ranks will write journals; its free space is looked at (the current folder by default)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of the activations, which some hazards depend on (default bfloat16)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> tuple[str, int]:
    from ..compile_passes.report_text import terminal_width
    from ..doctor import gather

    with stage("looking at this machine"):
        facts = gather(copies=arguments.copies, journals=arguments.journal_dir, dtype=arguments.dtype)
    text = json.dumps(as_dict(facts), indent=2) if arguments.json else as_text(facts, terminal_width())
    return text, OK if facts.healthy else FAILED


def as_dict(facts: Facts) -> dict[str, Any]:
    """JSON-ready."""
    return {"schema": SCHEMA, "healthy": facts.healthy} | dataclasses.asdict(facts)


def as_text(facts: Facts, width: int | None = None) -> str:
    """For a terminal. width: of its lines, but for the table of devices; None breaks none."""
    from tabulate import tabulate

    unusable = (
        f" (not used: {facts.flashinfer_unusable})" if facts.flashinfer.value and facts.flashinfer_unusable else ""
    )
    turned_off = ", ".join(facts.opt_outs)
    versions = [
        ("ringfence", facts.ringfence),
        ("python", facts.python),
        ("torch", facts.torch),
        ("CUDA of torch", facts.cuda.value or f"none ({facts.cuda.why})"),
        ("NCCL", str(facts.nccl).replace("unknown (this torch is built", "none (this torch is built")),
        ("FlashInfer", f"{facts.flashinfer}{unusable}" if facts.flashinfer.value else facts.flashinfer_unusable),
        ("driver", facts.driver),
        ("multicast", f"turned off by {turned_off}" if turned_off else "no variable turns it off"),
    ]
    lines = [*_pairs(versions), ""]
    if facts.devices.value is None:
        lines.append(f"devices: none ({facts.devices.why})")
    else:
        lines.append(tabulate(_device_rows(facts), headers="keys", disable_numparse=True))
        if facts.links.value is None:
            lines.append(f"NVLinks: {facts.links}")
        lines.append(f"linked by: {facts.topology}")
    if facts.copies.value is not None or facts.copies.why != NOT_TRIED:
        lines.append(f"copies between devices: {_copies(facts)}")
    lines += ["", *_pairs([(s.name, s.seen) for s in facts.machine])]
    lines += [line for sight in facts.machine for line in _concern(sight)]
    lines += ["", 'collective="auto" would choose']
    for advice in facts.advice:
        where = f" ({advice.not_here})" if advice.not_here else ""
        lines.append(f"  {advice.world_size} ranks{where}: {_chosen(advice)}")
        lines += [f"    {candidate}" for candidate in advice.candidates[:-1]]
    for title, against in (("hazards that decide against capture", True), ("other hazards", False)):
        found = [hazard for hazard in facts.hazards if hazard.against_capture is against]
        lines += ["", f"{title}: {'' if found else 'none'}".rstrip()]
        for hazard in found:
            lines.append(f"  {hazard.id} {hazard.title} ({hazard.decides})")
            lines += [f"    applies to: {'; '.join(hazard.applies_to)}", f"    remedy: {hazard.remedy}"]
    return "\n".join(part for line in lines for part in _broken(line, width))


def _pairs(pairs: Sequence[tuple[str, object]]) -> list[str]:
    """Names, and what is said of each, in two columns."""
    widest = max(len(name) for name, _ in pairs)
    return [f"{name:{widest}}  {said}" for name, said in pairs]


def _broken(line: str, width: int | None) -> list[str]:
    """What does not fit goes on below the second column, or below what it belongs to. A table is left as it is."""
    if width is None or len(line) <= width or "\n" in line:
        return [line]
    begin = re.match(r"\S+(?: \S+)* {2,}|(?: *)", line)
    indent = begin.end() if begin is not None else 0
    indent += 4 if line[:indent].isspace() or not indent else 0
    wrap = textwrap.TextWrapper(width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
    return wrap.wrap(line)


def _device_rows(facts: Facts) -> list[dict[str, Any]]:
    rows = []
    devices = facts.devices.value or ()
    for device in devices:
        row: dict[str, Any] = {
            "device": device.index,
            "name": device.name,
            "capability": "SM{}{}".format(*device.capability),
            "memory": f"{device.memory / 2**30:.0f} GiB",
            "multicast": device.multicast if device.multicast.value is None else _yes(device.multicast.value),
        }
        mine = facts.links.value[device.index] if facts.links.value else None
        for other in devices:
            peer = device.peers.value[other.index] if device.peers.value else None
            cell = "unknown" if device.peers.value is None else "peer" if peer else "no peer"
            if mine is not None:
                cell += f", {mine.near[other.index]}"
            row[f"to {other.index}"] = "-" if other is device else cell
        if mine is not None:
            row["to a switch or others"] = f"{mine.elsewhere} NVLinks"
        rows.append(row)
    return rows


def _copies(facts: Facts) -> str:
    if facts.copies.value is None:
        return f"not tried: {facts.copies.why}"
    pairs = [(of, to, arrived) for of, row in enumerate(facts.copies.value) for to, arrived in enumerate(row)]
    lost = [f"{of} to {to}" for of, to, arrived in pairs if arrived is False]
    tried = sum(arrived is not None for *_, arrived in pairs)
    if not tried:
        return "not tried: no device reaches another's memory (peer access)"
    return f"LOST {', '.join(lost)} (of {tried})" if lost else f"all {tried} arrive"


def _concern(sight: Sight) -> list[str]:
    """What may follow from it, with the row of the hazard table and its remedy."""
    from ..runtime.hazards.catalogue import find_hazard

    if sight.concern is None:
        return []
    if sight.hazard is None:
        return [f"  ! {sight.name}: {sight.concern}"]
    row = find_hazard(sight.hazard)
    return [f"  ! {sight.name}: {sight.concern} ({row.id} {row.title})", f"    remedy: {row.remedy}"]


def _yes(value: bool | None) -> str:
    return "yes" if value else "no"


def _chosen(advice: Advice) -> str:
    if advice.transport is None:
        return str(advice.collective)
    mib = [f"{size / 2**20:g} MiB" for size in (advice.one_shot, advice.fused)]
    return f"{advice.collective}/{advice.transport}, one-shot up to {mib[0]}, fused up to {mib[1]}"
