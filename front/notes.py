"""Notes: what a report says of its graph as a whole, where an option or the user's expectation came to nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch.distributed as dist

from .compile_passes.assignment import Assignment
from .compile_passes.match import Site
from .compile_passes.moe_sites import MoeSite
from .compile_passes.outer import OuterCapture
from .compile_passes.switch_off import names_site
from .options import Options
from .runtime.groups import group_exists, same_groups
from .runtime.hazards.engine_default import barred_from_capture
from .runtime.replay.program import SizeRule
from .runtime.spelling import group_word
from .stages import CallersMemory, FoundSites, Judged, TracedGraph

GRAD_MODE = "grad mode is on and an input or parameter requires grad"
WITHOUT_FUSION = (
    f"compiled without fusion: {GRAD_MODE}, and the fused collective has no backward. Call the model under "
    "torch.no_grad() or torch.inference_mode()"
)


_START = "start one process for each rank, as by torchrun --nproc-per-node N, and init_process_group in each"


def notes(
    options: Options,
    graph: TracedGraph,
    found: FoundSites,
    judged: Judged,
    memory: CallersMemory,
    unmatched: Mapping[str, Sequence[str]],
    replaced: Collection[str],
) -> Iterator[str]:
    """The notes of one graph.

    unmatched: by option, named ops that no graph had so far. replaced: ops that fusing took out of this one.
    """
    yield from _about_all_reduces(options, found, judged.assigned)
    yield from _about_missing_ranks(graph, found)
    for option, names in unmatched.items():
        if names:
            yield f"{option} names {', '.join(names)}: no graph so far has such an op"
    if fused := [name for name in options.split_ops if name in replaced]:
        ops = ", ".join(sorted({f"ringfence::{c.site.kind}" for c in found.candidates if c.site.fused}))
        yield (
            f"split_ops names {', '.join(fused)}, which sites of this graph have fused: name the fused op ({ops}) "
            "to run it between pieces, or leave the sites alone by skip_sites"
        )
    if graph.device.type == "cuda":
        yield from _about_moe(judged.assigned)
    yield from _about_capture(options, graph, found.sizes, judged)
    if options.pad_to_capture_size and memory.pads is None:
        yield (
            "not padded: the graph writes into its inputs, where padded rows would land too"
            if memory.written
            else "not padded: the graph has no single dynamic size that all its dynamic dimensions equal"
        )
    if options.outer_capture or graph.device.type == "cuda":
        yield from _about_outer_capture(judged.outer)


def _about_all_reduces(options: Options, found: FoundSites, assigned: Assignment) -> Iterator[str]:
    sites: list[Site | MoeSite] = [*(c.site for c in found.candidates), *found.moe_sites]
    there = {site.group for site in sites}
    if found.absent is not None:
        yield found.absent
    elif unknown := [n for n in options.groups or () if not same_groups(filter(None, there), [n])]:
        strangers = [n for n in unknown if not group_exists(n)]
        none = f"; {strangers} are no groups of this process" if strangers else ""
        over = sorted(group_word(group) for group in there if group is not None)
        yield f"option groups names {unknown}, and the graph's sites are over {over}{none}"
    if idle := [p for p in options.skip_sites if not any(names_site(p, site) for site in sites)]:
        yield f"skip_sites names {', '.join(idle)}: no site of this graph has such a module or source"
    fused = any(c.fuses for c in found.candidates)
    if not fused and (meaningless := _about_fused_sites(options)):
        yield f"nothing is fused, so these options mean nothing here: {', '.join(meaningless)}"
    yield from dict.fromkeys(note for carrier in assigned.ready.values() for note in carrier.notes)


def _about_missing_ranks(graph: TracedGraph, found: FoundSites) -> Iterator[str]:
    """Nobody to reduce with."""
    alone = [group_word(name) for name, group in graph.groups.items() if group.size == 1]
    if alone:
        named = f"group {alone[0]!r} has" if len(alone) == 1 else f"groups {', '.join(map(repr, alone))} have"
        yield f"{named} one rank, so there is nothing to reduce; {_START}"
    if found.absent is not None and not (dist.is_available() and dist.is_initialized()):
        yield f"this process has no process group, so nothing is reduced; {_START}"


def _about_moe(assigned: Assignment) -> Iterator[str]:
    """Who carries out dispatches and combines, and why no other."""
    for group, ready in assigned.moe.items():
        serves = ""
        if ready.workspace is not None:
            capacity, size = ready.workspace.sizes.capacity, ready.workspace.kernels.nbytes / 2**20
            serves = f" (capacities up to {capacity}, {size:.1f} MiB; the reference beyond)"
        why = "; ".join(str(c) for c in ready.candidates if c.why_not is not None)
        yield (
            f"dispatches and combines over group '{group_word(group)}' are carried out by {ready.collective}{serves}"
            f"{f': {why}' if why else ''}"
        )


def _about_outer_capture(outer: OuterCapture) -> Iterator[str]:
    if outer.by_reference:
        yield f"in a capture of the caller's the reference carries out: {'; '.join(outer.by_reference)}"
    if outer.barred:
        yield (
            "a capture of the caller's is refused, unless it is made in segments between which these can run: "
            f"{'; '.join(outer.barred)}"
        )


def _about_fused_sites(options: Options) -> list[str]:
    """The given options that are about fused sites alone."""
    given = options.given()
    about = ["transport", "deterministic", "size_table", "max_tokens"]
    about += [] if options.moe_dispatch else ["verify"]  # which runs experts too
    names: list[str] = [n for n in about if n in given]
    if options.collective not in ("auto", "reference"):
        names.insert(0, "collective")
    return [f"{name}={given[name]!r}" for name in names]


def _about_capture(options: Options, graph: TracedGraph, sizes: SizeRule, judged: Judged) -> Iterator[str]:
    captures, barred = judged.graphs is not None, barred_from_capture(judged.assigned.judged_collectives)
    if options.capture_sizes and sizes.tokens is None:
        yield "nothing is captured: the token count cannot be read from the sizes of the inputs"
    elif options.capture_sizes and not captures and options.profile == "conservative" and barred is not None:
        yield f"nothing is captured: {barred.why} (profile='conservative'; {barred.source})"
    elif options.capture_sizes and not captures:
        yield (
            f"nothing is captured: {graph.device.type} has no CUDA graphs; graphs='simulated' captures with a "
            "simulation of them, for tests"
        )
    if captures and (others := sorted(set(options.capture_sizes) - set(judged.captured))):
        assert sizes.tokens is not None
        yield (
            f"captures of {', '.join(map(str, others))} tokens are other graphs': this one is of {sizes.tokens(())} "
            "alone, because its sizes are not dynamic"
        )
    if captures and sizes.leading is not None:
        name = graph.inputs[sizes.leading]
        yield f"the token count is the first dimension of input '{name}', as no all-reduce tells it"
    if captures and len(sizes.bindings) > 1:
        yield (
            f"{len(sizes.bindings)} sizes of the inputs are dynamic: a capture serves calls that agree in all of "
            "them, and each token count is captured for at most 8 combinations"
        )
