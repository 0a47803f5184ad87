// Scalar arithmetic that CPU, GPU and simulator share bit for bit. Read by the C compiler, by nvcc and by the
// host C++ compiler of the simulator. Compiled without contraction: where a fused multiply-add is meant, fmaf stands.
#ifndef QLLM_SCALAR_H
#define QLLM_SCALAR_H
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define QHD static __host__ __device__ __forceinline__
#else
#define QHD static inline
#endif

typedef uint16_t bf16;   // the upper half of an f32
typedef uint16_t f16;    // IEEE binary16

QHD uint32_t f32_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
QHD float f32_from_bits(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }

QHD float bf16_to_f32(bf16 h) { return f32_from_bits((uint32_t)h << 16); }

// Nearest even; NaN stays NaN (quiet), overflow goes to infinity as in IEEE.
QHD bf16 bf16_from_f32(float f) {
    uint32_t u = f32_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (bf16)((u >> 16) | 0x40u);
    return (bf16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// f32 rounded to the nearest bf16 value, as f32.
QHD float bf16_round(float f) { return bf16_to_f32(bf16_from_f32(f)); }

QHD float f16_to_f32(f16 h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exp = (h >> 10) & 0x1fu, man = h & 0x3ffu;
    if (exp == 0x1f) return f32_from_bits(sign | 0x7f800000u | (man << 13));
    if (exp) return f32_from_bits(sign | ((exp + 112u) << 23) | (man << 13));
    float sub = (float)man * 5.9604644775390625e-8f;   // subnormal: man * 2^-24, exact
    return sign ? -sub : sub;
}

// f32 to f16, nearest even, overflow to infinity.
QHD f16 f16_from_f32(float f) {
    uint32_t u = f32_bits(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return (f16)(sign | 0x7e00u);
    if (a >= 0x477ff000u) return (f16)(sign | 0x7c00u);          // rounds to 65536 or more
    if (a >= 0x38800000u) {                                      // normal f16
        uint32_t r = a + 0xfffu + ((a >> 13) & 1u);
        return (f16)(sign | ((r - 0x38000000u) >> 13));
    }
    float scaled = f32_from_bits(a) * 16777216.0f;               // in units of 2^-24, exact
    return (f16)(sign | (uint32_t)rintf(scaled));
}

// f8 e4m3 (the kind without infinities: 1 sign, 4 exponent, 3 mantissa bits, bias 7, largest 448, 0x7f is NaN).
typedef uint8_t f8_e4m3;

QHD float f8_e4m3_to_f32(f8_e4m3 h) {
    uint32_t sign = (uint32_t)(h & 0x80u) << 24, a = h & 0x7fu;
    if (a == 0x7fu) return f32_from_bits(sign | 0x7fc00000u);
    if (a >= 8u) return f32_from_bits(sign | ((a << 20) + 0x3c000000u));
    float sub = (float)a * 0.001953125f;                         // subnormal: mantissa * 2^-9, exact
    return sign ? -sub : sub;
}

// Nearest even, saturating at 448; NaN stays NaN.
QHD f8_e4m3 f8_e4m3_from_f32(float f) {
    uint32_t u = f32_bits(f), sign = (u >> 24) & 0x80u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return (f8_e4m3)(sign | 0x7fu);
    if (a >= 0x43e00000u) return (f8_e4m3)(sign | 0x7eu);        // 448 or more
    if (a >= 0x3c800000u) return (f8_e4m3)(sign | ((a + 0x7ffffu + ((a >> 20) & 1u) - 0x3c000000u) >> 20));
    float scaled = f32_from_bits(a) * 512.0f;                    // in units of 2^-9, exact unless it rounds to 0
    return (f8_e4m3)(sign | (uint32_t)rintf(scaled));
}

// e^x; llmc/cpu/vec.h says how and how well (v16_exp: the same bits). Adding 1.5 * 2^23 rounds to the nearest integer,
// which then stands in the low bits: no conversions, of which a GPU does few at a time. (NaN: whatever stands there.)
QHD float exp_f32(float x) {
    x = x < -105.0f ? -105.0f : x > 89.0f ? 89.0f : x;
    float t = x * 1.44269504f + 12582912.0f, n = t - 12582912.0f;
    float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, x));
    float p = fmaf(0.00138145965f, r, 0.00836871751f);
    p = fmaf(p, r, 0.041668389f);
    p = fmaf(p, r, 0.166665211f);
    p = fmaf(p, r, 0.49999994f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    uint32_t e = f32_bits(t) - 0x4b400000u, half = (uint32_t)((int32_t)e >> 1);      // -152..129
    return p * f32_from_bits((half + 127u) << 23) * f32_from_bits((e - half + 127u) << 23);   // the first is exact
}

// 1 + e^x for a logistic function: the bits of 1.0f + exp_f32(x) for every x (compared over all of them) but NaN, of
// which it makes 1. e^-86 no longer adds to 1, so one power of two is enough: half of it, times a polynomial of twice
// the coefficients, so that 2^128 does not need a number of its own.
QHD float one_plus_exp_f32(float x) {
    x = fminf(fmaxf(x, -86.0f), 89.0f);
    float t = x * 1.44269504f + 12582912.0f, n = t - 12582912.0f;
    float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, x));
    float p = fmaf(2.0f * 0.00138145965f, r, 2.0f * 0.00836871751f);
    p = fmaf(p, r, 2.0f * 0.041668389f);
    p = fmaf(p, r, 2.0f * 0.166665211f);
    p = fmaf(p, r, 2.0f * 0.49999994f);
    p = fmaf(p, r, 2.0f);
    p = fmaf(p, r, 2.0f);
    return 1.0f + p * f32_from_bits((f32_bits(t) << 23) + 0x3f000000u);      // 2^(n - 1)
}

// The larger or smaller one, or NaN if either is: one instruction on a GPU.
QHD float max_nan_f32(float a, float b) {
#ifdef __CUDA_ARCH__
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
    return a;
#else
    return a > b || a != a ? a : b;
#endif
}
QHD float min_nan_f32(float a, float b) {
#ifdef __CUDA_ARCH__
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
    return a;
#else
    return a < b || a != a ? a : b;
#endif
}
// 2^r for r in [-1/2, 1/2], exactly 1 at 0, of relative error 2^-23.3 (and roundings).
QHD float exp2_part(float r) {
    float p = fmaf(0.00132692803f, r, 0.00967129972f);
    p = fmaf(p, r, 0.055507116f);
    p = fmaf(p, r, 0.240222469f);
    p = fmaf(p, r, 0.693147004f);
    return fmaf(p, r, 1.0f);
}
// 2^x for x < 127.5 in twelve instructions, for softmax: exactly 1 at 0; exactly 0 below -127 and so at -infinity (a
// masked score needs no care); less than 2^-126 between; NaN stays NaN; relative error below 2^-22.5 from -126 on.
// Adding 1.5 * 2^23 rounds to the nearest integer, which then stands in the low bits and makes a power of two, where
// -127 makes 0. It multiplies: added to the exponent's bits it would make a number of the NaN that GPUs give,
// 0x7fffffff. From 127.5 on the result is infinite or meaningless.
QHD float exp2_fast(float x) {
    x = max_nan_f32(x, -127.0f);
    float t = x + 12582912.0f, p = exp2_part(x - (t - 12582912.0f));
    return p * f32_from_bits((f32_bits(t) << 23) + 0x3f800000u);
}

// Natural logarithm of a positive normal number, within 1 ulp; NaN and infinity stay. logf's last bit is each library's
// own. In double, for a few numbers a row: x = 2^n m with m in [1/sqrt 2, sqrt 2), log m = 2 artanh((m - 1) / (m + 1)).
QHD float log_f32(float x) {
    uint32_t u = f32_bits(x);
    if (u >= 0x7f800000u) return x;
    int n = (int)((u - 0x3f3504f3u) >> 23) - (u < 0x3f3504f3u ? 512 : 0);
    double m = (double)f32_from_bits(u - ((uint32_t)n << 23)), s = (m - 1.0) / (m + 1.0), q = s * s;
    double p = 1.0 / 3.0 + q * (1.0 / 5.0 + q * (1.0 / 7.0 + q * (1.0 / 9.0 + q * (1.0 / 11.0))));
    return (float)(n * 0.69314718055994530942 + 2.0 * s * (1.0 + q * p));
}

// b^t for t >= 0 by squaring in double, rounded once: powf's last bit is each library's own.
QHD float pow_int_f32(float b, int t) {
    double r = 1.0, square = (double)b;
    for (; t > 0; t >>= 1) {
        if (t & 1) r *= square;
        square *= square;
    }
    return (float)r;
}

// The build's type of activations and working weights.
#ifdef PRECISION_FP32
typedef float floatX;
#define FLOATX_NAME "fp32"
QHD float x2f(floatX x) { return x; }
QHD floatX f2x(float f) { return f; }
#else
typedef bf16 floatX;
#define FLOATX_NAME "bf16"
QHD float x2f(floatX x) { return bf16_to_f32(x); }
QHD floatX f2x(float f) { return bf16_from_f32(f); }
#endif
#endif
