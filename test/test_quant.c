// Quantization schemes: the worked examples of the specification, torchao's goldens, blocks that hurt, packing, names,
// plans as JSON. Codes, scales and values are compared for equality: both sides do the same roundings.
#include "quant.h"
#include "safetensors.h"
#include "test_common.h"

#define GOLDEN "test/golden/quant.safetensors"

static QuantSpec spec(const char *text) {
    QuantSpec s;
    Err err = {0};
    if (quant_spec_parse(&s, text, strstr(text, "token") != NULL, &err)) fail_msg("%s", err.text);
    return s;
}

static QuantScheme scheme(const char *name) {
    QuantScheme s;
    Err err = {0};
    if (quant_scheme_from_name(&s, name, &err)) fail_msg("%s", err.text);
    return s;
}

static void assert_same(const char *what, int i, float got, float expected) {
    if (f32_bits(got) != f32_bits(expected) && !(got == 0 && expected == 0))
        fail_msg("%s[%d]: got %.9g (%08x), expected %.9g (%08x)", what, i, (double)got, f32_bits(got), (double)expected,
                 f32_bits(expected));
}

// ---------------------------------------------------------------------------------------------
// Worked examples. One block: the scale, the zero point, every code and value.

typedef struct {
    const char *spec;
    QuantDType d;
    int n;
    float x[8];
    uint32_t scale;          // bits
    float zp;
    int code[8];
    float dq[8];
} Example;

static void run_example(const Example *e) {
    QuantSpec s = spec(e->spec);
    float mn = INFINITY, mx = -INFINITY;
    for (int i = 0; i < e->n; i++) quant_minmax(&mn, &mx, e->x[i]);
    QParams p = quant_choose(mn, mx, &s, e->d);
    assert_same(e->spec, -1, p.scale, f32_from_bits(e->scale));
    assert_same(e->spec, -2, p.zp, e->zp);
    for (int i = 0; i < e->n; i++) {
        int code = quant_code(e->x[i], p, &s, e->d);
        if (code != e->code[i]) fail_msg("%s code[%d]: got %d, expected %d", e->spec, i, code, e->code[i]);
        assert_same(e->spec, i, quant_dequant((float)code, p, &s, e->d), e->dq[i]);
        assert_same(e->spec, i, quant_fake(e->x[i], p, &s, e->d), e->dq[i]);
    }
}

#define G4 "int4,group=4,symmetric"
#define F4 "uint4,group=4,float"
static const Example examples[] = {
    // int8 per token, asymmetric
    {"int8,token,asymmetric", QD_F32, 6, {-1, -0.3f, 0, 0.45f, 0.1f, 2}, 0x3c40c0c1, -43,
     {-128, -69, -43, -5, -35, 127}, {-1, -0.305882365f, 0, 0.447058827f, 0.0941176489f, 2}},
    {"int8,token,asymmetric", QD_BF16, 6, {-1, -0.30078125f, 0, 0.44921875f, 0.10009765625f, 2}, 0x3c410000, -43,
     {-128, -69, -43, -5, -35, 127}, {-1, -0.306640625f, 0, 0.447265625f, 0.09423828125f, 2}},
    {"int8,token,asymmetric", QD_F32, 4, {0, 0, 0, 0}, 0x34000000, -128, {-128, -128, -128, -128}, {0, 0, 0, 0}},
    {"int8,token,asymmetric", QD_F32, 4, {0.5f, 1.5f, 3, 0.25f}, 0x3c40c0c1, -128, {-86, 0, 127, -107},
     {0.494117647f, 1.50588238f, 3, 0.247058824f}},
    {"int8,token,asymmetric", QD_F32, 4, {-4, -1, -0.5f, -2}, 0x3c808081, 127, {-128, 63, 95, 0},
     {-4, -1.00392163f, -0.501960814f, -1.99215698f}},
    {"int8,token,asymmetric", QD_F32, 4, {1e-9f, -1e-9f, 0, 5e-10f}, 0x34000000, -128, {-128, -128, -128, -128},
     {0, 0, 0, 0}},
    {"int8,token,asymmetric", QD_F32, 4, {0.1f, -0.7f, 0.33f, 12.5f}, 0x3d54073a, -114, {-112, -128, -108, 127},
     {0.103529409f, -0.724705875f, 0.310588241f, 12.4752941f}},
    // int4 groups, symmetric; the outer code of the largest value is decided by the last bit of the scale
    {"int4,group=8,symmetric", QD_F32, 8, {0.7f, -0.31f, 0.05f, -0.7f, 0.12f, 0.46f, -0.02f, 0.233f}, 0x3dbf258c, 0,
     {7, -3, 1, -8, 1, 5, 0, 2},
     {0.653333306f, -0.280000001f, 0.0933333337f, -0.74666667f, 0.0933333337f, 0.466666669f, 0, 0.186666667f}},
    {"int4,group=8,symmetric-no-clip", QD_F32, 8, {0.7f, -0.31f, 0.05f, -0.7f, 0.12f, 0.46f, -0.02f, 0.233f},
     0x3dcccccd, 0, {7, -3, 0, -7, 1, 5, 0, 2}, {0.7f, -0.3f, 0, -0.7f, 0.1f, 0.5f, 0, 0.2f}},
    {"int4,group=8,symmetric", QD_BF16, 8,
     {0.69921875f, -0.310546875f, 0.050048828125f, -0.69921875f, 0.1201171875f, 0.4609375f, -0.02001953125f,
      0.2333984375f},
     0x3dbf0000, 0, {7, -3, 1, -7, 1, 5, 0, 3},
     {0.65234375f, -0.279296875f, 0.09326171875f, -0.65234375f, 0.09326171875f, 0.466796875f, 0, 0.279296875f}},
    {G4, QD_F32, 4, {0.02f, -0.01f, 0.005f, -0.015f}, 0x3b2ec33e, 0, {7, -4, 2, -6},
     {0.018666666f, -0.0106666666f, 0.00533333328f, -0.0159999989f}},
    {G4, QD_F32, 4, {-1, 0.2f, 0.6f, -0.45f}, 0x3e088889, 0, {-7, 1, 4, -3},
     {-0.933333397f, 0.13333334f, 0.533333361f, -0.400000036f}},
    {G4, QD_F32, 4, {0, 0, 0, 0}, 0x00800000, 0, {0, 0, 0, 0}, {0, 0, 0, 0}},
    // weights of ordinary size must not meet an eps of 2^-7
    {G4, QD_BF16, 4, {0.030029296875f, -0.02001953125f, 0.010009765625f, -0.0050048828125f}, 0x3b830000, 0,
     {7, -5, 3, -1}, {0.0279541015625f, -0.02001953125f, 0.011962890625f, -0.003997802734375f}},
    {"int4,group=4,symmetric,eps=0.0078125", QD_BF16, 4,
     {0.030029296875f, -0.02001953125f, 0.010009765625f, -0.0050048828125f}, 0x3c000000, 0, {4, -3, 1, -1},
     {0.03125f, -0.0234375f, 0.0078125f, -0.0078125f}},
    // small widths
    {"int2,group=4,symmetric", QD_F32, 4, {0.5f, -0.2f, 0.1f, -0.5f}, 0x3eaaaaab, 0, {1, -1, 0, -2},
     {0.333333343f, -0.333333343f, 0, -0.666666687f}},
    {"int3,group=4,symmetric", QD_F32, 4, {0.5f, -0.2f, 0.1f, -0.5f}, 0x3e124925, 0, {3, -1, 1, -3},
     {0.428571463f, -0.142857149f, 0.142857149f, -0.428571463f}},
    // uint4 with a float zero point
    {"uint4,group=8,float", QD_BF16, 8,
     {0.10986328125f, -0.310546875f, 0.050048828125f, -0.69921875f, 0.1201171875f, 0.4609375f, -0.02001953125f,
      0.2333984375f},
     0x3d9e0000, -0.08203125f, {10, 5, 10, 0, 11, 15, 9, 12},
     {0.072265625f, -0.3125f, 0.072265625f, -0.69921875f, 0.1494140625f, 0.45703125f, -0.0048828125f, 0.2265625f}},
    {F4, QD_BF16, 4, {1, 2, 3, 4}, 0x3e4d0000, 2.59375f, {0, 5, 10, 15}, {0.9921875f, 1.9921875f, 3, 4}},
    // eager PyTorch rounds product and sum and gets -0.120117188; one fused multiply-add gives -0.119628906
    {F4, QD_BF16, 4, {-0.5f, -0.25f, -0.125f, -0.0625f}, 0x3cef0000, -0.265625f, {0, 9, 13, 15},
     {-0.5f, -0.236328125f, -0.11962890625f, -0.0615234375f}},
    {F4, QD_BF16, 4, {0.30078125f, 0.30078125f, 0.30078125f, 0.30078125f}, 0x35860000, 0.30078125f, {0, 0, 0, 0},
     {0.30078125f, 0.30078125f, 0.30078125f, 0.30078125f}},
    {F4, QD_BF16, 4, {0.010009765625f, -0.02001953125f, 0.030029296875f, 0.0150146484375f}, 0x3b5b0000,
     0.00671386719f, {9, 0, 15, 10}, {0.01007080078125f, -0.02001953125f, 0.0301513671875f, 0.013427734375f}},
    {F4, QD_BF16, 4, {0.0341796875f, -0.08740234375f, 0.0517578125f, 0.0181884765625f}, 0x3c170000, -0.013671875f,
     {13, 0, 15, 11}, {0.032470703125f, -0.08740234375f, 0.05078125f, 0.01397705078125f}},
    // int8wo and int8dq
    {"int8,channel,symmetric", QD_F32, 5, {0.5f, -1.27f, 0.013f, 1, -0.004f}, 0x3c23328f, 0, {50, -128, 1, 100, 0},
     {0.498039216f, -1.27498043f, 0.00996078458f, 0.996078432f, 0}},
    {"int8,token,symmetric", QD_F32, 5, {0.5f, -1.27f, 0.013f, 1, -0.004f}, 0x3c23d70a, 0, {50, -127, 1, 100, 0},
     {0.5f, -1.26999998f, 0.00999999978f, 1, 0}},
    {"int8,token,symmetric", QD_BF16, 5, {0.5f, -1.2734375f, 0.01300048828125f, 1, -0.0040283203125f}, 0x3c240000, 0,
     {50, -127, 1, 100, 0}, {0.5f, -1.2734375f, 0.010009765625f, 1, 0}},
    {"int8,channel,symmetric", QD_BF16, 5, {0.5f, -1.2734375f, 0.01300048828125f, 1, -0.0040283203125f}, 0x3c240000,
     0, {50, -127, 1, 100, 0}, {0.5f, -1.2734375f, 0.010009765625f, 1, 0}},
    {"int8,channel,symmetric", QD_F32, 4, {0.1f, -0.2f, 0.3f, -0.4f}, 0x3b4d9a67, 0, {32, -64, 96, -128},
     {0.100392155f, -0.200784311f, 0.301176459f, -0.401568621f}},
    {"int8,token,symmetric", QD_F32, 4, {0.1f, -0.2f, 0.3f, -0.4f}, 0x3b4e69a0, 0, {32, -64, 95, -127},
     {0.100787401f, -0.201574802f, 0.299212605f, -0.400000006f}},
    {"int8,channel,symmetric", QD_F32, 4, {0.001f, 5, -2.5f, 0}, 0x3d20a0a1, 0, {0, 127, -64, 0},
     {0, 4.98039246f, -2.50980401f, 0}},
    {"int8,token,symmetric", QD_F32, 4, {0.001f, 5, -2.5f, 0}, 0x3d214285, 0, {0, 127, -64, 0},
     {0, 5, -2.51968503f, 0}},
};

static void test_worked_examples(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof examples / sizeof *examples; i++) run_example(&examples[i]);

    // One bit: no text names it, the arithmetic has it.
    QuantSpec one = {.bits = 1, .qmin = -1, .qmax = 0, .gran = QG_GROUP, .group = 4, .eps = 0x1p-126f};
    QParams p = quant_choose(-0.5f, 0.5f, &one, QD_F32);
    assert_same("int1", 0, p.scale, 1.0f);
    const float w[] = {0.5f, -0.2f, 0.1f, -0.5f};
    for (int i = 0; i < 4; i++) assert_int_equal(quant_code(w[i], p, &one, QD_F32), 0);

    // The scale is f32 in the product: in bf16 arithmetic this weight would get 6.
    QuantSpec int4 = spec(G4);
    assert_int_equal(quant_code(0.07373046875f, (QParams){0.013427734375f, 0}, &int4, QD_BF16), 5);

    // The zero point is added after rounding: x / scale = 0.5 gives rne(0.5) + 1 = 1, not rne(1.5) = 2.
    QuantSpec token = spec("int8,token,asymmetric");
    assert_int_equal(quant_code(0.5f, (QParams){1, 1}, &token, QD_F32), 1);

    // f32 qparams of the float domain, and f32 weights with qparams rounded to bf16.
    QuantSpec tiny = spec("uint4,group=8,float");
    const float x[] = {0.11f, -0.31f, 0.05f, -0.7f, 0.12f, 0.46f, -0.02f, 0.233f};
    const int codes[] = {10, 5, 10, 0, 11, 15, 9, 12};
    const float dq[] = {0.07275390625f, -0.31298828125f, 0.07275390625f, -0.69873046875f,
                        0.14990234375f, 0.45849609375f, -0.00439453125f, 0.22705078125f};
    p = quant_choose(-0.7f, 0.46f, &tiny, QD_F32);
    assert_same("tinygemm f32 scale", 0, p.scale, 0.0773333311f);
    assert_same("tinygemm f32 zero", 0, p.zp, -0.0813333392f);
    QParams b = {bf16_round(p.scale), bf16_round(p.zp)};
    assert_same("tinygemm bf16 scale", 0, b.scale, 0.0771484375f);
    assert_same("tinygemm bf16 zero", 0, b.zp, -0.08154296875f);
    for (int i = 0; i < 8; i++) {
        assert_int_equal(quant_code(x[i], p, &tiny, QD_F32), codes[i]);
        assert_same("tinygemm dq", i, quant_dequant((float)codes[i], b, &tiny, QD_F32), dq[i]);
    }
}

static void test_ste_mask(void **state) {
    (void)state;
    QuantSpec s = spec(G4);
    const float w[] = {0.7f, 0.36f, -0.41f, -0.39f};
    const int before[] = {14, 7, -8, -8};
    const bool inside[] = {false, true, true, true};
    for (int i = 0; i < 4; i++) {
        assert_same("unclamped", i, quant_unclamped(w[i], (QParams){0.05f, 0}, &s, QD_F32), (float)before[i]);
        assert_int_equal(quant_in_range(w[i], (QParams){0.05f, 0}, &s, QD_F32), inside[i]);
    }
    assert_false(quant_in_range(NAN, (QParams){0.05f, 0}, &s, QD_F32));
    assert_false(quant_in_range(INFINITY, (QParams){0.05f, 0}, &s, QD_F32));
}

// ---------------------------------------------------------------------------------------------
// torchao's goldens.

static const StTensor *golden(const Safetensors *st, const char *prefix, const char *what, bool required) {
    char name[220];
    snprintf(name, sizeof name, "%s|%s", prefix, what);
    const StTensor *t = safetensors_find(st, name);
    if (!t && required) fail_msg("%s has no %s", GOLDEN, name);
    return t;
}

static float *widen(const StTensor *t, size_t n) {
    float *x = malloc(n * sizeof *x);
    assert_non_null(x);
    assert_int_equal(t->bytes, n * dtype_size(t->dtype));
    assert_int_equal(convert_to_f32(x, t->data, t->dtype, n), 0);
    return x;
}

static void check_golden(const Safetensors *st, const char *prefix) {
    char text[100], input[100];
    assert_int_equal(sscanf(prefix, "%99[^|]|%99[^|]", text, input), 2);
    QuantSpec s = spec(text);
    const StTensor *x_t = safetensors_find(st, input);
    assert_non_null(x_t);
    assert_int_equal(x_t->ndim, 2);
    int64_t rows = x_t->shape[0], cols = x_t->shape[1], block[2];
    size_t n = (size_t)(rows * cols);
    QuantDType d = x_t->dtype == DT_BF16 ? QD_BF16 : QD_F32;
    assert_int_equal(quant_block_shape(&s, rows, cols, block, NULL), 0);
    int64_t across = cols / block[1];
    size_t blocks = (size_t)(rows / block[0] * across);

    const StTensor *zero_t = golden(st, prefix, "zero", false), *mask_t = golden(st, prefix, "mask", false);
    const StTensor *codes_t = golden(st, prefix, "codes", true);
    float *x = widen(x_t, n), *scale = widen(golden(st, prefix, "scale", true), blocks);
    float *zero = zero_t ? widen(zero_t, blocks) : NULL, *dq = widen(golden(st, prefix, "dq", true), n);
    assert_int_equal(zero_t != NULL, quant_has_zero(&s));
    assert_int_equal(codes_t->bytes, n);

    int16_t *codes = malloc(n * sizeof *codes);
    QParams *qp = malloc(blocks * sizeof *qp);
    assert_non_null(codes);
    assert_non_null(qp);
    Err err = {0};
    if (quant_tensor(codes, qp, x, rows, cols, &s, d, &err)) fail_msg("%s", err.text);
    for (size_t b = 0; b < blocks; b++) {
        assert_same(prefix, (int)b, qp[b].scale, scale[b]);
        assert_same(prefix, (int)b, qp[b].zp, zero ? zero[b] : 0.0f);
    }
    for (size_t i = 0; i < n; i++) {
        int expected = s.is_unsigned ? codes_t->data[i] : (int8_t)codes_t->data[i];
        QParams p = qp[(int64_t)i / cols / block[0] * across + (int64_t)i % cols / block[1]];
        if (codes[i] != expected)
            fail_msg("%s: code %zu of %.9g is %d, expected %d", prefix, i, (double)x[i], codes[i], expected);
        assert_same(prefix, (int)i, quant_dequant((float)codes[i], p, &s, d), dq[i]);
        assert_same(prefix, (int)i, quant_fake(x[i], p, &s, d), dq[i]);
        if (mask_t && quant_in_range(x[i], p, &s, d) != mask_t->data[i])
            fail_msg("%s: clip mask %zu of %.9g is not %d", prefix, i, (double)x[i], mask_t->data[i]);
    }
    free(x), free(scale), free(zero), free(dq), free(codes), free(qp);
}

static void test_torchao_goldens(void **state) {
    (void)state;
    Safetensors st;
    Err err = {0};
    if (safetensors_open(&st, GOLDEN, &err)) fail_msg("%s", err.text);
    int cases = 0;
    for (int i = 0; i < st.n; i++) {
        char prefix[200];
        const char *end = strstr(st.tensors[i].name, "|codes");
        if (!end) continue;
        snprintf(prefix, sizeof prefix, "%.*s", (int)(end - st.tensors[i].name), st.tensors[i].name);
        check_golden(&st, prefix);
        cases++;
    }
    safetensors_close(&st);
    assert_true(cases >= 70);
}

// ---------------------------------------------------------------------------------------------
// Blocks that hurt.

static const char *const all_specs[] = {
    "int2,group=8,symmetric", "int3,group=8,symmetric", "int4,group=8,symmetric", "int5,group=8,symmetric",
    "int6,group=8,symmetric", "int7,group=8,symmetric", "int8,group=8,symmetric", "int4,group=8,symmetric-no-clip",
    "int4,group=8,asymmetric", "uint4,group=8,asymmetric", "uint4,group=8,float", "uint2,group=8,float",
    "uint8,group=8,float", "int8,channel,symmetric", "int4,tensor,asymmetric", "int4,block=1x8,symmetric",
    "int4,channel,symmetric,range=-7..7", "int8,token,symmetric", "int8,token,asymmetric"};
#define N_SPECS (sizeof all_specs / sizeof *all_specs)

static void quantize_eight(const char *text, const float x[8], QuantDType d, QParams *p, int16_t codes[8]) {
    QuantSpec s = spec(text);
    Err err = {0};
    if (quant_tensor(codes, p, x, 1, 8, &s, d, &err)) fail_msg("%s: %s", text, err.text);
    for (int i = 0; i < 8; i++)
        if (codes[i] < s.qmin || codes[i] > s.qmax) fail_msg("%s: code %d is out of its range", text, codes[i]);
}

static void test_zero_and_constant_blocks(void **state) {
    (void)state;
    const float zeros[8] = {0, -0.0f, 0, 0, -0.0f, 0, 0, 0};
    float constant[8];
    for (int k = 0; k < 8; k++) constant[k] = -0.30078125f;
    for (size_t i = 0; i < N_SPECS; i++)
        for (QuantDType d = QD_F32; d <= QD_BF16; d++) {
            QuantSpec s = spec(all_specs[i]);
            QParams p;
            int16_t codes[8];
            quantize_eight(all_specs[i], zeros, d, &p, codes);
            assert_same("zero block scale", (int)i, p.scale, quant_round_d(s.eps, d));
            for (int k = 0; k < 8; k++) {
                float v = quant_fake(zeros[k], p, &s, d);
                // The float domain's zero is mn + scale * mid, so a zero block comes back exactly through code 0.
                assert_true(v == 0.0f);
                if (s.zero == QZ_INT) assert_false(signbit(v));   // adding the zero point makes -0 a +0
            }
            quantize_eight(all_specs[i], constant, d, &p, codes);
            for (int k = 0; k < 8; k++) {
                float v = quant_dequant(codes[k], p, &s, d);
                // Half a step from rounding and, where the largest value clips from 2^(b-1) to 2^(b-1) - 1, half a step
                // more; the roundings of scale and value to bf16 add 2^-8 of the value each, twice.
                if (fabsf(v - constant[k]) > p.scale + 0.31f * 0x1p-6f)
                    fail_msg("%s: constant %g came back as %g", all_specs[i], (double)constant[k], (double)v);
            }
        }
}

static void test_nan_and_infinity(void **state) {
    (void)state;
    for (size_t i = 0; i < N_SPECS; i++)
        for (QuantDType d = QD_F32; d <= QD_BF16; d++) {
            QuantSpec s = spec(all_specs[i]);
            float x[8] = {0.5f, -0.25f, NAN, 1, -1, 0.125f, 0, 0.75f}, without[8];
            memcpy(without, x, sizeof x);
            without[2] = 0;
            QParams p, q;
            int16_t codes[8], other[8];
            quantize_eight(all_specs[i], x, d, &p, codes);
            quantize_eight(all_specs[i], without, d, &q, other);
            assert_same("a NaN takes no part in the range", (int)i, p.scale, q.scale);
            assert_memory_equal(codes, other, sizeof codes);           // and its code is that of zero
            assert_true(isnan(quant_fake(NAN, p, &s, d)));             // training must see it

            for (int k = 0; k < 8; k++) x[k] = NAN;
            quantize_eight(all_specs[i], x, d, &p, codes);
            assert_same("only NaN", (int)i, p.scale, quant_round_d(s.eps, d));

            const float ends[][2] = {{INFINITY, 1}, {-INFINITY, 1}, {INFINITY, -INFINITY}, {3e38f, -3e38f}};
            for (int e = 0; e < 4; e++) {
                memcpy(x, without, sizeof x);
                x[1] = ends[e][0], x[6] = ends[e][1];
                quantize_eight(all_specs[i], x, d, &p, codes);
                if (e == 3 && s.mapping != QM_ASYMMETRIC) {            // finite: symmetric takes one end only
                    assert_true(isfinite(p.scale));
                    continue;
                }
                assert_true(isinf(p.scale));
                for (int k = 0; k < 8; k++) assert_true(isnan(quant_fake(x[k], p, &s, d)));
            }
        }
}

static void test_subnormal_and_smallest(void **state) {
    (void)state;
    for (size_t i = 0; i < N_SPECS; i++) {
        QuantSpec s = spec(all_specs[i]);
        const float x[8] = {0x1p-149f, -0x1p-149f, 0x1p-126f, -0x1p-127f, 0x1p-133f, 0, 0x1p-130f, 0x1p-126f};
        QParams p;
        int16_t codes[8];
        quantize_eight(all_specs[i], x, QD_F32, &p, codes);
        assert_same("floored scale", (int)i, p.scale, s.eps);          // never below eps, never subnormal
        for (int k = 0; k < 8; k++) assert_true(fabsf(quant_fake(x[k], p, &s, QD_F32)) <= 2 * s.eps);
    }
}

// Rows are independent and the reference's threads change nothing; blocks of several rows share one scale.
static void test_blocks(void **state) {
    (void)state;
    enum { R = 12, C = 48 };
    float w[R * C];
    for (int i = 0; i < R * C; i++) w[i] = bf16_round((float)((i * 7919) % 1009 - 500) / 317.0f);
    QuantSpec s = spec("int4,block=3x16,symmetric");
    int16_t codes[R * C];
    QParams qp[(R / 3) * (C / 16)];
    assert_int_equal(quant_tensor(codes, qp, w, R, C, &s, QD_BF16, NULL), 0);
    for (int br = 0; br < R / 3; br++)
        for (int bc = 0; bc < C / 16; bc++) {
            float amax = 0;
            for (int r = 0; r < 3; r++)
                for (int c = 0; c < 16; c++) amax = fmaxf(amax, fabsf(w[(br * 3 + r) * C + bc * 16 + c]));
            QParams p = qp[br * (C / 16) + bc];
            assert_same("block scale", br, p.scale, bf16_round(amax / 7.5f));
            for (int r = 0; r < 3; r++)
                for (int c = 0; c < 16; c++) {
                    int at = (br * 3 + r) * C + bc * 16 + c;
                    assert_int_equal(codes[at], quant_code(w[at], p, &s, QD_BF16));
                }
        }

    Err err = {0};
    int64_t block[2];
    QuantSpec g = spec("int4,group=48,symmetric"), b = spec("int4,block=5x16,symmetric");
    assert_int_equal(quant_block_shape(&g, 4, 2048, block, &err), E_SHAPE);
    assert_non_null(strstr(err.text, "48"));
    assert_non_null(strstr(err.text, "2048"));
    assert_int_equal(quant_block_shape(&b, 12, 48, block, &err), E_SHAPE);
    assert_int_equal(quant_block_shape(&g, 0, 48, block, &err), E_SHAPE);
    assert_int_equal(quant_tensor(codes, qp, w, R, C, &b, QD_BF16, &err), E_SHAPE);
    QuantSpec t = spec("int8,tensor");
    assert_int_equal(quant_block_shape(&t, 5, 7, block, &err), 0);
    assert_true(block[0] == 5 && block[1] == 7);
}

// ---------------------------------------------------------------------------------------------
// Packing.

static void test_packing(void **state) {
    (void)state;
    enum { MAX = 67 };
    for (int bits = 2; bits <= 8; bits++)
        for (int is_unsigned = 0; is_unsigned <= 1; is_unsigned++)
            for (int cols = 1; cols <= MAX; cols++) {
                QuantSpec s = {.bits = bits, .is_unsigned = is_unsigned};
                int low = is_unsigned ? 0 : -(1 << (bits - 1)), n = 1 << bits;
                int16_t codes[MAX], back[MAX];
                for (int c = 0; c < cols; c++) codes[c] = (int16_t)(low + (c * 37 + c * c + cols) % n);
                size_t bytes = quant_row_bytes(bits, cols);
                assert_int_equal(bytes, (cols * bits + 7) / 8);
                uint8_t packed[MAX + 2], expected[MAX + 2] = {0};
                memset(packed, 0xa5, sizeof packed);
                quant_pack_row(packed, codes, cols, bits);
                for (int c = 0; c < cols; c++)                        // bit by bit
                    for (int k = 0; k < bits; k++)
                        if (codes[c] >> k & 1) expected[(c * bits + k) / 8] |= (uint8_t)(1 << (c * bits + k) % 8);
                assert_memory_equal(packed, expected, bytes);         // the last byte's unused bits are zero
                assert_int_equal(packed[bytes], 0xa5);                // and nothing is written behind it
                quant_unpack_row(back, packed, cols, &s);
                assert_memory_equal(back, codes, (size_t)cols * sizeof *codes);
            }
    const int16_t drawn[2] = {-3, 5};
    uint8_t byte;
    quant_pack_row(&byte, drawn, 2, 4);
    assert_int_equal(byte, 0x5d);
    assert_int_equal(quant_row_bytes(3, (int64_t)1 << 33), 3ull << 30);
}

// ---------------------------------------------------------------------------------------------
// Names.

static void test_presets(void **state) {
    (void)state;
    static const struct { const char *name, *weight, *act; } presets[] = {
        {"none", "none", "none"}, {"int8wo", "int8,channel,symmetric", "none"},
        {"int8dq", "int8,channel,symmetric", "int8,token,symmetric"}, {"int4wo-64", "uint4,group=64,float", "none"},
        {"8da4w-32", "int4,group=32,symmetric", "int8,token,asymmetric"},
        {"int2-16", "int2,group=16,symmetric", "none"}, {"int3-32", "int3,group=32,symmetric", "none"},
        {"int8-128", "int8,group=128,symmetric", "none"},
        {"int8qt", "int8,channel,rows", "none"}, {"int8qt-int8", "int8,channel,rows", "int8,token,rows"},
    };
    for (size_t i = 0; i < sizeof presets / sizeof *presets; i++) {
        char text[QUANT_SPEC_TEXT];
        QuantScheme s = scheme(presets[i].name);
        quant_spec_text(text, sizeof text, &s.weight);
        assert_string_equal(text, presets[i].weight);
        quant_spec_text(text, sizeof text, &s.act);
        assert_string_equal(text, presets[i].act);
    }
    QuantScheme dq = scheme("int8dq"), da = scheme("8da4w-32"), wo = scheme("int4wo-32");
    assert_true(dq.weight.qmin == -128 && dq.weight.qmax == 127 && dq.weight.eps == 0x1p-126f);
    assert_true(dq.act.qmin == -127 && dq.act.qmax == 127 && dq.act.eps == 0x1p-23f);
    assert_true(da.act.qmin == -128 && da.act.mapping == QM_ASYMMETRIC && da.act.zero == QZ_INT);
    assert_true(wo.weight.is_unsigned && wo.weight.zero == QZ_FLOAT && wo.weight.eps == 1e-6f && wo.weight.qmax == 15);
    assert_true(quant_works_as_codes(&dq.weight));
    assert_false(quant_works_as_codes(&da.weight));
    QuantSpec asym = spec("int8,channel,asymmetric");
    assert_false(quant_works_as_codes(&asym));
    QuantSpec none = spec("none");
    assert_false(quant_works_as_codes(&none));
    QuantScheme qt = scheme("int8qt-int8");
    const QuantSpec *both[] = {&qt.weight, &qt.act};
    for (int i = 0; i < 2; i++) {
        assert_true(quant_is_int8_rows(both[i]) && !quant_has_zero(both[i]));
        assert_true(both[i]->qmin == -128 && both[i]->qmax == 127 && !both[i]->is_unsigned);
    }
    assert_true(quant_works_as_codes(&qt.weight));
    assert_false(quant_is_int8_rows(&dq.weight) || quant_is_int8_rows(&dq.act) || quant_is_int8_rows(&none));
}

// INT8 rows through quant.h and by optimizer.h, which the trainer uses: the same scale and codes, to the bit, whatever
// the dtype. Rows of zeros, NaN, an infinity, the smallest values and the largest.
static void test_int8_rows(void **state) {
    (void)state;
    QuantSpec s = spec("int8,channel,rows");
    const float rows[][6] = {
        {0, 0, 0, -0.0f, 0, 0}, {NAN, NAN, NAN, NAN, NAN, NAN}, {1, NAN, -0.25f, 0.5f, 0, 0.126f},
        {INFINITY, 1, -1, 0, NAN, 3}, {1e-40f, -1e-45f, 3e-41f, 0, 0, 1e-44f}, {3.4e38f, -3e38f, 1, 0, 1e30f, -1e37f},
        {0.7f, -0.7f, 0.35f, -0.1f, 0.00275f, 0.002756f}, {-127, 126.5f, 125.5f, -0.5f, 1.5f, 63},
        {1e-30f, -1e-30f, 4e-31f, 0, 5e-33f, -2e-31f}};
    for (size_t r = 0; r < sizeof rows / sizeof *rows; r++)
        for (int d = 0; d < 2; d++) {
            float mn = INFINITY, mx = -INFINITY, amax = 0.0f;
            for (int i = 0; i < 6; i++) {
                quant_minmax(&mn, &mx, rows[r][i]);
                if (fabsf(rows[r][i]) > amax) amax = fabsf(rows[r][i]);       // NaN takes no part
            }
            QParams p = quant_choose(mn, mx, &s, d ? QD_BF16 : QD_F32);
            float scale = int8_row_scale(amax), inv = int8_row_inv(scale);
            assert_same("scale", (int)r, p.scale, scale);
            assert_true(p.zp == 0);
            for (int i = 0; i < 6; i++) {
                int code = quant_code(rows[r][i], p, &s, d ? QD_BF16 : QD_F32);
                if (code != int8_nearest(rows[r][i], inv))
                    fail_msg("row %zu, value %d: code %d, expected %d", r, i, code, int8_nearest(rows[r][i], inv));
            }
        }
    // By hand: 0.7 / 127 in f32, and its multiples; a row of zeros has scale 0 and decodes to zeros.
    const float w[4] = {0.7f, -0.7f, 0.35f, 0}, zero[4] = {0};
    int16_t codes[4];
    QParams qp;
    assert_int_equal(quant_tensor(codes, &qp, w, 1, 4, &s, QD_BF16, NULL), 0);
    assert_true(qp.scale == 0.7f / 127.0f && codes[0] == 127 && codes[1] == -127 && codes[2] == 64 && codes[3] == 0);
    assert_int_equal(quant_tensor(codes, &qp, zero, 1, 4, &s, QD_F32, NULL), 0);
    assert_true(qp.scale == 0 && codes[0] == 0 && quant_dequant(0, qp, &s, QD_F32) == 0);
}

static void test_unknown_schemes(void **state) {
    (void)state;
    static const struct { const char *name, *hint;
    } bad[] = {{"8da4w_32", "8da4w-32"},
               {"int8w", "int8wo"},
               {"int8qt-int", "int8qt-int8"},
               {"int4wo", "int4wo-32"},
               {"8da4w", "8da4w-32"},
               {"INT8WO", "known:"},
               {"int9-32", "known:"},
               {"int1-32", "known:"},
               {"", "known:"},
               {"nonsense-of-the-longest-kind-there-is", "known:"},
               {"int4wo-", "group size"},
               {"int4wo-0", "group size"},
               {"int4wo-1", "group size"},
               {"8da4w--32", "group size"},
               {"8da4w-32x", "group size"},
               {"8da4w- 32", "group size"},
               {"int3-99999999999999999999", "group size"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        QuantScheme s;
        Err err = {0};
        assert_int_equal(quant_scheme_from_name(&s, bad[i].name, &err), E_USAGE);
        if (!strstr(err.text, bad[i].hint))
            fail_msg("\"%s\": \"%s\" does not say %s", bad[i].name, err.text, bad[i].hint);
    }
}

static void test_spec_texts(void **state) {
    (void)state;
    static const struct { const char *text, *canonical; bool act;
    } texts[] = {
        {"none", "none", false}, {"none", "none", true}, {"int4", "int4,channel,symmetric", false},
        {"uint4", "uint4,channel,asymmetric", false}, {"int8", "int8,token,symmetric", true},
        {"uint8", "uint8,token,asymmetric", true}, {"int8,channel", "int8,channel,symmetric", false},
        {"int5,block=2x16", "int5,block=2x16,symmetric", false},
        {"int8,asymmetric,token", "int8,token,asymmetric", true},
        {"uint4,float,group=64", "uint4,group=64,float", false},
        {"int4,symmetric,group=32", "int4,group=32,symmetric", false},
        {"int6,tensor", "int6,tensor,symmetric", false},
        {"int4,group=32,range=-7..7", "int4,group=32,symmetric,range=-7..7", false},
        {"int4,group=32,range=-8..7", "int4,group=32,symmetric", false},
        {"int8,token,range=-128..127", "int8,token,symmetric,range=-128..127", true},
        {"int8,token,range=-127..127", "int8,token,symmetric", true},
        {"uint4,group=32,range=1..14", "uint4,group=32,asymmetric,range=1..14", false},
        {"int8,token,eps=1e-05", "int8,token,symmetric,eps=9.99999975e-06", true},
        {"int8,channel,eps=1.1754943508222875e-38", "int8,channel,symmetric", false},
        {"int4,symmetric-no-clip,group=32", "int4,group=32,symmetric-no-clip", false},
        {"int8,rows", "int8,channel,rows", false}, {"int8,rows,channel", "int8,channel,rows", false},
        {"int8,rows", "int8,token,rows", true},
        {"int8,block=1048576x1048576,symmetric-no-clip,range=-127..127,eps=1.23456793e-30",
         "int8,block=1048576x1048576,symmetric-no-clip,range=-127..127,eps=1.23456793e-30", false},
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        QuantSpec a, b;
        Err err = {0};
        char text[QUANT_SPEC_TEXT];
        if (quant_spec_parse(&a, texts[i].text, texts[i].act, &err)) fail_msg("%s", err.text);
        quant_spec_text(text, sizeof text, &a);
        assert_string_equal(text, texts[i].canonical);
        assert_int_equal(quant_spec_parse(&b, text, texts[i].act, &err), 0);
        assert_true(quant_spec_equal(&a, &b));
    }
    for (size_t i = 0; i < N_SPECS; i++) {
        char text[QUANT_SPEC_TEXT];
        QuantSpec s = spec(all_specs[i]);
        quant_spec_text(text, sizeof text, &s);
        assert_string_equal(text, all_specs[i]);
    }
}

static void test_bad_specs(void **state) {
    (void)state;
    static const struct { const char *text; bool act; const char *hint;
    } bad[] = {{"", false, "int2 to int8"},
               {"int", false, "int2 to int8"},
               {"int1", false, "int2 to int8"},
               {"int9", false, "int2 to int8"},
               {"int04x", false, "int2 to int8"},
               {"float8", false, "int2 to int8"},
               {"int 4", false, "int2 to int8"},
               {"group=32", false, "int2 to int8"},
               {",int4", false, "int2 to int8"},
               {"int4,", false, "unknown word"},
               {"int4,,symmetric", false, "unknown word"},
               {"int4,Group=32", false, "unknown word"},
               {"int4,group", false, "unknown word"},
               {"int4,group=", false, "2 to 1048576"},
               {"int4,group=1", false, "2 to"},
               {"int4,group=-32", false, "2 to"},
               {"int4,group=2147483648", false, "2 to"},
               {"int4,group=32 ", false, "2 to"},
               {"int4,group=0x20", false, "2 to"},
               {"int4,block=2", false, "rows x columns"},
               {"int4,channel,rows", false, "int8,channel,rows"},
               {"uint8,channel,rows", false, "int8,channel,rows"},
               {"int8,tensor,rows", false, "int8,channel,rows"},
               {"int8,group=32,rows", false, "int8,channel,rows"},
               {"int8,channel,rows,range=-127..127", false, "int8,channel,rows"},
               {"int8,token,rows,eps=1e-5", true, "int8,token,rows"},
               {"int8,rows,symmetric", false, "twice"},
               {"int8,channel,rows", true, "per token"},
               {"int8,token,rows", false, "no tokens"},
               {"int4,block=2x", false, "rows x"},
               {"int4,block=x2", false, "rows x columns"},
               {"int4,block=0x2", false, "rows x columns"},
               {"int4,block=1x1", false, "one value"},
               {"int4,block=99999999999999999999x2", false, "rows x columns"},
               {"int4,range=-9..7", false, "-8..7"},
               {"int4,range=7..-8", false, "LOW..HIGH"},
               {"int4,range=-8", false, "LOW"},
               {"int4,range=-8..3", false, "centered"},
               {"int4,range=-1..0", false, "centered"},
               {"int4,symmetric-no-clip,range=0..7", false, "both sides"},
               {"int4,eps=0", false, "smallest scale"},
               {"int4,eps=nan", false, "smallest scale"},
               {"int4,eps=-1", false, "smallest scale"},
               {"int4,eps=1e-40", false, "smallest scale"},
               {"int4,eps=2", false, "smallest scale"},
               {"int4,eps=", false, "smallest scale"},
               {"int4,symmetric,asymmetric", false, "twice"},
               {"int4,group=32,channel", false, "twice"},
               {"int4,token", false, "no tokens"},
               {"int8,channel", true, "per token"},
               {"int8,group=32", true, "per token"},
               {"uint4,symmetric", false, "signed"},
               {"int4,float", false, "unsigned"},
               {"uint8,token,float", true, "unsigned weights"},
               {"uint4,float,range=0..14", false, "whole range"},
               {"int4,group=32,group=32,group=32,group=32,group=32,group=32,group=32,group=32,group=32,group=32,group="
                "32,group=32,"
                "group=32,group=32",
                false, "too long"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        QuantSpec s;
        Err err = {0};
        if (quant_spec_parse(&s, bad[i].text, bad[i].act, &err) != E_USAGE)
            fail_msg("\"%s\" was accepted", bad[i].text);
        if (!strstr(err.text, bad[i].hint))
            fail_msg("\"%s\": \"%s\" does not say %s", bad[i].text, err.text, bad[i].hint);
        assert_int_equal(s.bits, 0);
    }
}

// ---------------------------------------------------------------------------------------------
// Plans.

static void test_plan_rules(void **state) {
    (void)state;
    QuantPlan p;
    Err err = {0};
    static const char *const rules[] = {"*.down_proj.*=int8wo", "model.layers.[01].*=none",
                                        "*.layers.1.*.o_proj.weight=int3,group=32",
                                        "lm_head.weight=int8,channel;int8,token"};
    if (quant_plan_from_options(&p, NULL, "8da4w-32", NULL, NULL, "int4,group=32", NULL, rules, 4, &err))
        fail_msg("%s", err.text);
    assert_string_equal(p.name, "custom");
    static const struct { const char *tensor, *weight, *act; } expected[] = {
        {"model.layers.5.self_attn.q_proj.weight", "int4,group=32,symmetric", "int8,token,asymmetric"},
        {"model.layers.5.mlp.down_proj.weight", "int8,channel,symmetric", "none"},
        {"model.layers.0.mlp.down_proj.weight", "none", "none"},           // the later rule wins
        {"model.layers.1.self_attn.o_proj.weight", "int3,group=32,symmetric", "none"},
        {"lm_head.weight", "int8,channel,symmetric", "int8,token,symmetric"}};
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
        char text[QUANT_SPEC_TEXT];
        QuantScheme s = quant_plan_linear(&p, expected[i].tensor);
        quant_spec_text(text, sizeof text, &s.weight);
        assert_string_equal(text, expected[i].weight);
        quant_spec_text(text, sizeof text, &s.act);
        assert_string_equal(text, expected[i].act);
    }

    static const char *const bad[] = {
        "", "=int8wo", "*.q proj.*=int8wo", "*\n=int8wo", "*\xc3\xa9=int8wo",
        "*.q_proj.*", "*.q_proj.*=", "*=int9wo", "*=int4,group=1", "*=;int8,token",
        "*=int4,group=32;int8,channel", "*=int8,token"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        int before = p.n_rules;
        if (quant_plan_add_rule(&p, bad[i], &err) != E_USAGE) fail_msg("rule \"%s\" was accepted", bad[i]);
        assert_int_equal(p.n_rules, before);
    }
    char longest[300];
    memset(longest, 'a', sizeof longest);
    memcpy(longest + 200, "=int8wo", 8);
    assert_int_equal(quant_plan_add_rule(&p, longest, &err), E_USAGE);
    quant_plan_none(&p);
    for (int i = 0; i < QUANT_MAX_RULES; i++) assert_int_equal(quant_plan_add_rule(&p, "*=int8wo", &err), 0);
    assert_int_equal(quant_plan_add_rule(&p, "*=int8wo", &err), E_USAGE);
}

static void options_give(const QuantPlan *base, const char *scheme, const char *weight, const char *activation,
                         const char *embedding, const char *head, const char *name, QuantPlan *p) {
    Err err = {0};
    if (quant_plan_from_options(p, base, scheme, weight, activation, embedding, head, NULL, 0, &err))
        fail_msg("%s", err.text);
    assert_string_equal(p->name, name);
}

static void test_plan_options(void **state) {
    (void)state;
    QuantPlan p, base;
    Err err = {0};
    options_give(NULL, NULL, NULL, NULL, NULL, NULL, "none", &p);
    assert_true(quant_plan_is_none(&p));
    options_give(NULL, "none", NULL, NULL, NULL, "none", "none", &p);
    options_give(NULL, "8da4w-64", NULL, NULL, NULL, NULL, "8da4w-64", &p);
    assert_false(quant_plan_is_none(&p));
    options_give(NULL, NULL, "int4,group=32,symmetric", "int8,token,asymmetric", NULL, NULL, "custom", &p);
    QuantScheme preset = scheme("8da4w-32");
    assert_true(quant_spec_equal(&p.linear.weight, &preset.weight) && quant_spec_equal(&p.linear.act, &preset.act));
    options_give(NULL, "none", NULL, NULL, NULL, "int8,channel", "custom", &p);
    assert_false(quant_plan_is_none(&p));
    assert_int_equal(quant_plan_from_options(&p, NULL, "none", "none", NULL, NULL, NULL, NULL, 0, &err), E_USAGE);

    // On top of a plan: what is not said stays.
    options_give(NULL, "8da4w-32", NULL, NULL, "int4,group=32", NULL, "custom", &base);
    assert_int_equal(quant_plan_add_rule(&base, "*.down_proj.*=int8wo", &err), 0);
    strcpy(base.name, "mixed");
    options_give(&base, NULL, NULL, NULL, NULL, NULL, "mixed", &p);
    assert_true(quant_plan_equal(&p, &base));
    options_give(&base, NULL, NULL, "int8,token,asymmetric", "int4,group=32", NULL, "mixed", &p);
    options_give(&base, NULL, NULL, NULL, NULL, "int8,channel", "custom", &p);
    assert_true(p.embedding.bits == 4 && p.tied_head.bits == 8 && p.linear.act.bits == 8 && p.n_rules == 1);
    options_give(&base, "int8wo", NULL, NULL, NULL, NULL, "custom", &p);
    assert_true(p.embedding.bits == 4 && p.linear.weight.bits == 8 && !p.linear.act.bits && p.n_rules == 0);
    options_give(&base, "int8wo", NULL, NULL, "none", NULL, "int8wo", &p);
    options_give(NULL, "int8wo", NULL, NULL, "none", NULL, "int8wo", &p);
}

// Where INT8 rows may stand: linears and a tied head, integer inputs with them only, never an embedding.
static void test_plan_rows(void **state) {
    (void)state;
    QuantPlan p, back;
    Err err = {0};
    options_give(NULL, "int8qt", NULL, NULL, NULL, NULL, "int8qt", &p);
    assert_true(quant_plan_has_rows(&p));
    options_give(NULL, "int8qt-int8", NULL, NULL, NULL, "int8,channel", "custom", &p);
    options_give(NULL, "int8wo", NULL, NULL, NULL, "int8,channel,rows", "custom", &p);
    options_give(NULL, "int8qt-int8", NULL, NULL, NULL, "int8,channel,rows", "int8qt-int8", &p);
    assert_true(quant_plan_has_rows(&p) && quant_is_int8_rows(&p.tied_head));
    options_give(NULL, "none", NULL, NULL, NULL, "int8,rows", "custom", &p);
    assert_true(quant_plan_has_rows(&p));
    options_give(NULL, NULL, "int8,rows", "int8,token,asymmetric", NULL, NULL, "custom", &p);
    const char *const one[] = {"lm_head.*=int8qt"}, *const off[] = {"lm_head.weight=none"};
    assert_int_equal(quant_plan_from_options(&p, NULL, "8da4w-32", NULL, NULL, NULL, NULL, one, 1, &err), 0);
    assert_true(quant_plan_has_rows(&p));
    options_give(NULL, "8da4w-32", NULL, NULL, "int8,channel", "int8,channel", "custom", &p);
    assert_false(quant_plan_has_rows(&p));

    static const struct { const char *scheme, *weight, *act, *embedding, *rule, *hint; } bad[] = {
        {"int8qt", NULL, NULL, "int8,channel,rows", NULL, "embedding"},
        {"int8wo", NULL, "int8,token,rows", NULL, NULL, "not of int8,channel,symmetric"},
        {NULL, NULL, "int8,token,rows", NULL, NULL, "not of none"},
        {"none", NULL, NULL, NULL, "*.down_proj.*=int4,group=32;int8,token,rows", "*.down_proj.*"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const char *const rules[] = {bad[i].rule};
        int rc = quant_plan_from_options(&p, NULL, bad[i].scheme, bad[i].weight, bad[i].act, bad[i].embedding, NULL,
                                         rules, bad[i].rule != NULL, &err);
        if (rc != E_USAGE || !strstr(err.text, bad[i].hint)) fail_msg("%zu: %d, \"%s\"", i, rc, err.text);
    }

    assert_int_equal(quant_plan_from_options(&p, NULL, "int8qt-int8", NULL, NULL, NULL, "int8,rows", off, 1, &err), 0);
    char *text = quant_plan_to_json(&p);
    if (quant_plan_from_json(&back, text, strlen(text), &err)) fail_msg("%s: %s", text, err.text);
    assert_true(quant_plan_equal(&p, &back));
    free(text);
    static const char *const hostile[] = {
        "{\"name\":\"x\",\"embedding\":\"int8,channel,rows\"}",
        "{\"name\":\"x\",\"linear\":{\"weight\":\"int8,channel\",\"activation\":\"int8,token,rows\"}}",
        "{\"name\":\"x\",\"rules\":[{\"pattern\":\"*\",\"activation\":\"int8,token,rows\"}]}"};
    for (size_t i = 0; i < sizeof hostile / sizeof *hostile; i++) {
        assert_int_equal(quant_plan_from_json(&back, hostile[i], strlen(hostile[i]), &err), E_FORMAT);
        assert_true(quant_plan_is_none(&back) && !back.n_rules);
    }
}

static void test_plan_json(void **state) {
    (void)state;
    static const char *const names[] = {"none", "int8wo", "int8dq", "int4wo-64", "8da4w-32", "int3-32", "int8qt",
                                        "int8qt-int8"};
    static const char *const rules[] = {"*\"quoted\\pattern*=int5,block=2x16",
                                        "*.mlp.*=int4,group=16;int6,token,asymmetric"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        for (int n_rules = 0; n_rules <= 2; n_rules += 2) {
            QuantPlan a, b;
            Err err = {0};
            if (quant_plan_from_options(&a, NULL, names[i], NULL, NULL, n_rules ? "int4,group=32" : NULL,
                                        n_rules ? "uint4,group=64,float" : NULL, rules, n_rules, &err))
                fail_msg("%s", err.text);
            char *text = quant_plan_to_json(&a);
            if (quant_plan_from_json(&b, text, strlen(text), &err)) fail_msg("%s: %s", text, err.text);
            char *again = quant_plan_to_json(&b);
            assert_string_equal(text, again);
            assert_string_equal(a.name, b.name);
            assert_true(quant_plan_equal(&a, &b));
            free(text), free(again);
        }
}

static void test_hostile_json(void **state) {
    (void)state;
#define LIN "{\"name\":\"x\",\"linear\":{\"weight\":"
    static const char *const bad[] = {
        "", "{", "null", "[]", "3", "\"8da4w-32\"", "{}", "{\"name\":3}", "{\"name\":\"\"}",
        "{\"name\":\"../../etc/passwd\"}", "{\"name\":\"a/b\"}", "{\"name\":\".hidden\"}", "{\"name\":\"-o\"}",
        "{\"name\":\"a b\"}",
        "{\"name\":\"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\"}",
        "{\"name\":\"x\"} trailing", "{\"name\":\"x\",\"name\":\"y\"}", "{\"name\":\"x\",\"new_field\":1}",
        "{\"name\":\"x\",\"linear\":3}",
        LIN "3}}",
        LIN "\"int9\"}}",
        LIN "\"int4,group=0\"}}",
        LIN "\"int4,group=99999999999\"}}",
        LIN "null}}",
        LIN "\"int8,token\"}}",
        "{\"name\":\"x\",\"linear\":{\"activation\":\"int8,channel\"}}", "{\"name\":\"x\",\"embedding\":{}}",
        "{\"name\":\"x\",\"tied_head\":\"int4,eps=1e99\"}", "{\"name\":\"x\",\"rules\":{}}",
        "{\"name\":\"x\",\"rules\":[3]}", "{\"name\":\"x\",\"rules\":[{}]}",
        "{\"name\":\"x\",\"rules\":[{\"pattern\":\"\"}]}", "{\"name\":\"x\",\"rules\":[{\"pattern\":\"a\\u0001\"}]}",
        "{\"name\":\"x\",\"rules\":[{\"pattern\":\"*\",\"weight\":7}]}"};
    QuantPlan p;
    Err err = {0};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        if (!quant_plan_from_json(&p, bad[i], strlen(bad[i]), &err)) fail_msg("accepted: %s", bad[i]);
        assert_true(quant_plan_is_none(&p) && !p.n_rules);             // nothing half-read stays
        assert_true(*err.text);
        assert_true(quant_plan_from_json(&p, bad[i], strlen(bad[i]), NULL) < 0);
    }

    enum { DEEP = 10000 };
    char *deep = malloc(2 * DEEP + 64);
    assert_non_null(deep);
    strcpy(deep, "{\"name\":\"x\",\"rules\":");
    size_t n = strlen(deep);
    memset(deep + n, '[', DEEP);
    memset(deep + n + DEEP, ']', DEEP);
    strcpy(deep + n + 2 * DEEP, "}");
    assert_true(quant_plan_from_json(&p, deep, strlen(deep), &err) < 0);
    free(deep);

    char many[4096] = "{\"name\":\"x\",\"rules\":[{\"pattern\":\"*\"}";
    for (int i = 0; i < QUANT_MAX_RULES; i++) strcat(many, ",{\"pattern\":\"*\"}");
    strcat(many, "]}");
    assert_true(quant_plan_from_json(&p, many, strlen(many), &err) < 0);

    // What is missing is none; a minimal plan is accepted.
    assert_int_equal(quant_plan_from_json(&p, "{\"name\":\"x\"}", 12, &err), 0);
    assert_true(quant_plan_is_none(&p));
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_worked_examples), cmocka_unit_test(test_ste_mask), cmocka_unit_test(test_torchao_goldens),
    cmocka_unit_test(test_zero_and_constant_blocks), cmocka_unit_test(test_nan_and_infinity),
    cmocka_unit_test(test_subnormal_and_smallest), cmocka_unit_test(test_blocks), cmocka_unit_test(test_packing),
    cmocka_unit_test(test_presets), cmocka_unit_test(test_int8_rows), cmocka_unit_test(test_plan_rows),
    cmocka_unit_test(test_unknown_schemes), cmocka_unit_test(test_spec_texts),
    cmocka_unit_test(test_bad_specs), cmocka_unit_test(test_plan_rules), cmocka_unit_test(test_plan_options),
    cmocka_unit_test(test_plan_json), cmocka_unit_test(test_hostile_json),
};

TEST_MAIN(tests)
