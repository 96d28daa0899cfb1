"""Programs that were wrong once, each with the setting that showed it."""

from __future__ import annotations

from dataclasses import dataclass

from .check import Setting
from .play import Plan
from .program import Program, parse

_CAPTURED = {"capture_sizes": [2, 3, 4], "graphs": "simulated", "on_capture_failure": "raise"}
_EAGER = {"piece_compiler": "eager", **_CAPTURED}
_STEPS = ((3, 2, 3), (3, 2, 3), (2, 1, 1), (3, 2, 3))


@dataclass(frozen=True)
class Regression:
    program: Program
    setting: Setting


REGRESSIONS = {
    "an op that writes and returns two values": Regression(
        parse(
            {"x": "float32[n,16]", "c0": "keep float32[8,16]"},
            """
v1 = c0.sum(0)
v2, v3 = torch.ops.fz.tally_unsafe(x, c0)
v4, v5 = torch.ops.fz.tally(v2, c0[:4])
v6 = v4 * v3 + v1 + c0.sum(0) * v5
""",
            "v6, v3",
        ),
        Setting(Plan(_STEPS), dynamic=True, group=None, options=_EAGER),
    ),
    "view of an input is an output": Regression(
        parse(
            {"pos": "positions[n]", "caches": "keep list float32[8,16]"},
            """
v1 = F.embedding(pos, caches[0])
v2, v3 = caches[1].chunk(2, -1)
""",
            "v2",
        ),
        Setting(Plan(_STEPS), dynamic=True, group=None, options=_EAGER),
    ),
    "tag of an op that writes a list": Regression(
        parse(
            {"r": "float32[n,16]", "caches": "keep list float32[8,16]"},
            """
v1 = torch.cat([self.last[None], r[:-1]])
self.last.copy_(r[-1])
torch.ops.fz.many_unsafe(r, [caches[1]])
""",
            "v1",
            {"last": "keep float32[16]"},
        ),
        Setting(Plan(_STEPS), dynamic=None, group=None, options=_EAGER),
    ),
    "old state is read after the write": Regression(
        parse(
            {"x": "float32[n,16]", "c0": "keep float32[8,16]"},
            """
v1 = c0.clone()
c0.index_copy_(0, torch.arange(x.shape[0]), x)
v2 = x @ self.w
dist.all_reduce(v2)
v3 = x + v2
v4 = F.rms_norm(v3, (16,), self.g, 1e-5) + v1.mean(0)
""",
            "v4, v3",
            {"w": "weight float32[16,16]", "g": "norm float32[16]"},
        ),
        Setting(Plan(_STEPS), dynamic=True, options={}),
    ),
    "a view whose size another op computes": Regression(
        parse(
            {"caches": "keep list float32[8,16]", "x": "float32[n,16]", "r": "float32[n,16]"},
            """
n = x.shape[0]
v2 = torch.cat([x, r])
v5 = torch.ops.fz.maybe(x, caches[1])
v8 = torch.ops.fz.exchange_unsafe(torch.sin(caches[1][:, :8]), caches[0][:, :8])
v11 = v5[n // 2 :]
""",
            "v11, v8",
        ),
        Setting(Plan(_STEPS), dynamic=True, group=None, functionalize_v2=False, options=_EAGER),
    ),
    "a view of a slice of everything": Regression(
        parse(
            {"y": "float32[m,16]", "caches": "keep list float32[8,16]"},
            """
v3 = caches[1] + caches[0] * 0.5
v5 = fc.all_gather_tensor(y.contiguous(), 0, dist.group.WORLD)[: y.shape[0]]
v7 = v5[-1]
self.stack[...] = torch.sin(v3)
""",
            "v7",
            {"stack": "keep float32[2,8,16]"},
        ),
        Setting(Plan(_STEPS[:2]), dynamic=False, group="fake 1", options=_CAPTURED),
    ),
    "a written input comes where another one was": Regression(
        parse({"x": "float32[n,16]"}, "x.mul_(0.5)", "x + 1"),
        Setting(Plan(((4, 1, 1),) * 8), dynamic=False, group=None, options=_EAGER),
    ),
    "a returned view starts at a size": Regression(
        parse({"x": "float32[n,16]", "r": "float32[n,16]"}, "n = x.shape[0]\nv10 = r[n // 2 :]", "v10"),
        Setting(Plan(_STEPS), dynamic=True, group=None, options=_EAGER),
    ),
    "a returned view of what was written starts at a size": Regression(
        parse({"x": "float32[n,16]", "c1": "keep float32[8,16]"}, "n = x.shape[0]\nc1.mul_(0.5)\nv1 = c1[n:]", "v1"),
        Setting(Plan(_STEPS), dynamic=True, group=None, options={"piece_compiler": "eager"}),
    ),
    **{
        f"a returned view of what {where} wrote behind the part that made it": Regression(
            parse(
                {"c1": "keep float32[8,16]", "kv": "keep float32[2,8,16]", "x": "float32[n,16]"},
                f"v3 = torch.tanh(kv.sum(0))\nv4 = torch.sin(v3) + 1\nv17 = v3{view}\n"
                f"v22 = torch.ops.fz.exchange{op}(torch.sin(c1[2:6]), v3[2:6])",
                "v17, v22, v4, x + 1",
            ),
            Setting(Plan(_STEPS), dynamic=True, group=None, options={**_EAGER, "split_ops": ["aten::tanh"]}),
        )
        for where, op, view in (
            ("a piece", "", ".view(-1)"),
            ("an island", "_unsafe", ".view(-1)"),
            ("a slice", "", "[x.shape[0] :]"),
        )
    },
    "an output is fed back, and a view of it is held": Regression(
        parse(
            {"x": "float32[n,16]", "y": "float32[m,16]"},
            "v5 = torch.sin(x)\nv7 = torch.ops.fz.pure(y)\nx.copy_(v5 * 0.5)",
            "v5, v5[:], v7",
        ),
        Setting(Plan(_STEPS, feed=True), dynamic=None, group=None, options={**_EAGER, "split_ops": ["fz::pure"]}),
    ),
    **{
        f"a later part of {call} is written": Regression(
            parse(
                {"c0": "keep float32[8,16]", "past": "float32[p,16]"},
                f"a, b = c0.{call}\nd = b.detach()\nb.mul_(0.5)\ne = d + 1",
                "past * 2, e, c0 + 1",
            ),
            Setting(Plan(_STEPS), dynamic=True, group=None, options={"piece_compiler": "eager"}),
        )
        for call in (
            "split(4)",
            "split((3, 5))",
            "chunk(2)",
            "tensor_split(2)",
            "tensor_split((3,))",
            "split_with_sizes((5, 3))",
            "view(2, 4, 16).unbind(0)",
            "split(8, 1)",
            "hsplit(2)",
            "unflatten(0, (2, 4)).unbind(0)",
        )
    },
    "an op writes a list of views of what it was given a value of": Regression(
        parse(
            {
                "c0": "keep float32[8,16]",
                "caches": "keep list float32[8,16]",
                "pos": "positions[n]",
                "r": "float32[n,16]",
            },
            """
v1 = torch.gather(caches[0], 0, pos[:, None].expand(-1, 16))
torch.ops.fz.many(v1, [caches[0][:4], caches[0][4:]])
v4 = torch.ops.fz.two(v1, caches[0], c0)
""",
            "v4, r + 1",
        ),
        Setting(Plan(_STEPS), dynamic=True, group=None, options=_CAPTURED),
    ),
    "ops write what they were given values of, and the values are read later": Regression(
        parse(
            {"c0": "keep float32[8,16]", "caches": "keep list float32[8,16]", "kv": "keep float32[2,8,16]"},
            """
v1 = torch.sin(c0[:4])
torch.ops.fz.append(c0, v1, torch.arange(4))
v2 = torch.sin(caches[0][:4])
v3 = torch.ops.fz.exchange(v2, caches[0][:4])
v4 = caches[1] * 2
v5 = torch.empty_like(v4)
torch.ops.fz.attn(v4, caches[1], v5)
v6 = torch.sin(kv[0, :4])
torch.ops.fz.many(v6, [kv[0, :4], kv[1]])
""",
            "v1 + 1, v2 + 1, v3, v4 + 1, v5, v6 + 1",
        ),
        Setting(Plan(_STEPS), dynamic=False, group=None, options={}),
    ),
    "a view of what was computed before a write is returned": Regression(  # wrong with torch 2.11, right with 2.13
        parse(
            {"x": "float32[n,16]", "caches": "keep list float32[8,16]"},
            """
self.buffer.copy_(torch.sin(caches[0]))
v1 = torch.empty_like(caches[0])
v1.copy_(caches[0] * 0.5)
v12 = v1[..., 4:12]
caches[0].select(0, 1).copy_(x[-1])
""",
            "v12",
            {"buffer": "keep float32[8,16]"},
        ),
        Setting(Plan(_STEPS), dynamic=False, group=None, fallback_random=False, options={}),
    ),
    **{
        f"a static output is fed back beside {beside}": Regression(
            parse(inputs, body, returns, buffers),
            Setting(Plan(steps, feed=True), dynamic=dynamic, group=group, options=o),
        )
        for beside, dynamic, group, steps, inputs, body, returns, buffers, o in (
            (
                "an input that is loaded first",
                False,
                "gloo 1",
                ((2, 3, 1),) * 3,
                {"x": "float32[n,16]", "r": "float32[n,16]", "kv": "keep float32[2,8,16]"},
                """
v8 = torch.empty_like(r)
torch.ops.fz.attn_unsafe(r, kv[0], v8)
v23 = torch.sin(x)
dist.all_reduce(v23)
""",
                "v23[:],",
                {},
                {**_EAGER, "static_outputs": True, "split_ops": ["aten::sin"]},
            ),
            (
                "positions",
                False,
                "fake 2",
                ((4, 2, 3),) * 3,
                {"x": "float32[n,16]", "pos": "positions[n]", "caches": "keep list float32[8,16]"},
                "v4 = caches[1].index_select(0, pos) @ self.w\ndist.all_reduce(v4)\nv6 = F.rms_norm(x + v4, (16,))",
                "v6",
                {"w": "weight float32[16,16]"},
                {**_EAGER, "static_outputs": True, "fuse": False},
            ),
            (
                "inputs of another size",
                True,
                None,
                ((3, 1, 1), (2, 3, 3), (2, 3, 3), (3, 3, 2), (3, 1, 1)),
                {
                    "x": "float32[n,16]",
                    "r": "float32[n,16]",
                    "past": "float32[p,16]",
                    "caches": "keep list float32[8,16]",
                },
                """
v1 = torch.zeros_like(r)
torch.ops.fz.attn_unsafe(r, caches[0], v1)
v3 = torch.softmax(past @ caches[1].t(), -1) @ caches[1]
v5 = v1 + torch.tanh(v1.sum())
v6 = torch.empty_like(v1)
torch.ops.fz.attn(v1, caches[1], v6)
v7 = x + v6 * 0.5
""",
                "v7, v3, v5",
                {},
                {**_EAGER, "static_outputs": True, "split_ops": ["fz::attn"]},
            ),
        )
    },
    "compiled code that has no kernel of its own is captured": Regression(
        parse(
            {"past": "float32[p,16]", "caches": "keep list float32[8,16]"},
            """
v6 = fc.all_reduce(torch.sin(past), 'sum', dist.group.WORLD)
v9 = F.linear(caches[0], self.w)
v10 = F.linear(v9, self.w)
""",
            "v10",
            {"w": "weight float32[16,16]"},
        ),
        Setting(Plan(((5, 1, 2),) * 3), dynamic=False, group="fake 1", options={**_CAPTURED, "capture_sizes": [2, 5]}),
    ),
    **{
        f"{first} is written again {how}, and by an op": Regression(
            parse(
                {"c0": "keep float32[8,16]", "r": "float32[n,16]", "pos": "positions[n]"},
                f"{write}\n{again}\nv1 = torch.zeros_like(r)\ntorch.ops.fz.attn(r, c0, v1)",
                "v1, c0.sum()",
            ),
            Setting(Plan(_STEPS), dynamic=False, group=None, options={"piece_compiler": "eager"}),
        )
        for first, write, how, again in (
            ("what index_put wrote", "c0[pos] = r", "flat", "c0.view(-1)[:16] = r[0]"),
            ("what copy_ wrote", "c0[1] = r[0]", "transposed", "c0.t()[:, :2] = r[:2].t()"),
            ("what mul_ wrote", "c0.mul_(0.5)", "with its own", "c0.view(-1)[:16] = c0[1] + 1"),
            ("what append wrote", "torch.ops.fz.append(c0, r, pos)", "by permute", "c0.permute(1, 0)[2].add_(1)"),
            ("what mul_ wrote", "c0.mul_(0.5)", "times itself", "c0.view(-1).mul_(c0.view(-1))"),
        )
    },
    "inputs that share memory begin elsewhere in the next call": Regression(
        parse(
            {"x": "float32[n,16]", "c0": "keep gaps float32[8,16]", "c1": "= c0[:4]", "pos": "positions[n]"},
            "v1 = torch.tanh(c1 @ self.w)\nc0.index_fill_(0, pos, 0.5)",
            "v1, x * 2",
            {"w": "weight float32[16,16]"},
        ),
        Setting(Plan(_STEPS * 2, alternate=True), dynamic=True, group=None, options=_EAGER),
    ),
}
