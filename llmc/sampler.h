// Picks the next token from logits.
#ifndef QLLM_SAMPLER_H
#define QLLM_SAMPLER_H
#include "common.h"
#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    float temperature;       // 0: greedy (first of equals)
    int top_k;               // 0: all; else the k largest, of equals the first
    float top_p;             // 1: all; else the smallest set of largest probabilities that sums to at least top_p
    uint64_t seed;
} Sampler;

// Index of the largest logit, the first of equals. NaN is never picked; -1 when there is nothing above -infinity.
int argmax_token(const float *logits, int V);

// Temperature first, then top_k, then top_p on what top_k left. logits (V) are overwritten. step is the index of the
// token: the draw is Philox(seed, step), so that a run repeats. NaN logits are never picked, an infinite one always is;
// -1 when no logit is above -infinity.
int sample_token(const Sampler *s, float *logits, int V, uint64_t step);

#ifdef __cplusplus
}
#endif
#endif
