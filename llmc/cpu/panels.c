// A panel of codes times a few tokens: bound by the codes' bytes. Forms of f32 for every width of vectors, and one with
// AVX512-BF16 for codes of 4 bits.
//
// Per 64 bytes at 23 GB/s a core of 3.8 GHz has 10 cycles: codes of 8 bits take 16 instructions in them (two shifts, a
// conversion and a multiply-add for 16 weights), codes of 4 bits 12 with vdpbf16ps (a shift, a look-up and a
// multiply-add for 32 weights) and 25 without.
#include "panels.h"
#include "isa.h"
#include "tile.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// The next lines are asked for this far ahead: panels are one stream, whatever they hold. Measured on Zen 5 with one
// thread: 4 KiB 0.80, 8 KiB 0.90, 12 KiB 0.91, 16 KiB 0.86 of the read bandwidth.
#define PANEL_AHEAD 12288

// The functions of one form: codes of 4 and 8 bits, without and with integer zero points, for one token and two.
typedef struct {
    PanelDot run[2][2][PANEL_TOKENS];
    bool wide;
} PanelDots;

#define LANES 4
#define FORM(name) plain_##name
#define FORM_TARGET
#define FORM_FMA(a, b, c) ((a) * (b) + (c))
#include "panel_form.h"

#if defined(__x86_64__)
#define LANES 8
#define FORM(name) avx2_##name
#define FORM_TARGET __attribute__((target("avx2,fma")))
#define FORM_FMA(a, b, c) ((avx2_vf)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#include "panel_form.h"

#define TARGET_512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
static const float nibble_f32[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
#define LANES 16
#define FORM(name) avx512_##name
#define FORM_TARGET TARGET_512
#define FORM_FMA(a, b, c) ((avx512_vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
// The look-up reads the lowest four bits of a lane.
#define FORM_NIBBLE(w, k) \
    ((avx512_vf)_mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)(w), 4 * (unsigned)(k)), \
                                      _mm512_loadu_ps(nibble_f32)))
#include "panel_form.h"

#ifndef PRECISION_FP32
// ---------------------------------------------------------------------------------------------
// Codes of 4 bits with AVX512-BF16. One look-up makes the codes of a pair of columns in 16 rows: its index is the
// lowest five bits of a 16-bit half, of which the fifth is the next nibble's, so entries repeat after 16. Under integer
// zero points the index is the difference, -15 to 15 modulo 32. Two chains of multiply-adds a group; vdpbf16ps takes
// subnormals for zero.
#define TARGET_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define INLINE static inline __attribute__((always_inline)) TARGET_BF16

static const bf16 nibble_bf16[32] = {
    0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0,
    0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
    0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
};
static const bf16 difference_bf16[32] = {
    0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120,
    0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0xc180, 0xc170, 0xc160, 0xc150, 0xc140, 0xc130,
    0xc120, 0xc110, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
};

INLINE __m512 widen16(const char *p) {
    __m256i h = _mm256_loadu_si256((const __m256i *)(const void *)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

// A pair of values in all lanes.
INLINE __m512bh pair(const floatX *x) {
    int32_t two;
    memcpy(&two, x, sizeof two);
    return (__m512bh)_mm512_set1_epi32(two);
}

INLINE void bf16_dot(float *out, const Panels *p, const char *panel, const PanelInput *in, size_t t0, int n,
                     int64_t units, bool zero_is_int) {
    const __m512i table = _mm512_loadu_si512(zero_is_int ? difference_bf16 : nibble_bf16);
    const __m512i low = _mm512_set1_epi16(15), flip = _mm512_set1_epi16((short)0x8888);
    __m512 total[PANEL_TOKENS];
    for (int t = 0; t < n; t++) total[t] = _mm512_setzero_ps();
    const floatX *x = in->x + t0 * in->ld;
    for (int64_t g = 0; g < p->groups; g++) {
        const char *head = panel + panel_head(p, g) + (g % 2) * 32, *codes = panel + panel_codes(p, g);
        __m512 acc[PANEL_TOKENS][2];
        for (int t = 0; t < n; t++) acc[t][0] = acc[t][1] = _mm512_setzero_ps();
        __m512i zero = _mm512_setzero_si512();
        if (zero_is_int) {      // plus 8, in both halves of each lane
            __m256i z = _mm256_loadu_si256((const __m256i *)(const void *)(head + 64));
            zero = _mm512_add_epi32(_mm512_cvtepu16_epi32(z), _mm512_set1_epi32(8));
            zero = _mm512_or_si512(_mm512_slli_epi32(zero, 16), _mm512_and_si512(zero, _mm512_set1_epi32(0xffff)));
        }
        if (g % 2 == 0) __builtin_prefetch(head + PANEL_AHEAD);
#pragma GCC unroll 4
        for (int64_t u = 0; u < units; u++) {
            __m512i w = _mm512_loadu_si512(codes);
            __builtin_prefetch(codes + PANEL_AHEAD);
            if (zero_is_int) w = _mm512_xor_si512(w, flip);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                __m512i k = i ? _mm512_srli_epi16(w, 4 * (unsigned)i) : w;
                if (zero_is_int) k = _mm512_sub_epi16(_mm512_and_si512(k, low), zero);
                __m512bh q = (__m512bh)_mm512_permutexvar_epi16(k, table);
#pragma GCC unroll 4
                for (int t = 0; t < n; t++)
                    acc[t][i % 2] = _mm512_dpbf16_ps(acc[t][i % 2], q, pair(x + (size_t)t * in->ld + 2 * i));
            }
            codes += UNIT_BYTES;
            x += 8;
        }
        __m512 scale = widen16(head);
        for (int t = 0; t < n; t++) {
            total[t] = _mm512_fmadd_ps(_mm512_add_ps(acc[t][0], acc[t][1]), scale, total[t]);
            if (p->zero == PANEL_ZERO_FLOAT) {
                float sum = in->sums[(t0 + (size_t)t) * (size_t)p->groups + (size_t)g];
                total[t] = _mm512_fmadd_ps(widen16(head + 64), _mm512_set1_ps(sum), total[t]);
            }
        }
    }
    for (int t = 0; t < n; t++) _mm512_storeu_ps(out + t * PANEL_ROWS, total[t]);
}

#define BF16_DOT(name, n, zero_is_int) \
    static __attribute__((noinline)) TARGET_BF16 void name(float *out, const Panels *p, const char *panel, \
                                                           const PanelInput *in, size_t t0) { \
        if (p->units == 4) bf16_dot(out, p, panel, in, t0, n, 4, zero_is_int); \
        else bf16_dot(out, p, panel, in, t0, n, p->units, zero_is_int); \
    }
BF16_DOT(bf16_1, 1, false)
BF16_DOT(bf16_2, 2, false)
BF16_DOT(bf16_zero_1, 1, true)
BF16_DOT(bf16_zero_2, 2, true)
static const PanelDots bf16_dots = {.run = {{{bf16_1, bf16_2}, {bf16_zero_1, bf16_zero_2}}}};
#endif
#endif

PanelKernel panel_kernel(const Panels *p) {
    const PanelDots *dots = &plain_dots;
#if defined(__x86_64__)
    CpuIsa isa = cpu_isa();
    if (isa >= ISA_AVX2) dots = &avx2_dots;
    if (isa >= ISA_AVX512) dots = &avx512_dots;
#ifndef PRECISION_FP32
    if (isa >= ISA_AVX512_BF16 && p->bits == 4) dots = &bf16_dots;
#endif
#endif
    PanelKernel k = {.wide = dots->wide};
    for (int n = 0; n < PANEL_TOKENS; n++) k.dot[n] = dots->run[p->bits == 8][p->zero == PANEL_ZERO_INT][n];
    return k;
}

// ---------------------------------------------------------------------------------------------
// Panels back to rows of working values, 32 columns at a time: the 16 rows' pairs of columns are 16 registers, which
// are transposed.
#if defined(QLLM_AVX512) && UNIT == 2

typedef struct { __m512 scale, zero; } GroupQuant;      // of 16 rows

VEC __m512 unit_column(__m512i w, int bits, int j) {
    if (bits == 8)
        return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(w, 24 - 8 * (unsigned)j), 24));
    unsigned nibble = (unsigned)(j % 2 * 4 + j / 2);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(w, 4 * nibble), _mm512_loadu_ps(nibble_f32));
}

// Columns j and j + 1 of a unit as pairs of bf16.
VEC __m512i unit_pair(__m512i w, int bits, int j, const GroupQuant *q, PanelZero kind, bool as_codes) {
    const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512 v[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        v[i] = unit_column(w, bits, j + i);
        if (kind == PANEL_ZERO_INT) v[i] = _mm512_sub_ps(v[i], q->zero);
        if (!as_codes)
            v[i] = _mm512_fmadd_ps(v[i], q->scale, kind == PANEL_ZERO_FLOAT ? q->zero : _mm512_setzero_ps());
    }
    return _mm512_permutexvar_epi16(zip, (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0]));
}

// 32 columns from the units at `codes`.
VEC void unpack_32(floatX *work, const char *codes, int bits, const GroupQuant *q, PanelZero kind, bool as_codes,
                   int rows, size_t C) {
    const int cols = 32 / bits;
    __m512i r[PANEL_ROWS];
#pragma GCC unroll 8
    for (int u = 0; u < bits; u++) {
        __m512i w = _mm512_loadu_si512(codes + u * UNIT_BYTES);
#pragma GCC unroll 4
        for (int j = 0; j < cols; j += 2) r[(u * cols + j) / 2] = unit_pair(w, bits, j, q, kind, as_codes);
    }
    transpose_registers(r);
    if (rows == PANEL_ROWS) {
#pragma GCC unroll 16
        for (int i = 0; i < PANEL_ROWS; i++) _mm512_storeu_si512(work + (size_t)i * C, r[i]);
        return;
    }
    for (int i = 0; i < rows; i++) memcpy(work + (size_t)i * C, &r[i], sizeof r[i]);
}

VEC void unpack_group(floatX *work, const char *codes, const Panels *p, int bits, const GroupQuant *q, PanelZero kind,
                      bool as_codes, int rows, size_t C) {
    for (int64_t u = 0; u < p->units; u += bits) {
        unpack_32(work, codes + u * UNIT_BYTES, bits, q, kind, as_codes, rows, C);
        work += 32;
    }
}

bool panel_unpack(floatX *work, float *wscale, const char *panel, const Panels *p, int rows, int C, bool as_codes) {
    if (cpu_isa() < ISA_AVX512_BF16 || p->units % p->bits || p->groups * p->units * panel_unit_cols(p) != C)
        return false;
    const bool four = p->bits == 4;
    for (int64_t g = 0; g < p->groups; g++) {
        const char *head = panel + panel_head(p, g) + g % 2 * 32, *codes = panel + panel_codes(p, g);
        GroupQuant q = {.scale = p->scale_f32 ? _mm512_loadu_ps(head) : widen16(head)};
        if (p->zero == PANEL_ZERO_FLOAT) {
            q.zero = widen16(head + 64);
        } else if (p->zero == PANEL_ZERO_INT) {
            __m256i z = _mm256_loadu_si256((const __m256i *)(const void *)(head + 64));
            q.zero = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(z));
        }
        if (as_codes) {
            float scale[PANEL_ROWS];
            _mm512_storeu_ps(scale, q.scale);
            memcpy(wscale, scale, (size_t)rows * sizeof *scale);
            if (four) unpack_group(work, codes, p, 4, &q, PANEL_SYMMETRIC, true, rows, (size_t)C);
            else unpack_group(work, codes, p, 8, &q, PANEL_SYMMETRIC, true, rows, (size_t)C);
        } else {
            if (four) unpack_group(work, codes, p, 4, &q, p->zero, false, rows, (size_t)C);
            else unpack_group(work, codes, p, 8, &q, p->zero, false, rows, (size_t)C);
        }
        work += C / p->groups;
    }
    return true;
}
#else
bool panel_unpack(floatX *work, float *wscale, const char *panel, const Panels *p, int rows, int C, bool as_codes) {
    (void)work, (void)wscale, (void)panel, (void)p, (void)rows, (void)C, (void)as_codes;
    return false;
}
#endif
