"""Switch off: sites that the user wants left as they are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from .match import Candidate, Site
from .moe_sites import MoeSite
from .reasons import Decline, Reason


def switch_off(candidates: Sequence[Candidate], *, fuse: bool, skip_sites: Collection[str]) -> list[Candidate]:
    """The candidates; those that the options ``fuse`` and ``skip_sites`` switch off are declined.

    Sums that one op would carry out are left alone together.
    """
    off: dict[int, str] = {}
    for site in (c.site for c in candidates):
        by = "fuse=False" if not fuse else next((f"skip_sites: '{p}'" for p in skip_sites if names_site(p, site)), None)
        if by is not None:
            off[site.index] = f"switched off ({by})"
            if site.merged_into is not None:
                off.setdefault(site.merged_into, f"switched off with site {site.index}, which is part of the same sum")
    for site in (c.site for c in candidates):
        if site.merged_into in off:
            off.setdefault(site.index, f"switched off with site {site.merged_into}, which is part of the same sum")
    return [
        c.declined(Decline(Reason.SWITCHED_OFF, off[c.site.index])) if c.site.index in off else c for c in candidates
    ]


def names_site(pattern: str, site: Site | MoeSite) -> bool:
    """Whether a pattern names a site: by its module, or one around it, or by the end of its ``file:line``.

    ``model.layers.3``, ``*.o_proj``, ``model.py:120``, ``model.py:*``; ``*``, ``?`` and ``[...]`` as in file names.
    """
    module, source = site.module or "", site.source or ""
    if fnmatchcase(module, pattern) or fnmatchcase(module, f"{pattern}.*"):
        return True
    return fnmatchcase(source, pattern) or fnmatchcase(source, f"*[/\\\\]{pattern}")
