// Operations of the CPU wing that work on rows or elements, against plain scalar code in double.
#include "ops_common.h"

static const Ops *const o = &ops_cpu;

#define ACT(b, uns, lo, hi, map, zp, e) \
    {.bits = b, .is_unsigned = uns, .qmin = lo, .qmax = hi, .gran = QG_TOKEN, .mapping = map, .zero = zp, .eps = e}
static const QuantSpec acts[] = {
    ACT(8, 0, -128, 127, QM_ASYMMETRIC, QZ_INT, 0x1p-23f),      // 8da4w
    ACT(8, 0, -127, 127, QM_SYMMETRIC, QZ_INT, 0x1p-23f),       // int8dq
    ACT(8, 1, 0, 255, QM_ASYMMETRIC, QZ_INT, 0x1p-23f),
    ACT(4, 0, -8, 7, QM_SYMMETRIC_NO_CLIP, QZ_INT, 0x1p-23f),
    ACT(5, 1, 0, 31, QM_SYMMETRIC, QZ_INT, 0x1p-23f),
    ACT(4, 1, 0, 15, QM_ASYMMETRIC, QZ_FLOAT, 1e-6f),
    ACT(8, 1, 0, 255, QM_ASYMMETRIC, QZ_FLOAT, 1e-6f),
    ACT(2, 0, -2, 1, QM_SYMMETRIC, QZ_INT, 0x1p-126f),
};
#define N_ACTS (sizeof acts / sizeof *acts)

// got and mask must be the scalar fake quantization of raw, to the bit.
static void expect_fakequant(const floatX *got, const uint8_t *mask, const floatX *raw, size_t N, int C,
                             const QuantSpec *s) {
    for (size_t n = 0; n < N; n++) {
        float mn = INFINITY, mx = -INFINITY;
        for (int c = 0; c < C; c++) quant_minmax(&mn, &mx, x2f(raw[n * (size_t)C + (size_t)c]));
        QParams p = quant_choose(mn, mx, s, QD_X);
        for (int c = 0; c < C; c++) {
            size_t i = n * (size_t)C + (size_t)c;
            float x = x2f(raw[i]), u = quant_unclamped(x, p, s, QD_X);
            expect_same_f32(x2f(got[i]), x2f(f2x(quant_fake(x, p, s, QD_X))), "fake quantization", i);
            if (mask && mask[i] != (u >= (float)s->qmin && u <= (float)s->qmax))
                fail_msg("mask of element %zu is %d, code %g", i, mask[i], (double)u);
        }
    }
}

// exp_f32 and v16_exp: the same bits; within 1 ulp wherever the result is normal.
static void test_exp(void **state) {
    (void)state;
    double worst = 0.0;
    for (uint32_t sign = 0; sign < 2; sign++) {
        for (uint32_t u = 0x2f000000u; u < 0x42e00000u; u += 16 * 53) {
            v16 x;
            for (uint32_t i = 0; i < 16; i++) x[i] = f32_from_bits((sign << 31) | (u + i * 53));
            v16 e = v16_exp(x);
            for (size_t i = 0; i < 16; i++) {
                expect_same_f32(e[i], exp_f32(x[i]), "exp", i);
                expect_same_f32(one_plus_exp_f32(x[i]), 1.0f + exp_f32(x[i]), "1 + exp", i);
                double want = exp((double)x[i]);
                if (want < (double)FLT_MIN || want > (double)FLT_MAX) continue;
                int exponent;
                frexp(want, &exponent);
                double ulps = fabs((double)e[i] - want) / ldexp(1.0, exponent - 24);
                worst = ulps > worst ? ulps : worst;
            }
        }
    }
    if (worst > 1.0) fail_msg("exp is off by %.3f ulp", worst);
    v16 special = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 200.0f, -200.0f, 88.8f, -104.1f, -103.5f, 88.5f};
    v16 e = v16_exp(special);
    for (size_t i = 0; i < 16; i++) {
        expect_same_f32(e[i], exp_f32(special[i]), "exp of a special value", i);
        if (special[i] == special[i])
            expect_same_f32(one_plus_exp_f32(special[i]), 1.0f + exp_f32(special[i]), "1 + exp of a special value", i);
    }
    assert_true(e[0] == 1.0f && e[1] == 1.0f && e[2] == INFINITY && e[3] == 0.0f && e[4] != e[4] && e[5] == INFINITY);
    assert_true(e[6] == 0.0f && e[7] == INFINITY && e[8] == 0.0f && e[9] > 0.0f && e[10] < INFINITY);
}

// exp2_fast: its stated error, and the values it promises exactly.
static void test_exp2(void **state) {
    (void)state;
    double worst = 0.0;
    for (uint32_t sign = 0; sign < 2; sign++)
        for (uint32_t u = 0x2f000000u; u < 0x42ff0000u; u += 53) {          // up to 127.5
            float x = f32_from_bits((sign << 31) | u);
            if (x < -126.0f) break;
            double err = fabs((double)exp2_fast(x) / exp2((double)x) - 1.0);
            worst = err > worst ? err : worst;
        }
    if (worst > 0x1p-22 / sqrt(2.0)) fail_msg("exp2_fast is off by 2^%.2f", log2(worst));
    for (int n = -126; n < 128; n++) assert_true(exp2_fast((float)n) == ldexpf(1.0f, n));
    for (float x = -126.0f; x > -128.0f; x -= 0x1p-10f) assert_true(exp2_fast(x) >= 0.0f && exp2_fast(x) <= 0x1p-126f);
    assert_true(exp2_fast(-0.0f) == 1.0f && exp2_fast(-127.0f) == 0.0f && exp2_fast(-INFINITY) == 0.0f);
    assert_true(exp2_fast(-1e30f) == 0.0f && exp2_fast(NAN) != exp2_fast(NAN));
    float gpu_nan = f32_from_bits(0x7fffffffu);
    assert_true(exp2_fast(gpu_nan) != exp2_fast(gpu_nan));
}

static void test_log(void **state) {
    (void)state;
    double worst = 0.0;
    for (uint32_t u = 0x00800000u; u < 0x7f800000u; u += 997) {
        double want = log((double)f32_from_bits(u)), err = fabs((double)log_f32(f32_from_bits(u)) - want);
        int exponent;
        frexp(want, &exponent);
        double ulps = want == 0.0 ? err > 0.0 : err / ldexp(1.0, exponent - 24);
        worst = ulps > worst ? ulps : worst;
    }
    if (worst > 1.0) fail_msg("log_f32 is off by %.3f ulp", worst);
    assert_true(log_f32(1.0f) == 0.0f && log_f32(INFINITY) == INFINITY && log_f32(NAN) != log_f32(NAN));
}

// Lanes do what the scalars do, for any bits: subnormals, infinities, NaNs.
static void test_lanes(void **state) {
    (void)state;
    for (uint64_t k = 0; k < 40000; k += 16) {
        v16 x, y = {0};
        for (size_t i = 0; i < 16; i++) {
            uint32_t u = random_bits(k + i);
            x[i] = f32_from_bits(k % 64 ? u : (u & 0x807fffffu) | (k % 128 ? 0 : 0x7f800000u));
        }
        v16 r = v16_bf16_round(x);
        bf16 h[16];
        v16_store_bf16(h, x, 16);
        for (size_t i = 0; i < 16; i++) {
            assert_int_equal(f32_bits(r[i]), f32_bits(bf16_round(x[i])));
            assert_int_equal(h[i], bf16_from_f32(x[i]));
        }
        v16 back = v16_load_bf16(h, 16);
        assert_memory_equal(&back, &r, sizeof r);
        for (int n = 1; n < 16; n++) {
            bf16 part[17] = {0};
            v16_store_bf16(part, x, n);
            assert_memory_equal(part, h, (size_t)n * sizeof *h);
            assert_int_equal(part[n], 0);
            y = v16_load_bf16(h, n);
            for (int i = 0; i < 16; i++) assert_int_equal(f32_bits(y[i]), i < n ? f32_bits(r[i]) : 0);
        }
    }
}

static void test_embedding(void **state) {
    (void)state;
    for (size_t k = 0; k < N_SHAPES; k++) {
        int N = shapes[k][0], C = shapes[k][1], V = 11;
        size_t n_out = (size_t)N * (size_t)C, n_table = (size_t)V * (size_t)C;
        floatX *table = new_x(n_table, 1.0f), *out = new_x(n_out, 1.0f), *dout = new_x(n_out, 1.0f);
        float *dtable = new_f32(n_table, 1.0f), *want = copy_of(dtable, n_table * sizeof(float));
        int32_t *tokens = must_alloc((size_t)N * sizeof *tokens);
        for (int n = 0; n < N; n++)
            tokens[n] = n % 3 ? (int)(random_bits((uint64_t)n) % 11u) : 10; // many meet in one row
        o->embedding_forward(out, tokens, table, (size_t)N, C, V);
        o->embedding_backward(dtable, dout, tokens, (size_t)N, C, V);
        for (int n = 0; n < N; n++)
            for (int c = 0; c < C; c++) {
                assert_true(out[n * C + c] == table[tokens[n] * C + c]);
                want[tokens[n] * C + c] += x2f(dout[n * C + c]);
            }
        expect_same(dtable, want, n_table * sizeof(float), "embedding_backward", N, C);
        free(table), free(out), free(dout), free(dtable), free(want), free(tokens);
    }
}

// y = x rstd w of one row in double.
static double rmsnorm_row(double *y, const double *x, const double *w, int C, double eps) {
    double sum = 0.0;
    for (int c = 0; c < C; c++) sum += x[c] * x[c];
    double rstd = 1.0 / sqrt(sum / C + eps);
    for (int c = 0; c < C; c++) y[c] = x[c] * rstd * w[c];
    return rstd;
}

// The sum of squares is C/16 fused steps and a fold of 4, all terms positive: relative error (C/16 + 5) U32, halved by
// the square root; the mean, eps, root and reciprocal round once each.
static double rstd_error(int C) { return (C / 16 + 5) / 2.0 * U32 + 4 * U32; }

static void test_rmsnorm_forward(void **state) {
    (void)state;
    for (size_t k = 0; k < N_SHAPES; k++) {
        int N = shapes[k][0], C = shapes[k][1];
        size_t n_all = (size_t)N * (size_t)C;
        const float eps = 1e-5f;
        floatX *x = new_x(n_all, 2.0f), *delta = new_x(n_all, 0.5f), *w = new_x((size_t)C, 1.5f);
        floatX *res = new_x(n_all, 1.0f), *y = new_x(n_all, 1.0f), *yq = new_x(n_all, 1.0f);
        floatX *in_place = copy_of(x, n_all * sizeof *x);
        float *rstd = new_f32((size_t)N, 1.0f);
        uint8_t *mask = must_alloc(n_all);
        double *xd = must_alloc((size_t)C * sizeof *xd), *wd = must_alloc((size_t)C * sizeof *wd),
               *yd = must_alloc((size_t)C * sizeof *yd);
        o->rmsnorm_fq_forward(res, y, rstd, NULL, x, delta, w, (size_t)N, C, eps, NULL);
        for (int c = 0; c < C; c++) wd[c] = (double)x2f(w[c]);
        for (int n = 0; n < N; n++) {
            for (int c = 0; c < C; c++) {
                size_t i = (size_t)n * (size_t)C + (size_t)c;
                assert_true(res[i] == f2x(x2f(x[i]) + x2f(delta[i])));
                xd[c] = (double)x2f(res[i]);
            }
            double want = rmsnorm_row(yd, xd, wd, C, (double)eps);
            expect_near((double)rstd[n], want, want * rstd_error(C), "rstd", (size_t)n);
            for (int c = 0; c < C; c++)   // two products, then the rounding to X
                expect_near((double)x2f(y[n * C + c]), yd[c], fabs(yd[c]) * (rstd_error(C) + 2 * U32 + UX * 1.0001),
                            "y", (size_t)(n * C + c));
        }
        // In place; then the sum alone, with and without its copy.
        o->rmsnorm_fq_forward(in_place, yq, NULL, NULL, in_place, delta, w, (size_t)N, C, eps, NULL);
        expect_same(in_place, res, n_all * sizeof *res, "res in place", N, C);
        expect_same(yq, y, n_all * sizeof *y, "y in place", N, C);
        o->rmsnorm_fq_forward(NULL, yq, NULL, NULL, res, NULL, w, (size_t)N, C, eps, NULL);
        expect_same(yq, y, n_all * sizeof *y, "y without delta", N, C);
        o->rmsnorm_fq_forward(in_place, yq, NULL, mask, x, NULL, w, (size_t)N, C, eps, NULL);
        expect_same(in_place, x, n_all * sizeof *x, "res without delta", N, C);
        for (size_t i = 0; i < n_all; i++) assert_int_equal(mask[i], 1);
        for (size_t a = 0; a < N_ACTS; a++) {
            o->rmsnorm_fq_forward(res, yq, rstd, a % 2 ? mask : NULL, x, delta, w, (size_t)N, C, eps, &acts[a]);
            expect_fakequant(yq, a % 2 ? mask : NULL, y, (size_t)N, C, &acts[a]);
        }
        free(x), free(delta), free(w), free(res), free(y), free(yq), free(in_place), free(rstd), free(mask);
        free(xd), free(wd), free(yd);
    }
}

// Against central differences of the double forward (step 1e-5: truncation and rounding below 1e-8 for values near 1).
// Tolerance: rstd as above, some ten f32 roundings of terms no larger than `size`, the rounding of dres to X.
static void test_rmsnorm_backward(void **state) {
    (void)state;
    for (size_t k = 0; k < N_SHAPES; k++) {
        int N = shapes[k][0], C = shapes[k][1];
        size_t n_all = (size_t)N * (size_t)C;
        const double eps = 1e-5, h = 1e-5;
        floatX *x = new_x(n_all, 2.0f), *w = new_x((size_t)C, 1.5f), *dy = new_x(n_all, 1.0f),
               *dres = new_x(n_all, 1.0f);
        floatX *before = copy_of(dres, n_all * sizeof *dres);
        float *rstd = new_f32((size_t)N, 1.0f), *dw = new_f32((size_t)C, 1.0f);
        float *dw0 = copy_of(dw, (size_t)C * sizeof *dw);
        uint8_t *mask = must_alloc(n_all);
        for (size_t i = 0; i < n_all; i++) mask[i] = random_bits(i) % 4 != 0;
        double *xd = must_alloc((size_t)C * sizeof *xd), *wd = must_alloc((size_t)C * sizeof *wd),
               *yd = must_alloc((size_t)C * sizeof *yd);
        double *dwd = must_alloc((size_t)C * sizeof *dwd), *size = must_alloc((size_t)C * sizeof *size);
        for (int c = 0; c < C; c++) wd[c] = (double)x2f(w[c]), dwd[c] = (double)dw0[c], size[c] = fabs(dwd[c]);
        for (int n = 0; n < N; n++) {
            for (int c = 0; c < C; c++) xd[c] = (double)x2f(x[n * C + c]);
            rstd[n] = (float)rmsnorm_row(yd, xd, wd, C, eps);
        }
        o->rmsnorm_backward(dres, dw, dy, mask, x, w, rstd, (size_t)N, C);
        for (int n = 0; n < N; n++) {
            double sum_abs = 0.0;
            for (int c = 0; c < C; c++) {
                size_t i = (size_t)(n * C + c);
                double term = mask[i] ? (double)x2f(dy[i]) * (double)x2f(x[i]) * (double)rstd[n] : 0.0;
                dwd[c] += term, size[c] += fabs(term), sum_abs += fabs(term * wd[c]);
                xd[c] = (double)x2f(x[i]);
            }
            for (int c = 0; c < C; c += C > 100 ? 37 : 1) {
                double loss[2], at = xd[c], g = mask[n * C + c] ? (double)x2f(dy[n * C + c]) * wd[c] : 0.0;
                for (int side = 0; side < 2; side++) {
                    xd[c] = at + (side ? h : -h);
                    rmsnorm_row(yd, xd, wd, C, eps);
                    loss[side] = 0.0;
                    for (int j = 0; j < C; j++)
                        if (mask[n * C + j]) loss[side] += yd[j] * (double)x2f(dy[n * C + j]);
                }
                xd[c] = at;
                double want = (double)x2f(before[n * C + c]) + (loss[1] - loss[0]) / (2 * h);
                double terms = (double)rstd[n] * (fabs(g) + fabs(at) * (double)rstd[n] * sum_abs / C);
                double tol = terms * (2 * rstd_error(C) + (C / 16 + 10) * U32) + fabs(want) * UX * 1.001;
                tol += 1e-7 * (1 + sum_abs);
                expect_near((double)x2f(dres[n * C + c]), want, tol, "dres", (size_t)(n * C + c));
            }
        }
        // dw is linear in w: the sum itself is its gradient. N + 64 additions of terms whose sizes sum to `size`.
        for (int c = 0; c < C; c++) expect_near((double)dw[c], dwd[c], size[c] * (N + 70) * U32, "dweight", (size_t)c);
        free(x), free(w), free(dy), free(dres), free(before), free(rstd), free(dw), free(dw0), free(mask);
        free(xd), free(wd), free(yd), free(dwd), free(size);
    }
}

static void test_rope(void **state) {
    (void)state;
    static const int cases[][6] = {// N, T, pos0, heads, HS, row beyond the heads
                                   {1, 1, 0, 1, 2, 0},  {6, 3, 0, 2, 8, 8},     {5, 5, 7, 3, 64, 64},
                                   {4, 2, 1, 2, 80, 0}, {3, 3, 0, 4, 128, 128}, {600, 300, 2, 3, 64, 0}};
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        int N = cases[k][0], T = cases[k][1], pos0 = cases[k][2], NH = cases[k][3], HS = cases[k][4];
        int ld = NH * HS + cases[k][5], half = HS / 2;
        float *cs = new_f32((size_t)((pos0 + T) * half), 1.0f), *sn = new_f32((size_t)((pos0 + T) * half), 1.0f);
        for (int i = 0; i < (pos0 + T) * half; i++) sn[i] = sqrtf(1.0f - cs[i] * cs[i]);
        floatX *x = new_x((size_t)(N * ld), 1.0f), *y = copy_of(x, (size_t)(N * ld) * sizeof *x),
               *z = copy_of(x, (size_t)(N * ld) * sizeof *x);
        o->rope(y, cs, sn, (size_t)N, T, pos0, ld, NH, HS, false);
        o->rope(z, cs, sn, (size_t)N, T, pos0, ld, NH, HS, true);
        for (int n = 0; n < N; n++)
            for (int c = 0; c < ld; c++) {
                int head = c / HS, i = c % HS % half, at = n * ld + c;
                if (head >= NH) {
                    assert_true(y[at] == x[at] && z[at] == x[at]);
                    continue;
                }
                // The inverse is the transpose of an orthogonal map, so it is the backward. Two products and a sum in
                // f32: 3 roundings of at most |a| + |b|, then one to X.
                double a = (double)x2f(x[n * ld + head * HS + i]), b = (double)x2f(x[n * ld + head * HS + i + half]);
                double co = (double)cs[(pos0 + n % T) * half + i], si = (double)sn[(pos0 + n % T) * half + i];
                bool low = c % HS < half;
                double fwd = low ? a * co - b * si : b * co + a * si, inv = low ? a * co + b * si : b * co - a * si;
                double tol = 3 * U32 * (fabs(a) + fabs(b));
                expect_near((double)x2f(y[at]), fwd, tol + fabs(fwd) * UX * 1.0001, "rope", (size_t)at);
                expect_near((double)x2f(z[at]), inv, tol + fabs(inv) * UX * 1.0001, "rope inverse", (size_t)at);
            }
        free(cs), free(sn), free(x), free(y), free(z);
    }
}

static double silu(double g) { return g / (1.0 + exp(-g)); }

static void test_swiglu(void **state) {
    (void)state;
    for (size_t k = 0; k < N_SHAPES; k++) {
        int N = shapes[k][0], FF = shapes[k][1];
        size_t n_y = (size_t)N * (size_t)FF;
        floatX *gu = new_x(2 * n_y, 6.0f), *y = new_x(n_y, 1.0f), *yq = new_x(n_y, 1.0f), *dy = new_x(n_y, 1.0f);
        floatX *dgu = new_x(2 * n_y, 1.0f), *in_place = copy_of(gu, 2 * n_y * sizeof *gu);
        uint8_t *mask = must_alloc(n_y);
        if (FF > 20) gu[0] = in_place[0] = f2x(-200.0f), gu[1] = in_place[1] = f2x(200.0f);
        for (size_t i = 0; i < n_y; i++) mask[i] = random_bits(i) % 4 != 0;
        o->swiglu_fq_forward(y, NULL, gu, (size_t)N, FF, NULL);
        o->swiglu_backward(dgu, dy, mask, gu, (size_t)N, FF);
        o->swiglu_backward(in_place, dy, mask, in_place, (size_t)N, FF);
        expect_same(in_place, dgu, 2 * n_y * sizeof *dgu, "swiglu_backward in place", N, FF);
        for (int n = 0; n < N; n++)
            for (int c = 0; c < FF; c++) {
                size_t i = (size_t)(n * FF + c), gate = (size_t)(2 * n * FF + c), up = gate + (size_t)FF;
                double g = (double)x2f(gu[gate]), u = (double)x2f(gu[up]), d = mask[i] ? (double)x2f(dy[i]) : 0.0;
                // exp within 1 ulp (2 U32), then a sum, a quotient, a product: 6 U32 is ample. Results that are 0 in
                // f32 (sigmoid(-200)) are below the smallest normal.
                double want = silu(g) * u;
                expect_near((double)x2f(y[i]), want, fabs(want) * (6 * U32 + UX * 1.0001) + 1e-37, "swiglu", i);
                double h = 1e-5, dsilu = (silu(g + h) - silu(g - h)) / (2 * h); // truncation h^2/6 * |silu'''| < 1e-11
                double s = 1.0 / (1.0 + exp(-g));
                double size = fabs(d * u) * (s + fabs(g) * s * (1 - s) + s * fabs(g) * U32 * 4);
                expect_near((double)x2f(dgu[gate]), d * u * dsilu, size * 10 * U32 + fabs(d * u) * 1e-9 +
                            fabs(d * u * dsilu) * UX * 1.0001 + fabs(d * u * s * g) * 2 * U32, "dgate", i);
                expect_near((double)x2f(dgu[up]), d * silu(g), fabs(d * silu(g)) * (6 * U32 + UX * 1.0001) + 1e-37,
                            "dup", i);
            }
        for (size_t a = 0; a < N_ACTS; a++) {
            o->swiglu_fq_forward(yq, a % 2 ? mask : NULL, gu, (size_t)N, FF, &acts[a]);
            expect_fakequant(yq, a % 2 ? mask : NULL, y, (size_t)N, FF, &acts[a]);
        }
        free(gu), free(y), free(yq), free(dy), free(dgu), free(in_place), free(mask);
    }
}

static double cross_entropy(const float *z, int V, int target, int shifted, double by) {
    double m = -INFINITY, sum = 0.0;
    for (int v = 0; v < V; v++) m = fmax(m, (double)z[v]);
    for (int v = 0; v < V; v++) sum += exp((double)z[v] + (v == shifted ? by : 0.0) - m);
    return m + log(sum) - (double)z[target] - (shifted == target ? by : 0.0);
}

static void test_classifier(void **state) {
    (void)state;
    static const int cases[][2] = {{1, 1}, {3, 2}, {4, 17}, {2, 1000}, {3, 1024}, {3, 2049}, {5, 49152}, {2, 128256}};
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        int n = cases[k][0], V = cases[k][1];
        float *z = new_f32((size_t)n * (size_t)V, 8.0f), *losses = new_f32((size_t)n, 1.0f);
        float *only = new_f32((size_t)n, 1.0f);
        floatX *d = new_x((size_t)n * (size_t)V, 1.0f);
        int32_t targets[8];
        for (int r = 0; r < n; r++) targets[r] = r == 1 ? -100 : (int)(random_bits((uint64_t)(r + 7)) % (uint32_t)V);
        if (V > 2) z[V - 1] = 90.0f, z[0] = -INFINITY;     // a late maximum, and a logit that was masked out
        o->classifier(losses, d, z, targets, (size_t)n, V);
        o->classifier(only, NULL, z, targets, (size_t)n, V);
        assert_memory_equal(losses, only, (size_t)n * sizeof *losses);
        for (int r = 0; r < n; r++) {
            const float *zr = z + (size_t)r * (size_t)V;
            const floatX *dr = d + (size_t)r * (size_t)V;
            if (targets[r] < 0) {
                assert_true(losses[r] == 0.0f);
                for (int v = 0; v < V; v++) assert_true(x2f(dr[v]) == 0.0f);
                continue;
            }
            double want = cross_entropy(zr, V, targets[r], -1, 0.0);
            // exp: 2 U32, and U32 |z - max| of its rounded argument, largest near -1 where it weighs; 64 additions a
            // lane and a fold of 4: 80 U32 of the sum bounds all, as an absolute error of its logarithm.
            expect_near((double)losses[r], want, 80 * U32 + fabs(want) * 2 * U32, "loss", (size_t)r);
            for (int v = 0; v < V; v += V > 4096 ? 97 : 1) {
                if (zr[v] == -INFINITY) {
                    assert_true(x2f(dr[v]) == 0.0f);
                    continue;
                }
                double h = 1e-3,
                       grad = (cross_entropy(zr, V, targets[r], v, h) - cross_entropy(zr, V, targets[r], v, -h)) /
                              (2 * h);
                // Central difference: truncation h^2/6 p; losses near 100 are rounded to 1.4e-14, a few times: 1e-10.
                double p = v == targets[r] ? grad + 1.0 : grad;
                expect_near((double)x2f(dr[v]), grad,
                            p * 120 * U32 + 2 * U32 * (v == targets[r]) + fabs(grad) * UX * 1.0001 + 2e-7 * p + 1e-10,
                            "dlogits", (size_t)v);
            }
        }
        free(z), free(losses), free(only), free(d);
    }
    // What is not a number is not hidden.
    float z[3] = {1.0f, NAN, 2.0f}, loss;
    o->classifier(&loss, NULL, z, (int32_t[]){0}, 1, 3);
    assert_true(loss != loss);
}

static void test_loss_accumulate(void **state) {
    (void)state;
    StepState s = {.loss_sum = 2.0, .tokens = 5};
    float losses[4] = {1.5f, 0.0f, 0.25f, 1e-9f};
    int32_t targets[4] = {3, -1, 0, 9};
    o->loss_accumulate(&s, losses, targets, 4);
    assert_true(s.loss_sum == 2.0 + 1.5 + 0.0 + 0.25 + (double)1e-9f);
    assert_int_equal(s.tokens, 8);
}

static void test_fakequant(void **state) {
    (void)state;
    for (size_t k = 0; k < N_SHAPES; k++) {
        int N = shapes[k][0], C = shapes[k][1];
        size_t n_all = (size_t)N * (size_t)C;
        for (int kind = 0; kind < 6; kind++) {
            floatX *x = new_x(n_all, kind == 1 ? 1e-30f : 3.0f), *y = new_x(n_all, 1.0f), *z;
            uint8_t *mask = must_alloc(n_all);
            for (size_t i = 0; i < n_all; i++) {
                float v = x2f(x[i]);
                if (kind == 2) v = i % 2 ? 0.0f : -0.0f;
                if (kind == 3) v = fabsf(v) + 1.0f;
                if (kind == 4 && i % 7 == 3) v = i % 3 ? NAN : INFINITY;
                if (kind == 5) v = f32_from_bits(random_bits(i) & 0x807fffffu);    // subnormal
                x[i] = f2x(v);
            }
            z = copy_of(x, n_all * sizeof *x);
            for (size_t a = 0; a < N_ACTS; a++) {
                o->fakequant_forward(y, a % 2 ? mask : NULL, x, (size_t)N, C, &acts[a]);
                expect_fakequant(y, a % 2 ? mask : NULL, x, (size_t)N, C, &acts[a]);
            }
            o->fakequant_forward(z, NULL, z, (size_t)N, C, &acts[0]);
            o->fakequant_forward(y, NULL, x, (size_t)N, C, &acts[0]);
            expect_same(z, y, n_all * sizeof *y, "fakequant in place", N, C);
            o->fakequant_forward(y, mask, x, (size_t)N, C, NULL);
            expect_same(y, x, n_all * sizeof *y, "fakequant turned off", N, C);
            free(x), free(y), free(z), free(mask);
        }
    }
}

static void test_mask_backward(void **state) {
    (void)state;
    for (size_t k = 0; k < N_SHAPES; k++) {
        int N = shapes[k][0], C = shapes[k][1];
        size_t n_all = (size_t)N * (size_t)C;
        floatX *x = new_x(n_all, 1.0f), *was = copy_of(x, n_all * sizeof *x);
        uint8_t *mask = must_alloc(n_all);
        for (size_t i = 0; i < n_all; i++) mask[i] = random_bits(i) & 1;
        o->mask_backward(x, mask, (size_t)N, C);
        for (size_t i = 0; i < n_all; i++) assert_true(x[i] == (mask[i] ? was[i] : 0));
        free(x), free(was), free(mask);
    }
}

// One thread and three give the same bits (three do not divide anything here).
static void test_threads(void **state) {
    (void)state;
    enum { N = 131, C = 208, V = 301 };
    const size_t n_all = (size_t)N * C;
    floatX *x = new_x(2 * n_all, 2.0f), *d = new_x(n_all, 1.0f), *w = new_x(C, 1.0f),
           *table = new_x((size_t)V * C, 1.0f);
    float *z = new_f32((size_t)N * V, 5.0f);
    int32_t tokens[N];
    for (int n = 0; n < N; n++) tokens[n] = (int)(random_bits((uint64_t)n) % V);
    struct {
        floatX *a, *b, *c, *e, *f, *g;
        float *rstd, *dw, *dtable, *losses;
    } r[2];
    for (int k = 0; k < 2; k++) {
        set_threads(k ? 3 : 1);
        r[k].a = copy_of(x, n_all * sizeof *x), r[k].b = copy_of(x, n_all * sizeof *x);
        r[k].c = copy_of(x, n_all * sizeof *x);
        r[k].e = copy_of(x, 2 * n_all * sizeof *x), r[k].f = copy_of(x, n_all * sizeof *x),
        r[k].g = new_x((size_t)N * V, 1.0f);
        r[k].rstd = must_alloc(N * sizeof(float)), r[k].losses = must_alloc(N * sizeof(float));
        r[k].dw = calloc(C, sizeof(float)), r[k].dtable = calloc((size_t)V * C, sizeof(float));
        o->rmsnorm_fq_forward(r[k].a, r[k].b, r[k].rstd, NULL, x, d, w, N, C, 1e-5f, &acts[0]);
        o->rmsnorm_backward(r[k].c, r[k].dw, d, NULL, x, w, r[k].rstd, N, C);
        o->embedding_backward(r[k].dtable, d, tokens, N, C, V);
        o->swiglu_fq_forward(r[k].f, NULL, x, N, C, &acts[0]);
        o->swiglu_backward(r[k].e, d, NULL, r[k].e, N, C);
        o->classifier(r[k].losses, r[k].g, z, tokens, N, V);
    }
    set_threads(2);
    expect_same(r[1].a, r[0].a, n_all * sizeof *x, "res", N, C);
    expect_same(r[1].b, r[0].b, n_all * sizeof *x, "y", N, C);
    expect_same(r[1].c, r[0].c, n_all * sizeof *x, "dres", N, C);
    expect_same(r[1].dw, r[0].dw, C * sizeof(float), "dweight", N, C);
    expect_same(r[1].dtable, r[0].dtable, (size_t)V * C * sizeof(float), "dwte", N, C);
    expect_same(r[1].f, r[0].f, n_all * sizeof *x, "swiglu", N, C);
    expect_same(r[1].e, r[0].e, 2 * n_all * sizeof *x, "swiglu_backward", N, C);
    expect_same(r[1].losses, r[0].losses, N * sizeof(float), "losses", N, V);
    expect_same(r[1].g, r[0].g, (size_t)N * V * sizeof *x, "dlogits", N, V);
    for (int k = 0; k < 2; k++) {
        free(r[k].a), free(r[k].b), free(r[k].c), free(r[k].e), free(r[k].f), free(r[k].g);
        free(r[k].rstd), free(r[k].losses), free(r[k].dw), free(r[k].dtable);
    }
    free(x), free(d), free(w), free(table), free(z);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_exp),
    cmocka_unit_test(test_exp2),
    cmocka_unit_test(test_log),
    cmocka_unit_test(test_lanes),
    cmocka_unit_test(test_embedding),
    cmocka_unit_test(test_rmsnorm_forward),
    cmocka_unit_test(test_rmsnorm_backward),
    cmocka_unit_test(test_rope),
    cmocka_unit_test(test_swiglu),
    cmocka_unit_test(test_classifier),
    cmocka_unit_test(test_loss_accumulate),
    cmocka_unit_test(test_fakequant),
    cmocka_unit_test(test_mask_backward),
    cmocka_unit_test(test_threads),
};
TEST_MAIN(tests)
