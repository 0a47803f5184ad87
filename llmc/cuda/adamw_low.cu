#include "cuda.cuh"
void cuda_adamw_low(StoredParam, StoredState, StoredState, floatX *, float *, const float *, const StepState *,
                    const AdamWParams *, const QuantSpec *, Rounding, int, int64_t, int64_t, int64_t) {}
void cuda_int8_rows(int8_t *, float *, StoredParam, int64_t, int64_t) {}
void cuda_widen(float *, const bf16 *, size_t) {}
