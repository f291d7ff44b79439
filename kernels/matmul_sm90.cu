// The three products of kernels/matmul.cu (math, layouts and contract there) on Hopper's own units, sm_90a: TMA copies
// tiles into shared memory, wgmma multiplies them from there. bf16, fp16. All tensors as stored, nothing is transposed.
//
// A block is three warpgroups. One thread of the first fills a ring of stages with tiles of a and b, 64 of k each, and
// waits for stages to become free; the other two multiply. An mbarrier for each stage says that it is full, another
// that it is empty. Blocks stay: one on each multiprocessor, each takes every so many'th tile of the output.
//
// TFLOP/s on an H200 at B = 64, T = 1024, GPT-2 124M, bf16; in brackets the ratio to cuBLAS, which makes the bare product.
// forward: with bias; dgrad, wgrad: bare; GELU: fc forward (two outputs), fcproj dgrad.
// version | idea                                                | expected | forward    | dgrad, wgrad | GELU
//       6 | two warpgroups share a tile of 128 x 192            | 610-660  | 500-643    | 606-736      | 381, 428
//         |                                                     |          | (.76-.93)  | (.94-1.07)   | (.58, .72)
//       7 | they take turns at tiles: one multiplies, the other | 670-700  | 645-699    | 666-766      | 484, 464
//         | rounds, adds, stores                                |          | (.91-1.15) | (.95-1.20)   | (.74, .78)
//       8 | TMA stores results from shared memory and brings    | 680-760  | 679-775    | 672-754      | 645, 601
//         | what is read with them while the other multiplies   | GELU 620 | (.99-1.16) | (.95-1.06)   | (.89, .95)
//       9 | wgrad makes the bias gradient too: its tiles of     | wgrad    | as 8       | 591-676 with | as 8
//         | dout times ones                                     | 0.96 x   |            | dbias (.9-1) |
//      10 | dgrad makes the recomputed GELU too; tiles of       | dgrad    | as 8       | as 9         | 642, 511
//         | 192 x 128 where fewer are needed                    | 0.85 x   |            |              | (.88, .79)
//      11 | low bands of tiles; wgrad cuts the tokens of what   | 350M and | 699-789    | 655-772      | 626, 487
//         | is left after whole rounds of 132 tiles alone       | up: 1.1x | (1.01-1.18)| (.95-1.19)   | (.92, .79)
// 9: a pass over dout, 906 MB a layer, is not made; 2.4 of 102 ms a step. Two spare warps that added up the tiles in
// shared memory, the first form of 9, cost as much as that pass. 10: a kernel of 199 us a layer is not launched, its dgrad
// takes 90 us longer: 2 of 105 ms a step, op by op. 11: blocks drift apart, by more than a tile's time after 18 of
// them, and what they share leaves L2 before all have read it: 350M's LM head wgrad had 450 TFLOP/s, now 711 (H100).
// Clusters of two blocks that share the tiles of b by multicast gave nothing, twice (0.94 to 1.02 of 7, and of 11).
// With GELU the rate goes down with every instruction at the end of a tile, though the other warpgroup's products should
// hide them: without any arithmetic there 8 has 666 and 697. The chip is power limited: at its 700 W, after a second of
// work, the forward products run at 1.3 GHz, and the tensor cores are busy 97 % of the time.
//
// Source: the structure is that of CUTLASS's warp-specialised kernels; P. Bansal, "Outperforming cuBLAS on H100".
#include "ptx_sm90.cuh"

#ifndef RUNG
#define RUNG 11
#endif

constexpr int FORWARD = 0, DGRAD = 1, WGRAD = 2;
constexpr bool TURNS = RUNG >= 7;                      // the consumers take turns at tiles
constexpr bool TMA_STORES = RUNG >= 8;
#ifdef TALL
constexpr int ROWS = 192, COLUMNS = 128;               // outputs of a tile
#else
constexpr int ROWS = 128, COLUMNS = 192;
#endif
constexpr int DEPTH = 64;                              // k of a stage: 128 bytes, as TMA swizzles
constexpr int OWN_ROWS = TURNS ? ROWS : ROWS / 2;      // that a consumer makes
constexpr int HALVES = OWN_ROWS / 64, BOXES = COLUMNS / 64;
constexpr int STAGES = 4;
constexpr int BOX = 64 * DEPTH * 2;                    // bytes of 64 x 64 values
constexpr int A_BYTES = ROWS * DEPTH * 2, STAGE_BYTES = A_BYTES + COLUMNS * DEPTH * 2;
constexpr int WARP_STAGING = 16 * 64 * 2;              // bytes of 16 rows of a box
constexpr int SLOTS = 4;                               // with TMA stores: boxes of staging that a consumer has
constexpr int CONSUMER_REGISTERS = 240, PRODUCER_REGISTERS = 24;  // 2 * 240 + 24 = 3 * 168, what 384 threads can have
constexpr int ALL = 1 << 30;                            // every tile
constexpr int BAND = 16, LOW_BAND = 4;                 // rows of tiles

template <int OP> constexpr bool a_by_k = OP == WGRAD;
template <int OP> constexpr bool b_by_k = OP != FORWARD;

// One product and what to do with its result.
struct Product {
    int M, N, K;
    int whole;               // tiles from this one on, all in the order of work, are made in ranges of k
    int splits;              // their number
    floatX* out;             // (M, N), or null in WGRAD
    const floatX* bias;      // (N) or null: added
    floatX* gelu_input;      // (M, N) or null: the sum is stored here, and its gelu in out
    const floatX* gelu_at;   // (M, N) or null: the sum is multiplied by gelu'(gelu_at)
    floatX* gelu_out;        // (M, N) or null: gelu(gelu_at) is stored here
    floatG* grad;            // (M, N) in WGRAD, else null: the sum goes here
    int accumulate;          // grad += instead of =
    float* partials;         // (splits, tiles from `whole` on, ROWS, COLUMNS), their sums go here
    float* bias_sums;        // (splits * columns of tiles, M) or null: parts of the sums of a over k
};

struct Shared {  // the block's shared memory, from a multiple of 1024 bytes
    char stages[STAGES][STAGE_BYTES];
    char staging[8][TMA_STORES ? SLOTS : 2][WARP_STAGING];  // of the consumers' warps
#if RUNG >= 8
    alignas(128) float bias[2][COLUMNS];  // FORWARD: of the consumers' tiles. WGRAD, from 9 on: 8 rows of 64 ones
    u64 loaded[2][HALVES * BOXES];        // a box that the end of a consumer's tile reads is there
#endif
    u64 full[STAGES], empty[STAGES];
    u64 turns[2];  // consumer i may begin its next tile
};

struct Work {
    int m, n;        // first row and column of the tile
    int begin, end;  // blocks of DEPTH of k
    int split;       // which range that is
    int partial;     // which of the tiles in partials, or -1: all of k
};

// Tiles of which no block has all of k, given the number of tiles.
__device__ inline int tail_tiles(const Product& p, int tiles) { return max(0, tiles - p.whole); }

__device__ inline int work_items(const Product& p) {
    int tiles = ceil_div(p.M, ROWS) * ceil_div(p.N, COLUMNS);
    return tiles + tail_tiles(p, tiles) * (p.splits - 1);
}

// The order decides what the blocks running together share in L2: bands of tile rows, within a band column by column;
// of tiles in ranges of k all of a range before the next range. What blocks share has to be there once while all read
// it, and they drift apart: the lower the band, the closer in time are a row's tiles. Where the columns are so many
// that a band is several times what runs together, it has to be high, for b is read once for each.
__device__ inline Work work_item(const Product& p, int item) {
    int M = p.M, N = p.N;
    if (RUNG >= 8) { forget(M), forget(N); }  // or what follows from them is kept from tile to tile, and spilled
    int rows = ceil_div(M, ROWS), columns = ceil_div(N, COLUMNS), blocks = ceil_div(p.K, DEPTH);
    int tail = tail_tiles(p, rows * columns), split = item < p.whole ? 0 : (item - p.whole) / tail;
    int tile = item - split * tail, most = RUNG >= 11 && columns <= 64 ? LOW_BAND : BAND;
    int band = tile / (most * columns), in_band = tile % (most * columns), height = min(most, rows - band * most);
    Work w = {(band * most + in_band % height) * ROWS, in_band / height * COLUMNS, 0, blocks, split, -1};
    if (item >= p.whole) {
        w.begin = (i64)split * blocks / p.splits, w.end = (i64)(split + 1) * blocks / p.splits;
        w.partial = item - p.whole;
    }
    return w;
}

// One thread: fills the stages in the order in which the consumers read them.
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
                for (int i = 0; i < ROWS / 64; i++) { tma_load(a_tile + i * BOX, a, w.m + i * 64, k, full); }
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

// What becomes of a 16 x 16 part of the sum, as a lane has it: packed results.
//   READ   the sum is added to (WGRAD) or multiplied by gelu' of (DGRAD) what is in `second`
//   BOTH   also, in `second`, the gelu of the sum (FORWARD) or of what was there (DGRAD)
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
        if (OP == FORWARD && BOTH) {  // of the rounded value, so that recomputing it from gelu_input gives the same bits
            unpack2(y, packed[j]);
            second[j] = pack2(gelu(y[0]), gelu(y[1]));
        }
    }
}

// The end of a tile with 16-bit results, 6 and 7. A warp passes a unit of 16 rows x 64 columns at a time through shared
// memory of its own, so that a row of it is one 128-byte line of global memory; 16-byte pieces swizzled as TMA's.

// f(place, offset in the output, inside) for the pieces of a unit that this lane copies, four rows by four.
template <class F> __device__ inline void pieces(const Product& p, char* staging, int m, int n, int unit, F f) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, row = lane / 8, piece = lane % 8;
    int m0 = m + unit / BOXES * 64 + warp * 16 + row, column = n + unit % BOXES * 64 + piece * 8;
    i64 at = (i64)m0 * p.N + column;
#pragma unroll
    for (int i = 0; i < 4; i++, at += 4 * p.N) {
        forget(at);  // or all units' offsets are computed at once, and spilled
        f(swizzled(staging, row + 4 * i, piece), at, m0 + 4 * i < p.M && column < p.N);
    }
}

// Starts to bring a unit of `from` (M, N) into the buffer where write_tile expects it.
__device__ inline void read_unit(const Product& p, const floatX* from, char* staging, int m, int n, int unit) {
    pieces(p, staging + unit % 2 * WARP_STAGING, m, n, unit,
           [&](char* to, i64 at, bool inside) { cp_async_16(to, from + (inside ? at : 0), inside); });
    cp_async_commit();
}

// With READ the first unit is under way.
template <int OP, bool READ, bool BOTH>
__device__ inline void write_tile(const Product& p, float (&sums)[HALVES][COLUMNS / 2], char* staging, int m, int n) {
    constexpr int UNITS = HALVES * BOXES;
    int lane = threadIdx.x % 32;
    floatX* out = OP == WGRAD ? (floatX*)p.grad : p.out;
    const floatX* other = OP == WGRAD ? out : OP == DGRAD ? p.gelu_at : nullptr;
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++) {
        int half = unit / BOXES, box = unit % BOXES;
        char* buffer = staging + (READ ? unit % 2 * WARP_STAGING : 0);
        if (READ) {
            if (unit + 1 < UNITS) {
                read_unit(p, other, staging, m, n, unit + 1);
                cp_async_wait<1>();
            } else {
                cp_async_wait<0>();
            }
            __syncwarp();
        }
        float bias[8][2] = {};
        if (OP == FORWARD && p.bias) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                int column = n + box * 64 + i * 8 + lane % 4 * 2;
                if (column < p.N) { unpack2(bias[i], *(const u32*)(p.bias + column)); }
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            char* matrices = swizzled(buffer, lane % 16, i * 2 + lane / 16);
            u32 packed[4], second[4];
            if (READ) {
                ldmatrix_x4(second, matrices);
                __syncwarp();
            }
            finish<OP, READ, BOTH>(packed, second, &sums[half][(box * 4 + i) * 8], bias[2 * i]);
            stmatrix_x4(matrices, packed);
            if (BOTH) { stmatrix_x4(matrices + WARP_STAGING, second); }
        }
        __syncwarp();
        pieces(p, buffer, m, n, unit, [&](char* from, i64 at, bool inside) {
            if (inside) {
                *(int4*)((BOTH ? p.gelu_input : out) + at) = *(int4*)from;
                if (BOTH) { *(int4*)(out + at) = *(int4*)(from + WARP_STAGING); }
            }
        });
        __syncwarp();
    }
}

// The end of a tile with 16-bit results, from 8 on. A consumer makes a box at a time in a slot of its own, and TMA copies
// it from there; what the tile reads has come into the same slots, the first ones while the other consumer multiplied.
// One thread, the leader, asks for all copies, so that it alone has to know when a slot may be overwritten.
struct Slots {
    char* begin;  // SLOTS boxes
    u64* loaded;  // a barrier for each box of a tile
    float* bias;  // of the tile
    bool leader;
    int barrier;  // number of the consumer's named barrier
};

__device__ inline Slots make_slots(Shared& shared, int consumer) {
#if RUNG >= 8
    return {shared.staging[consumer * 4][0], shared.loaded[consumer], shared.bias[consumer], threadIdx.x % 128 == 0,
            1 + consumer};
#else
    return {};
#endif
}

// Slots in turn for what is read: all, but for one that is left for the gelu of it.
__device__ inline int read_slots(const Product& p) { return p.gelu_out ? SLOTS - 1 : SLOTS; }

__device__ inline void load_box(const TensorMap& from, const Slots& slots, int turn, int m, int n, int box) {
    mbarrier_expect(&slots.loaded[box], BOX);
    tma_load(slots.begin + turn * BOX, from, n + box % BOXES * 64, m + box / BOXES * 64, &slots.loaded[box]);
}

// Before the products of a tile, while it is the other consumer's turn: the slots are free again, the first boxes to be
// read are under way, and the bias is in shared memory.
template <int OP>
__device__ inline void prepare_tile(const Product& p, const TensorMap* read, const Slots& slots, int m, int n) {
    if (slots.leader) {
        tma_store_wait<0>();
        for (int box = 0; read && box < read_slots(p); box++) { load_box(*read, slots, box, m, n, box); }
    }
    int column = threadIdx.x % 128 * 2;
    if (OP == FORWARD && column < COLUMNS) {
        float pair[2] = {};
        if (p.bias && n + column < p.N) { unpack2(pair, *(const u32*)(p.bias + n + column)); }
        *(float2*)(slots.bias + column) = make_float2(pair[0], pair[1]);
    }
    named_barrier(slots.barrier, 128);
}

// parity: of the tiles that this consumer has done before. first, second: of results; read: of what is read.
template <int OP, bool READ, bool BOTH>
__device__ inline void store_tile(const TensorMap& first, const TensorMap& second_result, const TensorMap& read,
                                  float (&sums)[HALVES][COLUMNS / 2], const Slots& slots, int m, int n, int parity) {
    // Slots that the boxes take in turn. READ and BOTH: first overwrites what was read, second has the last slot alone.
    constexpr int COUNT = HALVES * BOXES, PAIR = BOTH && !READ ? 2 : 1;
    constexpr int IN_TURN = READ && BOTH ? SLOTS - 1 : SLOTS / PAIR;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
    for (int box = 0; box < COUNT; box++) {
        char* slot = slots.begin + box % IN_TURN * PAIR * BOX;
        char* second_slot = READ ? slots.begin + IN_TURN * BOX : slot + BOX;
        if (READ && BOTH && box > 0) {
            if (slots.leader) {
                tma_store_wait<0>();  // the box before has left its slots
                if (box + IN_TURN - 1 < COUNT) {
                    load_box(read, slots, (box - 1) % IN_TURN, m, n, box + IN_TURN - 1);
                }
            }
            named_barrier(slots.barrier, 128);
        }
        i64 place = (i64)swizzled(slot + warp * WARP_STAGING, lane % 16, lane / 16);
        forget(place);  // or four places are kept for the next box in the same slot, and spilled
        if (READ) { mbarrier_wait(&slots.loaded[box], parity); }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            char* matrices = (char*)(place ^ i * 32);  // two pieces on
            u32 packed[4], second[4];
            float beta[4] = {};
            if (READ) { ldmatrix_x4(second, matrices); }
            if (OP == FORWARD) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float2 pair = *(const float2*)(slots.bias + box % BOXES * 64 + i * 16 + j * 8 + lane % 4 * 2);
                    beta[2 * j] = pair.x, beta[2 * j + 1] = pair.y;
                }
            }
            finish<OP, READ, BOTH>(packed, second, &sums[box / BOXES][(box % BOXES * 4 + i) * 8], beta);
            stmatrix_x4(matrices, packed);
            if (BOTH) { stmatrix_x4(matrices + (second_slot - slot), second); }
        }
        fence_async();
        // All but the last copies have left their slots: the next box's, too.
        if (!READ && box + 1 >= IN_TURN && box + 1 < COUNT && slots.leader) { tma_store_wait<IN_TURN - 2>(); }
        named_barrier(slots.barrier, 128);
        if (slots.leader) {
            int column = n + box % BOXES * 64, row = m + box / BOXES * 64;
            tma_store(first, column, row, slot);
            if (BOTH) { tma_store(second_result, column, row, second_slot); }
            tma_store_commit();
            if (READ && !BOTH && box > 0 && box + SLOTS - 1 < COUNT) {
                tma_store_wait<1>();  // the box before has left its slot
                load_box(read, slots, (box - 1) % SLOTS, m, n, box + SLOTS - 1);
            }
        }
    }
}

// The end of a tile with fp32 results, the part from (m, n) on of out (rows, columns): a lane has two neighbours in
// a row, four lanes a sector of 32 bytes.
__device__ inline void write_floats(float* out, int rows, int columns, int m, int n, bool accumulate,
                                    const float (&sums)[HALVES][COLUMNS / 2]) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, column = n + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < HALVES * 2; i++) {  // rows of this lane
        int row = m + i / 2 * 64 + warp * 16 + lane / 4 + i % 2 * 8;
        i64 at = (i64)row * columns + column;
        forget(at);  // or all rows' places are computed at once, and spilled
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

// What the end of a tile needs beside the sums.
struct End {
    const TensorMap &first, &second, &read;  // from 8 on: of the results, and of what is read
    char* staging;                           // 6 and 7
    Slots slots;
    int parity;
};

template <int OP, bool READ, bool BOTH>
__device__ inline void end_tile(const Product& p, const End& e, float (&sums)[HALVES][COLUMNS / 2], int m, int n) {
    if constexpr (TMA_STORES) {
        store_tile<OP, READ, BOTH>(e.first, e.second, e.read, sums, e.slots, m, n, e.parity);
    } else {
        write_tile<OP, READ, BOTH>(p, sums, e.staging, m, n);
    }
}

template <int OP>
__device__ inline void write(const Product& p, const Work& w, const End& e, float (&sums)[HALVES][COLUMNS / 2], int m) {
    if constexpr (OP == FORWARD) {
        if (p.gelu_input) {
            end_tile<OP, false, true>(p, e, sums, m, w.n);
        } else {
            end_tile<OP, false, false>(p, e, sums, m, w.n);
        }
    } else if constexpr (OP == DGRAD) {
        if (RUNG >= 10 && p.gelu_out) {
            end_tile<OP, true, RUNG >= 10>(p, e, sums, m, w.n);
        } else if (p.gelu_at) {
            end_tile<OP, true, false>(p, e, sums, m, w.n);
        } else {
            end_tile<OP, false, false>(p, e, sums, m, w.n);
        }
    } else if (w.partial >= 0) {
        write_floats(p.partials + (size_t)w.partial * ROWS * COLUMNS, ROWS, COLUMNS, m - w.m, 0, false, sums);
    } else if constexpr (sizeof(floatG) == 4) {
        write_floats((float*)p.grad, p.M, p.N, m, w.n, p.accumulate, sums);
    } else if (p.accumulate) {
        end_tile<OP, true, false>(p, e, sums, m, w.n);
    } else {
        end_tile<OP, false, false>(p, e, sums, m, w.n);
    }
}

template <int OP>
__device__ inline void consume(const Product& p, const TensorMap& first, const TensorMap& second,
                               const TensorMap& read_map, Shared& shared, int consumer) {
    int lane = threadIdx.x % 32, first_row = TURNS ? 0 : consumer * OWN_ROWS;
    char* staging = shared.staging[threadIdx.x / 32 - 4][0];
    Slots slots = make_slots(shared, consumer);
#if RUNG >= 9
    u64 ones = wgmma_operand(shared.bias, 0);
#else
    u64 ones = 0;
#endif
    float sums[HALVES][COLUMNS / 2] = {}, row_sums[HALVES][4];
    bool add_rows = RUNG >= 9 && OP == WGRAD && p.bias_sums;
    const floatX* read = nullptr;  // what the end of a tile reads
    if constexpr (OP == DGRAD) { read = p.gelu_at; }
    if constexpr (OP == WGRAD && sizeof(floatG) == 2) {
        if (p.accumulate && p.whole > 0) { read = (floatX*)p.grad; }
    }
    u32 stages = 0;  // that the consumers have come by so far
    auto release = [&](u32 stage) {
        if (lane == 0) { mbarrier_arrive(&shared.empty[stage % STAGES]); }
    };
    for (int item = blockIdx.x, turn = 0; item < work_items(p); item += gridDim.x, turn++) {
        Work w = work_item(p, item);
        int blocks = w.end - w.begin;
        if (TURNS && turn % 2 != consumer) {
            stages += blocks;
            continue;
        }
        int m = w.m + first_row;
        if (TMA_STORES) {  // tiles in ranges of k read nothing; they come last, so that parities still count
            prepare_tile<OP>(p, read && w.partial < 0 ? &read_map : nullptr, slots, m, w.n);
        } else if (read && w.partial < 0) {
            read_unit(p, read, staging, m, w.n, 0);
        }
        // Until the other has come to its last stage: before, full[] could still be two phases behind, which looks like
        // the phase that is waited for.
        if (TURNS) { mbarrier_wait(&shared.turns[consumer], (turn / 2 + 1 + consumer) & 1); }
        // The tiles beside each other have the same rows of a: each of them adds up every so many'th of their blocks.
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
            u64 a = wgmma_operand(tile + first_row * DEPTH * 2, BOX), b = wgmma_operand(tile + A_BYTES, BOX);
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
            if (RUNG >= 9 && OP == WGRAD && block == next) {  // a times ones, by the tensor cores: no instruction adds
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
            if (block > 0) { release(stages - 1); }  // the stage before has been read
        }
        if (TURNS && lane == 0) { mbarrier_arrive(&shared.turns[consumer ^ 1]); }
        wgmma_wait<0>();
#pragma unroll
        for (int half = 0; half < HALVES; half++) { wgmma_tie(sums[half]), wgmma_tie(row_sums[half]); }
        release(stages - 1);
        if (add_rows && lane % 4 == 0) {  // the eight columns are alike
            float* to = p.bias_sums + (size_t)(w.split * columns + part) * p.M;
            int others = w.partial < 0 ? p.splits - 1 : 0;  // ranges that this tile has no parts of
#pragma unroll
            for (int i = 0; i < HALVES * 2; i++) {
                int row = m + i / 2 * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4 + i % 2 * 8;
                if (row < p.M) {
                    to[row] = row_sums[i / 2][i % 2 * 2];
                    for (int split = 1; split <= others; split++) { to[(size_t)split * columns * p.M + row] = 0.0f; }
                }
            }
        }
        write<OP>(p, w, {first, second, read_map, staging, slots, turn / 2 & 1}, sums, m);
    }
    if (TMA_STORES && slots.leader) { tma_store_wait<0>(); }  // shared memory must outlive the copies
}

template <int OP>
__device__ inline void product(const Product& p, const TensorMap& a, const TensorMap& b, const TensorMap& first,
                               const TensorMap& second, const TensorMap& read) {
    extern __shared__ char dynamic_shared[];
    Shared& shared = *(Shared*)(dynamic_shared + (1024 - shared_address(dynamic_shared) % 1024) % 1024);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(&shared.full[i], 1);
            mbarrier_init(&shared.empty[i], TURNS ? 4 : 8);  // an arrival from every warp that reads the stage
        }
        for (int i = 0; i < 2; i++) { mbarrier_init(&shared.turns[i], 4); }
#if RUNG >= 8
        for (int i = 0; i < 2 * HALVES * BOXES; i++) {
            mbarrier_init(&shared.loaded[i / (HALVES * BOXES)][i % (HALVES * BOXES)], 1);
        }
#endif
        mbarrier_init_done();
    }
#if RUNG >= 9
    if (OP == WGRAD && threadIdx.x < 256) {
        ((u32*)shared.bias)[threadIdx.x] = pack2(1.0f, 1.0f);
        fence_async();
    }
#endif
    __syncthreads();
    int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // tells the compiler that a warp has one role
    if (warpgroup == 0) {
        fewer_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) { produce<OP>(p, a, b, shared); }
    } else {
        more_registers<CONSUMER_REGISTERS>();
        consume<OP>(p, first, second, read, shared, warpgroup - 1);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// entry points: grid at most one block for each multiprocessor, block 384, dynamic shared memory sizeof(Shared) + 1024.
// Arguments as those of kernel 5 in matmul.cu, the operands as tensor maps. Boxes of rows x 64 columns: inp ROWS and
// weight COLUMNS in forward, dout ROWS and weight 64 in dgrad, dout and inp 64 in wgrad. From 8 on there are maps of the
// 16-bit results and of what is read with them, boxes of 64 rows: first is pre_gelu's where there is one, second out's.
// bias_sums: null before 9. gelu_out, where gelu of pre_gelu goes: null before 10. wgrad writes the first `whole` tiles of
// dweight, matmul_wgrad_reduce_sm90 the others.
// ---------------------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(384, 1) matmul_forward_sm90(
    floatX* out, floatX* pre_gelu, const __grid_constant__ TensorMap inp, const __grid_constant__ TensorMap weight,
    const __grid_constant__ TensorMap first, const __grid_constant__ TensorMap second, const floatX* bias, int M, int N,
    int K) {
    Product p = {};
    p.M = M, p.N = N, p.K = K, p.whole = ALL, p.splits = 1, p.out = out, p.bias = bias, p.gelu_input = pre_gelu;
    product<FORWARD>(p, inp, weight, first, second, second);
}
extern "C" __global__ void __launch_bounds__(384, 1) matmul_dgrad_sm90(
    floatX* dinp, const __grid_constant__ TensorMap dout, const __grid_constant__ TensorMap weight,
    const __grid_constant__ TensorMap dinp_map, const __grid_constant__ TensorMap pre_gelu_map,
    const __grid_constant__ TensorMap gelu_map, const floatX* pre_gelu, floatX* gelu_out, int M, int N, int K) {
    Product p = {};
    p.M = M, p.N = N, p.K = K, p.whole = ALL, p.splits = 1, p.out = dinp, p.gelu_at = pre_gelu, p.gelu_out = gelu_out;
    product<DGRAD>(p, dout, weight, dinp_map, gelu_map, pre_gelu_map);
}
extern "C" __global__ void __launch_bounds__(384, 1) matmul_wgrad_sm90(
    floatG* dweight, float* partials, float* bias_sums, const __grid_constant__ TensorMap dout,
    const __grid_constant__ TensorMap inp, const __grid_constant__ TensorMap to, int M, int N, int K, int whole,
    int splits, int accumulate) {
    Product p = {};
    p.M = M, p.N = N, p.K = K, p.whole = whole, p.splits = splits, p.grad = dweight, p.accumulate = accumulate;
    p.partials = partials, p.bias_sums = bias_sums;
    product<WGRAD>(p, dout, inp, to, to, to);
}

// dweight (+)= the sums of the ranges, in their order, for the tiles from `whole` on. Eight values a thread: grid
// (ROWS * COLUMNS / 2048, those tiles), block 256.
extern "C" __global__ void __launch_bounds__(256) matmul_wgrad_reduce_sm90(
    floatG* dweight, const float* partials, int M, int N, int whole, int splits, int accumulate) {
    Product p = {};
    p.M = M, p.N = N, p.whole = whole, p.splits = 1;
    Work w = work_item(p, whole + blockIdx.y);
    int at = (blockIdx.x * 256 + threadIdx.x) * 8, m = w.m + at / COLUMNS, n = w.n + at % COLUMNS;
    if (m < M && n < N) {
        partials += (size_t)blockIdx.y * ROWS * COLUMNS + at;
        add_partials(dweight + (i64)m * N + n, partials, (i64)gridDim.y * ROWS * COLUMNS, splits, accumulate);
    }
}
