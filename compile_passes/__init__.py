"""Graph in, graph out: find, fuse, judge, split. No CUDA call, no process group, no state.

Each pass is a function and works alone on any functional ATen graph:

    candidates = find(gm)
    sites = fuse(gm, candidates)
"""

from .find import Candidate, Kind, Match, Site, find
from .fuse import fuse
from .reasons import Decline, Reason, Rounding

__all__ = ["Candidate", "Decline", "Kind", "Match", "Reason", "Rounding", "Site", "find", "fuse"]
