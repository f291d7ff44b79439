// The executor's definitions of what kernels/ptx_sm90.cuh wraps: mbarriers, TMA, wgmma, named barriers. Kernels that
// use them run under two timings: everything happens at once, or as late as the waits allow (runtime/hopper.h). A
// kernel that uses data before a wait, or overwrites it before it was read, gives different results under the two. The
// order of ordinary accesses is checked (runtime/ordered.h); that of the accesses made here, for TMA and wgmma, is not.
#pragma once
#include "simt_ptx.h"

namespace simt {
extern "C" {
extern int simt_unfenced_writes;
char* simt_shared_memory();  // where shared addresses begin
void simt_mbarrier_init(u64* barrier, u32 arrivals);
void simt_mbarrier_arrive(u64* barrier, int arrivals, int bytes);
int simt_mbarrier_ended(u64* barrier, u32 parity, At at);
void simt_tma_load(const u64* map, int column, int row, void* shared, u64* barrier, At at);
void simt_bulk_load(void* shared, const void* global, u32 bytes, u64* barrier, At at);
void simt_tma_store(const u64* map, int column, int row, const void* shared, At at);
void simt_tma_store_commit();
void simt_tma_store_wait(int pending);
void simt_stmatrix_write(u32 shared, void* caller);
float simt_f16_value(u32 bits);
void simt_check_fenced(u32 shared, u32 size, At at);
void simt_fence_async();
void simt_named_barrier(int number, int threads, At at);
void simt_product_read(u32 shared);
void simt_product_begin();
void simt_product(void (*run)(const void*), const void* closure, int size, At at);
void simt_product_commit();
void simt_product_wait(int pending);
}

// Calls f() now, or when this thread waits for its group of products, depending on the timing.
template <class F> SIMT_UNCHECKED inline void product(F f, At at) {
    simt_product([](const void* closure) SIMT_UNCHECKED { (*(const F*)closure)(); }, &f, sizeof f, at);
}

SIMT_UNCHECKED inline float value_at(const void* p) {
    unsigned short bits;
    __builtin_memcpy(&bits, p, 2);
#ifdef ENABLE_BF16
    u32 wide = (u32)bits << 16;
    float value;
    __builtin_memcpy(&value, &wide, 4);
    return value;
#else
    return simt_f16_value(bits);
#endif
}
}  // namespace simt

inline u32 shared_address(const void* pointer) { return (u32)((const char*)pointer - simt::simt_shared_memory()); }
inline void mbarrier_init(u64* barrier, u32 arrivals) { simt::simt_mbarrier_init(barrier, arrivals); }
inline void mbarrier_init_done() {}
inline void mbarrier_expect(u64* barrier, u32 bytes) { simt::simt_mbarrier_arrive(barrier, 1, bytes); }
inline void mbarrier_arrive(u64* barrier) { simt::simt_mbarrier_arrive(barrier, 1, 0); }
inline bool mbarrier_try_wait(u64* barrier, u32 parity, SIMT_AT) {
    return simt::simt_mbarrier_ended(barrier, parity, SIMT_HERE);
}

// The map's words: address, rows, columns, rows of the box; made by tensor_map in simt/launch.py
inline void tma_load(void* smem, const TensorMap& map, int column, int row, u64* barrier, SIMT_AT) {
    simt::simt_tma_load(map.words, column, row, smem, barrier, SIMT_HERE);
}
inline void tma_store(const TensorMap& map, int column, int row, const void* smem, SIMT_AT) {
    simt::simt_tma_store(map.words, column, row, smem, SIMT_HERE);
}
inline void tma_store_commit() { simt::simt_tma_store_commit(); }
template <int N> inline void tma_store_wait() { simt::simt_tma_store_wait(N); }
inline void fence_async() { simt::simt_fence_async(); }
inline void named_barrier(int number, int threads, SIMT_AT) { simt::simt_named_barrier(number, threads, SIMT_HERE); }

inline void bulk_load(void* smem, const void* gmem, u32 bytes, u64* barrier, SIMT_AT) {
    simt::simt_bulk_load(smem, gmem, bytes, barrier, SIMT_HERE);
}

template <int N> inline void fewer_registers() {}
template <int N> inline void more_registers() {}

// Lane 8 i + r has the address of row r of matrix i. Lane l holds columns 2 (l % 4) and the next, of row l / 4 of each.
SIMT_UNCHECKED inline void stmatrix_x4(void* smem, const u32 (&r)[4]) {
    int lane = threadIdx.x % 32;
    u32 row = shared_address(smem);
    for (int i = 0; i < 4; i++) {
        u32 at = __shfl_sync(0xffffffffu, row, 8 * i + lane / 4);
        __builtin_memcpy(simt::simt_shared_memory() + at + lane % 4 * 4, &r[i], 4);
        simt::simt_stmatrix_write(at + lane % 4 * 4, __builtin_return_address(0));
    }
}

// .sync.aligned means that no lane goes on before all have come. It does not order memory accesses.
inline void wgmma_together(SIMT_AT) { simt::simt_warp(simt::WGMMA, ~0u, 0, 0, 32, SIMT_HERE); }
inline void wgmma_begin(SIMT_AT) {
    wgmma_together(file_, line_);
    simt::simt_product_begin();
}
inline void wgmma_commit() { simt::simt_product_commit(); }
template <int N> inline void wgmma_wait(SIMT_AT) {
    simt::simt_product_wait(N);
    wgmma_together(file_, line_);
}
template <int SIZE> inline void wgmma_tie(float (&)[SIZE]) {}
template <int SIZE> inline void wgmma_tie(u32 (&)[SIZE][4]) {}

inline void hold_until(float) {}

inline u64 wgmma_operand(const void* smem, u32 panel_bytes) {
    return (shared_address(smem) & 0x3ffffu) >> 4 | (u64)(panel_bytes >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

// The shared address of element (i, k) of an operand; i is its m or n.
template <bool BY_K> SIMT_UNCHECKED inline u32 wgmma_address(u64 operand, int i, int k) {
    u32 begin = (operand & 0x3fff) << 4, panel = (operand >> 16 & 0x3fff) << 4;
    u32 eight_rows = (operand >> 32 & 0x3fff) << 4;
    u32 at = BY_K ? begin + i / 64 * panel + k / 8 * eight_rows + k % 8 * 128 + i % 64 * 2
                  : begin + i / 8 * eight_rows + i % 8 * 128 + k * 2;
    return at ^ (at >> 7 & 7) << 4;
}

// Tells the runtime which 16-byte pieces a product reads: rows (or columns) first to first + count of its operand.
template <bool BY_K> SIMT_UNCHECKED inline void wgmma_reads(u64 operand, int first, int count) {
    if (threadIdx.x % 32) { return; }
    for (int i = first; i < first + count; i += BY_K ? 8 : 1) {
        for (int k = 0; k < 16; k += BY_K ? 1 : 8) { simt::simt_product_read(wgmma_address<BY_K>(operand, i, k)); }
    }
}

template <bool BY_K> SIMT_UNCHECKED inline float wgmma_element(u64 operand, int i, int k) {
    u32 at = wgmma_address<BY_K>(operand, i, k);
    if (simt::simt_unfenced_writes) { simt::simt_check_fenced(at, 2, simt::At{__builtin_FILE(), __builtin_LINE()}); }
    return simt::value_at(simt::simt_shared_memory() + at);
}

// Computes this thread's elements of d, which lie in two rows: the products of these rows of a with b.
template <bool B_BY_K, int SIZE>
SIMT_UNCHECKED inline void wgmma_rows(float (&d)[SIZE], const float (&rows)[2][16], u64 b, bool add) {
    for (int j = 0; j < SIZE; j++) {
        if (j % 4 > 1) { continue; }  // already done with j - 2
        int column = j / 4 * 8 + threadIdx.x % 4 * 2 + j % 2;
        float sums[2] = {add ? d[j] : 0.0f, add ? d[j + 2] : 0.0f};
        for (int k = 0; k < 16; k++) {
            float value = wgmma_element<B_BY_K>(b, column, k);
            sums[0] += rows[0][k] * value, sums[1] += rows[1][k] * value;
        }
        d[j] = sums[0], d[j + 2] = sums[1];
    }
}

template <bool A_BY_K, bool B_BY_K, int SIZE>
SIMT_UNCHECKED inline void wgmma(float (&d)[SIZE], u64 a, u64 b, bool add, SIMT_AT) {
    int thread = threadIdx.x % 128, row = thread / 32 * 16 + thread % 32 / 4;
    wgmma_reads<A_BY_K>(a, thread / 32 * 16, 16);
    wgmma_reads<B_BY_K>(b, 0, SIZE * 2);
    simt::product([=, &d]() SIMT_UNCHECKED {
        float rows[2][16];
        for (int i = 0; i < 2; i++) {
            for (int k = 0; k < 16; k++) { rows[i][k] = wgmma_element<A_BY_K>(a, row + 8 * i, k); }
        }
        wgmma_rows<B_BY_K>(d, rows, b, add);
    }, SIMT_HERE);
}

// The same with a in registers. Lane l has k = 2 (l % 4) + 0, 1, 8, 9 of two rows; three neighbours have the others.
// They are read when the operand in shared memory is, so a must not change until the wait.
template <bool B_BY_K, int SIZE>
SIMT_UNCHECKED inline void wgmma(float (&d)[SIZE], const u32 (&a)[4], u64 b, bool add, SIMT_AT) {
    int lane = threadIdx.x % 32;
    wgmma_reads<B_BY_K>(b, 0, SIZE * 2);
    simt::product([=, &d, &a]() SIMT_UNCHECKED {
        float rows[2][16];
        for (int i = 0; i < 4; i++) {
            for (int t = 0; t < 4; t++) {
                u32 pair = __shfl_sync(0xffffffffu, a[i], lane / 4 * 4 + t);
                for (int j = 0; j < 2; j++) {
                    rows[i % 2][i / 2 * 8 + 2 * t + j] = simt::value_at((const char*)&pair + 2 * j);
                }
            }
        }
        wgmma_rows<B_BY_K>(d, rows, b, add);
    }, SIMT_HERE);
}
