// Missing, divergent and misplaced barriers. Each fault stands beside its correct twin.

// Every thread writes its element and reads that of the thread before it.
extern "C" __global__ void missing_good(int* out, const int* inp) {
    __shared__ int tile[64];
    tile[threadIdx.x] = inp[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x ? threadIdx.x - 1 : 0];
}
extern "C" __global__ void missing_bad(int* out, const int* inp) {
    __shared__ int tile[64];
    tile[threadIdx.x] = inp[threadIdx.x];
    out[threadIdx.x] = tile[threadIdx.x ? threadIdx.x - 1 : 0];  // missing_bad
}

// The tile is used twice: the second write must wait for the first round's readers.
extern "C" __global__ void reuse_good(int* out, const int* inp) {
    __shared__ int tile[64];
    int sum = 0;
    for (int round = 0; round < 2; ++round) {
        tile[threadIdx.x] = inp[64 * round + threadIdx.x];
        __syncthreads();
        sum += tile[63 - threadIdx.x];
        __syncthreads();
    }
    out[threadIdx.x] = sum;
}
extern "C" __global__ void reuse_bad(int* out, const int* inp) {
    __shared__ int tile[64];
    int sum = 0;
    for (int round = 0; round < 2; ++round) {
        tile[threadIdx.x] = inp[64 * round + threadIdx.x];
        __syncthreads();
        sum += tile[63 - threadIdx.x];  // reuse_bad
    }
    out[threadIdx.x] = sum;
}

// The writer is itself the last one to read.
extern "C" __global__ void last_reader_bad(int* out, const int* inp) {
    __shared__ int value;
    if (threadIdx.x == 0) { value = inp[0]; }
    __syncthreads();
    out[threadIdx.x] = value;
    if (threadIdx.x == 63) { value = 1; }  // last_reader_bad
}

// Some threads leave before the barrier.
extern "C" __global__ void exit_good(int* out, const int* inp, int n) {
    __shared__ int tile[64];
    tile[threadIdx.x] = threadIdx.x < n ? inp[threadIdx.x] : 0;
    __syncthreads();
    if (threadIdx.x < n) { out[threadIdx.x] = tile[n - 1 - threadIdx.x]; }
}
extern "C" __global__ void exit_bad(int* out, const int* inp, int n) {
    __shared__ int tile[64];
    if (threadIdx.x >= n) { return; }
    tile[threadIdx.x] = inp[threadIdx.x];
    __syncthreads();  // exit_bad
    out[threadIdx.x] = tile[n - 1 - threadIdx.x];
}

// The two sides of a branch wait at barriers of their own.
extern "C" __global__ void branch_bad(int* out, const int* inp) {
    __shared__ int tile[64];
    tile[threadIdx.x] = inp[threadIdx.x];
    if (threadIdx.x < 32) {
        __syncthreads();
        out[threadIdx.x] = tile[63 - threadIdx.x];
    } else {
        __syncthreads();  // branch_bad
        out[threadIdx.x] = -tile[63 - threadIdx.x];
    }
}

// Within a warp: __syncwarp orders memory, a shuffle does not.
extern "C" __global__ void warp_good(int* out, const int* inp) {
    __shared__ int tile[32];
    tile[threadIdx.x] = inp[threadIdx.x];
    __syncwarp();
    out[threadIdx.x] = tile[31 - threadIdx.x];
}
extern "C" __global__ void warp_bad(int* out, const int* inp) {
    __shared__ int tile[32];
    tile[threadIdx.x] = inp[threadIdx.x];
    int sum = __shfl_xor_sync(0xffffffffu, inp[threadIdx.x], 1);
    out[threadIdx.x] = tile[31 - threadIdx.x] + 0 * sum;  // warp_bad
}
// Pairs of lanes that synchronise in a chain: 0 with 1, then 1 with 2.
extern "C" __global__ void chain_good(int* out) {
    __shared__ int value;
    int lane = threadIdx.x;
    if (lane == 0) { value = 7; }
    if (lane <= 1) { __syncwarp(0x3); }
    if (lane == 1 || lane == 2) { __syncwarp(0x6); }
    if (lane == 2) { out[0] = value; }
}
extern "C" __global__ void chain_bad(int* out) {
    __shared__ int value;
    int lane = threadIdx.x;
    if (lane == 0) { value = 7; }
    if (lane == 1 || lane == 2) { __syncwarp(0x6); }
    if (lane <= 1) { __syncwarp(0x3); }
    if (lane == 2) { out[0] = value; }  // chain_bad
}
