// Inside the CPU wing: the two kinds of served forms (ops.h). Codes alone (served_w), against inputs as they are; and
// codes against quantized inputs (served_i), in integers.
#ifndef QLLM_CPU_SERVED_H
#define QLLM_CPU_SERVED_H
#include "cpu.h"

size_t served_w_bytes(const QuantSpec *wq, int OC, int C);
void served_w_pack(void *served, const uint8_t *codes, const float *scale, const float *zero, const QuantSpec *wq,
                   int64_t row0, int64_t rows, int OC, int C);
// One of y and y32 is NULL.
void served_w_forward(floatX *y, float *y32, const floatX *x, const void *served, const QuantSpec *wq, size_t N, int C,
                      int OC);

// qmatvec_forward with either result: one of y and y32 is NULL (qmatmul.c).
void cpu_qmatvec(floatX *y, float *y32, const floatX *x, const uint8_t *codes, const float *scale, const float *zero,
                 const QuantSpec *wq, size_t N, int C, int OC);

// act has bits and an integer zero point, so has wq.
size_t served_i_bytes(const QuantSpec *wq, int OC, int C);
void served_i_pack(void *served, const uint8_t *codes, const float *scale, const float *zero, const QuantSpec *wq,
                   int64_t row0, int64_t rows, int OC, int C);
void served_i_forward(floatX *y, float *y32, const floatX *x, const void *served, const QuantSpec *wq,
                      const QuantSpec *act, size_t N, int C, int OC);
#endif
