// The Llama forward for serving: the trainer's operations, one call after the other, over a KV cache.
#include "infer.h"
#include <stdlib.h>
#include <string.h>
#include "device.h"
#include "served_cache.h"

enum {
    MATVEC_MAX_N = 8,             // most tokens that matvec_forward takes
    LOGIT_ROWS = 512,             // rows of logits that exist at one time
    STAGE_ELEMENTS = 1 << 22,     // values that pass through the loader at one time
    ARENA_FIRST = 1 << 18, ARENA_MOST = 1 << 24      // bytes
};

// One matmul: one tensor, or two or three that read the same input, their rows one after the other. Its weight is held
// in one of three forms.
typedef struct { PackedTensor t; QuantSpec spec; int rows; bool on_device; } Part;
typedef struct {
    int C, OC;
    QuantSpec spec;               // of packed codes
    const QuantSpec *act;         // quantization of the input; NULL: none
    const QuantSpec *fq;          // the same where the producer of the input does it, as in training
    bool integer;                 // integer products of INT8 training: codes in both arithmetics
    floatX *w;                    // (OC, C) X working values
    float *wscale;                // (OC) f32, NULL: no row works as codes
    void *served;                 // served form (ops.h)
    Part part[3]; int n_parts;    // what the file holds
    uint8_t *codes;               // (OC, row bytes) and their scales joined; NULL: part 0 is all
    float *scale, *zero;
} Linear;

typedef struct {
    floatX *norm1, *norm2;        // (C) X
    Linear qkv, o, gateup, down;
    KvCache cache;
} Block;

struct Infer {
    LlamaConfig c;
    QuantPlan plan;
    ParamTable table;
    Arithmetic arith;
    KvFormat kv;
    int B, max_T, max_N;
    int n, pos;                   // sequences now, and tokens of each in the cache

    Linear embed;                 // (V, C) X, or codes that are unpacked row by row
    Block *block;                 // L
    floatX *final_norm;           // (C) X
    Linear head;                  // (V, C); may share embed's values

    DecodeState *state;           // pos above, where operations read it; token and draw of infer_next
    int32_t *tokens, *targets;    // (max_N) i32
    int32_t *rows;                // (max_N) i32: rows of y that the head reads
    int32_t *positions;           // (max_T) i32: 0, 1, 2, ...
    float *cos_t, *sin_t;         // (max_T, HS/2) f32
    floatX *res, *delta, *y;      // (max_N, C) X: residual stream, what a sublayer adds to it, normalized
    floatX *qkv;                  // (max_N, (NH + 2*NKV) * HS) X
    floatX *att;                  // (max_N, NH*HS) X
    floatX *gateup, *ffn;         // (max_N, 2*FF), (max_N, FF) X
    float *logits; int logit_rows;// (logit_rows, V) f32, made longer when losses are first asked for
    float *losses;                // (max_N) f32

    void **owned; int n_owned;    // everything from device_alloc
    uint64_t id;                  // no other model of this process has it
    char *arena; size_t arena_left, arena_next;      // what smaller buffers are cut from
    const char *cache_path; Safetensors kept;        // served forms of an earlier run, where kept.tensors is not NULL
    ServedForm *made; int n_made; bool made_new;     // those of this run, while loading, and whether one was not kept
    float *stage, *stage_dev; size_t stage_bytes;    // while loading
    size_t memory, model_bytes, token_bytes, embed_bytes;
};

#ifdef __SANITIZE_ADDRESS__
enum { ONE_BUFFER_EACH = 1 };     // so that a step beyond one is seen
#else
enum { ONE_BUFFER_EACH = 0 };
#endif

static int own_new(Infer *s, void **out, size_t bytes, const char *what, Err *err) {
    void *p;
    int rc = device_alloc(&p, bytes, what, err);
    if (rc < 0) return rc;
    void **more = realloc(s->owned, (size_t)(s->n_owned + 1) * sizeof *more);
    if (!more) {
        device_free(p);
        return err_set(err, E_NOMEM, "%s: out of memory", what);
    }
    s->owned = more;
    s->owned[s->n_owned++] = p;
    *out = p;
    return 0;
}

// Zeroed device memory of a * b * c bytes. Smaller buffers share allocations that grow with their number: a model of
// hundreds of them then lies in large pages, which are sooner there and sooner walked.
static int grab(Infer *s, void *out, size_t a, size_t b, size_t c, const char *what, Err *err) {
    size_t bytes, padded;
    if (!mul_size(a, b, &bytes) || !mul_size(bytes, c, &bytes) || !add_size(bytes, 255, &padded))
        return err_set(err, E_NOMEM, "%s: the size overflows; use a smaller context or batch", what);
    void *p = NULL;
    int rc = 0;
    padded = padded / 256 * 256 + (bytes == 0 ? 256 : 0);
    if (padded > ARENA_MOST / 4 || ONE_BUFFER_EACH) {
        rc = own_new(s, &p, bytes ? bytes : 1, what, err);
    } else {
        if (padded > s->arena_left) {
            size_t size = s->arena_next < ARENA_FIRST ? ARENA_FIRST : s->arena_next;
            while (size < padded) size *= 2;
            rc = own_new(s, &p, size, what, err);
            if (rc < 0) return rc;
            s->arena = p;
            s->arena_left = size;
            s->arena_next = size < ARENA_MOST ? 2 * size : size;
        }
        p = s->arena;
        s->arena += padded;
        s->arena_left -= padded;
    }
    if (rc < 0) return rc;
    s->memory += bytes;
    memcpy(out, &p, sizeof p);
    return 0;
}

// ---------------------------------------------------------------------------------------------
// Loading.

static void free_stage(Infer *s) {
    if (s->stage && !device_is_host()) device_free(s->stage_dev);
    free(s->stage);
    s->stage = s->stage_dev = NULL;
    s->stage_bytes = 0;
}

// Where floats pass on their way to working values: on the host, one place is both ends.
static int make_stage(Infer *s, size_t bytes, Err *err) {
    if (bytes <= s->stage_bytes) return 0;
    free_stage(s);
    void *host, *dev = NULL;
    int rc = big_alloc(&host, bytes, "a piece of a tensor", err);
    if (rc < 0) return rc;
    if (!device_is_host()) rc = device_alloc(&dev, bytes, "a piece of a tensor", err);
    s->stage = host;
    s->stage_dev = dev ? dev : host;
    s->stage_bytes = bytes;
    return rc;
}

// Working values from floats: what the trainer makes of its masters.
static int load_floats(Infer *s, const ModelFile *m, const Param *p, const QuantSpec *spec, floatX *work, float *wscale,
                       Err *err) {
    int64_t block[2] = {1, p->cols};
    if (spec->bits) {
        int rc = quant_block_shape(spec, p->rows, p->cols, block, err);
        if (rc < 0) return rc;
    }
    int64_t step = STAGE_ELEMENTS / p->cols / block[0] * block[0];       // whole blocks
    if (step < block[0]) step = block[0];
    if (step > p->rows) step = p->rows;
    int rc = make_stage(s, (size_t)step * (size_t)p->cols * sizeof(float), err);
    for (int64_t r = 0; rc == 0 && r < p->rows; r += step) {
        int64_t n = p->rows - r < step ? p->rows - r : step;
        rc = model_read_rows(m, p, r, n, s->stage, err);
        if (rc < 0) break;
        if (s->stage_dev != s->stage)
            device_copy_in(s->stage_dev, s->stage, (size_t)n * (size_t)p->cols * sizeof(float));
        ops->weight_fq(work + r * p->cols, wscale ? wscale + r : NULL, s->stage_dev, spec, n, p->cols);
    }
    return rc;
}

// The n tensors p as working values where the file is mapped: of the host's own type, not quantized, one after the
// other. 1 and *w; 0: they are not.
static int values_in_place(floatX **w, const ModelFile *m, const Param *const *p, int n, Err *err) {
    const char *first = NULL, *end = NULL;
    for (int i = 0; i < n; i++) {
        const void *data;
        if (!device_is_host() || (p[i]->scheme.weight.bits && !param_is_norm(p[i]))) return 0;
        int rc = model_values(m, p[i], sizeof(floatX) == 2 ? DT_BF16 : DT_F32, &data, err);
        if (rc <= 0) return rc;
        if (i == 0) first = data;
        else if ((const char *)data != end) return 0;
        end = (const char *)data + (size_t)p[i]->rows * (size_t)p[i]->cols * sizeof(floatX);
    }
    *w = (floatX *)(uintptr_t)first;
    return 1;
}

// Working values of p from the file's floats: the bytes themselves where they are of the host's own type.
static int load_values(Infer *s, const ModelFile *m, const Param *p, const QuantSpec *spec, floatX *work,
                       float *wscale, Err *err) {
    const void *data;
    int rc = device_is_host() && !spec->bits && !wscale
                 ? model_values(m, p, sizeof(floatX) == 2 ? DT_BF16 : DT_F32, &data, err) : 0;
    if (rc == 0) return load_floats(s, m, p, spec, work, wscale, err);
    if (rc < 0) return rc;
    device_copy_in(work, data, (size_t)p->rows * (size_t)p->cols * sizeof *work);
    model_done(m, p);
    return 0;
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

// Puts the parts' codes and scales one after the other: what INT8 training's integer products read.
static int join_parts(Infer *s, Linear *l, Err *err) {
    size_t row_bytes = quant_row_bytes(l->spec.bits, l->C), row = 0;
    int rc = grab(s, &l->codes, (size_t)l->OC, row_bytes, 1, "packed weights", err);
    if (rc == 0) rc = grab(s, &l->scale, (size_t)l->OC, 1, sizeof(float), "scales", err);
    for (int i = 0; rc == 0 && i < l->n_parts; row += (size_t)l->part[i++].rows) {
        Part *p = &l->part[i];
        device_copy_in(l->codes + row * row_bytes, p->t.codes, (size_t)p->rows * row_bytes);
        device_copy_in(l->scale + row, p->t.scale, (size_t)p->rows * sizeof(float));
    }
    return rc;
}

// Unpacks part i of a linear: working values and, where wscale is not NULL, row scales, at its rows.
static void unpack_part(const Linear *l, int i, floatX *work, float *wscale) {
    size_t row = 0;
    for (int j = 0; j < i; j++) row += (size_t)l->part[j].rows;
    const Part *p = &l->part[i];
    ops->dequant_rows(work + row * (size_t)l->C, wscale ? wscale + row : NULL, p->t.codes, p->t.scale, p->t.zero,
                      &p->spec, p->rows, l->C);
}

static bool any_works_as_codes(const Linear *l) {
    for (int i = 0; i < l->n_parts; i++)
        if (quant_works_as_codes(&l->part[i].spec)) return true;
    return false;
}

// Remembers a served form for the file that keeps them.
static void note_served(Infer *s, const Linear *l, const char *name, size_t bytes) {
    if (!s->cache_path) return;
    ServedForm *more = realloc(s->made, (size_t)(s->n_made + 1) * sizeof *more);
    char *own_name = xstrdup(name);              // a tied head's name is its loader's
    if (!more) {
        free(own_name);
        s->made_new = false;                     // there is room for the model only: nothing will be kept
        return;
    }
    s->made = more;
    s->made[s->n_made++] = (ServedForm){own_name, l->served, bytes};
}

static void forget_served(Infer *s) {
    for (int i = 0; i < s->n_made; i++) free((char *)(uintptr_t)s->made[i].name);
    free(s->made);
    s->made = NULL;
    s->n_made = 0;
}

// The served form, made of the parts one after the other. 0 and l->served NULL: there is none, because parts differ in
// their scheme or the wing has no such form.
static int make_served(Infer *s, Linear *l, const ModelFile *m, const Param *const *params, Err *err) {
    const char *name = params[0]->name;
    for (int i = 1; i < l->n_parts; i++)
        if (!quant_spec_equal(&l->part[i].spec, &l->spec)) return 0;
    size_t bytes = ops->served_bytes(&l->spec, l->act, l->OC, l->C);
    if (bytes == 0) return 0;
    const void *kept = s->kept.tensors ? served_cache_find(&s->kept, name, bytes) : NULL;
    if (kept) {
        l->served = (void *)(uintptr_t)kept;
        for (int i = 0; i < l->n_parts; i++) part_free(&l->part[i]);
        note_served(s, l, name, bytes);
        return 0;
    }
    s->made_new = true;
    int rc = grab(s, &l->served, bytes, 1, 1, "packed weights", err);
    int64_t row = 0;
    for (int i = 0; rc == 0 && i < l->n_parts; row += l->part[i++].rows) {
        Part *p = &l->part[i];
        if (!device_is_host()) rc = part_to_device(p, l->C, err);
        if (rc == 0) ops->served_pack(l->served, p->t.codes, p->t.scale, p->t.zero, &l->spec, l->act, row, p->rows,
                                      l->OC, l->C);
        part_free(p);                            // on a device: in order, after what reads it
        if (rc == 0 && device_is_host()) model_done(m, params[i]);
    }
    if (rc == 0) note_served(s, l, name, bytes);
    return rc;
}

static int load_working_values(Infer *s, Linear *l, const ModelFile *m, const Param *const *p, Err *err) {
    // What is streamed once a token is copied out of the map all the same: the processor does not read ahead from one
    // small page of a file to the next (0.73 of the read bandwidth against 0.79 from large ones).
    bool streamed = s->arith == ARITH_SERVED && (p[0]->role != ROLE_EMBED || s->c.tied);
    int rc = streamed ? 0 : values_in_place(&l->w, m, p, l->n_parts, err);
    if (rc != 0) return rc < 0 ? rc : 0;
    rc = grab(s, &l->w, (size_t)l->OC, (size_t)l->C, sizeof(floatX), p[0]->name, err);
    if (rc == 0 && any_works_as_codes(l)) rc = grab(s, &l->wscale, (size_t)l->OC, sizeof(float), 1, "row scales", err);
    size_t row = 0;
    for (int i = 0; rc == 0 && i < l->n_parts; row += (size_t)l->part[i++].rows) {
        Part *part = &l->part[i];
        if (part->t.codes && !device_is_host()) rc = part_to_device(part, l->C, err);
        if (rc < 0) break;
        if (part->t.codes) unpack_part(l, i, l->w, l->wscale);
        else rc = load_values(s, m, p[i], &part->spec, l->w + row * (size_t)l->C,
                              l->wscale ? l->wscale + row : NULL, err);
        part_free(part);
    }
    return rc;
}

// Loads tensors p[0..n) as one linear. keep_packed: leave codes as they are if all of them have any.
static int load_linear(Infer *s, Linear *l, const ModelFile *m, const Param *const *p, int n, bool keep_packed,
                       Err *err) {
    bool embedding = p[0]->role == ROLE_EMBED;
    *l = (Linear){.C = (int)p[0]->cols, .n_parts = n, .spec = p[0]->scheme.weight};
    if (!embedding && quant_is_int8_rows(&p[0]->scheme.act)) l->integer = keep_packed = true;
    else if (!embedding && p[0]->scheme.act.bits) l->act = &p[0]->scheme.act;
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
        if (embedding || l->integer) {
            if (n > 1) rc = join_parts(s, l, err);
            else if (!device_is_host()) rc = part_to_device(&l->part[0], l->C, err);
        } else {
            rc = make_served(s, l, m, p, err);
        }
    }
    if (rc == 0 && !(all_packed && keep_packed && (embedding || l->integer || l->served))) {
        l->fq = l->act;
        rc = load_working_values(s, l, m, p, err);
        bytes = (size_t)l->OC * ((size_t)l->C * sizeof(floatX) + (l->wscale ? sizeof(float) : 0));
    }
    if (rc == 0 && l->codes)                     // the file's own are no longer read
        for (int i = 0; i < n; i++) part_free(&l->part[i]);
    s->model_bytes += bytes;
    if (embedding) {
        s->embed_bytes = bytes;
        bytes /= (size_t)l->OC;                  // one row a token
    }
    s->token_bytes += bytes;
    return rc;
}

static int load_norm(Infer *s, floatX **w, const ModelFile *m, const Param *p, Err *err) {
    const QuantSpec none = {0};
    int rc = values_in_place(w, m, &p, 1, err);
    if (rc == 0) {
        rc = grab(s, w, (size_t)p->cols, sizeof(floatX), 1, p->name, err);
        if (rc == 0) rc = load_floats(s, m, p, &none, *w, NULL, err);
    }
    if (rc < 0) return rc;
    s->model_bytes += (size_t)p->cols * sizeof(floatX);
    s->token_bytes += (size_t)p->cols * sizeof(floatX);
    return 0;
}

static int load_head(Infer *s, const ModelFile *m, Err *err) {
    if (!s->c.tied) {
        const Param *head = param_get(&s->table, -1, ROLE_HEAD);
        return load_linear(s, &s->head, m, &head, 1, s->arith == ARITH_SERVED, err);
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
    return load_linear(s, &s->head, m, &p, 1, s->arith == ARITH_SERVED, err);
}

static int load_weights(Infer *s, const ModelFile *m, Err *err) {
    bool packed = s->arith == ARITH_SERVED;
    const Param *embed = param_get(&s->table, -1, ROLE_EMBED);
    int64_t block[2] = {1, 1};
    int rc = 0;
    if (embed->scheme.weight.bits) rc = quant_block_shape(&embed->scheme.weight, embed->rows, embed->cols, block, err);
    // Rows are unpacked as tokens come; a block of several rows is unpacked at once.
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

static int make_caches(Infer *s, Err *err) {
    const LlamaConfig *c = &s->c;
    size_t heads = (size_t)s->B * (size_t)s->max_T * 2 * (size_t)c->NKV;
    int rc = 0;
    for (int l = 0; rc == 0 && l < c->L; l++) {
        KvCache *k = &s->block[l].cache;
        *k = (KvCache){.format = s->kv, .max_T = s->max_T, .NKV = c->NKV, .HS = c->HS};
        rc = grab(s, &k->values, heads, (size_t)c->HS, s->kv == KV_INT8 ? 1 : sizeof(floatX), "the KV cache", err);
        if (rc == 0 && s->kv == KV_INT8) rc = grab(s, &k->scale, heads, sizeof(float), 1, "the KV cache's scales", err);
    }
    return rc;
}

static int make_buffers(Infer *s, Err *err) {
    const LlamaConfig *c = &s->c;
    size_t N = (size_t)s->max_N, heads = (size_t)c->NH + 2 * (size_t)c->NKV, HS = (size_t)c->HS, X = sizeof(floatX);
    size_t T = (size_t)s->max_T;
    const char *act = "activations";
    int rc = grab(s, &s->state, 1, sizeof *s->state, 1, act, err);
    if (rc == 0) rc = grab(s, &s->tokens, N, sizeof(int32_t), 1, act, err);
    if (rc == 0) rc = grab(s, &s->targets, N, sizeof(int32_t), 1, act, err);
    if (rc == 0) rc = grab(s, &s->rows, N, sizeof(int32_t), 1, act, err);
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
    if (rc == 0) rc = make_caches(s, err);
    if (rc < 0) return rc;

    int32_t *index = xmalloc(T * sizeof *index);
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

int infer_new(Infer **out, const ModelFile *m, const InferOptions *o, Err *err) {
    *out = NULL;
    if (o->cache_err) *o->cache_err = (Err){0};
    if (o->B < 1 || o->max_T < 1 || o->max_N < o->B)
        return err_set(err, E_USAGE, "a batch of %d, a context of %d and %d tokens a call: each must be at least 1, and a "
                       "call holds a token of every sequence", o->B, o->max_T, o->max_N);
    if (o->max_N > INT32_MAX / (m->config.NH + 2 * m->config.NKV))       // rows of heads are counted in int
        return err_set(err, E_USAGE, "%d tokens a call are too many for %d heads; use fewer", o->max_N, m->config.NH);
    if (o->as_float && m->packed)
        return err_set(err, E_USAGE, "%s holds codes only: it cannot run as the float model it was made from; give "
                                     "that model", m->path);
    if (o->kv == KV_INT8 && o->arith == ARITH_TRAINED)
        return err_set(err, E_USAGE, "an INT8 cache is not what training computes with: use served arithmetic with it");
    static uint64_t models;
    Infer *s = xcalloc(1, sizeof *s);
    s->id = ++models;
    s->c = m->config;
    s->arith = o->arith;
    s->kv = o->kv;
    s->B = s->n = o->B;
    s->max_T = o->max_T;
    s->max_N = o->max_N;
    if (o->as_float) quant_plan_none(&s->plan);
    else s->plan = m->plan;
    s->block = xcalloc((size_t)s->c.L, sizeof *s->block);
    int rc = param_table_build(&s->table, &s->c, &s->plan, err);
    // A kept file knows its model by the checksum, which --no-verify does not compare.
    bool known = !(m->flags & MODEL_NO_VERIFY);
    if (o->cache_path && known && o->arith == ARITH_SERVED && device_is_host() && m->packed) {
        s->cache_path = o->cache_path;
        if (!served_cache_open(&s->kept, o->cache_path, m)) s->kept = (Safetensors){0};
    } else if (o->cache_path && o->cache_err) {
        err_set(o->cache_err, E_USAGE, "%s", !m->packed ? "the model is not packed: its floats are read as they are" :
                o->arith != ARITH_SERVED ? "only served arithmetic reads weights in an order of its own" :
                !known ? "a kept file knows its model by the checksum" : "a GPU's order is not kept");
    }
    if (rc == 0) rc = load_weights(s, m, err);
    free_stage(s);
    if (rc == 0 && s->made_new && s->n_made && o->cache_err)
        served_cache_write(s->cache_path, m, s->made, s->n_made, o->cache_err);
    forget_served(s);
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
    if (s->kept.tensors) safetensors_close(&s->kept);
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

// A gather of rows is what embedding_forward does, whatever the table and whatever the bytes mean: here positions of
// each of the m sequences, `bytes` each, from the last sequence on, so that none is written over before it is read.
static void fork_rows(Infer *s, void *rows, size_t bytes, int m, int copies) {
    size_t width = bytes / sizeof(floatX), all = (size_t)s->max_T * width;
    for (int to = m * copies - 1; to > 0; to--)
        if (to / copies != to)
            ops->embedding_forward((floatX *)rows + (size_t)to * all, s->positions,
                                   (floatX *)rows + (size_t)(to / copies) * all, (size_t)s->pos, (int)width, s->pos);
}

void infer_fork(Infer *s, int copies) {
    size_t heads = 2 * (size_t)s->c.NKV;
    int m = s->n, most = s->B / m;
    copies = copies < 1 ? 1 : copies > most ? most : copies;
    s->n = m * copies;
    for (int l = 0; l < s->c.L && s->pos > 0; l++) {
        KvCache *k = &s->block[l].cache;
        fork_rows(s, k->values, heads * (size_t)k->HS * (s->kv == KV_INT8 ? 1 : sizeof(floatX)), m, copies);
        if (k->scale) fork_rows(s, k->scale, heads * sizeof(float), m, copies);
    }
}

void infer_rewind(Infer *s, int position) {
    if (position >= 0 && position < s->pos) s->pos = position;
}

int infer_position(const Infer *s) { return s->pos; }
size_t infer_model_bytes(const Infer *s) { return s->model_bytes; }
size_t infer_size_bytes(const Infer *s) { return s->model_bytes - s->embed_bytes; }
size_t infer_bytes_per_token(const Infer *s) { return s->token_bytes; }
size_t infer_cache_bytes_per_position(const Infer *s) {
    size_t head = s->kv == KV_INT8 ? (size_t)s->c.HS + sizeof(float) : (size_t)s->c.HS * sizeof(floatX);
    return (size_t)s->c.L * 2 * (size_t)s->c.NKV * head;
}
size_t infer_cache_bytes(const Infer *s) { return infer_cache_bytes_per_position(s) * (size_t)s->B * (size_t)s->max_T; }
size_t infer_memory_bytes(const Infer *s) { return s->memory; }

// ---------------------------------------------------------------------------------------------
// Forward.

static void embed(Infer *s, const int32_t *tokens, size_t N) {
    const Linear *e = &s->embed;
    const PackedTensor *t = &e->part[0].t;
    if (e->w) ops->embedding_forward(s->res, tokens, e->w, N, e->C, e->OC);
    else ops->embedding_q_forward(s->res, tokens, t->codes, t->scale, t->zero, &e->spec, N, e->C, e->OC);
}

// INT8 rows of a linear of INT8 training's integer products.
static const int8_t *int8_codes(const Linear *l) { return (const int8_t *)(l->codes ? l->codes : l->part[0].t.codes); }
static const float *int8_scale(const Linear *l) { return l->codes ? l->scale : l->part[0].t.scale; }

// Float weights that are read as they stream: served arithmetic, few tokens.
static bool streams(const Infer *s, const Linear *l, size_t N) {
    return s->arith == ARITH_SERVED && N <= MATVEC_MAX_N && !l->wscale;
}

// y (N, OC) = x (N, C) . w^T, in the form the weight is held in.
static void linear(Infer *s, floatX *y, const floatX *x, const Linear *l, size_t N) {
    if (l->served) ops->served_forward(y, x, l->served, &l->spec, l->act, N, l->C, l->OC);
    else if (l->integer) ops->linear_i8_forward(y, x, int8_codes(l), int8_scale(l), N, l->C, l->OC);
    else if (streams(s, l, N)) ops->matvec_forward(y, x, l->w, N, l->C, l->OC);
    else ops->linear_forward(y, x, l->w, l->wscale, N, l->C, l->OC);
}

static void linear_f32(Infer *s, float *y, const floatX *x, const Linear *l, size_t N) {
    if (l->served) ops->served_forward_f32(y, x, l->served, &l->spec, l->act, N, l->C, l->OC);
    else if (l->integer) ops->linear_i8_forward_f32(y, x, int8_codes(l), int8_scale(l), N, l->C, l->OC);
    else if (streams(s, l, N)) ops->matvec_forward_f32(y, x, l->w, N, l->C, l->OC);
    else ops->linear_forward_f32(y, x, l->w, l->wscale, N, l->C, l->OC);
}

static void attention(Infer *s, const KvCache *k, int T) {
    const LlamaConfig *c = &s->c;
    int HS = c->HS, ld = (c->NH + 2 * c->NKV) * HS, ldkv = 2 * c->NKV * HS;
    ops->rope_append(s->qkv, k, s->cos_t, s->sin_t, &s->state->pos, s->n, T, c->NH);
    if (s->arith == ARITH_SERVED) {
        ops->attention_cached(s->att, s->qkv, k, &s->state->pos, s->n, T, c->NH);
        return;
    }
    const floatX *keys = k->values;
    ops->attention_forward(s->att, NULL, s->qkv, keys, keys + c->NKV * HS, s->n, T, s->pos + T, c->NH, c->NKV, HS,
                           c->NH * HS, ld, ldkv, (size_t)s->max_T * (size_t)ldkv);
}

static void forward_blocks(Infer *s, int T) {
    const LlamaConfig *c = &s->c;
    size_t N = (size_t)s->n * (size_t)T;
    for (int l = 0; l < c->L; l++) {
        Block *b = &s->block[l];
        floatX *res = l ? s->res : NULL, *delta = l ? s->delta : NULL;       // nothing to add before the first block
        ops->rmsnorm_fq_forward(res, s->y, NULL, NULL, s->res, delta, b->norm1, N, c->C, c->norm_eps, b->qkv.fq);
        linear(s, s->qkv, s->y, &b->qkv, N);
        attention(s, &b->cache, T);
        if (b->o.fq) ops->fakequant_forward(s->att, NULL, s->att, N, c->NH * c->HS, b->o.fq);
        linear(s, s->delta, s->att, &b->o, N);

        ops->rmsnorm_fq_forward(s->res, s->y, NULL, NULL, s->res, s->delta, b->norm2, N, c->C, c->norm_eps,
                                b->gateup.fq);
        linear(s, s->gateup, s->y, &b->gateup, N);
        ops->swiglu_fq_forward(s->ffn, NULL, s->gateup, N, c->FF, b->down.fq);
        linear(s, s->delta, s->ffn, &b->down, N);
    }
    ops->rmsnorm_fq_forward(s->res, s->y, NULL, NULL, s->res, s->delta, s->final_norm, N, c->C, c->norm_eps,
                            s->head.fq);
}

// Runs the head over the n rows of y listed in host_rows, in pieces. The residual stream is not needed any more: its
// buffer takes the gathered rows.
static void head_piece(Infer *s, const int32_t *rows, size_t n, size_t N) {
    const LlamaConfig *c = &s->c;
    device_copy_in(s->rows, rows, n * sizeof *rows);
    ops->embedding_forward(s->res, s->rows, s->y, n, c->C, (int)N);
    linear_f32(s, s->logits, s->res, &s->head, n);
}

static int check_ids(const Infer *s, const int32_t *ids, size_t n, const char *what, bool negative_ok, Err *err) {
    for (size_t i = 0; i < n; i++)
        if (ids[i] >= s->c.V || (ids[i] < 0 && !negative_ok))
            return err_set(err, E_USAGE, "%s %zu is %d, but the vocabulary has ids 0 to %d: is this the model's own "
                                         "tokenizer?",
                           what, i, ids[i], s->c.V - 1);
    return 0;
}

// Logits of the rows of a call: as many rows at a time as there is to be room for, once losses are asked for.
static int room_for_losses(Infer *s, Err *err) {
    int rows = s->max_N < LOGIT_ROWS ? s->max_N : LOGIT_ROWS;
    if (s->logit_rows >= rows) return 0;
    int rc = grab(s, &s->logits, (size_t)rows, (size_t)s->c.V, sizeof(float), "logits", err);
    if (rc == 0) s->logit_rows = rows;
    return rc;
}

// Checks a call, then runs the blocks over its tokens. The caller runs the head and moves pos on.
static int run_tokens(Infer *s, const int32_t *tokens, const int32_t *targets, int T, bool scored, Err *err) {
    if (T < 1 || T > s->max_N / s->n)
        return err_set(err, E_USAGE, "%d tokens for each of %d sequences: this model was loaded for 1 to %d tokens a "
                                     "call", T, s->n, s->max_N);
    if (T > s->max_T - s->pos)
        return err_set(err, E_USAGE, "%d tokens after the %d in the cache do not fit the context of %d; use a longer "
                                     "one (--ctx)",
                       T, s->pos, s->max_T);
    size_t N = (size_t)s->n * (size_t)T;
    int rc = check_ids(s, tokens, N, "token", false, err);
    if (rc == 0 && scored) {
        if (!targets) return err_set(err, E_USAGE, "losses need targets");
        rc = check_ids(s, targets, N, "target", true, err);
        if (rc == 0) rc = room_for_losses(s, err);
    }
    if (rc < 0) return rc;
    device_copy_in(s->tokens, tokens, N * sizeof *tokens);
    device_copy_in(&s->state->pos, &s->pos, sizeof s->pos);
    embed(s, s->tokens, N);
    forward_blocks(s, T);
    return 0;
}

// The next rows whose target counts, from *at on, at most `most`: their numbers and targets. Results of rows that do not
// count are 0.
static size_t scored_rows(int32_t *rows, int32_t *wanted, const int32_t *targets, size_t N, size_t *at, size_t most) {
    size_t n = 0;
    for (; n < most && *at < N; ++*at) {
        if (targets[*at] < 0) continue;
        rows[n] = (int32_t)*at;
        wanted[n++] = targets[*at];
    }
    return n;
}

// Logits of these rows, and from them the losses. A product's bits may differ between few tokens and many: a few left of
// a call of many pass as many, so that a loss does not depend on how many others were scored.
static void score_rows(Infer *s, float *losses, int32_t rows[LOGIT_ROWS], const int32_t *wanted, size_t n, size_t N) {
    float loss[LOGIT_ROWS];
    size_t run = n;
    while (N > MATVEC_MAX_N && run <= MATVEC_MAX_N && run < (size_t)s->logit_rows) rows[run++] = rows[0];
    head_piece(s, rows, run, N);
    device_copy_in(s->targets, wanted, n * sizeof *wanted);
    ops->classifier(s->losses, NULL, s->logits, s->targets, n, s->c.V);
    device_copy_out(loss, s->losses, n * sizeof *loss);
    for (size_t k = 0; k < n; k++) losses[rows[k]] = loss[k];
}

int infer_forward(Infer *s, const int32_t *tokens, const int32_t *targets, int T, float *logits, float *losses,
                  Err *err) {
    int32_t rows[LOGIT_ROWS], wanted[LOGIT_ROWS];
    size_t N = (size_t)s->n * (size_t)T, V = (size_t)s->c.V, n;
    int rc = run_tokens(s, tokens, targets, T, losses != NULL, err);
    if (rc < 0) return rc;
    for (size_t b = 0; logits && b < (size_t)s->n; b += n) {
        for (n = 0; n < (size_t)s->logit_rows && b + n < (size_t)s->n; n++)
            rows[n] = (int32_t)((b + n + 1) * (size_t)T - 1);
        head_piece(s, rows, n, N);
        device_copy_out(logits + b * V, s->logits, n * V * sizeof(float));
    }
    if (losses) {
        size_t at = 0;
        memset(losses, 0, N * sizeof *losses);
        while ((n = scored_rows(rows, wanted, targets, N, &at, (size_t)s->logit_rows)) > 0)
            score_rows(s, losses, rows, wanted, n, N);
    }
    rc = device_sync(err);
    if (rc < 0) return rc;
    s->pos += T;
    return 0;
}

int infer_compare(Infer *s, Infer *ref, const int32_t *tokens, const int32_t *targets, int T, float *losses,
                  float *ref_losses, float *kl, int32_t *same, Err *err) {
    if (s->c.V != ref->c.V)
        return err_set(err, E_USAGE, "a vocabulary of %d cannot be compared with one of %d: the reference must be of the "
                                     "same family", s->c.V, ref->c.V);
    if (s->n != ref->n || s->pos != ref->pos)
        return err_set(err, E_USAGE, "the model stands at %d sequences and position %d, its reference at %d and %d: both "
                                     "must be given the same calls", s->n, s->pos, ref->n, ref->pos);
    size_t N = (size_t)s->n * (size_t)T, at = 0, n;
    int rc = run_tokens(s, tokens, targets, T, true, err);
    if (rc == 0) rc = run_tokens(ref, tokens, targets, T, true, err);
    if (rc < 0) return rc;
    int32_t rows[LOGIT_ROWS], wanted[LOGIT_ROWS], alike[LOGIT_ROWS];
    float distance[LOGIT_ROWS];
    size_t most = (size_t)(s->logit_rows < ref->logit_rows ? s->logit_rows : ref->logit_rows);
    memset(losses, 0, N * sizeof *losses);
    memset(ref_losses, 0, N * sizeof *ref_losses);
    memset(kl, 0, N * sizeof *kl);
    memset(same, 0, N * sizeof *same);
    while ((n = scored_rows(rows, wanted, targets, N, &at, most)) > 0) {
        score_rows(s, losses, rows, wanted, n, N);
        score_rows(ref, ref_losses, rows, wanted, n, N);
        // losses and rows have been read: their memory takes what comes of the comparison
        ops->compare_logits(s->losses, s->rows, s->logits, ref->logits, n, s->c.V);
        device_copy_out(distance, s->losses, n * sizeof *distance);
        device_copy_out(alike, s->rows, n * sizeof *alike);
        for (size_t k = 0; k < n; k++) {
            kl[rows[k]] = distance[k];
            same[rows[k]] = alike[k];
        }
    }
    rc = device_sync(err);
    if (rc < 0) return rc;
    s->pos += T;
    ref->pos += T;
    return 0;
}

// ---------------------------------------------------------------------------------------------
// Decoding.

typedef struct { Infer *s; const Sampler *sampler; } Step;

// What a recorded step holds besides what it reads from the device: the model, its sampler's numbers, and the buffer
// that may have been made anew since.
static uint64_t step_key(const Infer *s, const Sampler *sampler) {
    const uint64_t parts[] = {s->id, (uint64_t)(uintptr_t)s->logits, f32_bits(sampler->temperature),
                              (uint64_t)sampler->top_k, f32_bits(sampler->top_p), sampler->seed};
    uint64_t key = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        key = (key ^ parts[i]) * 0x9E3779B97F4A7C15u;
        key ^= key >> 32;
    }
    return key;
}

static void decode_step(void *ctx) {
    const Step *step = ctx;
    Infer *s = step->s;
    embed(s, &s->state->token, 1);
    forward_blocks(s, 1);
    linear_f32(s, s->logits, s->y, &s->head, 1);
    ops->sample_next(s->state, s->logits, step->sampler, s->c.V);
}

int infer_next(Infer *s, const Sampler *sampler, uint64_t draw, int32_t *token, Err *err) {
    if (s->n != 1) return err_set(err, E_USAGE, "decoding step by step is for one sequence; there are %d", s->n);
    if (s->pos >= s->max_T)
        return err_set(err, E_USAGE, "the context of %d is full; use a longer one (--ctx)", s->max_T);
    int rc = check_ids(s, token, 1, "token", false, err);
    if (rc < 0) return rc;
    DecodeState state = {.pos = s->pos, .token = *token, .draw = draw};
    device_copy_in(s->state, &state, sizeof state);
    Step step = {s, sampler};
    if (s->arith == ARITH_SERVED) device_step(step_key(s, sampler), decode_step, &step);
    else decode_step(&step);                     // attention reads the position from the host
    device_copy_out(token, &s->state->token, sizeof *token);
    rc = device_sync(err);
    if (rc < 0) return rc;
    s->pos++;
    return 0;
}
