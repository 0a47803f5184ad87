// Updates of the master weights, and the working values made from them in the same pass.
#include "packed.h"
#include "update.h"

// Values that a thread takes at a time where rows do not matter.
#define CHUNK 8192

// No quantization, or (work NULL) no working values: a flat pass.
VEC void update_plain(const Update *u, UpdateKind kind, floatX *work, float *wscale, int64_t rows, int64_t cols) {
    size_t total = (size_t)rows * (size_t)cols, chunks = (total + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) if (total >= CPU_MIN_PARALLEL)
    for (size_t k = 0; k < chunks; k++) {
        size_t i = k * CHUNK, end = i + CHUNK < total ? i + CHUNK : total;
        for (; i + 32 <= end; i += 32) {
            v16 lo = update_step(u, kind, i, 16), hi = update_step(u, kind, i + 16, 16);
            if (!work) continue;
            prefetch_ahead(work + i);
            v32_storex(work + i, lo, hi);
        }
        for (; i < end; i += 16) {
            int n = end - i < 16 ? (int)(end - i) : 16;
            v16 p = update_step(u, kind, i, n);
            if (work) v16_storex(work + i, p, n);
        }
    }
    if (work && wscale)
        for (int64_t r = 0; r < rows; r++) wscale[r] = 1.0f;
}

// Updates a tensor that has one scale, for its parameters.
VEC V16QParams update_whole(const Update *u, UpdateKind kind, const QuantSpec *s, int64_t rows, int64_t cols) {
    float lo = INFINITY, hi = -INFINITY;
#pragma omp parallel for schedule(static) reduction(min : lo) reduction(max : hi) if (rows * cols >= CPU_MIN_PARALLEL)
    for (int64_t r = 0; r < rows; r++) {
        Range range = range_empty();
        update_span(u, kind, (size_t)(r * cols), cols, &range);
        float rl = v16_hmin(range.lo), rh = v16_hmax(range.hi);
        lo = rl < lo ? rl : lo;
        hi = rh > hi ? rh : hi;
    }
    return v16_choose(v16_bf16_round(v16_set1(lo)), v16_bf16_round(v16_set1(hi)), s, QD_BF16);
}

// One scale for the whole tensor: it is known only when everything has been updated, so two passes.
VEC void update_tensor(const Update *u, UpdateKind kind, floatX *work, const QuantSpec *s, int64_t rows, int64_t cols) {
    BlockQuant b = block_quant(update_whole(u, kind, s, rows, cols), s, QD_BF16);
#pragma omp parallel for schedule(static) if (rows * cols >= CPU_MIN_PARALLEL)
    for (int64_t r = 0; r < rows; r++) quantize_span(work + r * cols, u->master + r * cols, cols, &b, s, false);
}

// Blocks of b0 rows by b1 columns, strip by strip.
VEC void update_blocks(const Update *u, UpdateKind kind, floatX *work, float *wscale, const QuantSpec *s, int64_t rows,
                       int64_t cols, int64_t b0, int64_t b1) {
    bool codes = quant_works_as_codes(s);
#pragma omp parallel for schedule(static) if (rows * cols >= CPU_MIN_PARALLEL)
    for (int64_t r0 = 0; r0 < rows; r0 += b0) update_strip(u, kind, work, wscale, s, r0, cols, b0, b1, codes);
}

VEC void update_and_quantize(const Update *u, UpdateKind kind, floatX *work, float *wscale, const QuantSpec *s,
                             int64_t rows, int64_t cols) {
    if (rows == 0) return;
    if (!work || !quant_is_on(s)) {
        update_plain(u, kind, work, wscale, rows, cols);
        return;
    }
    int64_t block[2];
    Err err;
    if (quant_block_shape(s, rows, cols, block, &err) < 0) {
        ops_set_error(err.code, "%s", err.text);
        return;
    }
    if (block[0] == rows && block[1] == cols && rows > 1) {
        update_tensor(u, kind, work, s, rows, cols);
        for (int64_t r = 0; wscale && r < rows; r++) wscale[r] = 1.0f;
    } else {
        update_blocks(u, kind, work, wscale, s, rows, cols, block[0], block[1]);
    }
}

void cpu_adamw_fq(float *master, float *m, float *v, floatX *work, float *wscale, const float *grad,
                  const StepState *state, const AdamWParams *h, const QuantSpec *wq, int64_t rows, int64_t cols) {
    if (state->skip) return;
    Update u = adamw_update(state, h);
    u.master = master, u.m = m, u.v = v, u.grad = grad;
    update_and_quantize(&u, UPDATE_ADAMW, work, wscale, wq, rows, cols);
}

void cpu_sgd_fq(float *master, float *buf, floatX *work, float *wscale, const float *grad, const StepState *state,
                float momentum, float weight_decay, const QuantSpec *wq, int64_t rows, int64_t cols) {
    if (state->skip) return;
    Update u = {.master = master, .m = buf, .grad = grad, .grad_scale = state->grad_scale, .lr = state->lr,
                .decay = weight_decay, .c1 = momentum};
    update_and_quantize(&u, UPDATE_SGD, work, wscale, wq, rows, cols);
}

void cpu_weight_fq(floatX *work, float *wscale, const float *master, const QuantSpec *wq, int64_t rows, int64_t cols) {
    Update u = {.master = (float *)(uintptr_t)master};   // UPDATE_NONE reads only
    update_and_quantize(&u, UPDATE_NONE, work, wscale, wq, rows, cols);
}

VEC void ste_mask_step(float *grad, const float *master, int n, const BlockQuant *b, bool zero_is_float) {
    v16 u = v16_unclamped(v16_bf16_round(v16_load(master, n)), b, zero_is_float, QD_BF16);
    v16_store(grad, v16_keep_inside(v16_load(grad, n), u, b->lo, b->hi), n);
}

static void ste_mask_span(float *grad, const float *master, int64_t cols, const BlockQuant *b, bool zero_is_float) {
    for (int64_t c = 0; c < cols; c += 16)
        ste_mask_step(grad + c, master + c, cols - c < 16 ? (int)(cols - c) : 16, b, zero_is_float);
}

void cpu_weight_ste_mask(float *grad, const float *master, const QuantSpec *wq, int64_t rows, int64_t cols) {
    if (!quant_is_on(wq)) return;
    int64_t block[2];
    Err err;
    if (quant_block_shape(wq, rows, cols, block, &err) < 0) {
        ops_set_error(err.code, "%s", err.text);
        return;
    }
    Update u = {.master = (float *)(uintptr_t)master};
    int64_t b0 = block[0], b1 = block[1];
#pragma omp parallel for schedule(static) if (rows * cols >= CPU_MIN_PARALLEL)
    for (int64_t r0 = 0; r0 < rows; r0 += b0) {
        for (int64_t c0 = 0; c0 < cols; c0 += 16 * b1) {
            int blocks = cols - c0 < 16 * b1 ? (int)((cols - c0) / b1) : 16;
            BlockLanes all;
            update_sixteen(&all, &u, UPDATE_NONE, wq, r0, c0, cols, b0, b1, blocks);
            for (int64_t r = r0; r < r0 + b0; r++)
                for (int k = 0; k < blocks; k++) {
                    int64_t at = r * cols + c0 + k * b1;
                    BlockQuant b = block_lane(&all, k);
                    ste_mask_span(grad + at, master + at, b1, &b, wq->zero == QZ_FLOAT);
                }
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Codes for other ranks.

// Where codes and parameters of one tensor go.
typedef struct {
    uint8_t *codes, *int_zero;
    bf16 *scale, *float_zero;   // zero points: one of the two, or neither
    size_t row_bytes;
    Pack pack;
    bool zero_is_float;
} Wire;

static void wire_params(const Wire *w, int64_t at, v16 scale, v16 zp, int n) {
    v16_store_bf16(w->scale + at, scale, n);
    if (w->float_zero) v16_store_bf16(w->float_zero + at, zp, n);
    if (w->int_zero)
        for (int i = 0; i < n; i++) w->int_zero[at + i] = (uint8_t)(int)zp[i];
}

VEC void pack_loop(uint8_t *codes, const float *master, int64_t cols, const BlockQuant *b, const Pack *pack, int bits,
                   bool zero_is_float) {
    const Working as_codes = {zero_is_float, true, 0.0f};
    int64_t c = 0;
    for (; c + 16 <= cols; c += 16, codes += 2 * bits)
        pack16(codes, quantize_step(master + c, 16, b, as_codes), 16, bits, pack);
    if (c < cols) {
        int n = (int)(cols - c);
        pack16(codes, quantize_step(master + c, n, b, as_codes), n, bits, pack);
    }
}

// Codes of cols values in a row that share one scale.
VEC void pack_span(uint8_t *codes, const float *master, int64_t cols, const BlockQuant *b, const Wire *w) {
    const Pack *p = &w->pack;
    if (p->bits == 4 && w->zero_is_float) pack_loop(codes, master, cols, b, p, 4, true);
    else if (p->bits == 4) pack_loop(codes, master, cols, b, p, 4, false);
    else if (p->bits == 8) pack_loop(codes, master, cols, b, p, 8, w->zero_is_float);
    else pack_loop(codes, master, cols, b, p, p->bits, w->zero_is_float);
}

// Codes of cols values in a row that lie in up to sixteen blocks of b1 values, which end anywhere: every lane picks its
// own block's parameters.
VEC void pack_odd(uint8_t *codes, const float *master, int64_t cols, int b1, const BlockLanes *all, const Wire *w,
                  bool zero_is_float) {
    const Pack pack = w->pack;
    v16i block, within;
    for (int i = 0; i < 16; i++) block[i] = i / b1, within[i] = i % b1;
    for (int64_t c = 0; c < cols; c += 16, codes += 2 * pack.bits) {
        int n = cols - c < 16 ? (int)(cols - c) : 16;
        BlockQuant b = {v16_pick(all->scale, block), v16_pick(all->inv, block), v16_pick(all->lo, block),
                        v16_pick(all->hi, block), v16_pick(all->nan, block), v16_pick(all->zp, block),
                        v16_pick(all->m, block)};
        v16 q = quantize_step(master + c, n, &b, (Working){zero_is_float, true, 0.0f});
        pack16(codes, q, n, pack.bits, &pack);
        within += 16 % b1;
        v16i next = within >= b1;       // -1 where it is
        within += next & -b1;
        block += 16 / b1 - next;
    }
}

static void pack_tensor(const Wire *w, const Update *u, const QuantSpec *s, int64_t rows, int64_t cols) {
    V16QParams p = update_whole(u, UPDATE_NONE, s, rows, cols);
    BlockQuant b = block_quant(p, s, QD_BF16);
    wire_params(w, 0, p.scale, p.zp, 1);
#pragma omp parallel for schedule(static) if (rows * cols >= CPU_MIN_PARALLEL)
    for (int64_t r = 0; r < rows; r++)
        pack_span(w->codes + (size_t)r * w->row_bytes, u->master + r * cols, cols, &b, w);
}

static void pack_blocks(const Wire *w, const Update *u, const QuantSpec *s, int64_t rows, int64_t cols, int64_t b0,
                        int64_t b1) {
    const bool odd = b1 % 16 && b1 < cols;
#pragma omp parallel for schedule(static) if (rows * cols >= CPU_MIN_PARALLEL)
    for (int64_t r0 = 0; r0 < rows; r0 += b0) {
        for (int64_t c0 = 0; c0 < cols; c0 += 16 * b1) {
            int blocks = cols - c0 < 16 * b1 ? (int)((cols - c0) / b1) : 16;
            BlockLanes all;
            update_sixteen(&all, u, UPDATE_NONE, s, r0, c0, cols, b0, b1, blocks);
            wire_params(w, r0 / b0 * (cols / b1) + c0 / b1, v16_load(all.scale, 16), v16_load(all.zp, 16), blocks);
            for (int64_t r = r0; r < r0 + b0; r++) {
                const float *master = u->master + r * cols + c0;
                uint8_t *codes = w->codes + (size_t)r * w->row_bytes + (size_t)c0 * (size_t)s->bits / 8;
                if (odd && w->zero_is_float) pack_odd(codes, master, blocks * b1, (int)b1, &all, w, true);
                else if (odd) pack_odd(codes, master, blocks * b1, (int)b1, &all, w, false);
                for (int k = 0; k < blocks && !odd; k++) {
                    BlockQuant b = block_lane(&all, k);
                    pack_span(codes + (size_t)(k * b1) * (size_t)s->bits / 8, master + k * b1, b1, &b, w);
                }
            }
        }
    }
}

void cpu_weight_pack(uint8_t *wire, const float *master, const QuantSpec *wq, int64_t rows, int64_t cols, int64_t kn) {
    int64_t block[2];
    Err err;
    if (rows == 0) return;
    if (quant_block_shape(wq, rows, cols, block, &err) < 0) {
        ops_set_error(err.code, "%s", err.text);
        return;
    }
    QuantWire at = quant_wire_layout(wq, kn, cols, block);
    Wire w = {.codes = wire + at.codes, .scale = (bf16 *)(void *)(wire + at.scale),
              .row_bytes = quant_row_bytes(wq->bits, cols), .pack = pack_init(wq->bits),
              .zero_is_float = wq->zero == QZ_FLOAT};
    if (w.zero_is_float) w.float_zero = (bf16 *)(void *)(wire + at.zero);
    else if (quant_has_zero(wq)) w.int_zero = wire + at.zero;
    Update u = {.master = (float *)(uintptr_t)master};
    if (block[0] == rows && block[1] == cols && rows > 1) pack_tensor(&w, &u, wq, rows, cols);
    else pack_blocks(&w, &u, wq, rows, cols, block[0], block[1]);
}
