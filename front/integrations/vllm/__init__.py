"""ringfence in vLLM: a general plugin, which does nothing unless ``RINGFENCE`` or ``additional_config`` asks.

    RINGFENCE=pass    vllm serve M -tp 8    # vLLM compiles and captures; ringfence fuses in its graphs
    RINGFENCE=backend vllm serve M -tp 8    # ringfence compiles the whole graph, cuts and captures it
    RINGFENCE=guard   vllm serve M -tp 8    # vLLM's own kernels, with a vote, a self-test and a watch

See docs/engines.md. vLLM is imported when it asks, and each function that is hooked is checked before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule


def register() -> None:
    """Entry point of ``vllm.general_plugins``: vLLM calls it in each of its processes, perhaps several times.

    Ends the process, with one line, where the request means nothing.
    """
    from ...runtime.errors import OptionsError
    from .. import environment
    from ..targets import moved, why_not_there
    from . import config, hooked, request, worker
    from .wrapping import wrap

    try:
        asked = request.of_environment()
    except OptionsError as error:
        raise SystemExit(f"ringfence: {error}") from None
    if asked == "off":
        return
    if (missing := why_not_there("vllm")) is not None:
        if asked is not None:
            environment.warn(config.log, "ringfence does nothing: it is asked for in vLLM, and %s", missing)
        return
    unasked = (hooked.POST_INIT,)  # additional_config may ask later; who was not asked says nothing
    gone = moved(hooked.TARGETS[asked.mode] if isinstance(asked, request.Request) else unasked)
    if gone:
        if asked is not None:
            config.warn_moved(gone)
        return
    wrap(hooked.POST_INIT, config.configure)
    if asked is not None or (hooked.WORKER in sys.modules and not moved(worker.WRAPPED)):
        worker.install()


def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """What ``-cc.backend ringfence.integrations.vllm.backend`` stands for; its options come from vLLM's configuration.

    In a worker that the plugin runs in, vLLM is handed a :class:`ringfence.Backend` in its place.
    """
    from ...backend import Backend
    from ...runtime.errors import OptionsError
    from ..targets import why_not_there

    if (missing := why_not_there("vllm")) is not None:
        raise OptionsError(f"this backend is vLLM's, and {missing}: give torch.compile a ringfence.Backend(...)")
    from vllm.config import get_current_vllm_config

    from . import request, whole

    config = get_current_vllm_config()
    asked = request.of_config(config) or request.Request("backend")
    return Backend(**whole.options_for(asked, config))(gm, example_inputs)
