// Codes against inputs as they are: sums in f32.
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

size_t served_w_bytes(const QuantSpec *wq, int OC, int C) {
    Layout l;
    return layout(&l, wq, OC, C) ? l.bytes : 0;
}

void served_w_pack(void *served, const uint8_t *codes, const float *scale, const float *zero, const QuantSpec *wq,
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

void served_w_forward(floatX *y, float *y32, const floatX *x, const void *served, const QuantSpec *wq, size_t N, int C,
                      int OC) {
    Layout l;
    if (!layout(&l, wq, OC, C)) return;
    const char *base = served;
    const float *scale = (const float *)(const void *)(base + l.scale);
    const float *zero = l.bytes > l.zero ? (const float *)(const void *)(base + l.zero) : NULL;
    if (y && N <= 8) {
        cpu_qmatvec_forward(y, x, served, scale, zero, wq, N, C, OC);
        return;
    }
    size_t size = (size_t)OC * (size_t)C * sizeof(floatX);
    char *scratch = cpu_workspace_outer(size + (size_t)OC * sizeof(float));
    if (!scratch) return;
    floatX *work = (floatX *)(void *)scratch;
    float *wscale = (float *)(void *)(scratch + size);
    cpu_dequant_rows(work, wscale, served, scale, zero, wq, OC, C);
    if (y) cpu_linear_forward(y, x, work, wscale, N, C, OC);
    else cpu_linear_forward_f32(y32, x, work, wscale, N, C, OC);
}
