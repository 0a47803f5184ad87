// Float weights against few tokens: bound by the weight's bytes. Rows are read one after the other, so that each thread
// follows one stream through memory.
#include "cpu.h"
#include "isa.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define MATVEC_TOKENS 2                 // tokens that share one pass over a row
#define AHEAD 4096                      // bytes
#define PER_UNIT (4 / (int)sizeof(floatX))

// Rows of x, each padded with zeros to `ld` values. Forms in f32 read x32, in which the values of a block of LANES
// units stand as they are met: first those of the low halves, then those of the high halves.
typedef struct {
    const floatX *x;
    float *x32;
    size_t ld;
    int C;
} MatvecInput;

typedef void (*RowFn)(float *y, const floatX *w, const MatvecInput *in, size_t t0);
typedef struct {
    RowFn row[MATVEC_TOKENS];           // of n = 1, 2 tokens
    int lanes;                          // of x32; 0: reads x
} MatvecForm;

// n values from w on: their successors in memory, in lines.
static inline __attribute__((always_inline)) void prefetch_row(const floatX *w, int n) {
    for (int i = 0; i < n; i += 64 / (int)sizeof *w) __builtin_prefetch((const char *)(w + i) + AHEAD);
}

#define LANES 4
#define FORM(name) plain_##name
#define FORM_TARGET
#define FORM_FMA(a, b, c) ((a) * (b) + (c))
#include "matvec_form.h"
static const MatvecForm plain = {{plain_row_1, plain_row_2}, 4};

#if defined(__x86_64__)
#define LANES 8
#define FORM(name) avx2_##name
#define FORM_TARGET __attribute__((target("avx2,fma")))
#define FORM_FMA(a, b, c) ((avx2_vf)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#include "matvec_form.h"
static const MatvecForm avx2 = {{avx2_row_1, avx2_row_2}, 8};

#define LANES 16
#define FORM(name) avx512_##name
#define FORM_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define FORM_FMA(a, b, c) ((avx512_vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#include "matvec_form.h"
static const MatvecForm avx512 = {{avx512_row_1, avx512_row_2}, 16};

#ifndef PRECISION_FP32
// With AVX512-BF16, where x stays as it is.
#define TARGET_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define INLINE static inline __attribute__((always_inline)) TARGET_BF16
#define STEP 32

INLINE __m512bh load32(const floatX *p) { return (__m512bh)_mm512_loadu_si512(p); }

INLINE float fold(const __m512 acc[4]) {
    __m512 a = _mm512_add_ps(_mm512_add_ps(acc[0], acc[1]), _mm512_add_ps(acc[2], acc[3]));
    __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

INLINE void bf16_row(float *y, const floatX *w, const MatvecInput *in, size_t t0, int n) {
    const floatX *x = in->x + t0 * in->ld;
    const int C = in->C;
    __m512 acc[MATVEC_TOKENS][4];
    for (int t = 0; t < n; t++)
        for (int i = 0; i < 4; i++) acc[t][i] = _mm512_setzero_ps();
    int c = 0;
    for (; c + 4 * STEP <= C; c += 4 * STEP) {
        prefetch_row(w + c, 4 * STEP);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            __m512bh u = load32(w + c + i * STEP);
#pragma GCC unroll 4
            for (int t = 0; t < n; t++)
                acc[t][i] = _mm512_dpbf16_ps(acc[t][i], u, load32(x + (size_t)t * in->ld + (c + i * STEP)));
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++, c += STEP) {
        if (c >= C) break;
        __mmask32 mask = C - c < STEP ? (1u << (C - c)) - 1u : ~0u;
        __m512bh u = (__m512bh)_mm512_maskz_loadu_epi16(mask, w + c);
#pragma GCC unroll 4
        for (int t = 0; t < n; t++) {
            __m512bh v = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + (size_t)t * in->ld + c);
            acc[t][i] = _mm512_dpbf16_ps(acc[t][i], u, v);
        }
    }
    for (int t = 0; t < n; t++) y[t] = fold(acc[t]);
}

static TARGET_BF16 void bf16_row_1(float *y, const floatX *w, const MatvecInput *in, size_t t0) {
    bf16_row(y, w, in, t0, 1);
}
static TARGET_BF16 void bf16_row_2(float *y, const floatX *w, const MatvecInput *in, size_t t0) {
    bf16_row(y, w, in, t0, 2);
}
static const MatvecForm with_bf16 = {{bf16_row_1, bf16_row_2}, 0};
#endif
#endif

static const MatvecForm *form(void) {
#if defined(__x86_64__)
    CpuIsa isa = cpu_isa();
#ifndef PRECISION_FP32
    if (isa >= ISA_AVX512_BF16) return &with_bf16;
#endif
    if (isa >= ISA_AVX512) return &avx512;
    if (isa >= ISA_AVX2) return &avx2;
#endif
    return &plain;
}

// x32 of N tokens. False: no memory.
static bool widen_input(MatvecInput *in, const floatX *x, int lanes, size_t N) {
    const size_t block = (size_t)(lanes * PER_UNIT), C = (size_t)in->C;
    in->ld = (C + block - 1) / block * block;
    in->x32 = cpu_workspace(N * in->ld * sizeof(float));
    if (!in->x32) return false;
    for (size_t t = 0; t < N; t++) {
        float *to = in->x32 + t * in->ld;
        for (size_t c = 0; c < in->ld; c += block)
            for (size_t i = 0; i < block; i++) {
                size_t from = c + i % (size_t)lanes * PER_UNIT + i / (size_t)lanes;
                to[c + i] = from < C ? x2f(x[t * C + from]) : 0.0f;
            }
    }
    return true;
}

static void matvec(floatX *y, float *y32, const floatX *x, const floatX *w, size_t N, int C, int OC) {
    const MatvecForm *f = form();
    MatvecInput in = {.x = x, .ld = (size_t)C, .C = C};
    if (f->lanes && !widen_input(&in, x, f->lanes, N)) return;
#pragma omp parallel if ((size_t)OC * (size_t)C >= CPU_MIN_PARALLEL)
    {
        int first, last;
        cpu_share(&first, &last, OC);
        for (int r = first; r < last; r++)
            for (size_t t = 0, n; t < N; t += n) {
                float sum[MATVEC_TOKENS];
                n = N - t < MATVEC_TOKENS ? N - t : MATVEC_TOKENS;
                f->row[n - 1](sum, w + (size_t)r * (size_t)C, &in, t);
                for (size_t i = 0; i < n; i++) {
                    size_t at = (t + i) * (size_t)OC + (size_t)r;
                    if (y) y[at] = f2x(sum[i]);
                    else y32[at] = sum[i];
                }
            }
    }
}

void cpu_matvec_forward(floatX *y, const floatX *x, const floatX *w, size_t N, int C, int OC) {
    matvec(y, NULL, x, w, N, C, OC);
}

void cpu_matvec_forward_f32(float *y, const floatX *x, const floatX *w, size_t N, int C, int OC) {
    matvec(NULL, y, x, w, N, C, OC);
}
