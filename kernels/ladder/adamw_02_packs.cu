// AdamW over the flat arena of all parameters, rung 2: one thread per 16 bytes of params.
//
// Idea        The widest access for every array: 16 bytes of params and grads, 2 x 16 bytes of each fp32 array a thread.
// Prediction  Fewer instructions, faster than one element a thread (1012 us).
// Measured    2514 us (33 % of copy speed), two and a half times as long as rung 1. H200, 124 M parameters, bf16 with a
//             master, 2026-11-24.
// Lesson      Neighbouring threads are 32 bytes apart in the fp32 arrays, so that each access of a warp fills half of its
//             sectors: the executor counts 1.86 x the sectors (55 % coalesced). The three exact divisions and the root of
//             each of 8 elements come on top, and so does a search that diverges among them. kernels/adamw.cu deals the
//             elements out 4 by 4 instead.
//
// The formula, the arrays and what depends on what stand in kernels/adamw.cu. TENSORS, the rows of the tables, is that of
// the launcher.
#include "common.cuh"

// The largest power of two below the number of tensors, where the search begins; 0 for one tensor.
__host__ __device__ constexpr int largest_step(int tensors) {
    int step = 1;
    while (step < tensors) { step *= 2; }
    return step / 2;
}
constexpr int LARGEST_STEP = largest_step(TENSORS);

// The tensor that element i belongs to: the number of ends that are <= i, found by a binary search in steps that halve.
__device__ inline int find_tensor(const i64* ends, i64 i) {
    constexpr bool power_of_two = (TENSORS & (TENSORS - 1)) == 0;  // then no step leads past the last tensor
    int tensor = 0;
    for (int step = LARGEST_STEP; step > 0; step /= 2) {
        if constexpr (!power_of_two) {
            if (tensor + step >= TENSORS) { continue; }
        }
        if (i >= ends[tensor + step - 1]) { tensor += step; }
    }
    return tensor;
}

struct Adam {
    float lr, c1, c2, beta1, to_m, beta2, to_v, eps, scale;  // to_m = 1 - beta1, to_v = 1 - beta2, rounded once
};

// The new value of one parameter; m and v are updated.
__device__ inline float adam_step(const Adam& a, float grad, float& m, float& v, float old, float decay) {
    float g = a.scale * grad;
    m = fmaf(a.beta1, m, a.to_m * g);
    v = fmaf(a.beta2, v, a.to_v * g * g);
    return old - a.lr * ((m / a.c1) / (sqrtf(v / a.c2) + a.eps) + decay * old);
}

__device__ inline bool finite(const float* norm_squared) {  // NaN fails the comparisons too
    return norm_squared[0] < INFINITY && norm_squared[1] < INFINITY;
}

__device__ inline float clip_scale(float norm_squared, float clip, float unscale) {
    float norm = unscale * sqrtf(norm_squared);
    return clip > 0.0f && norm > clip ? unscale * (clip / norm) : unscale;
}

// x128::size consecutive elements at array + i, as fp32; the whole pack if `full`, else the first `count`.
template <class T> __device__ inline void fetch(float* values, const T* array, i64 i, int count, bool full) {
    if (full) {
        for (int k = 0; k < x128::size; k += Packed128<T>::size) {
            Packed128<T> pack = load128cs(array + i + k);
            for (int e = 0; e < Packed128<T>::size; e++) { values[k + e] = (float)pack[e]; }
        }
    } else {
        for (int k = 0; k < count; k++) { values[k] = (float)array[i + k]; }
    }
}

__device__ inline void put(float* array, i64 i, const float* values, int count, bool full) {
    if (full) {
        for (int k = 0; k < x128::size; k += f128::size) {
            f128 pack;
            for (int e = 0; e < f128::size; e++) { pack[e] = values[k + e]; }
            store128cs(array + i + k, pack);
        }
    } else {
        for (int k = 0; k < count; k++) { array[i + k] = values[k]; }
    }
}

// One thread per 16 bytes of params. A tensor may begin in the middle of a pack: the search is repeated where one ends.
// grid ceil(N / x128::size / block), any block; all arrays start at 16 bytes.
extern "C" __global__ void adamw_update_packs(floatX* params, float* master, const floatG* grads, float* m, float* v,
                                                const i64* ends, const float* decays, const u32* seeds,
                                                const float* hyper, const float* norm_squared, float beta1, float to_m,
                                                float beta2, float to_v, float eps, float clip, i64 N) {
    i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * x128::size;
    if (i >= N || !finite(norm_squared)) { return; }
    float scale = clip_scale(norm_squared[0], clip, hyper[3]);
    Adam a = {hyper[0], hyper[1], hyper[2], beta1, to_m, beta2, to_v, eps, scale};
    int count = (int)min((i64)x128::size, N - i);
    bool full = count == x128::size;
    float grad[x128::size] = {}, old[x128::size] = {}, new_m[x128::size] = {}, new_v[x128::size] = {};
    fetch(grad, grads, i, count, full);
    fetch(new_m, m, i, count, full);
    fetch(new_v, v, i, count, full);
    if (master) {
        fetch(old, master, i, count, full);
    } else {
        fetch(old, params, i, count, full);
    }
    i64 begin = 0, end = 0;
    float decay = 0.0f;
    u32 seed = 0;
    x128 rounded = zeros128<floatX>();
#pragma unroll
    for (int k = 0; k < x128::size; k++) {
        if (k >= count) { break; }
        if (i + k >= end) {
            int tensor = find_tensor(ends, i + k);
            begin = tensor > 0 ? ends[tensor - 1] : 0;
            end = ends[tensor];
            decay = decays[tensor];
            seed = seeds[tensor];
        }
        old[k] = adam_step(a, grad[k], new_m[k], new_v[k], old[k], decay);
        rounded[k] = stochastic_round(old[k], noise(i + k - begin, seed));
    }
    put(m, i, new_m, count, full);
    put(v, i, new_v, count, full);
    if (master) { put(master, i, old, count, full); }
    if (full) {
        store128(params + i, rounded);
    } else {
        for (int k = 0; k < count; k++) { params[i + k] = rounded[k]; }
    }
}
