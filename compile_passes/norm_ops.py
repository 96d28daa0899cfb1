"""RMSNorm ops of engines: which of them are known, and which argument is what.

    op(x, weight, eps) -> norm                      vllm_ir::rms_norm, trtllm::flashinfer_rmsnorm
    op(x, residual, weight, eps) -> (norm, sum)     vllm_ir::fused_add_rms_norm
    op(out!, x, weight, eps)                        _C::rms_norm, sgl_kernel::rmsnorm
    op(x!, residual!, weight, eps)                  _C::fused_add_rms_norm: x becomes the norm, residual the sum
    op(x!, residual!, weight, eps) -> (norm, sum)   vllm_ir::fused_add_rms_norm.maybe_inplace: given away, read no more

The form follows from an op's schema, because all engines order the arguments alike; a user may say it instead
(:class:`NormOp`), and that is checked against the schema. What it computes follows from
its name where the name is in :data:`KNOWN` or given by the user. Any other op that is called like one is run once,
on generated inputs, beside the reference: an op that computes an RMSNorm on them is taken for one. So is a user's op,
where it can be run: what computes something else is none, whoever says so.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes

from ..runtime.collectives import reference
from .functional import is_functionalised
from .roles import as_number, is_contiguous, same_size

#: By name: what is added to the weight.
KNOWN: Mapping[str, float] = {
    "vllm_ir::rms_norm": 0.0,
    "vllm_ir::fused_add_rms_norm": 0.0,
    "_C::rms_norm": 0.0,
    "_C::fused_add_rms_norm": 0.0,
    "sgl_kernel::rmsnorm": 0.0,
    "sgl_kernel::fused_add_rmsnorm": 0.0,
    "sgl_kernel::gemma_rmsnorm": 1.0,
    "sgl_kernel::gemma_fused_add_rmsnorm": 1.0,
    "flashinfer::rmsnorm": 0.0,
    "flashinfer::fused_add_rmsnorm": 0.0,
    "flashinfer::gemma_rmsnorm": 1.0,
    "flashinfer::gemma_fused_add_rmsnorm": 1.0,
    "trtllm::flashinfer_rmsnorm": 0.0,
    "trtllm::flashinfer_fused_add_rmsnorm": 0.0,
    "trtllm::flashinfer_gemma_rmsnorm": 1.0,
    "trtllm::flashinfer_gemma_fused_add_rmsnorm": 1.0,
    "auto_deploy::torch_rmsnorm": 0.0,
}

#: Names of ops that may be an RMSNorm and nothing besides: no quantiser, no rotary embedding, no collective.
_LOOKS_LIKE_ONE = re.compile(r"(\w+_)?rms_?norm(_?(forward|fwd|impl|kernel|op|inplace|maybe_inplace))?_?")
_WITH_MORE = re.compile(r"quant|fp8|fp4|int8|nvfp4|rope|rotary|silu|gate|reduce|gather|scatter|bwd|backward|layer_norm")

#: Largest difference from the reference, in units of the dtype's epsilon: roundings between root, weight and result.
_BOUND = 4.0
#: The same of an op that a user names: it may round as it likes, and is no LayerNorm.
_BOUND_OF_A_USER = 16.0
_ABSOLUTE = 1e-5
_ROWS = 5


@dataclass(frozen=True)
class NormOp:
    """An op by the names of its arguments.

    x: the input, to which ``residual`` is added where there is one. weight: None for an op that takes none.
    out: written with the norm, which is not returned.
    in_place: ``x`` becomes the norm and ``residual`` the sum; donated: they may be written, and nobody reads them any
    more, because it returns both. sum_first: it returns ``(sum, norm)``.
    weight_bias: added to the weight, 1.0 for Gemma's. name: ``"namespace::name"``. proven: its name is in no list, and
    it was run.
    """

    x: str
    weight: str | None
    eps: str
    residual: str | None = None
    out: str | None = None
    in_place: bool = False
    donated: bool = False
    sum_first: bool = False
    weight_bias: float = 0.0
    name: str = ""
    proven: bool = False


def check_row(row: NormOp, schema: torch.FunctionSchema) -> str | None:
    """Why an op of this schema cannot have the roles that are said of it; None where it can."""
    arguments = {a.name: a for a in schema.arguments}
    said = {"x": row.x, "weight": row.weight, "residual": row.residual, "out": row.out}
    if row.x in (row.weight, row.residual) or (row.weight is not None and row.weight == row.residual):
        return f"one argument is said to be two of x='{row.x}', weight='{row.weight}' and residual='{row.residual}'"
    for role, name in {**said, "eps": row.eps}.items():
        if name is None:
            continue
        kind = str(arguments[name].type) if name in arguments else "no argument"
        if kind not in (("Tensor", "Optional[Tensor]") if role != "eps" else ("float", "Optional[float]", "number")):
            return f"{role}='{name}' is {kind} of {schema}"
    written = {name for name, argument in arguments.items() if argument.is_write}
    both = row.in_place or row.donated
    expected = {row.out} if row.out is not None else {row.x, row.residual} if both else set()
    if both and (row.residual is None or row.out is not None or row.in_place == row.donated):
        return "in_place=True and donated=True mean that x and residual are written, and one of the two says how"
    if written != expected:
        return f"{schema} writes {sorted(written) or 'nothing'}, and is said to write {sorted(map(str, expected))}"
    returns = 0 if expected and not row.donated else 2 if row.residual is not None else 1
    if len(schema.returns) != returns:
        return f"{schema} returns {len(schema.returns)} values, and is said to return {returns}"
    return None


def read_schema(schema: torch.FunctionSchema, weight_bias: float = 0.0) -> NormOp | str:
    """The roles of the arguments of an op that is called an RMSNorm; or why its schema is none's."""
    tensors = [a for a in schema.arguments if "Tensor" in str(a.type)]
    numbers = [a for a in schema.arguments if str(a.type) == "float"]
    written = [a for a in tensors if a.is_write]
    if len(numbers) != 1 or any(str(a.type) not in ("Tensor", "Optional[Tensor]") for a in tensors):
        return f"{schema.name} takes {len(numbers)} floats where an RMSNorm takes its epsilon, or lists of tensors"
    names, returns = [a.name for a in tensors], len(schema.returns)
    op = NormOp(names[0], names[-1], numbers[0].name, weight_bias=weight_bias, name=schema.name)
    misplaced = any("weight" in name or "gamma" in name for name in names[:-1]) or "residual" in names[-1]
    if misplaced and len(names) in (2, 3):
        return f"{schema} has its tensors in another order than (x, [residual], weight); say which is which: a NormOp"
    if not written and (len(names), returns) == (2, 1):
        return op
    if not written and (len(names), returns) == (3, 2):
        return replace(op, residual=names[1])
    if len(names) == 3 and returns == 0 and [a.name for a in written] == names[:1]:
        return replace(op, x=names[1], out=names[0])
    if len(names) == 3 and returns == 0 and [a.name for a in written] == names[:2]:
        return replace(op, residual=names[1], in_place=True)
    if len(names) == 3 and returns == 2 and [a.name for a in written] == names[:2]:
        return replace(op, residual=names[1], donated=True)
    return f"{schema} has another form than the RMSNorm ops that are known: (x, [residual], weight, eps)"


def op_of(node: Node) -> torch._ops.OpOverload | None:
    """The custom op that a node calls, also inside ``auto_functionalized``."""
    if node.op != "call_function":
        return None
    target = node.args[0] if is_functionalised(node) else node.target
    return target if isinstance(target, torch._ops.OpOverload) and target.namespace not in _TORCHS else None


def is_foreign(target: object) -> bool:
    """Whether ``target`` is an op of somebody else, or may have one inside: an op of higher order."""
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace not in _TORCHS
    return isinstance(target, torch._ops.HigherOrderOperator)


_TORCHS = ("aten", "prims", "_c10d_functional", "c10d", "higher_order", "ringfence")


def norm_ops_of(
    gm: GraphModule, given: Mapping[str, float | NormOp] | None = None, device: torch.device | None = None
) -> dict[str, NormOp | str]:
    """By name and overload: the ops of a graph that are an RMSNorm, or why one that looks like it is not taken for one.

    given: what the user says of ops, as in :data:`KNOWN`, or all of their roles; of one overload, or of all. device:
    where ops of other names are run; None runs none.
    """
    found: dict[str, NormOp | str] = {}
    listed: dict[str, float | NormOp] = {**KNOWN, **(given or {})}
    for node in gm.graph.nodes:
        op = op_of(node)
        if op is None or (full := names_of(op)[0]) in found:
            continue
        said = next((listed[name] for name in names_of(op) if name in listed), None)
        if said is not None:
            row = _believed(op._schema, said)
            users = given is not None and not given.keys().isdisjoint(names_of(op))
            found[full] = _of_a_user(op, row, node, device) if users and isinstance(row, NormOp) else row
        elif _looks_like_one(op._schema.name):
            row = read_schema(op._schema)
            found[full] = row if isinstance(row, str) else _proven(op, row, node, device)
    return found


def names_of(op: torch._ops.OpOverload) -> tuple[str, str]:
    """With its overload, and without."""
    return f"{op._schema.name}.{op._overloadname}", op._schema.name


def _believed(schema: torch.FunctionSchema, said: float | NormOp) -> NormOp | str:
    if not isinstance(said, NormOp):
        return read_schema(schema, said)
    row = replace(said, name=schema.name)
    wrong = check_row(row, schema)
    return row if wrong is None else f"norm_ops says of {schema.name} what its schema does not: {wrong}"


def installed_ops(names: Iterable[str] = KNOWN) -> dict[str, NormOp | str]:
    """The roles of those ops that are registered in this process, each overload, or why their schema is none's."""
    found: dict[str, NormOp | str] = {}
    for name in names:
        namespace, _, op = name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), op, None)
        for overload in packet.overloads() if packet is not None else ():
            full = name if overload == "default" else f"{name}.{overload}"
            found[full] = read_schema(getattr(packet, overload)._schema, KNOWN.get(name, 0.0))
    return found


def _looks_like_one(name: str) -> bool:
    bare = name.partition("::")[2].lower()
    return _LOOKS_LIKE_ONE.fullmatch(bare) is not None and _WITH_MORE.search(bare) is None


# -- calls --------------------------------------------------------------------------


@dataclass(frozen=True)
class NormCall:
    """One call of a :class:`NormOp`. ``norm`` and ``sum`` are its results' nodes, None where nothing reads them."""

    row: NormOp
    node: Node
    x: Node
    residual: Node | None
    weight: object
    eps: float
    norm: Node | None
    sum: Node | None


def read_call(node: Node, row: NormOp) -> NormCall | str:
    """What a call gets and where its results are; or what is not plain about it."""
    op = op_of(node)
    assert op is not None, "a call of a known op"
    values = _arguments(node, op)
    if isinstance(values, str):
        return values
    given, written = values
    odd = [a.name for a in op._schema.arguments if a.name not in _roles(row) and _counts(a, given.get(a.name))]
    if odd:
        return f"{row.name} is called with {odd[0]}={given[odd[0]]!r}, of which an RMSNorm knows nothing"
    x, residual, eps = given.get(row.x), given.get(row.residual or ""), as_number(given.get(row.eps))
    if not isinstance(x, Node) or (row.residual is not None and not isinstance(residual, Node)) or eps is None:
        return f"{row.name} is called with something else than tensors and a number for epsilon"
    items = {u.args[1]: u for u in node.users if u.target is operator.getitem}
    if not is_functionalised(node) and (row.out is not None or row.in_place or row.donated):
        return f"{row.name} writes into its arguments; hand on a functional graph, in which AOT has wrapped it"
    if row.out is not None:
        norm, summed, mine = items.get(written[row.out]), None, {written[row.out]}
    elif row.in_place:
        first, second = written[row.x], written[str(row.residual)]
        norm, summed, mine = items.get(first), items.get(second), {first, second}
    elif row.residual is not None:
        norm, summed, mine = items.get(0), items.get(1), {0, 1}
        if row.sum_first:
            norm, summed = summed, norm
    else:
        norm, summed, mine = node, None, set()
    if norm is not node and (len(items) != len(node.users) or not {i for i, u in items.items() if u.users} <= mine):
        return f"{row.name} returns more than the norm and the sum"
    return NormCall(row, node, x, residual if row.residual else None, given.get(row.weight or ""), eps, norm, summed)


def _roles(row: NormOp) -> tuple[str | None, ...]:
    return row.x, row.residual, row.weight, row.eps, row.out


def _counts(argument: torch.Argument, value: object) -> bool:
    """Whether another argument may change what is computed: flags of launches (``enable_pdl``) do not."""
    return not isinstance(value, bool) and value is not None and value != argument.default_value


def _arguments(node: Node, op: torch._ops.OpOverload) -> tuple[dict[str, Any], dict[str, int]] | str:
    """The arguments by name, and for those that are written the position of the new value in what the node returns."""
    schema = op._schema.arguments
    defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
    if not is_functionalised(node):
        return defaults | dict(zip([a.name for a in schema], node.args, strict=False)) | dict(node.kwargs), {}
    given = dict(node.kwargs)
    bases: Any = given.pop("_all_bases", None)
    written = [a.name for a in schema if a.is_write]
    if bases is None:
        return defaults | given, {name: i + 1 for i, name in enumerate(written)}
    places: dict[str, int] = {}
    for name in written:
        index = given.pop(f"_{name}_base_index", None)
        if not isinstance(index, int) or index in places.values() or not _whole(given, name, bases[index]):
            return f"{op._schema.name} writes into a part of a tensor, or twice into one; pass it whole tensors"
        places[name], given[name] = index, bases[index]
    return defaults | given, {name: index + 1 for name, index in places.items()}


def _whole(given: Mapping[str, Any], name: str, base: Node) -> bool:
    """Whether the argument is the whole of its base, with the same rows."""
    if any(key.startswith(f"_{name}_slice_") for key in given):
        return False
    size, value = given.get(f"_{name}_size"), base.meta["val"]
    if size is None:
        return True
    dims = [d.meta["val"] if isinstance(d, Node) else d for d in size]
    same = same_size(math.prod(dims), value.numel()) and same_size(dims[-1], value.shape[-1])
    return given.get(f"_{name}_storage_offset") == 0 and is_contiguous(value) and same


# -- proof --------------------------------------------------------------------------


def _proven(op: torch._ops.OpOverload, row: NormOp, node: Node, device: torch.device | None) -> NormOp | str:
    """The row of an op that computes an RMSNorm on generated inputs; or why it is not taken for one."""
    remedy = f"if it is an RMSNorm, say so: norm_ops=['{row.name}']"
    biases = _agreeing(op, row, node, device, _BOUND)
    if isinstance(biases, str):
        return biases if isinstance(read_call(node, row), str) else f"{biases}; {remedy}"
    if not biases:
        return f"{row.name} is called like an RMSNorm and computes something else"
    return replace(row, weight_bias=biases[0], proven=True)


def _of_a_user(op: torch._ops.OpOverload, row: NormOp, node: Node, device: torch.device | None) -> NormOp | str:
    """A user's word holds where the op cannot be tried; where it can, it is an RMSNorm on generated inputs, roughly."""
    biases = _agreeing(op, row, node, device, _BOUND_OF_A_USER, row.weight_bias)
    if isinstance(biases, str) or row.weight_bias in biases:
        return row
    instead = f"; with {biases[0]} it does: norm_ops={{'{row.name}': {biases[0]}}}" if biases else ""
    return (
        f"norm_ops names {row.name}, and on generated inputs it does not compute an RMSNorm to whose weight "
        f"{row.weight_bias} is added{instead}"
    )


def _agreeing(
    op: torch._ops.OpOverload, row: NormOp, node: Node, device: torch.device | None, bound: float, *biases: float
) -> list[float] | str:
    """What may be added to the weight so that the op computes an RMSNorm; or why it was not tried."""
    call = read_call(node, row)
    if isinstance(call, str):
        return call
    value = call.x.meta["val"]
    if device is None or not isinstance(value.shape[-1], int):
        return f"{row.name} looks like an RMSNorm, and what it computes was not tried"
    given = _arguments(node, op)
    assert not isinstance(given, str), "the call was read"
    rest = {k: v for k, v in given[0].items() if k in {a.name for a in op._schema.arguments}}
    if any(isinstance(v, Node) for k, v in rest.items() if k not in (row.x, row.residual, row.weight, row.out)):
        return f"{row.name} takes more of the graph than tensors of an RMSNorm"
    tried = dict.fromkeys((*biases, 0.0, 1.0))
    try:
        with _disable_current_modes(), torch.no_grad():
            return [b for b in tried if all(_agrees(op, row, rest, b, value, device, e, bound) for e in (1e-5, 0.1))]
    except Exception as error:  # whatever somebody else's op raises
        return f"{row.name} looks like an RMSNorm and cannot be run on {device} ({type(error).__name__}: {error})"


def _agrees(
    op: torch._ops.OpOverload,
    row: NormOp,
    rest: Mapping[str, Any],
    bias: float,
    like: Tensor,
    device: torch.device,
    eps: float,
    bound: float,
) -> bool:
    generator, hidden, dtype = torch.Generator().manual_seed(0), like.shape[-1], like.dtype
    for magnitude in (1.0, 1e-2):
        x, residual = (
            (torch.randn(_ROWS, hidden, generator=generator) * magnitude + magnitude / 2).to(dtype).to(device)
            for _ in range(2)
        )
        weight = (torch.rand(hidden, generator=generator) + 0.5).to(dtype).to(device)
        summed = x + residual if row.residual is not None else x
        expected = reference.rms_norm(summed, weight if row.weight is not None else None, eps, bias)
        given = {**rest, row.x: x.clone(), row.eps: eps}
        written = torch.full_like(x, torch.nan)
        for name, value in ((row.weight, weight.clone()), (row.residual, residual.clone()), (row.out, written)):
            if name is not None:
                given[name] = value
        result = op(**given)
        returned: Sequence[Any]
        if row.out is not None:
            returned = (given[row.out],)
        elif row.in_place:
            returned = (given[row.x], given[str(row.residual)])
        else:
            returned = result if isinstance(result, tuple | list) else (result,)
        wanted = (expected, summed) if row.residual is not None else (expected,)
        wanted = wanted[::-1] if row.sum_first else wanted
        if not all(_close(a, b, bound) for a, b in zip(returned, wanted, strict=True)):
            return False
    return True


def _close(ours: Tensor, wanted: Tensor, bound: float) -> bool:
    if ours.shape != wanted.shape or ours.dtype != wanted.dtype:
        return False
    most = wanted.double().abs() * torch.finfo(wanted.dtype).eps * bound + _ABSOLUTE
    return bool(((ours.double() - wanted.double()).abs() <= most).all())
