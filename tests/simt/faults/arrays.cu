// Indices one past the end of local arrays, of classes and behind pointers: what g++'s own check lets through, because it
// allows a reference to the element past the end.
#include "common.cuh"

template <int N> __device__ inline void sum_of_pack(float* out, const float* inp) {
    f128 pack = load128(inp + 4 * threadIdx.x);
    float sum = 0;
    for (int k = 0; k < N; k++) { sum += pack[k]; }  // pack
    out[threadIdx.x] = sum;
}
extern "C" __global__ void pack_good(float* out, const float* inp) { sum_of_pack<f128::size>(out, inp); }
extern "C" __global__ void pack_bad(float* out, const float* inp) { sum_of_pack<f128::size + 1>(out, inp); }

extern "C" __global__ void pack_write_bad(float* out, const float* inp) {
    x128 packs[2] = {};
    for (int k = 0; k <= x128::size; k++) { packs[0][k] = inp[k]; }  // pack_write_bad
    out[threadIdx.x] = packs[0][threadIdx.x % 4] + packs[1][0];
}

// `n` of two packs.
extern "C" __global__ void packs(float* out, const float* inp, int n) {
    f128 rows[2], total = zeros128<float>();
    for (int k = 0; k < 2; k++) { rows[k] = load128(inp + 4 * k); }
    for (int k = 0; k < n; k++) { total[1] += rows[k][1]; }  // packs
    out[threadIdx.x] = total[1];
}

struct Pair {
    float a, b;
    __device__ float sum() const { return a + b; }
};
extern "C" __global__ void table(float* out, const float* inp, int n) {
    Pair pairs[2][3];
    for (int i = 0; i < 6; i++) { pairs[i / 3][i % 3] = {inp[2 * i], inp[2 * i + 1]}; }
    float sum = 0;
    for (int i = 0; i < n; i++) { sum += pairs[0][i].sum(); }  // table
    out[threadIdx.x] = sum;
}

__device__ inline void count_up(float* values, int n) {
    for (int i = 0; i < n; i++) { values[i] = i; }  // pointer
}
extern "C" __global__ void pointer(float* out, int n) {
    float values[4];
    count_up(values, n);
    out[threadIdx.x] = values[threadIdx.x % 4];
}
