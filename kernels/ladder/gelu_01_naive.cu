// GELU and its gradient, rung 1: one thread per element.
//
// Idea        The formula as it stands: each thread loads, computes and stores one element.
// Prediction  None was written down. Bytes alone (2 N forward, 3 N backward) allow what a copy takes, 96 and 144 us.
// Measured    Forward 275 us (35 % of copy speed), backward 303 us (47 %). H200, B=32, T=1024, C=768, bf16, 2026-11-24.
// Lesson      A thread that moves 2 bytes at a time cannot keep memory busy: see kernels/gelu.cu, 16 bytes a thread.
#include "common.cuh"

// N elements of any shape. grid ceil(N / block), any block.
extern "C" __global__ void gelu_forward_naive(floatX* out, const floatX* inp, i64 N) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < N) { out[i] = (floatX)gelu((float)inp[i]); }
}

extern "C" __global__ void gelu_backward_inplace_naive(floatX* d_in_out, const floatX* inp, i64 N) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < N) { d_in_out[i] = (floatX)((float)d_in_out[i] * gelu_grad((float)inp[i])); }
}
