// What the tests of the operations share: shapes that hurt, random tensors, bit comparisons, threads.
#ifndef QLLM_OPS_COMMON_H
#define QLLM_OPS_COMMON_H
#include "test_common.h"
#include "cpu/cpu.h"
#include "rng.h"
#include <float.h>

// Largest relative error of one rounding to f32, and to X.
#define U32 5.9604644775390625e-8
#ifdef PRECISION_FP32
#define UX U32
#else
#define UX 0.00390625
#endif

// Rows and columns: one row, odd sizes, less than a vector, tails, widths of real models; the last is large enough for
// several threads.
static const int shapes[][2] = {{1, 1}, {1, 32}, {3, 7}, {3, 64}, {2, 17}, {17, 96}, {5, 576}, {4, 2048}, {37, 608}};
#define N_SHAPES (sizeof shapes / sizeof *shapes)

static uint64_t stream_of_tests;

// Uniform in [-scale, scale).
static inline void fill_f32(float *x, size_t n, float scale) {
    stream_of_tests++;
    for (size_t i = 0; i < n; i++) x[i] = (2.0f * philox_uniform(philox(1, stream_of_tests, i).v[0]) - 1.0f) * scale;
}
// Buffers are of the exact size, so that the sanitizer sees any step beyond them.
static inline void *must_alloc(size_t bytes) {
    void *p = malloc(bytes ? bytes : 1);
    if (!p) abort();
    memset(p, 0xa5, bytes);
    return p;
}
static inline float *new_f32(size_t n, float scale) {
    float *x = must_alloc(n * sizeof *x);
    fill_f32(x, n, scale);
    return x;
}
static inline floatX *new_x(size_t n, float scale) {
    float *f = new_f32(n, scale);
    floatX *x = must_alloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = f2x(f[i]);
    free(f);
    return x;
}
static inline void *copy_of(const void *p, size_t bytes) {
    void *q = must_alloc(bytes);
    memcpy(q, p, bytes);
    return q;
}
static inline uint32_t random_bits(uint64_t i) { return philox(2, 0, i).v[0]; }

static inline void expect_same(const void *got, const void *want, size_t bytes, const char *what, int rows, int cols) {
    if (!memcmp(got, want, bytes)) return;
    size_t i = 0;
    while (((const uint8_t *)got)[i] == ((const uint8_t *)want)[i]) i++;
    fail_msg("%s (%d x %d): byte %zu of %zu differs", what, rows, cols, i, bytes);
}
// Same bits, or both NaN.
static inline void expect_same_f32(float got, float want, const char *what, size_t i) {
    if (f32_bits(got) == f32_bits(want) || (got != got && want != want)) return;
    fail_msg("%s: element %zu is %.9g (%08x), expected %.9g (%08x)", what, i, (double)got, f32_bits(got), (double)want,
             f32_bits(want));
}
static inline void expect_near(double got, double want, double tolerance, const char *what, size_t i) {
    if (fabs(got - want) <= tolerance) return;
    fail_msg("%s: element %zu is %.9g, expected %.9g within %.3g", what, i, got, want, tolerance);
}

static inline void set_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}
#endif
