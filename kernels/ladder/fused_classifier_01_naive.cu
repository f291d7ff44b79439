// Softmax, cross-entropy and their gradient, rung 1: one thread per row.
//
// Idea        Each thread sweeps its row three times: for the maximum, for the sum, for the gradient.
// Prediction  None was written down. 4 N V elements are 3.1 ms at copy speed.
// Measured    38353 us (4 % of copy speed). H200, B=32, T=1024, V=50257, bf16, 2026-11-24.
// Lesson      Neighbouring threads read addresses that are 2 Vp bytes apart: see fused_classifier_02_block_per_row.cu.
//
// The formula, the arrays and what may be assumed of them stand in kernels/fused_classifier.cu.
#include "common.cuh"

// One thread per row. grid ceil(N / block), any block.
extern "C" __global__ void fused_classifier_naive(floatX* logits, float* losses, const int* targets, float dloss, int N,
                                                    int V, int Vp, int write_dlogits) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= N) { return; }
    floatX* x = logits + (i64)row * Vp;
    int target = targets[row];
    float top = -INFINITY;
    for (int v = 0; v < V; v++) { top = fmaxf(top, (float)x[v]); }
    double total = 0.0;  // one thread adds V terms, which in float would cost it four digits
    for (int v = 0; v < V; v++) { total += expf((float)x[v] - top); }
    float sum = (float)total;
    losses[row] += logf(sum) - ((float)x[target] - top);
    if (!write_dlogits) { return; }
    float scale = dloss / sum;
    for (int v = 0; v < V; v++) {
        x[v] = (floatX)(expf((float)x[v] - top) * scale - (v == target ? dloss : 0.0f));
    }
}
