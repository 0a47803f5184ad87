// Top-k and top-p without a sort and without memory: the cut is found by three histograms over the bits of the weights.
#include "sampler.h"
#include <math.h>

int argmax_token(const float *logits, int V) {
    int best = -1;
    float top = -INFINITY;
    for (int i = 0; i < V; i++)
        if (logits[i] > top) { top = logits[i]; best = i; }
    return best;
}

static uint64_t amount_of(float w, bool by_number) { return by_number ? 1 : sampler_amount(w); }

// Weights are not negative, so that their bits order like the values. Keeps the largest ones until their amount (their
// number, or the sum of their amounts) reaches `enough`, and sets the others to zero. Of equals at the cut, the first.
//
// The 32 bits of the smallest kept weight are found from the top in digits of 11, 11 and 10 bits: each pass sums the
// amounts by digit among the weights that share the digits found so far, then walks down from the largest digit.
static void keep_largest(float *w, int V, uint64_t enough, bool by_number) {
    static const int shift[3] = {21, 10, 0}, bits[3] = {11, 11, 10};
    uint32_t prefix = 0;
    uint64_t above = 0;                          // amount of the weights known to be larger than the cut
    for (int pass = 0; pass < 3; pass++) {
        uint64_t amount[2048] = {0};
        uint32_t mask = (1u << bits[pass]) - 1u, known = pass ? ~0u << shift[pass - 1] : 0u;
        for (int i = 0; i < V; i++) {
            uint32_t key = f32_bits(w[i]);
            if ((key & known) == prefix) amount[key >> shift[pass] & mask] += amount_of(w[i], by_number);
        }
        uint32_t digit = mask;
        while (digit > 0 && above + amount[digit] < enough) above += amount[digit--];
        prefix |= digit << shift[pass];
    }
    for (int i = 0; i < V; i++) {
        uint32_t key = f32_bits(w[i]);
        if (key > prefix) continue;
        if (key == prefix && above < enough) above += amount_of(w[i], by_number);
        else w[i] = 0.0f;
    }
}

static uint64_t sum_amounts(const float *w, int V) {
    uint64_t sum = 0;
    for (int i = 0; i < V; i++) sum += sampler_amount(w[i]);
    return sum;
}

int sample_token(const Sampler *s, float *logits, int V, uint64_t step) {
    int best = argmax_token(logits, V);
    if (best < 0 || !(s->temperature > 0.0f) || isinf(logits[best])) return best;
    float top = logits[best];
    for (int i = 0; i < V; i++) logits[i] = sampler_weight(logits[i], top, s->temperature);
    int drawn = sample_weights(s, logits, V, step);
    return drawn < 0 ? best : drawn;
}

int sample_weights(const Sampler *s, float *w, int n, uint64_t step) {
    if (s->top_k > 0 && s->top_k < n) keep_largest(w, n, (uint64_t)s->top_k, true);
    uint64_t total = sum_amounts(w, n);
    if (s->top_p < 1.0f) {
        keep_largest(w, n, sampler_enough(s->top_p, total), false);
        total = sum_amounts(w, n);
    }
    if (total == 0) return -1;
    uint64_t below = 0, draw = sampler_draw(s->seed, step, total);
    for (int i = 0; i < n; i++) {
        below += sampler_amount(w[i]);
        if (draw < below) return i;
    }
    return -1;
}
