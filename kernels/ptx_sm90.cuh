// Hopper's own instructions (sm_90a): mbarriers, TMA, wgmma, moving registers between warps. One inline function each.
//
// mbarrier: 8 bytes of shared memory that count the arrivals and the bytes of TMA that are still to come. When both
//   counts reach zero, a phase ends and the next begins. A wait names the parity of the phase that has to have ended: 0
//   for the first, 1 for the second, 0 for the third. On a fresh barrier a wait for parity 1 passes at once. A wait
//   cannot tell a phase from the one two later, so no thread may fall that far behind.
// TMA: one thread asks for a box of a 2-D array to be copied to shared memory. A TensorMap (llmc/cuda/module.py) holds
//   the array's address and sizes and those of the box, which is rows x 64 columns of 16 bits. The box may reach out of
//   the array; TMA fills that part with zeros. In shared memory a row takes 128 bytes, and the 16-byte piece c of row r
//   lies at piece c ^ (r & 7). This is the 128-byte swizzle: the hardware takes r from the address, so a box must start
//   at a multiple of 1024 bytes.
// wgmma: a warpgroup (4 warps, the first a multiple of 4) computes d += a @ b for a (64 x 16) and b (16 x N) in shared
//   memory, as TMA left them. An operand "by k" has a row of 64 m or n for every k; any other has a row of 64 k for
//   every m or n. Let w = t / 32 and l = t % 32 for thread t of the warpgroup: its d[j] is in
//   row 16 w + l / 4 + 8 (j / 2 % 2) and column 8 (j / 4) + 2 (l % 4) + j % 2.
//
// Source: PTX ISA, "mbarrier", "Tensors", "cp.async.bulk.tensor", "Asynchronous Warpgroup Level Matrix Instructions".
#pragma once
#include "ptx.cuh"

typedef unsigned long long u64;

struct alignas(64) TensorMap {  // passed as `const __grid_constant__ TensorMap`
    u64 words[16];
};

#ifdef LLMC_SIMT
#include "simt_ptx_sm90.h"
#else

__device__ inline void mbarrier_init(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to others, TMA among them. It belongs between the inits and the __syncthreads
// after which others use the barriers.
__device__ inline void mbarrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void mbarrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and announces how many bytes TMA will bring in this phase.
__device__ inline void mbarrier_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

__device__ inline bool mbarrier_try_wait(u64* barrier, u32 parity) {
    u32 ended;
    asm volatile("{.reg .pred p;"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
                 "selp.u32 %0, 1, 0, p;}"
                 : "=r"(ended)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
    return ended;
}

__device__ inline void tma_load(void* smem, const TensorMap& map, int column, int row, u64* barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];"
                 ::"r"(shared_address(smem)), "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
                 : "memory");
}

// Copies a box from shared memory to the array; what lies outside the array is left out. TMA sees what threads wrote to
// shared memory only after each of them has called fence_async and then a barrier. A commit closes a group of this
// thread's copies. tma_store_wait<N> returns when all but the last N groups have read their shared memory, which may
// then be overwritten. A thread must not exit before its groups have done so.
__device__ inline void tma_store(const TensorMap& map, int column, int row, const void* smem) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
                 ::"l"(&map), "r"(column), "r"(row), "r"(shared_address(smem))
                 : "memory");
}
__device__ inline void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N> __device__ inline void tma_store_wait() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
__device__ inline void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A __syncthreads among `threads` threads of the block only, which make up whole warps. The number is 1 .. 15, because
// __syncthreads itself uses 0.
__device__ inline void named_barrier(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Copies `bytes` bytes to shared memory in the order they have. Their number and both addresses are multiples of 16.
__device__ inline void bulk_load(void* smem, const void* gmem, u32 bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(smem)), "l"(gmem), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// Each thread of this warpgroup has N registers from here on. N is a multiple of 8 from 24 to 256.
template <int N> __device__ inline void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ inline void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

__device__ inline void stmatrix_x4(void* smem, const u32 (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(smem)), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// wgmma_begin comes before wgmma first uses a register, and wgmma_commit closes a group. wgmma_wait<N> returns when at
// most N groups are under way. Until then the registers of d must not be touched. wgmma_tie stops the compiler from
// moving such a use to the other side of it.
__device__ inline void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

template <int SIZE> __device__ inline void wgmma_tie(float (&d)[SIZE]) {
#pragma unroll
    for (int i = 0; i < SIZE; i++) { asm volatile("" : "+f"(d[i])::"memory"); }
}
template <int SIZE> __device__ inline void wgmma_tie(u32 (&a)[SIZE][4]) {
#pragma unroll
    for (int i = 0; i < SIZE * 4; i++) { asm volatile("" : "+r"(a[i / 4][i % 4])::"memory"); }
}

// The descriptor of an operand in 128-byte swizzle. The address and the two strides are in units of 16 bytes.
// Bits 0-13: address | 16-29: for an operand by k, the stride from one 64 of m or n to the next | 32-45: the stride
// from one group of 8 rows to the next, 1024 bytes | 62: 128-byte swizzle
__device__ inline u64 wgmma_operand(const void* smem, u32 panel_bytes) {
    return (shared_address(smem) & 0x3ffffu) >> 4 | (u64)(panel_bytes >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

// Keeps the wait that follows behind the arithmetic that makes `value`, which is never negative. Left alone, ptxas puts
// waits before arithmetic.
__device__ inline void hold_until(float value) {
    if (value < 0.0f) { asm volatile("nanosleep.u32 1;"); }
}

#ifdef TENSOR_CORES
#ifdef ENABLE_BF16
#define WGMMA_TYPES "bf16.bf16"
#else
#define WGMMA_TYPES "f16.f16"
#endif
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)

#define D0_31 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define D32_63 \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
    "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define D64_95 \
    "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
    "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"

// d += a @ b if `add`, else d = a @ b. N is twice the size of d.
template <bool A_BY_K, bool B_BY_K> __device__ inline void wgmma(float (&d)[96], u64 a, u64 b, bool add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %98, 0;"
                 "wgmma.mma_async.sync.aligned.m64n192k16.f32." WGMMA_TYPES
                 " {" D0_31 "," D32_63 "," D64_95 "}, %96, %97, p, 1, 1, %99, %100;}"
                 : D16(0), D16(16), D16(32), D16(48), D16(64), D16(80)
                 : "l"(a), "l"(b), "r"((int)add), "n"((int)A_BY_K), "n"((int)B_BY_K));
}
template <bool A_BY_K, bool B_BY_K> __device__ inline void wgmma(float (&d)[64], u64 a, u64 b, bool add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0;"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." WGMMA_TYPES
                 " {" D0_31 "," D32_63 "}, %64, %65, p, 1, 1, %67, %68;}"
                 : D16(0), D16(16), D16(32), D16(48)
                 : "l"(a), "l"(b), "r"((int)add), "n"((int)A_BY_K), "n"((int)B_BY_K));
}
template <bool A_BY_K, bool B_BY_K> __device__ inline void wgmma(float (&d)[32], u64 a, u64 b, bool add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." WGMMA_TYPES " {" D0_31 "}, %32, %33, p, 1, 1, %35, %36;}"
                 : D16(0), D16(16)
                 : "l"(a), "l"(b), "r"((int)add), "n"((int)A_BY_K), "n"((int)B_BY_K));
}
template <bool A_BY_K, bool B_BY_K> __device__ inline void wgmma(float (&d)[4], u64 a, u64 b, bool add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %6, 0;"
                 "wgmma.mma_async.sync.aligned.m64n8k16.f32." WGMMA_TYPES " {%0,%1,%2,%3}, %4, %5, p, 1, 1, %7, %8;}"
                 : D4(0)
                 : "l"(a), "l"(b), "r"((int)add), "n"((int)A_BY_K), "n"((int)B_BY_K));
}

// The same with a (64 x 16) in registers: each warp holds 16 rows, laid out as for mma.m16n8k16 (ptx.cuh). Neither d
// nor a may be touched until wgmma_wait has returned.
template <bool B_BY_K> __device__ inline void wgmma(float (&d)[32], const u32 (&a)[4], u64 b, bool add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0;"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." WGMMA_TYPES
                 " {" D0_31 "}, {%32,%33,%34,%35}, %36, p, 1, 1, %38;}"
                 : D16(0), D16(16)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"((int)B_BY_K));
}
template <bool B_BY_K> __device__ inline void wgmma(float (&d)[64], const u32 (&a)[4], u64 b, bool add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0;"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." WGMMA_TYPES
                 " {" D0_31 "," D32_63 "}, {%64,%65,%66,%67}, %68, p, 1, 1, %70;}"
                 : D16(0), D16(16), D16(32), D16(48)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"((int)B_BY_K));
}

#undef D0_31
#undef D32_63
#undef D64_95
#undef D4
#undef D16
#endif  // TENSOR_CORES

#endif  // LLMC_SIMT

// Makes the compiler forget what it knows of a value. It can then not compute what depends on the value long before it
// is needed, which would keep registers occupied.
__device__ inline void forget(i64& value) {
#ifndef LLMC_SIMT
    asm volatile("" : "+l"(value));
#endif
}
__device__ inline void forget(int& value) {
#ifndef LLMC_SIMT
    asm volatile("" : "+r"(value));
#endif
}

// The address of the 16-byte piece `piece` (0 .. 7) of a row, in a box as TMA leaves it.
__device__ inline char* swizzled(char* box, int row, int piece) { return box + row * 128 + (piece ^ row % 8) * 16; }

// Waits until the phase with this parity has ended.
__device__ inline void mbarrier_wait(u64* barrier, u32 parity) {
    while (!mbarrier_try_wait(barrier, parity)) {}
}
