"""The command line: ``ringfence explain``, ``check``, ``hazards``, ``journal``, ``doctor`` and ``bench``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .runtime.errors import (
    JournalError,
    OptionsError,
    PlanError,
    RingfenceError,
    TargetError,
    TooManyStatesError,
    TraceError,
    UnknownHazardError,
    VersionError,
)

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

    from .compile_passes.report import CompileReport
    from .runtime.protocol.answer import Answer

#: Exit codes: what was asked for was done; the target cannot be loaded or compiled; wrong usage (argparse's own).
OK, FAILED, USAGE = 0, 1, 2

_BAD_USAGE = (OptionsError, UnknownHazardError, VersionError, PlanError, TraceError, TooManyStatesError, JournalError)

#: Collectives whose protocol has a model.
_MODELLED = ("mnnvl", "trtllm")

_QUIET_SECONDS = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ringfence", description=__doc__)
    parser.add_argument("--version", action="version", version=f"ringfence {importlib.metadata.version('ringfence')}")
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_explain, _add_check, _add_hazards, _add_journal, _add_doctor, _add_bench):
        add(commands)
    arguments = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], tuple[str, int]] = arguments.run
    try:
        text, code = run(arguments)
        if text:  # of the ranks of a bench, one has something to say
            print(text, flush=True)
    except BrokenPipeError:  # the reader has enough, as in `ringfence hazards | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except RingfenceError as error:
        if _first_of_the_ranks():
            print(f"ringfence: {error}", file=sys.stderr, flush=True)
        return USAGE if isinstance(error, _BAD_USAGE) else FAILED
    return code


def _add_hazards(commands: Commands) -> None:
    parser = commands.add_parser(
        "hazards",
        help="list the known ways in which a fused collective hangs or corrupts",
        description="Print the hazard table, or one row of it in full.",
    )
    parser.add_argument("id", nargs="?", help="an id, such as M1")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON (docs/report.md)")
    form.add_argument("--markdown", action="store_true", help="print docs/hazards.md")
    parser.set_defaults(run=_hazards, wrong_usage=parser.error)


def _hazards(arguments: argparse.Namespace) -> tuple[str, int]:
    from .runtime.hazards.catalogue import HAZARDS, as_dict, as_markdown, as_text, find_hazard, summary_table

    if arguments.id and arguments.markdown:
        arguments.wrong_usage("--markdown prints the whole table; leave the id out")
    rows = (find_hazard(arguments.id),) if arguments.id else HAZARDS
    if arguments.json:
        return json.dumps(as_dict(rows), indent=2), OK
    if arguments.markdown:
        return as_markdown().rstrip("\n"), OK
    return as_text(rows[0]) if arguments.id else summary_table(rows), OK


def _add_journal(commands: Commands) -> None:
    parser = commands.add_parser(
        "journal",
        help="say which rank stopped first, and which ranks wait for it",
        description="Merge the journals that the ranks of a job wrote into one folder (option journal_dir).",
    )
    parser.add_argument("folder", type=Path, help="the folder with journal-rank0.json, journal-rank1.json, ...")
    parser.add_argument("--json", action="store_true", help="print JSON (docs/report.md)")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the last steps of the ranks")
    parser.set_defaults(run=_journal)


def _journal(arguments: argparse.Namespace) -> tuple[str, int]:
    from .runtime.watch import journals

    merged = journals.merge(journals.read_folder(arguments.folder))
    if arguments.svg is not None:
        _write(arguments.svg, journals.svg(merged))
    return json.dumps(merged.to_dict(), indent=2) if arguments.json else str(merged), OK


def _add_doctor(commands: Commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="say what is here, what collective='auto' would choose, and which hazards apply",
        description="Look at this machine, with or without GPUs: exit 0 when it is healthy, 1 when a hazard that "
        "decides against capture applies, 2 on bad usage.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON (docs/report.md)")
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> tuple[str, int]:
    from .doctor import as_dict, as_text, gather

    with _stage("looking at this machine"):
        facts = gather()
    text = json.dumps(as_dict(facts), indent=2) if arguments.json else as_text(facts)
    return text, OK if facts.healthy else FAILED


def _add_bench(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure up to which size each fused collective is worth using here",
        description="Measure the fused collectives against NCCL on this machine and write a size table, the backend's "
        "option size_table. Start one process for each GPU: torchrun --nproc-per-node N -m ringfence bench ...",
    )
    parser.add_argument("--write-table", type=Path, required=True, metavar="FILE", help="where to write the table")
    parser.add_argument("--hidden", type=_count, nargs="+", default=[8192], metavar="N", help="(default 8192)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--sizes",
        type=_bytes,
        nargs="+",
        metavar="SIZE",
        help="bytes that a rank reduces, as 65536, 64K or 8M (default: the powers of two from 8K to 32M)",
    )
    parser.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> tuple[str, int]:
    import torch

    from .runtime.collectives.measure import SIZES, bench

    dtype = getattr(torch, arguments.dtype)
    return bench(arguments.write_table, arguments.sizes or SIZES, arguments.hidden, dtype), OK


def _add_check(commands: Commands) -> None:
    parser = commands.add_parser(
        "check",
        help="say whether a plan can hang, and show how",
        description="Run a model of the collective's protocol in every order, for a plan of captured pieces on N "
        "ranks: exit 0 when no order fails, 1 when one does, 2 on bad usage.",
    )
    parser.add_argument("--collective", choices=_MODELLED, help="whose protocol")
    parser.add_argument("--flashinfer", metavar="VERSION", help="in which version")
    parser.add_argument("--tp", type=_world_size, metavar="N", help="tensor-parallel world size: 2, 4, 8 or 16")
    parser.add_argument(
        "--layers",
        type=_layers,
        default=80,
        metavar="N",
        help="layers of two fused sites each, up to 1000 (default 80)",
    )
    parser.add_argument(
        "--pieces", type=_count, default=33, help="captured pieces that they are spread over (default 33)"
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
    parser.add_argument("--skip-rank", type=_natural, metavar="R", help="let rank R leave out a call")
    parser.add_argument("--skip-call", type=_natural, metavar="C", help="which one, counted from 0")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="show the trace that --json printed before")
    parser.add_argument("--json", action="store_true", help="print JSON (docs/report.md)")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the timeline")
    parser.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> tuple[str, int]:
    from .runtime.protocol import timeline

    if arguments.trace is not None:
        if any(getattr(arguments, name) is not None for name in ("collective", "flashinfer", "tp")):
            raise OptionsError("--trace shows what was asked before; leave --collective, --flashinfer and --tp out")
        result = timeline.load(_read(arguments.trace))
        extra: dict[str, Any] = {"safe": result.safe, "kind": str(result.failure or "safe")}
        lines = []
    else:
        answer = _ask(arguments)
        result, row = answer.result, answer.hazard
        extra = {
            "safe": answer.safe,
            "kind": str(result.failure or "safe"),
            "payload": str(answer.payload),
            "hazard": row.id if row is not None else None,
            "invariant": str(row.invariants[0]) if row is not None and row.invariants else None,
            "remedy": answer.remedy,
            "also": [also.id for also in answer.also],
        }
        lines = [f"payload: {answer.payload}"] if not answer.safe else []
        lines += [f"hazard: {row.id}, {row.title}"] if row is not None else []
        lines += [f"remedy: {answer.remedy}"] if answer.remedy else []
        lines += [f"not in the model: {also.id}, {also.title.lower()}: {also.remedy}" for also in answer.also]
    if arguments.svg is not None:
        _write(arguments.svg, timeline.svg(result))
    text = "\n".join([timeline.text(result), *lines])
    if arguments.json:
        text = json.dumps(json.loads(timeline.dump(result)) | extra, indent=2)
    return text, OK if result.safe else FAILED


def _ask(arguments: argparse.Namespace) -> Answer:
    from .runtime.hazards.situation import Collective, Payload, Situation, Strategy
    from .runtime.protocol import calls, plan
    from .runtime.protocol.answer import ask

    missing = [name for name in ("collective", "flashinfer", "tp") if getattr(arguments, name) is None]
    if missing:
        raise OptionsError(f"ringfence check needs {', '.join('--' + name for name in missing)}, or --trace")
    if (arguments.skip_rank is None) != (arguments.skip_call is None):
        raise OptionsError("--skip-rank and --skip-call belong together")
    sizes = _sizes(arguments.capture_sizes)
    strategy = None if arguments.strategy == "auto" else Strategy(arguments.strategy)
    pieces = plan.even_pieces(arguments.layers, 2, arguments.pieces, strategy)
    rank = plan.exercise(pieces, sizes, arguments.tp)
    programs = list(plan.programs([rank] * arguments.tp))
    if arguments.skip_rank is not None:
        if arguments.skip_rank >= arguments.tp or arguments.skip_call >= len(programs[0]):
            raise OptionsError(
                f"rank {arguments.skip_rank}, call {arguments.skip_call}: there are ranks 0 to {arguments.tp - 1} and "
                f"calls 0 to {len(programs[0]) - 1}"
            )
        programs[arguments.skip_rank] = calls.without(programs[arguments.skip_rank], arguments.skip_call)
    situation = Situation(
        Collective(arguments.collective),
        arguments.flashinfer,
        world_size=arguments.tp,
        strategy=strategy,
        payload=Payload(arguments.payload),
    )
    _say_if_unread(arguments.flashinfer)
    with _stage("exploring"):
        return ask(situation, programs)


def _sizes(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise OptionsError(f"--capture-sizes '{text}' is not a list of token counts; write it as 4,8")
    return tuple(sorted({int(part) for part in parts}))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"'{path}' cannot be read: {error}") from error


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise OptionsError(f"'{path}' cannot be written: {error}") from error


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 on")
    return int(text)


def _layers(text: str) -> int:
    if _natural(text) > 1000:
        raise argparse.ArgumentTypeError(f"'{text}' is more than 1000; layers repeat, so fewer tell as much")
    return int(text)


def _add_explain(commands: Commands) -> None:
    parser = commands.add_parser(
        "explain",
        help="say for each all-reduce of a model whether it is fused, and why not",
        description="Compile a model as one of N tensor-parallel ranks, without the other ranks and without a GPU, "
        "and print the report.",
    )
    parser.add_argument(
        "target", help="a Hugging Face model folder, or module:function that returns (model, example_inputs)"
    )
    parser.add_argument("--tp", type=_world_size, required=True, metavar="N", help="tensor-parallel world size")
    parser.add_argument("--json", action="store_true", help="print the report as JSON (docs/report.md)")
    parser.add_argument("--batch", type=_count, default=1, help="batch size of a model folder's input (default 1)")
    parser.add_argument("--tokens", type=_count, default=8, help="sequence length of that input (default 8)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="dtype of a model folder"
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the backend, a Python literal or a string; may be repeated",
    )
    parser.add_argument(
        "--collective",
        choices=_MODELLED,
        help="judge the fused sites as this collective's, though it need not run here",
    )
    parser.add_argument("--flashinfer", metavar="VERSION", help="and as in this version of FlashInfer")
    parser.set_defaults(run=_explain)


def _explain(arguments: argparse.Namespace) -> tuple[str, int]:
    report = _compile(arguments)
    return report.to_json(indent=2) if arguments.json else str(report), OK


def _world_size(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"'{text}' is not a world size of two or more")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive integer")
    return int(text)


def _bytes(text: str) -> int:
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("K", "M") else (text, "")
    if not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write it as 65536, 64K or 8M")
    return int(number) * {"": 1, "K": 1 << 10, "M": 1 << 20}[unit]


def _compile(arguments: argparse.Namespace) -> CompileReport:
    # Everything that takes seconds to import is imported here, so that --help and usage errors do not.
    import torch
    import torch.distributed as dist
    from torch._dynamo.exc import BackendCompilerFailed, Unsupported
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from .backend import Backend
    from .runtime.hazards.situation import Collective, Situation

    # Simulated, because the plan is for another machine: it shows what would be captured there.
    backend = Backend(**{"piece_compiler": "eager", "graphs": "simulated", **_options(arguments.option)})
    if arguments.flashinfer is not None and arguments.collective is None:
        raise OptionsError("--flashinfer says nothing without --collective")
    if arguments.collective is not None:
        backend.judge_as = Situation(Collective(arguments.collective), arguments.flashinfer, world_size=arguments.tp)
    if arguments.flashinfer is not None:
        _say_if_unread(arguments.flashinfer)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=arguments.tp)
    try:
        with _stage(f"loading {arguments.target}"):
            model, args, kwargs = _load(arguments)
        with _stage("compiling"), torch.no_grad():
            torch.compile(model, backend=backend, fullgraph=True)(*args, **kwargs)
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, RingfenceError):
            raise error.inner_exception from error
        raise TargetError(f"'{arguments.target}' does not compile: {_first_lines(error)}") from error
    except Unsupported as error:
        raise TargetError(
            f"'{arguments.target}' breaks the graph, so no pass can see across: {_first_lines(error)}"
        ) from error
    except RingfenceError:
        raise
    except Exception as error:  # whatever the user's model raises
        raise TargetError(f"'{arguments.target}' raised {type(error).__name__}: {_first_lines(error)}") from error
    finally:
        dist.destroy_process_group()
    if not backend.reports:
        raise TargetError(f"'{arguments.target}' ran without compiling a graph; is it a torch.nn.Module or function?")
    report = backend.reports[-1]
    if backend.options.capture_sizes and arguments.collective is None:
        _say("collectives were judged as host work, which the fake group's are; over NCCL they stay in the pieces")
    if not report.sites:
        _say(f"'{arguments.target}' has no all-reduce: its tensor-parallel plan is empty, or it was not applied")
    return report


def _first_of_the_ranks() -> bool:
    """Whether no other rank of a torchrun job has failed before this one. The first speaks for all.

    It need not be rank 0: torchrun ends the others as soon as one has ended, perhaps before they could speak.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, timeout=timedelta(seconds=5), wait_for_workers=False)
        return int(store.add(f"ringfence/failed/{os.environ['TORCHELASTIC_RESTART_COUNT']}", 1)) == 1
    except (KeyError, ValueError, RuntimeError):  # better twice than never
        return True


def _say(text: str) -> None:
    print(f"ringfence: {text}", file=sys.stderr, flush=True)


def _say_if_unread(flashinfer: str) -> None:
    """An answer about a release that nobody has read is one about the newest that was."""
    from .runtime.protocol.rules import NEWEST_READ
    from .runtime.versions import parse_version

    if parse_version(flashinfer) > parse_version(NEWEST_READ):
        _say(f"protocols and hazards were read up to FlashInfer {NEWEST_READ}; {flashinfer} may differ")


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:4])


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    import ast

    options: dict[str, Any] = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[key] = text
    return options


def _load(arguments: argparse.Namespace) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
    target = arguments.target
    if Path(target).is_dir():
        return _load_folder(Path(target), arguments)
    module_name, colon, function_name = target.partition(":")
    if not colon:
        raise TargetError(f"'{target}' is neither an existing folder nor module:function")
    return _load_function(module_name, function_name)


def _load_folder(folder: Path, arguments: argparse.Namespace) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
    import torch

    from .hugging_face import remove_backward_hooks

    if not (folder / "config.json").is_file():
        raise TargetError(f"'{folder}' has no config.json; a model folder is what save_pretrained writes")
    try:
        from transformers import AutoModelForCausalLM
        from transformers.distributed.configuration_utils import DistributedConfig
    except ImportError as error:
        raise TargetError("a model folder needs transformers: pip install 'ringfence[transformers]'") from error
    plan = DistributedConfig(tp_plan="auto", tp_size=arguments.tp)
    dtype = getattr(torch, arguments.dtype)
    try:
        with _local_rank():
            model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan, dtype=dtype).eval()
    except Exception as error:  # transformers raises what its loaders raise: OSError, ValueError, ImportError, ...
        raise TargetError(f"'{folder}' cannot be loaded: {type(error).__name__}: {_first_lines(error)}") from error
    hooked = remove_backward_hooks(model)
    if hooked:
        _say(
            f"removed the backward hooks of {len(hooked)} modules ({hooked[0]}, ...), which break the graph; before "
            "you compile it, call remove_backward_hooks(model) from ringfence.hugging_face"
        )
    shape = (arguments.batch, arguments.tokens)
    tokens = torch.randint(0, model.config.vocab_size, shape, device=model.device)
    return model, (tokens,), {"use_cache": False}


@contextlib.contextmanager
def _local_rank() -> Iterator[None]:
    """On a machine with an accelerator, transformers reads the device's index from this variable."""
    given = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = given or "0"
    try:
        yield
    finally:
        if given is None:
            del os.environ["LOCAL_RANK"]


def _load_function(module_name: str, function_name: str) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
    with _importable_from_here():
        try:
            function = getattr(importlib.import_module(module_name), function_name)
        except (ImportError, AttributeError) as error:
            path = module_name.removesuffix(".py").replace("/", ".")
            hint = f"; a module is named without its suffix: {path}:{function_name}" if path != module_name else ""
            raise TargetError(f"'{module_name}:{function_name}' cannot be imported: {error}{hint}") from error
        try:
            result = function()
        except Exception as error:  # whatever the user's function raises
            raise TargetError(f"'{module_name}:{function_name}()' raised {type(error).__name__}: {error}") from error
    if not (isinstance(result, tuple) and len(result) == 2 and callable(result[0])):
        types = [type(r).__name__ for r in result] if isinstance(result, tuple) else type(result).__name__
        raise TargetError(f"'{module_name}:{function_name}' must return (model, example_inputs), and returned {types}")
    model, inputs = result
    if isinstance(inputs, Mapping):
        return model, (), inputs
    return model, tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {}


@contextlib.contextmanager
def _importable_from_here() -> Iterator[None]:
    """As with ``python -m``: modules of the current folder can be named."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


@contextlib.contextmanager
def _stage(label: str) -> Iterator[None]:
    """One line on standard error for a stage that takes more than two seconds."""
    timer = threading.Timer(_QUIET_SECONDS, _say, [f"{label} ..."])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
