// CUDA C++ on a CPU: what stands in front of the kernels' own sources, in place of instructions.cuh, and runs them as
// they are, on ranks_on_cpu.h.

#include "ranks_on_cpu.h"

#define __device__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __CUDA_ARCH__ 900

constexpr bool CLUSTERS = true;

#define threadIdx (cpu::me->thread)
#define blockIdx (cpu::me->block)
#define gridDim (cpu::me->grid)

// -- instructions ----------------------------------------------------------------------

// Eight lanes store a line at once, and read it at once, if nothing came between them since they last met.
static inline void store(char *at, uint4 v) { cpu::store(at, v); }
static inline uint4 load(const char *at) {
    uint4 v;
    cpu::load(at, v);
    return v;
}

static inline u64 clock_ns() { return cpu::turns; }

static inline void wait_for_kernel_before() { cpu::wait_for_kernel_before(); }

constexpr u64 ASK_EVERY_NS = cpu::ASK_EVERY;
static inline void pause() { cpu::yield(); }
static inline void let_dependents_begin() { cpu::let_dependents_begin(); }

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
static inline void arrive_in_cluster() { cpu::arrive_in_cluster(true); }
static inline void arrive_in_cluster_without_words() { cpu::arrive_in_cluster(false); }
static inline void wait_in_cluster() { cpu::wait_in_cluster(); }
template <class W>
static inline W load_word(const W *at) {
    cpu::look_at(at);
    cpu::yield();
    return *at;
}
static inline void store_in_block(u64 *to, int block, u64 value) { cpu::store_in_block(to, block, value); }

// -- what NVRTC knows by itself --------------------------------------------------------

static inline void __syncthreads() { cpu::meet_block(); }
static inline void __syncwarp() {
    cpu::collect(0);
    cpu::me->together = true;
}
static inline void __threadfence_system() { cpu::let_host_look(); }
static inline int __ffs(int v) { return __builtin_ffs(v); }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline u64 atomicAdd(u64 *at, u64 value) {
    cpu::yield();
    const u64 old = *at;
    *at += value;
    return old;
}
static inline u32 atomicCAS(u32 *at, u32 expected, u32 value) {
    cpu::yield();
    const u32 old = *at;
    if (old == expected) *at = value;
    return old;
}
static inline u32 __ballot_sync(u32, int here) {
    const u64 *all = cpu::collect(here != 0);
    u32 found = 0;
    for (int lane = 0; lane < 32; lane++) found |= (u32)(all[lane] != 0) << lane;
    return found;
}
static inline int __all_sync(u32 who, int here) { return __ballot_sync(who, here) == 0xffffffffu; }
static inline int __any_sync(u32 who, int here) { return __ballot_sync(who, here) != 0; }
static inline u32 __shfl_sync(u32, u32 v, int lane) { return (u32)cpu::collect(v)[lane]; }
static inline float __shfl_xor_sync(u32, float v, int mask) {
    return __uint_as_float((u32)cpu::collect(__float_as_uint(v))[(cpu::me->thread.x & 31) ^ mask]);
}
