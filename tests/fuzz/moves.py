"""Moves that make values: views, arithmetic, reads of caches, random numbers, sizes."""

from __future__ import annotations

from .draft import Draft, move
from .program import Value


@move(14)
def view(d: Draft) -> bool:
    v = d.value(lambda v: len(v.shape) > 0)
    if v is None:
        return False
    first, rest = v.shape[0], v.shape[1:]
    options: list[tuple[str, Value]] = []

    def offer(text: str, shape: tuple[str, ...], *, contiguous: bool = True) -> None:
        options.append((text.format(v.name), d.new(shape, of=v, contiguous=contiguous)))

    if first.isdigit() and int(first) > 3:
        size = int(first)
        a = d.draw.randrange(size - 2)
        b = d.draw.randrange(a + 1, size)
        offer(f"{{}}[{a}:{b}]", (str(b - a), *rest))
        offer("{}[::2]", (str((size + 1) // 2), *rest), contiguous=False)
        if first == "8":
            offer("{}[:n]", ("n", *rest))
            offer("{}[k : k + n]", ("n", *rest))
            offer("{}[n:]", ("8-n", *rest))
    if not first.isdigit() and first == "n":
        offer("{}[:1]", ("1", *rest))
        offer("{}[n // 2 :]", ("n-n//2", *rest))
    offer("{}[0]", rest)
    offer("{}[-1]", rest)
    offer("{}.unsqueeze(0)", ("1", *v.shape))
    offer("{}[...]", v.shape)
    if rest and rest[-1] == "16":
        offer("{}[..., :8]", (first, *rest[:-1], "8"), contiguous=False)
        offer("{}[..., 4:12]", (first, *rest[:-1], "8"), contiguous=False)
        if v.contiguous:
            offer("{}.view(*{}.shape[:-1], 2, 8)".replace("{}", v.name), (first, *rest[:-1], "2", "8"))
    if len(v.shape) == 2:
        offer("{}.t()", (rest[0], first), contiguous=False)
        if v.contiguous:
            offer("{}.view(-1)", (f"({first})*{rest[0]}",))
        offer("{}.diagonal()", ("diagonal",), contiguous=False) if first == "8" else None
    if len(v.shape) == 3:
        offer("{}.transpose(0, 1)", (rest[0], first, *rest[1:]), contiguous=False)
    text, value = d.draw.choice(options)
    return d.add(f"{value.name} = {text}", value)


@move(4)
def several_views(d: Draft) -> bool:
    v = d.value(lambda v: len(v.shape) > 1 and v.shape[-1] == "16")
    if v is None:
        return False
    halves = [d.new((*v.shape[:-1], "8"), of=v, contiguous=False) for _ in range(2)]
    how = d.one("split(8, -1)", "chunk(2, -1)", "tensor_split(2, -1)")
    if v.shape[0] == "2":
        halves, how = [d.new(v.shape[1:], of=v) for _ in range(2)], "unbind(0)"
    return d.add(f"{halves[0].name}, {halves[1].name} = {v.name}.{how}", *halves)


@move(10)
def arithmetic(d: Draft) -> bool:
    v = d.value()
    if v is None:
        return False
    other = d.alike(v.shape)
    made = d.new(v.shape)
    text = d.one(
        "torch.sin({})",
        "torch.tanh({})",
        "{} * 0.5",
        "{} + 1",
        "-{}",
        "{}.clone()",
        "{} + 0.0",
        "{} * 1",
        "{} * s",
        "{} * k",
        "{} + n",
        *["{} + other"] * 4,
        *["{} - other"] * 2,
        "torch.tanh({} * other)",
        "torch.where({} > 0, {}, other)" if v.name in d.inputs else "{} + other",
    )
    if other is None and "other" in text:
        return False
    return d.add(f"{made.name} = {text.replace('{}', v.name).replace('other', other or '')}", made)


@move(5)
def matmul(d: Draft) -> bool:
    v = d.value(lambda v: len(v.shape) == 2 and v.shape[1] == "16")
    if v is None:
        return False
    made = d.new(v.shape)
    return d.add(
        f"{made.name} = {d.one('torch.tanh({} @ self.w)', '{} @ self.w', 'F.linear({}, self.w)')}".format(v.name), made
    )


@move(5)
def attention(d: Draft) -> bool:
    v, c = d.rows(), d.value(lambda v: len(v.shape) == 2 and v.shape[1] == "16")
    if v is None or c is None:
        return False
    made = d.new(v.shape)
    return d.add(f"{made.name} = torch.softmax({v.name} @ {c.name}.t(), -1) @ {c.name}", made)


@move(8)
def reduction(d: Draft) -> bool:
    v = d.value(lambda v: len(v.shape) > 0 and v.shape[0] != "8-n")
    if v is None:
        return False
    text, shape = d.draw.choice(
        [
            ("torch.tanh({}.sum(0))", v.shape[1:]),
            ("{}.mean(0)", v.shape[1:]),
            ("torch.tanh({}.sum())", ()),
            ("{}.mean()", ()),
            ("{}.amax(0)", v.shape[1:]),
            ("{}.mean(-1)", v.shape[:-1]),
        ]
    )
    made = d.new(shape)
    return d.add(f"{made.name} = {text.format(v.name)}", made)


@move(8)
def into_rows(d: Draft) -> bool:
    """Let any value flow into an activation."""
    v, read = d.rows(), d.value()
    if v is None or read is None:
        return False
    made = d.new(v.shape)
    return d.add(f"{made.name} = {v.name} + torch.tanh({read.name}.sum())", made)


@move(5)
def read_positions(d: Draft) -> bool:
    c = d.value(lambda v: v.shape == ("8", "16"))
    if c is None:
        return False
    made = d.new(("n", "16"))
    text = d.one(
        "{}[pos]", "{}.index_select(0, pos)", "torch.gather({}, 0, pos[:, None].expand(-1, 16))", "F.embedding(pos, {})"
    )
    return d.add(f"{made.name} = {text.format(c.name)}", made)


@move(4)
def norm(d: Draft) -> bool:
    v = d.value(lambda v: len(v.shape) > 0 and v.shape[-1] == "16")
    if v is None:
        return False
    made = d.new(v.shape)
    text = d.one(
        "F.rms_norm({}, (16,), self.g, 1e-5)",
        "F.layer_norm({}, (16,))",
        "torch.softmax({}, -1)",
        "F.gelu({})",
        "F.silu({})",
    )
    return d.add(f"{made.name} = {text.format(v.name)}", made)


@move(4)
def joined(d: Draft) -> bool:
    """A size that is a sum: prefill and decode, a cache and what is appended to it."""
    a, b = d.rows(), d.rows()
    if a is None or b is None:
        return False
    made = d.new((f"{a.shape[0]}+{b.shape[0]}", "16"))
    if len(made.shape[0]) > 9:
        return False
    d.add(f"{made.name} = torch.cat([{a.name}, {b.name}])", made)
    if d.chance(0.5):
        rows, ramp = d.new(made.shape), f"0.1 * torch.arange({made.name}.shape[0], device=x.device)"
        d.add(
            f"{rows.name} = {made.name} + ({ramp}).to(x.dtype)[:, None]",
            rows,
        )
    return True


@move(3)
def past_and_one(d: Draft) -> bool:
    """A mask one longer than what is cached."""
    v = d.rows()
    if v is None:
        return False
    mask = "0.01 * torch.arange(p + 1, device=x.device).to(x.dtype)"
    keys, made = d.new(("p+1", "16")), d.new(v.shape)
    return d.add(
        f"{keys.name} = torch.cat([past, {v.name}[-1:]])\n"
        f"{made.name} = torch.softmax({v.name} @ {keys.name}.t() - {mask}, -1) @ {keys.name}",
        keys,
        made,
    )


@move(3)
def from_sizes(d: Draft) -> bool:
    made = d.new(("n", "16"))
    text = d.one(
        "x.new_zeros(n, 16) + n",
        "torch.full((n, 16), 0.5, dtype=x.dtype, device=x.device)",
        "x.new_ones(n, 16) * k",
        "torch.arange(n, device=x.device).to(x.dtype)[:, None].expand(n, 16) + 0",
        "torch.ones_like(x) * (n + k)",
    )
    return d.add(f"{made.name} = {text}", made)


@move(2)
def masked(d: Draft) -> bool:
    v = d.value(lambda v: v.shape == ("n", "16"))
    if v is None:
        return False
    made = d.new(v.shape)
    return d.add(
        f"{made.name} = {d.one('torch.where(mask[:, None], {0}, 0.5)', '{0}.masked_fill(mask[:, None], 0.0)')}".format(
            v.name
        ),
        made,
    )


@move(3)
def random_numbers(d: Draft) -> bool:
    v = d.value(lambda v: len(v.shape) > 1 and v.shape[0] != "8-n")
    if v is None:
        return False
    made = d.random_value(d.new(v.shape))
    text = d.one(
        "torch.rand_like({})",
        "F.dropout({}, 0.5, True)",
        "torch.empty_like({}).exponential_(1)",
        "torch.randn_like({})",
        "torch.randn({}.shape, device=x.device, dtype=x.dtype)",
        "torch.rand_like({}) + {}",
        "torch.randint(0, 5, {}.shape, device=x.device).to(x.dtype)",
        "torch.bernoulli(torch.sigmoid({}))",
        "torch.empty_like({}).uniform_(-1, 1)",
        "{}[torch.randperm({}.shape[0], device=x.device)]",
    )
    if made.random:
        d.returned.append(f"('random', {made.name})")
    return d.add(f"{made.name} = {text.replace('{}', v.name)}", made)


@move(2)
def pure_ops(d: Draft) -> bool:
    v = d.rows()
    if v is None:
        return False
    if d.chance(0.3):
        one, two = d.new(v.shape), d.new(("16",))
        return d.add(f"{one.name}, {two.name} = torch.ops.fz.pair({v.name})", one, two)
    if d.chance(0.2):
        made = d.new(("n-1", "16"))
        return d.add(f"{made.name} = torch.ops.fz.head(x, n - 1)", made)
    made = d.new(v.shape)
    return d.add(f"{made.name} = torch.ops.fz.{d.one('pure', 'pure', 'pure_unsafe', 'peek_unsafe')}({v.name})", made)


@move(3)
def host_values(d: Draft) -> bool:
    """Tensors of the host's beside the device's: computed there, copied over, read as a scalar, returned."""
    v = d.tokens()
    if v is None:
        return False
    made = d.new(v.shape)
    kind = d.draw.randrange(6)
    if kind == 0:
        d.returned.append(d.one("lens + 1", "torch.cumsum(lens + 1, 0)", "lens.max() - lens", "(lens % 8).sort()[0]"))
        return True
    if kind == 1:
        return d.add("lens.add_(1)")
    if kind == 2:
        text = f"{v.name} + (torch.cumsum(lens, 0) % 7).to(x.device).to(x.dtype)[:, None]"
    elif kind == 3:
        text = f"{v.name} + (lens.max() % 5)"
    elif kind == 4:
        text = f"{v.name} + ({v.name}.cpu() * 0.5 + 1).to(x.device)"
    else:
        text = f"{v.name} * (lens % 3)[0]"
    return d.add(f"{made.name} = {text}", made)
