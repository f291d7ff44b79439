// Linear layers, rung 1: one thread for each output.
//
//   forward  out = inp @ weight^T + bias;  with pre_gelu: pre_gelu = that, out = gelu(pre_gelu)
//   dgrad    dinp = dout @ weight, times gelu'(pre_gelu) if given        wgrad    dweight (+)= dout^T @ inp
//   bias     dbias (+)= column sums of dout
//
// Idea        A thread makes one output and reads its row of a and its column of b from global memory.
// Prediction  0.5 to 1 TFLOP/s.
// Measured    0.49 TFLOP/s forward, 4.3 backward, at B = 32, T = 1024, C = 768, OC = 3072, bf16. H200, 2026-11-24.
//             The bias gradient, with N threads for the whole GPU, was never measured alone.
// Lesson      In backward neighbouring threads read neighbouring values of b. In forward these lie a row apart, and a
//             request of a warp touches 32 sectors. Every value is read anew for each output: it has to be shared.
//
// Layouts and rounding are those of kernels/matmul.cu.
#include "common.cuh"

constexpr int FORWARD = 0, DGRAD = 1, WGRAD = 2;

// One product and what to do with its result. Members that a kernel leaves null cost nothing: they are constants.
struct Product {
    floatX* out;             // (M, N), or null in WGRAD
    const floatX* a;         // (K, M) in WGRAD, else (M, K)
    const floatX* b;         // (N, K) in FORWARD, else (K, N)
    int M, N, K;
    const floatX* bias;      // (N) or null: added
    floatX* gelu_input;      // (M, N) or null: the sum is stored here, and its gelu in out
    const floatX* gelu_at;   // (M, N) or null: the sum is multiplied by gelu'(gelu_at)
    floatG* grad;            // (M, N) in WGRAD, else null: the sum goes here
    int accumulate;          // grad += instead of =
};

template <int OP> constexpr bool a_by_k = OP == WGRAD;
template <int OP> constexpr bool b_by_k = OP != FORWARD;

// The end of a sum v for output (m, n).
__device__ inline void finish(const Product& p, float v, int m, int n) {
    size_t at = (size_t)m * p.N + n;
    if (p.bias) { v += (float)p.bias[n]; }
    if (p.accumulate) { v += (float)p.grad[at]; }
    if (p.gelu_at) { v *= gelu_grad((float)p.gelu_at[at]); }
    if (p.grad) {
        p.grad[at] = (floatG)v;
        return;
    }
    if (p.gelu_input) {  // GELU of the rounded value: recomputing it from gelu_input then gives the same bits
        p.gelu_input[at] = (floatX)v;
        v = gelu((float)(floatX)v);
    }
    p.out[at] = (floatX)v;
}

template <int OP> __device__ inline float a_value(const Product& p, int m, int k) {
    return (float)p.a[a_by_k<OP> ? (size_t)k * p.M + m : (size_t)m * p.K + k];
}
template <int OP> __device__ inline float b_value(const Product& p, int k, int n) {
    return (float)p.b[b_by_k<OP> ? (size_t)k * p.N + n : (size_t)n * p.K + k];
}

template <int OP> __device__ inline void product(const Product& p) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)p.M * p.N) { return; }
    int m = i / p.N, n = i % p.N;
    float sum = 0.0f;
    for (int k = 0; k < p.K; k++) { sum += a_value<OP>(p, m, k) * b_value<OP>(p, k, n); }
    finish(p, sum, m, n);
}

__device__ inline Product forward_product(floatX* out, floatX* pre_gelu, const floatX* inp, const floatX* weight,
                                          const floatX* bias, int M, int N, int K) {
    return {out, inp, weight, M, N, K, bias, pre_gelu, nullptr, nullptr, 0};
}
__device__ inline Product dgrad_product(floatX* dinp, const floatX* dout, const floatX* weight, const floatX* pre_gelu,
                                        int M, int N, int K) {
    return {dinp, dout, weight, M, N, K, nullptr, nullptr, pre_gelu, nullptr, 0};
}
__device__ inline Product wgrad_product(floatG* dweight, const floatX* dout, const floatX* inp, int M, int N, int K,
                                        int accumulate) {
    return {nullptr, dout, inp, M, N, K, nullptr, nullptr, nullptr, dweight, accumulate};
}

// Grid ceil(M * N / 256), block 256.
extern "C" __global__ void __launch_bounds__(256) matmul_forward_naive(
    floatX* out, floatX* pre_gelu, const floatX* inp, const floatX* weight, const floatX* bias, int M, int N, int K) {
    product<FORWARD>(forward_product(out, pre_gelu, inp, weight, bias, M, N, K));
}
extern "C" __global__ void __launch_bounds__(256) matmul_dgrad_naive(
    floatX* dinp, const floatX* dout, const floatX* weight, const floatX* pre_gelu, int M, int N, int K) {
    product<DGRAD>(dgrad_product(dinp, dout, weight, pre_gelu, M, N, K));
}
extern "C" __global__ void __launch_bounds__(256) matmul_wgrad_naive(
    floatG* dweight, const floatX* dout, const floatX* inp, int M, int N, int K, int accumulate) {
    product<WGRAD>(wgrad_product(dweight, dout, inp, M, N, K, accumulate));
}

// dbias (+)= column sums of dout (M, N). Grid ceil(N / 256), block 256.
extern "C" __global__ void __launch_bounds__(256) matmul_bias_grad_naive(
    floatG* dbias, const floatX* dout, int M, int N, int accumulate) {
    int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) { return; }
    float sum = 0.0f;
    for (int m = 0; m < M; m++) { sum += (float)dout[(size_t)m * N + n]; }
    dbias[n] = (floatG)(accumulate ? (float)dbias[n] + sum : sum);
}
