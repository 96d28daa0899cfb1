"""``ringfence docs``: the pages that messages name."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringfence.cli import main
from ringfence.commands import docs
from ringfence.commands.terminal import OK, USAGE

Captured = pytest.CaptureFixture[str]


def test_docs_lists_the_pages_and_prints_one(capsys: Captured) -> None:
    assert main(["docs"]) == OK
    assert "operating     Running it in production" in capsys.readouterr().out.splitlines()
    for name in ("operating", "docs/operating.md", "Operating"):
        assert main(["docs", name]) == OK
        out = capsys.readouterr().out
        assert out.startswith("# Running it in production\n") and "journal_dir" in out


def test_docs_of_a_page_that_is_none(capsys: Captured) -> None:
    assert main(["docs", "operatin"]) == USAGE
    out, err = capsys.readouterr()
    assert out == "" and err == "ringfence: there is no page 'operatin'; did you mean 'operating'?\n"
    assert main(["docs", "frobnicate"]) == USAGE and "the pages are api, " in capsys.readouterr().err


def test_pages_are_found_in_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There they lie in the package."""
    (tmp_path / "ringfence/docs").mkdir(parents=True)
    (tmp_path / "ringfence/docs/hangs.md").write_text("# A page\n")
    monkeypatch.setattr(docs, "__file__", str(tmp_path / "ringfence/commands/docs.py"))
    assert docs.pages() == {"hangs": tmp_path / "ringfence/docs/hangs.md"}
