// RMSNorm with the residual add before it and the activation fake quantization after it.
#include "cpu.h"

// x, or X(x + delta): what is normalized.
VEC v16 residual_step(const floatX *x, const floatX *delta, int n, bool with_delta) {
    v16 r = v16_loadx(x, n);
    return with_delta ? v16_roundx(r + v16_loadx(delta, n)) : r;
}

// Sum of squares of a row: one chain of fused multiply-adds, since its order is part of the operation.
VEC float residual_row(floatX *res, const floatX *x, const floatX *delta, int C, bool with_delta, bool with_res) {
    v16 sum = {0};
    int c = 0;
    for (; c + 32 <= C; c += 32) {
        prefetch_ahead(x + c);
        if (with_delta) prefetch_ahead(delta + c);
        if (with_res) prefetch_ahead(res + c);
        v16 lo = residual_step(x + c, with_delta ? delta + c : NULL, 16, with_delta);
        v16 hi = residual_step(x + c + 16, with_delta ? delta + c + 16 : NULL, 16, with_delta);
        if (with_res) v32_storex(res + c, lo, hi);
        sum = v16_fma(lo, lo, sum);
        sum = v16_fma(hi, hi, sum);
    }
    for (; c < C; c += 16) {                        // lanes beyond the row load as 0 and add nothing
        int n = C - c < 16 ? C - c : 16;
        v16 r = residual_step(x + c, with_delta ? delta + c : NULL, n, with_delta);
        if (with_res) v16_storex(res + c, r, n);
        sum = v16_fma(r, r, sum);
    }
    return v16_sum(sum);
}

VEC v16 normalize_step(const floatX *r, const floatX *weight, v16 rstd, int n) {
    return v16_loadx(r, n) * rstd * v16_loadx(weight, n);
}

static Range normalize_row(floatX *y, const floatX *r, const floatX *weight, float rstd, int C) {
    v16 scale = v16_set1(rstd);
    Range even = range_empty(), odd = even;
    int c = 0;
    for (; c + 32 <= C; c += 32) {
        prefetch_ahead(y + c);
        v16 lo = normalize_step(r + c, weight + c, scale, 16),
            hi = normalize_step(r + c + 16, weight + c + 16, scale, 16);
        v32_storex(y + c, lo, hi);
        range_add(&even, lo, 16);
        range_add(&odd, hi, 16);
    }
    for (; c < C; c += 16) {
        int n = C - c < 16 ? C - c : 16;
        v16 v = normalize_step(r + c, weight + c, scale, n);
        v16_storex(y + c, v, n);
        range_add(&even, v, n);
    }
    return (Range){v16_min(even.lo, odd.lo), v16_max(even.hi, odd.hi)};
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
        Range range = normalize_row(y + at, r, weight, s, C);
        if (quant_is_on(act)) fakequant_row(y + at, mask ? mask + at : NULL, y + at, C, range, act);
        else if (mask) memset(mask + at, 1, (size_t)C);
    }
}

VEC v16 masked_dy(const floatX *dy, const uint8_t *mask, int n) {
    v16 v = v16_loadx(dy, n);
    return mask ? v16_keep(v, mask, n) : v;
}

// One row: y_c = x_c rstd w_c, so with g = dy * w and xhat = x * rstd
//   dx = rstd * (g - xhat * mean(g * xhat)),   dw += dy * xhat.
VEC v16 backward_sums(float *dw, const floatX *dy, const uint8_t *mask, const floatX *x, const floatX *weight, v16 rstd,
                      v16 sum, int n) {
    v16 gx = masked_dy(dy, mask, n) * (v16_loadx(x, n) * rstd);
    v16_store(dw, v16_load(dw, n) + gx, n);
    return v16_fma(gx, v16_loadx(weight, n), sum);
}

VEC v16 backward_dres(const floatX *dres, const floatX *dy, const uint8_t *mask, const floatX *x, const floatX *weight,
                      v16 rstd, v16 mean, int n) {
    v16 g = masked_dy(dy, mask, n) * v16_loadx(weight, n);
    return v16_loadx(dres, n) + rstd * (g - v16_loadx(x, n) * rstd * mean);
}

VEC void rmsnorm_backward_row(floatX *dres, float *dw, const floatX *dy, const uint8_t *mask, const floatX *x,
                              const floatX *weight, float rstd, int C) {
    v16 even = {0}, odd = {0}, scale = v16_set1(rstd);
    int c = 0;
    for (; c + 32 <= C; c += 32) {
        prefetch_ahead(dy + c);
        prefetch_ahead(x + c);
        prefetch_ahead(dres + c);
        even = backward_sums(dw + c, dy + c, mask ? mask + c : NULL, x + c, weight + c, scale, even, 16);
        odd = backward_sums(dw + c + 16, dy + c + 16, mask ? mask + c + 16 : NULL, x + c + 16, weight + c + 16, scale,
                            odd, 16);
    }
    for (; c < C; c += 16)
        even = backward_sums(dw + c, dy + c, mask ? mask + c : NULL, x + c, weight + c, scale, even,
                             C - c < 16 ? C - c : 16);
    v16 mean = v16_set1(v16_sum(even + odd) / (float)C);
    for (c = 0; c + 32 <= C; c += 32) {
        v16 lo = backward_dres(dres + c, dy + c, mask ? mask + c : NULL, x + c, weight + c, scale, mean, 16);
        int d = c + 16;
        v16 hi = backward_dres(dres + d, dy + d, mask ? mask + d : NULL, x + d, weight + d, scale, mean, 16);
        v32_storex(dres + c, lo, hi);
    }
    for (; c < C; c += 16) {
        int n = C - c < 16 ? C - c : 16;
        v16 v = backward_dres(dres + c, dy + c, mask ? mask + c : NULL, x + c, weight + c, scale, mean, n);
        v16_storex(dres + c, v, n);
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
