// What the tests of matmul and attention share: random operands, threads, the device's error, the roundoff of X.
#ifndef QLLM_MATMUL_COMMON_H
#define QLLM_MATMUL_COMMON_H
#include "test_common.h"
#include "device.h"

static uint32_t state;

// Uniform in [-1, 1), rounded to X.
static inline float uniform(void) {
    state = state * 1664525u + 1013904223u;
    return x2f(f2x((float)(state >> 8) / 8388608.0f - 1.0f));
}

static inline floatX *random_x(size_t n, float scale) {
    floatX *p = xmalloc(n * sizeof *p);
    for (size_t i = 0; i < n; i++) p[i] = f2x(scale * uniform());
    return p;
}

// A build without OpenMP has one thread, whatever is asked for: its comparisons are of a run with itself.
static inline void set_threads(int n) {
    Err err;
#ifndef _OPENMP
    n = 1;
#endif
    if (device_init("cpu", n, &err) < 0) fail_msg("%s", err.text);
}

static inline void check_device(void) {
    Err err = {0};
    if (device_sync(&err) < 0) fail_msg("%s", err.text);
}

// Unit roundoff of X.
#ifdef PRECISION_FP32
#define UX 0x1p-24
#else
#define UX 0x1p-8
#endif
#endif
