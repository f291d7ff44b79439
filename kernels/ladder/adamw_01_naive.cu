// AdamW over the flat arena of all parameters, and the parameters from the master weights, rung 1: one thread per element.
//
// Idea        Every thread looks up the tensor of its element, then does the textbook's update with exact arithmetic.
// Prediction  None was written down. 28 bytes a parameter with a master are 818 us at copy speed.
// Measured    adamw_update 1012 us (80.8 % of copy speed), init_from_master 491.5 us (36.6 %). H200, 124 M parameters,
//             bf16 with a master, 2026-11-26.
// Lesson      4 bytes of each array a thread are nearly enough for fp32 arrays, as a warp covers whole sectors. What is
//             left is arithmetic: a division is some 40 instructions, and each element searches for its tensor.
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

// One thread per element. grid ceil(N / block), any block.
extern "C" __global__ void adamw_update_naive(floatX* params, float* master, const floatG* grads, float* m, float* v,
                                                const i64* ends, const float* decays, const u32* seeds,
                                                const float* hyper, const float* norm_squared, float beta1, float to_m,
                                                float beta2, float to_v, float eps, float clip, i64 N) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= N || !finite(norm_squared)) { return; }
    float scale = clip_scale(norm_squared[0], clip, hyper[3]);
    Adam a = {hyper[0], hyper[1], hyper[2], beta1, to_m, beta2, to_v, eps, scale};
    int tensor = find_tensor(ends, i);
    i64 index = i - (tensor > 0 ? ends[tensor - 1] : 0);
    float old = master ? master[i] : (float)params[i], new_m = m[i], new_v = v[i];
    float value = adam_step(a, (float)grads[i], new_m, new_v, old, decays[tensor]);
    m[i] = new_m;
    v[i] = new_v;
    if (master) { master[i] = value; }
    params[i] = stochastic_round(value, noise(index, seeds[tensor]));
}

// params = stochastic_round(master), with the noise of adamw_update. grid ceil(N / block), any block.
extern "C" __global__ void init_from_master_naive(floatX* params, const float* master, const i64* ends,
                                                    const u32* seeds, i64 N) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= N) { return; }
    int tensor = find_tensor(ends, i);
    i64 index = i - (tensor > 0 ? ends[tensor - 1] : 0);
    params[i] = stochastic_round(master[i], noise(index, seeds[tensor]));
}
