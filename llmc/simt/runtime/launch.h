// Launch: blocks one after another, signals and the clock around them, what the Python layer calls.

static sigjmp_buf escape;

static timer_t timer;
static double started, progressed;  // CPU time: of the launch's begin, and when the clock last saw progress
static u64 seen_progress;
static int tries;

static double cpu_time() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// Rings all `seconds` of CPU time, or as seldom as the machine's clock does.
static void set_clock(double seconds) {
    timespec spec{(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
    itimerspec when = {spec, spec};
    timer_settime(timer, 0, &when, nullptr);
}

// The clock has rung: whether the launch may go on.
static bool patient(bool in_kernel) {
    double present = cpu_time();
    if (progress != seen_progress) { seen_progress = progress, progressed = present; }
    bool idle = present - progressed > launch.patience;
    if (!idle && present - started < launch.timeout) { return true; }
    if (!in_kernel && ++tries < 20) {  // the kernel's own line says most: the next call of the runtime will have it
        expired = idle ? launch.patience : launch.timeout, endless = idle, watching |= EXPIRED;
        return true;
    }
    expired = idle ? launch.patience : launch.timeout, endless = idle;
    report_expired(At{});
    return false;
}

// A wild access in fast mode, an overflowing stack, an integer division by zero or an endless loop ends the launch, not
// the process.
static void on_signal(int number, siginfo_t* info, void* context) {
    uintptr_t pc = 0;
#if defined(__x86_64__)
    pc = (uintptr_t)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP];
#else
    (void)context;
#endif
    bool in_kernel = pc >= image_begin && pc < image_end;
    if (number == SIGRTMIN + 4) {
        if (patient(in_kernel)) { return; }
    } else {
        report("crash", self, At{}, "%s at address %p", strsignal(number), info->si_addr);
    }
    if (in_kernel) { fault.pc = pc + 1 - image_begin; }
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
    start_following();
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
    watching = (launch.watching || launch.counting ? WATCHING : 0) | (launch.followed ? FOLLOWING : 0), watched_pc = 0;
    streams.clear(), traffic.clear();
    float_atomics = 0, float_atomic_pc = 0;
    boxes.clear();
    launch_number += 1;
    statics_end = STATICS, statics_bytes = 0;
    Dl_info info;
    dladdr((void*)launch.entry, &info);
    image_begin = (uintptr_t)info.dli_fbase, image_end = image_begin;
    dl_iterate_phdr(find_image, nullptr);

    if (!launch.checked) { shared_variables.clear(); }
    if (launch.followed && launch.dynamic_bytes) {
        shared_variables.push_back({launch.dynamic_align, launch.dynamic_bytes, 1, "dynamic shared memory"});
    }
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
    tries = 0, progress = seen_progress = 0, expired = 0, started = progressed = cpu_time();
    bool timed = launch.patience > 0 && timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer) == 0;
    if (timed) { set_clock(launch.patience / 8); }
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
    if (watched_pc) { fault.other_pc = watched_pc; }
    *out = fault;
    *float_atomic = float_atomic_pc;
    return faulted;
}
