// What adamw.c and adamw_low.c share: the update of some values, and working values made from them.
#ifndef QLLM_CPU_UPDATE_H
#define QLLM_CPU_UPDATE_H
#include "cpu.h"

typedef enum { UPDATE_NONE, UPDATE_ADAMW, UPDATE_SGD } UpdateKind;

// One tensor and the constants of one step.
typedef struct {
    float *master, *m, *v;          // v unused by SGD, whose m is the momentum buffer
    const float *grad;
    float grad_scale, lr;
    float decay;                    // AdamW: lr * wd, SGD: wd
    float c1, c2;                   // AdamW: 1 - beta1, 1 - beta2; SGD: c1 = momentum
    float bc1, sqrt_bc2, eps;
} Update;

// The constants of an AdamW step; its tensors are the caller's.
static inline Update adamw_update(const StepState *state, const AdamWParams *h) {
    return (Update){.grad_scale = state->grad_scale, .lr = state->lr, .decay = state->lr * (float)h->weight_decay,
                    .eps = (float)h->eps, .c1 = (float)(1.0 - h->beta1), .c2 = (float)(1.0 - h->beta2),
                    .bc1 = 1.0f - pow_int_f32((float)h->beta1, state->t),
                    .sqrt_bc2 = sqrtf(1.0f - pow_int_f32((float)h->beta2, state->t))};
}

// AdamW on sixteen parameters p with gradients g (times grad_scale) and moments m and v; adamw_fq in ops.h.
VEC v16 adamw16(const Update *u, v16 p, v16 g, v16 *m, v16 *v) {
    p = p - v16_set1(u->decay) * p;
    *m = *m + v16_set1(u->c1) * (g - *m);
    *v = *v + v16_set1(u->c2) * (g * g - *v);
    v16 den = v16_sqrt(*v) / v16_set1(u->sqrt_bc2) + v16_set1(u->eps);
    return p - v16_set1(u->lr) * (*m / v16_set1(u->bc1)) / den;
}

// Updates n <= 16 masters at `at` and returns them. Kind is a constant where this is inlined.
VEC v16 update_step(const Update *u, UpdateKind kind, size_t at, int n) {
    prefetch_ahead(u->master + at);
    v16 p = v16_load(u->master + at, n);
    if (kind == UPDATE_NONE) return p;
    v16 g = v16_load(u->grad + at, n) * v16_set1(u->grad_scale);
    prefetch_ahead(u->grad + at);
    prefetch_ahead(u->m + at);
    v16 m = v16_load(u->m + at, n);
    if (kind == UPDATE_ADAMW) {
        prefetch_ahead(u->v + at);
        v16 v = v16_load(u->v + at, n);
        p = adamw16(u, p, g, &m, &v);
        v16_store(u->v + at, v, n);
    } else {
        m = v16_set1(u->c1) * m + (g + v16_set1(u->decay) * p);
        p = p - v16_set1(u->lr) * m;
    }
    v16_store(u->m + at, m, n);
    v16_store(u->master + at, p, n);
    return p;
}

// Updates cols values in a row, adding them to the range. Its ends are rounded to bf16 when it is complete: rounding
// keeps order, so that is the range of the rounded values.
VEC void update_span(const Update *u, UpdateKind kind, size_t at, int64_t cols, Range *r) {
    int64_t c = 0;
    for (; c + 16 <= cols; c += 16) range_add(r, update_step(u, kind, at + (size_t)c, 16), 16);
    if (c < cols) {
        int n = (int)(cols - c);
        range_add(r, update_step(u, kind, at + (size_t)c, n), n);
    }
}

// What the working values of one tensor are made by; constants where it is inlined.
typedef struct {
    bool zero_is_float, codes;
    float mid;
} Working;

VEC v16 quantize_step(const float *master, int n, const BlockQuant *b, Working w) {
    v16 u = v16_unclamped(v16_bf16_round(v16_load(master, n)), b, w.zero_is_float, QD_BF16);
    v16 q = v16_nan_to(v16_clamp_code(u, b), b->nan);
    if (w.codes) return w.zero_is_float ? q : q + b->zp;    // works as codes: zero point 0, and -0 turns into 0
    return v16_dequant(q, b, w.zero_is_float, w.mid);
}

// Working values of cols values in a row that share one scale. In the fp32 build they are rounded to bf16 all the same.
VEC void quantize_loop(floatX *work, const float *master, int64_t cols, const BlockQuant *b, Working w) {
    int64_t c = 0;
    for (; c + 32 <= cols; c += 32) {
        prefetch_ahead(work + c);
        v16 lo = quantize_step(master + c, 16, b, w), hi = quantize_step(master + c + 16, 16, b, w);
        v32_storex(work + c, v16_work(lo), v16_work(hi));
    }
    for (; c < cols; c += 16) {
        int n = cols - c < 16 ? (int)(cols - c) : 16;
        v16_storex(work + c, v16_work(quantize_step(master + c, n, b, w)), n);
    }
}

VEC void quantize_span(floatX *work, const float *master, int64_t cols, const BlockQuant *b, const QuantSpec *s,
                       bool codes) {
    if (s->zero == QZ_FLOAT) quantize_loop(work, master, cols, b, (Working){true, false, quant_mid(s)});
    else if (codes) quantize_loop(work, master, cols, b, (Working){false, true, 0.0f});
    else quantize_loop(work, master, cols, b, (Working){false, false, 0.0f});
}

// Updates up to sixteen blocks of b0 rows by b1 columns, the first at row r0 and column c0, for their
// parameters. Sixteen at a time, since choosing a scale takes two divisions one after the other.
VEC void update_sixteen(BlockLanes *lanes, const Update *u, UpdateKind kind, const QuantSpec *s, int64_t r0, int64_t c0,
                              int64_t cols, int64_t b0, int64_t b1, int blocks) {
    float lo[16] = {0}, hi[16] = {0};
    for (int k = 0; k < blocks; k++) {
        Range range = range_empty();
        for (int64_t r = r0; r < r0 + b0; r++) update_span(u, kind, (size_t)(r * cols + c0 + k * b1), b1, &range);
        lo[k] = v16_hmin(range.lo);
        hi[k] = v16_hmax(range.hi);
    }
    v16 mn = v16_bf16_round(v16_load(lo, 16)), mx = v16_bf16_round(v16_load(hi, 16));
    *lanes = block_lanes(block_quant(v16_choose(mn, mx, s, QD_BF16), s, QD_BF16));
}

// A strip of b0 rows, from r0 on, of blocks of b0 rows by b1 columns: updated, and quantized while it is in cache.
VEC void update_strip(const Update *u, UpdateKind kind, floatX *work, float *wscale, const QuantSpec *s, int64_t r0,
                      int64_t cols, int64_t b0, int64_t b1, bool codes) {
    for (int64_t c0 = 0; c0 < cols; c0 += 16 * b1) {
        int blocks = cols - c0 < 16 * b1 ? (int)((cols - c0) / b1) : 16;
        BlockLanes all;
        update_sixteen(&all, u, kind, s, r0, c0, cols, b0, b1, blocks);
        for (int64_t r = r0; r < r0 + b0; r++) {
            for (int k = 0; k < blocks; k++) {
                int64_t at = r * cols + c0 + k * b1;
                BlockQuant b = block_lane(&all, k);
                quantize_span(work + at, u->master + at, b1, &b, s, codes);
            }
            if (wscale && c0 == 0) wscale[r] = codes ? all.scale[0] : 1.0f;
        }
    }
}
#endif
