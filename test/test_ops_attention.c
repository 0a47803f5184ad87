// Attention against sums in double, its gradients against finite differences, and the equalities it promises: bits that
// depend neither on T, on B, on a cache before the queries, nor on the number of threads.
#include "matmul_common.h"

// One query row in double. s, p (Tk): scaled scores and softmax. Returns the log-sum-exp; *e bounds the relative
// error of a weight p in f32: the score's rounding (HS products, HS sums and the scale, each at most one rounding
// relative to the magnitudes summed), that of score - max and of the exponential (3 ulp of numbers up to |score|, and
// 2 of p).
static double reference_row(double *p, const floatX *q, const floatX *k, size_t ld, int n, int HS, double *e) {
    double top = -INFINITY, sum = 0, mag_max = 0, scale = 1 / sqrt((double)HS);
    for (int j = 0; j < n; j++) {
        double dot = 0, mag = 0;
        for (int i = 0; i < HS; i++) {
            double t = (double)x2f(q[i]) * x2f(k[(size_t)j * ld + (size_t)i]);
            dot += t;
            mag += fabs(t);
        }
        p[j] = dot * scale;
        if (p[j] > top) top = p[j];
        if (mag * scale > mag_max) mag_max = mag * scale;
    }
    for (int j = 0; j < n; j++) sum += exp(p[j] - top);
    for (int j = 0; j < n; j++) p[j] = exp(p[j] - top) / sum;
    *e = ((2 * HS + 2) * mag_max + 3 * 2 * mag_max + 2) * 0x1p-24;
    return top + log(sum);
}

typedef struct { int B, T, Tk, NH, NKV, HS; } Shape;

// o = sum p v: a weight's relative error e counts twice (numerator and sum), its rounding to X before the product once,
// the n sums in f32 one rounding each (of the magnitudes), the result's rounding to X once.
static void check_forward(Shape s) {
    size_t ldq = (size_t)(s.NH * s.HS) + 6, ldkv = (size_t)(2 * s.NKV * s.HS), ldo = (size_t)(s.NH * s.HS) + 2;
    size_t rows = (size_t)s.B * (size_t)s.T, skv = (size_t)(s.Tk + 3) * ldkv;
    floatX *q = random_x(rows * ldq, 2), *kv = random_x((size_t)s.B * skv, 2), *o = xcalloc(rows * ldo, sizeof *o);
    float *lse = xcalloc(rows * (size_t)s.NH, sizeof *lse);
    double *p = xmalloc((size_t)s.Tk * sizeof *p);
    const floatX *k = kv, *v = kv + s.NKV * s.HS;
    ops->attention_forward(o, lse, q, k, v, s.B, s.T, s.Tk, s.NH, s.NKV, s.HS, (int)ldo, (int)ldq, (int)ldkv, skv);
    check_device();
    for (int b = 0; b < s.B; b++)
        for (int t = 0; t < s.T; t++)
            for (int h = 0; h < s.NH; h++) {
                size_t row = (size_t)(b * s.T + t), head = (size_t)(h / (s.NH / s.NKV) * s.HS);
                int n = s.Tk - s.T + t + 1;
                double e, want = reference_row(p, q + row * ldq + (size_t)(h * s.HS), k + (size_t)b * skv + head,
                                               ldkv, n, s.HS, &e);
                double got = lse[(size_t)(b * s.NH + h) * (size_t)s.T + (size_t)t];
                double bound = e + n * 0x1p-24 + 4 * 0x1p-24 * fabs(want);
                if (!(fabs(got - want) <= bound))
                    fail_msg("lse b %d t %d h %d (T %d, Tk %d, HS %d): %.9g, expected %.9g +- %.2g", b, t, h, s.T,
                             s.Tk, s.HS, got, want, bound);
                for (int i = 0; i < s.HS; i++) {
                    double sum = 0, mag = 0;
                    for (int j = 0; j < n; j++) {
                        double x = p[j] * x2f(v[(size_t)b * skv + (size_t)j * ldkv + head + (size_t)i]);
                        sum += x;
                        mag += fabs(x);
                    }
                    double y = x2f(o[row * ldo + (size_t)(h * s.HS + i)]);
                    double limit = (2 * e + UX + (n + 4) * 0x1p-23) * mag + UX * fabs(sum);
                    if (!(fabs(y - sum) <= limit))
                        fail_msg("o b %d t %d h %d i %d (T %d, Tk %d, HS %d): %.9g, expected %.9g +- %.2g", b, t, h,
                                 i, s.T, s.Tk, s.HS, y, sum, limit);
                }
            }
    free(q); free(kv); free(o); free(lse); free(p);
}

static const Shape grid[] = {                                   // B, T, Tk, NH, NKV, HS
    {1, 1, 1, 1, 1, 2}, {2, 3, 3, 2, 1, 4}, {1, 17, 17, 3, 3, 6}, {2, 65, 65, 4, 2, 8}, {1, 64, 64, 2, 1, 32},
    {1, 130, 130, 3, 1, 64}, {2, 63, 63, 9, 3, 64}, {1, 200, 200, 2, 2, 80}, {1, 97, 97, 2, 1, 96},
    {2, 70, 70, 4, 1, 128}, {1, 21, 21, 80, 1, 16}, {1, 40, 40, 5, 5, 34},
};

static void test_forward(void **unused) {
    (void)unused;
    set_threads(0);
    state = 1;
    for (size_t i = 0; i < sizeof grid / sizeof *grid; i++) check_forward(grid[i]);
    static const Shape cached[] = {                             // queries behind a cache
        {1, 1, 5, 2, 1, 8}, {2, 1, 64, 9, 3, 64}, {1, 1, 65, 4, 4, 128}, {2, 7, 100, 3, 1, 64}, {1, 70, 199, 4, 2, 80},
        {1, 1, 300, 3, 1, 96}, {3, 2, 2, 2, 2, 10},
    };
    for (size_t i = 0; i < sizeof cached / sizeof *cached; i++) check_forward(cached[i]);
}

// Extreme scores: weights of exactly one and zero, differences beyond what an exponential represents.
static void test_extreme_scores(void **unused) {
    (void)unused;
    set_threads(0);
    enum { T = 70, HS = 4 };
    floatX qkv[T][3 * HS], o[T][HS];
    float lse[T];
    for (int t = 0; t < T; t++)
        for (int i = 0; i < HS; i++) {
            qkv[t][i] = f2x(64.0f);
            qkv[t][HS + i] = f2x(t == 66 ? 64.0f : -64.0f);    // in the second tile: scores 8192 over -8192
            qkv[t][2 * HS + i] = f2x((float)t);
        }
    ops->attention_forward(&o[0][0], lse, &qkv[0][0], &qkv[0][HS], &qkv[0][2 * HS], 1, T, T, 1, 1, HS, HS, 3 * HS,
                           3 * HS, (size_t)T * 3 * HS);
    check_device();
    // Equal scores average the values 0..t exactly up to the roundings of o, and of 64 weights and sums.
    for (int t = 0; t < 66; t++) assert_true(fabs(x2f(o[t][0]) - t / 2.0) <= t / 2.0 * (UX + 0x1p-16));
    for (int t = 66; t < T; t++) assert_true(x2f(o[t][0]) == 66.0f && lse[t] == 8192.0f);
}

typedef struct { floatX *qkv, *o, *dout, *dqkv; float *lse; size_t ld, ldo, rows; } Run;

static Run make_run(Shape s, float scale) {
    Run r = {.ld = (size_t)((s.NH + 2 * s.NKV) * s.HS), .ldo = (size_t)(s.NH * s.HS),
             .rows = (size_t)s.B * (size_t)s.T};
    r.qkv = random_x(r.rows * r.ld, scale);
    r.dout = random_x(r.rows * r.ldo, 1);
    r.o = xcalloc(r.rows * r.ldo, sizeof *r.o);
    r.dqkv = xcalloc(r.rows * r.ld, sizeof *r.dqkv);
    r.lse = xcalloc(r.rows * (size_t)s.NH, sizeof *r.lse);
    return r;
}

static void free_run(Run *r) {
    free(r->qkv);
    free(r->dout);
    free(r->o);
    free(r->dqkv);
    free(r->lse);
}

static void forward_run(const Run *r, Shape s) {
    const floatX *k = r->qkv + s.NH * s.HS, *v = k + s.NKV * s.HS;
    ops->attention_forward(r->o, r->lse, r->qkv, k, v, s.B, s.T, s.T, s.NH, s.NKV, s.HS, (int)r->ldo, (int)r->ld,
                           (int)r->ld, (size_t)s.T * r->ld);
}

static void backward_run(const Run *r, Shape s) {
    forward_run(r, s);
    ops->attention_backward(r->dqkv, r->dout, r->qkv, r->o, r->lse, s.B, s.T, s.NH, s.NKV, s.HS);
}

// Gradients in double beside bounds of their error. With e as in reference_row for p (twice: the score and the stored
// log-sum-exp), w = |p| e + |p| u for a weight, the error of ds = p (dp - D) is
//   |ds| (2e + u) + p (error of dp and D),  D = do . o with o rounded to X (and as far off as check_forward allows),
// where u rounds to X; the sums over n terms add n roundings of 2^-24 of the magnitudes, the result its own u.
static void check_backward(Shape s) {
    Run r = make_run(s, 1.5f);
    backward_run(&r, s);
    check_device();
    size_t n = r.rows * r.ld;
    double *want = xcalloc(n, sizeof *want), *err = xcalloc(n, sizeof *err), *p = xmalloc((size_t)s.T * sizeof *p);
    double scale = 1 / sqrt((double)s.HS);
    for (int b = 0; b < s.B; b++)
        for (int t = 0; t < s.T; t++)
            for (int h = 0; h < s.NH; h++) {
                size_t row = (size_t)(b * s.T + t), first = (size_t)(b * s.T) * r.ld;
                size_t at_q = row * r.ld + (size_t)(h * s.HS);
                size_t at_k = first + (size_t)((s.NH + h / (s.NH / s.NKV)) * s.HS),
                    at_v = at_k + (size_t)(s.NKV * s.HS);
                const floatX *dout = r.dout + row * r.ldo + (size_t)(h * s.HS);
                double e, D = 0, D_err = 0;
                reference_row(p, r.qkv + at_q, r.qkv + at_k, r.ld, t + 1, s.HS, &e);
                for (int i = 0; i < s.HS; i++) {
                    double o = 0, mag = 0, d = x2f(dout[i]);
                    for (int j = 0; j <= t; j++) {
                        double x = p[j] * x2f(r.qkv[at_v + (size_t)j * r.ld + (size_t)i]);
                        o += x;
                        mag += fabs(x);
                    }
                    D += d * o;
                    D_err += fabs(d) * ((2 * e + UX + (t + 4) * 0x1p-23) * mag + (UX + s.HS * 0x1p-24) * fabs(o));
                }
                for (int j = 0; j <= t; j++) {
                    size_t row_k = at_k + (size_t)j * r.ld, row_v = at_v + (size_t)j * r.ld;
                    double dp = 0, mag = 0;
                    for (int i = 0; i < s.HS; i++) {
                        double x = (double)x2f(dout[i]) * x2f(r.qkv[row_v + (size_t)i]);
                        dp += x;
                        mag += fabs(x);
                    }
                    double ds = p[j] * (dp - D), p_err = p[j] * (2 * e + UX + (s.B * s.T * s.NH + 4) * 0x1p-23);
                    double dp_err = (2 * s.HS + 2) * 0x1p-24 * mag;
                    double ds_err = fabs(ds) / (p[j] + 1e-300) * p_err + p[j] * (D_err + dp_err);
                    for (int i = 0; i < s.HS; i++) {
                        double q = x2f(r.qkv[at_q + (size_t)i]), k = x2f(r.qkv[row_k + (size_t)i]), d = x2f(dout[i]);
                        want[at_q + (size_t)i] += scale * ds * k;
                        err[at_q + (size_t)i] += scale * ds_err * fabs(k);
                        want[row_k + (size_t)i] += scale * ds * q;
                        err[row_k + (size_t)i] += scale * ds_err * fabs(q);
                        want[row_v + (size_t)i] += p[j] * d;
                        err[row_v + (size_t)i] += p_err * fabs(d);
                    }
                }
            }
    for (size_t i = 0; i < n; i++) {
        double bound = err[i] + 2 * UX * fabs(want[i]) + 1e-30;
        if (!(fabs(x2f(r.dqkv[i]) - want[i]) <= bound))
            fail_msg("dqkv row %zu column %zu (T %d, NH %d, NKV %d, HS %d): %.9g, expected %.9g +- %.2g", i / r.ld,
                     i % r.ld, s.T, s.NH, s.NKV, s.HS, x2f(r.dqkv[i]), want[i], bound);
    }
    free(want);
    free(err);
    free(p);
    free_run(&r);
}

static void test_backward(void **unused) {
    (void)unused;
    set_threads(0);
    state = 2;
    for (size_t i = 0; i < sizeof grid / sizeof *grid; i++) check_backward(grid[i]);
}

#ifdef PRECISION_FP32
static double loss_of(const Run *r, Shape s) {
    forward_run(r, s);
    double loss = 0;
    for (size_t i = 0; i < r->rows * r->ldo; i++) loss += (double)r->dout[i] * r->o[i];
    return loss;
}

// Central differences with step h = 2^-7. Truncation: h^2 / 6 times the third derivative, which for values within 1.5
// and scores of that size is below 10 times the gradient's own scale (|do| HS terms of at most 1): 1e-4 absolute.
// Noise: n outputs, each within some 2^-21 of exact and of random sign, over h: sqrt(n) 2^-21 / 2^-7 below 2e-3.
static void test_finite_differences(void **unused) {
    (void)unused;
    set_threads(0);
    state = 3;
    static const Shape shapes[] = {{2, 7, 7, 4, 2, 8}, {1, 70, 70, 2, 1, 4}};
    for (size_t k = 0; k < 2; k++) {
        Shape s = shapes[k];
        Run r = make_run(s, 1.0f);
        backward_run(&r, s);
        const float h = 0x1p-7f;
        for (size_t i = k; i < r.rows * r.ld; i += 5) {
            float x = r.qkv[i];
            r.qkv[i] = x + h;
            double up = loss_of(&r, s), x_up = r.qkv[i];
            r.qkv[i] = x - h;
            double down = loss_of(&r, s), slope = (up - down) / (x_up - (double)r.qkv[i]);
            r.qkv[i] = x;
            if (!(fabs(slope - r.dqkv[i]) <= 2.1e-3))
                fail_msg("element %zu of shape %zu: gradient %.6g, difference %.6g", i, k, r.dqkv[i], slope);
        }
        check_device();
        free_run(&r);
    }
}
#endif

// The first rows of a long sequence, of the sequence alone, and of a batch; a token behind a cache; any number of
// threads.
static void test_same_bits(void **unused) {
    (void)unused;
    state = 4;
    static const Shape shapes[] = {{3, 150, 150, 9, 3, 64}, {2, 200, 200, 4, 1, 80}, {2, 100, 100, 3, 3, 6}};
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
        Shape s = shapes[k];
        Run r = make_run(s, 2);
        set_threads(1);
        backward_run(&r, s);
        size_t no = r.rows * r.ldo, ng = r.rows * r.ld, nl = r.rows * (size_t)s.NH;
        floatX *o = xmalloc(no * sizeof *o), *grad = xmalloc(ng * sizeof *grad);
        float *lse = xmalloc(nl * sizeof *lse);
        memcpy(o, r.o, no * sizeof *o);
        memcpy(grad, r.dqkv, ng * sizeof *grad);
        memcpy(lse, r.lse, nl * sizeof *lse);
        for (int threads = 2; threads <= 5; threads++) {
            set_threads(threads);
            memset(r.dqkv, 0, ng * sizeof *grad);
            backward_run(&r, s);
            assert_memory_equal(r.o, o, no * sizeof *o);
            assert_memory_equal(r.lse, lse, nl * sizeof *lse);
            if (memcmp(r.dqkv, grad, ng * sizeof *grad)) fail_msg("gradients differ with %d threads", threads);
        }
        const floatX *kk = r.qkv + s.NH * s.HS, *vv = kk + s.NKV * s.HS;
        for (int T = 1; T < s.T; T += 13) {                     // shorter, one sequence at a time
            for (int b = 0; b < s.B; b++) {
                size_t at = (size_t)(b * s.T) * r.ld;
                ops->attention_forward(r.o, r.lse, r.qkv + at, kk + at, vv + at, 1, T, T, s.NH, s.NKV, s.HS, (int)r.ldo,
                                       (int)r.ld, (int)r.ld, 0);
                if (memcmp(r.o, o + (size_t)(b * s.T) * r.ldo, (size_t)T * r.ldo * sizeof *o))
                    fail_msg("T %d of %d, sequence %d", T, s.T, b);
            }
        }
        static const int tail[] = {1, 2, 5, 21, 40, 80};       // the last queries behind the others' keys and values
        for (size_t i = 0; i < sizeof tail / sizeof *tail; i++) {
            int T = tail[i], from = s.T - T;
            for (int b = 0; b < s.B; b++) {
                size_t at = (size_t)(b * s.T) * r.ld, q0 = at + (size_t)from * r.ld;
                ops->attention_forward(r.o, NULL, r.qkv + q0, kk + at, vv + at, 1, T, s.T, s.NH, s.NKV, s.HS,
                                       (int)r.ldo, (int)r.ld, (int)r.ld, 0);
                if (memcmp(r.o, o + (size_t)(b * s.T + from) * r.ldo, (size_t)T * r.ldo * sizeof *o))
                    fail_msg("last %d queries of %d, sequence %d", T, s.T, b);
            }
        }
        check_device();
        free(o);
        free(grad);
        free(lse);
        free_run(&r);
    }
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_forward), cmocka_unit_test(test_extreme_scores), cmocka_unit_test(test_backward),
#ifdef PRECISION_FP32
        cmocka_unit_test(test_finite_differences),
#endif
        cmocka_unit_test(test_same_bits),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL) != 0;
}
