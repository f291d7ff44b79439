// Shuffles and votes that not all of the named lanes reach.

extern "C" __global__ void shuffle_good(int* out, const int* inp) {
    int value = inp[threadIdx.x];
    if (threadIdx.x % 32 < 16) { value = __shfl_xor_sync(0x0000ffffu, value, 1); }
    out[threadIdx.x] = value;
}
extern "C" __global__ void mask_bad(int* out, const int* inp) {  // the mask leaves out lanes that call
    out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, inp[threadIdx.x], 1);  // mask_bad
}
extern "C" __global__ void source_bad(int* out, const int* inp) {  // reads a lane that the mask leaves out
    if (threadIdx.x % 32 < 16) {
        out[threadIdx.x] = __shfl_down_sync(0x0000ffffu, inp[threadIdx.x], 1);  // source_bad
    }
}
extern "C" __global__ void divergent_bad(int* out, const int* inp) {  // only half of the named lanes come
    int value = inp[threadIdx.x];
    if (threadIdx.x % 32 < 16) {
        value = __shfl_xor_sync(0xffffffffu, value, 1);  // divergent_bad
    }
    __syncthreads();
    out[threadIdx.x] = value;
}
extern "C" __global__ void exited_bad(int* out, const int* inp, int n) {  // the tail of the grid has left
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) { return; }
    out[i] = __shfl_xor_sync(0xffffffffu, inp[i], 1);  // exited_bad
}
extern "C" __global__ void kinds_bad(int* out, const int* inp) {  // different functions meet
    int value = inp[threadIdx.x];
    if (threadIdx.x % 2) {
        value = __shfl_xor_sync(0xffffffffu, value, 2);
    } else {
        value = __any_sync(0xffffffffu, value);  // kinds_bad
    }
    out[threadIdx.x] = value;
}
