// Codes against inputs that are quantized by row: integer products.
#include "packed.h"
#include "served.h"

typedef struct { size_t codes, scale, zero, bytes; } Layout;

static bool layout(Layout *l, const QuantSpec *wq, int OC, int C) {
    int64_t block[2];
    Err err;
    if (quant_block_shape(wq, OC, C, block, &err) < 0 || block[0] != 1) return false;
    size_t scales = (size_t)OC * (size_t)(C / block[1]) * sizeof(float);
    l->codes = 0;
    l->scale = ((size_t)OC * quant_row_bytes(wq->bits, C) + 63) & ~(size_t)63;
    l->zero = l->scale + scales;
    l->bytes = l->zero + (quant_has_zero(wq) ? scales : 0);
    return true;
}

size_t served_i_bytes(const QuantSpec *wq, int OC, int C) {
    Layout l;
    return layout(&l, wq, OC, C) ? l.bytes : 0;
}

void served_i_pack(void *served, const uint8_t *codes, const float *scale, const float *zero, const QuantSpec *wq,
                   int64_t row0, int64_t rows, int OC, int C) {
    Layout l;
    if (!layout(&l, wq, OC, C)) return;
    char *base = served;
    size_t row_bytes = quant_row_bytes(wq->bits, C), across = (l.zero - l.scale) / sizeof(float) / (size_t)OC;
    memcpy(base + (size_t)row0 * row_bytes, codes, (size_t)rows * row_bytes);
    size_t at = (size_t)row0 * across * sizeof(float), bytes = (size_t)rows * across * sizeof(float);
    memcpy(base + l.scale + at, scale, bytes);
    if (zero && quant_has_zero(wq)) memcpy(base + l.zero + at, zero, bytes);
}

// The definition, value by value.
static void integer_reference(floatX *y, float *y32, const floatX *x, const uint8_t *codes, const float *scale,
                              const float *zero, const QuantSpec *wq, const QuantSpec *act, size_t N, int C, int OC) {
    Packed pk = {0};
    if (packed_init(&pk, wq, OC, C) < 0) return;
    int16_t *qx = cpu_workspace((size_t)C * 2 * sizeof(int16_t));
    if (!qx) return;
    int16_t *qw = qx + C;
    QuantDType d = sizeof(floatX) == 2 ? QD_BF16 : QD_F32;
    for (size_t n = 0; n < N; n++) {
        float mn = INFINITY, mx = -INFINITY;
        for (int c = 0; c < C; c++) quant_minmax(&mn, &mx, x2f(x[n * (size_t)C + (size_t)c]));
        QParams p = quant_choose(mn, mx, act, d);
        for (int c = 0; c < C; c++) qx[c] = (int16_t)(quant_code(x2f(x[n * (size_t)C + (size_t)c]), p, act, d) - (int)p.zp);
        for (int r = 0; r < OC; r++) {
            quant_unpack_row(qw, codes + (size_t)r * pk.row_bytes, C, wq);
            float t = 0.0f, sum = 0.0f;
            for (int64_t g = 0; g < pk.across; g++) {
                int64_t at = (int64_t)r * pk.across + g;
                int zw = zero ? (int)zero[at] : (int)quant_mid(wq);
                sum = 0.0f;
                for (int64_t c0 = 0; c0 < pk.b1; c0 += 1 << 16) {
                    int32_t acc = 0;
                    for (int64_t c = c0; c < pk.b1 && c < c0 + (1 << 16); c++)
                        acc += qx[g * pk.b1 + c] * (qw[g * pk.b1 + c] - zw);
                    sum += (float)acc;
                }
                t = fmaf(sum, scale[at], t);
            }
            float v = pk.across == 1 ? sum * p.scale * scale[r] : t * p.scale;
            if (y) y[n * (size_t)OC + (size_t)r] = f2x(v);
            else y32[n * (size_t)OC + (size_t)r] = v;
        }
    }
}

void served_i_forward(floatX *y, float *y32, const floatX *x, const void *served, const QuantSpec *wq,
                      const QuantSpec *act, size_t N, int C, int OC) {
    Layout l;
    if (!layout(&l, wq, OC, C)) return;
    const char *base = served;
    const float *scale = (const float *)(const void *)(base + l.scale);
    const float *zero = l.bytes > l.zero ? (const float *)(const void *)(base + l.zero) : NULL;
    integer_reference(y, y32, x, served, scale, zero, wq, act, N, C, OC);
}
