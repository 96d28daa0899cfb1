"""Moves that write: in place, into caches, through engines' ops, over the ranks."""

from __future__ import annotations

from .draft import Draft, move
from .program import Value


@move(14)
def write(d: Draft) -> bool:
    """Any in-place op of aten on anything that may be written."""
    v = d.target()
    if v is None:
        return False
    other = d.alike(v.shape)
    if other is None:
        return False
    text = d.one(
        "{v}.copy_({o})",
        "{v}.copy_({o})",
        "{v}.mul_(0.5)",
        "{v}.add_({o})",
        "{v}.mul_(0.5).add_({o})",
        "{v}.tanh_()",
        "{v}.fill_(0.25)",
        "{v}.zero_()",
        "{v}.sub_({o}, alpha=0.5)",
        "{v}.lerp_(torch.ones_like({v}), 0.5)",
        "{v}[...] = {o}",
        "{v}.clamp_(-1, 1)",
        "torch._foreach_mul_([{v}], 0.5)",
        "torch._foreach_add_([{v}], 0.25)",
        "{v}.masked_fill_({v}.detach() > 100, 0.0)",
        "slices",
    ).format(v=v.name, o=other)
    if text == "slices":
        if not v.shape or v.shape[-1] != "16":
            return False
        text = d.one("{v}[..., :8] = {v}[..., 8:] * 0.5", "{v}[..., 4:12].mul_(0.5)", "{v}[..., ::2] += 0.25").format(
            v=v.name
        )
    return d.add(text)


@move(8)
def write_cache(d: Draft) -> bool:
    """The ways in which engines write keys and values."""
    c, v = d.cache(), d.tokens()
    if c is None or v is None:
        return False
    text = d.one(
        "{c}.index_copy_(0, pos, {v})",
        "{c}[pos] = {v}",
        "{c}[:n] = {v}",
        "{c}[k : k + n] = {v}",
        "{c}[k : k + n].copy_({v})",
        "{c}.index_put_((pos,), {v})",
        "{c}.index_put_((pos,), {v} * 0.5, accumulate=True)",
        "{c}.index_add_(0, pos, {v} * 0.5)",
        "{c}.scatter_(0, pos[:, None].expand(-1, 16), {v})",
        "{c}[pos, :8] = {v}[:, :8]",
        "{c}.narrow(0, 0, n).add_({v} * 0.5)",
        "{c}.index_fill_(0, pos, 0.5)",
        "{c}[holes] = 0.5",
        "{c}.masked_fill_(holes[:, None], 0.25)",
        "{c}[k] = {v}[0]",
        "{c}[:2] = {v}[:1]",
        "{c}.select(0, 1).copy_({v}[-1])",
        "{c}.view(-1)[:16] = {v}[0]",
        "{c}.t()[:, :n] = {v}.t()",
    )
    if ".view(" in text and not c.contiguous:
        return False
    return d.add(text.format(c=c.name, v=v.name))


@move(8)
def old_value(d: Draft) -> bool:
    """What was there before is kept, overwritten, and read: rollback, token shift, ring buffer, swap."""
    c = d.target()
    if c is None or not c.shape:
        return False
    old = d.new(c.shape)
    keep = d.one("{}.clone()", "{}.clone()", "{} + 0.0", "{} * 1", "{}.detach().clone()", "{}.contiguous().clone()")
    other = d.alike(c.shape)
    d.add(f"{old.name} = {keep.format(c.name)}", old)
    twin = d.value(lambda v: v.shape == c.shape and v.writable and v.name != c.name)
    choice = d.draw.random()
    if choice < 0.3 and twin is not None:
        d.add(f"{c.name}.copy_({twin.name})")
        return d.add(f"{twin.name}.copy_({old.name})")
    if choice < 0.5 and c.shape == ("8", "16"):
        return d.add(
            d.one(
                "{c}[:-1] = {o}[1:]",
                "{c}[:-1] = {c}[1:].clone()",
                "{c}.copy_(torch.roll({c}, -1, 0))",
                "{c}.copy_(torch.cat([{c}[n:], x]))",
                "{c}[:-n] = {c}[n:].clone()",
            ).format(c=c.name, o=old.name)
        )
    if choice < 0.9 and other is not None:
        return d.add(f"{c.name}.copy_({other})")
    return d.add(f"{c.name}.mul_(0.5)")


@move(4)
def token_shift(d: Draft) -> bool:
    v, state = d.tokens(), d.value(lambda v: v.shape == ("16",) and v.writable)
    if v is None or state is None:
        return False
    made = d.new(v.shape)
    return d.add(
        f"{made.name} = torch.cat([{state.name}[None], {v.name}[:-1]])\n{state.name}.copy_({v.name}[-1])", made
    )


@move(12)
def engine_op(d: Draft) -> bool:
    """A registered op that writes into one or several of its arguments."""
    v, c, two, row = d.tokens(), d.cache(), d.cache(), d.row()
    if v is None or c is None or two is None or row is None:
        return False
    made = d.new(v.shape)
    target = c.name
    if d.chance(0.25):
        target = d.one("kv[0]", "kv[1]", "self.stack[1]", "self.stack.select(0, 0)", "caches[1]", "kv[1, 2:]")
    elif d.chance(0.3):
        target = f"{c.name}{d.one('[2:]', '[3:]', '[:6]')}"
    unsafe = d.one("", "", "_unsafe")
    kind = d.draw.randrange(12)
    if kind < 3:
        o = d.one(
            "torch.empty_like({})",
            "torch.empty_like({})",
            "torch.empty({}.shape, dtype=x.dtype, device=x.device)",
            "torch.zeros_like({})",
            "x.new_empty({}.shape)",
        ).format(v.name)
        return d.add(f"{made.name} = {o}\ntorch.ops.fz.attn{unsafe}({v.name}, {target}, {made.name})", made)
    if kind == 3:
        return d.add(f"torch.ops.fz.append{unsafe}({c.name}, {v.name}, pos)")
    if kind == 4:
        source = d.one("", "[:4]", "[2:6]", "[:, :8]", ".t()")
        shape = {"": c.shape, "[:4]": ("4", "16"), "[2:6]": ("4", "16"), "[:, :8]": ("8", "8"), ".t()": ("16", "8")}[
            source
        ]
        old = d.new(shape)
        fill = f"torch.sin({two.name}{source})" if two.name != c.name else f"{row.name}[0].expand({', '.join(shape)})"
        return d.add(f"{old.name} = torch.ops.fz.exchange{unsafe}({fill}, {c.name}{source})", old)
    if kind == 5:
        return d.add(f"{made.name} = torch.ops.fz.maybe({v.name}, {d.one(target, 'None')})", made)
    if kind == 6:
        lists = d.one(
            f"[{c.name}]",
            f"[{c.name}[:4], {c.name}[4:]]",
            "caches",
            "[kv[0], kv[1]]",
            "[c0, self.buffer]",
            f"[{target}, state]",
        )
        return d.add(f"torch.ops.fz.many{unsafe}({v.name}, {lists})")
    if kind == 7:
        return d.add(f"{made.name} = torch.empty_like({v.name})\ntorch.ops.fz.out({v.name}, out={made.name})", made)
    if kind == 8:
        res = d.new(v.shape)
        return d.add(
            f"{made.name} = {v.name} * 1\n{res.name} = r.clone()\n"
            f"torch.ops.fz.add_norm_({made.name}, {res.name}, self.g)",
            made,
            res,
        )
    if kind == 9:
        return d.add(
            f"torch.ops.fz.scale_({d.one(target, c.name + '[:4]', c.name + '[:, :8]', c.name + '.t()', 'state')}, 0.5)"
        )
    if kind == 10:
        total = d.new(())
        return d.add(f"{made.name}, {total.name} = torch.ops.fz.tally{unsafe}({v.name}, {target})", made, total)
    if two.name == c.name:
        return False
    return d.add(f"{made.name} = torch.ops.fz.two({v.name}, {c.name}, {two.name})", made)


@move(4)
def out_argument(d: Draft) -> bool:
    v = d.value(lambda v: len(v.shape) == 2)
    if v is None:
        return False
    made = d.new(v.shape)
    return d.add(
        f"{made.name} = torch.empty_like({v.name})\n{made.name}.copy_({v.name} * 0.5)"
        if d.chance(0.5)
        else f"{made.name} = torch.empty_like({v.name})\ntorch.mul({v.name}, 0.5, out={made.name})",
        made,
    )


@move(2)
def preallocated(d: Draft) -> bool:
    """A buffer that is filled part by part."""
    v = d.value(lambda v: v.shape == ("n", "16"))
    if v is None:
        return False
    made = d.new(("n", "16"))
    first = d.one("torch.ops.fz.pure({})[:, :8]", "{}[:, :8]", "torch.sin({})[:, :8]").format(v.name)
    return d.add(
        f"{made.name} = torch.empty_like({v.name})\n{made.name}[:, :8] = {first}\n"
        f"{made.name}[:, 8:] = {v.name}[:, 8:] * 0.5",
        made,
    )


@move(9)
def all_reduce(d: Draft) -> bool:
    """An all-reduce, mostly with the add and the norm that it is fused with."""
    v = d.rows()
    if v is None or not d.distributed:
        return False
    y, res, h = d.new(v.shape), d.new(v.shape), d.new(v.shape)
    local = d.one("{} @ self.w", "torch.sin({})", "{} * 1").format(v.name)
    if d.chance(0.5):
        d.add(f"{y.name} = {local}\ndist.all_reduce({y.name})", y, hidden=True)
    elif d.chance(0.7):
        d.add(f"{y.name} = fc.all_reduce({local}, 'sum', dist.group.WORLD)", y, hidden=True)
    else:
        d.add(
            f"{y.name} = torch.ops._c10d_functional.all_reduce({local}, 'sum', GROUP)\n"
            f"{y.name} = torch.ops._c10d_functional.wait_tensor({y.name})",
            y,
            hidden=True,
        )
    kind = d.draw.random()
    residual = d.value(lambda v: v.shape == y.shape)
    if kind < 0.15 or residual is None:
        d.values.append(y)
        return True
    if kind < 0.3:
        d.values.append(y)
        return d.add(f"{h.name} = F.rms_norm({y.name}, (16,), self.g, 1e-5)", h)
    added = d.one("{r} + {y}", "{y} + {r}", "{r} + {y}", "{r} + ({y} + self.g)", "{r} + {y} * 0.5").format(
        r=residual.name, y=y.name
    )
    normed = d.one(
        "F.rms_norm({}, (16,), self.g, 1e-5)",
        "F.rms_norm({}, (16,), self.g, 1e-5)",
        "F.rms_norm({}, (16,))",
        "{} * torch.rsqrt({}.pow(2).mean(-1, keepdim=True) + 1e-5) * self.g",
    ).replace("{}", res.name)
    d.add(f"{res.name} = {added}", res, hidden=True)
    d.add(f"{h.name} = {normed}", h)
    if d.chance(0.8):
        d.values.append(res)
    return True


@move(3)
def collective(d: Draft) -> bool:
    """Other collectives, in place on what is not the program's own, waited for late or never."""
    v = d.rows()
    if v is None or not d.distributed:
        return False
    y = d.new(v.shape)
    kind = d.draw.randrange(5)
    if kind == 0:
        c = d.value(lambda v: v.writable and v.contiguous and len(v.shape) > 0)
        return c is not None and d.add(f"dist.all_reduce({c.name})\n{c.name}.mul_(0.5)")
    if kind == 1:
        late = d.new(v.shape)
        d.add(f"{y.name} = torch.ops._c10d_functional.all_reduce({v.name} * 1, 'sum', GROUP)", y, hidden=True)
        between = d.draw.choice([write, arithmetic_between, engine_op])
        between(d)
        return d.add(f"{late.name} = torch.ops._c10d_functional.wait_tensor({y.name})", late)
    if kind == 2:
        d.returned.append(f"('unwaited', {y.name})")
        return d.add(f"{y.name} = torch.ops._c10d_functional.all_reduce({v.name} * 1, 'sum', GROUP)", y, hidden=True)
    if kind == 3:
        return d.add(f"{y.name} = fc.broadcast({v.name} * 1, 0, dist.group.WORLD)", y)
    gathered = d.new(v.shape)
    return d.add(
        f"{gathered.name} = fc.all_gather_tensor({v.name}.contiguous(), 0, dist.group.WORLD)[: {v.name}.shape[0]]",
        gathered,
    )


def arithmetic_between(d: Draft) -> bool:
    v = d.rows()
    if v is None:
        return False
    made: Value = d.new(v.shape)
    return d.add(f"{made.name} = torch.cos({v.name})", made)
