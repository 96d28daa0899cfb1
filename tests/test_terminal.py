"""What is the same for all commands: Ctrl-C, readers that leave, FIFOs, encodings. One line each, and no traceback."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringfence import cli
from ringfence.commands import line, terminal
from ringfence.commands.terminal import FAILED, OK, USAGE
from ringfence.runtime.errors import OptionsError
from support import HARD_END

CHECK = ("check", "--collective", "mnnvl", "--flashinfer", "0.6.10", "--tp", "2", "--layers", "2", "--pieces", "2")


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """What a shell starts in the background ignores Ctrl-C, and so would the tests and what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def started(*arguments: str, **more: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ringfence", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)  # type: ignore[call-overload,no-any-return]


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    with process:
        try:
            out, err = process.communicate(timeout=HARD_END)
        finally:
            process.kill()
    return process.returncode, out, err


@pytest.mark.parametrize("command", [c.__name__.rpartition(".")[2] for c in line.COMMANDS])
def test_ctrl_c_is_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Wherever the command is: it is interrupted in its own ``run``."""
    arguments = {
        "explain": ("m:f", "--tp", "2"),
        "check": CHECK[1:],
        "journal": (str(tmp_path),),
        "bench": ("--write-table", "t"),
    }
    for module in line.COMMANDS:
        monkeypatch.setattr(module, "run", lambda _: signal.raise_signal(signal.SIGINT))
    assert cli.main([command, *arguments.get(command, ())]) == 130
    assert capsys.readouterr() == ("", "ringfence: interrupted\n")


def test_a_process_that_gets_ctrl_c_ends_with_130(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    process = started("check", "--trace", str(tmp_path / "fifo"))
    with (tmp_path / "fifo").open("wb"):  # the process reads it now, and nothing comes
        process.send_signal(signal.SIGINT)
        assert ended(process) == (130, "", "ringfence: interrupted\n")


def test_a_stream_that_was_closed_before_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with ``2>&-``: what is said goes nowhere, and not to the other stream."""
    monkeypatch.setattr(sys, "stderr", None)
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    terminal.say("exploring")
    monkeypatch.setattr(sys, "stdout", None)
    assert terminal.answer("safe") and out.getvalue() == ""


def test_ctrl_c_in_the_imports_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "ringfence.commands.line":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "ringfence.commands.line", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    assert cli.main(["hazards"]) == 130
    assert capsys.readouterr() == ("", "ringfence: interrupted\n")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    process = started("hazards", "--markdown")
    assert process.stdout is not None
    process.stdout.close()
    with process:
        assert process.stderr is not None and process.stderr.read() == ""
    assert process.returncode == OK


def test_an_answer_that_cannot_be_written_says_so() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "ringfence", "hazards"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=HARD_END,
        )
    assert ran.returncode == FAILED and ran.stderr.count("\n") == 1 and "cannot be written" in ran.stderr


def test_what_an_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert terminal.answer("GLHF \N{BEACH WITH UMBRELLA} \udc80")
    assert written.getvalue() == b"GLHF \\U0001f3d6 \\udc80\n"


def test_pictures_are_utf_8(tmp_path: Path) -> None:
    terminal.write(tmp_path / "x.svg", "… \ud800")
    assert (tmp_path / "x.svg").read_bytes() == "… \\ud800".encode()


# -- FIFOs -------------------------------------------------------------------------------------


@pytest.fixture
def fifo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(terminal, "_FIFO_SECONDS", 0.3)
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def test_a_fifo_without_another_end_is_refused(fifo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--trace", str(fifo)]) == USAGE
    assert cli.main([*CHECK, "--svg", str(fifo)]) == USAGE
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("nobody came to its other end" in line for line in said)


def test_a_fifo_with_another_end_is_as_good_as_a_file(fifo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_FIFO_SECONDS", 2.0)

    def slow_writer() -> None:
        with fifo.open("wb") as file:
            time.sleep(2.4)  # longer than a writer may take to come
            file.write(b"trace")

    writer = threading.Thread(target=slow_writer)
    writer.start()
    assert terminal.read(fifo) == b"trace"
    writer.join()

    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(fifo.read_bytes()))
    reader.start()
    terminal.write(fifo, "picture")
    reader.join()
    assert found == [b"picture"]


def test_a_journal_that_is_a_fifo_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "journal-rank0.json")
    assert cli.main(["journal", str(tmp_path)]) == USAGE
    assert capsys.readouterr().err == "ringfence: 'journal-rank0.json' is no file\n"


# -- what is read -------------------------------------------------------------------------------

BAD = {
    "deep": b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "no text": b"\xff\xfe\x00\xd8",
    "another encoding": '{"format": "\N{LATIN SMALL LETTER A WITH DIAERESIS}"}'.encode("latin-1"),
    "a number too long": b"1" * 10_000,
    "nothing": b"",
}


@pytest.mark.parametrize("text", BAD.values(), ids=list(BAD))
def test_what_cannot_be_read_is_one_line(tmp_path: Path, text: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "journal-rank0.json").write_bytes(text)
    for arguments in (["journal", str(tmp_path)], ["check", "--trace", str(tmp_path / "journal-rank0.json")]):
        assert cli.main(arguments) == USAGE
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("ringfence: ")


def test_a_path_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="cannot be written"):
        terminal.write(Path("a\0b"), "")
    with contextlib.suppress(ValueError), pytest.raises(OSError):
        terminal.read(tmp_path)
