// Barriers and warp functions: the last to arrive computes the results of all and releases them

// Keep in step with simt_cuda.h and simt_ptx.h.
enum Op {
    SHFL_IDX, SHFL_UP, SHFL_DOWN, SHFL_XOR, BALLOT, ANY, ALL, MATCH_ANY, MATCH_ALL, REDUCE_ADD, REDUCE_MIN_S,
    REDUCE_MIN_U, REDUCE_MAX_S, REDUCE_MAX_U, REDUCE_AND, REDUCE_OR, REDUCE_XOR, SYNCWARP, WGMMA, LDMATRIX, MMA
};
enum Vote { VOTE_NONE, VOTE_OR, VOTE_AND, VOTE_COUNT };
enum Mma { MMA_16816_BF16, MMA_16816_F16, MMA_1688_F16, MMA_1688_TF32 };
static const char* const op_names[] = {
    "__shfl_sync",       "__shfl_up_sync",    "__shfl_down_sync",  "__shfl_xor_sync",   "__ballot_sync",
    "__any_sync",        "__all_sync",        "__match_any_sync",  "__match_all_sync",  "__reduce_add_sync",
    "__reduce_min_sync", "__reduce_min_sync", "__reduce_max_sync", "__reduce_max_sync", "__reduce_and_sync",
    "__reduce_or_sync",  "__reduce_xor_sync", "__syncwarp",        "wgmma",             "ldmatrix",          "mma"};

static u32 barrier_arrived;

static void finish_barrier() {
    int vote = fibers[0].op;
    u64 any = 0, all = 1, count = 0;
    for (u32 i = 0; i < thread_count; ++i) {
        bool p = fibers[i].value != 0;
        any |= p, all &= p, count += p;
    }
    u64 result = vote == VOTE_OR ? any : vote == VOTE_AND ? all : vote == VOTE_COUNT ? count : 0;
    for (u32 i = 0; i < thread_count; ++i) { fibers[i].value = result; }
    barrier_arrived = 0;
    std::vector<const Fiber*> block;
    for (u32 i = 0; i < thread_count && launch.followed; ++i) { block.push_back(&fibers[i]); }
    share_knowledge(block);
    if (launch.checked) {
        limit_record = now << 12 | 0xfff;
        tick();
    }
}

extern "C" int simt_barrier(int vote, int value, At at) {
    self->at = at, self->op = vote, self->value = value != 0;
    self->state = AT_BARRIER;
    if (++barrier_arrived == thread_count) {
        for (u32 i = 0; i < thread_count; ++i) {
            if (fibers[i].at.line != at.line || strcmp(fibers[i].at.file, at.file) != 0 || fibers[i].op != vote) {
                Fiber* other = &fibers[i];
                fail("divergent barrier", at, "%s waits at the __syncthreads of %s:%d while %s waits at that of %s:%d",
                     name_of(self), base_name(at.file), at.line, name_of(other), base_name(other->at.file),
                     other->at.line);
            }
        }
        finish_barrier();
        push_all_ready();
    }
    run_next();
    return (int)self->value;
}

struct Gathering {  // lanes of a warp that wait for each other
    int op, width;
    u32 mask, arrived;
};
static std::vector<Gathering> gatherings[MAX_THREADS / 32];

static u64 shuffle_source(const Fiber& f, Fiber* lanes) {
    int width = f.width, lane = (int)f.lane, first = lane & ~(width - 1), last = first + width - 1, source = lane;
    switch (f.op) {
    case SHFL_IDX: source = first | (f.operand & (width - 1)); break;
    case SHFL_UP: source = (u32)f.operand > (u32)(lane - first) ? lane : lane - f.operand; break;
    case SHFL_DOWN: source = (u32)f.operand > (u32)(last - lane) ? lane : lane + f.operand; break;
    case SHFL_XOR: source = (lane ^ f.operand) > last ? lane : (lane ^ f.operand) & 31; break;
    }
    if (!(f.mask >> source & 1u)) {
        report("shuffle source", &f, f.at,
               "lane %d of warp %u reads lane %d, which the mask 0x%08x of its %s leaves out", lane, f.warp, source,
               f.mask, op_names[f.op]);
    }
    return lanes[source].value;
}

static void finish_ldmatrix(Fiber* lanes);
static void finish_mma(Fiber* lanes);

// What each lane of the mask did, or knew to have happened, now happened before what the others do next.
static void finish_syncwarp(Fiber* lanes, u32 mask) {
    std::vector<const Fiber*> group;
    for (u32 i = 0; i < 32 && launch.followed; ++i) {
        if (mask >> i & 1u) { group.push_back(lanes + i); }
    }
    share_knowledge(group);
    if (!launch.checked) { return; }
    u32(*rows)[32] = known + lanes[0].tid;
    u32 merged[32] = {};
    for (u32 i = 0; i < 32; ++i) {
        for (u32 j = 0; j < 32 && (mask >> i & 1u); ++j) { merged[j] = std::max(merged[j], rows[i][j]); }
    }
    for (u32 i = 0; i < 32; ++i) {
        if (mask >> i & 1u) { merged[i] = now; }
    }
    for (u32 i = 0; i < 32; ++i) {
        if (mask >> i & 1u) { memcpy(rows[i], merged, sizeof merged); }
    }
    tick();
}

static void finish_warp(Fiber* lanes, const Gathering& g) {
    if (g.op == SYNCWARP) { return finish_syncwarp(lanes, g.mask); }
    if (g.op == WGMMA) { return; }
    if (g.op == LDMATRIX) { return finish_ldmatrix(lanes); }
    if (g.op == MMA) { return finish_mma(lanes); }
    u64 results[32], any = 0;
    u32 sum = 0, low_u = ~0u, high_u = 0, conjunction = ~0u, disjunction = 0, parity = 0, all_equal = g.mask;
    int low_s = INT32_MAX, high_s = INT32_MIN;
    u64 first = lanes[__builtin_ctz(g.mask)].value;
    for (u32 i = 0; i < 32; ++i) {
        if (!(g.mask >> i & 1u)) { continue; }
        u64 wide = lanes[i].value;
        u32 v = (u32)wide;
        any |= (u64)(wide != 0) << i;
        sum += v, conjunction &= v, disjunction |= v, parity ^= v;
        low_u = v < low_u ? v : low_u, high_u = v > high_u ? v : high_u;
        low_s = (int)v < low_s ? (int)v : low_s, high_s = (int)v > high_s ? (int)v : high_s;
        if (wide != first) { all_equal = 0; }
    }
    for (u32 i = 0; i < 32; ++i) {
        if (!(g.mask >> i & 1u)) { continue; }
        Fiber& f = lanes[i];
        u64 r = 0;
        switch (g.op) {
        case SHFL_IDX:
        case SHFL_UP:
        case SHFL_DOWN:
        case SHFL_XOR: r = shuffle_source(f, lanes); break;
        case BALLOT: r = any; break;
        case ANY: r = any != 0; break;
        case ALL: r = any == g.mask; break;
        case MATCH_ANY:
            for (u32 j = 0; j < 32; ++j) { r |= (u64)((g.mask >> j & 1u) && lanes[j].value == f.value) << j; }
            break;
        case MATCH_ALL: r = all_equal; break;
        case REDUCE_ADD: r = sum; break;
        case REDUCE_MIN_S: r = (u32)low_s; break;
        case REDUCE_MIN_U: r = low_u; break;
        case REDUCE_MAX_S: r = (u32)high_s; break;
        case REDUCE_MAX_U: r = high_u; break;
        case REDUCE_AND: r = conjunction; break;
        case REDUCE_OR: r = disjunction; break;
        case REDUCE_XOR: r = parity; break;
        }
        results[i] = r;
    }
    for (u32 i = 0; i < 32; ++i) {
        if (g.mask >> i & 1u) { lanes[i].value = results[i]; }
    }
}

// The running fiber waits until every lane of `mask` has called the same function with the same mask and width.
static u64 gather(int op, u32 mask, int width, At at) {
    Fiber* f = self;
    f->op = op, f->mask = mask, f->width = width, f->at = at;
    if (!(mask >> f->lane & 1u)) {
        fail("warp mask", at, "lane %u of warp %u calls %s with the mask 0x%08x, which leaves it out", f->lane, f->warp,
             op_names[op], mask);
    }
    if (width < 1 || width > 32 || (width & (width - 1))) {
        fail("shuffle width", at, "width %d is no power of two up to 32", width);
    }
    std::vector<Gathering>& waiting = gatherings[f->warp];
    size_t i = 0;
    while (i < waiting.size() && !(waiting[i].op == op && waiting[i].mask == mask && waiting[i].width == width)) {
        ++i;
    }
    if (i == waiting.size()) { waiting.push_back({op, width, mask, 0}); }
    waiting[i].arrived |= 1u << f->lane;
    f->state = IN_WARP;
    if (waiting[i].arrived == mask) {
        Gathering done = waiting[i];
        waiting[i] = waiting.back();
        waiting.pop_back();
        Fiber* lanes = f - f->lane;
        finish_warp(lanes, done);
        if (faulted) { leave(); }
        push_ready(lanes, mask);
    }
    run_next();
    return f->value;
}

extern "C" u64 simt_warp(int op, u32 mask, u64 value, int operand, int width, At at) {
    self->value = value, self->operand = operand;
    return gather(op, mask, width, at);
}

extern "C" u32 simt_active_mask() {
    u32 mask = 0;
    Fiber* lanes = self - self->lane;
    for (u32 i = 0; i < 32 && lanes[i].tid < thread_count && lanes[i].warp == self->warp; ++i) {
        mask |= (u32)(lanes[i].state != EXITED) << i;
    }
    return mask;
}

// Nobody can run and somebody has not exited: says who waits where for whom.
static void report_deadlock() {
    for (u32 i = 0; i < thread_count; ++i) {
        Fiber& f = fibers[i];
        if (f.state != IN_WARP) { continue; }
        for (u32 lane = 0; lane < 32; ++lane) {
            if (!(f.mask >> lane & 1u)) { continue; }
            u32 tid = f.warp * 32 + lane;
            Fiber& other = fibers[tid < MAX_THREADS ? tid : 0];
            if (tid < thread_count && other.state == IN_WARP && other.op == f.op && other.mask == f.mask &&
                other.width == f.width) {
                continue;
            }
            char what[300];
            if (tid >= thread_count) {
                snprintf(what, sizeof what, "lane %u, which does not exist: the block has %u threads", lane,
                         thread_count);
            } else if (other.state == EXITED) {
                snprintf(what, sizeof what, "%s (lane %u), which has exited", name_of(&other), lane);
            } else if (other.state == AT_BARRIER) {
                snprintf(what, sizeof what, "%s (lane %u), which waits at the __syncthreads of %s:%d", name_of(&other),
                         lane, base_name(other.at.file), other.at.line);
            } else {
                snprintf(what, sizeof what, "%s (lane %u), which waits in %s (mask 0x%08x, width %d) of %s:%d",
                         name_of(&other), lane, op_names[other.op], other.mask, other.width, base_name(other.at.file),
                         other.at.line);
            }
            report("divergent warp", &f, f.at, "%s (lane %u of warp %u) waits in %s (mask 0x%08x, width %d) for %s",
                   name_of(&f), f.lane, f.warp, op_names[f.op], f.mask, f.width, what);
            return;
        }
    }
    Fiber *waiting = nullptr, *gone = nullptr;
    for (u32 i = 0; i < thread_count; ++i) {
        if (fibers[i].state == AT_BARRIER && !waiting) { waiting = &fibers[i]; }
        if (fibers[i].state == AT_NAMED_BARRIER) {
            return report("deadlock", &fibers[i], fibers[i].at, "%s waits at a named barrier for %d threads",
                          name_of(&fibers[i]), fibers[i].operand);
        }
        if (fibers[i].state == EXITED && !gone) { gone = &fibers[i]; }
    }
    if (waiting && gone) {
        report("divergent barrier", waiting, waiting->at,
               "%s waits at __syncthreads, but %s has exited (%u of %u threads arrived)", name_of(waiting),
               name_of(gone), barrier_arrived, thread_count);
    } else {
        report("deadlock", waiting, waiting ? waiting->at : At{}, "no thread can run");
    }
}
