"""The options of the backend, validated where they enter."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Never, Unpack, get_args, get_origin

import torch
import torch.distributed as dist

from .compile_passes.op_options import (
    all_reduce_ops,
    check_op_name,
    check_roles,
    group_names,
    groups,
    norm_ops,
    one_of,
    positive,
    registered,
    strings,
)
from .keywords import OptionKeywords
from .runtime.collectives import table
from .runtime.collectives.size_table import read_table
from .runtime.errors import GroupError, OptionsError
from .runtime.groups import register_group
from .runtime.spelling import meant, near
from .runtime.watch.folder import check_can_be_written

if TYPE_CHECKING:
    from .compile_passes.engine_ops import GroupOf
    from .compile_passes.norm_ops import NormOp
    from .compile_passes.report import CompileReport

_HINTS = OptionKeywords.__annotations__
_SECONDS = ("step_seconds", "warm_up_seconds", "agree_seconds", "kernel_wait_seconds")
_FLAGS = tuple(name for name, hint in _HINTS.items() if hint is bool)


def _choices(hint: object) -> tuple[object, ...]:
    """The words that a keyword may be; nothing where it is no choice of words."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    parts = get_args(hint)
    return (None, *_choices(parts[0])) if type(None) in parts and get_origin(parts[0]) is Literal else ()


_CHOICES = {name: choices for name, hint in _HINTS.items() if (choices := _choices(hint))}


@dataclass(frozen=True, init=False)
class Options:
    """What a user may ask of the backend: ``Options(capture_sizes=[1, 16])``, or the same to ``Backend``.

    Raises :class:`OptionsError` for what is unknown, of a wrong type, out of range or makes no sense together, with the
    valid names or values. Lists become tuples, names of ops mappings.

    fuse: False leaves every all-reduce as it is; the graph is still split, captured and watched.
    skip_sites: all-reduces, and MoE sites, to leave as they are: paths of their ``nn.Module`` or of one around it
        (``"model.layers.3"``, ``"*.o_proj"``), or their source (``"model.py:120"``), with ``*`` as in file names.
    collective: who carries out a fused all-reduce. ``"auto"`` takes the best that can run here; the report says why.
    transport: how mnnvl reaches the other ranks: ``"multicast"``, or ``"peer"`` on two GPUs of one node.
        No multicast object is made where ``NCCL_NVLS_ENABLE=0``, ``TORCH_SYMM_MEM_DISABLE_MULTICAST=1``
        or ``NVSHMEM_DISABLE_NVLS=1`` is set on any rank.
    deterministic: fused sites return the same bits in every run and whatever the token count, or the compilation is
        refused. Needs ``max_tokens``; a call of more tokens is an error.
    size_table: a file of ``ringfence bench --write-table``, read before the built-in sizes.
    plain_all_reduce: let the collective carry out all-reduces without a norm too, where the size table
        says that it is faster.
    split_ops: ops (``"namespace::name"`` or ``"namespace::name.overload"``) that run eagerly between pieces.
    capture_sizes: token counts to capture; empty captures nothing.
    piece_compiler: ``"inductor"``, or ``"eager"`` to run the ATen graph as it is.
    numerics: ``"kernel"`` fuses also where the source rounds at another place than the fused op
        and notes it; ``"strict"`` declines those sites.
    verify: run every rewrite against what it replaces, on generated inputs, before it is accepted. It declines sites,
        and accepts none that would be declined without it.
    check_parts: compare the cut graph, whose parts write in place, with the functional graph that it was made of, value
        by value, before it is used.
    max_tokens: the largest token count that a fused kernel's workspace is made for; no capture size may exceed it.
    all_reduce_ops: an engine's own all-reduce ops: names of those that take the name of a group, or the list of its
        ranks, as an argument; or a mapping from name to the group of one that takes none (``"world"`` is the default
        group), to a mapping from the engine's names of groups (``{"vllm::all_reduce": {"tp:0": name}}``),
        or to a :class:`ringfence.AllReduceOp` that says which argument is what. Such an op sums one tensor over the
        ranks, unless an argument ``op`` or ``reduce_op`` says otherwise.
    moe_dispatch: send tokens only to the ranks of their experts: a gather of hidden states, experts' ids and weights,
        the experts of this rank and a reduce-scatter become a dispatch and a combine, where all ranks of the group show
        that to be exact from the graph. Collectives that ``split_ops`` names stay. Not beside ``deterministic``.
    moe_collective: who carries out a dispatch and its combine in one graph. ``"auto"`` takes FlashInfer's one-sided
        kernels (``"moe_all_to_all"``) where they were measured to be faster; elsewhere on GPUs gathers stay gathers.
    moe_workspace_bytes: of each rank's memory, what they may take; calls of a larger capacity are the reference's.
    experts_ops: an engine's own kernels of experts, which take each row by itself, and leave out (as zeros) what asks
        for experts of other ranks. Their tensors of tokens are ``[tokens, ...]``.
    group_names: what an engine's names of groups stand for, ``{"tp:0": tp_group}``, where that was not registered
        (:func:`ringfence.register_group`): process groups, or torch's names of them. They hold for the process.
    norm_ops: an engine's own RMSNorm ops, besides those that are known by name: names, or a mapping from name to
        what is added to the weight (1.0 for Gemma's), or to a :class:`ringfence.NormOp`. Without one, they take
        ``(x, [residual], weight, eps)``, or write ``out`` or ``x`` and ``residual`` in place. An op that is only called
        like one is run on generated inputs first.
    groups: names of the process groups to fuse over, and to rewrite MoE sites of; None means all.
    graphs: what captures. ``"auto"`` is CUDA graphs on CUDA inputs, and nothing elsewhere. ``"simulated"`` is for
        tests: it keeps the rules of a capture on any device, and is no faster.
    pad_to_capture_size: serve a size between two captured ones by the larger, with zero rows. Only
        right for models whose rows do not look at each other outside ``split_ops``.
    on_hazard: what follows where a known mechanism (``ringfence hazards``) applies to a fused site.
        ``"split"`` runs it between pieces if that avoids the mechanism, and by the reference
        collective if not; ``"refuse"`` is always the reference collective; ``"raise"`` is an error;
        ``"clean"`` flushes the words that a faulty receiver waits for, where that helps (one-shot). With the releases
        that run, M34, M37, M49 and M69 make it act; the others are prevented (``ringfence docs hazards``).
    profile: ``"causes"`` decides by the hazard table; ``"conservative"`` as serving engines do, by name: a graph with
        calls over mnnvl is not captured at all, neither the calls nor what lies between them.
    outer_capture: the caller captures the model in graphs of its own, so ``capture_sizes`` is empty. The graph is cut
        as for captures, and what must not be captured runs between two segments of a capture that has some (vLLM's and
        SGLang's breakable graphs), else by the reference where that can be captured, else the capture is refused.
        Without the option the graph is not cut, and the same holds for it as a whole.
    static_outputs: return the captured output buffers themselves. They hold until the next call.
    on_report: called with the :class:`CompileReport` of every compiled graph.

    Running on several ranks (``ringfence docs operating``):

    on_hang: what follows when no progress is made in a step, or another rank fails. ``"raise"`` is an error,
        and the end of the process where the main thread cannot be reached; ``"abort"`` ends the process with
        exit code 85; ``"report"`` writes journals and goes on waiting. None watches nothing and starts no thread.
    kernel_wait_seconds: how long a kernel of ``collective="ringfence"`` waits for a peer; None is half of step_seconds.
        While a rank compiles, captures or runs a graph for the first time it is warm_up_seconds.
    step_seconds, warm_up_seconds: how long a step may stand still, and how long while a rank compiles or captures. They
        and on_hang are the same on all ranks, or the first graph is an error on all.
    agree_seconds: how long ranks wait for each other where they agree on something.
    check_every_step: compare sizes and choice of graph before every step: slow, and shows who diverges.
    on_capture_failure: a capture that fails on one rank makes all ranks run that size ``"uncaptured"``, or ``"raise"``.
    journal_dir: folder for the journals that are written when something goes wrong, in a hang with ``on_hang`` only;
        None writes none. Its last level is
        made; what is above it has to be there. It may be another path on each host.
    """

    fuse: bool = True
    skip_sites: tuple[str, ...] = ()
    collective: str = "auto"
    transport: str = "auto"
    deterministic: bool = False
    size_table: str | None = None
    plain_all_reduce: bool = True
    split_ops: tuple[str, ...] = ()
    capture_sizes: tuple[int, ...] = ()
    piece_compiler: str = "inductor"
    numerics: str = "kernel"
    verify: bool = False
    check_parts: bool = True
    max_tokens: int | None = None
    all_reduce_ops: Mapping[str, GroupOf] = field(default_factory=dict)
    moe_dispatch: bool = False
    moe_collective: str = "auto"
    moe_workspace_bytes: int = 512 << 20
    experts_ops: tuple[str, ...] = ()
    group_names: Mapping[str, Any] = field(default_factory=dict)
    norm_ops: Mapping[str, float | NormOp] = field(default_factory=dict)
    groups: tuple[str, ...] | None = None
    graphs: str = "auto"
    pad_to_capture_size: bool = False
    on_hazard: str = "split"
    profile: str = "causes"
    outer_capture: bool = False
    static_outputs: bool = False
    on_report: Callable[[CompileReport], None] | None = None
    on_hang: str | None = None
    kernel_wait_seconds: float | None = None
    step_seconds: float = 60.0
    warm_up_seconds: float = 1800.0
    agree_seconds: float = 600.0
    check_every_step: bool = False
    on_capture_failure: str = "uncaptured"
    journal_dir: str | None = None

    def __init__(self, *by_place: Never, **given: Unpack[OptionKeywords]) -> None:
        if by_place:
            raise OptionsError("options are given by name: Options(capture_sizes=[1, 16])")
        values = _normalised(given)
        for f in dataclasses.fields(self):
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            object.__setattr__(self, f.name, values.get(f.name, default))
        _check_together(self)

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Options:
        """Options from a mapping, as of the command line. Raises :class:`OptionsError`."""
        return cls(**given)

    def check_registered(self) -> None:
        """Raises :class:`OptionsError` for an op that torch does not know, or that it hands to no backend.

        Called when a graph is compiled: the op's package may be imported late.
        """
        from .compile_passes.named_ops import is_taken_apart

        for key in ("split_ops", "all_reduce_ops", "norm_ops", "experts_ops"):
            for name in getattr(self, key):
                check_roles(key, name, getattr(self, key), registered(key, name))
                if is_taken_apart(name):
                    raise OptionsError(
                        f"{key} holds '{name}', which torch replaces by the ops that it is made of before any backend "
                        "sees it; name one of those (TORCH_LOGS=aot_graphs shows them)"
                    )

    def register_groups(self) -> None:
        """Let the names in ``group_names`` stand for their groups. Raises :class:`OptionsError`."""
        for name, group in self.group_names.items():
            try:
                register_group(name, group)
            except GroupError as error:
                raise OptionsError(f"group_names: {error}") from error

    def given(self) -> dict[str, Any]:
        """The options that differ from the defaults."""
        defaults = Options()
        pairs = ((f.name, getattr(self, f.name), getattr(defaults, f.name)) for f in dataclasses.fields(self))
        return {name: value for name, value, default in pairs if value != default}

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values; a callable becomes whether it is set."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["on_report"] = self.on_report is not None
        return {key: _plain(value) for key, value in values.items()}


def _normalised(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, as it is kept. Raises :class:`OptionsError` for an option that is wrong by itself."""
    valid = [f.name for f in dataclasses.fields(Options)]
    for key in given:
        if key not in valid:
            raise OptionsError(f"unknown option '{key}'{_hint(key, valid)}")
    checked = dict(given)
    for key, choices in _CHOICES.items():
        if key in checked:
            one_of(key, checked[key], choices)
    for key in _FLAGS:
        if not isinstance(checked.get(key, False), bool):
            raise OptionsError(f"{key}={checked[key]!r} is not a bool")
    for key, read in _READ.items():
        if key in checked:
            checked[key] = read(checked[key])
    _check_sizes(checked)
    for key in _SECONDS:
        seconds = checked.get(key, 1.0)
        if key == "kernel_wait_seconds" and seconds is None:
            continue
        if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 < seconds < math.inf:
            raise OptionsError(f"{key}={seconds!r} is not a positive number of seconds")
    callback = checked.get("on_report")
    if callback is not None and not callable(callback):
        raise OptionsError(f"on_report={callback!r} is not callable")
    return checked


def _hint(key: object, valid: Sequence[str]) -> str:
    if near(key, valid) is None and key in torch._inductor.list_options():
        return f": it is Inductor's, which compiles the pieces: set torch._inductor.config.{key}"
    return meant(key, valid, "the options are")


def _read_ops(key: str, value: object) -> tuple[str, ...]:
    names = strings(key, value)
    for name in names:
        check_op_name(key, name)
    return names


def _read_groups(value: object) -> tuple[str, ...] | None:
    return groups(value) if value is not None else None


def _read_journal_dir(folder: object) -> str | None:
    if folder is None:
        return None
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise OptionsError(f"journal_dir={folder!r} is not a folder")
    path = os.fspath(folder)
    if isinstance(path, bytes) or "\0" in path:
        raise OptionsError(f"journal_dir={folder!r} is no path")
    path = os.path.abspath(path)  # the process may go elsewhere
    check_can_be_written(Path(path))
    return path


def _read_size_table(path: object) -> str | None:
    if path is None:
        return None
    if not isinstance(path, str | os.PathLike):
        raise OptionsError(f"size_table={path!r} is not a path")
    read_table(os.fspath(path))
    return os.fspath(path)


#: What turns a value into the one that is kept, or refuses it.
_READ: Mapping[str, Callable[[Any], Any]] = {
    "skip_sites": functools.partial(strings, "skip_sites"),
    "split_ops": functools.partial(_read_ops, "split_ops"),
    "experts_ops": functools.partial(_read_ops, "experts_ops"),
    "groups": _read_groups,
    "all_reduce_ops": all_reduce_ops,
    "group_names": group_names,
    "norm_ops": norm_ops,
    "journal_dir": _read_journal_dir,
    "size_table": _read_size_table,
    "moe_workspace_bytes": functools.partial(positive, "moe_workspace_bytes"),
}


def _check_together(options: Options) -> None:
    """Raises :class:`OptionsError` for options that make no sense beside each other."""
    if options.step_seconds > options.warm_up_seconds:
        raise OptionsError("step_seconds is more than warm_up_seconds, which is the longest that anything may take")
    if not options.fuse:
        _check_nothing_asks_for_fusion(options)
    if options.experts_ops and not options.moe_dispatch:
        raise OptionsError("experts_ops says which kernels a dispatch may stand before; it needs moe_dispatch=True")
    if options.pad_to_capture_size and not options.capture_sizes:
        raise OptionsError("pad_to_capture_size needs capture_sizes to pad to")
    if options.outer_capture and options.capture_sizes:
        raise OptionsError(
            f"outer_capture=True says that the caller captures, and capture_sizes={list(options.capture_sizes)} "
            "that ringfence does; leave one out"
        )
    if options.moe_dispatch and options.deterministic:
        raise OptionsError("deterministic=True is not promised of what moe_dispatch=True rewrites: leave one out")
    if options.deterministic and options.max_tokens is None:
        raise OptionsError("deterministic=True needs max_tokens: the largest token count that you will send")
    ways = [one.name for one in table.ALL]
    several = [str(name) for name in dict.fromkeys(ways) if ways.count(name) > 1]
    if options.transport != "auto" and options.collective not in ("auto", *several):
        raise OptionsError(
            f"transport='{options.transport}' is for collective='{' or '.join(several)}', "
            f"not '{options.collective}'; leave it out"
        )


#: What says something about fused sites alone, and may not be asked for where nothing is to be fused.
_ABOUT_FUSING = (
    *("transport", "deterministic", "size_table", "numerics", "verify", "groups", "norm_ops", "skip_sites"),
    "moe_dispatch",
)


def _check_nothing_asks_for_fusion(options: Options) -> None:
    given = options.given()
    asked = [name for name in _ABOUT_FUSING if name in given]
    if options.collective not in ("auto", "reference"):
        asked.insert(0, "collective")
    if asked:
        raise OptionsError(
            f"fuse=False fuses nothing, so {', '.join(f'{n}={given[n]!r}' for n in asked)} would mean nothing: leave "
            f"{'it' if len(asked) == 1 else 'them'} out"
        )


def _plain(value: Any) -> Any:
    """JSON-ready."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, dist.ProcessGroup):
        return value.group_name
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def _check_sizes(checked: dict[str, Any]) -> None:
    if (limit := checked.get("max_tokens")) is not None:
        positive("max_tokens", limit)
    sizes = checked.get("capture_sizes", ())
    if isinstance(sizes, str) or not isinstance(sizes, Sequence | set | frozenset | range):
        raise OptionsError(f"capture_sizes={sizes!r} is not a list of token counts")
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise OptionsError(f"capture_sizes holds {size!r}, which is not a positive integer")
        if limit is not None and size > limit:
            raise OptionsError(f"capture_sizes holds {size}, more than max_tokens={limit}")
    checked["capture_sizes"] = tuple(sorted(set(sizes)))
