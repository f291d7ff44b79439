// The sum of squares of a flat array, rung 2: many blocks, whose sums a second kernel adds.
//
// Idea        Up to 1024 blocks visit the array element by element and leave a partial sum each; one block adds those up.
//             The number of blocks depends on N alone, so that the bits are the same on every GPU.
// Prediction  None was written down.
// Measured    197 us for 124 M values of bf16 (33 % of copy speed). H200, 2026-11-24.
// Lesson      2 bytes a thread keep too few bytes on their way. In 16-byte packs (rung 3, which is gone) it took 71.5 us
//             (91 %), and with four packs of a thread really on their way 70.2 us: kernels/global_norm.cu.
#include "common.cuh"

// partials[block] = sum of squares of the elements this block visits. Any grid; block a multiple of 32 up to 1024.
extern "C" __global__ void global_norm_squared_many_blocks(float* partials, const floatX* values, i64 N) {
    float sum = 0.0f;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < N; i += (i64)gridDim.x * blockDim.x) {
        sum += (float)values[i] * (float)values[i];
    }
    sum = blockReduceSum(sum);
    if (threadIdx.x == 0) { partials[blockIdx.x] = sum; }
}

// out[0] = sum of partials[0..count). grid 1, block a multiple of 32 up to 1024.
extern "C" __global__ void global_norm_combine(float* out, const float* partials, int count) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) { sum += partials[i]; }
    sum = blockReduceSum(sum);
    if (threadIdx.x == 0) { out[0] = sum; }
}
