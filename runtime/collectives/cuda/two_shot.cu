// Two-shot: every rank sums its share of each row, and sends the sums to all.
//
// A granule belongs to rank granule % RANKS. In an inbox, for each token: the parts of the rank's own granules,
// [source][granule / RANKS], and then the sums, [granule]. A rank sends its sums to itself too, so all are received
// alike. They are those of one-shot, bit by bit.

template <class F>
__device__ __forceinline__ void two_shot(const Call &call) {
    constexpr u64 SHARE = (F::GRANULES + F::RANKS - 1) / F::RANKS;
    constexpr u64 PARTS = F::PEERS * SHARE, OF_A_TOKEN = PARTS + F::GRANULES;
    static_assert(F::GRANULES >= F::RANKS, "every rank has a share of each row");
    __shared__ Shared<F> shared;
    Block<F> block(call, shared);
    const u32 rank = call.rank;
    block.begin();
    for (u32 token = block.first; token < call.tokens; token += block.step) {
        uint4 own[F::ROUNDS];
        block.read(call.input, token, own);
        if (token == block.first) block.know();
#pragma unroll
        for (int i = 0; i < F::ROUNDS; i++) {
            const Place p = block.place(i);
            const u32 owner = (u32)p.granule % F::RANKS;
            if (p.granule < 0 || owner == rank) continue;
            const u32 mine = rank < owner ? rank : rank - 1, peer = owner < rank ? owner : owner - 1;
            block.send(call.peers[peer], token * OF_A_TOKEN + mine * SHARE + p.granule / F::RANKS, p, own[i]);
        }
    }
    for (u32 token = block.first; token < call.tokens; token += block.step)
#pragma unroll
        for (int i = 0; i < F::ROUNDS; i++) {
            const Place p = block.place(i);
            if (p.granule < 0 || (u32)p.granule % F::RANKS != rank) continue;
            const uint4 own = block.read(call.input, token, p);
            uint4 got[F::PEERS];
            block.receive(token * OF_A_TOKEN + p.granule / F::RANKS, SHARE, p, token, -1, got);
            const uint4 sum = summed<typename F::T, F::RANKS>(rank, own, got);
            const u64 to = token * OF_A_TOKEN + PARTS + p.granule;
            for (u32 k = 0; k < F::PEERS; k++) block.send(call.peers[(rank + k) % F::PEERS], to, p, sum);
            block.send(call.inbox, to, p, sum);
        }
    int turn = 0;
    for (u32 token = block.first; token < call.tokens; token += block.step, turn++) {
        uint4 residual[F::ROUNDS] = {}, weight[F::ROUNDS] = {}, sums[F::ROUNDS] = {};
        block.prepare(token, residual, weight);
#pragma unroll
        for (int i = 0; i < F::ROUNDS; i++) {
            const Place p = block.place(i);
            if (p.granule < 0) continue;
            uint4 got[1];
            block.receive(token * OF_A_TOKEN + PARTS + p.granule, 0, p, token, (int)((u32)p.granule % F::RANKS), got);
            sums[i] = got[0];
        }
        block.follow(token, turn, token + block.step >= call.tokens, sums, residual, weight);
    }
    block.end();
}
