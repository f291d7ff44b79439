// __nv_bfloat16 and __nv_bfloat162 for g++: the upper half of an fp32 number, arithmetic in fp32 rounded back to
// nearest even (one rounding in effect: fp32 has more than 2 * 8 + 2 bits).
#pragma once
#include "cuda_fp16.h"

namespace simt {
inline unsigned short bf16_from_float(float value) {
    unsigned x = __float_as_uint(value);
    if ((x & 0x7fffffffu) > 0x7f800000u) { return 0x7fff; }  // NaN, as cvt.rn.bf16.f32 writes it
    return (unsigned short)((x + 0x7fffu + (x >> 16 & 1u)) >> 16);
}
}  // namespace simt

struct __nv_bfloat16_raw { unsigned short x; };
struct alignas(2) __nv_bfloat16 {
    unsigned short __x;
    __nv_bfloat16() = default;
    __nv_bfloat16(__nv_bfloat16_raw raw) : __x(raw.x) {}
    __nv_bfloat16(float value) : __x(simt::bf16_from_float(value)) {}
    __nv_bfloat16(double value) : __x(simt::bf16_from_float(simt::odd_float(value))) {}
    __nv_bfloat16(int value) : __nv_bfloat16((double)value) {}
    __nv_bfloat16(unsigned value) : __nv_bfloat16((double)value) {}
    __nv_bfloat16(long long value) : __nv_bfloat16((double)value) {}
    __nv_bfloat16(unsigned long long value) : __nv_bfloat16((double)value) {}
    operator float() const { return __uint_as_float((unsigned)__x << 16); }
};
typedef __nv_bfloat16 nv_bfloat16;
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
    __nv_bfloat162() = default;
    __nv_bfloat162(__nv_bfloat16 x_, __nv_bfloat16 y_) : x(x_), y(y_) {}
};
typedef __nv_bfloat162 nv_bfloat162;
namespace simt { SIMT_KIND(__nv_bfloat16, 'B') }

inline float __bfloat162float(__nv_bfloat16 h) { return (float)h; }
inline __nv_bfloat16 __float2bfloat16(float f) { return __nv_bfloat16(f); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return __nv_bfloat16(f); }
inline __nv_bfloat16 __float2bfloat16_rz(float f) {
    return f == f ? __nv_bfloat16_raw{(unsigned short)(__float_as_uint(f) >> 16)} : __nv_bfloat16_raw{0x7fff};
}
inline __nv_bfloat16 __double2bfloat16(double d) { return __nv_bfloat16(d); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 f) { return {__nv_bfloat16(f.x), __nv_bfloat16(f.y)}; }
inline __nv_bfloat162 __float2bfloat162_rn(float f) { return {__nv_bfloat16(f), __nv_bfloat16(f)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 h) { return {(float)h.x, (float)h.y}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 x) { return {x, x}; }
inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 h) { return h.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 h) { return h.y; }
inline float __low2float(__nv_bfloat162 h) { return (float)h.x; }
inline float __high2float(__nv_bfloat162 h) { return (float)h.y; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 h) { return h.__x; }
inline short __bfloat16_as_short(__nv_bfloat16 h) { return (short)h.__x; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return __nv_bfloat16_raw{x}; }
inline __nv_bfloat16 __short_as_bfloat16(short x) { return __nv_bfloat16_raw{(unsigned short)x}; }
SIMT_ARITHMETIC(__nv_bfloat16, __nv_bfloat162)
