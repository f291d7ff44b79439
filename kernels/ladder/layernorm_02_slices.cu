// The gradient of LayerNorm, rung 2: dw and db summed by many blocks.
//
// Idea        Each block sums dw and db of a slice of rows, one channel per thread, and leaves fp32 partial sums, which a
//             second kernel adds up in the order of the slices. dx is that of rung 1, one warp per row.
// Prediction  None was written down. 7 NC are 83 us at copy speed.
// Measured    768 us (7 % of copy speed). H200, B=32, T=1024, C=768, bf16, 2026-11-24.
// Lesson      dout and inp come from memory twice, 2 bytes a thread. Rung 3 does all in one pass: 108 us (50 %), and is in
//             production for rows too wide for rung 6 (kernels/layernorm.cu). Rung 4, which is gone, had the next row on its
//             way into shared memory: 60.1 us (85.9 %); rung 6 does so without branches: 57.5 us (89.9 %).
//
// The formulas and the arrays stand in kernels/layernorm.cu.
#include "common.cuh"

#define EPS 1e-5f

// dinp of one row per warp. grid ceil(N / rows), block (32, rows).
extern "C" __global__ void layernorm_backward_dinp_slices(floatX* dinp, const floatX* dout, const floatX* inp,
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

// partials[slice] = dweight, dbias of a slice of rows; one channel per thread. partials (slices, 2, C) f32.
// grid (ceil(C / block), slices), any block; slice_rows * slices >= N.
extern "C" __global__ void layernorm_backward_dweight_slices(float* partials, const floatX* dout, const floatX* inp,
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
layernorm_backward_combine(floatG* dweight, floatG* dbias, const float* partials, int slices, int C) {
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
