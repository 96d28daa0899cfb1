"""What ``make demo-moe`` runs: it ends well, and says what it did."""

from __future__ import annotations

from pathlib import Path

from support import run_python

ROOT = Path(__file__).resolve().parent.parent


def test_the_demo_rewrites_captures_and_is_equal_to_eager() -> None:
    result = run_python("-W", "ignore", str(ROOT / "examples" / "demo_moe.py"), timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "10 steps equal to eager, two of them with an empty rank" in result.stdout
    assert result.stdout.count("dispatch and combine") == 2 and "capture: simulated, 2, 4, 8 tokens" in result.stdout
    assert "mean nothing here" not in result.stdout
    assert "demo_moe.py" in (ROOT / "Makefile").read_text()
