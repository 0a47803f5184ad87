// train_llama_qt: pretrains or fine-tunes a Llama whose linear weights are INT8 and nothing else: no high-precision
// copy.
//
// The whole algorithm is in this file: forward, backward, update and the step loop. Read it from top to bottom.
// `ops->NAME` are the operations (llmc/ops.h says what each computes); what surrounds the model (options, data, memory,
// logs, checkpoints) is in llmc/trainer.h.
//
// How it works. A linear's weight is codes q (int8) and one scale s a row: W = s q.
//   - --matmul weight-only: y = (x . q^T) s, the codes as bf16 integers, which are exact; backward dx = (dy s) . q.
//     --matmul int8: x (and dy, for the gradients) is quantized too, by row as it comes, and the products are INT8 x INT8
//     sums in int32. --int8 chooses which of the three.
//   - The gradient dW = dy^T . x is of the dequantized weight, in f32.
//   - The update reads a row, dequantizes it, makes AdamW's step, finds the new row's scale, and rounds it back to INT8
//     stochastically: an update far smaller than a code changes the weight by that much on average, where rounding to
//     nearest would undo it every time (--rounding nearest shows that).
// Embeddings are bf16, rounded stochastically, or fp32 (--master); norms are fp32. AdamW's moments may be kept in 8 or
// 4 bits (--optim-state). What is trained is the int8 model that is served: the file holds the very codes and scales.
//
// With several ranks the model asks for a unit's weights (shard_forward, shard_backward) and hands over its gradients
// (shard_gradients); units are the embedding, the blocks 0 .. L-1, and L, the final norm and the head. llmc/shard.h
// says who holds what meanwhile. Codes and scales are what travels.
//
// Letters: B batch, T sequence length, N = B*T tokens, C width, NH query heads, NKV key/value heads, HS head size,
// FF feed-forward width, V vocabulary, L layers. d before a name is its gradient, l_ its slice for one layer.
// floatX is bf16, or fp32 when built with PRECISION=fp32.
#include <stdlib.h>
#include <string.h>
#include "llmc/comm.h"
#include "llmc/device.h"
#include "llmc/trainer.h"

// ---------------------------------------------------------------------------------------------
// The model

// Which products are INT8 x INT8; the others multiply bf16.
typedef struct { bool output, grad_input, grad_weight; } Int8Products;

typedef struct {
    LlamaConfig c;
    const ParamTable *table;     // name, shape and format of every parameter
    Int8Products int8;
    Shard *shard;                // working weights (codes and scales, or floatX) and gradients (f32), whole
    Store *store;                // what this rank updates: codes and scales or floats, and AdamW's moments
} Llama;

static int param_index(const Llama *m, int l, ParamRole r) { return (int)(param_get(m->table, l, r) - m->table->p); }
static floatX *w(const Llama *m, int l, ParamRole r) { return shard_weight(m->shard, param_index(m, l, r)); }
static float *dw(const Llama *m, int l, ParamRole r) { return shard_gradient(m->shard, param_index(m, l, r)); }

// INT8 codes and row scales; those of a fused linear (q, k, v; gate, up) begin with its first.
static const int8_t *codes(const Llama *m, int l, ParamRole r) { return shard_codes(m->shard, param_index(m, l, r)); }
static const float *scales(const Llama *m, int l, ParamRole r) {
    return shard_weight_scale(m->shard, param_index(m, l, r));
}

// The head: INT8 weights of its own, an INT8 view of a tied table, or floats (then codes are NULL).
typedef struct { const int8_t *codes; const float *scale; const floatX *w; } Head;

static Head head_of(const Llama *m) {
    if (m->c.tied && m->shard->head) return (Head){shard_head_codes(m->shard), m->shard->head_scale, NULL};
    const Param *p = param_get(m->table, -1, m->c.tied ? ROLE_EMBED : ROLE_HEAD);
    if (p->format == PARAM_INT8) return (Head){codes(m, -1, p->role), scales(m, -1, p->role), NULL};
    return (Head){NULL, NULL, w(m, -1, p->role)};
}

// ---------------------------------------------------------------------------------------------
// Forward

// y (N, OC) = x (N, C) . W^T of the linear that begins with `r` in block l.
static void linear(const Llama *m, const Acts *s, floatX *y, const floatX *x, int l, ParamRole r, int C, int OC) {
    if (m->int8.output) ops->linear_i8_forward(y, x, codes(m, l, r), scales(m, l, r), s->N, C, OC);
    else ops->linear_w8_forward(y, x, codes(m, l, r), scales(m, l, r), s->N, C, OC);
}

// Everything of block l after its first residual add; also what --recompute runs again.
static void block_forward(const Llama *m, const Acts *s, int l, floatX *x_prev, bool add_delta) {
    const LlamaConfig *c = &m->c;
    const BlockActs *k = &s->block[l];
    int NHS = c->NH * c->HS, KVS = c->NKV * c->HS, QKV = NHS + 2 * KVS;

    // attention: x -> rmsnorm -> q,k,v -> rope -> causal softmax(q k^T) v -> o
    ops->rmsnorm_fq_forward(add_delta ? k->x : NULL, k->ln1, k->rstd1, NULL, add_delta ? x_prev : k->x,
                            add_delta ? s->delta : NULL, w(m, l, ROLE_NORM1), s->N, c->C, c->norm_eps, NULL);
    linear(m, s, k->qkv, k->ln1, l, ROLE_Q, c->C, QKV);
    ops->rope(k->qkv, s->cos_t, s->sin_t, s->N, s->T, 0, QKV, c->NH + c->NKV, c->HS, false);
    ops->attention_forward(k->att, k->lse, k->qkv, k->qkv + NHS, k->qkv + NHS + KVS, s->B, s->T, s->T, c->NH, c->NKV,
                           c->HS, NHS, QKV, QKV, (size_t)s->T * QKV);
    linear(m, s, s->delta, k->att, l, ROLE_O, NHS, c->C);

    // feed-forward: x2 = x + o -> rmsnorm -> gate, up -> silu(gate) * up -> down
    ops->rmsnorm_fq_forward(k->x2, k->ln2, k->rstd2, NULL, k->x, s->delta, w(m, l, ROLE_NORM2), s->N, c->C, c->norm_eps,
                            NULL);
    linear(m, s, k->gateup, k->ln2, l, ROLE_GATE, c->C, 2 * c->FF);
    ops->swiglu_fq_forward(k->ffn, NULL, k->gateup, s->N, c->FF, NULL);
}

// tokens -> lnf, the input of the head.
static void llama_forward(const Llama *m, const Acts *s) {
    const LlamaConfig *c = &m->c;
    shard_forward(m->shard, SHARD_EMBED);
    ops->embedding_forward(s->block[0].x, s->tokens, w(m, -1, ROLE_EMBED), s->N, c->C, c->V);
    for (int l = 0; l < c->L; l++) {
        shard_forward(m->shard, l);
        // The residual add of the block before is done by this block's first norm, in the same pass.
        block_forward(m, s, l, l ? s->block[l - 1].x2 : NULL, l > 0);
        linear(m, s, s->delta, s->block[l].ffn, l, ROLE_DOWN, c->FF, c->C);
    }
    shard_forward(m->shard, c->L);
    ops->rmsnorm_fq_forward(s->x_final, s->lnf, s->rstdf, NULL, s->block[c->L - 1].x2, s->delta,
                            w(m, -1, ROLE_FINAL_NORM), s->N, c->C, c->norm_eps, NULL);
}

// logits (n, V) = x (n, C) . head^T
static void head_forward(const Llama *m, const Acts *s, const Head *h, const floatX *x, size_t n) {
    const LlamaConfig *c = &m->c;
    if (!h->codes) ops->linear_forward_f32(s->logits, x, h->w, NULL, n, c->C, c->V);
    else if (m->int8.output) ops->linear_i8_forward_f32(s->logits, x, h->codes, h->scale, n, c->C, c->V);
    else ops->linear_w8_forward_f32(s->logits, x, h->codes, h->scale, n, c->C, c->V);
}

static void head_backward(const Llama *m, const Acts *s, const Head *h, floatX *dx, float *dhead, const floatX *x,
                          size_t n, bool accumulate) {
    const LlamaConfig *c = &m->c;
    if (h->codes && m->int8.grad_weight)
        ops->linear_i8_backward_weight(dhead, s->dlogits, x, n, c->C, c->V, accumulate);
    else ops->linear_backward_weight(dhead, s->dlogits, x, n, c->C, c->V, accumulate);
    if (!h->codes) ops->linear_backward_input(dx, s->dlogits, h->w, NULL, NULL, n, c->C, c->V);
    else if (m->int8.grad_input) ops->linear_i8_backward_input(dx, s->dlogits, h->codes, h->scale, n, c->C, c->V);
    else ops->linear_w8_backward_input(dx, s->dlogits, h->codes, h->scale, s->scaled, n, c->C, c->V);
}

// Head and loss in chunks of rows, so that the logits are never whole. With `backward`, also the head's gradient and
// dc = gradient of lnf, in micro-step `micro`. The gradients are sums over tokens; the update divides by their number.
static void llama_loss(const Llama *m, const Acts *s, bool backward, int micro) {
    const LlamaConfig *c = &m->c;
    // Whether gradients of earlier micro-steps are there to be added to.
    bool accumulate = backward && shard_backward(m->shard, c->L, micro);
    // A tied table's gradient begins here; embedding_backward adds to it at the end of the backward.
    float *dhead = dw(m, -1, c->tied ? ROLE_EMBED : ROLE_HEAD);
    Head h = head_of(m);
    for (size_t i = 0; i < s->N; i += (size_t)s->chunk) {
        size_t n = s->N - i < (size_t)s->chunk ? s->N - i : (size_t)s->chunk;
        const floatX *x = s->lnf + i * c->C;
        head_forward(m, s, &h, x, n);
        ops->classifier(s->losses + i, backward ? s->dlogits : NULL, s->logits, s->targets + i, n, c->V);
        if (backward) head_backward(m, s, &h, s->dc + i * c->C, dhead, x, n, accumulate || i > 0);
    }
    ops->loss_accumulate(s->state, s->losses, s->targets, s->N);
}

// ---------------------------------------------------------------------------------------------
// Backward

// A linear's two gradients: dx = dy . W, dW (+)= dy^T . x.
static void linear_backward(const Llama *m, const Acts *s, floatX *dx, const floatX *dy, const floatX *x, int l,
                            ParamRole r, int C, int OC, bool accumulate) {
    if (m->int8.grad_weight) ops->linear_i8_backward_weight(dw(m, l, r), dy, x, s->N, C, OC, accumulate);
    else ops->linear_backward_weight(dw(m, l, r), dy, x, s->N, C, OC, accumulate);
    if (m->int8.grad_input) ops->linear_i8_backward_input(dx, dy, codes(m, l, r), scales(m, l, r), s->N, C, OC);
    else ops->linear_w8_backward_input(dx, dy, codes(m, l, r), scales(m, l, r), s->scaled, s->N, C, OC);
}

// The mirror image of llama_forward and llama_loss, in micro-step `micro`; last: of the step.
static void llama_backward(const Llama *m, const Acts *s, int micro, bool last) {
    const LlamaConfig *c = &m->c;
    int NHS = c->NH * c->HS, QKV = NHS + 2 * c->NKV * c->HS;

    device_zero(s->dres, s->N * (size_t)c->C * sizeof(floatX));
    ops->rmsnorm_backward(s->dres, dw(m, -1, ROLE_FINAL_NORM), s->dc, NULL, s->x_final, w(m, -1, ROLE_FINAL_NORM),
                          s->rstdf, s->N, c->C);
    shard_gradients(m->shard, c->L, micro, last);
    for (int l = c->L - 1; l >= 0; l--) {
        const BlockActs *k = &s->block[l];
        // Under --shard grad and full the shard takes a block's gradients away each time, so that they begin anew.
        bool accumulate = shard_backward(m->shard, l, micro);
        if (s->recompute && l < c->L - 1) block_forward(m, s, l, NULL, false);

        linear_backward(m, s, s->dffn, s->dres, k->ffn, l, ROLE_DOWN, c->FF, c->C, accumulate);
        ops->swiglu_backward(s->dwide, s->dffn, NULL, k->gateup, s->N, c->FF);
        linear_backward(m, s, s->dc, s->dwide, k->ln2, l, ROLE_GATE, c->C, 2 * c->FF, accumulate);
        ops->rmsnorm_backward(s->dres, dw(m, l, ROLE_NORM2), s->dc, NULL, k->x2, w(m, l, ROLE_NORM2), k->rstd2, s->N,
                              c->C);

        linear_backward(m, s, s->dc, s->dres, k->att, l, ROLE_O, NHS, c->C, accumulate);
        ops->attention_backward(s->dwide, s->dc, k->qkv, k->att, k->lse, s->B, s->T, c->NH, c->NKV, c->HS);
        ops->rope(s->dwide, s->cos_t, s->sin_t, s->N, s->T, 0, QKV, c->NH + c->NKV, c->HS, true);
        linear_backward(m, s, s->dc, s->dwide, k->ln1, l, ROLE_Q, c->C, QKV, accumulate);
        ops->rmsnorm_backward(s->dres, dw(m, l, ROLE_NORM1), s->dc, NULL, k->x, w(m, l, ROLE_NORM1), k->rstd1, s->N,
                              c->C);
        shard_gradients(m->shard, l, micro, last);
    }
    shard_backward(m->shard, SHARD_EMBED, micro);
    ops->embedding_backward(dw(m, -1, ROLE_EMBED), s->dres, s->tokens, s->N, c->C, c->V);
    shard_gradients(m->shard, SHARD_EMBED, micro, last);
}

// ---------------------------------------------------------------------------------------------
// Update

typedef struct { AdamWParams adamw; double weight_decay; float clip; Rounding rounding; } UpdateParams;

// Gradient norm and clipping, then one pass over each parameter, which rounds it back to what it is stored as.
static void llama_update(const Llama *m, StepState *state, const UpdateParams *u) {
    const OwnTable *own = &m->shard->own;
    shard_finish_gradients(m->shard);
    // From here on every rank has the losses, tokens and squared gradients of all, and clips or skips alike.
    shard_sum_state(m->shard, state, true);
    ops->global_norm(state, u->clip);
    for (int i = 0; i < own->held.n; i++) {
        const Param *p = &own->held.p[i];
        const StoredTensor *k = &m->store->t[i];
        AdamWParams h = u->adamw;
        h.weight_decay = p->decay ? u->weight_decay : 0.0;
        if (p->rows)
            ops->adamw_low(k->p, k->m, k->v, store_work(m->store, i), NULL, shard_own_gradient(m->shard, i), state, &h,
                           NULL, u->rounding, i, own->row0[i], p->rows, p->cols);
    }
    shard_weights_changed(m->shard, m->store, true);
}

// One step: gradients of all its micro-batches, then the update. What changes from step to step is in s->state,
// s->tokens and s->targets, so a device may record it once and replay it.
typedef struct { const Llama *m; const Acts *s; const UpdateParams *u; int grad_accum; } Step;

static void train_step(void *ctx) {
    const Step *k = ctx;
    for (int micro = 0; micro < k->grad_accum; micro++) {
        Acts s = *k->s;
        s.tokens += (size_t)micro * s.N;
        s.targets += (size_t)micro * s.N;
        llama_forward(k->m, &s);
        llama_loss(k->m, &s, true, micro);
        llama_backward(k->m, &s, micro, micro == k->grad_accum - 1);
    }
    llama_update(k->m, k->s->state, k->u);
}

// ---------------------------------------------------------------------------------------------
// Options

static TrainOptions run;
static struct { const char *int8; int matmul, rounding, head; } qt;

static const Option options[] = {
    // name            type        where              default   allowed                       help
    TRAIN_OPTIONS_DATA(run),
    {"--matmul",       OPT_ENUM,   &qt.matmul,        "weight-only", "weight-only,int8", "products of linears: codes times bf16, or INT8 times INT8"},
    {"--int8",         OPT_STRING, &qt.int8,          NULL,     NULL, "with --matmul int8, which ones: of output,grad_input,grad_weight (default: all)"},
    {"--rounding",     OPT_ENUM,   &qt.rounding,      "stochastic", "stochastic,nearest", "of updated weights (nearest: to see why not)"},
    {"--head",         OPT_ENUM,   &qt.head,          "int8",   "int8,float", "the head: INT8 as the other linears (of a tied table: a view of it), or float"},
    {"--master",       OPT_ENUM,   &run.master,       "bf16-sr", "fp32,bf16-sr", "embeddings and a float head: fp32, or bf16 with stochastic rounding (norms are fp32)"},
    TRAIN_OPTIONS_RUN(run),
};
#define N_OPTIONS ((int)(sizeof options / sizeof *options))

// --matmul and --int8; text: what was chosen, NULL if nothing.
static int parse_products(Int8Products *p, const char **text, Err *err) {
    static const char *const names[] = {"output", "grad_input", "grad_weight"};
    static char chosen[48];
    bool *const which[] = {&p->output, &p->grad_input, &p->grad_weight};
    *p = (Int8Products){0};
    *text = NULL;
    if (qt.matmul == 0)
        return qt.int8 ? err_set(err, E_USAGE, "--int8 %s goes with --matmul int8", qt.int8) : 0;
    for (const char *at = qt.int8 ? qt.int8 : "output,grad_input,grad_weight";; at++) {
        size_t n = strcspn(at, ",");
        int k = 0;
        while (k < 3 && (strlen(names[k]) != n || strncmp(names[k], at, n))) k++;
        if (k == 3)
            return err_set(err, E_USAGE, "--int8 %s: \"%.*s\" is none of output, grad_input, grad_weight", qt.int8,
                           (int)n, at);
        *which[k] = true;
        at += n;
        if (!*at) break;
    }
    for (int k = 0; k < 3; k++)
        if (*which[k]) {
            size_t n = strlen(chosen);
            snprintf(chosen + n, sizeof chosen - n, "%s%s", n ? " " : "", names[k]);
            *text = chosen;
        }
    return 0;
}

// Linears are INT8 rows; so is the head, unless it is to be float.
static int plan_from_options(QuantPlan *plan, const LlamaConfig *c, const Int8Products *p, Err *err) {
    static const char *const float_head[] = {"lm_head.weight=none"};
    const char *scheme = p->output ? "int8qt-int8" : "int8qt";
    bool int8 = qt.head == 0;
    int rc = quant_plan_from_options(plan, NULL, scheme, NULL, NULL, NULL, c->tied && int8 ? "int8,channel,rows" : NULL,
                                     float_head, !c->tied && !int8, err);
    snprintf(plan->name, sizeof plan->name, "%s", scheme);         // whatever the head
    return rc;
}

// ---------------------------------------------------------------------------------------------
// The run

static int validate(Trainer *t, const Llama *m, int max_batches, Err *err) {
    double loss, t0 = now_seconds();
    Validation v;
    trainer_val_begin(t, &v, max_batches);
    while (trainer_val_next(t, &v)) {
        llama_forward(m, &t->acts);
        llama_loss(m, &t->acts, false, 0);
    }
    int rc = trainer_val_end(t, &v, &loss, err);
    if (rc < 0) return rc;
    printf("val  %5d | %s loss %.9f ppl %.4f | %.1f s\n", (int)t->progress.step, t->plan.name, loss, exp(loss),
           now_seconds() - t0);
    fflush(stdout);
    jsonlog_begin(&t->json, "val");
    jsonlog_int(&t->json, "step", t->progress.step);
    jsonlog_num(&t->json, "loss", loss);
    jsonlog_end(&t->json);
    return 0;
}

static int run_training(Err *err) {
    static Trainer t;                          // lives as long as the process
    Int8Products products;
    int rc;
    if ((rc = parse_products(&products, &t.products, err)) < 0) return rc;
    if ((rc = trainer_begin(&t, &run, options, N_OPTIONS, err)) < 0) return rc;
    if ((rc = plan_from_options(&t.plan, &t.c, &products, err)) < 0) return rc;
    t.rounding = (Rounding)qt.rounding;
    if ((rc = trainer_prepare(&t, run.master ? PARAM_BF16 : PARAM_F32, true, true, err)) < 0) return rc;
    ActsShape shape = {.B = run.B, .T = run.T, .grad_accum = run.grad_accum, .recompute = run.recompute,
                       .row_scales = !products.grad_input};
    if ((rc = trainer_alloc(&t, shape, err)) < 0 || (rc = trainer_start(&t, err)) < 0) return rc;

    Llama m = {.c = t.c, .table = &t.table, .int8 = products, .shard = &t.shard, .store = &t.store};
    UpdateParams u = {.adamw = {.beta1 = run.beta1, .beta2 = run.beta2, .eps = run.eps},
                      .weight_decay = run.weight_decay, .clip = (float)run.clip, .rounding = t.rounding};
    Step step = {.m = &m, .s = &t.acts, .u = &u, .grad_accum = run.grad_accum};
    shard_requantize(m.shard, m.store, true);
    while (trainer_goes_on(&t)) {
        if ((rc = trainer_begin_step(&t, err)) < 0) return rc;
        if (trainer_may_record(&t)) device_step(0, train_step, &step);
        else train_step(&step);
        if ((rc = trainer_end_step(&t, err)) < 0) return rc;
        if (trainer_validates(&t) && (rc = validate(&t, &m, run.val_batches, err)) < 0) return rc;
        if ((rc = trainer_save_if_due(&t, err)) < 0) return rc;
    }
    if ((rc = trainer_end(&t, err)) == 1) {
        rc = trainer_export(&t, err);
        if (rc == 0 && run.val_data) rc = validate(&t, &m, 0, err);
    }
    jsonlog_close(&t.json);
    return rc;
}

int main(int argc, char **argv) {
    program_name = "train_llama_qt";
    return trainer_main(argc, argv, options, N_OPTIONS,
                        "usage: [mpirun -np N] train_llama_qt (--model PATH | --init NAME) --train-data FILE [options]\n"
                        "Training of a Llama with INT8 weights and no high-precision copy.\n",
                        run_training);
}
