// What orders the accesses of a kernel of Hopper's units (sm_90a): who touched each 2 bytes of shared memory, and what
// each thread knows to have happened.
//
// A thread's clock counts the times that it has let others know: at __syncthreads, __syncwarp, named barriers and arrivals
// at mbarriers. known_until[i][j] is the clock of thread j up to which all that j did happened before what thread i does
// now. Shuffles, votes and the instructions of wgmma bring lanes together, but order no memory: CUDA promises no more.
// An access by TMA counts as one by the thread that asks for it.

struct Touch {
    u32 clock, pc;  // clock 0: nobody in this block; pc relative to the kernel library
    u32 thread, fenced;  // fenced: the clock of its fence_async since, which is what counts for TMA
};
static const u32 BY_TMA = MAX_THREADS;  // as a thread: a TMA load, whose end the waiter has seen
static Touch written[ARENA / 2], read_last[ARENA / 2], read_before[ARENA / 2];
static u32 known_until[MAX_THREADS][MAX_THREADS];

struct Announced {  // by arrivals at an mbarrier: in the phase under way, and in those that have ended
    std::vector<u32> pending, ended;
};
static std::unordered_map<u64*, Announced> announced;

static bool happened(const Touch& t, bool for_tma = false) {
    u32 clock = for_tma ? std::max(t.clock, t.fenced) : t.clock;
    return t.clock == 0 || t.thread == BY_TMA || t.thread == me || known_until[me][t.thread] >= clock;
}

static void take_in(std::vector<u32>& into, const u32* from) {
    into.resize(thread_count);
    for (u32 i = 0; i < thread_count; ++i) { into[i] = std::max(into[i], from[i]); }
}

// All threads of a group know now what any of them knew.
template <class Group> static void share_knowledge(const Group& group) {
    if (!launch.followed) { return; }
    static std::vector<u32> all;
    all.assign(thread_count, 0);
    for (const Fiber* f : group) { take_in(all, known_until[f->tid]); }
    for (const Fiber* f : group) {
        std::copy(all.begin(), all.end(), known_until[f->tid]);
        ++known_until[f->tid][f->tid];
    }
}

static void announce(u64* barrier, bool phase_ends) {
    if (!launch.followed) { return; }
    Announced& a = announced[barrier];
    take_in(a.pending, known_until[me]);
    ++known_until[me][me];
    if (phase_ends) {
        take_in(a.ended, a.pending.data());
        a.pending.clear();
    }
}
static void end_phase(u64* barrier) {
    if (!launch.followed) { return; }
    Announced& a = announced[barrier];
    a.pending.resize(thread_count);
    take_in(a.ended, a.pending.data());
    a.pending.clear();
}
static void hear(u64* barrier) {
    if (!launch.followed) { return; }
    Announced& a = announced[barrier];
    a.ended.resize(thread_count);
    for (u32 i = 0; i < thread_count; ++i) { known_until[me][i] = std::max(known_until[me][i], a.ended[i]); }
}

// What wgmma reads of shared memory, in pieces of 16 bytes, by the warp, in whose name lane 0 stands: the clock at which
// its product was waited for, UNDER_WAY before. That wait, not the call, has to come before TMA overwrites the piece.
static const u32 UNDER_WAY = ~0u;
static u32 product_read[MAX_THREADS / 32][ARENA / 16];

static void start_product_read(u32 at) {
    product_read[me / 32][at / 16] = UNDER_WAY;
    self->product_reads.push_back({self->product_group, at / 16});
}
static void end_product_reads(int pending) {
    auto& reads = self->product_reads;
    size_t done = 0;
    for (; done < reads.size() && reads[done].first < self->product_group - pending; ++done) {
        product_read[me / 32][reads[done].second] = known_until[me][me];
    }
    reads.erase(reads.begin(), reads.begin() + done);
}
static void check_product_reads(u32 begin, u32 size, At at) {
    for (u32 warp = 0; warp < (thread_count + 31) / 32; ++warp) {
        for (u32 piece = begin / 16; piece < (begin + size) / 16; ++piece) {
            u32& clock = product_read[warp][piece];
            if (clock && warp != me / 32 && known_until[me][warp * 32] < clock) {
                fail("race", at, "%s lets TMA overwrite shared memory that a wgmma of warp %u reads%s", name_of(self), warp,
                     clock == UNDER_WAY ? " and has not been waited for"
                                        : ": its wait does not come before the arrival that lets TMA go on");
            }
            clock = 0;
        }
    }
}

// `begin` and `end` of the shared variable that holds an offset; none: both 0.
static const SharedVariable* variable_at(size_t offset) {
    for (const SharedVariable& v : shared_variables) {
        if (offset >= v.offset && offset < v.offset + v.size) { return &v; }
    }
    return nullptr;
}

__attribute__((noreturn)) static void fail_unordered(size_t offset, u32 pc, At at, const char* what, const Touch& other,
                                                     bool other_wrote, const char* hint) {
    char array[80] = "", text[300];
    long long index = -1;
    const char* where = describe_address((uintptr_t)memory + offset, array, &index);
    Fiber named;
    named.index = fibers[other.thread].index;
    snprintf(text, sizeof text, "%s %s %s, which %s %s: nothing orders the two%s", name_of(self), what, where,
             name_of(&named), other_wrote ? "wrote" : "read", hint);
    report("race", self, at, "%s", text);
    memcpy(fault.array, array, sizeof array);
    fault.index = index, fault.pc = pc, fault.other_pc = other.pc;
    leave();
}

static const char* size_name(int size, bool write);

// An ordinary access to shared memory, ldmatrix or stmatrix.
static void follow_shared(size_t offset, int size, bool write, u32 pc) {
    const SharedVariable* variable = variable_at(offset);
    if (!variable || offset + size > variable->offset + variable->size) {
        fail_at("out of bounds, shared", (uintptr_t)memory + offset, pc + (char*)image_begin, size_name(size, write), "");
    }
    Touch mine{known_until[me][me], pc, me, 0};
    for (size_t g = offset / 2; g <= (offset + size - 1) / 2; ++g) {
        const char* hint = " (within a warp only __syncwarp does)";
        auto check = [&](const Touch& t, bool other_wrote) {
            if (!happened(t) && size > 1) {  // two bytes have one record
                fail_unordered(g * 2, pc, At{}, write ? "writes" : "reads", t, other_wrote,
                               t.thread / 32 == me / 32 ? hint : "");
            }
        };
        if (!write && written[g].clock == 0) {
            fail_at("uninitialised read", (uintptr_t)memory + 2 * g, pc + (char*)image_begin, size_name(size, write),
                    ": nothing in this block wrote it");
        }
        check(written[g], true);
        if (write) {
            check(read_last[g], false), check(read_before[g], false);
            written[g] = mine, read_last[g] = read_before[g] = Touch{};
        } else {
            if (read_last[g].thread != me) { read_before[g] = read_last[g]; }
            read_last[g] = mine;
        }
    }
}

// TMA is about to overwrite bytes of shared memory, at the running thread's request.
static void follow_load(u32 begin, u32 size, At at) {
    if (!launch.followed) { return; }
    check_product_reads(begin, size, at);
    for (size_t g = begin / 2; g < (begin + size) / 2; ++g) {
        const char* hint = ": nobody waits for that thread before the arrival that lets TMA go on";
        const char* what = "lets TMA overwrite";
        if (!happened(written[g], true)) { fail_unordered(2 * g, 0, at, what, written[g], true, hint); }
        if (!happened(read_last[g], true)) { fail_unordered(2 * g, 0, at, what, read_last[g], false, hint); }
        if (!happened(read_before[g], true)) { fail_unordered(2 * g, 0, at, what, read_before[g], false, hint); }
        written[g] = Touch{1, 0, BY_TMA, 0}, read_last[g] = read_before[g] = Touch{};
    }
}

// TMA is about to read them.
static void follow_store(u32 begin, u32 size, At at) {
    for (size_t g = begin / 2; launch.followed && g < (begin + size) / 2; ++g) {
        if (!happened(written[g], true)) { fail_unordered(2 * g, 0, at, "lets TMA read", written[g], true, ""); }
    }
}

// The running thread has called fence_async: its accesses to these bytes can be ordered for TMA from now on.
static void follow_fence(u32 begin, u32 size) {
    for (size_t g = begin / 2; launch.followed && g < (begin + size) / 2; ++g) {
        for (Touch* t : {&written[g], &read_last[g], &read_before[g]}) {
            if (t->clock && t->thread == me) { t->fenced = known_until[me][me]; }
        }
    }
}

// An ordinary access to global memory: arrays are where the caller has them.
static void follow_global(uintptr_t a, int size, bool write, void* pc) {
    for (int i = 0; i < launch.region_count; ++i) {
        const Region& r = launch.regions[i];
        if (a >= r.begin && a + size <= r.end) {
            if (!write || !r.read_only) { return; }
            fail_at("write to const", a, pc, size_name(size, write), ", which the kernel takes as a pointer to const");
        }
    }
    if (a >= image_begin && a < image_end && !write) { return; }  // constants, tables, literals
    fail_at("out of bounds", a, pc, size_name(size, write), "");
}

static void forget_touches(size_t offset, size_t size) {
    for (Touch* all : {written, read_last, read_before}) {
        std::fill(all + offset / 2, all + (offset + size + 1) / 2, Touch{});
    }
    for (u32 warp = 0; warp < (thread_count + 31) / 32; ++warp) {
        std::fill(product_read[warp] + offset / 16, product_read[warp] + (offset + size + 15) / 16, 0);
    }
}

static void start_following() {
    if (!launch.followed) { return; }
    announced.clear();
    for (const SharedVariable& v : shared_variables) { forget_touches(v.offset, v.size); }
    for (u32 i = 0; i < thread_count; ++i) {
        std::fill(known_until[i], known_until[i] + thread_count, 0);
        known_until[i][i] = 1;
    }
}
