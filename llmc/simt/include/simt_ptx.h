// The executor's definitions of the instructions that kernels/ptx.cuh wraps: tensor cores, ldmatrix, cp.async.
// They have the names and arguments of those functions. Fragments are per-lane registers in the layouts of the PTX ISA
// (sections "Matrix Fragments for mma.m16n8k16", ".m16n8k8" and "ldmatrix"). runtime.cpp spells these layouts out: it
// computes the result when the last lane of the warp has arrived.
#pragma once
#include "simt_cuda.h"

namespace simt {
// Keep in step with runtime.cpp.
enum Mma { MMA_16816_BF16, MMA_16816_F16, MMA_1688_F16, MMA_1688_TF32 };
extern "C" {
void simt_mma(int shape, float* d, const unsigned* a, const unsigned* b, const float* c, At at);
void simt_ldmatrix(unsigned* r, const void* row, int matrices, int transposed, At at);
void simt_cp_async(void* shared, const void* global, int pred, At at);
void simt_cp_async_commit();
void simt_cp_async_wait(int pending);
}
}  // namespace simt

// d = a b + c. a is 16 x k by rows, b is k x 8 by columns, c and d are 16 x 8 in fp32.
#define SIMT_MMA(name, shape) \
    inline void name(float* d, const uint32_t* a, const uint32_t* b, const float* c, SIMT_AT) { \
        simt::simt_mma(simt::shape, d, a, b, c, SIMT_HERE); \
    }
SIMT_MMA(mma_m16n8k16_bf16, MMA_16816_BF16)
SIMT_MMA(mma_m16n8k16_f16, MMA_16816_F16)
SIMT_MMA(mma_m16n8k8_f16, MMA_1688_F16)
SIMT_MMA(mma_m16n8k8_tf32, MMA_1688_TF32)
#undef SIMT_MMA

// Lane i of the first 8 n lanes gives the address of row i % 8 of the 8 x 8 matrix i / 8 (rows of 16 bytes).
inline void ldmatrix_x1(uint32_t* r, const void* row, SIMT_AT) { simt::simt_ldmatrix(r, row, 1, 0, SIMT_HERE); }
inline void ldmatrix_x2(uint32_t* r, const void* row, SIMT_AT) { simt::simt_ldmatrix(r, row, 2, 0, SIMT_HERE); }
inline void ldmatrix_x4(uint32_t* r, const void* row, SIMT_AT) { simt::simt_ldmatrix(r, row, 4, 0, SIMT_HERE); }
inline void ldmatrix_x1_trans(uint32_t* r, const void* row, SIMT_AT) { simt::simt_ldmatrix(r, row, 1, 1, SIMT_HERE); }
inline void ldmatrix_x2_trans(uint32_t* r, const void* row, SIMT_AT) { simt::simt_ldmatrix(r, row, 2, 1, SIMT_HERE); }
inline void ldmatrix_x4_trans(uint32_t* r, const void* row, SIMT_AT) { simt::simt_ldmatrix(r, row, 4, 1, SIMT_HERE); }

// 16 bytes from global to shared memory, or 16 zero bytes if !pred. They land when this thread waits for their group.
inline void cp_async_16(void* shared, const void* global, bool pred = true, SIMT_AT) {
    simt::simt_cp_async(shared, global, pred, SIMT_HERE);
}
inline void cp_async_commit() { simt::simt_cp_async_commit(); }
template <int pending> inline void cp_async_wait() { simt::simt_cp_async_wait(pending); }
