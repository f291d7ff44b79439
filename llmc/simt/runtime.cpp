// Runs one kernel launch on the CPU. A block's threads are fibers of one OS thread: each runs until it waits at a
// barrier or a warp function, and the last one to arrive releases the others. Blocks run one after another.
//
// In checked mode the kernel was compiled with -fsanitize=thread and -fsanitize=undefined, but without their libraries:
// g++ emits a call before every load and store (__tsan_read4, __tsan_write16 ...) and at every undefined operation
// (__ubsan_handle_...), and this file defines them.
//
// Sections: fibers, faults, shadow memory, hooks, barriers and warp functions, tensor cores, cp.async, Hopper's units,
// shared memory and atomics, launch.
#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>
#include <unordered_map>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define FAST_SWITCH  // otherwise fibers are ucontexts, which is slow but portable
#endif

typedef uint32_t u32;
typedef uint64_t u64;
#define RETURN_ADDRESS __builtin_return_address(0)
#define unlikely(x) __builtin_expect(!!(x), 0)

struct At {
    const char* file;
    int line;
};
struct uint3 {
    u32 x, y, z;
};

// Exchanged with the Python layer. Keep in step with the ctypes structures in __init__.py.
struct Access {  // one of the two sides of a race
    u32 time, tid;
    int write;
    u64 granule;
};
struct Fault {
    char kind[40];
    char text[1000];
    char file[400];  // source position, if known without addr2line
    int line;
    int has_thread;
    u32 block[3], thread[3];
    u64 pc;  // otherwise: the hook's return address, relative to the kernel library
    char array[80];
    long long index;  // element of `array`, -1 if unknown
    Access other;     // of a race: what to watch for in a second run to find its line
    u64 other_pc;     // filled by that run
};
struct Region {      // one array argument
    u64 begin, end;  // addresses
    char name[64];
    int item_size;
    int read_only;
};
struct Launch {
    void (*entry)(void**);
    void** args;
    u32 grid[3], block[3];
    u64 dynamic_bytes, dynamic_align, declared_bytes;  // declared: kernel(..., smem=)
    int order;  // 0 forward, 1 reverse, 2 random
    u32 seed;
    int late;  // Hopper's units do their work as late as the waits allow, not at once
    int checked;
    int hopper;      // a kernel for sm_90a
    double timeout;  // seconds of CPU time
    int counting;    // count traffic
    int watching;
    Access watched;
    const Region* regions;
    int region_count;
};

struct Traffic {  // of one instruction on one array, all warps and blocks together
    u64 pc;
    int write, array;  // array: number of the region, -1 for shared memory
    u64 requests, bytes, units, ideal;  // units: 32-byte sectors of global, wavefronts of shared memory
};

static const size_t MAX_THREADS = 1024, STACK = 128 * 1024, SHARED_LIMIT = 227 * 1024, STATIC_LIMIT = 48 * 1024;

// All memory a kernel may touch: the block's shared memory first, then copies of the launch's arrays with gaps between.
static const size_t ARENA = 1 << 20, STATICS = 1 << 19, MEMORY = (size_t)8 << 30;
static char* memory;

// ---------------------------------------------------------------------------------------------------------------------
// Fibers
// ---------------------------------------------------------------------------------------------------------------------

enum State { READY, AT_BARRIER, AT_NAMED_BARRIER, IN_WARP, EXITED };

struct Copy {
    void *to, *pc;
    int group;
    char bytes[16];
};

struct Box {  // a TMA copy
    uint16_t* array;
    long long rows, columns, row, column;
    int box_rows;  // 0: `bytes` in a row, no box
    int bytes, group;
    u32 shared;
    u64* barrier;
    bool done;
    At at;
};
struct Product {  // a wgmma under way
    int group;
    void (*run)(const void*);
    alignas(16) char closure[96];
};

struct Fiber {
#if defined(FAST_SWITCH)
    void* sp;
#else
    ucontext_t context;
#endif
    char* stack;
    uint3 index;
    u32 tid, warp, lane;
    State state;
    // what it waits for
    At at;
    int op, width;
    u32 mask;
    u64 value;  // operand, then result
    int operand;
    void* pointers[4];
    void* pc;
    std::vector<Copy> copies;  // cp.async under way
    int group;                 // the cp.async group being filled
    std::vector<Box> stores;   // TMA stores not waited for
    std::vector<Product> products;
    int store_group, product_group;
    std::vector<u32> unfenced;       // shared addresses written by stmatrix since the last fence_async
    std::vector<u32> unfenced_rows;  // 16-byte rows of shared memory read by ldmatrix since then, address / 16
};

static Fiber fibers[MAX_THREADS], scheduler;
static Fiber* self;            // the running fiber
static u32 me;                 // its number in the block
static uintptr_t stack_begin;  // its stack
static u32 thread_count;
static std::vector<Fiber*> ready;  // the next to run is at the back, or anywhere if the order is random
static Launch launch;
static uint3 block_index;
static Fault fault;
static bool faulted;

static inline void become(Fiber* f) { self = f, me = f->tid, stack_begin = (uintptr_t)f->stack; }

#if defined(FAST_SWITCH)
// Saves the callee-saved registers on the old stack and takes them from the new one.
asm(R"(
.text
.type simt_switch, @function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size simt_switch, . - simt_switch
)");
extern "C" void simt_switch(void** from, void** to);
static inline void switch_to(Fiber* from, Fiber* to) {
    become(to);
    simt_switch(&from->sp, &to->sp);
}
#else
static inline void switch_to(Fiber* from, Fiber* to) {
    become(to);
    swapcontext(&from->context, &to->context);
}
#endif

static u32 random_state;
static u32 random_below(u32 n) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    random_state ^= random_state << 5;
    return (u32)((u64)random_state * n >> 32);
}

// Leaves the running fiber for the next one that can run, or for the scheduler if there is none.
static void run_next() {
    Fiber* from = self;
    if (ready.empty()) { return switch_to(from, &scheduler); }
    if (launch.order == 2) { std::swap(ready[random_below(ready.size())], ready.back()); }
    Fiber* next = ready.back();
    ready.pop_back();
    if (next != from) { switch_to(from, next); }
}

static void check_exit();

static void fiber_main() {
    launch.entry(launch.args);
    check_exit();
    self->state = EXITED;
    run_next();
    abort();  // an exited fiber is never resumed
}

static void make_fiber(Fiber& f) {
    size_t color = f.tid % 61 * 64;  // equal offsets in every stack would share a few cache sets
    char* top = f.stack + STACK - 4096 - color;
#if defined(FAST_SWITCH)
    void** sp = (void**)((uintptr_t)top & ~(uintptr_t)15);
    *--sp = nullptr;  // return address of fiber_main; keeps the stack aligned as after a call
    *--sp = (void*)fiber_main;
    f.sp = sp - 6;
    memset(f.sp, 0, 6 * sizeof(void*));
#else
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = top - f.stack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
#endif
    f.state = READY;
    f.copies.clear(), f.stores.clear(), f.products.clear(), f.unfenced.clear(), f.unfenced_rows.clear();
    f.group = f.store_group = f.product_group = 0;
}

// Makes the fibers of `lanes` runnable such that they are taken in the launch's order.
static void push_ready(Fiber* first, u32 lanes) {
    for (int i = 0; i < 32; ++i) {
        int lane = launch.order == 1 ? i : 31 - i;
        if (lanes >> lane & 1u) {
            first[lane].state = READY;
            ready.push_back(&first[lane]);
        }
    }
}
static void push_all_ready() {
    for (u32 i = 0; i < thread_count; ++i) {
        Fiber* f = &fibers[launch.order == 1 ? i : thread_count - 1 - i];
        f->state = READY;
        ready.push_back(f);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Faults
// ---------------------------------------------------------------------------------------------------------------------

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
    } else if (offset < MEMORY && launch.region_count > 0) {
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

// ---------------------------------------------------------------------------------------------------------------------
// Shadow memory: who touched each 2 bytes last
// ---------------------------------------------------------------------------------------------------------------------
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

static u64 watching;
static u64 watched_pc;

// Traffic: the accesses of a warp's lanes through one instruction, grouped by how often each lane has come there.
struct Request {
    int array;
    u32 lanes, offset[32];
};
struct Stream {
    int size, write;
    u32 count[32];
    std::vector<Request> requests;
};
static std::unordered_map<u64, Stream> streams;  // of the running block, by instruction and warp
static std::unordered_map<u64, Traffic> traffic;

static void count_access(size_t offset, int size, bool write, void* pc) {
    Stream& s = streams[(((uintptr_t)pc - image_begin) << 1 | write) << 5 | me / 32];  // cp.async reads and writes
    u32 n = s.count[me % 32]++;
    s.size = size, s.write = write;
    if (n >= s.requests.size()) {
        s.requests.resize(n + 1);
        int array = offset < ARENA ? -1 : 0;  // the region is the same for all lanes, but for an access out of bounds
        uintptr_t a = (uintptr_t)memory + offset;
        while (offset >= ARENA && array < launch.region_count - 1 &&
               !(launch.regions[array].begin <= a && a < launch.regions[array].end)) {
            ++array;
        }
        s.requests[n].array = array;
    }
    s.requests[n].lanes |= 1u << me % 32;
    s.requests[n].offset[me % 32] = (u32)offset;
}

static size_t distinct(u32* values, size_t n) {
    std::sort(values, values + n);
    return std::unique(values, values + n) - values;
}

// What the block's requests cost. Global: distinct 32-byte sectors. Shared: 32 banks of 4 bytes, one word each at a
// time; a request of 8 or 16 bytes per lane is served in 2 or 4 parts of 16 or 8 lanes.
static void count_block() {
    for (auto& entry : streams) {
        const Stream& s = entry.second;
        for (const Request& r : s.requests) {
            bool shared = r.array < 0;
            Traffic& t = traffic[(entry.first >> 5) * 64 + (r.array + 1)];
            t.pc = entry.first >> 6, t.write = s.write, t.array = r.array;
            u64 bytes = (u64)__builtin_popcount(r.lanes) * s.size;
            t.requests += 1, t.bytes += bytes;
            u32 part = shared && s.size > 4 ? 128 / s.size : 32;
            for (u32 begin = 0; begin < 32; begin += part) {
                u32 words[32], bank_words[32], n = 0, worst = 0;
                for (u32 lane = begin; lane < begin + part; ++lane) {
                    if (r.lanes >> lane & 1u) { words[n++] = r.offset[lane] / (shared ? 4 : 32); }
                }
                if (n == 0) { continue; }
                if (!shared) {
                    t.units += distinct(words, n), t.ideal += (bytes + 31) / 32;
                    continue;
                }
                for (u32 bank = 0; bank < 32; ++bank) {
                    u32 m = 0;
                    for (u32 i = 0; i < n; ++i) {
                        for (u32 w = 0; w < (s.size > 4 ? (u32)s.size / 4 : 1u); ++w) {
                            if ((words[i] + w) % 32 == bank) { bank_words[m++] = words[i] + w; }
                        }
                    }
                    worst = std::max(worst, (u32)distinct(bank_words, m));
                }
                t.units += worst, t.ideal += 1;
            }
        }
    }
    streams.clear();
}

extern "C" int simt_traffic(Traffic* out, int capacity) {
    int n = 0;
    for (auto& entry : traffic) {
        if (n < capacity) { out[n] = entry.second; }
        ++n;
    }
    return n;
}

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

// The same as `hook`, for accesses that are not obviously right.
template <int SIZE, bool WRITE> __attribute__((noinline)) static void slow(uintptr_t a, u32 flags, void* pc) {
    size_t offset = a - (uintptr_t)memory;
    if (offset >= MEMORY) {
        if (a - stack_begin >= STACK) { outside(a, SIZE, WRITE, pc); }
        return;
    }
    if (a & (SIZE - 1)) {
        fail_at("misaligned access", a, pc, size_name(SIZE, WRITE),
                SIZE == 16 ? ": its address is no multiple of 16" : ": its address is no multiple of its size");
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
                store64(o, own ? o2 : r2);
                store64(r, stamp2);
                return;
            }
            if (y == o2 >> 32 && !(suspect(x) | suspect(y))) {
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

// ---------------------------------------------------------------------------------------------------------------------
// Hooks that g++ calls
// ---------------------------------------------------------------------------------------------------------------------

extern "C" {
#define HOOKS(N)                                                                        \
    void __tsan_read##N(void* p) { hook<N, false>(p, RETURN_ADDRESS); }                 \
    void __tsan_write##N(void* p) { hook<N, true>(p, RETURN_ADDRESS); }                 \
    void __tsan_unaligned_read##N(void* p) { hook_range(p, N, false, RETURN_ADDRESS); } \
    void __tsan_unaligned_write##N(void* p) { hook_range(p, N, true, RETURN_ADDRESS); }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16) void __tsan_read_range(void* p, size_t size) {
    hook_range(p, size, false, RETURN_ADDRESS);
}
void __tsan_write_range(void* p, size_t size) { hook_range(p, size, true, RETURN_ADDRESS); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}

// Calls that g++ did not expand; the kernel library is linked with --wrap.
void* __wrap_memcpy(void* to, const void* from, size_t size) {
    hook_range(from, size, false, RETURN_ADDRESS);
    hook_range(to, size, true, RETURN_ADDRESS);
    return memcpy(to, from, size);
}
void* __wrap_memmove(void* to, const void* from, size_t size) {
    hook_range(from, size, false, RETURN_ADDRESS);
    hook_range(to, size, true, RETURN_ADDRESS);
    return memmove(to, from, size);
}
void* __wrap_memset(void* to, int value, size_t size) {
    hook_range(to, size, true, RETURN_ADDRESS);
    return memset(to, value, size);
}

// Undefined behaviour. The layouts are those of g++'s -fsanitize=undefined; every record starts with the position.
struct UbLocation {
    const char* file;
    u32 line, column;
};
struct UbType {
    uint16_t kind, info;
    char name[1];
};
struct UbRecord {
    UbLocation at;
    const UbType *type, *other;
};
struct UbMismatch {
    UbLocation at;
    const UbType* type;
    unsigned char log_alignment, check;
};

static const char* ub_value(const UbType* type, u64 value) {
    static char text[2][40];
    static int next;
    char* out = text[next++ & 1];
    int bits = 1 << (type->info >> 1);
    if (type->info & 1) {
        snprintf(out, 40, "%lld", bits >= 64 ? (long long)value : (long long)(value << (64 - bits)) >> (64 - bits));
    } else {
        snprintf(out, 40, "%llu", (unsigned long long)value);
    }
    return out;
}
static const char UB[] = "undefined behaviour";
#define UB_BINARY(operation, sign)                                                                     \
    void __ubsan_handle_##operation##_overflow_abort(UbRecord* r, u64 a, u64 b) {                      \
        fail(UB, At{r->at.file, (int)r->at.line}, "%s %s %s overflows %s", ub_value(r->type, a), sign, \
             ub_value(r->type, b), r->type->name);                                                     \
    }
UB_BINARY(add, "+")
UB_BINARY(sub, "-") UB_BINARY(mul, "*")
    UB_BINARY(divrem, "/ or %") void __ubsan_handle_negate_overflow_abort(UbRecord* r, u64 a) {
    fail(UB, At{r->at.file, (int)r->at.line}, "-(%s) overflows %s", ub_value(r->type, a), r->type->name);
}
void __ubsan_handle_shift_out_of_bounds_abort(UbRecord* r, u64 a, u64 b) {
    fail(UB, At{r->at.file, (int)r->at.line}, "shift of %s (%s) by %s", ub_value(r->type, a), r->type->name,
         ub_value(r->other, b));
}
void __ubsan_handle_out_of_bounds_abort(UbRecord* r, u64 index) {
    fail("out of bounds, array", At{r->at.file, (int)r->at.line}, "index %s of an array %s", ub_value(r->other, index),
         r->type->name);
}
void __ubsan_handle_type_mismatch_v1_abort(UbMismatch* r, uintptr_t a) {
    At at{r->at.file, (int)r->at.line};
    char array[80] = "";
    long long index = -1;
    const char* where = describe_address(a, array, &index);
    if (a & (((uintptr_t)1 << r->log_alignment) - 1)) {
        report("misaligned access", self, at, "access as %s, which needs %u-byte alignment, to %s", r->type->name,
               1u << r->log_alignment, where);
    } else {
        report("out of bounds", self, at, "access as %s to %s", r->type->name, where);
    }
    memcpy(fault.array, array, sizeof array);
    fault.index = index;
    leave();
}
#define UB_PLAIN(name, text) \
    void __ubsan_handle_##name(UbRecord* r) { fail(UB, At{r->at.file, (int)r->at.line}, text); }
UB_PLAIN(builtin_unreachable, "unreachable code is reached")
UB_PLAIN(missing_return, "a function that has a result ends without return")
UB_PLAIN(vla_bound_not_positive_abort, "array of no positive size")
UB_PLAIN(invalid_builtin_abort, "count of leading or trailing zeros of 0")
UB_PLAIN(load_invalid_value_abort, "a bool or enum holds an invalid value")
UB_PLAIN(float_cast_overflow_abort, "float to integer conversion out of range")
}  // extern "C"

// ---------------------------------------------------------------------------------------------------------------------
// Barriers and warp functions: the last to arrive computes the results of all and releases them
// ---------------------------------------------------------------------------------------------------------------------

// Keep in step with simt_cuda.h and simt_ptx.h.
enum Op {
    SHFL_IDX, SHFL_UP, SHFL_DOWN, SHFL_XOR, BALLOT, ANY, ALL, MATCH_ANY, MATCH_ALL, REDUCE_ADD, REDUCE_MIN_S,
    REDUCE_MIN_U, REDUCE_MAX_S, REDUCE_MAX_U, REDUCE_AND, REDUCE_OR, REDUCE_XOR, SYNCWARP, LDMATRIX, MMA
};
enum Vote { VOTE_NONE, VOTE_OR, VOTE_AND, VOTE_COUNT };
enum Mma { MMA_16816_BF16, MMA_16816_F16, MMA_1688_F16, MMA_1688_TF32 };
static const char* const op_names[] = {
    "__shfl_sync",       "__shfl_up_sync",    "__shfl_down_sync",  "__shfl_xor_sync",   "__ballot_sync",
    "__any_sync",        "__all_sync",        "__match_any_sync",  "__match_all_sync",  "__reduce_add_sync",
    "__reduce_min_sync", "__reduce_min_sync", "__reduce_max_sync", "__reduce_max_sync", "__reduce_and_sync",
    "__reduce_or_sync",  "__reduce_xor_sync", "__syncwarp",        "ldmatrix",          "mma"};

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

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores. Layouts: PTX ISA, "Warp-level matrix instructions". g = lane / 4, t = lane % 4.
// ---------------------------------------------------------------------------------------------------------------------

static float bf16_value(u32 h) {
    u32 x = h << 16;
    float f;
    memcpy(&f, &x, 4);
    return f;
}
static float f16_value(u32 h) {
    u32 sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31u, mantissa = h & 0x3ffu, x;
    if (exponent == 31u) {
        x = sign | 0x7f800000u | mantissa << 13;
    } else if (exponent) {
        x = sign | (exponent + 112u) << 23 | mantissa << 13;
    } else {  // subnormal: mantissa * 2^-24
        float f = (float)mantissa * 5.9604644775390625e-8f;
        return sign ? -f : f;
    }
    float f;
    memcpy(&f, &x, 4);
    return f;
}
static float tf32_value(u32 x) {
    x &= 0xffffe000u;  // the hardware ignores the low 13 bits
    float f;
    memcpy(&f, &x, 4);
    return f;
}

extern "C" void simt_mma(int shape, float* d, const u32* a, const u32* b, const float* c, At at) {
    self->operand = shape;
    self->pointers[0] = d, self->pointers[1] = (void*)a, self->pointers[2] = (void*)b, self->pointers[3] = (void*)c;
    gather(MMA, ~0u, 32, at);
}

static void finish_mma(Fiber* lanes) {
    int shape = lanes[0].operand, k = shape == MMA_16816_BF16 || shape == MMA_16816_F16 ? 16 : 8;
    float A[16][16], B[16][8], D[16][8];
    for (u32 lane = 0; lane < 32; ++lane) {
        Fiber& f = lanes[lane];
        if (f.operand != shape) {
            report("divergent warp", &f, f.at, "lanes 0 and %u of warp %u call different mma shapes", lane, f.warp);
            return;
        }
        const u32 *a = (const u32*)f.pointers[1], *b = (const u32*)f.pointers[2];
        const float* c = (const float*)f.pointers[3];
        u32 g = lane / 4, t = lane % 4;
        if (shape == MMA_1688_TF32) {
            for (u32 i = 0; i < 4; ++i) { A[g + 8 * (i % 2)][t + 4 * (i / 2)] = tf32_value(a[i]); }
            for (u32 i = 0; i < 2; ++i) { B[t + 4 * i][g] = tf32_value(b[i]); }
        } else {
            auto value = shape == MMA_16816_BF16 ? bf16_value : f16_value;
            for (u32 i = 0; i < (u32)k / 4; ++i) {  // a register holds two neighbouring columns
                for (u32 half = 0; half < 2; ++half) {
                    A[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] = value(a[i] >> 16 * half & 0xffffu);
                }
            }
            for (u32 i = 0; i < (u32)k / 8; ++i) {
                for (u32 half = 0; half < 2; ++half) {
                    B[2 * t + 8 * i + half][g] = value(b[i] >> 16 * half & 0xffffu);
                }
            }
        }
        for (u32 i = 0; i < 4; ++i) { D[g + 8 * (i / 2)][2 * t + i % 2] = c[i]; }
    }
    for (int m = 0; m < 16; ++m) {
        for (int kk = 0; kk < k; ++kk) {
            for (int n = 0; n < 8; ++n) { D[m][n] += A[m][kk] * B[kk][n]; }
        }
    }
    for (u32 lane = 0; lane < 32; ++lane) {
        float* d = (float*)lanes[lane].pointers[0];
        for (u32 i = 0; i < 4; ++i) { d[i] = D[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]; }
    }
}

static void check_shared(void* p, void* pc) {
    if ((size_t)((char*)p - memory) >= ARENA) {
        fail_at("out of bounds", (uintptr_t)p, pc, "shared-memory access to", "");
    }
}

static void generic_read(const void* row, void* pc);

extern "C" void simt_ldmatrix(u32* r, const void* row, int matrices, int transposed, At at) {
    if (launch.hopper && (int)self->lane < 8 * matrices) { generic_read(row, RETURN_ADDRESS); }
    self->operand = matrices * 2 + transposed;
    self->pointers[0] = r, self->pointers[1] = (void*)row, self->pc = RETURN_ADDRESS;
    gather(LDMATRIX, ~0u, 32, at);
}

static void finish_ldmatrix(Fiber* lanes) {
    int matrices = lanes[0].operand / 2, transposed = lanes[0].operand % 2;
    for (u32 lane = 0; lane < 32; ++lane) {
        Fiber& f = lanes[lane];
        if (f.operand != lanes[0].operand) {
            report("divergent warp", &f, f.at, "lanes 0 and %u of warp %u call different ldmatrix forms", lane, f.warp);
            return;
        }
    }
    if (launch.checked) {
        Fiber* running = self;
        for (int lane = 0; lane < 8 * matrices; ++lane) {
            become(&lanes[lane]);
            check_shared(lanes[lane].pointers[1], lanes[lane].pc);
            hook<16, false>(lanes[lane].pointers[1], lanes[lane].pc);
        }
        become(running);
    }
    for (int i = 0; i < matrices; ++i) {
        uint16_t M[8][8];
        for (int row = 0; row < 8; ++row) { memcpy(M[row], lanes[8 * i + row].pointers[1], 16); }
        for (u32 lane = 0; lane < 32; ++lane) {
            u32 g = lane / 4, t = lane % 4;
            u32 low = transposed ? M[2 * t][g] : M[g][2 * t], high = transposed ? M[2 * t + 1][g] : M[g][2 * t + 1];
            ((u32*)lanes[lane].pointers[0])[i] = low | high << 16;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// cp.async: the bytes are read at the call and land when the thread waits for their group
// ---------------------------------------------------------------------------------------------------------------------

extern "C" void simt_cp_async(void* shared, const void* global, int pred, At) {
    Copy copy{shared, RETURN_ADDRESS, self->group, {}};
    if (!launch.checked) {
        if (pred) { memcpy(copy.bytes, global, 16); }
        memcpy(shared, copy.bytes, 16);
        return;
    }
    if (pred) {
        hook<16, false>((void*)global, copy.pc);
        memcpy(copy.bytes, global, 16);
    }
    check_shared(shared, copy.pc);
    hook<16, true>(shared, copy.pc);
    size_t offset = (char*)shared - memory;
    fill(offset, offset + 16, IN_FLIGHT);
    self->copies.push_back(copy);
}

extern "C" void simt_cp_async_commit() { ++self->group; }

extern "C" void simt_cp_async_wait(int pending) {
    size_t kept = 0;
    for (const Copy& copy : self->copies) {
        if (copy.group >= self->group - pending) {
            self->copies[kept++] = copy;
            continue;
        }
        size_t offset = (char*)copy.to - memory;
        memcpy(copy.to, copy.bytes, 16);
        fill(offset, offset + 16, now << 12 | me);
        if (launch.watching) { watch(offset, 16, true, copy.pc); }
    }
    self->copies.resize(kept);
}

// ---------------------------------------------------------------------------------------------------------------------
// Hopper's units (sm_90a): mbarriers, TMA, wgmma, named barriers
// ---------------------------------------------------------------------------------------------------------------------
//
// At once: a TMA copy is made when it is asked for, a product when each thread comes to it. Late: shared memory that a
// TMA load will fill holds NaN until nobody can go on without it; a TMA store reads shared memory when its thread waits
// for it, a product reads its operands and changes its sums when its thread waits for it.

struct Barrier {  // in the 8 bytes of an mbarrier
    int bytes;
    short pending;
    unsigned short count : 15, phase : 1;
};
static std::vector<Box> loads;           // late ones under way
static uint16_t unfenced_by[ARENA / 4];  // the thread + 1 that wrote 4 bytes by stmatrix and has no fence_async yet
static u32 unfenced_reads[ARENA / 16];   // by ldmatrix, of 16 bytes: several lanes may read the same
static u64 all_unfenced_reads;           // their sum
static u64 vain;                         // waits for mbarriers in a row that found nothing new
static std::vector<Fiber*> at_named_barrier[16];

extern "C" char* simt_shared_memory() { return memory; }
extern "C" {
int simt_unfenced_writes;  // how many of unfenced_by are set
}

extern "C" void simt_mbarrier_init(u64* address, u32 arrivals) {
    Barrier& b = *(Barrier*)address;
    b.bytes = 0, b.pending = b.count = arrivals, b.phase = 0;
}

extern "C" void simt_mbarrier_arrive(u64* address, int arrivals, int bytes) {
    Barrier& b = *(Barrier*)address;
    b.bytes += bytes, b.pending -= arrivals;
    if (b.pending == 0 && b.bytes == 0) { b.pending = b.count, b.phase ^= 1, vain = 0; }
}

// The box in global memory to shared memory, zeros outside of the array; or back, what is inside.
static void copy_box(const Box& box, bool out) {
    for (int r = 0; r < box.box_rows; ++r) {
        for (int c = 0; c < 64; ++c) {
            u32 at = box.shared + r * 128 + c * 2;
            at ^= (at >> 7 & 7) << 4;
            long long row = box.row + r, column = box.column + c;
            bool inside = row >= 0 && row < box.rows && column >= 0 && column < box.columns;
            uint16_t *shared = (uint16_t*)(memory + at), *global = box.array + row * box.columns + column;
            if (!out) {
                *shared = inside ? *global : 0;
            } else if (inside) {
                *global = *shared;
            }
        }
    }
}

static void check_box(const Box& box, const void* shared) {
    size_t begin = (const char*)shared - memory, end = launch.dynamic_align + launch.dynamic_bytes;
    if (begin + box.bytes > end) {
        fail("out of bounds, shared", box.at, "TMA copy of %d bytes at byte %zu of %zu of dynamic shared memory",
             box.bytes, begin - (size_t)launch.dynamic_align, (size_t)launch.dynamic_bytes);
    }
    if (begin % (box.box_rows ? 128 : 16)) {
        fail("misaligned access", box.at, "TMA copy at byte %zu of shared memory", begin);
    }
}

static Box make_box(const u64* map, int column, int row, const void* shared, u64* barrier, At at) {
    Box box{(uint16_t*)map[0], (long long)map[1], (long long)map[2], row, column, (int)map[3], (int)map[3] * 128,
            self->store_group, (u32)((const char*)shared - memory), barrier, false, at};
    check_box(box, shared);
    return box;
}

static void finish_load(const Box& box) {
    if (box.box_rows) {
        copy_box(box, false);
    } else {
        memcpy(memory + box.shared, box.array, box.bytes);
    }
    vain = 0;
    simt_mbarrier_arrive(box.barrier, 0, -box.bytes);
}

// TMA is about to overwrite shared memory: an ldmatrix may be carried out after the arrival that tells of it.
static void check_overwritten(const Box& box) {
    for (u32 row = box.shared / 16; all_unfenced_reads && row < (box.shared + box.bytes) / 16; ++row) {
        if (!unfenced_reads[row]) { continue; }
        const Fiber* f = fibers;
        while (!std::count(f->unfenced_rows.begin(), f->unfenced_rows.end(), row)) { ++f; }
        fail("missing fence", box.at, "TMA overwrites shared memory that %s read by ldmatrix without fence_async",
             name_of(f));
    }
}

static void start_load(const Box& box) {
    check_overwritten(box);
    if (!launch.late) { return finish_load(box); }
    memset(memory + box.shared, 0xff, box.bytes);
    loads.push_back(box);
}

extern "C" void simt_tma_load(const u64* map, int column, int row, void* shared, u64* barrier, At at) {
    start_load(make_box(map, column, row, shared, barrier, at));
}
extern "C" void simt_bulk_load(void* shared, const void* global, u32 bytes, u64* barrier, At at) {
    Box box{(uint16_t*)global, 0, 0, 0, 0, 0, (int)bytes, 0, (u32)((char*)shared - memory), barrier, false, at};
    check_box(box, shared);
    start_load(box);
}

// Runs all others first. Late loads arrive, in any order, when everybody waits.
extern "C" void simt_yield(At at) {
    if (++vain > 10000ull * thread_count) {
        fail("deadlock", at, "%s waits for an mbarrier whose phase does not end", name_of(self));
    }
    if (vain > 2 * thread_count && !loads.empty()) {
        std::swap(loads[launch.order == 2 ? random_below((u32)loads.size()) : 0], loads.back());
        Box box = loads.back();
        loads.pop_back();
        finish_load(box);
    }
    ready.insert(ready.begin(), self);
    run_next();
}

extern "C" int simt_mbarrier_ended(u64* address, u32 parity, At at) {
    if (((Barrier*)address)->phase != parity) { return 1; }
    simt_yield(at);
    return 0;
}

// Shared memory that TMA or wgmma are about to read.
extern "C" void simt_check_fenced(u32 begin, u32 size, At at) {
    for (u32 a = begin & ~3u; simt_unfenced_writes && a < begin + size; a += 4) {
        if (unfenced_by[a / 4]) {
            fail("missing fence", at, "TMA or wgmma reads shared memory that %s wrote without fence_async",
                 name_of(&fibers[unfenced_by[a / 4] - 1]));
        }
    }
}
extern "C" void simt_generic_write(u32 at) {
    simt_unfenced_writes += unfenced_by[at / 4] == 0;
    unfenced_by[at / 4] = (uint16_t)(me + 1);
    self->unfenced.push_back(at);
}
static void generic_read(const void* row, void* pc) {
    check_shared((void*)row, pc);
    u32 number = (u32)(((const char*)row - memory) / 16);
    ++unfenced_reads[number], ++all_unfenced_reads;
    self->unfenced_rows.push_back(number);
}
extern "C" void simt_fence_async() {
    for (u32 at : self->unfenced) {
        if (unfenced_by[at / 4] == me + 1) { unfenced_by[at / 4] = 0, --simt_unfenced_writes; }
    }
    for (u32 row : self->unfenced_rows) { --unfenced_reads[row], --all_unfenced_reads; }
    self->unfenced.clear(), self->unfenced_rows.clear();
}

extern "C" void simt_tma_store(const u64* map, int column, int row, const void* shared, At at) {
    Box box = make_box(map, column, row, shared, nullptr, at);
    simt_check_fenced(box.shared, box.bytes, at);
    if (!launch.late) { copy_box(box, true), box.done = true; }
    self->stores.push_back(box);
}
extern "C" void simt_tma_store_commit() { ++self->store_group; }
extern "C" void simt_tma_store_wait(int pending) {
    std::vector<Box>& stores = self->stores;
    while (!stores.empty() && stores[0].group < self->store_group - pending) {
        if (!stores[0].done) { copy_box(stores[0], true); }
        stores.erase(stores.begin());
    }
}

extern "C" void simt_product(void (*run)(const void*), const void* closure, int size) {
    if (!launch.late) { return run(closure); }
    self->products.push_back({self->product_group, run, {}});
    memcpy(self->products.back().closure, closure, size);
}
extern "C" void simt_product_commit() { ++self->product_group; }
extern "C" void simt_product_wait(int pending) {
    std::vector<Product>& products = self->products;
    size_t done = 0;
    for (; done < products.size() && products[done].group < self->product_group - pending; ++done) {
        products[done].run(products[done].closure);
    }
    products.erase(products.begin(), products.begin() + done);
}

extern "C" void simt_named_barrier(int number, int threads, At at) {
    if (number < 0 || number > 15) { fail("named barrier", at, "barrier %d; there are 16", number); }
    std::vector<Fiber*>& waiting = at_named_barrier[number];
    self->state = AT_NAMED_BARRIER, self->at = at, self->operand = threads;
    waiting.push_back(self);
    if (waiting[0]->operand != threads) {
        fail("named barrier", at, "%s comes to barrier %d for %d threads, %s for %d", name_of(self), number, threads,
             name_of(waiting[0]), waiting[0]->operand);
    }
    if ((int)waiting.size() == threads) {
        std::sort(waiting.begin(), waiting.end(),
                  [](Fiber* a, Fiber* b) { return launch.order == 1 ? a->tid < b->tid : a->tid > b->tid; });
        for (Fiber* f : waiting) {
            f->state = READY;
            ready.push_back(f);
        }
        waiting.clear();
    }
    run_next();
}

// A thread has come to its end, or a whole block has.
static void check_exit() {
    if (!self->stores.empty()) {
        const Box& box = self->stores[0];
        fail("TMA store in flight", box.at, "%s ends before its TMA store has read shared memory", name_of(self));
    }
    if (!self->products.empty()) { fail("wgmma in flight", At{}, "%s ends before its products", name_of(self)); }
}
static void check_loads() {
    if (!loads.empty()) {
        report("TMA load in flight", nullptr, loads[0].at, "the block ends before a TMA load that it asked for");
    }
}
static void clear_hopper() {
    vain = 0;
    loads.clear();
    for (auto& waiting : at_named_barrier) { waiting.clear(); }
    if (simt_unfenced_writes) { memset(unfenced_by, 0, sizeof unfenced_by), simt_unfenced_writes = 0; }
    if (all_unfenced_reads) { memset(unfenced_reads, 0, sizeof unfenced_reads), all_unfenced_reads = 0; }
}

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory, atomics, built-in variables
// ---------------------------------------------------------------------------------------------------------------------

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

// ---------------------------------------------------------------------------------------------------------------------
// Launch
// ---------------------------------------------------------------------------------------------------------------------

static sigjmp_buf escape;

// A wild access in fast mode, an overflowing stack, an integer division by zero or an endless loop ends the launch, not
// the process.
static void on_signal(int number, siginfo_t* info, void* context) {
    if (number == SIGRTMIN + 4) {
        report("timeout", self, At{}, "more than %.0f seconds", launch.timeout);
    } else {
        report("crash", self, At{}, "%s at address %p", strsignal(number), info->si_addr);
    }
#if defined(__x86_64__)
    uintptr_t pc = (uintptr_t)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP];
    if (pc >= image_begin && pc < image_end) { fault.pc = pc + 1 - image_begin; }
#else
    (void)context;
#endif
    siglongjmp(escape, 1);
}

__attribute__((constructor)) static void set_up() {
    auto reserve = [](size_t bytes) {
        void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) {
            fprintf(stderr, "simt: cannot reserve %zu bytes of address space\n", bytes);
            abort();
        }
        return p;
    };
    memory = (char*)reserve(MEMORY);
    writers = (u32*)reserve(MEMORY * 2), readers = (u32*)reserve(MEMORY * 2), other_readers = (u32*)reserve(MEMORY * 2);
    char* stacks = (char*)reserve(MAX_THREADS * STACK);
    for (size_t i = 0; i < MAX_THREADS; ++i) {
        fibers[i].stack = stacks + i * STACK;
        fibers[i].tid = i, fibers[i].warp = i / 32, fibers[i].lane = i % 32;
        mprotect(fibers[i].stack, 4096, PROT_NONE);
    }
}

static int find_image(dl_phdr_info* info, size_t, void*) {
    for (int i = 0; info->dlpi_addr == image_begin && i < info->dlpi_phnum; ++i) {
        const auto& segment = info->dlpi_phdr[i];
        if (segment.p_type == PT_LOAD) {
            image_end = std::max(image_end, (uintptr_t)(image_begin + segment.p_vaddr + segment.p_memsz));
        }
    }
    return 0;
}

static void run_block() {
    barrier_arrived = 0;
    clear_hopper();
    for (auto& waiting : gatherings) { waiting.clear(); }
    ready.clear();
    if (launch.checked) {
        if (now > TIME_SWEEP) { sweep(); }
        tick();
        block_record = now << 12, limit_record = block_record - 1;
        block_starts.push_back(now);
        block_indices.push_back(block_index);
        memset(unfenced, 0, sizeof unfenced);
        touched.emplace_back();
        for (const SharedVariable& v : shared_variables) { fill(v.offset, v.offset + v.size, NEVER_WRITTEN); }
    }
    for (u32 i = 0; i < thread_count; ++i) { make_fiber(fibers[i]); }
    push_all_ready();
    become(&scheduler);
    run_next();
    if (faulted) { return; }
    if (launch.counting) { count_block(); }
    for (u32 i = 0; i < thread_count; ++i) {
        if (fibers[i].state != EXITED) { return report_deadlock(); }
    }
    check_loads();
}

static void run_blocks() {
    u64 blocks = (u64)launch.grid[0] * launch.grid[1] * launch.grid[2];
    std::vector<u64> order(blocks);
    for (u64 i = 0; i < blocks; ++i) { order[i] = launch.order == 1 ? blocks - 1 - i : i; }
    for (u64 i = blocks; launch.order == 2 && i > 1; --i) { std::swap(order[i - 1], order[random_below((u32)i)]); }
    for (u64 i : order) {
        block_index = {(u32)(i % launch.grid[0]), (u32)(i / launch.grid[0] % launch.grid[1]),
                       (u32)(i / launch.grid[0] / launch.grid[1])};
        run_block();
        if (faulted) { return; }
    }
}

static void start_checks(const Region* old_regions, int old_count) {
    for (int i = 0; i < old_count; ++i) {
        fill(old_regions[i].begin - (uintptr_t)memory, old_regions[i].end - (uintptr_t)memory, UNALLOCATED);
    }
    for (const SharedVariable& v : shared_variables) { fill(v.offset, v.offset + v.size, UNALLOCATED); }
    shared_variables.clear();
    for (int i = 0; i < launch.region_count; ++i) {
        const Region& r = launch.regions[i];
        fill(r.begin - (uintptr_t)memory, r.end - (uintptr_t)memory, r.read_only ? READ_ONLY : INITIALISED);
        high_water = std::max(high_water, (size_t)(r.end - (uintptr_t)memory + 1));
    }
}

extern "C" char* simt_memory() { return memory; }
extern "C" u32* simt_writers() { return writers; }
extern "C" u64 simt_arena_size() { return ARENA; }
extern "C" u64 simt_memory_size() { return MEMORY; }

// Makes the arrays of a launch accessible and everything else inaccessible. The Python layer then fills them, and may
// mark parts as never written.
extern "C" void simt_prepare(const Region* regions, int count) {
    static std::vector<Region> current;
    launch.regions = regions, launch.region_count = count;
    start_checks(current.data(), (int)current.size());
    current.assign(regions, regions + count);
}

// Returns 0, or 1 with the fault filled in. `float_atomic` gets the position of a floating-point atomic, or 0.
extern "C" int simt_launch(const Launch* what, Fault* out, u64* float_atomic) {
    launch = *what;
    thread_count = launch.block[0] * launch.block[1] * launch.block[2];
    for (u32 i = 0; i < thread_count; ++i) {
        fibers[i].index = {i % launch.block[0], i / launch.block[0] % launch.block[1],
                           i / launch.block[0] / launch.block[1]};
    }
    random_state = launch.seed * 2654435761u | 1u;
    faulted = false;
    fault = Fault{};
    watching = launch.watching || launch.counting, watched_pc = 0;
    streams.clear(), traffic.clear();
    float_atomics = 0, float_atomic_pc = 0;
    launch_number += 1;
    statics_end = STATICS, statics_bytes = 0;
    Dl_info info;
    dladdr((void*)launch.entry, &info);
    image_begin = (uintptr_t)info.dli_fbase, image_end = image_begin;
    dl_iterate_phdr(find_image, nullptr);

    if (!launch.checked) { shared_variables.clear(); }
    if (launch.checked) {
        launch_record = (TIME_END + 1) << 12;  // all records are old
        if (now > TIME_SWEEP / 2) { sweep(); }
        now += 1;
        launch_record = now << 12;
        block_starts.clear(), block_indices.clear(), counters.clear(), touched.clear();
        if (launch.dynamic_bytes) {
            shared_variables.push_back({launch.dynamic_align, launch.dynamic_bytes, 1, "dynamic shared memory"});
        }
    }

    static char signal_stack[64 * 1024];
    stack_t alternate = {}, old_stack;
    alternate.ss_sp = signal_stack, alternate.ss_size = sizeof signal_stack;
    sigaltstack(&alternate, &old_stack);
    struct sigaction action = {}, old[5];
    const int signals[5] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGRTMIN + 4};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 5; ++i) { sigaction(signals[i], &action, &old[i]); }
    sigevent event = {};
    event.sigev_notify = SIGEV_THREAD_ID, event.sigev_signo = SIGRTMIN + 4;
    event._sigev_un._tid = (pid_t)syscall(SYS_gettid);
    timer_t timer;
    bool timed = launch.timeout > 0 && timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer) == 0;
    if (timed) {
        itimerspec when = {};
        when.it_value.tv_sec = (time_t)launch.timeout,
        when.it_value.tv_nsec = (long)((launch.timeout - (time_t)launch.timeout) * 1e9);
        timer_settime(timer, 0, &when, nullptr);
    }
#if defined(__x86_64__)
    u32 control = _mm_getcsr();
    _mm_setcsr(control | 0x8040);  // denormals are zero, in and out: CuPy compiles with -ftz=true
#endif
    if (!sigsetjmp(escape, 1)) { run_blocks(); }
#if defined(__x86_64__)
    _mm_setcsr(control);
#endif
    if (timed) { timer_delete(timer); }
    for (int i = 0; i < 5; ++i) { sigaction(signals[i], &old[i], nullptr); }
    sigaltstack(&old_stack, nullptr);
    fault.other_pc = watched_pc;
    *out = fault;
    *float_atomic = float_atomic_pc;
    return faulted;
}
