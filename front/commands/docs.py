"""``ringfence docs``: the pages that messages name, wherever the package is installed."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..runtime.errors import OptionsError
from ..runtime.spelling import meant
from .arguments import Commands
from .terminal import OK


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "docs",
        help="print a page of the documentation",
        description="Print a page of the documentation, in Markdown, or without a name the list of pages.",
    )
    parser.add_argument("page", nargs="?", help="a page, such as operating")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> tuple[str, int]:
    found = pages()
    if arguments.page is None:
        width = max(map(len, found))
        return "\n".join(f"{name:<{width}}  {_title(path)}" for name, path in found.items()), OK
    return find_page(arguments.page, found).read_text(encoding="utf-8").rstrip("\n"), OK


def pages() -> dict[str, Path]:
    """By name. In a wheel the pages lie in the package; in a clone beside it."""
    package = Path(__file__).parent.parent
    inside = package / "docs"
    folder = inside if inside.is_dir() else package.parent / "docs"
    return {path.stem: path for path in sorted(folder.glob("*.md"))}


def find_page(asked: str, found: dict[str, Path]) -> Path:
    """Also where it is called as a file is, ``docs/operating.md``. Raises :class:`OptionsError`."""
    name = asked.removeprefix("docs/").removesuffix(".md").lower()
    if name not in found:
        raise OptionsError(f"there is no page '{asked}'{meant(name, found, 'the pages are')}")
    return found[name]


def _title(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
