// cp.async: bytes that are used before they have landed.
#include "ptx.cuh"

template <bool COMMIT, int PENDING, bool BARRIER> inline __device__ void copy(int* out, const int* inp) {
    __shared__ alignas(16) int tile[2][128];
    int own = 4 * threadIdx.x, other = own ? own - 4 : 0;
    cp_async_16(&tile[0][own], inp + own, true);
    if (COMMIT) { cp_async_commit(); }
    cp_async_16(&tile[1][own], inp + 128 + own, threadIdx.x < 16);
    cp_async_commit();
    cp_async_wait<1>();
    if (BARRIER) { __syncthreads(); }
    int first = tile[0][other];  // first
    cp_async_wait<PENDING>();
    __syncthreads();
    int second = tile[1][other];  // second
    out[threadIdx.x] = first + second;
}
extern "C" __global__ void async_good(int* out, const int* inp) { copy<true, 0, true>(out, inp); }
extern "C" __global__ void no_commit_bad(int* out, const int* inp) { copy<false, 0, true>(out, inp); }
extern "C" __global__ void no_wait_bad(int* out, const int* inp) { copy<true, 1, true>(out, inp); }
extern "C" __global__ void no_barrier_bad(int* out, const int* inp) { copy<true, 0, false>(out, inp); }

extern "C" __global__ void misaligned_bad(int* out, const int* inp) {
    __shared__ alignas(16) int tile[160];
    cp_async_16(tile + 4 * threadIdx.x, inp + 4 * threadIdx.x + 1, true);  // misaligned_bad
    cp_async_commit();
    cp_async_wait<0>();
    out[threadIdx.x] = tile[4 * threadIdx.x];
}
// The buffer is filled again while the slower warp may still read it.
extern "C" __global__ void refill_bad(int* out, const int* inp) {
    __shared__ alignas(16) int tile[256];
    cp_async_16(tile + 4 * threadIdx.x, inp, true);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    int value = tile[255 - threadIdx.x];
    cp_async_16(tile + 4 * threadIdx.x, inp + 4, true);  // refill_bad
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    out[threadIdx.x] = value + tile[255 - threadIdx.x];
}
extern "C" __global__ void ldmatrix_bad(int* out, const int* inp) {  // rows of 24 bytes: every second one is misaligned
    __shared__ alignas(16) short tile[8 * 12];
    for (int i = threadIdx.x; i < 8 * 12; i += 32) { tile[i] = (short)inp[i]; }
    __syncthreads();
    unsigned r[1];
    ldmatrix_x1(r, tile + threadIdx.x % 8 * 12);  // ldmatrix_bad
    out[threadIdx.x] = (int)r[0];
}
