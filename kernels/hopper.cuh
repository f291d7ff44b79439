// What matmul_sm90.cu and attention_sm90.cu are both built from: the roles in a block, and the ring between them.
//
// A block has three warpgroups. One thread of the first is the producer: it asks TMA to fill the stages of a ring, one
// after the other. The other two warpgroups are the consumers: they multiply what lies in the stages. Two mbarriers for
// each stage keep them apart: full[i] has a phase for each time TMA has filled stage i, and empty[i] one for each time
// all its readers are done with it. No thread may wait for a phase while the one before the last is still under way: an
// mbarrier cannot tell these two apart (ptx_sm90.cuh).
#pragma once
#include "ptx_sm90.cuh"

constexpr int BLOCK_THREADS = 3 * 128;                            // a producer and two consumers
constexpr int CONSUMER_REGISTERS = 240, PRODUCER_REGISTERS = 24;  // 2 * 240 + 24 = 3 * 168, what 384 threads can have

// One thread, before divide_roles. readers: warps that arrive at empty[i] when they have read stage i.
__device__ inline void init_ring(u64* full, u64* empty, int stages, int readers) {
    for (int i = 0; i < stages; i++) {
        mbarrier_init(&full[i], 1);
        mbarrier_init(&empty[i], readers);
    }
}

// One arrival of a warp, all lanes of which call this.
__device__ inline void warp_arrive(u64* barrier, int lane) {
    if (lane == 0) { mbarrier_arrive(barrier); }
}

// Bytes from here to the next multiple of 1024: where a block's Shared begins in its dynamic shared memory.
__device__ inline u32 to_1024(const char* from) { return (1024 - shared_address(from) % 1024) % 1024; }

// The rest of the kernel: one thread calls produce(), two warpgroups call consume(0) and consume(1). The barriers have
// been initialised by thread 0.
template <class P, class C> __device__ inline void divide_roles(P produce, C consume) {
    __syncthreads();
    int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // tells the compiler that a warp has one role
    if (warpgroup == 0) {
        fewer_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) { produce(); }
    } else {
        more_registers<CONSUMER_REGISTERS>();
        consume(warpgroup - 1);
    }
}
