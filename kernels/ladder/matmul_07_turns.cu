// Linear layers, rung 7: two warpgroups take turns at tiles.
//
//   forward  out = inp @ weight^T + bias;  with pre_gelu: pre_gelu = that, out = gelu(pre_gelu)
//   dgrad    dinp = dout @ weight, times gelu'(pre_gelu) if given        wgrad    dweight (+)= dout^T @ inp
//
// Idea        Rung 6, but each consumer has tiles of 128 x 192 to itself: while one multiplies, the other rounds, adds
//             and stores. A barrier hands the turn on; the ring of stages alone does not keep the two apart.
// Prediction  670 to 700 TFLOP/s: the end of a tile costs nothing.
// Measured    Forward with bias 645-699 (0.91-1.15 of cuBLAS, which makes the bare product), dgrad and wgrad bare
//             666-766 (0.95-1.20), fc forward with GELU 484 (0.74), fcproj dgrad with dGELU 464 (0.78). H200, B = 64,
//             T = 1024, GPT-2 124M, bf16, 2026-11-24.
// Lesson      A long end of a tile is not hidden by the products of one other tile. Results have to go out by TMA, and
//             what is read has to come in before: rung 11, kernels/matmul_sm90.cu. dev/LOG.md has the steps between.
//
// An mbarrier for each stage says that it is full, another that it is empty. Blocks stay: one on each multiprocessor,
// each takes every gridDim.x'th tile of the output. Layouts and rounding are those of kernels/matmul.cu. bf16 and fp16.
#include "ptx_sm90.cuh"

constexpr int FORWARD = 0, DGRAD = 1, WGRAD = 2;
constexpr int ROWS = 128, COLUMNS = 192;               // outputs of a tile
constexpr int DEPTH = 64;                              // k of a stage: 128 bytes, as TMA swizzles
constexpr int HALVES = ROWS / 64, BOXES = COLUMNS / 64;
constexpr int STAGES = 4;
constexpr int BOX = 64 * DEPTH * 2;                    // bytes of 64 x 64 values
constexpr int A_BYTES = ROWS * DEPTH * 2, STAGE_BYTES = A_BYTES + COLUMNS * DEPTH * 2;
constexpr int WARP_STAGING = 16 * 64 * 2;              // bytes of 16 rows of a box
constexpr int CONSUMER_REGISTERS = 240, PRODUCER_REGISTERS = 24;  // 2 * 240 + 24 = 3 * 168, what 384 threads can have
constexpr int BAND = 16;                               // rows of tiles in a band

template <int OP> constexpr bool a_by_k = OP == WGRAD;
template <int OP> constexpr bool b_by_k = OP != FORWARD;

// One product and what to do with its result.
struct Product {
    int M, N, K;
    int splits;              // the sum over k is made in so many ranges
    floatX* out;             // (M, N), or null in WGRAD
    const floatX* bias;      // (N) or null: added
    floatX* gelu_input;      // (M, N) or null: the sum is stored here, and its gelu in out
    const floatX* gelu_at;   // (M, N) or null: the sum is multiplied by gelu'(gelu_at)
    floatG* grad;            // (M, N) in WGRAD, else null: the sum goes here
    int accumulate;          // grad += instead of =
    float* partials;         // (splits, tiles, ROWS, COLUMNS): the sums of the ranges, where there are several
};

struct Shared {  // the block's shared memory, from a multiple of 1024 bytes
    char stages[STAGES][STAGE_BYTES];
    char staging[8][2][WARP_STAGING];  // of the consumers' warps
    u64 full[STAGES], empty[STAGES];
    u64 turns[2];  // consumer i may begin its next tile
};

static_assert(sizeof(Shared) + 1024 == SHARED_BYTES, "the launcher asks for as much; 1024 to align it");

struct Work {
    int m, n;        // first row and column of the tile
    int begin, end;  // blocks of DEPTH of k
    int partial;     // which of the tiles in partials, or -1: all of k
};

__device__ inline int work_items(const Product& p) { return ceil_div(p.M, ROWS) * ceil_div(p.N, COLUMNS) * p.splits; }

// The order decides what the blocks running together share in L2: bands of tile rows, and within a band column by
// column. Of tiles in ranges of k all of a range come before the next range.
__device__ inline Work work_item(const Product& p, int item) {
    int rows = ceil_div(p.M, ROWS), columns = ceil_div(p.N, COLUMNS), blocks = ceil_div(p.K, DEPTH);
    int tiles = rows * columns, split = item / tiles, tile = item - split * tiles;
    int band = tile / (BAND * columns), in_band = tile % (BAND * columns), height = min(BAND, rows - band * BAND);
    Work w = {(band * BAND + in_band % height) * ROWS, in_band / height * COLUMNS, 0, blocks, -1};
    if (p.splits > 1) {
        w.begin = (i64)split * blocks / p.splits, w.end = (i64)(split + 1) * blocks / p.splits;
        w.partial = item;
    }
    return w;
}

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
//   READ   `second` holds what was read: the sum is added to it (WGRAD) or multiplied by gelu' of it (DGRAD)
//   BOTH   `second` receives the gelu of the sum (FORWARD)
template <int OP, bool READ, bool BOTH>
__device__ inline void finish(u32 (&packed)[4], u32 (&second)[4], const float* sums, const float* bias) {
#pragma unroll
    for (int j = 0; j < 4; j++) {  // 8 x 8 matrices: rows 0-7, 8-15 of the left, then the right
        float x[2] = {sums[2 * j], sums[2 * j + 1]}, y[2];
        if (OP == FORWARD) { x[0] += bias[j / 2 * 2], x[1] += bias[j / 2 * 2 + 1]; }
        if (OP == DGRAD && READ) {
            unpack2(y, second[j]);
            x[0] *= gelu_grad(y[0]), x[1] *= gelu_grad(y[1]);
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

// The end of a tile with 16-bit results. A warp passes a unit of 16 rows x 64 columns at a time through shared memory
// of its own, so that a row of it is one 128-byte line of global memory. 16-byte pieces are swizzled as TMA's are.

// Calls f(place, offset in the output, inside) for the pieces of a unit that this lane copies, four rows by four.
template <class F> __device__ inline void pieces(const Product& p, char* staging, int m, int n, int unit, F f) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, row = lane / 8, piece = lane % 8;
    int m0 = m + unit / BOXES * 64 + warp * 16 + row, column = n + unit % BOXES * 64 + piece * 8;
    i64 at = (i64)m0 * p.N + column;
#pragma unroll
    for (int i = 0; i < 4; i++, at += 4 * p.N) {
        forget(at);  // otherwise all units' offsets are computed at once, and spilled
        f(swizzled(staging, row + 4 * i, piece), at, m0 + 4 * i < p.M && column < p.N);
    }
}

// Starts to bring a unit of `from` (M, N) into the buffer where write_tile expects it.
__device__ inline void read_unit(const Product& p, const floatX* from, char* staging, int m, int n, int unit) {
    pieces(p, staging + unit % 2 * WARP_STAGING, m, n, unit,
           [&](char* to, i64 at, bool inside) { cp_async_16(to, from + (inside ? at : 0), inside); });
    cp_async_commit();
}

// With READ the first unit is on its way already.
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

template <int OP>
__device__ inline void write(const Product& p, const Work& w, char* staging, float (&sums)[HALVES][COLUMNS / 2]) {
    if constexpr (OP == FORWARD) {
        if (p.gelu_input) {
            write_tile<OP, false, true>(p, sums, staging, w.m, w.n);
        } else {
            write_tile<OP, false, false>(p, sums, staging, w.m, w.n);
        }
    } else if constexpr (OP == DGRAD) {
        if (p.gelu_at) {
            write_tile<OP, true, false>(p, sums, staging, w.m, w.n);
        } else {
            write_tile<OP, false, false>(p, sums, staging, w.m, w.n);
        }
    } else if (w.partial >= 0) {
        write_floats(p.partials + (size_t)w.partial * ROWS * COLUMNS, ROWS, COLUMNS, 0, 0, false, sums);
    } else if constexpr (sizeof(floatG) == 4) {
        write_floats((float*)p.grad, p.M, p.N, w.m, w.n, p.accumulate, sums);
    } else if (p.accumulate) {
        write_tile<OP, true, false>(p, sums, staging, w.m, w.n);
    } else {
        write_tile<OP, false, false>(p, sums, staging, w.m, w.n);
    }
}

template <int OP> __device__ inline void consume(const Product& p, Shared& shared, int consumer) {
    int lane = threadIdx.x % 32;
    char* staging = shared.staging[threadIdx.x / 32 - 4][0];
    float sums[HALVES][COLUMNS / 2] = {};
    const floatX* read = nullptr;  // what the end of a tile reads
    if constexpr (OP == DGRAD) { read = p.gelu_at; }
    if constexpr (OP == WGRAD && sizeof(floatG) == 2) {
        if (p.accumulate) { read = (floatX*)p.grad; }
    }
    u32 stages = 0;  // that the consumers have come by so far
    auto release = [&](u32 stage) {
        if (lane == 0) { mbarrier_arrive(&shared.empty[stage % STAGES]); }
    };
    for (int item = blockIdx.x, turn = 0; item < work_items(p); item += gridDim.x, turn++) {
        Work w = work_item(p, item);
        int blocks = w.end - w.begin;
        if (turn % 2 != consumer) {
            stages += blocks;
            continue;
        }
        if (read && w.partial < 0) { read_unit(p, read, staging, w.m, w.n, 0); }
        // The other consumer arrives here when it has come to its last stage. Before that, full[] could still be two
        // phases behind, which looks like the phase that is waited for.
        mbarrier_wait(&shared.turns[consumer], (turn / 2 + 1 + consumer) & 1);
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
            wgmma_wait<1>();
            if (block > 0) { release(stages - 1); }  // the stage before has been read
        }
        if (lane == 0) { mbarrier_arrive(&shared.turns[consumer ^ 1]); }
        wgmma_wait<0>();
#pragma unroll
        for (int half = 0; half < HALVES; half++) { wgmma_tie(sums[half]); }
        release(stages - 1);
        write<OP>(p, w, staging, sums);
    }
}

template <int OP> __device__ inline void product(const Product& p, const TensorMap& a, const TensorMap& b) {
    extern __shared__ char dynamic_shared[];
    Shared& shared = *(Shared*)(dynamic_shared + (1024 - shared_address(dynamic_shared) % 1024) % 1024);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(&shared.full[i], 1);
            mbarrier_init(&shared.empty[i], 4);  // an arrival from every warp that reads the stage
        }
        for (int i = 0; i < 2; i++) { mbarrier_init(&shared.turns[i], 4); }
        mbarrier_init_done();
    }
    __syncthreads();
    int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // tells the compiler that a warp has one role
    if (warpgroup == 0) {
        fewer_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) { produce<OP>(p, a, b, shared); }
    } else {
        more_registers<CONSUMER_REGISTERS>();
        consume<OP>(p, shared, warpgroup - 1);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// entry points: grid at most one block for each multiprocessor, block 384, dynamic shared memory SHARED_BYTES. The
// operands are tensor maps with boxes of rows x 64 columns: inp 128 and weight 192 in forward, dout 128 and weight 64
// in dgrad, dout and inp 64 in wgrad. With splits > 1 wgrad leaves dweight to matmul_wgrad_reduce.
// ---------------------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(384, 1) matmul_forward_turns(
    floatX* out, floatX* pre_gelu, const __grid_constant__ TensorMap inp, const __grid_constant__ TensorMap weight,
    const floatX* bias, int M, int N, int K) {
    Product p = {};
    p.M = M, p.N = N, p.K = K, p.splits = 1, p.out = out, p.bias = bias, p.gelu_input = pre_gelu;
    product<FORWARD>(p, inp, weight);
}
extern "C" __global__ void __launch_bounds__(384, 1) matmul_dgrad_turns(
    floatX* dinp, const __grid_constant__ TensorMap dout, const __grid_constant__ TensorMap weight,
    const floatX* pre_gelu, int M, int N, int K) {
    Product p = {};
    p.M = M, p.N = N, p.K = K, p.splits = 1, p.out = dinp, p.gelu_at = pre_gelu;
    product<DGRAD>(p, dout, weight);
}
extern "C" __global__ void __launch_bounds__(384, 1) matmul_wgrad_turns(
    floatG* dweight, float* partials, const __grid_constant__ TensorMap dout, const __grid_constant__ TensorMap inp,
    int M, int N, int K, int splits, int accumulate) {
    Product p = {};
    p.M = M, p.N = N, p.K = K, p.splits = splits, p.grad = dweight, p.accumulate = accumulate, p.partials = partials;
    product<WGRAD>(p, dout, inp);
}

// dweight (+)= the sums of the ranges, in their order. A thread adds eight values: grid (ROWS * COLUMNS / 2048, tiles),
// block 256.
extern "C" __global__ void __launch_bounds__(256) matmul_wgrad_reduce(
    floatG* dweight, const float* partials, int M, int N, int splits, int accumulate) {
    Product p = {};
    p.M = M, p.N = N, p.splits = 1;
    Work w = work_item(p, blockIdx.y);
    int at = (blockIdx.x * 256 + threadIdx.x) * 8, m = w.m + at / COLUMNS, n = w.n + at % COLUMNS;
    if (m < M && n < N) {
        partials += (size_t)blockIdx.y * ROWS * COLUMNS + at;
        add_partials(dweight + (i64)m * N + n, partials, (i64)gridDim.y * ROWS * COLUMNS, splits, accumulate);
    }
}
