// The threads of all ranks as fibers of one thread, in an order that a seed decides.
//
// What it keeps of a device, and no more:
// - The lanes of a warp go on together after a vote or a shuffle. A warp, or a block, may stand still for a while, and
//   the last warps of all blocks, or the last blocks of all clusters, may be slow.
// - Blocks are dispatched in order into a number of slots, the blocks of a cluster at once, into shared memory that
//   holds what an earlier kernel left there.
// - A kernel begins when the one before it has ended, or when all of its blocks let dependents begin. What it reads is
//   there when the one before has ended, or, where a kernel in between waits for nothing, when it begins.
// - A store to a peer's memory arrives later, and at the latest when its kernel ends: whole lines in any order, where
//   the lanes stored at once. One line may be held up for long. With `torn` each line may arrive in two halves.
// - A word for another block of a cluster arrives later too, in any order but that of one place.
// - The host sees what a kernel reports in any order but that of a fence, and at any time. Its own memory is far.
//
// What the kernels' sources see of it is here; ranks_on_cpu.cpp does it, and is compiled once for all kernels.

#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

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
// A thread, as its kernel sees it.
struct Lane {
    Dim thread, block, grid;
    bool together = false;  // with its warp, for what comes next
};
// What the kernel before leaves for a kernel.
struct Input {
    char *to;
    const char *from;
    u64 bytes;
};
// A call of a rank. used: bytes of a buffer that it needs; counted, received: its shares; bound: in the host's memory.
struct Request {
    int rank, grid;
    const Kind *kind;
    const Call *call;
    char *inbox;
    char *const *peers;
    u64 inbox_bytes, used;
    const u64 *counted, *received, *bound;
    const u32 *report;
    Input inputs[2];
};
// What a run is like. late: the rank that stands still at first. drowsy: for how many turns a warp, a block or a word
// stands still at most. slow: who goes on once where others do 64 times: nobody, the last warps of all blocks (1), or the
// last blocks of all clusters (2). held: which of all lines arrives only so many turns after it was stored; -1 is none.
struct Schedule {
    u32 seed;
    int waits, torn, slots, late, drowsy, slow;
    long long held;
    u64 held_for, most;
};

// Turns that a wait lasts before it looks into the host's memory, and looks again.
constexpr u64 ASK_EVERY = 1000;

extern Lane *me;
// early: how many kernels began while blocks of the one before worked. held: the line that was held up.
extern u64 turns, early;
extern char *held;

void yield();
// What all lanes of the warp give, once all have come. All go on in the next turn of the warp.
const u64 *collect(u64 value);
char *shared_of_block();

void store(char *at, const uint4 &v);
void load(const char *at, uint4 &v);
void wait_for_kernel_before();
void let_dependents_begin();
void meet_block();
void arrive_in_cluster(bool with_words);
void wait_in_cluster();
void store_in_block(u64 *to, int block, u64 value);
void let_host_look();
void look_at(const void *at);

// The requests of all ranks to their end. 0; or 1: not within so many turns, 2: a fault.
int play(const Request *requests, int count, int rank_count, const Schedule &how, u64 shares, const char **why);

template <class T>
T &block_shared() {
    return *(T *)shared_of_block();
}

}  // namespace cpu
