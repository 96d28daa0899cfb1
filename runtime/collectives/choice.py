"""Choice: which collective carries out the fused sites of a group, decided from facts.

Every rank probes its device and its packages, the facts are exchanged, and :func:`choose` is a
function of all of them: it gives the same answer on every rank, with a reason for each
candidate that was passed over.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..channel import by_value
from ..errors import CollectiveUnavailableError
from ..hazards.catalogue import applicable
from ..hazards.situation import Collective, Payload, Situation
from ..hazards.table import Action
from ..versions import in_range
from .flashinfer import Unavailable, load
from .size_table import TABLE, SizeRow, find_row, forced_row

#: Setting one of these to the value says: no NVLink multicast here. All three are respected by every path.
MULTICAST_OPT_OUTS = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}

#: FI#3385: from this release on a rank keeps its own part in registers and polls the others' only.
_PEER_TRANSPORT_FROM = "0.6.13"


@dataclass(frozen=True)
class RankFacts:
    """What one rank knows of itself.

    flashinfer: the version, None where it cannot be used for the reason in ``flashinfer_missing``.
    multicast: whether the device and driver offer NVLink multicast; nothing is created to find out.
    peers: whether this GPU can address the others that this process sees; None if it sees one only.
    """

    host: str
    device: str
    capability: tuple[int, int]
    multiprocessors: int
    flashinfer: str | None
    flashinfer_missing: str | None
    opt_outs: tuple[str, ...]
    multicast: bool
    peers: bool | None


@dataclass(frozen=True)
class Candidate:
    """A collective that was considered. ``why_not`` is None for the one that was chosen."""

    collective: Collective
    transport: str | None
    why_not: str | None

    def __str__(self) -> str:
        name = f"{self.collective}/{self.transport}" if self.transport else str(self.collective)
        return f"{name}: {self.why_not or 'chosen'}"


@dataclass(frozen=True)
class Choice:
    """Who carries out the fused sites, up to which sizes (``row``; None for the reference), and why not another."""

    collective: Collective
    transport: str | None
    row: SizeRow | None
    candidates: tuple[Candidate, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        return tuple(map(str, self.candidates))


#: In order of preference.
_ALL = (
    (Collective.MNNVL, "multicast"),
    (Collective.MNNVL, "peer"),
    (Collective.TRTLLM, "peer"),
    (Collective.REFERENCE, None),
)


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
    home = None
    with contextlib.suppress(KeyError):  # a container's user may be in no database
        home = pwd.getpwuid(os.getuid()).pw_dir
    return opt_outs(os.environ, nccl_files(os.environ, home))


def probe(device: torch.device) -> RankFacts:
    """The facts of this rank, on a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    package = load()
    missing = package.reason if isinstance(package, Unavailable) else None
    index = torch.cuda.current_device() if device.index is None else device.index
    others = [i for i in range(torch.cuda.device_count()) if i != index]
    return RankFacts(
        host=socket.gethostname(),
        device=properties.name,
        capability=(properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        flashinfer=None if isinstance(package, Unavailable) else package.version,
        flashinfer_missing=missing,
        opt_outs=own_opt_outs(),
        multicast=_device_has_multicast(index),
        peers=all(torch.cuda.can_device_access_peer(index, i) for i in others) if others else None,
    )


def choose(
    ranks: Sequence[RankFacts],
    *,
    wanted: str = "auto",
    transport: str = "auto",
    deterministic: bool = False,
    dtype: str = "bfloat16",
    table: Sequence[SizeRow] = TABLE,
    failed: Mapping[tuple[Collective, str], str] | None = None,
) -> Choice:
    """The first candidate that nothing speaks against. ``ranks`` are the facts of all ranks, by rank.

    wanted: "auto", or the collective that the user insists on; then a table row is not needed.
    dtype: that of most sites, which some hazards depend on.
    failed: what was tried before on this group, and how it failed; it is not tried again.
    Raises :class:`CollectiveUnavailableError` where the user insists and cannot have it, with the reasons.
    """
    considered = []
    for collective, way in _ALL:
        if wanted not in ("auto", collective) or (collective is Collective.MNNVL and transport not in ("auto", way)):
            continue
        why_not, row = None, None
        if collective is Collective.REFERENCE:
            if deterministic:
                why_not = "not shown to return the same bits whatever the token count"
        else:
            assert way is not None
            row = find_row(table, collective, way, ranks[0].capability, len(ranks))
            if row is None and wanted != "auto":
                row = forced_row(collective, way, ranks[0].capability, len(ranks))
            why_not = (failed or {}).get((collective, way)) or _why_not(
                ranks, collective, way, row, deterministic, dtype
            )
        considered.append(Candidate(collective, way, why_not))
        if why_not is None:
            return Choice(collective, way, row, tuple(considered))
    raise CollectiveUnavailableError(
        f"collective='{wanted}'{', deterministic=True' if deterministic else ''} cannot be had here: "
        + "; ".join(map(str, considered))
    )


def _why_not(
    ranks: Sequence[RankFacts],
    collective: Collective,
    transport: str,
    row: SizeRow | None,
    deterministic: bool,
    dtype: str,
) -> str | None:
    if missing := next((f.flashinfer_missing for f in ranks if f.flashinfer_missing), None):
        return missing
    for what in ("flashinfer", "capability", "multiprocessors"):
        values = [getattr(facts, what) for facts in ranks]
        if len(set(values)) > 1:  # grids would differ between ranks (hazard M22)
            return f"ranks differ in {what}: {by_value(values)}"
    version = ranks[0].flashinfer
    assert version is not None
    if transport == "multicast":
        if barred := multicast_barred(ranks):
            return barred
    else:
        if len({facts.host for facts in ranks}) > 1:
            return "the ranks are on several nodes, and peer memory is reached within one"
        if any(facts.peers is False for facts in ranks):
            return "a GPU cannot address the memory of another"
        if collective is Collective.MNNVL and len(ranks) != 2:
            return f"one-shot over the peer's own pointer is for two ranks, not {len(ranks)}"
        if collective is Collective.MNNVL and not in_range(version, _PEER_TRANSPORT_FROM, None):
            return f"FlashInfer {version} polls a rank's own slot; {_PEER_TRANSPORT_FROM} is needed"
    if row is None:
        major, minor = ranks[0].capability
        return f"no row of the size table knows {len(ranks)} GPUs of SM{major}{minor}; name it to force it"
    if deterministic and not row.bitwise:
        return "not shown to return the same bits whatever the token count"
    situation = Situation(
        collective, version, len(ranks), capability=ranks[0].capability, payload=Payload.ANY, dtype=dtype, capture=False
    )
    for hazard in applicable(situation):
        if hazard.decides is Action.REFUSE:
            return f"{hazard.id}, {hazard.title.lower()}: {hazard.remedy}"
    return None


def multicast_barred(ranks: Sequence[RankFacts]) -> str | None:
    """Why no multicast object may be created here."""
    for rank, facts in enumerate(ranks):
        if facts.opt_outs:
            return f"multicast is turned off ({facts.opt_outs[0]} on rank {rank})"
        if not facts.multicast:
            return f"the device of rank {rank} has no NVLink multicast"
    return None


def _device_has_multicast(index: int) -> bool:
    """What the driver says of the device. Asking creates nothing."""
    from torch._C import _distributed_c10d
    from torch._C._autograd import DeviceType

    try:
        return bool(_distributed_c10d._SymmetricMemory.has_multicast_support(DeviceType.CUDA, index))
    except (AttributeError, RuntimeError):  # a build without symmetric memory
        return False
