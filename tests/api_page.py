"""docs/api.md, from the docstrings of what is public.

PYTHONPATH=tests python tests/api_page.py      writes the page; test_packaging.py fails when it is stale
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import ringfence
from ringfence.compile_passes.reasons import Reason
from ringfence.keywords import OptionKeywords

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"

HEAD = """# The Python API

Generated from docstrings: `PYTHONPATH=tests python tests/api_page.py`. What stands here is
`ringfence.__all__`: public, and kept as CONTRIBUTING.md says under "Versions". Programs that use it: `examples/`.
"""

#: Names by what they are for; every public name is in one of them.
SECTIONS: dict[str, tuple[str, ...]] = {
    "The backend": ("compile", "Backend", "Options", "AllReduceOp", "NormOp", "register_group", "close_workspaces"),
    "The report": (
        "CompileReport",
        "assert_fused",
        "Site",
        "MoeSite",
        "Decline",
        "Reason",
        "Rounding",
        "Piece",
        "Verdict",
        "Decision",
        "PlanVerdict",
    ),
    "Without a graph": ("prepare", "Prepared", "all_reduce_add_rms_norm", "all_reduce", "moe", "watch", "Watch"),
    "The passes, in their order": (
        "find",
        "Candidate",
        "Match",
        "size_rule",
        "SizeRule",
        "describe_groups",
        "Group",
        "Assignment",
        "written_inputs",
        "fuse",
        "judge",
        "cut",
        "GraphPart",
        "write_in_place",
        "split",
        "SplitPlan",
        "lower",
        "eager_piece",
        "inductor_piece",
        "Program",
        "Step",
        "PiecewiseRunner",
        "CudaGraphs",
        "SimulatedGraphs",
    ),
}


def page() -> str:
    """The page as it should be."""
    lines = [HEAD]
    listed = {name for names in SECTIONS.values() for name in names}
    others = [name for name in ringfence.__all__ if name not in listed]
    errors = [name for name in others if _is_error(getattr(ringfence, name))]
    sections = {**SECTIONS, "Others": tuple(name for name in others if name not in errors)}
    for title, names in sections.items():
        there = [name for name in names if name in ringfence.__all__]
        if there:
            lines += [f"## {title}\n", *(_entry(name, getattr(ringfence, name)) for name in there)]
    lines.append("## Errors and warnings\n")
    lines += ["| | is a | |", "| --- | --- | --- |", *(_error(getattr(ringfence, name)) for name in errors)]
    return "\n".join(lines) + "\n"


def _is_error(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, Exception)


def _error(error: type) -> str:
    bases = ", ".join(f"`{base.__name__}`" for base in error.__bases__)
    return f"| `{error.__name__}` | {bases} | {' '.join(_text(error).split())} |"


def _entry(name: str, value: Any) -> str:
    if inspect.ismodule(value):
        return "\n".join([f"### `{name}`\n", _module_text(value) + "\n", *_of_module(name, value)])
    lines = [f"### `{name}`\n", f"```python\n{_signature(name, value)}\n```\n", _text(value) + "\n"]
    if inspect.isclass(value) and not issubclass(value, str):
        lines += [_member(name, own, part) for own, part in _members(value)]
    elif value is Reason:
        lines.append("Codes: " + ", ".join(f"`{code}`" for code in Reason) + ".\n")
    return "\n".join(lines)


def _of_module(name: str, module: Any) -> list[str]:
    """What a module has itself, a line for each."""
    own = [(n, part) for n, part in vars(module).items() if getattr(part, "__module__", "") == module.__name__]
    public = [(n, part) for n, part in own if not n.startswith("_")]
    return [f"- `{name}.{n}{_parameters(p)}`: {textwrap.indent(_text(p), '  ').strip()}\n" for n, p in public]


def _module_text(module: Any) -> str:
    """Its docstring, where indented lines are code."""
    return re.sub(r"(?:^    .*\n)+", lambda m: f"```python\n{textwrap.dedent(m[0])}```\n", _text(module), flags=re.M)


def _members(value: type) -> list[tuple[str, Any]]:
    """Public methods and properties that the class has itself and that say what they are."""
    found = [(name, part) for name, part in vars(value).items() if not name.startswith("_")]
    return [(n, p) for n, p in found if isinstance(p, property | classmethod) or inspect.isfunction(p)]


def _member(owner: str, name: str, part: Any) -> str:
    function = part.fget if isinstance(part, property) else getattr(part, "__func__", part)
    said = textwrap.indent(_text(function), "  ").strip()
    shown = f"{owner}.{name}" if isinstance(part, property) else f"{owner}.{name}{_parameters(function, skip=1)}"
    return f"- `{shown}`" + (f": {said}" if said else "") + "\n"


def _signature(name: str, value: Any) -> str:
    if value is ringfence.Options:
        return f"class {name}(\n    *,\n{_keywords()})"
    if not inspect.isclass(value):
        return name + _parameters(value)
    if issubclass(value, str):
        return f"class {name}(StrEnum)"
    return f"class {name}" + _parameters(value.__init__, skip=1)


def _keywords() -> str:
    """The options with the types that are accepted, and the defaults."""
    defaults, types = ringfence.Options(), OptionKeywords.__annotations__
    lines = []
    for field in dataclasses.fields(ringfence.Options):
        hint = getattr(types[field.name], "__forward_arg__", None) or inspect.formatannotation(types[field.name])
        plain = (
            hint.replace("typing.", "")
            .replace("collections.abc.", "")
            .replace("torch.distributed.distributed_c10d.", "")
        )
        lines.append(f"    {field.name}: {plain} = {getattr(defaults, field.name)!r},\n")
    return "".join(lines)


class _Unquoted(str):
    """An annotation that is printed as it was written."""

    def __repr__(self) -> str:
        return str(self)


def _parameters(function: Any, skip: int = 0) -> str:
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=_unquoted(p.annotation)) for p in signature.parameters.values()]
    returned = _unquoted(signature.return_annotation)
    text = str(signature.replace(parameters=parameters[skip:], return_annotation=returned)).removesuffix(" -> None")
    return re.sub(r"<factory>|<[^<>]*(?:<lambda>)?[^<>]* at 0x[0-9a-f]+>", "...", text)


def _unquoted(annotation: Any) -> Any:
    annotation = getattr(annotation, "__forward_arg__", annotation)  # of a NamedTuple
    return _Unquoted(annotation) if isinstance(annotation, str) else annotation


def _text(value: Any) -> str:
    """A docstring in Markdown: the references of reST and its double backquotes are code."""
    text = inspect.getdoc(value) or ""
    if text.startswith(f"{getattr(value, '__name__', '')}("):  # dataclasses write one where there is none
        return ""
    text = re.sub(r":(?:class|func|meth|mod|data):`~?\.*([^`]*)`", r"`\1`", text)
    text = text.replace("``", "`")
    text = re.sub(r"^(\w+(?:, \w+)*): ", lambda m: f"- {_codes(m[1])}: ", text, flags=re.M)
    return re.sub(r"(?<=[.;] )([a-z_]+(?:, [a-z_]+)*): ", lambda m: f"{_codes(m[1])}: ", text)


def _codes(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))


def write() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    write()
