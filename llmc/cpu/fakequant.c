// Activation fake quantization by row, and its straight-through masks.
#include "cpu.h"

VEC void fakequant_step(floatX *y, uint8_t *mask, const floatX *x, int n, const BlockQuant *b, bool zero_is_float,
                        bool with_mask) {
    v16 u = v16_unclamped(v16_loadx(x, n), b, zero_is_float, QD_X);
    if (with_mask) v16_store_inside(mask, u, b->lo, b->hi, n);
    v16_storex(y, v16_dequant(v16_clamp_code(u, b), b, zero_is_float, QD_X), n);
}

// zero_is_float and with_mask are constants at each call: four loops, no branches inside.
VEC void fakequant_loop(floatX *y, uint8_t *mask, const floatX *x, int C, const BlockQuant *b, bool zero_is_float,
                        bool with_mask) {
    int c = 0;
    for (; c + 16 <= C; c += 16) fakequant_step(y + c, with_mask ? mask + c : NULL, x + c, 16, b, zero_is_float, with_mask);
    if (c < C) fakequant_step(y + c, with_mask ? mask + c : NULL, x + c, C - c, b, zero_is_float, with_mask);
}

void fakequant_row(floatX *y, uint8_t *mask, const floatX *x, int C, float mn, float mx, const QuantSpec *act) {
    QParams p = quant_choose(quant_round_d(mn, QD_X), quant_round_d(mx, QD_X), act, QD_X);
    BlockQuant b = block_quant(p, act, QD_X);
    if (act->zero == QZ_FLOAT) {
        if (mask) fakequant_loop(y, mask, x, C, &b, true, true);
        else fakequant_loop(y, NULL, x, C, &b, true, false);
    } else {
        if (mask) fakequant_loop(y, mask, x, C, &b, false, true);
        else fakequant_loop(y, NULL, x, C, &b, false, false);
    }
}

void cpu_fakequant_forward(floatX *y, uint8_t *mask, const floatX *x, size_t N, int C, const QuantSpec *act) {
#pragma omp parallel for schedule(static) if (N * (size_t)C >= CPU_MIN_PARALLEL)
    for (size_t n = 0; n < N; n++) {
        const floatX *xn = x + n * (size_t)C;
        floatX *yn = y + n * (size_t)C;
        uint8_t *mn = mask ? mask + n * (size_t)C : NULL;
        if (!quant_is_on(act)) {
            if (yn != xn) memcpy(yn, xn, (size_t)C * sizeof(floatX));
            if (mn) memset(mn, 1, (size_t)C);
            continue;
        }
        v16 lo = v16_set1(INFINITY), hi = v16_set1(-INFINITY);
        int c = 0;
        for (; c + 16 <= C; c += 16) {
            v16 v = v16_loadx(xn + c, 16);
            lo = v16_min(v, lo);
            hi = v16_max(v, hi);
        }
        float rmin = v16_hmin(lo), rmax = v16_hmax(hi);
        for (; c < C; c++) {
            float v = x2f(xn[c]);
            rmin = v < rmin ? v : rmin;
            rmax = v > rmax ? v : rmax;
        }
        fakequant_row(yn, mn, xn, C, rmin, rmax, act);
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
