// Shadow memory: who touched each 2 bytes last
//
// A record is time << 12 | flags << 10 | thread. Time counts synchronisations (barriers, __syncwarp, starts of blocks
// and launches), so two records of one block are ordered if a barrier's time lies between them. Flags: 0 a whole
// granule, 1 its low byte, 2 its high byte, 3 an atomic. For each granule: the last writer, the last reader, and the
// last reader that was another thread than that one (an approximation; several thread orders make up for it).

static const u32 TID = 0x3ff, LOW_BYTE = 1 << 10, HIGH_BYTE = 2 << 10, ATOMIC = 3 << 10, FLAGS = 3 << 10;
// States instead of a writer. Fresh pages are 0.
static const u32 UNALLOCATED = 0, INITIALISED = 1, IN_FLIGHT = 0xfffffffc, READ_ONLY = 0xfffffffd,
                 NEVER_WRITTEN = 0xfffffffe;
static const u32 TIME_END = 0xffff0, TIME_SWEEP = 0xc0000;

static u32 *writers, *readers, *other_readers;
static size_t high_water = ARENA;  // no array has lain beyond
static u32 now = 2;                // the present time
static u32 launch_record;          // records below are from earlier launches: no matter
static u32 block_record;           // records below are from other blocks of this launch
static u32 limit_record;           // records up to this one happened before this block's last barrier
static u32 known[MAX_THREADS]
                [32];  // what lane j did until known[i][j] happened before what thread i does now (__syncwarp)
static std::vector<u32> block_starts;        // times, in order of execution
static std::vector<uint3> block_indices;     // and which block it was
static unsigned char unfenced[MAX_THREADS];  // has written global memory since its last __threadfence
static u32 fence_time[MAX_THREADS];

// Atomics on one address order blocks: what a block had done and fenced when it came there happened before what a later
// block does after it came. Per block and address: everything up to a barrier's time, and single threads up to later ones.
struct Arrival {
    u32 fenced_base, base;
    std::unordered_map<u32, u32> fenced_threads, threads;
};
struct Counter {
    std::unordered_map<u32, Arrival> arrivals;  // by block
};
static std::unordered_map<uintptr_t, Counter> counters;
static std::vector<std::vector<Counter*>> touched;  // by block, numbered as in block_starts: where it came

static void fill(size_t begin, size_t end, u32 value) {
    std::fill(writers + begin / 2, writers + (end + 1) / 2, value);
}

static void tick() {
    if (++now >= TIME_END) {
        fail("executor limit", At{}, "more than %u synchronisations in one block", TIME_END - TIME_SWEEP);
    }
}

// Starts time anew before it runs out: records of this launch become "some earlier block", older ones vanish.
static void sweep() {
    auto squash = [](u32& r, u32 none) {
        if (r >= (TIME_END << 12) || r <= INITIALISED) { return; }
        r = r >= launch_record ? 2u << 12 | (r & (FLAGS | TID)) : none;
    };
    for (size_t g = 0; g < high_water / 2; ++g) {
        squash(writers[g], INITIALISED);
        squash(readers[g], 0);
        squash(other_readers[g], 0);
    }
    memset(known, 0, sizeof known);
    memset(fence_time, 0, sizeof fence_time);
    block_starts.clear(), block_indices.clear(), counters.clear(), touched.clear();
    launch_record = 2u << 12;
    now = 3;
}

enum Known { UNKNOWN, UNFENCED, ORDERED };

// What the running block knows, through atomics, about what thread `tid` of another block did at `time`. Blocks pass on
// what they know.
static Known known_of(u32 block, u32 time, u32 tid) {
    std::vector<bool> seen(touched.size());
    std::vector<u32> waiting{(u32)touched.size() - 1};
    Known best = UNKNOWN;
    auto covers = [=](u32 base, const std::unordered_map<u32, u32>& threads) {
        auto own = threads.find(tid);
        return time <= base || (own != threads.end() && time <= own->second);
    };
    for (size_t i = 0; i < waiting.size(); ++i) {
        for (Counter* counter : touched[waiting[i]]) {
            auto found = counter->arrivals.find(block);
            if (found != counter->arrivals.end()) {
                const Arrival& a = found->second;
                if (covers(a.fenced_base, a.fenced_threads)) { return ORDERED; }
                if (covers(a.base, a.threads)) { best = UNFENCED; }
            }
            for (auto& other : counter->arrivals) {
                if (!seen[other.first]) {
                    seen[other.first] = true;
                    waiting.push_back(other.first);
                }
            }
        }
    }
    return best;
}

// Did what the record says happen before what the running thread does now? If not, `why` may say more.
static bool happened_before(u32 record, const char** why) {
    u32 time = record >> 12, tid = record & TID;
    if (record < launch_record) { return true; }
    if (record < block_record) {
        size_t block = std::upper_bound(block_starts.begin(), block_starts.end(), time) - block_starts.begin();
        if (block == 0) { return !touched.back().empty(); }  // swept: which block it was is forgotten
        Known known = known_of((u32)block - 1, time, tid);
        if (known == UNFENCED) {
            *why = ": an atomic counter orders the two, but no __threadfence() stands between the write and it";
        }
        return known == ORDERED;
    }
    if (record <= limit_record || tid == me) { return true; }
    if (tid / 32 == me / 32 && known[me][tid & 31] >= time) { return true; }
    for (Counter* counter : touched.back()) {  // both threads came to one address, fenced
        const Arrival& own = counter->arrivals.find((u32)touched.size() - 1)->second;
        auto theirs = own.fenced_threads.find(tid);
        if (own.threads.count(me) && theirs != own.fenced_threads.end() && time <= theirs->second) { return true; }
    }
    return false;
}
