// Serving of INT8 rows: a model whose codes are made here goes through a file into infer, and its logits and losses are
// those of the operations called one after the other on the same codes, bit for bit: weight-only matmuls and integer
// ones, heads of every kind, however a text is cut; the served arithmetic within its bound where it has operations of
// its own; and the sizes that are reported are those of the file.
#include "test_common.h"
#include "llmc/device.h"
#include "llmc/infer.h"
#include "llmc/rng.h"

enum { T = 21 };

static void must(int rc, const Err *err) {
    if (rc < 0) fail_msg("%s", err->text);
}

// 72 wide: rows of codes that are no whole vectors and not aligned.
static LlamaConfig small_config(bool tied) {
    return (LlamaConfig){.C = 72, .L = 2, .NH = 4, .NKV = 2, .HS = 18, .FF = 100, .V = 133, .max_T = 64,
                         .norm_eps = 1e-5f, .rope_theta = 10000, .rope_factor = 1, .tied = tied, .bos = -1};
}

static int float_rows(void *ctx, const Param *p, int64_t row0, int64_t n, float *out, Err *err) {
    (void)err;
    size_t count = (size_t)(n * p->cols);
    param_init_random(out, p, ctx, 5, (size_t)(row0 * p->cols), count);
    for (size_t i = 0; i < count; i++)
        out[i] = bf16_round(p->rows == 1 ? out[i] + 0.01f * (float)(i % 17) : 5.0f * out[i]);
    return 0;
}

// As training leaves them: rounded by chance, so that rows need not reach 127, and now and then reach -128; row 2 is
// zeros.
static int int8_code_rows(void *ctx, const Param *p, int64_t row0, int64_t n, int8_t *codes, float *scale, Err *err) {
    float *x = xmalloc((size_t)(n * p->cols) * sizeof *x);
    float_rows(ctx, p, row0, n, x, err);
    for (int64_t r = 0; r < n; r++) {
        float amax = 0;
        for (int64_t i = 0; i < p->cols; i++) amax = fmaxf(amax, fabsf(x[r * p->cols + i]));
        scale[r] = row0 + r == 2 ? 0.0f : int8_row_scale(amax);
        for (int64_t i = 0; i < p->cols; i++) {
            uint64_t at = (uint64_t)((row0 + r) * p->cols + i);
            float u = philox_uniform(philox(9, (uint64_t)p->role, at).v[0]);
            codes[r * p->cols + i] = row0 + r == 2 ? 0 : int8_stochastic(x[r * p->cols + i], int8_row_inv(scale[r]), u);
        }
        if (row0 + r == 4) codes[r * p->cols] = -128;
    }
    free(x);
    return 0;
}

typedef struct { const char *name, *scheme, *head, *rule; bool tied; } Variant;
static const Variant variants[] = {
    {"weight-only", "int8qt", NULL, NULL, false},
    {"weight-only, float head", "int8qt", NULL, "lm_head.weight=none", false},
    {"weight-only, tied", "int8qt", NULL, NULL, true},
    {"weight-only, tied int8 head", "int8qt", "int8,rows", NULL, true},
    {"integer", "int8qt-int8", NULL, NULL, false},
    {"integer, float head", "int8qt-int8", NULL, "lm_head.weight=none", false},
    {"integer, weight-only head", "int8qt-int8", NULL, "lm_head.weight=int8qt", false},
    {"integer, tied", "int8qt-int8", NULL, NULL, true},
    {"integer, tied int8 head", "int8qt-int8", "int8,rows", NULL, true},
    {"integer head only", "none", NULL, "lm_head.weight=int8qt-int8", false},
};
#define N_VARIANTS ((int)(sizeof variants / sizeof *variants))

static void open_model(ModelFile *m, const Variant *v, DType dtype) {
    Err err = {0};
    LlamaConfig c = small_config(v->tied);
    QuantPlan plan;
    ParamTable table;
    char path[300];
    snprintf(path, sizeof path, "%s/model.bin", test_tmpdir());
    must(quant_plan_from_options(&plan, NULL, v->scheme, NULL, NULL, NULL, v->head, &v->rule, v->rule != NULL, &err),
         &err);
    must(param_table_build(&table, &c, &plan, &err), &err);
    must(model_write_trained(path, &c, &plan, &table, NULL, dtype, float_rows, int8_code_rows, &c, &err), &err);
    param_table_free(&table);
    must(model_open(m, path, &err), &err);
}

static void make_tokens(int32_t *tokens, int32_t *targets, int V) {
    for (int i = 0; i < T; i++) {
        tokens[i] = (int32_t)(philox(7, 1, (uint64_t)i).v[0] % (uint32_t)V);
        targets[i] = i % 7 == 3 ? -1 : (int32_t)(philox(7, 2, (uint64_t)i).v[0] % (uint32_t)V);
    }
}

// ---------------------------------------------------------------------------------------------
// The same model by hand.

static floatX *floats(LlamaConfig *c, const Param *p) {
    size_t n = (size_t)(p->rows * p->cols);
    float *x = xmalloc(n * sizeof *x);
    floatX *out = xmalloc(n * sizeof *out);
    float_rows(c, p, 0, p->rows, x, NULL);
    for (size_t i = 0; i < n; i++) out[i] = f2x(x[i]);
    free(x);
    return out;
}

// y (T, OC) = x (T, C) . w^T of the n tensors p, whose rows lie one after the other. y is floatX, or f32 for logits.
static void by_hand(LlamaConfig *c, void *y, bool logits, const floatX *x, const Param *const *p, int n) {
    int64_t rows = 0, cols = p[0]->cols, row = 0;
    for (int i = 0; i < n; i++) rows += p[i]->rows;
    if (!p[0]->scheme.weight.bits) {
        floatX *w = floats(c, p[0]);
        if (logits) ops->linear_forward_f32(y, x, w, NULL, T, (int)cols, (int)rows);
        else ops->linear_forward(y, x, w, NULL, T, (int)cols, (int)rows);
        free(w);
        if (n > 1) fail_msg("float tensors are not joined here");
        return;
    }
    int8_t *codes = xmalloc((size_t)(rows * cols));
    float *scale = xmalloc((size_t)rows * sizeof *scale);
    for (int i = 0; i < n; row += p[i++]->rows)
        int8_code_rows(c, p[i], 0, p[i]->rows, codes + row * cols, scale + row, NULL);
    bool integer = quant_is_int8_rows(&p[0]->scheme.act);
    if (logits) (integer ? ops->linear_i8_forward_f32 : ops->linear_w8_forward_f32)(y, x, codes, scale, T, (int)cols,
                                                                                    (int)rows);
    else (integer ? ops->linear_i8_forward : ops->linear_w8_forward)(y, x, codes, scale, T, (int)cols, (int)rows);
    free(codes);
    free(scale);
}

// A tied head of its own: the table's values quantized to nearest.
static void by_hand_tied(LlamaConfig *c, float *logits, const floatX *x, const Param *embed, bool integer) {
    floatX *table = floats(c, embed);
    int8_t *codes = xmalloc((size_t)(c->V * c->C));
    float *scale = xmalloc((size_t)c->V * sizeof *scale);
    for (int r = 0; r < c->V; r++) {
        const floatX *w = table + r * c->C;
        float amax = 0;
        for (int i = 0; i < c->C; i++) amax = fmaxf(amax, fabsf(x2f(w[i])));
        scale[r] = int8_row_scale(amax);
        for (int i = 0; i < c->C; i++) codes[r * c->C + i] = int8_nearest(x2f(w[i]), int8_row_inv(scale[r]));
    }
    (integer ? ops->linear_i8_forward_f32 : ops->linear_w8_forward_f32)(logits, x, codes, scale, T, c->C, c->V);
    free(table);
    free(codes);
    free(scale);
}

// Logits (T, V) of all tokens.
static void forward_by_hand(float *logits, const ModelFile *m, const int32_t *tokens) {
    LlamaConfig c = m->config;
    ParamTable t;
    Err err = {0};
    must(param_table_build(&t, &c, &m->plan, &err), &err);
    size_t X = sizeof(floatX), heads = (size_t)(c.NH + 2 * c.NKV) * (size_t)c.HS;
    floatX *res = xmalloc(T * (size_t)c.C * X), *delta = xmalloc(T * (size_t)c.C * X);
    floatX *y = xmalloc(T * (size_t)c.C * X);
    floatX *qkv = xmalloc(T * heads * X), *att = xmalloc(T * (size_t)(c.NH * c.HS) * X);
    floatX *gateup = xmalloc(T * 2 * (size_t)c.FF * X), *ffn = xmalloc(T * (size_t)c.FF * X);
    float *cos_t = xmalloc(T * (size_t)c.HS / 2 * 4), *sin_t = xmalloc(T * (size_t)c.HS / 2 * 4);
    llama_rope_table(cos_t, sin_t, &c, T);
    const Param *embed = param_get(&t, -1, ROLE_EMBED);
    floatX *table = floats(&c, embed);
    ops->embedding_forward(res, tokens, table, T, c.C, c.V);
    free(table);
    for (int l = 0; l < c.L; l++) {
        const Param *of[ROLE_COUNT];
        for (int r = ROLE_NORM1; r <= ROLE_DOWN; r++) of[r] = param_get(&t, l, (ParamRole)r);
        floatX *norm1 = floats(&c, of[ROLE_NORM1]), *norm2 = floats(&c, of[ROLE_NORM2]);
        ops->rmsnorm_fq_forward(l ? res : NULL, y, NULL, NULL, res, l ? delta : NULL, norm1, T, c.C, c.norm_eps, NULL);
        if (of[ROLE_Q]->scheme.weight.bits) {
            by_hand(&c, qkv, false, y, &of[ROLE_Q], 3);
        } else {                                 // each to its own columns
            size_t at = 0;
            floatX *part = xmalloc(T * heads * X);
            for (int r = ROLE_Q; r <= ROLE_V; at += (size_t)of[r++]->rows) {
                by_hand(&c, part, false, y, &of[r], 1);
                for (size_t n = 0; n < T; n++)
                    memcpy(qkv + n * heads + at, part + n * (size_t)of[r]->rows, (size_t)of[r]->rows * X);
            }
            free(part);
        }
        ops->rope(qkv, cos_t, sin_t, T, T, 0, (int)heads, c.NH + c.NKV, c.HS, false);
        const floatX *k = qkv + c.NH * c.HS, *v = k + c.NKV * c.HS;
        ops->attention_forward(att, NULL, qkv, k, v, 1, T, T, c.NH, c.NKV, c.HS, c.NH * c.HS, (int)heads, (int)heads,
                               T * heads);
        by_hand(&c, delta, false, att, &of[ROLE_O], 1);
        ops->rmsnorm_fq_forward(res, y, NULL, NULL, res, delta, norm2, T, c.C, c.norm_eps, NULL);
        if (of[ROLE_GATE]->scheme.weight.bits) {
            by_hand(&c, gateup, false, y, &of[ROLE_GATE], 2);
        } else {
            for (int r = ROLE_GATE; r <= ROLE_UP; r++) {
                by_hand(&c, ffn, false, y, &of[r], 1);
                for (size_t n = 0; n < T; n++)
                    memcpy(gateup + (2 * n + (r == ROLE_UP)) * (size_t)c.FF, ffn + n * (size_t)c.FF, (size_t)c.FF * X);
            }
        }
        ops->swiglu_fq_forward(ffn, NULL, gateup, T, c.FF, NULL);
        by_hand(&c, delta, false, ffn, &of[ROLE_DOWN], 1);
        free(norm1);
        free(norm2);
    }
    floatX *final = floats(&c, param_get(&t, -1, ROLE_FINAL_NORM));
    ops->rmsnorm_fq_forward(res, y, NULL, NULL, res, delta, final, T, c.C, c.norm_eps, NULL);
    const Param *head = param_get(&t, -1, ROLE_HEAD);
    if (!c.tied) by_hand(&c, logits, true, y, &head, 1);
    else if (m->plan.tied_head.bits) by_hand_tied(&c, logits, y, embed, quant_is_int8_rows(&m->plan.linear.act));
    else by_hand(&c, logits, true, y, &embed, 1);
    must(device_sync(&err), &err);
    free(final), free(res), free(delta), free(y), free(qkv), free(att), free(gateup), free(ffn);
    free(cos_t), free(sin_t);
    param_table_free(&t);
}

static void same_bits(const char *what, const char *variant, const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (f32_bits(a[i]) != f32_bits(b[i]))
            fail_msg("%s: %s: value %zu is %.9g, expected %.9g", variant, what, i, (double)a[i], (double)b[i]);
}

// One text in one call, in pieces of 5, or token by token: losses of all tokens, logits (T, V) of all where step is 1.
static void run_infer(const ModelFile *m, Arithmetic arith, const int32_t *tokens, const int32_t *targets, int step,
                      float *losses, float *logits) {
    Infer *s;
    Err err = {0};
    must(infer_new(&s, m, &(InferOptions){.B = 1, .max_T = T, .max_N = T, .arith = arith}, &err), &err);
    for (int at = 0; at < T; at += step) {
        int n = T - at < step ? T - at : step;
        float *to = logits + (size_t)(at + n - 1) * (size_t)m->config.V;
        must(infer_forward(s, tokens + at, targets + at, n, to, losses + at, &err), &err);
    }
    infer_free(s);
}

static void logits_are_those_of_the_operations(void **state) {
    (void)state;
    Err err = {0};
    must(device_init("cpu", 0, &err), &err);
    for (int i = 0; i < N_VARIANTS; i++)
        for (int dtype = 0; dtype < 2; dtype++) {
            ModelFile m;
            open_model(&m, &variants[i], dtype ? DT_F32 : DT_BF16);
            size_t V = (size_t)m.config.V;
            int32_t tokens[T], targets[T];
            float expected[T], losses[T], *want = xmalloc(T * V * 4), *got = xmalloc(T * V * 4);
            make_tokens(tokens, targets, (int)V);
            forward_by_hand(want, &m, tokens);
            ops->classifier(expected, NULL, want, targets, T, (int)V);
            bool differs = false;                // a model that says something
            for (size_t k = 1; k < V; k++) differs = differs || want[k] != want[0];
            assert_true(differs);
            // What the served arithmetic shares with the trained: floats of many tokens, and integer products. The
            // head's logits are of one token.
            QuantScheme head = quant_plan_linear(&m.plan, "lm_head.weight");
            if (m.config.tied) head = (QuantScheme){m.plan.tied_head, m.plan.linear.act};
            bool shared = head.weight.bits && quant_is_int8_rows(&head.act);
            static const int steps[] = {T, 5, 1};
            for (int served = 0; served < 2; served++)
                for (int k = 0; k < 3; k++) {
                    // Few tokens have an attention of their own too.
                    if (served && (!shared || steps[k] < T)) continue;
                    run_infer(&m, served ? ARITH_SERVED : ARITH_TRAINED, tokens, targets, steps[k], losses, got);
                    char what[64];
                    snprintf(what, sizeof what, "%s, %d at a time", served ? "served" : "trained", steps[k]);
                    same_bits(what, variants[i].name, losses, expected, T);
                    if (steps[k] == 1) same_bits(what, variants[i].name, got, want, T * V);
                    else same_bits(what, variants[i].name, got + (T - 1) * V, want + (T - 1) * V, V);
                }
            free(want);
            free(got);
            model_close(&m);
        }
}

// In one call, in pieces and token by token. test_infer.c derives the bound: 4 L u of the logits' norm, u one
// rounding of X (bf16), or C * 2^-23 of sum |x w| (fp32; C <= 100, sums of mixed sign: 2^-14 of the result).
static void served_stays_within_its_bound(void **state) {
    (void)state;
    Err err = {0};
    must(device_init("cpu", 0, &err), &err);
    for (int i = 0; i < N_VARIANTS; i++) {
        ModelFile m;
        open_model(&m, &variants[i], DT_BF16);
        size_t V = (size_t)m.config.V;
        int32_t tokens[T], targets[T];
        float losses[T], *a = xcalloc(T * V, 4), *b = xcalloc(T * V, 4);
        // Quantized inputs turn a rounding into a step of the row's range.
        bool f32_only = sizeof(floatX) == 4 && !m.plan.linear.act.bits && !m.plan.n_rules;
        double u = f32_only ? 0x1p-14 : 0x1p-8;
        make_tokens(tokens, targets, (int)V);
        static const int steps[] = {T, 5, 1};
        for (int j = 0; j < 3; j++) {
            double diff = 0, norm = 0;           // of the rows that are asked for: the others stay zeros
            run_infer(&m, ARITH_TRAINED, tokens, targets, steps[j], losses, a);
            run_infer(&m, ARITH_SERVED, tokens, targets, steps[j], losses, b);
            for (size_t k = 0; k < T * V; k++) {
                diff += ((double)a[k] - (double)b[k]) * ((double)a[k] - (double)b[k]);
                norm += (double)a[k] * (double)a[k];
            }
            if (!(sqrt(diff) <= 4 * m.config.L * u * sqrt(norm)))
                fail_msg("%s, %d at a time: served logits are %.3g of their norm away; allowed %.3g", variants[i].name,
                         steps[j], sqrt(diff / norm), 4 * m.config.L * u);
        }
        free(a);
        free(b);
        model_close(&m);
    }
}

static void sizes_count_f32_scales(void **state) {
    (void)state;
    Err err = {0};
    must(device_init("cpu", 0, &err), &err);
    for (int i = 0; i < N_VARIANTS; i++) {
        ModelFile m;
        Infer *s;
        open_model(&m, &variants[i], DT_BF16);
        const LlamaConfig *c = &m.config;
        size_t L = (size_t)c->L, rows = (size_t)((c->NH + 2 * c->NKV) * c->HS + 2 * c->C + 2 * c->FF);
        size_t values = (size_t)c->C * (size_t)c->HS * (size_t)(2 * c->NH + 2 * c->NKV) + 3 * (size_t)(c->C * c->FF);
        size_t X = sizeof(floatX), norms = (2 * L + 1) * (size_t)c->C * X, table = (size_t)(c->V * c->C);
        size_t linears = m.plan.linear.weight.bits ? L * (values + 4 * rows) : L * values * X;
        QuantScheme h = quant_plan_linear(&m.plan, "lm_head.weight");
        if (c->tied) h = (QuantScheme){m.plan.tied_head, m.plan.linear.act};
        size_t head = h.weight.bits ? 4 * (size_t)c->V + table : table * X;
        must(infer_new(&s, &m, &(InferOptions){.B = 1, .max_T = 8, .max_N = 8, .arith = ARITH_SERVED}, &err), &err);
        assert_int_equal(infer_size_bytes(s), linears + norms + head);
        assert_int_equal(infer_bytes_per_token(s), linears + norms + head + (size_t)c->C * X);
        infer_free(s);
        model_close(&m);
    }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(logits_are_those_of_the_operations),
    cmocka_unit_test(served_stays_within_its_bound),
    cmocka_unit_test(sizes_count_f32_scales),
};
TEST_MAIN(tests)
