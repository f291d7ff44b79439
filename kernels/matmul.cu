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
//   floatX, dweight and dbias floatG; sums in fp32, one rounding to nearest at the end, also when accumulating.
//   BT >= 1; C, OC multiples of 8.
//
// In M, N, K terms the three products differ only in which index of an operand is contiguous in memory:
//            a                       b
//   forward  (M, K) rows of k        (N, K) rows of k       "rows of k": a row of the tile is a piece of one token
//   dgrad    (M, K) rows of k        (K, N) rows of n        or weight row; the long direction is strided
//   wgrad    (K, M) rows of m        (K, N) rows of n       "by k": a row of the tile is one k
//
// Rungs 3 and 5 of the ladder are in production here. Rung 11 is matmul_sm90.cu; the others are in kernels/ladder.
// TFLOP/s on an H200 at B = 32, T = 1024, C = 768, OC = 3072, forward and backward:
//
//   3  ffma: tiles of 128 x 128, 8 x 8 outputs in a thread's registers, 16-byte loads, two buffers, token ranges for
//      wgrad. Production for fp32, which it multiplies exactly.
//      expected 40-50 (peak 67), measured 44 and 42, 2026-11-24
//   5  mma: tensor cores as in rung 4, with a ring of stages filled by cp.async, fragments loaded one step ahead, an
//      order of blocks for L2, and token ranges for wgrad. Production for bf16 and fp16 where rung 11 is not.
//      expected 350-420 (limit of mma.sync about 620), measured 305 and 288 as the mean over the products of a bf16
//      training step, bias gradients included, 2026-11-23. Less than expected: per 16 of k the tensor cores need some
//      206 clocks for a 128 x 128 tile, and shared memory 128 for the fragments and 64 for the copies, so the two have
//      to overlap perfectly. Hopper's wgmma reads shared memory directly.
//
// Source: llm.c dev/cuda/matmul_forward.cu, dev/cuda/matmul_backward_bias.cu, llmc/matmul.cuh; the tile hierarchy is
// the one of CUTLASS (Kerr et al. 2017, "CUTLASS: Fast Linear Algebra in CUDA C++").
#include "common.cuh"
#include "ptx.cuh"

// llmc/cuda/matmul.py decides and gives by -D:
//   TILE          rows and columns of a block's outputs
//   STAGES        mma: tiles of a and b in flight
//   BAND          mma: rows of tiles in a band (product_mma)
//   RANGE_UNIT    of the ranges of tokens in which a weight gradient is summed: they are multiples of it
//   THREADS, MMA_THREADS, SHARED_BYTES   of a block; the last is mma's dynamic shared memory
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

// The end of a tile, common to both kernels, for the finished sums v of row m, columns n .. n+W-1. What it needs from
// global memory is read before, by load_bias and load_other, so that a thread can have several rows' reads under way.
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
        // GELU is taken of the rounded value, which a later recomputation from gelu_input sees: both give the same
        // bits.
        store_floats<W>(p.gelu_input + at, v);
#pragma unroll
        for (int i = 0; i < W; i++) { v[i] = gelu((float)(floatX)v[i]); }
    }
    store_floats<W>(p.out + at, v);
}

// The same, reads included.
template <int W> __device__ inline void finish(const Product& p, float (&v)[W], int m, int n) {
    float bias[W], other[W];
    load_bias(p, bias, n);
    load_other(p, other, m, n);
    finish(p, v, bias, other, m, n);
}

// ---------------------------------------------------------------------------------------------------------------------
// ffma: tiles in registers, multiplied by FFMA
// ---------------------------------------------------------------------------------------------------------------------

constexpr int FFMA_DEPTH = 16;       // k of a tile
constexpr int FFMA_ROW = TILE + 4;   // floats; + 4 keeps float4 aligned and lets columns change bank

static_assert(TILE == 128 && THREADS == 256, "8 x 8 outputs, and 8 values of each operand's tile");

// Reads an operand tile by tile along k: each time the 8 consecutive values at this thread's place in the (128, 16)
// tile. Values outside the operand are zero.
template <bool BY_K> struct Reader {
    const floatX* from;
    i64 step;
    int k;  // this thread's place in a tile, or past its end

    __device__ Reader(const floatX* operand, int rows, int K, int row0, int k_begin) {
        int row = row0 + (BY_K ? threadIdx.x % 16 * 8 : threadIdx.x / 2);
        k = BY_K ? threadIdx.x / 16 : threadIdx.x % 2 * 8;
        from = operand + (BY_K ? (i64)(k_begin + k) * rows + row : (i64)row * K + k_begin + k);
        step = BY_K ? (i64)FFMA_DEPTH * rows : FFMA_DEPTH;
        if (row >= rows) { k = FFMA_DEPTH; }
    }
    __device__ void next(float (&v)[8], int depth) {  // depth: k steps left, at most FFMA_DEPTH matter
        if (k < min(depth, FFMA_DEPTH)) {
            load_floats<8>(v, from);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) { v[i] = 0.0f; }
        }
        from += step;
    }
};

// Stores a thread's 8 values in tile[k][row], as the inner loop reads them: rows of one k.
template <bool BY_K> __device__ inline void place_ffma(float (&tile)[FFMA_DEPTH][FFMA_ROW], const float (&v)[8]) {
    if constexpr (BY_K) {
        store_floats<8>(&tile[threadIdx.x / 16][threadIdx.x % 16 * 8], v);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) { tile[threadIdx.x % 2 * 8 + i][threadIdx.x / 2] = v[i]; }
    }
}

template <int OP> __device__ inline void product_ffma(const Product& p, int k_begin, int k_end) {
    __shared__ alignas(16) float a_tile[2][FFMA_DEPTH][FFMA_ROW], b_tile[2][FFMA_DEPTH][FFMA_ROW];
    int m0 = blockIdx.y * TILE, n0 = blockIdx.x * TILE;
    // 2 x 4 warps of 64 x 32 outputs; in a warp 8 x 4 lanes. A lane has rows y .. y+3 and y+32 .. y+35 of 8 columns:
    // every shared-memory read of a warp is then a conflict-free float4 with broadcast.
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int y = warp / 4 * 64 + lane / 4 * 4, x = warp % 4 * 32 + lane % 4 * 8;
    float sums[8][8] = {}, next[8];
    Reader<a_by_k<OP>> a_reader(p.a, p.M, p.K, m0, k_begin);
    Reader<b_by_k<OP>> b_reader(p.b, p.N, p.K, n0, k_begin);
    int left = k_end - k_begin;

    a_reader.next(next, left);
    place_ffma<a_by_k<OP>>(a_tile[0], next);
    b_reader.next(next, left);
    place_ffma<b_by_k<OP>>(b_tile[0], next);
    __syncthreads();
    for (int buffer = 0; left > 0; buffer ^= 1) {
        left -= FFMA_DEPTH;
        // The next tile is read while this one is multiplied: a during the first half, b during the second.
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (left > 0) { half == 0 ? a_reader.next(next, left) : b_reader.next(next, left); }
#pragma unroll
            for (int k = half * FFMA_DEPTH / 2; k < (half + 1) * FFMA_DEPTH / 2; k++) {
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
                    place_ffma<a_by_k<OP>>(a_tile[buffer ^ 1], next);
                } else {
                    place_ffma<b_by_k<OP>>(b_tile[buffer ^ 1], next);
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

// A weight gradient has few output tiles and sums over many tokens. The tokens are cut into `splits` ranges, whose sums
// go to partials (splits, M, N); matmul_wgrad_reduce adds them in order. The number of splits comes from the shapes
// alone (llmc/cuda/matmul.py), so results do not depend on the device. No range may be empty.
__device__ inline void choose_split(Product& p, float* partials, int split, int splits, int& k_begin, int& k_end) {
    int range = ceil_div(ceil_div(p.K, RANGE_UNIT), splits) * RANGE_UNIT;
    k_begin = split * range, k_end = min(k_begin + range, p.K);
    if (splits > 1) { p.partials = partials, p.partial_row = split * p.M; }
}

// ---------------------------------------------------------------------------------------------------------------------
// mma: tensor cores
// ---------------------------------------------------------------------------------------------------------------------

#ifdef TENSOR_CORES

// A block of 4 warps makes 128 x 128 outputs, a warp 64 x 64: every ldmatrix.x4 (512 bytes of shared memory) then feeds
// 4 mma. With 8 warps of 64 x 32 it would feed 2.7, and shared memory, not the tensor cores, would set the pace.
constexpr int DEPTH = 32, WARP_TILE = 64;             // k of a stage; rows and columns of a warp's outputs
constexpr int TILE_SIZE = TILE * DEPTH;                // elements of one operand's tile
constexpr int CHUNKS = TILE_SIZE / 8;                  // 16-byte pieces, the unit of copies and of ldmatrix rows
constexpr int ROW_STAGING = WARP_TILE + 8;             // floats; + 8 spreads the rows of a fragment over the banks
constexpr int RING_BYTES = STAGES * 2 * TILE_SIZE * 2, STAGING_BYTES = MMA_THREADS / 32 * 32 * ROW_STAGING * 4;

static_assert(MMA_THREADS / 32 * WARP_TILE * WARP_TILE == TILE * TILE, "the warps share out a tile");
static_assert(STAGES >= 2, "the copies run STAGES - 1 steps ahead");
static_assert(RANGE_UNIT % 8 == 0, "a range begins with a 16-byte piece");
static_assert((RING_BYTES > STAGING_BYTES ? RING_BYTES : STAGING_BYTES) == SHARED_BYTES, "as the launcher asks for");

// The place of a piece in a tile, in elements. A tile has either 128 rows of 4 pieces of k or, by k, 32 rows of 16
// pieces. The eight rows that one 8 x 8 matrix of ldmatrix reads have the same piece number; exclusive-or with row bits
// sends them to the eight different 16-byte columns of the 32 banks, without padding.
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

// Makes the (128, 128) tile of p at (m0, n0), summed over k_begin <= k < k_end; k_begin is a multiple of 8.
template <int OP>
__device__ inline void product_mma(const Product& p, int m0, int n0, int k_begin, int k_end) {
    extern __shared__ int4 dynamic_shared[];
    floatX* shared = (floatX*)dynamic_shared;  // STAGES x {tile of a, tile of b}; afterwards staging for the end
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

    // The copies run STAGES - 1 steps ahead, the fragments one. There is one commit for each step, also when nothing is
    // left to copy: the waits count groups.
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

    // The end of the tile. A warp passes its outputs through shared memory, 32 rows at a time: a thread then has 8
    // neighbours of one row, and a row of the warp is one 128-byte line (16-bit) in global memory. The stages are free,
    // because every warp had read its last fragments before the last barrier.
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

// The tile that a number stands for. The order decides what the blocks running together share in L2: bands of BAND tile
// rows, and within a band column by column, so that some 250 running blocks need 16 row panels of a and about as many
// of b.
template <int OP> __device__ inline void product_mma(const Product& p, int tile, int k_begin, int k_end) {
    int rows = ceil_div(p.M, TILE), columns = ceil_div(p.N, TILE);
    int band = tile / (BAND * columns), in_band = tile % (BAND * columns);
    int height = min(BAND, rows - band * BAND);
    product_mma<OP>(p, (band * BAND + in_band % height) * TILE, in_band / height * TILE, k_begin, k_end);
}

#endif  // TENSOR_CORES

// ---------------------------------------------------------------------------------------------------------------------
// entry points
//
// Every kernel checks its own bounds; nothing needs to be zeroed; all pointers are 16-byte aligned. With tiles of TILE
// x TILE:
//   ffma   grid (ceil(N / TILE), ceil(M / TILE), wgrad: splits), block THREADS
//   mma    grid tiles, wgrad: tiles * splits, block MMA_THREADS, dynamic shared memory SHARED_BYTES
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

extern "C" __global__ void __launch_bounds__(THREADS, 2) matmul_forward_ffma(
    floatX* out, floatX* pre_gelu, const floatX* inp, const floatX* weight, const floatX* bias, int M, int N, int K) {
    product_ffma<FORWARD>(forward_product(out, pre_gelu, inp, weight, bias, M, N, K), 0, K);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) matmul_dgrad_ffma(
    floatX* dinp, const floatX* dout, const floatX* weight, const floatX* pre_gelu, int M, int N, int K) {
    product_ffma<DGRAD>(dgrad_product(dinp, dout, weight, pre_gelu, M, N, K), 0, K);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) matmul_wgrad_ffma(
    floatG* dweight, float* partials, const floatX* dout, const floatX* inp, int M, int N, int K, int splits,
    int accumulate) {
    Product p = wgrad_product(dweight, dout, inp, M, N, K, accumulate);
    int k_begin, k_end;
    choose_split(p, partials, blockIdx.z, splits, k_begin, k_end);
    product_ffma<WGRAD>(p, k_begin, k_end);
}

#ifdef TENSOR_CORES

extern "C" __global__ void __launch_bounds__(MMA_THREADS, 2) matmul_forward_mma(
    floatX* out, floatX* pre_gelu, const floatX* inp, const floatX* weight, const floatX* bias, int M, int N, int K) {
    product_mma<FORWARD>(forward_product(out, pre_gelu, inp, weight, bias, M, N, K), blockIdx.x, 0, K);
}
extern "C" __global__ void __launch_bounds__(MMA_THREADS, 2) matmul_dgrad_mma(
    floatX* dinp, const floatX* dout, const floatX* weight, const floatX* pre_gelu, int M, int N, int K) {
    product_mma<DGRAD>(dgrad_product(dinp, dout, weight, pre_gelu, M, N, K), blockIdx.x, 0, K);
}
// Neighbouring blocks work on the same range of tokens, so that they read the same rows of dout and inp.
extern "C" __global__ void __launch_bounds__(MMA_THREADS, 2) matmul_wgrad_mma(
    floatG* dweight, float* partials, const floatX* dout, const floatX* inp, int M, int N, int K, int splits,
    int accumulate) {
    Product p = wgrad_product(dweight, dout, inp, M, N, K, accumulate);
    int tiles = ceil_div(M, TILE) * ceil_div(N, TILE), k_begin, k_end;
    choose_split(p, partials, blockIdx.x / tiles, splits, k_begin, k_end);
    product_mma<WGRAD>(p, blockIdx.x % tiles, k_begin, k_end);
}

#endif  // TENSOR_CORES

// dweight (+)= the partials, added in order. Grid ceil(size / 8 / THREADS), block THREADS; size = OC * C.
extern "C" __global__ void __launch_bounds__(THREADS) matmul_wgrad_reduce(
    floatG* dweight, const float* partials, i64 size, int splits, int accumulate) {
    i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (i < size) { add_partials(dweight + i, partials + i, size, splits, accumulate); }
}

// ---------------------------------------------------------------------------------------------------------------------
// bias gradient: column sums of dout (M, N), in two kernels. Below capability 9.0; matmul_sm90.cu makes the partial
// sums with the weight gradient and needs the second kernel alone. Expected: 70-90 % of the speed of a copy; never
// measured alone.
// ---------------------------------------------------------------------------------------------------------------------

static_assert(THREADS == 8 * 32, "8 warps, of which each lane has 8 columns, or one");

// partials (parts, N) = sums over `parts` ranges of rows. Grid (ceil(N / THREADS), parts), block THREADS: warp w takes
// the rows w, w + 8, ... of the range, a lane 8 columns. The accumulate flag and the final rounding belong to the
// second kernel, so that no shape takes a path of its own (llm.c overwrites instead of accumulating where one range
// covers all rows).
extern "C" __global__ void __launch_bounds__(THREADS) matmul_bias_grad(
    float* partials, const floatX* dout, int M, int N) {
    __shared__ alignas(16) float sums[8][THREADS];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int n = blockIdx.x * THREADS + lane * 8, rows = ceil_div(M, (int)gridDim.y);
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
    int column = blockIdx.x * THREADS + threadIdx.x;
    if (column >= N) { return; }
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < 8; w++) { total += sums[w][threadIdx.x]; }
    partials[(size_t)blockIdx.y * N + column] = total;
}

// dbias (+)= sum of partials (parts, N). Grid ceil(N / 32), block THREADS: 32 columns x 8 interleaved ranges of parts.
extern "C" __global__ void __launch_bounds__(THREADS) matmul_bias_grad_reduce(
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
