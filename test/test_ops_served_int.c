// Served linears whose inputs are quantized: every form of the kernels against the definition in ops.h, value by value
// and bit for bit, since sums are integers and the f32 expressions after them are fixed; and against the trained
// arithmetic within the bound of its roundings.
#include "cpu/isa.h"
#include "matmul_common.h"
#include "quant.h"

typedef struct {
    QuantSpec w, act;
    int C, OC;
    int64_t group, groups;
    uint8_t *packed;                // rows of codes
    float *scale, *zero;            // zero NULL: symmetric
    int16_t *codes;
} Linear;

static Linear new_linear(const char *weight, const char *act, int C, int OC) {
    Linear l = {.C = C, .OC = OC};
    Err err;
    int64_t block[2];
    size_t n = (size_t)OC * (size_t)C;
    if (quant_spec_parse(&l.w, weight, false, &err) < 0 || quant_spec_parse(&l.act, act, true, &err) < 0 ||
        quant_block_shape(&l.w, OC, C, block, &err) < 0)
        fail_msg("%s", err.text);
    l.group = block[1];
    l.groups = C / block[1];
    float *w = xmalloc(n * sizeof *w);
    for (int64_t r = 0; r < OC; r++) {
        // Rows of one sign and of both, with spread scales: codes of all kinds, zero points at both ends.
        float shift = r % 3 == 1 ? 0.9f : r % 3 == 2 ? -1.5f : 0.0f, size = 0.01f * (float)(1 + r % 7);
        for (int64_t c = 0; c < C; c++) w[r * C + c] = bf16_round(size * (uniform() + shift));
    }
    size_t blocks = (size_t)(OC * l.groups), row = quant_row_bytes(l.w.bits, C);
    QParams *qp = xmalloc(blocks * sizeof *qp);
    l.codes = xmalloc(n * sizeof *l.codes);
    if (quant_tensor(l.codes, qp, w, OC, C, &l.w, QD_BF16, &err) < 0) fail_msg("%s", err.text);
    l.packed = xmalloc((size_t)OC * row);
    l.scale = xmalloc(blocks * sizeof *l.scale);
    if (quant_has_zero(&l.w)) l.zero = xmalloc(blocks * sizeof *l.zero);
    for (int64_t r = 0; r < OC; r++) quant_pack_row(l.packed + (size_t)r * row, l.codes + r * C, C, l.w.bits);
    for (size_t i = 0; i < blocks; i++) {
        l.scale[i] = qp[i].scale;
        if (l.zero) l.zero[i] = qp[i].zp;
    }
    free(w);
    free(qp);
    return l;
}

static void free_linear(Linear *l) {
    free(l->packed);
    free(l->scale);
    free(l->zero);
    free(l->codes);
}

// Rows of inputs as they come, and rows that hurt: zeros, NaN, infinities, one sign, hardly anything.
static floatX *new_inputs(int N, int C) {
    floatX *x = random_x((size_t)N * (size_t)C, 2.0f);
    for (int n = 1; n < N; n++) {
        floatX *row = x + (size_t)n * (size_t)C;
        for (int c = 0; c < C; c++) {
            float v = x2f(row[c]);
            switch (n % 11) {
            case 1: v = 0.0f; break;
            case 3: v = c % 5 == 2 ? NAN : v; break;
            case 4: v = NAN; break;
            case 5: v = c == C / 2 ? INFINITY : v; break;
            case 6: v = fabsf(v) + 0.25f; break;
            case 7: v = -fabsf(v); break;
            case 8: v *= 1e-38f; break;
            case 9: v *= 1.5e38f; break;
            }
            row[c] = f2x(v);
        }
    }
    return x;
}

// ops.h, served_forward with act.
static float definition(const Linear *l, const int16_t *qx, float sx, int r) {
    float t = 0.0f, sum = 0.0f;
    for (int64_t g = 0; g < l->groups; g++) {
        int64_t at = r * l->groups + g, end = (g + 1) * l->group;
        int zw = l->zero ? (int)l->zero[at] : (int)quant_mid(&l->w);
        sum = 0.0f;
        for (int64_t c0 = g * l->group; c0 < end; c0 += 1 << 16) {
            int64_t acc = 0;
            for (int64_t c = c0; c < end && c < c0 + (1 << 16); c++)
                acc += qx[c] * (l->codes[(int64_t)r * l->C + c] - zw);
            sum = c0 == g * l->group ? (float)acc : sum + (float)acc;
        }
        t = fmaf(sum, l->scale[at], t);
    }
    return l->groups == 1 ? (sum * sx) * l->scale[r] : t * sx;
}

// Codes less zero point of a row of x; returns its scale.
static float quantize_row(int16_t *qx, const floatX *x, int C, const QuantSpec *act) {
    QuantDType d = sizeof(floatX) == 2 ? QD_BF16 : QD_F32;
    float mn = INFINITY, mx = -INFINITY;
    for (int c = 0; c < C; c++) quant_minmax(&mn, &mx, x2f(x[c]));
    QParams p = quant_choose(mn, mx, act, d);
    for (int c = 0; c < C; c++) qx[c] = (int16_t)(quant_code(x2f(x[c]), p, act, d) - (int)p.zp);
    return p.scale;
}

static float *reference(const Linear *l, const floatX *x, int N) {
    float *y = xmalloc((size_t)N * (size_t)l->OC * sizeof *y);
    int16_t *qx = xmalloc((size_t)l->C * sizeof *qx);
    for (int n = 0; n < N; n++) {
        float sx = quantize_row(qx, x + (size_t)n * (size_t)l->C, l->C, &l->act);
        for (int r = 0; r < l->OC; r++) y[(size_t)n * (size_t)l->OC + (size_t)r] = definition(l, qx, sx, r);
    }
    free(qx);
    return y;
}

// The served form, of rows in `parts` calls.
static void *pack(const Linear *l, int parts) {
    size_t bytes = ops->served_bytes(&l->w, &l->act, l->OC, l->C), row = quant_row_bytes(l->w.bits, l->C);
    assert_true(bytes > 0);
    void *served = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!served) abort();
    memset(served, 0xa5, bytes);
    for (int64_t i = 0, r0 = 0; i < parts; i++) {
        int64_t r1 = (int64_t)l->OC * (i + 1) / parts, at = r0 * l->groups;
        if (r1 > r0)
            ops->served_pack(served, l->packed + (size_t)r0 * row, l->scale + at, l->zero ? l->zero + at : NULL, &l->w,
                             &l->act, r0, r1 - r0, l->OC, l->C);
        r0 = r1;
    }
    return served;
}

static bool same_f32(float a, float b) { return f32_bits(a) == f32_bits(b) || (a != a && b != b); }

static void expect_forward(const Linear *l, const void *served, const floatX *x, const float *want, int N,
                           const char *how) {
    size_t n = (size_t)N * (size_t)l->OC;
    floatX *y = xmalloc(n * sizeof *y);
    float *y32 = xmalloc(n * sizeof *y32);
    ops->served_forward(y, x, served, &l->w, &l->act, (size_t)N, l->C, l->OC);
    ops->served_forward_f32(y32, x, served, &l->w, &l->act, (size_t)N, l->C, l->OC);
    check_device();
    for (size_t i = 0; i < n; i++)
        if (!same_f32(y32[i], want[i]) || !same_f32(x2f(y[i]), x2f(f2x(want[i]))))
            fail_msg("%s, N %d, C %d, OC %d: element %zu is %.9g, in X %.9g; expected %.9g", how, N, l->C, l->OC, i,
                     (double)y32[i], (double)x2f(y[i]), (double)want[i]);
    free(y);
    free(y32);
}

#define MOST 130
static const int tokens[] = {1, 2, 3, 7, 8, 9, 17, 64, MOST};

static void check(const char *weight, const char *act, int C, int OC, int most) {
    Linear l = new_linear(weight, act, C, OC);
    floatX *x = new_inputs(most, C);
    float *want = reference(&l, x, most);
    for (int isa = ISA_PLAIN; isa <= (int)ISA_AVX512_BF16; isa++) {
        if (!cpu_isa_use((CpuIsa)isa)) continue;
        for (int threads = 1; threads <= 2; threads++) {
            char how[256];
            set_threads(threads);
            snprintf(how, sizeof how, "%s by %s, %s, %d threads", weight, act, cpu_isa_name((CpuIsa)isa), threads);
            void *served = pack(&l, threads == 1 ? 1 : 3);
            for (size_t i = 0; i < sizeof tokens / sizeof *tokens && tokens[i] <= most; i++)
                expect_forward(&l, served, x, want, tokens[i], how);
            free(served);
        }
    }
    free(x);
    free(want);
    free_linear(&l);
}

static const char *const asymmetric = "int8,token,asymmetric";

static void groups_of_int4(void **unused) {
    (void)unused;
    state = 1;
    check("int4,group=32,symmetric", asymmetric, 32, 1, MOST);
    check("int4,group=32,symmetric", asymmetric, 96, 37, MOST);
    check("int4,group=32,symmetric", asymmetric, 576, 96, MOST);        // several panels, enough for two threads
    check("int4,group=32,symmetric", asymmetric, 1536, 50, 17);
    check("int4,group=64,symmetric", asymmetric, 128, 33, MOST);
    check("int4,group=128,symmetric", asymmetric, 256, 16, MOST);
    check("int4,group=256,symmetric", asymmetric, 512, 19, 17);
}

static void rows_of_int8(void **unused) {
    (void)unused;
    state = 2;
    check("int8,channel", "int8,token,symmetric", 64, 1, MOST);
    check("int8,channel", "int8,token,symmetric", 61, 35, MOST);
    check("int8,channel", "int8,token,symmetric", 576, 144, MOST);      // panels of four, three, two, one block
    check("int8,channel", asymmetric, 132, 100, MOST);
    check("int8,channel", "uint8,token,asymmetric", 3, 18, MOST);
    check("int8,channel,rows", "int8,token,rows", 100, 20, 17);
}

static void other_schemes(void **unused) {
    (void)unused;
    state = 3;
    check("uint4,group=32,asymmetric", asymmetric, 96, 37, MOST);
    check("uint4,group=16,asymmetric", "uint8,token,asymmetric", 48, 17, MOST);
    check("int4,channel", asymmetric, 99, 21, MOST);                    // a group with padding
    check("int4,group=12,symmetric", asymmetric, 36, 18, 17);
    check("int3,group=10,symmetric", "int4,token,asymmetric", 50, 18, 17);
    check("int2,group=2,symmetric", "uint2,token,asymmetric", 14, 5, 17);
    check("uint3,group=6,asymmetric", "int8,token,symmetric", 18, 33, 17);
    check("int5,group=12,symmetric", asymmetric, 36, 18, 17);
    check("uint6,group=8,asymmetric", "int5,token,asymmetric", 64, 40, MOST);
    check("uint7,group=6,asymmetric", asymmetric, 18, 18, 17);
    check("int8,channel,symmetric-no-clip,range=-20..100", asymmetric, 40, 18, 17);
    check("int8,group=32,symmetric", asymmetric, 128, 48, MOST);
    check("uint8,group=18,asymmetric", asymmetric, 54, 37, 17);
    check("int8,channel,asymmetric", "uint8,token,asymmetric", 70, 17, 17);
}

// Sums in pieces of 2^16 columns.
static void long_rows(void **unused) {
    (void)unused;
    state = 4;
    check("int8,channel", "int8,token,symmetric", 2 * 65536 + 21, 3, 9);
    check("int8,channel", asymmetric, 65536 + 4, 2, 3);
    check("int4,channel", asymmetric, 65536 + 9, 2, 3);
    check("int4,group=65544,symmetric", asymmetric, 2 * 65544, 2, 2);
}

static void no_form(void **unused) {
    (void)unused;
    QuantSpec w, act;
    Err err;
    quant_spec_parse(&act, asymmetric, true, &err);
    quant_spec_parse(&w, "int8,block=2x16", false, &err);
    assert_int_equal(ops->served_bytes(&w, &act, 16, 32), 0);
    quant_spec_parse(&w, "uint4,group=32,float", false, &err);
    assert_int_equal(ops->served_bytes(&w, &act, 16, 32), 0);
    quant_spec_parse(&w, "uint8,channel,asymmetric", false, &err);      // 255 * 255 * 2^16 is beyond int32
    assert_int_equal(ops->served_bytes(&w, &act, 16, 65536), 0);
}

// Trained arithmetic multiplies values that were rounded: inputs to X (relative error UX), weights to bf16 (2^-8), and
// adds C products in f32. Served sums are exact within a group; a group costs a conversion and a fused multiply-add,
// and two scales are multiplied: together at most (C + groups + 8) roundings of 2^-24, each of a partial sum below
// S = sum |x| |w|. So they differ by at most ((1 + UX) (1 + 2^-8) - 1 + (C + groups + 8) 2^-23) S.
static void near_trained(void **unused) {
    (void)unused;
    enum { N = 5, C = 512, OC = 24 };
    static const char *const weights[] = {"int4,group=32,symmetric", "int8,channel", "uint4,group=64,asymmetric"};
    state = 5;
    set_threads(1);
    for (size_t i = 0; i < sizeof weights / sizeof *weights; i++) {
        Linear l = new_linear(weights[i], asymmetric, C, OC);
        floatX *x = random_x(N * C, 2.0f), *fq = xmalloc(N * C * sizeof *fq), *work = xmalloc(OC * C * sizeof *work);
        float wscale[OC], served_y[N * OC], trained[N * OC];
        void *served = pack(&l, 1);
        ops->served_forward_f32(served_y, x, served, &l.w, &l.act, N, C, OC);
        ops->fakequant_forward(fq, NULL, x, N, C, &l.act);
        ops->dequant_rows(work, wscale, l.packed, l.scale, l.zero, &l.w, OC, C);
        bool codes = quant_works_as_codes(&l.w);
        ops->linear_forward_f32(trained, fq, work, codes ? wscale : NULL, N, C, OC);
        check_device();
        double rounding = (1 + UX) * (1 + 0x1p-8) - 1 + (double)(C + l.groups + 8) * 0x1p-23;
        int16_t qx[C];
        for (int n = 0; n < N; n++) {
            double sx = (double)quantize_row(qx, x + n * C, C, &l.act);
            for (int r = 0; r < OC; r++) {
                double size = 0;
                for (int c = 0; c < C; c++) {
                    int64_t at = r * l.groups + c / l.group;
                    double zw = l.zero ? (double)l.zero[at] : (double)quant_mid(&l.w);
                    size += fabs(qx[c] * sx * (l.codes[r * C + c] - zw) * (double)l.scale[at]);
                }
                double error = fabs((double)served_y[n * OC + r] - (double)trained[n * OC + r]);
                if (!(error <= rounding * size))
                    fail_msg("%s: served %.9g, trained %.9g, bound %.3g", weights[i], (double)served_y[n * OC + r],
                             (double)trained[n * OC + r], rounding * size);
            }
        }
        free(x);
        free(fq);
        free(work);
        free(served);
        free_linear(&l);
    }
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(groups_of_int4), cmocka_unit_test(rows_of_int8), cmocka_unit_test(other_schemes),
        cmocka_unit_test(long_rows),      cmocka_unit_test(no_form),      cmocka_unit_test(near_trained),
    };
    set_threads(1);
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL) != 0;
}
