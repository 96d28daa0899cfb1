"""Moves about memory: where a tensor begins in a storage, what shares one, what is written through other views."""

from __future__ import annotations

from .draft import Draft, move


@move(6)
def turned_writes(d: Draft) -> bool:
    """In place through transposes, permutes, reshapes and parts of the memory."""
    v = d.value(lambda v: v.writable and len(v.shape) == 2)
    if v is None:
        return False
    text = d.one(
        "{}.t().mul_(0.5)",
        "{}.mT.add_(0.25)",
        "{}.transpose(0, 1)[1:].mul_(0.5)",
        "{}.permute(1, 0)[0].copy_({}[:, 1])",
        "{}.t()[2:4] = 0.5",
        "{}.unsqueeze(0).transpose(1, 2).mul_(0.5)",
        "{}.T[::2] += 0.25",
        "{}.diagonal().add_(0.5)",
        "{}[1:].t().copy_({}[1:].t() * 0.5)",
        "{}.flip(0).mul_(0.5)",
        "torch.swapaxes({}, 0, 1).sub_(0.25)",
        "{}.narrow(1, 2, 3).t()[0].zero_()",
        "{}[:, None].squeeze(1)[0].mul_(0.5)",
        "{}[..., -1].mul_(0.5)",
    )
    return d.add(text.replace("{}", v.name))


@move(6)
def written_parts(d: Draft) -> bool:
    """Parts of one tensor, of which some are written and all are read."""
    v = d.value(lambda v: v.writable and len(v.shape) == 2 and v.shape[1] == "16")
    if v is None:
        return False
    if v.shape[0] == "8" and d.chance(0.6):
        count, how = d.draw.choice(
            [
                (2, "chunk(2)"),
                (3, "split((2, 3, 3))"),
                (2, "tensor_split(2)"),
                (4, "split(2)"),
                (2, "view(2, 4, 16).unbind(0)"),
            ]
        )
        if "view" in how and not v.contiguous:
            return False
    else:
        count, how = d.draw.choice(
            [(2, "chunk(2, -1)"), (3, "split((4, 4, 8), -1)"), (2, "unflatten(1, (2, 8)).unbind(1)"), (2, "hsplit(2)")]
        )
    parts = [f"p{i}" for i in range(count)]
    made = d.new(())
    a, b = (d.draw.randrange(count) for _ in range(2))
    write = d.one(
        "p{a}.mul_(0.5)",
        "p{a}.copy_(torch.sin(p{a}))",
        "p{a}[0].add_(p{b}[-1].mean())",
        "p{a} += 0.25",
        "torch.ops.fz.scale_(p{a}, 0.5)",
        "torch.ops.fz.many(r * 1, [p{a}])",
        "torch.ops.fz.nothing(r * 1, p{a})",
    )
    read = d.one("p{b}.sum()", "p{a}.sum() + p{b}.mean()", "{v}.mean() - p{b}.mean()")
    said = {"a": a, "b": b, "v": v.name}
    order = [write.format(**said), f"{made.name} = torch.tanh({read.format(**said)})"]
    if d.chance(0.3):
        order.reverse()
    if d.chance(0.3):
        order.append(write.format(a=b, b=a, v=v.name))
    return d.add("\n".join([f"{', '.join(parts)} = {v.name}.{how}", *order]), made)


@move(5)
def other_dtype(d: Draft) -> bool:
    """The same bits in another dtype, which change where rounding does not show."""
    v = d.value(lambda v: len(v.shape) > 0)
    if v is None:
        return False
    bits, integer = (31, "torch.int32") if d.dtype == "float32" else (15, "torch.int16")
    sign = f"-(2**{bits})"
    if v.writable and d.chance(0.45):
        return d.add(
            d.one(
                f"{v.name}.view({integer}).bitwise_xor_({sign})",
                f"{v.name}.view({integer}).bitwise_and_(2**{bits} - 1)",
                f"{v.name}.view({integer})[0] ^= {sign}",
                f"{v.name}[..., :1].view({integer}).zero_()",
                f"{v.name}.view({d_type(d)}).mul_(0.5)",
            )
        )
    made = d.new(v.shape)
    text = d.one(
        f"({v.name}.view({integer}) ^ {sign}).view(x.dtype)",
        f"({v.name}.view({integer}) & (2**{bits} - 1)).view(x.dtype)",
        f"{v.name}.view({integer}).view(x.dtype) * 2",
        f"{v.name}.view({d_type(d)}) + 1",
        f"{v.name}.contiguous().view(torch.uint8).clone().view(x.dtype) + 0.5",
    )
    if d.dtype == "float32" and v.contiguous and v.shape[-1] == "16" and d.chance(0.3):
        pairs = f"torch.view_as_complex({v.name}.view(*{v.name}.shape[:-1], 8, 2))"
        if v.writable and d.chance(0.4):
            return d.add(f"{pairs}.mul_(1j)")
        text = f"torch.view_as_real({pairs} * 1j).flatten(-2)"
    return d.add(f"{made.name} = {text}", made)


def d_type(d: Draft) -> str:
    return f"torch.{d.dtype}"


@move(5)
def by_place(d: Draft) -> bool:
    """A view that is said by strides and by where it begins."""
    v = d.value(lambda v: v.contiguous and v.shape in (("8", "16"), ("4", "16"), ("24", "16")))
    if v is None:
        return False
    begins = d.one(f"{v.name}.storage_offset()", "None")  # an offset is a number where sizes are symbols only
    shape, layout = d.draw.choice(
        [
            (("2", "16"), "(2, 16), (16, 1), {} + 16"),
            (("3", "8"), "(3, 8), (16, 1), {} + 8"),
            (("16",), "(16,), (3,), {} + 2"),
            (("2", "16"), "(2, 16), (32, 1), {}"),
            (("16", "2"), "(16, 2), (1, 16), {}"),
            (("2", "16"), "(2, 16), (16, 1)"),
        ]
    )
    made = d.new(shape, of=v, contiguous=False)
    text = f"{v.name}.as_strided({layout.format(begins)})".replace("None + ", "")
    if v.writable and d.chance(0.3):
        return d.add(f"{text}.{d.one('mul_(0.5)', 'add_(0.25)', 'zero_()')}")
    return d.add(f"{made.name} = {text}", made)


@move(6)
def listing_ops(d: Draft) -> bool:
    """Ops that take or return lists, optional tensors and nothing, or what lies inside of a storage."""
    v, c = d.rows(), d.cache()
    if v is None or c is None:
        return False
    unsafe, kind = d.one("", "", "_unsafe"), d.draw.randrange(6)
    made, row = d.new(v.shape), d.new(("16",))
    if kind == 0:
        return d.add(f"{made.name}, {row.name} = torch.ops.fz.parts{unsafe}({v.name})", made, row)
    if kind == 1:
        lists, shapes = d.draw.choice(
            [
                ([c.name], [c.shape]),
                ([f"{c.name}[:4]", f"{c.name}[4:]"], [("4", "16")] * 2),
                (["kv[0]", "state"], [("8", "16"), ("16",)]),
                (["caches[0][:, :8]", "caches[1].t()"], [("8", "8"), ("16", "8")]),
            ]
        )
        old = [d.new(shape) for shape in shapes]
        names = ", ".join(o.name for o in old)
        return d.add(f"[{names}] = torch.ops.fz.keep{unsafe}({v.name}, [{', '.join(lists)}])", *old)
    if kind == 2:
        others = d.draw.sample([c.name, "None", "state", "kv[1]", "None"], 2)
        return d.add(f"{made.name} = torch.ops.fz.either{unsafe}([None, {v.name}, {', '.join(others)}])", made)
    if kind == 3:
        return d.add(
            f"torch.ops.fz.nothing{unsafe}({v.name}, {d.one('None', c.name, c.name + '[1:3]', 'total', 'self.scale')})"
        )
    op = d.one("inside", "inside", "turned")
    text = f"{made.name} = torch.ops.fz.{op}{unsafe}({v.name})"
    if d.chance(0.5):
        text += "\n" + d.one(
            f"{made.name}[1:].mul_(0.5)",
            f"torch.ops.fz.scale_({made.name}[:1], 0.5)",
            f"{made.name}.add_(1)",
            f"torch.ops.fz.scale_({made.name}[1:], 0.5)",
            f"torch.ops.fz.scale_({made.name}, 0.5)",
        )
    return d.add(text, made)


@move(5)
def out_forms(d: Draft) -> bool:
    """Ops of ATen that are given what to write into."""
    v = d.value(lambda v: len(v.shape) == 2 and v.contiguous)
    if v is None:
        return False
    made = d.new(v.shape)
    empty = f"{made.name} = torch.empty_like({v.name})\n"
    text = d.one(
        "torch.add({v}, 1, out={o})",
        "torch.sin({v}, out={o})",
        "torch.clamp({v}, -1, 1, out={o})",
        "torch.cumsum({v}, 0, out={o})",
        "torch.cat([{v}[:1], {v}[1:]], out={o})",
        "torch.where({v} > 0, {v}, {v} * 0.5, out={o})",
        "torch.softmax({v}, -1, out={o})",
        "torch.ops.fz.out({v}, out={o})",
        "torch.add({v}[:1], 1, out={o}[:1])\n{o}[1:] = 0.5",
        "torch.index_select({v}, 0, torch.arange({v}.shape[0], device=x.device), out={o})",
    ).format(v=v.name, o=made.name)
    if d.chance(0.3) and v.shape == ("8", "16"):
        c = d.cache()
        if c is not None and c.contiguous and c.name != v.name:
            return d.add(text.replace(made.name, c.name))
    return d.add(empty + text, made)


@move(4)
def nothing_and_numbers(d: Draft) -> bool:
    """Tensors without elements, and without dimensions."""
    v, c = d.rows(), d.cache()
    if v is None or c is None:
        return False
    made, kind = d.new(v.shape), d.draw.randrange(12)
    if kind < 5:
        return d.add(
            d.one(
                "{c}[:0] = none",
                "{c}[:0].mul_(0.5)",
                "torch.ops.fz.many({v}, [{c}[:0], {c}[2:4]])",
                "torch.ops.fz.scale_({c}[3:3], 0.5)",
                "count.add_(1)",
                "count.copy_(count + {v}.shape[0])",
                "total.add_({v}.mean())",
                "self.scale.mul_(0.5).add_(total)",
                "total.copy_({c}[0, 0])",
                "{c}[0, 0].copy_(total)",
                "torch.ops.fz.scale_(total, 0.5)",
                "torch.ops.fz.scale_({c}[1, 2], 0.5)",
                "{c}.index_fill_(0, count % 8, 0.5)",
                "{c}.index_copy_(0, (count % 8).view(1), {v}[:1])",
                "{c}[count % 8] = {v}[0]",
            ).format(c=c.name, v=v.name)
        )
    if kind == 5:
        empty = d.new(("0", "16"))
        text = d.one("none * 2", f"{v.name}[:0]", f"{c.name}[2:2] + none", "torch.sin(none)")
        d.returned.append(empty.name)
        return d.add(f"{empty.name} = {text}", empty, hidden=True)
    text = d.one(
        "torch.cat([{v}, none])",
        "torch.cat([none, {v}, {c}[:0]])",
        "{v} + none.sum(0)",
        "{v} * total",
        "{v} + count",
        "{v} + (count % 3)",
        "{v} * (count.to(x.dtype) + 1).reciprocal()",
        "torch.where(count > 2, {v}, {v} * 0.5)",
        "torch.where(total > 0, {v}, torch.zeros_like({v}))",
        "{v} + torch.tensor(0.5, device=x.device)",
        "{v} + torch.tensor([0.5, 0.25] * 8, device=x.device, dtype=x.dtype)",
        "{v} + {c}[count % 8]",
        "{v} + {c}.index_select(0, (count % 8).view(1))",
    )
    return d.add(f"{made.name} = {text.format(c=c.name, v=v.name)}", made)


@move(4)
def number_of_the_data(d: Draft) -> bool:
    """A number that is read of a tensor: as a factor, an index, where a slice begins, how long one is."""
    v, c = d.rows(), d.cache()
    if v is None or c is None:
        return False
    made = d.new(v.shape)
    take = "i = int(number.item())\ntorch._check(i >= 0)\ntorch._check(i < 4)\n"
    if d.chance(0.5):
        text = d.one(
            "{c}.narrow(0, i, 4).mul_(0.5)",
            "{c}[i : i + 4].mul_(0.5)",
            "{c}[i] = {v}[0]",
            "{c}.select(0, i).copy_({v}[0])",
            "torch.ops.fz.scale_({c}[i : i + 2], 0.5)",
            "torch.ops.fz.scale_({c}[i], 0.5)",
            "{c}[:i] = 0.5",
            "{c}[i:].mul_(0.5)",
            "{c}.index_fill_(0, torch.tensor([i], device=x.device), 0.5)",
            "torch.ops.fz.many({v}, [{c}[i : i + 2], {c}[6:]])",
        )
        return d.add(take + text.format(c=c.name, v=v.name))
    text = d.one(
        "{v} * i",
        "{v} + {c}[i]",
        "{v} + {c}.narrow(0, i, 4).sum(0)",
        "{v} + {c}[i : i + 3].mean(0)",
        "{v} + {c}[:i].sum(0)",
        "{v} + torch.arange(i + 1, device=x.device).to(x.dtype).sum()",
        "{v} + torch.full((16,), float(i), device=x.device, dtype=x.dtype)",
        "{v} + torch.cat([{c}[:i], {v}]).sum(0)",
        "{v} + torch.ops.fz.head({c}, i + 1).sum(0)",
    )
    return d.add(f"{take}{made.name} = {text.format(c=c.name, v=v.name)}", made)
