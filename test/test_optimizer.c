// The scalar arithmetic of INT8 training and of low-bit optimizer states: worked examples, torchao's goldens, the rule
// of the maps, the statistics of stochastic rounding, and what it is for.
#include "ops_common.h"
#include "safetensors.h"

static const Ops *const o = &ops_cpu;
enum { SEED = 20260801 };

// ---------------------------------------------------------------------------------------------
// Worked examples

static void test_int8_rows_examples(void **state) {
    (void)state;
    static const float x[5] = {0.5f, -1.27f, 0.013f, 1.0f, -0.004f}, u[5] = {0.25f, 0.5f, 0.75f, 0.9f, 0.1f};
    static const int nearest[5] = {50, -127, 1, 100, 0}, stochastic[5] = {50, -127, 2, 100, -1};
    float scale = int8_row_scale(1.27f), inv = int8_row_inv(scale);
    expect_same_f32(scale, 0.00999999978f, "scale", 0);
    expect_same_f32(inv, 100.0f, "inverse", 0);
    for (int i = 0; i < 5; i++) {
        assert_int_equal(int8_nearest(x[i], inv), nearest[i]);
        assert_int_equal(int8_stochastic(x[i], inv, u[i]), stochastic[i]);
    }
    static const float y[4] = {0.1f, -0.2f, 0.3f, -0.4f}, z[4] = {0.001f, 5.0f, -2.5f, 0.0f};
    static const int y_codes[4] = {32, -64, 95, -127}, z_codes[4] = {0, 127, -64, 0};
    expect_same_f32(int8_row_scale(0.4f), f32_from_bits(0x3b4e69a0), "scale", 1);
    expect_same_f32(int8_row_scale(5.0f), f32_from_bits(0x3d214285), "scale", 2);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(int8_nearest(y[i], int8_row_inv(int8_row_scale(0.4f))), y_codes[i]);
        assert_int_equal(int8_nearest(z[i], int8_row_inv(int8_row_scale(5.0f))), z_codes[i]);
    }
    // A row of zeros; NaN; infinities, whose inverse scale is 0.
    assert_true(int8_row_scale(0.0f) == 0.0f);
    assert_int_equal(int8_stochastic(0.0f, int8_row_inv(0.0f), 0.999f), 0);
    assert_int_equal(int8_nearest(NAN, 100.0f), 0);
    assert_int_equal(int8_stochastic(INFINITY, int8_row_inv(int8_row_scale(INFINITY)), 0.5f), 0);
    // 127 plus almost one is 128 in f32.
    assert_int_equal(int8_stochastic(1.27f, 100.0f, 1.0f - 0x1p-24f), 127);
}

static void test_bf16_examples(void **state) {
    (void)state;
    const float x = -0.3001f, pi = f32_from_bits(0x40490fdb);
    expect_same_f32(bf16_to_f32(bf16_stochastic(x, 42676)), -0.30078125f, "away", 0);
    expect_same_f32(bf16_to_f32(bf16_stochastic(x, 42677)), -0.298828125f, "towards zero", 0);
    expect_same_f32(bf16_to_f32(bf16_stochastic(pi, 4058)), 3.15625f, "away", 1);
    expect_same_f32(bf16_to_f32(bf16_stochastic(pi, 4059)), 3.140625f, "towards zero", 1);
    expect_same_f32(bf16_to_f32(bf16_stochastic(-INFINITY, 0)), -INFINITY, "infinity", 0);
    expect_same_f32(bf16_to_f32(bf16_stochastic(f32_from_bits(0x7f800001), 0)), NAN, "NaN", 0);
    expect_same_f32(bf16_to_f32(bf16_stochastic(1.0f, 0)), 1.0f, "a bf16 value", 0);
}

static void test_map_examples(void **state) {
    (void)state;
    const float *s8 = state_map(STATE_INT8, true), *u8 = state_map(STATE_INT8, false);
    const float *s4 = state_map(STATE_INT4, true), *u4 = state_map(STATE_INT4, false);
    static const struct { int code; float value; } s[] = {{0, -0.992968738f}, {1, -0.978906274f}, {126, -5.5e-07f},
                                                          {127, 0}, {128, 5.5e-07f}, {129, 3.25e-06f},
                                                          {254, 0.992968738f}, {255, 1}},
        u[] = {{0, 0}, {1, 3.25e-07f}, {2, 7.75e-07f}, {3, 2.125e-06f}, {128, 0.110546872f}, {254, 0.996484399f},
               {255, 1}};
    // The examples' cuts were stepped without fused multiplications: values may differ by some units in the last place.
    const double ulps = 0x1p-21;
    for (size_t i = 0; i < sizeof s / sizeof *s; i++)
        expect_near(s8[s[i].code], s[i].value, fabs((double)s[i].value) * ulps, "signed", i);
    for (size_t i = 0; i < sizeof u / sizeof *u; i++)
        expect_near(u8[u[i].code], u[i].value, fabs((double)u[i].value) * ulps, "unsigned", i);
    double sum_s = 0.0, sum_u = 0.0;
    for (int c = 0; c < 256; c++) sum_s += fabs((double)s8[c]), sum_u += (double)u8[c];
    expect_near(sum_s, 75.1052630, 75.0 * ulps, "sum of signed values", 0);
    expect_near(sum_u, 75.1052653, 75.0 * ulps, "sum of unsigned values", 0);
    static const float x8[] = {0.5f, -0.013f, 1.0f, -1.0f, 1e-7f, 0.0551f};
    static const int codes8[] = {219, 94, 255, 0, 127, 175};
    for (int i = 0; i < 6; i++) assert_int_equal(state_code(STATE_INT8, s8, x8[i], 1.0f), codes8[i]);
    assert_int_equal(state_code(STATE_INT8, u8, 0.5f, 1.0f), 183);
    assert_int_equal(state_code(STATE_INT8, u8, 0.0551f, 1.0f), 95);
    assert_int_equal(state_code(STATE_INT4, u4, 0.09f, 1.0f), 0);
    assert_int_equal(state_code(STATE_INT4, u4, 0.5f, 1.0f), 7);
    assert_int_equal(state_code(STATE_INT4, s4, -0.3f, 1.0f), 3);
    assert_int_equal(state_code(STATE_INT4, s4, 0.03f, 1.0f), 9);
    // NaN is taken for zero, also in a block with an infinity.
    assert_int_equal(state_code(STATE_INT8, s8, NAN, 1.0f), 127);
    assert_int_equal(state_code(STATE_INT8, s8, -INFINITY, state_scale(STATE_INT8, INFINITY)), 127);
    assert_true(isnan(state_value(STATE_INT8, s8, 127, INFINITY)));
    assert_int_equal(state_code(STATE_INT4, u4, NAN, 1.0f), 0);
    assert_int_equal(state_code(STATE_FP8, NULL, NAN, 1.0f), 0);
    expect_same_f32(state_scale(STATE_INT8, 0.0f), 1e-12f, "scale of zeros", 0);
    expect_same_f32(state_scale(STATE_FP8, 896.0f), 2.0f, "scale of e4m3", 0);
}

// The maps once more from their description, in f32 as PyTorch's linspace steps from both ends.
static int by_value(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}
static void test_maps_from_description(void **state) {
    (void)state;
    for (int is_signed = 0; is_signed < 2; is_signed++)
        for (int decades = 7; decades >= (is_signed ? 3 : 7); decades -= 4) {
            float want[256] = {0.0f, 1.0f};
            int n = 2;
            for (int i = 0; i < decades; i++) {
                int cuts = (is_signed ? 1 : 2) << i;
                float b[129], step = (1.0f - 0.1f) / (float)cuts;
                for (int j = 0; j <= cuts; j++)
                    b[j] = j <= cuts / 2 ? 0.1f + step * (float)j : 1.0f - step * (float)(cuts - j);
                for (int j = 0; j < cuts; j++) {
                    float value = (float)pow(10.0, i + 1 - decades) * ((b[j] + b[j + 1]) / 2.0f);
                    want[n++] = value;
                    if (is_signed) want[n++] = -value;
                }
            }
            assert_int_equal(n, decades == 7 ? 256 : 16);
            qsort(want, (size_t)n, sizeof *want, by_value);
            const float *map = state_map(n == 256 ? STATE_INT8 : STATE_INT4, is_signed);
            // linspace fuses its multiplication in some builds: one unit in the last place of the cuts, of the sum of
            // two of them and of the product.
            for (int c = 0; c < n; c++) expect_near(map[c], want[c], fabs((double)want[c]) * 0x1p-22, "map", (size_t)c);
        }
    for (int c = 0; c < 16; c++)
        expect_same_f32(state_map(STATE_INT4, false)[c], (float)(c + 1) / 16.0f, "4-bit unsigned", (size_t)c);
}

// An edge is the smallest number whose code is above c: by the rule itself, for it and the number before it. Since the
// rule does not fall anywhere (checked on a walk through all magnitudes), codes are known for every number.
static void test_edges(void **state) {
    (void)state;
    static const float s8[256] = {STATE_EDGES_S8}, u8[256] = {STATE_EDGES_U8}, s4[16] = {STATE_EDGES_S4},
                       u4[16] = {STATE_EDGES_U4};
    for (int k = 0; k < 4; k++) {
        const float *edges = k == 0 ? s8 : k == 1 ? u8 : k == 2 ? s4 : u4;
        const float *map = state_map(k < 2 ? STATE_INT8 : STATE_INT4, k % 2 == 0);
        int n = k < 2 ? 256 : 16;
        assert_true(isinf(edges[n - 1]));
        for (int c = 0; c + 1 < n; c++) {
            assert_true(map[c] < map[c + 1] && map[c] < edges[c] && edges[c] <= map[c + 1]);
            assert_int_equal(state_map_code(map, n, edges[c]), c + 1);
            assert_int_equal(state_map_code(map, n, nextafterf(edges[c], -2.0f)), c);
            assert_int_equal(state_map_code(map, n, map[c]), c);
        }
        for (int side = k % 2 ? 1 : 0; side < 2; side++)
            for (uint32_t bits = 0, before = 0; bits <= 0x3f800000u; bits += 1 + bits / 4096) {
                int code = state_map_code(map, n, f32_from_bits(bits | (side ? 0u : 0x80000000u)));
                if (bits && (side ? code < (int)before : code > (int)before)) fail_msg("not monotone at %08x", bits);
                before = (uint32_t)code;
            }
    }
}

static void test_e4m3(void **state) {
    (void)state;
    assert_true(f8_e4m3_to_f32(0x7e) == 448.0f && f8_e4m3_to_f32(0x08) == 0x1p-6f && f8_e4m3_to_f32(0x01) == 0x1p-9f);
    assert_true(isnan(f8_e4m3_to_f32(0x7f)) && isnan(f8_e4m3_to_f32(0xff)));
    for (int code = 0; code < 256; code++) {
        float x = f8_e4m3_to_f32((f8_e4m3)code);
        assert_int_equal(f8_e4m3_from_f32(x), code);
        if ((code & 0x7f) >= 0x7e) continue;
        // Between neighbours: the middle goes to the even code, a hair beside it to the nearer one.
        float next = f8_e4m3_to_f32((f8_e4m3)(code + 1)), middle = x + (next - x) / 2.0f;
        assert_int_equal(f8_e4m3_from_f32(middle), code % 2 ? code + 1 : code);
        assert_int_equal(f8_e4m3_from_f32(nextafterf(middle, x)), code);
        assert_int_equal(f8_e4m3_from_f32(nextafterf(middle, next)), code + 1);
    }
    assert_int_equal(f8_e4m3_from_f32(1e9f), 0x7e);
    assert_int_equal(f8_e4m3_from_f32(-INFINITY), 0xfe);
    assert_int_equal(f8_e4m3_from_f32(1e-30f), 0);
}

// ---------------------------------------------------------------------------------------------
// torchao's goldens (dev/ref/gen_optim.py). All of it is f32 with the same roundings: compared for equality.

static Safetensors golden;

static const void *tensor(const char *name, DType type, size_t *n) {
    const StTensor *t = safetensors_find(&golden, name);
    if (!t) fail_msg("no %s in the golden file", name);
    if (t->dtype != type) fail_msg("%s is %s", name, dtype_name(t->dtype));
    *n = t->bytes / dtype_size(type);
    return t->data;
}
// As f32 with the same bits: rows of the file need not be aligned.
static float *floats(const char *name, size_t *n) {
    const StTensor *t = safetensors_find(&golden, name);
    if (!t) fail_msg("no %s in the golden file", name);
    *n = t->bytes / dtype_size(t->dtype);
    float *x = must_alloc(*n * sizeof *x);
    if (convert_to_f32(x, t->data, t->dtype, *n) < 0) fail_msg("%s is %s", name, dtype_name(t->dtype));
    return x;
}
static int open_golden(void **state) {
    (void)state;
    Err err = {0};
    if (!safetensors_open(&golden, "test/golden/optim.safetensors", &err)) return 0;
    print_message("%s\n", err.text);
    return -1;
}
static int close_golden(void **state) {
    (void)state;
    safetensors_close(&golden);
    return 0;
}

static void test_golden_rows(void **state) {
    (void)state;
    size_t n, rows;
    float *x = floats("rows|x", &n), *u = floats("rows|u", &n), *scale = floats("rows|scale", &rows);
    const int8_t *nearest = tensor("rows|nearest", DT_I8, &n), *stochastic = tensor("rows|stochastic", DT_I8, &n);
    size_t cols = n / rows;
    for (size_t r = 0; r < rows; r++) {
        float amax = 0.0f;
        for (size_t i = r * cols; i < (r + 1) * cols; i++) amax = fabsf(x[i]) > amax ? fabsf(x[i]) : amax;
        expect_same_f32(int8_row_scale(amax), scale[r], "scale", r);
        float inv = int8_row_inv(scale[r]);
        for (size_t i = r * cols; i < (r + 1) * cols; i++) {
            assert_int_equal(int8_nearest(x[i], inv), nearest[i]);
            assert_int_equal(int8_stochastic(x[i], inv, u[i]), stochastic[i]);
        }
    }
    free(x), free(u), free(scale);
}

static void test_golden_bf16(void **state) {
    (void)state;
    size_t n;
    float *x = floats("sr|x", &n), *y = floats("sr|y", &n);
    const uint8_t *r = tensor("sr|r", DT_I32, &n);
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, r + 4 * i, 4);
        expect_same_f32(bf16_to_f32(bf16_stochastic(x[i], bits)), y[i], "rounded value", i);
    }
    free(x), free(y);
}

static void test_golden_maps(void **state) {
    (void)state;
    static const char *const names[] = {"map|s8", "map|u8", "map|s4", "map|u4"};
    for (int k = 0; k < 4; k++) {
        size_t n;
        float *want = floats(names[k], &n);
        assert_int_equal(n, k < 2 ? 256 : 16);
        const float *map = state_map(k < 2 ? STATE_INT8 : STATE_INT4, k % 2 == 0);
        expect_same(map, want, n * sizeof *want, names[k], 1, (int)n);
        free(want);
    }
}

static const struct { const char *name; StateFormat format; } lows[] = {
    {"int8", STATE_INT8}, {"int4", STATE_INT4}, {"fp8", STATE_FP8}};

static void test_golden_states(void **state) {
    (void)state;
    for (size_t k = 0; k < 3; k++)
        for (int is_signed = 0; is_signed < 2; is_signed++) {
            char name[64];
            const char *which = is_signed ? "m" : "v";
            StateFormat f = lows[k].format;
            size_t n, bytes, block = (size_t)state_block(f);
            snprintf(name, sizeof name, "state|%s", which);
            float *x = floats(name, &n);
            snprintf(name, sizeof name, "state|%s|%s.dq", lows[k].name, which);
            float *dq = floats(name, &n);
            snprintf(name, sizeof name, "state|%s|%s.scale", lows[k].name, which);
            float *scale = floats(name, &bytes);
            snprintf(name, sizeof name, "state|%s|%s.codes", lows[k].name, which);
            const uint8_t *codes = tensor(name, DT_U8, &bytes);
            assert_int_equal(bytes, state_data_bytes(f, n));
            for (size_t i = 0; i < n; i++) {
                float amax = 0.0f, s = scale[i / block];
                for (size_t j = i / block * block; j < (i / block + 1) * block; j++)
                    amax = fabsf(x[j]) > amax ? fabsf(x[j]) : amax;
                int code = f != STATE_INT4 ? codes[i] : i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4;
                expect_same_f32(state_scale(f, amax), s, "scale", i);
                int got = state_code(f, state_map(f, is_signed), x[i], s);
                if (got != code) fail_msg("%s[%zu]: code %d, expected %d", name, i, got, code);
                expect_same_f32(state_value(f, state_map(f, is_signed), code, s), dq[i], name, i);
            }
            free(x), free(dq), free(scale);
        }
}

static void expect_part(const void *got, const char *format, const char *what, DType type) {
    char name[64];
    size_t n;
    snprintf(name, sizeof name, "step|%s|%s", format, what);
    const void *want = tensor(name, type, &n);
    expect_same(got, want, n * dtype_size(type), name, 1, (int)n);
}
static void test_golden_steps(void **state) {
    (void)state;
    enum { ROWS = 16, COLS = 256, N = ROWS * COLS };
    const AdamWParams h = {.beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0.01};
    for (size_t k = 0; k < 4; k++) {
        StateFormat f = k ? lows[k - 1].format : STATE_F32;
        const char *format = k ? lows[k - 1].name : "f32";
        size_t n;
        float *p = floats("step|p", &n), *g[2] = {floats("step|g1", &n), floats("step|g2", &n)};
        assert_int_equal(n, N);
        assert_int_equal(state_format(f, N), f);
        StoredState moments[2];
        for (int i = 0; i < 2; i++)
            moments[i] = (StoredState){f, calloc(N, 4), calloc(N, 4)};
        for (int t = 1; t <= 2; t++) {
            StepState s = {.t = t, .lr = 1e-3f, .grad_scale = 1.0f};
            o->adamw_low((StoredParam){PARAM_F32, p, NULL}, moments[0], moments[1], NULL, NULL, g[t - 1], &s, &h, NULL,
                         ROUND_STOCHASTIC, 0, 0, ROWS, COLS);
        }
        expect_part(p, format, "p", DT_F32);
        expect_part(moments[0].data, format, k ? "m.codes" : "m", k ? DT_U8 : DT_F32);
        expect_part(moments[1].data, format, k ? "v.codes" : "v", k ? DT_U8 : DT_F32);
        if (k) expect_part(moments[0].scale, format, "m.scale", DT_F32);
        if (k) expect_part(moments[1].scale, format, "v.scale", DT_F32);
        for (int i = 0; i < 2; i++) free(moments[i].data), free(moments[i].scale), free(g[i]);
        free(p);
    }
}

// ---------------------------------------------------------------------------------------------
// Statistics of the rounding, with one seed: the figures are the same in every run.

// Of a million draws: the mean is the value, within 4 standard errors.
static void test_unbiased(void **state) {
    (void)state;
    enum { N = 1000000 };
    static const double fractions[] = {0.02, 0.25, 0.5, 0.7, 0.999};
    for (size_t k = 0; k < 5; k++) {
        const uint64_t stream = rounding_stream(3, 17 + (int)k);
        double f = fractions[k], sum[2] = {0.0, 0.0}, error = sqrt(f * (1.0 - f) / N);
        float codes = (float)(-41.0 + f), bits = f32_from_bits(0x3e990000u + (uint32_t)(f * 65536.0));
        double exact = (double)codes + 41.0, exact16 = (double)(f32_bits(bits) & 0xffffu) / 65536.0;
        for (uint64_t i = 0; i < N; i++) {
            sum[0] += int8_stochastic(codes, 1.0f, rounding_uniform(SEED, stream, i)) + 41;
            sum[1] += bf16_stochastic(bits, rounding_bits16(SEED, stream, i)) - 0x3e99;
        }
        double z8 = (sum[0] / N - exact) / error, z16 = (sum[1] / N - exact16) / error;
        print_message("note mean of 1e6 draws at %.3f: int8 %+.2f, bf16 %+.2f standard errors\n", f, z8, z16);
        assert_true(fabs(z8) < 4.0);
        assert_true(fabs(z16) < 4.0);
    }
}

typedef struct { uint64_t seed; int tensor; int32_t t; uint64_t shift; } Draw;

// Chi-square with 255 degrees of freedom: mean 255, standard deviation sqrt(510) = 22.6; 4 of them to both sides.
static void expect_chi_square(const char *what, const int count[256], double expected) {
    double chi = 0.0;
    for (int i = 0; i < 256; i++) chi += (count[i] - expected) * (count[i] - expected) / expected;
    print_message("note chi-square of %s: %.1f (255 expected, 165 to 345 allowed)\n", what, chi);
    assert_true(chi > 255.0 - 4.0 * 22.6 && chi < 255.0 + 4.0 * 22.6);
}
static void test_independent(void **state) {
    (void)state;
    enum { N = 1 << 20, COLS = 576 };
    static const struct { const char *what; Draw other; } pairs[] = {
        {"neighbours", {SEED, 3, 17, 1}},           {"elements four apart", {SEED, 3, 17, 4}},
        {"neighbours in a column", {SEED, 3, 17, COLS}}, {"consecutive updates", {SEED, 3, 18, 0}},
        {"consecutive tensors", {SEED, 4, 17, 0}},  {"consecutive seeds", {SEED + 1, 3, 17, 0}},
        {"tensor and update exchanged", {SEED, 17, 3, 0}}, {"seeds 2^32 apart", {SEED + ((uint64_t)1 << 32), 3, 17, 0}},
    };
    const uint64_t stream = rounding_stream(3, 17);
    int uniform[256] = {0}, uniform16[256] = {0}, low16[256] = {0};
    uint8_t *sixteenth = must_alloc(N), *sixteenth16 = must_alloc(N);
    for (uint64_t i = 0; i < N; i++) {
        float u = rounding_uniform(SEED, stream, i);
        uint32_t r = rounding_bits16(SEED, stream, i);
        assert_true(u >= 0.0f && u < 1.0f && r < 65536);
        uniform[(int)(u * 256.0f)]++, uniform16[r >> 8]++, low16[r & 255]++;
        sixteenth[i] = (uint8_t)(u * 16.0f), sixteenth16[i] = (uint8_t)(r >> 12);
    }
    expect_chi_square("24-bit fractions", uniform, N / 256.0);
    expect_chi_square("upper 8 of 16 bits", uniform16, N / 256.0);
    expect_chi_square("lower 8 of 16 bits", low16, N / 256.0);
    // Two dimensions: sixteenths of one draw by sixteenths of another.
    for (size_t k = 0; k < sizeof pairs / sizeof *pairs; k++) {
        const Draw *d = &pairs[k].other;
        int both[256] = {0}, both16[256] = {0};
        char what[96];
        for (uint64_t i = 0; i < N; i++) {
            uint64_t other = rounding_stream(d->tensor, d->t), at = i + d->shift;
            both[16 * sixteenth[i] + (int)(rounding_uniform(d->seed, other, at) * 16.0f)]++;
            both16[16 * sixteenth16[i] + (int)(rounding_bits16(d->seed, other, at) >> 12)]++;
        }
        expect_chi_square(pairs[k].what, both, N / 256.0);
        snprintf(what, sizeof what, "%s, 16 bits", pairs[k].what);
        expect_chi_square(what, both16, N / 256.0);
    }
    free(sixteenth), free(sixteenth16);
}

// Updates of a fiftieth of a step between stored values: rounded to nearest, weights stand still; stochastically
// rounded, they follow the exact sum on average. A gradient of 1 makes AdamW's update lr, up to f32 rounding; the first
// weight has none and keeps the row's scale.
static void tiny_updates(ParamFormat format, Rounding rounding, double steps[4], const char *what) {
    enum { N = 1024, T = 500 };
    const AdamWParams h = {.beta1 = 0.9, .beta2 = 0.999, .eps = 1e-12};
    const float step = format == PARAM_INT8 ? 0x1p-10f : 0x1p-7f, start = format == PARAM_INT8 ? 20.0f * step : 1.5f;
    int8_t codes[N];
    bf16 halves[N];
    float scale = step, grad[N], m[N] = {0}, v[N] = {0};
    for (int i = 0; i < N; i++) {
        codes[i] = i ? 20 : 127;
        halves[i] = bf16_from_f32(start);
        grad[i] = i ? 1.0f : 0.0f;
    }
    StoredParam p = {format, format == PARAM_INT8 ? (void *)codes : halves, &scale};
    for (int t = 1; t <= T; t++) {
        StepState s = {.t = t, .lr = step / 50.0f, .grad_scale = 1.0f, .seed = SEED};
        o->adamw_low(p, (StoredState){STATE_F32, m, NULL}, (StoredState){STATE_F32, v, NULL}, NULL, NULL, grad, &s, &h,
                     NULL, rounding, 11, 0, 1, N);
        if (t % 125) continue;
        double sum = 0.0;
        for (int i = 1; i < N; i++)
            sum += format == PARAM_INT8 ? 20.0 - codes[i] : ((double)start - bf16_to_f32(halves[i])) / step;
        steps[t / 125 - 1] = sum / (N - 1);
        // Each update moves a weight with probability 1/50, independently.
        double exact = t / 50.0, error = sqrt(t * (1.0 / 50) * (49.0 / 50) / (N - 1));
        print_message("note %s after %d updates of 1/50 step: %.3f steps (exact %.1f, standard error %.3f)\n", what, t,
                      steps[t / 125 - 1], exact, error);
        if (rounding == ROUND_STOCHASTIC) expect_near(steps[t / 125 - 1], exact, 4.0 * error, what, (size_t)t);
        else assert_true(steps[t / 125 - 1] == 0.0);
    }
    if (format == PARAM_INT8) {
        expect_same_f32(scale, step, "row scale", 0);
        assert_int_equal(codes[0], 127);
    }
}
static void test_tiny_updates(void **state) {
    (void)state;
    double steps[4];
    tiny_updates(PARAM_INT8, ROUND_NEAREST, steps, "int8, nearest");
    tiny_updates(PARAM_INT8, ROUND_STOCHASTIC, steps, "int8, stochastic");
    tiny_updates(PARAM_BF16, ROUND_NEAREST, steps, "bf16, nearest");
    tiny_updates(PARAM_BF16, ROUND_STOCHASTIC, steps, "bf16, stochastic");
}

// One step in numbers.
static void test_adamw_example(void **state) {
    (void)state;
    float p = 1.0f, m = 0.0f, v = 0.0f, g = 0.5f;
    const AdamWParams h = {.beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0.01};
    StepState s = {.t = 1, .lr = 1e-3f, .grad_scale = 1.0f};
    const StoredState first = {STATE_F32, &m, NULL}, second = {STATE_F32, &v, NULL};
    const StoredParam param = {PARAM_F32, &p, NULL};
    o->adamw_low(param, first, second, NULL, NULL, &g, &s, &h, NULL, ROUND_STOCHASTIC, 0, 0, 1, 1);
    expect_same_f32(p, f32_from_bits(0x3f7fbdcf), "parameter", 0);
    expect_same_f32(m, 0.05f, "first moment", 0);
    expect_same_f32(v, 0.000250000012f, "second moment", 0);
}

static void test_formats_of_tensors(void **state) {
    (void)state;
    assert_int_equal(state_format(STATE_INT8, 4096), STATE_INT8);
    assert_int_equal(state_format(STATE_INT8, 4095), STATE_F32);         // small
    assert_int_equal(state_format(STATE_INT8, 4096 + 128), STATE_F32);   // not whole blocks
    assert_int_equal(state_format(STATE_INT4, 4096 + 128), STATE_INT4);
    assert_int_equal(state_format(STATE_BF16, 7), STATE_F32);
    assert_int_equal(state_format(STATE_BF16, 4097), STATE_BF16);
    assert_int_equal(state_unit(STATE_INT8, 576), 4);
    assert_int_equal(state_unit(STATE_INT4, 576), 2);
    assert_int_equal(state_unit(STATE_FP8, 2048), 1);
    assert_int_equal(state_unit(STATE_INT8, 17), 256);
    assert_int_equal(state_unit(STATE_BF16, 17), 1);
    assert_int_equal(state_data_bytes(STATE_INT4, 4096), 2048);
    assert_int_equal(state_scales(STATE_INT4, 4096), 32);
    assert_int_equal(state_scales(STATE_F32, 4096), 0);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_int8_rows_examples), cmocka_unit_test(test_bf16_examples),
    cmocka_unit_test(test_map_examples),       cmocka_unit_test(test_maps_from_description),
    cmocka_unit_test(test_edges),              cmocka_unit_test(test_e4m3),
    cmocka_unit_test(test_formats_of_tensors), cmocka_unit_test(test_adamw_example),
    cmocka_unit_test(test_golden_rows),        cmocka_unit_test(test_golden_bf16),
    cmocka_unit_test(test_golden_maps),        cmocka_unit_test(test_golden_states),
    cmocka_unit_test(test_golden_steps),       cmocka_unit_test(test_unbiased),
    cmocka_unit_test(test_independent),        cmocka_unit_test(test_tiny_updates),
};
int main(int argc, char **argv) {
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, open_golden, close_golden) != 0;
}
