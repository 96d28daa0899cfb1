// What the forms of the all-reduce share: how a row is spread, and what a block does: begin, send, receive, and what
// follows the sum. protocol.cuh has the protocol, and who waits for what.

constexpr int HALVES_OF_A_LINE = 15;
constexpr int LINE_BYTES = 128;
constexpr int LINES_OF_A_WARP = 4;

// How a row is spread: over BLOCKS blocks of WARPS warps, each of which carries a granule of four lines in each of
// ROUNDS rounds. One warp more, the last of a block, carries none: it counts, and looks at what the device keeps.
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
    // Whether a block of a cluster carries nothing, where a row has too few granules for all.
    static constexpr bool IDLE_BLOCK = CLUSTER && (BLOCKS - 1) * OF_A_BLOCK >= GRANULES;
    static constexpr u64 ROW_BYTES = 8ull * HALVES;
    // Whether a weight is asked for before the wait; with more of it, it would fill the registers.
    static constexpr bool EARLY_WEIGHT = WEIGHT_ && ROUNDS_ <= 2;
    static_assert(RANKS >= 2 && RANKS <= 8, "two to eight ranks");
    static_assert(WARPS * ROUNDS >= OF_A_BLOCK, "the warps do not cover the row");
    static_assert(WARPS >= 1 && WARPS <= 31, "a block has at most 32 warps");
    static_assert(!CLUSTER || CLUSTERS, "several blocks have a norm in common from SM90 on");
    static_assert(!CLUSTER || BLOCKS <= 8, "a cluster has at most eight blocks");
};

// What a lane carries in a round: two halves of a line, one and the flag, or nothing.
struct Place {
    int granule;  // -1: the whole warp carries nothing
    int line, half;
    bool wire, first, second, flag;
};

template <class F>
struct Shared {
    u64 squares[2][F::LINES];  // of each line, and above them whose turn it is; tokens take turns
    u64 number;                // of this call
    u32 broken;                // as it was found
    u32 lost;                  // where there is no norm: ranks that some warp of this block has waited for in vain
};

// In place of a square: what was lost. No square is a NaN with a sign.
constexpr u32 LOST = 0xffffff00u;

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

    // The last warp takes what the device keeps and lets dependents begin; the others may meanwhile ask for the first rows.
    // One call may begin while another still receives, or two behind kernels that wait for nothing, and no more: they
    // would fill the device and wait.
    __device__ void begin() {
        const bool one = warp == F::WARPS && lane == 0;
        u64 received = 0, due = 0;  // shares of the calls before
        u32 broken = 0;
        if (F::CLUSTER && warp == F::WARPS)
            for (int i = lane; i < 2 * F::LINES; i += 32) shared.squares[i & 1][i >> 1] = 0;
        if (one) {
            look(received, broken);
            due = atomicAdd(call.begun, shares()) / SHARES * SHARES;
            shared.number = due / SHARES + 1;
            shared.lost = 0;
            while (received + SHARES < due) pause(), look(received, broken);
        }
        wait_for_kernel_before();
        if (!one) return;
        let_dependents_begin();
        for (bool again = false; received < due; again = true) {
            if (again) pause();
            look(received, broken);
        }
        shared.broken = broken;
    }

    __device__ void look(u64 &received, u32 &broken) const {
        received = load_word(call.received);
        broken = load_word(call.broken);
    }

    // Where no call works any more, this one sends, and receives nothing.
    __device__ void know() {
        __syncthreads();
        number = shared.number;
        lost = shared.broken;
        if (F::CLUSTER) warp == F::WARPS ? arrive_in_cluster() : arrive_in_cluster_without_words();
    }

    // Of this block.
    __device__ u64 shares() const { return (SHARES - blockIdx.x + gridDim.x - 1) / gridDim.x; }

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
                    // Who has lost something waits no more, and may be calls ahead: what it relays is for any call.
                    const bool here = !p.flag || (got[s].z == low && got[s].w == high) || (u8)got[s].w != 0;
                    if (__all_sync(ALL, here)) missing &= ~(1u << s);
                }
            if (missing == 0) {
                u32 relayed = 0;
#pragma unroll
                for (int s = 0; s < SOURCES; s++) relayed |= p.flag ? (u8)got[s].w : 0;
                if (__any_sync(ALL, relayed != 0)) {
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
            found = load_word(call.broken);
            const u32 lasted = (u32)((now - since) / ASK_EVERY_NS);
            if (found == 0 && lasted != asked) {
                asked = lasted;
                const u64 bound = load_word(call.bound) * (sum ? BOUNDS_OF_A_SUM : 1);
                if (now - since >= bound)
                    found = report(call, number, token, __ffs((int)absent) - 1, absent, sum ? SUM : PART);
            }
        }
        return __shfl_sync(ALL, found, 0);
    }

    // What a source relays of ranks that did not come. The whole warp calls.
    __device__ void hear(u32 token, u32 relayed, u32 source) {
        const u32 lanes = __ballot_sync(ALL, relayed != 0);
        if (lanes == 0) return;
        u32 found = __shfl_sync(ALL, relayed, __ffs((int)lanes) - 1);
        if (lane == 0) found = report(call, number, token, __ffs((int)source) - 1, found, RELAYED);
        lost = __shfl_sync(ALL, found, 0);
    }

    // The square of a line, to all threads that share the norm of its token, in each block of the cluster.
    __device__ void publish(int line, int turn, u32 square) const {
        const u64 word = (u64)(turn + 1) << 32 | square;
        u64 *to = &shared.squares[turn & 1][line];
        if (!F::CLUSTER) *(volatile u64 *)to = word;
#pragma unroll
        for (int block = 0; F::CLUSTER && block < F::BLOCKS; block++) store_in_block(to, block, word);
    }

    // The sum of the squares of a row. It arrives line by line, as the row does, so nobody meets anybody. A warp that
    // carries something is at most a turn ahead of any other, and one that carries nothing asks in the last turn only; in
    // a block of such warps in the one before too, since words of two turns come in any order.
    // A lane asks for its lines at once: a wait for one after the other takes half a microsecond.
    __device__ float sum_of_squares(int turn) {
        constexpr int AT_ONCE = F::LINES <= 8 * 32 ? (F::LINES + 31) / 32 : 8;
        const u64 whose = (u64)(turn + 1) << 32;
        float total = 0.f;
        u32 absent = 0;
        for (int first = lane; first < F::LINES; first += 32 * AT_ONCE) {
            u64 words[AT_ONCE];
            for (bool all = false; !all;) {
                all = true;
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++) {
                    const int line = first + 32 * i;
                    words[i] = line < F::LINES ? load_word(&shared.squares[turn & 1][line]) : whose;
                }
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++) all = all && (words[i] ^ whose) >> 32 == 0;
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                if ((u32)words[i] >= LOST) absent = (u32)words[i] & ~LOST;
                total += __uint_as_float((u32)words[i]);
            }
        }
        const u32 lanes = __ballot_sync(ALL, absent != 0);
        if (lanes != 0) lost = __shfl_sync(ALL, absent, __ffs((int)lanes) - 1);
#pragma unroll
        for (int half = 1; half < 32; half *= 2) total += __shfl_xor_sync(ALL, total, half);
        return total;
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
            if (F::NORM && p.granule >= 0) {
                float x[T::COUNT], square = 0.f;
                T::unpack(rounded[i], x);
#pragma unroll
                for (int k = 0; k < T::COUNT; k++) square = fmaf(x[k], x[k], square);
#pragma unroll
                for (int half = 1; half < 8; half *= 2) square += __shfl_xor_sync(ALL, square, half);
                if (p.flag) publish(p.line, turn, lost ? LOST | lost : __float_as_uint(square));
            }
            write(call.out, token, p, rounded[i]);
        }
        if (!F::NORM && last && lost && lane == 0) shared.lost = lost;
        if (F::NORM ? !F::CLUSTER : last) __syncthreads();
        if (!last && (!F::NORM || place(0).granule < 0)) return;
        if (F::IDLE_BLOCK && last && turn > 0 && (int)part * F::OF_A_BLOCK >= F::GRANULES) sum_of_squares(turn - 1);
        const float total = F::NORM ? sum_of_squares(turn) : 0.f;
        if (!F::NORM) lost |= shared.lost;
        if (last && warp == F::WARPS && lane == 0) atomicAdd(call.received, shares());  // all have received everything
        if (!F::NORM) return;
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

    // A call that has lost something returns nothing but NaN, in every dtype: here, what this block carries of its tokens.
    __device__ void end() const {
        if (!lost) return;
        const uint4 nan = make_uint4(0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu);
        for (u32 token = first; token < call.tokens; token += step)
#pragma unroll
            for (int i = 0; i < F::ROUNDS; i++) {
                write(call.out, token, place(i), nan);
                if (F::NORM) write(call.norm, token, place(i), nan);
            }
    }
};
