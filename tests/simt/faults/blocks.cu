// Blocks that meet in global memory.

extern "C" __global__ void own_good(int* out) { out[blockIdx.x * 32 + threadIdx.x] = 1; }
extern "C" __global__ void two_write_bad(int* out) {
    out[blockIdx.x * 31 + threadIdx.x] = 1;  // two_write_bad
}
extern "C" __global__ void read_bad(int* out) {
    int sum = threadIdx.x == 0 && blockIdx.x ? out[blockIdx.x * 32 - 1] : 0;  // read_bad
    out[blockIdx.x * 32 + threadIdx.x] = 1 + sum;
}
extern "C" __global__ void write_after_read_bad(int* out) {
    if (blockIdx.x == 0 && threadIdx.x == 3) { out[64] += out[63]; }
    if (blockIdx.x == 1 && threadIdx.x == 3) { out[63] = 1; }  // write_after_read_bad
}

// The last block to arrive at a counter adds up what all blocks wrote.
template <bool FENCE, bool BARRIER> inline __device__ void last_block(int* out, int* partial, unsigned* count) {
    __shared__ bool last;
    partial[blockIdx.x * blockDim.x + threadIdx.x] = blockIdx.x + 1;  // partial
    if (FENCE) { __threadfence(); }
    if (BARRIER) { __syncthreads(); }
    if (threadIdx.x == 0) { last = atomicInc(count, gridDim.x - 1) == gridDim.x - 1; }
    __syncthreads();
    if (last && threadIdx.x == 0) {
        int sum = 0;
        for (int i = 0; i < gridDim.x * blockDim.x; ++i) {
            sum += partial[i];  // sum
        }
        out[0] = sum;
    }
}
extern "C" __global__ void counter_good(int* out, int* partial, unsigned* count) {
    last_block<true, true>(out, partial, count);
}
extern "C" __global__ void no_fence_bad(int* out, int* partial, unsigned* count) {
    last_block<false, true>(out, partial, count);
}
extern "C" __global__ void no_barrier_bad(int* out, int* partial, unsigned* count) {
    last_block<true, false>(out, partial, count);
}

// One fence by the thread that counts, after the barrier, covers the whole block.
extern "C" __global__ void one_fence_good(int* out, int* partial, unsigned* count) {
    partial[blockIdx.x * 32 + threadIdx.x] = 1;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        if (atomicAdd(count, 1u) == gridDim.x - 1) {
            int sum = 0;
            for (int i = 0; i < gridDim.x * 32; ++i) { sum += partial[i]; }
            out[0] = sum;
        }
    }
}

extern "C" __global__ void histogram_good(int* out, const int* inp) {
    atomicAdd(&out[inp[blockIdx.x * 32 + threadIdx.x]], 1);
}
extern "C" __global__ void atomic_and_read_bad(int* out, const int* inp) {
    atomicAdd(&out[inp[threadIdx.x]], 1);
    if (threadIdx.x == 31) { out[8] = out[0]; }  // atomic_and_read_bad
}
// Who comes first gets the first place: no race, but the result depends on the order.
extern "C" __global__ void order_bad(int* out, unsigned* count) { out[atomicAdd(count, 1u)] = threadIdx.x; }
extern "C" __global__ void float_atomic(float* out, const float* inp) {
    atomicAdd(out, inp[threadIdx.x]);  // float_atomic
}

// Counts in two levels: the last block of each pair counts for the pair, the last pair adds up.
extern "C" __global__ void tree_good(int* out, int* partial, unsigned* counts) {
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = blockIdx.x + 1;
        __threadfence();
        if (atomicAdd(&counts[1 + blockIdx.x / 2], 1u) == 1) {
            __threadfence();
            if (atomicAdd(&counts[0], 1u) == gridDim.x / 2 - 1) {
                int sum = 0;
                for (int i = 0; i < gridDim.x; ++i) { sum += partial[i]; }
                out[0] = sum;
            }
        }
    }
}
// Every thread counts for itself.
extern "C" __global__ void each_thread_good(int* out, int* partial, unsigned* count) {
    int n = gridDim.x * blockDim.x;
    partial[blockIdx.x * blockDim.x + threadIdx.x] = 1;
    __threadfence();
    if (atomicAdd(count, 1u) == n - 1) {
        int sum = 0;
        for (int i = 0; i < n; ++i) { sum += partial[i]; }
        out[0] = sum;
    }
}
// So many synchronisations that the executor's clock starts anew within the launch.
extern "C" __global__ void long_good(int* out) {
    for (int i = 0; i < 1000; ++i) { __syncwarp(); }
    if (threadIdx.x == 0) { out[blockIdx.x] = 1; }
}
extern "C" __global__ void long_bad(int* out) {
    for (int i = 0; i < 1000; ++i) { __syncwarp(); }
    if (threadIdx.x == 0 && (blockIdx.x == 0 || blockIdx.x == gridDim.x - 1)) {
        out[0] = 1;  // long_bad
    }
}

// Only what stands before the atomic is covered by it.
extern "C" __global__ void late_write_bad(int* out, int* partial, unsigned* count) {
    if (threadIdx.x == 0) {
        partial[2 * blockIdx.x] = 1;
        __threadfence();
        bool last = atomicAdd(count, 1u) == gridDim.x - 1;
        partial[2 * blockIdx.x + 1] = 1;
        if (last) { out[0] = partial[1] + partial[3]; }  // late_write_bad
    }
}
