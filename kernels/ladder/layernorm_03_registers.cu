// LayerNorm, and the residual add fused with it, rung 3: the row stays in registers.
//
// Idea        A row is read once, in 16-byte packs, and waits in the registers of as many warps as it takes to hold it, so
//             that any width fits.
// Prediction  None was written down. 2 NC forward and 4 NC fused are 27 and 51 us at the speed of a copy of as many bytes.
// Measured    Forward 32.0 us (86.2 % of copy speed), fused 57.6 us (88.8 %). H200, B=32, T=1024, C=768, bf16, 2026-11-26.
// Lesson      What is left are conversions of one element at a time, and blocks of 256 threads, of which all wait for a
//             reduction at once. Rungs 4 and 5 are kernels/layernorm.cu: 29.8 and 55.1 us.
//
// FORWARD_PACKS, the packs of a row that a thread holds, is that of llmc/cuda/ladder/layernorm.py.
//
// The formulas and the arrays stand in kernels/layernorm.cu.
#include "common.cuh"

#define EPS 1e-5f

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
#pragma unroll 4
    for (int w = 0; w < warps; w++) { sum += partial[threadIdx.y * warps + w]; }
    return sum;
}

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
layernorm_forward_registers(floatX* out, float* mean, float* rstd, const floatX* inp, const floatX* weight,
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

// As layernorm_forward_registers; both inputs are read once and the residual is written once.
extern "C" __global__ void __launch_bounds__(1024)
fused_residual_forward_registers(floatX* residual, floatX* normed, float* mean, float* rstd, const floatX* inp1,
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
