"""``ringfence check``: can a plan of captured pieces hang, and how?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import NotDecidedError, OptionsError, TraceError
from ..runtime.hazards.situation import Collective, Payload, Situation, Strategy
from ..runtime.protocol.plan import MODELLED, OWN, PlannedPiece, even_pieces, exercise, moe_pieces, programs
from .arguments import Commands, count, layers, natural, output, seconds, world_size
from .terminal import FAILED, OK, UNDECIDED, progress, read, say_if_unread, write

if TYPE_CHECKING:
    from ..runtime.protocol.answer import Answer

#: What the needed arguments look like.
_EXAMPLES = {"collective": next(iter(MODELLED)), "flashinfer": "0.7.2", "tp": "4"}


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "check",
        help="say whether a plan can hang, and show how",
        description="Run a model of the collective's protocol in every order, for a plan of captured pieces on N "
        "ranks: exit 0 when no order fails, 1 when one does, 2 on bad usage, 3 when the time was not enough.",
    )
    parser.add_argument("--collective", choices=[str(c) for c in MODELLED], help="whose protocol")
    parser.add_argument("--flashinfer", metavar="VERSION", help="in which version")
    parser.add_argument("--tp", type=world_size, metavar="N", help="tensor-parallel world size: 2, 4, 8 or 16")
    parser.add_argument(
        "--layers",
        type=layers,
        default=80,
        metavar="N",
        help="layers of two calls each (all-reduces, or dispatch and combine), up to 1000 (default 80)",
    )
    parser.add_argument(
        "--pieces", type=count, default=33, help="captured pieces that they are spread over (default 33)"
    )
    parser.add_argument(
        "--capture-sizes", default="4,8", metavar="LIST", help="token counts to capture, as 4,8 (the default)"
    )
    parser.add_argument(
        "--payload",
        choices=("ordinary", "subnormal", "negative-zero", "any"),
        default="any",
        help="the worst word that a rank sends (default any: the answer holds for each)",
    )
    parser.add_argument("--strategy", choices=("one-shot", "two-shot", "auto"), default="auto", help="(default auto)")
    parser.add_argument("--skip-rank", type=natural, metavar="R", help="let rank R leave out a call")
    parser.add_argument("--skip-call", type=natural, metavar="C", help="which one, counted from 0")
    parser.add_argument(
        "--timeout", type=seconds, default=120.0, metavar="S", help="end after so many seconds (default 120)"
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="show the trace that --json printed before")
    parser.add_argument("--json", action="store_true", help="print JSON (described by: ringfence docs report)")
    parser.add_argument("--svg", type=output, metavar="FILE", help="draw the timeline")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> tuple[str, int]:
    from ..runtime.drawing import wrapped
    from ..runtime.protocol import timeline

    extra: dict[str, Any]
    if arguments.trace is not None:
        if any(getattr(arguments, name) is not None for name in ("collective", "flashinfer", "tp")):
            raise OptionsError("--trace shows what was asked before; leave --collective, --flashinfer and --tp out")
        saved = _read(arguments.trace)
        result = timeline.load(saved)
        extra = {"safe": result.safe, "kind": str(result.failure or "safe")} | _said_before(saved)
    else:
        try:
            answer = _ask(arguments)
        except NotDecidedError as error:
            why = {"safe": None, "kind": "not_decided", "states": error.states, "message": str(error)}
            return json.dumps(why, indent=2) if arguments.json else f"not decided: {error}", UNDECIDED
        result, extra = (
            answer.result,
            _as_dict(answer)
            | {"folded": _folded(arguments, answer), "plan": _assumed(arguments), "judged": _judged(arguments)},
        )
    lines = _lines(extra)
    if arguments.svg is not None:
        write(arguments.svg, timeline.svg(result, lines))
    text = "\n".join([timeline.text(result), *map(wrapped, lines)])
    if arguments.json:
        text = json.dumps(json.loads(timeline.dump(result)) | extra, indent=2)
    return text, OK if result.safe else FAILED


def _lines(said: Mapping[str, Any]) -> list[str]:
    """What the hazard table says, below the trace. said: the answer's JSON."""
    from ..runtime.hazards.catalogue import find_hazard

    hazard, remedy = said.get("hazard"), said.get("remedy")
    lines = [f"payload: {said['payload']}"] if not said["safe"] and "payload" in said else []
    lines += [f"hazard: {hazard}, {find_hazard(hazard).title}"] if hazard is not None else []
    lines += [f"remedy: {remedy}"] if remedy is not None else []
    lines += [said["folded"]] if said.get("folded") is not None else []
    also = [find_hazard(id) for id in said.get("also", ())]
    plan = [said["plan"]] if said.get("plan") is not None else []
    asked = [said["judged"]] if said.get("judged") is not None else []
    return lines + plan + asked + [f"not in the model: {row.id}, {row.title.lower()}: {row.remedy}" for row in also]


def _assumed(arguments: argparse.Namespace) -> str:
    """The plan that was asked about, with what nobody said of it."""
    release = f" of FlashInfer {arguments.flashinfer}" if arguments.flashinfer is not None else ""
    sizes = ", ".join(map(str, _sizes(arguments.capture_sizes)))
    skipped = (
        f", rank {arguments.skip_rank} leaves out call {arguments.skip_call}" if arguments.skip_rank is not None else ""
    )
    return (
        f"plan: {arguments.collective}{release}, {arguments.tp} ranks, {arguments.layers} layers of two calls in "
        f"{arguments.pieces} pieces, token counts {sizes} (and no others: --capture-sizes), strategy "
        f"{arguments.strategy}, payload {arguments.payload}{skipped}"
    )


def _judged(arguments: argparse.Namespace) -> str:
    """Whose protocol the answer is about, and how to ask for another one."""
    others = ", ".join(str(c) for c in MODELLED if c != arguments.collective)
    return (
        f"judged: the protocol of {arguments.collective}, whatever 'auto' takes, which 'ringfence doctor' says; "
        f"for others: --collective {others}"
    )


def _said_before(saved: bytes) -> dict[str, Any]:
    """What the answer's JSON has beside the trace; one that is not as it was written is left out."""
    value = json.loads(saved)
    said = {name: value.get(name) for name in ("payload", "hazard", "invariant", "remedy", "folded", "plan", "judged")}
    also = value.get("also")
    found: dict[str, Any] = {name: text for name, text in said.items() if isinstance(text, str)}
    return found | ({"also": also} if isinstance(also, list) and all(isinstance(id, str) for id in also) else {})


def _folded(arguments: argparse.Namespace, answer: Answer) -> str | None:
    """How a trace speaks for the plan that was asked about."""
    from ..runtime.protocol.fold import KEPT_RANKS

    if answer.safe or arguments.skip_rank is not None:
        return None
    ranks = f"{KEPT_RANKS} ranks stand for all {arguments.tp}, and " if arguments.tp > KEPT_RANKS else ""
    return f"in this trace {ranks}one to a few tokens stand for the sizes (ringfence docs design)"


def _as_dict(answer: Answer) -> dict[str, Any]:
    row = answer.hazard
    return {
        "safe": answer.safe,
        "kind": str(answer.result.failure or "safe"),
        "payload": str(answer.payload),
        "hazard": row.id if row is not None else None,
        "invariant": str(row.invariants[0]) if row is not None and row.invariants else None,
        "remedy": answer.remedy,
        "also": [also.id for also in answer.also],
    }


def _ask(arguments: argparse.Namespace) -> Answer:
    from ..runtime.protocol.answer import ask
    from ..runtime.protocol.bound import Bound
    from ..runtime.protocol.calls import without

    needed = ("collective", "tp") if arguments.collective in OWN else ("collective", "flashinfer", "tp")
    missing = [name for name in needed if getattr(arguments, name) is None]
    if missing:
        shown = " ".join(f"--{name} {_EXAMPLES[name]}" for name in missing)
        raise OptionsError(
            f"ringfence check needs {', '.join('--' + name for name in missing)}, as in: {shown}; or --trace FILE"
        )
    if arguments.collective in OWN and arguments.flashinfer is not None:
        raise OptionsError(f"--collective {arguments.collective} uses no FlashInfer; leave --flashinfer out")
    if arguments.skip_rank is not None and arguments.skip_rank >= arguments.tp:
        raise OptionsError(
            f"--skip-rank {arguments.skip_rank} is not within 0 to {arguments.tp - 1}, the ranks of --tp {arguments.tp}"
        )
    if (arguments.skip_rank is None) != (arguments.skip_call is None):
        raise OptionsError(
            f"--skip-rank (0 to {arguments.tp - 1}) and --skip-call (from 0 on) belong together: which rank leaves out "
            "which call"
        )
    collective, payload = Collective(arguments.collective), Payload(arguments.payload)
    strategy = None if arguments.strategy == "auto" else Strategy(arguments.strategy)
    rank = exercise(_pieces(arguments, collective, strategy), _sizes(arguments.capture_sizes), arguments.tp)
    ranks = list(programs([rank] * arguments.tp))
    if arguments.skip_rank is not None:
        if arguments.skip_call >= (calls := len(ranks[0])):
            raise OptionsError(f"--skip-call {arguments.skip_call} is not within 0 to {calls - 1}, the calls of a rank")
        ranks[arguments.skip_rank] = without(ranks[arguments.skip_rank], arguments.skip_call)
    situation = Situation(collective, arguments.flashinfer, world_size=arguments.tp, strategy=strategy, payload=payload)
    if arguments.flashinfer is not None:
        say_if_unread(arguments.flashinfer)
    with progress(f"exploring, for {arguments.timeout:g} s at most") as told:
        return ask(situation, ranks, Bound(seconds=arguments.timeout, told=told))


def _pieces(
    arguments: argparse.Namespace, collective: Collective, strategy: Strategy | None
) -> tuple[PlannedPiece, ...]:
    if collective is not Collective.MOE_ALL_TO_ALL:
        return even_pieces(arguments.layers, 2, arguments.pieces, strategy)
    if strategy is not None:
        raise OptionsError(f"--strategy {strategy} is for all-reduces; a MoE layer is a dispatch and a combine")
    return moe_pieces(arguments.layers, arguments.pieces)


def _sizes(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise OptionsError(f"--capture-sizes '{text}' is not a list of token counts; write it as 4,8")
    return tuple(sorted({int(part) for part in parts}))


def _read(path: Path) -> bytes:
    try:
        return read(path)
    except (OSError, ValueError) as error:
        raise TraceError(f"'{path}' cannot be read: {error}") from error
