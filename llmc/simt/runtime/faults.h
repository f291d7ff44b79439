// Faults: what was wrong, told in words, and the way out of a launch.

static const char* base_name(const char* path) {
    const char* slash = path ? strrchr(path, '/') : nullptr;
    return slash ? slash + 1 : path ? path : "?";
}

// "thread (3,0,0)" of a 1-D block reads better as "thread 3". Valid until the fourth next call.
static const char* name_of(const Fiber* f) {
    static char text[4][48];
    static int next;
    char* out = text[next++ & 3];
    if (launch.block[1] == 1 && launch.block[2] == 1) {
        snprintf(out, 48, "thread %u", f->index.x);
    } else {
        snprintf(out, 48, "thread (%u,%u,%u)", f->index.x, f->index.y, f->index.z);
    }
    return out;
}

static uintptr_t image_begin, image_end;  // the kernel library: its constants may be read

static void describe_fault(const char* kind, const Fiber* f, At at, const char* format, va_list list) {
    if (faulted) { return; }
    faulted = true;
    Access other = fault.other;  // set by the caller
    fault = Fault{};
    fault.other = other, fault.index = -1;
    snprintf(fault.kind, sizeof fault.kind, "%s", kind);
    vsnprintf(fault.text, sizeof fault.text, format, list);
    snprintf(fault.file, sizeof fault.file, "%s", at.file ? at.file : "");
    fault.line = at.line;
    fault.block[0] = block_index.x, fault.block[1] = block_index.y, fault.block[2] = block_index.z;
    if (f && f != &scheduler) {
        fault.has_thread = 1;
        fault.thread[0] = f->index.x, fault.thread[1] = f->index.y, fault.thread[2] = f->index.z;
    }
}

// Notes a fault of thread `f` and goes on: for code that then returns to the scheduler by itself.
__attribute__((format(printf, 4, 5))) static void report(const char* kind, const Fiber* f, At at, const char* format,
                                                         ...) {
    va_list list;
    va_start(list, format);
    describe_fault(kind, f, at, format, list);
    va_end(list);
}

// Ends the launch; the fibers are abandoned where they stand.
__attribute__((noreturn)) static void leave() {
    static Fiber abandoned;
    switch_to(&abandoned, &scheduler);
    abort();
}

__attribute__((noreturn, format(printf, 3, 4))) static void fail(const char* kind, At at, const char* format, ...) {
    va_list list;
    va_start(list, format);
    describe_fault(kind, self, at, format, list);
    va_end(list);
    leave();
}

static void report_expired(At at) {
    if (endless) {
        report("endless loop", self, at,
               "%s runs, but for %g seconds no thread has ended and nothing new was read or written", name_of(self),
               expired);
    } else {
        report("timeout", self, at, "more than %g seconds", expired);
    }
}

// At a return address in the kernel, or where the thread meets others.
__attribute__((noinline)) static void fail_expired(void* pc) {
    report_expired(pc ? At{} : self->at);
    fault.pc = pc ? (uintptr_t)pc - image_begin : 0;
    leave();
}

struct SharedVariable {
    size_t offset, size;
    int item_size;
    const char* name;
};
static std::vector<SharedVariable> shared_variables;

// "`out`[12]", "the shared array `tile`[3]" or, outside of everything, the nearest array and the distance to it.
static const char* describe_address(uintptr_t a, char* array, long long* index) {
    static char text[400];
    size_t offset = a - (uintptr_t)memory;
    if (a < 4096) {
        snprintf(text, sizeof text, "a null pointer (address %zu)", (size_t)a);
    } else if (offset < ARENA) {
        const SharedVariable* nearest = nullptr;
        for (const SharedVariable& v : shared_variables) {
            if (!nearest || (offset >= v.offset && v.offset >= nearest->offset)) { nearest = &v; }
        }
        if (!nearest) {
            snprintf(text, sizeof text, "shared memory, of which this launch has none");
            return text;
        }
        long long bytes = (long long)offset - (long long)nearest->offset, item = bytes / nearest->item_size;
        if (bytes < 0 && bytes % nearest->item_size) { --item; }
        snprintf(array, 80, "%s", nearest->name);
        *index = item;
        snprintf(text, sizeof text, "element %lld of the shared `%s`, which has %zu of %d bytes", item, nearest->name,
                 nearest->size / nearest->item_size, nearest->item_size);
    } else if ((offset < MEMORY || launch.followed) && launch.region_count > 0) {
        const Region* nearest = nullptr;
        u64 best = ~0ull;
        for (int i = 0; i < launch.region_count; ++i) {
            const Region& r = launch.regions[i];
            u64 distance = a < r.begin ? r.begin - a : a >= r.end ? a - r.end + 1 : 0;
            if (distance < best) { best = distance, nearest = &r; }
        }
        long long bytes = (long long)(a - nearest->begin), item = bytes / nearest->item_size;
        if (bytes < 0 && bytes % nearest->item_size) { --item; }
        snprintf(array, 80, "%s", nearest->name);
        *index = item;
        snprintf(text, sizeof text, "element %lld of `%s`, which has %llu of %d bytes", item, nearest->name,
                 (unsigned long long)(nearest->end - nearest->begin) / nearest->item_size, nearest->item_size);
    } else {
        snprintf(text, sizeof text, "address %p, which is no array of this launch", (void*)a);
        for (u32 i = 0; i < thread_count; ++i) {
            if (a - (uintptr_t)fibers[i].stack < STACK) {
                snprintf(text, sizeof text, "a local variable of %s", name_of(&fibers[i]));
            }
        }
    }
    return text;
}

// A fault of the running thread at an address; `format` gets the address's description.
__attribute__((noreturn)) static void fail_at(const char* kind, uintptr_t a, void* pc, const char* before,
                                              const char* after) {
    char array[80] = "";
    long long index = -1;
    const char* where = describe_address(a, array, &index);
    report(kind, self, At{}, "%s %s%s", before, where, after);
    memcpy(fault.array, array, sizeof array);
    fault.index = index;
    fault.pc = pc ? (uintptr_t)pc - image_begin : 0;
    leave();
}
