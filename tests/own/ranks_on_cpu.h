// The threads of all ranks as fibers of one thread, in an order that a seed decides.
//
// What it keeps of a device, and no more:
// - The lanes of a warp go on together after a vote or a shuffle. A warp, or a block, may stand still for a while.
// - Blocks are dispatched in order into a number of slots, the blocks of a cluster at once, into shared memory that
//   holds what an earlier kernel left there.
// - A kernel begins when the one before it has ended, or when all of its blocks let dependents begin. What it reads is
//   there when the one before has ended, or, where a kernel in between waits for nothing, when it begins.
// - A store to a peer's memory arrives later, and at the latest when its kernel ends: whole lines in any order, where
//   the lanes stored at once. One line may be held up for long. With `torn` each line may arrive in two halves.
// - A word for another block of a cluster arrives later too, in any order but that of one place.
// - The host sees what a kernel reports in any order but that of a fence.

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <vector>

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
    bool together = false;  // with its warp, for what comes next
    bool wrote = false;     // into shared memory, since it last arrived in the cluster with its words
    u32 turn = 0;           // of the meeting that it has arrived at
    char *stack;
};
struct Warp {
    std::vector<std::unique_ptr<Thread>> lanes;
    int arrived = 0;
    u32 turn = 0;
    u64 given[32], found[2][32], sleeps_until = 0;
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
    bool begun = false, triggered = false;
    bool done() const {
        for (auto &warp : warps)
            if (!warp.done()) return false;
        return true;
    }
};
// What the kernel before leaves for a kernel.
struct Input {
    char *to;
    const char *from;
    u64 bytes;
};
struct KernelState {
    int rank, index;
    const Kind *kind;
    const Call *call;
    char *inbox;
    u64 inbox_bytes;
    const u64 *counted, *received;  // shares
    const u32 *report;
    Input inputs[2];
    int grid, dispatched = 0, pending = 0;
    bool fed = false;
    std::deque<BlockState> blocks;
    std::deque<Meeting> clusters;
    bool begun = false, ended = false;
};
struct Line {
    char *at;
    uint4 vectors[8];
    u32 there;
    KernelState *kernel;
    u64 until;   // held up
    bool apart;  // not stored at once
};
struct Word {
    BlockState *to;
    size_t place;
    u64 value, until;
    KernelState *kernel;
};
// What a run is like. late: the rank that stands still at first. drowsy: for how many turns a warp, a block or a word
// stands still at most. held: which of all lines arrives only so many turns after it was stored; -1 is none.
struct Schedule {
    u32 seed;
    int waits, torn, slots, late, drowsy;
    long long held;
    u64 held_for, most;
};

static Thread *me;
static jmp_buf scheduler;
static std::vector<std::deque<KernelState>> *ranks;
static std::vector<Line> lines;
static std::vector<Word> words;
static std::vector<char *> stacks;
static std::vector<char> as_resumed;
static std::vector<std::array<u32, 8>> reports;
static std::map<size_t, std::vector<char>> left_behind;
static std::mt19937 dice;
static Schedule schedule;
static u64 turns, stored, shares;
static const char *fault;
constexpr size_t STACK = 48 << 10;

static char *aligned(BlockState *block) {
    char *at = block->shared.data();
    return at + (64 - (uintptr_t)at % 64) % 64;
}

// Whether this thread has written into shared memory since it went on.
static void note_writes() {
    BlockState *block = me->owner;
    if (block->kernel->kind->cluster > 1 && as_resumed != block->shared) me->wrote = true, as_resumed = block->shared;
}

static void yield() {
    note_writes();
    if (_setjmp(me->at) == 0) _longjmp(scheduler, 1);
}

static void body() {
    me->owner->begun = true;
    me->owner->kernel->kind->entry(*me->owner->kernel->call);
    me->done = true;
    stacks.push_back(me->stack);
    _longjmp(scheduler, 1);
}

static void resume(Thread *thread) {
    me = thread;
    if (me->owner->kernel->kind->cluster > 1) as_resumed = me->owner->shared;
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
    me->together = false;
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

// The host may see the words of a report in any order between two fences.
static void host_looks(KernelState *kernel) {
    auto &seen = reports[kernel->rank];
    const bool told = kernel->report[0] != seen[0];
    if (told && memcmp(kernel->report + 1, &seen[1], 28)) fault = "the host may read a report before its words";
    memcpy(seen.data(), kernel->report, 32);
}

static void feed(KernelState &kernel) {
    kernel.fed = true;
    for (Input &input : kernel.inputs) memcpy(input.to, input.from, input.bytes);
}

static void begin(KernelState &kernel) {
    kernel.begun = true;
    const int cluster = kernel.kind->cluster;
    for (int b = 0; b < kernel.grid; b++) {
        kernel.blocks.emplace_back();
        BlockState &block = kernel.blocks.back();
        block.kernel = &kernel;
        block.meeting.threads = kernel.kind->threads;
        auto &left = left_behind[kernel.kind->shared_bytes];
        if (left.empty()) left.assign(kernel.kind->shared_bytes + 64, (char)0xa5);
        block.shared = left;
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
    const u64 until = schedule.drowsy && dice() % 3 == 0 ? turns + dice() % schedule.drowsy : 0;
    for (Warp &warp : block.warps) warp.sleeps_until = until;
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
    if (!line.there) line.kernel->pending--, lines.erase(lines.begin() + which);
}

static void arrive_word(size_t which) {
    if (words[which].until > turns) return;
    for (size_t i = 0; i < which; i++)  // those of one place in order
        if (words[i].to == words[which].to && words[i].place == words[which].place) which = i;
    const Word word = words[which];
    words.erase(words.begin() + which);
    word.kernel->pending--;
    if (word.to->done()) fault = "a word arrives in a block that has ended";
    memcpy(aligned(word.to) + word.place, &word.value, 8);
}

static void arrive_something() {
    for (int several = dice() % 4; several > 0 && !words.empty(); several--) arrive_word(dice() % words.size());
    if (lines.empty() || dice() % 4) return;
    const size_t which = dice() % lines.size();
    if (lines[which].until > turns) return;
    if (schedule.torn || lines[which].apart)
        arrive(which, dice() % 2 ? 0x0f : 0xf0);
    else if (lines[which].there == 0xff)
        arrive(which, 0xff);
}

// A warp alone, or its block, stands still for a while.
static void doze(const std::vector<Warp *> &ready) {
    if (!schedule.drowsy || turns % 32 || ready.empty()) return;
    Warp *warp = ready[dice() % ready.size()];
    const bool alone = dice() % 2;
    const u64 until = turns + dice() % schedule.drowsy;
    for (Warp &other : warp->lanes[0]->owner->warps)
        if (&other == warp || !alone) other.sleeps_until = until;
}

// One call of a rank may begin while another still receives, or two behind kernels that wait for nothing.
static void count(const KernelState &kernel) {
    const u64 most = (schedule.waits ? 2 : 3) * shares;
    if (*kernel.counted - *kernel.received > most) fault = "more calls have begun than may, and not received everything";
}

static bool may_begin(std::deque<KernelState> &queue, size_t i) {
    if (i == 0 || queue[i - 1].ended) return true;
    KernelState &before = queue[i - 1];
    if (!before.begun || before.dispatched < before.grid) return false;
    for (BlockState &block : before.blocks)
        if (!block.triggered && !block.done()) return false;
    return true;
}

// All calls of all ranks to their end. 0; or 1: not within so many turns, 2: a fault.
static int play(std::vector<std::deque<KernelState>> &all) {
    ranks = &all, turns = stored = 0, fault = nullptr;
    dice.seed(schedule.seed);
    lines.clear(), words.clear(), left_behind.clear();
    reports.assign(all.size(), {});
    for (size_t r = 0; r < all.size(); r++)
        if (!all[r].empty()) memcpy(reports[r].data(), all[r][0].report, 32);
    std::vector<bool> asleep(all.size(), false);
    if (schedule.late >= 0) asleep[schedule.late] = true;
    for (std::vector<Warp *> ready;; ready.clear()) {
        bool finished = true;
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
                if (!kernel.fed && (i == 0 || all[r][i - 1].ended || !schedule.waits)) feed(kernel);
                const int most = schedule.slots ? schedule.slots : 1 << 20, cluster = kernel.kind->cluster;
                while (kernel.dispatched < kernel.grid && resident + cluster <= most)
                    for (int c = 0; c < cluster; c++, resident++) dispatch(kernel);
                count(kernel);
                bool done = kernel.dispatched == kernel.grid && kernel.pending == 0;
                for (auto &block : kernel.blocks) {
                    done = done && block.done();
                    if (!asleep[r])
                        for (auto &warp : block.warps)
                            if (!warp.done() && warp.sleeps_until <= turns) ready.push_back(&warp);
                }
                kernel.ended = done && (i == 0 || all[r][i - 1].ended || !schedule.waits);
                if (!kernel.ended) continue;
                host_looks(&kernel);
                left_behind[kernel.kind->shared_bytes] = kernel.blocks[dice() % kernel.grid].shared;
                kernel.blocks.clear();
            }
        }
        if (finished || fault) return fault ? 2 : 0;
        if (turns++ > schedule.most) return 1;
        if (turns % 64 == 0)
            for (size_t r = 0; r < all.size(); r++) asleep[r] = dice() % 2 || ((int)r == schedule.late && turns < 4000);
        arrive_something();
        doze(ready);
        if (ready.empty()) continue;
        for (int several = 0; several < 4; several++) {
            Warp *warp = ready[dice() % ready.size()];
            if (warp->sleeps_until > turns) continue;
            for (auto &lane : warp->lanes)
                if (!lane->done) resume(lane.get());
        }
    }
}

template <class T>
T &block_shared() {
    return *(T *)aligned(me->owner);
}

}  // namespace cpu
