// What the executor's vocabulary computes, one kernel per group of functions: tests/test_simt.py compares the results
// with NumPy, with ml_dtypes, and on a machine with a GPU with the hardware.
#include "ptx.cuh"

// ---- 16-bit types ----

extern "C" __global__ void decode(float* out, const floatX* inp, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) { out[i] = (float)inp[i]; }
}
extern "C" __global__ void encode(floatX* out, const float* inp, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) { out[i] = (floatX)inp[i]; }
}
#ifndef ENABLE_FP32
extern "C" __global__ void arithmetic(floatX* out, const floatX* a, const floatX* b, const floatX* c, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        out[i] = a[i] + b[i];
        out[n + i] = a[i] - b[i];
        out[2 * n + i] = a[i] * b[i];
        out[3 * n + i] = a[i] / b[i];
        out[4 * n + i] = __hfma(a[i], b[i], c[i]);
        out[5 * n + i] = -a[i];
        out[6 * n + i] = a[i] < b[i] ? a[i] : b[i];
    }
}
extern "C" __global__ void pairs(unsigned* out, const float* inp, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
#ifdef ENABLE_BF16
        __nv_bfloat162 two = __floats2bfloat162_rn(inp[2 * i], inp[2 * i + 1]);
#else
        __half2 two = __floats2half2_rn(inp[2 * i], inp[2 * i + 1]);
#endif
        memcpy(&out[i], &two, 4);
    }
}
#endif

// ---- Bits ----

extern "C" __global__ void bits(unsigned* out, const unsigned* a, const unsigned* b, const unsigned* c, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        out[i] = __popc(a[i]);
        out[n + i] = __ffs(a[i]);
        out[2 * n + i] = __clz(a[i]);
        out[3 * n + i] = __brev(a[i]);
        out[4 * n + i] = __byte_perm(a[i], b[i], c[i] & 0xffffu);
        out[5 * n + i] = __funnelshift_l(a[i], b[i], c[i]);
        out[6 * n + i] = __funnelshift_r(a[i], b[i], c[i]);
        out[7 * n + i] = __umulhi(a[i], b[i]);
        out[8 * n + i] = __mulhi((int)a[i], (int)b[i]);
        out[9 * n + i] = min(a[i], b[i]);
        out[10 * n + i] = max((int)a[i], (int)b[i]);
        out[11 * n + i] = __popcll((unsigned long long)a[i] << 32 | b[i]);
        out[12 * n + i] = __clzll((unsigned long long)a[i] << 32 | b[i]);
    }
}

// ---- Warps: 64 threads, every result of lane t of row r at out[64 r + t] ----

template <int width> __device__ void shuffles(int* out, int value, int operand) {
    out[0] = __shfl_sync(0xffffffffu, value, operand, width);
    out[64] = __shfl_up_sync(0xffffffffu, value, operand & 31, width);
    out[128] = __shfl_down_sync(0xffffffffu, value, operand & 31, width);
    out[192] = __shfl_xor_sync(0xffffffffu, value, operand & 31, width);
}
extern "C" __global__ void shuffle(int* out, const int* inp, int operand) {  // out (4 widths, 4 functions, 64)
    int t = threadIdx.x;
    shuffles<32>(out + t, inp[t], operand);
    shuffles<16>(out + 256 + t, inp[t], operand);
    shuffles<8>(out + 512 + t, inp[t], operand);
    shuffles<2>(out + 768 + t, inp[t], operand);
}
extern "C" __global__ void votes(unsigned* out, const int* inp) {
    int t = threadIdx.x, value = inp[t];
    unsigned half = t & 16 ? 0xffff0000u : 0x0000ffffu;
    out[t] = __ballot_sync(0xffffffffu, value > 1);
    out[64 + t] = __ballot_sync(half, value > 1);
    out[128 + t] = __any_sync(half, value == 3);
    out[192 + t] = __all_sync(half, value < 3);
    out[320 + t] = __syncthreads_or(value == 3);
    out[384 + t] = __syncthreads_and(value >= 0);
    out[448 + t] = __syncthreads_count(value == 1);
#if __CUDA_ARCH__ >= 700
    out[256 + t] = __match_any_sync(0xffffffffu, value);
#endif
#if __CUDA_ARCH__ >= 800
    out[512 + t] = __reduce_add_sync(half, (unsigned)value);
    out[576 + t] = __reduce_min_sync(half, value - 2);
    out[640 + t] = __reduce_max_sync(half, (unsigned)value);
    out[704 + t] = __reduce_xor_sync(half, (unsigned)value);
#endif
}
// Atomics of 64 threads on one element each; the sums and extremes do not depend on the order.
extern "C" __global__ void atomics(unsigned* out, const unsigned* inp) {
    unsigned value = inp[threadIdx.x];
    atomicAdd(&out[0], value);
    atomicMax(&out[1], value);
    atomicMin(&out[2], value);
    atomicAnd(&out[3], value);
    atomicOr(&out[4], value);
    atomicXor(&out[5], value);
    atomicInc(&out[6], 49u);
    atomicDec(&out[7], 9u);
    atomicSub(&out[8], value);
    atomicMax((int*)&out[9], (int)value);
    if (threadIdx.x == 7) { atomicExch(&out[10], value); }
    atomicCAS(&out[11], threadIdx.x == 3 ? 5u : 6u, 9u);
}

// ---- Tensor cores: one warp ----

// By the layout tables of the PTX ISA, element by element: A (16, K) by rows, B (K, 8) by rows, C and D (16, 8).
#ifdef ENABLE_FP32
#if __CUDA_ARCH__ >= 800
extern "C" __global__ void mma_tf32(float* D, const float* A, const float* B, const float* C) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    u32 a[4], b[2];
    for (int i = 0; i < 4; ++i) { a[i] = __float_as_uint(A[(g + 8 * (i % 2)) * 8 + t + 4 * (i / 2)]); }
    for (int i = 0; i < 2; ++i) { b[i] = __float_as_uint(B[(t + 4 * i) * 8 + g]); }
    float c[4], d[4];
    for (int i = 0; i < 4; ++i) { c[i] = C[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2]; }
    mma_m16n8k8_tf32(d, a, b, c);
    for (int i = 0; i < 4; ++i) { D[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = d[i]; }
}
#endif
#else
__device__ inline u32 two(floatX low, floatX high) {
    floatX pair[2] = {low, high};
    u32 bits;
    memcpy(&bits, pair, 4);
    return bits;
}
template <int K> __device__ void mma_by_table(float* D, const floatX* A, const floatX* B, const float* C) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    u32 a[K / 4], b[K / 8];
    for (int i = 0; i < K / 4; ++i) {
        const floatX* p = A + (g + 8 * (i % 2)) * K + 2 * t + 8 * (i / 2);
        a[i] = two(p[0], p[1]);
    }
    for (int i = 0; i < K / 8; ++i) { b[i] = two(B[(2 * t + 8 * i) * 8 + g], B[(2 * t + 8 * i + 1) * 8 + g]); }
    float c[4], d[4];
    for (int i = 0; i < 4; ++i) { c[i] = C[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2]; }
#ifdef ENABLE_BF16
    mma_m16n8k16_bf16(d, a, b, c);
#else
    if (K == 16) {
        mma_m16n8k16_f16(d, a, b, c);
    } else {
        mma_m16n8k8_f16(d, a, b, c);
    }
#endif
    for (int i = 0; i < 4; ++i) { D[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = d[i]; }
}
extern "C" __global__ void mma_k16(float* D, const floatX* A, const floatX* B, const float* C) {
    mma_by_table<16>(D, A, B, C);
}
#ifdef ENABLE_FP16
extern "C" __global__ void mma_k8(float* D, const floatX* A, const floatX* B, const float* C) {
    mma_by_table<8>(D, A, B, C);
}
#endif

// The same through shared memory and ldmatrix: A with x4, B (stored by rows) with x2.trans.
extern "C" __global__ void mma_ldmatrix(float* D, const floatX* A, const floatX* B, const float* C) {
    __shared__ alignas(16) floatX As[16][16], Bs[16][8];
    int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    for (int i = lane; i < 256; i += 32) { As[i / 16][i % 16] = A[i]; }
    for (int i = lane; i < 128; i += 32) { Bs[i / 8][i % 8] = B[i]; }
    __syncwarp();
    u32 a[4], b[2];
    ldmatrix_x4(a, &As[lane % 16][lane / 16 * 8]);
    ldmatrix_x2_trans(b, &Bs[lane % 16][0]);
    float c[4], d[4];
    for (int i = 0; i < 4; ++i) { c[i] = C[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2]; }
#ifdef ENABLE_BF16
    mma_m16n8k16_bf16(d, a, b, c);
#else
    mma_m16n8k16_f16(d, a, b, c);
#endif
    for (int i = 0; i < 4; ++i) { D[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = d[i]; }
}
#endif

// Every form of ldmatrix on four 8 x 8 matrices of 16-bit numbers: out (6 forms, 4 registers, 32 lanes).
extern "C" __global__ void ldmatrix_forms(unsigned* out, const unsigned short* inp) {
    __shared__ alignas(16) unsigned short M[4][8][8];
    int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) { M[i / 64][i / 8 % 8][i % 8] = inp[i]; }
    __syncwarp();
    const void* row = M[lane / 8][lane % 8];
    u32 r[6][4] = {};
    ldmatrix_x1(r[0], row);
    ldmatrix_x2(r[1], row);
    ldmatrix_x4(r[2], row);
    ldmatrix_x2_trans(r[4], row);
    ldmatrix_x4_trans(r[5], row);
    for (int form = 0; form < 6; ++form) {
        for (int i = 0; i < 4; ++i) { out[(form * 4 + i) * 32 + lane] = r[form][i]; }
    }
}
// cp.async with and without its predicate.
extern "C" __global__ void async_copy(int* out, const int* inp) {
    __shared__ alignas(16) int tile[128];
    cp_async_16(&tile[4 * threadIdx.x], inp + 4 * threadIdx.x, threadIdx.x % 3 != 0);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    for (int i = 0; i < 4; ++i) { out[4 * threadIdx.x + i] = tile[127 - 4 * threadIdx.x - i]; }
}
