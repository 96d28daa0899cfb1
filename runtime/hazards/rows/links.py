"""What is between the GPUs, and what a container lets through: M50 to M54."""

from __future__ import annotations

from .. import checks
from ..hazard import ALL_REDUCES, CUTEDSL, MNNVL, MOE, Action, Certainty, Hazard, Invariant
from ..situation import Collective, Fact, When

_OVER_MULTICAST = (MNNVL, CUTEDSL, MOE, Collective.SYMMETRIC_MEMORY)

ROWS: tuple[Hazard, ...] = (
    Hazard(
        id="M50",
        title="A fused kernel runs over PCIe",
        symptom="No hang: slow. Decoding takes 10 to 34 times longer than without fusion, on GPUs that NVLink bridges "
        "join in pairs or islands (H100 NVL, H200 NVL), or without NVLink (PCIe).",
        mechanism="The driver lets GPUs address each other over PCIe too, so the kernels work. Each of their small "
        "stores and polls then crosses the root complex, with microseconds of latency and a tenth of the bandwidth.",
        when=(When((*ALL_REDUCES, Collective.CUSTOM), facts=(Fact.NOT_ALL_NVLINK,)),),
        decides=Action.WARN,
        invariants=(Invariant.I18,),
        remedy="Do not force the fused kernels there: leave collective='auto', which takes none without NVLink between "
        "all pairs, or measure with `ringfence bench` and give it the option size_table.",
        source="V#48071, V#48075, V#45800",
        certainty=Certainty.CERTAIN,
        shown_by="tests/runtime/test_links.py::test_kernels_are_the_default_where_they_were_measured_and_nowhere_else",
    ),
    Hazard(
        id="M51",
        title="Peer memory is advertised and does not arrive",
        symptom="The first all-reduce hangs at start (TP 2), or a custom all-reduce returns garbage, while the driver "
        "reports peer access; NCCL's P2P transport hangs too, sometimes in replays only.",
        mechanism="That a GPU can address a peer is read from lists of boards and chipsets. With PCIe access control "
        "(ACS) on and an IOMMU that translates, or with a patched P2P driver, stores to a peer are redirected and "
        "dropped or land elsewhere; a PCIe write is not acknowledged, so nobody is told.",
        when=(
            When(
                (*ALL_REDUCES, MOE, Collective.CUSTOM, Collective.SYMMETRIC_MEMORY, Collective.NCCL),
                facts=(Fact.PEER_COPY_LOST,),
            ),
        ),
        decides=Action.REFUSE,
        invariants=(Invariant.I18,),
        remedy="Set NCCL_P2P_DISABLE=1 and use no peer-memory collective; or turn ACS off in the BIOS or by setpci, "
        "and boot with iommu=pt. `ringfence doctor --copies` tries each pair.",
        source="V#51513, NVIDIA/nccl#2079, local-inference-lab/rtx6kpro#15, er0080/vllm-benchmarking#126",
        certainty=Certainty.CERTAIN,
        shown_by="tests/runtime/test_peer_copy.py::test_a_write_that_does_not_arrive_is_named_on_all_ranks",
        prevented_by=checks.PEER_COPY,
    ),
    Hazard(
        id="M52",
        title="The NVLink fabric is not ready",
        symptom="All ranks wait in the rendezvous of a multicast or symmetric-memory workspace although tensor "
        "parallelism is all of WORLD; or CUDA error 802 (system not yet initialized) at start, which goes away by "
        "itself.",
        mechanism="On NVSwitch machines the fabric manager lets each GPU in. While it stalls, restarts or has left "
        "one GPU out, that rank's device cannot be added to a multicast object, and the others wait for it.",
        when=(When((*_OVER_MULTICAST, Collective.NCCL), facts=(Fact.FABRIC_NOT_READY,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I7, Invariant.I17),
        remedy="Restart nvidia-fabricmanager and wait until `nvidia-smi -q` shows Fabric State: Completed on all GPUs "
        "(`ringfence doctor` reads it); until then use no multicast: NCCL_NVLS_ENABLE=0.",
        source="SGL#29073, PT#195596, meta-pytorch/torchcomms#3130",
        certainty=Certainty.CERTAIN,
        not_shown="needs an NVSwitch machine whose fabric manager fails; what doctor says of one is tested",
        not_seen="not a fact of a plan: doctor reads the state, and a rendezvous has a deadline",
    ),
    Hazard(
        id="M53",
        title="There is no IMEX channel to the other nodes",
        symptom="cuMemCreate is not permitted for a fabric handle, or cuMemSetAccess answers NOT_SUPPORTED, in the "
        "workspace of a group that spans nodes of one NVLink domain (GB200, GB300).",
        mechanism="Memory is shared between nodes through the IMEX service and a channel device. A container without "
        "that device, or nodes of one clique in two IMEX domains, cannot map what the others export.",
        when=(When(_OVER_MULTICAST, multi_node=True, facts=(Fact.NO_IMEX_CHANNEL,)),),
        decides=Action.REFUSE,
        invariants=(Invariant.I7, Invariant.I18),
        remedy="Give the container /dev/nvidia-caps-imex-channels/channel0 (on Kubernetes a ComputeDomain), put all "
        "nodes into one IMEX domain (nodes_config.cfg), or use NCCL between nodes.",
        source="microsoft/mscclpp#467, NVIDIA/k8s-dra-driver-gpu#892, V#51986",
        certainty=Certainty.CERTAIN,
        not_shown="needs several nodes on one NVLink fabric; what doctor says of one is tested",
        not_seen="whether a container has the device is not in the graph; doctor looks",
    ),
    Hazard(
        id="M54",
        title="A container forbids handing memory over",
        symptom="pidfd_getfd or ptrace fails with EPERM (operation not permitted) when a MNNVL or MoE workspace is "
        "made in a default container.",
        mechanism="A rank takes the file descriptor of a peer's memory out of that process, which the kernel allows to "
        "whoever may trace it: not without CAP_SYS_PTRACE, nor where yama's ptrace_scope or seccomp forbids it.",
        when=(When((MNNVL, CUTEDSL, MOE, Collective.SYMMETRIC_MEMORY), facts=(Fact.HANDLES_FORBIDDEN,)),),
        decides=Action.WARN,
        invariants=(Invariant.I7,),
        remedy="Start the container with --cap-add=SYS_PTRACE and a seccomp profile that allows pidfd_getfd, or use a "
        "release that sends descriptors over a socket (FlashInfer 0.6.16 and later for MNNVL).",
        source="FI#4089, FI#3701",
        certainty=Certainty.CERTAIN,
        not_shown="needs FlashInfer's MoE workspace in a container; what doctor says of one is tested",
        not_seen="a container's rights are not in the graph; doctor looks, and a workspace is made by vote",
    ),
)
