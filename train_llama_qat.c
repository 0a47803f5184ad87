// train_llama_qat: fine-tunes or pretrains a Llama with quantization-aware training.
//
// The whole algorithm is in this file: forward, backward, update and the step loop. Read it from top to bottom.
// `ops->NAME` are the operations (llmc/ops.h says what each computes); what surrounds the model (signals, memory plan,
// logs, checkpoints) is in llmc/trainer.h.
//
// How fake quantization works here. A linear computes y = fq_a(x) . fq_w(W)^T, where fq quantizes and dequantizes:
//   - weights: the optimizer's pass that updates the fp32 masters also writes the working copy, which holds the
//     fake-quantized values. A forward pass never quantizes a weight.
//   - activations: the operation that produces a linear's input writes it fake-quantized (rmsnorm_fq, swiglu_fq; the
//     attention output, whose blocks never see a whole token, takes fakequant_forward).
//   - gradients pass straight through both (--ste clip zeroes them where a value was clipped).
// So QAT costs what plain training costs, plus arithmetic on data that is in cache anyway.
//
// With several ranks the model asks for a unit's weights (shard_forward, shard_backward) and hands over its gradients
// (shard_gradients); units are the embedding, the blocks 0 .. L-1, and L, the final norm and the head. llmc/shard.h says
// who holds what meanwhile.
//
// Letters: B batch, T sequence length, N = B*T tokens, C width, NH query heads, NKV key/value heads, HS head size,
// FF feed-forward width, V vocabulary, L layers. d before a name is its gradient, l_ its slice for one layer.
// floatX is bf16, or fp32 when built with PRECISION=fp32.
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "llmc/checkpoint.h"
#include "llmc/checksum.h"
#include "llmc/cli.h"
#include "llmc/comm.h"
#include "llmc/dataloader.h"
#include "llmc/device.h"
#include "llmc/llama.h"
#include "llmc/logger.h"
#include "llmc/ops.h"
#include "llmc/profile.h"
#include "llmc/schedule.h"
#include "llmc/shard.h"
#include "llmc/store.h"
#include "llmc/tokenizer.h"
#include "llmc/train_state.h"
#include "llmc/trainer.h"

// ---------------------------------------------------------------------------------------------
// The model: parameters

typedef enum { OPTIM_ADAMW, OPTIM_SGD } Optim;

typedef struct {
    LlamaConfig c;
    QuantPlan plan;
    ParamTable table;        // name, shape and scheme of every parameter
    bool fake_quant;         // whether working values are fake-quantized now (--fake-quant-after, validation without)

    // The working weights (floatX: fake-quantized values, or codes whose row scale is applied after) and the gradients
    // (f32, summed over the tokens of a step) of whole tensors are with the shard: always, or when asked for.
    Shard *shard;
    // What this rank updates: masters and AdamW's moments (SGD: m is the momentum buffer, v is not there), of all rows of
    // every parameter or of its share of them.
    Store store;

    float *cos_t, *sin_t;    // (T, HS/2)
} Llama;

static int param_index(const Llama *m, int l, ParamRole r) { return (int)(param_get(&m->table, l, r) - m->table.p); }
static floatX *w(const Llama *m, int l, ParamRole r) { return shard_weight(m->shard, param_index(m, l, r)); }
static float *dw(const Llama *m, int l, ParamRole r) { return shard_gradient(m->shard, param_index(m, l, r)); }

// Row scales of a linear whose working values are codes; NULL where they are plain values. `last` ends a fused linear.
static const float *wscale(const Llama *m, int l, ParamRole first, ParamRole last) {
    if (!m->fake_quant) return NULL;
    for (int r = first; r <= (int)last; r++)
        if (quant_works_as_codes(&param_get(&m->table, l, (ParamRole)r)->scheme.weight))
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
    const Param *p = param_get(&m->table, l, r);
    return m->fake_quant && p && p->scheme.act.bits ? &p->scheme.act : NULL;
}

// Rebuilds all working values from the masters, with fake quantization on or off.
static void llama_requantize(Llama *m, bool fake_quant) {
    m->fake_quant = fake_quant;
    shard_requantize(m->shard, &m->store, fake_quant);
}

// ---------------------------------------------------------------------------------------------
// The model: activations

// What the backward of one block reads.
typedef struct {
    floatX *x;               // (N, C)              residual stream entering the block
    floatX *ln1;             // (N, C)              fq(rmsnorm(x)): input of q, k, v
    float *rstd1;            // (N)
    floatX *qkv;             // (N, (NH+2*NKV)*HS)  after rope: q heads, k heads, v heads
    floatX *att;             // (N, NH*HS)          attention output, before quantization
    floatX *attq;            // (N, NH*HS)          fq(att): input of o; the same memory as att without quantization
    float *lse;              // (B, NH, T)          log-sum-exp of the attention scores
    floatX *x2;              // (N, C)              residual stream after attention
    floatX *ln2;             // (N, C)              fq(rmsnorm(x2)): input of gate, up
    float *rstd2;            // (N)
    floatX *gateup;          // (N, 2*FF)
    floatX *ffn;             // (N, FF)             fq(silu(gate)*up): input of down
    uint8_t *mask1, *mask_att, *mask2, *mask_ffn;   // --ste clip: 1 where the code was not clipped; else NULL
} BlockActs;

typedef struct {
    int B, T, chunk;         // chunk: rows of logits at a time
    size_t N;
    bool recompute;          // --recompute block: only x is kept for each block, the rest is computed again
    BlockActs *block;        // (L)
    floatX *x_final;         // (N, C)   residual stream after the last block
    floatX *lnf;             // (N, C)   fq(rmsnorm(x_final)): input of the head
    float *rstdf;            // (N)
    uint8_t *maskf;
    floatX *delta;           // (N, C)   output of o or down, added to the residual by the next norm
    float *logits;           // (chunk, V) f32
    floatX *dlogits;         // (chunk, V)
    float *losses;           // (N)
    int32_t *tokens, *targets;   // (N) of the running micro-batch
    // backward
    floatX *dres;            // (N, C)   gradient of the residual stream
    floatX *dc;              // (N, max(C, NH*HS))   gradient of a norm's or attention's output
    floatX *dwide;           // (N, max(2*FF, (NH+2*NKV)*HS))
    floatX *dffn;            // (N, FF)
    floatX *scaled;          // (max(N * widest linear, chunk * V)) a gradient times row scales; NULL if not needed
    StepState *state;
} Acts;

// One place says what is allocated: called once to add up the plan, once to allocate.
typedef struct { bool plan; double bytes; Err *err; int rc; } Arena;

static void *take(Arena *a, size_t n, size_t size, const char *what) {
    void *p = NULL;
    size_t bytes;
    if (!mul_size(n, size, &bytes)) bytes = SIZE_MAX;
    a->bytes += (double)bytes;
    if (!a->plan && a->rc == 0) a->rc = device_alloc(&p, bytes, what, a->err);
    return p;
}

static void take_block(Arena *a, BlockActs *k, const Llama *m, size_t N, bool clip) {
    const LlamaConfig *c = &m->c;
    size_t NHS = (size_t)c->NH * c->HS, X = sizeof(floatX);
    bool any_act = m->plan.linear.act.bits != 0 || m->plan.n_rules > 0;
    k->x = take(a, N * c->C, X, "activations");
    k->ln1 = take(a, N * c->C, X, "activations");
    k->rstd1 = take(a, N, 4, "activations");
    k->qkv = take(a, N * (NHS + 2 * (size_t)c->NKV * c->HS), X, "activations");
    k->att = take(a, N * NHS, X, "activations");
    k->attq = any_act ? take(a, N * NHS, X, "activations") : k->att;
    k->lse = take(a, N * c->NH, 4, "activations");
    k->x2 = take(a, N * c->C, X, "activations");
    k->ln2 = take(a, N * c->C, X, "activations");
    k->rstd2 = take(a, N, 4, "activations");
    k->gateup = take(a, N * 2 * c->FF, X, "activations");
    k->ffn = take(a, N * c->FF, X, "activations");
    if (clip && any_act) {
        k->mask1 = take(a, N * c->C, 1, "masks");
        k->mask_att = take(a, N * NHS, 1, "masks");
        k->mask2 = take(a, N * c->C, 1, "masks");
        k->mask_ffn = take(a, N * c->FF, 1, "masks");
    }
}

static size_t max_size(size_t a, size_t b) { return a > b ? a : b; }

static bool any_row_scale(const Llama *m) {
    for (int i = 0; i < m->table.n; i++)
        if (quant_works_as_codes(&m->table.p[i].scheme.weight)) return true;
    return quant_works_as_codes(&m->plan.tied_head);
}

// Activations for batches of (B, T); recompute keeps one full block for all layers. Tokens of all micro-batches of a
// step lie one after the other, so that they are there before it begins.
static void take_acts(Arena *a, Acts *s, const Llama *m, int B, int T, int grad_accum, bool recompute, bool clip) {
    const LlamaConfig *c = &m->c;
    size_t N = (size_t)B * T, X = sizeof(floatX), NHS = (size_t)c->NH * c->HS, QKV = NHS + 2 * (size_t)c->NKV * c->HS;
    s->B = B; s->T = T; s->N = N; s->recompute = recompute;
    // Each chunk adds to the head's whole gradient, so chunks grow with the batch; logits are an eighth of it at most.
    size_t chunk = N / 8 > 512 ? N / 8 : 512;
    s->chunk = (int)(N < chunk ? N : chunk);
    if (!s->block) s->block = xcalloc((size_t)c->L, sizeof *s->block);
    for (int l = 0; l < c->L; l++) {
        if (l > 0 && recompute) {
            s->block[l] = s->block[0];
            s->block[l].x = take(a, N * c->C, X, "activations");
        } else {
            take_block(a, &s->block[l], m, N, clip);
        }
    }
    s->x_final = take(a, N * c->C, X, "activations");
    s->lnf = take(a, N * c->C, X, "activations");
    s->rstdf = take(a, N, 4, "activations");
    if (clip && !c->tied) s->maskf = take(a, N * c->C, 1, "masks");
    s->delta = take(a, N * c->C, X, "activations");
    s->logits = take(a, (size_t)s->chunk * c->V, 4, "logits");
    s->dlogits = take(a, (size_t)s->chunk * c->V, X, "logits");
    s->losses = take(a, N, 4, "losses");
    s->tokens = take(a, N * (size_t)grad_accum, 4, "tokens");
    s->targets = take(a, N * (size_t)grad_accum, 4, "tokens");
    s->dres = take(a, N * c->C, X, "gradients of activations");
    s->dc = take(a, N * max_size(c->C, NHS), X, "gradients of activations");
    s->dwide = take(a, N * max_size(2 * (size_t)c->FF, QKV), X, "gradients of activations");
    s->dffn = take(a, N * c->FF, X, "gradients of activations");
    if (any_row_scale(m))
        s->scaled = take(a, max_size(N * max_size(2 * (size_t)c->FF, max_size(QKV, c->C)), (size_t)s->chunk * c->V), X,
                         "scaled gradients");
    s->state = take(a, 1, sizeof(StepState), "step state");
}

// ---------------------------------------------------------------------------------------------
// Forward

// Everything of block l after its first residual add; also what --recompute runs again.
static void block_forward(const Llama *m, const Acts *s, int l, floatX *x_prev, bool add_delta) {
    const LlamaConfig *c = &m->c;
    const BlockActs *k = &s->block[l];
    int NHS = c->NH * c->HS, KVS = c->NKV * c->HS, QKV = NHS + 2 * KVS;

    // attention: x -> rmsnorm -> q,k,v -> rope -> causal softmax(q k^T) v -> o
    ops->rmsnorm_fq_forward(add_delta ? k->x : NULL, k->ln1, k->rstd1, k->mask1, add_delta ? x_prev : k->x,
                            add_delta ? s->delta : NULL, w(m, l, ROLE_NORM1), s->N, c->C, c->norm_eps,
                            act(m, l, ROLE_Q));
    ops->linear_forward(k->qkv, k->ln1, w(m, l, ROLE_Q), wscale(m, l, ROLE_Q, ROLE_V), s->N, c->C, QKV);
    ops->rope(k->qkv, m->cos_t, m->sin_t, s->N, s->T, 0, QKV, c->NH + c->NKV, c->HS, false);
    ops->attention_forward(k->att, k->lse, k->qkv, k->qkv + NHS, k->qkv + NHS + KVS, s->B, s->T, s->T, c->NH, c->NKV,
                           c->HS, NHS, QKV, QKV, (size_t)s->T * QKV);
    const floatX *o_in = k->att;
    if (act(m, l, ROLE_O)) {
        ops->fakequant_forward(k->attq, k->mask_att, k->att, s->N, NHS, act(m, l, ROLE_O));
        o_in = k->attq;
    }
    ops->linear_forward(s->delta, o_in, w(m, l, ROLE_O), wscale(m, l, ROLE_O, ROLE_O), s->N, NHS, c->C);

    // feed-forward: x2 = x + o -> rmsnorm -> gate, up -> silu(gate) * up -> down
    ops->rmsnorm_fq_forward(k->x2, k->ln2, k->rstd2, k->mask2, k->x, s->delta, w(m, l, ROLE_NORM2), s->N, c->C,
                            c->norm_eps, act(m, l, ROLE_GATE));
    ops->linear_forward(k->gateup, k->ln2, w(m, l, ROLE_GATE), wscale(m, l, ROLE_GATE, ROLE_UP), s->N, c->C, 2 * c->FF);
    ops->swiglu_fq_forward(k->ffn, k->mask_ffn, k->gateup, s->N, c->FF, act(m, l, ROLE_DOWN));
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
        ops->linear_forward(s->delta, s->block[l].ffn, w(m, l, ROLE_DOWN), wscale(m, l, ROLE_DOWN, ROLE_DOWN), s->N,
                            c->FF, c->C);
    }
    shard_forward(m->shard, c->L);
    ops->rmsnorm_fq_forward(s->x_final, s->lnf, s->rstdf, s->maskf, s->block[c->L - 1].x2, s->delta,
                            w(m, -1, ROLE_FINAL_NORM), s->N, c->C, c->norm_eps, act(m, -1, ROLE_HEAD));
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
    for (size_t i = 0; i < s->N; i += (size_t)s->chunk) {
        size_t n = s->N - i < (size_t)s->chunk ? s->N - i : (size_t)s->chunk;
        const floatX *x = s->lnf + i * c->C;
        ops->linear_forward_f32(s->logits, x, head(m), scale, n, c->C, c->V);
        ops->classifier(s->losses + i, backward ? s->dlogits : NULL, s->logits, s->targets + i, n, c->V);
        if (!backward) continue;
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
    ops->linear_backward_weight(dw(m, l, first), dy, x, s->N, C, OC, accumulate);
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
        ops->rope(s->dwide, m->cos_t, m->sin_t, s->N, s->T, 0, QKV, c->NH + c->NKV, c->HS, true);
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

typedef struct {
    Optim kind;
    AdamWParams adamw;
    double weight_decay;
    float momentum, clip;
    bool ste_clip;
} UpdateParams;

// Gradient norm and clipping, then one pass over each parameter that updates the master and writes its working values
// (or, where other ranks wait for them, leaves that to shard_weights_changed).
static void llama_update(const Llama *m, StepState *state, const UpdateParams *u) {
    const ParamTable *own = &m->shard->own.held;
    shard_finish_gradients(m->shard);
    if (u->ste_clip && m->fake_quant)
        for (int i = 0; i < own->n; i++) {
            const Param *p = &own->p[i];
            if (p->rows && p->scheme.weight.bits)
                ops->weight_ste_mask(shard_own_gradient(m->shard, i), store_param(&m->store, i, 0).data,
                                     &p->scheme.weight, p->rows, p->cols);
        }
    // From here on every rank has the losses, tokens and squared gradients of all, and clips or skips alike.
    shard_sum_state(m->shard, state, true);
    ops->global_norm(state, u->clip);
    bool writes = shard_updates_weights(m->shard);
    for (int i = 0; i < own->n; i++) {
        const Param *p = &own->p[i];
        const StoredTensor *t = &m->store.t[i];
        floatX *work = writes ? shard_weight(m->shard, i) : NULL;
        float *scale = writes ? shard_weight_scale(m->shard, i) : NULL, *grad = shard_own_gradient(m->shard, i);
        const QuantSpec *wq = m->fake_quant ? &p->scheme.weight : NULL;
        if (!p->rows) continue;
        if (u->kind == OPTIM_ADAMW) {
            AdamWParams h = u->adamw;
            h.weight_decay = p->decay ? u->weight_decay : 0.0;
            ops->adamw_fq(t->p.data, t->m.data, t->v.data, work, scale, grad, state, &h, wq, p->rows, p->cols);
        } else {
            ops->sgd_fq(t->p.data, t->m.data, work, scale, grad, state, u->momentum,
                        p->decay ? (float)u->weight_decay : 0.0f, wq, p->rows, p->cols);
        }
    }
    shard_weights_changed(m->shard, &m->store, m->fake_quant);
}

// One step: gradients of all its micro-batches, then the update. What changes from step to step is in s->state, s->tokens
// and s->targets, so a device may record it once and replay it.
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

static struct {
    const char *model, *init, *tokenizer, *train_data, *val_data, *scheme, *weight, *activation, *embedding, *head,
        *out, *device, *comm, *profile;
    StringList rules;
    int ste, fake_quant_after, optimizer, schedule, warmup, decay_steps, steps, B, T, grad_accum, val_every,
        val_batches, save_every, keep, recompute, threads, max_skips, log_every, shard, gather;
    int64_t seed;
    double lr, min_lr, weight_decay, beta1, beta2, eps, momentum, clip;
    bool resume, hf, no_save;
} run;

static const Option options[] = {
    // name            type        where              default   allowed                       help
    {"--model",        OPT_STRING, &run.model,        NULL,     NULL, "model to start from: Hugging Face folder, .gguf or model.bin"},
    {"--init",         OPT_STRING, &run.init,         NULL,     NULL, "start from random weights of a named shape: tiny, 1M, 5M, 135M, 1B, ..."},
    {"--tokenizer",    OPT_STRING, &run.tokenizer,    NULL,     NULL, "tokenizer.json, or \"bytes\" (default: the model's own; bytes with --init)"},
    {"--train-data",   OPT_STRING, &run.train_data,   NULL,     NULL, ".txt, .jsonl or token shards (.bin): a file, folder or pattern"},
    {"--val-data",     OPT_STRING, &run.val_data,     NULL,     NULL, "held-out data of the same kinds"},
    {"--out",          OPT_STRING, &run.out,          "run",    NULL, "folder for logs, checkpoints and model.bin"},
    {"--scheme",       OPT_STRING, &run.scheme,       NULL,     NULL, "none, int8wo, int8dq, int4wo-G, 8da4w-G, intB-G (default: the model's, else 8da4w-32)"},
    {"--weight",       OPT_STRING, &run.weight,       NULL,     NULL, "general form for linears, e.g. int4,group=32,symmetric"},
    {"--activation",   OPT_STRING, &run.activation,   NULL,     NULL, "and their inputs, e.g. int8,token,asymmetric"},
    {"--embedding",    OPT_STRING, &run.embedding,    NULL,     NULL, "quantize the embedding table, e.g. int4,group=32"},
    {"--head",         OPT_STRING, &run.head,         NULL,     NULL, "quantize a tied head (an untied one follows --scheme)"},
    {"--rule",         OPT_LIST,   &run.rules,        NULL,     NULL, "PATTERN=SCHEME for linears whose name matches; may be repeated, the last match wins"},
    {"--ste",          OPT_ENUM,   &run.ste,          "pass",   "pass,clip", "gradient of clipped values: passed through, or zero"},
    {"--fake-quant-after", OPT_INT, &run.fake_quant_after, "0", "0..", "train in float for this many steps first"},
    {"--optimizer",    OPT_ENUM,   &run.optimizer,    "adamw",  "adamw,sgd", "update rule"},
    {"--lr",           OPT_FLOAT,  &run.lr,           "2e-5",   "0..10", "peak learning rate"},
    {"--min-lr",       OPT_FLOAT,  &run.min_lr,       "0",      "0..10", "final learning rate of cosine, linear and wsd"},
    {"--schedule",     OPT_ENUM,   &run.schedule,     "cosine", "constant,cosine,linear,wsd", "after the warmup"},
    {"--warmup",       OPT_INT,    &run.warmup,       "0",      "0..", "steps of linear warmup"},
    {"--decay-steps",  OPT_INT,    &run.decay_steps,  "0",      "0..", "wsd: steps of final decay (0: a fifth of all)"},
    {"--steps",        OPT_INT,    &run.steps,        "100",    "1..100000000", "optimizer steps of the whole run"},
    {"--batch",        OPT_INT,    &run.B,            "4",      "1..65536", "sequences in a micro-batch of a rank, B"},
    {"--seq-len",      OPT_INT,    &run.T,            "512",    "1..131072", "tokens in a sequence, T"},
    {"--grad-accum",   OPT_INT,    &run.grad_accum,   "1",      "1..65536", "micro-batches in a step; gradients are weighted by tokens"},
    {"--weight-decay", OPT_FLOAT,  &run.weight_decay, "0.01",   "0..10", "decoupled (adamw) or L2 (sgd); norms do not decay"},
    {"--beta1",        OPT_FLOAT,  &run.beta1,        "0.9",    "0..0.9999", "AdamW"},
    {"--beta2",        OPT_FLOAT,  &run.beta2,        "0.999",  "0..0.999999", "AdamW"},
    {"--eps",          OPT_FLOAT,  &run.eps,          "1e-8",   "0..1", "AdamW"},
    {"--momentum",     OPT_FLOAT,  &run.momentum,     "0.9",    "0..0.9999", "SGD"},
    {"--clip",         OPT_FLOAT,  &run.clip,         "1",      "0..1e9", "largest gradient norm (0: no clipping)"},
    {"--recompute",    OPT_ENUM,   &run.recompute,    "none",   "none,block", "what the backward computes again instead of keeping"},
    {"--val-every",    OPT_INT,    &run.val_every,    "100",    "0..", "validate every so many steps (0: only at the end)"},
    {"--val-batches",  OPT_INT,    &run.val_batches,  "0",      "0..", "batches of a validation on the way (0: all; the last is always over all)"},
    {"--save-every",   OPT_INT,    &run.save_every,   "0",      "0..", "write a checkpoint every so many steps (0: only when stopped)"},
    {"--keep",         OPT_INT,    &run.keep,         "1",      "0..", "checkpoints kept (0: all)"},
    {"--resume",       OPT_FLAG,   &run.resume,       "0",      NULL, "go on from the newest checkpoint in --out, bit for bit"},
    {"--hf",           OPT_FLAG,   &run.hf,           "0",      NULL, "at the end also write OUT/hf, a folder for transformers"},
    {"--no-save",      OPT_FLAG,   &run.no_save,      "0",      NULL, "write neither checkpoint nor model.bin: to measure speed"},
    {"--seed",         OPT_INT64,  &run.seed,         "1337",   "0..", "of weights, data order and rounding"},
    {"--max-skips",    OPT_INT,    &run.max_skips,    "10",     "1..", "stop after so many steps in a row without a finite loss and norm"},
    {"--log-every",    OPT_INT,    &run.log_every,    "1",      "1..", "print every so many steps (all of them are logged)"},
    {"--profile",      OPT_STRING, &run.profile,      NULL,     NULL, "at the end print the time of each operation, and write a timeline for ui.perfetto.dev to FILE"},
    {"--device",       OPT_STRING, &run.device,       "auto",   NULL, "auto (a GPU if there is one), cpu or cuda"},
    {"--shard",        OPT_ENUM,   &run.shard,        "auto",   "auto,none,optim,grad,full", "what ranks divide among themselves (auto: full, or none for one rank)"},
    {"--gather",       OPT_ENUM,   &run.gather,       "quant",  "quant,full", "fake-quantized weights travel as codes and scales (same bits, fewer bytes), or whole"},
    {"--comm",         OPT_STRING, &run.comm,         "auto",   NULL, "what carries device memory between ranks: nccl, mpi or auto"},
    {"--threads",      OPT_INT,    &run.threads,      "0",      "0..4096", "CPU threads (0: all cores)"},
};
#define N_OPTIONS ((int)(sizeof options / sizeof *options))

// The scheme: as the options say, else the model's own, else 8da4w-32.
static int plan_from_options(QuantPlan *plan, const QuantPlan *models_own, Err *err) {
    const QuantPlan *base = models_own && !quant_plan_is_none(models_own) ? models_own : NULL;
    const char *scheme = run.scheme || run.weight || base ? run.scheme : "8da4w-32";
    int rc = quant_plan_from_options(plan, base, scheme, run.weight, run.activation, run.embedding, run.head,
                                     run.rules.item, run.rules.n, err);
    if (rc == 0 && quant_plan_has_rows(plan))
        rc = err_set(err, E_USAGE, "INT8 rows (%s) are trained as codes, with no masters to fake-quantize: use "
                     "./train_llama_qt, or int8wo here", plan->name);
    return rc;
}

// ---------------------------------------------------------------------------------------------
// Around the loop

// Mean loss over the windows of the validation data, in order; rows past the last window do not count.
static int validate(Llama *m, Acts *s, DataLoader *dl, int max_batches, double *loss, Err *err) {
    StepState state = {0};
    device_copy_in(s->state, &state, sizeof state);
    dataloader_seek(dl, 0);
    uint64_t R = (uint64_t)comm_size(), all = (uint64_t)s->B * R, n_batches = (dl->n_windows + all - 1) / all;
    if (max_batches > 0 && n_batches > (uint64_t)max_batches) n_batches = (uint64_t)max_batches;
    int32_t *tokens = xmalloc(s->N * 4), *targets = xmalloc(s->N * 4);
    for (uint64_t i = 0; i < n_batches; i++) {
        dataloader_next(dl, tokens, targets);
        for (int b = 0; b < s->B; b++)
            if (i * all + (uint64_t)b * R + (uint64_t)comm_rank() >= dl->n_windows)
                for (int t = 0; t < s->T; t++) targets[(size_t)b * s->T + t] = -1;
        device_copy_in(s->tokens, tokens, s->N * 4);
        device_copy_in(s->targets, targets, s->N * 4);
        llama_forward(m, s);
        llama_loss(m, s, false, 0);
    }
    shard_sum_state(m->shard, s->state, false);
    free(tokens); free(targets);
    int rc = device_sync(err);
    device_copy_out(&state, s->state, sizeof state);
    *loss = state.tokens ? state.loss_sum / (double)state.tokens : NAN;
    return rc;
}

// Validation with fake quantization and without; the working values are as before afterwards.
static int validate_both(Llama *m, Acts *s, DataLoader *dl, int max_batches, int step, JsonLog *json, Err *err) {
    double loss_fq = NAN, loss_float = NAN, t0 = now_seconds();
    bool was = m->fake_quant, quantized = !quant_plan_is_none(&m->plan);
    WireBytes training = m->shard->wire;
    int rc = 0;
    if (quantized) {
        if (!was) llama_requantize(m, true);
        rc = validate(m, s, dl, max_batches, &loss_fq, err);
        llama_requantize(m, false);
    }
    if (rc == 0) rc = validate(m, s, dl, max_batches, &loss_float, err);
    if (m->fake_quant != was) llama_requantize(m, was);
    m->shard->wire = training;                 // what training sends is counted
    if (rc < 0) return rc;
    printf("val  %5d | ", step);
    if (quantized) printf("%s loss %.9f ppl %.4f | ", m->plan.name, loss_fq, exp(loss_fq));
    printf("float loss %.9f ppl %.4f | %.1f s\n", loss_float, exp(loss_float), now_seconds() - t0);
    fflush(stdout);
    jsonlog_begin(json, "val");
    jsonlog_int(json, "step", step);
    if (quantized) jsonlog_num(json, "loss_fq", loss_fq);
    jsonlog_num(json, "loss", loss_float);
    jsonlog_end(json);
    return 0;
}

// The rows of the masters that this rank holds, from the model file or drawn at random.
static int load_masters(Llama *m, const ModelFile *file, Err *err) {
    const OwnTable *o = &m->shard->own;
    for (int i = 0; i < m->table.n; i++) {
        const Param *p = &m->table.p[i], *own = &o->held.p[i];
        int64_t tile = (1 << 20) / p->cols + 1;
        float *rows = xmalloc((size_t)tile * (size_t)p->cols * sizeof *rows);
        int rc = 0;
        for (int64_t r = 0; r < own->rows && rc == 0; r += tile) {
            int64_t n = own->rows - r < tile ? own->rows - r : tile, row = o->row0[i] + r;
            if (file) rc = model_read_rows(file, p, row, n, rows, err);
            else param_init_random(rows, p, &m->c, (uint64_t)run.seed, (size_t)(row * p->cols), (size_t)(n * p->cols));
            if (rc == 0) rc = store_set_rows(&m->store, i, r, n, rows, err);
        }
        free(rows);
        if (rc < 0) return rc;
    }
    return 0;
}

// Whole tensors, from all ranks to the files that rank 0 writes: model.bin and, if asked, the folder.
static int export_model(Llama *m, const Tokenizer *tok, Err *err) {
    if (comm_rank() > 0) return store_lend_rows(&m->store, err);
    // What is exported is the working type's value of every parameter: quantizing it gives the codes that training
    // used.
    DType dtype = sizeof(floatX) == 4 ? DT_F32 : DT_BF16;
    char path[1100];
    snprintf(path, sizeof path, "%s/model.bin", run.out);
    int rc = model_write_bin(path, &m->c, &m->plan, &m->table, tok, dtype, store_rows, &m->store, err);
    if (rc < 0) return rc;
    printf("wrote   %s\n", path);
    if (run.hf) {
        snprintf(path, sizeof path, "%s/hf", run.out);
        if ((rc = model_write_hf(path, &m->c, &m->table, tok, dtype, store_rows, &m->store, err)) < 0) return rc;
        printf("wrote   %s\n", path);
    }
    return store_rows_end(&m->store, err);
}

static int load_tokenizer(Tokenizer **tok, ModelFile *file, Err *err) {
    if (run.tokenizer && strcmp(run.tokenizer, "bytes")) {
        char *text;
        size_t len;
        int rc = file_read(&text, &len, run.tokenizer, (size_t)256 << 20, err);
        if (rc == 0) { rc = tokenizer_from_json(tok, text, len, err); free(text); }
        return rc;
    }
    if (!run.tokenizer && file && file->tokenizer) {
        *tok = file->tokenizer;
        file->tokenizer = NULL;
        return 0;
    }
    if (!run.tokenizer && file)
        return err_set(err, E_USAGE, "%s carries no tokenizer; name one with --tokenizer FILE (or bytes)", run.model);
    *tok = tokenizer_bytes();
    return 0;
}

// Prints the memory plan. Activations are counted by the function that allocates them, for one sequence and for two.
static int print_memory_plan(double *planned, Llama *m, bool ste_clip, const TokenData *data, Err *err) {
    const ShardMemory *shard = &m->shard->memory;
    double b1, b2;
    StateArray arrays[STORE_MAX_ARRAYS];
    int n_arrays = store_arrays(&m->store, arrays);
    Acts s = {0};
    Arena a = {.plan = true};
    take_acts(&a, &s, m, 1, run.T, run.grad_accum, run.recompute, ste_clip);
    b1 = a.bytes;
    a.bytes = 0;
    take_acts(&a, &s, m, 2, run.T, run.grad_accum, run.recompute, ste_clip);
    b2 = a.bytes;
    a.bytes = 0;
    take_acts(&a, &s, m, run.B, run.T, run.grad_accum, run.recompute, ste_clip);
    free(s.block);
    double per = run.B > 1 ? (a.bytes - b1) / (run.B - 1) : b2 - b1;
    MemoryItem items[] = {
        {"master weights, fp32", m->store.param_bytes, 0},
        {"gradients, fp32", shard->gradients + shard->own_gradients, 0},
        {run.optimizer == OPTIM_ADAMW ? "AdamW moments, fp32" : "momentum, fp32", m->store.state_bytes, 0},
        {"working weights, " FLOATX_NAME, shard->weights, 0},
        {"on the way between ranks", shard->buffers, 0},
        {"activations and logits", a.bytes - per * run.B, per},
        {"copy of the state while it is saved", device_is_host() && run.save_every && !run.no_save
             ? (double)train_state_copy_bytes(&m->shard->own, arrays, n_arrays) : 0, 0},
        {"tokens", data->owned && device_is_host() ? 4.0 * (double)data->n : 0, 0},
    };
    return memory_plan_print(planned, items, sizeof items / sizeof *items, run.B, stdout, err);
}

static const char *const level_names[] = {"none", "optim", "grad", "full"};

// Rank 0 leaves a file in --out that all others must see: checkpoints are made of the files of all ranks.
static int check_out_is_shared(Err *err) {
    char path[1100];
    int64_t token = (int64_t)getpid();
    int rc = comm_host_broadcast(&token, sizeof token, 0, err);
    if (rc < 0 || comm_size() == 1) return rc;
    snprintf(path, sizeof path, "%s/ranks-%lld.tmp", run.out, (long long)token);
    if (comm_rank() == 0) {
        AtomicFile f;
        if ((rc = atomic_open(&f, path, err)) < 0 || (rc = atomic_commit(&f, err)) < 0) return rc;
    }
    if ((rc = comm_barrier(err)) < 0) return rc;
    if (!path_exists(path))
        return err_set(err, E_USAGE, "this rank does not see in --out %s what rank 0 wrote there; name a folder on a file "
                                     "system that all ranks share", run.out);
    rc = comm_barrier(err);
    if (comm_rank() == 0) remove(path);
    return rc;
}

// Ranks that were started with different models or data would train nonsense together.
static int check_ranks_agree(const Llama *m, const ModelFile *file, const char *plan_json, const TokenData *train,
                             const TokenData *val, Err *err) {
    char *config = llama_config_to_json(&m->c, FLOATX_NAME), text[200];
    Checksum weights;                                      // of a row of each tensor
    checksum_begin(&weights);
    int rc = 0;
    for (int i = 0; i < m->table.n && file && rc == 0; i++) {
        const Param *p = &m->table.p[i];
        float *row = xmalloc((size_t)p->cols * sizeof *row);
        rc = model_read_rows(file, p, p->rows / 2, 1, row, err);
        if (rc == 0) checksum_add(&weights, row, (size_t)p->cols * sizeof *row);
        free(row);
    }
    snprintf(text, sizeof text, "train_llama_qat " QLLM_VERSION " " FLOATX_NAME " on %s, weights %016llx, training data "
             "%016llx, validation data %016llx", ops->name, (unsigned long long)checksum_end(&weights),
             (unsigned long long)train->hash, (unsigned long long)val->hash);
    if (rc == 0) rc = comm_check_same("program, model and data", text, err);
    if (rc == 0) rc = comm_check_same("model configuration", config, err);
    if (rc == 0) rc = comm_check_same("quantization scheme", plan_json, err);
    free(config);
    return rc;
}

static int sum_over_ranks(double *x, Err *err) {
    double *all = xmalloc((size_t)comm_size() * sizeof *all);
    int rc = comm_host_all_gather(all, x, sizeof *x, err);
    *x = 0;
    for (int r = 0; r < comm_size(); r++) *x += all[r];
    free(all);
    return rc;
}

// What a rank received, a step, and how long it waited for it.
static void print_wire(const WireBytes *b, double busy, double blocked, int64_t steps, JsonLog *json) {
    double n = steps ? (double)steps : 1;
    char linears[32], others[32], gradients[32];
    printf("wire    a step, received by a rank: linears %s, other weights %s, gradients %s; %.1f ms on the way, %.1f ms "
           "waited for\n", fmt_bytes(linears, b->linears / n), fmt_bytes(others, b->others / n),
           fmt_bytes(gradients, b->gradients / n), 1e3 * busy / n, 1e3 * blocked / n);
    jsonlog_begin(json, "wire");
    jsonlog_int(json, "steps", (long long)steps);
    jsonlog_num(json, "linears", b->linears / n);
    jsonlog_num(json, "others", b->others / n);
    jsonlog_num(json, "gradients", b->gradients / n);
    jsonlog_num(json, "busy_seconds", busy / n);
    jsonlog_num(json, "blocked_seconds", blocked / n);
    jsonlog_end(json);
}

static int run_training(Err *err) {
    int rc;
    if (!run.train_data) return err_set(err, E_USAGE, "no --train-data; name a .txt, .jsonl or .bin file");
    if (!run.model == !run.init)
        return err_set(err, E_USAGE, "give either --model PATH or --init NAME (%s)", llama_config_names());
    static char *settings, *plan_json;
    settings = cli_json(options, N_OPTIONS);
    if ((rc = comm_check_same("options", settings, err)) < 0) return rc;
    device_choose(comm_local_rank(), comm_local_size());
    if ((rc = device_init(run.device, run.threads ? run.threads : comm_default_threads(), err)) < 0) return rc;
    if ((rc = comm_choose(run.comm, err)) < 0) return rc;
    if ((rc = make_dir(run.out, err)) < 0) return rc;
    bool first = comm_rank() == 0;
    int R = comm_size();
    if ((rc = check_out_is_shared(err)) < 0) return rc;

    // The model file: configuration, scheme and tokenizer now, weights when their place is allocated. What is static
    // here lives as long as the process.
    static Llama m;
    static ModelFile file;
    if (run.model) {
        if ((rc = model_open(&file, run.model, err)) < 0) return rc;
        m.c = file.config;
    } else if ((rc = llama_config_named(&m.c, run.init, err)) < 0) {
        return rc;
    }
    if ((rc = plan_from_options(&m.plan, run.model ? &file.plan : NULL, err)) < 0) return rc;
    if ((rc = param_table_build(&m.table, &m.c, &m.plan, err)) < 0) return rc;
    static Shard shard;
    ShardLevel level = run.shard ? (ShardLevel)(run.shard - 1) : R > 1 ? SHARD_FULL : SHARD_NONE;
    m.shard = &shard;
    if ((rc = shard_plan(&shard, &m.c, &m.plan, &m.table, level, run.gather == 0, R, comm_rank(), err)) < 0) return rc;
    if ((rc = store_plan(&m.store, &shard, run.optimizer == OPTIM_ADAMW, err)) < 0) return rc;
    static Tokenizer *tok;
    if ((rc = load_tokenizer(&tok, run.model ? &file : NULL, err)) < 0) return rc;
    if (tokenizer_vocab_size(tok) > m.c.V)
        return err_set(err, E_USAGE,
                       "the tokenizer has %d tokens, the model %d; use the tokenizer the model was made with",
                       tokenizer_vocab_size(tok), m.c.V);
    if (run.T > m.c.max_T)
        return err_set(err, E_USAGE, "--seq-len %d exceeds the model's %d positions", run.T, m.c.max_T);

    char cache[1100], buf[32], buf2[32];
    snprintf(cache, sizeof cache, "%s/cache", run.out);
    static TokenData train, val;
    static DataLoader train_dl, val_dl;
    // One rank of a machine tokenizes; the others find its tokens in the cache.
    for (int turn = 0; turn < 2; turn++) {
        if ((comm_local_rank() > 0) == (turn > 0)) {
            if ((rc = token_data_load(&train, run.train_data, tok, m.c.V, cache, err)) < 0) return rc;
            if (run.val_data && (rc = token_data_load(&val, run.val_data, tok, m.c.V, cache, err)) < 0) return rc;
        }
        if ((rc = comm_barrier(err)) < 0) return rc;
    }
    if ((rc = dataloader_init(&train_dl, &train, run.B, run.T, true, (uint64_t)run.seed, err)) < 0) return rc;
    dataloader_ranks(&train_dl, comm_rank(), R);
    if (run.val_data) {
        if ((rc = dataloader_init(&val_dl, &val, run.B, run.T, false, 0, err)) < 0) return rc;
        dataloader_ranks(&val_dl, comm_rank(), R);
    }
    plan_json = quant_plan_to_json(&m.plan);
    if ((rc = check_ranks_agree(&m, run.model ? &file : NULL, plan_json, &train, &val, err)) < 0) return rc;

    const char *peak_source;
    double peak = device_peak_flops(&peak_source);
    if ((rc = sum_over_ranks(&peak, err)) < 0) return rc;
    printf("device  %s; peak %.0f GFLOP/s measured (%s)\n", device_description(), peak / 1e9, peak_source);
    if (R > 1) printf("ranks   %s; --shard %s\n", comm_description(), level_names[level]);
    printf("model   %s: %s parameters, %d layers, width %d, %d heads on %d, feed-forward %d, vocabulary %d%s\n",
           run.model ? run.model : run.init, fmt_count(buf, (double)m.table.n_params), m.c.L, m.c.C, m.c.NH, m.c.NKV,
           m.c.FF, m.c.V, m.c.tied ? ", tied" : "");
    printf("scheme  %s; tokenizer %s\n", m.plan.name, tokenizer_name(tok));
    printf("data    %s training tokens%s%s%s\n", fmt_count(buf, (double)train.n), run.val_data ? ", " : "",
           run.val_data ? fmt_count(buf2, (double)val.n) : "",
           run.val_data ? " for validation" : "; no --val-data, so no validation");
    double flops_per_token = llama_train_flops_per_token(&m.c, run.T);
    printf("FLOPs   a token: 6 * %.0f matmul parameters + 6 * %d layers * %d * %d tokens = %.3g\n",
           llama_matmul_params(&m.c), m.c.L, m.c.NH * m.c.HS, run.T, flops_per_token);
    bool ste_clip = run.ste == 1;
    double planned;
    if ((rc = print_memory_plan(&planned, &m, ste_clip, &train, err)) < 0) return rc;
    fflush(stdout);

    // Allocate; masters are loaded first, so that the mapped model file is gone before the rest is touched.
    if ((rc = shard_alloc(&shard, err)) < 0 || (rc = store_alloc(&m.store, err)) < 0) return rc;
    if ((rc = load_masters(&m, run.model ? &file : NULL, err)) < 0) return rc;
    if (run.model) model_close(&file);
    Arena a = {.err = err};
    m.cos_t = take(&a, (size_t)run.T * m.c.HS / 2, 4, "rope table");
    m.sin_t = take(&a, (size_t)run.T * m.c.HS / 2, 4, "rope table");
    static Acts s;
    take_acts(&a, &s, &m, run.B, run.T, run.grad_accum, run.recompute, ste_clip);
    if (a.rc < 0) return a.rc;
    float *table = xmalloc((size_t)run.T * m.c.HS * 4);
    llama_rope_table(table, table + (size_t)run.T * m.c.HS / 2, &m.c, run.T);
    device_copy_in(m.cos_t, table, (size_t)run.T * m.c.HS / 2 * 4);
    device_copy_in(m.sin_t, table + (size_t)run.T * m.c.HS / 2, (size_t)run.T * m.c.HS / 2 * 4);
    free(table);

    StateArray arrays[STORE_MAX_ARRAYS];
    int n_arrays = store_arrays(&m.store, arrays);
    TrainProgress p = {.data_hash = train.hash, .seed = (uint64_t)run.seed, .T = run.T};
    bool resumed = false;
    if (first) train_state_clean(run.out);
    snprintf(cache, sizeof cache, "%s/latest", run.out);
    if (!run.resume && path_exists(cache) && !run.no_save)
        printf("note    %s holds checkpoints of an earlier run, which this one replaces; --resume would go on from them\n",
               run.out);
    if ((rc = comm_barrier(err)) < 0) return rc;
    if (run.resume) {
        if ((rc = train_state_load(run.out, &p, &m.c, &m.plan, &shard.own, arrays, n_arrays, err)) < 0) return rc;
        resumed = rc == 1;
        char found[96];
        snprintf(found, sizeof found, "%s step %lld, update %lld, window %llu", resumed ? "a checkpoint of" : "none,",
                 (long long)p.step, (long long)p.t, (unsigned long long)p.loader_position);
        if ((rc = comm_check_same("checkpoint in --out", found, err)) < 0) return rc;
        if (resumed) printf("resume  from step %lld\n", (long long)p.step);
        else printf("resume  %s has no checkpoint; starting at step 0\n", run.out);
        dataloader_seek(&train_dl, p.loader_position);
    }

    static JsonLog json;
    snprintf(cache, sizeof cache, "%s/log.jsonl", run.out);
    if ((rc = jsonlog_open(&json, first ? cache : NULL, resumed, err)) < 0) return rc;
    jsonlog_begin(&json, "start");
    jsonlog_str(&json, "program", "train_llama_qat " QLLM_VERSION " " FLOATX_NAME);
    jsonlog_raw(&json, "options", settings);
    jsonlog_raw(&json, "quant", plan_json);
    jsonlog_str(&json, "device", device_description());
    jsonlog_num(&json, "peak_flops", peak);
    jsonlog_int(&json, "parameters", (long long)m.table.n_params);
    jsonlog_num(&json, "memory_plan", planned);
    jsonlog_int(&json, "ranks", R);
    jsonlog_str(&json, "shard", level_names[level]);
    jsonlog_end(&json);
    free(settings); free(plan_json);
    settings = plan_json = NULL;

    StepLog log = {.json = &json,
                   .flops_per_token = flops_per_token,
                   .peak = peak,
                   .peak_source = peak_source,
                   .steps = run.steps};
    Schedule sched = {.kind = (ScheduleKind)run.schedule,
                      .lr = run.lr,
                      .min_lr = run.min_lr,
                      .warmup = run.warmup,
                      .steps = run.steps,
                      .decay = run.decay_steps ? run.decay_steps : run.steps / 5 + 1};
    UpdateParams u = {.kind = (Optim)run.optimizer, .momentum = (float)run.momentum, .weight_decay = run.weight_decay,
                      .adamw = {.beta1 = run.beta1, .beta2 = run.beta2, .eps = run.eps},
                      .clip = (float)run.clip, .ste_clip = ste_clip};
    static int32_t *tokens, *targets;
    tokens = xmalloc(s.N * (size_t)run.grad_accum * 4);
    targets = xmalloc(s.N * (size_t)run.grad_accum * 4);
    Step step = {.m = &m, .s = &s, .u = &u, .grad_accum = run.grad_accum};
    int skips_in_a_row = 0;
    bool quantized = !quant_plan_is_none(&m.plan);

    llama_requantize(&m, quantized && p.step >= run.fake_quant_after);
    trainer_catch_signals();
    if (run.profile && (rc = profile_begin(run.profile, comm_rank(), err)) < 0) return rc;
    int64_t profile_from = p.step + 2;             // the first steps build the matmul primitives
    double profile_seconds = 0;
    int64_t wire_from = p.step;
    double on_the_way = 0, waited = 0;
    bool stop = false;
    while (p.step < run.steps && !stop) {
        if ((rc = train_state_poll(err)) < 0) return rc;
        if (quantized && !m.fake_quant && p.step >= run.fake_quant_after) llama_requantize(&m, true);
        if (p.step == profile_from) profile_reset();
        double t0 = now_seconds(), busy0, blocked0, busy1, blocked1;
        comm_times(&busy0, &blocked0);
        StepState state = {
            .t = (int32_t)p.t + 1, .lr = (float)schedule_lr(&sched, (int)p.step), .seed = (uint64_t)run.seed,
            .stop = trainer_signal() != 0};
        device_copy_in(s.state, &state, sizeof state);
        for (int micro = 0; micro < run.grad_accum; micro++)
            dataloader_next(&train_dl, tokens + (size_t)micro * s.N, targets + (size_t)micro * s.N);
        device_copy_in(s.tokens, tokens, s.N * (size_t)run.grad_accum * 4);
        device_copy_in(s.targets, targets, s.N * (size_t)run.grad_accum * 4);
        // device_step records a step and replays it; not where each operation is timed, nor where ranks wait for others.
        if (run.profile || R > 1 || level != SHARD_NONE) train_step(&step);
        else device_step(m.fake_quant, train_step, &step);
        if ((rc = device_sync(err)) < 0) return rc;
        device_copy_out(&state, s.state, sizeof state);

        stop = state.stop || (R == 1 && trainer_signal());       // every rank has the signals of all: they leave together
        p.step++;
        p.t += !state.skip;
        p.skipped += state.skip;
        p.tokens += state.tokens;
        p.loader_position = train_dl.position;
        skips_in_a_row = state.skip ? skips_in_a_row + 1 : 0;
        double loss = state.tokens ? state.loss_sum / (double)state.tokens : NAN;
        bool last = p.step == run.steps;
        double seconds = now_seconds() - t0;
        comm_times(&busy1, &blocked1);
        on_the_way += busy1 - busy0;
        waited += blocked1 - blocked0;
        if (p.step > profile_from) profile_seconds += seconds;
        steplog_print(&log, &(StepReport){(int)p.step, loss, state.norm, state.lr, seconds, state.tokens, state.skip},
                      p.step % run.log_every == 0 || last || p.step == 1);
        if (skips_in_a_row >= run.max_skips)
            return err_set(
                err, E_FAIL,
                "step %lld: %d steps in a row had no finite loss and norm (loss %g, norm %g); lower --lr "
                "or check the data; the last good weights are in the checkpoint before, if --save-every made one",
                (long long)p.step, skips_in_a_row, loss, (double)state.norm);

        if ((last || stop) && run.profile) {
            if (p.step > profile_from) profile_print(stdout, (int)(p.step - profile_from), profile_seconds);
            if ((rc = profile_end(err)) < 0) return rc;
        }
        if (run.val_data && !last && !stop && run.val_every && p.step % run.val_every == 0)
            if ((rc = validate_both(&m, &s, &val_dl, run.val_batches, (int)p.step, &json, err)) < 0) return rc;
        if (run.save_every && !run.no_save && p.step % run.save_every == 0 && !last && !stop)
            if ((rc = train_state_save(run.out, &p, &m.c, &m.plan, &shard.own, arrays, n_arrays, run.keep, err)) < 0)
                return rc;
    }
    if (R > 1) print_wire(&shard.wire, on_the_way, waited, p.step - wire_from, &json);
    if (run.no_save) {
        jsonlog_close(&json);
        return 0;
    }
    // A stopped run leaves a checkpoint; a finished one leaves the checkpoint, model.bin and, if asked, the folder.
    rc = train_state_save_last(run.out, &p, &m.c, &m.plan, &shard.own, arrays, n_arrays, run.keep, err);
    if (rc < 0 || (rc = comm_barrier(err)) < 0) return rc;
    if (stop && p.step < run.steps) {
        printf("stopped by a signal at step %lld; saved. The same command with --resume goes on.\n", (long long)p.step);
        jsonlog_close(&json);
        return 0;
    }
    if ((rc = export_model(&m, tok, err)) < 0) return rc;
    if (p.skipped) printf("%lld steps were skipped for want of a finite loss and norm\n", (long long)p.skipped);
    if (run.val_data && (rc = validate_both(&m, &s, &val_dl, 0, (int)p.step, &json, err)) < 0) return rc;
    jsonlog_close(&json);
    return 0;
}

int main(int argc, char **argv) {
    program_name = "train_llama_qat";
    Err err = {0};
    bool asks = false;
    for (int i = 1; i < argc; i++)
        asks = asks || !strcmp(argv[i], "--help") || !strcmp(argv[i], "-h") || !strcmp(argv[i], "--version");
    if (!asks && comm_init(&argc, &argv, &err) < 0) comm_die(&err);     // answers need no other ranks
    // One rank speaks for all.
    if (comm_rank() > 0 && !freopen("/dev/null", "w", stdout)) perror("/dev/null");
    if (cli_parse(options, N_OPTIONS,
                  "usage: [mpirun -np N] train_llama_qat (--model PATH | --init NAME) --train-data FILE [options]\n"
                  "Quantization-aware training of a Llama.\n",
                  NULL, argc, argv, &err) < 0)
        comm_die(&err);
    if (run_training(&err) < 0 || comm_barrier(&err) < 0) comm_die(&err);
    comm_end();
    return 0;
}
