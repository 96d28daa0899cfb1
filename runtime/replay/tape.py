"""What a device would have recorded of a call: kernels, and the addresses that they were given.

A capture runs the call's host code once. What reaches the device meanwhile is a line of kernels; a replay launches
them again and knows nothing of the host code between them. So a tape holds ATen ops, what custom ops written in
Python launch inside, and the kernels of Inductor's compiled code, each with its tensors pinned: those of the caller
by their addresses, those born in the capture as memory of the pool. Ops on the host's own tensors are not recorded;
what they computed is a constant from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..errors import CaptureError
from .buffers import StorageView, copy_into, weak_memory
from .pool import Block, Pool

#: A replay's step: one kernel on pinned tensors.
Kernel = Callable[[], None]

#: A pinned tensor, or another argument as it was.
Place = Callable[[], Any]

_HOST_COLLECTIVES = ("_c10d_functional", "c10d", "ringfence")
_ALLOCATIONS = frozenset(
    {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
    | {"aten::empty_permuted"}
)
#: ``item``, ``bool`` and the like dispatch an op that is tagged.
_HOST_READS = frozenset(
    {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__, Tensor.__dlpack__, Tensor.__repr__, Tensor.__format__}
)
_TRANSFERS = frozenset({"aten::_to_copy", "aten::copy_", "aten::copy"})


class Tape(TorchDispatchMode):
    """Records what is dispatched while it is active. Everything that it changes on the device, :meth:`undo` restores.

    on_device: whether a tensor that was there before plays the device's memory; the others play the host's.
    """

    supports_higher_order_operators = True

    def __init__(self, pool: Pool, on_device: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        #: Blocks that this capture may use for anything: what is free when it begins, and what it adds.
        self.scratch: list[Block] = [b for b in pool.blocks if b.free]
        #: Those that its kernels do use.
        self.used: list[Block] = []
        self._pool, self._predicate = pool, on_device
        self._known = len(pool.blocks)
        # Storages born here: (what pins their identity, whether they are the device's; None before it is known).
        self._born: dict[int, tuple[StorageWeakRef, bool | None]] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # memory of others that was written, and what it held
        self._host: list[Tensor] = []
        #: Memory of the caller's that kernels read or write.
        self.kept: list[_Kept] = []
        self.host_reads = _HostReads(self._on_device)

    # -- what is recorded ------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            with self:  # a higher-order op is host code
                if func is torch.ops.higher_order.invoke_subgraph:  # it refuses to run below a mode
                    return args[0](*args[2:])
                return func.dispatch(self._key(args, kwargs), *args, **kwargs)
        if func.namespace in _HOST_COLLECTIVES:
            raise CaptureError(f"{func} runs on the host here and cannot be captured; add it to split_ops")
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        key = self._key(args, kwargs)
        if _is_python(func, key):
            with self, self.host_reads:  # what it launches is recorded, and its Python is not run again
                return func.redispatch(DispatchKeySet(key), *args, **kwargs)
        return self._op(func, args, kwargs)

    def _op(self, func: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        host = [t for t in given if not self._on_device(t)]
        device = len(host) < len(given)
        if device and (torch.Tag.data_dependent_output in func.tags or _size_depends_on_data(func, args)):
            raise CaptureError(f"{func} synchronises with the host and cannot be captured; add it to split_ops")
        name = func.name().partition(".")[0]
        if name == "aten::lift_fresh":  # a tensor made of Python's numbers
            self._born_on_host(args[0])
            return func(*args, **kwargs)
        self._check_mixed(func, name, args, host, device)
        if kwargs.get("generator") is not None:
            raise CaptureError(f"{func} draws from a generator that the graph does not know; add it to split_ops")
        if device:
            for tensor in _written(func, args, kwargs):
                self._remember(tensor)
        result = func(*args, **kwargs)
        if not device and given:
            from_host = not all(map(self._predicate, given))
            if name in _TRANSFERS and from_host and any(map(self._predicate, _tensors(result))):
                raise CaptureError(f"{func} moves a value from the host and cannot be captured; add it to split_ops")
            for tensor in _tensors(result):
                self._born_on_host(tensor)
            return result
        if name in _TRANSFERS and not all(map(self._predicate, _tensors(result))):
            raise CaptureError(f"{func} moves a value to the host and cannot be captured; add it to split_ops")
        if not given and not all(map(self._predicate, _tensors(result))):
            for tensor in _tensors(result):
                self._born_on_host(tensor)
            return result
        return self._record(func, args, kwargs, given, result, launches=name not in _ALLOCATIONS)

    def _record(
        self, func: Any, args: Any, kwargs: Any, given: Sequence[Tensor], result: Any, *, launches: bool
    ) -> Any:
        """Put what is new into the pool, and the kernel on the tape unless it only looks at what is there."""
        leaves, shape = tree_flatten(result)
        known = {_identity(t) for t in given}
        moved: dict[int, Tensor] = {}
        landings: list[Place | None] = []
        for i, leaf in enumerate(leaves):
            new = isinstance(leaf, Tensor) and _identity(leaf) not in known
            if new:
                leaves[i] = self._settle(leaf, moved)
            landings.append(self._place(leaves[i]) if new else None)
        writes = torch.Tag.inplace_view not in func.tags and len(_written(func, args, kwargs)) > 0
        if launches and (writes or any(landings)):
            self.kernels.append(_launch(func, *self._pinned(args, kwargs), landings))
        return tree_unflatten(leaves, shape)

    # -- Inductor's kernels ----------------------------------------------------------

    def compiled(self, kernel: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """A kernel of compiled code, which dispatches nothing. It may write into any of its tensors."""
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        states = [self._state(t) for t in given]
        on_host = any(s is False for s in states) and not any(states)
        if not any(s is not None for s in states):  # it only fills: where, its buffers tell
            on_host = not all(map(self._predicate, given))
        for tensor, state in zip(given, states, strict=True):
            if state is None:
                self._mark(tensor, not on_host)
        if on_host:
            return kernel(*args, **kwargs)
        self._check_mixed("a compiled kernel", "", args, [t for t in given if not self._on_device(t)], True)
        for tensor in given:
            if self._on_device(tensor):
                self._remember(tensor)
        kernel(*args, **kwargs)
        self.kernels.append(_launch(kernel, *self._pinned(args, kwargs), []))
        return None

    def buffer(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What compiled code allocates."""
        with torch.utils._python_dispatch._disable_current_modes():
            made = self._pool.empty(size, stride, dtype)
        self._note(made, None)
        return made

    # -- memory ----------------------------------------------------------------------

    def undo(self) -> None:
        """Give the caller's memory back as it was, and fill what was born here with poison."""
        for memory, held in self._before.values():
            memory.copy_(held)
        self._before.clear()
        self.poison()

    def poison(self) -> None:
        """Spoil what a replay may write to: a wrong reader of memory that was given away sees it."""
        for block in self.scratch:
            if block.used or block.open:
                block.memory.fill_(POISON)
                block.used = False

    def replay(self) -> None:
        """Launch the kernels, in order."""
        self.poison()
        for kernel in self.kernels:
            kernel()
        for block in self.used:
            block.used = True

    def _settle(self, tensor: Tensor, moved: dict[int, Tensor]) -> Tensor:
        """A new tensor of an op, as one of the pool's; tensors that share a storage go on sharing it."""
        if tensor.layout is not torch.strided:
            raise CaptureError(f"a tensor of layout {tensor.layout} cannot be captured; add its op to split_ops")
        storage = tensor.untyped_storage()
        memory = moved.get(storage._cdata)
        if memory is None:
            memory = moved[storage._cdata] = self._pool.bytes(storage.nbytes())
            if storage.nbytes():
                memory.copy_(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))
            self._note(memory, True)
        return StorageView.of(tensor).on(memory.untyped_storage())

    def _note(self, made: Tensor, device: bool | None) -> None:
        """A storage was born in the pool."""
        self._born[_identity(made)] = StorageWeakRef(made.untyped_storage()), device
        self.scratch += self._pool.blocks[self._known :]
        self._known = len(self._pool.blocks)
        block = self._pool.block_of(made)
        if block is not None and block not in self.used:
            self.used.append(block)

    def _remember(self, tensor: Tensor) -> None:
        """What the memory of others holds before it is written."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._born or storage._cdata in self._before or not storage.nbytes():
            return
        with torch.inference_mode(False):
            memory = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            self._before[storage._cdata] = memory, memory.clone()

    # -- host or device --------------------------------------------------------------

    def _state(self, tensor: Tensor) -> bool | None:
        born = self._born.get(_identity(tensor))
        return born[1] if born is not None else self._predicate(tensor)

    def _on_device(self, tensor: Tensor) -> bool:
        state = self._state(tensor)
        return state is None or state

    def _mark(self, tensor: Tensor, device: bool) -> None:
        identity = _identity(tensor)
        if identity in self._born:
            self._born[identity] = self._born[identity][0], device

    def _born_on_host(self, tensor: Tensor) -> None:
        identity = _identity(tensor)
        if identity not in self._born and self._predicate(tensor):  # else it is told by what it is
            self._host.append(tensor)
            self._born[identity] = StorageWeakRef(tensor.untyped_storage()), False

    def _check_mixed(self, what: Any, name: str, args: Sequence[Any], host: Sequence[Tensor], device: bool) -> None:
        """Raises for a kernel that reads the host's memory; a scalar of the host's is read once and is fine."""
        if device and any(t.ndim or name in _TRANSFERS for t in host):
            raise CaptureError(
                f"{what} moves a value between host and device and cannot be captured; add it to split_ops"
            )

    def _key(self, args: Any, kwargs: Any) -> DispatchKey:
        device = next((t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), "cpu")
        key: DispatchKey = getattr(DispatchKey, torch._C._dispatch_key_for_device(device))
        return key

    # -- arguments by address --------------------------------------------------------

    def _pinned(self, args: Any, kwargs: Any) -> tuple[list[Place], Any]:
        leaves, shape = tree_flatten((tuple(args), dict(kwargs)))
        return [self._place(leaf) for leaf in leaves], shape

    def _place(self, leaf: Any) -> Place:
        if not isinstance(leaf, Tensor):
            return lambda: leaf
        if not self._on_device(leaf):  # a scalar of the host's, as it was
            value = leaf.clone()
            return lambda: value
        if not leaf.untyped_storage().nbytes():  # what has no memory is nobody's
            empty = StorageView.of(leaf).on(torch.UntypedStorage(0, device=leaf.device))
            return lambda: empty
        block = self._pool.block_of(leaf)
        if block is not None:
            pinned = block.like(leaf)
            return lambda: pinned
        place = _Kept(leaf)
        self.kept.append(place)
        return place


class _HostReads(TorchFunctionMode):
    """Refuses the calls that read a tensor and dispatch nothing where it is on the CPU.

    On a device they synchronise, which ends a capture; here their result would become a constant without a word.
    """

    def __init__(self, on_device: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self._on_device = on_device

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in _HOST_READS and self._on_device(args[0]):
            name = f"Tensor.{func.__name__}"
            raise CaptureError(
                f"{name} synchronises with the host and cannot be captured; add the op that calls it to split_ops"
            )
        return func(*args, **(kwargs or {}))


class _Kept:
    """Memory of somebody else's, which a tape reads and does not keep alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._memory = weak_memory(tensor)
        self._address, self._layout = tensor.data_ptr(), StorageView.of(tensor)

    def __call__(self) -> Tensor:
        tensor = self._memory()
        if tensor is None:
            raise CaptureError("a replay reads memory that was freed since it was captured")
        return tensor

    def adopt(self, tensor: Tensor) -> None:
        """Read another tensor that lies where this memory was: a device knows addresses only."""
        storage = tensor.untyped_storage()
        begin = storage.data_ptr()
        if self._memory() is not None or not begin <= self._address < begin + storage.nbytes():
            return
        offset = (self._address - begin) // self._layout.dtype.itemsize
        self._memory = weak_memory(self._layout.on(storage, offset))


#: A byte that is NaN in floats of any width, and no value that a program would count with elsewhere.
POISON = 0xFF


def _launch(func: Callable[..., Any], leaves: list[Place], shape: Any, landings: Sequence[Place | None]) -> Kernel:
    def launch() -> None:
        args, kwargs = tree_unflatten([leaf() for leaf in leaves], shape)
        result = func(*args, **kwargs)
        if landings:
            for landing, value in zip(landings, tree_leaves(result), strict=True):
                if landing is not None:
                    copy_into(landing(), value)

    return launch


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def _is_python(func: torch._ops.OpOverload, key: DispatchKey) -> bool:
    """Whether an op is written in Python, so that what it launches can be seen from here."""
    name = func.name().replace("::", "/", 1)
    return any(f"{name}/{k}" in torch.library._impls for k in (key.name, "CompositeExplicitAutograd"))


def _written(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an op writes into, by its schema."""
    written: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        written += _tensors(value)
    return written


def _size_depends_on_data(func: torch._ops.OpOverload, args: Sequence[Any]) -> bool:
    if func.name().startswith(("aten::index_put", "aten::_unsafe_index_put")):  # counts where a mask is true
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if func is torch.ops.aten.index.Tensor:  # tagged for its boolean indices only
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return True
