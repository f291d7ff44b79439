// The executor's definitions of what kernels/ptx_sm90.cuh wraps: mbarriers, TMA, wgmma. Kernels that use them run
// unchecked. Everything happens at once: a TMA copy when it is asked for, a product when each thread comes to it, its
// own elements alone. That is right as long as no stage is reused before the threads that read it have come by, which
// wgmma_wait, where the lanes of a warp meet, guarantees for kernels that release a stage after it.
#pragma once
#include "simt_ptx.h"

namespace simt {
extern "C" {
char* simt_shared_memory();         // where shared addresses begin
void simt_yield(At at);             // lets all others run first
void simt_progress();               // an mbarrier's phase has ended: those who yield do not wait in vain
}
struct Barrier {
    int bytes;
    short pending;
    unsigned short count : 15, phase : 1;
    void end_phase() {
        if (pending || bytes) { return; }
        pending = count, phase ^= 1;
        simt_progress();
    }
};
inline Barrier& barrier_at(unsigned long long* address) { return *(Barrier*)address; }
}  // namespace simt

inline u32 shared_address(const void* pointer) { return (u32)((const char*)pointer - simt::simt_shared_memory()); }
inline void mbarrier_init(u64* barrier, u32 arrivals) {
    simt::Barrier& b = simt::barrier_at(barrier);
    b.bytes = 0, b.pending = b.count = arrivals, b.phase = 0;
}
inline void mbarrier_init_done() {}
inline void mbarrier_expect(u64* barrier, u32 bytes) {
    simt::Barrier& b = simt::barrier_at(barrier);
    b.bytes += bytes, --b.pending;
    b.end_phase();
}
inline void mbarrier_arrive(u64* barrier) { mbarrier_expect(barrier, 0); }
inline bool mbarrier_try_wait(u64* barrier, u32 parity, SIMT_AT) {
    if (simt::barrier_at(barrier).phase != parity) { return true; }
    simt::simt_yield(SIMT_HERE);
    return false;
}

// words: address, rows, columns, rows of the box; made by tensor_map in simt/__init__.py
inline void tma_load(void* smem, const TensorMap& map, int column, int row, u64* barrier) {
    const unsigned short* from = (const unsigned short*)map.words[0];
    int rows = map.words[1], columns = map.words[2], box_rows = map.words[3];
    u32 to = shared_address(smem);
    for (int r = 0; r < box_rows; r++) {
        for (int c = 0; c < 64; c++) {
            bool inside = row + r >= 0 && row + r < rows && column + c >= 0 && column + c < columns;
            u32 at = to + r * 128 + c * 2;
            at ^= (at >> 7 & 7) << 4;
            unsigned short value = inside ? from[(i64)(row + r) * columns + column + c] : 0;
            memcpy(simt::simt_shared_memory() + at, &value, 2);
        }
    }
    simt::Barrier& b = simt::barrier_at(barrier);
    b.bytes -= box_rows * 128;
    b.end_phase();
}

template <int N> inline void fewer_registers() {}
template <int N> inline void more_registers() {}

// Lane 8 i + r has the address of row r of matrix i; lane l holds columns 2 (l % 4), + 1 of row l / 4 of each.
inline void stmatrix_x4(void* smem, const u32 (&r)[4]) {
    int lane = threadIdx.x % 32;
    u32 row = shared_address(smem);
    for (int i = 0; i < 4; i++) {
        u32 at = __shfl_sync(0xffffffffu, row, 8 * i + lane / 4);
        memcpy(simt::simt_shared_memory() + at + lane % 4 * 4, &r[i], 4);
    }
}

inline void wgmma_begin() {}
inline void wgmma_commit() {}
template <int N> inline void wgmma_wait() { __syncwarp(); }
template <int SIZE> inline void wgmma_tie(float (&)[SIZE]) {}

inline u64 wgmma_operand(const void* smem, u32 panel_bytes) {
    return (shared_address(smem) & 0x3ffffu) >> 4 | (u64)(panel_bytes >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

// Element (i, k) of an operand, i its m or n.
template <bool BY_K> inline float wgmma_element(u64 operand, int i, int k) {
    u32 begin = (operand & 0x3fff) << 4, panel = (operand >> 16 & 0x3fff) << 4;
    u32 eight_rows = (operand >> 32 & 0x3fff) << 4;
    u32 at = BY_K ? begin + i / 64 * panel + k / 8 * eight_rows + k % 8 * 128 + i % 64 * 2
                  : begin + i / 8 * eight_rows + i % 8 * 128 + k * 2;
    at ^= (at >> 7 & 7) << 4;
    return (float)*(const floatX*)(simt::simt_shared_memory() + at);
}

template <bool A_BY_K, bool B_BY_K, int SIZE> inline void wgmma(float (&d)[SIZE], u64 a, u64 b, bool add) {
    int thread = threadIdx.x % 128, row = thread / 32 * 16 + thread % 32 / 4;
    float rows[2][16];
    for (int i = 0; i < 2; i++) {
        for (int k = 0; k < 16; k++) { rows[i][k] = wgmma_element<A_BY_K>(a, row + 8 * i, k); }
    }
    for (int j = 0; j < SIZE; j++) {
        if (j % 4 > 1) { continue; }  // with j - 2
        int column = j / 4 * 8 + thread % 4 * 2 + j % 2;
        float sums[2] = {add ? d[j] : 0.0f, add ? d[j + 2] : 0.0f};
        for (int k = 0; k < 16; k++) {
            float value = wgmma_element<B_BY_K>(b, column, k);
            sums[0] += rows[0][k] * value, sums[1] += rows[1][k] * value;
        }
        d[j] = sums[0], d[j + 2] = sums[1];
    }
}
