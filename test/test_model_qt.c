// The model with INT8 weights: gradients against finite differences, integer products against weight-only ones, and the
// equalities that must hold to the bit.
#include "test_common.h"
#define main train_main
#include "../train_llama_qt.c"
#undef main
#include "llmc/rng.h"

typedef struct { QuantPlan plan; ParamTable table; Shard shard; Store store; Llama m; Acts s; } Fixture;

static LlamaConfig small_config(bool tied) {
    return (LlamaConfig){.C = 32, .L = 2, .NH = 4, .NKV = 2, .HS = 8, .FF = 64, .V = 67, .max_T = 64, .norm_eps = 1e-5f,
                         .rope_theta = 10000, .rope_factor = 1, .tied = tied, .bos = -1};
}

static void fixture_init(Fixture *f, bool tied, bool int8_head, Int8Products products, ParamFormat others,
                         StateFormat state, bool recompute) {
    Err err = {0};
    memset(f, 0, sizeof *f);
    Llama *m = &f->m;
    *m = (Llama){.c = small_config(tied), .int8 = products, .table = &f->table, .shard = &f->shard, .store = &f->store};
    m->c.L = recompute ? 3 : 2;
    qt.head = !int8_head;
    if (plan_from_options(&f->plan, &m->c, &products, &err) < 0) fail_msg("%s", err.text);
    if (param_table_build(&f->table, &m->c, &f->plan, &err) < 0) fail_msg("%s", err.text);
    param_table_formats(&f->table, others, state);
    if (shard_plan(&f->shard, &m->c, &f->plan, &f->table, SHARD_NONE, true, 1, 0, &err) < 0 ||
        store_plan(&f->store, &f->shard, true, &err) < 0 || shard_alloc(&f->shard, &err) < 0 ||
        store_alloc(&f->store, &err) < 0) fail_msg("%s", err.text);
    ActsShape shape = {.B = 2, .T = 13, .grad_accum = 1, .recompute = recompute, .row_scales = !products.grad_input};
    if (acts_alloc(&f->s, &m->c, &shape, &err) < 0) fail_msg("%s", err.text);
    for (int i = 0; i < f->table.n; i++) {
        const Param *p = &f->table.p[i];
        size_t n = (size_t)(p->rows * p->cols);
        float *rows = xmalloc(n * sizeof *rows);
        param_init_random(rows, p, &m->c, 11, 0, n);
        for (size_t k = 0; k < n; k++) rows[k] *= p->rows == 1 ? 1.0f : 8.0f;
        if (store_set_rows(&f->store, i, 0, p->rows, rows, &err) < 0) fail_msg("%s", err.text);
        free(rows);
    }
    for (size_t i = 0; i < f->s.N; i++) {
        f->s.tokens[i] = (int32_t)(philox(7, 1, i).v[0] % (uint32_t)m->c.V);
        f->s.targets[i] = i % 7 == 3 ? -1 : (int32_t)(philox(7, 2, i).v[0] % (uint32_t)m->c.V);
    }
    shard_requantize(&f->shard, &f->store, true);
}

static void fixture_free(Fixture *f) {
    acts_free(&f->s);
    store_free(&f->store);
    shard_free(&f->shard);
    param_table_free(&f->table);
}

static double fixture_loss(Fixture *f, bool backward) {
    Err err = {0};
    *f->s.state = (StepState){.t = 1, .seed = 5};
    llama_forward(&f->m, &f->s);
    llama_loss(&f->m, &f->s, backward, 0);
    if (backward) llama_backward(&f->m, &f->s, 0, true);
    if (device_sync(&err) < 0) fail_msg("%s", err.text);
    return f->s.state->loss_sum / (double)f->s.state->tokens;
}

static const Int8Products none = {0}, all = {true, true, true};

// Codes cannot move by little, but their scales can: dL/ds of a row is the gradient of its weights times its codes. The
// quotient's error: see test_finite_differences of test_model.c; e is relative to the scale here.
static void test_finite_differences(void **u) {
    (void)u;
    if (sizeof(floatX) != 4) { print_message("skipped: only in the fp32 build\n"); skip(); }
    for (int tied = 0; tied < 2; tied++) {
        Fixture f;
        fixture_init(&f, tied, !tied, none, PARAM_F32, STATE_F32, false);
        fixture_loss(&f, true);
        double tokens = (double)f.s.state->tokens;
        int checked = 0;
        for (int i = 0; i < f.table.n; i++) {
            const Param *p = &f.table.p[i];
            if (p->format != PARAM_INT8) continue;
            StoredParam k = f.store.t[i].p;
            float *keep = memcpy(xmalloc((size_t)p->rows * 4), k.scale, (size_t)p->rows * 4), e = 1e-2f;
            double dot = 0;
            for (int64_t r = 0; r < p->rows; r++)
                for (int64_t c = 0; c < p->cols; c++)
                    dot += (double)shard_gradient(&f.shard, i)[r * p->cols + c] * ((int8_t *)k.data)[r * p->cols + c] *
                           keep[r] * (r % 3 - 1) / tokens;
            for (int64_t r = 0; r < p->rows; r++) k.scale[r] = keep[r] * (1 + e * (float)(r % 3 - 1));
            double plus = fixture_loss(&f, false);
            for (int64_t r = 0; r < p->rows; r++) k.scale[r] = keep[r] * (1 - e * (float)(r % 3 - 1));
            double minus = fixture_loss(&f, false), numeric = (plus - minus) / (2 * (double)e);
            memcpy(k.scale, keep, (size_t)p->rows * 4);
            if (fabs(numeric - dot) > 1e-4 + 5e-3 * fabs(dot))
                fail_msg("%s: gradient . d = %g, finite difference %g", p->name, dot, numeric);
            free(keep);
            checked++;
        }
        assert_int_equal(checked, tied ? 14 : 15);
        fixture_free(&f);
    }
}

// Integer products round each row of activations or gradients to 127 steps of its largest value, 2.5 to 4 times the
// row's root mean square here: each rounding adds noise of some 3.5 / (127 sqrt 12) = 0.8 % of the row. A forward makes
// nine, one after the other (four in each of two blocks, and the head's), the gradients of inputs as many, a weight's
// gradient two: n of them add up to 0.008 sqrt n, and to twice that, e, where the softmax and the norms subtract what
// is alike. Noise across the gradient takes e^2 / 2 from the cosine. Along it e would change squared lengths by 2 e; a
// quarter of its square is more than falls on one direction of many. Seen: up to 0.9 e^2 / 2 and 0.7 e. The losses'
// noise, 2.4 % of logits that spread by about 1, is a mean over 22 targets: 0.5 % of 1, and three times that is less
// than 0.4 % of a loss of 4.6. A transposed operand or a lost scale turns the gradient by far more.
static void test_integer_products(void **u) {
    (void)u;
    for (int which = 0; which < 4; which++) {
        Int8Products p = {which == 0 || which == 3, which == 1 || which == 3, which == 2 || which == 3};
        double e = 2 * 0.008 * sqrt(9 * p.output + 9 * p.grad_input + 2 * p.grad_weight);
        for (int tied = 0; tied < 2; tied++) {
            Fixture a, b;
            fixture_init(&a, tied, true, none, PARAM_F32, STATE_F32, false);
            fixture_init(&b, tied, true, p, PARAM_F32, STATE_F32, false);
            double la = fixture_loss(&a, true), lb = fixture_loss(&b, true);
            if (!p.output) assert_memory_equal(&la, &lb, sizeof la);
            assert_true(fabs(la - lb) < 0.004 * la);
            for (int i = 0; i < a.table.n; i++) {
                const Param *t = &a.table.p[i];
                double dot = 0, na = 0, nb = 0;
                for (int64_t k = 0; k < t->rows * t->cols; k++) {
                    double x = shard_gradient(&a.shard, i)[k], y = shard_gradient(&b.shard, i)[k];
                    dot += x * y;
                    na += x * x;
                    nb += y * y;
                }
                if (!(1 - dot / sqrt(na * nb) < e * e / 2 && fabs(nb / na - 1) < e))
                    fail_msg("%s, products %d: cosine %g, lengths %g and %g, e %g", t->name, which,
                             dot / sqrt(na * nb), sqrt(na), sqrt(nb), e);
            }
            fixture_free(&a);
            fixture_free(&b);
        }
    }
}

// Recomputation changes memory, not one bit of loss or gradient.
static void test_recompute_equal(void **u) {
    (void)u;
    for (int i = 0; i < 2; i++) {
        Fixture a, b;
        fixture_init(&a, i, true, i ? all : none, PARAM_BF16, STATE_INT8, true);
        fixture_init(&b, i, true, i ? all : none, PARAM_BF16, STATE_INT8, true);
        b.s.recompute = false;
        acts_free(&b.s);
        ActsShape shape = {.B = 2, .T = 13, .grad_accum = 1, .row_scales = true};
        Err err = {0};
        if (acts_alloc(&b.s, &b.m.c, &shape, &err) < 0) fail_msg("%s", err.text);
        memcpy(b.s.tokens, a.s.tokens, a.s.N * 4);
        memcpy(b.s.targets, a.s.targets, a.s.N * 4);
        double la = fixture_loss(&a, true), lb = fixture_loss(&b, true);
        assert_memory_equal(&la, &lb, sizeof la);
        for (int k = 0; k < a.table.n; k++)
            assert_memory_equal(shard_gradient(&a.shard, k), shard_gradient(&b.shard, k),
                                (size_t)(a.table.p[k].rows * a.table.p[k].cols) * 4);
        fixture_free(&a);
        fixture_free(&b);
    }
}

// After an update the working weights are what rebuilding them from the store gives, and the INT8 ones have moved; a
// step without a finite norm changes nothing.
static void test_update(void **u) {
    (void)u;
    for (int i = 0; i < 8; i++) {
        Fixture f;
        fixture_init(&f, i & 1, true, i & 2 ? all : none, i & 4 ? PARAM_F32 : PARAM_BF16,
                     i & 2 ? STATE_INT8 : STATE_F32, false);
        int q = (int)(param_get(&f.table, 0, ROLE_Q) - f.table.p), embed = 0;
        size_t nq = (size_t)(f.table.p[q].rows * f.table.p[q].cols), ne = (size_t)(f.m.c.V * f.m.c.C);
        int8_t *before = memcpy(xmalloc(nq), shard_codes(&f.shard, q), nq);
        UpdateParams up = {.adamw = {0.9, 0.999, 1e-8, 0}, .weight_decay = 0.1, .clip = 1,
                           .rounding = ROUND_STOCHASTIC};
        fixture_loss(&f, true);
        f.s.state->lr = 1e-2f;
        float keep = shard_gradient(&f.shard, embed)[3];
        shard_gradient(&f.shard, embed)[3] = NAN;
        llama_update(&f.m, f.s.state, &up);
        assert_int_equal(f.s.state->skip, 1);
        assert_memory_equal(before, shard_codes(&f.shard, q), nq);
        shard_gradient(&f.shard, embed)[3] = keep;
        f.s.state->grad_squares = 0;
        llama_update(&f.m, f.s.state, &up);
        assert_int_equal(f.s.state->skip, 0);
        assert_memory_not_equal(before, shard_codes(&f.shard, q), nq);
        floatX *table = memcpy(xmalloc(ne * sizeof(floatX)), shard_weight(&f.shard, embed), ne * sizeof(floatX));
        int8_t *head = f.m.c.tied ? memcpy(xmalloc(ne), shard_head_codes(&f.shard), ne) : NULL;
        shard_requantize(&f.shard, &f.store, true);
        assert_memory_equal(table, shard_weight(&f.shard, embed), ne * sizeof(floatX));
        if (head) assert_memory_equal(head, shard_head_codes(&f.shard), ne);
        free(before);
        free(table);
        free(head);
        fixture_free(&f);
    }
}

int main(int argc, char **argv) {
    Err err = {0};
    char *none_given[] = {"test"};
    if (cli_parse(options, N_OPTIONS, "", NULL, 1, none_given, &err) < 0 || device_init("cpu", 0, &err) < 0)
        fail_msg("%s", err.text);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_finite_differences),
        cmocka_unit_test(test_integer_products),
        cmocka_unit_test(test_recompute_equal),
        cmocka_unit_test(test_update),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL) != 0;
}
