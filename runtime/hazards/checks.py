"""What of ringfence keeps its plans out of most rows, by name, which tests/hangs/test_hazard_table.py looks up."""

from __future__ import annotations

from .hazard import Check

RELEASES = Check("runtime/collectives/flashinfer.py::load", "FlashInfer before 0.6.18 is not used")
NOT_OURS = Check("runtime/collectives/choice.py::choose", "no plan is given to this collective")
MOE_LAUNCH = Check(
    "runtime/collectives/moe_one_sided.py::OneSided",
    "launched without PDL and without a mask; ids are padded to a number that was compiled, payloads go by alignment",
)
MOE_MEMORY = Check(
    "runtime/collectives/moe_one_sided.py::create",
    "the combine region is at one offset for all calls, and ranks meet after initialisation",
)
SAME_MACHINES = Check(
    "runtime/collectives/rank_facts.py::differ", "ranks that differ in it get the reference collective"
)
ONE_NODE = Check("runtime/collectives/rank_facts.py::peers_out_of_reach", "peer memory is used within one node only")
SELF_TEST = Check("runtime/collectives/self_test.py::self_test", "a workspace is tried with such payloads first")
HOST_RULES = Check("compile_passes/rules.py::RULES", "an op that the host takes part in is split off by a rule")
MULTICAST = Check(
    "runtime/collectives/rank_facts.py::multicast_barred", "no rank without multicast gets such a workspace"
)
BUFFER_SIZE = Check("runtime/collectives/kernels.py::check_buffer", "no workspace has a buffer of 1 GiB")
PEER_COPY = Check(
    "runtime/collectives/peer_copy.py::try_copies", "data is copied both ways between all pairs before a kernel does"
)
SAFE_STRATEGIES = Check("runtime/collectives/trtllm.py::safe", "before FlashInfer 0.7.2 no call is two-shot")
FITS = Check("runtime/collectives/workspace.py::Workspace", "a call that does not fit is carried out by the reference")
NEVER_REPLACED = Check(
    "runtime/collectives/workspace.py::Workspaces", "a workspace stays where it is; a larger one is made beside it"
)
VOTE = Check("runtime/collectives/workspace.py::Workspaces", "a workspace is made by all ranks or by none")
NOT_IN_CAPTURE = Check("runtime/collectives/workspace.py::Workspaces", "none is made while a stream captures")
CHANNEL = Check("runtime/collectives/flashinfer.py::ChannelBackend", "handles travel among the ranks of the group")
ONE_OP = Check("runtime/collectives/ops.py::_fused", "all launches of a call are behind one op")
TRTLLM_LAUNCH = Check(
    "runtime/collectives/trtllm.py::Trtllm", "launched without PDL, and completion is triggered at the end"
)
SIZE_TABLE = Check("runtime/collectives/size_table.py::SizeRow", "nothing is tuned: a table says how, by size")
NOT_EMPTY = Check("compile_passes/graph_inputs.py::check_not_empty", "a graph that reduces no token is refused")
CAPACITY = Check(
    "compile_passes/moe_calls.py::check_capacities",
    "in a graph of ringfence's: a rank's own count, or one read from data, is refused; a constant is compared, and an "
    "int input before each capture, and each step with check_every_step; eager calls are, where prepare was told so "
    "(check_every_call)",
)
ROUTING = Check(
    "runtime/collectives/moe_checks.py::check_dispatch", "token counts, widths and, on the host, ids are checked"
)
AGREEMENT = Check(
    "runtime/watch/agree.py::GroupAgreement", "ranks compare their plans, and what they capture, before they go on"
)
BEFORE_CAPTURE = Check("runtime/watch/agree.py::GroupAgreement.before_capture", "the ranks meet before each capture")
LANDING = Check("runtime/replay/buffers.py::static_like", "a piece reads a static copy of what an island returned")
ONE_STREAM = Check(
    "compile_passes/lower.py::lower", "islands and pieces share a stream, so memory is given on in order"
)
OWN_GRAPHS = Check("runtime/replay/capture.py::CudaGraphs", "each piece has an executable graph of its own")
ZERO_ROWS = Check("runtime/replay/runner.py::PiecewiseRunner", "padded rows are zeros")
BUFFER_DUMP = Check("runtime/collectives/buffer_dump.py::describe", "in a hang, a word that no kernel writes is named")
CULPRIT = Check("runtime/watch/culprit.py::find_culprit", "in a hang, the rank that did not enter is named")
TELLS_OTHERS = Check(
    "runtime/watch/watchdog.py::Watchdog.failed", "with on_hang, a rank that fails tells the others, which stop"
)
CLOSED = Check(
    "runtime/errors.py::WorkspaceReplacedError", "a graph is not replayed once its workspace was closed: an error"
)
