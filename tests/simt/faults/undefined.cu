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
    while (atomicAdd(out, 0) == 0) {}
}
extern "C" __global__ void scalars(float* out, int i, unsigned u, long long l, float f, double d, bool b, size_t s) {
    if (threadIdx.x == 0) { out[0] = (float)(i + u + l + f + d + b + s); }
}
extern "C" __global__ void __launch_bounds__(64) bounded(int* out) { out[threadIdx.x] = 1; }
