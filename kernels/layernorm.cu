// LayerNorm over the channels, the residual add before it, both in one pass, and the gradient.
//
//   forward   mean = sum(x)/C;  var = sum((x - mean)^2)/C;  rstd = 1/sqrt(var + 1e-5);  out = (x - mean) rstd w + b
//   backward  dn = dout w;  xhat = (x - mean) rstd;  dx += rstd (dn - mean(dn) - xhat mean(dn xhat))
//             dw += sum over rows of dout xhat;  db += sum over rows of dout
//
//   x, out, dout, dx (N,C) floatX, N = B*T    w, b (C,) floatX    dw, db (C,) floatG    mean, rstd (N,) f32    C % 8 == 0
//
// The variance is two-pass: E[x^2] - E[x]^2 cancels when the mean is large. In the fused kernel the statistics are those of
// the residual as stored, after rounding to floatX, so that backward sees the same numbers.
//
// Bytes moved in units of sizeof(floatX), reads that L1 or L2 answers counted. Measured on an H200, B=32, T=1024, C=768,
// bf16, us (% of the speed of a copy of as many bytes in the same run). Goal of each direction: 88 %.
// version                   | idea                                                        | bytes moved | measured
// layernorm_forward 1       | thread per row: neighbours read addresses 2C bytes apart    | 4 NC        | 650 (4 %)
// layernorm_forward 2       | warp per row, lanes read neighbouring elements              | 4 NC        | 48.0 (60 %)
// layernorm_forward 3       | row stays in registers as 16-byte packs: read once; one or  | 2 NC        | 32.0 (86.2 %)
//                           | more warps per row, so that any width fits                  |             |
// layernorm_forward 4       | 3 with conversions in pairs, in blocks of two warps: some   | 2 NC        | 30.8 (89.7 %)
//                           | load while others reduce                                    |             |
// layernorm_forward 5       | 4 with the weights loaded beside the row: in 4 each pack's  | 2 NC        | 29.8 (92.5 %)
//                           | wait until the pack before is stored; no divisions          |             |
// fused_residual_forward 1  | residual_forward, then layernorm_forward: two launches      | 5 NC        | 73.4 (71 %)
// fused_residual_forward 2  | warp per row, residual written and read back                | 6 NC        | 98.0 (53 %)
// fused_residual_forward 3  | as layernorm_forward 3, sum of both inputs in registers     | 4 NC        | 57.6 (88.8 %)
// fused_residual_forward 4  | as layernorm_forward 4                                      | 4 NC        | 55.1 (92.8 %)
// fused_residual_forward 5  | as layernorm_forward 5                                      | 4 NC        | 55.1 (92.8 %)
// layernorm_backward 1      | warp per row for dx; thread per channel for dw, db          | 7 NC        | 7912 (0.7 %)
// layernorm_backward 2      | the same dx; dw, db by many blocks, a slice of rows each,   | 7 NC        | 768 (7 %)
//                           | fp32 partial sums to scratch, added by a second kernel      |             |
// layernorm_backward 3      | one pass: warps walk rows, dw and db accumulate in          | 4 NC        | 108 (50 %)
//                           | registers until the end of the block's slice                |             |
// layernorm_backward 4      | 3 with the next row on its way into shared memory (dx too)  | 4 NC        | 60.1 (85.9 %)
//                           | and fewer, longer slices                                    |             |
// layernorm_backward 6      | 4 without branches, dn and xhat stay in registers: 519      | 4 NC        | 57.5 (89.9 %),
//                           | instructions a row, 760 in 4; what the blocks have summed   |             | as predicted
//                           | is read as packs, and added after one wait instead of three |             |
// Figures with a decimal of a percent are of 2026-11-26: calls in a row; a large copy had 4236 GB/s, one of 2 NC 86 % of
// that, of 4 NC 92 %. The others are of 2026-11-24: single calls with events around them, which took some 2 us more.
// Forward 5 and fused 5 have each other's bits, not those of 4: the public functions change together.
// Not faster, and gone: forward in blocks that stay, the next row in registers or three of them on their way by cp.async
// (32.0, fused 55.7), two rows of a thread at once (30.6, 55.5); backward in 256 (rung 5), 384 or 512 slices (60.1).
// In a CUDA graph of 24 calls (one run): backward 4 54 us, fused 4 54 us, a copy 51 us; at B=64 101, 104 and 98 us. So rows
// stream as fast as a copy, and what 4 takes beyond its 51.6 us is there once. By calculation: the second kernel 4.3 (1.2
// to start after the first; then waits for the gradients from before, the slices past 256 and the others, one after the
// other (SASS)), the block's own sums 0.9 (12 rounds of 4 reads), the last row's instructions 1, the first row's code?
//
// llm.c's kernels 6 and 10 keep the row or the partial sums in shared memory, which caps C at some 10,000 and 4096. With
// registers spread over as many warps as the row needs, C may be 16384 forward and 12288 backward in fp32, 32768 and 12288
// in 16 bits (rungs 4 and 5 forward: 12288 and 24576).
//
// Source: llm.c llmc/layernorm.cuh; Ba et al. 2016, arXiv:1607.06450.
#include "ptx.cuh"

#define EPS 1e-5f

// ---------------------------------------------------------------------------------------------------------------------
// forward
// ---------------------------------------------------------------------------------------------------------------------

// One thread per row. grid ceil(N / block), any block.
extern "C" __global__ void layernorm_forward_kernel1(floatX* out, float* mean, float* rstd, const floatX* inp,
                                                     const floatX* weight, const floatX* bias, int N, int C) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= N) { return; }
    const floatX* x = inp + (i64)row * C;
    float m = 0.0f, squares = 0.0f;  // summed 32 at a time: one running sum over a wide row would lose three more bits
    for (int first = 0; first < C; first += 32) {
        float part = 0.0f;
        for (int c = first; c < min(first + 32, C); c++) { part += (float)x[c]; }
        m += part;
    }
    m /= C;
    for (int first = 0; first < C; first += 32) {
        float part = 0.0f;
        for (int c = first; c < min(first + 32, C); c++) { part += ((float)x[c] - m) * ((float)x[c] - m); }
        squares += part;
    }
    float s = rsqrtf(squares / C + EPS);
    for (int c = 0; c < C; c++) {
        out[(i64)row * C + c] = (floatX)(((float)x[c] - m) * s * (float)weight[c] + (float)bias[c]);
    }
    mean[row] = m;
    rstd[row] = s;
}

// One warp per row, 32 neighbouring elements at a time. grid ceil(N / rows), block (32, rows).
extern "C" __global__ void layernorm_forward_kernel2(floatX* out, float* mean, float* rstd, const floatX* inp,
                                                     const floatX* weight, const floatX* bias, int N, int C) {
    int row = blockIdx.x * blockDim.y + threadIdx.y, lane = threadIdx.x;
    if (row >= N) { return; }
    const floatX* x = inp + (i64)row * C;
    float sum = 0.0f;
    for (int c = lane; c < C; c += 32) { sum += (float)x[c]; }
    float m = warpReduceSum(sum) / C;
    float squares = 0.0f;
    for (int c = lane; c < C; c += 32) { squares += ((float)x[c] - m) * ((float)x[c] - m); }
    float s = rsqrtf(warpReduceSum(squares) / C + EPS);
    for (int c = lane; c < C; c += 32) {
        out[(i64)row * C + c] = (floatX)(((float)x[c] - m) * s * (float)weight[c] + (float)bias[c]);
    }
    if (lane == 0) {
        mean[row] = m;
        rstd[row] = s;
    }
}

// Sum over the threads of one row: those with the same threadIdx.y, a multiple of 32. All threads of the block call it.
__device__ inline float rowReduceSum(float value) {
    __shared__ float partial[32];
    value = warpReduceSum(value);
    if (blockDim.x == 32) { return value; }
    int warps = blockDim.x / 32, warp = threadIdx.y * warps + threadIdx.x / 32;
    __syncthreads();  // the last call's readers are done
    if (threadIdx.x % 32 == 0) { partial[warp] = value; }
    __syncthreads();
    float sum = 0.0f;
#pragma unroll 4  // by 16, which the compiler prefers, it is a quarter of layernorm_forward_kernel5
    for (int w = 0; w < warps; w++) { sum += partial[threadIdx.y * warps + w]; }
    return sum;
}

#define FORWARD_PACKS 4  // 16-byte packs of a row that a thread holds; llmc/cuda/layernorm.py has the same number

// Statistics and output of the row whose packs this thread holds; `row` past the end takes part in the reductions only.
__device__ inline void normalize(floatX* out, float* mean, float* rstd, const x128* x, const floatX* weight,
                                 const floatX* bias, int row, int N, int C) {
    int packs = C / x128::size;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < FORWARD_PACKS; i++) {
        if (i * blockDim.x + threadIdx.x < packs) {
            for (int k = 0; k < x128::size; k++) { sum += (float)x[i][k]; }
        }
    }
    float m = rowReduceSum(sum) / C;
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < FORWARD_PACKS; i++) {
        if (i * blockDim.x + threadIdx.x < packs) {
            for (int k = 0; k < x128::size; k++) { squares += ((float)x[i][k] - m) * ((float)x[i][k] - m); }
        }
    }
    float s = rsqrtf(rowReduceSum(squares) / C + EPS);
    if (row >= N) { return; }
#pragma unroll
    for (int i = 0; i < FORWARD_PACKS; i++) {
        int pack = i * blockDim.x + threadIdx.x;
        if (pack < packs) {
            x128 w = load128(weight + pack * x128::size), b = load128(bias + pack * x128::size), normed;
            for (int k = 0; k < x128::size; k++) {
                normed[k] = (floatX)(((float)x[i][k] - m) * s * (float)w[k] + (float)b[k]);
            }
            store128(out + (i64)row * C + pack * x128::size, normed);
        }
    }
    if (threadIdx.x == 0) {
        mean[row] = m;
        rstd[row] = s;
    }
}

// blockDim.x threads per row, blockDim.y rows per block, each row held in registers.
// grid ceil(N / blockDim.y); blockDim.x a multiple of 32 with blockDim.x * FORWARD_PACKS >= C / x128::size.
extern "C" __global__ void __launch_bounds__(1024)
layernorm_forward_kernel3(floatX* out, float* mean, float* rstd, const floatX* inp, const floatX* weight,
                          const floatX* bias, int N, int C) {
    int row = blockIdx.x * blockDim.y + threadIdx.y, packs = C / x128::size;
    x128 x[FORWARD_PACKS];
#pragma unroll
    for (int i = 0; i < FORWARD_PACKS; i++) {
        int pack = i * blockDim.x + threadIdx.x;
        x[i] = row < N && pack < packs ? load128cs(inp + (i64)row * C + pack * x128::size) : zeros128<floatX>();
    }
    normalize(out, mean, rstd, x, weight, bias, row, N, C);
}

// ---------------------------------------------------------------------------------------------------------------------
// residual add
// ---------------------------------------------------------------------------------------------------------------------

// One thread per element. grid ceil(elements / block), any block.
extern "C" __global__ void residual_forward_kernel1(floatX* out, const floatX* inp1, const floatX* inp2, i64 elements) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < elements) { out[i] = (floatX)((float)inp1[i] + (float)inp2[i]); }
}

// One thread per 16 bytes. grid ceil(elements / x128::size / block); elements % x128::size == 0.
extern "C" __global__ void residual_forward_kernel2(floatX* out, const floatX* inp1, const floatX* inp2, i64 elements) {
    i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * x128::size;
    if (i >= elements) { return; }
    x128 a = load128cs(inp1 + i), b = load128cs(inp2 + i);
    for (int k = 0; k < x128::size; k++) { a[k] = (floatX)((float)a[k] + (float)b[k]); }
    store128(out + i, a);
}

// ---------------------------------------------------------------------------------------------------------------------
// residual add and LayerNorm in one pass
// ---------------------------------------------------------------------------------------------------------------------

// One warp per row. grid ceil(N / rows), block (32, rows). A lane reads back only what it wrote itself.
extern "C" __global__ void fused_residual_forward_kernel2(floatX* residual, floatX* normed, float* mean, float* rstd,
                                                          const floatX* inp1, const floatX* inp2, const floatX* weight,
                                                          const floatX* bias, int N, int C) {
    int row = blockIdx.x * blockDim.y + threadIdx.y, lane = threadIdx.x;
    if (row >= N) { return; }
    floatX* x = residual + (i64)row * C;
    float sum = 0.0f;
    for (int c = lane; c < C; c += 32) {
        x[c] = (floatX)((float)inp1[(i64)row * C + c] + (float)inp2[(i64)row * C + c]);
        sum += (float)x[c];
    }
    float m = warpReduceSum(sum) / C;
    float squares = 0.0f;
    for (int c = lane; c < C; c += 32) { squares += ((float)x[c] - m) * ((float)x[c] - m); }
    float s = rsqrtf(warpReduceSum(squares) / C + EPS);
    for (int c = lane; c < C; c += 32) {
        normed[(i64)row * C + c] = (floatX)(((float)x[c] - m) * s * (float)weight[c] + (float)bias[c]);
    }
    if (lane == 0) {
        mean[row] = m;
        rstd[row] = s;
    }
}

// As layernorm_forward_kernel3; both inputs are read once and the residual is written once.
extern "C" __global__ void __launch_bounds__(1024)
fused_residual_forward_kernel3(floatX* residual, floatX* normed, float* mean, float* rstd, const floatX* inp1,
                               const floatX* inp2, const floatX* weight, const floatX* bias, int N, int C) {
    int row = blockIdx.x * blockDim.y + threadIdx.y, packs = C / x128::size;
    x128 x[FORWARD_PACKS];
#pragma unroll
    for (int i = 0; i < FORWARD_PACKS; i++) {
        int pack = i * blockDim.x + threadIdx.x;
        x[i] = zeros128<floatX>();
        if (row < N && pack < packs) {
            i64 offset = (i64)row * C + pack * x128::size;
            x128 a = load128cs(inp1 + offset), b = load128cs(inp2 + offset);
            for (int k = 0; k < x128::size; k++) { x[i][k] = (floatX)((float)a[k] + (float)b[k]); }
            store128cs(residual + offset, x[i]);
        }
    }
    normalize(normed, mean, rstd, x, weight, bias, row, N, C);
}

// ---------------------------------------------------------------------------------------------------------------------
// both once more: conversions in pairs, and small blocks, so that some load while others reduce
// ---------------------------------------------------------------------------------------------------------------------

#define ROW_PACKS 3  // packs of a row that a thread holds; llmc/cuda/layernorm.py has the same number

// blockDim.x threads per row, blockDim.y rows per block. grid ceil(N / blockDim.y); blockDim.x a multiple of 32 with
// blockDim.x * ROW_PACKS >= C / x128::size.
template <bool FUSED>
__device__ inline void normalize_row(floatX* residual, floatX* out, float* mean, float* rstd, const floatX* inp1,
                                     const floatX* inp2, const floatX* weight, const floatX* bias, int N, int C) {
    int row = blockIdx.x * blockDim.y + threadIdx.y, packs = C / x128::size;
    i64 start = (i64)row * C;
    x128 a[ROW_PACKS], b[ROW_PACKS];
#pragma unroll
    for (int i = 0; i < ROW_PACKS; i++) {
        int pack = i * blockDim.x + threadIdx.x;
        if (row < N && pack < packs) {
            a[i] = load128cs(inp1 + start + pack * x128::size);
            if (FUSED) { b[i] = load128cs(inp2 + start + pack * x128::size); }
        }
    }
    float x[ROW_PACKS][x128::size] = {}, sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < ROW_PACKS; i++) {
        int pack = i * blockDim.x + threadIdx.x;
        if (row < N && pack < packs) {
            to_floats(x[i], a[i]);
            if (FUSED) {
                float other[x128::size];
                to_floats(other, b[i]);
                for (int k = 0; k < x128::size; k++) { x[i][k] += other[k]; }
                x128 rounded = to_pack(x[i]);
                store128cs(residual + start + pack * x128::size, rounded);
                to_floats(x[i], rounded);
            }
            for (int k = 0; k < x128::size; k++) { sum += x[i][k]; }
        }
    }
    float m = rowReduceSum(sum) / C;
#pragma unroll
    for (int i = 0; i < ROW_PACKS; i++) {
        if (i * blockDim.x + threadIdx.x < packs) {
            for (int k = 0; k < x128::size; k++) {
                x[i][k] -= m;
                squares = fmaf(x[i][k], x[i][k], squares);
            }
        }
    }
    float s = rsqrtf(rowReduceSum(squares) / C + EPS);
    if (row >= N) { return; }
#pragma unroll
    for (int i = 0; i < ROW_PACKS; i++) {
        int pack = i * blockDim.x + threadIdx.x;
        if (pack < packs) {
            float w[x128::size], shift[x128::size];
            to_floats(w, load128(weight + pack * x128::size));
            to_floats(shift, load128(bias + pack * x128::size));
            for (int k = 0; k < x128::size; k++) { x[i][k] = fmaf(x[i][k] * s, w[k], shift[k]); }
            store128(out + start + pack * x128::size, to_pack(x[i]));
        }
    }
    if (threadIdx.x == 0) {
        mean[row] = m;
        rstd[row] = s;
    }
}

extern "C" __global__ void __launch_bounds__(1024)
layernorm_forward_kernel4(floatX* out, float* mean, float* rstd, const floatX* inp, const floatX* weight,
                          const floatX* bias, int N, int C) {
    normalize_row<false>(NULL, out, mean, rstd, inp, NULL, weight, bias, N, C);
}

extern "C" __global__ void __launch_bounds__(1024)
fused_residual_forward_kernel4(floatX* residual, floatX* normed, float* mean, float* rstd, const floatX* inp1,
                               const floatX* inp2, const floatX* weight, const floatX* bias, int N, int C) {
    normalize_row<true>(residual, normed, mean, rstd, inp1, inp2, weight, bias, N, C);
}

// ---------------------------------------------------------------------------------------------------------------------
// the same once more: weights on their way with the row, no divisions
// ---------------------------------------------------------------------------------------------------------------------

// As normalize_row, for blocks of up to 256 threads. There the weights of each pack are loaded where they are used, one
// after the other: a store to `out` lies between them, which for all the compiler knows changes weights.
// PACKS of a row a thread, 3 or 4: what wastes fewer threads (llmc/cuda/layernorm.py: packs_each).
template <bool FUSED, int PACKS>
__device__ inline void normalize_row5(floatX* residual, floatX* out, float* mean, float* rstd, const floatX* inp1,
                                      const floatX* inp2, const floatX* weight, const floatX* bias, int N, int C) {
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    i64 start = (i64)row * C;
    x128 a[PACKS], b[PACKS], w[PACKS], shift[PACKS];
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        int c = (i * blockDim.x + threadIdx.x) * x128::size;
        if (row < N && c < C) {
            a[i] = load128cs(inp1 + start + c);
            if (FUSED) { b[i] = load128cs(inp2 + start + c); }
        }
    }
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        int c = (i * blockDim.x + threadIdx.x) * x128::size;
        if (c < C) {
            w[i] = load128(weight + c);
            shift[i] = load128(bias + c);
        }
    }
    float x[PACKS][x128::size] = {}, sum = 0.0f, squares = 0.0f, per_channel = 1.0f / C;
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        int c = (i * blockDim.x + threadIdx.x) * x128::size;
        if (row < N && c < C) {
            to_floats(x[i], a[i]);
            if (FUSED) {
                float other[x128::size];
                to_floats(other, b[i]);
                for (int k = 0; k < x128::size; k++) { x[i][k] += other[k]; }
                x128 rounded = to_pack(x[i]);
                store128cs(residual + start + c, rounded);
                to_floats(x[i], rounded);
            }
            for (int k = 0; k < x128::size; k++) { sum += x[i][k]; }
        }
    }
    float m = rowReduceSum(sum) * per_channel;
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        if ((i * blockDim.x + threadIdx.x) * x128::size < C) {
            for (int k = 0; k < x128::size; k++) {
                x[i][k] -= m;
                squares = fmaf(x[i][k], x[i][k], squares);
            }
        }
    }
    float s = rsqrtf(rowReduceSum(squares) * per_channel + EPS);
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        int c = (i * blockDim.x + threadIdx.x) * x128::size;
        if (row < N && c < C) {
            float weights[x128::size], shifts[x128::size];
            to_floats(weights, w[i]);
            to_floats(shifts, shift[i]);
            for (int k = 0; k < x128::size; k++) { x[i][k] = fmaf(x[i][k] * s, weights[k], shifts[k]); }
            store128(out + start + c, to_pack(x[i]));
        }
    }
    if (threadIdx.x == 0 && row < N) {
        mean[row] = m;
        rstd[row] = s;
    }
}

#define FORWARD5(PACKS)                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) layernorm_forward_kernel5_##PACKS(                               \
        floatX* out, float* mean, float* rstd, const floatX* inp, const floatX* weight, const floatX* bias, int N,     \
        int C) {                                                                                                       \
        normalize_row5<false, PACKS>(NULL, out, mean, rstd, inp, NULL, weight, bias, N, C);                            \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) fused_residual_forward_kernel5_##PACKS(                          \
        floatX* residual, floatX* normed, float* mean, float* rstd, const floatX* inp1, const floatX* inp2,            \
        const floatX* weight, const floatX* bias, int N, int C) {                                                      \
        normalize_row5<true, PACKS>(residual, normed, mean, rstd, inp1, inp2, weight, bias, N, C);                     \
    }
FORWARD5(3)
FORWARD5(4)

// ---------------------------------------------------------------------------------------------------------------------
// backward
// ---------------------------------------------------------------------------------------------------------------------

// dinp of one row per warp. grid ceil(N / rows), block (32, rows).
extern "C" __global__ void layernorm_backward_dinp_kernel1(floatX* dinp, const floatX* dout, const floatX* inp,
                                                           const floatX* weight, const float* mean, const float* rstd,
                                                           int N, int C) {
    int row = blockIdx.x * blockDim.y + threadIdx.y, lane = threadIdx.x;
    if (row >= N) { return; }
    i64 start = (i64)row * C;
    float m = mean[row], s = rstd[row], sum = 0.0f, sum_xhat = 0.0f;
    for (int c = lane; c < C; c += 32) {
        float dn = (float)dout[start + c] * (float)weight[c];
        sum += dn;
        sum_xhat += dn * ((float)inp[start + c] - m) * s;
    }
    float dn_mean = warpReduceSum(sum) / C, dn_xhat_mean = warpReduceSum(sum_xhat) / C;
    for (int c = lane; c < C; c += 32) {
        float dn = (float)dout[start + c] * (float)weight[c], xhat = ((float)inp[start + c] - m) * s;
        dinp[start + c] = (floatX)((float)dinp[start + c] + (dn - dn_mean - xhat * dn_xhat_mean) * s);
    }
}

// dweight, dbias of one channel per thread, down all rows. grid ceil(C / block), any block.
extern "C" __global__ void layernorm_backward_dweight_kernel1(floatG* dweight, floatG* dbias, const floatX* dout,
                                                              const floatX* inp, const float* mean, const float* rstd,
                                                              int N, int C) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) { return; }
    float dw = 0.0f, db = 0.0f;
    for (int row = 0; row < N; row++) {
        float d = (float)dout[(i64)row * C + c];
        dw += d * ((float)inp[(i64)row * C + c] - mean[row]) * rstd[row];
        db += d;
    }
    dweight[c] = (floatG)((float)dweight[c] + dw);
    dbias[c] = (floatG)((float)dbias[c] + db);
}

// partials[slice] = dweight, dbias of a slice of rows; one channel per thread. partials (slices, 2, C) f32.
// grid (ceil(C / block), slices), any block; slice_rows * slices >= N.
extern "C" __global__ void layernorm_backward_dweight_kernel2(float* partials, const floatX* dout, const floatX* inp,
                                                              const float* mean, const float* rstd, int slice_rows,
                                                              int N, int C) {
    int c = blockIdx.x * blockDim.x + threadIdx.x, begin = blockIdx.y * slice_rows;
    if (c >= C) { return; }
    float dw = 0.0f, db = 0.0f;
    for (int row = begin; row < min(begin + slice_rows, N); row++) {
        float d = (float)dout[(i64)row * C + c];
        dw += d * ((float)inp[(i64)row * C + c] - mean[row]) * rstd[row];
        db += d;
    }
    partials[(i64)blockIdx.y * 2 * C + c] = dw;
    partials[(i64)blockIdx.y * 2 * C + C + c] = db;
}

// dweight += sum over slices of partials[:,0], dbias += sum of partials[:,1]; one of the 2C sums per threadIdx.x, its
// slices dealt to the threadIdx.y. grid ceil(2*C / 32), block (32, 32).
extern "C" __global__ void __launch_bounds__(1024)
layernorm_backward_combine_kernel(floatG* dweight, floatG* dbias, const float* partials, int slices, int C) {
    __shared__ float sums[32][33];  // 33: a column's entries lie in different banks
    int column = blockIdx.x * 32 + threadIdx.x, own = blockIdx.x * 32 + threadIdx.y;
    floatG* target = own < C ? dweight + own : dbias + own - C;
    float before = threadIdx.x == 0 && own < 2 * C ? (float)*target : 0.0f;  // on its way while the sums are
    float sum = 0.0f;
    if (column < 2 * C) {
#pragma unroll 8
        for (int slice = threadIdx.y; slice < slices; slice += 32) { sum += partials[(i64)slice * 2 * C + column]; }
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    float total = warpReduceSum(sums[threadIdx.x][threadIdx.y]);  // transposed: warp y adds up column y of the block
    if (threadIdx.x == 0 && own < 2 * C) { *target = (floatG)(before + total); }
}

// target = before + values, x128::size of them; no `before` means zeros.
__device__ inline void add_sums(float* target, const float* before, const float* values) {
    for (int k = 0; k < x128::size; k += f128::size) {
        f128 sum = before ? load128(before + k) : zeros128<float>();
        for (int e = 0; e < f128::size; e++) { sum[e] += values[k + e]; }
        store128(target + k, sum);
    }
}

#define BACKWARD_PACKS (24 / x128::size)  // packs of a row that a thread holds: 24 elements, so 48 fp32 sums

// Everything in one pass. blockDim.x threads per row, blockDim.y rows at a time, over a slice of slice_rows rows.
// grid slices, slice_rows * slices >= N, slice_rows % blockDim.y == 0; block (x, y) of at most 512 threads, x a multiple
// of 32 with x * BACKWARD_PACKS >= C / x128::size; dynamic shared memory 2*C floats if y > 1; partials (slices, 2, C) f32.
extern "C" __global__ void __launch_bounds__(512)
layernorm_backward_kernel3(floatX* dinp, float* partials, const floatX* dout, const floatX* inp, const floatX* weight,
                           const float* mean, const float* rstd, int slice_rows, int N, int C) {
    extern __shared__ __align__(16) float sums[];
    int packs = C / x128::size;
    float dw[BACKWARD_PACKS][x128::size] = {}, db[BACKWARD_PACKS][x128::size] = {};
    int begin = blockIdx.x * slice_rows, end = min(begin + slice_rows, N);
    for (int first = begin; first < end; first += blockDim.y) {
        int row = first + threadIdx.y;
        i64 start = (i64)row * C;
        float m = row < end ? mean[row] : 0.0f, s = row < end ? rstd[row] : 0.0f, sum = 0.0f, sum_xhat = 0.0f;
        x128 d[BACKWARD_PACKS], x[BACKWARD_PACKS];
#pragma unroll
        for (int i = 0; i < BACKWARD_PACKS; i++) {
            int pack = i * blockDim.x + threadIdx.x;
            if (row < end && pack < packs) {
                d[i] = load128cs(dout + start + pack * x128::size);
                x[i] = load128cs(inp + start + pack * x128::size);
                x128 w = load128(weight + pack * x128::size);
                for (int k = 0; k < x128::size; k++) {
                    float dn = (float)d[i][k] * (float)w[k], xhat = ((float)x[i][k] - m) * s;
                    sum += dn;
                    sum_xhat += dn * xhat;
                    dw[i][k] += (float)d[i][k] * xhat;
                    db[i][k] += (float)d[i][k];
                }
            }
        }
        float dn_mean = rowReduceSum(sum) / C, dn_xhat_mean = rowReduceSum(sum_xhat) / C;
#pragma unroll
        for (int i = 0; i < BACKWARD_PACKS; i++) {
            int pack = i * blockDim.x + threadIdx.x;
            if (row < end && pack < packs) {
                if (sizeof(floatX) == 4) {  // these rows and the sums do not both fit the registers: once more, from L1
                    d[i] = load128(dout + start + pack * x128::size);
                    x[i] = load128(inp + start + pack * x128::size);
                }
                forget128(d[i]);
                forget128(x[i]);
                x128 w = load128(weight + pack * x128::size), dx = load128(dinp + start + pack * x128::size);
                for (int k = 0; k < x128::size; k++) {
                    float dn = (float)d[i][k] * (float)w[k], xhat = ((float)x[i][k] - m) * s;
                    dx[k] = (floatX)((float)dx[k] + (dn - dn_mean - xhat * dn_xhat_mean) * s);
                }
                store128(dinp + start + pack * x128::size, dx);
            }
        }
    }
    // add up the block's rows, one threadIdx.y after the other so that the order of additions is fixed; the last of them
    // goes to scratch
    float* partial = partials + (i64)blockIdx.x * 2 * C;
    for (int y = 0; y < blockDim.y; y++) {
        if (threadIdx.y == y) {
            float* target = y == blockDim.y - 1 ? partial : sums;
#pragma unroll
            for (int i = 0; i < BACKWARD_PACKS; i++) {
                int pack = i * blockDim.x + threadIdx.x, c = pack * x128::size;
                if (pack < packs) {
                    add_sums(target + c, y > 0 ? sums + c : NULL, dw[i]);
                    add_sums(target + C + c, y > 0 ? sums + C + c : NULL, db[i]);
                }
            }
        }
        __syncthreads();
    }
}

#define RING_PACKS 3   // packs of a row that a thread holds; llmc/cuda/layernorm.py has the same three numbers
#define RING_STAGES 2  // rows: one that is worked on, one on its way
#define RING_ARRAYS 3  // dout, inp, dinp
#define RING_THREADS 128  // of a block of layernorm_backward_kernel6, at most

// Everything in one pass; rows arrive in shared memory while earlier ones are worked on. A thread copies the packs that it
// will itself read, so the copies need no barrier; with 32 threads per row nothing else does either.
// blockDim.x threads per row, blockDim.y rows at a time; block b of the grid takes rows b * blockDim.y + y, then those
// gridDim.x * blockDim.y further on. block (x, y) of at most 512 threads, x a multiple of 32 with x * RING_PACKS >=
// C / x128::size; partials (grid, 2, C) f32; dynamic shared memory threads * RING_STAGES * RING_ARRAYS * RING_PACKS * 16.
extern "C" __global__ void __launch_bounds__(512, 1)
layernorm_backward_kernel4(floatX* dinp, float* partials, const floatX* dout, const floatX* inp, const floatX* weight,
                           const float* mean, const float* rstd, int N, int C) {
    extern __shared__ __align__(16) char memory[];
    __shared__ float2 row_sums[2][16];  // of the warps; two, so that a row needs one barrier
    int threads = blockDim.x * blockDim.y, warps = blockDim.x / 32, packs = C / x128::size;
    int rows = gridDim.x * blockDim.y, first_row = blockIdx.x * blockDim.y + threadIdx.y;
    x128* ring = reinterpret_cast<x128*>(memory) + threadIdx.y * blockDim.x + threadIdx.x;
    auto slot = [&](int stage, int array, int i) -> x128& {
        return ring[((stage * RING_ARRAYS + array) * RING_PACKS + i) * threads];
    };
    auto fetch = [&](int row, int stage) {
        i64 start = (i64)row * C;
#pragma unroll
        for (int i = 0; i < RING_PACKS; i++) {
            int pack = i * blockDim.x + threadIdx.x;
            if (row < N && pack < packs) {
                cp_async_16(&slot(stage, 0, i), dout + start + pack * x128::size, true);
                cp_async_16(&slot(stage, 1, i), inp + start + pack * x128::size, true);
                cp_async_16(&slot(stage, 2, i), dinp + start + pack * x128::size, true);
            }
        }
        cp_async_commit();
    };

    x128 w[RING_PACKS];
    float dw[RING_PACKS][x128::size] = {}, db[RING_PACKS][x128::size] = {};
#pragma unroll
    for (int i = 0; i < RING_PACKS; i++) {
        int pack = i * blockDim.x + threadIdx.x;
        w[i] = pack < packs ? load128(weight + pack * x128::size) : zeros128<floatX>();
    }
#pragma unroll
    for (int ahead = 0; ahead < RING_STAGES - 1; ahead++) { fetch(first_row + ahead * rows, ahead); }
    float next_m = first_row < N ? mean[first_row] : 0.0f, next_s = first_row < N ? rstd[first_row] : 0.0f;
    int stage = 0, turn = 0;
    for (int row = first_row; row - (int)threadIdx.y < N; row += rows) {  // the same number of rounds in all threads
        fetch(row + (RING_STAGES - 1) * rows, stage == 0 ? RING_STAGES - 1 : stage - 1);
        float m = next_m, s = next_s, sum = 0.0f, sum_xhat = 0.0f;
        if (row + rows < N) { next_m = mean[row + rows], next_s = rstd[row + rows]; }
        cp_async_wait<RING_STAGES - 1>();
        float d[x128::size], x[x128::size], weights[x128::size];
#pragma unroll
        for (int i = 0; i < RING_PACKS; i++) {
            forget128(w[i]);
            if (row < N && i * blockDim.x + threadIdx.x < packs) {
                to_floats(d, slot(stage, 0, i));
                to_floats(x, slot(stage, 1, i));
                to_floats(weights, w[i]);
                for (int k = 0; k < x128::size; k++) {
                    float dn = d[k] * weights[k], xhat = (x[k] - m) * s;
                    sum += dn;
                    sum_xhat = fmaf(dn, xhat, sum_xhat);
                    dw[i][k] = fmaf(d[k], xhat, dw[i][k]);
                    db[i][k] += d[k];
                }
            }
        }
        for (int offset = 16; offset > 0; offset /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, offset);
            sum_xhat += __shfl_xor_sync(0xffffffffu, sum_xhat, offset);
        }
        if (warps > 1) {
            if (threadIdx.x % 32 == 0) {
                row_sums[turn][threadIdx.y * warps + threadIdx.x / 32] = make_float2(sum, sum_xhat);
            }
            __syncthreads();
            sum = sum_xhat = 0.0f;
            for (int i = 0; i < warps; i++) {
                float2 part = row_sums[turn][threadIdx.y * warps + i];
                sum += part.x;
                sum_xhat += part.y;
            }
            turn ^= 1;
        }
        float dn_mean = sum / C, dn_xhat_mean = sum_xhat / C;
#pragma unroll
        for (int i = 0; i < RING_PACKS; i++) {
            int pack = i * blockDim.x + threadIdx.x;
            forget128(w[i]);
            if (row < N && pack < packs) {
                x128 once_more = slot(stage, 0, i), and_x = slot(stage, 1, i);
                forget128(once_more);
                forget128(and_x);
                to_floats(d, once_more);
                to_floats(x, and_x);
                to_floats(weights, w[i]);
                float dx[x128::size];
                to_floats(dx, slot(stage, 2, i));
                for (int k = 0; k < x128::size; k++) {
                    float xhat = (x[k] - m) * s;
                    dx[k] = fmaf(fmaf(d[k], weights[k], -dn_mean) - xhat * dn_xhat_mean, s, dx[k]);
                }
                store128(dinp + (i64)row * C + pack * x128::size, to_pack(dx));
            }
        }
        stage = stage == RING_STAGES - 1 ? 0 : stage + 1;
    }

    // add up the block's rows, in the order of threadIdx.y
    float* sums = reinterpret_cast<float*>(memory);
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < RING_PACKS; i++) {
        int pack = i * blockDim.x + threadIdx.x;
        if (pack < packs) {
            add_sums(sums + (2 * threadIdx.y) * C + pack * x128::size, NULL, dw[i]);
            add_sums(sums + (2 * threadIdx.y + 1) * C + pack * x128::size, NULL, db[i]);
        }
    }
    __syncthreads();
    for (int c = threadIdx.y * blockDim.x + threadIdx.x; c < 2 * C; c += threads) {
        float sum = 0.0f;
        for (int y = 0; y < blockDim.y; y++) { sum += sums[y * 2 * C + c]; }
        partials[(i64)blockIdx.x * 2 * C + c] = sum;
    }
}

// As 4 with fewer instructions: what lies outside is copied as zeros, which no sum notices, instead of being branched
// around; dn and xhat stay in registers until the row's means are there. Two blocks of a multiprocessor may have 255
// registers a thread. Grid, rows and partials as in 4; block (x, y) of at most RING_THREADS threads, x a multiple of 32
// with x * PACKS >= C / x128::size. PACKS as in forward 5: more bytes are on their way where fewer threads are idle.
template <int PACKS>
__device__ inline void backward6(x128 (*ring)[RING_ARRAYS][PACKS][RING_THREADS], floatX* dinp, float* partials,
                                 const floatX* dout, const floatX* inp, const floatX* weight, const float* mean,
                                 const float* rstd, int N, int C) {
    __shared__ float2 row_sums[2][RING_THREADS / 32];  // of the warps; two, so that a row needs one barrier
    int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x, warps = blockDim.x / 32;
    int rows = gridDim.x * blockDim.y, first_row = blockIdx.x * blockDim.y + threadIdx.y;
    int column = threadIdx.x * x128::size, step = blockDim.x * x128::size;  // of the first pack; to the next one
    auto fetch = [&](int row, int stage) {
#pragma unroll
        for (int i = 0; i < PACKS; i++) {
            i64 at = (i64)row * C + column + i * step;
            bool inside = row < N && column + i * step < C;
            cp_async_16(&ring[stage][0][i][thread], dout + at, inside);
            cp_async_16(&ring[stage][1][i][thread], inp + at, inside);
            cp_async_16(&ring[stage][2][i][thread], dinp + at, inside);
        }
        cp_async_commit();
    };
    fetch(first_row, 0);
    float w[PACKS][x128::size] = {}, dw[PACKS][x128::size] = {}, db[PACKS][x128::size] = {};
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        if (column + i * step < C) { to_floats(w[i], load128(weight + column + i * step)); }
    }
    float next_m = first_row < N ? mean[first_row] : 0.0f, next_s = first_row < N ? rstd[first_row] : 0.0f;
    float per_channel = 1.0f / C;
    int stage = 0;
    for (int row = first_row; row - (int)threadIdx.y < N; row += rows) {  // the same number of rounds in all threads
        fetch(row + rows, stage ^ 1);
        float m = next_m, s = next_s, sum = 0.0f, sum_xhat = 0.0f;
        if (row + rows < N) { next_m = mean[row + rows], next_s = rstd[row + rows]; }
        cp_async_wait<1>();
        float dn[PACKS][x128::size], xhat[PACKS][x128::size];
#pragma unroll
        for (int i = 0; i < PACKS; i++) {
            x128 dout_pack = ring[stage][0][i][thread], inp_pack = ring[stage][1][i][thread];
            float d[x128::size];
            to_floats(d, dout_pack);
            to_floats(xhat[i], inp_pack);
            for (int k = 0; k < x128::size; k++) {
                dn[i][k] = d[k] * w[i][k];
                xhat[i][k] = (xhat[i][k] - m) * s;
                sum += dn[i][k];
                sum_xhat = fmaf(dn[i][k], xhat[i][k], sum_xhat);
                dw[i][k] = fmaf(d[k], xhat[i][k], dw[i][k]);
                db[i][k] += d[k];
            }
        }
        sum = warpReduceSum(sum);
        sum_xhat = warpReduceSum(sum_xhat);
        if (warps > 1) {
            if (threadIdx.x % 32 == 0) { row_sums[stage][thread / 32] = make_float2(sum, sum_xhat); }
            __syncthreads();
            sum = sum_xhat = 0.0f;
#pragma unroll 1
            for (int i = 0; i < warps; i++) {
                float2 part = row_sums[stage][threadIdx.y * warps + i];
                sum += part.x;
                sum_xhat += part.y;
            }
        }
        float dn_mean = sum * per_channel, dn_xhat_mean = sum_xhat * per_channel;
#pragma unroll
        for (int i = 0; i < PACKS; i++) {
            x128 dinp_pack = ring[stage][2][i][thread];
            float dx[x128::size];
            to_floats(dx, dinp_pack);
            for (int k = 0; k < x128::size; k++) {
                dx[k] = fmaf(dn[i][k] - dn_mean - xhat[i][k] * dn_xhat_mean, s, dx[k]);
            }
            if (row < N && column + i * step < C) {
                store128(dinp + (i64)row * C + column + i * step, to_pack(dx));
            }
        }
        stage ^= 1;
    }

    // add up the block's rows, in the order of threadIdx.y
    float* sums = reinterpret_cast<float*>(ring);
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        int c = column + i * step;
        if (c < C) {
            add_sums(sums + 2 * threadIdx.y * C + c, NULL, dw[i]);
            add_sums(sums + 2 * threadIdx.y * C + C + c, NULL, db[i]);
        }
    }
    __syncthreads();
    for (int c = thread * f128::size; c < 2 * C; c += threads * f128::size) {
        f128 sum = zeros128<float>();
#pragma unroll 4
        for (int y = 0; y < blockDim.y; y++) {
            f128 row_sum = load128(sums + 2 * y * C + c);
            for (int k = 0; k < f128::size; k++) { sum[k] += row_sum[k]; }
        }
        store128(partials + (i64)blockIdx.x * 2 * C + c, sum);
    }
}

extern "C" __global__ void __launch_bounds__(RING_THREADS, 2)
layernorm_backward_kernel6_3(floatX* dinp, float* partials, const floatX* dout, const floatX* inp, const floatX* weight,
                             const float* mean, const float* rstd, int N, int C) {
    __shared__ x128 ring[RING_STAGES][RING_ARRAYS][3][RING_THREADS];
    backward6<3>(ring, dinp, partials, dout, inp, weight, mean, rstd, N, C);
}

// Dynamic shared memory sizeof(ring): 48 KiB, more than all that may be static. Where it can be the kernel is 3 % faster.
extern "C" __global__ void __launch_bounds__(RING_THREADS, 2)
layernorm_backward_kernel6_4(floatX* dinp, float* partials, const floatX* dout, const floatX* inp, const floatX* weight,
                             const float* mean, const float* rstd, int N, int C) {
    extern __shared__ x128 dynamic_ring[];
    auto ring = reinterpret_cast<x128(*)[RING_ARRAYS][4][RING_THREADS]>(dynamic_ring);
    backward6<4>(ring, dinp, partials, dout, inp, weight, mean, rstd, N, C);
}

#define SLICES_AHEAD 9  // slices that a thread adds up: 264 are dealt to 32; llmc/cuda/layernorm.py has the same number

// dweight += sum over slices of partials[:,0], dbias += sum of partials[:,1]; a pack of the 2C sums per threadIdx.x, its
// slices dealt to the threadIdx.y. All loads are under way before the first is waited for: hence the second launch bound,
// without which ptxas saves registers. grid 2*C / 16, block (4, 32); slices <= 32 * SLICES_AHEAD.
extern "C" __global__ void __launch_bounds__(128, 1)
layernorm_backward_combine_kernel6(floatG* dweight, floatG* dbias, const float* partials, int slices, int C) {
    __shared__ __align__(16) float sums[32][16];
    int thread = threadIdx.y * 4 + threadIdx.x, own = blockIdx.x * 16 + thread;
    int column = blockIdx.x * 16 + threadIdx.x * f128::size;
    floatG* target = own < C ? dweight + own : dbias + own - C;
    floatG before = thread < 16 ? *target : (floatG)0.0f;
    f128 parts[SLICES_AHEAD], sum = zeros128<float>();
#pragma unroll
    for (int a = 0; a < SLICES_AHEAD; a++) {
        int slice = threadIdx.y + 32 * a;
        parts[a] = slice < slices ? load128(partials + (i64)slice * 2 * C + column) : zeros128<float>();
    }
#pragma unroll
    for (int a = 0; a < SLICES_AHEAD; a++) {
        for (int k = 0; k < f128::size; k++) { sum[k] += parts[a][k]; }
    }
    store128(sums[threadIdx.y] + threadIdx.x * f128::size, sum);
    __syncthreads();
    if (thread < 16) {
        float total = 0.0f;
        for (int y = 0; y < 32; y++) { total += sums[y][thread]; }
        *target = (floatG)((float)before + total);
    }
}
