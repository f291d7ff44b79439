// No faults: access patterns of known cost.

extern "C" __global__ void strided(float* out, const float* inp, int stride) {
    float value = inp[threadIdx.x * stride];  // strided
    out[threadIdx.x] = value;
}
extern "C" __global__ void column(float* out, int row) {
    extern __shared__ float tile[];
    for (int i = 0; i < 32; ++i) { tile[i * row + threadIdx.x] = i; }
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x * row];
}
extern "C" __global__ void vectors(float* out, int step) {
    extern __shared__ __align__(16) float tile[];
    for (int i = threadIdx.x; i < 32 * step; i += 32) { tile[i] = i; }
    __syncthreads();
    float4 v = *reinterpret_cast<const float4*>(tile + threadIdx.x * step);
    out[threadIdx.x] = v.x + v.w;
}
