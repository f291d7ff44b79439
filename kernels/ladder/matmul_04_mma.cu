// Linear layers, rung 4: tensor cores.
//
//   forward  out = inp @ weight^T + bias;  with pre_gelu: pre_gelu = that, out = gelu(pre_gelu)
//   dgrad    dinp = dout @ weight, times gelu'(pre_gelu) if given        wgrad    dweight (+)= dout^T @ inp
//
// Idea        mma m16n8k16 multiplies fragments that ldmatrix reads from swizzled tiles in shared memory. A block makes
//             128 x 128 outputs: it copies a tile of each operand by cp.async, waits, and multiplies.
// Prediction  200 to 250 TFLOP/s, of about 620 that mma.sync can do.
// Measured    223 TFLOP/s forward, 186 backward, at B = 32, T = 1024, C = 768, OC = 3072, bf16. H200, 2026-11-24.
// Lesson      Copies and products take turns: the tensor cores wait for the copies. mma in kernels/matmul.cu, rung 5,
//             keeps three tiles in flight.
//
// Layouts and rounding are those of kernels/matmul.cu. bf16 and fp16.
#include "common.cuh"
#include "ptx.cuh"

#ifdef TENSOR_CORES

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
};

template <int OP> constexpr bool a_by_k = OP == WGRAD;
template <int OP> constexpr bool b_by_k = OP != FORWARD;

// The end of a tile for the finished sums v of row m, columns n .. n+W-1. What it needs from global memory is read
// before, by load_bias and load_other, so that a thread can have several rows' reads under way.
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
        // of the rounded value: recomputing it from gelu_input then gives the same bits
        store_floats<W>(p.gelu_input + at, v);
#pragma unroll
        for (int i = 0; i < W; i++) { v[i] = gelu((float)(floatX)v[i]); }
    }
    store_floats<W>(p.out + at, v);
}

// A block of 4 warps makes 128 x 128 outputs, a warp 64 x 64: every ldmatrix.x4 (512 bytes of shared memory) then feeds
// 4 mma. With 8 warps of 64 x 32 it would feed 2.7, and shared memory, not the tensor cores, would set the pace.
constexpr int TILE = 128, DEPTH = 32, WARP_TILE = 64;   // outputs of a block, k of a tile, outputs of a warp
constexpr int TILE_SIZE = TILE * DEPTH;                // elements of one operand's tile
constexpr int CHUNKS = TILE_SIZE / 8;                  // 16-byte pieces, the unit of copies and of ldmatrix rows
constexpr int ROW_STAGING = WARP_TILE + 8;             // floats; + 8 spreads the rows of a fragment over the banks

// Place of a piece in a tile, in elements. A tile has either 128 rows of 4 pieces of k or, by k, 32 rows of 16 pieces.
// The eight rows that one 8 x 8 matrix of ldmatrix reads have the same piece number; exclusive-or with row bits sends
// them to the eight different 16-byte columns of the 32 banks, without padding.
template <bool BY_K> __device__ inline int place(int row, int piece) {
    return BY_K ? row * TILE + (piece ^ (row & 7)) * 8 : row * DEPTH + (piece ^ (row >> 1 & 3)) * 8;
}

// Starts the copy of the tile of `operand` at (row0, k0), with zeros outside. `rows` is M or N. A thread's
// four pieces lie in one column of the tile, at constant distances.
template <bool BY_K>
__device__ inline void copy_tile(floatX* tile, const floatX* operand, int rows, int K, int row0, int k0) {
    constexpr int PIECES = BY_K ? TILE / 8 : DEPTH / 8, STEP = 128 / PIECES;  // in a row of the tile; rows at a time
    int r = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
    int row = row0 + (BY_K ? piece * 8 : r), k = k0 + (BY_K ? r : piece * 8), stride = BY_K ? rows : K;
    const floatX* from = operand + (BY_K ? (i64)k * stride + row : (i64)row * stride + k);
    tile += place<BY_K>(r, piece);  // the swizzle repeats every 8 rows, and STEP is a multiple of 8
#pragma unroll
    for (int i = 0; i < CHUNKS / 128; i++) {
        bool inside = BY_K ? row < rows && k + i * STEP < K : row + i * STEP < rows && k < K;
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

// Makes this block's (128, 128) tile of p.
template <int OP> __device__ inline void product(const Product& p) {
    extern __shared__ int4 dynamic_shared[];
    floatX *a_tile = (floatX*)dynamic_shared, *b_tile = a_tile + TILE_SIZE;  // afterwards staging for the end
    int m0 = blockIdx.y * TILE, n0 = blockIdx.x * TILE;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int wm = warp / 2 * WARP_TILE, wn = warp % 2 * WARP_TILE;
    float sums[4][8][4] = {};  // 4 x 8 fragments of 16 x 8

    int steps = ceil_div(p.K, DEPTH);
    auto copy = [&](int step) {
        copy_tile<a_by_k<OP>>(a_tile, p.a, p.M, p.K, m0, step * DEPTH);
        copy_tile<b_by_k<OP>>(b_tile, p.b, p.N, p.K, n0, step * DEPTH);
    };

    u32 a[2][4][4], b[2][4][4];  // the fragments of two k steps of 16
    auto load_fragments = [&](int set, int k) {
#pragma unroll
        for (int i = 0; i < 4; i++) { load_a<a_by_k<OP>>(a[set][i], a_tile, wm + i * 16, k); }
#pragma unroll
        for (int j = 0; j < 4; j++) { load_b<b_by_k<OP>>(b[set][j], b_tile, wn + j * 16, k); }
    };
    auto multiply = [&](int set) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < 8; j++) { mma(sums[i][j], a[set][i], b[set][j / 2] + j % 2 * 2); }
        }
    };
    static_assert(DEPTH == 32, "two k steps in a stage");

    for (int step = 0; step < steps; step++) {  // copy, wait, multiply
        copy(step);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        load_fragments(0, 0);
        load_fragments(1, 16);
        __syncthreads();  // the tiles may be overwritten
        multiply(0);
        multiply(1);
    }

    // The end of the tile. A warp passes its outputs through shared memory, 32 rows at a time: a thread then has 8
    // neighbours of one row, and a row of the warp is one 128-byte line (16-bit) in global memory. The tiles are free,
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

__device__ inline Product forward_product(floatX* out, floatX* pre_gelu, const floatX* inp, const floatX* weight,
                                          const floatX* bias, int M, int N, int K) {
    return {out, inp, weight, M, N, K, bias, pre_gelu, nullptr, nullptr, 0};
}
__device__ inline Product dgrad_product(floatX* dinp, const floatX* dout, const floatX* weight, const floatX* pre_gelu,
                                        int M, int N, int K) {
    return {dinp, dout, weight, M, N, K, nullptr, nullptr, pre_gelu, nullptr, 0};
}
__device__ inline Product wgrad_product(floatG* dweight, const floatX* dout, const floatX* inp, int M, int N, int K,
                                        int accumulate) {
    return {nullptr, dout, inp, M, N, K, nullptr, nullptr, nullptr, dweight, accumulate};
}

// Grid (ceil(N / 128), ceil(M / 128)), block 128, dynamic shared memory SHARED_BYTES.
static_assert(4 * 32 * ROW_STAGING * 4 == SHARED_BYTES && 2 * TILE_SIZE * 2 <= SHARED_BYTES, "as launched");

extern "C" __global__ void __launch_bounds__(128, 2) matmul_forward_one_stage(
    floatX* out, floatX* pre_gelu, const floatX* inp, const floatX* weight, const floatX* bias, int M, int N, int K) {
    product<FORWARD>(forward_product(out, pre_gelu, inp, weight, bias, M, N, K));
}
extern "C" __global__ void __launch_bounds__(128, 2) matmul_dgrad_one_stage(
    floatX* dinp, const floatX* dout, const floatX* weight, const floatX* pre_gelu, int M, int N, int K) {
    product<DGRAD>(dgrad_product(dinp, dout, weight, pre_gelu, M, N, K));
}
extern "C" __global__ void __launch_bounds__(128, 2) matmul_wgrad_one_stage(
    floatG* dweight, const floatX* dout, const floatX* inp, int M, int N, int K, int accumulate) {
    product<WGRAD>(wgrad_product(dweight, dout, inp, M, N, K, accumulate));
}

#endif  // TENSOR_CORES
