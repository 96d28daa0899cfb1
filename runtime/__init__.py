"""What runs: process groups, and what their ranks tell each other; packages hold the rest.

Never imports compile_passes.
"""

if __name__ != "ringfence.runtime":  # the clone's root is on the path: every module would be there twice
    raise ImportError("import ringfence.runtime, not runtime")
