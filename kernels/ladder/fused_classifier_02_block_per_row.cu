// Softmax, cross-entropy and their gradient, rung 2: one block per row.
//
// Idea        The threads of a block read neighbouring elements, in the same three sweeps.
// Prediction  None was written down. 4 N V elements are 3.1 ms at copy speed.
// Measured    5685 us (28 % of copy speed). H200, B=32, T=1024, V=50257, bf16, 2026-11-24.
// Lesson      Three sweeps of 2 bytes a thread: see fused_classifier_03_online.cu, two sweeps of 16 bytes a thread.
//
// The formula, the arrays and what may be assumed of them stand in kernels/fused_classifier.cu.
#include "common.cuh"

// One block per row. grid N, block a multiple of 32 up to 1024.
extern "C" __global__ void fused_classifier_block_per_row(floatX* logits, float* losses, const int* targets, float dloss, int N,
                                                    int V, int Vp, int write_dlogits) {
    int row = blockIdx.x, target = targets[row];
    floatX* x = logits + (i64)row * Vp;
    float top = -INFINITY;
    for (int v = threadIdx.x; v < V; v += blockDim.x) { top = fmaxf(top, (float)x[v]); }
    top = blockReduceMax(top);
    float sum = 0.0f;
    for (int v = threadIdx.x; v < V; v += blockDim.x) { sum += expf((float)x[v] - top); }
    sum = blockReduceSum(sum);
    if (threadIdx.x == 0) { losses[row] += logf(sum) - ((float)x[target] - top); }
    if (!write_dlogits) { return; }
    __syncthreads();  // thread 0 has read the target's logit
    float scale = dloss / sum;
    for (int v = threadIdx.x; v < V; v += blockDim.x) {
        x[v] = (floatX)(expf((float)x[v] - top) * scale - (v == target ? dloss : 0.0f));
    }
}
