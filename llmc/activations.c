#include "activations.h"
#include <stdlib.h>
#include "device.h"

// One place says what is allocated: called once to add up the plan, once to allocate.
typedef struct { bool plan; double bytes; Acts *acts; Err *err; int rc; } Arena;

static void *take(Arena *a, size_t n, size_t size, const char *what) {
    void *p = NULL;
    size_t bytes;
    if (!mul_size(n, size, &bytes)) bytes = SIZE_MAX;
    a->bytes += (double)bytes;
    if (a->plan || a->rc < 0) return NULL;
    a->rc = device_alloc(&p, bytes, what, a->err);
    if (a->rc == 0) a->acts->owned[a->acts->n_owned++] = p;
    return p;
}

enum { IN_BLOCK = 16, AROUND = 18 };       // most allocations of a block, and of everything else

static void take_block(Arena *a, BlockActs *k, const LlamaConfig *c, const ActsShape *shape) {
    size_t N = (size_t)shape->B * (size_t)shape->T, NHS = (size_t)c->NH * (size_t)c->HS, X = sizeof(floatX);
    k->x = take(a, N * c->C, X, "activations");
    k->ln1 = take(a, N * c->C, X, "activations");
    k->rstd1 = take(a, N, 4, "activations");
    k->qkv = take(a, N * (NHS + 2 * (size_t)c->NKV * c->HS), X, "activations");
    k->att = take(a, N * NHS, X, "activations");
    k->attq = shape->quantized ? take(a, N * NHS, X, "activations") : k->att;
    k->lse = take(a, N * c->NH, 4, "activations");
    k->x2 = take(a, N * c->C, X, "activations");
    k->ln2 = take(a, N * c->C, X, "activations");
    k->rstd2 = take(a, N, 4, "activations");
    k->gateup = take(a, N * 2 * c->FF, X, "activations");
    k->ffn = take(a, N * c->FF, X, "activations");
    if (shape->masks && shape->quantized) {
        k->mask1 = take(a, N * c->C, 1, "masks");
        k->mask_att = take(a, N * NHS, 1, "masks");
        k->mask2 = take(a, N * c->C, 1, "masks");
        k->mask_ffn = take(a, N * c->FF, 1, "masks");
    }
}

static size_t max_size(size_t a, size_t b) { return a > b ? a : b; }

static void take_all(Arena *a, Acts *s, const LlamaConfig *c, const ActsShape *shape) {
    size_t N = (size_t)shape->B * (size_t)shape->T, X = sizeof(floatX), NHS = (size_t)c->NH * (size_t)c->HS;
    size_t QKV = NHS + 2 * (size_t)c->NKV * (size_t)c->HS;
    *s = (Acts){.B = shape->B, .T = shape->T, .N = N, .recompute = shape->recompute};
    // Each chunk adds to the head's whole gradient, so chunks grow with the batch; logits are an eighth of it at most.
    size_t chunk = N / 8 > 512 ? N / 8 : 512;
    s->chunk = (int)(N < chunk ? N : chunk);
    s->block = xcalloc((size_t)c->L, sizeof *s->block);
    s->owned = xcalloc((size_t)c->L * IN_BLOCK + AROUND, sizeof *s->owned);
    for (int l = 0; l < c->L; l++) {
        if (l > 0 && shape->recompute) {
            s->block[l] = s->block[0];
            s->block[l].x = take(a, N * c->C, X, "activations");
        } else {
            take_block(a, &s->block[l], c, shape);
        }
    }
    s->x_final = take(a, N * c->C, X, "activations");
    s->lnf = take(a, N * c->C, X, "activations");
    s->rstdf = take(a, N, 4, "activations");
    if (shape->masks && !c->tied) s->maskf = take(a, N * c->C, 1, "masks");
    s->delta = take(a, N * c->C, X, "activations");
    s->logits = take(a, (size_t)s->chunk * c->V, 4, "logits");
    s->dlogits = take(a, (size_t)s->chunk * c->V, X, "logits");
    s->losses = take(a, N, 4, "losses");
    s->tokens = take(a, N * (size_t)shape->grad_accum, 4, "tokens");
    s->targets = take(a, N * (size_t)shape->grad_accum, 4, "tokens");
    s->cos_t = take(a, (size_t)shape->T * c->HS / 2, 4, "rope table");
    s->sin_t = take(a, (size_t)shape->T * c->HS / 2, 4, "rope table");
    s->dres = take(a, N * c->C, X, "gradients of activations");
    s->dc = take(a, N * max_size(c->C, NHS), X, "gradients of activations");
    s->dwide = take(a, N * max_size(2 * (size_t)c->FF, QKV), X, "gradients of activations");
    s->dffn = take(a, N * c->FF, X, "gradients of activations");
    if (shape->row_scales)
        s->scaled = take(a, max_size(N * max_size(2 * (size_t)c->FF, max_size(QKV, c->C)), (size_t)s->chunk * c->V), X,
                         "scaled gradients");
    s->state = take(a, 1, sizeof(StepState), "step state");
}

double acts_bytes(const LlamaConfig *c, const ActsShape *shape) {
    Acts s;
    Arena a = {.plan = true};
    take_all(&a, &s, c, shape);
    acts_free(&s);
    return a.bytes;
}

int acts_alloc(Acts *s, const LlamaConfig *c, const ActsShape *shape, Err *err) {
    Arena a = {.acts = s, .err = err};
    take_all(&a, s, c, shape);
    if (a.rc < 0) {
        acts_free(s);
        return a.rc;
    }
    size_t n = (size_t)shape->T * (size_t)c->HS / 2;
    float *table = xmalloc(2 * n * sizeof *table);
    llama_rope_table(table, table + n, c, shape->T);
    device_copy_in(s->cos_t, table, n * sizeof *table);
    device_copy_in(s->sin_t, table + n, n * sizeof *table);
    free(table);
    return 0;
}

void acts_free(Acts *s) {
    for (int i = 0; i < s->n_owned; i++) device_free(s->owned[i]);
    free(s->owned);
    free(s->block);
    *s = (Acts){0};
}
