// Serving: how a text is cut into calls, what stands beside it in the batch, and whether the weights come as floats or
// as codes changes no bit of the trained arithmetic, and the bits are the trainer's; the served arithmetic stays within
// its bound, few tokens at a time and many; a step of decoding is a forward and a draw; an INT8 cache is a cache; the
// text of a fixed model is the stored one on every path; served forms kept in a file are those that are made; hostile
// input changes nothing.
#include "test_common.h"
#include <sys/stat.h>
#include "llmc/cpu/isa.h"
#include "llmc/device.h"
#include "llmc/infer.h"
#include "llmc/rng.h"

enum { T_ALL = 41, BATCH = 3 };

#define main train_main
#include "../train_llama_qat.c"
#undef main

static void must(int rc, const Err *err) {
    if (rc < 0) fail_msg("%s", err->text);
}

static LlamaConfig small_config(bool tied) {
    return (LlamaConfig){.C = 64, .L = 2, .NH = 4, .NKV = 2, .HS = 16, .FF = 96, .V = 132, .max_T = 64,
                         .norm_eps = 1e-5f,
                         .rope_theta = 10000, .rope_factor = 1, .tied = tied, .bos = -1};
}

// Weights large enough for attention and activations to matter; values of bf16, as every exported model has.
static int random_rows(void *ctx, const Param *p, int64_t row0, int64_t n, float *out, Err *err) {
    (void)err;
    size_t count = (size_t)(n * p->cols);
    param_init_random(out, p, ctx, 11, (size_t)(row0 * p->cols), count);
    for (size_t i = 0; i < count; i++) out[i] = bf16_round(p->rows == 1 ? out[i] + 0.01f * (float)(i % 17) :
                                                           5.0f * out[i]);
    return 0;
}

typedef struct { const char *name, *linear, *embedding, *head, *rule; bool tied; } Variant;
static const Variant variants[] = {
    {"float", "none", NULL, NULL, NULL, false},
    {"float tied", "none", NULL, NULL, NULL, true},
    {"8da4w", "8da4w-32", NULL, NULL, NULL, false},
    {"8da4w tied", "8da4w-32", "int4,group=32", NULL, NULL, true},
    {"int8wo", "int8wo", "int8,channel", NULL, NULL, false},
    {"int8dq", "int8dq", NULL, "int8,channel", NULL, true},
    {"int4wo", "int4wo-32", "int4,group=16", "int4,group=32,symmetric", NULL, true},
    {"int3", "int3-32", "int5,block=1x16", NULL, NULL, false},
    {"mixed", "int4wo-32", NULL, NULL, "*.[qk]_proj.weight=int8wo", false},
    {"part float", "int8wo", NULL, NULL, "*.v_proj.weight=none", false},
    {"blocks", "none", "int8,tensor,symmetric", NULL, "*=int5,block=2x16,asymmetric", false},
};
#define N_VARIANTS (sizeof variants / sizeof *variants)

static QuantPlan plan_of(const Variant *v) {
    Err err = {0};
    QuantPlan plan;
    quant_plan_none(&plan);
    snprintf(plan.name, sizeof plan.name, "test");
    must(quant_scheme_from_name(&plan.linear, v->linear, &err), &err);
    if (v->embedding) must(quant_spec_parse(&plan.embedding, v->embedding, false, &err), &err);
    if (v->head) must(quant_spec_parse(&plan.tied_head, v->head, false, &err), &err);
    if (v->rule) must(quant_plan_add_rule(&plan, v->rule, &err), &err);
    return plan;
}

// Writes the variant as a model.bin and opens it.
static void open_model(ModelFile *m, const Variant *v, bool packed) {
    Err err = {0};
    LlamaConfig c = small_config(v->tied);
    QuantPlan plan = plan_of(v);
    ParamTable table;
    char path[300];
    snprintf(path, sizeof path, "%s/model.bin", test_tmpdir());
    must(param_table_build(&table, &c, &plan, &err), &err);
    if (packed) must(model_write_packed(path, &c, &plan, &table, NULL, DT_BF16, random_rows, &c, NULL, NULL, &err),
                     &err);
    else must(model_write_bin(path, &c, &plan, &table, NULL, DT_BF16, random_rows, &c, &err), &err);
    param_table_free(&table);
    must(model_open(m, path, &err), &err);
}

static Infer *new_infer(const ModelFile *m, int B, int max_T, int max_N, Arithmetic arith) {
    Err err = {0};
    Infer *s;
    must(infer_new(&s, m, &(InferOptions){.B = B, .max_T = max_T, .max_N = max_N, .arith = arith}, &err), &err);
    return s;
}

static void make_tokens(int32_t *tokens, int32_t *targets, int V) {
    for (int i = 0; i < BATCH * T_ALL; i++) {
        tokens[i] = (int32_t)(philox(7, 1, (uint64_t)i).v[0] % (uint32_t)V);
        targets[i] = i % 7 == 3 ? -1 : (int32_t)(philox(7, 2, (uint64_t)i).v[0] % (uint32_t)V);
    }
}

// One sequence in calls of the given lengths: losses of every token and logits of the last.
static void run_in_pieces(Infer *s, const int32_t *tokens, const int32_t *targets, const int *pieces, float *losses,
                          float *logits) {
    Err err = {0};
    infer_reset(s, 1);
    for (int at = 0; at < T_ALL; at += *pieces++)
        must(infer_forward(s, tokens + at, targets + at, *pieces, logits, losses + at, &err), &err);
    assert_int_equal(infer_position(s), T_ALL);
}

static void same_bits(const char *what, const char *variant, const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (memcmp(&a[i], &b[i], sizeof *a)) fail_msg("%s: %s: value %zu is %.9g, expected %.9g", variant, what, i,
                                                      (double)a[i], (double)b[i]);
}

static void setup(void) {
    Err err = {0};
    must(device_init("cpu", 0, &err), &err);
}

static void cutting_changes_no_bit(void **state) {
    (void)state;
    setup();
    static const int whole[] = {T_ALL}, thirds[] = {5, 1, 20, 15};
    int ones[T_ALL];
    for (int i = 0; i < T_ALL; i++) ones[i] = 1;
    int32_t tokens[BATCH * T_ALL], targets[BATCH * T_ALL];
    for (size_t i = 0; i < N_VARIANTS; i++) {
        ModelFile m;
        open_model(&m, &variants[i], i & 1);
        int V = m.config.V;
        make_tokens(tokens, targets, V);
        Infer *s = new_infer(&m, 1, T_ALL, T_ALL, ARITH_TRAINED);
        float a[T_ALL], b[T_ALL], *la = xmalloc((size_t)V * 4), *lb = xmalloc((size_t)V * 4);
        run_in_pieces(s, tokens, targets, whole, a, la);
        for (int t = 0; t < T_ALL; t++) assert_true(targets[t] < 0 ? a[t] == 0.0f : isfinite(a[t]) && a[t] > 0.0f);
        run_in_pieces(s, tokens, targets, thirds, b, lb);
        same_bits("losses in pieces", variants[i].name, b, a, T_ALL);
        same_bits("logits in pieces", variants[i].name, lb, la, (size_t)V);
        run_in_pieces(s, tokens, targets, ones, b, lb);
        same_bits("losses one by one", variants[i].name, b, a, T_ALL);
        same_bits("logits one by one", variants[i].name, lb, la, (size_t)V);
        free(la); free(lb);
        infer_free(s);
        model_close(&m);
    }
}

static void neighbours_change_no_bit(void **state) {
    (void)state;
    setup();
    int32_t tokens[BATCH * T_ALL], targets[BATCH * T_ALL];
    for (size_t i = 0; i < N_VARIANTS; i++) {
        ModelFile m;
        Err err = {0};
        open_model(&m, &variants[i], !(i & 1));
        int V = m.config.V;
        make_tokens(tokens, targets, V);
        Infer *s = new_infer(&m, BATCH, T_ALL + 3, BATCH * T_ALL, ARITH_TRAINED);
        float all[BATCH * T_ALL], one[T_ALL], *la = xmalloc((size_t)(BATCH * V) * 4), *lb = xmalloc((size_t)V * 4);
        must(infer_forward(s, tokens, targets, T_ALL, la, all, &err), &err);
        for (int b = BATCH - 1; b >= 0; b--) {
            infer_reset(s, 1);
            must(infer_forward(s, tokens + b * T_ALL, targets + b * T_ALL, T_ALL, lb, one, &err), &err);
            same_bits("losses alone", variants[i].name, one, all + b * T_ALL, T_ALL);
            same_bits("logits alone", variants[i].name, lb, la + b * V, (size_t)V);
        }
        // A forked context is a context: 20 tokens once, then three different continuations.
        int32_t next[BATCH * 9], want[BATCH * 9];
        float forked[BATCH * 9];
        infer_reset(s, 1);
        must(infer_forward(s, tokens, NULL, 20, NULL, NULL, &err), &err);
        infer_fork(s, BATCH);
        for (int b = 0; b < BATCH; b++)
            for (int t = 0; t < 9; t++) {
                next[b * 9 + t] = tokens[b * T_ALL + t];
                want[b * 9 + t] = tokens[b * T_ALL + t + 1];
            }
        must(infer_forward(s, next, want, 9, NULL, forked, &err), &err);
        for (int b = 0; b < BATCH; b++) {
            infer_reset(s, 1);
            must(infer_forward(s, tokens, NULL, 20, NULL, NULL, &err), &err);
            must(infer_forward(s, next + b * 9, want + b * 9, 9, NULL, one, &err), &err);
            same_bits("forked", variants[i].name, forked + b * 9, one, 9);
        }
        free(la); free(lb);
        infer_free(s);
        model_close(&m);
    }
}

// The trainer's own forward on the same weights.
static void trainers_losses(float *losses, const Variant *v, const int32_t *tokens, const int32_t *targets) {
    Err err = {0};
    QuantPlan plan = plan_of(v);
    LlamaConfig c = small_config(v->tied);
    ParamTable table;
    Shard shard;
    Store store;
    Llama m = {.c = c, .plan = &plan, .table = &table, .shard = &shard, .store = &store};
    Acts s;
    must(param_table_build(&table, &c, &plan, &err), &err);
    must(shard_plan(&shard, &m.c, &plan, &table, SHARD_NONE, true, 1, 0, &err), &err);
    must(shard_alloc(&shard, &err), &err);
    must(store_plan(&store, &shard, true, &err), &err);
    must(store_alloc(&store, &err), &err);
    ActsShape shape = {.B = BATCH, .T = T_ALL, .grad_accum = 1, .quantized = true, .row_scales = true};
    must(acts_alloc(&s, &c, &shape, &err), &err);
    for (int i = 0; i < table.n; i++)
        random_rows(&c, &table.p[i], 0, table.p[i].rows, store_param(&store, i, 0).data, NULL);
    llama_requantize(&m, true);
    *s.state = (StepState){.t = 1};
    memcpy(s.tokens, tokens, s.N * sizeof *tokens);
    memcpy(s.targets, targets, s.N * sizeof *targets);
    llama_forward(&m, &s);
    llama_loss(&m, &s, false, 0);
    must(device_sync(&err), &err);
    memcpy(losses, s.losses, s.N * sizeof *losses);
    acts_free(&s);
    store_free(&store);
    shard_free(&shard);
    param_table_free(&table);
}

static void trainer_file_and_server_agree(void **state) {
    (void)state;
    setup();
    int32_t tokens[BATCH * T_ALL], targets[BATCH * T_ALL];
    for (size_t i = 0; i < N_VARIANTS; i++) {
        float expected[BATCH * T_ALL], got[BATCH * T_ALL];
        make_tokens(tokens, targets, small_config(false).V);
        trainers_losses(expected, &variants[i], tokens, targets);
        bool quantized = strcmp(variants[i].linear, "none") || variants[i].rule;
        for (int packed = 0; packed <= quantized; packed++)
            // Many tokens at a time of a model in floats: the served arithmetic is the same operations too.
            for (int served = 0; served <= !quantized; served++) {
                ModelFile m;
                Err err = {0};
                open_model(&m, &variants[i], packed);
                Infer *s = new_infer(&m, BATCH, T_ALL, BATCH * T_ALL, served ? ARITH_SERVED : ARITH_TRAINED);
                must(infer_forward(s, tokens, targets, T_ALL, NULL, got, &err), &err);
                same_bits(packed ? "packed against trainer" : "float file against trainer", variants[i].name, got,
                          expected, BATCH * T_ALL);
                infer_free(s);
                model_close(&m);
            }
    }
}

// The served arithmetic reads packed codes. A linear's output then differs by
//   - code * scale in f32 where training rounds it to bf16: 2^-9 of each weight, unless the weight works as its codes;
//     products of codes spare the rounding of the input's values to X as well, another 2^-9 (bf16);
//   - f32 rounding in another order before the one rounding to X: at most one ulp of X, 2^-8 relative (bf16), or
//     C * 2^-23 of sum |x w| (fp32; C <= 96, and sums of mixed sign: 2^-14 of the result).
// Quantized activations turn either into at most a step of 1/255 of the row's range, again about 2^-8. Attention keeps
// its weights in f32 where training rounds them to bf16, 2^-9 of its output, which the linear after it carries on. Four
// linears in each of L blocks feed the residual stream: 4 L u of the logits' norm, u the largest of these. A loss moves
// by no more than twice the largest move of its row's logits.
static void served_stays_within_its_bound(void **state) {
    (void)state;
    setup();
    int32_t tokens[BATCH * T_ALL], targets[BATCH * T_ALL];
    for (size_t i = 0; i < N_VARIANTS; i++) {
        ModelFile m;
        Err err = {0};
        bool quantized = strcmp(variants[i].linear, "none") || variants[i].rule;
        open_model(&m, &variants[i], quantized);
        int V = m.config.V;
        make_tokens(tokens, targets, V);
        bool f32_only = sizeof(floatX) == 4 && !m.plan.linear.act.bits && !m.plan.n_rules &&
                        (!m.plan.linear.weight.bits || quant_works_as_codes(&m.plan.linear.weight));
        double u = f32_only ? 0x1p-14 : 0x1p-8, diff = 0, norm = 0;
        Infer *a = new_infer(&m, 2, T_ALL, 2 * T_ALL, ARITH_TRAINED);
        Infer *b = new_infer(&m, 2, T_ALL, 2 * T_ALL, ARITH_SERVED);
        float *la = xmalloc((size_t)(2 * V) * 4), *lb = xmalloc((size_t)(2 * V) * 4);
        for (int t = 0; t < T_ALL; t++) {        // two sequences: calls of two tokens
            int32_t two[2] = {tokens[t], tokens[T_ALL + t]};
            must(infer_forward(a, two, NULL, 1, la, NULL, &err), &err);
            must(infer_forward(b, two, NULL, 1, lb, NULL, &err), &err);
            for (int k = 0; k < 2 * V; k++) {
                diff += ((double)la[k] - (double)lb[k]) * ((double)la[k] - (double)lb[k]);
                norm += (double)la[k] * (double)la[k];
            }
        }
        double allowed = 4 * m.config.L * u * sqrt(norm);
        if (!(sqrt(diff) <= allowed))
            fail_msg("%s: served logits are %.3g of their norm away; allowed %.3g", variants[i].name,
                     sqrt(diff / norm), 4 * m.config.L * u);
        float losses_a[2 * T_ALL], losses_b[2 * T_ALL];                      // both texts in one call
        infer_reset(a, 2);
        infer_reset(b, 2);
        must(infer_forward(a, tokens, targets, T_ALL, NULL, losses_a, &err), &err);
        must(infer_forward(b, tokens, targets, T_ALL, NULL, losses_b, &err), &err);
        double moved = 0;
        for (int k = 0; k < 2 * T_ALL; k++)
            moved += ((double)losses_a[k] - (double)losses_b[k]) * ((double)losses_a[k] - (double)losses_b[k]);
        if (!(sqrt(moved) <= 2 * allowed))
            fail_msg("%s: served losses moved by %.3g in all; allowed %.3g", variants[i].name, sqrt(moved),
                     2 * allowed);
        free(la); free(lb);
        infer_free(a);
        infer_free(b);
        model_close(&m);
    }
}

static Infer *new_kept(const ModelFile *m, int B, KvFormat kv, const char *cache_path, Err *cache_err) {
    Err err = {0};
    Infer *s;
    must(infer_new(&s, m, &(InferOptions){.B = B, .max_T = 64, .max_N = 64, .arith = ARITH_SERVED, .kv = kv,
                                          .cache_path = cache_path, .cache_err = cache_err}, &err), &err);
    return s;
}
static Infer *new_served(const ModelFile *m, int B, KvFormat kv) { return new_kept(m, B, kv, NULL, NULL); }

static void a_step_is_a_forward_and_a_draw(void **state) {
    (void)state;
    setup();
    const Sampler samplers[] = {{.temperature = 0}, {.temperature = 0.8f, .top_k = 40, .top_p = 0.9f, .seed = 5}};
    for (size_t i = 0; i < N_VARIANTS; i++)
        for (int mode = 0; mode < 3; mode++) {   // trained, served, served with an INT8 cache
            ModelFile m;
            Err err = {0};
            open_model(&m, &variants[i], strcmp(variants[i].linear, "none") || variants[i].rule);
            KvFormat kv = mode == 2 ? KV_INT8 : KV_X;
            Infer *a = mode ? new_served(&m, 1, kv) : new_infer(&m, 1, 64, 64, ARITH_TRAINED);
            Infer *b = mode ? new_served(&m, 1, kv) : new_infer(&m, 1, 64, 64, ARITH_TRAINED);
            float *logits = xmalloc((size_t)m.config.V * sizeof *logits);
            for (int k = 0; k < 2; k++) {
                const int32_t prompt[] = {5, 99, 17, 3, 64};
                infer_reset(a, 1);
                infer_reset(b, 1);
                must(infer_forward(a, prompt, NULL, 5, NULL, NULL, &err), &err);
                must(infer_forward(b, prompt, NULL, 5, NULL, NULL, &err), &err);
                int32_t next = 7, want = 7;
                for (int t = 0; t < 20; t++) {
                    must(infer_next(a, &samplers[k], (uint64_t)t, &next, &err), &err);
                    must(infer_forward(b, &want, NULL, 1, logits, NULL, &err), &err);
                    want = sample_token(&samplers[k], logits, m.config.V, (uint64_t)t);
                    if (next != want) fail_msg("%s, mode %d, token %d is %d, expected %d", variants[i].name, mode, t,
                                               next, want);
                }
                assert_int_equal(infer_position(a), 25);
            }
            free(logits);
            infer_free(a);
            infer_free(b);
            model_close(&m);
        }
}

// Each value of the cache is off by amax / 254 at most: 2^-7 of what a vector's values are worth where amax is up to
// twice their mean size, and scores of about 1 move by as much: 2^-6 of an attention's output, of which L feed the
// residual stream beside their linears' own roundings (test above).
static void an_int8_cache_is_a_cache(void **state) {
    (void)state;
    setup();
    enum { AHEAD = 20, ON = 12 };
    int32_t tokens[BATCH * T_ALL], targets[BATCH * T_ALL];
    for (size_t i = 0; i < N_VARIANTS; i++) {
        ModelFile m;
        Err err = {0};
        open_model(&m, &variants[i], strcmp(variants[i].linear, "none") || variants[i].rule);
        size_t V = (size_t)m.config.V;
        make_tokens(tokens, targets, (int)V);
        Infer *a = new_served(&m, BATCH, KV_INT8), *b = new_served(&m, BATCH, KV_X);
        float *la = xmalloc(BATCH * V * 4), *lb = xmalloc(BATCH * V * 4), *forked = xmalloc(BATCH * V * 4);
        double diff = 0, norm = 0;
        infer_reset(a, 1);
        infer_reset(b, 1);
        must(infer_forward(a, tokens, NULL, AHEAD, NULL, NULL, &err), &err);
        must(infer_forward(b, tokens, NULL, AHEAD, NULL, NULL, &err), &err);
        infer_fork(a, BATCH);
        infer_fork(b, BATCH);
        for (int t = 0; t < ON; t++) {
            int32_t next[BATCH];
            for (int k = 0; k < BATCH; k++) next[k] = tokens[k * T_ALL + t];
            must(infer_forward(a, next, NULL, 1, forked, NULL, &err), &err);
            must(infer_forward(b, next, NULL, 1, lb, NULL, &err), &err);
            for (size_t k = 0; k < BATCH * V; k++) {
                diff += ((double)forked[k] - (double)lb[k]) * ((double)forked[k] - (double)lb[k]);
                norm += (double)lb[k] * (double)lb[k];
            }
        }
        if (!(diff > 0 && sqrt(diff) <= m.config.L * (0x1p-6 + 4 * 0x1p-8) * sqrt(norm)))
            fail_msg("%s: with an INT8 cache logits are %.3g of their norm away", variants[i].name, sqrt(diff / norm));
        for (int k = 0; k < BATCH; k++) {        // a fork is the sequence itself
            infer_reset(a, 1);
            must(infer_forward(a, tokens, NULL, AHEAD, NULL, NULL, &err), &err);
            for (int t = 0; t < ON; t++) must(infer_forward(a, tokens + k * T_ALL + t, NULL, 1, la, NULL, &err), &err);
            same_bits("forked INT8 cache", variants[i].name, forked + (size_t)k * V, la, V);
        }
        free(la); free(lb); free(forked);
        infer_free(a);
        infer_free(b);
        model_close(&m);
    }
}

// What five models, with the weights above, say after a prompt, greedily; found with the trained arithmetic. The paths
// differ in rounding only, and no step here is near enough a tie for that to show.
enum { GREEDY = 10 };
static const struct { const char *scheme; int32_t text[GREEDY]; } greedy_texts[] = {
    {"none", {96, 79, 110, 32, 79, 106, 104, 104, 104, 104}},
    {"int8wo", {96, 79, 110, 32, 79, 106, 104, 104, 104, 104}},
    {"int8dq", {96, 79, 110, 32, 79, 106, 104, 104, 104, 104}},
    {"int4wo-32", {96, 79, 110, 85, 85, 85, 85, 85, 85, 85}},
    {"8da4w-32", {96, 79, 110, 85, 85, 85, 85, 85, 85, 85}},
};

static void greedy_text_is_the_stored_one(void **state) {
    (void)state;
    setup();
    const CpuIsa widest = cpu_isa();
    for (int i = 0; i < 5; i++)
        for (int isa = ISA_PLAIN; isa <= (int)widest; isa++)
            for (int mode = 0; mode < 3; mode++) {
                Variant v = {greedy_texts[i].scheme, greedy_texts[i].scheme, NULL, NULL, NULL, false};
                ModelFile m;
                Err err = {0};
                const int32_t prompt[] = {101, 23, 88, 4};
                int32_t token = 61, text[GREEDY];
                const Sampler greedy = {.temperature = 0};
                open_model(&m, &v, i > 0);
                assert_true(cpu_isa_use((CpuIsa)isa));
                Infer *s = mode ? new_served(&m, 1, mode == 2 ? KV_INT8 : KV_X)
                                : new_infer(&m, 1, 64, 64, ARITH_TRAINED);
                infer_reset(s, 1);
                must(infer_forward(s, prompt, NULL, 4, NULL, NULL, &err), &err);
                for (int t = 0; t < GREEDY; t++) {
                    must(infer_next(s, &greedy, (uint64_t)t, &token, &err), &err);
                    text[t] = token;
                }
                for (int t = 0; t < GREEDY; t++)
                    if (text[t] != greedy_texts[i].text[t])
                        fail_msg("%s, %s, mode %d: token %d is %d, expected %d", v.name, cpu_isa_name((CpuIsa)isa),
                                 mode, t, text[t], greedy_texts[i].text[t]);
                infer_free(s);
                model_close(&m);
            }
    cpu_isa_use(widest);
}

static uint64_t inode_of(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 ? (uint64_t)st.st_ino : 0;
}

static void kept_forms_are_those_that_are_made(void **state) {
    (void)state;
    setup();
    static const int32_t text[] = {4, 8, 15, 16, 23, 42};
    char path[300], nowhere[300];
    snprintf(path, sizeof path, "%s/kept.served", test_tmpdir());
    snprintf(nowhere, sizeof nowhere, "%s/no-folder/kept.served", test_tmpdir());
    uint64_t before = 0;
    for (size_t i = 0; i < N_VARIANTS; i++) {
        ModelFile m;
        Err err = {0};
        if (!strcmp(variants[i].linear, "none") && !variants[i].rule) continue;
        open_model(&m, &variants[i], true);
        size_t V = (size_t)m.config.V;
        float *want = xmalloc(V * 4), *got = xmalloc(V * 4);
        Infer *s = new_served(&m, 1, KV_X);
        must(infer_forward(s, text, NULL, 6, want, NULL, &err), &err);
        infer_free(s);
        bool kept = false;
        // Whoever may only read does not write.
        infer_free(new_kept(&m, 1, KV_X, path, NULL));
        assert_false(path_exists(path));
        // Made anew for this model; taken as it is; made again where it was damaged; no place to keep it.
        for (int start = 0; start < 4; start++) {
            if (start == 2 && path_exists(path)) {
                FILE *f = fopen(path, "r+b");
                assert_int_equal(fseek(f, -70, SEEK_END), 0);
                int c = fgetc(f);
                fseek(f, -70, SEEK_END);
                fputc(c ^ 16, f);
                fclose(f);
            }
            Err unkept = {.text = "not touched"};
            s = new_kept(&m, 1, KV_X, start == 3 ? nowhere : path, &unkept);
            assert_true((unkept.text[0] != 0) == (start == 3 && kept));
            must(infer_forward(s, text, NULL, 6, got, NULL, &err), &err);
            same_bits("kept", variants[i].name, got, want, V);
            infer_free(s);
            if (start == 0) kept = path_exists(path);
            if (start < 3 && variants[i].linear[0] == 'i' && !variants[i].rule) {
                assert_true((inode_of(path) == before) == (start == 1));
                before = inode_of(path);
            }
        }
        // A model whose checksum was not compared is not what a kept file knows: none is read, none is written.
        if (remove(path) == 0) {
            m.flags |= MODEL_NO_VERIFY;
            infer_free(new_kept(&m, 1, KV_X, path, &err));
            assert_false(path_exists(path));
            before = 0;                          // a number that may come back
        }
        free(want); free(got);
        model_close(&m);
    }
}

static void float_view_ignores_the_plan(void **state) {
    (void)state;
    setup();
    int32_t tokens[BATCH * T_ALL], targets[BATCH * T_ALL];
    float a[T_ALL], b[T_ALL], c[T_ALL];
    Err err = {0};
    ModelFile plain, planned, packed;
    const InferOptions as_float = {.B = 1, .max_T = T_ALL, .max_N = T_ALL, .as_float = true};
    open_model(&plain, &variants[0], false);
    make_tokens(tokens, targets, plain.config.V);
    Infer *s = new_infer(&plain, 1, T_ALL, T_ALL, ARITH_TRAINED);
    must(infer_forward(s, tokens, targets, T_ALL, NULL, a, &err), &err);
    infer_free(s);
    model_close(&plain);
    open_model(&planned, &variants[2], false);
    must(infer_new(&s, &planned, &as_float, &err), &err);
    must(infer_forward(s, tokens, targets, T_ALL, NULL, b, &err), &err);
    infer_free(s);
    s = new_infer(&planned, 1, T_ALL, T_ALL, ARITH_TRAINED);
    must(infer_forward(s, tokens, targets, T_ALL, NULL, c, &err), &err);
    infer_free(s);
    model_close(&planned);
    same_bits("as float", variants[2].name, b, a, T_ALL);
    assert_memory_not_equal(c, a, sizeof a);
    open_model(&packed, &variants[2], true);
    assert_int_equal(infer_new(&s, &packed, &as_float, &err), E_USAGE);
    assert_non_null(strstr(err.text, "holds codes only"));
    assert_null(s);
    model_close(&packed);
}

static void hostile_input_changes_nothing(void **state) {
    (void)state;
    setup();
    ModelFile m;
    Err err = {0};
    open_model(&m, &variants[2], true);
    int V = m.config.V;
    Infer *s;
    const InferOptions bad_sizes[] = {{.B = 0, .max_T = 8, .max_N = 8}, {.B = 4, .max_T = 8, .max_N = 3},
                                      {.B = 1, .max_T = INT32_MAX, .max_N = INT32_MAX}};
    for (int i = 0; i < 3; i++) assert_int_equal(infer_new(&s, &m, &bad_sizes[i], &err), E_USAGE);
    s = new_infer(&m, 2, 8, 10, ARITH_SERVED);
    const int32_t good[10] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
    float *logits = xmalloc((size_t)(2 * V) * 4), losses[10];
    must(infer_forward(s, good, NULL, 2, logits, NULL, &err), &err);
    const int32_t ids[] = {-1, V, INT32_MAX, INT32_MIN};
    for (size_t i = 0; i < sizeof ids / sizeof *ids; i++) {
        int32_t bad[2] = {1, ids[i]};
        assert_int_equal(infer_forward(s, bad, NULL, 1, logits, NULL, &err), E_USAGE);
        assert_non_null(strstr(err.text, "token 1 is"));
        int32_t targets[2] = {3, ids[i]};
        int rc = infer_forward(s, good, targets, 1, NULL, losses, &err);
        assert_int_equal(rc, ids[i] < 0 ? 0 : E_USAGE);
        if (rc == 0) {                            // a negative target does not count
            assert_true(losses[1] == 0.0f && losses[0] > 0.0f);
            infer_reset(s, 2);
            must(infer_forward(s, good, NULL, 2, logits, NULL, &err), &err);
        }
        assert_int_equal(infer_position(s), 2);
    }
    assert_int_equal(infer_forward(s, good, NULL, 0, logits, NULL, &err), E_USAGE);
    assert_int_equal(infer_forward(s, good, NULL, -1, logits, NULL, &err), E_USAGE);
    assert_int_equal(infer_forward(s, good, NULL, 6, logits, NULL, &err), E_USAGE);    // 12 tokens, 10 a call
    assert_int_equal(infer_forward(s, good, NULL, 1, NULL, losses, &err), E_USAGE);    // losses of what?
    must(infer_forward(s, good, NULL, 5, logits, NULL, &err), &err);
    must(infer_forward(s, good, NULL, 1, logits, NULL, &err), &err);
    assert_int_equal(infer_forward(s, good, NULL, 1, logits, NULL, &err), E_USAGE);    // context of 8 is full
    assert_non_null(strstr(err.text, "context of 8"));
    infer_reset(s, 1000);                         // no more than it was made for
    must(infer_forward(s, good, NULL, 5, logits, NULL, &err), &err);
    free(logits);
    infer_free(s);
    model_close(&m);
}

static void sizes_are_counted(void **state) {
    (void)state;
    setup();
    ModelFile m;
    open_model(&m, &variants[3], true);           // 8da4w tied: the table as floats, which the embedding is made from
    LlamaConfig c = m.config;
    Infer *s = new_infer(&m, 2, 16, 32, ARITH_SERVED);
    size_t linears = (size_t)c.L * (size_t)(c.C * c.HS * (2 * c.NH + 2 * c.NKV) + 3 * c.C * c.FF), X = sizeof(floatX);
    size_t norms = (2 * (size_t)c.L + 1) * (size_t)c.C * X, table = (size_t)(c.V * c.C);
    size_t packed = linears / 2 + linears / 32 * 2;   // two codes a byte, a bf16 scale a group of 32
    assert_int_equal(infer_size_bytes(s), packed + norms + table * X);
    assert_int_equal(infer_model_bytes(s), packed + norms + 2 * table * X);
    assert_int_equal(infer_bytes_per_token(s), packed + norms + table * X + (size_t)c.C * X);
    assert_int_equal(infer_cache_bytes(s), 2 * 16 * (size_t)c.L * 2 * (size_t)(c.NKV * c.HS) * X);
    infer_free(s);
    model_close(&m);
    open_model(&m, &variants[1], false);          // float tied: one table, counted as the head
    s = new_infer(&m, 1, 16, 16, ARITH_SERVED);
    assert_int_equal(infer_size_bytes(s), linears * X + norms + table * X);
    assert_int_equal(infer_model_bytes(s), infer_size_bytes(s));
    infer_free(s);
    model_close(&m);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(cutting_changes_no_bit),
    cmocka_unit_test(neighbours_change_no_bit),
    cmocka_unit_test(trainer_file_and_server_agree),
    cmocka_unit_test(served_stays_within_its_bound),
    cmocka_unit_test(a_step_is_a_forward_and_a_draw),
    cmocka_unit_test(an_int8_cache_is_a_cache),
    cmocka_unit_test(greedy_text_is_the_stored_one),
    cmocka_unit_test(kept_forms_are_those_that_are_made),
    cmocka_unit_test(float_view_ignores_the_plan),
    cmocka_unit_test(hostile_input_changes_nothing),
    cmocka_unit_test(sizes_are_counted),
};
TEST_MAIN(tests)
