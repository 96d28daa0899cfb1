"""Graph in, graph out: find, fuse, judge, split. No CUDA call, no process group, no state.

Each pass is a function and works alone on any functional ATen graph:

    candidates = find(gm)
    sites = fuse(gm, candidates)
"""

if __name__ != "ringfence.compile_passes":  # the clone's root is on the path: every module would be there twice
    raise ImportError("import ringfence.compile_passes, not compile_passes")


from .find import find
from .fuse import fuse
from .match import Candidate, Match, Site
from .reasons import Decline, Reason, Rounding

__all__ = ["Candidate", "Decline", "Match", "Reason", "Rounding", "Site", "find", "fuse"]
