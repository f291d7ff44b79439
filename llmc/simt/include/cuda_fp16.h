// __half and __half2 for g++: storage in 16 bits, arithmetic in fp32 rounded back to nearest even (one rounding in
// effect: fp32 has more than 2 * 11 + 2 bits), fused multiply-add through fp64.
#pragma once
#include "simt_cuda.h"

namespace simt {
inline unsigned short half_from_float(float value) {
    unsigned x = __float_as_uint(value), sign = x >> 16 & 0x8000u;
    x &= 0x7fffffffu;
    if (x > 0x7f800000u) { return 0x7fff; }                             // NaN, as cvt.rn.f16.f32 writes it
    if (x >= 0x477ff000u) { return (unsigned short)(sign | 0x7c00u); }  // 65520 and more round to infinity
    if (x <= 0x33000000u) { return (unsigned short)sign; }              // 2^-25 is a tie that goes to zero
    if (x < 0x38800000u) {                                              // below 2^-14: subnormal, in units of 2^-24
        unsigned mantissa = (x & 0x7fffffu) | 0x800000u, shift = 126u - (x >> 23);
        unsigned kept = mantissa >> shift, rest = mantissa & ((1u << shift) - 1u), tie = 1u << (shift - 1u);
        kept += rest > tie || (rest == tie && (kept & 1u));
        return (unsigned short)(sign | kept);
    }
    x += 0xc8000fffu + (x >> 13 & 1u);  // exponent bias 127 -> 15; round to nearest even
    return (unsigned short)(sign | x >> 13);
}
inline float half_to_float(unsigned short h) {
    unsigned sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31u, mantissa = h & 0x3ffu;
    if (exponent == 31u) { return __uint_as_float(sign | 0x7f800000u | mantissa << 13); }
    if (exponent != 0u) { return __uint_as_float(sign | (exponent + 112u) << 23 | mantissa << 13); }
    if (mantissa == 0u) { return __uint_as_float(sign); }
    unsigned shift = (unsigned)__builtin_clz(mantissa) - 21u;  // brings the leading one to bit 10
    return __uint_as_float(sign | (113u - shift) << 23 | (mantissa << shift & 0x3ffu) << 13);
}
// Round to odd keeps enough of the lost bits that a second rounding, to 16 bits, is right.
inline float odd_float(double value) {
    float nearest = (float)value;
    if ((double)nearest == value || value != value || isinf(nearest)) { return nearest; }
    unsigned x = __float_as_uint(nearest);
    if (fabs((double)nearest) > fabs(value)) { x -= 1u; }
    return __uint_as_float(x | 1u);
}
}  // namespace simt

struct __half_raw { unsigned short x; };
struct alignas(2) __half {
    unsigned short __x;
    __half() = default;
    __half(__half_raw raw) : __x(raw.x) {}
    __half(float value) : __x(simt::half_from_float(value)) {}
    __half(double value) : __x(simt::half_from_float(simt::odd_float(value))) {}
    __half(int value) : __half((double)value) {}
    __half(unsigned value) : __half((double)value) {}
    __half(long long value) : __half((double)value) {}
    __half(unsigned long long value) : __half((double)value) {}
    operator float() const { return simt::half_to_float(__x); }
};
typedef __half half;
struct alignas(4) __half2 {
    __half x, y;
    __half2() = default;
    __half2(__half x_, __half y_) : x(x_), y(y_) {}
};
typedef __half2 half2;
namespace simt { SIMT_KIND(__half, 'h') }

inline float __half2float(__half h) { return (float)h; }
inline __half __float2half(float f) { return __half(f); }
inline __half __float2half_rn(float f) { return __half(f); }
inline __half __float2half_rz(float f) {
    __half nearest(f);
    if (f == f && fabsf((float)nearest) > fabsf(f)) { nearest.__x -= 1; }
    return nearest;
}
inline __half __double2half(double d) { return __half(d); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 f) { return {__half(f.x), __half(f.y)}; }
inline __half2 __float2half2_rn(float f) { return {__half(f), __half(f)}; }
inline float2 __half22float2(__half2 h) { return {(float)h.x, (float)h.y}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half x) { return {x, x}; }
inline __half2 make_half2(__half x, __half y) { return {x, y}; }
inline __half __low2half(__half2 h) { return h.x; }
inline __half __high2half(__half2 h) { return h.y; }
inline float __low2float(__half2 h) { return (float)h.x; }
inline float __high2float(__half2 h) { return (float)h.y; }
inline unsigned short __half_as_ushort(__half h) { return h.__x; }
inline short __half_as_short(__half h) { return (short)h.__x; }
inline __half __ushort_as_half(unsigned short x) { return __half_raw{x}; }
inline __half __short_as_half(short x) { return __half_raw{(unsigned short)x}; }

#define SIMT_ARITHMETIC(T, T2) \
    inline T operator+(T a, T b) { return T((float)a + (float)b); } \
    inline T operator-(T a, T b) { return T((float)a - (float)b); } \
    inline T operator*(T a, T b) { return T((float)a * (float)b); } \
    inline T operator/(T a, T b) { return T((float)a / (float)b); } \
    inline T operator-(T a) { a.__x ^= 0x8000u; return a; } \
    inline T& operator+=(T& a, T b) { return a = a + b; } \
    inline T& operator-=(T& a, T b) { return a = a - b; } \
    inline T& operator*=(T& a, T b) { return a = a * b; } \
    inline T& operator/=(T& a, T b) { return a = a / b; } \
    inline bool operator==(T a, T b) { return (float)a == (float)b; } \
    inline bool operator!=(T a, T b) { return (float)a != (float)b; } \
    inline bool operator<(T a, T b) { return (float)a < (float)b; } \
    inline bool operator>(T a, T b) { return (float)a > (float)b; } \
    inline bool operator<=(T a, T b) { return (float)a <= (float)b; } \
    inline bool operator>=(T a, T b) { return (float)a >= (float)b; } \
    inline T __hadd(T a, T b) { return a + b; } \
    inline T __hsub(T a, T b) { return a - b; } \
    inline T __hmul(T a, T b) { return a * b; } \
    inline T __hdiv(T a, T b) { return a / b; } \
    inline T __hfma(T a, T b, T c) { return T(fma((double)(float)a, (double)(float)b, (double)(float)c)); } \
    inline T __hneg(T a) { return -a; } \
    inline T __habs(T a) { a.__x &= 0x7fffu; return a; } \
    inline T __hmax(T a, T b) { return T(fmaxf((float)a, (float)b)); } \
    inline T __hmin(T a, T b) { return T(fminf((float)a, (float)b)); } \
    inline bool __hisnan(T a) { return (float)a != (float)a; } \
    inline T2 __hadd2(T2 a, T2 b) { return {a.x + b.x, a.y + b.y}; } \
    inline T2 __hsub2(T2 a, T2 b) { return {a.x - b.x, a.y - b.y}; } \
    inline T2 __hmul2(T2 a, T2 b) { return {a.x * b.x, a.y * b.y}; } \
    inline T2 __hfma2(T2 a, T2 b, T2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; } \
    inline T2 __hmax2(T2 a, T2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; } \
    inline T2 __hmin2(T2 a, T2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; } \
    inline T2 operator+(T2 a, T2 b) { return __hadd2(a, b); } \
    inline T2 operator-(T2 a, T2 b) { return __hsub2(a, b); } \
    inline T2 operator*(T2 a, T2 b) { return __hmul2(a, b); }
SIMT_ARITHMETIC(__half, __half2)
