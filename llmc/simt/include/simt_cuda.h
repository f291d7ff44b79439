// CUDA's vocabulary for g++: what NVRTC and nvcc supply without an #include. The executor force-includes this file in
// front of a kernel file, so that the file itself stays unmodified.
//
// Two kinds of functions. Plain ones (arithmetic, bits, cached loads and stores) are written out here. Those in which
// threads meet, or that touch memory behind the compiler's back, are calls into runtime.cpp (namespace simt), which
// switches fibers and keeps the shadow memory.
//
// `__shared__`, `__global__` and `__launch_bounds__` stay undefined on purpose: the Python layer rewrites them after
// preprocessing (see translate.py).
#pragma once
#include <limits.h>
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

// int64_t is `long` in glibc and `long long` in kernel sources that declare it themselves for NVRTC. The second wins.
typedef long long simt_int64_t;
typedef unsigned long long simt_uint64_t;
#define int64_t simt_int64_t
#define uint64_t simt_uint64_t

#define __device__
#define __host__
#define __constant__ static const
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) alignas(n)
#define __CUDACC__ 1
#define __CUDACC_RTC__ 1
#define __NVCC__ 1
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 800
#endif
#define warpSize 32

// ---------------------------------------------------------------------------------------------------------------------
// Vector types, with CUDA's alignments
// ---------------------------------------------------------------------------------------------------------------------

#define SIMT_VECTOR(T, name, align1, align2, align4) \
    struct name##1 { T x; }; \
    struct alignas(align2) name##2 { T x, y; }; \
    struct name##3 { T x, y, z; }; \
    struct alignas(align4) name##4 { T x, y, z, w; }; \
    inline name##1 make_##name##1(T x) { return {x}; } \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

SIMT_VECTOR(signed char, char, 1, 2, 4)
SIMT_VECTOR(unsigned char, uchar, 1, 2, 4)
SIMT_VECTOR(short, short, 2, 4, 8)
SIMT_VECTOR(unsigned short, ushort, 2, 4, 8)
SIMT_VECTOR(int, int, 4, 8, 16)
SIMT_VECTOR(unsigned int, uint, 4, 8, 16)
SIMT_VECTOR(long long, longlong, 8, 16, 16)
SIMT_VECTOR(unsigned long long, ulonglong, 8, 16, 16)
SIMT_VECTOR(float, float, 4, 8, 16)
SIMT_VECTOR(double, double, 8, 16, 16)
#undef SIMT_VECTOR

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// ---------------------------------------------------------------------------------------------------------------------
// Calls into runtime.cpp
// ---------------------------------------------------------------------------------------------------------------------

namespace simt {

// The place of a call in the kernel's source. It is a default argument, because those are evaluated at the call.
struct At {
    const char* file;
    int line;
};
#define SIMT_AT const char* file_ = __builtin_FILE(), int line_ = __builtin_LINE()
#define SIMT_HERE simt::At{file_, line_}

// Keep in step with enum Op in runtime.cpp.
enum Op { SHFL_IDX, SHFL_UP, SHFL_DOWN, SHFL_XOR, BALLOT, ANY, ALL, MATCH_ANY, MATCH_ALL, REDUCE_ADD, REDUCE_MIN_S,
          REDUCE_MIN_U, REDUCE_MAX_S, REDUCE_MAX_U, REDUCE_AND, REDUCE_OR, REDUCE_XOR, SYNCWARP, WGMMA };
enum Vote { VOTE_NONE, VOTE_OR, VOTE_AND, VOTE_COUNT };

extern "C" {
// These are constant within a thread, so g++ may call them once and keep the result.
uint3 simt_thread_idx() __attribute__((const));
uint3 simt_block_idx() __attribute__((const));
uint3 simt_block_dim() __attribute__((const));
uint3 simt_grid_dim() __attribute__((const));
unsigned simt_lane() __attribute__((const));
unsigned simt_active_mask();

int simt_barrier(int vote, int value, At at);
unsigned long long simt_warp(int op, unsigned mask, unsigned long long value, int operand, int width, At at);

// Atomic read-modify-write of 4 or 8 bytes: `change` gets the old bits and the operands, and returns the new bits.
unsigned long long simt_atomic(void* p, int size, unsigned long long a, unsigned long long b,
                               unsigned long long (*change)(unsigned long long, unsigned long long, unsigned long long),
                               int is_float, At at);
void simt_fence();

// The block's storage of one __shared__ variable. `key` is a static at its declaration, one per template instance.
void* simt_shared(unsigned long long* key, size_t size, size_t align, int item_size, const char* name, const char* file,
                  int line);
void* simt_dynamic_shared(size_t align, const char* name, int item_size);
unsigned simt_shared_address(const void* p, At at);
void simt_bad_index(long long index, unsigned long long size);
void simt_assert(const char* condition, At at);
void simt_trap(At at);
}

// Describes a kernel's signature to the Python layer, argument by argument, and makes the call itself.
template <class T> struct Kind { static constexpr char value = __is_enum(T) ? 'i' : 'S'; };
#define SIMT_KIND(T, c) template <> struct Kind<T> { static constexpr char value = c; };
SIMT_KIND(void, 'v') SIMT_KIND(bool, 'b') SIMT_KIND(float, 'f') SIMT_KIND(double, 'f')
SIMT_KIND(char, 'i') SIMT_KIND(signed char, 'i') SIMT_KIND(short, 'i') SIMT_KIND(int, 'i') SIMT_KIND(long, 'i')
SIMT_KIND(long long, 'i')
SIMT_KIND(unsigned char, 'u') SIMT_KIND(unsigned short, 'u') SIMT_KIND(unsigned, 'u') SIMT_KIND(unsigned long, 'u')
SIMT_KIND(unsigned long long, 'u')

template <bool FIRST, class A, class B> struct Choose { typedef A type; };
template <class A, class B> struct Choose<false, A, B> { typedef B type; };
template <class T> struct Bare { typedef T type; };
template <class T> struct Bare<const T> { typedef T type; };
template <class T> struct Bare<volatile T> { typedef T type; };
template <class T> struct Bare<const volatile T> { typedef T type; };
template <class T> constexpr bool is_const = false;
template <class T> constexpr bool is_const<const T> = true;
template <class T> constexpr bool is_const<const volatile T> = true;
template <class T> constexpr int size_of = sizeof(T);
template <> inline constexpr int size_of<void> = 1;

struct Param {
    int kind;  // 'i' signed, 'u' unsigned, 'f' float, 'b' bool, 'h' __half, 'B' __nv_bfloat16, 'S' struct, 'P' pointer
    int size;
    int pointee;  // kind of what a pointer points to, 'v' for void
    int pointee_size;
    int constant;  // pointer to const
};
template <class T> struct Describe {
    static constexpr Param value = {Kind<typename Bare<T>::type>::value, sizeof(T), 0, 0, 0};
};
template <class T> struct Describe<T*> {
    typedef typename Bare<T>::type Base;
    static constexpr Param value = {'P', sizeof(T*), Kind<Base>::value, size_of<Base>, is_const<T>};
};

// An array of class type checks its indices here. A call of a member function takes a reference, and g++'s own check
// lets a reference to one past the end through. translate.py writes
// Checked<T[N]>::type where a kernel declares T name[N].
inline void check_index(unsigned long long i, unsigned long long size) {
    if (i >= size) { simt_bad_index((long long)i, size); }
}
template <class T, size_t N> struct Array {
    T values[N];
    template <class I> T& operator[](I i) { return check_index(i, N), values[i]; }
    template <class I> const T& operator[](I i) const { return check_index(i, N), values[i]; }
    operator T*() { return values; }
    operator const T*() const { return values; }
};
template <class T, bool CLASS = __is_class(T)> struct Checked { typedef T type; };
template <class T, size_t N> struct Checked<T[N], false> {
    typedef typename Checked<T>::type Inner;
    typedef typename Choose<__is_class(Inner), Array<Inner, N>, T[N]>::type type;
};

template <class T> struct Element { static constexpr int size = sizeof(T); };
template <class T, size_t N> struct Element<T[N]> : Element<T> {};
template <class T, size_t N> struct Element<Array<T, N>> : Element<T> {};

#define SIMT_UNCHECKED __attribute__((no_sanitize("thread", "undefined")))
template <int... I> struct Indices {};
template <int N, int... I> struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I> struct MakeIndices<0, I...> { typedef Indices<I...> type; };

template <class... P> constexpr int count(void (*)(P...)) { return sizeof...(P); }
template <class... P> SIMT_UNCHECKED inline void describe(void (*)(P...), Param* out) {
    Param all[] = {Describe<typename Bare<P>::type>::value..., Param{}};
    for (unsigned i = 0; i < sizeof...(P); ++i) { out[i] = all[i]; }
}
template <class... P, int... I>
SIMT_UNCHECKED inline void call(void (*kernel)(P...), void** args, Indices<I...>) {
    kernel(*(typename Bare<P>::type*)args[I]...);
}
template <class... P>
SIMT_UNCHECKED inline void call(void (*kernel)(P...), void** args) {
    call(kernel, args, typename MakeIndices<sizeof...(P)>::type());
}

constexpr size_t largest(size_t a) { return a; }
template <class... T> constexpr size_t largest(size_t a, size_t b, T... rest) {
    return largest(a > b ? a : b, rest...);
}

template <class To, class From> inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}
template <class T> inline unsigned long long widen(T value) {
    static_assert(sizeof(T) <= 8, "at most 8 bytes");
    unsigned long long wide = 0;
    memcpy(&wide, &value, sizeof(T));
    return wide;
}
template <class T> inline T narrow(unsigned long long wide) {
    T value;
    memcpy(&value, &wide, sizeof(T));
    return value;
}

}  // namespace simt

#define CHECK_INDEX(i, size) simt::check_index(i, size)  // kernels/common.cuh

#define threadIdx simt::simt_thread_idx()
#define blockIdx simt::simt_block_idx()
#define blockDim simt::simt_block_dim()
#define gridDim simt::simt_grid_dim()

// ---------------------------------------------------------------------------------------------------------------------
// Barriers, fences, warp functions
// ---------------------------------------------------------------------------------------------------------------------

inline void __syncthreads(SIMT_AT) { simt::simt_barrier(simt::VOTE_NONE, 0, SIMT_HERE); }
inline int __syncthreads_or(int p, SIMT_AT) { return simt::simt_barrier(simt::VOTE_OR, p, SIMT_HERE); }
inline int __syncthreads_and(int p, SIMT_AT) { return simt::simt_barrier(simt::VOTE_AND, p, SIMT_HERE); }
inline int __syncthreads_count(int p, SIMT_AT) { return simt::simt_barrier(simt::VOTE_COUNT, p, SIMT_HERE); }
inline void __threadfence() { simt::simt_fence(); }
inline void __threadfence_system() { simt::simt_fence(); }
inline void __threadfence_block() {}
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_AT) {
    simt::simt_warp(simt::SYNCWARP, mask, 0, 0, 32, SIMT_HERE);
}
#undef assert
#define assert(condition) ((condition) ? (void)0 : simt::simt_assert(#condition, {__builtin_FILE(), __builtin_LINE()}))
inline void __trap(SIMT_AT) { simt::simt_trap(SIMT_HERE); }
inline void __nanosleep(unsigned) {}
inline long long clock64() { return 0; }
inline int clock() { return 0; }
inline unsigned __activemask() { return simt::simt_active_mask(); }

#define SIMT_SHFL(name, op, operand) \
    template <class T> inline T name(unsigned mask, T value, operand source, int width = 32, SIMT_AT) { \
        return simt::narrow<T>(simt::simt_warp(simt::op, mask, simt::widen(value), (int)source, width, SIMT_HERE)); \
    }
SIMT_SHFL(__shfl_sync, SHFL_IDX, int)
SIMT_SHFL(__shfl_up_sync, SHFL_UP, unsigned)
SIMT_SHFL(__shfl_down_sync, SHFL_DOWN, unsigned)
SIMT_SHFL(__shfl_xor_sync, SHFL_XOR, int)
#undef SIMT_SHFL

inline unsigned __ballot_sync(unsigned mask, int p, SIMT_AT) {
    return (unsigned)simt::simt_warp(simt::BALLOT, mask, p != 0, 0, 32, SIMT_HERE);
}
inline int __any_sync(unsigned mask, int p, SIMT_AT) {
    return (int)simt::simt_warp(simt::ANY, mask, p != 0, 0, 32, SIMT_HERE);
}
inline int __all_sync(unsigned mask, int p, SIMT_AT) {
    return (int)simt::simt_warp(simt::ALL, mask, p != 0, 0, 32, SIMT_HERE);
}
template <class T> inline unsigned __match_any_sync(unsigned mask, T value, SIMT_AT) {
    return (unsigned)simt::simt_warp(simt::MATCH_ANY, mask, simt::widen(value), 0, 32, SIMT_HERE);
}
template <class T> inline unsigned __match_all_sync(unsigned mask, T value, int* pred, SIMT_AT) {
    unsigned lanes = (unsigned)simt::simt_warp(simt::MATCH_ALL, mask, simt::widen(value), 0, 32, SIMT_HERE);
    *pred = lanes != 0;
    return lanes;
}

#define SIMT_REDUCE(name, T, op) \
    inline T name(unsigned mask, T value, SIMT_AT) { \
        return (T)simt::simt_warp(simt::op, mask, (unsigned)value, 0, 32, SIMT_HERE); \
    }
SIMT_REDUCE(__reduce_add_sync, unsigned, REDUCE_ADD) SIMT_REDUCE(__reduce_add_sync, int, REDUCE_ADD)
SIMT_REDUCE(__reduce_min_sync, unsigned, REDUCE_MIN_U) SIMT_REDUCE(__reduce_min_sync, int, REDUCE_MIN_S)
SIMT_REDUCE(__reduce_max_sync, unsigned, REDUCE_MAX_U) SIMT_REDUCE(__reduce_max_sync, int, REDUCE_MAX_S)
SIMT_REDUCE(__reduce_and_sync, unsigned, REDUCE_AND) SIMT_REDUCE(__reduce_or_sync, unsigned, REDUCE_OR)
SIMT_REDUCE(__reduce_xor_sync, unsigned, REDUCE_XOR)
#undef SIMT_REDUCE

// ---------------------------------------------------------------------------------------------------------------------
// Atomics. All scopes are the same here. Floating-point atomics work, and the caller is told that there were some.
// ---------------------------------------------------------------------------------------------------------------------

namespace simt {
template <class T> constexpr int is_float = Kind<T>::value == 'f' || Kind<T>::value == 'h' || Kind<T>::value == 'B';
#define SIMT_ATOMIC(name, T, expression) \
    inline T name(T* p, T operand, SIMT_AT) { \
        auto change = [](unsigned long long old_, unsigned long long a_, unsigned long long) { \
            T old = simt::narrow<T>(old_), a = simt::narrow<T>(a_); \
            (void)old; \
            return simt::widen<T>(expression); \
        }; \
        return simt::narrow<T>( \
            simt::simt_atomic(p, sizeof(T), simt::widen(operand), 0, change, simt::is_float<T>, SIMT_HERE)); \
    }
}  // namespace simt
#define SIMT_ATOMIC_INTEGERS(name, expression) \
    SIMT_ATOMIC(name, int, expression) \
    SIMT_ATOMIC(name, unsigned, expression) \
    SIMT_ATOMIC(name, unsigned long long, expression)
SIMT_ATOMIC(atomicAdd, int, (int)((unsigned)old + (unsigned)a)) SIMT_ATOMIC(atomicAdd, unsigned, old + a)
SIMT_ATOMIC(atomicAdd, unsigned long long, old + a) SIMT_ATOMIC(atomicAdd, float, old + a)
SIMT_ATOMIC(atomicAdd, double, old + a)
SIMT_ATOMIC(atomicSub, int, (int)((unsigned)old - (unsigned)a)) SIMT_ATOMIC(atomicSub, unsigned, old - a)
SIMT_ATOMIC_INTEGERS(atomicExch, a) SIMT_ATOMIC(atomicExch, float, a)
SIMT_ATOMIC_INTEGERS(atomicMin, old < a ? old : a) SIMT_ATOMIC(atomicMin, long long, old < a ? old : a)
SIMT_ATOMIC_INTEGERS(atomicMax, old > a ? old : a) SIMT_ATOMIC(atomicMax, long long, old > a ? old : a)
SIMT_ATOMIC_INTEGERS(atomicAnd, old& a)
SIMT_ATOMIC_INTEGERS(atomicOr, old | a)
SIMT_ATOMIC_INTEGERS(atomicXor, old ^ a)
SIMT_ATOMIC(atomicInc, unsigned, old >= a ? 0 : old + 1)
SIMT_ATOMIC(atomicDec, unsigned, old == 0 || old > a ? a : old - 1)
#undef SIMT_ATOMIC_INTEGERS
#undef SIMT_ATOMIC

#define SIMT_CAS(T) \
    inline T atomicCAS(T* p, T compare, T value, SIMT_AT) { \
        typedef unsigned long long u64; \
        auto change = [](u64 old, u64 c, u64 v) { return old == c ? v : old; }; \
        u64 c = simt::widen(compare), v = simt::widen(value); \
        return simt::narrow<T>(simt::simt_atomic(p, sizeof(T), c, v, change, 0, SIMT_HERE)); \
    }
SIMT_CAS(int) SIMT_CAS(unsigned) SIMT_CAS(unsigned long long) SIMT_CAS(unsigned short)
#undef SIMT_CAS

// ---------------------------------------------------------------------------------------------------------------------
// Loads and stores with cache hints: plain accesses
// ---------------------------------------------------------------------------------------------------------------------

#define SIMT_LOAD(name) template <class T> __forceinline__ T name(const T* p) { return *p; }
SIMT_LOAD(__ldg) SIMT_LOAD(__ldca) SIMT_LOAD(__ldcg) SIMT_LOAD(__ldcs) SIMT_LOAD(__ldlu) SIMT_LOAD(__ldcv)
#undef SIMT_LOAD
#define SIMT_STORE(name) template <class T> __forceinline__ void name(T* p, T value) { *p = value; }
SIMT_STORE(__stwb) SIMT_STORE(__stcg) SIMT_STORE(__stcs) SIMT_STORE(__stwt)
#undef SIMT_STORE

inline size_t __cvta_generic_to_shared(const void* p, SIMT_AT) { return simt::simt_shared_address(p, SIMT_HERE); }

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic and bits
// ---------------------------------------------------------------------------------------------------------------------

// min and max of mixed integer types follow the usual conversions, as CUDA's overloads do.
template <class A, class B> constexpr auto min(A a, B b) -> decltype(a + b) { return a < b ? a : b; }
template <class A, class B> constexpr auto max(A a, B b) -> decltype(a + b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float rsqrtf(float x) { return (float)(1.0 / sqrt((double)x)); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return (float)exp(2.302585092994046 * x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __tanhf(float x) { return tanhf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frsqrt_rn(float a) { return rsqrtf(a); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

inline int __float_as_int(float x) { return simt::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return simt::bits<unsigned>(x); }
inline float __int_as_float(int x) { return simt::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return simt::bits<float>(x); }
inline long long __double_as_longlong(double x) { return simt::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return simt::bits<double>(x); }
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }
inline int __float2int_rn(float x) { return (int)rintf(x); }
inline int __float2int_rz(float x) { return (int)x; }
inline int __float2int_rd(float x) { return (int)floorf(x); }
inline int __float2int_ru(float x) { return (int)ceilf(x); }
inline unsigned __float2uint_rn(float x) { return (unsigned)rintf(x); }
inline unsigned __float2uint_rz(float x) { return (unsigned)x; }
inline float __double2float_rn(double x) { return (float)x; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; ++i) { reversed |= (x >> i & 1u) << (31 - i); }
    return reversed;
}
// Byte i of the result is byte (s >> 4i) & 7 of the 8 bytes b:a; bit 3 of the selector spreads that byte's sign.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
    unsigned long long both = (unsigned long long)b << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i) {
        unsigned selector = s >> 4 * i & 15u, byte = (unsigned)(both >> 8 * (selector & 7u)) & 255u;
        out |= (selector & 8u ? (byte & 128u ? 255u : 0u) : byte) << 8 * i;
    }
    return out;
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned s) {
    return (unsigned)(((unsigned long long)hi << 32 | lo) << (s & 31u) >> 32);
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned s) {
    return (unsigned)(((unsigned long long)hi << 32 | lo) >> (s & 31u));
}
inline int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline int __mul24(int a, int b) { return (int)((unsigned)(a << 8 >> 8) * (unsigned)(b << 8 >> 8)); }
inline unsigned __sad(int a, int b, unsigned c) { return c + (unsigned)(a > b ? a - b : b - a); }
template <class T> inline void __builtin_assume_(T) {}
#define __builtin_assume(x) ((void)0)
