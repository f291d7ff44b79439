// The hook of every load and store: the fast path of what is obviously right, and the whole truth about the rest.
static const u64 WATCHING = 1, EXPIRED = 2, FOLLOWING = 4;
static u64 watching;  // why every access is to be looked at
static u64 watched_pc;

__attribute__((noinline)) static void watch(size_t offset, int size, bool write, void* pc) {
    if (launch.counting) { count_access(offset, size, write, pc); }
    if (!launch.watching) { return; }
    const Access& w = launch.watched;
    if (w.granule >= offset / 2 && w.granule <= (offset + size - 1) / 2 && w.tid == me && w.write == write &&
        w.time == now - (launch_record >> 12)) {
        watched_pc = (uintptr_t)pc - image_begin;
    }
}

__attribute__((noreturn, noinline)) static void fail_race(uintptr_t a, void* pc, bool write, u32 record,
                                                          bool other_wrote, size_t granule, const char* why) {
    u32 time = record >> 12, tid = record & TID;
    fault.other = Access{time - (launch_record >> 12), tid, other_wrote, granule};
    char before[200], after[400];
    Fiber other;
    other.index = fibers[tid].index;
    snprintf(before, sizeof before, "%s %s", name_of(self), write ? "writes" : "reads");
    if (record >= block_record) {
        snprintf(after, sizeof after, ", which %s %s with no barrier between%s%s", name_of(&other),
                 other_wrote ? "wrote" : "read",
                 tid / 32 == me / 32 ? " (same warp: __syncwarp is missing; shuffles do not order memory)" : "", why);
        fail_at("race", a, pc, before, after);
    }
    size_t block = std::upper_bound(block_starts.begin(), block_starts.end(), time) - block_starts.begin();
    uint3 b = block ? block_indices[block - 1] : uint3{};
    char name[64] = "another block";
    if (block) { snprintf(name, sizeof name, "block (%u,%u,%u)", b.x, b.y, b.z); }
    snprintf(after, sizeof after, ", which %s of %s %s in the same launch%s", name_of(&other), name,
             other_wrote ? "wrote" : "read", why);
    fail_at("race between blocks", a, pc, before, after);
}

static const char* size_name(int size, bool write) {
    static char text[60];
    snprintf(text, sizeof text, "%d-byte %s of", size, write ? "write" : "read");
    return text;
}

// The whole truth about one access; the fast path comes here whenever something is not obviously right.
__attribute__((noinline)) static void examine(uintptr_t a, int size, bool write, u32 flags, void* pc) {
    size_t first = (a - (uintptr_t)memory) / 2, last = (a + size - 1 - (uintptr_t)memory) / 2;
    for (size_t g = first; g <= last; ++g) {
        uintptr_t at = std::max(a, (uintptr_t)memory + 2 * g);
        bool shared = 2 * g < ARENA;
        u32 w = writers[g];
        if (w == UNALLOCATED) {
            fail_at(shared ? "out of bounds, shared" : "out of bounds", at, pc, size_name(size, write), "");
        }
        if (w == READ_ONLY) {
            if (!write) { continue; }
            fail_at("write to const", at, pc, size_name(size, write), ", which the kernel takes as a pointer to const");
        }
        if (w == IN_FLIGHT) {
            fail_at("cp.async in flight", at, pc, size_name(size, write), ": its cp.async has not been waited for");
        }
        if (w == NEVER_WRITTEN) {
            if (!write) {
                fail_at("uninitialised read", at, pc, size_name(size, write),
                        shared ? ": nothing in this block wrote it" : ": nothing wrote it");
            }
            continue;
        }
        auto conflict = [&](u32 record, bool other_wrote) {
            u32 theirs = record & FLAGS;
            if (theirs == ATOMIC && flags == ATOMIC) { return; }
            if ((theirs == LOW_BYTE && flags == HIGH_BYTE) || (theirs == HIGH_BYTE && flags == LOW_BYTE)) { return; }
            if (shared && record < block_record) { return; }  // shared memory begins anew with each block
            const char* why = "";
            if (!happened_before(record, &why)) { fail_race(at, pc, write, record, other_wrote, g, why); }
        };
        if (w > INITIALISED) { conflict(w, true); }
        if (write) {
            conflict(readers[g], false);
            conflict(other_readers[g], false);
        }
    }
}

__attribute__((noinline)) static void outside(uintptr_t a, int size, bool write, void* pc) {
    if (a >= image_begin && a < image_end) {  // constants, tables, literals
        if (!write) { return; }
        fail_at("unsupported", a, pc, "write to a __device__ variable,", ": it would outlive the launch");
    }
    fail_at("out of bounds", a, pc, size_name(size, write), "");
}

template <int SIZE> static constexpr int GRANULES = SIZE > 1 ? SIZE / 2 : 1;

template <int SIZE, bool WRITE> static inline __attribute__((always_inline)) void note(size_t offset, u32 stamp) {
    u32 *w = writers + offset / 2, *r = readers + offset / 2, *o = other_readers + offset / 2;
    progress += WRITE ? w[0] < block_record || w[0] == NEVER_WRITTEN : r[0] < block_record;
    for (int i = 0; i < GRANULES<SIZE>; ++i) {
        if (WRITE) {
            w[i] = stamp;
        } else {
            u32 last = r[i];
            bool own = (last & TID) == (stamp & TID) && last >= block_record;
            o[i] = own ? o[i] : last;
            r[i] = stamp;
        }
    }
    if (WRITE) { unfenced[stamp & TID] |= (unsigned char)(offset >= ARENA); }
}

extern "C" void simt_generic_write(u32 at);

// The same as `hook`, for accesses that are not obviously right.
template <int SIZE, bool WRITE> __attribute__((noinline)) static void slow(uintptr_t a, u32 flags, void* pc) {
    size_t offset = a - (uintptr_t)memory;
    if (a - stack_begin < STACK) { return; }
    if (watching & EXPIRED) { fail_expired(pc); }
    if (offset >= MEMORY && !launch.followed) { return outside(a, SIZE, WRITE, pc); }
    if (a & (SIZE - 1)) {
        fail_at("misaligned access", a, pc, size_name(SIZE, WRITE),
                SIZE == 16 ? ": its address is no multiple of 16" : ": its address is no multiple of its size");
    }
    if (launch.followed) {
        if (offset >= ARENA) { return follow_global(a, SIZE, WRITE, pc); }
        follow_shared(offset, SIZE, WRITE, (u32)((uintptr_t)pc - image_begin));
        for (int i = 0; WRITE && i < SIZE; i += 4) { simt_generic_write((u32)offset + i); }
        return;
    }
    if (watching) { watch(offset, SIZE, WRITE, pc); }
    examine(a, SIZE, WRITE, flags, pc);
    if (WRITE || writers[offset / 2] != READ_ONLY) { note<SIZE, WRITE>(offset, now << 12 | flags | me); }
}

static inline u64 load64(const u32* p) {
    u64 value;
    memcpy(&value, p, 8);
    return value;
}
static inline void store64(u32* p, u64 value) { memcpy(p, &value, 8); }

// One access of SIZE bytes.
template <int SIZE, bool WRITE> static inline __attribute__((always_inline)) void hook(void* p, void* pc) {
    uintptr_t a = (uintptr_t)p;
    size_t offset = a - (uintptr_t)memory;
    u32 flags = SIZE == 1 ? (a & 1 ? HIGH_BYTE : LOW_BYTE) : 0;
    if (unlikely(offset / MEMORY | (a & (SIZE - 1)) | watching)) { return slow<SIZE, WRITE>(a, flags, pc); }
    u32 *w = writers + offset / 2, *r = readers + offset / 2, *o = other_readers + offset / 2;
    if (!WRITE) {
        u32 constant = ~0u;
        for (int i = 0; i < GRANULES<SIZE>; ++i) { constant &= (u32) - (w[i] == READ_ONLY); }
        if (constant) { return; }
    }
    // Wrong, or worth a closer look: a state or a time that is none yet; a record of another block; one of this block
    // after the last barrier, unless it is the thread's own.
    const u32 stamp = now << 12 | flags | me, lo = launch_record, span = block_record - lo, limit = limit_record;
    auto suspect = [=](u32 v) { return (u32)(v - lo < span) | ((u32)(v > limit) & (u32)((v ^ stamp) << 22 != 0)); };
    if (SIZE == 4) {  // the most frequent size: both halves usually have the same records
        u64 w2 = load64(w), r2 = load64(r), o2 = load64(o), stamp2 = (u64)stamp << 32 | stamp;
        u32 v = (u32)w2, x = (u32)r2, y = (u32)o2;
        if (v == w2 >> 32 && x == r2 >> 32 && v - 1 < (stamp | 0xfff) && !suspect(v)) {
            if (!WRITE) {
                bool own = (x ^ stamp) << 22 == 0 && x >= block_record;
                progress += x < block_record;
                store64(o, own ? o2 : r2);
                store64(r, stamp2);
                return;
            }
            if (y == o2 >> 32 && !(suspect(x) | suspect(y))) {
                progress += v < block_record;
                store64(w, stamp2);
                unfenced[me] |= (unsigned char)(offset >= ARENA);
                return;
            }
        }
    }
    u32 bad = 0;
    for (int i = 0; i < GRANULES<SIZE>; ++i) {
        bad |= (u32)(w[i] - 1 >= (stamp | 0xfff)) | suspect(w[i]);
        if (WRITE) { bad |= suspect(r[i]) | suspect(o[i]); }
    }
    if (unlikely(bad)) { return slow<SIZE, WRITE>(a, flags, pc); }
    note<SIZE, WRITE>(offset, stamp);
}

// Any number of bytes at any address: memcpy, structs, fields of packed structs.
static void hook_range(const void* p, size_t size, bool write, void* pc) {
    for (uintptr_t a = (uintptr_t)p, end = a + size; a < end;) {
        bool pair = !(a & 1) && a + 2 <= end;
        if (pair) {
            write ? hook<2, true>((void*)a, pc) : hook<2, false>((void*)a, pc);
        } else {
            write ? hook<1, true>((void*)a, pc) : hook<1, false>((void*)a, pc);
        }
        a += pair ? 2 : 1;
    }
}
