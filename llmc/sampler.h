// Picks the next token from logits.
#ifndef QLLM_SAMPLER_H
#define QLLM_SAMPLER_H
#include "common.h"
#include "rng.h"
#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    float temperature;       // 0: greedy (first of equals)
    int top_k;               // 0: all; else the k largest, of equals the first
    float top_p;             // 1: all; else the smallest set of largest probabilities that sums to at least top_p
    uint64_t seed;
} Sampler;

// The arithmetic, shared by all devices. A token's weight is e^((logit - largest) / temperature); its amount is that in
// units of 2^-40, an integer, so that sums do not depend on their order and every device picks the same token. Tokens
// that are less likely than 1e-12 of the first have amount 0 and are not drawn.
QHD float sampler_weight(float logit, float top, float temperature) {
    float w = exp_f32((logit - top) / temperature);
    return w >= 0.0f ? w : 0.0f;                     // NaN: 0
}
QHD uint64_t sampler_amount(float w) { return (uint64_t)((double)w * 1099511627776.0); }
// How much the largest weights must have together: top_p of the total, rounded up.
QHD uint64_t sampler_enough(float top_p, uint64_t total) {
    double enough = ceil((double)top_p * (double)total);
    return enough > 0.0 ? (uint64_t)enough : 0;
}
// What is drawn: the token with which the running sum of amounts comes to more than this.
QHD uint64_t sampler_draw(uint64_t seed, uint64_t step, uint64_t total) {
    Philox r = philox(seed, 0x53414d50, step);       // a stream apart from those of training
    double u = ((double)(r.v[0] >> 5) * 67108864.0 + (double)(r.v[1] >> 6)) * 0x1p-53;   // 53 bits, below 1
    uint64_t draw = (uint64_t)(u * (double)total);
    return draw < total ? draw : total - 1;
}

// Index of the largest logit, the first of equals. NaN is never picked; -1 when there is nothing above -infinity.
int argmax_token(const float *logits, int V);

// Temperature first, then top_k, then top_p on what top_k left. logits (V) are overwritten. step is the index of the
// token: the draw is Philox(seed, step), so that a run repeats. NaN logits are never picked, an infinite one always is;
// -1 when no logit is above -infinity.
int sample_token(const Sampler *s, float *logits, int V, uint64_t step);
// Its second half: which of n weights is drawn, -1 when none has an amount. Weights are overwritten. Those that top_k
// leaves out need not be among them.
int sample_weights(const Sampler *s, float *w, int n, uint64_t step);

#ifdef __cplusplus
}
#endif
#endif
