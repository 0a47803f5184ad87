// RMSNorm with the residual add before it and the activation fake quantization after it.
#include "cpu.h"

// r = X(x + delta), kept in res; returns r.
VEC v16 residual_step(floatX *res, const floatX *x, const floatX *delta, int n, bool with_delta, bool with_res) {
    v16 r = v16_loadx(x, n);
    if (with_delta) r = v16_roundx(r + v16_loadx(delta, n));
    if (with_res) v16_storex(res, r, n);
    return r;
}

VEC float residual_row(floatX *res, const floatX *x, const floatX *delta, int C, bool with_delta, bool with_res) {
    v16 sum = {0};
    int c = 0;
    for (; c + 16 <= C; c += 16) {
        v16 r = residual_step(with_res ? res + c : NULL, x + c, with_delta ? delta + c : NULL, 16, with_delta, with_res);
        sum = v16_fma(r, r, sum);
    }
    if (c < C) {                                    // lanes beyond the row load as 0 and add nothing
        v16 r = residual_step(with_res ? res + c : NULL, x + c, with_delta ? delta + c : NULL, C - c, with_delta, with_res);
        sum = v16_fma(r, r, sum);
    }
    return v16_sum(sum);
}

VEC v16 normalize_step(floatX *y, const floatX *r, const floatX *weight, v16 rstd, int n) {
    v16 v = v16_loadx(r, n) * rstd * v16_loadx(weight, n);
    v16_storex(y, v, n);
    return v;
}

void cpu_rmsnorm_fq_forward(floatX *res, floatX *y, float *rstd, uint8_t *mask, const floatX *x, const floatX *delta,
                            const floatX *weight, size_t N, int C, float eps, const QuantSpec *act) {
#pragma omp parallel for schedule(static) if (N * (size_t)C >= CPU_MIN_PARALLEL)
    for (size_t n = 0; n < N; n++) {
        size_t at = n * (size_t)C;
        const floatX *r = x + at;
        float sum;
        if (delta) {
            sum = residual_row(res + at, r, delta + at, C, true, true);
            r = res + at;
        } else if (res && res != x) {
            sum = residual_row(res + at, r, NULL, C, false, true);
        } else {
            sum = residual_row(NULL, r, NULL, C, false, false);
        }
        float s = 1.0f / sqrtf(sum / (float)C + eps);
        if (rstd) rstd[n] = s;
        v16 scale = v16_set1(s), lo = v16_set1(INFINITY), hi = v16_set1(-INFINITY);
        floatX *yn = y + at;
        int c = 0;
        for (; c + 16 <= C; c += 16) {
            v16 v = normalize_step(yn + c, r + c, weight + c, scale, 16);
            lo = v16_min(v, lo);
            hi = v16_max(v, hi);
        }
        float rmin = v16_hmin(lo), rmax = v16_hmax(hi);
        if (c < C) {
            v16 v = normalize_step(yn + c, r + c, weight + c, scale, C - c);
            for (int i = 0; i < C - c; i++) {
                rmin = v[i] < rmin ? v[i] : rmin;
                rmax = v[i] > rmax ? v[i] : rmax;
            }
        }
        if (quant_is_on(act)) fakequant_row(yn, mask ? mask + at : NULL, yn, C, rmin, rmax, act);
        else if (mask) memset(mask + at, 1, (size_t)C);
    }
}

VEC v16 masked_dy(const floatX *dy, const uint8_t *mask, int n) {
    v16 v = v16_loadx(dy, n);
    return mask ? v16_keep(v, mask, n) : v;
}

// One row: y_c = x_c rstd w_c, so with g = dy * w and xhat = x * rstd
//   dx = rstd * (g - xhat * mean(g * xhat)),   dw += dy * xhat.
VEC void rmsnorm_backward_row(floatX *dres, float *dw, const floatX *dy, const uint8_t *mask, const floatX *x,
                              const floatX *weight, float rstd, int C) {
    v16 sum = {0}, scale = v16_set1(rstd);
    int c = 0;
    for (; c < C; c += 16) {
        int n = C - c < 16 ? C - c : 16;
        v16 d = masked_dy(dy + c, mask ? mask + c : NULL, n), xhat = v16_loadx(x + c, n) * scale;
        v16 gx = d * xhat;
        v16_store(dw + c, v16_load(dw + c, n) + gx, n);
        sum = v16_fma(gx, v16_loadx(weight + c, n), sum);
    }
    v16 mean = v16_set1(v16_sum(sum) / (float)C);
    for (c = 0; c < C; c += 16) {
        int n = C - c < 16 ? C - c : 16;
        v16 g = masked_dy(dy + c, mask ? mask + c : NULL, n) * v16_loadx(weight + c, n);
        v16 dx = scale * (g - v16_loadx(x + c, n) * scale * mean);
        v16_storex(dres + c, v16_loadx(dres + c, n) + dx, n);
    }
}

// Gradients of the weight are summed over fixed pieces of the rows, then over the pieces in order: the bits depend on
// N and not on the number of threads.
#define MAX_PIECES 64
#define MIN_PIECE_ROWS 16

void cpu_rmsnorm_backward(floatX *dres, float *dweight, const floatX *dy, const uint8_t *mask, const floatX *x,
                          const floatX *weight, const float *rstd, size_t N, int C) {
    size_t pieces = (N + MIN_PIECE_ROWS - 1) / MIN_PIECE_ROWS;
    if (pieces > MAX_PIECES) pieces = MAX_PIECES;
    size_t rows = pieces ? (N + pieces - 1) / pieces : 0;
    float *part = cpu_workspace(pieces * (size_t)C * sizeof(float));
    if (!part) return;
#pragma omp parallel for schedule(static) if (N * (size_t)C >= CPU_MIN_PARALLEL)
    for (size_t k = 0; k < pieces; k++) {
        float *dw = part + k * (size_t)C;
        memset(dw, 0, (size_t)C * sizeof(float));
        for (size_t n = k * rows; n < (k + 1) * rows && n < N; n++) {
            size_t at = n * (size_t)C;
            rmsnorm_backward_row(dres + at, dw, dy + at, mask ? mask + at : NULL, x + at, weight, rstd[n], C);
        }
    }
    for (size_t k = 0; k < pieces; k++)
        for (int c = 0; c < C; c++) dweight[c] += part[k * (size_t)C + (size_t)c];
}
