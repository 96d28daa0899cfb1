// CUDA C++ on a CPU: the threads of all ranks as fibers of one thread, in an order that a seed decides.
//
// It stands in front of the kernels' own sources, in place of instructions.cuh, and runs them as they are. What it
// keeps of a device, and no more: the lanes of a warp go on together after a vote or a shuffle; blocks are dispatched
// in order into a number of slots; a kernel begins when the one before it has ended, or when all of its blocks let
// dependents begin; a store to a peer's memory arrives later, whole lines in any order, and at the latest when its
// kernel ends. With `torn` a line may arrive in two halves, which no kernel here would survive.

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __CUDA_ARCH__ 900

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
struct uint2 {
    u32 x, y;
};
struct uint4 {
    u32 x, y, z, w;
};
static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
struct Call;

namespace cpu {

typedef void (*Entry)(const Call &);
struct Kind {
    Entry entry;
    int threads, cluster;
    size_t shared_bytes;
};
struct Dim {
    u32 x;
};
struct BlockState;
struct Warp;
struct Thread {
    Dim thread, block, grid;
    BlockState *owner;
    Warp *warp;
    ucontext_t context;
    jmp_buf at;
    bool begun = false, done = false;
    u32 turn = 0;  // of the meeting that it has arrived at
    char *stack;
};
struct Warp {
    std::vector<std::unique_ptr<Thread>> lanes;
    int arrived = 0;
    u32 turn = 0;
    u64 given[32], found[2][32];
    bool done() const {
        for (auto &lane : lanes)
            if (!lane->done) return false;
        return true;
    }
};
struct Meeting {
    int arrived = 0, threads = 0;
    u32 turn = 0;
};
struct KernelState;
struct BlockState {
    KernelState *kernel;
    std::vector<Warp> warps;
    Meeting meeting, *cluster;
    std::vector<BlockState *> mates;  // of its cluster
    std::vector<char> shared;
    bool triggered = false;
    bool done() const {
        for (auto &warp : warps)
            if (!warp.done()) return false;
        return true;
    }
};
struct KernelState {
    int rank, index;
    const Kind *kind;
    const Call *call;
    char *inbox;
    u64 inbox_bytes;
    int grid, dispatched = 0, pending = 0;
    std::deque<BlockState> blocks;
    std::deque<Meeting> clusters;
    bool begun = false, ended = false;
};
struct Line {
    char *at;
    uint4 vectors[8];
    u32 there;
    KernelState *kernel;
};

static Thread *me;
static jmp_buf scheduler;
static std::vector<std::deque<KernelState>> *ranks;
static std::vector<Line> lines;
static std::vector<char *> stacks;
static u64 turns;
static bool waits, torn;
static const char *fault;
constexpr size_t STACK = 48 << 10;

static void yield() {
    if (_setjmp(me->at) == 0) _longjmp(scheduler, 1);
}

static void body() {
    me->owner->kernel->kind->entry(*me->owner->kernel->call);
    me->done = true;
    stacks.push_back(me->stack);
    _longjmp(scheduler, 1);
}

static void resume(Thread *thread) {
    me = thread;
    if (_setjmp(scheduler)) return;
    if (thread->begun) _longjmp(thread->at, 1);
    thread->begun = true;
    if (stacks.empty()) stacks.push_back((char *)malloc(STACK));
    thread->stack = stacks.back();
    stacks.pop_back();
    getcontext(&thread->context);
    thread->context.uc_stack.ss_sp = thread->stack;
    thread->context.uc_stack.ss_size = STACK;
    thread->context.uc_link = nullptr;
    makecontext(&thread->context, body, 0);
    setcontext(&thread->context);
}

// What all lanes give, once all have come. All go on in the next turn of the warp.
static const u64 *collect(u64 value) {
    Warp &warp = *me->warp;
    const u32 turn = warp.turn;
    warp.given[me->thread.x & 31] = value;
    if (++warp.arrived == 32) {
        memcpy(warp.found[turn & 1], warp.given, sizeof warp.given);
        warp.arrived = 0;
        warp.turn++;
        yield();
    } else {
        while (warp.turn == turn) yield();
    }
    return warp.found[turn & 1];
}

static void arrive(Meeting &meeting) {
    me->turn = meeting.turn;
    if (++meeting.arrived == meeting.threads) {
        meeting.arrived = 0;
        meeting.turn++;
    }
}

static void wait(Meeting &meeting) {
    while (meeting.turn == me->turn) yield();
    collect(0);  // a warp goes on whole
}

static void meet(Meeting &meeting) {
    const u32 turn = me->turn;  // of a cluster that this thread has arrived at, and not waited for
    arrive(meeting);
    wait(meeting);
    me->turn = turn;
}

static void begin(KernelState &kernel) {
    kernel.begun = true;
    const int cluster = kernel.kind->cluster;
    for (int b = 0; b < kernel.grid; b++) {
        kernel.blocks.emplace_back();
        BlockState &block = kernel.blocks.back();
        block.kernel = &kernel;
        block.meeting.threads = kernel.kind->threads;
        block.shared.assign(kernel.kind->shared_bytes + 64, (char)0xa5);
        if (b % cluster == 0) {
            kernel.clusters.emplace_back();
            kernel.clusters.back().threads = cluster * kernel.kind->threads;
        }
        block.cluster = &kernel.clusters.back();
    }
    for (int b = 0; b < kernel.grid; b++)
        for (int m = 0; m < cluster; m++) kernel.blocks[b].mates.push_back(&kernel.blocks[b / cluster * cluster + m]);
}

static void dispatch(KernelState &kernel) {
    const int b = kernel.dispatched++;
    BlockState &block = kernel.blocks[b];
    block.warps.resize(kernel.kind->threads / 32);
    for (int t = 0; t < kernel.kind->threads; t++) {
        Warp &warp = block.warps[t / 32];
        auto thread = std::make_unique<Thread>();
        thread->thread.x = t, thread->block.x = b, thread->grid.x = kernel.grid;
        thread->owner = &block, thread->warp = &warp;
        warp.lanes.push_back(std::move(thread));
    }
}

static void arrive(size_t which, u32 part) {
    Line &line = lines[which];
    const u32 now = line.there & part;
    for (int i = 0; i < 8; i++)
        if (now >> i & 1) memcpy(line.at + 16 * i, &line.vectors[i], 16);
    line.there &= ~now;
    if (line.there) return;
    line.kernel->pending--;
    lines.erase(lines.begin() + which);
}

static bool may_begin(std::deque<KernelState> &queue, size_t i) {
    if (i == 0 || queue[i - 1].ended) return true;
    KernelState &before = queue[i - 1];
    if (!before.begun || before.dispatched < before.grid) return false;
    for (BlockState &block : before.blocks)
        if (!block.triggered && !block.done()) return false;
    return true;
}

// All calls of all ranks to their end; rank `late` stands still at first. 0; or 1: not within so many turns, 2: a fault.
static int play(std::vector<std::deque<KernelState>> &all, u32 seed, int slots, int late, u64 most) {
    std::mt19937 random(seed);
    ranks = &all, turns = 0, fault = nullptr;
    lines.clear();
    std::vector<bool> asleep(all.size(), false);
    if (late >= 0) asleep[late] = true;
    while (true) {
        bool finished = true;
        std::vector<Warp *> ready;
        for (size_t r = 0; r < all.size(); r++) {
            int resident = 0;
            for (auto &kernel : all[r])
                for (auto &block : kernel.blocks) resident += !block.warps.empty() && !block.done();
            for (size_t i = 0; i < all[r].size(); i++) {
                KernelState &kernel = all[r][i];
                if (kernel.ended) continue;
                finished = false;
                if (!kernel.begun && may_begin(all[r], i)) begin(kernel);
                if (!kernel.begun) break;
                while (kernel.dispatched < kernel.grid && (slots == 0 || resident + kernel.kind->cluster <= slots))
                    for (int c = 0; c < kernel.kind->cluster; c++, resident++) dispatch(kernel);
                bool done = kernel.dispatched == kernel.grid && kernel.pending == 0;
                for (auto &block : kernel.blocks) {
                    done = done && block.done();
                    if (!asleep[r])
                        for (auto &warp : block.warps)
                            if (!warp.done()) ready.push_back(&warp);
                }
                kernel.ended = done && (i == 0 || all[r][i - 1].ended || !waits);
                if (kernel.ended) kernel.blocks.clear();
            }
        }
        if (finished || fault) return fault ? 2 : 0;
        if (turns++ > most) return 1;
        if (turns % 64 == 0)
            for (size_t r = 0; r < all.size(); r++) asleep[r] = random() % 2 || ((int)r == late && turns < 4000);
        if (!lines.empty() && random() % 4 == 0) {
            const size_t which = random() % lines.size();
            if (torn)
                arrive(which, random() % 2 ? 0x0f : 0xf0);
            else if (lines[which].there == 0xff)
                arrive(which, 0xff);
        }
        if (ready.empty()) continue;
        for (int several = 0; several < 4; several++) {
            Warp *warp = ready[random() % ready.size()];
            for (auto &lane : warp->lanes)
                if (!lane->done) resume(lane.get());
        }
    }
}

template <class T>
T &block_shared() {
    char *at = me->owner->shared.data();
    return *(T *)(at + (64 - (uintptr_t)at % 64) % 64);
}

}  // namespace cpu

#define threadIdx (cpu::me->thread)
#define blockIdx (cpu::me->block)
#define gridDim (cpu::me->grid)

// -- instructions ----------------------------------------------------------------------

static inline void store(char *at, uint4 v) {
    cpu::KernelState *kernel = cpu::me->owner->kernel;
    if (at >= kernel->inbox && at < kernel->inbox + kernel->inbox_bytes) {
        memcpy(at, &v, 16);
        return;
    }
    char *begin = at - (uintptr_t)at % 128;
    const int place = (at - begin) / 16;
    for (auto &line : cpu::lines)
        if (line.at == begin) {
            if (line.there >> place & 1) cpu::fault = "a line is written again before it arrived";
            line.vectors[place] = v, line.there |= 1 << place;
            return;
        }
    cpu::Line line = {begin, {}, 1u << place, kernel};
    line.vectors[place] = v;
    cpu::lines.push_back(line);
    kernel->pending++;
}

static inline uint4 load(const char *at) {
    uint4 v;
    memcpy(&v, at, 16);
    return v;
}

static inline u64 clock_ns() { return cpu::turns; }

static inline void wait_for_kernel_before() {
    auto &queue = (*cpu::ranks)[cpu::me->owner->kernel->rank];
    const int index = cpu::me->owner->kernel->index;
    while (cpu::waits && index > 0 && !queue[index - 1].ended) cpu::yield();
    cpu::collect(0);
}

constexpr u64 ASK_EVERY_NS = 1;
static inline void pause() { cpu::yield(); }
static inline void let_dependents_begin() { cpu::me->owner->triggered = true; }

static inline float __uint_as_float(u32 v) {
    float f;
    memcpy(&f, &v, 4);
    return f;
}
static inline u32 __float_as_uint(float f) {
    u32 v;
    memcpy(&v, &f, 4);
    return v;
}
static inline u32 one_bf16(float f) {
    const u32 v = __float_as_uint(f);
    return f != f ? 0x7fff : (v + 0x7fff + (v >> 16 & 1)) >> 16;
}
static inline u32 two_bf16(float low, float high) { return one_bf16(low) | one_bf16(high) << 16; }
static inline u32 two_f16(float, float) { abort(); }
static inline void from_two_f16(u32, float &, float &) { abort(); }
static inline void arrive_in_cluster() { cpu::arrive(*cpu::me->owner->cluster); }
static inline void arrive_in_cluster_without_words() { arrive_in_cluster(); }
static inline void wait_in_cluster() { cpu::wait(*cpu::me->owner->cluster); }
static inline u64 load_shared(const u64 *at) {
    cpu::yield();
    return *at;
}
static inline void store_in_block(u64 *to, int block, u64 value) {
    auto *owner = cpu::me->owner, *mate = owner->mates[block];
    if (mate->warps.empty()) cpu::fault = "a word is written into a block that has not begun";
    if (mate->done()) cpu::fault = "a word is written into a block that has ended";
    auto aligned = [](char *at) { return at + (64 - (uintptr_t)at % 64) % 64; };
    memcpy(aligned(mate->shared.data()) + ((char *)to - aligned(owner->shared.data())), &value, 8);
}

// -- what NVRTC knows by itself --------------------------------------------------------

static inline void __syncthreads() { cpu::meet(cpu::me->owner->meeting); }
static inline void __syncwarp() { cpu::collect(0); }
static inline void __threadfence() {}
static inline void __threadfence_system() {}
static inline int __ffs(int v) { return ffs(v); }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline u64 atomicAdd(u64 *at, u64 value) {
    const u64 old = *at;
    *at += value;
    return old;
}
static inline u32 atomicCAS(u32 *at, u32 expected, u32 value) {
    const u32 old = *at;
    if (old == expected) *at = value;
    return old;
}
static inline int __all_sync(u32, int here) {
    const u64 *all = cpu::collect(here != 0);
    return std::all_of(all, all + 32, [](u64 v) { return v != 0; });
}
static inline int __any_sync(u32, int here) {
    const u64 *all = cpu::collect(here != 0);
    return std::any_of(all, all + 32, [](u64 v) { return v != 0; });
}
static inline u32 __ballot_sync(u32, int here) {
    const u64 *all = cpu::collect(here != 0);
    u32 found = 0;
    for (int lane = 0; lane < 32; lane++) found |= (u32)(all[lane] != 0) << lane;
    return found;
}
static inline u32 __shfl_sync(u32, u32 v, int lane) { return (u32)cpu::collect(v)[lane]; }
static inline float __shfl_xor_sync(u32, float v, int mask) {
    return __uint_as_float((u32)cpu::collect(__float_as_uint(v))[(cpu::me->thread.x & 31) ^ mask]);
}
