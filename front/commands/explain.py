"""``ringfence explain``: for each all-reduce of a model, is it fused, and why not?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import OptionsError, TargetError
from ..runtime.protocol.plan import MODELLED_SUMS
from .arguments import Commands, count, output, world_size
from .targets import load_function, named
from .terminal import FAILED, OK, UNDECIDED, say, say_if_unread, stage, write

if TYPE_CHECKING:
    from ..explaining import Explanation

#: What the exit code may tell, and what is the case then.
_FAILURES = {
    "unsafe": "the plan can hang or corrupt",
    "undecided": "the plan was not decided",
    "refused": "the collective must not carry out a site",
    "none": "there is no all-reduce",
    "declined": "an all-reduce is not fused",
    "split": "an op splits the graph",
    "nothing": "",
}

_FAILS = "unsafe,undecided,refused,none"


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "explain",
        help="say for each all-reduce of a model whether it is fused, and why not",
        description="Compile a model as one of N tensor-parallel ranks, without the other ranks and without a GPU, "
        "and print the report. Of a Hugging Face folder only config.json is read, and no number is computed. Exit 0 "
        "when there is an all-reduce, none is refused and the plan is safe, or as --fail-on says; 1 when not, 2 on bad "
        "usage or a model that cannot be explained, 3 when the plan was not decided.",
    )
    parser.add_argument(
        "target",
        help="a Hugging Face folder with a config.json, or module:function that returns (model, example_inputs)",
    )
    parser.add_argument("--tp", type=world_size, required=True, metavar="N", help="tensor-parallel world size")
    of_folder = parser.add_argument_group("what is called of a folder's model")
    of_folder.add_argument("--prefill", action="store_true", help="a prompt, without a cache (the default)")
    of_folder.add_argument("--decode", action="store_true", help="a step of one token over a static cache")
    of_folder.add_argument("--batch", type=count, metavar="N", help="sequences (default 1)")
    of_folder.add_argument("--tokens", type=count, metavar="N", help="tokens of a prompt (default 8)")
    of_folder.add_argument("--context", type=count, metavar="N", help="tokens of the static cache (default 4096)")
    of_folder.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="(default bfloat16)")
    of_folder.add_argument(
        "--expert-parallel",
        action="store_true",
        help="by the plan for its experts (enable_expert_parallel=True)",
    )
    judged = parser.add_argument_group("what it is judged as")
    judged.add_argument(
        "--collective",
        choices=[str(name) for name in MODELLED_SUMS],
        help="judge the fused sites as this collective's, though it need not run here",
    )
    judged.add_argument("--flashinfer", metavar="VERSION", help="and as in this version of FlashInfer")
    judged.add_argument(
        "--gpu", metavar="NAME", help="and on N of these, as h200; without --collective, what 'auto' chooses there"
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the backend, a Python literal or a string; may be repeated",
    )
    parser.add_argument(
        "--fail-on",
        default=_FAILS,
        metavar="LIST",
        help=f"of {', '.join(_FAILURES)}: what makes the exit code 1, or 3 for undecided (default {_FAILS})",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the report as JSON (described by: ringfence docs report)"
    )
    parser.add_argument("--svg", type=output, metavar="FILE", help="draw the plan: layers, sites, pieces, islands, why")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> tuple[str, int]:
    fail_on = _fail_on(arguments.fail_on)
    options = _options(arguments.option)
    if arguments.svg is not None and arguments.prefill and arguments.decode:
        raise OptionsError("--svg draws one plan; ask for --prefill or --decode")
    found = _explained(arguments, options)
    for one in found:
        if _has_none(one):
            say(f"'{arguments.target}' has no all-reduce: {_why_none(arguments)}")
    if arguments.svg is not None:
        from ..plan_picture import svg

        write(arguments.svg, svg(found[0].report, f"{arguments.target}, {arguments.tp} ranks"))
    text = _json(found) if arguments.json else "\n\n".join(_text(one) for one in found)
    failed = [name for name in _FAILURES if name in fail_on and any(name in _failures(one) for one in found)]
    code = OK if not failed else UNDECIDED if failed == ["undecided"] else FAILED
    if failed:
        said = "; ".join(f"{_FAILURES[name]} ({name})" for name in failed)
        say(f"exit code {code}: {said}; what counts: --fail-on {','.join(fail_on)}")
    return text, code


def _why_none(arguments: argparse.Namespace) -> str:
    if ":" in arguments.target:
        return "nothing is reduced over ranks in the graph of what it returns, as the note of its report says"
    plans = "" if arguments.expert_parallel else "; for a plan of the experts alone: --expert-parallel"
    return f"its tensor-parallel plan is empty, or not applied{plans}"


def _explained(arguments: argparse.Namespace, options: dict[str, Any]) -> list[Explanation]:
    target = arguments.target
    folder = Path(target) if target and Path(target).is_dir() else None
    _check(arguments, folder)
    # Everything that takes seconds to import is imported here, so that --help and usage errors do not.
    with stage(f"loading {target}"):
        from ..explaining import AskedAs, explain_config, explain_function, fake_group
        from ..fake_model import CONTEXT, ModelCall, read_config

    asked = AskedAs(arguments.tp, arguments.collective, arguments.flashinfer, arguments.gpu).with_options(options)
    asked.planned(arguments.dtype or "bfloat16")  # what is wrong with it is said at once
    if arguments.flashinfer is not None:
        say_if_unread(arguments.flashinfer)
    try:
        if folder is None:
            with fake_group(arguments.tp):
                model, args, kwargs = load_function(target)
                with stage("compiling"):
                    return [explain_function(model, args, kwargs, asked=asked, options=options)]
        batch = arguments.batch or 1
        calls = [ModelCall(batch, arguments.tokens or 8)] if arguments.prefill or not arguments.decode else []
        calls += [ModelCall(batch, 1, arguments.context or CONTEXT)] if arguments.decode else []
        with stage("compiling"):
            return explain_config(
                read_config(folder),
                arguments.tp,
                calls,
                dtype=arguments.dtype or "bfloat16",
                asked=asked,
                options=options,
                expert_parallel=arguments.expert_parallel,
            )
    except TargetError as error:
        raise TargetError(f"'{target}': {error}") if target not in str(error) else error from error


def _check(arguments: argparse.Namespace, folder: Path | None) -> None:
    """What can be said before anything is imported."""
    if folder is not None:
        if arguments.tokens is not None and arguments.decode and not arguments.prefill:
            raise OptionsError("--tokens is of a prompt, and a step of --decode has one token; leave it out")
        if arguments.context is not None and not arguments.decode:
            raise OptionsError("--context is of the static cache of --decode")
        if not (folder / "config.json").is_file():
            package = (
                f"; of a package, name a function too: {folder.name}:FUNCTION"
                if (folder / "__init__.py").is_file()
                else ""
            )
            raise TargetError(f"'{folder}' has no config.json; a model folder is what save_pretrained writes{package}")
        return
    of_folder = ("prefill", "decode", "batch", "tokens", "context", "dtype", "expert_parallel")
    given = [f"--{name.replace('_', '-')}" for name in of_folder if getattr(arguments, name)]
    named(arguments.target)
    if given:
        raise OptionsError(f"{', '.join(given)}: of a folder's model; a function returns its inputs itself")


def _text(one: Explanation) -> str:
    return f"{one.about}\n{one.report}" if one.about else str(one.report)


def _json(found: Sequence[Explanation]) -> str:
    reports = [{**one.report.to_dict(), "call": one.about or None} for one in found]
    return json.dumps(reports if len(reports) > 1 else reports[0], indent=2)


def _failures(one: Explanation) -> list[str]:
    report = one.report
    found = {
        "unsafe": report.plan is not None and report.plan.failed,
        "undecided": report.plan is not None and report.plan.kind == "not_decided",
        "refused": bool(report.refused),
        "none": _has_none(one),
        "declined": bool(report.declined),
        "split": any(piece.island for piece in report.pieces),
    }
    return [name for name, is_so in found.items() if is_so]


def _has_none(one: Explanation) -> bool:
    """Whether there is no site at all: neither an all-reduce nor a dispatch or combine."""
    return not one.report.sites and not one.report.moe_sites


def _fail_on(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    wrong = [name for name in names if name not in _FAILURES]
    if wrong:
        raise OptionsError(f"--fail-on '{text}' is not a list of {', '.join(_FAILURES)}")
    return names


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    import ast

    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise OptionsError(f"--option '{pair}' is not KEY=VALUE, as capture_sizes=[1,2,4]")
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[key] = text
    return options
