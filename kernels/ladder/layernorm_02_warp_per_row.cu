// LayerNorm, and the residual add fused with it, rung 2: one warp per row.
//
// Idea        The lanes of a warp read neighbouring elements, and shuffles add up what they have. The fused kernel writes the
//             residual, and reads it back for the variance and the output.
// Prediction  None was written down.
// Measured    Forward 48.0 us (60 % of copy speed; 4 NC moved). Fused 98.0 us (53 %; 6 NC moved), more than the 73.4 us of
//             two launches, which is what the reading back costs. H200, B=32, T=1024, C=768, bf16, 2026-11-24.
// Lesson      The row is read two or three times, 2 bytes a lane: see layernorm_03_registers.cu.
//
// The formulas and the arrays stand in kernels/layernorm.cu.
#include "common.cuh"

#define EPS 1e-5f

// One warp per row, 32 neighbouring elements at a time. grid ceil(N / rows), block (32, rows).
extern "C" __global__ void layernorm_forward_warp_per_row(floatX* out, float* mean, float* rstd, const floatX* inp,
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

// One warp per row. grid ceil(N / rows), block (32, rows). A lane reads back only what it wrote itself.
extern "C" __global__ void fused_residual_forward_warp_per_row(floatX* residual, floatX* normed, float* mean, float* rstd,
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
