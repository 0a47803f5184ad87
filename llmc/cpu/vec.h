// Sixteen f32 lanes: the one way the CPU wing's element-wise code is written. With AVX-512 a v16 is a zmm register and
// the helpers are single instructions; elsewhere the compiler's vector extension lowers the same source to what the
// processor has (two ymm registers with AVX2). Every helper is exactly rounded or moves bits only, so both give the
// same bits, and lane i does what the scalar functions of scalar.h and quant.h do.
//
// Spans that are no multiple of 16 are walked as
//     for (; c + 16 <= n; c += 16) step(c, 16);
//     if (c < n) step(c, n - c);
// where step is always inlined: a count of 16 known at compile time makes the loads and stores unmasked.
#ifndef QLLM_CPU_VEC_H
#define QLLM_CPU_VEC_H
#include "scalar.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define QLLM_AVX512 1
#include <immintrin.h>
#endif

// Asks for the line that the stream at p reaches some 8 KiB later. Loops over rows from memory do so for every stream,
// written ones too: with it they reach one and a half to two times the bandwidth, since an operation's own arithmetic
// leaves the processor little room to run ahead. Measured on Zen 5: 4 to 8 KiB are best; beyond the end it does nothing.
#define PREFETCH_BYTES 8192
#define VEC static inline __attribute__((always_inline))
VEC void prefetch_ahead(const void *p) { __builtin_prefetch((const void *)((uintptr_t)p + PREFETCH_BYTES), 0, 3); }

// By-value vectors only pass between inlined functions, so the warning about their calling convention is moot.
#pragma GCC diagnostic ignored "-Wpsabi"

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef uint32_t v16u __attribute__((vector_size(64)));

VEC v16 v16_set1(float x) { return (v16){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
VEC v16 v16_abs(v16 x) { return (v16)((v16i)x & 0x7fffffff); }

#ifdef QLLM_AVX512
VEC __mmask16 v16_mask(int n) { return (__mmask16)((1u << n) - 1u); }
VEC __m128i bytes_load(const void *p, int n) {
    return n == 16 ? _mm_loadu_si128((const __m128i *)p) : _mm_maskz_loadu_epi8(v16_mask(n), p);
}

VEC v16 v16_load(const float *p, int n) {
    return (v16)(n == 16 ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(v16_mask(n), p));
}
VEC void v16_store(float *p, v16 v, int n) {
    if (n == 16) _mm512_storeu_ps(p, (__m512)v);
    else _mm512_mask_storeu_ps(p, v16_mask(n), (__m512)v);
}
VEC v16 v16_fma(v16 a, v16 b, v16 c) { return (v16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
VEC v16 v16_rint(v16 a) {
    return (v16)_mm512_roundscale_ps((__m512)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
VEC v16 v16_sqrt(v16 a) { return (v16)_mm512_sqrt_ps((__m512)a); }
// a < b ? a : b and a > b ? a : b: b when either is NaN.
VEC v16 v16_min(v16 a, v16 b) { return (v16)_mm512_min_ps((__m512)a, (__m512)b); }
VEC v16 v16_max(v16 a, v16 b) { return (v16)_mm512_max_ps((__m512)a, (__m512)b); }
// b where a is NaN, else a.
VEC v16 v16_nan_to(v16 a, v16 b) {
    return (v16)_mm512_mask_mov_ps((__m512)a, _mm512_cmp_ps_mask((__m512)a, (__m512)a, _CMP_UNORD_Q), (__m512)b);
}
// bf16_from_f32's bits, in the upper halves; the lower halves hold rests.
VEC __m512i v16_bf16_bits(v16 v) {
    __m512i u = _mm512_castps_si512((__m512)v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
}
VEC v16 v16_bf16_round(v16 v) {
    return (v16)_mm512_castsi512_ps(_mm512_and_si512(v16_bf16_bits(v), _mm512_set1_epi32((int)0xffff0000u)));
}
VEC v16 v16_load_bf16(const bf16 *p, int n) {
    __m256i h = n == 16 ? _mm256_loadu_si256((const __m256i *)(const void *)p)
                        : _mm256_maskz_loadu_epi16(v16_mask(n), p);
    return (v16)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
VEC void v16_store_bf16(bf16 *p, v16 v, int n) {
    __m256i h = _mm512_cvtepi32_epi16(_mm512_srli_epi32(v16_bf16_bits(v), 16));
    if (n == 16) _mm256_storeu_si256((__m256i *)(void *)p, h);
    else _mm256_mask_storeu_epi16(p, v16_mask(n), h);
}
// Bytes: 1 where lo <= v <= hi, else (and for NaN) 0.
VEC void v16_store_inside(uint8_t *p, v16 v, v16 lo, v16 hi, int n) {
    __mmask16 k = _mm512_cmp_ps_mask((__m512)lo, (__m512)v, _CMP_LE_OQ) &
                  _mm512_cmp_ps_mask((__m512)v, (__m512)hi, _CMP_LE_OQ);
    __m128i ones = _mm_maskz_set1_epi8(k, 1);
    if (n == 16) _mm_storeu_si128((__m128i *)(void *)p, ones);
    else _mm_mask_storeu_epi8(p, v16_mask(n), ones);
}
// v where the byte is not 0, else 0.
VEC v16 v16_keep(v16 v, const uint8_t *mask, int n) {
    __m128i b = bytes_load(mask, n);
    return (v16)_mm512_maskz_mov_ps(_mm_test_epi8_mask(b, b), (__m512)v);
}
// v where lo <= u <= hi, else 0.
VEC v16 v16_keep_inside(v16 v, v16 u, v16 lo, v16 hi) {
    __mmask16 k = _mm512_cmp_ps_mask((__m512)lo, (__m512)u, _CMP_LE_OQ) &
                  _mm512_cmp_ps_mask((__m512)u, (__m512)hi, _CMP_LE_OQ);
    return (v16)_mm512_maskz_mov_ps(k, (__m512)v);
}
// v * 2^n for integral n with one rounding.
VEC v16 v16_scale2(v16 v, v16 n) { return (v16)_mm512_scalef_ps((__m512)v, (__m512)n); }
// Lane i: table[k[i]], of sixteen.
VEC v16 v16_pick(const float table[16], v16i k) {
    return (v16)_mm512_permutexvar_ps((__m512i)k, _mm512_loadu_ps(table));
}
VEC v16 v16_load_i8(const int8_t *p, int n) { return (v16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes_load(p, n))); }
// int8_clamp(rintf(v)) of lanes below 2^31.
VEC void v16_store_i8(int8_t *p, v16 v, int n) {
    __mmask16 number = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q);
    __m128i codes = _mm512_cvtsepi32_epi8(_mm512_maskz_cvtps_epi32(number, (__m512)v));
    if (n == 16) _mm_storeu_si128((__m128i *)(void *)p, codes);
    else _mm_mask_storeu_epi8(p, v16_mask(n), codes);
}
#else
VEC v16 v16_select(v16i k, v16 a, v16 b) { return (v16)(((v16i)a & k) | ((v16i)b & ~k)); }

VEC v16 v16_load(const float *p, int n) {
    v16 v = {0};
    memcpy(&v, p, (size_t)n * sizeof(float));
    return v;
}
VEC void v16_store(float *p, v16 v, int n) { memcpy(p, &v, (size_t)n * sizeof(float)); }
VEC v16 v16_fma(v16 a, v16 b, v16 c) {
    for (int i = 0; i < 16; i++) c[i] = fmaf(a[i], b[i], c[i]);
    return c;
}
VEC v16 v16_rint(v16 a) {
    for (int i = 0; i < 16; i++) a[i] = rintf(a[i]);
    return a;
}
VEC v16 v16_sqrt(v16 a) {
    for (int i = 0; i < 16; i++) a[i] = sqrtf(a[i]);
    return a;
}
VEC v16 v16_min(v16 a, v16 b) { return v16_select(a < b, a, b); }
VEC v16 v16_max(v16 a, v16 b) { return v16_select(a > b, a, b); }
VEC v16 v16_nan_to(v16 a, v16 b) { return v16_select(a == a, a, b); }
VEC v16u v16_bf16_bits(v16 v) {
    v16u u = (v16u)v, r = u + 0x7fffu + ((u >> 16) & 1u), nan = (v16u)(v != v);
    return ((u | 0x400000u) & nan) | (r & ~nan);
}
VEC v16 v16_bf16_round(v16 v) { return (v16)(v16_bf16_bits(v) & 0xffff0000u); }
VEC v16 v16_load_bf16(const bf16 *p, int n) {
    v16u u = {0};
    for (int i = 0; i < n; i++) u[i] = (uint32_t)p[i] << 16;
    return (v16)u;
}
VEC void v16_store_bf16(bf16 *p, v16 v, int n) {
    v16u u = v16_bf16_bits(v) >> 16;
    for (int i = 0; i < n; i++) p[i] = (bf16)u[i];
}
VEC void v16_store_inside(uint8_t *p, v16 v, v16 lo, v16 hi, int n) {
    v16i k = (lo <= v) & (v <= hi);
    for (int i = 0; i < n; i++) p[i] = (uint8_t)(k[i] & 1);
}
VEC v16 v16_keep(v16 v, const uint8_t *mask, int n) {
    for (int i = 0; i < n; i++) v[i] = mask[i] ? v[i] : 0.0f;
    return v;
}
VEC v16 v16_keep_inside(v16 v, v16 u, v16 lo, v16 hi) { return (v16)((v16i)v & (lo <= u) & (u <= hi)); }
// In two multiplications: for |v| in [2^-1, 2] and |n| <= 250 the first is exact.
VEC v16 v16_scale2(v16 v, v16 n) {
    for (int i = 0; i < 16; i++) {
        int e = n[i] == n[i] ? (int)n[i] : 0, half = e >> 1;
        v[i] = v[i] * f32_from_bits((uint32_t)(half + 127) << 23) * f32_from_bits((uint32_t)(e - half + 127) << 23);
    }
    return v;
}
VEC v16 v16_pick(const float table[16], v16i k) {
    v16 v;
    for (int i = 0; i < 16; i++) v[i] = table[k[i] & 15];
    return v;
}
VEC v16 v16_load_i8(const int8_t *p, int n) {
    v16 v = {0};
    for (int i = 0; i < n; i++) v[i] = (float)p[i];
    return v;
}
VEC void v16_store_i8(int8_t *p, v16 v, int n) {
    v = v16_nan_to(v16_rint(v), v16_set1(0.0f));
    v = v16_min(v16_set1(127.0f), v16_max(v16_set1(-128.0f), v));
    for (int i = 0; i < n; i++) p[i] = (int8_t)v[i];
}
#endif

// Folds of the lanes: i with i + 8, then + 4, + 2, + 1.
#define V16_FOLD(name, ctype, expr) \
    VEC float name(v16 v) { \
        ctype t[16]; \
        memcpy(t, &v, sizeof t); \
        for (int h = 8; h; h >>= 1) \
            for (int i = 0; i < h; i++) { \
                ctype a = t[i], b = t[i + h]; \
                t[i] = (expr); \
            } \
        return t[0]; \
    }
#ifdef QLLM_AVX512
#define V16_FOLD512(name, op256, op128) \
    VEC float name(v16 v) { \
        __m256 a = op256(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1)); \
        __m128 b = op128(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)); \
        b = op128(b, _mm_movehl_ps(b, b)); \
        b = op128(b, _mm_movehdup_ps(b)); \
        return _mm_cvtss_f32(b); \
    }
V16_FOLD512(v16_sum, _mm256_add_ps, _mm_add_ps)
V16_FOLD512(v16_hmin, _mm256_min_ps, _mm_min_ps)
V16_FOLD512(v16_hmax, _mm256_max_ps, _mm_max_ps)
#undef V16_FOLD512
#else
V16_FOLD(v16_sum, float, a + b)
V16_FOLD(v16_hmin, float, a < b ? a : b)
V16_FOLD(v16_hmax, float, a > b ? a : b)
#endif
#undef V16_FOLD

// Sixteen f32 to an address that is a multiple of 64, past the caches: for tensors larger than they are, whose lines
// would be read from memory only to be overwritten. stream_done before others read them.
VEC void v16_stream(float *p, v16 v) {
#ifdef QLLM_AVX512
    _mm512_stream_ps(p, (__m512)v);
#else
    v16_store(p, v, 16);
#endif
}
VEC void stream_done(void) {
#ifdef QLLM_AVX512
    _mm_sfence();
#endif
}

// floatX in memory, f32 in lanes.
VEC v16 v16_loadx(const floatX *p, int n) {
#ifdef PRECISION_FP32
    return v16_load(p, n);
#else
    return v16_load_bf16(p, n);
#endif
}
VEC void v16_storex(floatX *p, v16 v, int n) {
#ifdef PRECISION_FP32
    v16_store(p, v, n);
#else
    v16_store_bf16(p, v, n);
#endif
}
// Thirty-two values at once. bf16: the processor's own conversion, which takes subnormals for zero, where there are
// none.
VEC void v32_storex(floatX *p, v16 lo, v16 hi) {
#if defined(QLLM_AVX512) && defined(__AVX512BF16__) && !defined(PRECISION_FP32)
    const int subnormal = 0x20;
    __mmask16 any = _mm512_fpclass_ps_mask((__m512)lo, subnormal) | _mm512_fpclass_ps_mask((__m512)hi, subnormal);
    if (__builtin_expect(any == 0, 1)) {
        _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)hi, (__m512)lo));
        return;
    }
#endif
    v16_storex(p, lo, 16);
    v16_storex(p + 16, hi, 16);
}
// The value that v16_storex stores.
VEC v16 v16_roundx(v16 v) {
#ifdef PRECISION_FP32
    return v;
#else
    return v16_bf16_round(v);
#endif
}

// e^x within 1 ulp of the true value for normal results (test_ops_elementwise measures it over all of [-104, 89]):
// x = n ln2 + r with |r| <= ln2/2, ln2 in two parts so that n * hi is exact, then 1 + r + r^2 q(r) with the q of degree
// 4 that leaves the least relative error (2^-28.3; fitted by reweighted least squares), by Horner with fused
// multiply-adds. Overflows to infinity above 88.73, to 0 below -103.98; NaN stays NaN. scalar.h's exp_f32 is the
// scalar twin: the same bits.
VEC v16 v16_exp(v16 x) {
    x = v16_min(v16_set1(89.0f), v16_max(v16_set1(-105.0f), x));
    v16 n = v16_rint(x * v16_set1(1.44269504f));
    v16 r = v16_fma(n, v16_set1(-0.693359375f), x);
    r = v16_fma(n, v16_set1(2.12194440e-4f), r);
    v16 p = v16_fma(v16_set1(0.00138145965f), r, v16_set1(0.00836871751f));
    p = v16_fma(p, r, v16_set1(0.041668389f));
    p = v16_fma(p, r, v16_set1(0.166665211f));
    p = v16_fma(p, r, v16_set1(0.49999994f));
    p = v16_fma(p, r, v16_set1(1.0f));
    p = v16_fma(p, r, v16_set1(1.0f));
    return v16_scale2(p, n);
}
#endif
