// Serving (ops.h): the served form of linears, the cache, the next token.
#include "cuda.cuh"

#define NOT_YET(name) ops_set_error(E_FAIL, "%s: not on this device yet", name)

size_t cuda_served_bytes(const QuantSpec *, const QuantSpec *, int, int) { return 0; }

void cuda_served_pack(void *, const uint8_t *, const float *, const float *, const QuantSpec *, const QuantSpec *,
                      int64_t, int64_t, int, int) {
    NOT_YET("served_pack");
}

void cuda_served_forward(floatX *, const floatX *, const void *, const QuantSpec *, const QuantSpec *, size_t, int,
                         int) {
    NOT_YET("served_forward");
}

void cuda_served_forward_f32(float *, const floatX *, const void *, const QuantSpec *, const QuantSpec *, size_t, int,
                             int) {
    NOT_YET("served_forward_f32");
}

void cuda_matvec_forward(floatX *y, const floatX *x, const floatX *w, size_t N, int C, int OC) {
    cuda_linear_forward(y, x, w, nullptr, N, C, OC);
}

void cuda_matvec_forward_f32(float *y, const floatX *x, const floatX *w, size_t N, int C, int OC) {
    cuda_linear_forward_f32(y, x, w, nullptr, N, C, OC);
}

void cuda_rope_append(floatX *, const KvCache *, const float *, const float *, const int32_t *, int, int, int) {
    NOT_YET("rope_append");
}

void cuda_attention_cached(floatX *, const floatX *, const KvCache *, const int32_t *, int, int, int) {
    NOT_YET("attention_cached");
}

void cuda_sample_next(DecodeState *, float *, const Sampler *, int) { NOT_YET("sample_next"); }

void cuda_embedding_q_forward(floatX *, const int32_t *, const uint8_t *, const float *, const float *,
                              const QuantSpec *, size_t, int, int) {
    NOT_YET("embedding_q_forward");
}

void cuda_compare_logits(float *, int32_t *, const float *, const float *, size_t, int) { NOT_YET("compare_logits"); }
