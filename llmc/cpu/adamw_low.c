#include "cpu/cpu.h"
void cpu_adamw_low(StoredParam p, StoredState m, StoredState v, floatX *work, float *wscale, const float *grad,
                   const StepState *state, const AdamWParams *h, const QuantSpec *wq, Rounding rounding, int tensor,
                   int64_t row0, int64_t rows, int64_t cols) {
    (void)p, (void)m, (void)v, (void)work, (void)wscale, (void)grad, (void)state, (void)h, (void)wq, (void)rounding;
    (void)tensor, (void)row0, (void)rows, (void)cols;
}
void cpu_int8_rows(int8_t *codes, float *scale, StoredParam from, int64_t rows, int64_t cols) {
    (void)codes, (void)scale, (void)from, (void)rows, (void)cols;
}
void cpu_widen(float *out, const bf16 *in, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = bf16_to_f32(in[i]);
}
