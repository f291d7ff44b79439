// Linear layers, rung 2: tiles in shared memory.
//
//   forward  out = inp @ weight^T + bias;  with pre_gelu: pre_gelu = that, out = gelu(pre_gelu)
//   dgrad    dinp = dout @ weight, times gelu'(pre_gelu) if given        wgrad    dweight (+)= dout^T @ inp
//
// Idea        A block of 256 threads makes 16 x 16 outputs. For every 16 of k it loads a tile of a and one of b into
//             shared memory, so that a value is read once for 16 outputs.
// Prediction  4 to 6 TFLOP/s.
// Measured    6.3 TFLOP/s forward, 6.2 backward, at B = 32, T = 1024, C = 768, OC = 3072, bf16. H200, 2026-11-24.
// Lesson      There are two reads of shared memory for one FFMA. A thread has to make several outputs from values in
//             its registers, as ffma in kernels/matmul.cu does: rung 3.
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

constexpr int TILE = 16;

template <int OP> __device__ inline void product(const Product& p) {
    // the extra column puts the 16 rows of a column in different banks
    __shared__ float a_tile[TILE][TILE + 1], b_tile[TILE][TILE + 1];  // [m][k], [k][n]
    int x = threadIdx.x % TILE, y = threadIdx.x / TILE;
    int m0 = blockIdx.y * TILE, n0 = blockIdx.x * TILE;
    float sum = 0.0f;
    for (int k0 = 0; k0 < p.K; k0 += TILE) {
        // neighbouring threads (x) read neighbouring addresses, whichever index that is
        int am = a_by_k<OP> ? x : y, ak = a_by_k<OP> ? y : x;
        int bn = b_by_k<OP> ? x : y, bk = b_by_k<OP> ? y : x;
        a_tile[am][ak] = m0 + am < p.M && k0 + ak < p.K ? a_value<OP>(p, m0 + am, k0 + ak) : 0.0f;
        b_tile[bk][bn] = n0 + bn < p.N && k0 + bk < p.K ? b_value<OP>(p, k0 + bk, n0 + bn) : 0.0f;
        __syncthreads();
#pragma unroll
        for (int k = 0; k < TILE; k++) { sum += a_tile[y][k] * b_tile[k][x]; }
        __syncthreads();
    }
    if (m0 + y < p.M && n0 + x < p.N) { finish(p, sum, m0 + y, n0 + x); }
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

// Grid (ceil(N / 16), ceil(M / 16)), block 256.
extern "C" __global__ void __launch_bounds__(256) matmul_forward_shared_tiles(
    floatX* out, floatX* pre_gelu, const floatX* inp, const floatX* weight, const floatX* bias, int M, int N, int K) {
    product<FORWARD>(forward_product(out, pre_gelu, inp, weight, bias, M, N, K));
}
extern "C" __global__ void __launch_bounds__(256) matmul_dgrad_shared_tiles(
    floatX* dinp, const floatX* dout, const floatX* weight, const floatX* pre_gelu, int M, int N, int K) {
    product<DGRAD>(dgrad_product(dinp, dout, weight, pre_gelu, M, N, K));
}
extern "C" __global__ void __launch_bounds__(256) matmul_wgrad_shared_tiles(
    floatG* dweight, const floatX* dout, const floatX* inp, int M, int N, int K, int accumulate) {
    product<WGRAD>(wgrad_product(dweight, dout, inp, M, N, K, accumulate));
}
