"""docs/support.md says what runs: a share of its rows, made anew."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import architectures
import pytest
from architectures import BEGIN, END, PAGE, Row, main, row, table_of
from architectures import architectures as known

from support import run_python

SHARE = ["cohere", "gemma2"]


def test_the_page_has_a_row_of_each_architecture_that_there_is() -> None:
    assert set(table_of(PAGE.read_text())) == {"architecture", *known()}
    assert f"Of {len(known())} causal language models" in PAGE.read_text()


@pytest.mark.slow
def test_a_share_of_the_rows_is_fresh() -> None:
    found = run_python(str(PAGE.parent.parent / "tests" / "architectures.py"), "--check", *SHARE)
    assert found.returncode == 0, found.stdout + found.stderr


def test_a_run_that_is_stopped_keeps_its_rows_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "support.md"
    page.write_text(f"before\n{BEGIN}| architecture |\n| b | 1 of 1 | old |\n| gone | | |\n{END}after\n")
    monkeypatch.setattr(architectures, "PAGE", page)
    monkeypatch.setattr(architectures, "architectures", lambda: ["a", "b", "c"])
    monkeypatch.setattr(sys, "argv", ["architectures.py", "--write", "--missing"])
    asked = []

    def stopped(kind: str) -> Row:
        asked.append(kind)
        if asked == ["a", "c"]:
            raise KeyboardInterrupt
        return Row(kind, 2, 1, "new")

    monkeypatch.setattr(architectures, "row", stopped)
    with pytest.raises(KeyboardInterrupt):
        main()
    assert main() == 0 and asked == ["a", "c", "c"]
    assert list(table_of(page.read_text()).items())[1:] == [
        ("a", "| a | 1 of 2 | new |"),
        ("b", "| b | 1 of 1 | old |"),
        ("c", "| c | 1 of 2 | new |"),
    ]
    assert page.read_text().startswith("before\n") and page.read_text().endswith(f"{END}after\n")


def test_a_process_that_dies_is_a_row_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(kind: str, pipe: architectures.Connection) -> None:
        pipe.send("on its way")
        os._exit(7)

    monkeypatch.setattr(architectures, "_find_row", dies)
    assert str(row("a")) == "| a | | on its way: the process ends with 7 |"
