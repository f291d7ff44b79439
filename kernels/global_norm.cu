// The sum of squares of a flat array: the square of the gradient's global norm.
//
//   out[0] = sum of values[i]^2
//
//   values (N,) floatX    out (1,) f32 written    scratch f32, one partial sum per block
//
// llm.c's grid follows the number of multiprocessors. Here grid and block depend on N alone, so that a checkpoint continues
// with the same bits on another GPU. Partial sums go through memory to a second, one-block kernel: no atomics.
//
// measured on an H200, 124 M values of bf16, microseconds (% of the speed of a copy of as many bytes in the same run;
// 3 and 4 on 2026-11-26):
// version                | idea                                             | bytes moved | measured
// global_norm_squared 1  | one block walks the array                        | N           | 44322 (0.1 %)
// global_norm_squared 2  | up to 1024 blocks, element by element; then one  | N           | 197 (33 %)
// global_norm_squared 3  | the same in 16-byte packs                        | N           | 71.5 (90.8 %)
// global_norm_squared 4  | four packs of a thread really under way at once; | N           | 70.2 (92.5 %),
//                        | the last kernel's threads load once each         |             | predicted 0.95 x 3
// In 3, ptxas checks the end of the array after each pack, so that one load of a thread is under way (seen in SASS): 62
// warps of a multiprocessor x 512 bytes = 32 KB, just about what 4.3 TB/s x 0.8 us / 132 take.
//
// Source: llm.c llmc/global_norm.cuh (global_norm_squared_kernel, global_norm_aggregate_kernel).
#include "common.cuh"

// out[0] = sum of squares. grid 1, block a multiple of 32 up to 1024.
extern "C" __global__ void global_norm_squared_kernel1(float* out, const floatX* values, i64 N) {
    double sum = 0.0;  // a thread adds many thousand terms, which in float would cost it four digits
    for (i64 i = threadIdx.x; i < N; i += blockDim.x) { sum += (float)values[i] * (float)values[i]; }
    float total = blockReduceSum((float)sum);
    if (threadIdx.x == 0) { out[0] = total; }
}

// partials[block] = sum of squares of the elements this block visits. Any grid; block a multiple of 32 up to 1024.
extern "C" __global__ void global_norm_squared_kernel2(float* partials, const floatX* values, i64 N) {
    float sum = 0.0f;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < N; i += (i64)gridDim.x * blockDim.x) {
        sum += (float)values[i] * (float)values[i];
    }
    sum = blockReduceSum(sum);
    if (threadIdx.x == 0) { partials[blockIdx.x] = sum; }
}

// The same in 16-byte packs; the last N % x128::size elements go to the first threads.
// The optimiser reads the array next: default caching, so that its end is still in L2.
extern "C" __global__ void global_norm_squared_kernel3(float* partials, const floatX* values, i64 N) {
    i64 first = (i64)blockIdx.x * blockDim.x + threadIdx.x, stride = (i64)gridDim.x * blockDim.x;
    i64 packs = N / x128::size, ragged = packs * x128::size + first;
    float sum = ragged < N ? (float)values[ragged] * (float)values[ragged] : 0.0f;
#pragma unroll 4
    for (i64 i = first; i < packs; i += stride) {
        x128 pack = load128(values + i * x128::size);
        for (int k = 0; k < x128::size; k++) { sum += (float)pack[k] * (float)pack[k]; }
    }
    sum = blockReduceSum(sum);
    if (threadIdx.x == 0) { partials[blockIdx.x] = sum; }
}

#define AHEAD 4  // packs of a thread under way: 16 of its 32 registers (sm_90)

// The same with AHEAD loads before the first sum. grid up to 1024 blocks of 256 threads: 132 multiprocessors hold 1056.
extern "C" __global__ void __launch_bounds__(256)
global_norm_squared_kernel4(float* partials, const floatX* values, i64 N) {
    i64 first = (i64)blockIdx.x * blockDim.x + threadIdx.x, stride = (i64)gridDim.x * blockDim.x;
    i64 packs = N / x128::size, ragged = packs * x128::size + first;
    float sum = ragged < N ? (float)values[ragged] * (float)values[ragged] : 0.0f;
    for (i64 i = first; i < packs; i += AHEAD * stride) {
        int4 bits[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            bits[a] = make_int4(0, 0, 0, 0);
            if (i + a * stride < packs) { bits[a] = bits128(load128(values + (i + a * stride) * x128::size)); }
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            float x[x128::size], squares = 0.0f;
            to_floats(x, unpack128<floatX>(bits[a]));
            for (int k = 0; k < x128::size; k++) { squares = fmaf(x[k], x[k], squares); }
            sum += squares;
        }
    }
    sum = blockReduceSum(sum);
    if (threadIdx.x == 0) { partials[blockIdx.x] = sum; }
}

// out[0] = sum of partials[0..count). grid 1, block a multiple of 32 up to 1024.
extern "C" __global__ void global_norm_combine_kernel(float* out, const float* partials, int count) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) { sum += partials[i]; }
    sum = blockReduceSum(sum);
    if (threadIdx.x == 0) { out[0] = sum; }
}
