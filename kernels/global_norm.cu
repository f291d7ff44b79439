// The sum of squares of a flat array: the square of the gradient's global norm.
//
//   out[0] = sum of values[i]^2
//
//   values (N,) floatX    out (1,) f32 written    scratch f32, one partial sum per block
//
// llm.c's grid follows the number of multiprocessors. Here grid and block depend on N alone, so that a checkpoint continues
// with the same bits on another GPU. Partial sums go through memory to a second, one-block kernel: no atomics.
//
// Measured on an H200, 124 M values of bf16, microseconds (% of the speed of a copy of as many bytes in the same run):
// rung | idea                                                       | measured       | file
// 1    | one block walks the array                                  | 44322 (0.1 %)  | ladder/global_norm_01_one_block.cu
// 2    | up to 1024 blocks, element by element; then one block      | 197 (33 %)     | ladder/global_norm_02_many_blocks.cu
// 4    | 16-byte packs, four of a thread on their way at once       | 70.2 (92.5 %)  | this one
//
// Source: llm.c llmc/global_norm.cuh (global_norm_squared_kernel, global_norm_aggregate_kernel).
// BLOCK, the threads of a block, comes from llmc/cuda/global_norm.py.
#include "common.cuh"

#define AHEAD 4  // packs that a thread has on their way: 16 of its 32 registers (sm_90)

// partials[block] = sum of squares of the packs that this block visits, AHEAD loads of each thread before the first sum.
// The last N % x128::size elements go to the first threads. Any grid (132 multiprocessors hold 1056 blocks); block BLOCK.
// The optimiser reads the array next: default caching, so that its end is still in L2.
extern "C" __global__ void __launch_bounds__(BLOCK)
global_norm_squared_kernel(float* partials, const floatX* values, i64 N) {
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
