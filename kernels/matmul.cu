// Linear layers: out = inp @ weight^T + bias, with GELU, and the three gradients. All tensors as stored, row-major.
//
//   forward  out[m, n]     = sum_k inp[m, k] * weight[n, k] + bias[n]     m = token, n = output channel, k = channel
//            pre_gelu = that, out = gelu(pre_gelu)                        if pre_gelu is given
//   dgrad    dinp[m, n]    = sum_k dout[m, k] * weight[k, n]              m = token, n = channel, k = output channel
//            dinp *= gelu'(pre_gelu)                                      if pre_gelu is given
//   wgrad    dweight[m, n] (+)= sum_k dout[k, m] * inp[k, n]              m = output channel, n = channel, k = token
//   bias     dbias[n]      (+)= sum_m dout[m, n]
//
//   inp (BT, C)  weight (OC, C)  bias (OC)  out, dout (BT, OC)  pre_gelu as out in forward, as inp in dgrad. All
//   floatX, dweight and dbias floatG; sums in fp32, one rounding to nearest at the end, also when accumulating. BT >= 1;
//   C, OC multiples of 8.
//
// In M, N, K terms the three products differ only in which index of an operand is contiguous in memory:
//            a                       b
//   forward  (M, K) rows of k        (N, K) rows of k       "rows of k": a row of the tile is a piece of one token
//   dgrad    (M, K) rows of k        (K, N) rows of n        or weight row; the long direction is strided
//   wgrad    (K, M) rows of m        (K, N) rows of n       "by k": a row of the tile is one k
//
// TFLOP/s on an H200 at B = 32, T = 1024, C = 768, OC = 3072:
// version | idea                                                                   | expected       | measured
//       1 | one thread per output, operands from global memory                     | 0.5-1          | 0.49, 4.3
//       2 | 16 x 16 tiles in shared memory: each value is loaded once per tile     | 4-6            | 6.3, 6.2
//       3 | 128 x 128 tile, 8 x 8 outputs in a thread's registers, 16-byte loads,  | 40-50          | 44, 42
//         | double buffer, split-K for wgrad. fp32: production (FFMA, exact)       | (peak 67)      |
//       4 | tensor cores: mma m16n8k16, ldmatrix, swizzled shared memory           | 200-250        | 223, 186
//       5 | 4 + ring of three stages filled by cp.async, fragments loaded one step | 350-420 (limit | 305 forward,
//         | ahead, block order for L2, split-K for wgrad. bf16, fp16: production   | of mma.sync    | 288 backward:
//         |                                                                        | about 620)     | 2026-11-23
// Rungs 1 to 4: forward, backward of this shape, 2026-11-24. The figures of 5 are the mean over the products of a bf16
// training step, bias gradients included. Less than expected: per 16 of k the tensor cores need some 206 clocks for a
// 128 x 128 tile, and shared memory 128 for the fragments and 64 for the copies, so the two have to overlap perfectly.
// Hopper's wgmma reads shared memory directly: kernels/matmul_sm90.cu.
//
// Source: llm.c dev/cuda/matmul_forward.cu, dev/cuda/matmul_backward_bias.cu, llmc/matmul.cuh; the tile hierarchy is
// the one of CUTLASS (Kerr et al. 2017, "CUTLASS: Fast Linear Algebra in CUDA C++").
#include "common.cuh"
#include "ptx.cuh"

constexpr int FORWARD = 0, DGRAD = 1, WGRAD = 2;

// One product and what to do with its result. Members that a kernel leaves null cost nothing: they are constants.
struct Product {
    floatX* out;             // (M, N), or null in WGRAD
    const floatX* a;         // (K, M) in WGRAD, else (M, K)
    const floatX* b;         // (N, K) in FORWARD, else (K, N)
    int M, N, K;
    const floatX* bias;      // (N) or null: added
    floatX* gelu_input;      // (M, N) or null: the sum is stored here, and its gelu in out
    const floatX* gelu_at;   // (M, N) or null: the sum is multiplied by gelu'(gelu_at)
    floatG* grad;            // (M, N) in WGRAD, else null: the sum goes here
    int accumulate;          // grad += instead of =
    float* partials;         // (splits, M, N) fp32 or null: the bare sum goes here instead,
    int partial_row;         // to row m + partial_row, partial_row = split * M
};

template <int OP> constexpr bool a_by_k = OP == WGRAD;
template <int OP> constexpr bool b_by_k = OP != FORWARD;

// The epilogue, common to all rungs, for the finished sums v of row m, columns n .. n+W-1. What it needs from global
// memory is read before, by these two, so that a thread can have several rows' reads under way.
template <int W> __device__ inline void load_bias(const Product& p, float (&bias)[W], int n) {
    if (p.bias) {
        load_floats<W>(bias, p.bias + n);
    } else {
#pragma unroll
        for (int i = 0; i < W; i++) { bias[i] = 0.0f; }
    }
}

template <int W> __device__ inline void load_other(const Product& p, float (&other)[W], int m, int n) {
    size_t at = (size_t)m * p.N + n;
    if (p.accumulate) { load_floats<W>(other, p.grad + at); }
    if (p.gelu_at) { load_floats<W>(other, p.gelu_at + at); }
}

template <int W>
__device__ inline void finish(const Product& p, float (&v)[W], const float (&bias)[W], const float (&other)[W], int m,
                              int n) {
    size_t at = (size_t)m * p.N + n;
    if (p.partials) {
        store_floats<W>(p.partials + (size_t)(p.partial_row + m) * p.N + n, v);
        return;
    }
#pragma unroll
    for (int i = 0; i < W; i++) {
        v[i] += bias[i];
        if (p.accumulate) { v[i] += other[i]; }
        if (p.gelu_at) { v[i] *= gelu_grad(other[i]); }
    }
    if (p.grad) {
        store_floats<W>(p.grad + at, v);
        return;
    }
    if (p.gelu_input) {
        // GELU of the rounded value: what a later recomputation from gelu_input sees, so that both give the same bits
        store_floats<W>(p.gelu_input + at, v);
#pragma unroll
        for (int i = 0; i < W; i++) { v[i] = gelu((float)(floatX)v[i]); }
    }
    store_floats<W>(p.out + at, v);
}

// The same in one step.
template <int W> __device__ inline void finish(const Product& p, float (&v)[W], int m, int n) {
    float bias[W], other[W];
    load_bias(p, bias, n);
    load_other(p, other, m, n);
    finish(p, v, bias, other, m, n);
}

// ---------------------------------------------------------------------------------------------------------------------
// kernel 1: one thread per output
// ---------------------------------------------------------------------------------------------------------------------

template <int OP> __device__ inline float a_value(const Product& p, int m, int k) {
    return (float)p.a[a_by_k<OP> ? (size_t)k * p.M + m : (size_t)m * p.K + k];
}
template <int OP> __device__ inline float b_value(const Product& p, int k, int n) {
    return (float)p.b[b_by_k<OP> ? (size_t)k * p.N + n : (size_t)n * p.K + k];
}

template <int OP> __device__ inline void product1(const Product& p) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)p.M * p.N) { return; }
    int m = i / p.N, n = i % p.N;
    float sum[1] = {0.0f};
    for (int k = 0; k < p.K; k++) { sum[0] += a_value<OP>(p, m, k) * b_value<OP>(p, k, n); }
    finish(p, sum, m, n);
}

// ---------------------------------------------------------------------------------------------------------------------
// kernel 2: shared-memory tiles
// ---------------------------------------------------------------------------------------------------------------------

constexpr int TILE2 = 16;

template <int OP> __device__ inline void product2(const Product& p) {
    // the extra column puts the 16 rows of a column in different banks
    __shared__ float a_tile[TILE2][TILE2 + 1], b_tile[TILE2][TILE2 + 1];  // [m][k], [k][n]
    int x = threadIdx.x % TILE2, y = threadIdx.x / TILE2;
    int m0 = blockIdx.y * TILE2, n0 = blockIdx.x * TILE2;
    float sum[1] = {0.0f};
    for (int k0 = 0; k0 < p.K; k0 += TILE2) {
        // neighbouring threads (x) read neighbouring addresses, whichever index that is
        int am = a_by_k<OP> ? x : y, ak = a_by_k<OP> ? y : x;
        int bn = b_by_k<OP> ? x : y, bk = b_by_k<OP> ? y : x;
        a_tile[am][ak] = m0 + am < p.M && k0 + ak < p.K ? a_value<OP>(p, m0 + am, k0 + ak) : 0.0f;
        b_tile[bk][bn] = n0 + bn < p.N && k0 + bk < p.K ? b_value<OP>(p, k0 + bk, n0 + bn) : 0.0f;
        __syncthreads();
#pragma unroll
        for (int k = 0; k < TILE2; k++) { sum[0] += a_tile[y][k] * b_tile[k][x]; }
        __syncthreads();
    }
    if (m0 + y < p.M && n0 + x < p.N) { finish(p, sum, m0 + y, n0 + x); }
}

// ---------------------------------------------------------------------------------------------------------------------
// kernel 3: register tiles, FFMA
// ---------------------------------------------------------------------------------------------------------------------

constexpr int TILE3 = 128, DEPTH3 = 16, ROW3 = TILE3 + 4;  // + 4: float4 stays aligned, columns change bank

// Reads an operand tile by tile along k: 8 consecutive values for this thread's place in the (128, 16) tile, zero
// outside the operand.
template <bool BY_K> struct Reader3 {
    const floatX* from;
    i64 step;
    int k;  // this thread's place in a tile, or past its end

    __device__ Reader3(const floatX* operand, int rows, int K, int row0, int k_begin) {
        int row = row0 + (BY_K ? threadIdx.x % 16 * 8 : threadIdx.x / 2);
        k = BY_K ? threadIdx.x / 16 : threadIdx.x % 2 * 8;
        from = operand + (BY_K ? (i64)(k_begin + k) * rows + row : (i64)row * K + k_begin + k);
        step = BY_K ? (i64)DEPTH3 * rows : DEPTH3;
        if (row >= rows) { k = DEPTH3; }
    }
    __device__ void next(float (&v)[8], int depth) {  // depth: k steps left, at most DEPTH3 matter
        if (k < min(depth, DEPTH3)) {
            load_floats<8>(v, from);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) { v[i] = 0.0f; }
        }
        from += step;
    }
};

// Into tile[k][row]: the inner loop reads rows of one k.
template <bool BY_K> __device__ inline void place3(float (&tile)[DEPTH3][ROW3], const float (&v)[8]) {
    if constexpr (BY_K) {
        store_floats<8>(&tile[threadIdx.x / 16][threadIdx.x % 16 * 8], v);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) { tile[threadIdx.x % 2 * 8 + i][threadIdx.x / 2] = v[i]; }
    }
}

template <int OP> __device__ inline void product3(const Product& p, int k_begin, int k_end) {
    __shared__ alignas(16) float a_tile[2][DEPTH3][ROW3], b_tile[2][DEPTH3][ROW3];
    int m0 = blockIdx.y * TILE3, n0 = blockIdx.x * TILE3;
    // 2 x 4 warps of 64 x 32 outputs; in a warp 8 x 4 lanes. A lane has rows y .. y+3 and y+32 .. y+35 of 8 columns:
    // every shared-memory read of a warp is then a conflict-free float4 with broadcast.
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int y = warp / 4 * 64 + lane / 4 * 4, x = warp % 4 * 32 + lane % 4 * 8;
    float sums[8][8] = {}, next[8];
    Reader3<a_by_k<OP>> a_reader(p.a, p.M, p.K, m0, k_begin);
    Reader3<b_by_k<OP>> b_reader(p.b, p.N, p.K, n0, k_begin);
    int left = k_end - k_begin;

    a_reader.next(next, left);
    place3<a_by_k<OP>>(a_tile[0], next);
    b_reader.next(next, left);
    place3<b_by_k<OP>>(b_tile[0], next);
    __syncthreads();
    for (int buffer = 0; left > 0; buffer ^= 1) {
        left -= DEPTH3;
        // The next tile is read while this one is multiplied: a during the first half, b during the second.
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (left > 0) { half == 0 ? a_reader.next(next, left) : b_reader.next(next, left); }
#pragma unroll
            for (int k = half * DEPTH3 / 2; k < (half + 1) * DEPTH3 / 2; k++) {
                float a[8], b[8];
                f128 a0 = load128(&a_tile[buffer][k][y]), a1 = load128(&a_tile[buffer][k][y + 32]);
                load_floats<8>(b, &b_tile[buffer][k][x]);
#pragma unroll
                for (int i = 0; i < 4; i++) { a[i] = a0[i], a[i + 4] = a1[i]; }
#pragma unroll
                for (int i = 0; i < 8; i++) {
#pragma unroll
                    for (int j = 0; j < 8; j++) { sums[i][j] += a[i] * b[j]; }
                }
            }
            if (left > 0) {
                if (half == 0) {
                    place3<a_by_k<OP>>(a_tile[buffer ^ 1], next);
                } else {
                    place3<b_by_k<OP>>(b_tile[buffer ^ 1], next);
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int m = m0 + y + i % 4 + i / 4 * 32, n = n0 + x;
        if (m < p.M && n < p.N) { finish(p, sums[i], m, n); }
    }
}

// Weight gradients with few output tiles and many tokens (kernels 3 and 5): the tokens are cut into `splits` ranges,
// whose sums go to partials (splits, M, N); matmul_wgrad_reduce adds them in order. The number of splits comes from the
// shapes alone (llmc/cuda/matmul.py), so results do not depend on the device; no range may be empty.
__device__ inline void choose_split(Product& p, float* partials, int split, int splits, int& k_begin, int& k_end) {
    constexpr int UNIT = 32;
    int range = ceil_div(ceil_div(p.K, UNIT), splits) * UNIT;
    k_begin = split * range, k_end = min(k_begin + range, p.K);
    if (splits > 1) { p.partials = partials, p.partial_row = split * p.M; }
}

// ---------------------------------------------------------------------------------------------------------------------
// kernels 4 and 5: tensor cores
// ---------------------------------------------------------------------------------------------------------------------

#ifdef TENSOR_CORES

// A block of 4 warps makes 128 x 128 outputs, a warp 64 x 64: every ldmatrix.x4 (512 bytes of shared memory) then feeds
// 4 mma. With 8 warps of 64 x 32 it would be 2.7, and shared memory, not the tensor cores, would set the pace.
constexpr int TILE = 128, DEPTH = 32, WARP_TILE = 64;
constexpr int TILE_SIZE = TILE * DEPTH;                // elements of one operand's tile
constexpr int CHUNKS = TILE_SIZE / 8;                  // 16-byte pieces, the unit of copies and of ldmatrix rows
constexpr int ROW_STAGING = WARP_TILE + 8;             // floats; + 8 spreads the rows of a fragment over the banks

// Place of a piece in a tile, in elements. A tile has either 128 rows of 4 pieces of k or, by k, 32 rows of 16 pieces.
// The eight rows that one 8 x 8 matrix of ldmatrix reads have the same piece number; exclusive-or with row bits sends
// them to the eight different 16-byte columns of the 32 banks, without padding.
template <bool BY_K> __device__ inline int place(int row, int piece) {
    return BY_K ? row * TILE + (piece ^ (row & 7)) * 8 : row * DEPTH + (piece ^ (row >> 1 & 3)) * 8;
}

// Starts the copy of the tile of `operand` at (row0, k0) with k < K_end; zeros outside. `rows` is M or N. A thread's
// four pieces lie in one column of the tile, at constant distances.
template <bool BY_K>
__device__ inline void copy_tile(floatX* tile, const floatX* operand, int rows, int K, int row0, int k0, int K_end) {
    constexpr int PIECES = BY_K ? TILE / 8 : DEPTH / 8, STEP = 128 / PIECES;  // in a row of the tile; rows at a time
    int r = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
    int row = row0 + (BY_K ? piece * 8 : r), k = k0 + (BY_K ? r : piece * 8), stride = BY_K ? rows : K;
    const floatX* from = operand + (BY_K ? (i64)k * stride + row : (i64)row * stride + k);
    tile += place<BY_K>(r, piece);  // the swizzle repeats every 8 rows, and STEP is a multiple of 8
#pragma unroll
    for (int i = 0; i < CHUNKS / 128; i++) {
        bool inside = BY_K ? row < rows && k + i * STEP < K_end : row + i * STEP < rows && k < K_end;
        cp_async_16(tile + i * STEP * PIECES * 8, from + (i64)(i * STEP) * stride, inside);
    }
}

// The 16 x 16 (m, k) fragment of a at row m of the tile, k of the stage.
template <bool BY_K> __device__ inline void load_a(u32 (&a)[4], const floatX* tile, int m, int k) {
    int lane = threadIdx.x % 32;
    if (BY_K) {
        ldmatrix_x4_trans(a, tile + place<true>(k + lane % 8 + lane / 16 * 8, m / 8 + lane / 8 % 2));
    } else {
        ldmatrix_x4(a, tile + place<false>(m + lane % 16, k / 8 + lane / 16));
    }
}

// Two 16 x 8 (k, n) fragments of b, columns n .. n+15: b[0], b[1] and b[2], b[3].
template <bool BY_K> __device__ inline void load_b(u32 (&b)[4], const floatX* tile, int n, int k) {
    int lane = threadIdx.x % 32;
    if (BY_K) {
        ldmatrix_x4_trans(b, tile + place<true>(k + lane % 16, n / 8 + lane / 16));
    } else {
        ldmatrix_x4(b, tile + place<false>(n + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2));
    }
}

// The (128, 128) tile of p at (m0, n0), summed over k_begin <= k < k_end (k_begin a multiple of 8).
template <int OP, int STAGES>
__device__ inline void product_mma(const Product& p, int m0, int n0, int k_begin, int k_end) {
    extern __shared__ int4 dynamic_shared[];
    floatX* shared = (floatX*)dynamic_shared;  // STAGES x {tile of a, tile of b}; afterwards staging for the epilogue
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int wm = warp / 2 * WARP_TILE, wn = warp % 2 * WARP_TILE;
    float sums[4][8][4] = {};  // 4 x 8 fragments of 16 x 8

    int steps = ceil_div(k_end - k_begin, DEPTH);
    auto copy = [&](int step) {
        floatX* stage = shared + step % STAGES * 2 * TILE_SIZE;
        int k0 = k_begin + step * DEPTH;
        copy_tile<a_by_k<OP>>(stage, p.a, p.M, p.K, m0, k0, k_end);
        copy_tile<b_by_k<OP>>(stage + TILE_SIZE, p.b, p.N, p.K, n0, k0, k_end);
    };

    u32 a[2][4][4], b[2][4][4];  // the fragments of one k step of 16, and of the next
    auto load_fragments = [&](int set, int step, int k) {
        const floatX* a_tile = shared + step % STAGES * 2 * TILE_SIZE;
#pragma unroll
        for (int i = 0; i < 4; i++) { load_a<a_by_k<OP>>(a[set][i], a_tile, wm + i * 16, k); }
#pragma unroll
        for (int j = 0; j < 4; j++) { load_b<b_by_k<OP>>(b[set][j], a_tile + TILE_SIZE, wn + j * 16, k); }
    };
    auto multiply = [&](int set) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < 8; j++) { mma(sums[i][j], a[set][i], b[set][j / 2] + j % 2 * 2); }
        }
    };
    static_assert(DEPTH == 32, "two k steps in a stage");

    if constexpr (STAGES == 1) {  // kernel 4: copy, wait, multiply
        for (int step = 0; step < steps; step++) {
            copy(step);
            cp_async_commit();
            cp_async_wait<0>();
            __syncthreads();
            load_fragments(0, step, 0);
            load_fragments(1, step, 16);
            __syncthreads();  // the stage is free
            multiply(0);
            multiply(1);
        }
    } else {  // kernel 5: the copies run STAGES - 1 steps ahead, the fragments one
        // One commit per step, also when there is nothing left to copy: the waits count groups.
        for (int step = 0; step < STAGES - 1; step++) {
            if (step < steps) { copy(step); }
            cp_async_commit();
        }
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        load_fragments(0, 0, 0);
        for (int step = 0; step < steps; step++) {
            load_fragments(1, step, 16);
            if (step + STAGES - 1 < steps) { copy(step + STAGES - 1); }  // where step - 1 was
            cp_async_commit();
            multiply(0);
            cp_async_wait<STAGES - 2>();  // this thread's part of the stage of step + 1 has arrived
            __syncthreads();              // everybody's has, and everybody has read all of the stage of `step`
            if (step + 1 < steps) { load_fragments(0, step + 1, 0); }
            multiply(1);
        }
    }

    // Epilogue: a warp passes its outputs through shared memory, 32 rows at a time, so that a thread gets 8 neighbours
    // of one row and a row of the warp is one 128-byte line (16-bit) in global memory. The stages are free: every warp
    // had read its last fragments before the last barrier.
    float* staging = (float*)dynamic_shared + warp * 32 * ROW_STAGING;
    int n = n0 + wn + lane % 8 * 8;
    float bias[8] = {};
    if (n < p.N) { load_bias(p, bias, n); }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float* at = staging + (i * 16 + lane / 4) * ROW_STAGING + j * 8 + lane % 4 * 2;
                const float(&sum)[4] = sums[half * 2 + i][j];
                *(float2*)at = make_float2(sum[0], sum[1]);
                *(float2*)(at + 8 * ROW_STAGING) = make_float2(sum[2], sum[3]);
            }
        }
        __syncwarp();
#pragma unroll 1
        for (int r0 = lane / 8; r0 < 32; r0 += 16) {
            float other[4][8];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int m = m0 + wm + half * 32 + r0 + i * 4;
                if (m < p.M && n < p.N) { load_other(p, other[i], m, n); }
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int m = m0 + wm + half * 32 + r0 + i * 4;
                float v[8];
                load_floats<8>(v, staging + (r0 + i * 4) * ROW_STAGING + lane % 8 * 8);
                if (m < p.M && n < p.N) { finish(p, v, bias, other[i], m, n); }
            }
        }
    }
}

template <int OP> __device__ inline void product4(const Product& p) {
    product_mma<OP, 1>(p, blockIdx.y * TILE, blockIdx.x * TILE, 0, p.K);
}

// The order of the blocks decides what the ones running together share in L2: bands of 16 tile rows, and within a band
// column by column, so that some 250 running blocks need 16 row panels of a and about as many of b.
constexpr int STAGES5 = 3, BAND = 16;

template <int OP> __device__ inline void product5(const Product& p, int tile, int k_begin, int k_end) {
    int rows = ceil_div(p.M, TILE), columns = ceil_div(p.N, TILE);
    int band = tile / (BAND * columns), in_band = tile % (BAND * columns);
    int height = min(BAND, rows - band * BAND);
    product_mma<OP, STAGES5>(p, (band * BAND + in_band % height) * TILE, in_band / height * TILE, k_begin, k_end);
}

#endif  // TENSOR_CORES

// ---------------------------------------------------------------------------------------------------------------------
// entry points
//
// Every kernel checks its own bounds; nothing needs to be zeroed; all pointers 16-byte aligned.
//   kernel 1      grid ceil(M*N / 256), block 256
//   kernel 2      grid (ceil(N / 16), ceil(M / 16)), block 256
//   kernel 3      grid (ceil(N / 128), ceil(M / 128), wgrad: splits), block 256
//   kernel 4      grid (ceil(N / 128), ceil(M / 128)), block 128, dynamic shared memory 36864 bytes
//   kernel 5      grid ceil(N / 128) * ceil(M / 128), wgrad: times splits, block 128, dynamic shared memory 49152 bytes
// forward: M = BT, N = OC, K = C; bias, pre_gelu may be null.  dgrad: M = BT, N = C, K = OC; pre_gelu may be null.
// wgrad: M = OC, N = C, K = BT; with splits > 1 dweight is neither read nor written, matmul_wgrad_reduce does that.
// ---------------------------------------------------------------------------------------------------------------------

__device__ inline Product forward_product(floatX* out, floatX* pre_gelu, const floatX* inp, const floatX* weight,
                                          const floatX* bias, int M, int N, int K) {
    return {out, inp, weight, M, N, K, bias, pre_gelu, nullptr, nullptr, 0, nullptr, 0};
}
__device__ inline Product dgrad_product(floatX* dinp, const floatX* dout, const floatX* weight, const floatX* pre_gelu,
                                        int M, int N, int K) {
    return {dinp, dout, weight, M, N, K, nullptr, nullptr, pre_gelu, nullptr, 0, nullptr, 0};
}
__device__ inline Product wgrad_product(floatG* dweight, const floatX* dout, const floatX* inp, int M, int N, int K,
                                        int accumulate) {
    return {nullptr, dout, inp, M, N, K, nullptr, nullptr, nullptr, dweight, accumulate, nullptr, 0};
}

extern "C" __global__ void __launch_bounds__(256) matmul_forward_kernel1(
    floatX* out, floatX* pre_gelu, const floatX* inp, const floatX* weight, const floatX* bias, int M, int N, int K) {
    product1<FORWARD>(forward_product(out, pre_gelu, inp, weight, bias, M, N, K));
}
extern "C" __global__ void __launch_bounds__(256) matmul_dgrad_kernel1(
    floatX* dinp, const floatX* dout, const floatX* weight, const floatX* pre_gelu, int M, int N, int K) {
    product1<DGRAD>(dgrad_product(dinp, dout, weight, pre_gelu, M, N, K));
}
extern "C" __global__ void __launch_bounds__(256) matmul_wgrad_kernel1(
    floatG* dweight, const floatX* dout, const floatX* inp, int M, int N, int K, int accumulate) {
    product1<WGRAD>(wgrad_product(dweight, dout, inp, M, N, K, accumulate));
}

extern "C" __global__ void __launch_bounds__(256) matmul_forward_kernel2(
    floatX* out, floatX* pre_gelu, const floatX* inp, const floatX* weight, const floatX* bias, int M, int N, int K) {
    product2<FORWARD>(forward_product(out, pre_gelu, inp, weight, bias, M, N, K));
}
extern "C" __global__ void __launch_bounds__(256) matmul_dgrad_kernel2(
    floatX* dinp, const floatX* dout, const floatX* weight, const floatX* pre_gelu, int M, int N, int K) {
    product2<DGRAD>(dgrad_product(dinp, dout, weight, pre_gelu, M, N, K));
}
extern "C" __global__ void __launch_bounds__(256) matmul_wgrad_kernel2(
    floatG* dweight, const floatX* dout, const floatX* inp, int M, int N, int K, int accumulate) {
    product2<WGRAD>(wgrad_product(dweight, dout, inp, M, N, K, accumulate));
}

extern "C" __global__ void __launch_bounds__(256, 2) matmul_forward_kernel3(
    floatX* out, floatX* pre_gelu, const floatX* inp, const floatX* weight, const floatX* bias, int M, int N, int K) {
    product3<FORWARD>(forward_product(out, pre_gelu, inp, weight, bias, M, N, K), 0, K);
}
extern "C" __global__ void __launch_bounds__(256, 2) matmul_dgrad_kernel3(
    floatX* dinp, const floatX* dout, const floatX* weight, const floatX* pre_gelu, int M, int N, int K) {
    product3<DGRAD>(dgrad_product(dinp, dout, weight, pre_gelu, M, N, K), 0, K);
}
extern "C" __global__ void __launch_bounds__(256, 2) matmul_wgrad_kernel3(
    floatG* dweight, float* partials, const floatX* dout, const floatX* inp, int M, int N, int K, int splits,
    int accumulate) {
    Product p = wgrad_product(dweight, dout, inp, M, N, K, accumulate);
    int k_begin, k_end;
    choose_split(p, partials, blockIdx.z, splits, k_begin, k_end);
    product3<WGRAD>(p, k_begin, k_end);
}

#ifdef TENSOR_CORES

extern "C" __global__ void __launch_bounds__(128, 2) matmul_forward_kernel4(
    floatX* out, floatX* pre_gelu, const floatX* inp, const floatX* weight, const floatX* bias, int M, int N, int K) {
    product4<FORWARD>(forward_product(out, pre_gelu, inp, weight, bias, M, N, K));
}
extern "C" __global__ void __launch_bounds__(128, 2) matmul_dgrad_kernel4(
    floatX* dinp, const floatX* dout, const floatX* weight, const floatX* pre_gelu, int M, int N, int K) {
    product4<DGRAD>(dgrad_product(dinp, dout, weight, pre_gelu, M, N, K));
}
extern "C" __global__ void __launch_bounds__(128, 2) matmul_wgrad_kernel4(
    floatG* dweight, const floatX* dout, const floatX* inp, int M, int N, int K, int accumulate) {
    product4<WGRAD>(wgrad_product(dweight, dout, inp, M, N, K, accumulate));
}

extern "C" __global__ void __launch_bounds__(128, 2) matmul_forward_kernel5(
    floatX* out, floatX* pre_gelu, const floatX* inp, const floatX* weight, const floatX* bias, int M, int N, int K) {
    product5<FORWARD>(forward_product(out, pre_gelu, inp, weight, bias, M, N, K), blockIdx.x, 0, K);
}
extern "C" __global__ void __launch_bounds__(128, 2) matmul_dgrad_kernel5(
    floatX* dinp, const floatX* dout, const floatX* weight, const floatX* pre_gelu, int M, int N, int K) {
    product5<DGRAD>(dgrad_product(dinp, dout, weight, pre_gelu, M, N, K), blockIdx.x, 0, K);
}
// Neighbouring blocks work on the same range of tokens, so that they read the same rows of dout and inp.
extern "C" __global__ void __launch_bounds__(128, 2) matmul_wgrad_kernel5(
    floatG* dweight, float* partials, const floatX* dout, const floatX* inp, int M, int N, int K, int splits,
    int accumulate) {
    Product p = wgrad_product(dweight, dout, inp, M, N, K, accumulate);
    int tiles = ceil_div(M, TILE) * ceil_div(N, TILE), k_begin, k_end;
    choose_split(p, partials, blockIdx.x / tiles, splits, k_begin, k_end);
    product5<WGRAD>(p, blockIdx.x % tiles, k_begin, k_end);
}

#endif  // TENSOR_CORES

// dweight (+)= the partials, added in order. Grid ceil(size / 2048), block 256; size = OC * C.
extern "C" __global__ void __launch_bounds__(256) matmul_wgrad_reduce(
    floatG* dweight, const float* partials, i64 size, int splits, int accumulate) {
    i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (i < size) { add_partials(dweight + i, partials + i, size, splits, accumulate); }
}

// ---------------------------------------------------------------------------------------------------------------------
// bias gradient: column sums of dout (M, N)
//
// version | idea                                                                   | expected       | measured
//       1 | one thread per column: N threads for the whole GPU                     | 2-5 % of copy  | never alone
//       2 | 256 columns x a range of rows per block, 16-byte loads; fp32 partials, | 70-90 % of     | never alone
//         | which a second kernel adds in order. Production below capability 9.0   | copy speed     |
// ---------------------------------------------------------------------------------------------------------------------

// Grid ceil(N / 256), block 256.
extern "C" __global__ void __launch_bounds__(256) matmul_bias_grad_kernel1(
    floatG* dbias, const floatX* dout, int M, int N, int accumulate) {
    int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) { return; }
    float sum = 0.0f;
    for (int m = 0; m < M; m++) { sum += (float)dout[(size_t)m * N + n]; }
    dbias[n] = (floatG)(accumulate ? (float)dbias[n] + sum : sum);
}

// partials (parts, N) = sums over `parts` ranges of rows. Grid (ceil(N / 256), parts), block 256: warp w takes rows w,
// w + 8, ... of the range, a lane 8 columns. The accumulate flag and the final rounding belong to the second kernel, so
// that no shape takes a path of its own (llm.c overwrites instead of accumulating where one range covers all rows).
extern "C" __global__ void __launch_bounds__(256) matmul_bias_grad_kernel2(
    float* partials, const floatX* dout, int M, int N) {
    __shared__ alignas(16) float sums[8][256];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int n = blockIdx.x * 256 + lane * 8, rows = ceil_div(M, (int)gridDim.y);
    int begin = min((int)blockIdx.y * rows, M), end = min(begin + rows, M);
    float sum[8] = {}, v[8];
    if (n < N) {
#pragma unroll 4
        for (int m = begin + warp; m < end; m += 8) {
            load_floats<8>(v, dout + (size_t)m * N + n);
#pragma unroll
            for (int i = 0; i < 8; i++) { sum[i] += v[i]; }
        }
    }
    store_floats<8>(&sums[warp][lane * 8], sum);
    __syncthreads();
    int column = blockIdx.x * 256 + threadIdx.x;
    if (column >= N) { return; }
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < 8; w++) { total += sums[w][threadIdx.x]; }
    partials[(size_t)blockIdx.y * N + column] = total;
}

// dbias (+)= sum of partials (parts, N). Grid ceil(N / 32), block 256: 32 columns x 8 interleaved ranges of parts.
extern "C" __global__ void __launch_bounds__(256) matmul_bias_grad_reduce_kernel2(
    floatG* dbias, const float* partials, int N, int parts, int accumulate) {
    __shared__ float sums[8][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = blockIdx.x * 32 + lane;
    float sum = 0.0f;
    if (n < N) {
        for (int part = warp; part < parts; part += 8) { sum += partials[(size_t)part * N + n]; }
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || n >= N) { return; }
    float total = accumulate ? (float)dbias[n] : 0.0f;
    for (int w = 0; w < 8; w++) { total += sums[w][lane]; }
    dbias[n] = (floatG)total;
}
