// The sum of squares of a flat array, rung 1: one block.
//
// Idea        One block of 1024 threads walks the whole array and adds up in a fixed order: nothing else is needed.
// Prediction  None was written down. One of 132 multiprocessors works, so more than a hundred times what a copy takes.
// Measured    44322 us for 124 M values of bf16 (0.1 % of copy speed). H200, 2026-11-24.
// Lesson      The work has to reach all multiprocessors: see global_norm_02_many_blocks.cu.
#include "common.cuh"

// out[0] = sum of squares. grid 1, block a multiple of 32 up to 1024.
extern "C" __global__ void global_norm_squared_one_block(float* out, const floatX* values, i64 N) {
    double sum = 0.0;  // a thread adds many thousand terms, which in float would cost it four digits
    for (i64 i = threadIdx.x; i < N; i += blockDim.x) { sum += (float)values[i] * (float)values[i]; }
    float total = blockReduceSum((float)sum);
    if (threadIdx.x == 0) { out[0] = total; }
}
