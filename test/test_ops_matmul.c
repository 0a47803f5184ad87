// The linears against sums in double, and the equalities they promise: a row's bits depend neither on the rows beside
// it nor on the number of threads.
#include "matmul_common.h"
#ifdef _OPENMP
#include <omp.h>
#endif

// |computed - exact| <= u_out |exact| + (K + 2) 2^-23 sum |a b|: one rounding to the output's type, and at most one f32
// rounding for each product and each addition (vdpbf16ps rounds twice a pair; a scale adds one). 1e-30 is for what is
// flushed to zero.
static void check_close(double got, double want, double abs_sum, int64_t K, double u_out, const char *what, size_t at) {
    double bound = u_out * fabs(want) + (double)(K + 2) * 0x1p-23 * abs_sum + 1e-30;
    if (!(fabs(got - want) <= bound)) fail_msg("%s[%zu]: %.9g, expected %.9g +- %.3g", what, at, got, want, bound);
}

static void check_linear(size_t N, int C, int OC, bool scaled) {
    size_t nx = N * (size_t)C, nw = (size_t)OC * (size_t)C, ny = N * (size_t)OC;
    floatX *x = random_x(nx, 1), *w = random_x(nw, 1), *dy = random_x(ny, 1), *y = xcalloc(ny, sizeof *y);
    floatX *dx = xcalloc(nx, sizeof *dx), *dys = xcalloc(ny, sizeof *dys);
    float *y32 = xcalloc(ny, sizeof *y32), *dw = xcalloc(nw, sizeof *dw), *dw2 = xcalloc(nw, sizeof *dw2);
    float *scale = xmalloc((size_t)OC * sizeof *scale);
    for (int o = 0; o < OC; o++) scale[o] = 0.01f + fabsf(uniform());
    const float *ws = scaled ? scale : NULL;
    for (size_t i = 0; i < nw; i++) dw2[i] = dw[i] = 0.5f;      // overwritten, added to

    ops->linear_forward(y, x, w, ws, N, C, OC);
    ops->linear_forward_f32(y32, x, w, ws, N, C, OC);
    ops->linear_backward_input(dx, dy, w, ws, ws ? dys : NULL, N, C, OC);
    ops->linear_backward_weight(dw, dy, x, N, C, OC, false);
    ops->linear_backward_weight(dw2, dy, x, N, C, OC, true);
    check_device();

    for (size_t n = 0; n < N; n++)
        for (int o = 0; o < OC; o++) {
            double sum = 0, mag = 0, s = scaled ? (double)scale[o] : 1.0;
            for (int c = 0; c < C; c++) {
                double t = s * x2f(x[n * (size_t)C + c]) * x2f(w[(size_t)o * C + c]);
                sum += t;
                mag += fabs(t);
            }
            check_close(x2f(y[n * (size_t)OC + o]), sum, mag, C, UX, "y", n * (size_t)OC + o);
            check_close(y32[n * (size_t)OC + o], sum, mag, C, 0x1p-24, "y f32", n * (size_t)OC + o);
        }
    for (size_t n = 0; n < N; n++)
        for (int c = 0; c < C; c++) {
            double sum = 0, mag = 0;
            for (int o = 0; o < OC; o++) {
                float d = x2f(dy[n * (size_t)OC + o]);
                if (scaled) d = x2f(f2x(d * scale[o]));
                double t = (double)d * x2f(w[(size_t)o * C + c]);
                sum += t;
                mag += fabs(t);
            }
            check_close(x2f(dx[n * (size_t)C + c]), sum, mag, OC, UX, "dx", n * (size_t)C + c);
        }
    for (int o = 0; o < OC; o++)
        for (int c = 0; c < C; c++) {
            double sum = 0, mag = 0;
            for (size_t n = 0; n < N; n++) {
                double t = (double)x2f(dy[n * (size_t)OC + o]) * x2f(x[n * (size_t)C + c]);
                sum += t;
                mag += fabs(t);
            }
            size_t at = (size_t)o * C + c;
            check_close(dw[at], sum, mag, (int64_t)N, 0x1p-24, "dw", at);
            check_close(dw2[at], sum + 0.5, mag + 0.5, (int64_t)N, 0x1p-24, "dw accumulated", at);
        }
    free(x); free(w); free(dy); free(y); free(dx); free(dys); free(y32); free(dw); free(dw2); free(scale);
}

static void test_shapes(void **unused) {
    (void)unused;
    set_threads(0);
    state = 1;
    static const int shapes[][3] = {                            // N, C, OC
        {1, 2, 1}, {1, 64, 33}, {2, 6, 5}, {3, 7, 9}, {5, 1, 3}, {17, 31, 64}, {64, 64, 64}, {65, 80, 130},
        {97, 96, 48}, {130, 576, 65}, {33, 1536, 72}, {600, 34, 40}, {7, 48, 1000},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int scaled = 0; scaled < 2; scaled++)
            check_linear((size_t)shapes[i][0], shapes[i][1], shapes[i][2], scaled);
}

// Nothing to do is done: no rows, and a weight gradient of no tokens is zero.
static void test_empty(void **unused) {
    (void)unused;
    set_threads(0);
    floatX x[4] = {0}, w[4] = {0}, y[4] = {0};
    float dw[4] = {1, 1, 1, 1}, y32[4] = {0};
    ops->linear_forward(y, x, w, NULL, 0, 2, 2);
    ops->linear_forward_f32(y32, x, w, NULL, 0, 2, 2);
    ops->linear_backward_input(x, y, w, NULL, NULL, 0, 2, 2);
    ops->linear_backward_weight(dw, y, x, 0, 2, 2, true);
    assert_true(dw[0] == 1 && dw[3] == 1);
    ops->linear_backward_weight(dw, y, x, 0, 2, 2, false);
    assert_true(dw[0] == 0 && dw[3] == 0);
    check_device();
}

static const int thread_counts[] = {1, 2, 3, 6};

// Rows 0..n-1 of a forward of n rows are those of a forward of many, for every number of threads: evaluation in other
// batches, or token by token, gives the trainer's bits. Shapes: those of the 135M model, then long sums (wide models).
static void test_rows_independent(void **unused) {
    (void)unused;
    state = 2;
    static const int shapes[][3] = {                            // N, C, OC
        {300, 576, 960}, {300, 576, 576}, {200, 576, 3072}, {300, 1536, 576}, {17, 576, 49152},
        {70, 64, 96}, {140, 2048, 256}, {140, 4096, 96}, {140, 8192, 80}, {70, 14336, 64}, {50, 34, 1000},
    };
    static const int counts[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 100, 127,
                                 128, 129, 192, 255, 256, 257};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        size_t N = (size_t)shapes[i][0];
        int C = shapes[i][1], OC = shapes[i][2];
        floatX *x = random_x(N * (size_t)C, 1), *w = random_x((size_t)OC * (size_t)C, 1);
        floatX *y = xmalloc(N * (size_t)OC * sizeof *y), *all = xmalloc(N * (size_t)OC * sizeof *all);
        float *y32 = xmalloc(N * (size_t)OC * sizeof *y32), *all32 = xmalloc(N * (size_t)OC * sizeof *all32);
        float *scale = xmalloc((size_t)OC * sizeof *scale);
        for (int o = 0; o < OC; o++) scale[o] = 0.01f + fabsf(uniform());
        for (int scaled = 0; scaled < 2; scaled++) {
            set_threads(1);
            ops->linear_forward(all, x, w, scaled ? scale : NULL, N, C, OC);
            ops->linear_forward_f32(all32, x, w, scaled ? scale : NULL, N, C, OC);
            for (size_t t = 0; t < sizeof thread_counts / sizeof *thread_counts; t++) {
                set_threads(thread_counts[t]);
                for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) {
                    size_t n = (size_t)counts[k];
                    if (n > N || (t > 1 && k % 5)) continue;    // a sample of the counts for many threads
                    ops->linear_forward(y, x, w, scaled ? scale : NULL, n, C, OC);
                    if (memcmp(y, all, n * (size_t)OC * sizeof *y))
                        fail_msg("y: %zu rows of %zu, C %d, OC %d, %d threads", n, N, C, OC, thread_counts[t]);
                    ops->linear_forward_f32(y32, x, w, scaled ? scale : NULL, n, C, OC);
                    if (memcmp(y32, all32, n * (size_t)OC * sizeof *y32))
                        fail_msg("y f32: %zu rows of %zu, C %d, OC %d, %d threads", n, N, C, OC, thread_counts[t]);
                }
            }
        }
        check_device();
        free(x); free(w); free(y); free(all); free(y32); free(all32); free(scale);
    }
}

// Gradients are sums over tokens or output channels: the same bits for any number of threads.
static void test_threads_equal(void **unused) {
    (void)unused;
    state = 3;
    static const int shapes[][3] = {{1024, 64, 96}, {4096, 32, 48}, {2048, 64, 300}, {8192, 30, 30}, {3000, 96, 40},
                                    {1, 96, 4096},
                                     {77, 130, 66}, {512, 576, 960}, {300, 1536, 576}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        size_t N = (size_t)shapes[i][0];
        int C = shapes[i][1], OC = shapes[i][2];
        size_t nx = N * (size_t)C, nw = (size_t)OC * (size_t)C;
        floatX *x = random_x(nx, 1), *w = random_x(nw, 1), *dy = random_x(N * (size_t)OC, 1);
        floatX *dx[2] = {xmalloc(nx * sizeof(floatX)), xmalloc(nx * sizeof(floatX))};
        float *dw[2] = {xmalloc(nw * sizeof(float)), xmalloc(nw * sizeof(float))};
        for (size_t t = 0; t < sizeof thread_counts / sizeof *thread_counts; t++) {
            int z = t > 0;
            set_threads(thread_counts[t]);
            ops->linear_backward_input(dx[z], dy, w, NULL, NULL, N, C, OC);
            ops->linear_backward_weight(dw[z], dy, x, N, C, OC, false);
            ops->linear_backward_weight(dw[z], dy, x, N, C, OC, true);
            if (z && memcmp(dx[0], dx[1], nx * sizeof(floatX)))
                fail_msg("dx of %zu x %d x %d differs with %d threads", N, C, OC, thread_counts[t]);
            if (z && memcmp(dw[0], dw[1], nw * sizeof(float)))
                fail_msg("dw of %zu x %d x %d differs with %d threads", N, C, OC, thread_counts[t]);
        }
        check_device();
        free(x); free(w); free(dy); free(dx[0]); free(dx[1]); free(dw[0]); free(dw[1]);
    }
}

// More shapes than primitives are kept: the cache starts over and goes on.
static void test_many_shapes(void **unused) {
    (void)unused;
    set_threads(1);
    state = 4;
    floatX *x = random_x(700 * 4, 1), *w = random_x(4 * 4, 1), *y = xmalloc(700 * 4 * sizeof *y),
        *all = xmalloc(700 * 4 * sizeof *y);
    ops->linear_forward(all, x, w, NULL, 700, 4, 4);
    for (size_t n = 1; n <= 700; n++) {
        ops->linear_forward(y, x, w, NULL, n, 4, 4);
        assert_memory_equal(y, all, n * 4 * sizeof *y);
    }
    check_device();
    free(x); free(w); free(y); free(all);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shapes), cmocka_unit_test(test_empty), cmocka_unit_test(test_rows_independent),
        cmocka_unit_test(test_threads_equal), cmocka_unit_test(test_many_shapes),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL) != 0;
}
