// Fibers: one for each thread of the running block; each runs until it waits for others.

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
    bool registers_fenced;                            // wgmma_begin since the last wait
    std::vector<std::pair<int, u32>> product_reads;   // group and 16-byte piece of shared memory
    std::vector<u32> unfenced;       // shared addresses written by stmatrix since the last fence_async
    std::vector<u32> matrix_reads;   // shared addresses, of 2 bytes, that it got by ldmatrix since then
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

// What an endless loop has not: threads that end, elements that the block touches for the first time, new TMA boxes.
static u64 progress;
static double expired;  // the seconds that have passed, if they were too many
static bool endless;    // without progress
static void fail_expired(void* pc);

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
    if (unlikely(expired > 0) && from != &scheduler) { fail_expired(nullptr); }
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
    ++progress;
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
    f.copies.clear(), f.stores.clear(), f.products.clear(), f.unfenced.clear(), f.unfenced_rows.clear(), f.matrix_reads.clear();
    f.product_reads.clear(), f.registers_fenced = false;
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
