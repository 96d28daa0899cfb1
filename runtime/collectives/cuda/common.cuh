// What the forms of the all-reduce share: how a row travels, how its arrival is seen, and what follows the sum.
//
// A row of HALVES halves of 16-byte vectors travels in lines of 128 bytes: fifteen halves of data, and one that repeats
// the number of the call. Eight neighbouring lanes write a line with one store and read it with one load, and such a
// store arrives whole, over NVLink and within a GPU. So a line says by itself that it is there: no payload can imitate
// the number of a call, which never comes again, and nothing is ever cleared.
//
// The number of the call is kept on the device, in a word for each block that a grid may have. A block takes its own, and
// advances those of blocks that this grid does not have too. So all words are alike between two calls, whatever their
// grids, and nothing of the protocol is in a captured graph.
//
// Calls take turns with two buffers. A rank that writes call n + 2 has received from every peer in call n + 1, so each
// peer had begun it, and had received all of call n, whose buffer is written now. A kernel lets its dependents begin
// (programmatic dependent launch) as soon as it has advanced the numbers. They wait for its end. Where they cannot,
// because a kernel in between waits for nothing, a call still does not begin before the blocks of all calls before it have
// received everything, which each counts for all the words that it has advanced.
//
// No wait is without an end: what does not come within the bound is reported to the host, and the outputs are NaN.
//
// Compiled by NVRTC without headers. There are no ranks' numbers among the template arguments: one image serves all.

// A call of one rank. As in ringfence.py, field by field.
struct Call {
    const char *input, *residual, *weight;  // [tokens, hidden], the same, [hidden]
    char *norm, *out;                       // both [tokens, hidden]
    char *inbox;                            // two buffers of this rank
    char *peers[7];                         // the inboxes of the others, by rank
    u64 *numbers;                           // of the last call, for each block
    u64 *received;                          // of how many words the blocks have received everything
    u32 *broken;                            // not 0: a wait has ended without success, for the ranks of these bits
    const u64 *bound;                       // nanoseconds of a wait, in the host's memory
    u32 *report;                            // in the host's memory: what report() writes
    u64 buffer_bytes;
    u32 number_count, tokens, rank;
    float eps, weight_bias;
};

// -- rows and blocks -------------------------------------------------------------------

constexpr int HALVES_OF_A_LINE = 15;
constexpr int LINE_BYTES = 128;
constexpr int LINES_OF_A_WARP = 4;
constexpr u32 ALL = 0xffffffffu;
// How often a wait looks in vain before it looks at the time.
constexpr int LOOKS = 64;

// What a wait that ended without success was for: a part, a sum, or nothing, because a source told that it has lost
// something itself. The host is told, in words of its memory: 1, the call (two words), the token, the source, the own
// rank, a bit for each rank that did not come, and this.
constexpr u32 PART = 0, SUM = 1, TOLD = 2;
// A sum comes after the owner's parts, so the owner gives up first, and tells for whom it has waited.
constexpr u64 BOUNDS_OF_A_SUM = 2;

// Tell the host, if nothing was told before. absent: a bit for each rank that did not come; returned is what stands.
__device__ __noinline__ u32 report(const Call &call, u64 number, u32 token, u32 source, u32 absent, u32 what) {
    const u32 before = atomicCAS(call.broken, 0u, absent);
    if (before != 0) return before;
    volatile u32 *to = call.report;
    to[1] = (u32)number;
    to[2] = (u32)(number >> 32);
    to[3] = token;
    to[4] = source;
    to[5] = call.rank;
    to[6] = absent;
    to[7] = what;
    __threadfence_system();
    to[0] = 1;
    __threadfence_system();
    return absent;
}

// How a row is spread: over BLOCKS blocks of WARPS warps, each of which carries a granule of four lines in each of
// ROUNDS rounds. One warp more, the last of a block, carries none: it advances the numbers while the others go on.
template <class T_, int RANKS_, int HALVES_, bool RESIDUAL_, bool NORM_, bool WEIGHT_, int BLOCKS_, int WARPS_,
          int ROUNDS_>
struct Form {
    typedef T_ T;
    static constexpr int RANKS = RANKS_, PEERS = RANKS_ - 1, HALVES = HALVES_, BLOCKS = BLOCKS_, WARPS = WARPS_,
                         ROUNDS = ROUNDS_;
    static constexpr bool RESIDUAL = RESIDUAL_, NORM = NORM_, WEIGHT = WEIGHT_;
    // Blocks that share a norm are a cluster.
    static constexpr bool CLUSTER = NORM_ && BLOCKS_ > 1;
    static constexpr int LINES = (HALVES + HALVES_OF_A_LINE - 1) / HALVES_OF_A_LINE;
    static constexpr int GRANULES = (LINES + LINES_OF_A_WARP - 1) / LINES_OF_A_WARP;
    static constexpr int OF_A_BLOCK = (GRANULES + BLOCKS - 1) / BLOCKS;
    static constexpr u64 ROW_BYTES = 8ull * HALVES;
    // Whether a weight is asked for before the wait; with more of it, it would fill the registers.
    static constexpr bool EARLY_WEIGHT = WEIGHT_ && ROUNDS_ <= 2;
    static_assert(RANKS >= 2 && RANKS <= 8, "two to eight ranks");
    static_assert(WARPS * ROUNDS >= OF_A_BLOCK, "the warps do not cover the row");
    static_assert(WARPS >= 1 && WARPS <= 31, "a block has at most 32 warps");
};

// What a lane carries in a round: two halves of a line, one and the flag, or nothing.
struct Place {
    int granule;  // -1: the whole warp carries nothing
    int line, half;
    bool wire, first, second, flag;
};

template <class F>
struct Shared {
    float squares[2][F::LINES];  // of each line; tokens take turns
    u64 number;                  // of this call
    u32 broken;                  // as it was found
    int lost;                    // some wait of this block's, or of the cluster's, has ended without success
};

template <class F>
struct Block {
    typedef typename F::T T;
    const Call &call;
    Shared<F> &shared;
    const u32 lane, warp, part, first, step;
    u64 number;
    u32 lost;  // a bit for each rank that did not come; where there is one, no call works any more

    __device__ Block(const Call &c, Shared<F> &s)
        : call(c), shared(s), lane(threadIdx.x & 31), warp(threadIdx.x >> 5), part(blockIdx.x % F::BLOCKS),
          first(blockIdx.x / F::BLOCKS), step(gridDim.x / F::BLOCKS), number(0), lost(0) {}

    // The last warp takes what the device keeps, and the others may meanwhile ask for the first rows.
    __device__ void begin() {
        wait_for_kernel_before();
        if (warp != F::WARPS || lane != 0) return;
        const u64 before = *(const volatile u64 *)(call.numbers + blockIdx.x);
        shared.number = before + 1;
        shared.broken = *(const volatile u32 *)call.broken;
        shared.lost = 0;
        while (*(const volatile u64 *)call.received < before * call.number_count) pause();
    }

    // Where no call works any more, this one sends, and receives nothing.
    __device__ void know() {
        __syncthreads();
        number = shared.number;
        lost = shared.broken;
        if (F::CLUSTER) arrive_in_cluster();
        if (warp != F::WARPS) return;
        for (u32 i = blockIdx.x + lane * gridDim.x; i < call.number_count; i += 32 * gridDim.x)
            *(volatile u64 *)(call.numbers + i) = number;
        __threadfence();
        __syncwarp();
        if (lane == 0) let_dependents_begin();
    }

    __device__ Place place(int round) const {
        Place p;
        const int own = round * F::WARPS + (int)warp;
        const int granule = (int)part * F::OF_A_BLOCK + own;
        const bool here = warp < F::WARPS && own < F::OF_A_BLOCK && granule < F::GRANULES;
        const int column = lane & 7;
        p.granule = here ? granule : -1;
        p.line = granule * LINES_OF_A_WARP + (int)(lane >> 3);
        p.half = p.line * HALVES_OF_A_LINE + 2 * column;
        p.wire = here && p.line < F::LINES;
        p.flag = p.wire && column == 7;
        p.first = p.wire && p.half < F::HALVES;
        p.second = p.wire && column < 7 && p.half + 1 < F::HALVES;
        return p;
    }

    // Halves of a row, 0 where there are none.
    __device__ uint4 read(const char *rows, u32 token, const Place &p) const {
        const uint2 *at = (const uint2 *)(rows + token * F::ROW_BYTES) + p.half;
        const uint2 none = make_uint2(0, 0), a = p.first ? at[0] : none, b = p.second ? at[1] : none;
        return make_uint4(a.x, a.y, b.x, b.y);
    }

    __device__ void read(const char *rows, u32 token, uint4 (&row)[F::ROUNDS]) const {
#pragma unroll
        for (int i = 0; i < F::ROUNDS; i++) row[i] = read(rows, token, place(i));
    }

    __device__ void write(char *rows, u32 token, const Place &p, uint4 v) const {
        uint2 *at = (uint2 *)(rows + token * F::ROW_BYTES) + p.half;
        if (p.first) at[0] = make_uint2(v.x, v.y);
        if (p.second) at[1] = make_uint2(v.z, v.w);
    }

    // Where a call's lines lie in an inbox: in the buffer whose turn it is.
    __device__ u64 slot(u64 granule) const {
        return (number & 1) * call.buffer_bytes + (granule * LINES_OF_A_WARP + (lane >> 3)) * LINE_BYTES +
               16 * (lane & 7);
    }

    // A flag: the number of the call, in 56 bits, and who did not come, if this rank has lost something.
    __device__ void send(char *inbox, u64 granule, const Place &p, uint4 v) const {
        if (p.flag) v.z = (u32)number, v.w = (u32)(number >> 32) << 8 | lost;
        __syncwarp();  // the lanes of a line store at once
        if (p.wire) store(inbox + slot(granule), v);
    }

    // Receive a granule of each of SOURCES sources, `stride` granules apart. The whole warp calls.
    template <int SOURCES>
    __device__ void receive(u64 granule, u64 stride, const Place &p, u32 token, int only, uint4 (&got)[SOURCES]) {
        const char *at = call.inbox + slot(granule);
        const u32 low = (u32)number, high = (u32)(number >> 32) << 8;
        u32 missing = (1u << SOURCES) - 1;
        u64 since = 0;
        u32 asked = 0;
        for (u32 looks = 1; !lost; looks++) {
            __syncwarp();  // the lanes of a line load at once
#pragma unroll
            for (int s = 0; s < SOURCES; s++)
                if (missing >> s & 1)
                    got[s] = p.wire ? load(at + s * stride * (LINES_OF_A_WARP * LINE_BYTES)) : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int s = 0; s < SOURCES; s++)
                if (missing >> s & 1) {
                    // Who has lost something waits no more, and may be calls ahead: what it tells is for any call.
                    const bool here = !p.flag || (got[s].z == low && got[s].w == high) || (u8)got[s].w != 0;
                    if (__all_sync(ALL, here)) missing &= ~(1u << s);
                }
            if (missing == 0) {
                u32 told = 0;
#pragma unroll
                for (int s = 0; s < SOURCES; s++) told |= p.flag ? (u8)got[s].w : 0;
                if (__any_sync(ALL, told != 0)) {
#pragma unroll
                    for (int s = 0; s < SOURCES; s++) hear(token, p.flag ? (u8)got[s].w : 0, by_rank(1u << s, only));
                    continue;
                }
#pragma unroll
                for (int s = 0; s < SOURCES; s++)
                    if (p.flag) got[s].z = got[s].w = 0;
                return;
            } else if (looks % LOOKS == 0) {
                lost = gave_up(since, asked, token, by_rank(missing, only), only >= 0);
            }
        }
#pragma unroll
        for (int s = 0; s < SOURCES; s++) got[s] = make_uint4(0, 0, 0, 0);
    }

    // Bits of sources as bits of ranks. only: the one source, by rank; or -1, where the sources are the other ranks.
    __device__ u32 by_rank(u32 sources, int only) const {
        const u32 below = (1u << call.rank) - 1;
        return only >= 0 ? 1u << only : (sources & below) | (sources & ~below) << 1;
    }

    // The ranks that did not come, once the time of a wait is over or another has ended without success; 0 until then.
    // How long it may last stands in the host's memory, which is far: thousands of warps that looked there at once
    // would wait for that longer than for a peer, and it in turn for them. So a wait looks there once in a millisecond.
    // The whole warp calls.
    __device__ u32 gave_up(u64 &since, u32 &asked, u32 token, u32 absent, bool sum) {
        u32 found = 0;
        if (lane == 0) {
            const u64 now = clock_ns();
            if (since == 0) since = now;
            found = *(const volatile u32 *)call.broken;
            const u32 lasted = (u32)((now - since) / ASK_EVERY_NS);
            if (found == 0 && lasted != asked) {
                asked = lasted;
                const u64 bound = *(const volatile u64 *)call.bound * (sum ? BOUNDS_OF_A_SUM : 1);
                if (now - since >= bound)
                    found = report(call, number, token, __ffs((int)absent) - 1, absent, sum ? SUM : PART);
            }
        }
        return __shfl_sync(ALL, found, 0);
    }

    // What a source tells of ranks that did not come. The whole warp calls.
    __device__ void hear(u32 token, u32 told, u32 source) {
        const u32 lanes = __ballot_sync(ALL, told != 0);
        if (lanes == 0) return;
        u32 found = __shfl_sync(ALL, told, __ffs((int)lanes) - 1);
        if (lane == 0) found = report(call, number, token, __ffs((int)source) - 1, found, TOLD);
        lost = __shfl_sync(ALL, found, 0);
    }

    // All threads of the block, or of the cluster that shares the norm, and what they wrote into shared memory.
    __device__ void meet() const {
        if (F::CLUSTER)
            arrive_in_cluster(), wait_in_cluster();
        else
            __syncthreads();
    }

    // A word of shared memory, of each block of the cluster.
    __device__ void tell(void *to, u32 value) const {
        if (!F::CLUSTER) *(volatile u32 *)to = value;
#pragma unroll
        for (int block = 0; F::CLUSTER && block < F::BLOCKS; block++) store_in_block(to, block, value);
    }

    // What a token needs beside its sum.
    __device__ void prepare(u32 token, uint4 (&residual)[F::ROUNDS], uint4 (&weight)[F::ROUNDS]) const {
        if (F::RESIDUAL) read(call.residual, token, residual);
        if (F::EARLY_WEIGHT) read(call.weight, 0, weight);
    }

    // What follows the sums of a token. Squares are summed line by line and then over the lines: this order depends on
    // nothing but the row, so the bits depend neither on the number of tokens nor on how blocks share a row.
    __device__ void follow(u32 token, int turn, bool last, const uint4 (&sums)[F::ROUNDS],
                           const uint4 (&residual)[F::ROUNDS], const uint4 (&weight)[F::ROUNDS]) {
        if (F::CLUSTER && turn == 0) wait_in_cluster();  // until all of its blocks have begun
        uint4 rounded[F::ROUNDS];
#pragma unroll
        for (int i = 0; i < F::ROUNDS; i++) {
            const Place p = place(i);
            rounded[i] = F::RESIDUAL ? added<T>(sums[i], residual[i]) : sums[i];
            write(call.out, token, p, rounded[i]);
            if (F::NORM && p.granule >= 0) {
                float x[T::COUNT], square = 0.f;
                T::unpack(rounded[i], x);
#pragma unroll
                for (int k = 0; k < T::COUNT; k++) square = fmaf(x[k], x[k], square);
#pragma unroll
                for (int half = 1; half < 8; half *= 2) square += __shfl_xor_sync(ALL, square, half);
                if (p.flag) tell(&shared.squares[turn & 1][p.line], __float_as_uint(square));
            }
        }
        if (!F::NORM && !last) return;
        if (lost && lane == 0) tell(&shared.lost, 1);
        meet();
        if (last) received();
        if (!F::NORM) return;
        float total = 0.f;
        for (int line = lane; line < F::LINES; line += 32) total += shared.squares[turn & 1][line];
#pragma unroll
        for (int half = 1; half < 32; half *= 2) total += __shfl_xor_sync(ALL, total, half);
        const float scale = rsqrtf(total / (float)(F::HALVES * T::COUNT / 2) + call.eps);
#pragma unroll
        for (int i = 0; i < F::ROUNDS; i++) {
            const Place p = place(i);
            float x[T::COUNT], w[T::COUNT];
            T::unpack(rounded[i], x);
            if (F::WEIGHT) T::unpack(F::EARLY_WEIGHT ? weight[i] : read(call.weight, 0, p), w);
#pragma unroll
            for (int k = 0; k < T::COUNT; k++) x[k] = F::WEIGHT ? x[k] * scale * (w[k] + call.weight_bias) : x[k] * scale;
            write(call.norm, token, p, T::pack(x));
        }
    }

    // All threads have received everything.
    __device__ void received() const {
        if (warp != F::WARPS || lane != 0) return;
        const u32 words = (call.number_count - blockIdx.x + gridDim.x - 1) / gridDim.x;
        atomicAdd(call.received, (u64)words);
    }

    // A call that has lost something returns nothing but NaN.
    __device__ void end() {
        if (*(volatile int *)&shared.lost) fill();
    }

    // The outputs of this block's tokens are NaN, in every dtype.
    __device__ void fill() const {
        const uint4 nan = make_uint4(0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu);
        for (u32 token = first; token < call.tokens; token += step)
#pragma unroll
            for (int i = 0; i < F::ROUNDS; i++) {
                write(call.out, token, place(i), nan);
                if (F::NORM) write(call.norm, token, place(i), nan);
            }
    }
};
