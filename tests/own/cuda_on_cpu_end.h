// Behind the kernels' sources and the table of kinds: the door for ctypes.

struct Asked {
    int kind, grid, rank, index;
    const char *input, *residual;  // what lies where the call reads it, once the kernel before has ended
    u64 bytes, used;
};

extern "C" int play(int rank_count, int call_count, const Asked *asked, const Call *calls, const cpu::Schedule *how,
                    u64 *turns, u64 *early, char **held, const char **fault) {
    cpu::Request *requests = new cpu::Request[rank_count * call_count];
    int count = 0;
    for (int i = 0; i < rank_count * call_count; i++) {
        const Asked &one = asked[i];
        const Call &call = calls[i];
        if (one.grid == 0) continue;
        const cpu::Input input = {(char *)call.input, one.input, one.bytes};
        const cpu::Input residual = {(char *)call.residual, one.residual, one.bytes};
        requests[count++] = {one.rank, one.grid, &KINDS[one.kind], &call, call.inbox, call.peers,
                             2 * call.buffer_bytes, one.used, call.begun, call.received, call.bound, call.report,
                             {input, residual}};
    }
    const int found = cpu::play(requests, count, rank_count, *how, SHARES, fault);
    delete[] requests;
    *turns = cpu::turns, *early = cpu::early, *held = cpu::held;
    return found;
}
