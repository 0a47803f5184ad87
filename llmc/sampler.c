// Top-k and top-p without a sort and without memory: the cut is found by three histograms over the bits of the weights.
#include "sampler.h"
#include <math.h>
#include "rng.h"

enum { SAMPLER_STREAM = 0x53414d50 };            // keeps these draws apart from those of training

int argmax_token(const float *logits, int V) {
    int best = -1;
    float top = -INFINITY;
    for (int i = 0; i < V; i++)
        if (logits[i] > top) { top = logits[i]; best = i; }
    return best;
}

// Weights are exp(.) of finite values: not negative, so that their bits order like the values. Keeps the largest ones
// until their amount (their number, or their sum) reaches `enough`, and sets the others to zero. Of equals at the cut,
// the first.
//
// The 32 bits of the smallest kept weight are found from the top in digits of 11, 11 and 10 bits: each pass sums the
// amounts by digit among the weights that share the digits found so far, then walks down from the largest digit.
static void keep_largest(float *w, int V, double enough, bool by_number) {
    static const int shift[3] = {21, 10, 0}, bits[3] = {11, 11, 10};
    uint32_t prefix = 0;
    double above = 0.0;                          // amount of the weights known to be larger than the cut
    for (int pass = 0; pass < 3; pass++) {
        double amount[2048] = {0};
        uint32_t mask = (1u << bits[pass]) - 1u, known = pass ? ~0u << shift[pass - 1] : 0u;
        for (int i = 0; i < V; i++) {
            uint32_t key = f32_bits(w[i]);
            if ((key & known) == prefix) amount[key >> shift[pass] & mask] += by_number ? 1.0 : (double)w[i];
        }
        uint32_t digit = mask;
        while (digit > 0 && above + amount[digit] < enough) above += amount[digit--];
        prefix |= digit << shift[pass];
    }
    for (int i = 0; i < V; i++) {
        uint32_t key = f32_bits(w[i]);
        if (key > prefix) continue;
        if (key == prefix && above < enough) above += by_number ? 1.0 : (double)w[i];
        else w[i] = 0.0f;
    }
}

static double sum_weights(const float *w, int V) {
    double sum = 0.0;
    for (int i = 0; i < V; i++) sum += (double)w[i];
    return sum;
}

int sample_token(const Sampler *s, float *logits, int V, uint64_t step) {
    int best = argmax_token(logits, V);
    if (best < 0 || !(s->temperature > 0.0f) || isinf(logits[best])) return best;
    float top = logits[best];
    for (int i = 0; i < V; i++) {
        float w = expf((logits[i] - top) / s->temperature);
        logits[i] = w >= 0.0f ? w : 0.0f;        // NaN becomes 0, and so does a -0 in any libm
    }
    if (s->top_k > 0 && s->top_k < V) keep_largest(logits, V, (double)s->top_k, true);
    double total = sum_weights(logits, V);
    if (s->top_p < 1.0f) {
        keep_largest(logits, V, (double)s->top_p * total, false);
        total = sum_weights(logits, V);
    }
    Philox r = philox(s->seed, SAMPLER_STREAM, step);
    double u = ((double)(r.v[0] >> 5) * 67108864.0 + (double)(r.v[1] >> 6)) * 0x1p-53;   // 53 bits, below 1
    double below = 0.0, draw = u * total;
    int last = best;
    for (int i = 0; i < V; i++) {
        if (logits[i] == 0.0f) continue;
        below += (double)logits[i];
        last = i;
        if (draw < below) break;                 // if rounding lets all pass, the last kept one is taken
    }
    return last;
}
