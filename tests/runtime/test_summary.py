"""What ``ringfence journal`` prints: one short sentence, the line of code, one line per rank, nothing twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import types
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ringfence.cli import main
from ringfence.runtime.watch import journals, summary, user_code
from ringfence.runtime.watch.culprit import came_with, find_culprit
from ringfence.runtime.watch.folder import BEGUN
from ringfence.runtime.watch.position import CallSpan, Position
from ringfence.runtime.watch.report import ended
from support import HARD_END

TOLD = "was told to end (SystemExit: 0)"
CODE = {"file": "job.py", "line": 30, "function": "serve", "text": "time.sleep(3600)"}


def waits(rank: int, call: int = 14, sizes: tuple[int, ...] = (8,)) -> Position:
    calls, done = (CallSpan("tp", call, call),), {"tp": call}
    return Position(rank, "step", 7, sizes, 3, "submod_3", "island", "", calls, {"tp": call + 1}, done, still=3.0)


def idle(rank: int) -> Position:
    return Position(rank, "idle", 6, (4,), submitted={"tp": 14}, completed={"tp": 14}, still=3.0)


def write(folder: Path, position: Position, ranks: int, reason: str = "", **more: Any) -> None:
    value = {
        "format": 1,
        "rank": position.rank,
        "reason": reason,
        "time": 1000.0,
        "clock_ns": 0,
        "groups": {"tp": list(range(ranks))},
        "programs": [],
        "steps": [],
        "position": position.to_dict(),
        **more,
    }
    (folder / f"journal-rank{position.rank}.json").write_text(json.dumps(value))


def printed(folder: Path) -> str:
    text = summary.text(journals.merge(journals.read_folder(folder)))
    assert max(map(len, text.splitlines())) <= 80
    return text


def test_a_rank_in_its_own_code_is_shown_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reason = (
        "hang: rank 1 did not come to call 14 of group 'tp' (step 7 of sizes (8,), piece 3 'submod_3' (island) "
        "on rank 0), in which ranks 0, 2 wait: rank 1 is outside of the model since 2.6 s"
    )
    for position in (waits(0), idle(1), waits(2)):
        write(tmp_path, position, 3, reason, code=CODE if position.rank == 1 else None)
    assert main(["journal", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "rank 1 did not come to call 14 of group 'tp', in which ranks 0, 2 wait",
        "rank 1 is at job.py:30 in serve: time.sleep(3600)",
        "",
        "rank 0 waits in call 14: step 7 of sizes (8,), piece 3 'submod_3'",
        "rank 1 is outside of the model since 3.0 s, after step 6 of sizes (4,)",
        "rank 2 waits in call 14: step 7 of sizes (8,), piece 3 'submod_3'",
    ]


def test_a_rank_that_threw_is_shown_where_it_threw(tmp_path: Path) -> None:
    failures = [{"rank": 1, "where": "step 7 of sizes (8,)", "error": "ValueError: no token left", "victim": False}]
    write(tmp_path, waits(0), 2, failures=failures)
    write(tmp_path, idle(1), 2, failures=failures, code=CODE)
    assert printed(tmp_path).splitlines()[:2] == [
        "rank 1 failed: ValueError: no token left",
        "rank 1 threw at job.py:30 in serve: time.sleep(3600)",
    ]


def test_a_rank_without_a_file_has_a_line_too(tmp_path: Path) -> None:
    write(tmp_path, waits(0), 3, heard={"1": waits(1).to_dict(), "2": Position(2, "idle", -1).to_dict()})
    said = " ".join(printed(tmp_path).split())
    heard = "when last heard of, it waits in call 14: step 7 of sizes (8,), piece 3 'submod_3'"
    assert said.endswith(f"rank 1 could not write its file; {heard} rank 2 could not write its file")
    write(tmp_path, waits(0), 3, silent={"2": "has not been heard of for 3.0 s"})
    assert printed(tmp_path).splitlines()[-2:] == [f"rank {r} left no file that can be read" for r in (1, 2)]


def test_a_shutdown_is_told_once(tmp_path: Path) -> None:
    """Not once in the answer, with three places, and again for each rank that wrote because of it."""
    for position, how in (
        (waits(0), TOLD),
        (idle(1), TOLD),
        (waits(2, call=15), "was interrupted (KeyboardInterrupt)"),
    ):
        report = ended(position.rank, how, f"in step 7 of sizes (8,), piece {position.rank}")
        heard = {str(r): idle(r).to_dict() for r in range(3) if r != position.rank}
        reason = f"end: {report.sentence}"
        write(tmp_path, position, 3, reason, report=asdict(report), later=[], heard=heard)
    assert printed(tmp_path).splitlines() == [
        "nobody waited for long: ranks 0, 1 were told to end (SystemExit: 0); rank 2 was",
        "    interrupted (KeyboardInterrupt)",
        "",
        "rank 0 waits in call 14: step 7 of sizes (8,), piece 3 'submod_3'",
        "rank 1 is outside of the model since 3.0 s, after step 6 of sizes (4,)",
        "rank 2 waits in call 15: step 7 of sizes (8,), piece 3 'submod_3'",
    ]
    assert "in step 7 of sizes (8,), piece 1" in journals.merge(journals.read_folder(tmp_path)).sentence


def test_who_has_begun_has_a_file(tmp_path: Path) -> None:
    for position in (waits(0), idle(1)):
        write(tmp_path, position, 2, BEGUN)
    assert printed(tmp_path).splitlines() == [
        "ranks 0, 1 began and wrote nothing since: they run, have ended in order, or were",
        "    ended before they could write",
    ]
    write(tmp_path, waits(0), 2, "hang: rank 1 has not been heard of", silent={"1": "has not been heard of for 3.0 s"})
    assert printed(tmp_path).splitlines()[-1] == "rank 1 wrote nothing since it began"
    heard = {"1": idle(1).to_dict()}
    write(tmp_path, waits(0), 2, "hang: rank 1 has closed its backend", heard=heard)
    assert " ".join(printed(tmp_path).split()).endswith(
        "rank 1 wrote nothing since it began; when last heard of, it is outside of the model since 3.0 s, after step 6 "
        "of sizes (4,)"
    )


def test_long_names_and_lines_are_wrapped(tmp_path: Path) -> None:
    code = CODE | {"text": "value = " + " + ".join(f"term_{i}" for i in range(20))}
    for position in (waits(0), idle(1)):
        write(tmp_path, position, 2, "signal SIGUSR2, because " + "somebody wanted to know it " * 20, code=code)
    text = printed(tmp_path)
    assert "every rank wrote because of: signal SIGUSR2" in text and " ..." in text and text.count("SIGUSR2") == 1


def test_groups_are_named_where_there_are_several(tmp_path: Path) -> None:
    write(tmp_path, waits(0), 2, groups={"tp": [0, 1], "dp": [0]})
    write(tmp_path, idle(1), 2)
    assert "rank 0 waits in call 14 of group 'tp': step 7" in printed(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "odd", "said"),
    [
        ({0: (16,), 1: (1,), 2: (16,)}, (1,), "rank 1 came with 1 token, the others with 16"),
        ({0: (1,), 1: (2,), 2: (1,)}, (1,), "rank 1 came with 2 tokens, the others with 1 token"),
        ({0: (16,), 1: (1,)}, (0, 1), "rank 0 came with 16 tokens, rank 1 with 1 token"),
        (
            {0: (8,), 1: (1,), 2: (8,), 3: (4,), 4: (8,)},
            (1, 3),
            "rank 1 came with 1 token, rank 3 with 4 tokens, the others with 8",
        ),
        ({0: (2, 8), 1: (2, 8), 2: ()}, (2,), "rank 2 came with fixed sizes, the others with sizes (2, 8)"),
    ],
)
def test_who_came_with_other_sizes(sizes: dict[int, tuple[int, ...]], odd: tuple[int, ...], said: str) -> None:
    assert came_with(sizes) == (odd, said)
    assert came_with(dict.fromkeys(sizes, (3,))) is None


def test_a_call_of_other_sizes_blames_who_came_with_them(tmp_path: Path) -> None:
    """A kernel that waits for tokens which do not come: every rank is in the call."""
    positions = {0: waits(0, sizes=(16,)), 1: waits(1, sizes=(1,)), 2: waits(2, sizes=(16,))}
    finding = find_culprit(positions, {})
    assert finding is not None and (finding.ranks, finding.waiting) == ((1,), (0, 2))
    assert finding.sentence.startswith("rank 1 came with 1 token, the others with 16: ranks 0, 2 wait in step 7")
    for position in positions.values():
        write(tmp_path, position, 3)
    assert printed(tmp_path).count("came with") == 1
    assert printed(tmp_path).startswith("rank 1 came with 1 token, the others with 16\n")


def test_the_first_step_of_other_sizes_is_told(tmp_path: Path) -> None:
    for position, tokens in ((waits(0), 16), (idle(1), 1), (waits(2), 16)):
        steps = [
            {"step": n, "program": 0, "sizes": [s], "how": "replay", "calls_before": {}, "pieces": []}
            for n, s in ((5, 8), (6, tokens))
        ]
        write(tmp_path, position, 3, steps=steps, programs=[{"pieces": []}])
    assert printed(tmp_path).splitlines()[1] == "rank 1 came with 1 token, the others with 16, in step 6"


# -- the line of code ------------------------------------------------------------------------


def test_the_line_of_a_thread_is_the_users_innermost(monkeypatch: pytest.MonkeyPatch) -> None:
    ready, end = threading.Event(), threading.Event()

    def serve() -> None:
        ready.set()
        end.wait(20)  # in threading.py, which is nobody's program

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert ready.wait(20) and thread.ident is not None
        monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
        place = user_code.of_thread(thread.ident)
    finally:
        end.set()
        thread.join()
    assert place is not None
    assert (place.file, place.function) == ("test_summary.py", "serve")
    assert place.text in ("ready.set()", "end.wait(20)  # in threading.py, which is nobody's program")


def test_the_line_of_an_error_is_where_the_user_called(tmp_path: Path) -> None:
    (tmp_path / "site-packages").mkdir()
    paths = [tmp_path / "site-packages" / "engine.py", tmp_path / "job.py"]
    paths[0].write_text("import json\ndef load():\n    json.loads('{')\n")
    paths[1].write_text("def serve():\n    engine.load()\n")
    modules = []
    for path in paths:
        module = types.ModuleType(path.stem)
        exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
        modules.append(module)
    engine, job = modules
    job.__dict__["engine"] = engine

    def thrown(call: Any) -> BaseException:
        try:
            call()
        except ValueError as error:
            return error.with_traceback(error.__traceback__.tb_next if error.__traceback__ else None)
        raise AssertionError

    place = user_code.of_error(thrown(job.serve))
    assert place is not None and str(place) == f"{paths[1]}:2 in serve: engine.load()"
    place = user_code.of_error(thrown(engine.load))  # a program that is installed is better than none
    assert place is not None and str(place) == f"{paths[0]}:3 in load: json.loads('{{')"
    assert user_code.of_error(ValueError("never thrown")) is None


def test_the_code_of_a_program_is_named_as_an_import_would(tmp_path: Path) -> None:
    """In a process of its own, started as users start it."""
    (tmp_path / "job.py").write_text(
        "import threading\nfrom ringfence.runtime.watch import user_code\n"
        "def serve():\n    print(user_code.of_thread(threading.get_ident()))\nserve()\n"
    )
    ran = subprocess.run(
        [sys.executable, tmp_path / "job.py"], capture_output=True, text=True, cwd=os.sep, timeout=HARD_END
    )
    assert ran.stdout == "job.py:4 in serve: print(user_code.of_thread(threading.get_ident()))\n", ran.stderr
