"""In place, before the cut: what the model writes is written where it lies, and nothing of it crosses a cut as a copy.

AOT makes a graph functional. A write into an input, such as a key-value cache, is a chain of *versions* of it: the
input, what the first write made of it, and so on to the one that a ``copy_`` at the end of the graph puts back. In a
graph that is cut, a version would cross as a value, and the whole cache would be copied twice in every step. So after
this pass (all of it before the parts become modules of their own):

- a part reads a written input from the input, and leaves the last version that it makes in it: an op that runs
  eagerly writes in place, and a piece for Inductor ends with the ``copy_`` that Inductor turns into writes in place;
- a read of a version that a later part needs and that is overwritten before, is a copy of what is read, taken in time;
- a view is taken anew in each part that reads it, of the value that owns the memory, so no two values that cross a
  cut share memory, and every alias inside of a part can be seen there;
- a buffer that an op fills (``out=``) is written where it was made, unless somebody reads what was there before.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from .aliases import RESHAPES, ancestors, readers, root, viewed
from .elided import may_be_read_late
from .functional import SCATTERS, Mutation, View, Written, in_place_form, mutation, new_value, updated
from .part_editor import PartEditor
from .parts import GraphPart
from .roles import arguments, aten, calls, same_shape, same_size, tensor
from .symbols import as_node, expression, providers
from .value_numbers import LOOKED
from .versions import WrittenInput, is_own, scatter_of, written_inputs_of


def write_in_place(gm: GraphModule, parts: Sequence[GraphPart], *, eager_pieces: bool) -> tuple[GraphPart, ...]:
    """The parts anew; see the module.

    ``eager_pieces`` is whether pieces run op by op, as islands do. Changes ``gm``; a part may vanish, and an island
    may come between.
    """
    done = _InPlace(gm, parts, eager_pieces).run()
    gm.graph.lint()
    gm.recompile()
    return done


class _InPlace(PartEditor):
    def __init__(self, gm: GraphModule, parts: Sequence[GraphPart], eager_pieces: bool) -> None:
        super().__init__(gm.graph, parts)
        self.eager = [part.island or eager_pieces for part in parts]
        (self.output,) = gm.graph.find_nodes(op="output")
        self.owners = {value: root(value) for value in self.output.all_input_nodes}
        self.buffers = list(written_inputs_of(gm, gm.graph.find_nodes(op="placeholder")))
        numbered = [(b, k, v) for b in self.buffers for k, v in enumerate(b.versions) if k == 0 or is_own(v)]
        #: Which input a version is of, and its number.
        self.version = {v: (b, k) for b, k, v in reversed(numbered)}
        #: Which version a node writes, if it is written in place.
        self.written_at = {b.at(k): v for b, k, v in numbered if k}
        self.copies = {buffer.copy for buffer in self.buffers}
        #: Nodes that nothing needs any more.
        self.replaced: dict[Node, None] = {}
        self.sizes = {s: n for s, n in providers(gm).items() if n.op == "placeholder"}

    def run(self) -> tuple[GraphPart, ...]:
        for p, part in enumerate(self.parts):
            for node in part.nodes:
                self._visit(node, p)
            self._end(p)
        self._return()
        for node in reversed(self.graph.nodes):
            if not node.users and (node in self.replaced or _is_free(node)):
                self.graph.erase_node(node)
        return self.regrouped()

    # -- one node --------------------------------------------------------------------

    def _visit(self, node: Node, p: int) -> None:
        if node in self.replaced or node in self.copies:
            return
        if not self.eager[p]:
            self.localise(node, p)
            return
        change = mutation(node)
        if change is not None and change.written:
            self._run_mutation(node, change, p)
        elif node in self.written_at and self._write_version(node, p):
            pass
        else:
            self.localise(node, p)

    # -- overwriting -----------------------------------------------------------------

    def _save(self, version: Node, anchor: Node | None, p: int, late: Callable[[Node], bool]) -> None:
        """Copy what ``late`` readers read of a version, before it is overwritten."""
        buffer, k = self.version[version]
        copies: dict[Node, Node] = {}
        for reader, value in buffer.reads[k]:
            if (reader, value) in self.saved or not late(reader):
                continue
            if value not in copies:
                local = self.local_at(value, anchor, p)
                copies[value] = self.new(anchor, p, aten.clone.default, (local,))
            self.saved[reader, value] = copies[value]

    def _claim(self, version: Node, anchor: Node, p: int) -> Node:
        """The memory that the next version of a buffer is written into, at ``anchor``."""
        buffer, k = self.version[version]
        memory = self.home.get(version, version)
        older = [v for v in buffer.versions[: k + 1] if self.home.get(v, v) is memory]
        for v in older:
            self._save(v, anchor, p, lambda reader: reader.op == "output" or anchor < reader)
        return memory

    def _settle(self, version: Node, memory: Node, anchor: Node, p: int) -> None:
        """A version lies in ``memory`` now. The caller of the graph gets a copy: an input's memory is its own."""
        self.home[version] = memory
        if memory.op != "placeholder" or version not in self.version:
            return
        buffer, k = self.version[version]
        for reader, value in buffer.reads[k]:
            if reader.op == "output":
                self.saved[reader, value] = self.new(anchor, p, aten.clone.default, (self.local_at(value, anchor, p),))

    # -- ops that write into arguments -------------------------------------------------

    def _run_mutation(self, node: Node, change: Mutation, p: int) -> None:
        """Call the op itself, on the memory or on a copy of what somebody reads later."""
        given: dict[str, Any] = dict(map_arg(change.arguments, lambda n: self.local(n, node, p)))
        given |= {name: [None] * length for name, length in change.lengths.items()}
        given |= {name: None for name, place in change.absent if place is None}
        memories, looked = [], set()
        for written in change.written:
            memory, settled = self._memory(node, written, p)
            memories.append((memory, settled))
            for name, place, view in written.names:
                seen = self._seen(memory, written.old, view, node, p)
                if view.target is not None:
                    looked.add((name, place))
                if place is None:
                    given[name] = seen
                else:
                    given[name][place] = seen
        call = self.new(node, p, change.op, (), given, like=node)
        call.meta[LOOKED] = looked
        self._return_values(node, change, call, given, p)
        for written, (memory, settled) in zip(change.written, memories, strict=True):
            value = new_value(node, written.output)
            if value is not None:
                self.replaced[value] = None
                self._settle(value, memory, node, p)
            if settled is not None:
                self.replaced[settled] = None
                self._settle(settled, self.home[settled], node, p)
        self.replaced[node] = None

    def _memory(self, node: Node, written: Written, p: int) -> tuple[Node, Node | None]:
        """Where the op may write, and which version that is, if a scatter would have made it."""
        value = new_value(node, written.output)
        old = written.old
        if value in self.version and self._is_next(old, value):
            return self._claim(old, node, p), None
        scatter = scatter_of(node, value)
        if scatter is not None and self._is_next(arguments(scatter)[0], scatter):
            memory = self._claim(arguments(scatter)[0], node, p)
            self.home[scatter] = memory
            seen = self.new(node, p, old.target, (memory, *arguments(old)[1:]), dict(old.kwargs))  # type: ignore[arg-type]
            return seen, scatter
        local = self.local(old, node, p)
        here = [old, *(v for v, memory in self.home.items() if memory is local)]
        read_later = any(node < reader for v in here for reader, _ in readers(v) if reader is not node)
        if viewed(old) is None and root(local) is local and local.op == "call_function" and not read_later:
            return local, None
        return self.new(node, p, aten.clone.default, (local,)), None

    def _is_next(self, old: Node, new: Node | None) -> bool:
        if new not in self.version or old not in self.version:
            return False
        buffer, k = self.version[new]
        return k > 0 and buffer.versions[k - 1] is old and self._same_layout(new, self.home.get(old, old))

    def _same_layout(self, one: Node, other: Node) -> bool:
        strides = [tuple(tensor(n).stride()) for n in (one, other)]
        return same_shape(one, other) and all(map(same_size, *strides))

    def _seen(self, memory: Node, old: Node, view: View, anchor: Node, p: int) -> Node:
        """What of the memory an argument looks at. A trace counts strided views from the start of the storage."""
        if view.target is None:
            return memory
        args = map_arg(view.args, lambda n: self.local(n, anchor, p))
        if view.target is not aten.as_strided.default:
            return self.new(anchor, p, view.target, (memory, *args))
        size, stride, offset = args
        inside = self._difference(offset, tensor(old).storage_offset(), anchor, p)
        if getattr(memory.target, "namespace", "") != "aten":  # what is not ATen's may begin inside of its storage
            start = self.new(anchor, p, aten.sym_storage_offset.default, (memory,))
            inside = self.new(anchor, p, operator.add, (start, inside))
        return self.new(anchor, p, aten.as_strided.default, (memory, size, stride, inside))

    def _difference(self, offset: Any, base: Any, anchor: Node, p: int) -> Any:
        """``offset - base`` of one trace."""
        value = offset.meta["val"] if isinstance(offset, Node) else offset
        start = expression(base)
        wanted = expression(value) - start
        known = wanted.free_symbols <= self.sizes.keys()
        with self.graph.inserting_before(anchor):
            before = anchor.prev
            result = as_node(self.graph, wanted if known else start, self.sizes)
            if not known:  # the offset is a number of the data's
                result = self.graph.call_function(operator.sub, (offset, result))
                result.meta["val"] = value - base
        while before is not anchor.prev and (before := before.next) is not anchor:
            self.put(before, anchor, p)
        return result

    def _return_values(self, node: Node, change: Mutation, call: Node, given: dict[str, Any], p: int) -> None:
        """The readers of what the op itself returns read it of the call."""
        returns = change.op._schema.returns
        vals: Any = node.meta.get("val") or ()
        call.meta["val"] = vals[0] if len(returns) == 1 else tuple(vals[: len(returns)]) if returns else None
        for i, returned in enumerate(returns):
            value = new_value(node, i)
            if value is None:
                continue
            if returned.alias_info is not None and returned.alias_info.is_write:  # it returns its argument
                name = next(
                    a.name for a in change.op._schema.arguments if a.alias_info is not None and a.alias_info.is_write
                )
                self.home[value] = given[name]
            elif len(returns) == 1:
                self.home[value] = call
            else:
                item = self.new(node, p, operator.getitem, (call, i))
                self.home[value] = item
            self.replaced[value] = None

    # -- ATen ops ------------------------------------------------------------------------

    def _write_version(self, node: Node, p: int) -> bool:
        """Write the version that an ATen op makes where the one before lies; whether that can be done."""
        version = self.written_at[node]
        buffer, k = self.version[version]
        old = buffer.versions[k - 1]
        made_of = updated(node) if version is node else viewed(arguments(node)[0])
        if made_of not in (old, self.home.get(old, old)) or not self._is_next(old, version):  # of its memory by now
            return False
        if self._reads_versions(arguments(node)[1:], node.kwargs, buffer, node):
            return False
        memory = self._claim(old, node, p)
        if version is not node:  # a view of what was made of a view: both are all of it
            seen = self._local_at_memory(arguments(node)[0], memory, node, p)
            self._write(seen, node, lambda n: n is arguments(node)[0], node, p)
        else:
            self._write(memory, node, lambda n: n is old or self.home.get(n, n) is memory, node, p)
        self.replaced |= dict.fromkeys((node, version))
        self._settle(version, memory, node, p)
        return True

    def _local_at_memory(self, view: Node, memory: Node, anchor: Node, p: int) -> Node:
        return self.new(anchor, p, view.target, (memory, *arguments(view)[1:]), dict(view.kwargs))  # type: ignore[arg-type]

    def _reads_versions(self, args: Any, kwargs: Any, buffer: WrittenInput, node: Node) -> bool:
        """Whether a call reads the memory that it would write into through another argument."""
        found: list[Node] = []
        map_arg((args, kwargs), found.append)
        if node.target in SCATTERS:
            found = found[1:]  # the source may be a write of its own, see _write
            source = arguments(node)[1]
            if isinstance(source, Node) and viewed(source) is not None and root(source) in buffer.versions:
                return True
        return any(root(n) in buffer.versions for n in found)

    def _write(self, memory: Node, value: Node, is_old: Callable[[Node], bool], anchor: Node, p: int) -> None:
        """Put ``value`` into memory that holds what ``is_old`` says that a node is."""
        form, made_of = in_place_form(value), self._reshape_of(value, is_old, p)
        if made_of is not None:
            self.replaced[value] = None
            changed, reshape = made_of
            seen = self._local_at_memory(reshape, memory, anchor, p)
            self._write(seen, changed, lambda n: _reshapes(n, reshape) and is_old(arguments(n)[0]), anchor, p)
            return
        base = arguments(value)[0] if value.args else None
        if value.target in SCATTERS and isinstance(base, Node) and is_old(base):
            look = SCATTERS[value.target]
            self.replaced[value] = None
            rest = map_arg(arguments(value)[2:], lambda n: self.local(n, anchor, p))
            named = {k: map_arg(v, lambda n: self.local(n, anchor, p)) for k, v in value.kwargs.items()}
            seen = self.new(anchor, p, look, (memory, *rest), named)

            def is_part(node: Node) -> bool:
                source = viewed(node)
                alike = (
                    node.target is look and arguments(node)[1:] == arguments(value)[2:] and node.kwargs == value.kwargs
                )
                return source is not None and alike and is_old(source)

            source = arguments(value)[1]
            if self._can_move(source, value, p):
                self._write(seen, source, is_part, anchor, p)
                self.replaced[source] = None
            else:
                self.new(anchor, p, aten.copy_.default, (seen, self.local(source, value, p)))
        elif form is not None and isinstance(base, Node) and is_old(base):
            self.replaced[value] = None
            rest, named = map_arg((arguments(value)[1:], dict(value.kwargs)), lambda n: self.local(n, value, p))
            self.new(anchor, p, form, (memory, *rest), named, like=value)
        else:
            self.new(anchor, p, aten.copy_.default, (memory, self.local(value, anchor, p)))

    def _reshape_of(self, value: Node, is_old: Callable[[Node], bool], p: int) -> tuple[Node, Node] | None:
        """Where a value is what was made of a reshape of old memory, shaped back: what was made, and that reshape."""
        changed = viewed(value) if value.target in RESHAPES else None
        look = arguments(changed)[0] if changed is not None and updated(changed) is not None else None
        if changed is None or not isinstance(look, Node) or look.target not in RESHAPES:
            return None
        return (changed, look) if is_old(arguments(look)[0]) and self._can_move(changed, value, p) else None

    def _can_move(self, source: Any, user: Node, p: int) -> bool:
        """Whether an op may run where its only reader stands: nothing that it reads is written in between."""
        if not isinstance(source, Node) or list(source.users) != [user] or self.place.get(source) != p:
            return False
        written = {v for b in self.buffers for v in b.versions} | set(self.home.values())
        return not any(root(n) in written for n in source.all_input_nodes if n is not source.args[0])

    # -- the end of a part -----------------------------------------------------------------

    def _end(self, p: int) -> None:
        """Leave the last version of each buffer that this part makes in the buffer's memory."""
        stores: list[tuple[WrittenInput, Node, Node]] = []
        for buffer in self.buffers:
            made = [v for k, v in enumerate(buffer.versions) if k and self._made_in(buffer, v) == p]
            if made and made[-1] is buffer.versions[-1]:
                self.replaced[buffer.copy] = None
            if made and self.home.get(made[-1]) is not buffer.memory:
                value = self.saved.get((buffer.copy, made[-1]))
                stores.append((buffer, made[-1], value if value is not None else self.local_at(made[-1], None, p)))
        for buffer, version, _ in stores:
            self._before_store(buffer, version, p)
        memories = {buffer.memory for buffer, _, _ in stores}
        late = [may_be_read_late(value, memories - {buffer.memory}) for buffer, _, value in stores]
        values = [
            self.new(None, p, aten.clone.default, (value,)) if is_late else value
            for (_, _, value), is_late in zip(stores, late, strict=True)
        ]
        # A compiler may look through such a clone inside of its piece: then the write is an island's.
        order = sorted(range(len(stores)), key=lambda i: late[i])
        for i in order:
            buffer, version, _ = stores[i]
            copy = self.new(None, p, aten.copy_.default, (buffer.memory, values[i]))
            if late[i] and not self.eager[p]:
                self.leave_to_an_island(copy)
            if self._owns(buffer, version) and self._same_layout(version, buffer.memory):
                self.home[version] = buffer.memory

    def _before_store(self, buffer: WrittenInput, version: Node, p: int) -> None:
        """Save what later parts read of the versions that are overwritten, and give the caller a value of its own."""
        for old in buffer.versions:
            if self._owns(buffer, old) and self.home.get(old, old) is buffer.memory:
                self._save(old, None, p, lambda reader: reader.op != "output" and self.place[reader] > p)
        if self._owns(buffer, version):
            for reader, read in buffer.reads[self.version[version][1]]:
                if reader.op == "output":
                    self.saved.setdefault((reader, read), self.local_at(read, None, p))

    def _owns(self, buffer: WrittenInput, version: Node) -> bool:
        return version in self.version and self.version[version][0] is buffer

    def _made_in(self, buffer: WrittenInput, version: Node) -> int:
        return self.place.get(version, self.place[buffer.copy]) if is_own(version) else self.place[buffer.copy]

    def _return(self) -> None:
        """What the graph returns: views are taken in the part that owns the memory."""
        for value in self.output.all_input_nodes:
            taken = self.saved.get((self.output, value), self.home.get(value))
            if taken is None and viewed(value) is not None:
                taken = self._returned_view(value)
            if taken is not None:
                self.output.replace_input_with(value, taken)

    def _returned_view(self, value: Node) -> Node:
        version = self.owners[value]
        owner = self.home.get(version, version)
        p, behind = self.place.get(owner), self.place[value]
        if p is not None and self.place.get(version, p) != p:
            # Written behind the part that made it, in a buffer that this part's own view does not look at.
            return self.new(None, behind, aten.clone.default, (self.local_at(value, None, behind),))
        numbers = [self.place.get(n, -1) for n in ancestors(value) if viewed(n) is None and n is not owner]
        known = p is not None and p != behind and max(numbers, default=-1) < p
        return self.local(value, None, p) if known and p is not None else value


def _reshapes(node: Node, look: Node) -> bool:
    return node.target is look.target and arguments(node)[1:] == arguments(look)[1:]


def _is_free(node: Node) -> bool:
    """A view, which may go when nothing reads it."""
    return viewed(node) is not None or calls(node, aten.sym_storage_offset.default)
