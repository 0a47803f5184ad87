// The linears with INT8 weights. Integer products against a scalar reference, bit for bit: integers are exact and the
// f32 expressions around them are fixed. Weight-only products against the same linear on the codes as X.
#include "matmul_common.h"
#include "optimizer.h"
#include <limits.h>

static const int thread_counts[] = {1, 2, 3, 6};

static int8_t *random_codes(size_t n) {
    int8_t *p = xmalloc(n);
    for (size_t i = 0; i < n; i++) {
        state = state * 1664525u + 1013904223u;
        p[i] = (int8_t)(state >> 24);                           // -128 among them
    }
    return p;
}

static float *random_scales(int n) {
    float *p = xmalloc((size_t)n * sizeof *p);
    for (int i = 0; i < n; i++) p[i] = 0.001f * (1.0f + fabsf(uniform()));
    return p;
}

static void expect_same(const void *got, const void *want, size_t n, size_t size, const char *what, const int shape[3],
                        int threads) {
    if (!memcmp(got, want, n * size)) return;
    size_t i = 0;
    while (!memcmp((const char *)got + i * size, (const char *)want + i * size, size)) i++;
    float g, w;
    if (size == 4) {
        memcpy(&g, (const char *)got + i * 4, 4);
        memcpy(&w, (const char *)want + i * 4, 4);
    } else {
        g = bf16_to_f32(((const bf16 *)got)[i]);
        w = bf16_to_f32(((const bf16 *)want)[i]);
    }
    fail_msg("%s of N %d, C %d, OC %d with %d threads: element %zu is %.9g, expected %.9g", what, shape[0], shape[1],
             shape[2], threads, i, (double)g, (double)w);
}

// ---------------------------------------------------------------------------------------------
// The reference: a step at a time, as ops.h states it.

// n values `step` apart, times mul where given: their codes; returns their scale.
static float quantize(int8_t *codes, const floatX *x, size_t step, const float *mul, int n) {
    float amax = 0;
    for (int i = 0; i < n; i++) {
        float v = x2f(x[(size_t)i * step]);
        if (mul) v *= mul[i];
        if (fabsf(v) > amax) amax = fabsf(v);
    }
    float scale = int8_row_scale(amax), inv = int8_row_inv(scale);
    for (int i = 0; i < n; i++) {
        float v = x2f(x[(size_t)i * step]);
        if (mul) v *= mul[i];
        codes[i] = int8_nearest(v, inv);
    }
    return scale;
}

// f32 of the sum of n products, in pieces of 2^16.
static float dot(const int8_t *a, const int8_t *b, size_t step_b, int n) {
    float total = 0;
    for (int p = 0; p < n; p += 65536) {
        int64_t sum = 0;
        for (int i = p; i < n && i < p + 65536; i++) sum += a[i] * b[(size_t)i * step_b];
        assert_true(sum >= INT_MIN && sum <= INT_MAX);
        total = p ? total + (float)sum : (float)sum;
    }
    return total;
}

typedef struct { floatX *y, *dx; float *y32, *dw, *dw2; } Results;

// Aligned as device memory is: large results are then written past the caches.
static float *aligned_f32(size_t n) {
    float *p = aligned_alloc(64, (n * sizeof *p + 63) / 64 * 64);
    assert_non_null(p);
    memset(p, 0, n * sizeof *p);
    return p;
}

static Results new_results(size_t nx, size_t nw, size_t ny) {
    Results r = {xcalloc(ny, sizeof(floatX)), xcalloc(nx, sizeof(floatX)), aligned_f32(ny), aligned_f32(nw),
                 aligned_f32(nw)};
    for (size_t i = 0; i < nw; i++) r.dw2[i] = r.dw[i] = 0.5f;      // overwritten, added to
    return r;
}
static void free_results(Results *r) { free(r->y); free(r->dx); free(r->y32); free(r->dw); free(r->dw2); }

static void reference(Results *r, const floatX *x, const floatX *dy, const int8_t *codes, const float *wscale, int N,
                      int C, int OC) {
    int most = N > C ? N : C;
    size_t width = (size_t)(most > OC ? most : OC);
    int8_t *row = xmalloc(width), *cols = xmalloc((size_t)C * (size_t)N);
    float *sx = xmalloc((size_t)C * sizeof *sx);
    for (size_t n = 0; n < (size_t)N; n++) {
        float s = quantize(row, x + n * (size_t)C, 1, NULL, C);
        for (size_t o = 0; o < (size_t)OC; o++) {
            float v = (dot(row, codes + o * (size_t)C, 1, C) * s) * wscale[o];
            r->y[n * (size_t)OC + o] = f2x(v);
            r->y32[n * (size_t)OC + o] = v;
        }
        s = quantize(row, dy + n * (size_t)OC, 1, wscale, OC);
        for (size_t c = 0; c < (size_t)C; c++)
            r->dx[n * (size_t)C + c] = f2x(dot(row, codes + c, (size_t)C, OC) * s);
    }
    for (size_t c = 0; c < (size_t)C; c++) sx[c] = quantize(cols + c * (size_t)N, x + c, (size_t)C, NULL, N);
    for (size_t o = 0; o < (size_t)OC; o++) {
        float s = quantize(row, dy + o, (size_t)OC, NULL, N);
        for (size_t c = 0; c < (size_t)C; c++) {
            float v = (dot(row, cols + c * (size_t)N, 1, N) * s) * sx[c];
            r->dw[o * (size_t)C + c] = v;
            r->dw2[o * (size_t)C + c] = 0.5f + v;
        }
    }
    free(row); free(cols); free(sx);
}

static void run_all(Results *r, const floatX *x, const floatX *dy, const int8_t *codes, const float *wscale, int N,
                    int C, int OC) {
    size_t n = (size_t)N;
    ops->linear_i8_forward(r->y, x, codes, wscale, n, C, OC);
    ops->linear_i8_forward_f32(r->y32, x, codes, wscale, n, C, OC);
    ops->linear_i8_backward_input(r->dx, dy, codes, wscale, n, C, OC);
    ops->linear_i8_backward_weight(r->dw, dy, x, n, C, OC, false);
    ops->linear_i8_backward_weight(r->dw2, dy, x, n, C, OC, true);
    check_device();
}

static void check(const floatX *x, const floatX *dy, const int8_t *codes, const float *wscale, const int shape[3]) {
    int N = shape[0], C = shape[1], OC = shape[2];
    size_t nx = (size_t)N * (size_t)C, nw = (size_t)OC * (size_t)C, ny = (size_t)N * (size_t)OC;
    Results want = new_results(nx, nw, ny);
    reference(&want, x, dy, codes, wscale, N, C, OC);
    for (size_t t = 0; t < sizeof thread_counts / sizeof *thread_counts; t++) {
        Results got = new_results(nx, nw, ny);
        set_threads(thread_counts[t]);
        run_all(&got, x, dy, codes, wscale, N, C, OC);
        expect_same(got.y, want.y, ny, sizeof(floatX), "y", shape, thread_counts[t]);
        expect_same(got.y32, want.y32, ny, 4, "y f32", shape, thread_counts[t]);
        expect_same(got.dx, want.dx, nx, sizeof(floatX), "dx", shape, thread_counts[t]);
        expect_same(got.dw, want.dw, nw, 4, "dw", shape, thread_counts[t]);
        expect_same(got.dw2, want.dw2, nw, 4, "dw accumulated", shape, thread_counts[t]);
        free_results(&got);
    }
    free_results(&want);
}

static const int shapes[][3] = {                                // N, C, OC
    {1, 1, 1}, {1, 64, 33}, {2, 6, 5}, {3, 7, 9}, {5, 1, 3}, {17, 31, 64}, {64, 64, 64}, {65, 80, 130}, {97, 96, 48},
    {130, 576, 65}, {33, 1536, 72}, {600, 34, 40}, {7, 48, 1000}, {3, 530, 1}, {17, 63, 5}, {190, 66, 1100},
    {1100, 20, 70}, {12, 1090, 20},
};
#define N_SHAPES (sizeof shapes / sizeof *shapes)

static void test_integer_reference(void **unused) {
    (void)unused;
    state = 1;
    for (size_t i = 0; i < N_SHAPES; i++) {
        size_t N = (size_t)shapes[i][0], C = (size_t)shapes[i][1], OC = (size_t)shapes[i][2];
        floatX *x = random_x(N * C, 3), *dy = random_x(N * OC, 0.01f);
        int8_t *codes = random_codes(OC * C);
        float *wscale = random_scales(shapes[i][2]);
        check(x, dy, codes, wscale, shapes[i]);
        free(x); free(dy); free(codes); free(wscale);
    }
}

// Rows and columns of zeros, of one value, with NaN and infinity, so small that the scale is below its floor; a weight
// row of zeros, of -128, of scale 0. An infinite row decodes to NaN: what NaN's sign is depends on the processor's
// choice of operand, so those elements are only asked to be NaN.
static void test_hard_rows(void **unused) {
    (void)unused;
    state = 2;
    static const int shape[3] = {21, 70, 50};
    const int N = shape[0], C = shape[1], OC = shape[2];
    floatX *x = random_x((size_t)(N * C), 1), *dy = random_x((size_t)(N * OC), 1);
    int8_t *codes = random_codes((size_t)(OC * C));
    float *wscale = random_scales(OC);
    memset(codes, 0, (size_t)C);
    memset(codes + C, -128, (size_t)C);
    wscale[2] = 0;
    for (int c = 0; c < C; c++) {
        x[0 * C + c] = f2x(0);
        x[1 * C + c] = f2x(-0.7f);
        x[2 * C + c] = f2x(1e-14f * uniform());
        x[3 * C + c] = f2x(1e30f * uniform());
        if (c % 3) x[4 * C + c] = f2x(NAN);
        x[5 * C + c] = f2x(NAN);
    }
    for (int n = 0; n < N; n++) {
        x[n * C + 7] = f2x(0);
        dy[n * OC + 3] = f2x(0);
        dy[n * OC + 4] = f2x(0.25f);
        dy[n * OC + 5] = f2x(NAN);
    }
    for (int o = 0; o < OC; o++) {
        dy[0 * OC + o] = f2x(0);
        if (o % 2) dy[1 * OC + o] = f2x(NAN);
    }
    check(x, dy, codes, wscale, shape);

    x[6 * C + 9] = f2x(INFINITY);
    dy[6 * OC + 9] = f2x(-INFINITY);
    Results r = new_results((size_t)(N * C), (size_t)(OC * C), (size_t)(N * OC));
    set_threads(2);
    run_all(&r, x, dy, codes, wscale, N, C, OC);
    for (int i = 0; i < N * OC; i++) assert_true(isnan(x2f(r.y[i])) == (i / OC == 6));
    for (int i = 0; i < N * C; i++) assert_true(isnan(x2f(r.dx[i])) == (i / C == 6));
    for (int i = 0; i < OC * C; i++) assert_true(isnan(r.dw[i]) == (i / C == 9 || i % C == 9));
    free_results(&r);
    free(x); free(dy); free(codes); free(wscale);
}

// A row's bits do not depend on the rows beside it.
static void test_integer_rows_independent(void **unused) {
    (void)unused;
    state = 3;
    static const int counts[] = {1, 2, 3, 4, 5, 6, 7, 8, 13, 16, 17, 64, 95, 96, 97, 130};
    enum { N = 130, C = 96, OC = 200 };
    floatX *x = random_x(N * C, 1), *dy = random_x(N * OC, 1);
    int8_t *codes = random_codes(OC * C);
    float *wscale = random_scales(OC);
    static floatX y[2][N * OC], dx[2][N * C];
    set_threads(1);
    ops->linear_i8_forward(y[0], x, codes, wscale, N, C, OC);
    ops->linear_i8_backward_input(dx[0], dy, codes, wscale, N, C, OC);
    set_threads(3);
    for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) {
        size_t n = (size_t)counts[k];
        ops->linear_i8_forward(y[1], x, codes, wscale, n, C, OC);
        ops->linear_i8_backward_input(dx[1], dy, codes, wscale, n, C, OC);
        assert_memory_equal(y[1], y[0], n * OC * sizeof **y);
        assert_memory_equal(dx[1], dx[0], n * C * sizeof **dx);
    }
    check_device();
    free(x); free(dy); free(codes); free(wscale);
}

// Sums of more than 2^16 products, in pieces: of channels (forward), of output channels (input gradient), of tokens
// (weight gradient). One of them fills an int32 sum to its edge. The last is a head: results larger than the caches,
// and a weight that blocks pack for themselves.
static void test_long_sums(void **unused) {
    (void)unused;
    state = 4;
    static const int long_shapes[][3] = {{12, 140003, 3}, {3, 2, 70001}, {65536 * 2 + 5, 3, 18}, {30, 32, 140000}};
    for (int i = 0; i < 4; i++) {
        size_t N = (size_t)long_shapes[i][0], C = (size_t)long_shapes[i][1], OC = (size_t)long_shapes[i][2];
        floatX *x = random_x(N * C, 3), *dy = random_x(N * OC, 0.01f);
        int8_t *codes = random_codes(OC * C);
        float *wscale = random_scales(long_shapes[i][2]);
        // One sign: sums beyond 2^24, which become f32 with a rounding, so that it shows where they are cut.
        for (size_t k = 0; k < N * C; k++) x[k] = f2x(fabsf(x2f(x[k])));
        for (size_t k = 0; k < N * OC; k++) dy[k] = f2x(fabsf(x2f(dy[k])));
        for (size_t k = 0; k < OC * C; k++) codes[k] &= 127;
        if (!i) {
            for (size_t c = 0; c < C; c++) x[c] = f2x(1);
            memset(codes, -128, C);
        }
        check(x, dy, codes, wscale, long_shapes[i]);
        free(x); free(dy); free(codes); free(wscale);
    }
}

// Forward: the bits of the linear in X. The input gradient too, but that of a head is summed in pieces of 4096: there
//   |computed - exact| <= U |exact| + (OC + 2) 2^-23 sum |dy * wscale * code|
// with one rounding to X, and at most one f32 rounding for each product and each addition.
static void test_weight_only(void **unused) {
    (void)unused;
    state = 5;
    static const int more[][3] = {{9, 64, 9000}, {20, 576, 4800}, {40, 16, 110000}};
    for (size_t i = 0; i < N_SHAPES + 3; i++) {
        const int *shape = i < N_SHAPES ? shapes[i] : more[i - N_SHAPES];
        int C = shape[1], OC = shape[2];
        size_t N = (size_t)shape[0], nx = N * (size_t)C, nw = (size_t)OC * (size_t)C, ny = N * (size_t)OC;
        floatX *x = random_x(nx, 3), *dy = random_x(ny, 0.01f), *w = xmalloc(nw * sizeof *w);
        floatX *scaled = xcalloc(ny, sizeof *scaled);
        int8_t *codes = random_codes(nw);
        float *wscale = random_scales(OC);
        for (size_t k = 0; k < nw; k++) w[k] = f2x(codes[k]);
        Results want = new_results(nx, 1, ny);
        for (size_t t = 0; t < sizeof thread_counts / sizeof *thread_counts; t++) {
            int threads = thread_counts[t];
            set_threads(threads);
            Results got = new_results(nx, 1, ny);
            ops->linear_w8_forward(got.y, x, codes, wscale, N, C, OC);
            ops->linear_w8_forward_f32(got.y32, x, codes, wscale, N, C, OC);
            ops->linear_w8_backward_input(got.dx, dy, codes, wscale, scaled, N, C, OC);
            if (!t) {
                ops->linear_forward(want.y, x, w, wscale, N, C, OC);
                ops->linear_forward_f32(want.y32, x, w, wscale, N, C, OC);
                ops->linear_backward_input(want.dx, dy, w, wscale, scaled, N, C, OC);
                for (size_t k = 0; OC > 4096 && k < nx; k++) {
                    const floatX *row = scaled + k / (size_t)C * (size_t)OC;
                    const int8_t *column = codes + k % (size_t)C;
                    double sum = 0, magnitude = 0;
                    for (size_t o = 0; o < (size_t)OC; o++) {
                        double d = (double)x2f(row[o]) * column[o * (size_t)C];
                        sum += d;
                        magnitude += fabs(d);
                    }
                    double bound = UX * fabs(sum) + (OC + 2) * 0x1p-23 * magnitude;
                    double computed = x2f(got.dx[k]);
                    if (!(fabs(computed - sum) <= bound))
                        fail_msg("dx[%zu] of OC %d: %.9g, expected %.9g +- %.3g", k, OC, computed, sum, bound);
                    want.dx[k] = got.dx[k];
                }
            }
            check_device();
            expect_same(got.y, want.y, ny, sizeof(floatX), "weight-only y", shape, threads);
            expect_same(got.y32, want.y32, ny, 4, "weight-only y f32", shape, threads);
            expect_same(got.dx, want.dx, nx, sizeof(floatX), "weight-only dx", shape, threads);
            free_results(&got);
        }
        free_results(&want);
        free(x); free(dy); free(w); free(scaled); free(codes); free(wscale);
    }
}

// Nothing to do is done: no rows, and a weight gradient of no tokens is zero.
static void test_empty(void **unused) {
    (void)unused;
    set_threads(0);
    floatX x[4] = {0}, y[4] = {0};
    int8_t w[4] = {0};
    float scale[2] = {1, 1}, dw[4] = {1, 1, 1, 1}, y32[4] = {0};
    ops->linear_w8_forward(y, x, w, scale, 0, 2, 2);
    ops->linear_w8_forward_f32(y32, x, w, scale, 0, 2, 2);
    ops->linear_w8_backward_input(x, y, w, scale, y, 0, 2, 2);
    ops->linear_i8_forward(y, x, w, scale, 0, 2, 2);
    ops->linear_i8_forward_f32(y32, x, w, scale, 0, 2, 2);
    ops->linear_i8_backward_input(x, y, w, scale, 0, 2, 2);
    ops->linear_i8_backward_weight(dw, y, x, 0, 2, 2, true);
    assert_true(dw[0] == 1 && dw[3] == 1);
    ops->linear_i8_backward_weight(dw, y, x, 0, 2, 2, false);
    assert_true(dw[0] == 0 && dw[3] == 0);
    check_device();
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_integer_reference), cmocka_unit_test(test_hard_rows),
        cmocka_unit_test(test_integer_rows_independent), cmocka_unit_test(test_long_sums),
        cmocka_unit_test(test_weight_only), cmocka_unit_test(test_empty),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL) != 0;
}
