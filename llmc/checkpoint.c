// Models in and out: see checkpoint.h, and doc/formats.md for the formats.
#include "checkpoint.h"
#include <dirent.h>
#include <errno.h>
#include <float.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "cpu/quantize_rows.h"
#include "json.h"

#define TOKENIZER_TENSOR "qllm.tokenizer"
#define WRITER "qllm.c"
#define TILE_VALUES ((int64_t)1 << 20)         // values converted at a time by all threads together: 4 MiB of f32
#define TILE_OF_ONE ((int64_t)1 << 17)         // and by one thread on its own: they stay in its cache
#define MAX_SHARDS 1024

// The spec a tensor is packed with; bits == 0 where it stays float.
static QuantSpec packed_spec(const LlamaConfig *c, const QuantPlan *plan, const Param *p) {
    QuantSpec none = {0};
    if (param_is_norm(p)) return none;
    // A tied table whose head stays float is stored once, as floats: the embedding's codes follow from them.
    if (p->role == ROLE_EMBED) return c->tied && !plan->tied_head.bits ? none : llama_embedding_spec(plan, c);
    if (p->role == ROLE_HEAD && c->tied) return plan->tied_head;
    return quant_plan_linear(plan, p->name).weight;
}

QuantSpec model_packed_spec(const ModelFile *m, const Param *p) {
    return m->packed ? packed_spec(&m->config, &m->plan, p) : (QuantSpec){0};
}

// Zero points are codes in the integer domain, real numbers in the float domain.
static DType zero_dtype(const QuantSpec *s) {
    return s->zero == QZ_FLOAT ? DT_BF16 : s->is_unsigned ? DT_U8 : DT_I8;
}

// Scales are bf16 values by their making; those of INT8 rows are f32.
static DType scale_dtype(const QuantSpec *s) { return quant_is_int8_rows(s) ? DT_F32 : DT_BF16; }

// Has any of n values an exponent of all ones? Returns the first such column, or -1.
static int64_t first_not_finite(const float *x, int64_t n) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) bad |= (f32_bits(x[i]) & 0x7f800000u) == 0x7f800000u;
    if (!bad) return -1;
    int64_t i = 0;
    while (isfinite(x[i])) i++;
    return i;
}

static int refuse_not_finite(const char *path, const Param *p, int64_t row, const float *x, int64_t cols, Err *err) {
    int64_t col = first_not_finite(x, cols);
    return err_set(err, E_FORMAT, "%s: tensor '%s' holds %s at row %lld, column %lld; the model is damaged", path,
                   p->name, isnan(x[col]) ? "NaN" : "an infinite value", (long long)row, (long long)col);
}

// ---------------------------------------------------------------------------------------------
// Tensors of Hugging Face folders and of model.bin

static const StTensor *find_tensor(const ModelFile *m, const char *name) {
    for (int i = 0; i < m->n_files; i++) {
        const StTensor *t = safetensors_find(&m->files[i], name);
        if (t) return t;
    }
    return NULL;
}

static void shape_text(char *buf, size_t size, const StTensor *t) {
    size_t n = (size_t)snprintf(buf, size, "(");
    for (int i = 0; i < t->ndim && n < size; i++)
        n += (size_t)snprintf(buf + n, size - n, "%s%lld", i ? ", " : "", (long long)t->shape[i]);
    if (n < size) snprintf(buf + n, size - n, ")");
}

// Norms are vectors in files and one row in the table.
static int check_shape(const ModelFile *m, const StTensor *t, bool vector, int64_t rows, int64_t cols, Err *err) {
    if (vector ? t->ndim == 1 && t->shape[0] == cols : t->ndim == 2 && t->shape[0] == rows &&
        t->shape[1] == cols) return 0;
    char found[200];
    shape_text(found, sizeof found, t);
    if (vector)
        return err_set(err, E_SHAPE, "%s: tensor '%s' has shape %s; the configuration asks for (%lld)", m->path,
                       t->name, found, (long long)cols);
    return err_set(err, E_SHAPE, "%s: tensor '%s' has shape %s; the configuration asks for (%lld, %lld)", m->path,
                   t->name, found, (long long)rows, (long long)cols);
}

static int check_float(const ModelFile *m, const Param *p, Err *err) {
    const StTensor *t = find_tensor(m, p->name);
    if (!t)
        return err_set(err, E_MISSING, "%s: tensor '%s' is missing%s", m->path, p->name,
                       p->role == ROLE_HEAD ? " (and tie_word_embeddings is false)" : "");
    if (t->dtype != DT_F32 && t->dtype != DT_F16 && t->dtype != DT_BF16)
        return err_set(err, E_DTYPE, "%s: tensor '%s' is %s; weights are read as F32, F16 or BF16", m->path, t->name,
                       dtype_name(t->dtype));
    return check_shape(m, t, param_is_norm(p), p->rows, p->cols, err);
}

// Finds NAME.SUFFIX of a packed tensor and checks its dtype and shape.
static int packed_part(const ModelFile *m, const Param *p, const char *suffix, DType dtype, int64_t rows, int64_t cols,
                       const StTensor **out, Err *err) {
    char name[128];
    snprintf(name, sizeof name, "%s.%s", p->name, suffix);
    const StTensor *t = find_tensor(m, name);
    if (!t) return err_set(err, E_MISSING, "%s: tensor '%s' is missing (the plan packs '%s')", m->path, name, p->name);
    if (t->dtype != dtype)
        return err_set(err, E_DTYPE, "%s: tensor '%s' is %s; expected %s", m->path, name, dtype_name(t->dtype),
                       dtype_name(dtype));
    *out = t;
    return check_shape(m, t, false, rows, cols, err);
}

typedef struct { const StTensor *codes, *scale, *zero; int64_t block[2]; } PackedParts;

static int packed_parts(const ModelFile *m, const Param *p, const QuantSpec *s, PackedParts *out, Err *err) {
    *out = (PackedParts){0};
    int rc = quant_block_shape(s, p->rows, p->cols, out->block, err);
    if (rc) return rc;
    int64_t down = p->rows / out->block[0], across = p->cols / out->block[1];
    rc = packed_part(m, p, "codes", DT_U8, p->rows, (int64_t)quant_row_bytes(s->bits, p->cols), &out->codes, err);
    if (!rc) rc = packed_part(m, p, "scale", scale_dtype(s), down, across, &out->scale, err);
    if (!rc && quant_has_zero(s)) rc = packed_part(m, p, "zero", zero_dtype(s), down, across, &out->zero, err);
    return rc;
}

static bool ends_with(const char *s, const char *end) {
    size_t n = strlen(s), k = strlen(end);
    return n >= k && strcmp(s + n - k, end) == 0;
}

// Is `name` one of the tensors that the table and plan account for?
static bool tensor_expected(const ModelFile *m, const ParamTable *table, const char *name) {
    const Param *p = param_find(table, name);
    // Old exports keep rope's frequencies, which the configuration gives, or a copy of a tied head.
    if (m->kind == MODEL_HF)
        return p || ends_with(name, ".rotary_emb.inv_freq") || (m->config.tied && strcmp(name, "lm_head.weight") == 0);
    if (strcmp(name, TOKENIZER_TENSOR) == 0) return true;
    if (p) return !m->packed || !packed_spec(&m->config, &m->plan, p).bits;
    char base[128];
    const char *dot = strrchr(name, '.');
    if (!m->packed || !dot || (size_t)(dot - name) >= sizeof base) return false;
    memcpy(base, name, (size_t)(dot - name));
    base[dot - name] = 0;
    Param head = {.name = "lm_head.weight", .role = ROLE_HEAD};
    p = param_find(table, base);
    if (!p && strcmp(base, head.name) == 0) p = &head;
    if (!p) return false;
    QuantSpec s = packed_spec(&m->config, &m->plan, p);
    return s.bits && (strcmp(dot, ".codes") == 0 || strcmp(dot, ".scale") == 0 ||
                      (quant_has_zero(&s) && strcmp(dot, ".zero") == 0));
}

// Every tensor of the table is there as it should be, and the file holds no others.
static int check_tensors(const ModelFile *m, Err *err) {
    ParamTable table;
    int rc = param_table_build(&table, &m->config, m->packed ? &m->plan : NULL, err);
    if (rc) return rc;
    int accounted = 0, present = 0;
    Param head = {.name = "lm_head.weight", .role = ROLE_HEAD, .layer = -1, .rows = m->config.V, .cols = m->config.C};
    bool extra_head = m->packed && m->config.tied && m->plan.tied_head.bits;
    for (int i = 0; i < table.n + extra_head && rc == 0; i++) {
        const Param *p = i < table.n ? &table.p[i] : &head;
        QuantSpec spec = m->packed ? packed_spec(&m->config, &m->plan, p) : (QuantSpec){0};
        PackedParts parts;
        rc = spec.bits ? packed_parts(m, p, &spec, &parts, err) : check_float(m, p, err);
        accounted += spec.bits ? quant_has_zero(&spec) ? 3 : 2 : 1;
    }
    for (int f = 0; f < m->n_files; f++) present += m->files[f].n;
    if (m->kind == MODEL_BIN && find_tensor(m, TOKENIZER_TENSOR)) accounted++;
    for (int f = 0; f < m->n_files && rc == 0 && present > accounted; f++)
        for (int i = 0; i < m->files[f].n && rc == 0; i++) {
            const char *name = m->files[f].tensors[i].name;
            if (!tensor_expected(m, &table, name))
                rc = err_set(err, E_FORMAT, "%s: unknown tensor '%s': the model is not the plain Llama that its "
                             "configuration describes", m->files[f].path, name);
        }
    param_table_free(&table);
    return rc;
}

// ---------------------------------------------------------------------------------------------
// Opening a Hugging Face folder

static int join(char *buf, size_t size, const char *dir, const char *name, Err *err) {
    if ((size_t)snprintf(buf, size, "%s/%s", dir, name) >= size)
        return err_set(err, E_USAGE, "path too long: %.200s.../%.200s", dir, name);
    return 0;
}

static int open_shard(ModelFile *m, const char *path, Err *err) {
    int rc = safetensors_open(&m->files[m->n_files], path, err);
    if (rc) return rc;
    if (m->flags & MODEL_STREAM) file_sequential(&m->files[m->n_files].map);
    m->n_files++;
    return 0;
}

static int compare_strings(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

static int compare_tensors(const void *a, const void *b) {
    return strcmp((*(const StTensor *const *)a)->name, (*(const StTensor *const *)b)->name);
}

static int open_index(ModelFile *m, const cJSON *root, const char *path, Err *err) {
    const cJSON *map = cJSON_GetObjectItemCaseSensitive(root, "weight_map"), *v;
    if (!cJSON_IsObject(map) || !map->child) return err_set(err, E_FORMAT, "%s: weight_map is missing or empty", path);
    int n = cJSON_GetArraySize(map), k = 0, rc = 0;
    const char **names = xcalloc((size_t)n, sizeof *names);
    cJSON_ArrayForEach(v, map) {
        const char *name = cJSON_GetStringValue(v);
        // A name from the file becomes a path: it must stay inside the folder.
        if (!name || !ends_with(name, ".safetensors") || strchr(name, '/') || name[0] == '.') {
            rc = err_set(err, E_FORMAT, "%s: weight_map names the file '%.100s'; expected a .safetensors file of "
                         "this folder", path, name ? name : "(not a string)");
            break;
        }
        names[k++] = name;
    }
    if (rc == 0) qsort(names, (size_t)n, sizeof *names, compare_strings);
    m->files = xcalloc(MAX_SHARDS, sizeof *m->files);
    for (int i = 0; i < n && rc == 0; i++) {
        if (i && strcmp(names[i], names[i - 1]) == 0) continue;
        char shard[1024];
        if (m->n_files == MAX_SHARDS) rc = err_set(err, E_FORMAT, "%s: more than %d shards", path, MAX_SHARDS);
        if (rc == 0) rc = join(shard, sizeof shard, m->path, names[i], err);
        if (rc == 0) rc = open_shard(m, shard, err);
    }
    free(names);
    if (rc) return rc;

    size_t total = 0;
    for (int f = 0; f < m->n_files; f++) total += (size_t)m->files[f].n;
    const StTensor **all = xcalloc(total + 1, sizeof *all);
    total = 0;
    for (int f = 0; f < m->n_files; f++)
        for (int i = 0; i < m->files[f].n; i++) all[total++] = &m->files[f].tensors[i];
    qsort(all, total, sizeof *all, compare_tensors);
    for (size_t i = 1; i < total && rc == 0; i++)
        if (strcmp(all[i - 1]->name, all[i]->name) == 0)
            rc = err_set(err, E_FORMAT, "%s: tensor '%s' stands in two shards", m->path, all[i]->name);
    free(all);
    return rc;
}

// Where generation stops by default may be said better in generation_config.json than in config.json.
static int read_generation_config(ModelFile *m, const cJSON *root, const char *path, Err *err) {
    const cJSON *eos = cJSON_GetObjectItemCaseSensitive(root, "eos_token_id");
    if (!cJSON_IsNumber(eos) && !cJSON_IsArray(eos)) return 0;
    LlamaConfig *c = &m->config;
    int n = cJSON_IsArray(eos) ? cJSON_GetArraySize(eos) : 1, most = (int)(sizeof c->eos / sizeof *c->eos);
    if (n > most) return err_set(err, E_FORMAT, "%s: %d values in eos_token_id; at most %d are kept", path, n, most);
    for (int i = 0; i < n; i++) {
        const cJSON *e = cJSON_IsArray(eos) ? cJSON_GetArrayItem(eos, i) : eos;
        double id = cJSON_IsNumber(e) ? e->valuedouble : -1;
        if (!(id >= 0 && id < c->V) || id != (int)id)
            return err_set(err, E_FORMAT, "%s: eos_token_id %g; expected a whole number from 0 to %d", path, id,
                           c->V - 1);
        c->eos[i] = (int)id;
    }
    c->n_eos = n;
    return 0;
}

// Reads NAME of the folder as JSON. Returns 0 with *root == NULL if it is not there.
static int read_json(const ModelFile *m, const char *name, size_t max, char *path, size_t size, cJSON **root,
                     Err *err) {
    char *text;
    size_t len;
    *root = NULL;
    int rc = join(path, size, m->path, name, err);
    if (rc || !path_exists(path)) return rc;
    rc = file_read(&text, &len, path, max, err);
    if (rc) return rc;
    *root = json_parse(text, len, path, err);
    free(text);
    return *root ? 0 : E_FORMAT;
}

// Newer folders keep the chat template in a file of its own; here it is a field of the tokenizer's configuration, where
// older ones have it, so that it travels with the tokenizer.
static int add_chat_template(char **config, size_t *len, const ModelFile *m, Err *err) {
    char path[1024], *text;
    size_t n;
    int rc = join(path, sizeof path, m->path, "chat_template.jinja", err);
    if (rc || !path_exists(path)) return rc;
    cJSON *root = json_parse(*config, *len, "tokenizer_config.json", NULL);
    rc = cJSON_IsObject(root) ? file_read(&text, &n, path, (size_t)1 << 20, err) : 0;
    if (rc == 0 && cJSON_IsObject(root)) {
        cJSON_DeleteItemFromObjectCaseSensitive(root, "chat_template");
        cJSON_AddStringToObject(root, "chat_template", text);
        free(text);
        free(*config);
        *config = cJSON_Print(root);
        *len = strlen(*config);
    }
    cJSON_Delete(root);
    return rc;
}

static int open_tokenizer(ModelFile *m, Err *err) {
    char path[1024], *text;
    size_t len;
    int rc = join(path, sizeof path, m->path, "tokenizer.json", err);
    if (rc || !path_exists(path)) return rc;
    rc = file_read(&text, &len, path, (size_t)256 << 20, err);
    if (rc) return rc;
    rc = tokenizer_from_json(&m->tokenizer, text, len, err);
    free(text);
    if (rc) {
        char why[700];
        snprintf(why, sizeof why, "%.699s", err->text);
        return err_set(err, rc, "%s: %s", path, why);
    }
    rc = join(path, sizeof path, m->path, "tokenizer_config.json", err);
    if (rc) return rc;
    if (path_exists(path)) rc = file_read(&text, &len, path, (size_t)64 << 20, err);
    else len = strlen(text = xstrdup("{}"));
    if (rc) return rc;
    rc = add_chat_template(&text, &len, m, err);
    if (rc == 0) tokenizer_set_config(m->tokenizer, text, len);
    free(text);
    return rc;
}

// Folders of other quantizers (GPTQ, AWQ, bitsandbytes) hold tensors in forms of their own.
static int refuse_quantized(const char *path, const char *text, size_t len, Err *err) {
    cJSON *root = json_parse(text, len, path, err);
    if (!root) return E_FORMAT;
    const cJSON *q = cJSON_GetObjectItemCaseSensitive(root, "quantization_config");
    const char *method = json_string(q, "quant_method");
    int rc = 0;
    if (q && !cJSON_IsNull(q))
        rc = err_set(err, E_FORMAT, "%s: the weights are quantized already (%.40s); give the model in F32, F16 or BF16",
                     path, method ? method : "quantization_config");
    cJSON_Delete(root);
    return rc;
}

static int open_hf(ModelFile *m, Err *err) {
    char path[1024], *text;
    size_t len;
    cJSON *root;
    int rc = join(path, sizeof path, m->path, "config.json", err);
    if (rc) return rc;
    rc = file_read(&text, &len, path, (size_t)4 << 20, err);
    if (rc == E_MISSING) {
        char bin[1024];
        bool has_bin = join(bin, sizeof bin, m->path, "model.bin", NULL) == 0 && path_exists(bin);
        return err_set(err, E_MISSING, "%s: no config.json in this folder%s%s", m->path,
                       has_bin ? "; did you mean " : "; a Hugging Face model folder has one", has_bin ? bin : "");
    }
    if (rc) return rc;
    rc = refuse_quantized(path, text, len, err);
    if (rc == 0) rc = llama_config_from_json(&m->config, text, len, err);
    free(text);
    if (rc) {
        char why[700];
        snprintf(why, sizeof why, "%.699s", err->text);
        return err_set(err, rc, "%s: %s", m->path, why);
    }
    rc = read_json(m, "generation_config.json", (size_t)4 << 20, path, sizeof path, &root, err);
    if (rc == 0 && root) rc = read_generation_config(m, root, path, err);
    cJSON_Delete(root);
    if (rc) return rc;

    rc = join(path, sizeof path, m->path, "model.safetensors", err);
    if (rc) return rc;
    if (path_exists(path)) {
        m->files = xcalloc(1, sizeof *m->files);
        rc = open_shard(m, path, err);
    } else {
        rc = read_json(m, "model.safetensors.index.json", (size_t)64 << 20, path, sizeof path, &root, err);
        if (rc == 0 && !root)
            rc = err_set(err, E_MISSING, "%s: neither model.safetensors nor model.safetensors.index.json is there; "
                         "weights in another form (pytorch_model.bin) must be saved as safetensors first", m->path);
        else if (rc == 0) rc = open_index(m, root, path, err);
        cJSON_Delete(root);
    }
    if (rc == 0) rc = check_tensors(m, err);
    if (rc == 0) rc = open_tokenizer(m, err);
    return rc;
}

// ---------------------------------------------------------------------------------------------
// Opening model.bin

static int open_bin(ModelFile *m, Err *err) {
    m->files = xcalloc(1, sizeof *m->files);
    int rc = open_shard(m, m->path, err);
    if (rc) return rc;
    const Safetensors *st = &m->files[0];
    const char *format = safetensors_meta(st, "format"), *version = safetensors_meta(st, "version");
    const char *config = safetensors_meta(st, "config"), *plan = safetensors_meta(st, "quant");
    const char *packed = safetensors_meta(st, "packed");
    if (!format || strcmp(format, WRITER))
        return err_set(err, E_FORMAT, "%s: a safetensors file without our configuration inside; give the folder that "
                       "holds its config.json", m->path);
    if (!(m->flags & MODEL_NO_VERIFY) && (rc = safetensors_verify(st, m->flags & MODEL_STREAM, err))) return rc;
    if (!version || strcmp(version, "1"))
        return err_set(err, E_FORMAT, "%s: model.bin version %.20s; this program reads version 1", m->path,
                       version ? version : "(none)");
    if (!config || !plan || !packed || (strcmp(packed, "true") && strcmp(packed, "false")))
        return err_set(err, E_FORMAT, "%s: the metadata lack config, quant or packed", m->path);
    m->packed = strcmp(packed, "true") == 0;
    rc = llama_config_from_json(&m->config, config, strlen(config), err);
    if (rc == 0) rc = quant_plan_from_json(&m->plan, plan, strlen(plan), err);
    if (rc) {
        char why[700];
        snprintf(why, sizeof why, "%.699s", err->text);
        return err_set(err, rc, "%s: metadata: %s", m->path, why);
    }
    if (!m->packed && quant_plan_has_rows(&m->plan))
        return err_set(err, E_FORMAT, "%s: the plan (%s) has INT8 rows, which are stored as codes, but the file is "
                       "not packed", m->path, m->plan.name);
    rc = check_tensors(m, err);
    const StTensor *blob = find_tensor(m, TOKENIZER_TENSOR);
    if (rc || !blob) return rc;
    if (blob->dtype != DT_U8 || blob->ndim != 1)
        return err_set(err, E_DTYPE, "%s: tensor '%s' must be a vector of U8", m->path, TOKENIZER_TENSOR);
    return tokenizer_from_blob(&m->tokenizer, blob->data, blob->bytes, err);
}

// ---------------------------------------------------------------------------------------------
// Opening GGUF

void model_gguf_name(char *buf, size_t size, const Param *p) {
    static const char *names[ROLE_COUNT] = {
        [ROLE_EMBED] = "token_embd", [ROLE_NORM1] = "attn_norm", [ROLE_Q] = "attn_q", [ROLE_K] = "attn_k",
        [ROLE_V] = "attn_v", [ROLE_O] = "attn_output", [ROLE_NORM2] = "ffn_norm", [ROLE_GATE] = "ffn_gate",
        [ROLE_UP] = "ffn_up", [ROLE_DOWN] = "ffn_down", [ROLE_FINAL_NORM] = "output_norm", [ROLE_HEAD] = "output",
    };
    if (p->layer >= 0) snprintf(buf, size, "blk.%d.%s.weight", p->layer, names[p->role]);
    else snprintf(buf, size, "%s.weight", names[p->role]);
}

// The llama3 rope scaling is not in the metadata: the converter writes the HS/2 divisors of the frequencies as a
// tensor. With Meta's constants (low 1, high 4, original context 8192) they follow from the factor, which is the
// largest of them. Others are refused: a Hugging Face configuration could not say them.
static int rope_from_factors(LlamaConfig *c, const GgufTensor *t, const char *path, Err *err) {
    if (t->ndim != 1 || t->ne[0] != c->HS / 2)
        return err_set(err, E_SHAPE, "%s: rope_freqs.weight has %lld values; expected %d (half the head size)", path,
                       (long long)t->ne[0], c->HS / 2);
    float *factors = xmalloc((size_t)(c->HS / 2) * sizeof *factors),
        *with = xmalloc((size_t)(c->HS / 2) * sizeof *with);
    float *without = xmalloc((size_t)(c->HS / 2) * sizeof *without), largest = 1;
    int rc = gguf_row(factors, t, 0, err), i = 0;
    for (i = 0; i < c->HS / 2; i++) largest = factors[i] > largest ? factors[i] : largest;
    if (rc == 0 && largest > 1) {
        llama_rope_inv_freq(without, c);
        c->rope_scaling = ROPE_LLAMA3;
        c->rope_factor = largest;
        c->rope_low_freq_factor = 1;
        c->rope_high_freq_factor = 4;
        c->rope_original_max_T = 8192;
        llama_rope_inv_freq(with, c);
    }
    // The converter works in f32 and its results stray from this by up to 3e-7 (computed for Llama 3.1 and 3.2); the two
    // roundings of the quotient add 1.2e-7. Another set of constants is off by 1e-2 and more.
    for (i = 0; i < c->HS / 2 && rc == 0; i++) {
        double expected = largest > 1 ? (double)without[i] / with[i] : 1.0;
        if (!(fabs(factors[i] - expected) <= 1e-6 * expected))
            rc = err_set(err, E_FORMAT, "%s: rope_freqs.weight is no llama3 scaling with low_freq_factor 1, "
                         "high_freq_factor 4 and original context 8192 (value %d is %g, expected %g for factor %g); "
                         "use the Hugging Face folder of this model", path, i, (double)factors[i], expected,
                         (double)largest);
    }
    free(factors);
    free(with);
    free(without);
    return rc;
}

static bool string_is(const char *s, size_t len, const char *text) {
    return s && len == strlen(text) && memcmp(s, text, len) == 0;
}

static int gguf_rope(LlamaConfig *c, const Gguf *g, Err *err) {
    size_t len = 0;
    double factor = 1;
    int rc = gguf_get_double(g, "llama.rope.scale_linear", false, &factor, err);       // as old files have it
    if (rc) return rc;
    const char *type = gguf_get_string(g, "llama.rope.scaling.type", &len);
    if (type && string_is(type, len, "none")) factor = 1;
    else if (type && string_is(type, len, "linear"))
        rc = gguf_get_double(g, "llama.rope.scaling.factor", true, &factor, err);
    else if (type)
        return err_set(err, E_FORMAT, "%s: llama.rope.scaling.type is '%.*s'; none, linear and llama3 are supported",
                       g->path, len > 40 ? 40 : (int)len, type);
    if (rc) return rc;
    if (factor != 1) {
        c->rope_scaling = ROPE_LINEAR;
        c->rope_factor = factor;
    }
    const GgufTensor *factors = gguf_tensor(g, "rope_freqs.weight");
    if (!factors) return 0;
    if (c->rope_scaling != ROPE_DEFAULT)
        return err_set(err, E_FORMAT, "%s: linear rope scaling and rope_freqs.weight exclude each other", g->path);
    return rope_from_factors(c, factors, g->path, err);
}

int llama_config_from_gguf(LlamaConfig *c, const Gguf *g, Err *err) {
    size_t len = 0;
    const char *arch = gguf_get_string(g, "general.architecture", &len);
    if (!string_is(arch, len, "llama"))
        return err_set(err, E_FORMAT, "%s: architecture '%.*s'; only llama is supported", g->path, len > 40 ? 40 :
                       (int)len, arch ? arch : "");
    *c = (LlamaConfig){.rope_theta = 10000, .rope_factor = 1, .bos = -1};
    int64_t C = 0, L = 0, FF = 0, NH = 0, NKV, HS, max_T = 0, experts = 0, dims, bos = -1, eos = -1, eot = -1;
    double eps = 0;
    int rc = gguf_get_int(g, "llama.embedding_length", true, 1, 1 << 17, &C, err);
    if (!rc) rc = gguf_get_int(g, "llama.block_count", true, 1, 1024, &L, err);
    if (!rc) rc = gguf_get_int(g, "llama.feed_forward_length", true, 1, 1 << 19, &FF, err);
    if (!rc) rc = gguf_get_int(g, "llama.attention.head_count", true, 1, 1024, &NH, err);
    if (!rc) rc = gguf_get_int(g, "llama.context_length", true, 1, 1 << 24, &max_T, err);
    if (!rc) rc = gguf_get_double(g, "llama.attention.layer_norm_rms_epsilon", true, &eps, err);
    if (!rc) rc = gguf_get_double(g, "llama.rope.freq_base", false, &c->rope_theta, err);
    if (!rc) rc = gguf_get_int(g, "llama.expert_count", false, 0, INT32_MAX, &experts, err);
    NKV = NH;
    if (!rc) rc = gguf_get_int(g, "llama.attention.head_count_kv", false, 1, 1024, &NKV, err);
    if (rc) return rc;
    if (experts) return err_set(err, E_FORMAT, "%s: a mixture of %lld experts; only dense Llamas are supported",
                                g->path, (long long)experts);
    if (C % NH && !gguf_value(g, "llama.attention.key_length"))
        return err_set(err, E_FORMAT, "%s: %lld heads do not divide embedding_length %lld and attention.key_length "
                       "is missing", g->path, (long long)NH, (long long)C);
    HS = C / NH;
    if ((rc = gguf_get_int(g, "llama.attention.key_length", false, 2, 1024, &HS, err))) return rc;
    int64_t value_length = HS;
    dims = HS;
    if ((rc = gguf_get_int(g, "llama.attention.value_length", false, 1, 65536, &value_length, err))) return rc;
    if ((rc = gguf_get_int(g, "llama.rope.dimension_count", false, 1, 65536, &dims, err))) return rc;
    if (dims != HS || value_length != HS)
        return err_set(err, E_FORMAT, "%s: rope.dimension_count %lld and attention.value_length %lld must equal the "
                       "head size %lld", g->path, (long long)dims, (long long)value_length, (long long)HS);
    const GgufTensor *embed = gguf_tensor(g, "token_embd.weight");
    if (!embed) return err_set(err, E_MISSING, "%s: tensor 'token_embd.weight' is missing", g->path);
    if (embed->ndim != 2 || embed->ne[1] < 2 || embed->ne[1] > 1 << 24)
        return err_set(err, E_SHAPE, "%s: token_embd.weight has %lld rows; expected a vocabulary of 2 to 16777216",
                       g->path, (long long)embed->ne[1]);
    int64_t V = embed->ne[1];
    // -1 or 2^32 - 1 stand for "none" in the wild: what is outside the vocabulary is taken as that.
    if ((rc = gguf_get_int(g, "tokenizer.ggml.bos_token_id", false, -1, INT64_MAX, &bos, err))) return rc;
    if ((rc = gguf_get_int(g, "tokenizer.ggml.eos_token_id", false, -1, INT64_MAX, &eos, err))) return rc;
    if ((rc = gguf_get_int(g, "tokenizer.ggml.eot_token_id", false, -1, INT64_MAX, &eot, err))) return rc;
    c->bos = bos < V ? (int)bos : -1;
    if (eos >= 0 && eos < V) c->eos[c->n_eos++] = (int)eos;
    if (eot >= 0 && eot < V && eot != eos) c->eos[c->n_eos++] = (int)eot;
    c->C = (int)C; c->L = (int)L; c->FF = (int)FF; c->NH = (int)NH; c->NKV = (int)NKV; c->HS = (int)HS;
    c->V = (int)V;
    c->max_T = (int)max_T;
    c->norm_eps = (float)eps;
    c->tied = !gguf_tensor(g, "output.weight");
    rc = llama_config_validate(c, err);
    if (rc == 0) rc = gguf_rope(c, g, err);
    if (rc == 0) rc = llama_config_validate(c, err);
    return rc;
}

static int open_gguf(ModelFile *m, Err *err) {
    int rc = gguf_open(&m->gguf, m->path, err);
    if (rc == 0) rc = llama_config_from_gguf(&m->config, &m->gguf, err);
    ParamTable table;
    if (rc == 0) rc = param_table_build(&table, &m->config, NULL, err);
    if (rc) return rc;
    char name[128];
    for (int i = 0; i < table.n && rc == 0; i++) {
        const Param *p = &table.p[i];
        model_gguf_name(name, sizeof name, p);
        const GgufTensor *t = gguf_tensor(&m->gguf, name);
        if (!t) rc = err_set(err, E_MISSING, "%s: tensor '%s' is missing", m->path, name);
        else if (t->ne[0] != p->cols || t->ne[1] != p->rows || t->ne[2] != 1 || t->ne[3] != 1)
            rc = err_set(err, E_SHAPE, "%s: tensor '%s' has shape (%lld, %lld, %lld, %lld); the metadata ask for "
                         "(%lld, %lld)", m->path, name, (long long)t->ne[0], (long long)t->ne[1], (long long)t->ne[2],
                         (long long)t->ne[3], (long long)p->cols, (long long)p->rows);
    }
    int extra = gguf_tensor(&m->gguf, "rope_freqs.weight") != NULL;
    for (int i = 0; i < m->gguf.n_tensors && rc == 0 && m->gguf.n_tensors > table.n + extra; i++) {
        const char *found = m->gguf.tensors[i].name;
        bool known = strcmp(found, "rope_freqs.weight") == 0;
        for (int k = 0; k < table.n && !known; k++) {
            model_gguf_name(name, sizeof name, &table.p[k]);
            known = strcmp(name, found) == 0;
        }
        if (!known) rc = err_set(err, E_FORMAT, "%s: unknown tensor '%s': the model is not a plain Llama", m->path,
                                 found);
    }
    param_table_free(&table);
    if (rc == 0 && gguf_value(&m->gguf, "tokenizer.ggml.model")) rc = tokenizer_from_gguf(&m->tokenizer, &m->gguf, err);
    return rc;
}

// ---------------------------------------------------------------------------------------------
// Opening and reading, whatever the kind

// The first bytes tell the kind; the name does not matter.
static int open_file(ModelFile *m, Err *err) {
    FileMap map;
    int rc = file_map(&map, m->path, err);
    if (rc) return rc;
    bool is_gguf = map.size >= 4 && memcmp(map.data, "GGUF", 4) == 0;
    bool is_zip = map.size >= 4 && memcmp(map.data, "PK\3\4", 4) == 0;
    file_unmap(&map);
    if (is_zip)
        return err_set(err, E_FORMAT, "%s: a PyTorch archive; save the model as safetensors and give its folder",
                       m->path);
    m->kind = is_gguf ? MODEL_GGUF : MODEL_BIN;
    return is_gguf ? open_gguf(m, err) : open_bin(m, err);
}

int model_open(ModelFile *m, const char *path, Err *err) { return model_open_with(m, path, 0, err); }

int model_open_with(ModelFile *m, const char *path, int flags, Err *err) {
    Err local;
    if (!err) err = &local;
    memset(m, 0, sizeof *m);
    m->flags = flags;
    quant_plan_none(&m->plan);
    size_t len = strlen(path);
    while (len > 1 && path[len - 1] == '/') len--;
    if (len == 0 || len >= sizeof m->path)
        return err_set(err, E_USAGE, "model path of %zu bytes; 1 to %zu are possible", len, sizeof m->path - 1);
    memcpy(m->path, path, len);
    m->path[len] = 0;
    m->kind = MODEL_HF;
    int rc = path_is_dir(m->path) ? open_hf(m, err) : open_file(m, err);
    if (rc) model_close(m);
    return rc;
}

void model_close(ModelFile *m) {
    for (int i = 0; i < m->n_files; i++) safetensors_close(&m->files[i]);
    free(m->files);
    gguf_close(&m->gguf);
    if (m->tokenizer) tokenizer_free(m->tokenizer);
    memset(m, 0, sizeof *m);
}

int model_unchanged(const ModelFile *m, Err *err) {
    bool changed = m->kind == MODEL_GGUF && file_changed(&m->gguf.map, m->path);
    const char *path = m->path;
    for (int i = 0; i < m->n_files && !changed; i++) {
        path = m->files[i].path;
        changed = file_changed(&m->files[i].map, path);
    }
    if (!changed) return 0;
    return err_set(err, E_FORMAT, "%s: written to while it was read; start again when the other program is done", path);
}

enum { SCALES_TASK = 1 << 13 };         // scales that a thread takes at a time

// Zero points [at, at + n) of a packed tensor; stored NULL: symmetric unsigned codes, whose zero point is the middle.
static void widen_zeros(float *zero, const StTensor *stored, int64_t at, int64_t n, const QuantSpec *s) {
    if (!stored) {
        for (int64_t i = 0; i < n; i++) zero[i] = quant_mid(s);
    } else if (s->zero == QZ_FLOAT) {
        convert_to_f32(zero, stored->data + 2 * (size_t)at, DT_BF16, (size_t)n);
    } else if (s->is_unsigned) {
        for (int64_t i = 0; i < n; i++) zero[i] = stored->data[at + i];
    } else {
        for (int64_t i = 0; i < n; i++) zero[i] = (int8_t)stored->data[at + i];
    }
}

// The first of n scales that is not positive (rows: nor 0) and finite, or whose zero point is not one that quantizing
// makes: a code, or in the float domain any finite number; else n.
static int64_t first_bad_scale(const float *scale, const float *zero, int64_t n, const QuantSpec *s) {
    bool rows = quant_is_int8_rows(s), any = s->zero == QZ_FLOAT;        // a row of zeros has scale 0
    float least = rows ? 0.0f : 0x1p-149f, most = rows ? FLT_MAX / 128 : FLT_MAX;
    float zmin = any ? -FLT_MAX : (float)s->qmin, zmax = any ? FLT_MAX : (float)s->qmax;
    int bad = 0;
    for (int64_t i = 0; i < n; i++) bad |= !(scale[i] >= least && scale[i] <= most);
    for (int64_t i = 0; zero && i < n; i++) bad |= !(zero[i] >= zmin && zero[i] <= zmax);
    if (!bad) return n;
    int64_t i = 0;
    while (scale[i] >= least && scale[i] <= most && (!zero || (zero[i] >= zmin && zero[i] <= zmax))) i++;
    return i;
}

int model_packed(const ModelFile *m, const Param *p, PackedTensor *t, Err *err) {
    *t = (PackedTensor){0};
    if (!m->packed) return 0;
    QuantSpec spec = packed_spec(&m->config, &m->plan, p);
    if (!spec.bits) return 0;
    PackedParts parts;
    int rc = packed_parts(m, p, &spec, &parts, err);
    if (rc) return rc;
    t->codes = parts.codes->data;
    t->n_scales = (p->rows / parts.block[0]) * (p->cols / parts.block[1]);
    t->scale = xmalloc((size_t)t->n_scales * sizeof *t->scale);
    if (parts.zero || spec.is_unsigned) t->zero = xmalloc((size_t)t->n_scales * sizeof *t->zero);
    int64_t bad = t->n_scales;
#pragma omp parallel for schedule(static) reduction(min : bad) if (t->n_scales > 4 * SCALES_TASK)
    for (int64_t at = 0; at < t->n_scales; at += SCALES_TASK) {
        int64_t n = t->n_scales - at < SCALES_TASK ? t->n_scales - at : SCALES_TASK;
        float *scale = t->scale + at, *zero = t->zero ? t->zero + at : NULL;
        convert_to_f32(scale, parts.scale->data + (size_t)at * dtype_size(parts.scale->dtype), parts.scale->dtype,
                       (size_t)n);
        if (zero) widen_zeros(zero, parts.zero, at, n, &spec);
        int64_t first = first_bad_scale(scale, zero, n, &spec);
        if (first < n && at + first < bad) bad = at + first;
    }
    if (bad < t->n_scales) {
        bool rows = quant_is_int8_rows(&spec);
        char zero[96] = "";
        if (t->zero && spec.zero == QZ_FLOAT) snprintf(zero, sizeof zero, ", zero points finite");
        else if (t->zero) snprintf(zero, sizeof zero, ", zero points codes of %d to %d", spec.qmin, spec.qmax);
        rc = err_set(err, E_FORMAT, "%s: tensor '%s': block %lld has scale %g and zero point %g; scales are finite%s and "
                     "%s%s", m->path, p->name, (long long)bad, (double)t->scale[bad],
                     t->zero ? (double)t->zero[bad] : 0.0, rows ? ", 128 times over too," : "",
                     rows ? "not negative" : "positive", zero);
        packed_tensor_free(t);
        return rc;
    }
    return 1;
}

void packed_tensor_free(PackedTensor *t) {
    free(t->scale);
    free(t->zero);
    *t = (PackedTensor){0};
}

// One row of a packed tensor. Tensors that work as their codes keep code * scale in f32: that is what multiplying the
// accumulator by the scale amounts to; the others have bf16 working values.
static void unpack_row(float *out, int16_t *codes, const PackedParts *t, const QuantSpec *s, const Param *p,
                       int64_t row) {
    size_t row_bytes = quant_row_bytes(s->bits, p->cols);
    QuantDType d = quant_works_as_codes(s) ? QD_F32 : QD_BF16;
    int64_t across = p->cols / t->block[1];
    quant_unpack_row(codes, t->codes->data + (size_t)row * row_bytes, p->cols, s);
    for (int64_t b = 0; b < across; b++) {
        size_t i = (size_t)(row / t->block[0] * across + b);
        QParams qp = {0, s->is_unsigned ? quant_mid(s) : 0.0f};
        convert_to_f32(&qp.scale, t->scale->data + dtype_size(t->scale->dtype) * i, t->scale->dtype, 1);
        if (t->zero && s->zero == QZ_FLOAT) convert_to_f32(&qp.zp, t->zero->data + 2 * i, DT_BF16, 1);
        else if (t->zero) qp.zp = s->is_unsigned ? t->zero->data[i] : (int8_t)t->zero->data[i];
        for (int64_t c = b * t->block[1]; c < (b + 1) * t->block[1]; c++) out[c] = quant_dequant(codes[c], qp, s, d);
    }
}

// llama.cpp's converter interleaves the two halves that rope rotates: row 2b + a of a head is the Hugging Face row a
// HS/2 + b.
static int64_t gguf_source_row(const LlamaConfig *c, const Param *p, int64_t row) {
    if (p->role != ROLE_Q && p->role != ROLE_K) return row;
    int64_t head = row / c->HS, i = row % c->HS, half = c->HS / 2;
    return head * c->HS + 2 * (i % half) + i / half;
}

// The file that a tensor lies in.
static const Safetensors *st_file(const ModelFile *m, const StTensor *t) {
    int i = 0;
    while (t->data < m->files[i].map.data || t->data >= m->files[i].map.data + m->files[i].map.size) i++;
    return &m->files[i];
}

// Rows [row0, row0 + n) of p, which takes up `bytes` from data on, are not read again. A fault of a thread that is still
// at earlier rows brings in pages around its own, so some rows before these are dropped once more, and at the end all.
static void drop_rows(const FileMap *map, const uint8_t *data, size_t bytes, const Param *p, int64_t row0, int64_t n) {
    size_t begin = (size_t)(data - map->data), row = bytes / (size_t)p->rows;
    int64_t first = row0 + n == p->rows || row0 < 16 * n ? 0 : row0 - 16 * n;
    file_drop(map, begin + (size_t)first * row, begin + (size_t)(row0 + n) * row);
}

static void tied_head_as_table(Param *p) {
    p->role = ROLE_EMBED;
    strcpy(p->name, "model.embed_tokens.weight");
}

int model_read_rows(const ModelFile *m, const Param *p, int64_t row0, int64_t n, float *out, Err *err) {
    if (row0 < 0 || n < 0 || row0 > p->rows - n)
        return err_set(err, E_SHAPE, "%s: '%s' has %lld rows; rows %lld to %lld are asked for", m->path, p->name,
                       (long long)p->rows, (long long)row0, (long long)(row0 + n));
    Param own = *p;
    QuantSpec spec = m->packed ? packed_spec(&m->config, &m->plan, p) : (QuantSpec){0};
    if (p->role == ROLE_HEAD && m->config.tied && !spec.bits) {       // a tied head reads the embedding table
        tied_head_as_table(&own);
        if (m->packed) spec = packed_spec(&m->config, &m->plan, &own);
    }
    const StTensor *st = NULL;
    const GgufTensor *gg = NULL;
    PackedParts parts = {0};
    int rc = 0;
    if (m->kind == MODEL_GGUF) {
        char name[128];
        model_gguf_name(name, sizeof name, &own);
        gg = gguf_tensor(&m->gguf, name);
        if (!gg || gg->ne[0] != p->cols || gg->ne[1] != p->rows)
            rc = err_set(err, E_MISSING, "%s: no tensor '%s' of %lld by %lld", m->path, name,
                         (long long)p->rows, (long long)p->cols);
    } else if (spec.bits) {
        rc = packed_parts(m, &own, &spec, &parts, err);
    } else if ((rc = check_float(m, &own, err)) == 0) {
        st = find_tensor(m, own.name);
    }
    if (rc) return rc;

    int64_t bad_row = n;
    #pragma omp parallel if (n * p->cols >= 1 << 16)
    {
        int16_t *codes = spec.bits ? xmalloc((size_t)p->cols * sizeof *codes) : NULL;
        #pragma omp for schedule(static) reduction(min : bad_row)
        for (int64_t r = 0; r < n; r++) {
            float *y = out + r * p->cols;
            if (gg) gguf_row(y, gg, gguf_source_row(&m->config, p, row0 + r), NULL);
            else if (spec.bits) unpack_row(y, codes, &parts, &spec, &own, row0 + r);
            else convert_to_f32(y, st->data + (size_t)(row0 + r) * (size_t)p->cols * dtype_size(st->dtype), st->dtype,
                                (size_t)p->cols);
            if (first_not_finite(y, p->cols) >= 0 && r < bad_row) bad_row = r;
        }
        free(codes);
    }
    if (bad_row < n) return refuse_not_finite(m->path, p, row0 + bad_row, out + bad_row * p->cols, p->cols, err);
    if (!(m->flags & MODEL_STREAM)) return 0;
    if (gg) drop_rows(&m->gguf.map, gg->data, gg->bytes, p, row0, n);
    else if (spec.bits) drop_rows(&m->files[0].map, parts.codes->data, parts.codes->bytes, p, row0, n);
    else drop_rows(&st_file(m, st)->map, st->data, st->bytes, p, row0, n);
    return 0;
}

// Whether one of n values has an exponent of ones.
static bool any_not_finite(const void *data, DType dtype, size_t n) {
    const uint32_t *wide = data;
    const uint16_t *half = data;
    const size_t piece = 1 << 16;
    uint32_t bad = 0;
#pragma omp parallel for schedule(static) reduction(| : bad) if (n > 4 * piece)
    for (size_t at = 0; at < n; at += piece) {
        size_t end = n - at < piece ? n : at + piece;
        uint16_t bad_half = 0;
        if (dtype == DT_F32)
            for (size_t i = at; i < end; i++) bad |= (wide[i] & 0x7f800000u) == 0x7f800000u;
        else
            for (size_t i = at; i < end; i++) bad_half |= (half[i] & 0x7f80) == 0x7f80;
        bad |= bad_half;
    }
    return bad;
}

int model_values(const ModelFile *m, const Param *p, DType dtype, const void **data, Err *err) {
    if (m->kind == MODEL_GGUF || (m->packed && packed_spec(&m->config, &m->plan, p).bits)) return 0;
    Param own = *p;
    if (p->role == ROLE_HEAD && m->config.tied) tied_head_as_table(&own);
    const StTensor *t = find_tensor(m, own.name);
    if (!t || t->dtype != dtype || (uintptr_t)t->data % dtype_size(dtype)) return 0;
    int rc = check_float(m, &own, err);
    if (rc < 0) return rc;
    if (any_not_finite(t->data, dtype, (size_t)p->rows * (size_t)p->cols)) {
        float *row = xmalloc((size_t)p->cols * sizeof *row);             // says which
        for (int64_t r = 0; rc == 0 && r < p->rows; r++) rc = model_read_rows(m, p, r, 1, row, err);
        free(row);
        return rc;
    }
    *data = t->data;
    return 1;
}

void model_done(const ModelFile *m, const Param *p) {
    Param own = *p;
    QuantSpec spec = m->packed ? packed_spec(&m->config, &m->plan, p) : (QuantSpec){0};
    PackedParts parts;
    Err unused;
    if (m->kind == MODEL_GGUF) return;
    if (spec.bits) {
        if (packed_parts(m, &own, &spec, &parts, &unused) == 0)
            drop_rows(&m->files[0].map, parts.codes->data, parts.codes->bytes, p, 0, p->rows);
        return;
    }
    if (p->role == ROLE_HEAD && m->config.tied) tied_head_as_table(&own);
    const StTensor *t = find_tensor(m, own.name);
    if (t) drop_rows(&st_file(m, t)->map, t->data, t->bytes, p, 0, p->rows);
}

int model_row_source(void *ctx, const Param *p, int64_t row0, int64_t n, float *out, Err *err) {
    const ModelFile *m = ctx;
    int rc = model_read_rows(m, p, row0, n, out, err);
    if (rc == 0 && row0 + n == p->rows) rc = model_unchanged(m, err);        // once a tensor
    if (rc == 0 && m->rows_read) m->rows_read(m->rows_ctx, p, n);
    return rc;
}

// ---------------------------------------------------------------------------------------------
// Writing floats

// Rows of p in a tile. A source that is an open model is asked by all threads, each for tiles of its own.
static bool by_threads(RowSource source) { return source == model_row_source; }

static int64_t tile_rows(const Param *p, RowSource source) {
    int64_t n = (by_threads(source) ? TILE_OF_ONE : TILE_VALUES) / p->cols;
    return n < 1 ? 1 : n > p->rows ? p->rows : n;
}

static void declare_float(StWriter *w, const Param *p, DType dtype) {
    int64_t shape[2] = {p->rows, p->cols};
    st_writer_tensor(w, p->name, dtype, param_is_norm(p) ? 1 : 2, param_is_norm(p) ? shape + 1 : shape);
}

// Asks the source for rows and refuses what is not finite, so that no broken model is ever left behind.
static int source_rows(RowSource source, void *ctx, const Param *p, int64_t row0, int64_t n, float *out, Err *err) {
    int rc = source(ctx, p, row0, n, out, err);
    if (rc || source == model_row_source) return rc;              // which looks itself
    int64_t bad = n;
    #pragma omp parallel for schedule(static) reduction(min : bad)
    for (int64_t r = 0; r < n; r++)
        if (first_not_finite(out + r * p->cols, p->cols) >= 0 && r < bad) bad = r;
    if (bad == n) return 0;
    return refuse_not_finite("nothing written", p, row0 + bad, out + bad * p->cols, p->cols, err);
}

// n rows from `row` on as dtype: h (DT_BF16) or x itself.
static int float_rows(const Param *p, DType dtype, RowSource source, void *ctx, int64_t row, int64_t n, float *x,
                      bf16 *h, Err *err) {
    int rc = source_rows(source, ctx, p, row, n, x, err);
    if (rc || dtype == DT_F32) return rc;
    uint32_t infinite = 0;
    for (int64_t i = 0; i < n * p->cols; i++) {
        h[i] = bf16_from_f32(x[i]);
        infinite |= (h[i] & 0x7fff) == 0x7f80;
    }
    if (!infinite) return 0;
    int64_t i = 0;
    while ((h[i] & 0x7fff) != 0x7f80) i++;
    return err_set(err, E_FORMAT, "nothing written: tensor '%s' holds %g at row %lld, too large for BF16; write F32",
                   p->name, (double)x[i], (long long)(row + i / p->cols));
}

static int write_float(StWriter *w, const Param *p, DType dtype, RowSource source, void *ctx, Err *err) {
    const int64_t tile = tile_rows(p, source), tiles = (p->rows + tile - 1) / tile;
    int rc = 0;
    #pragma omp parallel if (by_threads(source))
    {
        float *x = xmalloc((size_t)(tile * p->cols) * sizeof *x);
        bf16 *h = xmalloc((size_t)(tile * p->cols) * sizeof *h);
        #pragma omp for ordered schedule(dynamic, 1)
        for (int64_t i = 0; i < tiles; i++) {
            Err local;
            int64_t row = i * tile, n = p->rows - row < tile ? p->rows - row : tile;
            int failed, before;
            #pragma omp atomic read
            before = rc;
            if (before) continue;
            failed = float_rows(p, dtype, source, ctx, row, n, x, h, &local);
            #pragma omp ordered
            {
                if (rc == 0 && failed) {
                    #pragma omp atomic write
                    rc = failed;
                    if (err) *err = local;
                }
                if (rc == 0) st_writer_data(w, dtype == DT_F32 ? (void *)x : h, (size_t)(n * p->cols) *
                                            dtype_size(dtype));
            }
        }
        free(x);
        free(h);
    }
    return rc;
}

static int check_writable_dtype(DType dtype, Err *err) {
    if (dtype == DT_BF16 || dtype == DT_F32) return 0;
    return err_set(err, E_DTYPE, "weights are written as BF16 or F32, not as %s", dtype_name(dtype));
}

static const char *torch_name(DType dtype) { return dtype == DT_F32 ? "float32" : "bfloat16"; }

// ---------------------------------------------------------------------------------------------
// Writing model.bin

static void declare_packed(StWriter *w, const Param *p, const QuantSpec *s, const int64_t block[2]) {
    char name[128];
    int64_t codes[2] = {p->rows, (int64_t)quant_row_bytes(s->bits, p->cols)};
    int64_t scales[2] = {p->rows / block[0], p->cols / block[1]};
    snprintf(name, sizeof name, "%s.codes", p->name);
    st_writer_tensor(w, name, DT_U8, 2, codes);
    snprintf(name, sizeof name, "%s.scale", p->name);
    st_writer_tensor(w, name, scale_dtype(s), 2, scales);
    snprintf(name, sizeof name, "%s.zero", p->name);
    if (quant_has_zero(s)) st_writer_tensor(w, name, zero_dtype(s), 2, scales);
}

// Work on one tensor, in pieces of `piece` rows: whole bands of block[0] rows whose scales are made together. A band that
// is larger than a piece is read twice (a scale for a whole tensor that is too large to hold).
typedef struct {
    const Param *p, *from;               // what is written; what the source is asked for (they differ for a tied head)
    RowQuant q;
    int64_t across, piece;
    size_t row_bytes;
    float *x;                            // (piece, cols) as the source gave it
    uint8_t *packed;                     // (piece, row_bytes)
    float *mn, *mx;                      // (RANGE_PARTS, across)
    QParams *qp;                         // (rows/block[0], across)
    RowErrors *errors;                   // (piece), added up in order: threads change nothing
} Packer;

// Ranges of one band are made from at most so many runs of its rows, side by side.
#define RANGE_PARTS 64

static void no_ranges(float *mn, float *mx, int64_t n) {
    for (int64_t i = 0; i < n; i++) mn[i] = INFINITY, mx[i] = -INFINITY;
}

// Widens the ranges of a band, the first of RANGE_PARTS, by n of its rows.
static void fold_ranges(Packer *k, const float *x, int64_t n) {
    #pragma omp parallel for schedule(static)
    for (int i = 0; i < RANGE_PARTS; i++) {
        float *mn = k->mn + i * k->across, *mx = k->mx + i * k->across;
        int64_t first = n * i / RANGE_PARTS, last = n * (i + 1) / RANGE_PARTS;
        if (i) no_ranges(mn, mx, k->across);
        quantize_ranges(mn, mx, &k->q, x + first * k->p->cols, last - first);
    }
    for (int64_t i = k->across; i < RANGE_PARTS * k->across; i++) {
        int64_t b = i % k->across;
        if (k->mn[i] < k->mn[b]) k->mn[b] = k->mn[i];
        if (k->mx[i] > k->mx[b]) k->mx[b] = k->mx[i];
    }
}

// Codes of the n rows of a piece that begin at row `at` of it; the piece begins at row `row`. One band.
static void pack_rows(Packer *k, int64_t row, int64_t at, int64_t n) {
    const QParams *qp = k->qp + (row + at) / k->q.block[0] * k->across;
    #pragma omp parallel for schedule(static)
    for (int64_t r = at; r < at + n; r++)
        quantize_row(k->packed + (size_t)r * k->row_bytes, &k->errors[r], &k->q, k->x + r * k->p->cols, qp);
}

// Many bands: each by one thread, while its rows are in the nearest cache.
static void pack_small_bands(Packer *k, int64_t row, int64_t bands) {
    const int64_t b0 = k->q.block[0], cols = k->p->cols;
    #pragma omp parallel
    {
        float *mn = xmalloc((size_t)(2 * k->across) * sizeof *mn), *mx = mn + k->across;
        #pragma omp for schedule(dynamic, 16384 / (b0 * cols) + 1)
        for (int64_t i = 0; i < bands; i++) {
            QParams *qp = k->qp + (row / b0 + i) * k->across;
            no_ranges(mn, mx, k->across);
            quantize_ranges(mn, mx, &k->q, k->x + i * b0 * cols, b0);
            quantize_params(qp, &k->q, mn, mx, k->across);
            for (int64_t r = i * b0; r < (i + 1) * b0; r++)
                quantize_row(k->packed + (size_t)r * k->row_bytes, &k->errors[r], &k->q, k->x + r * cols, qp);
        }
        free(mn);
    }
}

// Scales and codes of a piece of n rows, whole bands, that begins at row `row`.
static void pack_piece(Packer *k, int64_t row, int64_t n) {
    const int64_t b0 = k->q.block[0];
    if (n / b0 >= 16) {
        pack_small_bands(k, row, n / b0);
        return;
    }
    for (int64_t at = 0; at < n; at += b0) {
        no_ranges(k->mn, k->mx, k->across);
        fold_ranges(k, k->x + at * k->p->cols, b0);
        quantize_params(k->qp + (row + at) / b0 * k->across, &k->q, k->mn, k->mx, k->across);
        pack_rows(k, row, at, b0);
    }
}

static int check_qparams(const Packer *k, int64_t n, Err *err) {
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(k->qp[i].scale) ||
            (scale_dtype(k->q.spec) == DT_BF16 && bf16_round(k->qp[i].scale) != k->qp[i].scale) ||
            (k->q.spec->zero == QZ_FLOAT && bf16_round(k->qp[i].zp) != k->qp[i].zp))
            return err_set(err, E_FORMAT, "nothing written: tensor '%s': scale %lld is %g, which %s does not hold: "
                           "the weights are too large", k->p->name, (long long)i, (double)k->qp[i].scale,
                           scale_dtype(k->q.spec) == DT_F32 ? "f32" : "bf16");
    return 0;
}

static void write_qparams(StWriter *w, const Packer *k, int64_t n) {
    if (scale_dtype(k->q.spec) == DT_F32) {
        float *scale = xmalloc((size_t)n * sizeof *scale);
        for (int64_t i = 0; i < n; i++) scale[i] = k->qp[i].scale;
        st_writer_data(w, scale, (size_t)n * sizeof *scale);
        free(scale);
        return;
    }
    bf16 *h = xmalloc((size_t)n * sizeof *h);
    for (int64_t i = 0; i < n; i++) h[i] = bf16_from_f32(k->qp[i].scale);
    st_writer_data(w, h, (size_t)n * sizeof *h);
    if (quant_has_zero(k->q.spec)) {
        uint8_t *z = (uint8_t *)h;       // as U8 or as the bits of I8
        if (k->q.spec->zero == QZ_FLOAT)
            for (int64_t i = 0; i < n; i++) h[i] = bf16_from_f32(k->qp[i].zp);
        else
            for (int64_t i = 0; i < n; i++) z[i] = (uint8_t)(int)k->qp[i].zp;
        st_writer_data(w, h, (size_t)n * dtype_size(zero_dtype(k->q.spec)));
    }
    free(h);
}

static void write_piece(StWriter *w, const Packer *k, int64_t n, RowErrors *sum) {
    st_writer_data(w, k->packed, (size_t)n * k->row_bytes);
    for (int64_t r = 0; r < n; r++) {
        const RowErrors *e = &k->errors[r];
        sum->signal += e->signal;
        sum->noise += e->noise;
        if (e->worst > sum->worst) sum->worst = e->worst;
        if (e->amax > sum->amax) sum->amax = e->amax;
    }
}

// Rows [row, end), one band that is larger than a piece: once for its scales, once for its codes.
static int pack_large_band(StWriter *w, Packer *k, int64_t row, int64_t end, RowSource source, void *ctx, RowErrors *sum,
                           Err *err) {
    no_ranges(k->mn, k->mx, k->across);
    for (int codes = 0; codes < 2; codes++) {
        for (int64_t at = row; at < end; at += k->piece) {
            int64_t n = end - at < k->piece ? end - at : k->piece;
            int rc = source_rows(source, ctx, k->from, at, n, k->x, err);
            if (rc) return rc;
            if (!codes) {
                fold_ranges(k, k->x, n);
                continue;
            }
            pack_rows(k, at, 0, n);
            write_piece(w, k, n, sum);
        }
        if (!codes) quantize_params(k->qp + row / k->q.block[0] * k->across, &k->q, k->mn, k->mx, k->across);
    }
    return 0;
}

// What a thread needs to work on a piece.
static void packer_alloc(Packer *k) {
    k->x = xmalloc((size_t)(k->piece * k->p->cols) * sizeof *k->x);
    k->packed = xmalloc((size_t)k->piece * k->row_bytes);
    k->mn = xmalloc((size_t)(2 * RANGE_PARTS * k->across) * sizeof *k->mn);
    k->mx = k->mn + RANGE_PARTS * k->across;
    k->errors = xmalloc((size_t)k->piece * sizeof *k->errors);
}

static void packer_free(Packer *k) {
    free(k->x);
    free(k->packed);
    free(k->mn);
    free(k->errors);
}

// Pieces of whole bands, written in order. Threads take pieces of their own where the source lets them, so that none
// waits for another; else they share the work on one.
static int pack_pieces(StWriter *w, const Packer *tensor, RowSource source, void *ctx, RowErrors *sum, Err *err) {
    const int64_t rows = tensor->p->rows, piece = tensor->piece, n_pieces = (rows + piece - 1) / piece;
    int rc = 0;
    #pragma omp parallel if (by_threads(source))
    {
        Packer k = *tensor;
        packer_alloc(&k);
        #pragma omp for ordered schedule(dynamic, 1)
        for (int64_t i = 0; i < n_pieces; i++) {
            Err local;
            int64_t row = i * piece, n = rows - row < piece ? rows - row : piece;
            int failed, before;
            #pragma omp atomic read
            before = rc;
            if (before) continue;
            failed = source_rows(source, ctx, k.from, row, n, k.x, &local);
            if (!failed) pack_piece(&k, row, n);
            #pragma omp ordered
            {
                if (rc == 0 && failed) {
                    #pragma omp atomic write
                    rc = failed;
                    if (err) *err = local;
                }
                if (rc == 0) write_piece(w, &k, n, sum);
            }
        }
        packer_free(&k);
    }
    return rc;
}

static int pack_tensor(StWriter *w, Packer *k, RowSource source, void *ctx, RowErrors *sum, Err *err) {
    const int64_t b0 = k->q.block[0];
    int rc = 0;
    if (k->piece >= b0) return pack_pieces(w, k, source, ctx, sum, err);
    packer_alloc(k);
    for (int64_t row = 0; row < k->p->rows && rc == 0; row += b0)
        rc = pack_large_band(w, k, row, row + b0, source, ctx, sum, err);
    packer_free(k);
    return rc;
}

static int write_packed(StWriter *w, const Param *p, const Param *from, const QuantSpec *s, DType dtype, bool trained,
                        RowSource source, void *ctx, PackReport *rep, Err *err) {
    Packer k = {.p = p, .from = from, .q = {.spec = s, .cols = p->cols}};
    int rc = quant_block_shape(s, p->rows, p->cols, k.q.block, err);
    if (rc) return rc;
    k.across = p->cols / k.q.block[1];
    // INT8 rows are made from the very values, as the trainer begins with; a tied head's, unless the trainer made it from
    // masters of more digits, from the table as the file has it.
    k.q.rounds = !quant_is_int8_rows(s) || (from != p && dtype == DT_BF16 && !trained);
    k.piece = tile_rows(p, source);
    if (k.piece > k.q.block[0]) k.piece -= k.piece % k.q.block[0];
    k.row_bytes = quant_row_bytes(s->bits, p->cols);
    int64_t n_qp = p->rows / k.q.block[0] * k.across;
    k.qp = xmalloc((size_t)n_qp * sizeof *k.qp);
    *rep = (PackReport){.p = p, .spec = s};
    rep->bytes = (size_t)p->rows * k.row_bytes + (size_t)n_qp * dtype_size(scale_dtype(s));
    if (quant_has_zero(s)) rep->bytes += (size_t)n_qp * dtype_size(zero_dtype(s));
    rep->float_bytes = (size_t)p->rows * (size_t)p->cols * dtype_size(dtype);
    RowErrors sum = {0};
    rc = pack_tensor(w, &k, source, ctx, &sum, err);
    rep->sqnr_db = sum.noise > 0 ? 10 * log10(sum.signal / sum.noise) : INFINITY;
    rep->max_abs_err = sum.worst;
    rep->amax = sum.amax;
    if (rc == 0) rc = check_qparams(&k, n_qp, err);
    if (rc == 0) write_qparams(w, &k, n_qp);
    free(k.qp);
    return rc;
}

// INT8 rows that were trained: the codes as they are, and the scales after them.
static int write_trained(StWriter *w, const Param *p, CodeSource source, void *ctx, Err *err) {
    int64_t tile = tile_rows(p, NULL);
    int8_t *codes = xmalloc((size_t)(tile * p->cols));
    float *scale = xmalloc((size_t)p->rows * sizeof *scale);
    int rc = 0;
    for (int64_t row = 0; row < p->rows && rc == 0; row += tile) {
        int64_t n = p->rows - row < tile ? p->rows - row : tile;
        rc = source(ctx, p, row, n, codes, scale + row, err);
        for (int64_t r = row; r < row + n && rc == 0; r++)
            if (!(isfinite(scale[r]) && scale[r] >= 0))
                rc = err_set(err, E_FORMAT, "nothing written: tensor '%s': the scale of row %lld is %g: the weights "
                             "are no longer finite", p->name, (long long)r, (double)scale[r]);
        if (rc == 0) st_writer_data(w, codes, (size_t)(n * p->cols));
    }
    if (rc == 0) st_writer_data(w, scale, (size_t)p->rows * sizeof *scale);
    free(codes);
    free(scale);
    return rc;
}

// Where a writer takes values from and what it tells: codes NULL unless INT8 rows are there already.
typedef struct {
    RowSource rows;
    CodeSource codes;
    void *ctx;
    void (*report)(void *ctx, const PackReport *r);
    void *report_ctx;
} Sources;

static int write_bin(const char *path, const LlamaConfig *c, const QuantPlan *plan, const ParamTable *table,
                     const Tokenizer *tok, DType dtype, bool packed, const Sources *from, Err *err) {
    int rc = check_writable_dtype(dtype, err);
    if (rc) return rc;
    uint8_t *blob = NULL;
    size_t blob_size = 0;
    if (tok && (rc = tokenizer_to_blob(tok, &blob, &blob_size, err))) return rc;

    // A tied table serves two masters: the head is packed for itself where the plan says so.
    Param head = {.name = "lm_head.weight", .role = ROLE_HEAD, .layer = -1, .rows = c->V, .cols = c->C};
    bool extra_head = packed && c->tied && plan->tied_head.bits;
    int n = table->n + extra_head;
    StWriter *w = st_writer_new();
    char *config = llama_config_to_json(c, torch_name(dtype)), *quant = quant_plan_to_json(plan);
    st_writer_meta(w, "format", WRITER);
    st_writer_meta(w, "version", "1");
    st_writer_meta(w, "packed", packed ? "true" : "false");
    st_writer_meta(w, "config", config);
    st_writer_meta(w, "quant", quant);
    st_writer_seal(w);
    free(config);
    free(quant);
    for (int i = 0; i < n && rc == 0; i++) {
        const Param *p = i < table->n ? &table->p[i] : &head;
        QuantSpec spec = packed ? packed_spec(c, plan, p) : (QuantSpec){0};
        int64_t block[2];
        if (!spec.bits) declare_float(w, p, dtype);
        else if ((rc = quant_block_shape(&spec, p->rows, p->cols, block, err)) == 0) declare_packed(w, p, &spec, block);
    }
    int64_t blob_shape[1] = {(int64_t)blob_size};
    if (blob) st_writer_tensor(w, TOKENIZER_TENSOR, DT_U8, 1, blob_shape);
    if (rc == 0) rc = st_writer_begin(w, path, err);
    if (rc == 0) st_writer_behind(w);
    for (int i = 0; i < n && rc == 0; i++) {
        const Param *p = i < table->n ? &table->p[i] : &head;
        QuantSpec spec = packed ? packed_spec(c, plan, p) : (QuantSpec){0};
        if (!spec.bits) {
            rc = write_float(w, p, dtype, from->rows, from->ctx, err);
        } else if (from->codes && p != &head && quant_is_int8_rows(&spec)) {
            rc = write_trained(w, p, from->codes, from->ctx, err);
        } else {
            PackReport rep;
            const Param *values = p == &head ? param_get(table, -1, ROLE_EMBED) : p;
            rc = write_packed(w, p, values, &spec, dtype, from->codes != NULL, from->rows, from->ctx, &rep, err);
            if (rc == 0 && from->report) from->report(from->report_ctx, &rep);
        }
    }
    if (rc == 0 && blob) st_writer_data(w, blob, blob_size);
    free(blob);
    if (rc == 0) return st_writer_finish(w, err);
    st_writer_abort(w);
    return rc;
}

int model_write_bin(const char *path, const LlamaConfig *c, const QuantPlan *plan, const ParamTable *table,
                    const Tokenizer *tok, DType dtype, RowSource source, void *ctx, Err *err) {
    if (quant_plan_has_rows(plan))
        return err_set(err, E_USAGE, "%s: the INT8 rows of %s are stored as codes, not as floats", path, plan->name);
    Sources from = {.rows = source, .ctx = ctx};
    return write_bin(path, c, plan, table, tok, dtype, false, &from, err);
}

int model_write_packed(const char *path, const LlamaConfig *c, const QuantPlan *plan, const ParamTable *table,
                       const Tokenizer *tok, DType dtype, RowSource source, void *ctx,
                       void (*report)(void *ctx, const PackReport *r), void *report_ctx, Err *err) {
    Sources from = {.rows = source, .ctx = ctx, .report = report, .report_ctx = report_ctx};
    return write_bin(path, c, plan, table, tok, dtype, true, &from, err);
}

int model_write_trained(const char *path, const LlamaConfig *c, const QuantPlan *plan, const ParamTable *table,
                        const Tokenizer *tok, DType dtype, RowSource rows, CodeSource codes, void *ctx, Err *err) {
    Sources from = {.rows = rows, .codes = codes, .ctx = ctx};
    return write_bin(path, c, plan, table, tok, dtype, true, &from, err);
}

// ---------------------------------------------------------------------------------------------
// Writing a Hugging Face folder

// Removes a flat folder of ours and what is in it.
static void remove_folder(const char *dir) {
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d));) {
        char path[2048];
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        unlink(path);
    }
    if (d) closedir(d);
    rmdir(dir);
}

// May DIR be replaced? Only if it is empty, or all of its files bear names that an export writes and its weights are
// signed.
static int check_replaceable(const char *dir, bool *empty, Err *err) {
    static const char *names[] = {"config.json", "generation_config.json", "model.safetensors.index.json",
                                  "tokenizer.json",
                                  "tokenizer_config.json"};
    bool signed_by_us = false;
    int rc = 0;
    *empty = true;
    DIR *d = opendir(dir);
    if (!d) return err_set(err, E_FAIL, "cannot read folder %s: %s", dir, strerror(errno));
    for (struct dirent *e; rc == 0 && (e = readdir(d));) {
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
        *empty = false;
        bool known = false;
        for (size_t i = 0; i < sizeof names / sizeof *names; i++) known |= strcmp(e->d_name, names[i]) == 0;
        if (!known && strncmp(e->d_name, "model", 5) == 0 && ends_with(e->d_name, ".safetensors")) {
            char path[2048];
            Safetensors st;
            snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
            if (safetensors_open(&st, path, NULL) == 0) {
                const char *writer = safetensors_meta(&st, "writer");
                known = writer && strcmp(writer, WRITER) == 0;
                signed_by_us |= known;
                safetensors_close(&st);
            }
        }
        if (!known)
            rc = err_set(err, E_USAGE, "%s holds '%.200s', which is not of an earlier export: name a new folder or "
                         "empty this one", dir, e->d_name);
    }
    closedir(d);
    if (rc == 0 && !*empty && !signed_by_us)
        rc = err_set(err, E_USAGE, "%s is not empty and holds no weights exported before: name a new folder or empty "
                     "this one", dir);
    return rc;
}

static int write_text(const char *dir, const char *name, const char *text, size_t len, Err *err) {
    char path[1024];
    AtomicFile f;
    int rc = join(path, sizeof path, dir, name, err);
    if (rc == 0) rc = atomic_open(&f, path, err);
    if (rc) return rc;
    atomic_write(&f, text, len);
    return atomic_commit(&f, err);
}

static int write_json(const char *dir, const char *name, cJSON *root, Err *err) {
    char *text = cJSON_Print(root);
    cJSON_Delete(root);
    if (!text) return err_set(err, E_NOMEM, "%s/%s: no memory for its text", dir, name);
    int rc = write_text(dir, name, text, strlen(text), err);
    cJSON_free(text);
    return rc;
}

static int write_shard(const char *path, const ParamTable *table, int first, int last, const FolderWeights *from,
                       Err *err) {
    StWriter *w = st_writer_new();
    st_writer_meta(w, "format", "pt");           // what transformers looks for
    st_writer_meta(w, "writer", WRITER);
    for (int i = first; i < last; i++) from->declare(from->ctx, &table->p[i], w);
    int rc = st_writer_begin(w, path, err);
    for (int i = first; i < last && rc == 0; i++) rc = from->write(from->ctx, &table->p[i], w, err);
    if (rc == 0) return st_writer_finish(w, err);
    st_writer_abort(w);
    return rc;
}

// The shard that begins with tensor `first` ends before the tensor returned.
static int shard_end(const ParamTable *table, int first, size_t shard_bytes, const FolderWeights *from) {
    size_t bytes = from->bytes(from->ctx, &table->p[first]);
    int i = first + 1;
    while (i < table->n &&
           from->bytes(from->ctx, &table->p[i]) <= shard_bytes - (bytes < shard_bytes ? bytes : shard_bytes))
        bytes += from->bytes(from->ctx, &table->p[i++]);
    return i;
}

// Which tensors a shard holds is read from itself.
static int index_shard(cJSON *map, size_t *total, const char *path, const char *name, Err *err) {
    Safetensors st;
    int rc = safetensors_open(&st, path, err);
    if (rc) return rc;
    for (int i = 0; i < st.n; i++) {
        cJSON_AddStringToObject(map, st.tensors[i].name, name);
        *total += st.tensors[i].bytes;
    }
    safetensors_close(&st);
    return 0;
}

static int write_weights(const char *dir, const ParamTable *table, size_t shard_bytes, const FolderWeights *from,
                         Err *err) {
    char path[1024], name[64] = "model.safetensors";
    int n_shards = 0, rc = 0, k = 0;
    size_t total = 0;
    for (int i = 0; i < table->n; i = shard_end(table, i, shard_bytes, from)) n_shards++;
    cJSON *map = cJSON_CreateObject();
    for (int first = 0, last; first < table->n && rc == 0; first = last) {
        last = shard_end(table, first, shard_bytes, from);
        if (n_shards > 1) snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", ++k, n_shards);
        rc = join(path, sizeof path, dir, name, err);
        if (rc == 0) rc = write_shard(path, table, first, last, from, err);
        if (rc == 0 && n_shards > 1) rc = index_shard(map, &total, path, name, err);
    }
    if (rc || n_shards == 1) {
        cJSON_Delete(map);
        return rc;
    }
    cJSON *index = cJSON_CreateObject();
    cJSON_AddNumberToObject(cJSON_AddObjectToObject(index, "metadata"), "total_size", (double)total);
    cJSON_AddItemToObject(index, "weight_map", map);
    return write_json(dir, "model.safetensors.index.json", index, err);
}

// config.json, with the description of the quantization where there is one.
static int write_config(const char *dir, const LlamaConfig *c, DType dtype, const char *quantization, Err *err) {
    char *config = llama_config_to_json(c, torch_name(dtype));
    if (!quantization) {
        int rc = write_text(dir, "config.json", config, strlen(config), err);
        free(config);
        return rc;
    }
    cJSON *root = json_parse(config, strlen(config), "config.json", err);
    cJSON *q = root ? json_parse(quantization, strlen(quantization), "quantization_config", err) : NULL;
    free(config);
    if (!q) {
        cJSON_Delete(root);
        return E_FORMAT;
    }
    cJSON_AddItemToObject(root, "quantization_config", q);
    return write_json(dir, "config.json", root, err);
}

static int write_configs(const char *dir, const LlamaConfig *c, const Tokenizer *tok, DType dtype,
                         const char *quantization, Err *err) {
    int rc = write_config(dir, c, dtype, quantization, err);
    if (rc) return rc;
    cJSON *g = cJSON_CreateObject();
    cJSON_AddBoolToObject(g, "_from_model_config", 1);
    if (c->bos >= 0) cJSON_AddNumberToObject(g, "bos_token_id", c->bos);
    if (c->n_eos == 1) cJSON_AddNumberToObject(g, "eos_token_id", c->eos[0]);
    if (c->n_eos > 1) cJSON_AddItemToObject(g, "eos_token_id", cJSON_CreateIntArray(c->eos, c->n_eos));
    rc = write_json(dir, "generation_config.json", g, err);
    if (rc || !tok) return rc;
    char *text;
    size_t len;
    rc = tokenizer_to_json(tok, &text, &len, err);
    if (rc) return rc;
    rc = write_text(dir, "tokenizer.json", text, len, err);
    free(text);
    if (rc) return rc;
    text = tokenizer_config_json(tok);
    if (text) rc = write_text(dir, "tokenizer_config.json", text, strlen(text), err);
    free(text);
    return rc;
}

// Puts the finished folder in place. An old export is moved aside first and removed last, so that at every moment one
// of the two is whole.
static int install_folder(const char *tmp, const char *dir, bool replace, Err *err) {
    char old[1100];
    snprintf(old, sizeof old, "%s.old-%ld", dir, (long)getpid());
    if (replace && rename(dir, old)) return err_set(err, E_FAIL, "cannot move %s aside: %s", dir, strerror(errno));
    if (rename(tmp, dir)) {                      // over an empty folder, or where nothing is
        int e = errno;
        if (replace && rename(old, dir)) return err_set(err, E_FAIL, "cannot rename %s to %s: %s; what was there is "
                                                        "now %s", tmp, dir, strerror(e), old);
        return err_set(err, E_FAIL, "cannot rename %s to %s: %s; nothing was changed", tmp, dir, strerror(e));
    }
    if (replace) remove_folder(old);
    return 0;
}

int model_write_folder(const char *dir, const LlamaConfig *c, const ParamTable *table, const Tokenizer *tok,
                       DType dtype, size_t shard_bytes, const char *quantization, const FolderWeights *from, Err *err) {
    char target[900], tmp[1000];
    size_t len = strlen(dir);
    while (len > 1 && dir[len - 1] == '/') len--;
    if (len == 0 || len >= sizeof target)
        return err_set(err, E_USAGE, "folder name of %zu bytes; 1 to %zu are possible", len, sizeof target - 1);
    memcpy(target, dir, len);
    target[len] = 0;
    bool exists = path_exists(target), empty = false;
    int rc = check_writable_dtype(dtype, err);
    if (rc == 0 && exists && !path_is_dir(target)) rc = err_set(err, E_USAGE, "%s is there and is no folder", target);
    if (rc == 0 && exists) rc = check_replaceable(target, &empty, err);
    if (rc) return rc;
    snprintf(tmp, sizeof tmp, "%s.tmp-%ld", target, (long)getpid());
    if (mkdir(tmp, 0777)) return err_set(err, E_FAIL, "cannot make folder %s: %s", tmp, strerror(errno));
    rc = write_weights(tmp, table, shard_bytes, from, err);
    if (rc == 0) rc = write_configs(tmp, c, tok, dtype, quantization, err);
    if (rc == 0) rc = install_folder(tmp, target, exists && !empty, err);
    if (rc) remove_folder(tmp);
    return rc;
}

// The weights of a folder as floats.
typedef struct { DType dtype; RowSource source; void *ctx; } FloatWeights;

static size_t float_bytes(void *ctx, const Param *p) {
    return (size_t)p->rows * (size_t)p->cols * dtype_size(((const FloatWeights *)ctx)->dtype);
}

static void float_declare(void *ctx, const Param *p, StWriter *w) {
    declare_float(w, p, ((const FloatWeights *)ctx)->dtype);
}

static int float_write(void *ctx, const Param *p, StWriter *w, Err *err) {
    const FloatWeights *f = ctx;
    return write_float(w, p, f->dtype, f->source, f->ctx, err);
}

int model_write_float(StWriter *w, const Param *p, DType dtype, RowSource source, void *ctx, Err *err) {
    return write_float(w, p, dtype, source, ctx, err);
}

int model_write_hf_shards(const char *dir, const LlamaConfig *c, const ParamTable *table, const Tokenizer *tok,
                          DType dtype, size_t shard_bytes, RowSource source, void *ctx, Err *err) {
    FloatWeights values = {dtype, source, ctx};
    FolderWeights from = {&values, float_bytes, float_declare, float_write};
    return model_write_folder(dir, c, table, tok, dtype, shard_bytes, NULL, &from, err);
}

int model_write_hf(const char *dir, const LlamaConfig *c, const ParamTable *table, const Tokenizer *tok, DType dtype,
                   RowSource source, void *ctx, Err *err) {
    return model_write_hf_shards(dir, c, table, tok, dtype, HF_SHARD_BYTES, source, ctx, err);
}
