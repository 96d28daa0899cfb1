"""Types of arguments, for argparse: what is no such thing is wrong usage, and the message says what is."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import NoReturn, TypeAlias

from .terminal import USAGE

#: Where a command adds its parser.
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with what was meant by a name that is misspelt."""

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"^argument (\S+): invalid choice: '?(.*?)'? \(choose from (.*)\)$", message)
        if choice is not None:
            what, given, names = choice.groups()
            valid = [name.strip("' ") for name in names.split(",")]
            if what == "command":
                message = f"'{given}' is no command; there are {', '.join(valid)}"
            message += meant(given, valid)
        self.exit(USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def refuse(self, unknown: list[str]) -> NoReturn:
        """What this command does not know."""
        option = next((name for name in unknown if name.startswith("--")), "")
        self.error(f"unrecognized arguments: {' '.join(unknown)}{meant(option, self._option_string_actions)}")


def meant(given: str, valid: Iterable[str]) -> str:
    """``; did you mean 'explain'?``, or nothing."""
    near = difflib.get_close_matches(given, list(valid), 1)
    return f"; did you mean '{near[0]}'?" if near else ""


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
    if natural(text) > 1000:
        raise argparse.ArgumentTypeError(f"'{text}' is more than 1000; layers repeat, so fewer tell as much")
    return int(text)


def bytes_(text: str) -> int:
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("K", "M") else (text, "")
    if not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write it as 65536, 64K or 8M")
    return int(number) * {"": 1, "K": 1 << 10, "M": 1 << 20}[unit]
