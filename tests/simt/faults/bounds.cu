// Accesses outside of arrays, to memory nobody wrote, and through misaligned or constant pointers.

extern "C" __global__ void global_good(float* out, const float* inp, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) { out[i] = 2 * inp[i]; }
}
extern "C" __global__ void global_read_bad(float* out, const float* inp, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i <= n) {
        float value = 2 * inp[i];  // global_read_bad
        if (i < n) { out[i] = value; }
    }
}
extern "C" __global__ void global_write_bad(float* out, const float* inp, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i <= n) { out[i] = 2 * inp[i < n ? i : 0]; }  // global_write_bad
}
extern "C" __global__ void before_bad(float* out, const float* inp) {
    out[threadIdx.x] = (inp + threadIdx.x)[-1];  // before_bad
}

extern "C" __global__ void shared_good(float* out, const float* inp) {
    __shared__ float tile[32], other[32];
    tile[threadIdx.x] = other[threadIdx.x] = inp[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = tile[31 - threadIdx.x] + other[threadIdx.x];
}
extern "C" __global__ void shared_read_bad(float* out, const float* inp) {
    __shared__ float tile[32], other[32];
    tile[threadIdx.x] = other[threadIdx.x] = inp[threadIdx.x];
    __syncthreads();
    const float* p = tile;
    out[threadIdx.x] = p[32 - threadIdx.x] + other[threadIdx.x];  // shared_read_bad
}
extern "C" __global__ void shared_write_bad(float* out, const float* inp) {
    extern __shared__ float dynamic[];
    dynamic[threadIdx.x + 1] = inp[threadIdx.x];  // shared_write_bad
    __syncthreads();
    out[threadIdx.x] = dynamic[threadIdx.x + 1];
}
// The index leaves a row of a two-dimensional array, but not the array: only the compiler's check can see it.
extern "C" __global__ void row_bad(float* out, const float* inp) {
    __shared__ float tile[4][8];
    tile[threadIdx.x / 8][threadIdx.x % 8] = inp[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x / 9][threadIdx.x % 9];  // row_bad
}

extern "C" __global__ void uninitialised_good(float* out, const float* inp) {
    __shared__ float tile[32];
    tile[threadIdx.x] = threadIdx.x < 31 ? inp[threadIdx.x] : 0;
    __syncthreads();
    out[blockIdx.x * 32 + threadIdx.x] = tile[31 - threadIdx.x];
}
extern "C" __global__ void uninitialised_bad(float* out,
                                             const float* inp) {  // the second block must not see the first's
    __shared__ float tile[32];
    if (threadIdx.x < 31 || blockIdx.x == 0) { tile[threadIdx.x] = inp[threadIdx.x]; }
    __syncthreads();
    out[blockIdx.x * 32 + threadIdx.x] = tile[31 - threadIdx.x];  // uninitialised_bad
}
extern "C" __global__ void accumulate(float* out, const float* inp) {
    out[threadIdx.x] += inp[threadIdx.x];  // accumulate
}

extern "C" __global__ void vector_read(float* out, const float* inp, int shift) {
    float4 v = *reinterpret_cast<const float4*>(inp + 4 * threadIdx.x + shift);  // vector_read
    out[threadIdx.x] = v.x + v.y + v.z + v.w;
}
extern "C" __global__ void vector_write(float* out, const float* inp, int shift) {
    float x = inp[threadIdx.x];
    *reinterpret_cast<float4*>(out + 4 * threadIdx.x + shift) = make_float4(x, x, x, x);  // vector_write
}

extern "C" __global__ void null_bad(float* out, const float* bias) {
    out[threadIdx.x] = bias[threadIdx.x];  // null_bad
}
extern "C" __global__ void const_bad(float* out, const float* inp) {
    out[threadIdx.x] = inp[threadIdx.x];
    if (threadIdx.x == 5) { const_cast<float*>(inp)[2] = 1; }  // const_bad
}
extern "C" __global__ void local_bad(int* out) {  // a pointer to another thread's local variable
    __shared__ int* shared;
    int local[2] = {(int)threadIdx.x, 1};
    if (threadIdx.x == 0) { shared = local; }
    __syncthreads();
    out[threadIdx.x] = shared[threadIdx.x % 2] + local[(threadIdx.x + 1) % 2];  // local_bad
}
extern "C" __global__ void too_much_shared(int* out) {
    __shared__ int tile[16384];  // too_much_shared
    tile[threadIdx.x] = 1;
    out[threadIdx.x] = tile[threadIdx.x];
}
extern "C" __global__ void too_much_in_all(int* out) {
    extern __shared__ int dynamic[];
    __shared__ int tile[32];  // too_much_in_all
    dynamic[threadIdx.x] = tile[threadIdx.x] = 1;
    out[threadIdx.x] = dynamic[threadIdx.x] + tile[threadIdx.x];
}
