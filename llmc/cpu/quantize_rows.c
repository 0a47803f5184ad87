// Sixteen values at a time where a block is a multiple of sixteen columns, or the whole row; one after the other else.
#include "quantize_rows.h"
#include <stdlib.h>
#include "packed.h"

// ---------------------------------------------------------------------------------------------
// Ranges and parameters

static void scalar_range(float *mn, float *mx, const float *x, int64_t n) {
    for (int64_t c = 0; c < n; c++) quant_minmax(mn, mx, x[c]);
}

static void vector_range(float *mn, float *mx, const float *x, int64_t n) {
    Range even = range_empty(), odd = range_empty();     // two, so that one need not wait for the other
    int64_t c = 0;
    for (; c + 32 <= n; c += 32) {
        range_add(&even, v16_load(x + c, 16), 16);
        range_add(&odd, v16_load(x + c + 16, 16), 16);
    }
    if (c + 16 <= n) {
        range_add(&even, v16_load(x + c, 16), 16);
        c += 16;
    }
    float lo = v16_hmin(v16_min(even.lo, odd.lo)), hi = v16_hmax(v16_max(even.hi, odd.hi));
    if (lo < *mn) *mn = lo;
    if (hi > *mx) *mx = hi;
    scalar_range(mn, mx, x + c, n - c);
}

void quantize_ranges(float *mn, float *mx, const RowQuant *k, const float *x, int64_t rows) {
    int64_t b1 = k->block[1], across = k->cols / b1;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t b = 0; b < across; b++, x += b1) (b1 < 16 ? scalar_range : vector_range)(&mn[b], &mx[b], x, b1);
}

void quantize_params(QParams *qp, const RowQuant *k, const float *mn, const float *mx, int64_t n) {
    const QuantSpec *s = k->spec;
    for (int64_t i = 0; i < n; i += 16) {
        int part = n - i < 16 ? (int)(n - i) : 16;
        v16 lo = v16_load(mn + i, part), hi = v16_load(mx + i, part);
        if (k->rounds) lo = v16_bf16_round(lo), hi = v16_bf16_round(hi);     // rounding keeps order
        if (s->mapping == QM_ROWS) {
            for (int j = 0; j < part; j++) qp[i + j] = quant_choose(lo[j], hi[j], s, QD_BF16);
            continue;
        }
        V16QParams p = v16_choose(lo, hi, s, QD_BF16);
        for (int j = 0; j < part; j++) qp[i + j] = (QParams){p.scale[j], p.zp[j]};
    }
}

// ---------------------------------------------------------------------------------------------
// Codes and errors

// Sixteen sums in double side by side: lane i of a vector of values goes to sum i.
typedef double v8d __attribute__((vector_size(64)));
typedef struct { v8d signal[2], noise[2], worst[2]; v16 amax; } Errors;

#ifdef QLLM_AVX512
VEC v8d v16_half(v16 v, int half) {
    return (v8d)_mm512_cvtps_pd(half ? _mm512_extractf32x8_ps((__m512)v, 1) : _mm512_castps512_ps256((__m512)v));
}
VEC v8d v8d_amax(v8d a, v8d b) { return (v8d)_mm512_max_pd((__m512d)a, _mm512_abs_pd((__m512d)b)); }
#else
VEC v8d v16_half(v16 v, int half) {
    v8d d;
    for (int i = 0; i < 8; i++) d[i] = (double)v[8 * half + i];
    return d;
}
VEC v8d v8d_amax(v8d a, v8d b) {
    for (int i = 0; i < 8; i++) a[i] = fabs(b[i]) > a[i] ? fabs(b[i]) : a[i];
    return a;
}
#endif

VEC void errors_add(Errors *e, v16 x, v16 value, int n) {
    if (n < 16)
        for (int i = n; i < 16; i++) x[i] = value[i] = 0.0f;
    for (int half = 0; half < 2; half++) {
        v8d v = v16_half(x, half), d = v - v16_half(value, half);
        e->signal[half] = e->signal[half] + v * v;
        e->noise[half] = e->noise[half] + d * d;
        e->worst[half] = v8d_amax(e->worst[half], d);
    }
    e->amax = v16_max(v16_abs(x), e->amax);
}

static RowErrors errors_fold(const Errors *e) {
    RowErrors row = {0};
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 8; i++) {
            row.signal += e->signal[half][i];
            row.noise += e->noise[half][i];
            if (e->worst[half][i] > row.worst) row.worst = e->worst[half][i];
        }
    row.amax = (double)v16_hmax(e->amax);
    return row;
}

// What does not change within a tensor.
typedef struct {
    Pack pack;
    float mid;
    bool rounds, values_round;           // values_round: working values are bf16
} Encoder;

// n values of one block, from a multiple of 16 columns on.
VEC void encode_span(uint8_t *packed, Errors *e, const float *x, int64_t n, const BlockQuant *b, const Encoder *k,
                     int bits, bool zero_is_float) {
    for (int64_t c = 0; c < n; c += 16, packed += 2 * bits) {
        int part = n - c < 16 ? (int)(n - c) : 16;
        v16 v = v16_load(x + c, part), w = k->rounds ? v16_bf16_round(v) : v;
        v16 q = v16_nan_to(v16_clamp_code(v16_unclamped(w, b, zero_is_float, QD_BF16), b), b->nan);
        pack16(packed, zero_is_float ? q : q + b->zp, part, bits, &k->pack);
        v16 value = v16_dequant(q, b, zero_is_float, k->mid);
        errors_add(e, v, k->values_round ? v16_bf16_round(value) : value, part);
    }
}

static BlockLanes lanes_of(const QParams *qp, int n, const QuantSpec *s) {
    V16QParams p = {v16_set1(1.0f), v16_set1(0.0f)};
    for (int i = 0; i < n; i++) p.scale[i] = qp[i].scale, p.zp[i] = qp[i].zp;
    BlockQuant b = block_quant(p, s, QD_BF16);
    if (s->mapping == QM_ROWS)
        for (int i = 0; i < 16; i++) b.inv[i] = int8_row_inv(p.scale[i]);
    return block_lanes(b);
}

static RowErrors vector_row(uint8_t *packed, const RowQuant *k, const float *x, const QParams *qp) {
    const QuantSpec *s = k->spec;
    const Encoder enc = {pack_init(s->bits), quant_mid(s), k->rounds, !quant_works_as_codes(s)};
    int64_t b1 = k->block[1], across = k->cols / b1;
    Errors e = {.amax = v16_set1(0.0f)};
    for (int64_t first = 0; first < across; first += 16) {
        int blocks = across - first < 16 ? (int)(across - first) : 16;
        BlockLanes lanes = lanes_of(qp + first, blocks, s);
        for (int i = 0; i < blocks; i++) {
            BlockQuant b = block_lane(&lanes, i);
            int64_t c = (first + i) * b1;
            uint8_t *to = packed + (size_t)c * (size_t)s->bits / 8;
            if (s->zero == QZ_FLOAT && s->bits == 4) encode_span(to, &e, x + c, b1, &b, &enc, 4, true);
            else if (s->zero == QZ_FLOAT) encode_span(to, &e, x + c, b1, &b, &enc, s->bits, true);
            else if (s->bits == 4) encode_span(to, &e, x + c, b1, &b, &enc, 4, false);
            else if (s->bits == 8) encode_span(to, &e, x + c, b1, &b, &enc, 8, false);
            else encode_span(to, &e, x + c, b1, &b, &enc, s->bits, false);
        }
    }
    return errors_fold(&e);
}

static RowErrors scalar_row(uint8_t *packed, const RowQuant *k, const float *x, const QParams *qp) {
    const QuantSpec *s = k->spec;
    QuantDType d = quant_works_as_codes(s) ? QD_F32 : QD_BF16;
    int16_t *codes = xmalloc((size_t)k->cols * sizeof *codes);
    RowErrors e = {0};
    for (int64_t c = 0; c < k->cols; c++) {
        QParams p = qp[c / k->block[1]];
        int code = quant_code(k->rounds ? bf16_round(x[c]) : x[c], p, s, QD_BF16);
        double v = (double)x[c], error = fabs(v - (double)quant_dequant((float)code, p, s, d));
        codes[c] = (int16_t)code;
        e.signal += v * v;
        e.noise += error * error;
        if (error > e.worst) e.worst = error;
        if (fabs(v) > e.amax) e.amax = fabs(v);
    }
    quant_pack_row(packed, codes, k->cols, s->bits);
    free(codes);
    return e;
}

void quantize_row(uint8_t *packed, RowErrors *e, const RowQuant *k, const float *x, const QParams *qp) {
    bool vectors = k->block[1] % 16 == 0 || k->block[1] == k->cols;
    *e = (vectors ? vector_row : scalar_row)(packed, k, x, qp);
}
