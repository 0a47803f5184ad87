// Served forms (ops.h): which of the two kinds a linear has.
#include "served.h"

static bool quantizes(const QuantSpec *act) { return act && act->bits; }

size_t cpu_served_bytes(const QuantSpec *wq, const QuantSpec *act, int OC, int C) {
    if (!quantizes(act)) return served_w_bytes(wq, OC, C);
    return wq->zero == QZ_FLOAT || act->zero == QZ_FLOAT ? 0 : served_i_bytes(wq, OC, C);
}

void cpu_served_pack(void *served, const uint8_t *codes, const float *scale, const float *zero, const QuantSpec *wq,
                     const QuantSpec *act, int64_t row0, int64_t rows, int OC, int C) {
    if (quantizes(act)) served_i_pack(served, codes, scale, zero, wq, row0, rows, OC, C);
    else served_w_pack(served, codes, scale, zero, wq, row0, rows, OC, C);
}

static void forward(floatX *y, float *y32, const floatX *x, const void *served, const QuantSpec *wq,
                    const QuantSpec *act, size_t N, int C, int OC) {
    if (quantizes(act)) served_i_forward(y, y32, x, served, wq, act, N, C, OC);
    else served_w_forward(y, y32, x, served, wq, N, C, OC);
}

void cpu_served_forward(floatX *y, const floatX *x, const void *served, const QuantSpec *wq, const QuantSpec *act,
                        size_t N, int C, int OC) {
    forward(y, NULL, x, served, wq, act, N, C, OC);
}

void cpu_served_forward_f32(float *y, const floatX *x, const void *served, const QuantSpec *wq, const QuantSpec *act,
                            size_t N, int C, int OC) {
    forward(NULL, y, x, served, wq, act, N, C, OC);
}
