// The tensor-core and asynchronous-copy instructions that CUDA C++ has no function for: one inline function each.
// Hopper's own are in ptx_sm90.cuh.
//
// Fragments (PTX ISA, "Matrix Fragments for mma.m16n8k16"). Lane l, group g = l / 4, t = l % 4. Each register of a and
// b holds two 16-bit values, the lower k in the lower half; d = a @ b + c in fp32.
//   a (16 x 16): a[0] row g, k 2t..2t+1 | a[1] row g+8, same k | a[2] row g, k 2t+8..2t+9 | a[3] row g+8, same k
//   b (16 x 8):  b[0] column g, k 2t..2t+1 | b[1] column g, k 2t+8..2t+9
//   c, d (16 x 8): [0], [1] row g, columns 2t, 2t+1 | [2], [3] row g+8, same columns
//   m16n8k8 f16: the first k half of the above (a[0], a[1], b[0]).
//   m16n8k8 tf32: a[0] row g, k t | a[1] row g+8, k t | a[2] row g, k t+4 | a[3] row g+8, k t+4; b[0] k t | b[1] k t+4
// ldmatrix: lane 8i + r gives the address of row r (16 bytes = 8 values) of the 8 x 8 matrix i. Result register i: lane
// l receives row l/4, columns 2t, 2t+1 of matrix i; with _trans, rows 2t, 2t+1 of column l/4.
//
// sm_75 has neither m16n8k16 nor cp.async. Two m16n8k8 and a plain 16-byte copy take their place there, so that the
// fp16 kernels run unchanged. bf16 needs sm_80.
#pragma once
#include "common.cuh"

#if defined(ENABLE_FP16) || (defined(ENABLE_BF16) && (defined(LLMC_SIMT) || __CUDA_ARCH__ >= 800))
#define TENSOR_CORES  // this compilation has the 16-bit matrix kernels
#endif

#ifdef LLMC_SIMT
#include "simt_ptx.h"
#else

__device__ inline u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

__device__ inline void mma_m16n8k8_f16(float d[4], const u32 a[2], const u32 b[1], const float c[4]) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

__device__ inline void mma_m16n8k16_f16(float d[4], const u32 a[4], const u32 b[2], const float c[4]) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
                   "f"(c[3]));
#else
    mma_m16n8k8_f16(d, a, b, c);
    mma_m16n8k8_f16(d, a + 2, b + 1, d);
#endif
}

#if __CUDA_ARCH__ >= 800
__device__ inline void mma_m16n8k16_bf16(float d[4], const u32 a[4], const u32 b[2], const float c[4]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
                   "f"(c[3]));
}

__device__ inline void mma_m16n8k8_tf32(float d[4], const u32 a[4], const u32 b[2], const float c[4]) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
                   "f"(c[3]));
}
#endif

__device__ inline void ldmatrix_x1(u32 r[1], const void* smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(shared_address(smem)));
}

__device__ inline void ldmatrix_x2(u32 r[2], const void* smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(smem)));
}

__device__ inline void ldmatrix_x4(u32 r[4], const void* smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(smem)));
}

__device__ inline void ldmatrix_x2_trans(u32 r[2], const void* smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(smem)));
}

__device__ inline void ldmatrix_x4_trans(u32 r[4], const void* smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(smem)));
}

// Copies 16 bytes to shared memory without passing through registers; if !pred, it writes zeros and reads nothing. This
// thread sees the data after cp_async_commit and cp_async_wait, other threads after a barrier that follows.
__device__ inline void cp_async_16(void* smem, const void* gmem, bool pred) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(smem)), "l"(gmem),
                 "r"(pred ? 16 : 0)
                 : "memory");
#else
    *(int4*)smem = pred ? *(const int4*)gmem : make_int4(0, 0, 0, 0);
#endif
}

__device__ inline void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most N of this thread's committed groups are still under way.
template <int N> __device__ inline void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

#endif  // LLMC_SIMT

#ifdef TENSOR_CORES

// d += a @ b on 16 x 8 x 16 tiles of floatX.
__device__ inline void mma(float d[4], const u32 a[4], const u32 b[2]) {
#ifdef ENABLE_BF16
    mma_m16n8k16_bf16(d, a, b, d);
#else
    mma_m16n8k16_f16(d, a, b, d);
#endif
}

// Two values rounded to nearest, as one register of a fragment: `low` has the lower k.
__device__ inline u32 pack2(float low, float high) {
#if !defined(LLMC_SIMT) && __CUDA_ARCH__ >= 800
    u32 packed;
#ifdef ENABLE_BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#endif
    return packed;
#else
    floatX pair[2] = {(floatX)low, (floatX)high};
    u32 packed;
    memcpy(&packed, pair, 4);
    return packed;
#endif
}

__device__ inline void unpack2(float (&values)[2], u32 packed) {
#if !defined(LLMC_SIMT) && defined(ENABLE_BF16)  // one instruction each, where the conversions of cuda_bf16.h take two
    values[0] = __uint_as_float(packed << 16), values[1] = __uint_as_float(packed & 0xffff0000u);
#else
    floatX pair[2];
    memcpy(pair, &packed, 4);
    values[0] = (float)pair[0], values[1] = (float)pair[1];
#endif
}

#endif  // TENSOR_CORES
