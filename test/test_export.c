// Exports: what GGUF files and compressed-tensors folders hold is what the packed model holds, what a format cannot
// hold is refused by name or off by no more than it says, and refused exports leave nothing behind.
#include "test_common.h"
#include <dirent.h>
#include <sys/stat.h>
#include "export.h"
#include "gguf_write.h"
#include "json.h"

static const char *temp(const char *name) {
    static char paths[8][512];
    static int k;
    char *p = paths[k++ % 8];
    snprintf(p, 512, "%s/%s", test_tmpdir(), name);
    return p;
}

static void assert_no_leftovers(void) {
    DIR *d = opendir(test_tmpdir());
    for (struct dirent *e; (e = readdir(d));)
        if (strstr(e->d_name, ".tmp-") || strstr(e->d_name, ".old-")) fail_msg("left behind: %s", e->d_name);
    closedir(d);
}

// Rows are whole blocks of 32, heads are 32 wide, and every matrix has another shape.
static LlamaConfig small_config(bool tied) {
    return (LlamaConfig){.C = 128, .L = 2, .NH = 4, .NKV = 2, .HS = 32, .FF = 192, .V = 300, .max_T = 128,
                         .norm_eps = 1e-5f, .rope_theta = 500000, .rope_scaling = ROPE_LLAMA3, .rope_factor = 32,
                         .rope_low_freq_factor = 1, .rope_high_freq_factor = 4, .rope_original_max_T = 8192,
                         .tied = tied, .bos = 256, .eos = {257, 5}, .n_eos = 2};
}

// Weights of f32 with a zero block and a skewed one. ctx: the configuration.
static int random_rows(void *ctx, const Param *p, int64_t row0, int64_t n, float *out, Err *err) {
    (void)err;
    param_init_random(out, p, ctx, 7, (size_t)(row0 * p->cols), (size_t)(n * p->cols));
    for (int64_t r = 0; r < n && !param_is_norm(p); r++)
        for (int64_t c = 0; c < 64; c++) {
            float *v = &out[r * p->cols + c];
            if ((row0 + r) % 7 == 3) *v = c < 32 ? 0.0f : fabsf(*v);
        }
    return 0;
}

static DType floats_as = DT_BF16;                // what floats of packed models are kept as

// A packed model of the plan that the options say, opened.
static void make_packed(ModelFile *m, LlamaConfig *c, const char *scheme, const char *weight, const char *embedding,
                        const char *head, const char *rule, Tokenizer *tok) {
    QuantPlan plan;
    ParamTable table;
    Err err = {0};
    const char *rules[] = {rule};
    if (quant_plan_from_options(&plan, NULL, scheme, weight, NULL, embedding, head, rules, rule ? 1 : 0, &err) ||
        param_table_build(&table, c, &plan, &err) ||
        model_write_packed(temp("packed.bin"), c, &plan, &table, tok, floats_as, random_rows, c, NULL, NULL, &err) ||
        model_open(m, temp("packed.bin"), &err))
        fail_msg("%s", err.text);
    param_table_free(&table);
}

typedef struct { char name[64][96], form[64][16]; bool exact[64]; double max_err[64]; int n, inexact, notes; } Seen;

static void see(void *ctx, const ExportRow *row) {
    Seen *s = ctx;
    assert_true(s->n < 64);
    snprintf(s->name[s->n], 96, "%s", row->name);
    snprintf(s->form[s->n], 16, "%s", row->form);
    s->exact[s->n] = row->exact;
    s->max_err[s->n++] = row->max_err;
    s->inexact += !row->exact;
}

static void see_note(void *ctx, const char *text) {
    (void)text;
    ((Seen *)ctx)->notes++;
}

static ExportOptions watch(Seen *s, bool allow) {
    *s = (Seen){0};
    return (ExportOptions){.allow_inexact = allow, .dtype = -1, .report = see, .note = see_note, .ctx = s};
}

static int seen(const Seen *s, const char *name) {
    for (int i = 0; i < s->n; i++)
        if (!strcmp(s->name[i], name)) return i;
    fail_msg("no row about %s", name);
    return -1;
}

static void expect_same_config(const LlamaConfig *a, const LlamaConfig *b) {
    char *x = llama_config_to_json(a, "float32"), *y = llama_config_to_json(b, "float32");
    assert_string_equal(x, y);
    free(x);
    free(y);
}

// Every value of `out` against the packed (or float) model `in`. Exact tensors: GGUF multiplies code and scale in f32
// and adds the minimum, both exact in f32 for these sizes, and our working values are that rounded to bf16 (not for
// rows of int8, which work as their codes). Inexact ones: off by what was reported, and ours are rounded to bf16, half
// a step of which is 2^-8 of the value; a hundredth more for the value being that of the file.
static void expect_same_values(const ModelFile *in, const ModelFile *out, const Seen *s) {
    ParamTable table;
    Err err = {0};
    assert_int_equal(param_table_build(&table, &out->config, NULL, &err), 0);
    for (int i = 0; i < table.n; i++) {
        const Param *p = &table.p[i];
        size_t n = (size_t)(p->rows * p->cols);
        float *a = malloc(n * sizeof *a), *b = malloc(n * sizeof *b);
        QuantSpec spec = model_packed_spec(in, p);
        int k = seen(s, p->name);
        if (model_read_rows(in, p, 0, p->rows, a, &err) || model_read_rows(out, p, 0, p->rows, b, &err))
            fail_msg("%s", err.text);
        bool rounds = spec.bits && !quant_works_as_codes(&spec);
        for (size_t j = 0; j < n; j++) {
            float v = rounds && s->exact[k] ? bf16_round(b[j]) : b[j];
            double room = s->exact[k] ? 0 : 1.01 * s->max_err[k] + fabs((double)b[j]) / 256;
            if (!(fabs((double)v - (double)a[j]) <= room))
                fail_msg("%s[%zu] (%s): %a, expected %a", p->name, j, s->form[k], (double)v, (double)a[j]);
        }
        free(a);
        free(b);
    }
    param_table_free(&table);
}

// ---------------------------------------------------------------------------------------------
// GGUF

static void gguf_of_packed(void **state) {
    (void)state;
    static const struct { const char *scheme, *weight, *embedding, *head, *form; bool tied, exact; } cases[] = {
        {"int8wo", NULL, NULL, NULL, "Q8_0", true, true},
        {"int8dq", NULL, "int8,channel", "int8,channel", "Q8_0", true, true},
        {"8da4w-32", NULL, NULL, NULL, "Q4_0", false, true},
        {"8da4w-64", NULL, "int4,group=32", "int8,channel", "Q4_0", true, true},
        {NULL, "int4,channel", NULL, NULL, "Q4_0", false, true},
        {NULL, "int8,group=32", NULL, NULL, "Q8_0", true, true},
        {NULL, "int4,tensor", NULL, NULL, "Q4_0", true, true},
        {NULL, "int4,block=2x64", NULL, NULL, "Q4_0", true, true},
        {"int4wo-32", NULL, NULL, NULL, "Q4_1", true, true},
        {NULL, "uint4,group=64,asymmetric", NULL, NULL, "Q4_1", true, false},
        {NULL, "int4,group=32,asymmetric", NULL, NULL, "Q4_1", false, false},
        {"int8qt", NULL, NULL, NULL, "Q8_0", true, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        LlamaConfig c = small_config(cases[i].tied);
        Tokenizer *tok = tokenizer_bytes();
        ModelFile in, out;
        Seen s;
        Err err = {0};
        make_packed(&in, &c, cases[i].scheme, cases[i].weight, cases[i].embedding, cases[i].head, NULL, tok);
        ExportOptions o = watch(&s, false);
        if (!cases[i].exact) {
            remove(temp("out.gguf"));
            assert_int_equal(export_gguf(temp("out.gguf"), &in, &o, &err), E_USAGE);
            if (!strstr(err.text, "--allow-inexact")) fail_msg("%s", err.text);
            assert_false(path_exists(temp("out.gguf")));
            o = watch(&s, true);
        }
        if (export_gguf(temp("out.gguf"), &in, &o, &err) || model_open(&out, temp("out.gguf"), &err))
            fail_msg("%s %s: %s", cases[i].scheme, cases[i].weight, err.text);
        assert_int_equal(out.kind, MODEL_GGUF);
        assert_int_equal(s.inexact == 0, cases[i].exact);
        assert_string_equal(s.form[seen(&s, "model.layers.1.mlp.down_proj.weight")], cases[i].form);
        bool own_head = cases[i].head != NULL;
        assert_int_equal(out.config.tied, cases[i].tied && !own_head);
        LlamaConfig want = c;
        want.tied = out.config.tied;
        expect_same_config(&out.config, &want);
        expect_same_values(&in, &out, &s);
        // The bytes tokenizer has 258 ids of 300: the rest are unused, and text comes out as before.
        int32_t *ids;
        size_t n;
        assert_int_equal(tokenizer_encode(out.tokenizer, "na\xc3\xafve\n", 7, false, &ids, &n, &err), 0);
        assert_int_equal(n, 7);
        for (size_t k = 0; k < n; k++) assert_int_equal(ids[k], (uint8_t)"na\xc3\xafve\n"[k]);
        free(ids);
        assert_int_equal(tokenizer_eos(out.tokenizer), 257);
        model_close(&in);
        model_close(&out);
        tokenizer_free(tok);
    }
    assert_no_leftovers();
}

static void gguf_of_floats(void **state) {
    (void)state;
    static const struct { DType stored; int asked; const char *form; bool exact; } cases[] = {
        {DT_BF16, -1, "BF16", true}, {DT_F32, -1, "F32", true}, {DT_BF16, DT_F32, "F32", true},
        {DT_F32, DT_BF16, "BF16", false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        LlamaConfig c = small_config(i & 1);
        QuantPlan plan;
        ParamTable table;
        ModelFile in, out;
        Seen s;
        Err err = {0};
        if (i == 1) c.rope_scaling = ROPE_LINEAR, c.rope_factor = 4;
        if (i == 2) c.rope_scaling = ROPE_DEFAULT;
        quant_plan_none(&plan);
        assert_int_equal(param_table_build(&table, &c, &plan, &err), 0);
        if (model_write_bin(temp("float.bin"), &c, &plan, &table, NULL, cases[i].stored, random_rows, &c, &err) ||
            model_open(&in, temp("float.bin"), &err))
            fail_msg("%s", err.text);
        ExportOptions o = watch(&s, !cases[i].exact);
        o.dtype = cases[i].asked;
        if (export_gguf(temp("float.gguf"), &in, &o, &err) || model_open(&out, temp("float.gguf"), &err))
            fail_msg("%s", err.text);
        assert_string_equal(s.form[seen(&s, "model.layers.0.self_attn.q_proj.weight")], cases[i].form);
        assert_string_equal(s.form[seen(&s, "model.norm.weight")], "F32");
        assert_int_equal(s.inexact == 0, cases[i].exact);
        assert_int_equal(s.notes, 1);                                    // no tokenizer
        expect_same_config(&out.config, &in.config);
        expect_same_values(&in, &out, &s);
        if (!cases[i].exact) {
            o.allow_inexact = false;
            s.n = 0;
            assert_int_equal(export_gguf(temp("refused.gguf"), &in, &o, &err), E_USAGE);
        }
        model_close(&in);
        model_close(&out);
        param_table_free(&table);
    }
    assert_false(path_exists(temp("refused.gguf")));
}

static void gguf_refusals(void **state) {
    (void)state;
    static const struct { const char *scheme, *weight, *embedding, *message; } cases[] = {
        {"int3-32", NULL, NULL, "no blocks"},
        {"int8-32", "int8,group=32,asymmetric", NULL, "no blocks"},
        {"8da4w-16", NULL, NULL, "16 values share a scale"},
        {"8da4w-32", NULL, "int4,group=32", "made at load"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        LlamaConfig c = small_config(true);
        ModelFile in;
        Seen s;
        Err err = {0};
        make_packed(&in, &c, cases[i].weight ? NULL : cases[i].scheme, cases[i].weight, cases[i].embedding, NULL, NULL,
                    NULL);
        ExportOptions o = watch(&s, i < 3);                              // allowing inexactness does not help these
        assert_int_equal(export_gguf(temp("no.gguf"), &in, &o, &err), E_USAGE);
        if (!strstr(err.text, cases[i].message)) fail_msg("'%s' lacks '%s'", err.text, cases[i].message);
        model_close(&in);
    }
    assert_false(path_exists(temp("no.gguf")));
    // A file whose data do not add up is no file.
    Err err = {0};
    GgufWriter *w = gguf_writer_new();
    gguf_writer_tensor(w, "t", GGML_F32, 2, 8, false);
    assert_int_equal(gguf_writer_begin(w, temp("no.gguf"), &err), 0);
    gguf_writer_data(w, (float[15]){0}, 60);
    assert_int_equal(gguf_writer_finish(w, &err), E_FAIL);
    assert_false(path_exists(temp("no.gguf")));
    assert_no_leftovers();
}

// Tokenizers of real models leave as GGUF and give the same ids when they come back.
static void gguf_tokenizers(void **state) {
    (void)state;
    static const char *const names[] = {"tokenizers/llama2/tokenizer.json", "tokenizers/llama3/tokenizer.json"};
    static const char text[] = "Hello, world! 12345 na\xc3\xafve fa\xc3\xa7" "ade \xe2\x80\x94 "
        "\xe6\x9d\xb1\xe4\xba\xac \xf0\x9f\x98\x80\n\n  def f(x):\treturn x  # it's 3.14\n   \n";
    int tried = 0;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const char *path = test_data(names[i]);
        if (!path) continue;
        char *json;
        size_t len, n, k;
        Tokenizer *a, *b;
        Gguf g;
        Err err = {0};
        int32_t *x, *y;
        if (file_read(&json, &len, path, (size_t)64 << 20, &err) || tokenizer_from_json(&a, json, len, &err))
            fail_msg("%s", err.text);
        free(json);
        GgufWriter *w = gguf_writer_new();
        if (tokenizer_to_gguf(a, w, tokenizer_vocab_size(a) + 2, &err) ||
            gguf_writer_begin(w, temp("tok.gguf"), &err) || gguf_writer_finish(w, &err) ||
            gguf_open(&g, temp("tok.gguf"), &err) || tokenizer_from_gguf(&b, &g, &err))
            fail_msg("%s: %s", names[i], err.text);
        assert_int_equal(tokenizer_vocab_size(b), tokenizer_vocab_size(a) + 2);
        assert_int_equal(tokenizer_encode(a, text, sizeof text - 1, false, &x, &n, &err), 0);
        assert_int_equal(tokenizer_encode(b, text, sizeof text - 1, false, &y, &k, &err), 0);
        assert_int_equal(n, k);
        assert_memory_equal(x, y, n * sizeof *x);
        for (int32_t id = 0; id < tokenizer_vocab_size(a); id++)
            assert_int_equal(tokenizer_is_special(a, id), tokenizer_is_special(b, id));
        free(x);
        free(y);
        gguf_close(&g);
        tokenizer_free(a);
        tokenizer_free(b);
        tried++;
    }
    if (!tried) skip();
}

// A tokenizer that splits in a way of its own is refused, and left out where that is allowed.
static void gguf_strange_tokenizer(void **state) {
    (void)state;
    static const char json[] = "{\"added_tokens\": [], \"normalizer\": null, "
        "\"pre_tokenizer\": {\"type\": \"Sequence\", "
        "\"pretokenizers\": [{\"type\": \"Split\", \"pattern\": {\"Regex\": \"a+\"}, \"behavior\": \"Isolated\", "
        "\"invert\": false}, {\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"use_regex\": false}]}, "
        "\"decoder\": {\"type\": \"ByteLevel\"}, \"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"b\": 1}, "
        "\"merges\": []}}";
    LlamaConfig c = small_config(true);
    Tokenizer *tok;
    ModelFile in, out;
    Seen s;
    Err err = {0};
    if (tokenizer_from_json(&tok, json, sizeof json - 1, &err)) fail_msg("%s", err.text);
    make_packed(&in, &c, "int8wo", NULL, NULL, NULL, NULL, tok);
    ExportOptions o = watch(&s, false);
    assert_int_equal(export_gguf(temp("strange.gguf"), &in, &o, &err), E_USAGE);
    if (!strstr(err.text, "no name for")) fail_msg("%s", err.text);
    assert_false(path_exists(temp("strange.gguf")));
    o = watch(&s, true);
    if (export_gguf(temp("strange.gguf"), &in, &o, &err) || model_open(&out, temp("strange.gguf"), &err))
        fail_msg("%s", err.text);
    assert_int_equal(s.notes, 1);
    assert_null(out.tokenizer);
    model_close(&in);
    model_close(&out);
    tokenizer_free(tok);
}

// ---------------------------------------------------------------------------------------------
// compressed-tensors

static const StTensor *tensor(const Safetensors *st, const char *name, DType dtype, int64_t rows, int64_t cols) {
    const StTensor *t = safetensors_find(st, name);
    if (!t) fail_msg("no tensor %s", name);
    if (t->dtype != dtype || t->shape[0] != rows || (t->ndim == 2 ? t->shape[1] : 0) != cols)
        fail_msg("%s: %s (%lld, %lld)", name, dtype_name(t->dtype), (long long)t->shape[0], (long long)t->shape[1]);
    return t;
}

// Field i of `bits` bits from the words at p, `stride` words apart.
static int field(const uint8_t *p, int64_t i, int bits, int64_t stride) {
    uint64_t pair = 0;
    for (int k = 0; k < 2; k++) {
        uint32_t word = 0;
        if (k == 0 || i * bits % 32 + bits > 32) memcpy(&word, p + 4 * (i * bits / 32 + k) * stride, 4);
        pair |= (uint64_t)word << (32 * k);
    }
    return (int)(pair >> (i * bits % 32) & ((1u << bits) - 1));
}

static float bf16_at(const uint8_t *p, int64_t i) {
    bf16 h;
    memcpy(&h, p + 2 * i, 2);
    return bf16_to_f32(h);
}

// One linear of a pack-quantized folder, decoded as compressed-tensors does, (field - 2^(bits-1) - zero) * scale in
// bf16, is what our packed file decodes to (for int8 by channel: that rounded to bf16).
static void expect_decoded(const Safetensors *st, const ModelFile *in, const Param *p) {
    QuantSpec s = model_packed_spec(in, p);
    int64_t block[2], words = (p->cols * s.bits + 31) / 32;
    Err err = {0};
    char name[128], *end = name + (size_t)snprintf(name, sizeof name, "%s", p->name);
    assert_int_equal(quant_block_shape(&s, p->rows, p->cols, block, &err), 0);
    int64_t across = p->cols / block[1];
    strcpy(end, "_packed");
    const uint8_t *codes = tensor(st, name, DT_I32, p->rows, words)->data, *zeros = NULL;
    strcpy(end, "_scale");
    const uint8_t *scales = tensor(st, name, DT_BF16, p->rows, across)->data;
    strcpy(end, "_zero_point");
    if (quant_has_zero(&s)) zeros = tensor(st, name, DT_I32, (p->rows * s.bits + 31) / 32, across)->data;
    else assert_null(safetensors_find(st, name));
    strcpy(end, "_shape");
    int64_t shape[2];
    memcpy(shape, tensor(st, name, DT_I64, 2, 0)->data, sizeof shape);
    assert_true(shape[0] == p->rows && shape[1] == p->cols);
    float *want = malloc((size_t)(p->rows * p->cols) * sizeof *want);
    if (model_read_rows(in, p, 0, p->rows, want, &err)) fail_msg("%s", err.text);
    int mid = 1 << (s.bits - 1);
    for (int64_t r = 0; r < p->rows; r++)
        for (int64_t c = 0; c < p->cols; c++) {
            int q = field(codes + 4 * r * words, c, s.bits, 1) - mid;
            int z = zeros ? field(zeros + 4 * (c / block[1]), r, s.bits, across) - mid : 0;
            float v = bf16_round((float)(q - z) * bf16_at(scales, r * across + c / block[1]));
            if (v != bf16_round(want[r * p->cols + c]))
                fail_msg("%s (%d, %d): %a, expected %a", p->name, (int)r, (int)c, (double)v,
                         (double)want[r * p->cols + c]);
        }
    free(want);
}

static cJSON *quantization_config(const char *dir, Err *err) {
    char path[600], *text;
    size_t len;
    snprintf(path, sizeof path, "%s/config.json", dir);
    if (file_read(&text, &len, path, 1 << 20, err)) fail_msg("%s", err->text);
    cJSON *root = json_parse(text, len, path, err), *q = cJSON_DetachItemFromObject(root, "quantization_config");
    free(text);
    cJSON_Delete(root);
    if (!q) fail_msg("no quantization_config in %s", path);
    return q;
}

static void compressed_packed(void **state) {
    (void)state;
    static const struct { const char *scheme, *weight, *strategy; int bits; bool symmetric, act; } cases[] = {
        {"8da4w-32", NULL, "group", 4, true, true},
        {"int8wo", NULL, "channel", 8, true, false},
        {"int3-64", NULL, "group", 3, true, false},
        {NULL, "uint4,group=32,asymmetric", "group", 4, false, false},
        {NULL, "int4,group=64,asymmetric", "group", 4, false, false},
        {NULL, "uint5,channel,asymmetric", "channel", 5, false, false},
        {NULL, "int4,block=2x32", "group", 4, true, false},
        {NULL, "int4,block=1x128", "group", 4, true, false},         // a whole row of some, half a row of others
        {NULL, "int4,tensor", "channel", 4, true, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        LlamaConfig c = small_config(true);
        c.FF = 256;
        ModelFile in;
        ParamTable table;
        Seen s;
        Err err = {0};
        char dir[512], path[600];
        snprintf(dir, sizeof dir, "%s/ct%zu", test_tmpdir(), i);
        snprintf(path, sizeof path, "%s/model.safetensors", dir);
        make_packed(&in, &c, cases[i].scheme, cases[i].weight, NULL, NULL, NULL, NULL);
        ExportOptions o = watch(&s, false);
        if (export_compressed(dir, &in, &o, &err)) fail_msg("%s", err.text);
        Safetensors st;
        if (safetensors_open(&st, path, &err)) fail_msg("%s", err.text);
        assert_int_equal(param_table_build(&table, &c, NULL, &err), 0);
        for (int k = 0; k < table.n; k++)
            if (table.p[k].layer >= 0 && !param_is_norm(&table.p[k])) expect_decoded(&st, &in, &table.p[k]);
        tensor(&st, "model.embed_tokens.weight", DT_BF16, c.V, c.C);
        tensor(&st, "model.norm.weight", DT_BF16, c.C, 0);
        safetensors_close(&st);
        param_table_free(&table);
        cJSON *q = quantization_config(dir, &err);
        assert_string_equal(json_string(q, "quant_method"), "compressed-tensors");
        assert_string_equal(json_string(q, "format"), "pack-quantized");
        const cJSON *g = cJSON_GetObjectItem(cJSON_GetObjectItem(q, "config_groups"), "group_0");
        const cJSON *w = cJSON_GetObjectItem(g, "weights"), *a = cJSON_GetObjectItem(g, "input_activations");
        assert_string_equal(cJSON_GetArrayItem(cJSON_GetObjectItem(g, "targets"), 0)->valuestring, "Linear");
        assert_string_equal(cJSON_GetArrayItem(cJSON_GetObjectItem(q, "ignore"), 0)->valuestring, "lm_head");
        assert_string_equal(json_string(w, "strategy"), cases[i].strategy);
        // As many scales a row as the strategy says.
        const cJSON *size = cJSON_GetObjectItem(w, "group_size");
        assert_int_equal(cJSON_IsNull(size), !strcmp(cases[i].strategy, "channel"));
        if (!cJSON_IsNull(size)) {
            if (safetensors_open(&st, path, &err)) fail_msg("%s", err.text);
            tensor(&st, "model.layers.0.mlp.down_proj.weight_scale", DT_BF16, c.C, c.FF / size->valueint);
            safetensors_close(&st);
        }
        assert_int_equal(cJSON_GetObjectItem(w, "num_bits")->valueint, cases[i].bits);
        assert_int_equal(cJSON_IsTrue(cJSON_GetObjectItem(w, "symmetric")), cases[i].symmetric);
        assert_int_equal(cJSON_IsObject(a), cases[i].act);
        if (cases[i].act) assert_string_equal(json_string(a, "strategy"), "token");
        cJSON_Delete(q);
        // Our own reader knows that it is not a folder of floats.
        ModelFile again;
        assert_int_equal(model_open(&again, dir, &err), E_FORMAT);
        model_close(&in);
    }
    assert_no_leftovers();
}

// int8 weights and inputs, a float linear by rule, another scheme by rule, and a head of its own.
static void compressed_mixed(void **state) {
    (void)state;
    LlamaConfig c = small_config(true);
    ModelFile in;
    Seen s;
    Err err = {0};
    make_packed(&in, &c, "int8dq", NULL, "int8,channel", "int4,group=32", "*.down_proj.weight=int4,group=32", NULL);
    ExportOptions o = watch(&s, false);
    const char *dir = temp("mixed");
    if (export_compressed(dir, &in, &o, &err)) fail_msg("%s", err.text);
    assert_int_equal(s.notes, 1);                                        // inputs are quantized a little otherwise
    char path[600];
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    Safetensors st;
    if (safetensors_open(&st, path, &err)) fail_msg("%s", err.text);
    ParamTable table;
    LlamaConfig untied = c;
    untied.tied = false;
    assert_int_equal(param_table_build(&table, &untied, NULL, &err), 0);
    expect_decoded(&st, &in, param_find(&table, "lm_head.weight"));
    expect_decoded(&st, &in, param_get(&table, 1, ROLE_DOWN));
    const Param *p = param_get(&table, 0, ROLE_GATE);
    const uint8_t *codes = tensor(&st, "model.layers.0.mlp.gate_proj.weight", DT_I8, p->rows, p->cols)->data;
    const uint8_t *scale = tensor(&st, "model.layers.0.mlp.gate_proj.weight_scale", DT_BF16, p->rows, 1)->data;
    float *want = malloc((size_t)(p->rows * p->cols) * sizeof *want);
    assert_int_equal(model_read_rows(&in, p, 0, p->rows, want, &err), 0);
    for (int64_t i = 0; i < p->rows * p->cols; i++)
        assert_true((float)(int8_t)codes[i] * bf16_at(scale, i / p->cols) == want[i]);
    free(want);
    safetensors_close(&st);
    param_table_free(&table);
    cJSON *q = quantization_config(dir, &err);
    assert_string_equal(json_string(q, "format"), "mixed-precision");
    assert_int_equal(cJSON_GetArraySize(cJSON_GetObjectItem(q, "config_groups")), 2);
    assert_int_equal(cJSON_GetArraySize(cJSON_GetObjectItem(q, "ignore")), 0);
    cJSON_Delete(q);
    model_close(&in);

    make_packed(&in, &c, "int4wo-32", NULL, NULL, NULL, NULL, NULL);
    assert_int_equal(export_compressed(temp("floatzero"), &in, &o, &err), E_USAGE);
    if (!strstr(err.text, "integer zero points only")) fail_msg("%s", err.text);
    assert_false(path_exists(temp("floatzero")));
    model_close(&in);
}

// A folder of floats holds a tied head's own codes too: it is untied then.
static void dequantized(void **state) {
    (void)state;
    for (int k = 0; k < 2; k++) {
        LlamaConfig c = small_config(true);
        ModelFile in, out;
        Seen s;
        Err err = {0};
        make_packed(&in, &c, "8da4w-32", NULL, "int4,group=32", "int8,channel", NULL, NULL);
        ExportOptions o = watch(&s, false);
        o.dtype = k ? DT_F32 : -1;
        const char *dir = temp(k ? "deq32" : "deq16");
        if (export_dequantized(dir, &in, &o, &err) || model_open(&out, dir, &err)) fail_msg("%s", err.text);
        assert_false(out.config.tied);
        assert_int_equal(s.inexact, k ? 0 : 1);                          // int8 * scale has more digits than bf16
        assert_int_equal(s.exact[seen(&s, "lm_head.weight")], k);
        expect_same_values(&in, &out, &s);
        model_close(&in);
        model_close(&out);
    }
}

// Largest distance of the embedding's floats from symmetric four bits in groups of 32 (spec: amax / 7.5, all in bf16).
static double int4_error(const ModelFile *in) {
    ParamTable table;
    Err err = {0};
    if (param_table_build(&table, &in->config, NULL, &err)) fail_msg("%s", err.text);
    const Param *p = param_find(&table, "model.embed_tokens.weight");
    size_t n = (size_t)(p->rows * p->cols);
    float *x = malloc(n * sizeof *x);
    if (model_read_rows(in, p, 0, p->rows, x, &err)) fail_msg("%s", err.text);
    double worst = 0;
    for (size_t g = 0; g < n; g += 32) {
        float amax = 0;
        for (size_t i = g; i < g + 32; i++) amax = fmaxf(amax, fabsf(x[i]));
        float scale = bf16_round(amax / 7.5f);
        for (size_t i = g; i < g + 32 && scale > 0; i++) {
            float q = fminf(7.0f, fmaxf(-8.0f, rintf(x[i] * (1.0f / scale))));
            worst = fmax(worst, fabs((double)bf16_round(q * scale) - (double)x[i]));
        }
    }
    free(x);
    param_table_free(&table);
    return worst;
}

// What is not said by a format is noted, and what is rounded is not called exact: inputs that rules quantize, floats
// that become bf16, and an embedding that is served in codes of its own.
static void what_is_left_out(void **state) {
    (void)state;
    LlamaConfig c = small_config(true);
    ModelFile in;
    Seen s;
    Err err = {0};
    make_packed(&in, &c, "none", NULL, NULL, NULL, "*.mlp.*=8da4w-32", NULL);
    ExportOptions o = watch(&s, true);
    if (export_gguf(temp("rules.gguf"), &in, &o, &err)) fail_msg("%s", err.text);
    assert_int_equal(s.notes, 2);                            // inputs of linears; no tokenizer
    o = watch(&s, false);
    if (export_dequantized(temp("rules"), &in, &o, &err)) fail_msg("%s", err.text);
    assert_int_equal(s.notes, 1);
    model_close(&in);
    // A pipe is no place for a file, and stays one.
    make_packed(&in, &c, "int8wo", NULL, NULL, NULL, NULL, NULL);
    struct stat st;
    assert_int_equal(mkfifo(temp("pipe"), 0600), 0);
    assert_int_equal(export_gguf(temp("pipe"), &in, &o, &err), E_USAGE);
    if (!strstr(err.text, "a device or a pipe")) fail_msg("%s", err.text);
    assert_true(stat(temp("pipe"), &st) == 0 && S_ISFIFO(st.st_mode));
    model_close(&in);

    make_packed(&in, &c, "8da4w-32", NULL, NULL, NULL, "*.down_proj.weight=none;int8,token,asymmetric", NULL);
    o = watch(&s, false);
    if (export_compressed(temp("acts"), &in, &o, &err)) fail_msg("%s", err.text);
    assert_int_equal(s.notes, 1);
    model_close(&in);

    make_packed(&in, &c, "int8-32", NULL, "int4,group=32", NULL, NULL, NULL);
    for (int k = 0; k < 3; k++) {
        o = watch(&s, false);
        const char *path = temp(k == 0 ? "lost.gguf" : k == 1 ? "lost16" : "lost32");
        int (*export[3])(const char *, const ModelFile *, const ExportOptions *, Err *) = {export_gguf, export_compressed,
                                                                                           export_dequantized};
        assert_int_equal(export[k](path, &in, &o, &err), E_USAGE);
        o = watch(&s, true);
        if (k == 2) o.dtype = DT_F32;
        if (export[k](path, &in, &o, &err)) fail_msg("%s", err.text);
        assert_true(s.notes >= 1);
        int e = seen(&s, "model.embed_tokens.weight");
        assert_false(s.exact[e]);
        if (fabs(s.max_err[e] - int4_error(&in)) > 0) fail_msg("off by %g, not %g", s.max_err[e], int4_error(&in));
    }
    model_close(&in);

    floats_as = DT_F32;
    make_packed(&in, &c, "int8-32", NULL, NULL, NULL, NULL, NULL);
    floats_as = DT_BF16;
    o = watch(&s, false);
    if (export_compressed(temp("f32"), &in, &o, &err)) fail_msg("%s", err.text);
    assert_int_equal(s.inexact, 0);
    o.dtype = DT_BF16;
    assert_int_equal(export_compressed(temp("f32as16"), &in, &o, &err), E_USAGE);
    if (!strstr(err.text, "not exactly representable")) fail_msg("%s", err.text);
    assert_false(path_exists(temp("f32as16")));
    o = watch(&s, true);
    o.dtype = DT_BF16;
    if (export_compressed(temp("f32as16"), &in, &o, &err)) fail_msg("%s", err.text);
    assert_int_equal(s.exact[seen(&s, "model.embed_tokens.weight")], 0);
    model_close(&in);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(gguf_of_packed),
    cmocka_unit_test(gguf_of_floats),
    cmocka_unit_test(gguf_refusals),
    cmocka_unit_test(gguf_tokenizers),
    cmocka_unit_test(gguf_strange_tokenizer),
    cmocka_unit_test(compressed_packed),
    cmocka_unit_test(compressed_mixed),
    cmocka_unit_test(dequantized),
    cmocka_unit_test(what_is_left_out),
};

TEST_MAIN(tests)
