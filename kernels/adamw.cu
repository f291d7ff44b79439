// AdamW over the flat arena of all parameters, in one launch.
//
//   g = scale grads;  m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  old = master, or params where there is no master
//   new = old - lr ((m/c1) / (sqrt(v/c2) + eps) + decay old);  master = new;  params = stochastic_round(new)
//   scale = unscale (clip/norm if clip > 0 and norm > clip else 1);  norm = unscale sqrt(norm_squared);  c = 1 - beta^t
//
//   params (N,) floatX    master (N,) f32 or NULL    grads (N,) floatG    m, v (N,) f32
//   tensor i covers [ends[i-1], ends[i]):  ends (TENSORS,) i64, decays (TENSORS,) f32, seeds (TENSORS,) u32
//   hyper (4,) f32 = lr, c1, c2, unscale: 1 / the loss scale of fp16, else 1
//   norm_squared (2,) f32: of the gradients as they are stored, and of the losses
//
// What changes from step to step (hyper, norm_squared, seeds) is read from device memory, so that a captured graph can be
// replayed. Where either norm is not finite nothing is written. The rounding noise depends on the seed of the tensor and
// the index within the tensor alone: another launch geometry, another sharding of the arena or init_from_master after a
// resume gives the same bits.
//
// TENSORS (rows of the tables), BLOCK (threads) and QUADS (groups of 4 elements that a thread has on their way) come from
// llmc/cuda/adamw.py.
//
// Bytes per parameter in bf16 with an fp32 master. Measured on an H200, 124 M parameters, us (% of copy speed):
// op               | rung | idea                                                          | bytes | measured
// adamw_update     | 1    | thread per element: ladder/adamw_01_naive.cu                  | 28    | 1012 (80.8 %)
// adamw_update     | 2    | thread per 16 bytes of params: ladder/adamw_02_packs.cu       | 28    | 2514 (33 %)
// adamw_update     | 3    | thread per 16 bytes of fp32, twice; all loads first; hardware | 28    | 859 (95.2 %), goal 88 %
//                  |      | division and root                                             |       |
// init_from_master | 1    | thread per element: ladder/adamw_01_naive.cu                  | 6     | 491.5 (36.6 %)
// init_from_master | 2    | groups of 4 elements; a look-up per block; once per start     | 6     | 231.5 (77.6 %), predicted 205
//
// Source: llm.c llmc/adamw.cuh (adamw_kernel3, init_from_master_kernel); Loshchilov and Hutter 2019, arXiv:1711.05101.
#include "common.cuh"

static_assert(TENSORS > 0 && QUADS > 0 && BLOCK % 32 == 0 && BLOCK <= 1024, "sizes that llmc/cuda/adamw.py gives");

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
    float lr, over_c1, over_c2, beta1, to_m, beta2, to_v, eps, scale;  // to_m = 1 - beta1, to_v = 1 - beta2, rounded once
};

__device__ inline bool finite(const float* norm_squared) {  // NaN fails the comparisons too
    return norm_squared[0] < INFINITY && norm_squared[1] < INFINITY;
}

__device__ inline float clip_scale(float norm_squared, float clip, float unscale) {
    float norm = unscale * sqrtf(norm_squared);
    return clip > 0.0f && norm > clip ? unscale * (clip / norm) : unscale;
}

// Four consecutive elements as they lie in memory: 16 bytes of fp32, 8 of the 16-bit types.
template <class T> struct alignas(4 * sizeof(T)) Quad { T e[4]; };

template <class T> __device__ inline Quad<T> load4(const T* address) {
    Quad<T> quad;
    if constexpr (sizeof(T) == 4) {
        int4 bits = __ldcs(reinterpret_cast<const int4*>(address));
        memcpy(&quad, &bits, sizeof(quad));
    } else {
        int2 bits = __ldcs(reinterpret_cast<const int2*>(address));
        memcpy(&quad, &bits, sizeof(quad));
    }
    return quad;
}

template <class T> __device__ inline void store4(T* address, const Quad<T>& quad) {
    if constexpr (sizeof(T) == 4) {
        int4 bits;
        memcpy(&bits, &quad, sizeof(quad));
        __stcs(reinterpret_cast<int4*>(address), bits);
    } else {
        int2 bits;
        memcpy(&bits, &quad, sizeof(quad));
        __stcs(reinterpret_cast<int2*>(address), bits);
    }
}

// The new value of one parameter; m and v are updated. 1/c1, 1/c2, the division and the square root are the hardware's own,
// which are right to some 2^-22 of an update that is itself lr of a parameter. They take a quarter of the instructions.
__device__ inline float adam_step(const Adam& a, float grad, float& m, float& v, float old, float decay) {
    float g = a.scale * grad;
    m = fmaf(a.beta1, m, a.to_m * g);
    v = fmaf(a.beta2, v, a.to_v * g * g);
    float v_hat = v * a.over_c2, root = v_hat * rsqrtf(fmaxf(v_hat, 1.2e-38f));  // 0 where v is 0
    return old - a.lr * (__fdividef(m * a.over_c1, root + a.eps) + decay * old);
}

// A thread takes QUADS groups of 4 elements. Neighbouring groups belong to neighbouring threads, so that every access of a
// warp covers whole sectors. All loads are on their way before anything else is asked for. Each block looks its tensor up
// once, and threads past the tensor's end once more; a group in which a tensor ends goes element by element.
// grid ceil(N / (4 * QUADS * BLOCK)), block BLOCK; all arrays start at 16 bytes.
extern "C" __global__ void __launch_bounds__(BLOCK, 3)
adamw_update_kernel(floatX* params, float* master, const floatG* grads, float* m, float* v, const i64* ends,
                     const float* decays, const u32* seeds, const float* hyper, const float* norm_squared, float beta1,
                     float to_m, float beta2, float to_v, float eps, float clip, i64 N) {
    i64 first = (i64)blockIdx.x * blockDim.x * (4 * QUADS), stride = 4 * blockDim.x;
    Quad<floatG> grad[QUADS];
    Quad<float> old[QUADS], new_m[QUADS], new_v[QUADS];
    Quad<floatX> rounded[QUADS];
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
        i64 i = first + q * stride + 4 * threadIdx.x;
        if (i + 4 <= N) {
            grad[q] = load4(grads + i);
            new_m[q] = load4(m + i);
            new_v[q] = load4(v + i);
            if (master) {
                old[q] = load4(master + i);
            } else {
                rounded[q] = load4(params + i);
            }
        }
    }
    if (!finite(norm_squared)) { return; }
    float scale = clip_scale(norm_squared[0], clip, hyper[3]);
    float over_c1 = __fdividef(1.0f, hyper[1]), over_c2 = __fdividef(1.0f, hyper[2]);
    Adam a = {hyper[0], over_c1, over_c2, beta1, to_m, beta2, to_v, eps, scale};
    int tensor = find_tensor(ends, first);
    i64 begin = tensor > 0 ? ends[tensor - 1] : 0, end = ends[tensor];
    float decay = decays[tensor];
    u32 seed = seeds[tensor];
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
        i64 i = first + q * stride + 4 * threadIdx.x;
        if (i >= N) { break; }
        if (i >= end) {
            tensor = find_tensor(ends, i);
            begin = ends[tensor - 1], end = ends[tensor];
            decay = decays[tensor];
            seed = seeds[tensor];
        }
        if (i + 4 > end) {
            for (i64 j = i; j < min(i + 4, N); j++) {
                int at = find_tensor(ends, j);
                float one = master ? master[j] : (float)params[j], one_m = m[j], one_v = v[j];
                one = adam_step(a, (float)grads[j], one_m, one_v, one, decays[at]);
                m[j] = one_m;
                v[j] = one_v;
                if (master) { master[j] = one; }
                params[j] = stochastic_round(one, noise(j - (at > 0 ? ends[at - 1] : 0), seeds[at]));
            }
            continue;
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float before = master ? old[q].e[k] : (float)rounded[q].e[k];
            old[q].e[k] = adam_step(a, (float)grad[q].e[k], new_m[q].e[k], new_v[q].e[k], before, decay);
            rounded[q].e[k] = stochastic_round(old[q].e[k], noise(i + k - begin, seed));
        }
        store4(m + i, new_m[q]);
        store4(v + i, new_v[q]);
        if (master) { store4(master + i, old[q]); }
        store4(params + i, rounded[q]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// parameters from the master weights
// ---------------------------------------------------------------------------------------------------------------------

// params = stochastic_round(master), with the noise of adamw_update, in its groups of 4 and with its look-up. Same grid.
extern "C" __global__ void __launch_bounds__(BLOCK)
init_from_master_kernel(floatX* params, const float* master, const i64* ends, const u32* seeds, i64 N) {
    i64 first = (i64)blockIdx.x * blockDim.x * (4 * QUADS), stride = 4 * blockDim.x;
    Quad<float> values[QUADS];
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
        i64 i = first + q * stride + 4 * threadIdx.x;
        if (i + 4 <= N) { values[q] = load4(master + i); }
    }
    int tensor = find_tensor(ends, first);
    i64 begin = tensor > 0 ? ends[tensor - 1] : 0, end = ends[tensor];
    u32 seed = seeds[tensor];
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
        i64 i = first + q * stride + 4 * threadIdx.x;
        if (i >= N) { break; }
        if (i >= end) {
            tensor = find_tensor(ends, i);
            begin = ends[tensor - 1], end = ends[tensor];
            seed = seeds[tensor];
        }
        if (i + 4 > end) {
            for (i64 j = i; j < min(i + 4, N); j++) {
                int at = find_tensor(ends, j);
                params[j] = stochastic_round(master[j], noise(j - (at > 0 ? ends[at - 1] : 0), seeds[at]));
            }
            continue;
        }
        Quad<floatX> rounded;
        for (int k = 0; k < 4; k++) { rounded.e[k] = stochastic_round(values[q].e[k], noise(i + k - begin, seed)); }
        store4(params + i, rounded);
    }
}
