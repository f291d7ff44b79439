// What every kernel file shares: the model's number type, 16-byte packs, warp and block reductions, noise for
// stochastic rounding, GELU. The file of every op includes it.
//
// floatX is the type of parameters, activations and their gradients, fixed by one -D option per compilation:
// ENABLE_FP32 | ENABLE_FP16 | ENABLE_BF16. All arithmetic is in fp32: read with (float)x, write with (floatX)f, which
// rounds to nearest even. Statistics (mean, rstd, log-sum-exp, losses, m, v) are always fp32.
//
// Compiled by NVRTC, which has no stdint.h, math.h or type_traits: the few names needed are defined here.
// Source: llm.c llmc/cuda_common.h (floatX) and llmc/cuda_utils.cuh (Packed128, reductions, stochastic rounding).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned int u32;
typedef long long i64;

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

#if defined(ENABLE_BF16)
typedef __nv_bfloat16 floatX;
#elif defined(ENABLE_FP16)
typedef __half floatX;
#elif defined(ENABLE_FP32)
typedef float floatX;
#else
#error "define one of ENABLE_BF16, ENABLE_FP16, ENABLE_FP32"
#endif

// floatG is the type of the weights' gradients: floatX, or float with -DGRADS_FP32.
#ifdef GRADS_FP32
typedef float floatG;
#else
typedef floatX floatG;
#endif

// Integers only: ceil_div(7, 2) = 4.
template <class T> __host__ __device__ constexpr T ceil_div(T a, T b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------------------------------------------------------------
// 16-byte packs: the widest access a thread can make, and the unit of every vectorised kernel
// ---------------------------------------------------------------------------------------------------------------------

#ifndef LLMC_SIMT
#define CHECK_INDEX(i, size)  // nothing on a GPU; the CPU executor (llmc/simt) checks the index
#endif

// 8 bf16/fp16 or 4 fp32 values that are loaded and stored at once. The address must be 16-byte aligned.
template <class T> struct alignas(16) Packed128 {
    static constexpr int size = 16 / sizeof(T);
    T payload[size];

    __device__ T& operator[](int i) {
        CHECK_INDEX(i, size);
        return payload[i];
    }
    __device__ const T& operator[](int i) const {
        CHECK_INDEX(i, size);
        return payload[i];
    }
};

typedef Packed128<floatX> x128;
typedef Packed128<float> f128;

template <class T> __device__ inline Packed128<T> unpack128(int4 bits) {
    Packed128<T> pack;
    memcpy(&pack, &bits, 16);
    return pack;
}

template <class T> __device__ inline int4 bits128(const Packed128<T>& pack) {
    int4 bits;
    memcpy(&bits, &pack, 16);
    return bits;
}

// load128: default caching. load128cs: evict first, for data that is read once. load128cg: past L1, for data that
// other blocks wrote during this launch.
template <class T> __device__ inline Packed128<T> load128(const T* address) {
    return unpack128<T>(*reinterpret_cast<const int4*>(address));
}
template <class T> __device__ inline Packed128<T> load128cs(const T* address) {
    return unpack128<T>(__ldcs(reinterpret_cast<const int4*>(address)));
}
template <class T> __device__ inline Packed128<T> load128cg(const T* address) {
    return unpack128<T>(__ldcg(reinterpret_cast<const int4*>(address)));
}

// store128cs: evict first, for data that no kernel reads soon. store128cg: keep in L2 only.
template <class T> __device__ inline void store128(T* address, const Packed128<T>& pack) {
    *reinterpret_cast<int4*>(address) = bits128(pack);
}
template <class T> __device__ inline void store128cs(T* address, const Packed128<T>& pack) {
    __stcs(reinterpret_cast<int4*>(address), bits128(pack));
}
template <class T> __device__ inline void store128cg(T* address, const Packed128<T>& pack) {
    __stcg(reinterpret_cast<int4*>(address), bits128(pack));
}

// Makes the compiler forget what it has computed from a pack. It then converts the 16-bit values again where they are
// used next. Otherwise it keeps their fp32 copies until then, which take twice the registers and are spilled.
template <class T> __device__ inline void forget128(Packed128<T>& pack) {
    int4 bits = bits128(pack);
    asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
    pack = unpack128<T>(bits);
}

// to_floats gives all values of a pack of floatX as fp32, with one instruction for each value. to_pack is the way back:
// it rounds to nearest even, with one instruction for each pair of values.
__device__ inline void to_floats(float (&values)[x128::size], const x128& pack) {
#ifdef ENABLE_BF16  // bf16 is the upper half of an fp32 number; the library takes two instructions for odd elements
    u32 pairs[x128::size / 2];
    memcpy(pairs, &pack, 16);
    for (int i = 0; i < x128::size / 2; i++) {
        values[2 * i] = __uint_as_float(pairs[i] << 16);
        values[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
#else
    for (int k = 0; k < x128::size; k++) { values[k] = (float)pack[k]; }
#endif
}

__device__ inline x128 to_pack(const float (&values)[x128::size]) {
    x128 pack;
#if defined(ENABLE_BF16)
    __nv_bfloat162 pairs[x128::size / 2];
    for (int i = 0; i < x128::size / 2; i++) { pairs[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]); }
    memcpy(&pack, pairs, 16);
#elif defined(ENABLE_FP16)
    __half2 pairs[x128::size / 2];
    for (int i = 0; i < x128::size / 2; i++) { pairs[i] = __floats2half2_rn(values[2 * i], values[2 * i + 1]); }
    memcpy(&pack, pairs, 16);
#else
    for (int k = 0; k < x128::size; k++) { pack[k] = values[k]; }
#endif
    return pack;
}

// Reads W consecutive values as fp32. W is 1, or a multiple of a pack's size; the accesses are then of 16 bytes.
template <int W, class T> __device__ inline void load_floats(float (&v)[W], const T* address) {
    if constexpr (W == 1) {
        v[0] = (float)address[0];
    } else {
        constexpr int size = Packed128<T>::size;
#pragma unroll
        for (int i = 0; i < W; i += size) {
            Packed128<T> pack = load128(address + i);
#pragma unroll
            for (int j = 0; j < size; j++) { v[i + j] = (float)pack[j]; }
        }
    }
}

template <int W, class T> __device__ inline void store_floats(T* address, const float (&v)[W]) {
    if constexpr (W == 1) {
        address[0] = (T)v[0];
    } else {
        constexpr int size = Packed128<T>::size;
#pragma unroll
        for (int i = 0; i < W; i += size) {
            Packed128<T> pack;
#pragma unroll
            for (int j = 0; j < size; j++) { pack[j] = (T)v[i + j]; }
            store128(address + i, pack);
        }
    }
}

// Adds up `count` partial sums of eight values each. The first lies at `partials`, every next one `step` values further
// on; they are added in this order. The eight sums are written to `to`, or added to what is there if `accumulate`.
template <class T>
__device__ inline void add_partials(T* to, const float* partials, i64 step, int count, bool accumulate) {
    float sum[8], other[8];
    load_floats<8>(sum, partials);
#pragma unroll 4
    for (int i = 1; i < count; i++) {
        load_floats<8>(other, partials + i * step);
#pragma unroll
        for (int j = 0; j < 8; j++) { sum[j] += other[j]; }
    }
    if (accumulate) {
        load_floats<8>(other, to);
#pragma unroll
        for (int j = 0; j < 8; j++) { sum[j] += other[j]; }
    }
    store_floats<8>(to, sum);
}

template <class T> __device__ inline Packed128<T> zeros128() { return unpack128<T>(make_int4(0, 0, 0, 0)); }

// ---------------------------------------------------------------------------------------------------------------------
// Reductions. Butterfly shuffles: every lane gets the same bits, and the order never depends on timing.
// ---------------------------------------------------------------------------------------------------------------------

__device__ inline float warpReduceSum(float value) {
    for (int offset = 16; offset > 0; offset /= 2) { value += __shfl_xor_sync(0xffffffffu, value, offset); }
    return value;
}

__device__ inline float warpReduceMax(float value) {
    for (int offset = 16; offset > 0; offset /= 2) { value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset)); }
    return value;
}

// Every thread of a 1-D block calls these (blockDim.x a multiple of 32, up to 1024); every thread gets the result.
// The first barrier lets the call be repeated in a loop: without it a fast warp overwrites what a slow one still reads.
__device__ inline float blockReduceSum(float value) {
    __shared__ float partial[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    value = warpReduceSum(value);
    __syncthreads();
    if (lane == 0) { partial[warp] = value; }
    __syncthreads();
    return warpReduceSum(lane < warps ? partial[lane] : 0.0f);
}

__device__ inline float blockReduceMax(float value) {
    __shared__ float partial[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    value = warpReduceMax(value);
    __syncthreads();
    if (lane == 0) { partial[warp] = value; }
    __syncthreads();
    return warpReduceMax(lane < warps ? partial[lane] : -INFINITY);
}

// ---------------------------------------------------------------------------------------------------------------------
// Stochastic rounding
// ---------------------------------------------------------------------------------------------------------------------

// 32 random-looking bits that depend on (position, seed) alone: the integer hash SquirrelNoise5 of S. Eiserloh, which
// llm.c uses. The upper half of a position is multiplied by a prime and added, as in the hash's two-dimensional form.
__device__ inline u32 noise(unsigned long long position, u32 seed) {
    u32 m = ((u32)position + 198491317u * (u32)(position >> 32)) * 0xd2a80a3fu + seed;
    m = (m ^ (m >> 9)) + 0xa884f197u;
    m = (m ^ (m >> 11)) * 0x6c736f4bu;
    m = (m ^ (m >> 13)) + 0xb79f3abbu;
    m = (m ^ (m >> 15)) * 0x1b56c4f5u;
    return m ^ (m >> 17);
}

// Rounds up in magnitude with the probability that makes the expected value exact, from the low 16 bits of `random`.
// In fp32 there is nothing to round; fp16 rounds to nearest, as in llm.c. The caller's noise must depend on the element
// alone, never on thread or block ids, so that results do not change with the launch.
template <class T = floatX> __device__ inline T stochastic_round(float value, u32 random) {
#if defined(ENABLE_BF16)
    if constexpr (sizeof(T) == 2) {
        u32 bits = __float_as_uint(value);
        u32 kept = (bits & 0xffffu) > (random & 0xffffu) ? bits | 0xffffu : bits & 0xffff0000u;
        // If all 16 low bits are set, the conversion below rounds up; if all are clear, it is exact. NaN is passed on
        // unchanged, because clearing its low bits could turn it into infinity.
        return __float2bfloat16_rn(value == value ? __uint_as_float(kept) : value);
    } else {
        return value;
    }
#else
    return (T)value;
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// GELU, tanh form: 0.5 x (1 + tanh u) with u = sqrt(2/pi) (x + 0.044715 x^3).
// 0.5 (1 + tanh u) = s = 1 / (1 + exp(-2u)), which loses no digits for negative x, where 1 + tanh u cancels.
// exp is computed as 2^y. It and the division are one hardware instruction each, with an error of about 2^-21. The
// exact expf and division take 40 instructions an element, which last longer than moving its 4 bytes. tanh.approx has
// an error of 2^-11, and 1 + tanh u cancels.
// ---------------------------------------------------------------------------------------------------------------------

#define GELU_SCALE 0.7978845608028654f  // sqrt(2/pi)
#define GELU_CUBIC 0.044715f
#define GELU_EXPONENT -2.302208198144325f  // -2 sqrt(2/pi) log2(e)

// s, the factor of x
__device__ inline float gelu_factor(float x) {
    return __fdividef(1.0f, 1.0f + exp2f(x * (GELU_EXPONENT + GELU_EXPONENT * GELU_CUBIC * (x * x))));
}

__device__ inline float gelu(float x) { return x * gelu_factor(x); }

// d gelu / dx = s + x * ds/dx with s = gelu_factor(x) and ds/dx = 2 s (1 - s) du/dx. gelu and gelu_grad use as few
// instructions as they can, because in the epilogue of a matmul each one costs a percent of the matmul's time.
__device__ inline float gelu_grad(float x, float s) {
    return s + (s - s * s) * (x * (2 * GELU_SCALE + 6 * GELU_SCALE * GELU_CUBIC * (x * x)));
}
__device__ inline float gelu_grad(float x) { return gelu_grad(x, gelu_factor(x)); }
