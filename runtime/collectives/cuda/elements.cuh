// Elements of each dtype, in vectors of 16 bytes, and sums of them.

__device__ __forceinline__ u32 &word(uint4 &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

struct BFloat16 {
    static constexpr int COUNT = 8;  // in a vector
    static __device__ __forceinline__ void unpack(uint4 v, float *to) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            to[2 * i] = __uint_as_float(word(v, i) << 16);
            to[2 * i + 1] = __uint_as_float(word(v, i) & 0xffff0000u);
        }
    }
    static __device__ __forceinline__ uint4 pack(const float *from) {
        uint4 v;
#pragma unroll
        for (int i = 0; i < 4; i++) word(v, i) = two_bf16(from[2 * i], from[2 * i + 1]);
        return v;
    }
};

struct Float16 {
    static constexpr int COUNT = 8;
    static __device__ __forceinline__ void unpack(uint4 v, float *to) {
#pragma unroll
        for (int i = 0; i < 4; i++) from_two_f16(word(v, i), to[2 * i], to[2 * i + 1]);
    }
    static __device__ __forceinline__ uint4 pack(const float *from) {
        uint4 v;
#pragma unroll
        for (int i = 0; i < 4; i++) word(v, i) = two_f16(from[2 * i], from[2 * i + 1]);
        return v;
    }
};

struct Float32 {
    static constexpr int COUNT = 4;
    static __device__ __forceinline__ void unpack(uint4 v, float *to) {
#pragma unroll
        for (int i = 0; i < 4; i++) to[i] = __uint_as_float(word(v, i));
    }
    static __device__ __forceinline__ uint4 pack(const float *from) {
        return make_uint4(__float_as_uint(from[0]), __float_as_uint(from[1]), __float_as_uint(from[2]),
                          __float_as_uint(from[3]));
    }
};

// Rounded once, of two vectors added in float32.
template <class T>
__device__ __forceinline__ uint4 added(uint4 a, uint4 b) {
    float x[T::COUNT], y[T::COUNT];
    T::unpack(a, x);
    T::unpack(b, y);
#pragma unroll
    for (int i = 0; i < T::COUNT; i++) x[i] += y[i];
    return T::pack(x);
}

// The sum over the ranks, always in their order, in float32 and rounded once: the same bits on every rank.
// got: of the others, by rank.
template <class T, int RANKS>
__device__ __forceinline__ uint4 summed(u32 rank, uint4 own, const uint4 (&got)[RANKS - 1]) {
    float sum[T::COUNT], part[T::COUNT];
    T::unpack(rank == 0 ? own : got[0], sum);
#pragma unroll
    for (int r = 1; r < RANKS; r++) {
        T::unpack(r == rank ? own : r < rank ? got[r < RANKS - 1 ? r : 0] : got[r - 1], part);
#pragma unroll
        for (int i = 0; i < T::COUNT; i++) sum[i] += part[i];
    }
    return T::pack(sum);
}
