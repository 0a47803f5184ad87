// Serving operations of the CPU wing whose inputs stay as they are: weight-only codes and float weights against few
// tokens, in every form that the processor has, and codes against many.
#include "ops_common.h"
#include "cpu/isa.h"

static const Ops *const o = &ops_cpu;
static const CpuIsa isas[] = {ISA_PLAIN, ISA_AVX2, ISA_AVX512, ISA_AVX512_BF16};

// Codes of 4 and 8 bits in groups that end where units of 8 or 4 columns do, and in groups that do not; every kind of
// zero point; a range whose middle is not zero; other widths.
static const char *const spec_texts[] = {
    "int8,channel", "int8,channel,rows", "int8,group=32", "int8,group=12", "int8,group=6", "int8,group=32,asymmetric",
    "uint8,group=32", "uint8,channel,float", "int4,group=32", "int4,group=64", "int4,group=128", "int4,channel",
    "int4,group=12", "int4,group=32,asymmetric", "uint4,group=32", "uint4,channel", "uint4,group=32,float",
    "uint4,group=64,float", "uint4,channel,float", "int4,group=32,symmetric-no-clip,range=-8..3", "int3,group=32",
    "int2,channel", "int5,group=40", "int6,channel", "uint7,group=16",
};
#define N_TEXTS (sizeof spec_texts / sizeof *spec_texts)

// Rows that are no multiple of 16, columns that are no multiple of 8 or 4, fewer than 16 of either, groups in odd
// number. From 16384 values on there are several threads.
static const int weights[][2] = {{1, 1}, {3, 7}, {1, 32}, {17, 96}, {16, 12}, {5, 576}, {130, 257}, {37, 640}};
#define N_WEIGHTS (sizeof weights / sizeof *weights)

typedef struct {
    QuantSpec spec;
    int OC, C;
    int64_t group, across;
    size_t row_bytes;
    int16_t *codes;
    uint8_t *packed;
    float *scale, *zero;        // zero: NULL without zero points
    double *value, *counts;     // of each code, and what it counts in the bound
    void *served;
} Weight;

static bool weight_new(Weight *w, const char *text, int OC, int C) {
    int64_t block[2];
    Err err;
    *w = (Weight){.OC = OC, .C = C};
    if (quant_spec_parse(&w->spec, text, false, &err) < 0) fail_msg("%s", err.text);
    if (quant_block_shape(&w->spec, OC, C, block, &err) < 0) return false;
    const QuantSpec *s = &w->spec;
    w->group = block[1];
    w->across = C / block[1];
    w->row_bytes = quant_row_bytes(s->bits, C);
    size_t n = (size_t)OC * (size_t)C, scales = (size_t)(OC * w->across);
    w->codes = must_alloc(n * sizeof *w->codes);
    w->packed = must_alloc((size_t)OC * w->row_bytes);
    w->scale = new_f32(scales, 0.01f);
    w->zero = quant_has_zero(s) ? new_f32(scales, 0.1f) : NULL;
    stream_of_tests++;
    for (size_t i = 0; i < n; i++) {
        uint32_t r = philox(1, stream_of_tests, i).v[0];
        w->codes[i] = (int16_t)(s->qmin + (int)(r % (uint32_t)(s->qmax - s->qmin + 1)));
    }
    for (int r = 0; r < OC; r++) quant_pack_row(w->packed + (size_t)r * w->row_bytes, w->codes + r * C, C, s->bits);
    for (size_t i = 0; i < scales; i++) {
        w->scale[i] = fabsf(w->scale[i]) + 0.001f;
        if (!quant_is_int8_rows(s)) w->scale[i] = bf16_round(w->scale[i]);
        if (!w->zero) continue;
        if (s->zero == QZ_FLOAT) w->zero[i] = bf16_round(w->zero[i]);
        else w->zero[i] = (float)(s->qmin + (int)(random_bits(i) % (uint32_t)(s->qmax - s->qmin + 1)));
    }
    return true;
}

static void pack_rows(const Weight *w, void *served, int row, int rows) {
    size_t at = (size_t)(row * w->across);
    o->served_pack(served, w->packed + (size_t)row * w->row_bytes, w->scale + at, w->zero ? w->zero + at : NULL,
                   &w->spec, NULL, row, rows, w->OC, w->C);
}

// The served form, made in parts that do not end where sixteen rows do.
static void weight_pack(Weight *w) {
    size_t bytes = o->served_bytes(&w->spec, NULL, w->OC, w->C);
    assert_true(bytes > 0);
    w->served = must_alloc(bytes);
    void *whole = must_alloc(bytes);
    memset(whole, 0x5a, bytes);
    pack_rows(w, whole, 0, w->OC);
    for (int row = 0, rows; row < w->OC; row += rows) {
        rows = row ? 13 : 7;
        if (rows > w->OC - row) rows = w->OC - row;
        pack_rows(w, w->served, row, rows);
    }
    // A file may keep it: every byte is said, whatever lay there.
    expect_same(w->served, whole, bytes, "served form", w->OC, w->C);
    free(whole);
}

static void weight_free(Weight *w) {
    free(w->codes), free(w->packed), free(w->scale), free(w->zero), free(w->served), free(w->value),
        free(w->counts);
}

// The float domain sums (code - mid) * scale and zero apart, so both count.
static void weight_values(Weight *w) {
    size_t n = (size_t)w->OC * (size_t)w->C;
    w->value = must_alloc(n * sizeof(double));
    w->counts = must_alloc(n * sizeof(double));
    for (size_t i = 0; i < n; i++) {
        size_t g = i / (size_t)w->group;
        double code = w->codes[i], scale = (double)w->scale[g], mid = (double)quant_mid(&w->spec);
        double zero = w->zero ? (double)w->zero[g] : mid;
        bool is_float = w->spec.zero == QZ_FLOAT;
        w->value[i] = is_float ? (code - mid) * scale + zero : (code - zero) * scale;
        w->counts[i] = is_float ? fabs((code - mid) * scale) + fabs(zero) : fabs(w->value[i]);
    }
}

// ops.h: |err| <= (C + 6) * 2^-23 * sum |x| |w| before one rounding to X.
static double bound(int C, double size) { return (C + 6) * 2 * U32 * size; }

// want and bounds (N, OC) of x (N, C) times values (OC, C) that count as `counts`.
static void reference(double *want, double *bounds, const floatX *x, const double *value, const double *counts, int N,
                      int C, int OC) {
    for (int t = 0; t < N; t++)
        for (int r = 0; r < OC; r++) {
            double sum = 0.0, size = 0.0;
            for (int c = 0; c < C; c++) {
                double xv = (double)x2f(x[t * C + c]);
                sum += value[r * C + c] * xv;
                size += counts[r * C + c] * fabs(xv);
            }
            want[t * OC + r] = sum;
            bounds[t * OC + r] = bound(C, size);
        }
}

static void check(const floatX *y, const float *y32, const double *want, const double *bounds, size_t n) {
    for (size_t i = 0; i < n; i++) {
        expect_near((double)y32[i], want[i], bounds[i], "f32 result", i);
        expect_same_f32(x2f(y[i]), x2f(f2x(y32[i])), "result in X and in f32", i);
    }
}

// The widest form comes last, and stays.
static void few_tokens(const Weight *w) {
    size_t OC = (size_t)w->OC, C = (size_t)w->C;
    for (int N = 1; N <= 8; N += N < 4 ? 1 : 4) {
        floatX *x = new_x((size_t)N * C, 1.0f), *y = new_x((size_t)N * OC, 1.0f), *again = new_x((size_t)N * OC, 1.0f);
        float *y32 = new_f32((size_t)N * OC, 1.0f);
        double *want = must_alloc((size_t)N * OC * sizeof *want), *bounds = must_alloc((size_t)N * OC * sizeof *want);
        reference(want, bounds, x, w->value, w->counts, N, w->C, w->OC);
        for (size_t k = 0; k < sizeof isas / sizeof *isas; k++) {
            if (!cpu_isa_use(isas[k])) continue;
            o->served_forward(y, x, w->served, &w->spec, NULL, (size_t)N, w->C, w->OC);
            o->served_forward_f32(y32, x, w->served, &w->spec, NULL, (size_t)N, w->C, w->OC);
            check(y, y32, want, bounds, (size_t)N * OC);
            // A token's bits do not depend on its company, nor on the number of threads.
            for (size_t t = 0; t < (size_t)N; t++)
                o->served_forward(again + t * OC, x + t * C, w->served, &w->spec, NULL, 1, w->C, w->OC);
            expect_same(again, y, (size_t)N * OC * sizeof *y, "served, token by token", w->OC, w->C);
            set_threads(3);
            o->served_forward(again, x, w->served, &w->spec, NULL, (size_t)N, w->C, w->OC);
            set_threads(2);
            expect_same(again, y, (size_t)N * OC * sizeof *y, "served by three threads", w->OC, w->C);
        }
        free(x), free(y), free(again), free(y32), free(want), free(bounds);
    }
}

// Many tokens: the trained arithmetic, to the bit.
static void many_tokens(const Weight *w, int N) {
    size_t OC = (size_t)w->OC, C = (size_t)w->C, n = (size_t)N * OC;
    floatX *x = new_x((size_t)N * C, 1.0f), *y = new_x(n, 1.0f), *want = new_x(n, 1.0f), *work = new_x(OC * C, 1.0f);
    float *y32 = new_f32(n, 1.0f), *want32 = new_f32(n, 1.0f), *wscale = new_f32(OC, 1.0f);
    o->dequant_rows(work, wscale, w->packed, w->scale, w->zero, &w->spec, w->OC, w->C);
    const float *scale = quant_works_as_codes(&w->spec) ? wscale : NULL;
    o->linear_forward(want, x, work, scale, (size_t)N, w->C, w->OC);
    o->linear_forward_f32(want32, x, work, scale, (size_t)N, w->C, w->OC);
    o->served_forward(y, x, w->served, &w->spec, NULL, (size_t)N, w->C, w->OC);
    o->served_forward_f32(y32, x, w->served, &w->spec, NULL, (size_t)N, w->C, w->OC);
    expect_same(y, want, n * sizeof *y, "served, many tokens", w->OC, w->C);
    expect_same(y32, want32, n * sizeof *y32, "served in f32, many tokens", w->OC, w->C);
    free(x), free(y), free(want), free(work), free(y32), free(want32), free(wscale);
}

static void test_served(void **state) {
    (void)state;
    for (size_t i = 0; i < N_TEXTS; i++)
        for (size_t k = 0; k < N_WEIGHTS; k++) {
            Weight w;
            if (!weight_new(&w, spec_texts[i], weights[k][0], weights[k][1])) continue;
            weight_pack(&w);
            weight_values(&w);
            few_tokens(&w);
            many_tokens(&w, 9);
            weight_free(&w);
        }
}

// More rows than are unpacked at a time.
static void test_pieces(void **state) {
    (void)state;
    const char *const texts[] = {"int8,channel", "uint4,group=32,float", "int3,group=32"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        Weight w;
        assert_true(weight_new(&w, texts[i], 1150, 2080));
        weight_pack(&w);
        many_tokens(&w, 33);
        weight_free(&w);
    }
}

static void test_matvec(void **state) {
    (void)state;
    for (size_t k = 0; k < N_SHAPES; k++) {
        int OC = shapes[k][0], C = shapes[k][1];
        floatX *w = new_x((size_t)(OC * C), 0.1f);
        double *value = must_alloc((size_t)(OC * C) * sizeof *value), *counts = must_alloc((size_t)(OC * C) * 8);
        for (int i = 0; i < OC * C; i++) value[i] = (double)x2f(w[i]), counts[i] = fabs(value[i]);
        for (int N = 1; N <= 8; N += N < 4 ? 1 : 4) {
            size_t n = (size_t)(N * OC);
            floatX *x = new_x((size_t)(N * C), 1.0f), *y = new_x(n, 1.0f), *again = new_x(n, 1.0f);
            float *y32 = new_f32(n, 1.0f);
            double *want = must_alloc(n * sizeof *want), *bounds = must_alloc(n * sizeof *want);
            reference(want, bounds, x, value, counts, N, C, OC);
            for (size_t i = 0; i < sizeof isas / sizeof *isas; i++) {
                if (!cpu_isa_use(isas[i])) continue;
                o->matvec_forward(y, x, w, (size_t)N, C, OC);
                o->matvec_forward_f32(y32, x, w, (size_t)N, C, OC);
                check(y, y32, want, bounds, n);
                for (int t = 0; t < N; t++) o->matvec_forward(again + t * OC, x + t * C, w, 1, C, OC);
                expect_same(again, y, n * sizeof *y, "matvec, token by token", OC, C);
                set_threads(3);
                o->matvec_forward(again, x, w, (size_t)N, C, OC);
                set_threads(2);
                expect_same(again, y, n * sizeof *y, "matvec by three threads", OC, C);
            }
            free(x), free(y), free(again), free(y32), free(want), free(bounds);
        }
        free(w), free(value), free(counts);
    }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_served),
    cmocka_unit_test(test_pieces),
    cmocka_unit_test(test_matvec),
};
TEST_MAIN(tests)
