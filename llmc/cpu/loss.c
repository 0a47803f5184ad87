// Cross entropy and its gradient, row by row of the logits.
#include "cpu.h"

// Logits that stay in the nearest cache while they are read twice: for the maximum, then for the sum.
#define SWEEP 1024

VEC v16 load_or(const float *p, int n, float rest) {
    v16 v = v16_load(p, n);
    for (int i = n; i < 16; i++) v[i] = rest;
    return v;
}

static float largest_of(const float *z, int n) {
    v16 a = v16_set1(-INFINITY), b = a;
    int c = 0;
    for (; c + 32 <= n; c += 32) {
        prefetch_ahead(z + c);
        prefetch_ahead(z + c + 16);
        a = v16_max(v16_load(z + c, 16), a);
        b = v16_max(v16_load(z + c + 16, 16), b);
    }
    for (; c < n; c += 16) a = v16_max(load_or(z + c, n - c < 16 ? n - c : 16, -INFINITY), a);
    return v16_hmax(v16_max(a, b));
}

// Sum of e^(z - shift), f32 in 32 lanes; where e is given the terms are kept in it.
VEC float sum_of_exp(float *e, const float *z, int n, float shift, bool keep) {
    v16 a = {0}, b = {0}, s = v16_set1(shift);
    int c = 0;
    for (; c + 32 <= n; c += 32) {
        v16 lo = v16_exp(v16_load(z + c, 16) - s), hi = v16_exp(v16_load(z + c + 16, 16) - s);
        if (keep) v16_store(e + c, lo, 16);
        if (keep) v16_store(e + c + 16, hi, 16);
        a += lo;
        b += hi;
    }
    for (; c < n; c += 16) {
        int k = n - c < 16 ? n - c : 16;
        v16 v = v16_exp(load_or(z + c, k, -INFINITY) - s);
        if (keep) v16_store(e + c, v, k);
        a += v;
    }
    return v16_sum(a + b);
}

// X(e * factor)
static void scale_to_x(floatX *d, const float *e, int n, float factor) {
    v16 f = v16_set1(factor);
    int c = 0;
    for (; c + 32 <= n; c += 32) {
        prefetch_ahead(d + c);
        v32_storex(d + c, v16_load(e + c, 16) * f, v16_load(e + c + 16, 16) * f);
    }
    for (; c < n; c += 16) {
        int k = n - c < 16 ? n - c : 16;
        v16_storex(d + c, v16_load(e + c, k) * f, k);
    }
}

// One row. Each sweep's exponentials count from the largest logit seen so far, which stands in shifts; they are kept in
// e (V) and scaled to the final sum afterwards, so that e^x, the dearest part, is taken once. Sums are f32 within a
// sweep, double across sweeps.
static float classify_row(floatX *d, const float *z, int target, int V, float *e, float *shifts) {
    float m = -INFINITY;
    double sum = 0.0;
    for (int c = 0, k = 0; c < V; c += SWEEP, k++) {
        int n = V - c < SWEEP ? V - c : SWEEP;
        float top = largest_of(z + c, n);
        if (top > m) {
            sum *= (double)exp_f32(m - top);
            m = top;
        }
        shifts[k] = m;
        sum += (double)(d ? sum_of_exp(e + c, z + c, n, m, true) : sum_of_exp(NULL, z + c, n, m, false));
    }
    for (int c = 0, k = 0; d && c < V; c += SWEEP, k++)
        scale_to_x(d + c, e + c, V - c < SWEEP ? V - c : SWEEP, (float)((double)exp_f32(shifts[k] - m) / sum));
    if (d) d[target] = f2x((float)((double)exp_f32(z[target] - m) / sum - 1.0));
    return (float)(log(sum) + (double)(m - z[target]));
}

void cpu_classifier(float *losses, floatX *dlogits, const float *logits, const int32_t *targets, size_t n, int V) {
    size_t sweeps = ((size_t)V + SWEEP - 1) / SWEEP, each = ((size_t)V + sweeps + 15) / 16 * 16;
    float *scratch = cpu_workspace((size_t)cpu_max_threads() * each * sizeof(float));
    if (!scratch) return;
#pragma omp parallel for schedule(static) if (n * (size_t)V >= CPU_MIN_PARALLEL)
    for (size_t r = 0; r < n; r++) {
        float *e = scratch + (size_t)cpu_thread() * each;
        floatX *d = dlogits ? dlogits + r * (size_t)V : NULL;
        if (targets[r] >= 0) {
            losses[r] = classify_row(d, logits + r * (size_t)V, targets[r], V, e, e + V);
            continue;
        }
        losses[r] = 0.0f;
        if (d) memset(d, 0, (size_t)V * sizeof *d);
    }
}

void cpu_loss_accumulate(StepState *state, const float *losses, const int32_t *targets, size_t N) {
    for (size_t n = 0; n < N; n++) {
        state->loss_sum += (double)losses[n];
        state->tokens += targets[n] >= 0;
    }
}
