// The whole model: logits, loss and every gradient against PyTorch's (dev/ref/gen_llama.py), gradients against finite
// differences, and the equalities that must hold to the bit: recomputation, straight-through gradients, validation
// state.
#include "test_common.h"
#define main train_main
#include "../train_llama_qat.c"
#undef main
#include "llmc/rng.h"

typedef struct { QuantPlan plan; ParamTable table; Shard shard; Store store; Llama m; Acts s; } Fixture;

static void setup_options(void) {
    Err err = {0};
    char *argv[] = {"test"};
    if (cli_parse(options, N_OPTIONS, "", NULL, 1, argv, &err) < 0) fail_msg("%s", err.text);
    if (device_init("cpu", 0, &err) < 0) fail_msg("%s", err.text);
}

static void fixture_init(Fixture *f, const LlamaConfig *c, const QuantPlan *plan, int B, int T, bool recompute,
                         bool clip) {
    Err err = {0};
    memset(f, 0, sizeof *f);
    f->m = (Llama){.c = *c, .plan = &f->plan, .table = &f->table, .shard = &f->shard, .store = &f->store};
    if (plan) f->plan = *plan; else quant_plan_none(&f->plan);
    if (param_table_build(&f->table, c, &f->plan, &err) < 0) fail_msg("%s", err.text);
    if (shard_plan(&f->shard, &f->m.c, &f->plan, &f->table, SHARD_NONE, true, 1, 0, &err) < 0 ||
        shard_alloc(&f->shard, &err) < 0 || store_plan(&f->store, &f->shard, true, &err) < 0 ||
        store_alloc(&f->store, &err) < 0) fail_msg("%s", err.text);
    run.B = B;
    run.T = T;
    run.recompute = recompute;
    qat.ste = clip;
    ActsShape shape = acts_shape(&f->table, &f->plan);
    if (acts_alloc(&f->s, c, &shape, &err) < 0) fail_msg("%s", err.text);
}

static void fixture_free(Fixture *f) {
    acts_free(&f->s);
    store_free(&f->store);
    shard_free(&f->shard);
    param_table_free(&f->table);
}

static double fixture_loss(Fixture *f, bool backward) {
    Err err = {0};
    *f->s.state = (StepState){.t = 1};
    llama_forward(&f->m, &f->s);
    llama_loss(&f->m, &f->s, backward, 0);
    if (backward) llama_backward(&f->m, &f->s, 0, true);
    if (device_sync(&err) < 0) fail_msg("%s", err.text);
    return f->s.state->loss_sum / (double)f->s.state->tokens;
}

static void random_tokens(Fixture *f) {
    for (size_t i = 0; i < f->s.N; i++) {
        f->s.tokens[i] = (int32_t)(philox(7, 1, i).v[0] % (uint32_t)f->m.c.V);
        f->s.targets[i] = i % 7 == 3 ? -1 : (int32_t)(philox(7, 2, i).v[0] % (uint32_t)f->m.c.V);
    }
}

static float *master(const Fixture *f, int i) { return store_param(&f->store, i, 0).data; }

static void random_weights(Fixture *f, float scale) {
    for (int i = 0; i < f->table.n; i++) {
        const Param *p = &f->table.p[i];
        size_t n = (size_t)(p->rows * p->cols);
        param_init_random(master(f, i), p, &f->m.c, 11, 0, n);
        for (size_t k = 0; k < n; k++) master(f, i)[k] *= p->rows == 1 ? 1.0f : scale;
    }
}

static LlamaConfig small_config(bool tied) {
    return (LlamaConfig){.C = 32, .L = 2, .NH = 4, .NKV = 2, .HS = 8, .FF = 64, .V = 67, .max_T = 64, .norm_eps = 1e-5f,
                         .rope_theta = 10000, .rope_factor = 1, .tied = tied, .bos = -1};
}

// ---------------------------------------------------------------------------------------------

// fp32: both sides sum the same products in another order; a value that is a sum of n terms moves by about
// sqrt(n) * 2^-24 relative to the largest, and 2 layers chain some 30 such sums: 2e-5 of the tensor's norm is ample and
// far below what a wrong term would make. bf16: every activation is rounded to 2^-9 relative, some 20 roundings deep,
// averaging: 3 % of the norm, and a cosine that stays within 1e-3 of 1.
static const double tensor_tolerance = sizeof(floatX) == 4 ? 2e-5 : 6e-2;

static void check_tensor(const char *what, const float *ours, const float *ref, size_t n) {
    double diff = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        diff += ((double)ours[i] - ref[i]) * ((double)ours[i] - ref[i]);
        norm += (double)ref[i] * ref[i];
    }
    if (!(sqrt(diff) <= tensor_tolerance * sqrt(norm) + 1e-12))
        fail_msg("%s: |ours - reference| = %g of |reference| = %g; allowed %g", what, sqrt(diff), sqrt(norm),
                 tensor_tolerance);
}

static int32_t int_at(const StTensor *t, size_t i) {
    if (t->dtype == DT_I64) { int64_t v; memcpy(&v, t->data + 8 * i, 8); return (int32_t)v; }
    int32_t v; memcpy(&v, t->data + 4 * i, 4); return v;
}

static void golden(const char *path) {
    Err err = {0};
    Safetensors st;
    if (safetensors_open(&st, path, &err) < 0) fail_msg("%s", err.text);
    LlamaConfig c;
    const char *config = safetensors_meta(&st, "config");
    assert_non_null(config);
    if (llama_config_from_json(&c, config, strlen(config), &err) < 0) fail_msg("%s", err.text);
    const StTensor *tokens = safetensors_find(&st, "tokens"), *targets = safetensors_find(&st, "targets");
    const StTensor *logits = safetensors_find(&st, "logits"), *loss = safetensors_find(&st, "loss");
    assert_true(tokens && targets && logits && loss);
    Fixture f;
    fixture_init(&f, &c, NULL, (int)tokens->shape[0], (int)tokens->shape[1], false, false);
    for (size_t i = 0; i < f.s.N; i++) { f.s.tokens[i] = int_at(tokens, i); f.s.targets[i] = int_at(targets, i); }
    for (int i = 0; i < f.table.n; i++) {
        const Param *p = &f.table.p[i];
        const StTensor *t = safetensors_find(&st, p->name);
        if (!t) fail_msg("golden %s has no %s", path, p->name);
        convert_to_f32(master(&f, i), t->data, t->dtype, (size_t)(p->rows * p->cols));
    }
    llama_requantize(&f.m, false);
    double ours = fixture_loss(&f, true);
    float ref_loss;
    convert_to_f32(&ref_loss, loss->data, loss->dtype, 1);
    if (!(fabs(ours - ref_loss) <= tensor_tolerance * 0.1 * ref_loss))
        fail_msg("%s: loss %.7f, reference %.7f", path, ours, (double)ref_loss);
    assert_true(f.s.N <= (size_t)f.s.chunk);   // so that all logits are still there
    check_tensor("logits", f.s.logits, (const float *)logits->data, f.s.N * (size_t)c.V);
    for (int i = 0; i < f.table.n; i++) {
        const Param *p = &f.table.p[i];
        char name[128];
        snprintf(name, sizeof name, "grad.%s", p->name);
        const StTensor *t = safetensors_find(&st, name);
        if (!t) fail_msg("golden %s has no %s", path, name);
        size_t n = (size_t)(p->rows * p->cols);
        float *g = xmalloc(n * 4);
        for (size_t k = 0; k < n; k++) g[k] = f.shard.grad[p->offset + k] / (float)f.s.state->tokens;
        check_tensor(name, g, (const float *)t->data, n);
        free(g);
    }
    fixture_free(&f);
    safetensors_close(&st);
}

static void test_golden_gqa(void **u) { (void)u; golden("test/golden/llama_gqa.safetensors"); }
static void test_golden_tied(void **u) { (void)u; golden("test/golden/llama_tied.safetensors"); }
static void test_golden_llama3_rope(void **u) { (void)u; golden("test/golden/llama_llama3.safetensors"); }
static void test_golden_linear_rope(void **u) { (void)u; golden("test/golden/llama_linear.safetensors"); }
static void test_golden_head_dim(void **u) { (void)u; golden("test/golden/llama_headdim.safetensors"); }

// Directional derivatives, one parameter tensor at a time: (L(w + e d) - L(w - e d)) / 2e against grad . d.
// fp32 losses carry about 1e-7 relative noise: with e = 1e-2 along a unit direction the quotient is good to 5e-5
// absolute, the truncation error is e^2/6 times a third derivative of order one.
static void test_finite_differences(void **u) {
    (void)u;
    if (sizeof(floatX) != 4) { print_message("skipped: only in the fp32 build\n"); skip(); }
    for (int tied = 0; tied < 2; tied++) {
        LlamaConfig c = small_config(tied);
        Fixture f;
        fixture_init(&f, &c, NULL, 2, 13, false, false);
        random_weights(&f, 8);
        random_tokens(&f);
        llama_requantize(&f.m, false);
        fixture_loss(&f, true);
        double tokens = (double)f.s.state->tokens;
        for (int i = 0; i < f.table.n; i++) {
            const Param *p = &f.table.p[i];
            size_t n = (size_t)(p->rows * p->cols);
            double norm = 0, dot = 0;
            float *d = xmalloc(n * 4), *keep = xmalloc(n * 4), *at = master(&f, i);
            memcpy(keep, at, n * 4);
            // Half random, half along the gradient, so that the derivative is not lost in noise.
            double gnorm = 0;
            for (size_t k = 0; k < n; k++) gnorm += (double)f.shard.grad[p->offset + k] * f.shard.grad[p->offset + k];
            gnorm = sqrt(gnorm / (double)n) + 1e-20;
            for (size_t k = 0; k < n; k++) {
                d[k] = philox_uniform(philox(3, (uint64_t)i, k).v[0]) - 0.5f +
                       0.5f * (float)(f.shard.grad[p->offset + k] / gnorm);
                norm += (double)d[k] * d[k];
            }
            norm = sqrt(norm);
            for (size_t k = 0; k < n; k++) {
                d[k] = (float)(d[k] / norm);
                dot += (double)d[k] * f.shard.grad[p->offset + k] / tokens;
            }
            float e = 1e-2f;
            for (size_t k = 0; k < n; k++) at[k] = keep[k] + e * d[k];
            llama_requantize(&f.m, false);
            double plus = fixture_loss(&f, false);
            for (size_t k = 0; k < n; k++) at[k] = keep[k] - e * d[k];
            llama_requantize(&f.m, false);
            double minus = fixture_loss(&f, false);
            memcpy(at, keep, n * 4);
            double numeric = (plus - minus) / (2 * (double)e);
            if (fabs(numeric - dot) > 1e-4 + 5e-3 * fabs(dot))
                fail_msg("%s: gradient . d = %g, finite difference %g", p->name, dot, numeric);
            free(d); free(keep);
        }
        fixture_free(&f);
    }
}

static QuantPlan plan_named(const char *scheme, const char *embedding) {
    Err err = {0};
    QuantPlan plan;
    quant_plan_none(&plan);
    snprintf(plan.name, sizeof plan.name, "%s", scheme);
    if (quant_scheme_from_name(&plan.linear, scheme, &err) < 0) fail_msg("%s", err.text);
    if (embedding && quant_spec_parse(&plan.embedding, embedding, false, &err) < 0) fail_msg("%s", err.text);
    return plan;
}

static const char *schemes[] = {"none", "int8wo", "int8dq", "int4wo-32", "8da4w-32", "int3-16", "int2-8"};
#define N_SCHEMES (sizeof schemes / sizeof *schemes)

// Recomputation changes memory, not one bit of loss or gradient.
static void test_recompute_equal(void **u) {
    (void)u;
    for (size_t i = 0; i < N_SCHEMES; i++)
        for (int clip = 0; clip < 2; clip++) {
            QuantPlan plan = plan_named(schemes[i], NULL);
            LlamaConfig c = small_config(i & 1);
            c.L = 3;
            Fixture a, b;
            fixture_init(&a, &c, &plan, 2, 21, false, clip);
            fixture_init(&b, &c, &plan, 2, 21, true, clip);
            random_weights(&a, 4); random_weights(&b, 4);
            random_tokens(&a); random_tokens(&b);
            llama_requantize(&a.m, true); llama_requantize(&b.m, true);
            double la = fixture_loss(&a, true), lb = fixture_loss(&b, true);
            assert_memory_equal(&la, &lb, sizeof la);
            assert_memory_equal(a.shard.grad, b.shard.grad, a.table.n_elements * 4);
            fixture_free(&a); fixture_free(&b);
        }
}

// Weight-only fake quantization with straight-through gradients: loss and gradients are those of the float model whose
// masters are the fake-quantized values.
static void test_straight_through(void **u) {
    (void)u;
    QuantPlan plan = plan_named("int4wo-32", "int4,group=32");
    LlamaConfig c = small_config(false);
    Fixture a, b;
    fixture_init(&a, &c, &plan, 2, 16, false, false);
    fixture_init(&b, &c, NULL, 2, 16, false, false);
    random_weights(&a, 4); random_tokens(&a); random_tokens(&b);
    llama_requantize(&a.m, true);
    for (int i = 0; i < a.table.n; i++)
        for (int64_t k = 0; k < a.table.p[i].rows * a.table.p[i].cols; k++)
            master(&b, i)[k] = x2f(shard_weight(&a.shard, i)[k]);
    llama_requantize(&b.m, false);
    double la = fixture_loss(&a, true), lb = fixture_loss(&b, true);
    assert_memory_equal(&la, &lb, sizeof la);
    assert_memory_equal(a.shard.grad, b.shard.grad, a.table.n_elements * 4);
    fixture_free(&a); fixture_free(&b);
}

// Masters that drift from the working copy would train one model and serve another: after an update the working values
// are what rebuilding them from the masters gives, for every scheme; switching off and on again changes nothing.
static void test_update_keeps_working_values(void **u) {
    (void)u;
    for (size_t i = 0; i < N_SCHEMES; i++)
        for (int kind = 0; kind < 2; kind++) {
            QuantPlan plan = plan_named(schemes[i], i % 3 ? NULL : "int4,group=32");
            LlamaConfig c = small_config(i & 1);
            Fixture f;
            fixture_init(&f, &c, &plan, 1, 16, false, true);
            random_weights(&f, 4); random_tokens(&f);
            llama_requantize(&f.m, true);
            fixture_loss(&f, true);
            f.s.state->lr = 1e-2f;
            UpdateParams up = {.kind = kind ? OPTIM_SGD : OPTIM_ADAMW, .adamw = {0.9, 0.999, 1e-8, 0}, .momentum = 0.9f,
                               .weight_decay = 0.1f, .clip = 1, .ste_clip = true};
            llama_update(&f.m, f.s.state, &up);
            size_t n = f.table.n_elements * sizeof(floatX), rows = f.table.n_rows * 4;
            floatX *work = memcpy(xmalloc(n), f.shard.work, n);
            float *scale = memcpy(xmalloc(rows), f.shard.wscale, rows);
            llama_requantize(&f.m, false);
            llama_requantize(&f.m, true);
            assert_memory_equal(work, f.shard.work, n);
            assert_memory_equal(scale, f.shard.wscale, rows);
            free(work); free(scale);
            fixture_free(&f);
        }
}

// Gradients of two micro-steps add up to those of one batch of both (another order of summation over tokens).
static void test_accumulation(void **u) {
    (void)u;
    LlamaConfig c = small_config(true);
    Fixture both, one;
    fixture_init(&both, &c, NULL, 2, 16, false, false);
    fixture_init(&one, &c, NULL, 1, 16, false, false);
    random_weights(&both, 4); random_weights(&one, 4);
    random_tokens(&both);
    llama_requantize(&both.m, false); llama_requantize(&one.m, false);
    fixture_loss(&both, true);
    *one.s.state = (StepState){.t = 1};
    for (int micro = 0; micro < 2; micro++) {
        memcpy(one.s.tokens, both.s.tokens + micro * 16, 64);
        memcpy(one.s.targets, both.s.targets + micro * 16, 64);
        llama_forward(&one.m, &one.s);
        llama_loss(&one.m, &one.s, true, micro);
        llama_backward(&one.m, &one.s, micro, micro == 1);
    }
    assert_int_equal(one.s.state->tokens, both.s.state->tokens);
    assert_true(fabs(one.s.state->loss_sum - both.s.state->loss_sum) < 1e-9 * both.s.state->loss_sum);
    // fp32 sums of 32 terms in another order: 32 * 2^-24 of the largest partial sum.
    check_tensor("accumulated gradients", one.shard.grad, both.shard.grad, both.table.n_elements);
    fixture_free(&both); fixture_free(&one);
}

// A NaN anywhere in the gradients leaves masters, moments and working values as they are.
static void test_skip_on_nan(void **u) {
    (void)u;
    QuantPlan plan = plan_named("8da4w-32", NULL);
    LlamaConfig c = small_config(true);
    Fixture f;
    fixture_init(&f, &c, &plan, 1, 16, false, false);
    random_weights(&f, 4); random_tokens(&f);
    llama_requantize(&f.m, true);
    fixture_loss(&f, true);
    f.shard.grad[f.table.n_elements / 2] = NAN;
    f.s.state->lr = 1;
    size_t n = f.table.n_elements, stored = f.store.arena_bytes;
    void *store = memcpy(xmalloc(stored), f.store.arena, stored);
    floatX *work = memcpy(xmalloc(n * sizeof(floatX)), f.shard.work, n * sizeof(floatX));
    UpdateParams up = {.kind = OPTIM_ADAMW, .adamw = {0.9, 0.999, 1e-8, 0}, .weight_decay = 0.1f, .clip = 1};
    llama_update(&f.m, f.s.state, &up);
    assert_int_equal(f.s.state->skip, 1);
    assert_memory_equal(store, f.store.arena, stored);
    assert_memory_equal(work, f.shard.work, n * sizeof(floatX));
    free(store); free(work);
    fixture_free(&f);
}

int main(int argc, char **argv) {
    setup_options();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden_gqa),
        cmocka_unit_test(test_golden_tied),
        cmocka_unit_test(test_golden_llama3_rope),
        cmocka_unit_test(test_golden_linear_rope),
        cmocka_unit_test(test_golden_head_dim),
        cmocka_unit_test(test_finite_differences),
        cmocka_unit_test(test_recompute_equal),
        cmocka_unit_test(test_straight_through),
        cmocka_unit_test(test_update_keeps_working_values),
        cmocka_unit_test(test_accumulation),
        cmocka_unit_test(test_skip_on_nan),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL) != 0;
}
