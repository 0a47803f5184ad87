// The Llama forward for serving: the trainer's operations, one call after the other, over a KV cache.
#include "infer.h"
#include <stdlib.h>
#include <string.h>
#include "device.h"

enum {
    MATVEC_MAX_N = 8,             // packed codes are read in place for so few tokens; above, a tensor is unpacked first
    LOGIT_ROWS = 512,             // rows of logits that exist at one time
    STAGE_ELEMENTS = 1 << 22      // values that pass through the loader at one time
};

// One matmul: one tensor, or two or three that read the same input, their rows one after the other.
typedef struct { PackedTensor t; QuantSpec spec; int rows; bool on_device; } Part;
typedef struct {
    int C, OC;
    const QuantSpec *act;         // fake quantization of the input; NULL: none
    bool integer;                 // integer products: codes in both arithmetics, rows of the input quantized on the fly
    floatX *w;                    // (OC, C) X working values; NULL: packed
    float *wscale;                // (OC) f32, NULL: no row works as codes
    Part part[3]; int n_parts;    // packed codes
    uint8_t *codes;               // (OC, row bytes) and their scales (OC, blocks of a row) joined, so that one call
    float *scale, *zero;          //   reads all parts; NULL: part by part
} Linear;

typedef struct {
    floatX *norm1, *norm2;        // (C) X
    Linear qkv, o, gateup, down;
    floatX *cache;                // (B, max_T, 2, NKV*HS) X: keys, then values, of each position
} Block;

struct Infer {
    LlamaConfig c;
    QuantPlan plan;
    ParamTable table;
    Arithmetic arith;
    int B, max_T, max_N;
    int n, pos;                   // sequences now, and tokens of each in the cache

    Linear embed;                 // (V, C) X, or codes that are unpacked row by row
    Block *block;                 // L
    floatX *final_norm;           // (C) X
    Linear head;                  // (V, C); may share embed's values

    int32_t *tokens, *targets;    // (max_N) i32
    int32_t *rows;                // (max_N) i32: rows of y that the head reads
    int32_t *kv_rows;             // (max_N * 2*NKV) i32: see append_to_cache
    int32_t *positions;           // (max_T) i32: 0, 1, 2, ...
    float *cos_t, *sin_t;         // (max_T, HS/2) f32
    floatX *res, *delta, *y;      // (max_N, C) X: residual stream, what a sublayer adds to it, normalized
    floatX *qkv;                  // (max_N, (NH + 2*NKV) * HS) X
    floatX *att;                  // (max_N, NH*HS) X
    floatX *gateup, *ffn;         // (max_N, 2*FF), (max_N, FF) X
    floatX *unpacked;             // largest packed linear, X, with
    float *unpacked_scale;        //   its row scales
    float *logits; int logit_rows;// (logit_rows, V) f32, made longer when losses are first asked for
    float *losses;                // (max_N) f32

    void **owned; int n_owned;    // everything from device_alloc
    size_t memory, model_bytes, token_bytes, embed_bytes;
    size_t embed_row_scales;      // scales of a row of a packed embedding
};

static int grab(Infer *s, void *out, size_t a, size_t b, size_t c, const char *what, Err *err) {
    size_t bytes;
    if (!mul_size(a, b, &bytes) || !mul_size(bytes, c, &bytes))
        return err_set(err, E_NOMEM, "%s: the size overflows; use a smaller context or batch", what);
    void *p;
    int rc = device_alloc(&p, bytes ? bytes : 1, what, err);
    if (rc < 0) return rc;
    void **more = realloc(s->owned, (size_t)(s->n_owned + 1) * sizeof *more);
    if (!more) {
        device_free(p);
        return err_set(err, E_NOMEM, "%s: out of memory", what);
    }
    s->owned = more;
    s->owned[s->n_owned++] = p;
    s->memory += bytes;
    memcpy(out, &p, sizeof p);
    return 0;
}

// ---------------------------------------------------------------------------------------------
// Loading.

// Working values from floats: what the trainer makes of its masters.
static int load_floats(const ModelFile *m, const Param *p, const QuantSpec *spec, floatX *work, float *wscale,
                       Err *err) {
    int64_t block[2] = {1, p->cols};
    if (spec->bits) {
        int rc = quant_block_shape(spec, p->rows, p->cols, block, err);
        if (rc < 0) return rc;
    }
    int64_t step = STAGE_ELEMENTS / p->cols / block[0] * block[0];       // whole blocks
    if (step < block[0]) step = block[0];
    if (step > p->rows) step = p->rows;
    size_t bytes = (size_t)step * (size_t)p->cols * sizeof(float);
    void *host = NULL, *dev = NULL;
    int rc = big_alloc(&host, bytes, "a piece of a tensor", err);
    if (rc == 0) rc = device_alloc(&dev, bytes, "a piece of a tensor", err);
    for (int64_t r = 0; rc == 0 && r < p->rows; r += step) {
        int64_t n = p->rows - r < step ? p->rows - r : step;
        rc = model_read_rows(m, p, r, n, host, err);
        if (rc < 0) break;
        device_copy_in(dev, host, (size_t)n * (size_t)p->cols * sizeof(float));
        ops->weight_fq(work + r * p->cols, wscale ? wscale + r : NULL, dev, spec, n, p->cols);
    }
    if (dev) device_free(dev);
    free(host);
    return rc;
}

// Codes and scales of a part that are read where the file is mapped; a device that is not the host gets its own copy.
static int part_to_device(Part *p, int C, Err *err) {
    size_t code_bytes = (size_t)p->rows * quant_row_bytes(p->spec.bits, C);
    size_t scale_bytes = (size_t)p->t.n_scales * sizeof(float);
    const void *host[] = {p->t.codes, p->t.scale, p->t.zero};
    size_t bytes[] = {code_bytes, scale_bytes, scale_bytes};
    void *dev[3] = {NULL, NULL, NULL};
    for (int i = 0; i < 3; i++) {
        if (!host[i]) continue;
        int rc = device_alloc(&dev[i], bytes[i], "packed weights", err);
        if (rc < 0) {
            for (int j = 0; j < i; j++) device_free(dev[j]);
            return rc;
        }
        device_copy_in(dev[i], host[i], bytes[i]);
    }
    int64_t n_scales = p->t.n_scales;
    packed_tensor_free(&p->t);
    p->t = (PackedTensor){.codes = dev[0], .scale = dev[1], .zero = dev[2], .n_scales = n_scales};
    p->on_device = true;
    return 0;
}

static void part_free(Part *p) {
    if (p->on_device) {
        device_free((void *)(uintptr_t)p->t.codes);
        device_free(p->t.scale);
        device_free(p->t.zero);
        p->t = (PackedTensor){0};
        p->on_device = false;
    } else {
        packed_tensor_free(&p->t);
    }
}

static size_t packed_bytes(const Part *p, int C) {
    // As the file has them: bf16 scales, f32 ones of INT8 rows; zero points bf16 in the float domain, else one byte.
    size_t zero = !quant_has_zero(&p->spec) ? 0 : p->spec.zero == QZ_FLOAT ? 2 : 1;
    size_t scale = quant_is_int8_rows(&p->spec) ? 4 : 2;
    return (size_t)p->rows * quant_row_bytes(p->spec.bits, C) + (size_t)p->t.n_scales * (scale + zero);
}

// Puts the parts' codes and scales one after the other. Only for blocks within rows.
static int join_parts(Infer *s, Linear *l, Err *err) {
    size_t row_bytes = quant_row_bytes(l->part[0].spec.bits, l->C), row_scales = 0, row = 0;
    for (int i = 0; i < l->n_parts; i++) {
        int64_t block[2];
        if (!quant_spec_equal(&l->part[i].spec, &l->part[0].spec)) return 0;
        int rc = quant_block_shape(&l->part[i].spec, l->part[i].rows, l->C, block, err);
        if (rc < 0) return rc;
        if (block[0] != 1) return 0;
        row_scales = (size_t)(l->C / block[1]);
    }
    int rc = grab(s, &l->codes, (size_t)l->OC, row_bytes, 1, "packed weights", err);
    if (rc == 0) rc = grab(s, &l->scale, (size_t)l->OC, row_scales, sizeof(float), "scales", err);
    if (rc == 0 && l->part[0].t.zero) rc = grab(s, &l->zero, (size_t)l->OC, row_scales, sizeof(float), "zero points",
                                                err);
    for (int i = 0; rc == 0 && i < l->n_parts; row += (size_t)l->part[i++].rows) {
        Part *p = &l->part[i];
        size_t n = (size_t)p->rows;
        device_copy_in(l->codes + row * row_bytes, p->t.codes, n * row_bytes);
        device_copy_in(l->scale + row * row_scales, p->t.scale, n * row_scales * sizeof(float));
        if (l->zero) device_copy_in(l->zero + row * row_scales, p->t.zero, n * row_scales * sizeof(float));
    }
    return rc;
}

// Unpacks part i of a linear: working values and, where wscale is not NULL, row scales, at its rows.
static void unpack_part(const Linear *l, int i, floatX *work, float *wscale) {
    size_t row = 0;
    for (int j = 0; j < i; j++) row += (size_t)l->part[j].rows;
    const Part *p = &l->part[i];
    ops->dequant_rows(work + row * (size_t)l->C, wscale ? wscale + row : NULL, p->t.codes, p->t.scale, p->t.zero,
                      &p->spec,
                      p->rows, l->C);
}

static bool any_works_as_codes(const Linear *l) {
    for (int i = 0; i < l->n_parts; i++)
        if (quant_works_as_codes(&l->part[i].spec)) return true;
    return false;
}

// Loads tensors p[0..n) as one linear. keep_packed: leave codes as they are if all of them have any.
static int load_linear(Infer *s, Linear *l, const ModelFile *m, const Param *const *p, int n, bool keep_packed,
                       Err *err) {
    *l = (Linear){.C = (int)p[0]->cols, .n_parts = n};
    if (p[0]->role != ROLE_EMBED && quant_is_int8_rows(&p[0]->scheme.act)) l->integer = keep_packed = true;
    else if (p[0]->role != ROLE_EMBED && p[0]->scheme.act.bits) l->act = &p[0]->scheme.act;
    bool all_packed = true;
    for (int i = 0; i < n; i++) {
        Part *part = &l->part[i];
        part->rows = (int)p[i]->rows;
        part->spec = p[i]->scheme.weight;
        l->OC += part->rows;
        int packed = m->packed && part->spec.bits ? model_packed(m, p[i], &part->t, err) : 0;
        if (packed < 0) return packed;
        all_packed = all_packed && packed;
    }
    size_t bytes = 0;
    int rc = 0;
    if (all_packed && keep_packed) {
        for (int i = 0; i < n; i++) bytes += packed_bytes(&l->part[i], l->C);
        if (n > 1 || !device_is_host()) rc = join_parts(s, l, err);
        for (int i = 0; rc == 0 && i < n && !l->codes && !device_is_host(); i++)
            rc = part_to_device(&l->part[i], l->C, err);
    } else {
        rc = grab(s, &l->w, (size_t)l->OC, (size_t)l->C, sizeof(floatX), p[0]->name, err);
        if (rc == 0 && any_works_as_codes(l)) rc = grab(s, &l->wscale, (size_t)l->OC, sizeof(float), 1, "row scales",
                                                        err);
        size_t row = 0;
        for (int i = 0; rc == 0 && i < n; row += (size_t)l->part[i++].rows) {
            Part *part = &l->part[i];
            if (part->t.codes && !device_is_host()) rc = part_to_device(part, l->C, err);
            if (rc < 0) break;
            if (part->t.codes) unpack_part(l, i, l->w, l->wscale);
            else rc = load_floats(m, p[i], &part->spec, l->w + row * (size_t)l->C, l->wscale ? l->wscale + row : NULL,
                                  err);
        }
        bytes = (size_t)l->OC * ((size_t)l->C * sizeof(floatX) + (l->wscale ? sizeof(float) : 0));
    }
    if (l->w || l->codes)                        // the file's own are no longer read
        for (int i = 0; i < n; i++) part_free(&l->part[i]);
    s->model_bytes += bytes;
    if (p[0]->role == ROLE_EMBED) {
        s->embed_bytes = bytes;
        bytes /= (size_t)l->OC;                  // one row a token
    }
    s->token_bytes += bytes;
    return rc;
}

static int load_norm(Infer *s, floatX **w, const ModelFile *m, const Param *p, Err *err) {
    const QuantSpec none = {0};
    int rc = grab(s, w, (size_t)p->cols, sizeof(floatX), 1, p->name, err);
    if (rc == 0) rc = load_floats(m, p, &none, *w, NULL, err);
    s->model_bytes += (size_t)p->cols * sizeof(floatX);
    s->token_bytes += (size_t)p->cols * sizeof(floatX);
    return rc;
}

static int load_head(Infer *s, const ModelFile *m, Err *err) {
    if (!s->c.tied) {
        const Param *head = param_get(&s->table, -1, ROLE_HEAD);
        // Logits are f32 and qmatvec_forward's output is X, so the head's codes are unpacked, but for integer products.
        return load_linear(s, &s->head, m, &head, 1, false, err);
    }
    if (!s->plan.embedding.bits && !s->plan.tied_head.bits) {
        s->head = s->embed;
        s->token_bytes += s->embed_bytes;
        s->embed_bytes = 0;                      // one table, counted as the head
        return 0;
    }
    // The head's own view of the table, under the name of an untied head: the file knows what it holds for it.
    Param head = *param_get(&s->table, -1, ROLE_EMBED);
    const Param *p = &head;
    head.scheme = (QuantScheme){.weight = s->plan.tied_head};
    if (quant_is_int8_rows(&s->plan.tied_head) && quant_is_int8_rows(&s->plan.linear.act))
        head.scheme.act = s->plan.linear.act;    // as the other linears: integer products
    head.role = ROLE_HEAD;
    snprintf(head.name, sizeof head.name, "lm_head.weight");
    return load_linear(s, &s->head, m, &p, 1, false, err);
}

static int load_weights(Infer *s, const ModelFile *m, Err *err) {
    bool packed = s->arith == ARITH_SERVED;
    const Param *embed = param_get(&s->table, -1, ROLE_EMBED);
    int64_t block[2] = {1, 1};
    int rc = 0;
    if (embed->scheme.weight.bits) rc = quant_block_shape(&embed->scheme.weight, embed->rows, embed->cols, block, err);
    // Rows are unpacked as tokens come; a block of several rows is unpacked at once.
    if (embed->scheme.weight.bits) s->embed_row_scales = (size_t)(embed->cols / block[1]);
    if (rc == 0) rc = load_linear(s, &s->embed, m, &embed, 1, packed && block[0] == 1, err);
    for (int l = 0; rc == 0 && l < s->c.L; l++) {
        Block *b = &s->block[l];
        const Param *of[ROLE_COUNT];
        for (int r = ROLE_NORM1; r <= ROLE_DOWN; r++) of[r] = param_get(&s->table, l, (ParamRole)r);
        rc = load_norm(s, &b->norm1, m, of[ROLE_NORM1], err);
        if (rc == 0) rc = load_linear(s, &b->qkv, m, &of[ROLE_Q], 3, packed, err);
        if (rc == 0) rc = load_linear(s, &b->o, m, &of[ROLE_O], 1, packed, err);
        if (rc == 0) rc = load_norm(s, &b->norm2, m, of[ROLE_NORM2], err);
        if (rc == 0) rc = load_linear(s, &b->gateup, m, &of[ROLE_GATE], 2, packed, err);
        if (rc == 0) rc = load_linear(s, &b->down, m, &of[ROLE_DOWN], 1, packed, err);
    }
    if (rc == 0) rc = load_norm(s, &s->final_norm, m, param_get(&s->table, -1, ROLE_FINAL_NORM), err);
    if (rc == 0) rc = load_head(s, m, err);
    return rc;
}

static int make_buffers(Infer *s, Err *err) {
    const LlamaConfig *c = &s->c;
    size_t N = (size_t)s->max_N, heads = (size_t)c->NH + 2 * (size_t)c->NKV, HS = (size_t)c->HS, X = sizeof(floatX);
    size_t T = (size_t)s->max_T, widest = 0, largest = 0;
    for (int l = 0; l < c->L; l++) {
        const Linear *of[] = {&s->block[l].qkv, &s->block[l].o, &s->block[l].gateup, &s->block[l].down};
        for (size_t i = 0; i < sizeof of / sizeof *of; i++) {
            size_t size = (size_t)of[i]->OC * (size_t)of[i]->C;
            if (of[i]->integer) continue;
            if (!of[i]->w && (size_t)of[i]->OC > widest) widest = (size_t)of[i]->OC;
            if (!of[i]->w && size > largest) largest = size;
        }
    }
    const char *act = "activations";
    int rc = grab(s, &s->tokens, N, sizeof(int32_t), 1, act, err);
    if (rc == 0) rc = grab(s, &s->targets, N, sizeof(int32_t), 1, act, err);
    if (rc == 0) rc = grab(s, &s->rows, N, sizeof(int32_t), 1, act, err);
    if (rc == 0) rc = grab(s, &s->kv_rows, N, 2 * (size_t)c->NKV, sizeof(int32_t), act, err);
    if (rc == 0) rc = grab(s, &s->positions, T, sizeof(int32_t), 1, act, err);
    if (rc == 0) rc = grab(s, &s->cos_t, T, HS / 2, sizeof(float), act, err);
    if (rc == 0) rc = grab(s, &s->sin_t, T, HS / 2, sizeof(float), act, err);
    if (rc == 0) rc = grab(s, &s->res, N, (size_t)c->C, X, act, err);
    if (rc == 0) rc = grab(s, &s->delta, N, (size_t)c->C, X, act, err);
    if (rc == 0) rc = grab(s, &s->y, N, (size_t)c->C, X, act, err);
    if (rc == 0) rc = grab(s, &s->qkv, N, heads * HS, X, act, err);
    if (rc == 0) rc = grab(s, &s->att, N, (size_t)c->NH * HS, X, act, err);
    if (rc == 0) rc = grab(s, &s->gateup, N, 2 * (size_t)c->FF, X, act, err);
    if (rc == 0) rc = grab(s, &s->ffn, N, (size_t)c->FF, X, act, err);
    if (rc == 0) rc = grab(s, &s->losses, N, sizeof(float), 1, act, err);
    s->logit_rows = s->B < LOGIT_ROWS ? s->B : LOGIT_ROWS;
    if (rc == 0) rc = grab(s, &s->logits, (size_t)s->logit_rows, (size_t)c->V, sizeof(float), "logits", err);
    if (rc == 0 && largest) {
        // Prefill is the only reader; one token at a time never touches it.
        rc = grab(s, &s->unpacked, largest, X, 1, "an unpacked weight", err);
        if (rc == 0) rc = grab(s, &s->unpacked_scale, widest, sizeof(float), 1, "an unpacked weight", err);
    }
    for (int l = 0; rc == 0 && l < c->L; l++)
        rc = grab(s, &s->block[l].cache, (size_t)s->B * T, 2 * (size_t)c->NKV * HS, X, "the KV cache", err);
    if (rc < 0) return rc;

    int32_t *index = xmalloc((N * 2 * (size_t)c->NKV > T ? N * 2 * (size_t)c->NKV : T) * sizeof *index);
    for (size_t n = 0, i = 0; n < N; n++)
        for (size_t j = 0; j < 2 * (size_t)c->NKV; j++) index[i++] = (int32_t)(n * heads + (size_t)c->NH + j);
    device_copy_in(s->kv_rows, index, N * 2 * (size_t)c->NKV * sizeof *index);
    for (size_t t = 0; t < T; t++) index[t] = (int32_t)t;
    device_copy_in(s->positions, index, T * sizeof *index);
    free(index);

    float *table = xmalloc(2 * T * (HS / 2) * sizeof *table);
    llama_rope_table(table, table + T * (HS / 2), c, s->max_T);
    device_copy_in(s->cos_t, table, T * (HS / 2) * sizeof *table);
    device_copy_in(s->sin_t, table + T * (HS / 2), T * (HS / 2) * sizeof *table);
    free(table);
    return 0;
}

int infer_new(Infer **out, const ModelFile *m, int B, int max_T, int max_N, Arithmetic arith, bool as_float, Err *err) {
    *out = NULL;
    if (B < 1 || max_T < 1 || max_N < B)
        return err_set(err, E_USAGE, "a batch of %d, a context of %d and %d tokens a call: each must be at least 1, and a "
                       "call holds a token of every sequence", B, max_T, max_N);
    if (as_float && m->packed)
        return err_set(err, E_USAGE, "%s holds codes only: it cannot run as the float model it was made from; give "
                                     "that model", m->path);
    // kv_rows holds indices up to max_N * heads.
    if ((int64_t)max_N * (m->config.NH + 2 * (int64_t)m->config.NKV) > INT32_MAX)
        return err_set(err, E_USAGE, "%d tokens a call are too many for %d heads; use fewer", max_N, m->config.NH);
    Infer *s = xcalloc(1, sizeof *s);
    s->c = m->config;
    s->arith = arith;
    s->B = s->n = B;
    s->max_T = max_T;
    s->max_N = max_N;
    if (as_float) quant_plan_none(&s->plan);
    else s->plan = m->plan;
    s->block = xcalloc((size_t)s->c.L, sizeof *s->block);
    int rc = param_table_build(&s->table, &s->c, &s->plan, err);
    if (rc == 0) rc = load_weights(s, m, err);
    if (rc == 0) rc = make_buffers(s, err);
    if (rc == 0) rc = device_sync(err);
    if (rc < 0) {
        infer_free(s);
        return rc;
    }
    *out = s;
    return 0;
}

static void linear_free(Linear *l) {
    for (int i = 0; i < l->n_parts; i++) part_free(&l->part[i]);
}

void infer_free(Infer *s) {
    if (!s) return;
    for (int l = 0; l < s->c.L; l++) {
        linear_free(&s->block[l].qkv);
        linear_free(&s->block[l].o);
        linear_free(&s->block[l].gateup);
        linear_free(&s->block[l].down);
    }
    linear_free(&s->embed);
    linear_free(&s->head);
    for (int i = 0; i < s->n_owned; i++) device_free(s->owned[i]);
    free(s->owned);
    free(s->block);
    param_table_free(&s->table);
    free(s);
}

void infer_reset(Infer *s, int n) {
    s->n = n < 1 ? 1 : n > s->B ? s->B : n;
    s->pos = 0;
}

// A gather of rows is what embedding_forward does, whatever the table: here positions of sequence 0.
void infer_fork(Infer *s, int n) {
    int width = 2 * s->c.NKV * s->c.HS;
    s->n = n < 1 ? 1 : n > s->B ? s->B : n;
    for (int l = 0; l < s->c.L && s->pos > 0; l++) {
        floatX *cache = s->block[l].cache;
        for (int b = 1; b < s->n; b++)
            ops->embedding_forward(cache + (size_t)b * (size_t)s->max_T * (size_t)width, s->positions, cache,
                                   (size_t)s->pos, width, s->pos);
    }
}

int infer_position(const Infer *s) { return s->pos; }
size_t infer_model_bytes(const Infer *s) { return s->model_bytes; }
size_t infer_size_bytes(const Infer *s) { return s->model_bytes - s->embed_bytes; }
size_t infer_bytes_per_token(const Infer *s) { return s->token_bytes; }
size_t infer_cache_bytes_per_position(const Infer *s) {
    return (size_t)s->c.L * 2 * (size_t)s->c.NKV * (size_t)s->c.HS * sizeof(floatX);
}
size_t infer_cache_bytes(const Infer *s) { return infer_cache_bytes_per_position(s) * (size_t)s->B * (size_t)s->max_T; }
size_t infer_memory_bytes(const Infer *s) { return s->memory; }

// ---------------------------------------------------------------------------------------------
// Forward.

static void embed(Infer *s, const int32_t *tokens, size_t N) {
    const Linear *e = &s->embed;
    if (e->w) {
        ops->embedding_forward(s->res, s->tokens, e->w, N, e->C, e->OC);
        return;
    }
    const Part *p = &e->part[0];
    const uint8_t *codes = e->codes ? e->codes : p->t.codes;
    const float *scale = e->codes ? e->scale : p->t.scale, *zero = e->codes ? e->zero : p->t.zero;
    size_t row_bytes = quant_row_bytes(p->spec.bits, e->C), row_scales = s->embed_row_scales;
    for (size_t n = 0; n < N; n++) {
        size_t row = (size_t)tokens[n];
        ops->dequant_rows(s->res + n * (size_t)e->C, NULL, codes + row * row_bytes, scale + row * row_scales,
                          zero ? zero + row * row_scales : NULL, &p->spec, 1, e->C);
    }
}

// INT8 rows of a linear of integer products.
static const int8_t *int8_codes(const Linear *l) { return (const int8_t *)(l->codes ? l->codes : l->part[0].t.codes); }
static const float *int8_scale(const Linear *l) { return l->codes ? l->scale : l->part[0].t.scale; }

// y (N, OC) = x (N, C) . w^T, in the form the weight is held in.
static void linear(Infer *s, floatX *y, const floatX *x, const Linear *l, size_t N) {
    if (l->w) {
        ops->linear_forward(y, x, l->w, l->wscale, N, l->C, l->OC);
        return;
    }
    if (l->integer) {
        ops->linear_i8_forward(y, x, int8_codes(l), int8_scale(l), N, l->C, l->OC);
        return;
    }
    size_t OC = (size_t)l->OC;
    if (N > MATVEC_MAX_N) {
        float *wscale = any_works_as_codes(l) ? s->unpacked_scale : NULL;
        if (l->codes) ops->dequant_rows(s->unpacked, wscale, l->codes, l->scale, l->zero, &l->part[0].spec, l->OC,
                                        l->C);
        else for (int i = 0; i < l->n_parts; i++) unpack_part(l, i, s->unpacked, wscale);
        ops->linear_forward(y, x, s->unpacked, wscale, N, l->C, l->OC);
        return;
    }
    if (l->codes) {
        ops->qmatvec_forward(y, x, l->codes, l->scale, l->zero, &l->part[0].spec, N, l->C, l->OC);
        return;
    }
    size_t column = 0;
    for (int i = 0; i < l->n_parts; i++) {
        const Part *p = &l->part[i];
        // A part's columns of several tokens do not lie side by side: token by token then.
        size_t together = l->n_parts == 1 ? N : 1;
        for (size_t n = 0; n < N; n += together)
            ops->qmatvec_forward(y + n * OC + column, x + n * (size_t)l->C, p->t.codes, p->t.scale, p->t.zero, &p->spec,
                                 together, l->C, p->rows);
        column += (size_t)p->rows;
    }
}

// The keys and values of each new token go to their position. Seen as rows of HS values, row n of qkv has its NH query
// heads, then NKV keys, then NKV values: kv_rows lists the latter, so that a gather writes them one after the other.
static void append_to_cache(Infer *s, floatX *cache, int T) {
    const LlamaConfig *c = &s->c;
    int heads = c->NH + 2 * c->NKV, width = 2 * c->NKV * c->HS;
    for (int b = 0; b < s->n; b++)
        ops->embedding_forward(cache + ((size_t)b * (size_t)s->max_T + (size_t)s->pos) * (size_t)width, s->kv_rows,
                               s->qkv + (size_t)b * (size_t)T * (size_t)(heads * c->HS),
                                   (size_t)T * 2 * (size_t)c->NKV, c->HS,
                               T * heads);
}

static void forward_blocks(Infer *s, int T) {
    const LlamaConfig *c = &s->c;
    size_t N = (size_t)s->n * (size_t)T;
    int HS = c->HS, ldqkv = (c->NH + 2 * c->NKV) * HS, ldkv = 2 * c->NKV * HS;
    for (int l = 0; l < c->L; l++) {
        Block *b = &s->block[l];
        floatX *res = l ? s->res : NULL, *delta = l ? s->delta : NULL;       // nothing to add before the first block
        ops->rmsnorm_fq_forward(res, s->y, NULL, NULL, s->res, delta, b->norm1, N, c->C, c->norm_eps, b->qkv.act);
        linear(s, s->qkv, s->y, &b->qkv, N);
        ops->rope(s->qkv, s->cos_t, s->sin_t, N, T, s->pos, ldqkv, c->NH + c->NKV, HS, false);
        append_to_cache(s, b->cache, T);
        ops->attention_forward(s->att, NULL, s->qkv, b->cache, b->cache + c->NKV * HS, s->n, T, s->pos + T, c->NH,
                               c->NKV, HS,
                               c->NH * HS, ldqkv, ldkv, (size_t)s->max_T * (size_t)ldkv);
        if (b->o.act) ops->fakequant_forward(s->att, NULL, s->att, N, c->NH * HS, b->o.act);
        linear(s, s->delta, s->att, &b->o, N);

        ops->rmsnorm_fq_forward(s->res, s->y, NULL, NULL, s->res, s->delta, b->norm2, N, c->C, c->norm_eps,
                                b->gateup.act);
        linear(s, s->gateup, s->y, &b->gateup, N);
        ops->swiglu_fq_forward(s->ffn, NULL, s->gateup, N, c->FF, b->down.act);
        linear(s, s->delta, s->ffn, &b->down, N);
    }
    ops->rmsnorm_fq_forward(s->res, s->y, NULL, NULL, s->res, s->delta, s->final_norm, N, c->C, c->norm_eps,
                            s->head.act);
}

// Runs the head over the n rows of y listed in host_rows, in pieces. The residual stream is not needed any more: its
// buffer takes the gathered rows.
static void head_piece(Infer *s, const int32_t *rows, size_t n, size_t N) {
    const LlamaConfig *c = &s->c;
    device_copy_in(s->rows, rows, n * sizeof *rows);
    ops->embedding_forward(s->res, s->rows, s->y, n, c->C, (int)N);
    const Linear *h = &s->head;
    if (h->integer) ops->linear_i8_forward_f32(s->logits, s->res, int8_codes(h), int8_scale(h), n, c->C, c->V);
    else ops->linear_forward_f32(s->logits, s->res, h->w, h->wscale, n, c->C, c->V);
}

static int check_ids(const Infer *s, const int32_t *ids, size_t n, const char *what, bool negative_ok, Err *err) {
    for (size_t i = 0; i < n; i++)
        if (ids[i] >= s->c.V || (ids[i] < 0 && !negative_ok))
            return err_set(err, E_USAGE, "%s %zu is %d, but the vocabulary has ids 0 to %d: is this the model's own "
                                         "tokenizer?",
                           what, i, ids[i], s->c.V - 1);
    return 0;
}

int infer_forward(Infer *s, const int32_t *tokens, const int32_t *targets, int T, float *logits, float *losses,
                  Err *err) {
    const LlamaConfig *c = &s->c;
    if (T < 1 || T > s->max_N / s->n)
        return err_set(err, E_USAGE, "%d tokens for each of %d sequences: this model was loaded for 1 to %d tokens a "
                                     "call", T, s->n, s->max_N);
    if (T > s->max_T - s->pos)
        return err_set(err, E_USAGE, "%d tokens after the %d in the cache do not fit the context of %d; use a longer "
                                     "one (--ctx)",
                       T, s->pos, s->max_T);
    size_t N = (size_t)s->n * (size_t)T;
    int rc = check_ids(s, tokens, N, "token", false, err);
    if (rc == 0 && losses) {
        if (!targets) return err_set(err, E_USAGE, "losses need targets");
        rc = check_ids(s, targets, N, "target", true, err);
    }
    if (rc < 0) return rc;
    if (losses && s->logit_rows < LOGIT_ROWS && s->logit_rows < s->max_N) {
        int rows = s->max_N < LOGIT_ROWS ? s->max_N : LOGIT_ROWS;
        rc = grab(s, &s->logits, (size_t)rows, (size_t)c->V, sizeof(float), "logits", err);
        if (rc < 0) return rc;
        s->logit_rows = rows;
    }
    device_copy_in(s->tokens, tokens, N * sizeof *tokens);
    embed(s, tokens, N);
    forward_blocks(s, T);

    size_t piece = (size_t)s->logit_rows;
    int32_t rows[LOGIT_ROWS];
    for (size_t b = 0; logits && b < (size_t)s->n;) {
        size_t n = 0;
        for (; n < piece && b + n < (size_t)s->n; n++) rows[n] = (int32_t)((b + n + 1) * (size_t)T - 1);
        head_piece(s, rows, n, N);
        device_copy_out(logits + b * (size_t)c->V, s->logits, n * (size_t)c->V * sizeof(float));
        b += n;
    }
    for (size_t i = 0; losses && i < N;) {
        int32_t wanted[LOGIT_ROWS];
        float loss[LOGIT_ROWS];
        size_t n = 0;
        for (; n < piece && i < N; i++) {
            losses[i] = 0.0f;
            if (targets[i] < 0) continue;
            rows[n] = (int32_t)i;
            wanted[n++] = targets[i];
        }
        if (n == 0) break;
        head_piece(s, rows, n, N);
        device_copy_in(s->targets, wanted, n * sizeof *wanted);
        ops->classifier(s->losses, NULL, s->logits, s->targets, n, c->V);
        device_copy_out(loss, s->losses, n * sizeof *loss);
        for (size_t k = 0; k < n; k++) losses[rows[k]] = loss[k];
    }
    rc = device_sync(err);
    if (rc < 0) return rc;
    s->pos += T;
    return 0;
}
