#include "ranks_on_cpu.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <vector>

namespace cpu {

struct BlockState;
struct Warp;
struct Thread : Lane {
    BlockState *owner;
    Warp *warp;
    ucontext_t context;
    jmp_buf at;
    bool begun = false, done = false;
    bool wrote = false;  // into shared memory, since it last arrived in the cluster with its words
    u32 turn = 0;        // of the meeting that it has arrived at
    char *stack;
};
struct Warp {
    std::vector<std::unique_ptr<Thread>> lanes;
    int arrived = 0, left = 0;  // left: lanes that are not done
    u32 turn = 0;
    u64 given[32], found[2][32], sleeps_until = 0;
    u64 dispatched = 0, asked = 0;  // asked: how often it has looked into the host's memory
    bool done() const { return left == 0; }
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
    int left = 0;  // threads that are not done, of those that were dispatched
    bool done() const { return left == 0; }
};
struct KernelState : Request {
    int index, dispatched = 0, pending = 0;
    bool fed = false, begun = false, ended = false;
    std::deque<BlockState> blocks;
    std::deque<Meeting> clusters;
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

Lane *me;
u64 turns, early;
char *held;
static jmp_buf scheduler;
static std::vector<std::deque<KernelState>> ranks;
static std::vector<Line> lines;
static std::vector<Word> words;
static std::vector<char *> stacks;
static std::vector<char> as_resumed;
static std::vector<std::array<u32, 8>> reports;
static std::map<size_t, std::vector<char>> left_behind;
static std::mt19937 dice;
static Schedule schedule;
static u64 stored, shares;
static const char *fault;
constexpr size_t STACK = 48 << 10;

static Thread *self() { return (Thread *)me; }

static char *aligned(BlockState *block) {
    char *at = block->shared.data();
    return at + (64 - (uintptr_t)at % 64) % 64;
}

// Whether this thread has written into shared memory since it went on.
static void note_writes() {
    BlockState *block = self()->owner;
    if (block->kernel->kind->cluster == 1 || as_resumed == block->shared) return;
    self()->wrote = true, as_resumed = block->shared;
}

void yield() {
    note_writes();
    if (_setjmp(self()->at) == 0) _longjmp(scheduler, 1);
}

static void body() {
    self()->owner->begun = true;
    self()->owner->kernel->kind->entry(*self()->owner->kernel->call);
    self()->done = true;
    self()->warp->left--, self()->owner->left--;
    stacks.push_back(self()->stack);
    _longjmp(scheduler, 1);
}

static void resume(Thread *thread) {
    me = thread;
    if (self()->owner->kernel->kind->cluster > 1) as_resumed = self()->owner->shared;
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

const u64 *collect(u64 value) {
    Warp &warp = *self()->warp;
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
    self()->turn = meeting.turn;
    if (++meeting.arrived == meeting.threads) {
        meeting.arrived = 0;
        meeting.turn++;
    }
}

static void wait(Meeting &meeting) {
    while (meeting.turn == self()->turn) yield();
    collect(0);  // a warp goes on whole
}

static void meet(Meeting &meeting) {
    const u32 turn = self()->turn;  // of a cluster that this thread has arrived at, and not waited for
    arrive(meeting);
    wait(meeting);
    self()->turn = turn;
}

// The host may see the words of a report in any order between two fences. It reads them when it likes, so they stay.
static void host_looks(KernelState *kernel) {
    auto &seen = reports[kernel->rank];
    const bool other = memcmp(kernel->report + 1, &seen[1], 28);
    if (other && kernel->report[0] != seen[0]) fault = "the host may read a report before its words";
    if (other && seen[0]) fault = "a report is written again";
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
    block.left = kernel.kind->threads;
    const u64 until = schedule.drowsy && dice() % 3 == 0 ? turns + dice() % schedule.drowsy : 0;
    for (Warp &warp : block.warps) warp.sleeps_until = until, warp.dispatched = turns;
    for (int t = 0; t < kernel.kind->threads; t++) {
        Warp &warp = block.warps[t / 32];
        auto thread = std::make_unique<Thread>();
        thread->thread.x = t, thread->block.x = b, thread->grid.x = kernel.grid;
        thread->owner = &block, thread->warp = &warp;
        warp.lanes.push_back(std::move(thread));
        warp.left++;
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
    const u64 now = *kernel.counted - *kernel.received;
    if (now > most) fault = "more calls have begun than may, and not received everything";
}

static bool may_begin(std::deque<KernelState> &queue, size_t i) {
    if (i == 0 || queue[i - 1].ended) return true;
    KernelState &before = queue[i - 1];
    if (!before.begun || before.dispatched < before.grid) return false;
    for (BlockState &block : before.blocks)
        if (!block.triggered && !block.done()) return false;
    return true;
}

static bool works(const KernelState &kernel) {
    const auto &blocks = kernel.blocks;
    return std::any_of(blocks.begin(), blocks.end(), [](const BlockState &block) { return !block.done(); });
}

static bool slow(const Warp *warp) {
    const BlockState *block = warp->lanes[0]->owner;
    return schedule.slow == 1 ? warp == &block->warps.back() : schedule.slow == 2 && block == block->mates.back();
}

static int to_their_end() {
    std::vector<bool> asleep(ranks.size(), false);
    if (schedule.late >= 0) asleep[schedule.late] = true;
    for (std::vector<Warp *> ready;; ready.clear()) {
        bool finished = true;
        for (size_t r = 0; r < ranks.size(); r++) {
            int resident = 0;
            for (auto &kernel : ranks[r])
                for (auto &block : kernel.blocks) resident += !block.warps.empty() && !block.done();
            for (size_t i = 0; i < ranks[r].size(); i++) {
                KernelState &kernel = ranks[r][i];
                if (kernel.ended) continue;
                finished = false;
                if (!kernel.begun && may_begin(ranks[r], i)) begin(kernel), early += i > 0 && works(ranks[r][i - 1]);
                if (!kernel.begun) break;
                if (!kernel.fed && (i == 0 || ranks[r][i - 1].ended || !schedule.waits)) feed(kernel);
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
                kernel.ended = done && (i == 0 || ranks[r][i - 1].ended || !schedule.waits);
                if (!kernel.ended) continue;
                host_looks(&kernel);
                left_behind[kernel.kind->shared_bytes] = kernel.blocks[dice() % kernel.grid].shared;
                kernel.blocks.clear();
            }
        }
        if (finished || fault) return fault ? 2 : 0;
        if (turns++ > schedule.most) return 1;
        if (turns % 64 == 0)
            for (size_t r = 0; r < ranks.size(); r++)
                asleep[r] = dice() % 2 || ((int)r == schedule.late && turns < 4000);
        arrive_something();
        doze(ready);
        if (ready.empty()) continue;
        for (int several = 0; several < 4; several++) {
            Warp *warp = ready[dice() % ready.size()];
            if (warp->sleeps_until > turns || (slow(warp) && dice() % 64)) continue;
            for (auto &lane : warp->lanes)
                if (!lane->done) resume(lane.get());
        }
    }
}

int play(const Request *requests, int count, int rank_count, const Schedule &how, u64 all_shares, const char **why) {
    schedule = how, shares = all_shares;
    turns = stored = early = 0, fault = held = nullptr;
    dice.seed(schedule.seed);
    lines.clear(), words.clear(), left_behind.clear();
    ranks.clear(), ranks.resize(rank_count);
    reports.assign(rank_count, {});
    for (int i = 0; i < count; i++) {
        auto &queue = ranks[requests[i].rank];
        if (queue.empty()) memcpy(reports[requests[i].rank].data(), requests[i].report, 32);
        queue.emplace_back();
        (Request &)queue.back() = requests[i], queue.back().index = (int)queue.size() - 1;
    }
    const int found = to_their_end();
    *why = fault ? fault : "";
    return found;
}

// -- instructions ----------------------------------------------------------------------

char *shared_of_block() { return aligned(self()->owner); }

// Whether a call may write there: into what it needs of a buffer, in an inbox.
static bool belongs(const char *at, const KernelState &kernel) {
    const auto within = [&](const char *inbox) {
        return inbox && at >= inbox && at < inbox + kernel.inbox_bytes &&
               (at - inbox) % (kernel.inbox_bytes / 2) < kernel.used;
    };
    return within(kernel.inbox) || std::any_of(kernel.peers, kernel.peers + 7, within);
}

void store(char *at, const uint4 &v) {
    KernelState *kernel = self()->owner->kernel;
    if (!belongs(at, *kernel)) fault = "a line is written where it does not belong";
    const bool apart = !me->together;
    me->together = false;
    if (at >= kernel->inbox && at < kernel->inbox + kernel->inbox_bytes) {
        memcpy(at, &v, 16);
        return;
    }
    char *begin = at - (uintptr_t)at % 128;
    const int place = (at - begin) / 16;
    for (auto &line : lines)
        if (line.at == begin) {
            if (line.there >> place & 1) fault = "a line is written again before it arrived";
            line.vectors[place] = v, line.there |= 1 << place, line.apart |= apart;
            return;
        }
    const bool late = (long long)stored++ == schedule.held;
    if (late) held = begin;
    Line line = {begin, {}, 1u << place, kernel, late ? turns + schedule.held_for : 0, apart};
    line.vectors[place] = v;
    lines.push_back(line);
    kernel->pending++;
}

void load(const char *at, uint4 &v) {
    const bool later = !me->together && me->thread.x & 4;
    for (u32 looks = later ? dice() % 8 : 0; looks > 0; looks--) yield();
    memcpy(&v, at, 16);
}

void wait_for_kernel_before() {
    auto &queue = ranks[self()->owner->kernel->rank];
    const int index = self()->owner->kernel->index;
    while (schedule.waits && index > 0 && !queue[index - 1].ended) yield();
    collect(0);
}

void let_dependents_begin() { self()->owner->triggered = true; }

void meet_block() { meet(self()->owner->meeting); }

void arrive_in_cluster(bool with_words) {
    note_writes();
    if (with_words) self()->wrote = false;
    if (self()->wrote) fault = "a thread that has written into shared memory arrives without that";
    arrive(*self()->owner->cluster);
}

void wait_in_cluster() { wait(*self()->owner->cluster); }

void store_in_block(u64 *to, int block, u64 value) {
    BlockState *owner = self()->owner, *mate = owner->mates[block];
    if (!mate->begun) fault = "a word is written into a block that has not begun";
    const int drowsy = schedule.drowsy;
    const u64 until = drowsy && dice() % 8 == 0 ? turns + dice() % (10 * drowsy) : 0;
    words.push_back({mate, (size_t)((char *)to - aligned(owner)), value, until, owner->kernel});
    owner->kernel->pending++;
}

void let_host_look() { host_looks(self()->owner->kernel); }

// A wait looks into the host's memory once in a while, and not before it has lasted so long.
void look_at(const void *at) {
    Warp &warp = *self()->warp;
    if (at == self()->owner->kernel->bound && ++warp.asked > (turns - warp.dispatched) / ASK_EVERY)
        fault = "a wait looks into the host's memory too often";
}

}  // namespace cpu
