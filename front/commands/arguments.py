"""Types of arguments, for argparse: what is no such thing is wrong usage, and the message says what is."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NoReturn, TypeAlias

from ..runtime.spelling import meant
from .terminal import USAGE, why_not_written

#: Where a command adds its parser.
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with what was meant by a name that is misspelt."""

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"^argument (\S+): invalid choice: '?(.*?)'? \(choose from (.*)\)$", message)
        if choice is not None:
            what, given, names = choice.groups()
            valid = [name.strip("' ") for name in names.split(",")]
            what = "is no command" if what == "COMMAND" else f"is no value of {what}"
            message = f"'{given}' {what}{meant(given, valid, 'there are')}"
        message = re.sub(r"(?<=are required: ).*", self._with_values, message)
        self.exit(USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def _with_values(self, missing: re.Match[str]) -> str:
        """What is missing, each option with what it takes."""
        takes = {name: action.metavar for name, action in self._option_string_actions.items() if action.required}
        return ", ".join(f"{name} {takes[name]}" if takes.get(name) else name for name in missing[0].split(", "))

    def refuse(self, unknown: list[str]) -> NoReturn:
        """What this command does not know."""
        option = next((name for name in unknown if name.startswith("--")), "")
        self.error(f"unrecognized arguments: {' '.join(unknown)}{meant(option, [*self._option_string_actions])}")


def world_size(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"'{text}' is not a world size of two or more")
    return int(text)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive integer")
    return int(text)


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 on")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is no number of seconds above 0")
    return value


def layers(text: str) -> int:
    if count(text) > 1000:
        raise argparse.ArgumentTypeError(f"'{text}' is more than 1000; layers repeat, so fewer tell as much")
    return int(text)


def bytes_(text: str) -> int:
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("K", "M") else (text, "")
    if not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write it as 65536, 64K or 8M")
    return int(number) * {"": 1, "K": 1 << 10, "M": 1 << 20}[unit]


def output(text: str) -> Path:
    """A file that will be written when the work is done, which is too late to find out that it cannot be."""
    path = Path(text)
    if (why := why_not_written(path)) is not None:
        raise argparse.ArgumentTypeError(f"'{text}' cannot be written: {why}")
    return path
