// Hopper's units (sm_90a): mbarriers, TMA, wgmma, named barriers
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
static std::set<std::array<long long, 3>> boxes;  // that this launch has copied, and in which direction does not matter
static u64 vain;                         // waits for mbarriers in a row that found nothing new
static std::vector<Fiber*> at_named_barrier[16];

extern "C" char* simt_shared_memory() { return memory; }
extern "C" float simt_f16_value(u32 bits) { return f16_value(bits); }
extern "C" {
int simt_unfenced_writes;  // how many of unfenced_by are set
}

extern "C" void simt_mbarrier_init(u64* address, u32 arrivals) {
    Barrier& b = *(Barrier*)address;
    announced.erase(address);
    b.bytes = 0, b.pending = b.count = arrivals, b.phase = 0;
}

extern "C" void simt_mbarrier_arrive(u64* address, int arrivals, int bytes) {
    Barrier& b = *(Barrier*)address;
    b.bytes += bytes, b.pending -= arrivals;
    bool ends = b.pending == 0 && b.bytes == 0;
    if (arrivals) {
        announce(address, ends);
    } else if (ends) {
        end_phase(address);
    }
    if (ends) { b.pending = b.count, b.phase ^= 1, vain = 0; }
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
    progress += boxes.insert({(long long)box.array, box.row, box.column}).second;
    size_t begin = (const char*)shared - memory, end = launch.dynamic_align + launch.dynamic_bytes;
    const SharedVariable* variable = variable_at(begin);  // a static one
    if (begin + box.bytes > (variable ? variable->offset + variable->size : end)) {
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
    follow_load(box.shared, box.bytes, box.at);
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
    self->at = at;
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
    if (((Barrier*)address)->phase != parity) {
        hear(address);
        return 1;
    }
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
extern "C" void simt_stmatrix_write(u32 at, void* caller) {
    if (launch.followed) { follow_shared(at, 4, true, (u32)((uintptr_t)caller - image_begin)); }
    simt_generic_write(at);
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
        follow_fence(at, 4);
        if (unfenced_by[at / 4] == me + 1) { unfenced_by[at / 4] = 0, --simt_unfenced_writes; }
    }
    for (u32 row : self->unfenced_rows) { --unfenced_reads[row], --all_unfenced_reads; }
    for (u32 at : self->matrix_reads) { follow_fence(at, 2); }
    self->matrix_reads.clear();
    self->unfenced.clear(), self->unfenced_rows.clear();
}

extern "C" void simt_tma_store(const u64* map, int column, int row, const void* shared, At at) {
    Box box = make_box(map, column, row, shared, nullptr, at);
    simt_check_fenced(box.shared, box.bytes, at);
    follow_store(box.shared, box.bytes, at);
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

// A wgmma reads a piece of shared memory; lane 0 tells for its warp.
extern "C" void simt_product_read(u32 at) {
    if (launch.followed) { start_product_read(at); }
}
extern "C" void simt_product_begin() { self->registers_fenced = true; }
extern "C" void simt_product(void (*run)(const void*), const void* closure, int size, At at) {
    if (!self->registers_fenced) {
        fail("missing fence", at, "%s calls wgmma without wgmma_begin since its last wait", name_of(self));
    }
    if (!launch.late) { return run(closure); }
    self->products.push_back({self->product_group, run, {}});
    memcpy(self->products.back().closure, closure, size);
}
extern "C" void simt_product_commit() { ++self->product_group; }
extern "C" void simt_product_wait(int pending) {
    if (launch.followed) { end_product_reads(pending); }
    if (pending == 0) { self->registers_fenced = false; }
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
        share_knowledge(waiting);
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
