// Picks the next token from logits.
#ifndef QLLM_SAMPLER_H
#define QLLM_SAMPLER_H
#include "common.h"

typedef struct {
    float temperature;       // 0: greedy (first of equals)
    int top_k;               // 0: all
    float top_p;             // 1: all
    uint64_t seed;
} Sampler;

// logits (V) are overwritten. step is the index of the token: the draw is Philox(seed, step), so that a run repeats.
int sample_token(const Sampler *s, float *logits, int V, uint64_t step);
#endif
