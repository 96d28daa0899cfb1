"""The smallest program, and the plainest setting, that still fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from .check import Setting
from .program import Program

Fails = Callable[[Program, Setting], bool]


def shrink(program: Program, setting: Setting, fails: Fails, *, seconds: float = 60) -> tuple[Program, Setting]:
    """Drop and simplify while ``fails`` holds, until nothing more can go or the time is over."""
    end = time.monotonic() + seconds
    again = True
    while again and time.monotonic() < end:
        again = False
        for smaller in _smaller(program, setting):
            if time.monotonic() > end:
                break
            if fails(*smaller):
                program, setting = smaller
                again = True
                break
    return program, setting


def _smaller(program: Program, setting: Setting) -> Iterator[tuple[Program, Setting]]:
    for statement in reversed(program.statements):
        if (without := program.without(statement)).returns:
            yield without.pruned(), setting
    for i in range(len(program.returns)):
        if len(program.returns) > 1:
            yield replace(program, returns=program.returns[:i] + program.returns[i + 1 :]).pruned(), setting
    yield from ((program, s) for s in _plainer(setting))
    values = {v.name: v for s in program.statements for v in s.defines}
    for statement in program.statements:  # the value that a statement makes is replaced by an earlier one
        for made in statement.defines:
            alike = [v for v in values.values() if v.shape == made.shape and int(v.name[1:]) < int(made.name[1:])]
            for other in [v.name for v in alike[:2]] + (["x"] if made.shape == ("n", "16") else []):
                if len(statement.defines) == 1:
                    yield program.substituted(made.name, other).without(statement).pruned(), setting


def _plainer(setting: Setting) -> Iterator[Setting]:
    plan, options = setting.plan, setting.options
    for name in list(options):
        if name not in ("piece_compiler", "graphs", "on_capture_failure"):
            rest = {k: v for k, v in options.items() if k != name}
            if name == "capture_sizes":
                rest = {k: v for k, v in rest.items() if k not in ("graphs", "on_capture_failure", "static_outputs")}
            yield replace(setting, options=rest)
    for op in options.get("split_ops", []):
        yield replace(setting, options={**options, "split_ops": [o for o in options["split_ops"] if o != op]})
    if len(plan.steps) > 1:
        for i in range(len(plan.steps)):
            yield replace(setting, plan=replace(plan, steps=plan.steps[:i] + plan.steps[i + 1 :]))
        if len(set(plan.steps)) > 1:
            yield replace(setting, plan=replace(plan, steps=(plan.steps[0],) * len(plan.steps)))
    for name in ("alternate", "feed", "mark_static", "mark_dynamic", "inference_mode"):
        if getattr(plan, name):
            yield replace(setting, plan=replace(plan, **{name: False}))
    if setting.dynamic is not False:
        yield replace(setting, dynamic=False)
    if not setting.functionalize_v2:
        yield replace(setting, functionalize_v2=True)
    if setting.group not in (None, "ranks"):
        yield replace(setting, group=None)
