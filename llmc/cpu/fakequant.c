// Activation fake quantization by row, and its straight-through masks.
#include "cpu.h"

// The value, before its rounding to X. The flags are constants where this is inlined: four loops, no branches inside.
VEC v16 fakequant_step(uint8_t *mask, const floatX *x, int n, const BlockQuant *b, float mid, bool zero_is_float,
                       bool with_mask) {
    v16 u = v16_unclamped(v16_loadx(x, n), b, zero_is_float, QD_X);
    if (with_mask) v16_store_inside(mask, u, b->lo, b->hi, n);
    return v16_dequant(v16_clamp_code(u, b), b, zero_is_float, mid);
}

VEC void fakequant_loop(floatX *y, uint8_t *mask, const floatX *x, int C, const BlockQuant *b, float mid,
                        bool zero_is_float, bool with_mask) {
    int c = 0;
    for (; c + 32 <= C; c += 32) {
        prefetch_ahead(y + c);
        v16 lo = fakequant_step(with_mask ? mask + c : NULL, x + c, 16, b, mid, zero_is_float, with_mask);
        v16 hi = fakequant_step(with_mask ? mask + c + 16 : NULL, x + c + 16, 16, b, mid, zero_is_float, with_mask);
        v32_storex(y + c, lo, hi);
    }
    for (; c < C; c += 16) {
        int n = C - c < 16 ? C - c : 16;
        v16_storex(y + c, fakequant_step(with_mask ? mask + c : NULL, x + c, n, b, mid, zero_is_float, with_mask), n);
    }
}

void fakequant_row(floatX *y, uint8_t *mask, const floatX *x, int C, Range range, const QuantSpec *act) {
    V16QParams p = v16_choose(v16_roundx(v16_set1(v16_hmin(range.lo))), v16_roundx(v16_set1(v16_hmax(range.hi))), act,
                              QD_X);
    BlockQuant b = block_quant(p, act, QD_X);
    float mid = quant_mid(act);
    if (act->zero == QZ_FLOAT) {
        if (mask) fakequant_loop(y, mask, x, C, &b, mid, true, true);
        else fakequant_loop(y, NULL, x, C, &b, mid, true, false);
    } else {
        if (mask) fakequant_loop(y, mask, x, C, &b, mid, false, true);
        else fakequant_loop(y, NULL, x, C, &b, mid, false, false);
    }
}

static Range range_of(const floatX *x, int C) {
    Range even = range_empty(), odd = even;          // two, so that an addition need not wait for the one before
    int c = 0;
    for (; c + 32 <= C; c += 32) {
        prefetch_ahead(x + c);
        range_add(&even, v16_loadx(x + c, 16), 16);
        range_add(&odd, v16_loadx(x + c + 16, 16), 16);
    }
    for (; c < C; c += 16) {
        int n = C - c < 16 ? C - c : 16;
        range_add(&even, v16_loadx(x + c, n), n);
    }
    return (Range){v16_min(even.lo, odd.lo), v16_max(even.hi, odd.hi)};
}

void cpu_fakequant_forward(floatX *y, uint8_t *mask, const floatX *x, size_t N, int C, const QuantSpec *act) {
#pragma omp parallel for schedule(static) if (N * (size_t)C >= CPU_MIN_PARALLEL)
    for (size_t n = 0; n < N; n++) {
        size_t at = n * (size_t)C;
        if (quant_is_on(act)) {
            fakequant_row(y + at, mask ? mask + at : NULL, x + at, C, range_of(x + at, C), act);
            continue;
        }
        if (y != x) memcpy(y + at, x + at, (size_t)C * sizeof *y);
        if (mask) memset(mask + at, 1, (size_t)C);
    }
}

void cpu_mask_backward(floatX *dx, const uint8_t *mask, size_t N, int C) {
    size_t total = N * (size_t)C, blocks = (total + 4095) / 4096;
#pragma omp parallel for schedule(static) if (total >= CPU_MIN_PARALLEL)
    for (size_t k = 0; k < blocks; k++) {
        size_t i = k * 4096, end = i + 4096 < total ? i + 4096 : total;
        for (; i + 16 <= end; i += 16) v16_storex(dx + i, v16_keep(v16_loadx(dx + i, 16), mask + i, 16), 16);
        for (; i < end; i++) dx[i] = mask[i] ? dx[i] : 0;
    }
}
