// Rotary position embedding, in place.
#include "cpu.h"

// (a, b) of a pair turns by the angle: a cos - b sin, b cos + a sin; each product rounded, as eager PyTorch does.
VEC void rope_step(floatX *a, floatX *b, const float *cs, const float *sn, int n, bool inverse) {
    v16 va = v16_loadx(a, n), vb = v16_loadx(b, n), c = v16_load(cs, n), s = v16_load(sn, n);
    if (inverse) s = -s;
    v16_storex(a, va * c - vb * s, n);
    v16_storex(b, vb * c + va * s, n);
}

void rope_row(floatX *row, const float *cs, const float *sn, int NH_rot, int HS, bool inverse) {
    int half = HS / 2;
    for (int h = 0; h < NH_rot; h++) {
        floatX *a = row + (size_t)h * (size_t)HS, *b = a + half;
        int i = 0;
        for (; i + 16 <= half; i += 16) rope_step(a + i, b + i, cs + i, sn + i, 16, inverse);
        if (i < half) rope_step(a + i, b + i, cs + i, sn + i, half - i, inverse);
    }
}

void cpu_rope(floatX *x, const float *cos_t, const float *sin_t, size_t N, int T, int pos0, int ldx, int NH_rot, int HS,
              bool inverse) {
    size_t half = (size_t)HS / 2;
#pragma omp parallel for schedule(static) if (N * (size_t)ldx >= CPU_MIN_PARALLEL)
    for (size_t n = 0; n < N; n++) {
        size_t pos = (size_t)pos0 + n % (size_t)T;
        rope_row(x + n * (size_t)ldx, cos_t + pos * half, sin_t + pos * half, NH_rot, HS, inverse);
    }
}
