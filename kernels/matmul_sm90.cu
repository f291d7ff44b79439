// The three products of kernels/matmul.cu (math, layouts and contract there) on Hopper's own units, sm_90a, for bf16
// and fp16: TMA copies tiles into shared memory, wgmma multiplies them from there. All tensors lie as stored, nothing
// is transposed. kernels/hopper.cuh has the roles and the ring of stages.
//
// The producer fills a stage with the tiles of a and b for the next 64 of k. The consumers take turns at output tiles:
// while one multiplies, the other rounds, adds and stores. A consumer stores its tile in boxes of 64 x 64: it packs a
// box into a slot of shared memory, and TMA copies the box out from there. What the end of a tile reads (pre_gelu, or
// the gradient that is added to) is brought into the same slots by TMA; the first boxes of it arrive while the other
// consumer multiplies. The weight gradient makes the bias gradient too: it multiplies its tiles of dout by ones.
// Blocks stay: one runs on each multiprocessor, and takes every gridDim.x'th tile of the output.
//
// Rung 11 of the ladder; production for bf16 and fp16 at compute capability 9.0. TFLOP/s on an H200 at B = 64,
// T = 1024, GPT-2 124M, bf16, 2026-11-26; in brackets the ratio to cuBLAS, which makes the bare product:
//            forward, with bias  | dgrad and wgrad, bare  | fc forward with GELU (two outputs), fcproj dgrad with dGELU
//   expected 680-760             | 680-760                | 620
//   measured 699-789 (1.01-1.18) | 655-772 (0.95-1.19)    | 626, 487 (0.92, 0.79)
// The rate falls with every instruction at the end of a tile, though the other consumer's products should hide them.
// The chip is power limited: at its 700 W the forward products run at 1.3 GHz, and the tensor cores are busy 97 % of
// the time. dev/LOG.md has what was tried on the way.
//
// Source: the structure is that of CUTLASS's warp-specialised kernels; P. Bansal, "Outperforming cuBLAS on H100".
#include "hopper.cuh"

// llmc/cuda/matmul.py decides and gives by -D:
//   ROWS, COLUMNS   outputs of a tile: 128 x 192, or 192 x 128 where fewer of those cover the output
//   STAGES          of the ring
//   SLOTS           boxes of 64 x 64 results that a consumer has room for in shared memory
//   BAND, LOW_BAND  rows of tiles in a band (work_item); the low one where a row of tiles has at most LOW_COLUMNS
//   THREADS, REDUCE_THREADS, SHARED_BYTES   of a block
constexpr int FORWARD = 0, DGRAD = 1, WGRAD = 2;
constexpr int DEPTH = 64;                               // k of a stage: 128 bytes, as TMA swizzles
constexpr int HALVES = ROWS / 64, BOXES = COLUMNS / 64;  // a tile's boxes of 64 x 64, down and across
constexpr int BOX = 64 * DEPTH * 2;                     // bytes of 64 x 64 values
constexpr int A_BYTES = ROWS * DEPTH * 2, STAGE_BYTES = A_BYTES + COLUMNS * DEPTH * 2;
constexpr int ALL = 1 << 30;                            // every tile

template <int OP> constexpr bool a_by_k = OP == WGRAD;
template <int OP> constexpr bool b_by_k = OP != FORWARD;

// One product and what to do with its result.
struct Product {
    int M, N, K;
    int whole;               // tiles from this one on, all in the order of work, are made in ranges of k
    int splits;              // the number of ranges
    floatX* out;             // (M, N), or null in WGRAD
    const floatX* bias;      // (N) or null: added
    floatX* gelu_input;      // (M, N) or null: the sum is stored here, and its gelu in out
    const floatX* gelu_at;   // (M, N) or null: the sum is multiplied by gelu'(gelu_at)
    floatX* gelu_out;        // (M, N) or null: gelu(gelu_at) is stored here
    floatG* grad;            // (M, N) in WGRAD, else null: the sum goes here
    int accumulate;          // grad += instead of =
    float* partials;         // (splits, tiles from `whole` on, ROWS, COLUMNS): the sums of the ranges
    float* bias_sums;        // (splits * columns of tiles, M) or null: parts of the sums of a over k
};

struct Shared {
    char stages[STAGES][STAGE_BYTES];
    char slots[2 * SLOTS][BOX];           // of one consumer, then of the other
    alignas(128) float bias[2][COLUMNS];  // FORWARD: of the consumers' tiles. WGRAD: 8 rows of 64 ones, 16-bit
    u64 loaded[2][HALVES * BOXES];        // a box that the end of a consumer's tile reads has arrived
    u64 full[STAGES], empty[STAGES];
    u64 turns[2];                         // consumer i may begin its next tile
};

static_assert((ROWS == 128 && COLUMNS == 192) || (ROWS == 192 && COLUMNS == 128), "the sums of a tile fill a consumer");
static_assert(THREADS == BLOCK_THREADS, "a producer and two consumers");
static_assert(SLOTS >= 3 && SLOTS <= HALVES * BOXES, "slots in turn for a box, the next, and a second result");
static_assert(sizeof(Shared::bias) >= 8 * 64 * 2, "room for the ones");
static_assert(sizeof(Shared) + 1024 == SHARED_BYTES, "the launcher asks for as much; 1024 to align it");
static_assert(ROWS * COLUMNS % (REDUCE_THREADS * 8) == 0, "matmul_wgrad_reduce_sm90 has no bounds within a tile");

// A tile of the output, or the part of one that is summed over a range of k.
struct Work {
    int m, n;        // first row and column of the tile
    int begin, end;  // blocks of DEPTH of k
    int split;       // which range that is
    int partial;     // which of the tiles in partials, or -1: all of k
};

// How many tiles are made in ranges of k, given the number of tiles.
__device__ inline int tail_tiles(const Product& p, int tiles) { return max(0, tiles - p.whole); }

__device__ inline int work_items(const Product& p) {
    int tiles = ceil_div(p.M, ROWS) * ceil_div(p.N, COLUMNS);
    return tiles + tail_tiles(p, tiles) * (p.splits - 1);
}

// The order of work decides what the blocks running together share in L2. Tiles are taken in bands of tile rows, and
// within a band column by column. Tiles in ranges of k come last: all tiles of a range before the next range. Blocks
// drift apart, and what they share has to stay in L2 until the last has read it: the lower the band, the closer in time
// are the tiles of a row. Where a row has so many tiles that a band is several times what runs together, the band has
// to be high, because all of b is read once for each band.
__device__ inline Work work_item(const Product& p, int item) {
    int M = p.M, N = p.N;
    forget(M), forget(N);  // otherwise what follows from them is kept from tile to tile, and spilled
    int rows = ceil_div(M, ROWS), columns = ceil_div(N, COLUMNS), blocks = ceil_div(p.K, DEPTH);
    int tail = tail_tiles(p, rows * columns), split = item < p.whole ? 0 : (item - p.whole) / tail;
    int tile = item - split * tail, most = columns <= LOW_COLUMNS ? LOW_BAND : BAND;
    int band = tile / (most * columns), in_band = tile % (most * columns), height = min(most, rows - band * most);
    Work w = {(band * most + in_band % height) * ROWS, in_band / height * COLUMNS, 0, blocks, split, -1};
    if (item >= p.whole) {
        w.begin = (i64)split * blocks / p.splits, w.end = (i64)(split + 1) * blocks / p.splits;
        w.partial = item - p.whole;
    }
    return w;
}

// ---------------------------------------------------------------------------------------------------------------------
// producer
// ---------------------------------------------------------------------------------------------------------------------

// One thread fills the stages in the order in which the consumers read them.
template <int OP>
__device__ inline void produce(const Product& p, const TensorMap& a, const TensorMap& b, Shared& shared) {
    int stage = 0, phase = 0;
    for (int item = blockIdx.x; item < work_items(p); item += gridDim.x) {
        Work w = work_item(p, item);
        for (int block = w.begin; block < w.end; block++) {
            char* a_tile = shared.stages[stage];
            char* b_tile = a_tile + A_BYTES;
            u64* full = &shared.full[stage];
            int k = block * DEPTH;
            mbarrier_wait(&shared.empty[stage], phase ^ 1);
            mbarrier_expect(full, STAGE_BYTES);
            if (a_by_k<OP>) {
#pragma unroll
                for (int i = 0; i < HALVES; i++) { tma_load(a_tile + i * BOX, a, w.m + i * 64, k, full); }
            } else {
                tma_load(a_tile, a, k, w.m, full);
            }
            if (b_by_k<OP>) {
#pragma unroll
                for (int i = 0; i < BOXES; i++) { tma_load(b_tile + i * BOX, b, w.n + i * 64, k, full); }
            } else {
                tma_load(b_tile, b, k, w.n, full);
            }
            if (++stage == STAGES) { stage = 0, phase ^= 1; }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// consumers: the end of a tile
// ---------------------------------------------------------------------------------------------------------------------

// What becomes of a 16 x 16 part of the sum, as a lane has it: packed results.
//   READ   `second` holds what was read: the sum is added to it (WGRAD) or multiplied by gelu' of it (DGRAD)
//   BOTH   `second` receives a gelu: of the sum (FORWARD), or of what was read (DGRAD)
template <int OP, bool READ, bool BOTH>
__device__ inline void finish(u32 (&packed)[4], u32 (&second)[4], const float* sums, const float* bias) {
#pragma unroll
    for (int j = 0; j < 4; j++) {  // 8 x 8 matrices: rows 0-7, 8-15 of the left, then the right
        float x[2] = {sums[2 * j], sums[2 * j + 1]}, y[2];
        if (OP == FORWARD) { x[0] += bias[j / 2 * 2], x[1] += bias[j / 2 * 2 + 1]; }
        if (OP == DGRAD && READ) {
            unpack2(y, second[j]);
            float s[2] = {gelu_factor(y[0]), gelu_factor(y[1])};
            x[0] *= gelu_grad(y[0], s[0]), x[1] *= gelu_grad(y[1], s[1]);
            if (BOTH) { second[j] = pack2(y[0] * s[0], y[1] * s[1]); }
        }
        if (OP == WGRAD && READ) {
            unpack2(y, second[j]);
            x[0] += y[0], x[1] += y[1];
        }
        packed[j] = pack2(x[0], x[1]);
        if (OP == FORWARD && BOTH) {  // of the rounded value: recomputing it from gelu_input then gives the same bits
            unpack2(y, packed[j]);
            second[j] = pack2(gelu(y[0]), gelu(y[1]));
        }
    }
}

// What a consumer has to itself. One of its threads, the leader, asks for all copies by TMA, so that it alone has to
// know when a slot may be overwritten.
struct Consumer {
    char* slots;
    u64* loaded;  // a barrier for each box of a tile
    float* bias;  // of its tile
    bool leader;
    int barrier;  // the number of its named barrier
};

__device__ inline Consumer make_consumer(Shared& shared, int number) {
    return {shared.slots[number * SLOTS], shared.loaded[number], shared.bias[number], threadIdx.x % 128 == 0,
            1 + number};
}

// The slots that boxes of what is read take in turn. The last slot is kept free where a second result needs it.
__device__ inline int read_slots(const Product& p) { return p.gelu_out ? SLOTS - 1 : SLOTS; }

__device__ inline void load_box(const TensorMap& from, const Consumer& self, int slot, int m, int n, int box) {
    mbarrier_expect(&self.loaded[box], BOX);
    tma_load(self.slots + slot * BOX, from, n + box % BOXES * 64, m + box / BOXES * 64, &self.loaded[box]);
}

// Called before the products of a tile, while it is the other consumer's turn. Afterwards the slots are free again, the
// first boxes of what is read are on their way, and the bias is in shared memory. read: null where nothing is read.
template <int OP>
__device__ inline void prepare_tile(const Product& p, const TensorMap* read, const Consumer& self, int m, int n) {
    if (self.leader) {
        tma_store_wait<0>();
        for (int box = 0; read && box < read_slots(p); box++) { load_box(*read, self, box, m, n, box); }
    }
    int column = threadIdx.x % 128 * 2;
    if (OP == FORWARD && column < COLUMNS) {
        float pair[2] = {};
        if (p.bias && n + column < p.N) { unpack2(pair, *(const u32*)(p.bias + n + column)); }
        *(float2*)(self.bias + column) = make_float2(pair[0], pair[1]);
    }
    named_barrier(self.barrier, 128);
}

// The maps of a tile's 16-bit results, and of what is read for them.
struct Maps {
    const TensorMap &first, &second, &read;
};

// The end of a tile with 16-bit results: a box at a time goes through a slot to `first`, with BOTH a second one to
// `second`. parity: of the number of tiles that this consumer has done before.
template <int OP, bool READ, bool BOTH>
__device__ inline void store_tile(const Maps& maps, float (&sums)[HALVES][COLUMNS / 2], const Consumer& self, int m,
                                  int n, int parity) {
    // Boxes take IN_TURN slots in turn, or pairs of slots where there are two results and nothing is read. With READ
    // the first result overwrites what was read; with READ and BOTH the second has the last slot to itself.
    constexpr int COUNT = HALVES * BOXES, PAIR = BOTH && !READ ? 2 : 1;
    constexpr int IN_TURN = READ && BOTH ? SLOTS - 1 : SLOTS / PAIR;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
    for (int box = 0; box < COUNT; box++) {
        char* slot = self.slots + box % IN_TURN * PAIR * BOX;
        char* second_slot = READ ? self.slots + IN_TURN * BOX : slot + BOX;
        if (READ && BOTH && box > 0) {
            if (self.leader) {
                tma_store_wait<0>();  // the box before has left its slots
                if (box + IN_TURN - 1 < COUNT) {
                    load_box(maps.read, self, (box - 1) % IN_TURN, m, n, box + IN_TURN - 1);
                }
            }
            named_barrier(self.barrier, 128);
        }
        i64 place = (i64)swizzled(slot + warp * 16 * 128, lane % 16, lane / 16);
        forget(place);  // otherwise four places are kept for the next box in the same slot, and spilled
        if (READ) { mbarrier_wait(&self.loaded[box], parity); }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            char* matrices = (char*)(place ^ i * 32);  // two pieces on
            u32 packed[4], second[4];
            float beta[4] = {};
            if (READ) { ldmatrix_x4(second, matrices); }
            if (OP == FORWARD) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float2 pair = *(const float2*)(self.bias + box % BOXES * 64 + i * 16 + j * 8 + lane % 4 * 2);
                    beta[2 * j] = pair.x, beta[2 * j + 1] = pair.y;
                }
            }
            finish<OP, READ, BOTH>(packed, second, &sums[box / BOXES][(box % BOXES * 4 + i) * 8], beta);
            stmatrix_x4(matrices, packed);
            if (BOTH) { stmatrix_x4(matrices + (second_slot - slot), second); }
        }
        fence_async();
        // All copies but the last few have left their slots, among them the slot of the next box.
        if (!READ && box + 1 >= IN_TURN && box + 1 < COUNT && self.leader) { tma_store_wait<IN_TURN - 2>(); }
        named_barrier(self.barrier, 128);
        if (self.leader) {
            int column = n + box % BOXES * 64, row = m + box / BOXES * 64;
            tma_store(maps.first, column, row, slot);
            if (BOTH) { tma_store(maps.second, column, row, second_slot); }
            tma_store_commit();
            if (READ && !BOTH && box > 0 && box + SLOTS - 1 < COUNT) {
                tma_store_wait<1>();  // the box before has left its slot
                load_box(maps.read, self, (box - 1) % SLOTS, m, n, box + SLOTS - 1);
            }
        }
    }
}

// The end of a tile with fp32 results: the part from (m, n) on of out (rows, columns). A lane has two neighbours in a
// row, four lanes fill a sector of 32 bytes.
__device__ inline void write_floats(float* out, int rows, int columns, int m, int n, bool accumulate,
                                    const float (&sums)[HALVES][COLUMNS / 2]) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, column = n + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < HALVES * 2; i++) {  // rows of this lane
        int row = m + i / 2 * 64 + warp * 16 + lane / 4 + i % 2 * 8;
        i64 at = (i64)row * columns + column;
        forget(at);  // otherwise all rows' places are computed at once, and spilled
#pragma unroll
        for (int k = 0; k < COLUMNS / 8; k++) {
            if (row < rows && column + k * 8 < columns) {
                const float* pair = &sums[i / 2][k * 4 + i % 2 * 2];
                float2* to = (float2*)(out + at + k * 8);
                float2 sum = make_float2(pair[0], pair[1]);
                if (accumulate) {
                    float2 old = *to;
                    sum.x += old.x, sum.y += old.y;
                }
                *to = sum;
            }
        }
    }
}

// Writes this tile's parts of the bias gradient, from sums over k of the rows of a.
__device__ inline void write_bias_sums(const Product& p, const Work& w, const float (&row_sums)[HALVES][4], int lane) {
    int columns = ceil_div(p.N, COLUMNS), part = w.n / COLUMNS;
    float* to = p.bias_sums + (size_t)(w.split * columns + part) * p.M;
    int others = w.partial < 0 ? p.splits - 1 : 0;  // ranges that this tile has no parts of: theirs are 0
#pragma unroll
    for (int i = 0; i < HALVES * 2; i++) {
        int row = w.m + i / 2 * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4 + i % 2 * 8;
        if (row < p.M) {
            to[row] = row_sums[i / 2][i % 2 * 2];
            for (int split = 1; split <= others; split++) { to[(size_t)split * columns * p.M + row] = 0.0f; }
        }
    }
}

template <int OP>
__device__ inline void end_tile(const Product& p, const Work& w, const Maps& maps, float (&sums)[HALVES][COLUMNS / 2],
                                const Consumer& self, int parity) {
    if constexpr (OP == FORWARD) {
        if (p.gelu_input) {
            store_tile<OP, false, true>(maps, sums, self, w.m, w.n, parity);
        } else {
            store_tile<OP, false, false>(maps, sums, self, w.m, w.n, parity);
        }
    } else if constexpr (OP == DGRAD) {
        if (p.gelu_out) {
            store_tile<OP, true, true>(maps, sums, self, w.m, w.n, parity);
        } else if (p.gelu_at) {
            store_tile<OP, true, false>(maps, sums, self, w.m, w.n, parity);
        } else {
            store_tile<OP, false, false>(maps, sums, self, w.m, w.n, parity);
        }
    } else if (w.partial >= 0) {
        write_floats(p.partials + (size_t)w.partial * ROWS * COLUMNS, ROWS, COLUMNS, 0, 0, false, sums);
    } else if constexpr (sizeof(floatG) == 4) {
        write_floats((float*)p.grad, p.M, p.N, w.m, w.n, p.accumulate, sums);
    } else if (p.accumulate) {
        store_tile<OP, true, false>(maps, sums, self, w.m, w.n, parity);
    } else {
        store_tile<OP, false, false>(maps, sums, self, w.m, w.n, parity);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// consumers: the products
// ---------------------------------------------------------------------------------------------------------------------

// The sums of a tile, still under way when this returns. stages: how many the consumers have come by so far. row_sums:
// the product of a with ones, for those blocks of k that this tile has to add up; ones: null if no tile has to.
template <int OP>
__device__ inline void multiply(const Product& p, const Work& w, int blocks, Shared& shared,
                                float (&sums)[HALVES][COLUMNS / 2], float (&row_sums)[HALVES][4], bool add_rows,
                                u64 ones, u32& stages) {
    int lane = threadIdx.x % 32;
    // The tiles of a row of tiles have the same rows of a: each of them adds up every columns'th block of k.
    int columns = ceil_div(p.N, COLUMNS), part = w.n / COLUMNS;
    int next = add_rows ? (part + columns - w.begin % columns) % columns : blocks;
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
#pragma unroll
        for (int j = 0; j < 4; j++) { row_sums[half][j] = 0.0f; }
    }
    for (int block = 0; block < blocks; block++, stages++) {
        char* tile = shared.stages[stages % STAGES];
        mbarrier_wait(&shared.full[stages % STAGES], stages / STAGES & 1);
        u64 a = wgmma_operand(tile, BOX), b = wgmma_operand(tile + A_BYTES, BOX);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < DEPTH / 16; k++) {  // the next 16 of k: 32 bytes on in a row, or 16 rows of 128
#pragma unroll
            for (int half = 0; half < HALVES; half++) {
                wgmma<a_by_k<OP>, b_by_k<OP>>(sums[half], a + (k * (a_by_k<OP> ? 2048 : 32) + half * BOX) / 16,
                                              b + k * (b_by_k<OP> ? 2048 : 32) / 16, block > 0 || k > 0);
            }
        }
        wgmma_commit();
        if (OP == WGRAD && block == next) {  // the tensor cores add: no other instruction is needed
            next += columns;
            wgmma_begin();
#pragma unroll
            for (int k = 0; k < DEPTH / 16; k++) {
#pragma unroll
                for (int half = 0; half < HALVES; half++) {
                    wgmma<true, false>(row_sums[half], a + (k * 2048 + half * BOX) / 16, ones, true);
                }
            }
            wgmma_commit();
            wgmma_wait<2>();
        } else {
            wgmma_wait<1>();
        }
        if (block > 0) { warp_arrive(&shared.empty[(stages - 1) % STAGES], lane); }  // the stage before has been read
    }
}

template <int OP> __device__ inline void consume(const Product& p, const Maps& maps, Shared& shared, int consumer) {
    int lane = threadIdx.x % 32;
    Consumer self = make_consumer(shared, consumer);
    u64 ones = wgmma_operand(shared.bias, 0);
    float sums[HALVES][COLUMNS / 2] = {}, row_sums[HALVES][4];
    bool add_rows = OP == WGRAD && p.bias_sums;
    const void* read = nullptr;  // what the end of a tile reads
    if constexpr (OP == DGRAD) { read = p.gelu_at; }
    if constexpr (OP == WGRAD && sizeof(floatG) == 2) {
        if (p.accumulate && p.whole > 0) { read = p.grad; }
    }
    u32 stages = 0;  // that the consumers have come by so far
    for (int item = blockIdx.x, turn = 0; item < work_items(p); item += gridDim.x, turn++) {
        Work w = work_item(p, item);
        int blocks = w.end - w.begin;
        if (turn % 2 != consumer) {
            stages += blocks;
            continue;
        }
        // Tiles in ranges of k read nothing. They come last, so that the parity of `loaded` is still that of the tiles.
        prepare_tile<OP>(p, read && w.partial < 0 ? &maps.read : nullptr, self, w.m, w.n);
        // The other consumer arrives here when it has come to its last stage. Before that, full[] could still be two
        // phases behind, which looks like the phase that is waited for.
        mbarrier_wait(&shared.turns[consumer], (turn / 2 + 1 + consumer) & 1);
        multiply<OP>(p, w, blocks, shared, sums, row_sums, add_rows, ones, stages);
        warp_arrive(&shared.turns[consumer ^ 1], lane);
        wgmma_wait<0>();
#pragma unroll
        for (int half = 0; half < HALVES; half++) { wgmma_tie(sums[half]), wgmma_tie(row_sums[half]); }
        warp_arrive(&shared.empty[(stages - 1) % STAGES], lane);
        if (add_rows && lane % 4 == 0) { write_bias_sums(p, w, row_sums, lane); }  // eight columns of `ones` are alike
        end_tile<OP>(p, w, maps, sums, self, turn / 2 & 1);
    }
    if (self.leader) { tma_store_wait<0>(); }  // shared memory must outlive the copies
}

template <int OP>
__device__ inline void product(const Product& p, const TensorMap& a, const TensorMap& b, const Maps& maps) {
    extern __shared__ char dynamic_shared[];
    Shared& shared = *(Shared*)(dynamic_shared + to_1024(dynamic_shared));
    if (threadIdx.x == 0) {
        init_ring(shared.full, shared.empty, STAGES, 4);  // one consumer reads a stage
        for (int i = 0; i < 2; i++) { mbarrier_init(&shared.turns[i], 4); }
        for (int i = 0; i < 2 * HALVES * BOXES; i++) {
            mbarrier_init(&shared.loaded[i / (HALVES * BOXES)][i % (HALVES * BOXES)], 1);
        }
        mbarrier_init_done();
    }
    if (OP == WGRAD && threadIdx.x < 256) {
        ((u32*)shared.bias)[threadIdx.x] = pack2(1.0f, 1.0f);
        fence_async();
    }
    divide_roles([&] { produce<OP>(p, a, b, shared); }, [&](int consumer) { consume<OP>(p, maps, shared, consumer); });
}

// ---------------------------------------------------------------------------------------------------------------------
// entry points: grid at most one block for each multiprocessor, block THREADS, dynamic shared memory SHARED_BYTES.
// M, N, K and the nulls as those of the mma kernels in matmul.cu; the operands are tensor maps with boxes of 64
// columns: inp ROWS rows and weight COLUMNS in forward, dout ROWS and weight 64 in dgrad, dout and inp 64 in wgrad. The
// 16-bit results and what is read for them have maps with boxes of 64 rows.
// ---------------------------------------------------------------------------------------------------------------------

// first: map of pre_gelu where there is one, else of out. second: of out.
extern "C" __global__ void __launch_bounds__(THREADS, 1) matmul_forward_sm90(
    floatX* out, floatX* pre_gelu, const __grid_constant__ TensorMap inp, const __grid_constant__ TensorMap weight,
    const __grid_constant__ TensorMap first, const __grid_constant__ TensorMap second, const floatX* bias, int M, int N,
    int K) {
    Product p = {};
    p.M = M, p.N = N, p.K = K, p.whole = ALL, p.splits = 1, p.out = out, p.bias = bias, p.gelu_input = pre_gelu;
    product<FORWARD>(p, inp, weight, {first, second, second});
}

// gelu_out: null, or where gelu(pre_gelu) goes.
extern "C" __global__ void __launch_bounds__(THREADS, 1) matmul_dgrad_sm90(
    floatX* dinp, const __grid_constant__ TensorMap dout, const __grid_constant__ TensorMap weight,
    const __grid_constant__ TensorMap dinp_map, const __grid_constant__ TensorMap pre_gelu_map,
    const __grid_constant__ TensorMap gelu_map, const floatX* pre_gelu, floatX* gelu_out, int M, int N, int K) {
    Product p = {};
    p.M = M, p.N = N, p.K = K, p.whole = ALL, p.splits = 1, p.out = dinp, p.gelu_at = pre_gelu, p.gelu_out = gelu_out;
    product<DGRAD>(p, dout, weight, {dinp_map, gelu_map, pre_gelu_map});
}

// Writes the first `whole` tiles of dweight; matmul_wgrad_reduce_sm90 writes the others. bias_sums: parts of the bias
// gradient, for matmul_bias_grad_reduce in matmul.cu, or null. to: map of dweight, or any where it is fp32.
extern "C" __global__ void __launch_bounds__(THREADS, 1) matmul_wgrad_sm90(
    floatG* dweight, float* partials, float* bias_sums, const __grid_constant__ TensorMap dout,
    const __grid_constant__ TensorMap inp, const __grid_constant__ TensorMap to, int M, int N, int K, int whole,
    int splits, int accumulate) {
    Product p = {};
    p.M = M, p.N = N, p.K = K, p.whole = whole, p.splits = splits, p.grad = dweight, p.accumulate = accumulate;
    p.partials = partials, p.bias_sums = bias_sums;
    product<WGRAD>(p, dout, inp, {to, to, to});
}

// dweight (+)= the sums of the ranges, in their order, for the tiles from `whole` on. A thread adds eight values: grid
// (ROWS * COLUMNS / REDUCE_THREADS / 8, number of those tiles), block REDUCE_THREADS.
extern "C" __global__ void __launch_bounds__(REDUCE_THREADS) matmul_wgrad_reduce_sm90(
    floatG* dweight, const float* partials, int M, int N, int whole, int splits, int accumulate) {
    Product p = {};
    p.M = M, p.N = N, p.whole = whole, p.splits = 1;
    Work w = work_item(p, whole + blockIdx.y);
    int at = (blockIdx.x * REDUCE_THREADS + threadIdx.x) * 8, m = w.m + at / COLUMNS, n = w.n + at % COLUMNS;
    if (m < M && n < N) {
        partials += (size_t)blockIdx.y * ROWS * COLUMNS + at;
        add_partials(dweight + (i64)m * N + n, partials, (i64)gridDim.y * ROWS * COLUMNS, splits, accumulate);
    }
}
