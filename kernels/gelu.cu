// GELU in its tanh form, and its gradient.
//
//   forward   out = gelu(inp) = 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))        backward  d = d * gelu'(inp), in place
//
//   any shape, N elements of floatX; arithmetic in fp32. gelu() and gelu_grad() are in common.cuh: the matmul epilogues
//   use them too, and these kernels remain for recomputation and for the rungs below the fused matmul.
//
// measured on an H200, B=32, T=1024, C=768, bf16, microseconds (% of copy speed):
// version                  | idea                | bytes moved | measured
// gelu_forward 1           | thread per element  | 2N          | 275 (35 %)
// gelu_forward 2           | thread per 16 bytes | 2N          | 102 (94 %); with exact exp and division 136 in a step
// gelu_backward_inplace 1  | thread per element  | 3N          | 303 (47 %)
// gelu_backward_inplace 2  | thread per 16 bytes | 3N          | 148 (97 %)
//
// Source: llm.c llmc/gelu.cuh (gelu_forward_kernel2, gelu_backward_inplace_kernel); Hendrycks and Gimpel, arXiv:1606.08415.
#include "common.cuh"

// One thread per element. grid ceil(N / block), any block.
extern "C" __global__ void gelu_forward_kernel1(floatX* out, const floatX* inp, i64 N) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < N) { out[i] = (floatX)gelu((float)inp[i]); }
}

extern "C" __global__ void gelu_backward_inplace_kernel1(floatX* d_in_out, const floatX* inp, i64 N) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < N) { d_in_out[i] = (floatX)((float)d_in_out[i] * gelu_grad((float)inp[i])); }
}

// One thread per 16 bytes; the last one takes what is left of N. grid ceil(N / x128::size / block), any block.
// out is read by the next matmul, so it stays in L2; inp is not needed again before the backward pass.
extern "C" __global__ void gelu_forward_kernel2(floatX* out, const floatX* inp, i64 N) {
    i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * x128::size;
    if (i + x128::size <= N) {
        x128 pack = load128cs(inp + i);
        for (int k = 0; k < x128::size; k++) { pack[k] = (floatX)gelu((float)pack[k]); }
        store128(out + i, pack);
    } else {
        for (; i < N; i++) { out[i] = (floatX)gelu((float)inp[i]); }
    }
}

extern "C" __global__ void gelu_backward_inplace_kernel2(floatX* d_in_out, const floatX* inp, i64 N) {
    i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * x128::size;
    if (i + x128::size <= N) {
        x128 grad = load128(d_in_out + i), pack = load128cs(inp + i);
        for (int k = 0; k < x128::size; k++) { grad[k] = (floatX)((float)grad[k] * gelu_grad((float)pack[k])); }
        store128(d_in_out + i, grad);
    } else {
        for (; i < N; i++) { d_in_out[i] = (floatX)((float)d_in_out[i] * gelu_grad((float)inp[i])); }
    }
}
