// train_llama_qat: fine-tunes or pretrains a Llama with quantization-aware training.
//
// The whole algorithm is in this file: forward, backward, update and the step loop. Read it from top to bottom.
// `ops->NAME` are the operations (llmc/ops.h says what each computes); what a step keeps for the backward is listed in
// llmc/activations.h; what surrounds the model (options, data, memory, logs, checkpoints) is in llmc/trainer.h.
//
// How fake quantization works here. A linear computes y = fq_a(x) . fq_w(W)^T, where fq quantizes and dequantizes:
//   - weights: the optimizer's pass that updates the fp32 masters also writes the working copy, which holds the
//     fake-quantized values. A forward pass never quantizes a weight.
//   - activations: the operation that produces a linear's input writes it fake-quantized (rmsnorm_fq, swiglu_fq; the
//     attention output, whose blocks never see a whole token, takes fakequant_forward).
//   - gradients pass straight through both (--ste clip zeroes them where a value was clipped).
// So QAT costs what plain training costs, plus arithmetic on data that is in cache anyway.
//
// With --forward integer a linear whose input is quantized multiplies the codes themselves, by the kernel that serves
// the packed model (ops->served_forward): the input comes unquantized, and its fake-quantized values are made after the
// product, for the backward, which is the same as before. With --grad-weight int8 the backward's product that gives a
// block's weight gradients is one of integers too: both sides are quantized to INT8 by column, over all tokens.
//
// With several ranks the model asks for a unit's weights (shard_forward, shard_backward) and hands over its gradients
// (shard_gradients); units are the embedding, the blocks 0 .. L-1, and L, the final norm and the head. llmc/shard.h
// says who holds what meanwhile.
//
// Letters: B batch, T sequence length, N = B*T tokens, C width, NH query heads, NKV key/value heads, HS head size,
// FF feed-forward width, V vocabulary, L layers. d before a name is its gradient, l_ its slice for one layer.
// floatX is bf16, or fp32 when built with PRECISION=fp32.
#include <stdlib.h>
#include <string.h>
#include "llmc/comm.h"
#include "llmc/device.h"
#include "llmc/served_weights.h"
#include "llmc/trainer.h"

// ---------------------------------------------------------------------------------------------
// The model: parameters

typedef struct {
    LlamaConfig c;
    const QuantPlan *plan;
    const ParamTable *table; // name, shape and scheme of every parameter
    bool fake_quant;         // whether working values are fake-quantized now (--fake-quant-after, validation without)
    Shard *shard;            // working weights (floatX: fake-quantized values, or codes whose row scale is applied after)
                             // and gradients (f32, summed over the tokens of a step), whole: always, or when asked for
    Store *store;            // what this rank updates: masters (--master) and moments (--optim-state), all rows of every
                             // parameter or its share of them
    ServedWeights *served;   // --forward integer: linears as they are served; else NULL
    bool int8_grad_weight;   // --grad-weight int8
} Llama;

static int param_index(const Llama *m, int l, ParamRole r) { return (int)(param_get(m->table, l, r) - m->table->p); }
static floatX *w(const Llama *m, int l, ParamRole r) { return shard_weight(m->shard, param_index(m, l, r)); }
static float *dw(const Llama *m, int l, ParamRole r) { return shard_gradient(m->shard, param_index(m, l, r)); }

// Row scales of a linear whose working values are codes; NULL where they are plain values. `last` ends a fused linear.
static const float *wscale(const Llama *m, int l, ParamRole first, ParamRole last) {
    if (!m->fake_quant) return NULL;
    for (int r = first; r <= (int)last; r++)
        if (quant_works_as_codes(&param_get(m->table, l, (ParamRole)r)->scheme.weight))
            return shard_weight_scale(m->shard, param_index(m, l, first));
    return NULL;
}

// A tied table has a second view for the head where the embedding or the head is quantized.
static const floatX *head(const Llama *m) {
    return m->shard->head ? m->shard->head : w(m, -1, m->c.tied ? ROLE_EMBED : ROLE_HEAD);
}
static const float *head_scale(const Llama *m) {
    return m->c.tied ? m->shard->head_scale : wscale(m, -1, ROLE_HEAD, ROLE_HEAD);
}

// How the input of a linear is fake-quantized; NULL: not at all.
static const QuantSpec *act(const Llama *m, int l, ParamRole r) {
    const Param *p = param_get(m->table, l, r);
    return m->fake_quant && p && p->scheme.act.bits ? &p->scheme.act : NULL;
}

// The linear that begins with this tensor as it is served; NULL: it multiplies working values.
static const ServedLinear *served(const Llama *m, int l, ParamRole first) {
    const Param *p = m->fake_quant ? param_get(m->table, l, first) : NULL;
    return p ? served_weights_get(m->served, (int)(p - m->table->p)) : NULL;
}

// What the producer of a linear's input does to it: nothing where the product itself quantizes.
static const QuantSpec *producer_act(const Llama *m, int l, ParamRole r) {
    return served(m, l, r) ? NULL : act(m, l, r);
}

// Rebuilds all working values from the masters, with fake quantization on or off.
static void llama_requantize(Llama *m, bool fake_quant) {
    m->fake_quant = fake_quant;
    shard_requantize(m->shard, m->store, fake_quant);
    if (m->served && fake_quant) served_weights_update(m->served, m->store);
}

// ---------------------------------------------------------------------------------------------
// Forward

// y (N, OC) = x (N, C) . W^T. x is the linear's input: fake-quantized, or, where the product is one of integers, still
// to be quantized; then xq receives fq(x) (and mask what was not clipped) for the backward. xq may be x.
static void linear(const Llama *m, const Acts *s, floatX *y, const floatX *x, floatX *xq, uint8_t *mask, int l,
                   ParamRole first, ParamRole last, int C, int OC) {
    const ServedLinear *k = served(m, l, first);
    if (!k) {
        ops->linear_forward(y, x, w(m, l, first), wscale(m, l, first, last), s->N, C, OC);
        return;
    }
    ops->served_forward(y, x, k->served, k->wq, k->act, s->N, C, OC);
    ops->fakequant_forward(xq, mask, x, s->N, C, k->act);
}

// Everything of block l after its first residual add; also what --recompute runs again.
static void block_forward(const Llama *m, const Acts *s, int l, floatX *x_prev, bool add_delta) {
    const LlamaConfig *c = &m->c;
    const BlockActs *k = &s->block[l];
    int NHS = c->NH * c->HS, KVS = c->NKV * c->HS, QKV = NHS + 2 * KVS;

    // attention: x -> rmsnorm -> q,k,v -> rope -> causal softmax(q k^T) v -> o
    ops->rmsnorm_fq_forward(add_delta ? k->x : NULL, k->ln1, k->rstd1, k->mask1, add_delta ? x_prev : k->x,
                            add_delta ? s->delta : NULL, w(m, l, ROLE_NORM1), s->N, c->C, c->norm_eps,
                            producer_act(m, l, ROLE_Q));
    linear(m, s, k->qkv, k->ln1, k->ln1, k->mask1, l, ROLE_Q, ROLE_V, c->C, QKV);
    ops->rope(k->qkv, s->cos_t, s->sin_t, s->N, s->T, 0, QKV, c->NH + c->NKV, c->HS, false);
    ops->attention_forward(k->att, k->lse, k->qkv, k->qkv + NHS, k->qkv + NHS + KVS, s->B, s->T, s->T, c->NH, c->NKV,
                           c->HS, NHS, QKV, QKV, (size_t)s->T * QKV);
    const QuantSpec *o_act = producer_act(m, l, ROLE_O);
    if (o_act) ops->fakequant_forward(k->attq, k->mask_att, k->att, s->N, NHS, o_act);
    linear(m, s, s->delta, o_act ? k->attq : k->att, k->attq, k->mask_att, l, ROLE_O, ROLE_O, NHS, c->C);

    // feed-forward: x2 = x + o -> rmsnorm -> gate, up -> silu(gate) * up -> down
    ops->rmsnorm_fq_forward(k->x2, k->ln2, k->rstd2, k->mask2, k->x, s->delta, w(m, l, ROLE_NORM2), s->N, c->C,
                            c->norm_eps, producer_act(m, l, ROLE_GATE));
    linear(m, s, k->gateup, k->ln2, k->ln2, k->mask2, l, ROLE_GATE, ROLE_UP, c->C, 2 * c->FF);
    ops->swiglu_fq_forward(k->ffn, k->mask_ffn, k->gateup, s->N, c->FF, producer_act(m, l, ROLE_DOWN));
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
        const BlockActs *k = &s->block[l];
        linear(m, s, s->delta, k->ffn, k->ffn, k->mask_ffn, l, ROLE_DOWN, ROLE_DOWN, c->FF, c->C);
    }
    shard_forward(m->shard, c->L);
    ops->rmsnorm_fq_forward(s->x_final, s->lnf, s->rstdf, s->maskf, s->block[c->L - 1].x2, s->delta,
                            w(m, -1, ROLE_FINAL_NORM), s->N, c->C, c->norm_eps, producer_act(m, -1, ROLE_HEAD));
}

// Head and loss in chunks of rows, so that the logits are never whole. With `backward`, also the head's gradient and
// dc = gradient of lnf, in micro-step `micro`. The gradients are sums over tokens; the update divides by their number.
static void llama_loss(const Llama *m, const Acts *s, bool backward, int micro) {
    const LlamaConfig *c = &m->c;
    // Whether gradients of earlier micro-steps are there to be added to.
    bool accumulate = backward && shard_backward(m->shard, c->L, micro);
    // A tied table's gradient begins here; embedding_backward adds to it at the end of the backward.
    float *dhead = dw(m, -1, c->tied ? ROLE_EMBED : ROLE_HEAD);
    const float *scale = head_scale(m);
    const ServedLinear *k = c->tied ? NULL : served(m, -1, ROLE_HEAD);
    for (size_t i = 0; i < s->N; i += (size_t)s->chunk) {
        size_t n = s->N - i < (size_t)s->chunk ? s->N - i : (size_t)s->chunk;
        floatX *x = s->lnf + i * c->C;
        if (k) ops->served_forward_f32(s->logits, x, k->served, k->wq, k->act, n, c->C, c->V);
        else ops->linear_forward_f32(s->logits, x, head(m), scale, n, c->C, c->V);
        ops->classifier(s->losses + i, backward ? s->dlogits : NULL, s->logits, s->targets + i, n, c->V);
        if (!backward) continue;
        if (k) ops->fakequant_forward(x, s->maskf ? s->maskf + i * c->C : NULL, x, n, c->C, k->act);
        ops->linear_backward_weight(dhead, s->dlogits, x, n, c->C, c->V, accumulate || i > 0);
        ops->linear_backward_input(s->dc + i * c->C, s->dlogits, head(m), scale, scale ? s->scaled : NULL, n, c->C,
                                   c->V);
    }
    ops->loss_accumulate(s->state, s->losses, s->targets, s->N);
}

// ---------------------------------------------------------------------------------------------
// Backward

// A linear's two gradients: dx = dy . W (NULL: not wanted), dW (+)= dy^T . x.
static void linear_backward(const Llama *m, const Acts *s, floatX *dx, const floatX *dy, const floatX *x, int l,
                            ParamRole first, ParamRole last, int C, int OC, bool accumulate) {
    const float *scale = wscale(m, l, first, last);
    if (m->int8_grad_weight) ops->linear_i8_backward_weight(dw(m, l, first), dy, x, s->N, C, OC, accumulate);
    else ops->linear_backward_weight(dw(m, l, first), dy, x, s->N, C, OC, accumulate);
    ops->linear_backward_input(dx, dy, w(m, l, first), scale, scale ? s->scaled : NULL, s->N, C, OC);
}

// The mirror image of llama_forward and llama_loss, in micro-step `micro`; last: of the step.
static void llama_backward(const Llama *m, const Acts *s, int micro, bool last) {
    const LlamaConfig *c = &m->c;
    int NHS = c->NH * c->HS, QKV = NHS + 2 * c->NKV * c->HS;

    device_zero(s->dres, s->N * (size_t)c->C * sizeof(floatX));
    ops->rmsnorm_backward(s->dres, dw(m, -1, ROLE_FINAL_NORM), s->dc, act(m, -1, ROLE_HEAD) ? s->maskf : NULL,
                          s->x_final, w(m, -1, ROLE_FINAL_NORM), s->rstdf, s->N, c->C);
    shard_gradients(m->shard, c->L, micro, last);
    for (int l = c->L - 1; l >= 0; l--) {
        const BlockActs *k = &s->block[l];
        // Under --shard grad and full the shard takes a block's gradients away each time, so that they begin anew.
        bool accumulate = shard_backward(m->shard, l, micro);
        if (s->recompute && l < c->L - 1) block_forward(m, s, l, NULL, false);

        linear_backward(m, s, s->dffn, s->dres, k->ffn, l, ROLE_DOWN, ROLE_DOWN, c->FF, c->C, accumulate);
        ops->swiglu_backward(s->dwide, s->dffn, act(m, l, ROLE_DOWN) ? k->mask_ffn : NULL, k->gateup, s->N, c->FF);
        linear_backward(m, s, s->dc, s->dwide, k->ln2, l, ROLE_GATE, ROLE_UP, c->C, 2 * c->FF, accumulate);
        ops->rmsnorm_backward(s->dres, dw(m, l, ROLE_NORM2), s->dc, act(m, l, ROLE_GATE) ? k->mask2 : NULL, k->x2,
                              w(m, l, ROLE_NORM2), k->rstd2, s->N, c->C);

        bool quantized_o = act(m, l, ROLE_O) != NULL;
        linear_backward(m, s, s->dc, s->dres, quantized_o ? k->attq : k->att, l, ROLE_O, ROLE_O, NHS, c->C, accumulate);
        if (quantized_o && k->mask_att) ops->mask_backward(s->dc, k->mask_att, s->N, NHS);
        ops->attention_backward(s->dwide, s->dc, k->qkv, k->att, k->lse, s->B, s->T, c->NH, c->NKV, c->HS);
        ops->rope(s->dwide, s->cos_t, s->sin_t, s->N, s->T, 0, QKV, c->NH + c->NKV, c->HS, true);
        linear_backward(m, s, s->dc, s->dwide, k->ln1, l, ROLE_Q, ROLE_V, c->C, QKV, accumulate);
        ops->rmsnorm_backward(s->dres, dw(m, l, ROLE_NORM1), s->dc, act(m, l, ROLE_Q) ? k->mask1 : NULL, k->x,
                              w(m, l, ROLE_NORM1), k->rstd1, s->N, c->C);
        shard_gradients(m->shard, l, micro, last);
    }
    shard_backward(m->shard, SHARD_EMBED, micro);
    ops->embedding_backward(dw(m, -1, ROLE_EMBED), s->dres, s->tokens, s->N, c->C, c->V);
    shard_gradients(m->shard, SHARD_EMBED, micro, last);
}

// ---------------------------------------------------------------------------------------------
// Update

typedef enum { OPTIM_ADAMW, OPTIM_SGD } Optim;
typedef struct {
    Optim kind;
    AdamWParams adamw;
    double weight_decay;
    float momentum, clip;
    bool ste_clip;
} UpdateParams;

// AdamW on own rows of tensor i, and their working values in the same pass (work NULL: not here).
static void update_adamw(const Llama *m, int i, floatX *work, float *scale, const float *grad, const StepState *state,
                         const UpdateParams *u, const QuantSpec *wq) {
    const OwnTable *own = &m->shard->own;
    const Param *p = &own->held.p[i];
    const StoredTensor *k = &m->store->t[i];
    AdamWParams h = u->adamw;
    h.weight_decay = p->decay ? u->weight_decay : 0.0;
    if (p->format == PARAM_F32 && p->state == STATE_F32)
        ops->adamw_fq(k->p.data, k->m.data, k->v.data, work, scale, grad, state, &h, wq, p->rows, p->cols);
    else
        ops->adamw_low(k->p, k->m, k->v, work, scale, grad, state, &h, wq, ROUND_STOCHASTIC, i, own->row0[i],
                       p->rows, p->cols);
}

// Gradient norm and clipping, then one pass over each parameter that updates the master and writes its working values
// (or, where other ranks wait for them, leaves that to shard_weights_changed).
static void llama_update(const Llama *m, StepState *state, const UpdateParams *u) {
    const ParamTable *own = &m->shard->own.held;
    shard_finish_gradients(m->shard);
    if (u->ste_clip && m->fake_quant)
        for (int i = 0; i < own->n; i++) {
            const Param *p = &own->p[i];
            if (p->rows && p->scheme.weight.bits)
                ops->weight_ste_mask(shard_own_gradient(m->shard, i), m->store->t[i].p.data, &p->scheme.weight, p->rows,
                                     p->cols);
        }
    // From here on every rank has the losses, tokens and squared gradients of all, and clips or skips alike.
    shard_sum_state(m->shard, state, true);
    ops->global_norm(state, u->clip);
    for (int i = 0; i < own->n; i++) {
        const Param *p = &own->p[i];
        floatX *work = store_work(m->store, i);
        float *scale = work ? shard_weight_scale(m->shard, i) : NULL, *grad = shard_own_gradient(m->shard, i);
        const QuantSpec *wq = m->fake_quant ? &p->scheme.weight : NULL;
        if (!p->rows) continue;
        if (u->kind == OPTIM_ADAMW) update_adamw(m, i, work, scale, grad, state, u, wq);
        else
            ops->sgd_fq(m->store->t[i].p.data, m->store->t[i].m.data, work, scale, grad, state, u->momentum,
                        p->decay ? (float)u->weight_decay : 0.0f, wq, p->rows, p->cols);
    }
    shard_weights_changed(m->shard, m->store, m->fake_quant);
    if (m->served && m->fake_quant) served_weights_update(m->served, m->store);
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
static struct {
    const char *scheme, *weight, *activation, *embedding, *head;
    StringList rules;
    int ste, fake_quant_after, optimizer, gather, forward, grad_weight;
    double momentum;
} qat;

static const Option options[] = {
    // name            type        where              default   allowed                       help
    TRAIN_OPTIONS_DATA(run),
    {"--scheme",       OPT_STRING, &qat.scheme,       NULL,     NULL, "none, int8wo, int8dq, int4wo-G, 8da4w-G, intB-G (default: the model's, else 8da4w-32)"},
    {"--weight",       OPT_STRING, &qat.weight,       NULL,     NULL, "general form for linears, e.g. int4,group=32,symmetric"},
    {"--activation",   OPT_STRING, &qat.activation,   NULL,     NULL, "and their inputs, e.g. int8,token,asymmetric"},
    {"--embedding",    OPT_STRING, &qat.embedding,    NULL,     NULL, "quantize the embedding table, e.g. int4,group=32"},
    {"--head",         OPT_STRING, &qat.head,         NULL,     NULL, "quantize a tied head (an untied one follows --scheme)"},
    {"--rule",         OPT_LIST,   &qat.rules,        NULL,     NULL, "PATTERN=SCHEME for linears whose name matches; may be repeated, the last match wins"},
    {"--ste",          OPT_ENUM,   &qat.ste,          "pass",   "pass,clip", "gradient of clipped values: passed through, or zero"},
    {"--forward",      OPT_ENUM,   &qat.forward,      "float",  "float,integer", "linears with quantized inputs multiply fake-quantized values, or codes by the kernel that serves them"},
    {"--grad-weight",  OPT_ENUM,   &qat.grad_weight,  "float",  "float,int8", "weight gradients of the blocks' linears: products of floats, or of INT8 codes of both sides"},
    {"--fake-quant-after", OPT_INT, &qat.fake_quant_after, "0", "0..", "train in float for this many steps first"},
    {"--gather",       OPT_ENUM,   &qat.gather,       "quant",  "quant,full", "between ranks fake-quantized weights travel as codes and scales (same bits, fewer bytes), or whole"},
    {"--optimizer",    OPT_ENUM,   &qat.optimizer,    "adamw",  "adamw,sgd", "update rule"},
    {"--momentum",     OPT_FLOAT,  &qat.momentum,     "0.9",    "0..0.9999", "SGD"},
    {"--master",       OPT_ENUM,   &run.master,       "fp32",   "fp32,bf16-sr", "what masters are kept in: fp32, or bf16 with stochastic rounding (norms fp32)"},
    TRAIN_OPTIONS_RUN(run),
};
#define N_OPTIONS ((int)(sizeof options / sizeof *options))

// What cannot go together is refused before memory is taken.
static int check_options(Err *err) {
    if (qat.optimizer == OPTIM_SGD && (run.master || run.optim_state))
        return err_set(err, E_USAGE, "--optimizer sgd keeps fp32 masters and momentum; use adamw, or leave out --master and "
                                     "--optim-state");
    if (qat.ste == 1 && run.master)
        return err_set(err, E_USAGE, "--ste clip reads fp32 masters; use --ste pass, or --master fp32");
    if (qat.forward && run.master)
        return err_set(err, E_USAGE, "--forward integer makes codes from fp32 masters; use --master fp32, or --forward float");
    return 0;
}

// The scheme: as the options say, else the model's own, else 8da4w-32.
static int plan_from_options(QuantPlan *plan, const QuantPlan *models_own, Err *err) {
    const QuantPlan *base = models_own && !quant_plan_is_none(models_own) ? models_own : NULL;
    const char *scheme = qat.scheme || qat.weight || base ? qat.scheme : "8da4w-32";
    int rc = quant_plan_from_options(plan, base, scheme, qat.weight, qat.activation, qat.embedding, qat.head,
                                     qat.rules.item, qat.rules.n, err);
    if (rc == 0 && quant_plan_has_rows(plan))
        rc = err_set(err, E_USAGE, "INT8 rows (%s) are trained as codes, with no masters to fake-quantize: use "
                     "./train_llama_qt, or int8wo here", plan->name);
    return rc;
}

// ---------------------------------------------------------------------------------------------
// The run

// Mean loss over the windows of the validation data.
static int validate(Trainer *t, const Llama *m, int max_batches, double *loss, Err *err) {
    Validation v;
    trainer_val_begin(t, &v, max_batches);
    while (trainer_val_next(t, &v)) {
        llama_forward(m, &t->acts);
        llama_loss(m, &t->acts, false, 0);
    }
    return trainer_val_end(t, &v, loss, err);
}

// Validation with fake quantization and without; the working values are as before afterwards.
static int validate_both(Trainer *t, Llama *m, int max_batches, Err *err) {
    double loss_fq = NAN, loss_float = NAN, t0 = now_seconds();
    bool was = m->fake_quant, quantized = !quant_plan_is_none(m->plan);
    int rc = 0;
    if (quantized) {
        if (!was) llama_requantize(m, true);
        rc = validate(t, m, max_batches, &loss_fq, err);
        llama_requantize(m, false);
    }
    if (rc == 0) rc = validate(t, m, max_batches, &loss_float, err);
    if (m->fake_quant != was) llama_requantize(m, was);
    if (rc < 0) return rc;
    printf("val  %5d | ", (int)t->progress.step);
    if (quantized) printf("%s loss %.9f ppl %.4f | ", m->plan->name, loss_fq, exp(loss_fq));
    printf("float loss %.9f ppl %.4f | %.1f s\n", loss_float, exp(loss_float), now_seconds() - t0);
    fflush(stdout);
    jsonlog_begin(&t->json, "val");
    jsonlog_int(&t->json, "step", t->progress.step);
    if (quantized) jsonlog_num(&t->json, "loss_fq", loss_fq);
    jsonlog_num(&t->json, "loss", loss_float);
    jsonlog_end(&t->json);
    return 0;
}

// What the steps need of activations. attq is there where some linear's input may be fake-quantized.
static ActsShape acts_shape(const ParamTable *table, const QuantPlan *plan) {
    ActsShape s = {.B = run.B, .T = run.T, .grad_accum = run.grad_accum, .recompute = run.recompute,
                   .quantized = plan->linear.act.bits != 0 || plan->n_rules > 0, .masks = qat.ste == 1,
                   .row_scales = quant_works_as_codes(&plan->tied_head)};
    for (int i = 0; i < table->n; i++)
        s.row_scales = s.row_scales || quant_works_as_codes(&table->p[i].scheme.weight);
    return s;
}

// Weights in served form are made from masters that this rank has all of.
static int plan_integer_forward(Trainer *t, ServedWeights *s, Err *err) {
    if (t->shard.level != SHARD_NONE)
        return err_set(err, E_USAGE, "--forward integer needs all masters on every rank: use --shard none, or --forward float");
    int rc = served_weights_plan(s, &t->table, &t->c, err);
    if (rc == 0) t->served_bytes = (double)s->bytes;
    return rc;
}

static int run_training(Err *err) {
    static Trainer t;                          // these live as long as the process
    static ServedWeights served_weights;
    int rc;
    if ((rc = check_options(err)) < 0 || (rc = trainer_begin(&t, &run, options, N_OPTIONS, err)) < 0) return rc;
    if ((rc = plan_from_options(&t.plan, run.model ? &t.file.plan : NULL, err)) < 0) return rc;
    static const char *const products[2][2] = {{NULL, "grad_weight"}, {"output", "output grad_weight"}};
    t.products = products[qat.forward][qat.grad_weight];
    rc = trainer_prepare(&t, run.master ? PARAM_BF16 : PARAM_F32, qat.gather == 0, qat.optimizer == OPTIM_ADAMW, err);
    if (rc == 0 && qat.forward) rc = plan_integer_forward(&t, &served_weights, err);
    if (rc < 0 || (rc = trainer_alloc(&t, acts_shape(&t.table, &t.plan), err)) < 0) return rc;
    if (qat.forward && (rc = served_weights_alloc(&served_weights, err)) < 0) return rc;
    if ((rc = trainer_start(&t, err)) < 0) return rc;

    Llama m = {.c = t.c, .plan = &t.plan, .table = &t.table, .shard = &t.shard, .store = &t.store,
               .served = qat.forward ? &served_weights : NULL, .int8_grad_weight = qat.grad_weight == 1};
    UpdateParams u = {.kind = (Optim)qat.optimizer, .momentum = (float)qat.momentum, .weight_decay = run.weight_decay,
                      .adamw = {.beta1 = run.beta1, .beta2 = run.beta2, .eps = run.eps},
                      .clip = (float)run.clip, .ste_clip = qat.ste == 1};
    Step step = {.m = &m, .s = &t.acts, .u = &u, .grad_accum = run.grad_accum};
    bool quantized = !quant_plan_is_none(&t.plan);
    llama_requantize(&m, quantized && t.progress.step >= qat.fake_quant_after);
    while (trainer_goes_on(&t)) {
        if (quantized && !m.fake_quant && t.progress.step >= qat.fake_quant_after) llama_requantize(&m, true);
        if ((rc = trainer_begin_step(&t, err)) < 0) return rc;
        if (trainer_may_record(&t)) device_step(m.fake_quant, train_step, &step);
        else train_step(&step);
        if ((rc = trainer_end_step(&t, err)) < 0) return rc;
        if (trainer_validates(&t) && (rc = validate_both(&t, &m, run.val_batches, err)) < 0) return rc;
        if ((rc = trainer_save_if_due(&t, err)) < 0) return rc;
    }
    if ((rc = trainer_end(&t, err)) == 1) {
        rc = trainer_export(&t, err);
        if (rc == 0 && run.val_data) rc = validate_both(&t, &m, 0, err);
    }
    jsonlog_close(&t.json);
    return rc;
}

int main(int argc, char **argv) {
    program_name = "train_llama_qat";
    return trainer_main(argc, argv, options, N_OPTIONS,
                        "usage: [mpirun -np N] train_llama_qat (--model PATH | --init NAME) --train-data FILE [options]\n"
                        "Quantization-aware training of a Llama.\n",
                        run_training);
}
