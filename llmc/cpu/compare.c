// Logits compared: the largest of a row, and the distance of two models' distributions.
#include "cpu.h"

enum { RUN = 1024 };

// The largest of each run of values; the first run with the largest of all is searched.
int cpu_argmax(const float *x, int V) {
    float top = -INFINITY;
    int run = -1;
    for (int at = 0; at < V; at += RUN) {
        int end = V - at < RUN ? V : at + RUN, i = at;
        v16 m[4] = {v16_set1(top), v16_set1(top), v16_set1(top), v16_set1(top)};
        for (; i + 64 <= end; i += 64)
            for (int k = 0; k < 4; k++) m[k] = v16_max(v16_load(x + i + 16 * k, 16), m[k]);     // not x where it is NaN
        float most = v16_hmax(v16_max(v16_max(m[0], m[1]), v16_max(m[2], m[3])));
        for (; i < end; i++) most = x[i] > most ? x[i] : most;
        if (!(most > top)) continue;
        top = most;
        run = at;
    }
    if (run < 0) return -1;
    while (x[run] != top) run++;
    return run;
}

typedef struct { double za, zb, cross; } Sums;

// Adds e^a, e^b and e^b (b - a) of n logits less their row's largest. A token that the reference gives no weight counts
// nothing, whatever the other gives it.
VEC void compare_step(v16 *za, v16 *zb, v16 *cross, const float *a, const float *b, v16 top_a, v16 top_b, int n) {
    v16 da = v16_load(a, n) - top_a, db = v16_load(b, n) - top_b, ea = v16_exp(da), eb = v16_exp(db);
    if (n < 16)
        for (int i = n; i < 16; i++) ea[i] = eb[i] = 0.0f;
    v16 term = eb * (db - da);
    *za += ea;
    *zb += eb;
    *cross += (v16)((v16i)term & (v16i)(eb != v16_set1(0.0f)));
}

// f32 sums of a run, then doubles.
static Sums compare_row(const float *a, const float *b, float top_a, float top_b, int V) {
    Sums s = {0.0, 0.0, 0.0};
    v16 ta = v16_set1(top_a), tb = v16_set1(top_b);
    for (int at = 0; at < V; at += RUN) {
        v16 za = {0}, zb = {0}, cross = {0};
        int end = V - at < RUN ? V : at + RUN, i = at;
        for (; i + 16 <= end; i += 16) compare_step(&za, &zb, &cross, a + i, b + i, ta, tb, 16);
        if (i < end) compare_step(&za, &zb, &cross, a + i, b + i, ta, tb, end - i);
        s.za += (double)v16_sum(za);
        s.zb += (double)v16_sum(zb);
        s.cross += (double)v16_sum(cross);
    }
    return s;
}

// With x' = x - max x and Z = sum e^x':  sum p_b (log p_b - log p_a) = sum p_b (b' - a') + log Za - log Zb.
void cpu_compare_logits(float *kl, int32_t *same, const float *logits, const float *reference, size_t n, int V) {
#pragma omp parallel for schedule(static) if (n * (size_t)V >= CPU_MIN_PARALLEL)
    for (size_t r = 0; r < n; r++) {
        const float *a = logits + r * (size_t)V, *b = reference + r * (size_t)V;
        int top_a = cpu_argmax(a, V), top_b = cpu_argmax(b, V);
        same[r] = top_a == top_b;
        kl[r] = NAN;
        if (top_a < 0 || top_b < 0) continue;
        Sums s = compare_row(a, b, a[top_a], b[top_b], V);
        double d = s.cross / s.zb + (log(s.za) - log(s.zb));
        kl[r] = d < 0.0 ? 0.0f : (float)d;
    }
}
