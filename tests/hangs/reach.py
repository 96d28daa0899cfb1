"""Which rows of the hazard table can a run of ours reach, and what comes of it? Computed from the product's own code.

Every situation that the product can build is built by the product: ``choose`` is asked about worlds of every
kind, ``situation_of`` puts its answer into the table's words, and the judge judges graphs that hold what a hazard
may rest on. Releases, capabilities and world sizes are those at which some row begins or ends: between two of them
nothing changes.

    python tests/hangs/reach.py        writes runtime/hazards/reached.py; test_reach.py fails when that is stale
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from unsafe_ops import unregistered, with_host_epoch

import ringfence
from ringfence.compile_passes.facts import facts_of
from ringfence.compile_passes.fuse import SITE
from ringfence.compile_passes.judge import Decision, Verdict
from ringfence.compile_passes.moe_calls import is_moe, misuses
from ringfence.compile_passes.parts import cut
from ringfence.compile_passes.roles import c10d
from ringfence.runtime.collectives import moe_one_sided, moe_ready
from ringfence.runtime.collectives.choice import choose
from ringfence.runtime.collectives.flashinfer import SUPPORTED
from ringfence.runtime.collectives.links import Links
from ringfence.runtime.collectives.rank_facts import RankFacts
from ringfence.runtime.collectives.ready import situation_of
from ringfence.runtime.collectives.size_table import TABLE
from ringfence.runtime.errors import CollectiveUnavailableError, HazardError
from ringfence.runtime.hazards.catalogue import applicable
from ringfence.runtime.hazards.situation import Collective, Fact, Situation, facts_of_nccl
from ringfence.runtime.hazards.table import HAZARDS, Action, Hazard
from ringfence.runtime.versions import in_range, parse_version
from support import aot_graph, fuse_graph, judge, start_fake_group

#: Row -> collective -> option on_hazard, or "choice" -> what comes of it.
Reached = dict[str, dict[str, dict[str, str]]]

H = 16
ON_HAZARD = ("split", "refuse", "raise", "clean")
DTYPES = ("bfloat16", "float16", "float32")
NCCL_VERSIONS = (None, "2.27.5", "2.28.9", "2.29.7", "2.30.4", "2.30.7", "2.31.2")
_WHENS = [when for hazard in HAZARDS for when in hazard.when]
_ENDS = {end for when in _WHENS for end in (when.low, when.high) if end}
RELEASES = sorted({v for v in (*_ENDS, SUPPORTED[0], "0.7.99") if in_range(v, *SUPPORTED)}, key=parse_version)
CAPABILITIES = sorted({(8, 0), *(c for w in _WHENS for c in w.capabilities), *(row.capability for row in TABLE)})
LINKS = (Links("gpu", switch=18, fabric="a fabric"), Links("gpu"))  # an NVSwitch, or PCIe
WORLD_SIZES = sorted({3, *(n for w in _WHENS for n in w.world_sizes), *(row.world_size for row in TABLE)})


@contextlib.contextmanager
def instead_of(function: Callable[..., Any], other: Callable[..., Any]) -> Iterator[None]:
    """In every module of the product that imported it."""
    name = function.__name__
    homes = [m for n, m in list(sys.modules.items()) if n.startswith("ringfence.") and vars(m).get(name) is function]
    assert homes
    for home in homes:
        setattr(home, name, other)
    try:
        yield
    finally:
        for home in homes:
            setattr(home, name, function)


# -- situations --------------------------------------------------------------------------


def worlds() -> Iterator[list[RankFacts]]:
    """The facts of all ranks, of every kind of machine on which all ranks are alike."""
    kinds = itertools.product(RELEASES, CAPABILITIES, WORLD_SIZES, (1, 2), (True, False), (True, False), LINKS)
    for version, capability, size, nodes, multicast, peers, links in kinds:
        rank = RankFacts("host0", "a device", capability, 132, version, None, (), multicast, peers, links)
        yield [replace(rank, host=f"host{i % nodes}") for i in range(size)]


@functools.cache
def chosen_situations() -> tuple[set[Situation], set[Situation]]:
    """What the judge is told of whoever was chosen; and what the choice itself asked about candidates."""
    asked: set[Situation] = set()

    def asks(situation: Situation) -> tuple[Hazard, ...]:
        asked.add(situation)
        return applicable(situation)

    found: set[Situation] = set()
    wanted = (("auto", "auto"), ("reference", "auto"), ("trtllm", "auto"), ("mnnvl", "multicast"), ("mnnvl", "peer"))
    with instead_of(applicable, asks):
        for ranks, (name, way), certain, dtype in itertools.product(worlds(), wanted, (True, False), DTYPES[:2]):
            try:
                choice = choose(ranks, wanted=name, transport=way, deterministic=certain, dtype=dtype)
            except CollectiveUnavailableError:
                continue
            served = (choice.row.one_shot, choice.row.fused) if choice.row is not None else (None,)
            for sizes, part, largest in itertools.product(((), (4,), (4, 8)), (True, False), served):
                given: dict[str, Any] = {"sizes": sizes, "part_of_world": part, "largest": largest}
                found.add(situation_of(choice, ranks, dtype=dtype, **given))
    return found, asked


def judged_situations(chosen: Iterable[Situation]) -> tuple[set[Situation], set[Situation]]:
    """With what the judge adds, for fused sites; and those of NCCL, which a group's other all-reduces go over."""
    facts = plan_facts()
    sites: set[Situation] = set()
    nccl: set[Situation] = set()
    for situation, capture, dtype in itertools.product(chosen, (True, False), DTYPES):  # of the site, not of most
        mine = replace(situation, capture=capture, dtype=dtype)
        sites |= {mine, *(replace(mine, facts=mine.facts | {fact}) for fact in facts if capture)}
        other = replace(mine, collective=Collective.NCCL, flashinfer=None)
        nccl |= {replace(other, facts=facts_of_nccl(version)) for version in NCCL_VERSIONS}
    return sites, nccl


@functools.cache
def all_judged() -> tuple[set[Situation], set[Situation]]:
    """Of all that is chosen."""
    return judged_situations(chosen_situations()[0])


@functools.cache
def moe_situations() -> set[Situation]:
    """What the judge is told of dispatches and combines, with what it finds in graphs of careless people."""
    facts: set[Fact] = set()
    for fn in (outliving, unanswered, in_turn):
        gm = aot_graph(fn, torch.randn(4, H), torch.zeros(4, 2, dtype=torch.int64))
        if fn is in_turn:
            next(n for n in gm.graph.nodes if is_moe(n)).meta["custom"] = {"stream": 1}
        facts |= {fact for _, fact, _ in misuses(gm)}
    found = set()
    for ranks, part, capture in itertools.product(worlds(), (True, False), (True, False)):
        if moe_one_sided.unfit(ranks) is None:
            mine = replace(moe_ready.situation_of(ranks, part_of_world=part), capture=capture)
            found |= {mine, *(replace(mine, facts=mine.facts | {fact}) for fact in facts)}
    return found


def pair(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What a combine returns, and what it was given."""
    sent = ringfence.moe.dispatch([x], ids, capacity=8, num_experts=4)
    return ringfence.moe.combine(sent.payloads[0], sent.route), sent.payloads[0]


def outliving(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return pair(x, ids)


def in_turn(x: Tensor, ids: Tensor) -> Tensor:
    return pair(pair(x, ids)[0], ids)[0]


def unanswered(x: Tensor, ids: Tensor) -> Tensor:
    first, second = (ringfence.moe.dispatch([y], ids, capacity=8, num_experts=4) for y in (x, x.sin()))
    return ringfence.moe.combine(first.payloads[0], first.route) + ringfence.moe.combine(
        second.payloads[0], second.route
    )


# -- facts of a plan ---------------------------------------------------------------------


def layer(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    summed = c10d.wait_tensor(c10d.all_reduce(x, "sum", "0")) + residual
    return F.rms_norm(summed, (H,), None, 1e-6), summed


def fused(fn: Callable[..., object], dtype: torch.dtype = torch.float32) -> GraphModule:
    gm = aot_graph(fn, *torch.randn(2, 4, H).to(dtype))
    fuse_graph(gm)
    return gm


def graphs() -> dict[str, tuple[GraphModule, tuple[str, ...]]]:
    """Graphs with all that :func:`facts_of` looks for, and the nodes at which somebody careless cuts them."""

    def branching(x: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        x, r = layer(x, r)
        return layer(torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t - 1, (x,)), r)

    streams = fused(lambda x, r: layer(*layer(x, r)))
    next(n for n in streams.graph.nodes if SITE in n.meta).meta["custom"] = {"stream": 1}
    halves = fused(lambda x, r: layer(x.sin(), r.exp()))
    (op,) = [n for n in halves.graph.nodes if SITE in n.meta]
    names = {str(n.target): n for n in halves.graph.nodes}
    names["aten.sin.default"].meta[SITE] = op.meta[SITE]  # as if a call had two launches, which none of ours has
    with FakeTensorMode():
        copy = make_fx(lambda x: x.exp().cpu())(torch.empty(4, H, device="cuda"))
    return {
        "data decides": (fused(branching), ()),
        "copy to the host": (copy, ()),
        "unregistered": (fused(lambda x, r: layer(unregistered(x), r)), ()),
        "epoch of the host": (fused(lambda x, r: layer(with_host_epoch(x, 7), r)), ()),
        "two streams": (streams, ()),
        "two launches": (halves, (names["aten.exp.default"].name,)),
    }


def careless_facts() -> set[Fact]:
    """What is found in plans that are cut without the judge."""
    found = set()
    for gm, eager in graphs().values():
        verdicts = [Verdict(name, name, Decision.SPLIT, "mine", "", "") for name in eager]
        found |= {e.fact for e in facts_of(gm, cut(gm, verdicts))}
    return found


@functools.cache
def plan_facts() -> set[Fact]:
    """What is found in the judge's own plans of the same graphs, where each call has one launch."""
    found = set()
    for name, (gm, _) in graphs().items():
        if name != "two launches":
            verdicts = judge(gm, backends={"0": "nccl"}, capture=True)
            found |= {e.fact for e in facts_of(gm, cut(gm, verdicts))}
    return found


# -- outcomes ----------------------------------------------------------------------------


def outcome(gm: GraphModule, row: Hazard, on_hazard: str, **situation: Any) -> str:
    """What the judge makes of this row alone."""
    with instead_of(applicable, lambda _: (row,)):
        try:
            verdict, *_ = judge(gm, backends={"0": "nccl", "world": "nccl"}, on_hazard=on_hazard, **situation)
        except HazardError as error:
            return type(error).__name__
    return f"{verdict.decision}, cleaned" if verdict.clean else str(verdict.decision)


def reached() -> Reached:
    """Computed anew. Needs a process group."""
    table: defaultdict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    _, asked = chosen_situations()
    sites, nccl = all_judged()
    layers = {name: fused(layer, getattr(torch, name)) for name in DTYPES}
    plain = aot_graph(lambda x: (c10d.wait_tensor(c10d.all_reduce(x, "sum", "0")),), torch.ones(4))
    for situation in sorted(asked, key=repr):
        for row in applicable(situation):
            if row.decides is Action.REFUSE:
                table[row.id].setdefault(situation.collective, {})["choice"] = "passed over"
    moe = aot_graph(in_turn, torch.randn(4, H), torch.zeros(4, 2, dtype=torch.int64))
    for kind, situations in (("situation", sites), ("nccl", nccl), ("moe", moe_situations())):
        tried = set()
        for situation in sorted(situations, key=repr):
            for row in applicable(situation):
                when = next(w for w in row.when if w.holds(situation))
                if (key := (row.id, situation.collective, when, situation.strategy, situation.capture)) in tried:
                    continue
                tried.add(key)
                outcomes = table[row.id].setdefault(situation.collective, {})
                gm = layers[str(situation.dtype)] if kind == "situation" else {"nccl": plain, "moe": moe}[kind]
                for option in ON_HAZARD:
                    new = outcome(gm, row, option, capture=situation.capture, **{kind: situation})
                    outcomes[option] = " or ".join(sorted({new, *outcomes.get(option, new).split(" or ")}))
    return {row.id: {str(c): table[row.id][c] for c in sorted(table[row.id])} for row in HAZARDS if row.id in table}


def source(table: Reached) -> str:
    """runtime/hazards/reached.py."""
    lines = [
        '"""Generated by tests/hangs/reach.py: which rows a run can reach, and what comes of it (docs/hazards.md)."""',
        "",
    ]
    lines += ["from __future__ import annotations", "", "from collections.abc import Mapping", ""]
    lines += ['#: Row -> collective -> value of the option on_hazard, or "choice" -> what comes of it.']
    lines += ["REACHED: Mapping[str, Mapping[str, Mapping[str, str]]] = {"]
    for id, by in table.items():
        lines.append(f'    "{id}": {{')
        for collective, outcomes in by.items():
            pairs = ", ".join(f'"{option}": "{what}"' for option, what in outcomes.items())
            lines.append(f'        "{collective}": {{{pairs}}},')
        lines.append("    },")
    return "\n".join([*lines, "}", ""])


if __name__ == "__main__":
    start_fake_group(2)
    Path("runtime/hazards/reached.py").write_text(source(reached()))
    dist.destroy_process_group()
