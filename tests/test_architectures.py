"""docs/support.md says what runs: a share of its rows, made anew."""

from __future__ import annotations

import pytest
from architectures import PAGE, architectures, table_of

from support import run_python

SHARE = ["cohere", "gemma2"]


def test_the_page_has_rows_of_architectures_that_there_are() -> None:
    rows = table_of(PAGE.read_text())
    known = {"architecture", *architectures()}
    assert set(SHARE) < set(rows) <= known and len(rows) > 30


@pytest.mark.slow
def test_a_share_of_the_rows_is_fresh() -> None:
    found = run_python(str(PAGE.parent.parent / "tests" / "architectures.py"), "--check", *SHARE, timeout=280)
    assert found.returncode == 0, found.stdout + found.stderr
