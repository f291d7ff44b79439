// Runs one kernel launch on the CPU. A block's threads are fibers of one OS thread: each runs until it waits at a barrier
// or a warp function, and the last one to arrive releases the others. Blocks run one after another.
//
// Sections: fibers, faults, barriers and warp functions, tensor cores, launch.
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <utility>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

typedef uint32_t u32;
typedef uint64_t u64;

struct At { const char* file; int line; };
struct uint3 { u32 x, y, z; };

// Filled by the Python layer, read by it after a fault. Keep in step with the ctypes structures in __init__.py.
struct Fault {
    char kind[40];
    char text[1000];
    char file[400];  // source position, if known without addr2line
    int line;
    int has_thread;
    u32 block[3], thread[3];
    void* pc;        // otherwise: the return address of the hook
    void* address;
};
struct Launch {
    void (*entry)(void**);
    void** args;
    u32 grid[3], block[3];
    u64 dynamic_bytes;
    int order;  // 0 forward, 1 reverse, 2 random
    u32 seed;
    int checked;
};

static const size_t MAX_THREADS = 1024, STACK = 128 * 1024, SHARED_LIMIT = 227 * 1024, STATIC_LIMIT = 48 * 1024;

// ---------------------------------------------------------------------------------------------------------------------
// Fibers
// ---------------------------------------------------------------------------------------------------------------------

enum State { READY, AT_BARRIER, IN_WARP, EXITED };

struct Fiber {
#if defined(__x86_64__)
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
    u64 value;       // operand, then result
    int operand;
    void* pointers[4];
};

static Fiber fibers[MAX_THREADS], scheduler;
static Fiber* self;           // the running fiber
static u32 thread_count;
static std::vector<Fiber*> ready;  // the next to run is at the back, or anywhere if the order is random
static Launch launch;
static uint3 block_index;
static Fault fault;
static bool faulted;

#if defined(__x86_64__)
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
    self = to;
    simt_switch(&from->sp, &to->sp);
}
#else
static inline void switch_to(Fiber* from, Fiber* to) {
    self = to;
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

static void fiber_main() {
    launch.entry(launch.args);
    self->state = EXITED;
    run_next();
    abort();  // an exited fiber is never resumed
}

static void make_fiber(Fiber& f) {
    size_t color = f.tid % 61 * 64;  // equal offsets in every stack would share a few cache sets
    char* top = f.stack + STACK - 4096 - color;
#if defined(__x86_64__)
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

static void describe_fault(const char* kind, const Fiber* f, At at, const char* format, va_list list) {
    if (faulted) { return; }
    faulted = true;
    memset(&fault, 0, sizeof fault);
    snprintf(fault.kind, sizeof fault.kind, "%s", kind);
    vsnprintf(fault.text, sizeof fault.text, format, list);
    snprintf(fault.file, sizeof fault.file, "%s", at.file ? at.file : "");
    fault.line = at.line;
    fault.block[0] = block_index.x, fault.block[1] = block_index.y, fault.block[2] = block_index.z;
    if (f) {
        fault.has_thread = 1;
        fault.thread[0] = f->index.x, fault.thread[1] = f->index.y, fault.thread[2] = f->index.z;
    }
}

// Ends the launch from inside a fiber; the other fibers are abandoned where they stand.
__attribute__((noreturn, format(printf, 3, 4))) static void fail(const char* kind, At at, const char* format, ...) {
    va_list list;
    va_start(list, format);
    describe_fault(kind, self, at, format, list);
    va_end(list);
    Fiber dead;
    switch_to(&dead, &scheduler);
    abort();
}

__attribute__((format(printf, 4, 5))) static void report(const char* kind, const Fiber* f, At at, const char* format, ...) {
    va_list list;
    va_start(list, format);
    describe_fault(kind, f, at, format, list);
    va_end(list);
}

static const char* base_name(const char* path) {
    const char* slash = path ? strrchr(path, '/') : nullptr;
    return slash ? slash + 1 : path ? path : "?";
}

// "thread (3,0,0)" of a 1-D block reads better as "thread 3".
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

// ---------------------------------------------------------------------------------------------------------------------
// Barriers and warp functions: the last to arrive computes the results of all and releases them
// ---------------------------------------------------------------------------------------------------------------------

// Keep in step with simt_cuda.h and simt_ptx.h.
enum Op { SHFL_IDX, SHFL_UP, SHFL_DOWN, SHFL_XOR, BALLOT, ANY, ALL, MATCH_ANY, MATCH_ALL, REDUCE_ADD, REDUCE_MIN_S,
          REDUCE_MIN_U, REDUCE_MAX_S, REDUCE_MAX_U, REDUCE_AND, REDUCE_OR, REDUCE_XOR, SYNCWARP, LDMATRIX, MMA };
enum Vote { VOTE_NONE, VOTE_OR, VOTE_AND, VOTE_COUNT };
enum Mma { MMA_16816_BF16, MMA_16816_F16, MMA_1688_F16, MMA_1688_TF32 };
static const char* const op_names[] = {
    "__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync", "__ballot_sync", "__any_sync", "__all_sync",
    "__match_any_sync", "__match_all_sync", "__reduce_add_sync", "__reduce_min_sync", "__reduce_min_sync",
    "__reduce_max_sync", "__reduce_max_sync", "__reduce_and_sync", "__reduce_or_sync", "__reduce_xor_sync", "__syncwarp",
    "ldmatrix", "mma"};

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
}

extern "C" int simt_barrier(int vote, int value, At at) {
    self->at = at, self->op = vote, self->value = value != 0;
    self->state = AT_BARRIER;
    if (++barrier_arrived == thread_count) {
        for (u32 i = 0; i < thread_count; ++i) {
            if (fibers[i].at.line != at.line || strcmp(fibers[i].at.file, at.file) != 0 || fibers[i].op != vote) {
                Fiber* other = &fibers[i];
                fail("divergent barrier", at, "%s waits at the __syncthreads of %s:%d while %s waits at that of %s:%d",
                     name_of(self), base_name(at.file), at.line, name_of(other), base_name(other->at.file), other->at.line);
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
        report("shuffle source", &f, f.at, "lane %d of warp %u reads lane %d, which the mask 0x%08x of its %s leaves out",
               lane, f.warp, source, f.mask, op_names[f.op]);
    }
    return lanes[source].value;
}

static void finish_ldmatrix(Fiber* lanes);
static void finish_mma(Fiber* lanes);

static void finish_warp(Fiber* lanes, const Gathering& g) {
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
        case SHFL_IDX: case SHFL_UP: case SHFL_DOWN: case SHFL_XOR: r = shuffle_source(f, lanes); break;
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
    if (g.op == LDMATRIX) { finish_ldmatrix(lanes); }
    if (g.op == MMA) { finish_mma(lanes); }
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
    if (width < 1 || width > 32 || (width & (width - 1))) { fail("shuffle width", at, "width %d is no power of two up to 32", width); }
    std::vector<Gathering>& waiting = gatherings[f->warp];
    size_t i = 0;
    while (i < waiting.size() && !(waiting[i].op == op && waiting[i].mask == mask && waiting[i].width == width)) { ++i; }
    if (i == waiting.size()) { waiting.push_back({op, width, mask, 0}); }
    waiting[i].arrived |= 1u << f->lane;
    f->state = IN_WARP;
    if (waiting[i].arrived == mask) {
        Gathering done = waiting[i];
        waiting[i] = waiting.back();
        waiting.pop_back();
        Fiber* lanes = f - f->lane;
        finish_warp(lanes, done);
        if (faulted) { fail("", at, "%s", ""); }
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
            if (tid < thread_count && other.state == IN_WARP && other.op == f.op && other.mask == f.mask && other.width == f.width) {
                continue;
            }
            char what[300];
            if (tid >= thread_count) {
                snprintf(what, sizeof what, "lane %u, which does not exist: the block has %u threads", lane, thread_count);
            } else if (other.state == EXITED) {
                snprintf(what, sizeof what, "%s (lane %u), which has exited", name_of(&other), lane);
            } else if (other.state == AT_BARRIER) {
                snprintf(what, sizeof what, "%s (lane %u), which waits at the __syncthreads of %s:%d", name_of(&other), lane,
                         base_name(other.at.file), other.at.line);
            } else {
                snprintf(what, sizeof what, "%s (lane %u), which waits in %s (mask 0x%08x, width %d) of %s:%d", name_of(&other),
                         lane, op_names[other.op], other.mask, other.width, base_name(other.at.file), other.at.line);
            }
            report("divergent warp", &f, f.at, "%s (lane %u of warp %u) waits in %s (mask 0x%08x, width %d) for %s", name_of(&f),
                   f.lane, f.warp, op_names[f.op], f.mask, f.width, what);
            return;
        }
    }
    Fiber *waiting = nullptr, *gone = nullptr;
    for (u32 i = 0; i < thread_count; ++i) {
        if (fibers[i].state == AT_BARRIER && !waiting) { waiting = &fibers[i]; }
        if (fibers[i].state == EXITED && !gone) { gone = &fibers[i]; }
    }
    if (waiting && gone) {
        report("divergent barrier", waiting, waiting->at, "%s waits at __syncthreads, but %s has exited (%u of %u threads arrived)",
               name_of(waiting), name_of(gone), barrier_arrived, thread_count);
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
                for (u32 half = 0; half < 2; ++half) { B[2 * t + 8 * i + half][g] = value(b[i] >> 16 * half & 0xffffu); }
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

extern "C" void simt_ldmatrix(u32* r, const void* row, int matrices, int transposed, At at) {
    self->operand = matrices * 2 + transposed;
    self->pointers[0] = r, self->pointers[1] = (void*)row;
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

extern "C" void simt_cp_async(void* shared, const void* global, int pred, At) {
    if (pred) {
        memcpy(shared, global, 16);
    } else {
        memset(shared, 0, 16);
    }
}
extern "C" void simt_cp_async_commit() {}
extern "C" void simt_cp_async_wait(int) {}

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory, atomics, built-in variables
// ---------------------------------------------------------------------------------------------------------------------

// One arena: dynamic shared memory first, static variables from the middle on.
static const size_t ARENA = 1 << 20, STATICS = 1 << 19;
alignas(4096) static char arena[ARENA];
static size_t statics_end, statics_bytes;
static u64 shared_launch;  // a static's key says where it lies: launch << 20 | offset

extern "C" void* simt_dynamic_shared(size_t align) {
    // No more aligned than the kernel asked for, so that reliance on luck shows.
    return arena + (align < 16 ? 16 : align);
}

extern "C" void* simt_shared(u64* key, size_t size, size_t align, const char* name, const char* file, int line) {
    if (*key >> 20 != shared_launch) {
        statics_end = (statics_end + align - 1) / align * align;
        *key = shared_launch << 20 | statics_end;
        statics_end += size + 16;
        statics_bytes += size;
        if (statics_bytes > STATIC_LIMIT) {
            fail("shared memory size", At{file, line}, "static shared memory is %zu bytes with `%s`; the limit is %zu", statics_bytes,
                 name, STATIC_LIMIT);
        }
    }
    return arena + (*key & 0xfffff);
}

extern "C" u32 simt_shared_address(const void* p, At) { return (u32)((const char*)p - arena); }

extern "C" u64 simt_atomic(void* p, int size, u64 a, u64 b, u64 (*change)(u64, u64, u64), int, At) {
    u64 old = 0;
    memcpy(&old, p, size);
    u64 now = change(old, a, b);
    memcpy(p, &now, size);
    return old;
}
extern "C" void simt_fence() {}

extern "C" uint3 simt_thread_idx() { return self->index; }
extern "C" uint3 simt_block_idx() { return block_index; }
extern "C" uint3 simt_block_dim() { return {launch.block[0], launch.block[1], launch.block[2]}; }
extern "C" uint3 simt_grid_dim() { return {launch.grid[0], launch.grid[1], launch.grid[2]}; }
extern "C" u32 simt_lane() { return self->lane; }

// ---------------------------------------------------------------------------------------------------------------------
// Launch
// ---------------------------------------------------------------------------------------------------------------------

static sigjmp_buf escape;

// A wild access in fast mode, an overflowing stack or an integer division by zero ends the launch, not the process.
static void on_signal(int number, siginfo_t* info, void* context) {
    report("crash", self == &scheduler ? nullptr : self, At{}, "signal %d (%s) at address %p", number, strsignal(number), info->si_addr);
#if defined(__x86_64__)
    fault.pc = (void*)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP];
#else
    (void)context;
#endif
    siglongjmp(escape, 1);
}

static void set_up() {
    char* stacks = (char*)mmap(nullptr, MAX_THREADS * STACK, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) { abort(); }
    for (size_t i = 0; i < MAX_THREADS; ++i) {
        fibers[i].stack = stacks + i * STACK;
        fibers[i].tid = i, fibers[i].warp = i / 32, fibers[i].lane = i % 32;
        mprotect(fibers[i].stack, 4096, PROT_NONE);
    }
}

static void run_block() {
    barrier_arrived = 0;
    for (auto& waiting : gatherings) { waiting.clear(); }
    ready.clear();
    for (u32 i = 0; i < thread_count; ++i) { make_fiber(fibers[i]); }
    push_all_ready();
    self = &scheduler;
    run_next();
    if (faulted) { return; }
    for (u32 i = 0; i < thread_count; ++i) {
        if (fibers[i].state != EXITED) { return report_deadlock(); }
    }
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

// Returns 0, or 1 with the fault filled in.
extern "C" int simt_launch(const Launch* what, Fault* out) {
    static bool ready_to_run = (set_up(), true);
    (void)ready_to_run;
    launch = *what;
    thread_count = launch.block[0] * launch.block[1] * launch.block[2];
    for (u32 i = 0; i < thread_count; ++i) {
        fibers[i].index = {i % launch.block[0], i / launch.block[0] % launch.block[1], i / launch.block[0] / launch.block[1]};
    }
    random_state = launch.seed * 2654435761u | 1u;
    faulted = false;
    shared_launch += 1;
    statics_end = STATICS, statics_bytes = 0;

    static char signal_stack[64 * 1024];
    stack_t alternate = {}, old_stack;
    alternate.ss_sp = signal_stack, alternate.ss_size = sizeof signal_stack;
    sigaltstack(&alternate, &old_stack);
    struct sigaction action = {}, old[4];
    const int signals[4] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 4; ++i) { sigaction(signals[i], &action, &old[i]); }
    if (!sigsetjmp(escape, 1)) { run_blocks(); }
    for (int i = 0; i < 4; ++i) { sigaction(signals[i], &old[i], nullptr); }
    sigaltstack(&old_stack, nullptr);
    if (faulted) { *out = fault; }
    return faulted;
}
