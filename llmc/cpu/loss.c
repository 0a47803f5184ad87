// Cross entropy and its gradient, row by row of the logits.
#include "cpu.h"

// Logits of one sweep that stay in the nearest cache while they are read twice: for the maximum, then for the sum.
#define SWEEP 1024

VEC v16 load_or(const float *p, int n, float rest) {
    v16 v = v16_load(p, n);
    for (int i = n; i < 16; i++) v[i] = rest;
    return v;
}

// Online softmax statistics: the largest logit, and the sum of e^(logit - largest). Sums are f32 within a sweep and a
// lane (64 terms), double across sweeps: relative error below 2^-18 + V/SWEEP * 2^-53, in practice near 2^-24.
static void softmax_stats(float *largest, double *total, const float *z, int V) {
    float m = -INFINITY;
    double sum = 0.0;
    for (int c0 = 0; c0 < V; c0 += SWEEP) {
        int end = V - c0 < SWEEP ? V : c0 + SWEEP, c = c0;
        v16 hi = v16_set1(-INFINITY);
        for (; c + 16 <= end; c += 16) hi = v16_max(v16_load(z + c, 16), hi);
        if (c < end) hi = v16_max(load_or(z + c, end - c, -INFINITY), hi);
        float top = v16_hmax(hi);
        if (top > m) {
            sum *= (double)exp_f32(m - top);
            m = top;
        }
        v16 part = {0}, shift = v16_set1(m);
        for (c = c0; c + 16 <= end; c += 16) part += v16_exp(v16_load(z + c, 16) - shift);
        if (c < end) part += v16_exp(load_or(z + c, end - c, -INFINITY) - shift);
        sum += (double)v16_sum(part);
    }
    *largest = m;
    *total = sum;
}

VEC void dlogits_step(floatX *d, const float *z, v16 shift, v16 inv, int n) {
    v16_storex(d, v16_exp(v16_load(z, n) - shift) * inv, n);
}

void cpu_classifier(float *losses, floatX *dlogits, const float *logits, const int32_t *targets, size_t n, int V) {
#pragma omp parallel for schedule(static) if (n * (size_t)V >= CPU_MIN_PARALLEL)
    for (size_t r = 0; r < n; r++) {
        const float *z = logits + r * (size_t)V;
        floatX *d = dlogits ? dlogits + r * (size_t)V : NULL;
        int target = targets[r];
        if (target < 0) {
            losses[r] = 0.0f;
            if (d) memset(d, 0, (size_t)V * sizeof *d);
            continue;
        }
        float m;
        double sum;
        softmax_stats(&m, &sum, z, V);
        losses[r] = (float)(log(sum) + (double)(m - z[target]));
        if (!d) continue;
        float inv1 = (float)(1.0 / sum);
        v16 shift = v16_set1(m), inv = v16_set1(inv1);
        int c = 0;
        for (; c + 16 <= V; c += 16) dlogits_step(d + c, z + c, shift, inv, 16);
        if (c < V) dlogits_step(d + c, z + c, shift, inv, V - c);
        d[target] = f2x(exp_f32(z[target] - m) * inv1 - 1.0f);
    }
}

void cpu_loss_accumulate(StepState *state, const float *losses, const int32_t *targets, size_t N) {
    for (size_t n = 0; n < N; n++) {
        state->loss_sum += (double)losses[n];
        state->tokens += targets[n] >= 0;
    }
}
