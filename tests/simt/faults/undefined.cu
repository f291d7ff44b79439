// Operations without a defined result, and kernels that never end.

extern "C" __global__ void overflow(int* out, int a, int b) {
    out[threadIdx.x] = a * b + (int)threadIdx.x;  // overflow
}
extern "C" __global__ void shift(int* out, int a, int b) {
    out[threadIdx.x] = a << b;  // shift
}
extern "C" __global__ void divide(int* out, int a, int b) {
    out[threadIdx.x] = a / b;  // divide
}
extern "C" __global__ void asserts(int* out, int a, int b) {
    assert((int)threadIdx.x < a);  // asserts
    out[threadIdx.x] = b;
}
__device__ int calls;
extern "C" __global__ void variable(int* out) {
    if (threadIdx.x == 2) {
        out[0] = calls++;  // variable
    }
}
extern "C" __global__ void endless(int* out) {
    while (atomicAdd(out, 0) == 0) {}  // endless
}
extern "C" __global__ void endless_register(int* out) {
    for (unsigned i = threadIdx.x; i != 33; i += 2) { out[0] = 1; }  // endless_register
}
extern "C" __global__ void endless_sum(float* out, const float* inp) {
    float sum = 0.0f;
    for (int i = 0; i < 32; i = (i + 1) % 32) { sum += inp[i]; }  // endless_sum
    out[threadIdx.x] = sum;
}
extern "C" __global__ void endless_barrier(int* out) {
    while (!__syncthreads_or(threadIdx.x == blockDim.x)) {}  // endless_barrier
    out[threadIdx.x] = 1;
}
// Many blocks, or many elements, take long too.
extern "C" __global__ void long_good(int* out, int n) {
    for (int i = 0; i < n; i++) { out[blockIdx.x * n + i] = i; }
}
extern "C" __global__ void scalars(float* out, int i, unsigned u, long long l, float f, double d, bool b, size_t s) {
    if (threadIdx.x == 0) { out[0] = (float)(i + u + l + f + d + b + s); }
}
extern "C" __global__ void __launch_bounds__(64) bounded(int* out) { out[threadIdx.x] = 1; }
