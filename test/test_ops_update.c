// Weights in the CPU wing: updates, their fake quantization, packed codes, and the state of a step.
#include "ops_common.h"

static const Ops *const o = &ops_cpu;

#define SPEC(b, uns, lo, hi, g, group_, b0, b1, map, zp, e) \
    {.bits = b, .is_unsigned = uns, .qmin = lo, .qmax = hi, .gran = g, .group = group_, .block = {b0, b1}, \
     .mapping = map, .zero = zp, .eps = e}
#define TINY 0x1p-126f
static const QuantSpec specs[] = {
    SPEC(4, 0, -8, 7, QG_GROUP, 32, 0, 0, QM_SYMMETRIC, QZ_INT, TINY),            // 8da4w
    SPEC(8, 0, -128, 127, QG_CHANNEL, 0, 0, 0, QM_SYMMETRIC, QZ_INT, TINY),       // int8wo: works as codes
    SPEC(4, 1, 0, 15, QG_GROUP, 32, 0, 0, QM_ASYMMETRIC, QZ_FLOAT, 1e-6f),        // int4wo
    SPEC(3, 0, -4, 3, QG_GROUP, 32, 0, 0, QM_SYMMETRIC, QZ_INT, TINY),
    SPEC(4, 0, -8, 7, QG_GROUP, 64, 0, 0, QM_SYMMETRIC_NO_CLIP, QZ_INT, TINY),
    SPEC(8, 0, -127, 127, QG_TENSOR, 0, 0, 0, QM_SYMMETRIC, QZ_INT, TINY),
    SPEC(5, 0, -16, 15, QG_BLOCK, 0, 2, 16, QM_SYMMETRIC, QZ_INT, TINY),
    SPEC(6, 1, 0, 63, QG_GROUP, 48, 0, 0, QM_ASYMMETRIC, QZ_INT, TINY),
    SPEC(2, 0, -2, 1, QG_GROUP, 2, 0, 0, QM_SYMMETRIC, QZ_INT, TINY),
    SPEC(7, 0, -64, 63, QG_CHANNEL, 0, 0, 0, QM_SYMMETRIC, QZ_INT, TINY),
    SPEC(4, 0, -8, 7, QG_CHANNEL, 0, 0, 0, QM_SYMMETRIC, QZ_INT, TINY),
    SPEC(8, 1, 0, 255, QG_CHANNEL, 0, 0, 0, QM_ASYMMETRIC, QZ_INT, TINY),
    SPEC(4, 1, 0, 15, QG_TENSOR, 0, 0, 0, QM_ASYMMETRIC, QZ_FLOAT, 1e-6f),
    SPEC(4, 0, -8, 7, QG_BLOCK, 0, 4, 3, QM_ASYMMETRIC, QZ_INT, TINY),
    SPEC(4, 1, 0, 15, QG_GROUP, 6, 0, 0, QM_SYMMETRIC, QZ_INT, TINY),
    SPEC(3, 1, 0, 7, QG_GROUP, 16, 0, 0, QM_ASYMMETRIC, QZ_FLOAT, 1e-6f),
    {.bits = 0},
};
#define N_SPECS (sizeof specs / sizeof *specs)
static const int weights[][2] = {{1, 1},  {1, 32},  {2, 6},    {4, 96},   {8, 48},
                                 {3, 17}, {6, 576}, {48, 576}, {4, 2048}, {1, 576}};
#define N_WEIGHTS (sizeof weights / sizeof *weights)

// What weight_fq should write, by quant.h's scalars: codes, their block's parameters, working values, row scales.
typedef struct { int16_t *codes; QParams *qp; float *scale, *zero; floatX *work; float *wscale; uint8_t *inside; } Want;

static bool want_new(Want *w, const float *master, const QuantSpec *s, int rows, int cols) {
    size_t n = (size_t)rows * (size_t)cols;
    int64_t block[2] = {1, 1};
    if (s->bits && quant_block_shape(s, rows, cols, block, NULL) < 0) return false;
    float *w16 = must_alloc(n * sizeof *w16);
    for (size_t i = 0; i < n; i++) w16[i] = bf16_round(master[i]);
    *w = (Want){.codes = must_alloc(n * 2), .qp = must_alloc(n * sizeof(QParams)),
                .scale = must_alloc(n * sizeof(float)),
                .zero = must_alloc(n * sizeof(float)), .work = must_alloc(n * sizeof(floatX)),
                .wscale = must_alloc((size_t)rows * sizeof(float)), .inside = must_alloc(n)};
    if (s->bits) assert_int_equal(quant_tensor(w->codes, w->qp, w16, rows, cols, s, QD_BF16, NULL), 0);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) {
            size_t i = (size_t)(r * cols + c), b = (size_t)(r / block[0] * (cols / block[1]) + c / block[1]);
            w->inside[i] = 1;
            w->wscale[r] = 1.0f;
            if (!s->bits) {
                w->work[i] = f2x(master[i]);
                continue;
            }
            float u = quant_unclamped(w16[i], w->qp[b], s, QD_BF16);
            w->inside[i] = u >= (float)s->qmin && u <= (float)s->qmax;
            w->scale[b] = w->qp[b].scale;
            w->zero[b] = w->qp[b].zp;
            if (quant_works_as_codes(s)) w->wscale[r] = w->qp[b].scale;
            w->work[i] = f2x(quant_works_as_codes(s) ? (float)w->codes[i]
                                                     : quant_dequant((float)w->codes[i], w->qp[b], s, QD_BF16));
        }
    free(w16);
    return true;
}
static void want_free(Want *w) {
    free(w->codes), free(w->qp), free(w->scale), free(w->zero), free(w->work), free(w->wscale), free(w->inside);
}

static void expect_x(const floatX *got, const floatX *want, size_t n, const char *what) {
    for (size_t i = 0; i < n; i++) expect_same_f32(x2f(got[i]), x2f(want[i]), what, i);
}

static void test_weight_fq(void **state) {
    (void)state;
    for (size_t k = 0; k < N_WEIGHTS; k++) {
        int rows = weights[k][0], cols = weights[k][1];
        size_t n = (size_t)rows * (size_t)cols;
        for (int kind = 0; kind < 4; kind++) {
            float *master = new_f32(n, 0.1f);
            for (size_t i = 0; i < n; i++) {
                if (kind == 1 && (i / 32) % 2) master[i] = i % 2 ? 0.0f : -0.0f;
                if (kind == 2 && i % 11 == 4) master[i] = i % 3 ? NAN : -INFINITY;
                if (kind == 3) master[i] = f32_from_bits(random_bits(i) & 0x807fffffu);
            }
            for (size_t q = 0; q < N_SPECS; q++) {
                Want w;
                if (!want_new(&w, master, &specs[q], rows, cols)) continue;
                floatX *work = must_alloc(n * sizeof *work);
                float *wscale = must_alloc((size_t)rows * sizeof *wscale), *grad = new_f32(n, 1.0f),
                      *grad0 = copy_of(grad, n * sizeof *grad);
                o->weight_fq(work, wscale, master, &specs[q], rows, cols);
                expect_x(work, w.work, n, "working value");
                expect_same(wscale, w.wscale, (size_t)rows * sizeof *wscale, "row scale", rows, cols);
                o->weight_fq(work, NULL, master, &specs[q], rows, cols);
                expect_x(work, w.work, n, "working value without row scale");
                o->weight_ste_mask(grad, master, &specs[q], rows, cols);
                for (size_t i = 0; i < n; i++)
                    expect_same_f32(grad[i], w.inside[i] ? grad0[i] : 0.0f, "masked gradient", i);
                if (specs[q].bits) {
                    size_t bytes = quant_row_bytes(specs[q].bits, cols);
                    uint8_t *packed = must_alloc((size_t)rows * bytes);
                    for (int r = 0; r < rows; r++)
                        quant_pack_row(packed + (size_t)r * bytes, w.codes + (size_t)(r * cols), cols, specs[q].bits);
                    const float *zero = quant_has_zero(&specs[q]) ? w.zero : NULL;
                    o->dequant_rows(work, wscale, packed, w.scale, zero, &specs[q], rows, cols);
                    expect_x(work, w.work, n, "unpacked working value");
                    expect_same(wscale, w.wscale, (size_t)rows * sizeof *wscale, "unpacked row scale", rows, cols);
                    free(packed);
                }
                free(work), free(wscale), free(grad), free(grad0);
                want_free(&w);
            }
            free(master);
        }
    }
    o->weight_fq(&(floatX){0}, NULL, &(float){1.0f}, NULL, 1, 1);     // no spec at all
}

// The update written once more, one element at a time, in the order of ops.h.
static void adamw_twin(float *p, float *m, float *v, float g, const StepState *s, const AdamWParams *h) {
    float lr = s->lr, bc1 = 1.0f - powf((float)h->beta1, (float)s->t), bc2 = 1.0f - powf((float)h->beta2, (float)s->t);
    g = g * s->grad_scale;
    *p = *p - (lr * (float)h->weight_decay) * *p;
    *m = *m + (float)(1.0 - h->beta1) * (g - *m);
    *v = *v + (float)(1.0 - h->beta2) * (g * g - *v);
    float den = sqrtf(*v) / sqrtf(bc2) + (float)h->eps;
    *p = *p - (lr * (*m / bc1)) / den;
}

static void test_adamw(void **state) {
    (void)state;
    const AdamWParams h = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1};
    for (size_t k = 0; k < N_WEIGHTS; k++) {
        int rows = weights[k][0], cols = weights[k][1];
        size_t n = (size_t)rows * (size_t)cols;
        for (size_t q = 0; q < N_SPECS; q++) {
            int64_t block[2];
            if (specs[q].bits && quant_block_shape(&specs[q], rows, cols, block, NULL) < 0) continue;
            float *p = new_f32(n, 0.1f), *m = calloc(n, sizeof *m), *v = calloc(n, sizeof *v),
                  *grad = new_f32(n, 10.0f);
            float *p2 = copy_of(p, n * sizeof *p), *m2 = calloc(n, sizeof *m2), *v2 = calloc(n, sizeof *v2);
            floatX *work = must_alloc(n * sizeof *work);
            float *wscale = must_alloc((size_t)rows * sizeof *wscale);
            for (int t = 1; t <= 3; t++) {
                StepState s = {.t = t, .lr = 1e-2f / (float)t, .grad_scale = 0.37f, .skip = 0};
                o->adamw_fq(p, m, v, work, wscale, grad, &s, &h, &specs[q], rows, cols);
                for (size_t i = 0; i < n; i++) adamw_twin(&p2[i], &m2[i], &v2[i], grad[i], &s, &h);
                expect_same(p, p2, n * sizeof *p, "master", rows, cols);
                expect_same(m, m2, n * sizeof *m, "first moment", rows, cols);
                expect_same(v, v2, n * sizeof *v, "second moment", rows, cols);
                Want w;
                assert_true(want_new(&w, p, &specs[q], rows, cols));
                expect_x(work, w.work, n, "working value after the update");
                expect_same(wscale, w.wscale, (size_t)rows * sizeof *wscale, "row scale after the update", rows, cols);
                want_free(&w);
                fill_f32(grad, n, 1.0f);
            }
            // A skipped step leaves all as it is.
            StepState skip = {.t = 4, .lr = 1.0f, .grad_scale = 1.0f, .skip = 1};
            floatX *work0 = copy_of(work, n * sizeof *work);
            grad[0] = NAN;
            o->adamw_fq(p, m, v, work, wscale, grad, &skip, &h, &specs[q], rows, cols);
            expect_same(p, p2, n * sizeof *p, "master of a skipped step", rows, cols);
            expect_same(m, m2, n * sizeof *m, "moment of a skipped step", rows, cols);
            expect_same(work, work0, n * sizeof *work, "working value of a skipped step", rows, cols);
            free(p), free(m), free(v), free(grad), free(p2), free(m2), free(v2), free(work), free(work0), free(wscale);
        }
    }
}

// The first step of numerics' example: p = 1, g = 0.5, defaults.
static void test_adamw_example(void **state) {
    (void)state;
    const AdamWParams h = {.beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0.01};
    StepState s = {.t = 1, .lr = 1e-3f, .grad_scale = 1.0f};
    float p = 1.0f, m = 0.0f, v = 0.0f, g = 0.5f;
    floatX work;
    o->adamw_fq(&p, &m, &v, &work, NULL, &g, &s, &h, NULL, 1, 1);
    assert_int_equal(f32_bits(p), 0x3f7fbdcf);
    assert_true(m == 0.05f && v == 0.000250000012f && work == f2x(p));
}

static void test_sgd(void **state) {
    (void)state;
    const float momentum = 0.9f, wd = 1e-2f;
    for (size_t k = 0; k < N_WEIGHTS; k++) {
        int rows = weights[k][0], cols = weights[k][1];
        size_t n = (size_t)rows * (size_t)cols;
        const QuantSpec *spec = &specs[cols % 32 ? N_SPECS - 1 : k % 4];
        float *p = new_f32(n, 0.1f), *buf = calloc(n, sizeof *buf), *p2 = copy_of(p, n * sizeof *p);
        float *buf2 = calloc(n, sizeof *buf2);
        floatX *work = must_alloc(n * sizeof *work);
        for (int t = 1; t <= 3; t++) {
            StepState s = {.t = t, .lr = 1e-2f, .grad_scale = 0.5f, .skip = t == 3};
            float *grad = new_f32(n, 1.0f);
            o->sgd_fq(p, buf, work, NULL, grad, &s, momentum, wd, spec, rows, cols);
            for (size_t i = 0; i < n && !s.skip; i++) {
                buf2[i] = momentum * buf2[i] + (grad[i] * s.grad_scale + wd * p2[i]);
                p2[i] = p2[i] - s.lr * buf2[i];
            }
            expect_same(p, p2, n * sizeof *p, "master", rows, cols);
            expect_same(buf, buf2, n * sizeof *buf, "momentum", rows, cols);
            Want w;
            assert_true(want_new(&w, p, spec, rows, cols));
            expect_x(work, w.work, n, "working value");
            want_free(&w);
            free(grad);
        }
        free(p), free(buf), free(p2), free(buf2), free(work);
    }
}

static void norm_of(StepState *s, const float *grad, size_t n, float max_norm) {
    s->grad_squares = 0.0;
    o->sum_squares(s, grad, n);
    o->global_norm(s, max_norm);
}

static void test_global_norm(void **state) {
    (void)state;
    static const size_t sizes[] = {1, 17, 65536, 65537, 300001};
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        size_t n = sizes[k];
        float *g = new_f32(n, 3.0f);
        double sum = 0.0;
        for (size_t i = 0; i < n; i++) sum += (double)g[i] * (double)g[i];
        StepState s = {.loss_sum = 5.0, .tokens = 7};
        norm_of(&s, g, n, 0.0f);
        // Double sums of positive terms: n 2^-53 relative, far below the one rounding to f32.
        expect_near((double)s.norm, sqrt(sum) / 7.0, sqrt(sum) / 7.0 * 1.01 * U32, "norm", k);
        expect_near((double)s.grad_scale, 1.0 / 7.0, U32 / 7.0, "scale without clipping", k);
        assert_int_equal(s.skip, 0);
        norm_of(&s, g, n, s.norm * 0.5f);
        expect_near((double)s.grad_scale, 0.5 / 7.0, U32 / 7.0, "scale with clipping", k);
        norm_of(&s, g, n, s.norm * 2.0f);
        expect_near((double)s.grad_scale, 1.0 / 7.0, U32 / 7.0, "scale below the bound", k);
        StepState one = s, two = s;
        set_threads(1);
        norm_of(&one, g, n, 1.0f);
        set_threads(3);
        norm_of(&two, g, n, 1.0f);
        set_threads(2);
        assert_memory_equal(&one, &two, sizeof one);
        g[n / 2] = INFINITY;
        norm_of(&s, g, n, 1.0f);
        assert_int_equal(s.skip, 1);
        g[n / 2] = NAN;
        norm_of(&s, g, n, 1.0f);
        assert_int_equal(s.skip, 1);
        g[n / 2] = 1.0f;
        norm_of(&s, g, n, 1.0f);
        assert_int_equal(s.skip, 0);
        s.tokens = 0;
        norm_of(&s, g, n, 1.0f);
        assert_int_equal(s.skip, 1);
        s.tokens = 7, s.loss_sum = NAN;
        norm_of(&s, g, n, 1.0f);
        assert_int_equal(s.skip, 1);
        free(g);
    }
    StepState zero = {.tokens = 2};
    norm_of(&zero, &(float){0.0f}, 1, 1.0f);       // no gradient at all is no reason to skip
    assert_true(zero.norm == 0.0f && zero.skip == 0 && zero.grad_scale == 0.5f);
}

static void test_qmatvec(void **state) {
    (void)state;
    for (size_t k = 0; k < N_WEIGHTS; k++) {
        int rows = weights[k][0], cols = weights[k][1];
        size_t n = (size_t)rows * (size_t)cols;
        float *master = new_f32(n, 0.1f);
        for (size_t q = 0; q < N_SPECS; q++) {
            const QuantSpec *s = &specs[q];
            Want w;
            if (!s->bits || !want_new(&w, master, s, rows, cols)) continue;
            int64_t block[2];
            quant_block_shape(s, rows, cols, block, NULL);
            size_t bytes = quant_row_bytes(s->bits, cols);
            uint8_t *packed = must_alloc((size_t)rows * bytes);
            for (int r = 0; r < rows; r++)
                quant_pack_row(packed + (size_t)r * bytes, w.codes + (size_t)(r * cols), cols, s->bits);
            for (int N = 1; N <= 9; N += N < 4 ? 1 : 5) {
                floatX *x = new_x((size_t)(N * cols), 1.0f), *y = new_x((size_t)(N * rows), 1.0f),
                       *alone = new_x((size_t)rows, 1.0f);
                const float *zero = quant_has_zero(s) ? w.zero : NULL;
                o->qmatvec_forward(y, x, packed, w.scale, zero, s, (size_t)N, cols, rows);
                for (int t = 0; t < N; t++)
                    for (int r = 0; r < rows; r++) {
                        double want = 0.0, size = 0.0;
                        for (int c = 0; c < cols; c++) {
                            size_t b = (size_t)(r / block[0] * (cols / block[1]) + c / block[1]);
                            double code = (double)w.codes[r * cols + c], scale = (double)w.scale[b],
                                   xv = (double)x2f(x[t * cols + c]);
                            double value = s->zero == QZ_FLOAT
                                               ? (code - (double)quant_mid(s)) * scale + (double)w.zero[b]
                                               : (code - (double)w.zero[b]) * scale;
                            want += value * xv;
                            // The float domain sums (code - mid) * scale and zero apart, so both count.
                            size += fabs(xv) * (s->zero != QZ_FLOAT ? fabs(value)
                                                                    : fabs(code - (double)quant_mid(s)) * scale +
                                                                          fabs((double)w.zero[b]));
                        }
                        expect_near((double)x2f(y[t * rows + r]), want,
                                    cols * 2 * U32 * size + 6 * U32 * size + fabs(want) * UX * 1.001, "qmatvec",
                                    (size_t)(t * rows + r));
                    }
                // A token's bits do not depend on its company.
                o->qmatvec_forward(alone, x + (N - 1) * cols, packed, w.scale, zero, s, 1, cols, rows);
                expect_same(y + (N - 1) * rows, alone, (size_t)rows * sizeof *y, "qmatvec of one token", rows, cols);
                free(x), free(y), free(alone);
            }
            free(packed);
            want_free(&w);
        }
        free(master);
    }
}

static void test_threads(void **state) {
    (void)state;
    enum { R = 66, C = 288, N = R * C };
    const AdamWParams h = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1};
    const StepState s = {.t = 2, .lr = 1e-2f, .grad_scale = 0.37f};
    float *p0 = new_f32(N, 0.1f), *g = new_f32(N, 1.0f);
    for (size_t q = 0; q < N_SPECS; q++) {
        int64_t block[2];
        if (specs[q].bits && quant_block_shape(&specs[q], R, C, block, NULL) < 0) continue;
        floatX *work[2];
        float *p[2];
        for (int k = 0; k < 2; k++) {
            float *m = calloc(N, sizeof *m), *v = calloc(N, sizeof *v);
            p[k] = copy_of(p0, N * sizeof(float));
            work[k] = must_alloc(N * sizeof(floatX));
            set_threads(k ? 3 : 1);
            o->adamw_fq(p[k], m, v, work[k], NULL, g, &s, &h, &specs[q], R, C);
            free(m), free(v);
        }
        set_threads(2);
        expect_same(p[1], p[0], N * sizeof(float), "master", R, C);
        expect_same(work[1], work[0], N * sizeof(floatX), "working value", R, C);
        free(p[0]), free(p[1]), free(work[0]), free(work[1]);
    }
    free(p0), free(g);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_weight_fq),
    cmocka_unit_test(test_adamw),
    cmocka_unit_test(test_adamw_example),
    cmocka_unit_test(test_sgd),
    cmocka_unit_test(test_global_norm),
    cmocka_unit_test(test_qmatvec),
    cmocka_unit_test(test_threads),
};
TEST_MAIN(tests)
