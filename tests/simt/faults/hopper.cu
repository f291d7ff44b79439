// TMA, mbarriers, wgmma: used before it was waited for, overwritten before it was read, not fenced, left behind.
// 128 threads, 17 KiB of dynamic shared memory; `inp` and `out` are tensor maps of 64 columns in boxes of 64 rows.
#include "ptx_sm90.cuh"

struct Shared {
    char tile[8192], staging[8192];
    u64 full, other;
};

__device__ inline Shared& shared() {
    extern __shared__ char memory[];
    Shared& s = *(Shared*)(memory + (1024 - shared_address(memory) % 1024) % 1024);
    if (threadIdx.x == 0) {
        mbarrier_init(&s.full, 1), mbarrier_init(&s.other, 1);
        mbarrier_init_done();
    }
    __syncthreads();
    return s;
}

__device__ inline void load(void* to, const TensorMap& inp, u64* barrier) {
    if (threadIdx.x == 0) {
        mbarrier_expect(barrier, 8192);
        tma_load(to, inp, 0, 0, barrier);  // load
    }
}

// A warp's 16 rows of `tile`, times two, to `to`.
__device__ inline void twice(const char* tile, char* to) {
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
    for (int i = 0; i < 4; i++) {
        u32 r[4];
        ldmatrix_x4(r, swizzled((char*)tile, row, i * 2 + lane / 16));
        for (int j = 0; j < 4; j++) {
            float x[2];
            unpack2(x, r[j]);
            r[j] = pack2(2 * x[0], 2 * x[1]);
        }
        stmatrix_x4(swizzled(to, row, i * 2 + lane / 16), r);
    }
}

template <bool WAIT, bool FENCE, bool BARRIER, bool READ>
__device__ inline void copy(const TensorMap& out, const TensorMap& inp) {
    Shared& s = shared();
    load(s.tile, inp, &s.full);
    WAIT ? mbarrier_wait(&s.full, 0) : named_barrier(1, 128);  // at least it has been asked for
    twice(s.tile, s.staging);
    if (FENCE) { fence_async(); }
    if (BARRIER) { named_barrier(1, 128); }
    if (threadIdx.x == 0) {
        tma_store(out, 0, 0, s.staging);  // store
        tma_store_commit();
        if (READ) { tma_store_wait<0>(); }
    }
    if (!WAIT) { mbarrier_wait(&s.full, 0); }
}
#define COPY(name, ...)                                                                                           \
    extern "C" __global__ void name(const __grid_constant__ TensorMap out, const __grid_constant__ TensorMap inp) { \
        copy<__VA_ARGS__>(out, inp);                                                                              \
    }
COPY(copy_good, true, true, true, true)
COPY(unfilled_bad, false, true, true, true)
COPY(fence_bad, true, false, true, true)
COPY(barrier_bad, true, true, false, true)
COPY(exit_bad, true, true, true, false)

// The staging buffer is written again while TMA may still read it.
template <int PENDING> __device__ inline void reuse(const TensorMap& out, const TensorMap& inp) {
    Shared& s = shared();
    load(s.tile, inp, &s.full);
    mbarrier_wait(&s.full, 0);
    for (int round = 0; round < 2; round++) {
        twice(round ? s.staging : s.tile, s.staging);
        fence_async();
        named_barrier(1, 128);
        if (threadIdx.x == 0) {
            tma_store(out, 0, round * 64, s.staging);
            tma_store_commit();
            tma_store_wait<PENDING>();
        }
        named_barrier(1, 128);
    }
    if (threadIdx.x == 0) { tma_store_wait<0>(); }
}
extern "C" __global__ void reuse_good(const __grid_constant__ TensorMap out, const __grid_constant__ TensorMap inp) {
    reuse<0>(out, inp);
}
extern "C" __global__ void reuse_bad(const __grid_constant__ TensorMap out, const __grid_constant__ TensorMap inp) {
    reuse<1>(out, inp);
}

// inp times itself, transposed; then its tile is filled with zeros from outside of the array.
template <bool WAIT_FIRST, int PENDING> __device__ inline void square(const TensorMap& out, const TensorMap& inp) {
    Shared& s = shared();
    load(s.tile, inp, &s.full);
    mbarrier_wait(&s.full, 0);
    float d[32] = {};
    wgmma_begin();
    for (int k = 0; k < 4; k++) {
        u64 operand = wgmma_operand(s.tile + k * 32, 8192);
        wgmma<false, false>(d, operand, operand, k > 0);
    }
    wgmma_commit();
    wgmma_wait<WAIT_FIRST ? PENDING : 1>();
    named_barrier(1, 128);
    if (threadIdx.x == 0) {
        mbarrier_expect(&s.other, 8192);
        tma_load(s.tile, inp, 0, 64, &s.other);  // refill
    }
    if (!WAIT_FIRST) { wgmma_wait<0>(); }
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
    for (int i = 0; i < 4; i++) {
        u32 r[4];
        for (int j = 0; j < 4; j++) { r[j] = pack2(d[i * 8 + 2 * j], d[i * 8 + 2 * j + 1]); }
        stmatrix_x4(swizzled(s.staging, row, i * 2 + lane / 16), r);
    }
    wgmma_wait<0>();
    fence_async();
    named_barrier(1, 128);
    if (threadIdx.x == 0) {
        tma_store(out, 0, 0, s.staging);
        tma_store_commit();
        tma_store_wait<0>();
    }
    mbarrier_wait(&s.other, 0);
}
#define SQUARE(name, ...)                                                                                         \
    extern "C" __global__ void name(const __grid_constant__ TensorMap out, const __grid_constant__ TensorMap inp) { \
        square<__VA_ARGS__>(out, inp);                                                                            \
    }
SQUARE(square_good, true, 0)
SQUARE(sums_bad, true, 1)
SQUARE(refill_bad, false, 0)

// A product reads the tile; each warp arrives for TMA to fill it again, before its product is waited for or after. BEGIN:
// wgmma_begin stands before the product.
template <bool BEGIN, bool WAIT_FIRST> __device__ inline void released(const TensorMap& inp) {
    Shared& s = shared();
    if (threadIdx.x == 0) {
        mbarrier_init(&s.other, 4);
        mbarrier_init_done();
    }
    __syncthreads();
    load(s.tile, inp, &s.full);
    mbarrier_wait(&s.full, 0);
    float d[32] = {};
    u64 operand = wgmma_operand(s.tile, 8192);
    if (BEGIN) { wgmma_begin(); }
    wgmma<false, false>(d, operand, operand, false);  // released
    wgmma_commit();
    if (WAIT_FIRST) { wgmma_wait<0>(); }
    if (threadIdx.x % 32 == 0) { mbarrier_arrive(&s.other); }
    if (!WAIT_FIRST) { wgmma_wait<0>(); }
    if (threadIdx.x == 0) { mbarrier_wait(&s.other, 0); }
    load(s.tile, inp, &s.full);
    mbarrier_wait(&s.full, 1);
}
#define RELEASED(name, ...)                                                                                       \
    extern "C" __global__ void name(const __grid_constant__ TensorMap out, const __grid_constant__ TensorMap inp) { \
        released<__VA_ARGS__>(inp);                                                                               \
    }
RELEASED(released_good, true, true)
RELEASED(released_bad, true, false)
RELEASED(begin_bad, false, true)

// TMA fills the tile again, which all warps have read, but the first UNFENCED threads without a fence since.
template <int UNFENCED> __device__ inline void refilled(const TensorMap& inp) {
    Shared& s = shared();
    load(s.tile, inp, &s.full);
    mbarrier_wait(&s.full, 0);
    u32 r[4];
    ldmatrix_x4(r, s.tile + threadIdx.x % 32 * 16);
    if (threadIdx.x >= UNFENCED) { fence_async(); }
    named_barrier(1, 128);
    load(s.tile, inp, &s.full);
    mbarrier_wait(&s.full, 1);
}
extern "C" __global__ void refilled_good(const __grid_constant__ TensorMap out, const __grid_constant__ TensorMap inp) {
    refilled<0>(inp);
}
extern "C" __global__ void refilled_bad(const __grid_constant__ TensorMap out, const __grid_constant__ TensorMap inp) {
    refilled<32>(inp);
}

extern "C" __global__ void load_bad(const __grid_constant__ TensorMap out, const __grid_constant__ TensorMap inp) {
    Shared& s = shared();
    load(s.tile, inp, &s.full);
}
extern "C" __global__ void phase_bad(const __grid_constant__ TensorMap out, const __grid_constant__ TensorMap inp) {
    Shared& s = shared();
    load(s.tile, inp, &s.full);
    mbarrier_wait(&s.full, 0);
    mbarrier_wait(&s.other, 0);  // nobody arrives
}
extern "C" __global__ void few_bad(const __grid_constant__ TensorMap out, const __grid_constant__ TensorMap inp) {
    if (threadIdx.x < 96) { named_barrier(1, 128); }  // few_bad
}
extern "C" __global__ void outside_bad(const __grid_constant__ TensorMap out, const __grid_constant__ TensorMap inp) {
    Shared& s = shared();
    load(s.staging + 4096, inp, &s.full);
    mbarrier_wait(&s.full, 0);
}
extern "C" __global__ void endless_bad(const __grid_constant__ TensorMap out, const __grid_constant__ TensorMap inp) {
    Shared& s = shared();
    for (int phase = 0; phase < 2; phase ^= 1) {
        load(s.tile, inp, &s.full);
        mbarrier_wait(&s.full, phase);
        named_barrier(1, 128);
    }
}

// A ring of one stage: thread 0 brings the tile twice, and before the second time waits for an arrival from every reading
// warp, which lane 0 makes for all lanes. ORDER: what stands before that arrival.
enum Order { NOTHING, SYNCWARP, SHUFFLE, WGMMA, ALL_ARRIVE, LATE_FENCE };

template <int ORDER> __device__ inline void ring(const TensorMap& inp) {
    Shared& s = shared();
    int lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        mbarrier_init(&s.other, ORDER == ALL_ARRIVE ? 96 : 3);
        mbarrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int round = 0; round < 2; round++) {
            mbarrier_wait(&s.other, round ^ 1);
            load(s.tile, inp, &s.full);
        }
        mbarrier_wait(&s.full, 1);
    } else if (threadIdx.x >= 32) {
        mbarrier_wait(&s.full, 0);
        float sum = 0;
        for (int i = 0; i < 4; i++) { sum += ((const float*)s.tile)[lane * 4 + i]; }  // ring
        u32 r[4];
        if (ORDER == LATE_FENCE) { ldmatrix_x4(r, s.tile + 4096 + lane % 16 * 16); }
        if (ORDER == SYNCWARP || ORDER == LATE_FENCE) { __syncwarp(); }
        if (ORDER == SHUFFLE) { sum = __shfl_sync(~0u, sum, 0); }
        if (ORDER == WGMMA) { wgmma_begin(); }
        if (lane == 0 || ORDER == ALL_ARRIVE) { mbarrier_arrive(&s.other); }
        if (ORDER == LATE_FENCE) { fence_async(); }
        if (sum == 12345.0f) { s.staging[lane] = 1; }
    }
}
#define RING(name, order)                                                                                         \
    extern "C" __global__ void name(const __grid_constant__ TensorMap out, const __grid_constant__ TensorMap inp) { \
        ring<order>(inp);                                                                                         \
    }
RING(ring_good, SYNCWARP)
RING(ring_all_good, ALL_ARRIVE)
RING(ring_bad, NOTHING)
RING(ring_shuffle_bad, SHUFFLE)
RING(ring_wgmma_bad, WGMMA)
RING(ring_late_fence_bad, LATE_FENCE)

// Ordinary accesses.
template <bool BARRIER> __device__ inline void plain(int shift) {
    short *staging = (short*)shared().staging, *tile = (short*)shared().tile;
    staging[threadIdx.x] = threadIdx.x;
    if (BARRIER) { named_barrier(1, 128); }
    tile[threadIdx.x] = staging[max((int)threadIdx.x - 1, 0) + shift];  // plain
}
extern "C" __global__ void plain_good(const __grid_constant__ TensorMap out, const __grid_constant__ TensorMap inp) {
    plain<true>(0);
}
extern "C" __global__ void plain_bad(const __grid_constant__ TensorMap out, const __grid_constant__ TensorMap inp) {
    plain<false>(0);
}
extern "C" __global__ void unwritten_bad(const __grid_constant__ TensorMap out, const __grid_constant__ TensorMap inp) {
    plain<true>(2);
}
template <bool FENCE> __device__ inline void store(const TensorMap& out) {
    Shared& s = shared();
    for (int i = threadIdx.x; i < 4096; i += 128) { ((floatX*)s.staging)[i] = (floatX)2.0f; }
    if (FENCE) { fence_async(); }
    named_barrier(1, 128);
    if (threadIdx.x == 0) {
        tma_store(out, 0, 0, s.staging);  // plain store
        tma_store_commit();
        tma_store_wait<0>();
    }
}
extern "C" __global__ void store_good(const __grid_constant__ TensorMap out, const __grid_constant__ TensorMap inp) {
    store<true>(out);
}
extern "C" __global__ void store_bad(const __grid_constant__ TensorMap out, const __grid_constant__ TensorMap inp) {
    store<false>(out);
}
extern "C" __global__ void beyond_bad(const __grid_constant__ TensorMap out, const __grid_constant__ TensorMap inp) {
    Shared& s = shared();
    (&s.staging[0])[8192 + 16 + 1024 + threadIdx.x] = 1;  // beyond
}
extern "C" __global__ void global_array(float* out, int n) {
    if ((int)threadIdx.x < n) { out[threadIdx.x] = 1.0f; }  // global
}
