// Exports: see export.h, and doc/formats.md for the layouts.
#include "export.h"
#include <stdlib.h>
#include <string.h>
#include "gguf_write.h"
#include "json.h"

#define TILE_VALUES ((int64_t)1 << 20)             // values converted at a time
#define WAYS_OUT "--to dequantized writes its values as floats"

// What an export writes: the model's parameters, and the head by itself where it does not have the embedding's values.
typedef struct {
    const ModelFile *m;
    const ExportOptions *o;
    LlamaConfig config;                            // of the export: untied where a tied head was packed for itself
    ParamTable table;
    bool embedding_lost;                           // made at load from the head's floats, which are all that is written
} Export;

static void note(const Export *x, const char *text) {
    if (x->o->note) x->o->note(x->o->ctx, text);
}

static int export_begin(Export *x, const ModelFile *m, const ExportOptions *o, Err *err) {
    *x = (Export){.m = m, .o = o, .config = m->config};
    if (m->packed && m->config.tied && m->plan.tied_head.bits) x->config.tied = false;
    x->embedding_lost = m->packed && m->config.tied && m->plan.embedding.bits && !m->plan.tied_head.bits;
    if (x->embedding_lost && !o->allow_inexact)
        return err_set(err, E_USAGE, "%s: the embedding's codes are made at load from the floats of the head that "
                       "shares its table, and no other program would make them: quantize with --head int8,channel "
                       "too, or export the floats with --allow-inexact", m->path);
    if (x->embedding_lost)
        note(x, "the embedding is served quantized, from codes made at load; written are the floats of the head that "
             "shares its table, for both");
    return param_table_build(&x->table, &x->config, m->packed ? &m->plan : NULL, err);
}

// Whether the inputs of any linear are quantized.
static bool quantizes_inputs(const Export *x) {
    bool some = false;
    for (int i = 0; i < x->table.n; i++) some = some || x->table.p[i].scheme.act.bits;
    return some;
}

static void report(const Export *x, const ExportRow *row) {
    if (x->o->report) x->o->report(x->o->ctx, row);
}

static int64_t tile_rows(const Param *p, int64_t unit) {
    int64_t n = TILE_VALUES / p->cols / unit * unit;
    return n < unit ? unit : n;
}

// ---------------------------------------------------------------------------------------------
// GGUF: what each tensor becomes

// The exact line that codes of one block of 32 stand for, value = d * u + m with u = code + shift, and its f16.
typedef struct { double d, m; f16 d16, m16; } Line;

static int code_shift(const QuantSpec *s) { return quant_has_zero(s) && !s->is_unsigned ? 1 << (s->bits - 1) : 0; }

static Line block_line(const QuantSpec *s, const PackedTensor *t, int64_t scale) {
    Line l = {.d = t->scale[scale]};
    if (s->zero == QZ_FLOAT) l.m = (double)t->zero[scale] - l.d * (double)quant_mid(s);
    else if (quant_has_zero(s)) l.m = -l.d * ((double)t->zero[scale] + code_shift(s));
    l.d16 = f16_from_f32((float)l.d);
    l.m16 = f16_from_f32((float)l.m);
    return l;
}

static double line_error(const Line *l, int u) {
    return fabs(u * ((double)f16_to_f32(l->d16) - l->d) + ((double)f16_to_f32(l->m16) - l->m));
}

// Largest error and value of a packed tensor in f16 blocks. Where f16 holds every scale and minimum nothing is read; a
// line is straight, so the ends of each block's codes tell.
static void line_errors(const QuantSpec *s, const PackedTensor *t, const Param *p, const int64_t block[2],
                        ExportRow *row) {
    bool exact = true;
    for (int64_t i = 0; i < t->n_scales && exact; i++) {
        Line l = block_line(s, t, i);
        exact = line_error(&l, 0) == 0 && line_error(&l, 1) == 0;
    }
    row->exact = exact;
    if (exact) return;
    int64_t across = p->cols / block[1];
    size_t row_bytes = quant_row_bytes(s->bits, p->cols);
    double worst = 0, amax = 0;
    #pragma omp parallel reduction(max : worst, amax)
    {
        int16_t *codes = xmalloc((size_t)p->cols * sizeof *codes);
        #pragma omp for schedule(static)
        for (int64_t r = 0; r < p->rows; r++) {
            quant_unpack_row(codes, t->codes + (size_t)r * row_bytes, p->cols, s);
            for (int64_t b = 0; b < across; b++) {
                Line l = block_line(s, t, r / block[0] * across + b);
                // Beyond f16 the codes do not matter: 0 times infinity is not 0.
                if (!isfinite(f16_to_f32(l.d16)) || !isfinite(f16_to_f32(l.m16))) worst = INFINITY;
                int lo = INT16_MAX, hi = INT16_MIN;
                for (int64_t c = b * block[1]; c < (b + 1) * block[1]; c++) {
                    if (codes[c] < lo) lo = codes[c];
                    if (codes[c] > hi) hi = codes[c];
                }
                for (int end = 0; end < 2; end++) {
                    int u = (end ? hi : lo) + code_shift(s);
                    double e = line_error(&l, u), v = fabs(l.d * u + l.m);
                    worst = e > worst ? e : worst;
                    amax = v > amax ? v : amax;
                }
            }
        }
        free(codes);
    }
    row->exact = worst == 0;
    row->max_err = worst;
    row->amax = amax;
}

// The block type for a spec; 0 if there is none (F32 is 0 and no block type).
static uint32_t gguf_block_type(const QuantSpec *s) {
    if (s->bits == 8 && !quant_has_zero(s)) return GGML_Q8_0;
    if (s->bits == 4) return quant_has_zero(s) ? GGML_Q4_1 : GGML_Q4_0;
    return 0;
}

static int check_blocks(const Param *p, const QuantSpec *s, const int64_t block[2], Err *err) {
    char text[QUANT_SPEC_TEXT];
    quant_spec_text(text, sizeof text, s);
    if (!gguf_block_type(s))
        return err_set(err, E_USAGE, "'%s' is %s, for which GGUF has no blocks (int8 and int4 by channel or groups of "
                       "32 and multiples, int4 with zero points too); " WAYS_OUT ", --to hf keeps the codes", p->name,
                       text);
    if (block[1] % 32)
        return err_set(err, E_USAGE, "'%s' is %s: %lld values share a scale, and GGUF's blocks of 32 cannot be cut "
                       "from that; " WAYS_OUT ", --to hf keeps the codes", p->name, text, (long long)block[1]);
    return 0;
}

static DType stored_dtype(const ModelFile *m, const Param *p) {
    char name[128];
    Param own = *p;
    if (p->role == ROLE_HEAD && m->config.tied) {
        own.role = ROLE_EMBED;
        strcpy(own.name, "model.embed_tokens.weight");
    }
    if (m->kind == MODEL_GGUF) {
        model_gguf_name(name, sizeof name, &own);
        const GgufTensor *t = gguf_tensor(&m->gguf, name);
        return t && t->type == GGML_BF16 ? DT_BF16 : t && t->type == GGML_F16 ? DT_F16 : DT_F32;
    }
    for (int i = 0; i < m->n_files; i++) {
        const StTensor *t = safetensors_find(&m->files[i], own.name);
        if (t) return t->dtype;
    }
    return DT_F32;
}

// Rows as they are served where an embedding's floats are written for its codes; in place.
static int fake_quantized(const ModelFile *m, float *x, int64_t rows, int64_t cols, Err *err) {
    QuantSpec s = llama_embedding_spec(&m->plan, &m->config);
    int64_t block[2];
    int rc = quant_block_shape(&s, rows, cols, block, err);
    if (rc) return rc;
    int16_t *codes = xmalloc((size_t)(rows * cols) * sizeof *codes);
    QParams *qp = xmalloc((size_t)(rows / block[0] * (cols / block[1])) * sizeof *qp);
    for (int64_t i = 0; i < rows * cols; i++) x[i] = bf16_round(x[i]);
    rc = quant_tensor(codes, qp, x, rows, cols, &s, QD_BF16, err);
    for (int64_t i = 0; i < rows * cols && rc == 0; i++)
        x[i] = quant_dequant((float)codes[i], qp[i / cols / block[0] * (cols / block[1]) + i % cols / block[1]], &s,
                             QD_BF16);
    free(codes);
    free(qp);
    return rc;
}

// Largest error of a tensor written as floats of a type.
static int float_errors(const Export *x, const Param *p, DType dtype, ExportRow *row, Err *err) {
    bool lost = x->embedding_lost && p->role == ROLE_EMBED;
    int64_t unit = 1, block[2];
    QuantSpec s = llama_embedding_spec(&x->m->plan, &x->m->config);
    int rc = lost ? quant_block_shape(&s, p->rows, p->cols, block, err) : 0;
    if (rc) return rc;
    if (lost) unit = block[0];
    int64_t tile = tile_rows(p, unit);
    float *v = xmalloc((size_t)(tile * p->cols) * sizeof *v), *served = xmalloc((size_t)(tile * p->cols) * sizeof *v);
    for (int64_t r = 0; r < p->rows && rc == 0; r += tile) {
        int64_t n = p->rows - r < tile ? p->rows - r : tile;
        rc = model_read_rows(x->m, p, r, n, v, err);
        memcpy(served, v, (size_t)(n * p->cols) * sizeof *v);
        if (rc == 0 && lost) rc = fake_quantized(x->m, served, n, p->cols, err);
        for (int64_t i = 0; i < n * p->cols && rc == 0; i++) {
            double written = dtype == DT_BF16 ? bf16_round(v[i]) : v[i], is = served[i];
            if (fabs(written - is) > row->max_err) row->max_err = fabs(written - is);
            if (fabs(is) > row->amax) row->amax = fabs(is);
        }
    }
    free(v);
    free(served);
    row->exact = row->max_err == 0;
    return rc;
}

// Whether a tensor of this type in the model is not simply copied.
static bool may_be_inexact(const Export *x, const Param *p, DType stored, DType dtype) {
    return (dtype == DT_BF16 && stored != DT_BF16) || (x->embedding_lost && p->role == ROLE_EMBED);
}

static int plan_float(const Export *x, const Param *p, uint32_t *type, ExportRow *row, Err *err) {
    DType stored = stored_dtype(x->m, p), dtype = x->o->dtype < 0 ? stored : (DType)x->o->dtype;
    if (param_is_norm(p)) dtype = DT_F32;                    // the only type that llama.cpp has norms in
    *type = dtype == DT_BF16 ? GGML_BF16 : dtype == DT_F16 ? GGML_F16 : GGML_F32;
    return may_be_inexact(x, p, stored, dtype) ? float_errors(x, p, dtype, row, err) : 0;
}

static int plan_tensor(const Export *x, const Param *p, uint32_t *type, ExportRow *row, Err *err) {
    QuantSpec spec = model_packed_spec(x->m, p);
    PackedTensor t;
    *row = (ExportRow){.name = p->name, .rows = p->rows, .cols = p->cols, .exact = true};
    int rc = model_packed(x->m, p, &t, err);
    if (rc < 0) return rc;
    if (rc == 0) {
        rc = plan_float(x, p, type, row, err);
    } else {
        int64_t block[2];
        rc = quant_block_shape(&spec, p->rows, p->cols, block, err);
        if (rc == 0) rc = check_blocks(p, &spec, block, err);
        if (rc == 0) line_errors(&spec, &t, p, block, row);
        *type = gguf_block_type(&spec);
        packed_tensor_free(&t);
    }
    row->form = gguf_type_name(*type);
    row->bytes = (size_t)p->rows * gguf_row_bytes(*type, p->cols);
    if (rc == 0 && !isfinite(row->max_err))
        rc = err_set(err, E_USAGE, "'%s': a scale is too large for %s, whose scales are f16; " WAYS_OUT, p->name,
                     row->form);
    return rc;
}

// The tensors that are not exact: how many, and the worst of them.
typedef struct { int n; char form[48]; ExportRow worst; } Inexact;

// Reports a tensor, and remembers it where it is not exact.
static void count_row(const Export *x, const ExportRow *row, Inexact *k) {
    report(x, row);
    if (row->exact) return;
    if (k->n++ && row->max_err * k->worst.amax <= k->worst.max_err * row->amax) return;
    k->worst = *row;
    snprintf(k->form, sizeof k->form, "%s", row->form);
}

// Refuses what is not exact, once all of it has been reported.
static int refuse_inexact(const Export *x, const Inexact *k, Err *err) {
    if (!k->n || x->o->allow_inexact) return 0;
    return err_set(err, E_USAGE, "%d of %d tensors are not exactly representable: as %s, '%s' is off by up to %.3g, "
                   "its largest value being %.3g; --allow-inexact writes the nearest, %s", k->n, x->table.n, k->form,
                   k->worst.name, k->worst.max_err, k->worst.amax,
                   x->m->packed ? WAYS_OUT : "--dtype auto keeps the stored type");
}

// Types of all tensors.
static int plan_tensors(const Export *x, uint32_t *type, Err *err) {
    Inexact inexact = {0};
    for (int i = 0; i < x->table.n; i++) {
        ExportRow row;
        int rc = plan_tensor(x, &x->table.p[i], &type[i], &row, err);
        if (rc) return rc;
        count_row(x, &row, &inexact);
    }
    return refuse_inexact(x, &inexact, err);
}

// ---------------------------------------------------------------------------------------------
// GGUF: metadata

// Most of the file in one word, which some readers print.
static uint32_t file_type(const Export *x, const uint32_t *type) {
    static const struct { uint32_t type, word; } words[] = {
        {GGML_F32, 0}, {GGML_F16, 1}, {GGML_Q4_0, 2}, {GGML_Q4_1, 3}, {GGML_Q8_0, 7}, {GGML_BF16, 32}};
    size_t values[6] = {0};
    int most = 0;
    for (int i = 0; i < x->table.n; i++)
        for (int k = 0; k < 6; k++)
            if (words[k].type == type[i] && x->table.p[i].layer >= 0)
                values[k] += (size_t)x->table.p[i].rows * (size_t)x->table.p[i].cols;
    for (int k = 1; k < 6; k++)
        if (values[k] > values[most]) most = k;
    return words[most].word;
}

static int put_config(const Export *x, GgufWriter *w, const uint32_t *type, Err *err) {
    const LlamaConfig *c = &x->config;
    gguf_put_text(w, "general.architecture", "llama");
    gguf_put_u32(w, "general.file_type", file_type(x, type));
    gguf_put_u32(w, "general.quantization_version", 2);
    gguf_put_u32(w, "llama.vocab_size", (uint32_t)c->V);
    gguf_put_u32(w, "llama.context_length", (uint32_t)c->max_T);
    gguf_put_u32(w, "llama.embedding_length", (uint32_t)c->C);
    gguf_put_u32(w, "llama.block_count", (uint32_t)c->L);
    gguf_put_u32(w, "llama.feed_forward_length", (uint32_t)c->FF);
    gguf_put_u32(w, "llama.attention.head_count", (uint32_t)c->NH);
    gguf_put_u32(w, "llama.attention.head_count_kv", (uint32_t)c->NKV);
    gguf_put_u32(w, "llama.attention.key_length", (uint32_t)c->HS);
    gguf_put_u32(w, "llama.attention.value_length", (uint32_t)c->HS);
    gguf_put_u32(w, "llama.rope.dimension_count", (uint32_t)c->HS);
    gguf_put_f32(w, "llama.attention.layer_norm_rms_epsilon", c->norm_eps);
    gguf_put_f32(w, "llama.rope.freq_base", (float)c->rope_theta);
    if (c->rope_scaling == ROPE_LINEAR) {
        gguf_put_text(w, "llama.rope.scaling.type", "linear");
        gguf_put_f32(w, "llama.rope.scaling.factor", (float)c->rope_factor);
    }
    bool exact = (double)(float)c->rope_theta == c->rope_theta &&
        (c->rope_scaling != ROPE_LINEAR || (double)(float)c->rope_factor == c->rope_factor);
    if (exact || x->o->allow_inexact) return 0;
    return err_set(err, E_USAGE, "rope_theta %.17g (factor %.17g) is no f32, which GGUF keeps it in; --allow-inexact "
                   "writes the nearest, --to dequantized keeps it", c->rope_theta, c->rope_factor);
}

// GGUF knows one begin, one end of text and one end of turn.
static void put_ends(const Export *x, GgufWriter *w) {
    const LlamaConfig *c = &x->config;
    const Tokenizer *tok = x->m->tokenizer;
    int bos = tok ? tokenizer_bos(tok) : c->bos, eos = tok ? tokenizer_eos(tok) : -1, turn = -1, left = 0;
    bool listed = c->n_eos == 0;
    for (int i = 0; i < c->n_eos; i++) listed |= c->eos[i] == eos;
    if (!listed || eos < 0) eos = c->n_eos ? c->eos[0] : eos;
    for (int i = 0; i < c->n_eos; i++) {
        if (c->eos[i] == eos) continue;
        if (turn < 0) turn = c->eos[i];
        else left++;
    }
    if (bos >= 0) gguf_put_u32(w, "tokenizer.ggml.bos_token_id", (uint32_t)bos);
    if (eos >= 0) gguf_put_u32(w, "tokenizer.ggml.eos_token_id", (uint32_t)eos);
    if (turn >= 0) gguf_put_u32(w, "tokenizer.ggml.eot_token_id", (uint32_t)turn);
    if (left)
        note(x, "more than two tokens end generation; GGUF names two, and readers guess others by their spelling");
}

// The tokenizer, where there is one and GGUF has words for it.
static int put_tokenizer(const Export *x, GgufWriter **w, const uint32_t *type, Err *err) {
    int rc = x->m->tokenizer ? tokenizer_to_gguf(x->m->tokenizer, *w, x->config.V, err) : 0;
    if (!x->m->tokenizer) {
        note(x, "the model carries no tokenizer, and so does the file: other programs read it for token ids only");
    } else if (rc == E_USAGE && x->o->allow_inexact) {
        note(x, "GGUF has no words for this tokenizer: the file is written without one");
        gguf_writer_abort(*w);
        *w = gguf_writer_new();
        rc = put_config(x, *w, type, err);
    }
    if (rc == 0) put_ends(x, *w);
    return rc;
}

// The divisors of the frequencies by which GGUF says llama3 scaling: HS/2 of them.
static float *rope_divisors(const LlamaConfig *c) {
    int n = c->HS / 2;
    LlamaConfig plain = *c;
    plain.rope_scaling = ROPE_DEFAULT;
    float *divisor = xmalloc((size_t)n * sizeof *divisor), *scaled = xmalloc((size_t)n * sizeof *scaled);
    llama_rope_inv_freq(divisor, &plain);
    llama_rope_inv_freq(scaled, c);
    for (int i = 0; i < n; i++) {
        divisor[i] /= scaled[i];
        // The factor itself, and not what is left of it after the roundings of its use.
        if (fabs(divisor[i] - c->rope_factor) <= 1e-6 * c->rope_factor) divisor[i] = (float)c->rope_factor;
    }
    free(scaled);
    return divisor;
}

// ---------------------------------------------------------------------------------------------
// GGUF: data

// Row of the parameter that stands as row g of the file: llama.cpp rotates neighbours, so that the two halves of each
// head of q and k are interleaved. Row 2b + a of a head is row a HS/2 + b of ours.
static int64_t gguf_row_from(const LlamaConfig *c, const Param *p, int64_t g) {
    if (p->role != ROLE_Q && p->role != ROLE_K) return g;
    int64_t i = g % c->HS;
    return g - i + i % 2 * (c->HS / 2) + i / 2;
}

static int write_floats(const Export *x, const Param *p, uint32_t type, GgufWriter *w, Err *err) {
    bool heads = p->role == ROLE_Q || p->role == ROLE_K;
    int64_t tile = tile_rows(p, heads ? x->config.HS : 1);   // whole heads: rows change places within one
    size_t row_bytes = gguf_row_bytes(type, p->cols);
    float *in = xmalloc((size_t)(tile * p->cols) * sizeof *in);
    uint8_t *out = xmalloc((size_t)tile * row_bytes);
    int rc = 0;
    for (int64_t row = 0; row < p->rows && rc == 0; row += tile) {
        int64_t n = p->rows - row < tile ? p->rows - row : tile;
        rc = model_read_rows(x->m, p, row, n, in, err);
        if (rc) break;
        #pragma omp parallel for schedule(static)
        for (int64_t r = 0; r < n; r++) {
            const float *v = in + (gguf_row_from(&x->config, p, row + r) - row) * p->cols;
            uint8_t *dst = out + (size_t)r * row_bytes;
            if (type == GGML_F32) memcpy(dst, v, row_bytes);
            for (int64_t i = 0; i < p->cols && type != GGML_F32; i++) {
                uint16_t h = type == GGML_BF16 ? bf16_from_f32(v[i]) : f16_from_f32(v[i]);
                memcpy(dst + 2 * i, &h, 2);
            }
        }
        gguf_writer_data(w, out, (size_t)n * row_bytes);
    }
    free(in);
    free(out);
    return rc;
}

static void encode_row(uint8_t *dst, uint32_t type, int16_t *codes, const QuantSpec *s, const PackedTensor *t,
                       int64_t scale0, int64_t width, int64_t cols) {
    size_t block_bytes = gguf_row_bytes(type, 32);
    for (int64_t c = 0; c < cols; c += 32, dst += block_bytes) {
        Line l = block_line(s, t, scale0 + c / width);
        for (int i = 0; i < 32; i++) codes[c + i] = (int16_t)(codes[c + i] + code_shift(s));
        if (type == GGML_Q8_0) gguf_block_q8_0(dst, codes + c, l.d16);
        else if (type == GGML_Q4_0) gguf_block_q4_0(dst, codes + c, l.d16);
        else gguf_block_q4_1(dst, codes + c, l.d16, l.m16);
    }
}

static int write_blocks(const Export *x, const Param *p, uint32_t type, const PackedTensor *t, GgufWriter *w,
                        Err *err) {
    QuantSpec s = model_packed_spec(x->m, p);
    int64_t block[2], tile = tile_rows(p, 1);
    int rc = quant_block_shape(&s, p->rows, p->cols, block, err);
    if (rc) return rc;
    size_t row_bytes = gguf_row_bytes(type, p->cols), code_bytes = quant_row_bytes(s.bits, p->cols);
    uint8_t *out = xmalloc((size_t)tile * row_bytes);
    for (int64_t row = 0; row < p->rows; row += tile) {
        int64_t n = p->rows - row < tile ? p->rows - row : tile;
        #pragma omp parallel
        {
            int16_t *codes = xmalloc((size_t)p->cols * sizeof *codes);
            #pragma omp for schedule(static)
            for (int64_t r = 0; r < n; r++) {
                int64_t from = gguf_row_from(&x->config, p, row + r);
                quant_unpack_row(codes, t->codes + (size_t)from * code_bytes, p->cols, &s);
                encode_row(out + (size_t)r * row_bytes, type, codes, &s, t, from / block[0] * (p->cols / block[1]),
                           block[1], p->cols);
            }
            free(codes);
        }
        gguf_writer_data(w, out, (size_t)n * row_bytes);
    }
    free(out);
    return 0;
}

static int write_tensors(const Export *x, const uint32_t *type, GgufWriter *w, Err *err) {
    int rc = 0;
    if (x->config.rope_scaling == ROPE_LLAMA3) {
        float *divisor = rope_divisors(&x->config);
        gguf_writer_data(w, divisor, (size_t)(x->config.HS / 2) * sizeof *divisor);
        free(divisor);
    }
    for (int i = 0; i < x->table.n && rc == 0; i++) {
        PackedTensor t;
        rc = model_packed(x->m, &x->table.p[i], &t, err);
        if (rc < 0) break;
        rc = rc ? write_blocks(x, &x->table.p[i], type[i], &t, w, err) :
            write_floats(x, &x->table.p[i], type[i], w, err);
        packed_tensor_free(&t);
        if (rc == 0) rc = model_unchanged(x->m, err);
    }
    return rc;
}

static int write_gguf(const char *path, const Export *x, const uint32_t *type, GgufWriter **w, Err *err) {
    int rc = put_config(x, *w, type, err);
    if (rc == 0) rc = put_tokenizer(x, w, type, err);
    if (rc) return rc;
    if (x->config.rope_scaling == ROPE_LLAMA3)
        gguf_writer_tensor(*w, "rope_freqs.weight", GGML_F32, 1, x->config.HS / 2, true);
    for (int i = 0; i < x->table.n; i++) {
        const Param *p = &x->table.p[i];
        char name[128];
        model_gguf_name(name, sizeof name, p);
        gguf_writer_tensor(*w, name, type[i], p->rows, p->cols, param_is_norm(p));
    }
    rc = gguf_writer_begin(*w, path, err);
    return rc ? rc : write_tensors(x, type, *w, err);
}

int export_gguf(const char *path, const ModelFile *m, const ExportOptions *o, Err *err) {
    Export x;
    int rc = export_begin(&x, m, o, err);
    if (rc) return rc;
    uint32_t *type = xcalloc((size_t)x.table.n, sizeof *type);
    rc = plan_tensors(&x, type, err);
    if (rc == 0) {
        if (m->packed && quantizes_inputs(&x))
            note(&x, "GGUF does not say how inputs of linears are quantized: llama.cpp rounds them in blocks of 32, in "
                 "its own way");
        GgufWriter *w = gguf_writer_new();
        rc = write_gguf(path, &x, type, &w, err);
        if (rc) gguf_writer_abort(w);
        else rc = gguf_writer_finish(w, err);
    }
    free(type);
    param_table_free(&x.table);
    return rc;
}

// ---------------------------------------------------------------------------------------------
// compressed-tensors. A linear M.weight with codes becomes
//   pack-quantized   M.weight_packed (rows, ceil(cols bits / 32)) I32, M.weight_scale (rows, groups), M.weight_shape
//                    (2) I64, and with zero points M.weight_zero_point (ceil(rows bits / 32), groups) I32
//   int-quantized    M.weight (rows, cols) I8, M.weight_scale (rows, groups)
// Packed fields are the unsigned numbers code + 2^(bits-1), lowest bits first, a row's (a column's, for zero points)
// without gaps from its first word on.

#define MAX_GROUPS (QUANT_MAX_RULES + 2)
typedef struct { QuantScheme scheme; bool int8; } Group;

typedef struct {
    Export x;
    Group group[MAX_GROUPS];
    int n_groups;
    int *of;                             // (table.n): each parameter's group, -1 for floats
} Compressed;

static bool is_linear(const Param *p) { return !param_is_norm(p) && p->role != ROLE_EMBED; }

static DType scale_type(const QuantSpec *s) { return quant_is_int8_rows(s) ? DT_F32 : DT_BF16; }

static int check_compressed(const Param *p, const QuantScheme *s, Err *err) {
    char text[QUANT_SPEC_TEXT];
    quant_spec_text(text, sizeof text, &s->weight);
    if (s->weight.zero == QZ_FLOAT)
        return err_set(err, E_USAGE, "'%s' is %s: compressed-tensors has integer zero points only; " WAYS_OUT, p->name,
                       text);
    return 0;
}

static int find_groups(Compressed *k, Err *err) {
    const ModelFile *m = k->x.m;
    for (int i = 0; i < k->x.table.n; i++) {
        const Param *p = &k->x.table.p[i];
        QuantScheme s = quant_plan_linear(&m->plan, p->name);
        s.weight = model_packed_spec(m, p);
        if (p->role == ROLE_HEAD && m->config.tied) s.act = (QuantSpec){0};
        k->of[i] = -1;
        if (!is_linear(p) || !s.weight.bits) continue;
        int g = 0, rc = check_compressed(p, &s, err);
        if (rc) return rc;
        while (g < k->n_groups && !(quant_spec_equal(&k->group[g].scheme.weight, &s.weight) &&
                                    quant_spec_equal(&k->group[g].scheme.act, &s.act))) g++;
        if (g == MAX_GROUPS)
            return err_set(err, E_USAGE, "'%s' would be the start of group %d of schemes; there are %d at most",
                           p->name, g + 1, MAX_GROUPS);
        if (g == k->n_groups)
            k->group[k->n_groups++] = (Group){s, s.weight.bits == 8 && !quant_has_zero(&s.weight) && s.act.bits};
        k->of[i] = g;
    }
    if (k->n_groups) return 0;
    return err_set(err, E_USAGE, "%s holds no quantized linear; --to dequantized writes a plain folder", m->path);
}

// "model.layers.0.mlp.up_proj" of "model.layers.0.mlp.up_proj.weight", and a suffix.
static void module_name(char *buf, size_t size, const Param *p, const char *suffix) {
    int len = (int)strlen(p->name) - (int)strlen(".weight");
    snprintf(buf, size, "%.*s%s", len, p->name, suffix);
}

static cJSON *args_json(const QuantSpec *s, int64_t width, bool channel) {
    cJSON *a = cJSON_CreateObject();
    bool token = s->gran == QG_TOKEN;
    cJSON_AddNumberToObject(a, "num_bits", s->bits);
    cJSON_AddStringToObject(a, "type", "int");
    cJSON_AddBoolToObject(a, "symmetric", !quant_has_zero(s));
    cJSON_AddStringToObject(a, "strategy", token ? "token" : channel ? "channel" : "group");
    if (token || channel) cJSON_AddNullToObject(a, "group_size");
    else cJSON_AddNumberToObject(a, "group_size", (double)width);
    cJSON_AddBoolToObject(a, "dynamic", token);
    cJSON_AddNullToObject(a, "actorder");
    return a;
}

// Which values share a scale there: `width` of a row. Blocks of several rows repeat theirs.
static int64_t scale_width(const QuantSpec *s, const Param *p) {
    int64_t block[2];
    return quant_block_shape(s, p->rows, p->cols, block, NULL) ? p->cols : block[1];
}

static const char *format_name(const Group *g) { return g->int8 ? "int-quantized" : "pack-quantized"; }

static cJSON *group_json(const Compressed *k, int g) {
    const Group *group = &k->group[g];
    const Param *first = NULL;
    cJSON *o = cJSON_CreateObject(), *targets = cJSON_AddArrayToObject(o, "targets");
    for (int i = 0; i < k->x.table.n; i++) {
        char name[128];
        if (k->of[i] != g) continue;
        if (!first) first = &k->x.table.p[i];
        if (k->n_groups == 1) continue;
        module_name(name, sizeof name, &k->x.table.p[i], "");
        cJSON_AddItemToArray(targets, cJSON_CreateString(name));
    }
    if (k->n_groups == 1) cJSON_AddItemToArray(targets, cJSON_CreateString("Linear"));
    int64_t width = scale_width(&group->scheme.weight, first);
    bool channel = group->scheme.weight.gran == QG_CHANNEL || group->scheme.weight.gran == QG_TENSOR;
    cJSON_AddItemToObject(o, "weights", args_json(&group->scheme.weight, width, channel));
    if (group->scheme.act.bits) cJSON_AddItemToObject(o, "input_activations", args_json(&group->scheme.act, 0, false));
    else cJSON_AddNullToObject(o, "input_activations");
    cJSON_AddNullToObject(o, "output_activations");
    cJSON_AddStringToObject(o, "format", format_name(group));
    return o;
}

static char *quantization_json(const Compressed *k) {
    cJSON *root = cJSON_CreateObject();
    bool same = true;
    for (int g = 1; g < k->n_groups; g++) same &= k->group[g].int8 == k->group[0].int8;
    cJSON_AddStringToObject(root, "quant_method", "compressed-tensors");
    cJSON_AddStringToObject(root, "format", same ? format_name(&k->group[0]) : "mixed-precision");
    cJSON_AddStringToObject(root, "quantization_status", "compressed");
    cJSON *groups = cJSON_AddObjectToObject(root, "config_groups");
    for (int g = 0; g < k->n_groups; g++) {
        char name[32];
        snprintf(name, sizeof name, "group_%d", g);
        cJSON_AddItemToObject(groups, name, group_json(k, g));
    }
    cJSON *ignore = cJSON_AddArrayToObject(root, "ignore");
    for (int i = 0; i < k->x.table.n; i++) {
        char name[128];
        if (k->of[i] >= 0 || !is_linear(&k->x.table.p[i])) continue;
        module_name(name, sizeof name, &k->x.table.p[i], "");
        cJSON_AddItemToArray(ignore, cJSON_CreateString(name));
    }
    if (k->x.config.tied) cJSON_AddItemToArray(ignore, cJSON_CreateString("lm_head"));
    cJSON_AddNullToObject(root, "kv_cache_scheme");
    char *text = cJSON_PrintUnformatted(root), *copy = xstrdup(text ? text : "{}");
    cJSON_free(text);
    cJSON_Delete(root);
    return copy;
}

typedef struct { const Group *g; int64_t width, across, words; } Layout;

// false for a tensor that stays floats.
static bool layout_of(const Compressed *k, const Param *p, Layout *l) {
    int g = k->of[p - k->x.table.p];
    if (g < 0) return false;
    *l = (Layout){.g = &k->group[g]};
    l->width = scale_width(&l->g->scheme.weight, p);
    l->across = p->cols / l->width;
    l->words = (int64_t)(quant_row_bytes(l->g->scheme.weight.bits, p->cols) + 3) / 4;
    return true;
}

static int64_t zero_words(const Param *p, int bits) { return (p->rows * bits + 31) / 32; }

static DType float_type(const Compressed *k, const Param *p) {
    if (k->x.o->dtype >= 0) return (DType)k->x.o->dtype;
    return stored_dtype(k->x.m, p) == DT_F32 && !model_packed_spec(k->x.m, p).bits ? DT_F32 : DT_BF16;
}

static size_t compressed_bytes(void *ctx, const Param *p) {
    const Compressed *k = ctx;
    Layout l;
    if (!layout_of(k, p, &l)) return (size_t)p->rows * (size_t)p->cols * dtype_size(float_type(k, p));
    const QuantSpec *s = &l.g->scheme.weight;
    size_t bytes = (size_t)p->rows * (size_t)l.across * dtype_size(scale_type(s));
    if (l.g->int8) return bytes + (size_t)p->rows * (size_t)p->cols;
    if (quant_has_zero(s)) bytes += (size_t)zero_words(p, s->bits) * (size_t)l.across * 4;
    return bytes + (size_t)p->rows * (size_t)l.words * 4 + 16;
}

static void declare_part(StWriter *w, const Param *p, const char *suffix, DType dtype, int ndim, int64_t a, int64_t b) {
    char name[128];
    module_name(name, sizeof name, p, suffix);
    st_writer_tensor(w, name, dtype, ndim, (int64_t[]){a, b});
}

static void compressed_declare(void *ctx, const Param *p, StWriter *w) {
    const Compressed *k = ctx;
    Layout l;
    if (!layout_of(k, p, &l)) {
        bool norm = param_is_norm(p);
        declare_part(w, p, ".weight", float_type(k, p), norm ? 1 : 2, norm ? p->cols : p->rows, p->cols);
        return;
    }
    const QuantSpec *s = &l.g->scheme.weight;
    // Eight-byte numbers first: readers map the file, and what follows is aligned to less.
    if (!l.g->int8) declare_part(w, p, ".weight_shape", DT_I64, 1, 2, 0);
    if (l.g->int8) declare_part(w, p, ".weight", DT_I8, 2, p->rows, p->cols);
    else declare_part(w, p, ".weight_packed", DT_I32, 2, p->rows, l.words);
    if (!l.g->int8 && quant_has_zero(s))
        declare_part(w, p, ".weight_zero_point", DT_I32, 2, zero_words(p, s->bits), l.across);
    declare_part(w, p, ".weight_scale", scale_type(s), 2, p->rows, l.across);
}

static void write_codes(const Param *p, const Layout *l, const PackedTensor *t, StWriter *w) {
    const QuantSpec *s = &l->g->scheme.weight;
    int64_t tile = tile_rows(p, 1);
    size_t code_bytes = quant_row_bytes(s->bits, p->cols);
    size_t row_bytes = l->g->int8 ? (size_t)p->cols : (size_t)l->words * 4;
    int offset = s->is_unsigned ? 0 : 1 << (s->bits - 1);
    uint8_t *out = xcalloc((size_t)tile, row_bytes);             // the last word's free bits are zeros
    for (int64_t row = 0; row < p->rows; row += tile) {
        int64_t n = p->rows - row < tile ? p->rows - row : tile;
        #pragma omp parallel
        {
            int16_t *codes = xmalloc((size_t)p->cols * sizeof *codes);
            #pragma omp for schedule(static)
            for (int64_t r = 0; r < n; r++) {
                uint8_t *dst = out + (size_t)r * row_bytes;
                quant_unpack_row(codes, t->codes + (size_t)(row + r) * code_bytes, p->cols, s);
                for (int64_t c = 0; c < p->cols && !l->g->int8; c++) codes[c] = (int16_t)(codes[c] + offset);
                quant_pack_row(dst, codes, p->cols, s->bits);
            }
            free(codes);
        }
        st_writer_data(w, out, (size_t)n * row_bytes);
    }
    free(out);
}

// Zero points are packed down the columns: field r of column b is that of row r.
static void write_zeros(const Param *p, const Layout *l, const PackedTensor *t, const int64_t block[2], StWriter *w) {
    const QuantSpec *s = &l->g->scheme.weight;
    int64_t words = zero_words(p, s->bits);
    int offset = s->is_unsigned ? 0 : 1 << (s->bits - 1);
    int16_t *column = xmalloc((size_t)p->rows * sizeof *column);
    uint32_t *one = xcalloc((size_t)words, sizeof *one), *all = xmalloc((size_t)(words * l->across) * sizeof *all);
    for (int64_t b = 0; b < l->across; b++) {
        for (int64_t r = 0; r < p->rows; r++)
            column[r] = (int16_t)((int)t->zero[r / block[0] * l->across + b] + offset);
        quant_pack_row((uint8_t *)one, column, p->rows, s->bits);
        for (int64_t i = 0; i < words; i++) all[i * l->across + b] = one[i];
    }
    st_writer_data(w, all, (size_t)(words * l->across) * sizeof *all);
    free(column);
    free(one);
    free(all);
}

static void write_scales(const Param *p, const Layout *l, const PackedTensor *t, const int64_t block[2], StWriter *w) {
    bool f32 = scale_type(&l->g->scheme.weight) == DT_F32;
    bf16 *h = xmalloc((size_t)l->across * sizeof *h);
    for (int64_t r = 0; r < p->rows; r++) {
        const float *scale = t->scale + r / block[0] * l->across;
        for (int64_t b = 0; b < l->across; b++) h[b] = bf16_from_f32(scale[b]);
        st_writer_data(w, f32 ? (const void *)scale : h, (size_t)l->across * (f32 ? 4 : 2));
    }
    free(h);
}

static int read_source(void *ctx, const Param *p, int64_t row0, int64_t n, float *out, Err *err) {
    return model_read_rows(((const Compressed *)ctx)->x.m, p, row0, n, out, err);
}

static int compressed_write(void *ctx, const Param *p, StWriter *w, Err *err) {
    Compressed *k = ctx;
    Layout l;
    PackedTensor t;
    int changed = model_unchanged(k->x.m, err);
    if (changed) return changed;
    if (!layout_of(k, p, &l)) return model_write_float(w, p, float_type(k, p), read_source, k, err);
    const QuantSpec *s = &l.g->scheme.weight;
    int64_t block[2], shape[2] = {p->rows, p->cols};
    int rc = quant_block_shape(s, p->rows, p->cols, block, err);
    if (rc == 0 && (rc = model_packed(k->x.m, p, &t, err)) < 0) return rc;
    if (rc <= 0) return rc ? rc : err_set(err, E_FORMAT, "'%s' is not packed", p->name);
    if (!l.g->int8) st_writer_data(w, shape, sizeof shape);
    write_codes(p, &l, &t, w);
    if (!l.g->int8 && quant_has_zero(s)) write_zeros(p, &l, &t, block, w);
    write_scales(p, &l, &t, block, w);
    packed_tensor_free(&t);
    return 0;
}

static int report_compressed(const Compressed *k, Err *err) {
    Inexact inexact = {0};
    for (int i = 0; i < k->x.table.n; i++) {
        const Param *p = &k->x.table.p[i];
        char form[48];
        Layout l;
        ExportRow row = {.name = p->name, .form = form, .rows = p->rows, .cols = p->cols, .exact = true,
                         .bytes = compressed_bytes((void *)k, p)};
        if (layout_of(k, p, &l)) {
            snprintf(form, sizeof form, "int%d%s", l.g->scheme.weight.bits, l.g->int8 ? "" : " packed");
        } else {
            DType dtype = float_type(k, p);
            QuantSpec s = model_packed_spec(k->x.m, p);          // an embedding's: it goes as what its codes decode to
            bool is_bf16 = s.bits ? !quant_works_as_codes(&s) : stored_dtype(k->x.m, p) == DT_BF16;
            snprintf(form, sizeof form, "%s", dtype_name(dtype));
            if (may_be_inexact(&k->x, p, is_bf16 ? DT_BF16 : DT_F32, dtype)) {
                int rc = float_errors(&k->x, p, dtype, &row, err);
                if (rc) return rc;
            }
        }
        count_row(&k->x, &row, &inexact);
    }
    return refuse_inexact(&k->x, &inexact, err);
}

static void note_activations(const Compressed *k) {
    for (int i = 0; i < k->x.table.n; i++) {
        if (k->of[i] >= 0 || !k->x.table.p[i].scheme.act.bits) continue;
        note(&k->x, "inputs of linears whose weights stay floats are quantized here; readers take those linears as they "
             "are");
        break;
    }
    for (int g = 0; g < k->n_groups; g++) {
        const QuantSpec *a = &k->group[g].scheme.act;
        if (!a->bits || quant_has_zero(a)) continue;
        note(&k->x, "inputs of linears: readers use all 256 codes of int8 (scale amax / 127.5), we use 255 (amax / "
             "127)");
        return;
    }
}

int export_compressed(const char *dir, const ModelFile *m, const ExportOptions *o, Err *err) {
    if (!m->packed)
        return err_set(err, E_USAGE, "%s holds floats; quantize it with --scheme, or use --to dequantized", m->path);
    Compressed k = {0};
    int rc = export_begin(&k.x, m, o, err);
    if (rc) return rc;
    k.of = xmalloc((size_t)k.x.table.n * sizeof *k.of);
    rc = find_groups(&k, err);
    if (rc == 0) rc = report_compressed(&k, err);
    if (rc == 0) {
        note_activations(&k);
        char *quantization = quantization_json(&k);
        FolderWeights from = {&k, compressed_bytes, compressed_declare, compressed_write};
        DType dtype = float_type(&k, param_get(&k.x.table, 0, ROLE_NORM1));
        rc = model_write_folder(dir, &k.x.config, &k.x.table, m->tokenizer, dtype, HF_SHARD_BYTES, quantization, &from,
                                err);
        free(quantization);
    }
    free(k.of);
    param_table_free(&k.x.table);
    return rc;
}

// ---------------------------------------------------------------------------------------------
// Plain folders of what packed tensors decode to

static int report_floats(const Export *x, DType dtype, Err *err) {
    int rc = 0;
    for (int i = 0; i < x->table.n && rc == 0; i++) {
        const Param *p = &x->table.p[i];
        QuantSpec s = model_packed_spec(x->m, p);
        ExportRow row = {.name = p->name, .form = dtype_name(dtype), .rows = p->rows, .cols = p->cols, .exact = true,
                         .bytes = (size_t)p->rows * (size_t)p->cols * dtype_size(dtype)};
        // Working values are bf16 already, but those of codes that work as they are, times a row's scale.
        bool is_bf16 = s.bits ? !quant_works_as_codes(&s) : stored_dtype(x->m, p) == DT_BF16;
        if (may_be_inexact(x, p, is_bf16 ? DT_BF16 : DT_F32, dtype)) rc = float_errors(x, p, dtype, &row, err);
        if (rc == 0) report(x, &row);
    }
    return rc;
}

static int read_values(void *ctx, const Param *p, int64_t row0, int64_t n, float *out, Err *err) {
    const Export *x = ctx;
    int rc = model_read_rows(x->m, p, row0, n, out, err);
    return rc || row0 + n < p->rows ? rc : model_unchanged(x->m, err);       // once a tensor
}

int export_dequantized(const char *dir, const ModelFile *m, const ExportOptions *o, Err *err) {
    Export x;
    DType dtype = o->dtype < 0 ? DT_BF16 : (DType)o->dtype;
    int rc = export_begin(&x, m, o, err);
    if (rc) return rc;
    if (m->packed && quantizes_inputs(&x))
        note(&x, "inputs of linears are quantized here; a plain folder does not say so, and its readers do not");
    if (o->report) rc = report_floats(&x, dtype, err);
    if (rc == 0) rc = model_write_hf(dir, &x.config, &x.table, m->tokenizer, dtype, read_values, &x, err);
    param_table_free(&x.table);
    return rc;
}
