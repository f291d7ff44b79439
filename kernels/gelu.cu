// GELU in its tanh form, and its gradient.
//
//   forward   out = gelu(inp) = 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))        backward  d = d * gelu'(inp), in place
//
//   any shape, N elements of floatX; arithmetic in fp32. gelu() and gelu_grad() are in common.cuh, as the epilogues of the
//   matmul use them too. These kernels remain for recomputation and for the rungs of the matmul that have no epilogue.
//
// Measured on an H200, B=32, T=1024, C=768, bf16, microseconds (% of copy speed):
// rung | idea                | bytes moved          | forward    | backward   | file
// 1    | thread per element  | forward 2N           | 275 (35 %) | 303 (47 %) | ladder/gelu_01_naive.cu
// 2    | thread per 16 bytes | backward 3N          | 102 (94 %) | 148 (97 %) | this one
// With exact exp and division the forward pass took 136 us in a step.
//
// Source: llm.c llmc/gelu.cuh (gelu_forward_kernel2, gelu_backward_inplace_kernel); Hendrycks and Gimpel, arXiv:1606.08415.
#include "common.cuh"

// Each thread takes 16 bytes; the last thread takes what is left of N. grid ceil(N / x128::size / block), any block.
// The next matmul reads out, which therefore stays in L2; inp is not needed again before the backward pass.
extern "C" __global__ void gelu_forward_kernel(floatX* out, const floatX* inp, i64 N) {
    i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * x128::size;
    if (i + x128::size <= N) {
        x128 pack = load128cs(inp + i);
        for (int k = 0; k < x128::size; k++) { pack[k] = (floatX)gelu((float)pack[k]); }
        store128(out + i, pack);
    } else {
        for (; i < N; i++) { out[i] = (floatX)gelu((float)inp[i]); }
    }
}

extern "C" __global__ void gelu_backward_inplace_kernel(floatX* d_in_out, const floatX* inp, i64 N) {
    i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * x128::size;
    if (i + x128::size <= N) {
        x128 grad = load128(d_in_out + i), pack = load128cs(inp + i);
        for (int k = 0; k < x128::size; k++) { grad[k] = (floatX)((float)grad[k] * gelu_grad((float)pack[k])); }
        store128(d_in_out + i, grad);
    } else {
        for (; i < N; i++) { d_in_out[i] = (floatX)((float)d_in_out[i] * gelu_grad((float)inp[i])); }
    }
}
