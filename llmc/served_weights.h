// Linears in the form they are served in, kept beside the working weights of a run that trains with served arithmetic
// (train_llama_qat --forward integer): codes of quantized inputs times codes of weights, in integers. What eval
// --arithmetic served computes from the packed file is then what training computed, to the bit.
#ifndef QLLM_SERVED_WEIGHTS_H
#define QLLM_SERVED_WEIGHTS_H
#include "store.h"

// One matmul: tensors first .. first + n - 1 of the table, their rows one after the other.
typedef struct {
    int first, n, C, OC;
    const QuantSpec *wq, *act;
    void *served;                        // ops.h, served form
    size_t bytes;
} ServedLinear;

typedef struct {
    ServedLinear *linear;
    int n;
    int *of;                             // (table->n) linear that begins with this tensor, or -1
    size_t bytes;                        // all that served_weights_alloc takes
    // private: one tensor on its way
    uint8_t *wire;
    float *scale;
    size_t wire_bytes, scales;
} ServedWeights;

// Lists the linears whose inputs the plan quantizes. E_USAGE where one has no such form here, with the reason, or where
// there is none. table must outlive s.
int served_weights_plan(ServedWeights *s, const ParamTable *table, const LlamaConfig *c, Err *err);
int served_weights_alloc(ServedWeights *s, Err *err);
void served_weights_free(ServedWeights *s);
// The linear that begins with tensor i; NULL: it is not one of these (s may be NULL).
const ServedLinear *served_weights_get(const ServedWeights *s, int i);
// Makes all of them anew from the masters in the store, f32 ones of which this rank holds every row.
void served_weights_update(const ServedWeights *s, const Store *store);
#endif
