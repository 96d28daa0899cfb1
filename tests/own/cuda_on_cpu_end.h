// Behind the kernels' sources and the table of kinds: the door for ctypes.

struct Asked {
    int kind, grid, rank, index;
    const char *input, *residual;  // what lies where the call reads it, once the kernel before has ended
    u64 bytes;
};

extern "C" int play(int rank_count, int call_count, const Asked *asked, const Call *calls, const cpu::Schedule *how,
                    u64 *turns, const char **fault) {
    cpu::schedule = *how, cpu::shares = SHARES;
    std::vector<std::deque<cpu::KernelState>> all(rank_count);
    for (int r = 0; r < rank_count; r++)
        for (int i = 0; i < call_count; i++) {
            const Asked &one = asked[r * call_count + i];
            const Call &call = calls[r * call_count + i];
            if (one.grid == 0) continue;
            cpu::KernelState kernel;
            kernel.rank = r, kernel.index = (int)all[r].size(), kernel.kind = &KINDS[one.kind], kernel.call = &call;
            kernel.inbox = call.inbox, kernel.inbox_bytes = 2 * call.buffer_bytes, kernel.grid = one.grid;
            kernel.counted = call.begun, kernel.received = call.received, kernel.report = call.report;
            kernel.inputs[0] = {(char *)call.input, one.input, one.bytes};
            kernel.inputs[1] = {(char *)call.residual, one.residual, one.bytes};
            all[r].push_back(std::move(kernel));
        }
    const int found = cpu::play(all);
    *turns = cpu::turns, *fault = cpu::fault ? cpu::fault : "";
    return found;
}
