// One-shot: every rank sends its rows to all others, and each sums all of them.
//
// In an inbox: [token][source][granule], where the sources are the other ranks, in their order.

template <class F>
__device__ __forceinline__ void one_shot(const Call &call) {
    __shared__ Shared<F> shared;
    Block<F> block(call, shared);
    const u32 rank = call.rank;
    block.begin();
    int turn = 0;
    for (u32 token = block.first; token < call.tokens; token += block.step, turn++) {
        uint4 own[F::ROUNDS], residual[F::ROUNDS] = {}, weight[F::ROUNDS] = {}, sums[F::ROUNDS] = {}, got[F::PEERS];
        block.read(call.input, token, own);
        if (turn == 0) block.know();
#pragma unroll
        for (int i = 0; i < F::ROUNDS; i++) {
            const Place p = block.place(i);
            if (p.granule < 0) continue;
            for (u32 k = 0; k < F::PEERS; k++) {
                const u32 peer = (rank + k) % F::PEERS;  // ranks begin with different ones
                const u32 mine = peer < rank ? rank - 1 : rank;
                block.send(call.peers[peer], (u64)(token * F::PEERS + mine) * F::GRANULES + p.granule, p, own[i]);
            }
        }
        block.prepare(token, residual, weight);
#pragma unroll
        for (int i = 0; i < F::ROUNDS; i++) {
            const Place p = block.place(i);
            if (p.granule < 0) continue;
            block.receive((u64)token * F::PEERS * F::GRANULES + p.granule, F::GRANULES, p, token, -1, got);
            sums[i] = summed<typename F::T, F::RANKS>(rank, own[i], got);
        }
        block.follow(token, turn, token + block.step >= call.tokens, sums, residual, weight);
    }
    block.end();
}
