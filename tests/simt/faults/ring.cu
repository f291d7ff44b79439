// The smallest kernels with the ring's pattern: thread 0 brings 128 numbers by TMA, `rounds` times into the same place;
// warp 1 reads them with ordinary loads, and an mbarrier says that it has. The kernels differ in what orders the reads of
// lanes 1 to 31 before the arrival that lets TMA overwrite what they read. grid 1, block 64; out (rounds, 32), inp
// (rounds, 128) f32. `python dev/gpu_check.py sanitize --pattern` asks racecheck about them, tests/test_simt.py the
// executor.
#include "ptx_sm90.cuh"

enum Order { NOTHING, SYNCWARP, FENCE, ALL_ARRIVE, BLOCK };

template <int ORDER> __device__ inline void ring(float* out, const float* inp, int rounds) {
    __shared__ alignas(16) float numbers[128];
    __shared__ u64 full, empty;
    int lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        mbarrier_init(&full, 1), mbarrier_init(&empty, ORDER == ALL_ARRIVE ? 32 : 1);
        mbarrier_init_done();
    }
    __syncthreads();
    for (int round = 0; round < rounds; round++) {
        if (threadIdx.x == 0) {
            if (ORDER != BLOCK) { mbarrier_wait(&empty, round & 1 ^ 1); }
            mbarrier_expect(&full, sizeof(numbers));
            bulk_load(numbers, inp + round * 128, sizeof(numbers), &full);  // load
        }
        if (threadIdx.x >= 32) {
            mbarrier_wait(&full, round & 1);
            float sum = 0.0f;
            for (int i = 0; i < 4; i++) { sum += numbers[(lane + i * 32 + 1) % 128]; }  // read
            out[round * 32 + lane] = sum;
            if (ORDER == FENCE) { fence_async(); }
            if (ORDER == SYNCWARP || ORDER == FENCE) { __syncwarp(); }
            if (ORDER != BLOCK && (lane == 0 || ORDER == ALL_ARRIVE)) { mbarrier_arrive(&empty); }
        }
        if (ORDER == BLOCK) { __syncthreads(); }
    }
    if (threadIdx.x == 0) { mbarrier_wait(&full, rounds - 1 & 1); }
}

#define RING(name, order)                                                                    \
    extern "C" __global__ void name(float* out, const float* inp, int rounds) {              \
        ring<order>(out, inp, rounds);                                                       \
    }
RING(nothing_bad, NOTHING)        // a race by the rules, although every lane has its numbers before it goes on
RING(syncwarp_good, SYNCWARP)     // __syncwarp orders the lanes' reads before lane 0's arrival
RING(fence_good, FENCE)           // and fence.proxy.async between ordinary reads and TMA
RING(all_arrive_good, ALL_ARRIVE) // each lane arrives for itself
RING(block_good, BLOCK)           // no mbarrier for what is empty: the whole block meets
