// Rows of weights to packed codes, and how far these are from the values: what the writers of model.bin do on the host,
// whatever the device. Ranges, scales and codes have the bits of quant.h. Errors are summed in an order that depends
// neither on threads nor on the processor. Several threads may work on one tensor.
#ifndef QLLM_CPU_QUANTIZE_ROWS_H
#define QLLM_CPU_QUANTIZE_ROWS_H
#include "quant.h"
#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const QuantSpec *spec;
    int64_t cols, block[2];              // block: rows and columns that share a scale
    bool rounds;                         // codes are made from bf16(value), else from the value
} RowQuant;

// Of one row, in double: sum of squares of the values and of their errors, the largest error, the largest value.
typedef struct { double signal, noise, worst, amax; } RowErrors;

// Widens mn and mx (cols / block[1]), which begin at INFINITY and -INFINITY, by rows of finite values.
void quantize_ranges(float *mn, float *mx, const RowQuant *k, const float *x, int64_t rows);
// Scales and zero points of n blocks from their ranges.
void quantize_params(QParams *qp, const RowQuant *k, const float *mn, const float *mx, int64_t n);
// The codes of a row of finite values whose blocks have the parameters qp (cols / block[1]), packed.
void quantize_row(uint8_t *packed, RowErrors *e, const RowQuant *k, const float *x, const QParams *qp);
#ifdef __cplusplus
}
#endif
#endif
