// The protocol of the all-reduce: how a row travels, how its arrival is seen, and who waits for what.
//
// A row of HALVES halves of 16-byte vectors travels in lines of 128 bytes: fifteen halves of data, and one that repeats
// the number of the call. Eight neighbouring lanes write a line with one store and read it with one load, and such a
// store arrives whole, over NVLink and within a GPU. So a line says by itself that it is there: no payload can imitate
// the number of a call, which never comes again, and nothing is ever cleared.
//
// The number of the call is kept on the device. A call has SHARES shares, and each block counts those that are its own
// when it begins: what it found says how many calls began before this one, whatever their grids. So nothing of the
// protocol is in a captured graph.
//
// Calls take turns with two buffers. A rank that writes call n + 2 has received from every peer in call n + 1, so each
// peer had begun it, and had received all of call n, whose buffer is written now. A kernel lets its dependents begin
// (programmatic dependent launch) as soon as its blocks have counted and the kernel before has ended. They count too, and
// wait for its end. Where they cannot, because a kernel in between waits for nothing, a call still does not send before
// the blocks of all calls before it have received everything, which each counts for its shares.
//
// No wait is without an end: what does not come within the bound is reported to the host, and the outputs are NaN.
//
// Who waits where, for what, and what would go wrong without:
//
//   last warp   begin      all calls before the last to have   more calls than two would fill the device, and wait
//                          received everything
//   all         begin      the kernel before to have ended     it writes what this one reads
//   last warp   begin      all calls before to have received   they may still read the buffer that is written next
//                          everything
//   all         know       the last warp of their block        it alone knows the number of the call
//   all         follow,    all threads of the cluster to have  a word would come before its block has begun, or be
//               turn 0     arrived in know                     cleared there
//   carriers    receive    the lines of their sources          the only wait for other ranks, and the one with a bound
//   all of a    follow     each other: with a norm of one      squares are read that were not written yet; a block counts
//   block                  block in each turn, without a norm  as having received what one of its warps still waits for,
//                          in the last one                     or returns what one of them has lost
//   carriers    follow     the squares of the turn, from all   with a norm over several blocks: the same; and squares of
//                          carriers of the cluster             two turns on may only come once these were read
//   others      follow,    the same; of a block without        a word would come after its block has ended, or the block
//               last turn  carriers of the turn before too     would count too early
//
// Carriers are the warps of a block that carry granules; the others are its last warp, and those beyond the row's end.
//
// Compiled by NVRTC without headers. There are no ranks' numbers among the template arguments: one image serves all.

// A call of one rank. As in ringfence.py, field by field.
struct Call {
    const char *input, *residual, *weight;  // [tokens, hidden], the same, [hidden]
    char *norm, *out;                       // both [tokens, hidden]
    char *inbox;                            // two buffers of this rank
    char *peers[7];                         // the inboxes of the others, by rank
    u64 *begun;                             // how many shares of calls have begun
    u64 *received;                          // of how many the blocks have received everything
    u32 *broken;                            // not 0: a wait has ended without success, for the ranks of these bits
    const u64 *bound;                       // nanoseconds of a wait, in the host's memory
    u32 *report;                            // in the host's memory: what report() writes
    u64 buffer_bytes;
    u32 tokens, rank;
    float eps, weight_bias;
};

constexpr u32 ALL = 0xffffffffu;
// Of a call: as many as a grid may have blocks.
constexpr u32 SHARES = 1024;
// How often a wait looks in vain before it looks at the time.
constexpr int LOOKS = 64;

// What a wait that ended without success was for: a part, a sum, or nothing, because a source has relayed that it has
// lost something itself. A report to the host is words of its memory: 1, the call (two words), the token, the source,
// the own rank, a bit for each rank that did not come, and this.
constexpr u32 PART = 0, SUM = 1, RELAYED = 2;
// A sum comes after the owner's parts, so the owner gives up first, and relays for whom it has waited.
constexpr u64 BOUNDS_OF_A_SUM = 2;

// Report to the host, if nothing was reported before. absent: a bit for each rank that did not come; returned is what
// stands.
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
    __threadfence_system();  // nothing rests on this one; without it all else is scheduled anew, which was not measured
    return absent;
}
