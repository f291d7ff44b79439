// Shared memory, atomics, built-in variables

// Dynamic shared memory lies at the start of the arena, static variables from its middle on, with gaps between them.
static size_t statics_end, statics_bytes;
static u64 launch_number;  // a static's key says where it lies: launch_number << 20 | offset

// No more aligned than the kernel asked for, so that reliance on luck shows. Of several declarations, reports name the
// one that was reached last.
extern "C" void* simt_dynamic_shared(size_t align, const char* name, int item_size) {
    if (!shared_variables.empty() && shared_variables[0].offset == align) {
        shared_variables[0].name = name, shared_variables[0].item_size = item_size;
    }
    return memory + align;
}

extern "C" void* simt_shared(u64* key, size_t size, size_t align, int item_size, const char* name, const char* file,
                             int line) {
    if (*key >> 20 != launch_number) {
        statics_end = (statics_end + align - 1) / align * align;
        statics_bytes += size;
        size_t limit = statics_bytes + launch.declared_bytes > STATIC_LIMIT ? SHARED_LIMIT : STATIC_LIMIT;
        if (statics_bytes > STATIC_LIMIT || statics_bytes + launch.dynamic_bytes > limit) {
            fail("shared memory size", At{file, line},
                 "%zu bytes of static shared memory with `%s` and %zu of dynamic; the limits are %zu and %zu in all",
                 statics_bytes, name, (size_t)launch.dynamic_bytes, STATIC_LIMIT, limit);
        }
        *key = launch_number << 20 | statics_end;
        shared_variables.push_back({statics_end, size, item_size, name});
        if (launch.followed) { forget_touches(statics_end, size); }
        if (launch.checked) { fill(statics_end, statics_end + size, NEVER_WRITTEN); }
        statics_end += size + 64;
    }
    return memory + (*key & 0xfffff);
}

extern "C" u32 simt_shared_address(const void* p, At) {
    if (launch.checked) { check_shared((void*)p, RETURN_ADDRESS); }
    return (u32)((const char*)p - memory);
}

// The running thread comes to an address in global memory with an atomic.
static void arrive(uintptr_t a) {
    u32 block = (u32)touched.size() - 1, base = limit_record >> 12;
    Counter& counter = counters[a];
    auto found = counter.arrivals.find(block);
    if (found == counter.arrivals.end()) {
        found = counter.arrivals.emplace(block, Arrival{}).first;
        touched.back().push_back(&counter);
    }
    Arrival& mine = found->second;
    mine.base = base, mine.threads[me] = now;
    // Fenced by everybody after their last write, or by this thread after the last barrier.
    if (!memchr(unfenced, 1, thread_count) || fence_time[me] > base) { mine.fenced_base = base; }
    if (!unfenced[me]) { mine.fenced_threads[me] = now; }
    if (now < TIME_END - (TIME_END - TIME_SWEEP) / 2) { ++now; }  // what follows is not covered
}

static int float_atomics;
static u64 float_atomic_pc;

template <int SIZE> static void check_atomic(void* p, void* pc) {
    uintptr_t a = (uintptr_t)p;
    size_t offset = a - (uintptr_t)memory;
    if (offset >= MEMORY) { fail_at("out of bounds", a, pc, "atomic access to", ""); }
    if (a & (SIZE - 1)) { fail_at("misaligned access", a, pc, "atomic access to", ""); }
    // Read, then write: both sides see other threads' plain accesses; atomics do not conflict with each other.
    unsigned char before = unfenced[me];
    examine(a, SIZE, false, ATOMIC, pc);
    slow<SIZE, true>(a, ATOMIC, pc);
    unfenced[me] = before;  // an atomic needs no fence itself
    if (offset >= ARENA) { arrive(a); }
}

extern "C" u64 simt_atomic(void* p, int size, u64 a, u64 b, u64 (*change)(u64, u64, u64), int is_float, At) {
    if (launch.checked) {
        if (is_float && !float_atomics++) { float_atomic_pc = (uintptr_t)RETURN_ADDRESS - image_begin; }
        if (size == 8) { check_atomic<8>(p, RETURN_ADDRESS); }
        if (size == 4) { check_atomic<4>(p, RETURN_ADDRESS); }
        if (size == 2) { check_atomic<2>(p, RETURN_ADDRESS); }
    }
    u64 old = 0;
    memcpy(&old, p, size);
    u64 changed = change(old, a, b);
    memcpy(p, &changed, size);
    return old;
}

extern "C" void simt_fence() {
    unfenced[me] = 0;
    fence_time[me] = now;
}

extern "C" void simt_assert(const char* condition, At at) { fail("assertion", at, "assert(%s) fails", condition); }
extern "C" void simt_trap(At at) { fail("assertion", at, "__trap()"); }

extern "C" uint3 simt_thread_idx() { return self->index; }
extern "C" uint3 simt_block_idx() { return block_index; }
extern "C" uint3 simt_block_dim() { return {launch.block[0], launch.block[1], launch.block[2]}; }
extern "C" uint3 simt_grid_dim() { return {launch.grid[0], launch.grid[1], launch.grid[2]}; }
extern "C" u32 simt_lane() { return self->lane; }
