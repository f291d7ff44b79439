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
// llm.c's kernels 6 and 10 keep the row or the partial sums in shared memory, which caps C at some 10,000 and 4096. Here a
// row is spread over the registers of as many warps as it needs. In 16 bits the narrow kernels take C up to 8192 forward and
// 4096 backward, the wide ones 24576 and 12288; in fp32 it is half of that, but for 12288 backward.
//
// The sizes come from llmc/cuda/layernorm.py:
//   PACKS (16-byte packs of a row that a thread holds: 3, or 4 where fewer threads idle then), FORWARD_BLOCK (threads),
//   WIDE_PACKS, WIDE_BLOCK, WIDE_ELEMENTS, WIDE_BACKWARD_BLOCK (the same of the wide kernels), RING_STAGES and RING_BLOCK
//   (rows in the ring of the backward kernel, one worked on and one on its way; its threads), SLICES_AHEAD.
//
// Bytes moved in units of sizeof(floatX), reads that L1 or L2 answers counted. Measured on an H200, B=32, T=1024, C=768,
// bf16, us (% of the speed of a copy of as many bytes in the same run). Goal of each direction: 88 %. Rungs without "this
// file" are ladder/layernorm_0N_*.cu.
// op                     | rung | idea                                                      | moved | measured
// layernorm_forward      | 1    | thread per row                                            | 4 NC  | 650 (4 %)
// layernorm_forward      | 2    | warp per row, lanes read neighbouring elements            | 4 NC  | 48.0 (60 %)
// layernorm_forward      | 3    | row stays in registers as 16-byte packs: read once        | 2 NC  | 32.0 (86.2 %)
// layernorm_forward      | 4    | 3 with conversions in pairs, in blocks of two warps: some | 2 NC  | 30.8 (89.7 %)
//                        |      | load while others reduce. This file, for wide rows        |       |
// layernorm_forward      | 5    | 4 with the weights loaded beside the row; no divisions.   | 2 NC  | 29.8 (92.5 %)
//                        |      | This file                                                 |       |
// residual_forward       | 1    | thread per element                                        | 3 NC  | 79.1 (51 %)
// residual_forward       | 2    | thread per 16 bytes. This file                            | 3 NC  | 41.9 (97 %)
// fused_residual_forward | 1    | residual_forward, then layernorm_forward: two launches    | 5 NC  | 73.4 (71 %)
// fused_residual_forward | 2    | warp per row, residual written and read back              | 6 NC  | 98.0 (53 %)
// fused_residual_forward | 3    | as layernorm_forward 3, sum of both inputs in registers   | 4 NC  | 57.6 (88.8 %)
// fused_residual_forward | 4, 5 | as layernorm_forward 4 and 5. This file                   | 4 NC  | 55.1 (92.8 %) both
// layernorm_backward     | 1    | warp per row for dx; thread per channel for dw, db        | 7 NC  | 7912 (0.7 %)
// layernorm_backward     | 2    | the same dx; dw, db by many blocks, a slice of rows each, | 7 NC  | 768 (7 %)
//                        |      | fp32 partial sums added by a second kernel                |       |
// layernorm_backward     | 3    | one pass: warps walk rows, dw and db wait in registers    | 4 NC  | 108 (50 %)
//                        |      | until the slice ends. This file, for wide rows            |       |
// layernorm_backward     | 6    | the next row on its way into shared memory, no branches,  | 4 NC  | 57.5 (89.9 %),
//                        |      | the partial sums added after one wait. This file          |       | as predicted
// Figures with a decimal of a percent are of 2026-11-26, the others of 2026-11-24, when a call took some 2 us more.
// Forward 5 and fused 5 have each other's bits, not those of 4: the public functions change together.
//
// Source: llm.c llmc/layernorm.cuh; Ba et al. 2016, arXiv:1607.06450.
#include "ptx.cuh"

#define EPS 1e-5f
#define RING_ARRAYS 3  // dout, inp, dinp
static_assert(RING_STAGES == 2, "the backward kernel goes back and forth between two stages");
static_assert(FORWARD_BLOCK <= 1024 && WIDE_BLOCK <= 1024 && RING_BLOCK <= 1024, "rowReduceSum has 32 places for warps");

// ---------------------------------------------------------------------------------------------------------------------
// forward
// ---------------------------------------------------------------------------------------------------------------------

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
#pragma unroll 4  // by 16, which the compiler prefers, the loop is a quarter of layernorm_forward_kernel
    for (int w = 0; w < warps; w++) { sum += partial[threadIdx.y * warps + w]; }
    return sum;
}

// One row, of LayerNorm alone or of the sum of two arrays (FUSED). A thread holds PACKS packs of the row in registers. The
// weights come with the row: loaded where they are used, each pack would wait for the store of the pack before, which for
// all the compiler knows changes weights.
// blockDim.x threads per row, blockDim.y rows per block. grid ceil(N / blockDim.y); blockDim.x a multiple of 32 with
// blockDim.x * PACKS >= C / x128::size; up to FORWARD_BLOCK threads.
template <bool FUSED>
__device__ inline void normalize_row(floatX* residual, floatX* out, float* mean, float* rstd, const floatX* inp1,
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

extern "C" __global__ void __launch_bounds__(FORWARD_BLOCK)
layernorm_forward_kernel(floatX* out, float* mean, float* rstd, const floatX* inp, const floatX* weight,
                         const floatX* bias, int N, int C) {
    normalize_row<false>(NULL, out, mean, rstd, inp, NULL, weight, bias, N, C);
}

extern "C" __global__ void __launch_bounds__(FORWARD_BLOCK)
fused_residual_forward_kernel(floatX* residual, floatX* normed, float* mean, float* rstd, const floatX* inp1,
                              const floatX* inp2, const floatX* weight, const floatX* bias, int N, int C) {
    normalize_row<true>(residual, normed, mean, rstd, inp1, inp2, weight, bias, N, C);
}

// The same for rows that take more than FORWARD_BLOCK threads. The weights are loaded where they are used, so that there are
// registers for WIDE_BLOCK threads; the bits are not those of the narrow kernels, as sums are divided by C.
// blockDim.x threads per row, blockDim.y rows per block. grid ceil(N / blockDim.y); blockDim.x a multiple of 32 with
// blockDim.x * WIDE_PACKS >= C / x128::size; up to WIDE_BLOCK threads.
template <bool FUSED>
__device__ inline void normalize_wide_row(floatX* residual, floatX* out, float* mean, float* rstd, const floatX* inp1,
                                     const floatX* inp2, const floatX* weight, const floatX* bias, int N, int C) {
    int row = blockIdx.x * blockDim.y + threadIdx.y, packs = C / x128::size;
    i64 start = (i64)row * C;
    x128 a[WIDE_PACKS], b[WIDE_PACKS];
#pragma unroll
    for (int i = 0; i < WIDE_PACKS; i++) {
        int pack = i * blockDim.x + threadIdx.x;
        if (row < N && pack < packs) {
            a[i] = load128cs(inp1 + start + pack * x128::size);
            if (FUSED) { b[i] = load128cs(inp2 + start + pack * x128::size); }
        }
    }
    float x[WIDE_PACKS][x128::size] = {}, sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < WIDE_PACKS; i++) {
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
    for (int i = 0; i < WIDE_PACKS; i++) {
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
    for (int i = 0; i < WIDE_PACKS; i++) {
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

extern "C" __global__ void __launch_bounds__(WIDE_BLOCK)
layernorm_forward_wide_kernel(floatX* out, float* mean, float* rstd, const floatX* inp, const floatX* weight,
                          const floatX* bias, int N, int C) {
    normalize_wide_row<false>(NULL, out, mean, rstd, inp, NULL, weight, bias, N, C);
}

extern "C" __global__ void __launch_bounds__(WIDE_BLOCK)
fused_residual_forward_wide_kernel(floatX* residual, floatX* normed, float* mean, float* rstd, const floatX* inp1,
                               const floatX* inp2, const floatX* weight, const floatX* bias, int N, int C) {
    normalize_wide_row<true>(residual, normed, mean, rstd, inp1, inp2, weight, bias, N, C);
}

// ---------------------------------------------------------------------------------------------------------------------
// residual add
// ---------------------------------------------------------------------------------------------------------------------

// One thread per 16 bytes. grid ceil(elements / x128::size / block); elements % x128::size == 0.
extern "C" __global__ void residual_forward_kernel(floatX* out, const floatX* inp1, const floatX* inp2, i64 elements) {
    i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * x128::size;
    if (i >= elements) { return; }
    x128 a = load128cs(inp1 + i), b = load128cs(inp2 + i);
    for (int k = 0; k < x128::size; k++) { a[k] = (floatX)((float)a[k] + (float)b[k]); }
    store128(out + i, a);
}

// ---------------------------------------------------------------------------------------------------------------------
// backward
// ---------------------------------------------------------------------------------------------------------------------

// target = before + values, x128::size of them; no `before` means zeros.
__device__ inline void add_sums(float* target, const float* before, const float* values) {
    for (int k = 0; k < x128::size; k += f128::size) {
        f128 sum = before ? load128(before + k) : zeros128<float>();
        for (int e = 0; e < f128::size; e++) { sum[e] += values[k + e]; }
        store128(target + k, sum);
    }
}

// Everything in one pass; the next row arrives in the ring in shared memory while one is worked on. A thread copies the
// packs that it will itself read, so the copies need no barrier; with 32 threads per row nothing else does either. What lies
// outside of the array is copied as zeros, which no sum notices. dn and xhat stay in registers until the means of the row are
// there: two blocks of a multiprocessor may have 255 registers a thread.
// blockDim.x threads per row, blockDim.y rows at a time; block b of the grid takes rows b * blockDim.y + y, then those
// gridDim.x * blockDim.y further on. block (x, y) of up to RING_BLOCK threads, x a multiple of 32 with x * PACKS >=
// C / x128::size; partials (grid, 2, C) f32: dw and db of the rows of a block.
__device__ inline void backward_rows(x128 (*ring)[RING_ARRAYS][PACKS][RING_BLOCK], floatX* dinp, float* partials,
                                     const floatX* dout, const floatX* inp, const floatX* weight, const float* mean,
                                     const float* rstd, int N, int C) {
    __shared__ float2 row_sums[2][RING_BLOCK / 32];  // of the warps; two, so that a row needs one barrier
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

extern "C" __global__ void __launch_bounds__(RING_BLOCK, 2)
layernorm_backward_kernel(floatX* dinp, float* partials, const floatX* dout, const floatX* inp, const floatX* weight,
                          const float* mean, const float* rstd, int N, int C) {
#if RING_STAGES * RING_ARRAYS * PACKS * RING_BLOCK * 16 < 48 * 1024
    __shared__ x128 ring[RING_STAGES][RING_ARRAYS][PACKS][RING_BLOCK];
#else  // more than may be static; where it can be static the kernel is 3 % faster
    extern __shared__ x128 dynamic_ring[];
    auto ring = reinterpret_cast<x128(*)[RING_ARRAYS][PACKS][RING_BLOCK]>(dynamic_ring);
#endif
    backward_rows(ring, dinp, partials, dout, inp, weight, mean, rstd, N, C);
}

// dweight += sum over slices of partials[:,0], dbias += sum of partials[:,1]; a pack of the 2C sums per threadIdx.x, its
// slices dealt to the threadIdx.y, SLICES_AHEAD to each. All loads are on their way before the first is waited for: hence
// the second launch bound, without which ptxas saves registers. grid 2*C / 16, block (4, 32); slices <= 32 * SLICES_AHEAD.
extern "C" __global__ void __launch_bounds__(128, 1)
layernorm_backward_combine_kernel(floatG* dweight, floatG* dbias, const float* partials, int slices, int C) {
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

// ---------------------------------------------------------------------------------------------------------------------
// backward of wide rows
// ---------------------------------------------------------------------------------------------------------------------

#define BACKWARD_PACKS (WIDE_ELEMENTS / x128::size)  // packs of a row that a thread holds, with two fp32 sums an element
static_assert(WIDE_ELEMENTS % x128::size == 0, "whole packs");

// The same for rows that take more than RING_BLOCK threads: warps walk the rows of a slice, whose packs they load when they
// need them, and dw and db wait in registers until the slice ends.
// blockDim.x threads per row, blockDim.y rows at a time, over a slice of slice_rows rows. grid slices, slice_rows * slices
// >= N, slice_rows % blockDim.y == 0; block (x, y) of up to WIDE_BACKWARD_BLOCK threads, x a multiple of 32 with
// x * BACKWARD_PACKS >= C / x128::size; dynamic shared memory 2*C floats if y > 1; partials (slices, 2, C) f32.
extern "C" __global__ void __launch_bounds__(WIDE_BACKWARD_BLOCK)
layernorm_backward_wide_kernel(floatX* dinp, float* partials, const floatX* dout, const floatX* inp,
                               const floatX* weight, const float* mean, const float* rstd, int slice_rows, int N, int C) {
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

// dweight += sum over slices of partials[:,0], dbias += sum of partials[:,1]; one of the 2C sums per threadIdx.x, its
// slices dealt to the threadIdx.y. grid ceil(2*C / 32), block (32, 32).
extern "C" __global__ void __launch_bounds__(1024)
layernorm_backward_wide_combine_kernel(floatG* dweight, floatG* dbias, const float* partials, int slices, int C) {
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
