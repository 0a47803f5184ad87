// Operations between ranks in the CPU wing: whose rows are whose, what goes on the wire, what comes off it.
#include "ops_common.h"
#include "device.h"

static const Ops *const o = &ops_cpu;

// ---------------------------------------------------------------------------------------------
// split.h

static void test_split(void **state) {
    (void)state;
    for (int64_t unit = 1; unit <= 3; unit++)
        for (int64_t units = 0; units <= 20; units++)
            for (int R = 1; R <= 9; R++)
                for (int first = 0; first < R; first++) {
                    RowSplit s = {.rows = units * unit, .unit = unit, .R = R, .first = first};
                    int64_t at = 0, most = 0, least = s.rows;
                    for (int r = 0; r < R; r++) {
                        int64_t n = split_count(&s, r);
                        assert_int_equal(split_begin(&s, r), at);       // rank after rank, no row left out
                        assert_int_equal(n % unit, 0);
                        at += n;
                        most = n > most ? n : most;
                        least = n < least ? n : least;
                    }
                    assert_int_equal(at, s.rows);
                    assert_int_equal(split_most(&s), most);
                    assert_true(most - least <= unit);                  // as even as can be
                    for (int64_t k = 0; k < units % R; k++)             // those with more: first, first + 1, ...
                        assert_int_equal(split_count(&s, (int)((first + k) % R)), most);
                }
    // Beyond 32 bits: an embedding of 405B, element counts aside.
    RowSplit big = {.rows = (int64_t)3 << 40, .unit = 1 << 10, .R = 1000, .first = 999};
    assert_int_equal(split_begin(&big, 999) + split_count(&big, 999), big.rows);
}

// ---------------------------------------------------------------------------------------------
// Rows of bytes

static const int rank_counts[] = {1, 2, 3, 5, 8};
#define N_COUNTS (sizeof rank_counts / sizeof *rank_counts)

static int64_t rows_in(const RowSplit *s, int r, int64_t k0, int64_t kn) {
    int64_t n = split_count(s, r) - k0;
    return n < 0 ? 0 : n < kn ? n : kn;
}
static size_t up16(size_t n) { return (n + 15) & ~(size_t)15; }

static void test_rows(void **state) {
    (void)state;
    static const size_t widths[] = {1, 2, 4, 6, 33, 34, 64, 4096};
    static const int64_t row_counts[] = {1, 3, 4, 17, 64};
    for (size_t c = 0; c < N_COUNTS; c++)
        for (size_t w = 0; w < sizeof widths / sizeof *widths; w++)
            for (size_t k = 0; k < sizeof row_counts / sizeof *row_counts; k++) {
                RowSplit s = {.rows = row_counts[k], .unit = 1, .R = rank_counts[c], .first = rank_counts[c] / 2};
                size_t bytes = widths[w], total = (size_t)s.rows * bytes;
                uint8_t *tensor = must_alloc(total), *back = must_alloc(total);
                for (size_t i = 0; i < total; i++) tensor[i] = (uint8_t)random_bits(i);
                for (int64_t kn = 1; kn <= split_most(&s) + 1; kn += 1 + kn / 2) {
                    size_t stride = up16((size_t)kn * bytes) + 16 * (size_t)(kn % 2), size = stride * (size_t)s.R;
                    memset(back, 0x5a, total);
                    for (int64_t k0 = 0; k0 <= split_most(&s); k0 += kn) {
                        uint8_t *wire = must_alloc(size), *want = must_alloc(size), *before = copy_of(back, total);
                        for (int r = 0; r < s.R; r++) {
                            size_t n = (size_t)rows_in(&s, r, k0, kn) * bytes,
                                   at = (size_t)(split_begin(&s, r) + k0) * bytes;
                            if (n) memcpy(want + (size_t)r * stride, tensor + at, n);
                            if (n) memcpy(before + at, tensor + at, n);
                        }
                        o->rows_pack(wire, stride, tensor, &s, k0, kn, bytes);
                        expect_same(wire, want, size, "packed rows", (int)s.rows, (int)bytes);
                        o->rows_unpack(back, wire, stride, &s, k0, kn, bytes);
                        expect_same(back, before, total, "rows of one window", (int)s.rows, (int)bytes);
                        free(wire), free(want), free(before);
                    }
                    expect_same(back, tensor, total, "rows of all windows", (int)s.rows, (int)bytes);
                }
                free(tensor), free(back);
            }
}

// ---------------------------------------------------------------------------------------------
// Quantized weights

// Every width, granularity, mapping and kind of zero point; groups that end where vectors, bytes, or neither do.
static const struct { const char *spec; int rows, cols; } wires[] = {
    {"int4,group=32", 13, 96},
    {"int4,group=32", 3, 2112},                                 // more scales a row than are widened at a time
    {"int4,group=2", 5, 1030},
    {"int3,group=2", 3, 1030},
    {"int4,group=64,symmetric-no-clip", 7, 576},
    {"uint4,group=64,float", 9, 320},
    {"uint4,group=6,float", 4, 66},
    {"uint4,group=24,asymmetric", 6, 120},
    {"int4,group=24,asymmetric", 6, 72},
    {"int4", 11, 33},
    {"int8", 10, 577},                                          // works as codes
    {"int8", 10, 1},
    {"int8,range=-127..127", 4, 64},
    {"int8,symmetric-no-clip,range=-100..127", 4, 64},
    {"int8,asymmetric", 5, 100},
    {"uint8", 5, 48},
    {"uint8,group=16,float", 5, 48},
    {"int8,group=32,asymmetric", 8, 64},
    {"uint8,group=32", 8, 64},
    {"int2,group=2", 5, 62},
    {"uint2,group=16,asymmetric", 5, 48},
    {"int3,group=32", 9, 96},
    {"int3,group=40", 9, 1200},
    {"uint3,group=16,float", 5, 80},
    {"int5,block=2x16", 14, 80},
    {"int5", 7, 31},
    {"int6,block=4x3", 20, 66},
    {"uint6,group=48", 5, 96},
    {"int7", 9, 53},
    {"uint7,block=3x64", 12, 192},
    {"uint7,group=32,asymmetric", 9, 96},
    {"int4,tensor", 6, 40},
    {"int4,tensor", 1, 31},
    {"uint5,tensor,float", 7, 50},
    {"int8,tensor,asymmetric,range=-100..99", 4, 65},
    {"int4,group=32,eps=0.01", 4, 64},
    {"uint3,block=2x5,asymmetric,range=1..6", 8, 35},
};
#define N_WIRES (sizeof wires / sizeof *wires)

// Masters that hurt.
enum { PLAIN, ZERO_ROWS, NOT_FINITE, SUBNORMAL, LARGE, KINDS };
static float *new_masters(size_t rows, size_t cols, int kind) {
    float *p = new_f32(rows * cols, kind == LARGE ? 3e38f : 0.1f);
    for (size_t i = 0; i < rows * cols; i++) {
        if (kind == ZERO_ROWS && i / cols % 2) p[i] = i % 2 ? 0.0f : -0.0f;
        if (kind == NOT_FINITE && i % 41 == 4) p[i] = i % 3 == 0 ? NAN : i % 3 == 1 ? -INFINITY : INFINITY;
        if (kind == NOT_FINITE && i / cols % 5 == 3) p[i] = NAN;
        if (kind == NOT_FINITE && i / cols % 5 == 4) p[i] = i % 7 ? -0.0f : NAN;
        if (kind == SUBNORMAL) p[i] = f32_from_bits(random_bits(i) & 0x807fffffu);
    }
    return p;
}

// One rank's part by quant.h's scalars; bytes that nobody writes are as must_alloc leaves them.
static uint8_t *part_by_scalars(const float *master, const QuantSpec *s, int64_t rows, int64_t cols, int64_t kn,
                                size_t stride) {
    uint8_t *part = must_alloc(stride);
    int64_t block[2];
    if (rows == 0) return part;
    assert_int_equal(quant_block_shape(s, rows, cols, block, NULL), 0);
    QuantWire at = quant_wire_layout(s, kn, cols, block);
    size_t n = (size_t)rows * (size_t)cols, blocks = (size_t)(rows / block[0]) * (size_t)(cols / block[1]);
    float *w16 = must_alloc(n * sizeof *w16);
    int16_t *codes = must_alloc(n * sizeof *codes);
    QParams *qp = must_alloc(blocks * sizeof *qp);
    for (size_t i = 0; i < n; i++) w16[i] = bf16_round(master[i]);
    assert_int_equal(quant_tensor(codes, qp, w16, rows, cols, s, QD_BF16, NULL), 0);
    for (int64_t r = 0; r < rows; r++)
        quant_pack_row(part + at.codes + (size_t)r * quant_row_bytes(s->bits, cols), codes + r * cols, cols, s->bits);
    for (size_t b = 0; b < blocks; b++) {
        bf16 scale = bf16_from_f32(qp[b].scale), zero = bf16_from_f32(qp[b].zp);
        memcpy(part + at.scale + 2 * b, &scale, 2);
        if (s->zero == QZ_FLOAT) memcpy(part + at.zero + 2 * b, &zero, 2);
        else if (quant_has_zero(s)) part[at.zero + b] = (uint8_t)(int)qp[b].zp;
    }
    free(w16), free(codes), free(qp);
    return part;
}

// All windows of one tensor: each rank's part, then the working values of the whole.
static void check_wire(const QuantSpec *s, const RowSplit *split, const float *master, int64_t cols, int64_t kn,
                       bool with_scale) {
    size_t n = (size_t)split->rows * (size_t)cols, bytes = n * sizeof(floatX);
    int64_t block[2];
    assert_int_equal(quant_block_shape(s, split->rows, cols, block, NULL), 0);
    floatX *want = must_alloc(bytes), *got = must_alloc(bytes);
    size_t scale_bytes = (size_t)split->rows * sizeof(float);
    float *want_scale = must_alloc(scale_bytes), *got_scale = must_alloc(scale_bytes);
    o->weight_fq(want, want_scale, master, s, split->rows, cols);
    size_t size = quant_wire_layout(s, kn, cols, block).bytes, stride = size + (kn % 2 ? 48 : 0);
    for (int64_t k0 = 0; k0 <= split_most(split); k0 += kn) {       // the last one may be behind everybody's rows
        uint8_t *wire = must_alloc(stride * (size_t)split->R);
        floatX *expect = copy_of(got, bytes);
        for (int r = 0; r < split->R; r++) {
            int64_t rows = rows_in(split, r, k0, kn), at = (split_begin(split, r) + k0) * cols;
            uint8_t *part = wire + (size_t)r * stride,
                    *by_scalars = part_by_scalars(rows ? master + at : NULL, s, rows, cols, kn, stride);
            o->weight_pack(part, rows ? master + at : NULL, s, rows, cols, kn);
            expect_same(part, by_scalars, stride, "packed weights", (int)rows, (int)cols);
            if (rows) memcpy(expect + at, want + at, (size_t)(rows * cols) * sizeof(floatX));
            free(by_scalars);
        }
        o->weight_unpack(got, with_scale ? got_scale : NULL, wire, stride, split, k0, kn, s, cols);
        expect_same(got, expect, bytes, "working values of one window", (int)split->rows, (int)cols);
        free(wire), free(expect);
    }
    expect_same(got, want, bytes, "working values", (int)split->rows, (int)cols);
    if (with_scale) expect_same(got_scale, want_scale, scale_bytes, "row scales", (int)split->rows, (int)cols);
    free(want), free(got), free(want_scale), free(got_scale);
}

static void test_wire(void **state) {
    (void)state;
    for (size_t k = 0; k < N_WIRES; k++) {
        QuantSpec s;
        Err err = {0};
        if (quant_spec_parse(&s, wires[k].spec, false, &err) < 0) fail_msg("%s", err.text);
        int64_t rows = wires[k].rows, cols = wires[k].cols, block[2];
        assert_int_equal(quant_block_shape(&s, rows, cols, block, NULL), 0);
        for (int kind = 0; kind < KINDS; kind++) {
            float *master = new_masters((size_t)rows, (size_t)cols, kind);
            for (size_t c = 0; c < N_COUNTS; c++) {
                RowSplit split = {.rows = rows, .unit = block[0], .R = rank_counts[c],
                                  .first = (int)(k % (size_t)rank_counts[c])};
                int64_t most = split_most(&split);
                check_wire(&s, &split, master, cols, most, true);
                if (most > block[0]) check_wire(&s, &split, master, cols, block[0], false);
                if (most > 2 * block[0]) check_wire(&s, &split, master, cols, 2 * block[0], true);
            }
            free(master);
        }
    }
}

static void test_wire_threads(void **state) {
    (void)state;
    static const char *const texts[] = {"int4,group=32", "uint4,group=32,float", "int8", "int3,group=6", "int4,tensor"};
    enum { ROWS = 61, COLS = 960 };
    float *master = new_f32(ROWS * COLS, 0.1f);
    for (size_t k = 0; k < sizeof texts / sizeof *texts; k++)
        for (int threads = 1; threads <= 3; threads += 2) {
            QuantSpec s;
            int64_t block[2];
            assert_int_equal(quant_spec_parse(&s, texts[k], false, NULL), 0);
            assert_int_equal(quant_block_shape(&s, ROWS, COLS, block, NULL), 0);
            RowSplit split = {.rows = ROWS, .unit = block[0], .R = 2, .first = 1};
            set_threads(threads);
            check_wire(&s, &split, master, COLS, split_most(&split), true);
            set_threads(2);
        }
    free(master);
}

static void test_wire_size(void **state) {
    (void)state;
    QuantSpec s;
    assert_int_equal(quant_spec_parse(&s, "int4,group=32", false, NULL), 0);
    static const int64_t shapes_of_linears[][2] = {{960, 576}, {3072, 2048}, {16384, 53248}};
    for (size_t k = 0; k < 3; k++) {
        int64_t rows = shapes_of_linears[k][0], cols = shapes_of_linears[k][1], block[2];
        assert_int_equal(quant_block_shape(&s, rows, cols, block, NULL), 0);
        QuantWire w = quant_wire_layout(&s, rows, cols, block);
        // Half a byte and a 32nd of a bf16 scale for two bytes: 0.28125.
        assert_true((double)w.bytes <= 0.29 * 2.0 * (double)rows * (double)cols);
        assert_int_equal(w.zero, w.bytes);
        assert_true(w.scale % 16 == 0 && w.bytes % 16 == 0);
    }
}

// ---------------------------------------------------------------------------------------------
// Sums

static void test_sum_ranks(void **state) {
    (void)state;
    static const size_t sizes[] = {1, 15, 16, 63, 64, 65, 1000, 8192, 8209, 40007};
    for (size_t c = 0; c < N_COUNTS; c++)
        for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
            int R = rank_counts[c];
            size_t n = sizes[k], stride = n + (k % 3) * 16;
            float *in = new_f32((size_t)(R - 1) * stride + n, 1.0f), *out = must_alloc(n * sizeof *out),
                  *more = new_f32(n, 1.0f), *more0 = copy_of(more, n * sizeof *more);
            for (size_t i = 0; i < n; i++)
                for (int r = 0; r < R; r++) {          // sizes apart, so that order shows
                    float *x = &in[(size_t)r * stride + i];
                    *x = i % 13 == 5 ? -0.0f : ldexpf(*x, (int)((i + (size_t)r * 7) % 29));
                }
            for (int threads = 1; threads <= 3; threads += 2) {
                set_threads(threads);
                o->sum_ranks(out, in, stride, R, n, false);
                memcpy(more, more0, n * sizeof *more);
                o->sum_ranks(more, in, stride, R, n, true);
                set_threads(2);
                for (size_t i = 0; i < n; i++) {
                    float sum = in[i];
                    for (int r = 1; r < R; r++) sum = sum + in[(size_t)r * stride + i];
                    expect_same_f32(out[i], sum, "sum over ranks", i);
                    expect_same_f32(more[i], more0[i] + sum, "accumulated sum over ranks", i);
                }
            }
            free(in), free(out), free(more), free(more0);
        }
}

static void test_state_sum(void **state) {
    (void)state;
    StepState all[3] = {{.loss_sum = 1e16, .tokens = 3, .grad_squares = 1.0, .stop = 1, .t = 9},
                        {.loss_sum = 1.0, .tokens = 5000000000, .grad_squares = 1e16, .stop = 4},
                        {.loss_sum = -1e16, .tokens = 7, .grad_squares = 1.0, .lr = 2.0f}};
    // What state held before does not count, and its other members stay.
    StepState got = {.t = 3, .lr = 0.5f, .seed = 11, .norm = 2.0f, .loss_sum = 77.0, .tokens = 5, .grad_squares = 4.0,
                     .stop = 8};
    o->state_sum(&got, all, 3);
    assert_true(got.loss_sum == (1e16 + 1.0) + -1e16 && got.grad_squares == (1.0 + 1e16) + 1.0);   // in order
    assert_true(got.tokens == 5000000010 && got.stop == 5);
    assert_true(got.t == 3 && got.lr == 0.5f && got.seed == 11 && got.norm == 2.0f);
    o->state_sum(&got, all + 1, 1);
    assert_true(got.loss_sum == 1.0 && got.grad_squares == 1e16 && got.tokens == 5000000000 && got.stop == 4);
    all[1].grad_squares = INFINITY;                                    // one rank's overflow is everybody's
    all[2].loss_sum = NAN;
    o->state_sum(&got, all, 3);
    assert_true(isinf(got.grad_squares) && isnan(got.loss_sum));
}

// Squares are added to what is there, block by block in order.
static void test_sum_squares(void **state) {
    (void)state;
    enum { N = 65536 * 2 + 777 };
    float *g = new_f32(N, 3.0f);
    StepState whole = {.grad_squares = 0.25}, parts = {.grad_squares = 0.0};
    double want = 0.0, sum[3] = {0};
    for (int k = 0; k < 3; k++) {
        size_t first = (size_t)k * 65536, n = k < 2 ? 65536 : N - first;
        double lane[16] = {0};
        for (size_t i = 0; i < n; i++) lane[i % 16] += (double)g[first + i] * (double)g[first + i];
        for (int h = 8; h; h >>= 1)
            for (int l = 0; l < h; l++) lane[l] += lane[l + h];
        sum[k] = lane[0];
        want += lane[0];
        o->sum_squares(&parts, g + first, n);
    }
    o->sum_squares(&whole, g, N);
    assert_true(whole.grad_squares == 0.25 + want);
    assert_true(parts.grad_squares == (sum[0] + sum[1]) + sum[2]);
    free(g);
}

// ---------------------------------------------------------------------------------------------
// Updates of masters whose working values come from elsewhere

static void test_update_alone(void **state) {
    (void)state;
    static const char *const texts[] = {"none", "int4,group=32", "int8", "uint4,group=32,float", "int4,tensor"};
    enum { ROWS = 37, COLS = 608, N = ROWS * COLS };
    const AdamWParams h = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1};
    float *p0 = new_f32(N, 0.1f), *g = new_f32(N, 1.0f), *m0 = new_f32(N, 0.1f), *v0 = new_f32(N, 0.1f);
    for (size_t i = 0; i < N; i++) v0[i] = fabsf(v0[i]);
    floatX *work = must_alloc(N * sizeof *work);
    for (size_t k = 0; k < sizeof texts / sizeof *texts; k++)
        for (int sgd = 0; sgd < 2; sgd++)
            for (int t = 1; t <= 2; t++) {
                QuantSpec s;
                assert_int_equal(quant_spec_parse(&s, texts[k], false, NULL), 0);
                const StepState step = {.t = t, .lr = 1e-2f, .grad_scale = 0.37f, .skip = t == 2};
                float *p[2], *m[2], *v[2], wscale[ROWS];
                for (int alone = 0; alone < 2; alone++) {
                    p[alone] = copy_of(p0, N * sizeof(float));
                    m[alone] = copy_of(m0, N * sizeof(float));
                    v[alone] = copy_of(v0, N * sizeof(float));
                    floatX *to = alone ? NULL : work;
                    float *scales = alone ? NULL : wscale;
                    const QuantSpec *wq = alone && !sgd ? NULL : &s;       // alone it is not read
                    if (sgd) o->sgd_fq(p[alone], m[alone], to, scales, g, &step, 0.9f, 0.1f, wq, ROWS, COLS);
                    else o->adamw_fq(p[alone], m[alone], v[alone], to, scales, g, &step, &h, wq, ROWS, COLS);
                }
                expect_same(p[1], p[0], N * sizeof(float), "master", ROWS, COLS);
                expect_same(m[1], m[0], N * sizeof(float), "momentum", ROWS, COLS);
                expect_same(v[1], v[0], N * sizeof(float), "second moment", ROWS, COLS);
                assert_int_equal(memcmp(p[0], p0, N * sizeof(float)) == 0, step.skip);
                // A rank without rows of this tensor, with and without working values.
                for (int alone = 0; alone < 2; alone++) {
                    floatX *to = alone ? NULL : work;
                    Err err = {0};
                    if (sgd) o->sgd_fq(NULL, NULL, to, NULL, NULL, &step, 0.9f, 0.1f, &s, 0, COLS);
                    else o->adamw_fq(NULL, NULL, NULL, to, NULL, NULL, &step, &h, &s, 0, COLS);
                    if (device_sync(&err) < 0) fail_msg("%s", err.text);
                }
                for (int i = 0; i < 2; i++) free(p[i]), free(m[i]), free(v[i]);
            }
    free(p0), free(g), free(m0), free(v0), free(work);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_split),        cmocka_unit_test(test_rows),
    cmocka_unit_test(test_wire),         cmocka_unit_test(test_wire_threads),
    cmocka_unit_test(test_wire_size),    cmocka_unit_test(test_sum_ranks),
    cmocka_unit_test(test_state_sum),    cmocka_unit_test(test_sum_squares),
    cmocka_unit_test(test_update_alone),
};
TEST_MAIN(tests)
