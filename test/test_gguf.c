// GGUF: block formats bit for bit against the gguf package, a whole tiny model, configurations, and hostile files in
// the shape of past vulnerabilities of such readers. Goldens by dev/ref/gen_gguf.py.
#include "test_common.h"
#include "checkpoint.h"
#include "gguf.h"
#include "safetensors.h"

// ---------------------------------------------------------------------------------------------
// Builds files in memory.

typedef struct { uint8_t *p; size_t n; } Bytes;

static void put(Bytes *b, const void *data, size_t n) {
    b->p = realloc(b->p, b->n + n + 1);
    if (n) memcpy(b->p + b->n, data, n);
    b->n += n;
}

static void put_int(Bytes *b, uint64_t v, int bytes) {
    for (int i = 0; i < bytes; i++) {
        uint8_t byte = (uint8_t)(v >> (8 * i));
        put(b, &byte, 1);
    }
}

static void put_string(Bytes *b, const char *s) {
    put_int(b, strlen(s), 8);
    put(b, s, strlen(s));
}

static void put_header(Bytes *b, uint32_t version, uint64_t tensors, uint64_t values) {
    put(b, "GGUF", 4);
    put_int(b, version, 4);
    put_int(b, tensors, 8);
    put_int(b, values, 8);
}

static void put_u32(Bytes *b, const char *key, uint32_t v) {
    put_string(b, key);
    put_int(b, GGUF_U32, 4);
    put_int(b, v, 4);
}

static void put_f32(Bytes *b, const char *key, float v) {
    put_string(b, key);
    put_int(b, GGUF_F32, 4);
    put_int(b, f32_bits(v), 4);
}

static void put_text(Bytes *b, const char *key, const char *v) {
    put_string(b, key);
    put_int(b, GGUF_STRING, 4);
    put_string(b, v);
}

static void put_tensor(Bytes *b, const char *name, int ndim, const uint64_t *ne, uint32_t type, uint64_t offset) {
    put_string(b, name);
    put_int(b, (uint64_t)ndim, 4);
    for (int i = 0; i < ndim; i++) put_int(b, ne[i], 8);
    put_int(b, type, 4);
    put_int(b, offset, 8);
}

static void put_data(Bytes *b, size_t bytes) {
    while (b->n % 32) put_int(b, 0, 1);
    for (size_t i = 0; i < bytes; i++) put_int(b, i * 7 & 0x3f, 1);
}

// Parses a copy of its own, so that a sanitizer sees any read beyond the end.
static int parse_copy(Gguf *g, const Bytes *b, uint8_t **copy, Err *err) {
    *copy = malloc(b->n ? b->n : 1);
    if (b->n) memcpy(*copy, b->p, b->n);
    return gguf_parse(g, *copy, b->n, "test", err);
}

static void expect_refused(Bytes *b, int code, const char *message) {
    Gguf g;
    Err err = {0};
    uint8_t *copy;
    int rc = parse_copy(&g, b, &copy, &err);
    if (rc != code || !strstr(err.text, message)) fail_msg("rc %d, message '%s', expected '%s'", rc, err.text, message);
    free(copy);
    free(b->p);
    *b = (Bytes){0};
}

// ---------------------------------------------------------------------------------------------
// Values

static void blocks_match_reference(void **state) {
    (void)state;
    static const struct { const char *name; uint32_t type; } types[] = {
        {"F16", 1}, {"Q4_0", 2}, {"Q4_1", 3}, {"Q5_0", 6}, {"Q5_1", 7}, {"Q8_0", 8}, {"Q4_K", 12}, {"Q5_K", 13},
            {"Q6_K", 14},
        {"BF16", 30},
    };
    Safetensors st;
    Err err = {0};
    assert_int_equal(safetensors_open(&st, "test/golden/gguf_blocks.safetensors", &err), 0);
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        char name[32];
        snprintf(name, sizeof name, "%s.raw", types[i].name);
        const StTensor *raw = safetensors_find(&st, name);
        snprintf(name, sizeof name, "%s.f32", types[i].name);
        const StTensor *want = safetensors_find(&st, name);
        assert_non_null(raw);
        assert_non_null(want);
        int64_t cols = want->shape[1];
        GgufTensor t = {.type = types[i].type, .ndim = 2, .ne = {cols, want->shape[0], 1, 1}, .data = raw->data};
        float row[256];
        assert_true(cols <= 256);
        assert_string_equal(gguf_type_name(t.type), types[i].name);
        for (int64_t r = 0; r < want->shape[0]; r++) {
            assert_int_equal(gguf_row(row, &t, r, &err), 0);
            for (int64_t c = 0; c < cols; c++) {                  // bits, but +0 and -0 are one value to both
                float w;
                memcpy(&w, want->data + (size_t)(r * cols + c) * 4, 4);
                if (f32_bits(row[c]) != f32_bits(w) && !(row[c] == 0 && w == 0))
                    fail_msg("%s row %d col %d: %a, expected %a", types[i].name, (int)r, (int)c, (double)row[c],
                             (double)w);
            }
        }
        assert_int_equal(gguf_row(row, &t, want->shape[0], &err), E_SHAPE);
    }
    safetensors_close(&st);
}

// A whole model: types mixed, q and k permuted, llama3 factors. Weights as a Hugging Face model has them, bit for bit.
static void tiny_model(void **state) {
    (void)state;
    ModelFile m;
    Safetensors st;
    Err err = {0};
    if (model_open(&m, "test/golden/gguf_tiny.gguf", &err)) fail_msg("%s", err.text);
    assert_int_equal(m.kind, MODEL_GGUF);
    assert_false(m.config.tied);
    assert_int_equal(m.config.V, 64);
    assert_int_equal(m.config.HS, 8);
    assert_int_equal(m.config.rope_scaling, ROPE_LLAMA3);
    assert_float_equal(m.config.rope_factor, 8.0, 0);
    assert_float_equal(m.config.rope_theta, 500000.0, 0);
    assert_int_equal(m.config.rope_original_max_T, 8192);
    assert_int_equal(m.config.bos, 1);
    assert_int_equal(m.config.n_eos, 1);
    assert_int_equal(m.config.eos[0], 2);
    assert_int_equal(safetensors_open(&st, "test/golden/gguf_tiny.safetensors", &err), 0);
    ParamTable table;
    assert_int_equal(param_table_build(&table, &m.config, NULL, &err), 0);
    for (int i = 0; i < table.n; i++) {
        const Param *p = &table.p[i];
        const StTensor *want = safetensors_find(&st, p->name);
        assert_non_null(want);
        float *x = malloc((size_t)(p->rows * p->cols) * sizeof *x);
        assert_int_equal(model_read_rows(&m, p, 0, p->rows, x, &err), 0);
        if (memcmp(x, want->data, want->bytes)) fail_msg("%s differs", p->name);
        // A slice from the middle is the same rows.
        if (p->rows > 5) {
            assert_int_equal(model_read_rows(&m, p, 3, 2, x, &err), 0);
            assert_memory_equal(x, want->data + (size_t)(3 * p->cols) * 4, (size_t)(2 * p->cols) * 4);
        }
        assert_int_equal(model_read_rows(&m, p, p->rows, 1, x, &err), E_SHAPE);
        free(x);
    }
    param_table_free(&table);
    safetensors_close(&st);
    model_close(&m);
}

static void metadata(void **state) {
    (void)state;
    Bytes b = {0};
    Gguf g;
    Err err = {0};
    uint8_t *copy;
    put_header(&b, 2, 0, 15);
    put_string(&b, "i8"), put_int(&b, GGUF_I8, 4), put_int(&b, 0xfe, 1);
    put_string(&b, "u64"), put_int(&b, GGUF_U64, 4), put_int(&b, UINT64_MAX, 8);
    put_string(&b, "f64"), put_int(&b, GGUF_F64, 4), put_int(&b, 0x3ff8000000000000u, 8);
    put_string(&b, "flag"), put_int(&b, GGUF_BOOL, 4), put_int(&b, 1, 1);
    put_text(&b, "text", "hello");
    for (int k = 0; k < 10; k++) {                                 // more arrays than there are slots for their indices
        char key[16];
        snprintf(key, sizeof key, "list%d", k);
        put_string(&b, key), put_int(&b, GGUF_ARRAY, 4), put_int(&b, GGUF_STRING, 4), put_int(&b, 3, 8);
        put_string(&b, "a"), put_string(&b, ""), put_string(&b, key);
    }
    if (parse_copy(&g, &b, &copy, &err)) fail_msg("%s", err.text);
    int64_t i = 0;
    double d = 0;
    size_t len = 0;
    assert_int_equal(gguf_get_int(&g, "i8", true, -10, 10, &i, &err), 0);
    assert_int_equal(i, -2);
    assert_int_equal(gguf_get_int(&g, "u64", true, 0, INT64_MAX, &i, &err), 0);
    assert_true(i == INT64_MAX);
    assert_int_equal(gguf_get_int(&g, "u64", true, 0, 100, &i, &err), E_FORMAT);
    assert_int_equal(gguf_get_int(&g, "f64", true, 0, 10, &i, &err), E_FORMAT);
    assert_int_equal(gguf_get_int(&g, "none", true, 0, 10, &i, &err), E_MISSING);
    i = 42;
    assert_int_equal(gguf_get_int(&g, "none", false, 0, 10, &i, &err), 0);
    assert_int_equal(i, 42);
    assert_int_equal(gguf_get_double(&g, "f64", true, &d, &err), 0);
    assert_true(d == 1.5);
    assert_int_equal(gguf_get_double(&g, "i8", true, &d, &err), 0);
    assert_true(d == -2);
    assert_int_equal(gguf_get_double(&g, "text", true, &d, &err), E_FORMAT);
    const char *s = gguf_get_string(&g, "text", &len);
    assert_int_equal(len, 5);
    assert_memory_equal(s, "hello", 5);
    assert_null(gguf_get_string(&g, "flag", &len));
    for (int round = 0; round < 2; round++)
        for (int k = 0; k < 10; k++) {
            char key[16];
            snprintf(key, sizeof key, "list%d", k);
            const GgufValue *v = gguf_value(&g, key);
            assert_non_null(v);
            s = gguf_string_at(&g, v, 2, &len);
            assert_int_equal(len, 5);
            assert_memory_equal(s, key, 5);
            gguf_string_at(&g, v, 1, &len);
            assert_int_equal(len, 0);
            assert_null(gguf_string_at(&g, v, 3, &len));
        }
    gguf_close(&g);
    free(copy);
    free(b.p);
}

// ---------------------------------------------------------------------------------------------
// Configurations

typedef struct { int heads, kv_heads, head_size; const char *scaling; float factor; const float *freqs; } Shape;

// A model of one block over F32 zeros, 64 wide.
static Bytes model_file(const Shape *s, const char *arch, const char *left_out, const char *extra) {
    Bytes values = {0}, infos = {0}, file = {0};
    int n_values = 0, n_tensors = 0, q = s->heads * s->head_size, kv = s->kv_heads * s->head_size;
    uint64_t at = 0;
#define VALUE(key, kind, v) if (!left_out || strcmp(left_out, key)) put_##kind(&values, key, v), n_values++
    VALUE("general.architecture", text, arch);
    VALUE("llama.block_count", u32, 1);
    VALUE("llama.embedding_length", u32, 64);
    VALUE("llama.feed_forward_length", u32, 96);
    VALUE("llama.attention.head_count", u32, (uint32_t)s->heads);
    VALUE("llama.attention.head_count_kv", u32, (uint32_t)s->kv_heads);
    VALUE("llama.attention.layer_norm_rms_epsilon", f32, 1e-5f);
    VALUE("llama.context_length", u32, 2048);
    VALUE("llama.rope.freq_base", f32, 500000.0f);
    if (s->head_size * s->heads != 64) VALUE("llama.attention.key_length", u32, (uint32_t)s->head_size);
    if (s->scaling) {
        VALUE("llama.rope.scaling.type", text, s->scaling);
        VALUE("llama.rope.scaling.factor", f32, s->factor);
    }
    VALUE("tokenizer.ggml.eos_token_id", u32, 3);
    VALUE("tokenizer.ggml.bos_token_id", u32, UINT32_MAX);        // "none", as old converters wrote it
    if (extra && strchr(extra, '=')) {                            // "key=number"
        char key[64];
        snprintf(key, sizeof key, "%.*s", (int)(strchr(extra, '=') - extra), extra);
        put_u32(&values, key, (uint32_t)atoi(strchr(extra, '=') + 1));
        n_values++;
    }
#undef VALUE
    const struct { const char *name; int64_t cols, rows; } tensors[] = {
        {"token_embd.weight", 64, 32}, {"blk.0.attn_norm.weight", 64, 0}, {"blk.0.attn_q.weight", 64, q},
        {"blk.0.attn_k.weight", 64, kv}, {"blk.0.attn_v.weight", 64, kv}, {"blk.0.attn_output.weight", q, 64},
        {"blk.0.ffn_norm.weight", 64, 0}, {"blk.0.ffn_gate.weight", 64, 96}, {"blk.0.ffn_up.weight", 64, 96},
        {"blk.0.ffn_down.weight", 96, 64}, {"output_norm.weight", 64, 0}, {"rope_freqs.weight", s->head_size / 2, 0},
        {extra, 64, 64},
    };
    size_t freqs_at = 0;
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
        const char *name = tensors[i].name;
        if (!name || strchr(name, '=') || (left_out && strcmp(left_out, name) == 0)) continue;
        if (strcmp(name, "rope_freqs.weight") == 0) {
            if (!s->freqs) continue;
            freqs_at = at;
        }
        uint64_t ne[2] = {(uint64_t)tensors[i].cols, (uint64_t)tensors[i].rows};
        put_tensor(&infos, name, tensors[i].rows ? 2 : 1, ne, 0, at);
        at += (uint64_t)(tensors[i].cols * (tensors[i].rows ? tensors[i].rows : 1) * 4 + 31) / 32 * 32;
        n_tensors++;
    }
    put_header(&file, 3, (uint64_t)n_tensors, (uint64_t)n_values);
    put(&file, values.p, values.n);
    put(&file, infos.p, infos.n);
    put_data(&file, 0);
    size_t base = file.n;
    uint8_t *zeros = calloc(1, at);
    put(&file, zeros, at);
    if (s->freqs) memcpy(file.p + base + freqs_at, s->freqs, (size_t)(s->head_size / 2) * 4);
    free(zeros);
    free(values.p);
    free(infos.p);
    return file;
}

static int config_of(Bytes *file, LlamaConfig *c, Err *err) {
    Gguf g;
    int rc = gguf_parse(&g, file->p, file->n, "test", err);
    if (rc == 0) {
        rc = llama_config_from_gguf(c, &g, err);
        gguf_close(&g);
    }
    free(file->p);
    return rc;
}

static void configurations(void **state) {
    (void)state;
    LlamaConfig c;
    Err err = {0};
    Shape s = {.heads = 4, .kv_heads = 2, .head_size = 16};
    Bytes f = model_file(&s, "llama", NULL, NULL);
    if (config_of(&f, &c, &err)) fail_msg("%s", err.text);
    assert_true(c.tied && c.V == 32 && c.C == 64 && c.FF == 96 && c.NH == 4 && c.NKV == 2 && c.HS == 16 && c.L == 1);
    assert_true(c.bos == -1 && c.n_eos == 1 && c.eos[0] == 3 && c.rope_theta == 500000.0 && c.max_T == 2048);
    assert_int_equal(c.rope_scaling, ROPE_DEFAULT);
    assert_float_equal(c.norm_eps, 1e-5f, 0);

    Shape wide = {.heads = 4, .kv_heads = 1, .head_size = 32, .scaling = "linear", .factor = 4};
    f = model_file(&wide, "llama", NULL, NULL);
    if (config_of(&f, &c, &err)) fail_msg("%s", err.text);
    assert_true(c.HS == 32 && c.rope_scaling == ROPE_LINEAR && c.rope_factor == 4);

    static const struct { const char *left_out, *extra, *message; } bad[] = {
        {"llama.block_count", NULL, "block_count"}, {"llama.embedding_length", NULL, "embedding_length"},
        {"llama.attention.layer_norm_rms_epsilon", NULL, "epsilon"}, {"token_embd.weight", NULL, "token_embd"},
        {NULL, "llama.expert_count=8", "experts"}, {NULL, "llama.rope.dimension_count=8", "dimension_count"},
        {"llama.attention.head_count", "llama.attention.head_count=0", "head_count"},
        {"llama.attention.head_count", "llama.attention.head_count=3", "divide"},
        {"llama.block_count", "llama.block_count=100000", "expected 1 to"},
        {"llama.context_length", "llama.context_length=0", "context_length"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        f = model_file(&s, "llama", bad[i].left_out, bad[i].extra);
        int rc = config_of(&f, &c, &err);
        if (rc == 0 || !strstr(err.text, bad[i].message))
            fail_msg("case %zu: rc %d, '%s', expected '%s'", i, rc, err.text, bad[i].message);
    }
    f = model_file(&s, "qwen2", NULL, NULL);
    assert_int_equal(config_of(&f, &c, &err), E_FORMAT);
    assert_non_null(strstr(err.text, "qwen2"));
    Shape yarn = {.heads = 4, .kv_heads = 2, .head_size = 16, .scaling = "yarn", .factor = 4};
    f = model_file(&yarn, "llama", NULL, NULL);
    assert_int_equal(config_of(&f, &c, &err), E_FORMAT);
    assert_non_null(strstr(err.text, "yarn"));
}

// The converter's f32 formula for rope_freqs.weight, as it stands there.
static void converter_freqs(float *out, int head_size, float factor, float low, float high, float original) {
    for (int i = 0; i < head_size / 2; i++) {
        float freq = 1.0f / powf(500000.0f, (float)(2 * i) / (float)head_size), wavelen = 6.2831853f / freq;
        if (wavelen < original / high) out[i] = 1;
        else if (wavelen > original / low) out[i] = factor;
        else {
            float smooth = (original / wavelen - low) / (high - low);
            out[i] = 1 / ((1 - smooth) / factor + smooth);
        }
    }
}

static void llama3_factors(void **state) {
    (void)state;
    LlamaConfig c;
    Err err = {0};
    float freqs[32];
    Shape s = {.heads = 2, .kv_heads = 1, .head_size = 64, .freqs = freqs};
    static const float factors[] = {8, 32};
    for (int k = 0; k < 2; k++) {
        converter_freqs(freqs, 64, factors[k], 1, 4, 8192);
        Bytes f = model_file(&s, "llama", NULL, NULL);
        if (config_of(&f, &c, &err)) fail_msg("%s", err.text);
        assert_int_equal(c.rope_scaling, ROPE_LLAMA3);
        assert_true(c.rope_factor == factors[k] && c.rope_low_freq_factor == 1 && c.rope_high_freq_factor == 4);
        assert_int_equal(c.rope_original_max_T, 8192);
    }
    for (int i = 0; i < 32; i++) freqs[i] = 1;                     // factors of one: no scaling
    Bytes f = model_file(&s, "llama", NULL, NULL);
    if (config_of(&f, &c, &err)) fail_msg("%s", err.text);
    assert_int_equal(c.rope_scaling, ROPE_DEFAULT);
    converter_freqs(freqs, 64, 8, 1, 4, 4096);                     // other constants
    f = model_file(&s, "llama", NULL, NULL);
    assert_int_equal(config_of(&f, &c, &err), E_FORMAT);
    assert_non_null(strstr(err.text, "rope_freqs"));
    freqs[3] = NAN;
    f = model_file(&s, "llama", NULL, NULL);
    assert_int_equal(config_of(&f, &c, &err), E_FORMAT);
    float other[16] = {0};
    Shape mismatch = s;                                            // the tensor's length is half of another head size
    mismatch.freqs = other;
    mismatch.head_size = 32;
    mismatch.heads = 4;
    f = model_file(&mismatch, "llama", "llama.attention.key_length", "llama.attention.key_length=64");
    assert_int_equal(config_of(&f, &c, &err), E_SHAPE);
}

static void open_bytes(const Bytes *f, int code, const char *message) {
    char path[512];
    snprintf(path, sizeof path, "%s/model.gguf", test_tmpdir());
    FILE *out = fopen(path, "wb");
    fwrite(f->p, 1, f->n, out);
    fclose(out);
    ModelFile m;
    Err err = {0};
    int rc = model_open(&m, path, &err);
    if (rc != code || (message && !strstr(err.text, message))) fail_msg("rc %d, '%s', expected '%s'", rc, err.text,
                                                                        message);
    if (rc == 0) model_close(&m);
    free(f->p);
}

static void tensors_checked(void **state) {
    (void)state;
    Shape s = {.heads = 4, .kv_heads = 2, .head_size = 16};
    Bytes f = model_file(&s, "llama", NULL, NULL);
    open_bytes(&f, 0, NULL);
    f = model_file(&s, "llama", "blk.0.ffn_up.weight", NULL);
    open_bytes(&f, E_MISSING, "blk.0.ffn_up.weight");
    f = model_file(&s, "llama", NULL, "blk.0.attn_q.bias");
    open_bytes(&f, E_FORMAT, "blk.0.attn_q.bias");
    f = model_file(&s, "llama", "llama.feed_forward_length", "llama.feed_forward_length=128");
    open_bytes(&f, E_SHAPE, "ffn_gate");
    f = model_file(&s, "llama", NULL, NULL);
    f.n -= 1;
    open_bytes(&f, E_FORMAT, "goes beyond the end");
}

// ---------------------------------------------------------------------------------------------
// Hostile files

static void hostile_counts(void **state) {
    (void)state;
    Bytes b = {0};
    put(&b, "GGUX", 4);
    expect_refused(&b, E_FORMAT, "not a GGUF");
    put_header(&b, 1, 0, 0);
    expect_refused(&b, E_FORMAT, "version 1");
    put_header(&b, 0x03000000, 0, 0);
    expect_refused(&b, E_FORMAT, "big-endian");
    // Counts whose product with a struct's size wraps, or that would reserve the whole memory.
    static const uint64_t counts[] = {1, 1000, 1u << 31, 0x5555555555555556u, UINT64_MAX / 2 + 1, UINT64_MAX};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        put_header(&b, 3, counts[i], 0);
        expect_refused(&b, E_FORMAT, "corrupt");
        put_header(&b, 3, 0, counts[i]);
        expect_refused(&b, E_FORMAT, "corrupt");
    }
}

static void hostile_values(void **state) {
    (void)state;
    Bytes b = {0};
    char zeros[64] = {0};
    static const uint64_t lengths[] = {50, 1u << 31, UINT64_MAX - 7, UINT64_MAX};     // length + 8 wraps
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        put_header(&b, 3, 0, 1);                                   // a key's length
        put_int(&b, lengths[i], 8), put(&b, zeros, 20);
        expect_refused(&b, E_FORMAT, "corrupt");
        put_header(&b, 3, 0, 1);                                   // a string's length
        put_string(&b, "key"), put_int(&b, GGUF_STRING, 4), put_int(&b, lengths[i], 8), put(&b, zeros, 20);
        expect_refused(&b, E_FORMAT, "corrupt");
        put_header(&b, 3, 0, 1);                                   // an array's count
        put_string(&b, "key"), put_int(&b, GGUF_ARRAY, 4), put_int(&b, GGUF_F64, 4), put_int(&b, lengths[i], 8);
        put(&b, zeros, 20);
        expect_refused(&b, E_FORMAT, "corrupt");
        put_header(&b, 3, 0, 1);                                   // an array of strings: count, and a string inside
        put_string(&b, "key"), put_int(&b, GGUF_ARRAY, 4), put_int(&b, GGUF_STRING, 4), put_int(&b, lengths[i], 8);
        put(&b, zeros, 24);
        expect_refused(&b, E_FORMAT, "corrupt");
        put_header(&b, 3, 0, 1);
        put_string(&b, "key"), put_int(&b, GGUF_ARRAY, 4), put_int(&b, GGUF_STRING, 4), put_int(&b, 2, 8);
        put_int(&b, lengths[i], 8), put(&b, zeros, 16);
        expect_refused(&b, E_FORMAT, "corrupt");
    }
    put_header(&b, 3, 0, 1);                                       // arrays of arrays of arrays ...
    put_string(&b, "key"), put_int(&b, GGUF_ARRAY, 4);
    for (int i = 0; i < 10000; i++) put_int(&b, GGUF_ARRAY, 4), put_int(&b, 1, 8);
    expect_refused(&b, E_FORMAT, "array of arrays");
    put_header(&b, 3, 0, 1);
    put_string(&b, "key"), put_int(&b, 13, 4), put(&b, zeros, 8);
    expect_refused(&b, E_FORMAT, "unknown value type 13");
    put_header(&b, 3, 0, 1);
    put_string(&b, "key"), put_int(&b, GGUF_ARRAY, 4), put_int(&b, 77, 4), put_int(&b, 1, 8), put(&b, zeros, 8);
    expect_refused(&b, E_FORMAT, "unknown value type 77");
    put_header(&b, 3, 0, 1);
    put_string(&b, ""), put_int(&b, GGUF_U32, 4), put(&b, zeros, 8);
    expect_refused(&b, E_FORMAT, "empty");
    put_header(&b, 3, 0, 2);
    put_u32(&b, "same", 1), put_u32(&b, "same", 2);
    expect_refused(&b, E_FORMAT, "twice");
    static const uint32_t alignments[] = {0, 3, 48, 1u << 30};
    for (size_t i = 0; i < sizeof alignments / sizeof *alignments; i++) {
        put_header(&b, 3, 0, 1);
        put_u32(&b, "general.alignment", alignments[i]);
        expect_refused(&b, E_FORMAT, "general.alignment");
    }
    put_header(&b, 3, 0, 1);
    put_text(&b, "general.alignment", "32");
    expect_refused(&b, E_FORMAT, "not an integer");
}

static void hostile_tensors(void **state) {
    (void)state;
    static const struct { const char *name; int ndim; uint64_t ne[5]; uint32_t type; uint64_t offset; int code;
                         const char *message; }
    cases[] = {
        {"t", 0, {0}, 0, 0, E_FORMAT, "dimensions"},
        {"t", 5, {1, 1, 1, 1, 1}, 0, 0, E_FORMAT, "dimensions"},
        {"t", 2, {8, 0}, 0, 0, E_FORMAT, "zero or the product"},
        {"t", 2, {8, UINT64_MAX}, 0, 0, E_FORMAT, "zero or the product"},
        {"t", 4, {65536, 65536, 65536, 65536}, 0, 0, E_FORMAT, "zero or the product"},   // 2^64 wraps to 0
        {"t", 3, {1ull << 32, 1ull << 31, 4}, 0, 0, E_FORMAT, "zero or the product"},
        {"t", 2, {1ull << 32, 1ull << 30}, 0, 0, E_FORMAT, "overflows"},             // fits in values, not in bytes
        {"t", 1, {1ull << 62}, 8, 0, E_FORMAT, "beyond the end"},
        {"t", 1, {33}, 2, 0, E_FORMAT, "blocks of 32"},
        {"t", 1, {32}, 14, 0, E_FORMAT, "blocks of 256"},
        {"t", 1, {32}, 4, 0, E_DTYPE, "type 4"},                // removed from the format
        {"t", 1, {256}, 10, 0, E_DTYPE, "Q2_K"},
        {"t", 1, {32}, 0x80000000u, 0, E_DTYPE, "unknown"},
        {"t", 1, {32}, 0, 1, E_FORMAT, "alignment"},
        {"t", 1, {32}, 0, 32, E_FORMAT, "beyond the end"},
        {"t", 1, {33}, 0, 0, E_FORMAT, "beyond the end"},
        {"t", 1, {32}, 0, UINT64_MAX - 31, E_FORMAT, "beyond the end"},                         // offset + size wraps
        {"t", 1, {32}, 0, 1ull << 63, E_FORMAT, "beyond the end"},
        {"", 1, {32}, 0, 0, E_FORMAT, "empty"},
        {"a\033[2J", 1, {32}, 0, 0, E_FORMAT, "control"},
    };
    Bytes b = {0};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        put_header(&b, 3, 1, 0);
        put_tensor(&b, cases[i].name, cases[i].ndim, cases[i].ne, cases[i].type, cases[i].offset);
        if (b.n % 32 == 0) put_int(&b, 0, 1);
        put_data(&b, 128);
        expect_refused(&b, cases[i].code, cases[i].message);
    }
    char longest[300];
    memset(longest, 'n', sizeof longest);
    longest[299] = 0;
    put_header(&b, 3, 1, 0);
    put_tensor(&b, longest, 1, (uint64_t[]){32}, 0, 0);
    put_data(&b, 128);
    expect_refused(&b, E_FORMAT, "longer than 127");
    put_header(&b, 3, 2, 0);
    put_tensor(&b, "a", 1, (uint64_t[]){32}, 0, 0);
    put_tensor(&b, "b", 1, (uint64_t[]){32}, 0, 96);
    put_data(&b, 256);
    expect_refused(&b, E_FORMAT, "overlap");
    put_header(&b, 3, 2, 0);
    put_tensor(&b, "a", 1, (uint64_t[]){32}, 0, 0);
    put_tensor(&b, "a", 1, (uint64_t[]){32}, 0, 128);
    put_data(&b, 256);
    expect_refused(&b, E_FORMAT, "twice");
}

// Cut after every byte: always refused. Any bit flipped: refused or read, never a crash.
static void truncated_and_mangled(void **state) {
    (void)state;
    Bytes b = {0};
    put_header(&b, 3, 2, 4);
    put_text(&b, "general.architecture", "llama");
    put_u32(&b, "general.alignment", 32);
    put_f32(&b, "llama.rope.freq_base", 10000);
    put_string(&b, "tokens"), put_int(&b, GGUF_ARRAY, 4), put_int(&b, GGUF_STRING, 4), put_int(&b, 3, 8);
    put_string(&b, "a"), put_string(&b, ""), put_string(&b, "bcd");
    put_tensor(&b, "q", 2, (uint64_t[]){64, 1}, 8, 0);
    put_tensor(&b, "f", 1, (uint64_t[]){8}, 0, 96);
    put_data(&b, 128);
    Gguf g;
    Err err = {0};
    uint8_t *copy;
    float row[64];
    if (parse_copy(&g, &b, &copy, &err)) fail_msg("%s", err.text);
    assert_int_equal(gguf_row(row, gguf_tensor(&g, "q"), 0, &err), 0);
    gguf_close(&g);
    free(copy);
    Bytes cut = b;
    for (cut.n = 0; cut.n < b.n; cut.n++) {
        if (parse_copy(&g, &cut, &copy, &err) == 0) fail_msg("a file of %zu of %zu bytes is taken", cut.n, b.n);
        free(copy);
    }
    for (size_t i = 0; i < b.n; i++)
        for (int bit = 0; bit < 8; bit++) {
            b.p[i] ^= (uint8_t)(1 << bit);
            if (parse_copy(&g, &b, &copy, &err) == 0) {
                LlamaConfig c;
                llama_config_from_gguf(&c, &g, &err);
                for (int t = 0; t < g.n_tensors; t++)
                    if (g.tensors[t].ne[0] <= 64) gguf_row(row, &g.tensors[t], 0, &err);
                gguf_close(&g);
            }
            free(copy);
            b.p[i] ^= (uint8_t)(1 << bit);
        }
    free(b.p);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(blocks_match_reference), cmocka_unit_test(tiny_model), cmocka_unit_test(metadata),
    cmocka_unit_test(configurations), cmocka_unit_test(llama3_factors), cmocka_unit_test(tensors_checked),
    cmocka_unit_test(hostile_counts), cmocka_unit_test(hostile_values), cmocka_unit_test(hostile_tensors),
    cmocka_unit_test(truncated_and_mangled),
};
TEST_MAIN(tests)
