// LayerNorm, the residual add and the gradient of LayerNorm, rung 1: the formulas as they stand.
//
// Idea        Forward, one thread per row. Residual add, one thread per element. Backward, one warp per row for dx, one
//             thread per channel, down all rows, for dw and db.
// Prediction  None was written down. Copies of as many bytes take 27 us forward, 51 backward, 40 for the residual add.
// Measured    Forward 650 us (4 % of copy speed), residual add 79 us (51 %), backward 7912 us (0.7 %). H200, B=32, T=1024, C=768, bf16,
//             2026-11-24.
// Lesson      Forward, neighbouring threads read addresses that are 2C bytes apart. Backward, 768 threads of a whole GPU add
//             up 32768 rows each. See layernorm_02_warp_per_row.cu and layernorm_02_slices.cu.
//
// The formulas and the arrays stand in kernels/layernorm.cu.
#include "common.cuh"

#define EPS 1e-5f

// One thread per row. grid ceil(N / block), any block.
extern "C" __global__ void layernorm_forward_naive(floatX* out, float* mean, float* rstd, const floatX* inp,
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

// One thread per element. grid ceil(elements / block), any block.
extern "C" __global__ void residual_forward_naive(floatX* out, const floatX* inp1, const floatX* inp2, i64 elements) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < elements) { out[i] = (floatX)((float)inp1[i] + (float)inp2[i]); }
}

// dinp of one row per warp. grid ceil(N / rows), block (32, rows).
extern "C" __global__ void layernorm_backward_dinp_naive(floatX* dinp, const floatX* dout, const floatX* inp,
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
extern "C" __global__ void layernorm_backward_dweight_naive(floatG* dweight, floatG* dbias, const floatX* dout,
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
