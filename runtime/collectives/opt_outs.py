"""Who forbids NVLink multicast: three variables, in the environment or in the files that NCCL reads."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

#: Setting one of these to the value says: no NVLink multicast here. All three are respected by every path.
MULTICAST_OPT_OUTS = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}


def opt_outs(environment: Mapping[str, str], files: Sequence[tuple[str, str]] = ()) -> tuple[str, ...]:
    """What forbids multicast: ``NAME=value``, with the file where it is not the environment that says so.

    files: path and text of each of :func:`nccl_files`. Who comes first wins: the environment,
    then file by file, and in each its first line. NCCL puts every variable of these files into the
    environment, also those that are not its own, but only when it starts: too late to be seen there.
    """
    said = [(environment, ""), *((_settings(text), f" in {path}") for path, text in files)]
    found = []
    for name, value in MULTICAST_OPT_OUTS.items():
        settings, where = next(((s, w) for s, w in said if name in s), ({name: ""}, ""))
        given = settings[name].strip()
        # What turns it off has many spellings ("1", "true", "y"): whatever does not say the contrary.
        # Where that is 0 it is a number to NCCL, as C reads them: a word is 0, and so is "0 # off".
        if given and (not _NOT_ZERO.match(given) if value == "0" else given.lower() not in _NOT_SET):
            found.append(f"{name}={given}{where}")
    return tuple(found)


_NOT_ZERO = re.compile("[+-]?(0[xX][0-9a-fA-F]*[1-9a-fA-F]|[0-9]*[1-9])")
_NOT_SET = ("0", "false", "no", "n", "off")


def _settings(text: str) -> dict[str, str]:
    """``NAME=value``, one a line, without blanks around the name; what is not is ignored, as NCCL does."""
    settings: dict[str, str] = {}
    for line in text.split("\n"):
        name, equals, value = line.partition("=")
        if equals:  # a name after a "#" is none that is looked for
            settings.setdefault(name, value)
    return settings


def nccl_files(
    environment: Mapping[str, str], home: str | None, system: str = "/etc/nccl.conf"
) -> list[tuple[str, str]]:
    """Path and text of the files that NCCL reads its variables from, in its order; not those that cannot be read.

    ``NCCL_CONF_FILE`` stands in place of the user's own file, which is in the home folder that the password
    database says (``home``), whatever ``HOME`` is.
    """
    user = environment.get("NCCL_CONF_FILE") or (f"{home}/.nccl.conf" if home else None)
    found = []
    for path in (user, system):
        if path is not None:
            with contextlib.suppress(OSError):
                found.append((path, Path(path).read_text(errors="replace")))
    return found


def own_opt_outs() -> tuple[str, ...]:
    """What forbids multicast in this process."""
    return opt_outs(os.environ, _own_files())


def nccl_settings() -> dict[str, str]:
    """What is set for NCCL in this process, ``NCCL_...`` to its value: by the environment, or else by its files."""
    found: dict[str, str] = {}
    for settings in (os.environ, *(_settings(text) for _, text in _own_files())):
        for name, value in settings.items():
            if name.startswith("NCCL_"):
                found.setdefault(name, value.strip())
    return found


def nccl_setting(name: str) -> str | None:
    """The value of one of them; None where it is not set."""
    return nccl_settings().get(name)


def _own_files() -> list[tuple[str, str]]:
    home = None
    with contextlib.suppress(KeyError):  # a container's user may be in no database
        home = pwd.getpwuid(os.getuid()).pw_dir
    return nccl_files(os.environ, home)
