"""The fused ops that every compiler carries, each registered from its :class:`.epilogue.Epilogue`.

    ringfence::all_reduce_add_rms_norm(input, residual, weight, eps, weight_bias, group, collective)
        -> (norm, residual_out)
    ringfence::all_reduce_rms_norm(input, weight, eps, weight_bias, group, collective)
        -> (norm, reduced)
    ringfence::all_reduce(input, group, collective)
        -> reduced

All are functional: they allocate what they return and alias nothing, so no pass
has to undo a functionalisation. All tensors are ``[..., hidden]``, of one shape and
one of float16, bfloat16, float32; ``weight`` is ``[hidden]``, of the same dtype, or
None for ones. ``group`` is the name of a process group; every rank of it must make
the call, in the same order.

``collective`` says who carries the sum out: "reference", a collective whose workspace
belongs to the group, or "prepared": whoever :func:`ringfence.prepare` chose. A call that the workspace does not
serve (too large, another dtype, no workspace) is carried out by the reference: the shapes decide, which are the same
on every rank. Behind the name of a collective, ", not captured" says that a capture which somebody else makes may
not hold it.

An empty tensor is refused with :class:`InputError`: the fused kernels cannot launch
on zero tokens, and a rank that returned early would leave the others waiting.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..capturing import is_capturing
from ..errors import CaptureError, CollectiveUnavailableError, InputError, PoisonedError
from ..groups import HOST_BACKENDS, describe_group
from ..hazards.situation import Strategy
from ..seams import run_between
from ..spelling import group_word
from . import reference, table
from .epilogue import DTYPES, Epilogue, RmsNorm
from .no_backward import check_no_grad, without_backward
from .prepared import Prepared
from .workspace import Workspace, workspaces_of

#: In place of a collective: whoever was prepared for the group (:class:`.prepared.Prepared`).
PREPARED = "prepared"
#: Behind the name of a collective: no capture that somebody else makes may hold the call.
NOT_CAPTURED = ", not captured"
_WHAT = "the fused all-reduce"


def _workspace(input: Tensor, group: str, collective: str) -> Workspace | None:
    if input.numel() == 0:
        raise InputError(
            f"the input must not be empty, but it is {list(input.shape)}; pad to at least one token on every rank"
        )
    if collective == reference.IMPLEMENTATION.name:
        return None
    workspaces = workspaces_of(group)
    wanted = collective if collective != PREPARED else None
    found = workspaces.find(wanted, input.device, input.dtype, input.numel() * input.element_size())
    if found is None and wanted is not None:
        known = dict.fromkeys(str(one.name) for one in table.ALL)
        if collective not in known and all(one.collective != collective for one in workspaces.open):
            raise CollectiveUnavailableError(
                f"collective '{collective}' has no runtime in this process; use one of {list(known)}"
            )
    return found


def _rows(tensor: Tensor) -> Tensor:
    """``[tokens, hidden]``, contiguous."""
    return _readable(tensor).view(-1, tensor.shape[-1])


def _readable(tensor: Tensor) -> Tensor:
    """Contiguous and at a multiple of 16 bytes, as the kernels take for granted."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@functools.lru_cache(maxsize=1024)
def _epilogues(residual: bool, eps: float, weight_bias: float, has_weight: bool) -> tuple[Epilogue, Epilogue]:
    """What a call means, and what those kernels are asked for that always add and multiply. Built once for a site."""
    norm = RmsNorm(eps, weight_bias if has_weight else 0.0, has_weight)
    return Epilogue(residual, norm), Epilogue(True, RmsNorm(eps, norm.weight_bias))


def _fused(
    workspace: Workspace,
    strategy: Strategy,
    epilogues: tuple[Epilogue, Epilogue],
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    shape: torch.Size,
) -> tuple[Tensor, ...]:
    """By the kernels of a workspace. epilogues: of :func:`_epilogues`; what a site lacks of one are zeros, and ones."""
    out = torch.empty_like(x)
    meaning, padded = epilogues
    epilogue = meaning if workspace.implementation.takes(meaning) else padded
    if epilogue.norm is None:
        workspace.kernels.run(x, epilogue, strategy, None, None, out)
        return (out.view(shape),)
    if residual is not None:
        residual = _rows(residual)
    elif epilogue.residual:
        residual = workspace.constant("zeros", x, x.numel()).view_as(x)
    if weight is not None:
        weight = _readable(weight)
    elif epilogue.norm.has_weight:
        weight = workspace.constant("ones", x, x.shape[1])
    for name, other in (("residual", residual), ("weight", weight)):
        if other is None:
            continue
        if other.dtype != x.dtype or other.device != x.device or other.shape[-1] != x.shape[1]:
            raise InputError(  # the kernel would read it as if it were, and return garbage
                f"{name} must be {x.dtype} on {x.device} with rows of {x.shape[1]}, as the input is, but it is "
                f"{other.dtype} {list(other.shape)} on {other.device}"
            )
    norm = torch.empty_like(x)
    workspace.kernels.run(x, epilogue, strategy, (residual, weight), norm, out)
    return norm.view(shape), out.view(shape)


def normed(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    weight_bias: float,
    group: str,
    collective: str,
) -> tuple[Tensor, ...]:
    """``(norm, sum)``; see above."""
    if collective == PREPARED:
        check_operands(input, residual, weight, eps, weight_bias)
        check_no_grad(_WHAT, input, residual, weight)
    epilogues = _epilogues(residual is not None, eps, weight_bias, weight is not None)

    def run(collective: str, *operands: Any) -> tuple[Tensor, ...]:
        return _normed(epilogues, group, collective, *operands)

    return _carried(run, group, collective, input, residual, weight)


def _normed(
    epilogues: tuple[Epilogue, Epilogue],
    group: str,
    collective: str,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor, ...]:
    workspace = _workspace(input, group, collective)
    if workspace is not None:
        x = _rows(input)
        strategy = workspace.strategy(x.shape[0], x.shape[1], x.dtype)
        if strategy is not None:
            return _fused(workspace, strategy, epilogues, x, residual, weight, input.shape)
    return reference.apply(epilogues[0], reference.all_reduce(input, group), residual, weight)


def by_kernels(input: Tensor, group: str) -> bool:
    """Whether a fused call that names no collective is carried out by kernels that were prepared for the group.

    By the shape and dtype of its input, so the answer is one on all ranks. Makes no call.
    """
    prepared = workspaces_of(group).prepared.get(input.dtype)
    if prepared is None or not prepared.largest or not input.numel():
        return False
    workspace = _workspace(input, group, PREPARED)
    tokens = input.numel() // input.shape[-1]
    return workspace is not None and workspace.strategy(tokens, input.shape[-1], input.dtype) is not None


_SUM = Epilogue()


def summed(input: Tensor, group: str, collective: str) -> Tensor:
    """The sum; see above."""
    if collective == PREPARED:
        check_operands(input)
        check_no_grad(_WHAT, input)

    def run(collective: str, input: Tensor) -> tuple[Tensor]:
        return (_summed(input, group, collective),)

    return _carried(run, group, collective, input)[0]


def _summed(input: Tensor, group: str, collective: str) -> Tensor:
    workspace = _workspace(input, group, collective)
    if workspace is not None and input.dim():
        x = _rows(input)
        strategy = workspace.all_reduce_strategy(x.shape[0], x.shape[1], x.dtype)
        if strategy is not None:
            return _fused(workspace, strategy, (_SUM, _SUM), x, None, None, input.shape)[0]
    return reference.all_reduce(input, group)


# -- in captures of somebody else ---------------------------------------------------


def _carried(run: Callable[..., tuple[Tensor, ...]], group: str, collective: str, *operands: Any) -> tuple[Tensor, ...]:
    """``run(collective, *operands)``, as a capture that somebody else makes allows it.

    A call that must not be captured runs between two segments of that capture, else by the reference if that can be
    captured, else it is refused. The graphs of a compiled model that captures itself name a collective and nothing
    more: their judge has spoken.
    """
    named = collective.removesuffix(NOT_CAPTURED)
    if named == collective != PREPARED:
        return run(collective, *operands)
    input: Tensor = operands[0]
    prepared = None
    if collective == PREPARED:
        prepared = _prepared(group, input.dtype)
        if prepared is not None and not prepared.largest:
            named = reference.IMPLEMENTATION.name
    if not is_capturing(input.device) or (prepared is not None and prepared.captured):
        return run(named, *operands)
    between = run_between(functools.partial(run, named), operands, input.device)
    if between is not None:
        return between
    backend = describe_group(group, input.device).backend
    if backend in HOST_BACKENDS:
        why = (
            f"the collectives of group '{group_word(group)}' run on the host over {backend}, and a replay would not "
            "run them again"
        )
    elif prepared is not None and prepared.collective == reference.IMPLEMENTATION.name:
        why = prepared.capture
    else:
        return run(reference.IMPLEMENTATION.name, *operands)
    raise CaptureError(
        f"a fused all-reduce was called inside a capture that must not hold it: {why}. Capture without it, or in "
        "segments between which it runs (vLLM's and SGLang's breakable graphs)"
    )


def _prepared(group: str, dtype: torch.dtype) -> Prepared | None:
    workspaces = workspaces_of(group)
    if workspaces.invalid is not None:
        raise PoisonedError(f"{workspaces.invalid}; call ringfence.prepare on every rank, which begins anew")
    return workspaces.prepared.get(dtype)


def check_operands(
    input: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 0.0,
    weight_bias: float = 0.0,
) -> None:
    """Of a call that a person wrote, before it reaches the other ranks: a graph's was matched.

    May be asked of fake tensors, whose sizes are compared as far as they are known. It is in the way of every step of
    an engine that captures nothing, so what is right is found to be with little work. Raises :class:`InputError`.
    """
    if not isinstance(input, Tensor) or input.layout != torch.strided or input.dtype not in DTYPES or not input.dim():
        raise InputError(f"the input must be [..., hidden] of {_TAKEN}, but it is {_told(input)}")
    shape = input.shape
    if residual is not None and not _fits(residual, input, shape):
        raise _unlike("residual", residual, input, shape)
    if weight is not None and not _fits(weight, input, shape[-1:]):
        raise _unlike("weight", weight, input, shape[-1:])
    if type(eps) is not float or not 0.0 <= eps < math.inf:
        _check_number("eps", eps, positive=True)
    if type(weight_bias) is not float or not -math.inf < weight_bias < math.inf:
        _check_number("weight_bias", weight_bias)


def _check_number(name: str, number: object, *, positive: bool = False) -> None:
    check_is_number(name, number)
    if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
        raise InputError(f"{name} must be a finite number, but it is {number!r}")
    if positive and number < 0:
        raise InputError(
            f"{name} must not be negative, as an RMSNorm takes the root of a mean plus it, but it is {number!r}"
        )


def check_is_number(name: str, number: object) -> None:
    """Also where it is traced: an op's schema would be what complains there. Raises :class:`InputError`."""
    if isinstance(number, Tensor):
        raise InputError(f"{name} must be a number, but it is a tensor: pass float({name})")


_TAKEN = ", ".join(map(str, DTYPES))


def _told(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    layout = "" if value.layout == torch.strided else f" ({value.layout})"
    return f"{value.dtype} {list(value.shape)}{layout} on {value.device}"


def _fits(value: object, input: Tensor, shape: Sequence[int]) -> bool:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.dtype != input.dtype:
        return False
    if value.device != input.device or value.dim() != len(shape):
        return False
    for a, b in zip(value.shape, shape, strict=True):
        if a is not b and isinstance(a, int) and isinstance(b, int) and a != b:
            return False
    return True


def _unlike(name: str, value: object, input: Tensor, shape: Sequence[int]) -> InputError:
    wanted = f"{input.dtype} {list(shape)} on {input.device}"
    because = "as the input is" if wanted == _told(input) else f"beside an input of {_told(input)}"
    return InputError(f"{name} must be {wanted}, {because}, but it is {_told(value)}")


def _contiguous_like(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _register(form: Epilogue) -> Any:
    """The op of an epilogue; of its norm, only that there is one."""
    residual = ", Tensor residual" if form.residual else ""
    norm = ", Tensor? weight, float eps, float weight_bias" if form.norm is not None else ""
    results = "(Tensor, Tensor)" if form.norm is not None else "Tensor"
    run: Callable[..., Any] = normed if form.norm is not None else summed
    if form.norm is not None and not form.residual:

        def run(input: Tensor, *others: Any) -> Any:
            return normed(input, None, *others)

    def fake(input: Tensor, *_: Any) -> Any:
        like = _contiguous_like(input)
        return like if form.norm is None else (like, _contiguous_like(input))

    schema = f"(Tensor input{residual}{norm}, str group, str collective) -> {results}"
    op = torch.library.custom_op(f"ringfence::{form.op}", run, mutates_args=(), schema=schema)
    op.register_fake(fake)
    without_backward(op, _WHAT)
    return getattr(torch.ops.ringfence, form.op).default


_ANY_NORM = RmsNorm(0.0)
all_reduce_add_rms_norm = _register(Epilogue(True, _ANY_NORM))
all_reduce_rms_norm = _register(Epilogue(False, _ANY_NORM))
all_reduce = _register(_SUM)

#: With a norm; and all of them.
FUSED = (all_reduce_add_rms_norm, all_reduce_rms_norm)
OPS = (*FUSED, all_reduce)
