// What C++ has no words for: the instructions of the device that the kernels use.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

// Whether blocks form clusters, and a kernel may begin before the one before it has ended.
constexpr bool CLUSTERS = __CUDA_ARCH__ >= 900;

__device__ __forceinline__ void store(char *at, uint4 v) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ uint4 load(const char *at) {
    uint4 v;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at)
                 : "memory");
    return v;
}

__device__ __forceinline__ u64 clock_ns() {
    u64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
    return now;
}

// How long a wait lasts before it asks the host how long it may last, and asks again.
constexpr u64 ASK_EVERY_NS = 1 << 20;

__device__ __forceinline__ void pause() {
    asm volatile("nanosleep.u32 100;");
}

__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_dependents_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ u32 two_bf16(float low, float high) {
    u32 v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}

__device__ __forceinline__ u32 two_f16(float low, float high) {
    u32 v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}

__device__ __forceinline__ void from_two_f16(u32 v, float &low, float &high) {
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
        : "=f"(low), "=f"(high)
        : "r"(v));
}

// All threads of a cluster, and what they wrote into shared memory before they arrived.
__device__ __forceinline__ void arrive_in_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

// By a thread that has written nothing for the others: it does not wait for its other stores to be seen.
__device__ __forceinline__ void arrive_in_cluster_without_words() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_in_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Into the shared memory of a block of the cluster, where this block has `to`. A word arrives whole.
__device__ __forceinline__ void store_in_block(u64 *to, int block, u64 value) {
#if __CUDA_ARCH__ >= 900
    u32 mine, theirs;
    asm volatile("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(mine) : "l"(to));
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(mine), "r"(block));
    asm volatile("st.relaxed.cluster.shared::cluster.u64 [%0], %1;" ::"r"(theirs), "l"(value) : "memory");
#endif
}

// What another thread, another kernel or the host may change meanwhile.
__device__ __forceinline__ u32 load_word(const u32 *at) { return *(const volatile u32 *)at; }
__device__ __forceinline__ u64 load_word(const u64 *at) { return *(const volatile u64 *)at; }
