// Models in and out: what is written is read back to the bit, packed codes are those of fake quantization, damaged
// and strange models are refused by name, and a failed write leaves nothing behind.
#include "test_common.h"
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include "checkpoint.h"

static const char *temp(const char *name) {
    static char paths[8][512];
    static int k;
    char *p = paths[k++ % 8];
    snprintf(p, 512, "%s/%s", test_tmpdir(), name);
    return p;
}

static void write_text(const char *path, const char *text) {
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

// Nothing in the test folder may be a leftover of an unfinished write.
static void assert_no_leftovers(void) {
    DIR *d = opendir(test_tmpdir());
    for (struct dirent *e; (e = readdir(d));)
        if (strstr(e->d_name, ".tmp-") || strstr(e->d_name, ".old-")) fail_msg("left behind: %s", e->d_name);
    closedir(d);
}

static LlamaConfig small_config(bool tied) {
    return (LlamaConfig){.C = 64, .L = 2, .NH = 4, .NKV = 2, .HS = 16, .FF = 96, .V = 300, .max_T = 128,
                         .norm_eps = 1e-5f,
                         .rope_theta = 500000, .rope_scaling = ROPE_LLAMA3, .rope_factor = 8, .rope_low_freq_factor = 1,
                         .rope_high_freq_factor = 4, .rope_original_max_T = 8192, .tied = tied, .bos = 256,
                             .eos = {257, 5},
                         .n_eos = 2};
}

// Values of no particular dtype: f32 that bf16 does not hold. ctx: the configuration.
static int random_rows(void *ctx, const Param *p, int64_t row0, int64_t n, float *out, Err *err) {
    (void)err;
    param_init_random(out, p, ctx, 11, (size_t)(row0 * p->cols), (size_t)(n * p->cols));
    return 0;
}

static float *all_rows(LlamaConfig *c, const Param *p) {
    float *x = malloc((size_t)(p->rows * p->cols) * sizeof *x);
    random_rows(c, p, 0, p->rows, x, NULL);
    return x;
}

static void expect_same_values(const ModelFile *m, LlamaConfig *c, const ParamTable *table, DType dtype) {
    Err err = {0};
    for (int i = 0; i < table->n; i++) {
        const Param *p = &table->p[i];
        size_t n = (size_t)(p->rows * p->cols);
        float *want = all_rows(c, p), *got = malloc(n * sizeof *got);
        if (model_read_rows(m, p, 0, p->rows, got, &err)) fail_msg("%s", err.text);
        for (size_t k = 0; k < n; k++) {
            float w = dtype == DT_BF16 ? bf16_round(want[k]) : want[k];
            if (f32_bits(w) != f32_bits(got[k])) fail_msg("%s[%zu]: %a, expected %a", p->name, k, (double)got[k],
                                                          (double)w);
        }
        free(want);
        free(got);
    }
}

static void expect_same_config(const LlamaConfig *a, const LlamaConfig *b) {
    char *x = llama_config_to_json(a, "float32"), *y = llama_config_to_json(b, "float32");
    assert_string_equal(x, y);
    free(x);
    free(y);
}

// ---------------------------------------------------------------------------------------------
// model.bin

static void bin_round_trip(void **state) {
    (void)state;
    for (int k = 0; k < 4; k++) {
        DType dtype = k & 1 ? DT_BF16 : DT_F32;
        LlamaConfig c = small_config(k & 2);
        QuantPlan plan;
        ParamTable table;
        Err err = {0};
        quant_plan_none(&plan);
        assert_int_equal(quant_scheme_from_name(&plan.linear, "8da4w-32", &err), 0);
        assert_int_equal(param_table_build(&table, &c, &plan, &err), 0);
        Tokenizer *tok = k & 2 ? tokenizer_bytes() : NULL;
        const char *path = temp("round.bin");
        if (model_write_bin(path, &c, &plan, &table, tok, dtype, random_rows, &c, &err)) fail_msg("%s", err.text);
        ModelFile m;
        if (model_open(&m, path, &err)) fail_msg("%s", err.text);
        assert_int_equal(m.kind, MODEL_BIN);
        assert_false(m.packed);
        assert_int_equal(m.tokenizer != NULL, tok != NULL);
        if (tok) assert_true(tokenizer_hash(m.tokenizer) == tokenizer_hash(tok));
        expect_same_config(&m.config, &c);
        char *a = quant_plan_to_json(&m.plan), *b = quant_plan_to_json(&plan);
        assert_string_equal(a, b);
        free(a);
        free(b);
        expect_same_values(&m, &c, &table, dtype);
        PackedTensor t;
        assert_int_equal(model_packed(&m, &table.p[0], &t, &err), 0);
        // The head of a tied model is its embedding table.
        if (c.tied) {
            Param head = {.name = "lm_head.weight", .role = ROLE_HEAD, .layer = -1, .rows = c.V, .cols = c.C};
            float *x = malloc((size_t)(c.V * c.C) * 4), *y = malloc((size_t)(c.V * c.C) * 4);
            assert_int_equal(model_read_rows(&m, &head, 0, c.V, x, &err), 0);
            assert_int_equal(model_read_rows(&m, &table.p[0], 0, c.V, y, &err), 0);
            assert_memory_equal(x, y, (size_t)(c.V * c.C) * 4);
            free(x);
            free(y);
        }
        model_close(&m);
        if (tok) tokenizer_free(tok);
        param_table_free(&table);
    }
    assert_no_leftovers();
}

typedef struct { int n; PackReport last[64]; char name[64][96]; } Reports;

static void collect(void *ctx, const PackReport *r) {
    Reports *all = ctx;
    snprintf(all->name[all->n], sizeof all->name[0], "%s", r->p->name);
    all->last[all->n++] = *r;
}

// One packed tensor against quant_tensor on the bf16 values: codes, scales, zero points and values to the bit, errors
// to 1e-9 relative (sums of up to 2^21 doubles in another order: 2^21 * 2^-53 = 2.4e-10).
static void expect_packed(const ModelFile *m, LlamaConfig *c, const Param *p, const Param *from, const QuantSpec *s,
                          const PackReport *r) {
    Err err = {0};
    int64_t block[2], n = p->rows * p->cols;
    assert_int_equal(quant_block_shape(s, p->rows, p->cols, block, &err), 0);
    int64_t across = p->cols / block[1], n_qp = p->rows / block[0] * across;
    float *x = all_rows(c, from), *w = malloc((size_t)n * 4), *got = malloc((size_t)n * 4);
    int16_t *codes = malloc((size_t)n * sizeof *codes);
    QParams *qp = malloc((size_t)n_qp * sizeof *qp);
    uint8_t *packed = malloc(quant_row_bytes(s->bits, p->cols));
    // Of INT8 rows the values themselves.
    for (int64_t i = 0; i < n; i++) w[i] = quant_is_int8_rows(s) ? x[i] : bf16_round(x[i]);
    assert_int_equal(quant_tensor(codes, qp, w, p->rows, p->cols, s, QD_BF16, &err), 0);
    PackedTensor t;
    if (model_packed(m, p, &t, &err) != 1) fail_msg("%s", err.text);
    assert_true(t.n_scales == n_qp);
    for (int64_t i = 0; i < n_qp; i++) {
        assert_true(f32_bits(t.scale[i]) == f32_bits(qp[i].scale));
        assert_true((t.zero ? t.zero[i] : 0.0f) == qp[i].zp);
    }
    for (int64_t i = 0; i < p->rows; i++) {
        size_t row_bytes = quant_row_bytes(s->bits, p->cols);
        quant_pack_row(packed, codes + i * p->cols, p->cols, s->bits);
        assert_memory_equal(packed, t.codes + (size_t)i * row_bytes, row_bytes);
    }
    if (model_read_rows(m, p, 0, p->rows, got, &err)) fail_msg("%s", err.text);
    double signal = 0, noise = 0, worst = 0;
    for (int64_t i = 0; i < n; i++) {
        QParams q = qp[i / p->cols / block[0] * across + i % p->cols / block[1]];
        float v = quant_dequant(codes[i], q, s, quant_works_as_codes(s) ? QD_F32 : QD_BF16);
        if (f32_bits(v) != f32_bits(got[i])) fail_msg("%s[%d]: %a, expected %a", p->name, (int)i, (double)got[i],
                                                      (double)v);
        double e = (double)x[i] - v;
        signal += (double)x[i] * x[i];
        noise += e * e;
        if (fabs(e) > worst) worst = fabs(e);
    }
    assert_true(fabs(r->sqnr_db - 10 * log10(signal / noise)) < 1e-8);      // 10/ln 10 * 1e-9, twice
    assert_true(r->max_abs_err == worst);
    assert_true(r->bytes < r->float_bytes);
    packed_tensor_free(&t);
    free(x);
    free(w);
    free(got);
    free(codes);
    free(qp);
    free(packed);
}

static void packs_as_fake_quantization(void **state) {
    (void)state;
    static const char *specs[] = {
        "int4,group=32,symmetric", "int8,channel,symmetric", "uint4,group=32,float", "int8,tensor,asymmetric",
        "int3,group=16,symmetric", "int5,block=16x2", "int2,group=32,asymmetric", "int7,channel,asymmetric",
        "uint4,group=8,asymmetric", "int6,tensor", "int8,channel,rows",
    };
    Reports *reports = malloc(sizeof *reports);
    for (size_t i = 0; i < sizeof specs / sizeof *specs; i++) {
        LlamaConfig c = small_config(i % 2);
        QuantPlan plan;
        ParamTable table;
        Err err = {0};
        quant_plan_none(&plan);
        if (quant_spec_parse(&plan.linear.weight, specs[i], false, &err)) fail_msg("%s", err.text);
        if (c.tied) assert_int_equal(quant_spec_parse(&plan.tied_head, "int8,channel,symmetric", false, &err), 0);
        if (i % 3 == 0) assert_int_equal(quant_spec_parse(&plan.embedding, "int4,group=32", false, &err), 0);
        assert_int_equal(quant_plan_add_rule(&plan, "*layers.1.mlp.down_proj*=none", &err), 0);
        assert_int_equal(param_table_build(&table, &c, &plan, &err), 0);
        reports->n = 0;
        const char *path = temp("packed.bin");
        if (model_write_packed(path, &c, &plan, &table, NULL, DT_BF16, random_rows, &c, collect, reports, &err))
            fail_msg("%s: %s", specs[i], err.text);
        ModelFile m;
        if (model_open(&m, path, &err)) fail_msg("%s: %s", specs[i], err.text);
        assert_true(m.packed);
        int seen = 0;
        PackedTensor t;
        for (int k = 0; k < table.n; k++) {
            const Param *p = &table.p[k];
            if (!p->scheme.weight.bits) {
                assert_int_equal(model_packed(&m, p, &t, &err), 0);
                continue;
            }
            assert_string_equal(reports->name[seen], p->name);
            expect_packed(&m, &c, p, p, &p->scheme.weight, &reports->last[seen++]);
        }
        Param head = {.name = "lm_head.weight", .role = ROLE_HEAD, .layer = -1, .rows = c.V, .cols = c.C};
        if (c.tied) expect_packed(&m, &c, &head, &table.p[0], &plan.tied_head, &reports->last[seen++]);
        assert_int_equal(seen, reports->n);
        assert_int_equal(model_packed(&m, param_find(&table, "model.layers.1.mlp.down_proj.weight"), &t, &err), 0);
        model_close(&m);
        param_table_free(&table);
    }
    free(reports);
    assert_no_leftovers();
}

// Tensors of more than one tile: a scale for all of it takes two passes, groups are made tile by tile.
static void packs_large_tensors(void **state) {
    (void)state;
    static const char *specs[] = {"int8,tensor,asymmetric", "int4,group=32", "int8,channel", "int4,block=20000x32"};
    Reports *reports = malloc(sizeof *reports);
    for (size_t i = 0; i < sizeof specs / sizeof *specs; i++) {
        LlamaConfig c = small_config(false);
        c.V = 40000;                                               // 64 wide: 2.6M values, tiles hold 1M
        QuantPlan plan;
        ParamTable table;
        Err err = {0};
        quant_plan_none(&plan);
        if (quant_spec_parse(&plan.embedding, specs[i], false, &err)) fail_msg("%s", err.text);
        assert_int_equal(param_table_build(&table, &c, &plan, &err), 0);
        reports->n = 0;
        const char *path = temp("large.bin");
        if (model_write_packed(path, &c, &plan, &table, NULL, DT_F32, random_rows, &c, collect, reports, &err))
            fail_msg("%s", err.text);
        ModelFile m;
        if (model_open(&m, path, &err)) fail_msg("%s", err.text);
        expect_packed(&m, &c, &table.p[0], &table.p[0], &table.p[0].scheme.weight, &reports->last[0]);
        model_close(&m);
        param_table_free(&table);
        unlink(path);
    }
    free(reports);
}

// A tied table whose head stays float is stored once, as floats, whatever the embedding's scheme.
static void tied_table_stored_once(void **state) {
    (void)state;
    LlamaConfig c = small_config(true);
    QuantPlan plan;
    ParamTable table;
    ModelFile m;
    PackedTensor t;
    Err err = {0};
    quant_plan_none(&plan);
    assert_int_equal(quant_scheme_from_name(&plan.linear, "8da4w-32", &err), 0);
    assert_int_equal(quant_spec_parse(&plan.embedding, "int4,group=32", false, &err), 0);
    assert_int_equal(param_table_build(&table, &c, &plan, &err), 0);
    const char *path = temp("tied.bin");
    if (model_write_packed(path, &c, &plan, &table, NULL, DT_BF16, random_rows, &c, NULL, NULL, &err))
        fail_msg("%s", err.text);
    if (model_open(&m, path, &err)) fail_msg("%s", err.text);
    Param head = {.name = "lm_head.weight", .role = ROLE_HEAD, .layer = -1, .rows = c.V, .cols = c.C};
    assert_int_equal(model_packed(&m, &table.p[0], &t, &err), 0);
    assert_int_equal(model_packed(&m, &head, &t, &err), 0);
    float *x = malloc((size_t)(c.V * c.C) * 4), *want = all_rows(&c, &table.p[0]);
    for (int k = 0; k < 2; k++) {
        assert_int_equal(model_read_rows(&m, k ? &head : &table.p[0], 0, c.V, x, &err), 0);
        for (int i = 0; i < c.V * c.C; i++) assert_true(x[i] == bf16_round(want[i]));
    }
    free(x);
    free(want);
    model_close(&m);
    param_table_free(&table);
}

static bool same_files(const char *a, const char *b) {
    FileMap x, y;
    assert_int_equal(file_map(&x, a, NULL), 0);
    assert_int_equal(file_map(&y, b, NULL), 0);
    bool same = x.size == y.size && memcmp(x.data, y.data, x.size) == 0;
    file_unmap(&x);
    file_unmap(&y);
    return same;
}

// Packed from the trainer's f32 values, from the exported bf16 model.bin, or from the Hugging Face folder: the same
// file.
static void packs_the_same_from_exports(void **state) {
    (void)state;
    LlamaConfig c = small_config(false);
    c.V = 20000;                                         // tables of several tiles, which threads take in turns
    QuantPlan plan;
    ParamTable table;
    ModelFile m;
    Err err = {0};
    quant_plan_none(&plan);
    assert_int_equal(quant_scheme_from_name(&plan.linear, "int4wo-32", &err), 0);
    assert_int_equal(quant_spec_parse(&plan.embedding, "int4,group=32", false, &err), 0);
    assert_int_equal(param_table_build(&table, &c, &plan, &err), 0);
    const char *direct = temp("direct.bin"), *bin = temp("float.bin"), *packed = temp("again.bin"),
        *dir = temp("same-hf");
    if (model_write_packed(direct, &c, &plan, &table, NULL, DT_BF16, random_rows, &c, NULL, NULL,
                           &err)) fail_msg("%s", err.text);
    if (model_write_bin(bin, &c, &plan, &table, NULL, DT_BF16, random_rows, &c, &err)) fail_msg("%s", err.text);
    if (model_write_hf(dir, &c, &table, NULL, DT_BF16, random_rows, &c, &err)) fail_msg("%s", err.text);
    const char *sources[] = {bin, dir};
    for (int i = 0; i < 2; i++) {
        if (model_open(&m, sources[i], &err)) fail_msg("%s", err.text);
        if (model_write_packed(packed, &m.config, &plan, &table, NULL, DT_BF16, model_row_source, &m, NULL, NULL, &err))
            fail_msg("%s", err.text);
        model_close(&m);
        assert_true(same_files(direct, packed));
    }
    param_table_free(&table);
}

// ---------------------------------------------------------------------------------------------
// Hugging Face folders

static void hf_round_trip(void **state) {
    (void)state;
    for (int k = 0; k < 4; k++) {
        LlamaConfig c = small_config(k & 1);
        ParamTable table;
        ModelFile m;
        Err err = {0};
        assert_int_equal(param_table_build(&table, &c, NULL, &err), 0);
        const char *dir = temp("hf");                              // from the second round on it is replaced
        char name[600];
        size_t shard = k & 2 ? 50000 : SIZE_MAX;
        DType dtype = k & 1 ? DT_F32 : DT_BF16;
        if (model_write_hf_shards(dir, &c, &table, NULL, dtype, shard, random_rows, &c, &err)) fail_msg("%s", err.text);
        snprintf(name, sizeof name, "%s/model.safetensors.index.json", dir);
        assert_int_equal(path_exists(name), (k & 2) != 0);
        snprintf(name, sizeof name, "%s/", dir);                   // a trailing slash does no harm
        if (model_open(&m, name, &err)) fail_msg("%s", err.text);
        assert_int_equal(m.kind, MODEL_HF);
        assert_true(k & 2 ? m.n_files > 2 : m.n_files == 1);
        expect_same_config(&m.config, &c);
        expect_same_values(&m, &c, &table, dtype);
        model_close(&m);
        param_table_free(&table);
    }
    assert_no_leftovers();
}

static void hf_refuses_to_overwrite(void **state) {
    (void)state;
    LlamaConfig c = small_config(true);
    ParamTable table;
    Err err = {0};
    char name[600];
    assert_int_equal(param_table_build(&table, &c, NULL, &err), 0);
    const char *dir = temp("foreign"), *file = temp("plain-file");
    mkdir(dir, 0777);                                              // empty: taken
    if (model_write_hf(dir, &c, &table, NULL, DT_BF16, random_rows, &c, &err)) fail_msg("%s", err.text);
    snprintf(name, sizeof name, "%s/notes.txt", dir);
    write_text(name, "mine");
    assert_int_equal(model_write_hf(dir, &c, &table, NULL, DT_BF16, random_rows, &c, &err), E_USAGE);
    assert_non_null(strstr(err.text, "notes.txt"));
    unlink(name);
    assert_int_equal(model_write_hf(dir, &c, &table, NULL, DT_BF16, random_rows, &c, &err), 0);
    snprintf(name, sizeof name, "%s/model.safetensors", dir);
    StWriter *w = st_writer_new();                                 // weights that another program wrote
    st_writer_tensor(w, "a", DT_U8, 1, (int64_t[]){0});
    assert_int_equal(st_writer_begin(w, name, &err), 0);
    assert_int_equal(st_writer_finish(w, &err), 0);
    assert_int_equal(model_write_hf(dir, &c, &table, NULL, DT_BF16, random_rows, &c, &err), E_USAGE);
    assert_non_null(strstr(err.text, "model.safetensors"));
    unlink(name);                                                  // only a config.json: someone's, perhaps
    assert_int_equal(model_write_hf(dir, &c, &table, NULL, DT_BF16, random_rows, &c, &err), E_USAGE);
    write_text(file, "x");
    assert_int_equal(model_write_hf(file, &c, &table, NULL, DT_BF16, random_rows, &c, &err), E_USAGE);
    assert_int_equal(model_write_hf("", &c, &table, NULL, DT_BF16, random_rows, &c, &err), E_USAGE);
    assert_int_equal(model_write_hf("/nonexistent/a/b", &c, &table, NULL, DT_BF16, random_rows, &c, &err), E_FAIL);
    assert_int_equal(model_write_hf(temp("f16"), &c, &table, NULL, DT_F16, random_rows, &c, &err), E_DTYPE);
    param_table_free(&table);
    assert_no_leftovers();
}

// A folder with config.json and weights of which one tensor is strange.
typedef struct {
    const char *skip;                    // left out
    const char *extra;                   // added, a vector of 8 F32
    const char *odd; DType dtype;        // written with this dtype (of zeros)
    const char *wrong;                   // written with one row too many
    const char *nan; float value;        // its element (2, 7) is this
} Strange;

static const char *strange_folder(const LlamaConfig *c, const Strange *s) {
    static char dir[512];
    char path[600];
    ParamTable table;
    Err err = {0};
    snprintf(dir, sizeof dir, "%s/strange", test_tmpdir());
    mkdir(dir, 0777);
    char *config = llama_config_to_json(c, "float32");
    snprintf(path, sizeof path, "%s/config.json", dir);
    write_text(path, config);
    free(config);
    assert_int_equal(param_table_build(&table, c, NULL, &err), 0);
    StWriter *w = st_writer_new();
    for (int pass = 0; pass < 2; pass++) {
        for (int i = 0; i < table.n; i++) {
            const Param *p = &table.p[i];
            if (s->skip && strcmp(p->name, s->skip) == 0) continue;
            bool vector = p->rows == 1;
            int64_t shape[2] = {p->rows + (s->wrong && strcmp(p->name, s->wrong) == 0), p->cols};
            DType dtype = s->odd && strcmp(p->name, s->odd) == 0 ? s->dtype : DT_F32;
            if (pass == 0) {
                st_writer_tensor(w, p->name, dtype, vector ? 1 : 2, vector ? shape + 1 : shape);
            } else {
                size_t n = (size_t)(shape[0] * shape[1]);
                float *x = calloc(n, 8);                           // enough for any dtype
                if (s->nan && strcmp(p->name, s->nan) == 0) x[2 * p->cols + 7] = s->value;
                st_writer_data(w, x, n * dtype_size(dtype));
                free(x);
            }
        }
        float zeros[8] = {0};
        if (s->extra && pass == 0) st_writer_tensor(w, s->extra, DT_F32, 1, (int64_t[]){8});
        if (s->extra && pass == 1) st_writer_data(w, zeros, sizeof zeros);
        snprintf(path, sizeof path, "%s/model.safetensors", dir);
        if (pass == 0) assert_int_equal(st_writer_begin(w, path, &err), 0);
    }
    assert_int_equal(st_writer_finish(w, &err), 0);
    param_table_free(&table);
    return dir;
}

static void strange_models(void **state) {
    (void)state;
    LlamaConfig c = small_config(true), untied = small_config(false);
    const char *q = "model.layers.1.self_attn.q_proj.weight";
    const struct { Strange s; const LlamaConfig *c; int code; const char *message; } cases[] = {
        {{0}, &c, 0, NULL},
        {{.extra = "lm_head.weight"}, &c, 0, NULL},                // a second copy of a tied head
        {{.extra = "model.layers.0.self_attn.rotary_emb.inv_freq"}, &c, 0, NULL},
        {{.odd = q, .dtype = DT_BF16}, &c, 0, NULL},
        {{.odd = q, .dtype = DT_F16}, &c, 0, NULL},
        {{.skip = q}, &c, E_MISSING, q},
        {{.skip = "lm_head.weight"}, &untied, E_MISSING, "tie_word_embeddings"},
        {{.skip = "model.norm.weight"}, &c, E_MISSING, "model.norm.weight"},
        {{.extra = "model.layers.0.self_attn.q_proj.bias"}, &c, E_FORMAT, "q_proj.bias"},
        {{.extra = "model.layers.2.mlp.up_proj.weight"}, &c, E_FORMAT, "layers.2"},
        {{.odd = q, .dtype = DT_I8}, &c, E_DTYPE, "I8"},
        {{.odd = q, .dtype = DT_F64}, &c, E_DTYPE, "F64"},
        {{.wrong = q}, &c, E_SHAPE, "(65, 64); the configuration asks for (64, 64)"},
        {{.wrong = "model.embed_tokens.weight"}, &c, E_SHAPE, "(301, 64)"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        ModelFile m;
        Err err = {0};
        int rc = model_open(&m, strange_folder(cases[i].c, &cases[i].s), &err);
        if (rc != cases[i].code || (rc && !strstr(err.text, cases[i].message)))
            fail_msg("case %zu: rc %d '%s', expected %d '%s'", i, rc, err.text, cases[i].code, cases[i].message);
        if (rc == 0) model_close(&m);
    }
}

static void damaged_values(void **state) {
    (void)state;
    LlamaConfig c = small_config(true);
    static const float values[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        Strange s = {.nan = "model.layers.1.mlp.up_proj.weight", .value = values[i]};
        ModelFile m;
        ParamTable table;
        Err err = {0};
        if (model_open(&m, strange_folder(&c, &s), &err)) fail_msg("%s", err.text);
        assert_int_equal(param_table_build(&table, &c, NULL, &err), 0);
        const Param *p = param_find(&table, s.nan);
        float *x = malloc((size_t)(p->rows * p->cols) * 4);
        assert_int_equal(model_read_rows(&m, p, 0, 2, x, &err), 0);             // the rows before it are sound
        assert_int_equal(model_read_rows(&m, p, 1, 5, x, &err), E_FORMAT);
        assert_non_null(strstr(err.text, "up_proj"));
        assert_non_null(strstr(err.text, "row 2, column 7"));
        assert_non_null(strstr(err.text, isnan(values[i]) ? "NaN" : "infinite"));
        // Nor is it written.
        assert_int_equal(model_write_bin(temp("nan.bin"), &c, &m.plan, &table, NULL, DT_BF16, model_row_source, &m,
                                         &err), E_FORMAT);
        assert_int_equal(model_write_hf(temp("nan-hf"), &c, &table, NULL, DT_BF16, model_row_source, &m, &err),
                         E_FORMAT);
        assert_false(path_exists(temp("nan.bin")) || path_exists(temp("nan-hf")));
        free(x);
        model_close(&m);
        param_table_free(&table);
    }
    assert_no_leftovers();
}

static void expect_refused(const char *path, int code, const char *message) {
    ModelFile m;
    Err err = {0};
    int rc = model_open(&m, path, &err);
    if (rc != code || !strstr(err.text, message)) fail_msg("rc %d '%s', expected %d '%s'", rc, err.text, code, message);
}

static void strange_places(void **state) {
    (void)state;
    LlamaConfig c = small_config(true);
    Strange plain = {0};
    char path[700];
    const char *dir = temp("empty-folder");
    mkdir(dir, 0777);
    expect_refused(temp("nowhere"), E_MISSING, "nowhere");
    expect_refused("", E_USAGE, "path");
    expect_refused("/dev/null", E_FAIL, "/dev/null");
    expect_refused(dir, E_MISSING, "config.json");
    snprintf(path, sizeof path, "%s/model.bin", dir);
    write_text(path, "x");
    expect_refused(dir, E_MISSING, "did you mean");
    expect_refused(path, E_FORMAT, "model.bin");
    write_text(path, "PK\3\4 and so on");
    expect_refused(path, E_FORMAT, "PyTorch");
    write_text(path, "");
    expect_refused(path, E_FORMAT, "model.bin");
    snprintf(path, sizeof path, "%s/config.json", dir);
    write_text(path, "{\"architectures\": [\"MixtralForCausalLM\"]}");
    expect_refused(dir, E_FORMAT, "MixtralForCausalLM");
    write_text(path, "not json");
    expect_refused(dir, E_FORMAT, dir);
    write_text(path, "{\"quantization_config\": {\"quant_method\": \"gptq\"}}");
    expect_refused(dir, E_FORMAT, "gptq");
    char *config = llama_config_to_json(&c, "float32");
    write_text(path, config);
    free(config);
    expect_refused(dir, E_MISSING, "model.safetensors");

    // Shards named by an index must be files of the folder.
    static const char *names[] = {"../strange/model.safetensors", "/etc/passwd", "..", ".hidden.safetensors",
                                  "a/b.safetensors", "weights.bin", ""};
    char index[400];
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", dir);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        snprintf(index, sizeof index, "{\"weight_map\": {\"a\": \"%s\"}}", names[i]);
        write_text(path, index);
        expect_refused(dir, E_FORMAT, "file of this folder");
    }
    write_text(path, "{\"weight_map\": {\"a\": 5}}");
    expect_refused(dir, E_FORMAT, "not a string");
    write_text(path, "{\"weight_map\": {}}");
    expect_refused(dir, E_FORMAT, "weight_map");
    write_text(path, "{\"weight_map\": {\"a\": \"gone.safetensors\"}}");
    expect_refused(dir, E_MISSING, "gone.safetensors");

    // Truncated weights, and weights without their folder.
    const char *whole = strange_folder(&c, &plain);
    snprintf(path, sizeof path, "%s/model.safetensors", whole);
    expect_refused(path, E_FORMAT, "give the folder");
    struct stat st;
    stat(path, &st);
    assert_int_equal(truncate(path, st.st_size - 1), 0);
    expect_refused(whole, E_FORMAT, "truncated");
    snprintf(path, sizeof path, "%s/generation_config.json", strange_folder(&c, &plain));
    write_text(path, "{\"eos_token_id\": [1, 999]}");
    expect_refused(whole, E_FORMAT, "999");
    write_text(path, "{\"eos_token_id\": [1, 9, 4]}");
    ModelFile m;
    Err err = {0};
    if (model_open(&m, whole, &err)) fail_msg("%s", err.text);
    assert_true(m.config.n_eos == 3 && m.config.eos[1] == 9);
    model_close(&m);
    unlink(path);
}

// Two shards with the same tensor.
static void doubled_tensor(void **state) {
    (void)state;
    LlamaConfig c = small_config(true);
    Strange plain = {0};
    const char *dir = strange_folder(&c, &plain);
    char a[600], b[600];
    Err err = {0};
    snprintf(a, sizeof a, "%s/model.safetensors", dir);
    snprintf(b, sizeof b, "%s/a.safetensors", dir);
    assert_int_equal(rename(a, b), 0);
    snprintf(b, sizeof b, "%s/b.safetensors", dir);
    StWriter *w = st_writer_new();
    st_writer_tensor(w, "model.norm.weight", DT_U8, 1, (int64_t[]){0});
    assert_int_equal(st_writer_begin(w, b, &err), 0);
    assert_int_equal(st_writer_finish(w, &err), 0);
    snprintf(a, sizeof a, "%s/model.safetensors.index.json", dir);
    write_text(a, "{\"weight_map\": {\"x\": \"a.safetensors\", \"y\": \"b.safetensors\", \"z\": \"a.safetensors\"}}");
    expect_refused(dir, E_FORMAT, "two shards");
    unlink(a);
}

// ---------------------------------------------------------------------------------------------
// Damaged model.bin

// Copies a container, without its checksum and with one metadata value replaced, one tensor dropped, or the first bytes
// of one changed.
static void edit_bin(const char *from, const char *to, const char *key, const char *value, const char *drop,
                     const char *patch, const void *bytes, size_t n) {
    Safetensors st;
    Err err = {0};
    assert_int_equal(safetensors_open(&st, from, &err), 0);
    StWriter *w = st_writer_new();
    for (int i = 0; i < st.n_meta; i++)
        if (strcmp(st.meta[i].key, "checksum"))
            st_writer_meta(w, st.meta[i].key, key && strcmp(key, st.meta[i].key) == 0 ? value : st.meta[i].value);
    for (int i = 0; i < st.n; i++)
        if (!drop || strcmp(drop, st.tensors[i].name))
            st_writer_tensor(w, st.tensors[i].name, st.tensors[i].dtype, st.tensors[i].ndim, st.tensors[i].shape);
    assert_int_equal(st_writer_begin(w, to, &err), 0);
    for (int i = 0; i < st.n; i++) {
        const StTensor *t = &st.tensors[i];
        if (drop && strcmp(drop, t->name) == 0) continue;
        size_t skip = patch && strcmp(patch, t->name) == 0 ? n : 0;
        if (skip) st_writer_data(w, bytes, n);
        st_writer_data(w, t->data + skip, t->bytes - skip);
    }
    assert_int_equal(st_writer_finish(w, &err), 0);
    safetensors_close(&st);
}

static void damaged_bin(void **state) {
    (void)state;
    LlamaConfig c = small_config(true);
    QuantPlan plan;
    ParamTable table;
    ModelFile m;
    PackedTensor t;
    Err err = {0};
    quant_plan_none(&plan);
    assert_int_equal(quant_spec_parse(&plan.linear.weight, "uint4,group=32,float", false, &err), 0);
    assert_int_equal(param_table_build(&table, &c, &plan, &err), 0);
    const char *good = temp("good.bin"), *bad = temp("bad.bin"), *q = "model.layers.0.self_attn.q_proj.weight";
    if (model_write_packed(good, &c, &plan, &table, NULL, DT_BF16, random_rows, &c, NULL, NULL, &err))
        fail_msg("%s", err.text);
    edit_bin(good, bad, "version", "2", NULL, NULL, NULL, 0);
    expect_refused(bad, E_FORMAT, "version 2");
    edit_bin(good, bad, "config", "{}", NULL, NULL, NULL, 0);
    expect_refused(bad, E_FORMAT, "metadata");
    edit_bin(good, bad, "quant", "[[[", NULL, NULL, NULL, 0);
    expect_refused(bad, E_FORMAT, "metadata");
    edit_bin(good, bad, "packed", "maybe", NULL, NULL, NULL, 0);
    expect_refused(bad, E_FORMAT, "packed");
    edit_bin(good, bad, "packed", "false", NULL, NULL, NULL, 0);
    expect_refused(bad, E_MISSING, "layers.0.self_attn.q_proj.weight");
    QuantPlan other = plan;                                        // a plan that the tensors do not follow
    assert_int_equal(quant_spec_parse(&other.linear.weight, "int4,group=32", false, &err), 0);
    char *text = quant_plan_to_json(&other);
    edit_bin(good, bad, "quant", text, NULL, NULL, NULL, 0);
    expect_refused(bad, E_FORMAT, ".zero");
    free(text);
    assert_int_equal(quant_spec_parse(&other.linear.weight, "uint4,group=16,float", false, &err), 0);
    text = quant_plan_to_json(&other);
    edit_bin(good, bad, "quant", text, NULL, NULL, NULL, 0);
    expect_refused(bad, E_SHAPE, "q_proj.weight.scale");
    free(text);
    edit_bin(good, bad, NULL, NULL, "model.layers.0.self_attn.q_proj.weight.scale", NULL, NULL, 0);
    expect_refused(bad, E_MISSING, "q_proj.weight.scale");
    static const uint16_t scales[] = {0x7f80, 0xff80, 0x7fc0, 0xbf80, 0x0000};       // inf, -inf, NaN, -1, 0
    for (size_t i = 0; i < sizeof scales / sizeof *scales; i++) {
        edit_bin(good, bad, NULL, NULL, NULL, "model.layers.0.self_attn.q_proj.weight.scale", &scales[i], 2);
        if (model_open(&m, bad, &err)) fail_msg("%s", err.text);
        assert_int_equal(model_packed(&m, param_find(&table, q), &t, &err), E_FORMAT);
        assert_non_null(strstr(err.text, q));
        model_close(&m);
    }
    edit_bin(good, bad, NULL, NULL, NULL, "model.layers.0.self_attn.q_proj.weight.zero", &scales[2], 2);
    if (model_open(&m, bad, &err)) fail_msg("%s", err.text);
    assert_int_equal(model_packed(&m, param_find(&table, q), &t, &err), E_FORMAT);
    float row[64];
    assert_int_equal(model_read_rows(&m, param_find(&table, q), 0, 1, row, &err), E_FORMAT);
    model_close(&m);
    param_table_free(&table);

    // Zero points of the integer domain are codes: kernels that serve keep them in as few bits.
    quant_plan_none(&plan);
    assert_int_equal(quant_spec_parse(&plan.linear.weight, "int4,group=32,asymmetric", false, &err), 0);
    assert_int_equal(param_table_build(&table, &c, &plan, &err), 0);
    if (model_write_packed(good, &c, &plan, &table, NULL, DT_BF16, random_rows, &c, NULL, NULL, &err))
        fail_msg("%s", err.text);
    static const int8_t zeros[] = {8, -9, 30, -100};
    for (size_t i = 0; i < sizeof zeros; i++) {
        edit_bin(good, bad, NULL, NULL, NULL, "model.layers.0.self_attn.q_proj.weight.zero", &zeros[i], 1);
        if (model_open(&m, bad, &err)) fail_msg("%s", err.text);
        assert_int_equal(model_packed(&m, param_find(&table, q), &t, &err), E_FORMAT);
        assert_non_null(strstr(err.text, "codes of -8 to 7"));
        model_close(&m);
    }
    param_table_free(&table);
}

static void flip(const char *path, long at) {
    FILE *f = fopen(path, "r+b");
    assert_non_null(f);
    assert_int_equal(fseek(f, at, SEEK_SET), 0);
    int byte = fgetc(f);
    assert_int_equal(fseek(f, at, SEEK_SET), 0);
    fputc(byte ^ 1, f);
    fclose(f);
}

// Any change of a model.bin is seen when it is opened, unless --no-verify; files without a checksum open as before.
static void checksum(void **state) {
    (void)state;
    LlamaConfig c = small_config(true);
    QuantPlan plan;
    ParamTable table;
    ModelFile m;
    Err err = {0};
    quant_plan_none(&plan);
    assert_int_equal(quant_scheme_from_name(&plan.linear, "int8wo", &err), 0);
    assert_int_equal(param_table_build(&table, &c, &plan, &err), 0);
    const char *path = temp("sealed.bin"), *old = temp("old.bin");
    for (int packed = 0; packed < 2; packed++) {
        if (packed ? model_write_packed(path, &c, &plan, &table, NULL, DT_BF16, random_rows, &c, NULL, NULL, &err)
                   : model_write_bin(path, &c, &plan, &table, NULL, DT_BF16, random_rows, &c, &err))
            fail_msg("%s", err.text);
        if (model_open_with(&m, path, MODEL_STREAM, &err)) fail_msg("%s", err.text);
        const uint8_t *data = m.files[0].map.data;
        const char *digits = memmem(data, m.files[0].map.size, "checksum\":\"", 11);
        const char *theta = memmem(data, m.files[0].map.size, "vocab_size", 10);
        assert_true(digits && theta);
        long at[] = {0, (long)m.files[0].map.size - 1, (long)m.files[0].map.size / 2,
                     (const uint8_t *)digits - data + 11, (const uint8_t *)theta - data + 3};
        at[0] = (const uint8_t *)m.files[0].tensors[0].data - data;
        model_close(&m);
        for (size_t i = 0; i < sizeof at / sizeof *at; i++) {
            flip(path, at[i]);
            if (i < 4) expect_refused(path, E_FORMAT, "--no-verify");
            else assert_true(model_open(&m, path, &err) < 0);          // a name in the configuration
            if (i < 3) {
                if (model_open_with(&m, path, MODEL_NO_VERIFY, &err)) fail_msg("%s", err.text);
                model_close(&m);
            }
            flip(path, at[i]);
        }
        edit_bin(path, old, NULL, NULL, NULL, NULL, NULL, 0);
        const struct timespec before[2] = {{.tv_sec = 1000000000}, {.tv_sec = 1000000000}};   // file clocks are coarse
        assert_int_equal(utimensat(AT_FDCWD, old, before, 0), 0);
        if (model_open(&m, old, &err)) fail_msg("%s", err.text);
        assert_int_equal(model_unchanged(&m, &err), 0);
        flip(old, (long)m.files[0].map.size - 1);
        assert_int_equal(model_unchanged(&m, &err), E_FORMAT);
        assert_non_null(strstr(err.text, "old.bin"));
        model_close(&m);
        if (model_open(&m, old, &err)) fail_msg("%s", err.text);
        assert_int_equal(rename(path, old), 0);                            // another file, not this one
        assert_int_equal(model_unchanged(&m, &err), 0);
        model_close(&m);
    }
    param_table_free(&table);
}

// ---------------------------------------------------------------------------------------------
// INT8 rows that were trained

// Codes of all values, -128 among them, and scales that bf16 does not hold; row 3 is all zeros, with scale 0.
static int8_t trained_code(const Param *p, int64_t row, int64_t col) {
    return row == 3 ? 0 : (int8_t)(uint8_t)(row * 31 + col * 7 + (int64_t)p->role);
}
static float trained_scale(const Param *p, int64_t row) {
    return row == 3 ? 0.0f : 0.001f + 1e-5f * (float)(row + (int64_t)p->role);
}

typedef struct { LlamaConfig *c; float scale; int fail; } Trained;   // scale: of row 5, where it is not 0
static int trained_codes(void *ctx, const Param *p, int64_t row0, int64_t n, int8_t *codes, float *scale, Err *err) {
    const Trained *t = ctx;
    for (int64_t r = 0; r < n; r++) {
        scale[r] = row0 + r == 5 && t->scale != 0 ? t->scale : trained_scale(p, row0 + r);
        for (int64_t k = 0; k < p->cols; k++) codes[r * p->cols + k] = trained_code(p, row0 + r, k);
    }
    return t->fail && p->role == ROLE_DOWN ? err_set(err, E_FAIL, "the source broke") : 0;
}
static int trained_floats(void *ctx, const Param *p, int64_t row0, int64_t n, float *out, Err *err) {
    const Trained *t = ctx;
    if (quant_is_int8_rows(&p->scheme.weight)) fail_msg("%s was asked for as floats", p->name);
    return random_rows(t->c, p, row0, n, out, err);
}

static void trained_plan(QuantPlan *plan, ParamTable *table, const LlamaConfig *c, const char *head, const char *rule) {
    Err err = {0};
    if (quant_plan_from_options(plan, NULL, "int8qt-int8", NULL, NULL, NULL, head, &rule, rule != NULL, &err) ||
        param_table_build(table, c, plan, &err)) fail_msg("%s", err.text);
}

// Codes and scales come back as they were; floats as dtype; a tied head is made from the table as it is in the file.
static void trained_rows_round_trip(void **state) {
    (void)state;
    static const struct { bool tied; DType dtype; const char *head, *rule; } kinds[] = {
        {true, DT_BF16, "int8,channel,rows", NULL}, {true, DT_F32, "int8,channel,rows", NULL},
        {true, DT_F32, NULL, NULL}, {false, DT_BF16, NULL, NULL}, {false, DT_F32, NULL, "lm_head.weight=none"}};
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        LlamaConfig c = small_config(kinds[k].tied);
        c.V = 20000;                                               // 64 wide: more than one tile
        QuantPlan plan;
        ParamTable table;
        ModelFile m;
        PackedTensor t;
        Err err = {0};
        Trained source = {.c = &c};
        trained_plan(&plan, &table, &c, kinds[k].head, kinds[k].rule);
        const char *path = temp("trained.bin");
        if (model_write_trained(path, &c, &plan, &table, NULL, kinds[k].dtype, trained_floats, trained_codes, &source,
                                &err)) fail_msg("%s", err.text);
        if (model_open(&m, path, &err)) fail_msg("%s", err.text);
        assert_true(m.packed && quant_plan_equal(&m.plan, &plan));
        int packed = 0;
        for (int i = 0; i < table.n; i++) {
            const Param *p = &table.p[i];
            float *x = malloc((size_t)(p->rows * p->cols) * sizeof *x), *want = all_rows(&c, p);
            int rc = model_packed(&m, p, &t, &err);
            if (rc < 0 || model_read_rows(&m, p, 0, p->rows, x, &err)) fail_msg("%s", err.text);
            assert_int_equal(rc, quant_is_int8_rows(&p->scheme.weight));
            packed += rc;
            if (rc) assert_true(t.n_scales == p->rows && !t.zero);
            for (int64_t r = 0; r < p->rows; r++) {
                if (rc) assert_true(f32_bits(t.scale[r]) == f32_bits(trained_scale(p, r)));
                for (int64_t col = 0; col < p->cols; col++) {
                    float v = want[r * p->cols + col];
                    if (rc) {
                        assert_int_equal((int8_t)t.codes[r * p->cols + col], trained_code(p, r, col));
                        v = (float)trained_code(p, r, col) * trained_scale(p, r);
                    } else if (kinds[k].dtype == DT_BF16) {
                        v = bf16_round(v);
                    }
                    assert_true(x[r * p->cols + col] == v);
                }
            }
            packed_tensor_free(&t);
            free(x);
            free(want);
        }
        assert_int_equal(packed, 7 * c.L + (!c.tied && !kinds[k].rule));
        Param head = {.name = "lm_head.weight", .role = ROLE_HEAD, .layer = -1, .rows = c.V, .cols = c.C};
        if (kinds[k].head) {
            float *want = all_rows(&c, &table.p[0]);
            if (model_packed(&m, &head, &t, &err) != 1) fail_msg("%s", err.text);
            for (int64_t r = 0; r < c.V; r++) {
                float *w = want + r * c.C, amax = 0;
                // Of the table's own values, as the trainer's view is, whatever the table is written as.
                for (int i = 0; i < c.C; i++)
                    if (fabsf(w[i]) > amax) amax = fabsf(w[i]);
                float scale = int8_row_scale(amax), inv = int8_row_inv(scale);
                assert_true(f32_bits(t.scale[r]) == f32_bits(scale));
                for (int i = 0; i < c.C; i++) assert_int_equal((int8_t)t.codes[r * c.C + i], int8_nearest(w[i], inv));
            }
            packed_tensor_free(&t);
            free(want);
        }
        model_close(&m);
        param_table_free(&table);
        unlink(path);
    }
    assert_no_leftovers();
}

// Scales that no training leaves are refused, in a file and by the writer; a zero is a row of zeros.
static void damaged_rows(void **state) {
    (void)state;
    LlamaConfig c = small_config(true);
    QuantPlan plan, other;
    ParamTable table;
    ModelFile m;
    PackedTensor t;
    Err err = {0};
    Trained source = {.c = &c};
    trained_plan(&plan, &table, &c, "int8,channel,rows", NULL);
    const char *good = temp("rows.bin"), *bad = temp("rows-bad.bin");
    const char *names[] = {"model.layers.1.mlp.up_proj.weight", "lm_head.weight"};
    Param head = {.name = "lm_head.weight", .role = ROLE_HEAD, .layer = -1, .rows = c.V, .cols = c.C};
    if (model_write_trained(good, &c, &plan, &table, NULL, DT_BF16, trained_floats, trained_codes, &source, &err))
        fail_msg("%s", err.text);
    const float scales[] = {INFINITY, -INFINITY, NAN, -1e-3f, -1e-42f, 0.0f, 1e-42f};
    for (size_t i = 0; i < sizeof scales / sizeof *scales; i++)
        for (int k = 0; k < 2; k++) {
            char part[128];
            snprintf(part, sizeof part, "%s.scale", names[k]);
            edit_bin(good, bad, NULL, NULL, NULL, part, &scales[i], 4);
            if (model_open(&m, bad, &err)) fail_msg("%s", err.text);
            int rc = model_packed(&m, k ? &head : param_find(&table, names[k]), &t, &err);
            if (rc != (i < 5 ? E_FORMAT : 1)) fail_msg("scale %g: %d", (double)scales[i], rc);
            if (rc == 1) assert_true(t.scale[0] == scales[i]);
            else assert_true(strstr(err.text, names[k]) && strstr(err.text, "not negative"));
            packed_tensor_free(&t);
            float row[64];
            if (i < 3) assert_int_equal(model_read_rows(&m, param_find(&table, names[0]), 0, 1, row, &err),
                                        k ? 0 : E_FORMAT);
            model_close(&m);
        }
    edit_bin(good, bad, "packed", "false", NULL, NULL, NULL, 0);
    expect_refused(bad, E_FORMAT, "not packed");
    edit_bin(good, bad, NULL, NULL, "lm_head.weight.scale", NULL, NULL, 0);
    expect_refused(bad, E_MISSING, "lm_head.weight.scale");
    edit_bin(good, bad, NULL, NULL, "model.layers.0.self_attn.o_proj.weight.codes", NULL, NULL, 0);
    expect_refused(bad, E_MISSING, "o_proj.weight.codes");
    other = plan;                                                  // the same shapes, other scales
    assert_int_equal(quant_scheme_from_name(&other.linear, "int8dq", &err), 0);
    char *text = quant_plan_to_json(&other);
    edit_bin(good, bad, "quant", text, NULL, NULL, NULL, 0);
    expect_refused(bad, E_DTYPE, "expected BF16");
    free(text);
    struct stat st;
    edit_bin(good, bad, NULL, NULL, NULL, NULL, NULL, 0);
    stat(bad, &st);
    for (int cut = 1; cut < 1000; cut += 333) {
        assert_int_equal(truncate(bad, st.st_size - cut), 0);
        expect_refused(bad, E_FORMAT, "truncated");
    }
    param_table_free(&table);
}

static void failed_rows(void **state) {
    (void)state;
    LlamaConfig c = small_config(true);
    QuantPlan plan;
    ParamTable table;
    Err err = {0};
    trained_plan(&plan, &table, &c, "int8,channel,rows", NULL);
    const char *path = temp("rows-failed.bin");
    const Trained sources[] = {{&c, NAN, 0}, {&c, INFINITY, 0}, {&c, -1.0f, 0}, {&c, 0, 1}, {&c, 0, 0}};
    for (int i = 0; i < 5; i++) {
        Trained source = sources[i];
        struct rlimit old;
        getrlimit(RLIMIT_FSIZE, &old);
        struct rlimit small = {100000, old.rlim_max};
        signal(SIGXFSZ, SIG_IGN);
        if (i == 4) setrlimit(RLIMIT_FSIZE, &small);
        int rc = model_write_trained(path, &c, &plan, &table, NULL, DT_BF16, trained_floats, trained_codes, &source,
                                     &err);
        setrlimit(RLIMIT_FSIZE, &old);
        const char *hint = i < 3 ? "scale of row 5" : i == 3 ? "the source broke" : "cannot write";
        if (rc != (i < 3 ? E_FORMAT : E_FAIL) || !strstr(err.text, hint)) fail_msg("%d: %d, %s", i, rc, err.text);
        assert_false(path_exists(path));
    }
    // As floats they would be quantized a second time.
    assert_int_equal(model_write_bin(path, &c, &plan, &table, NULL, DT_BF16, random_rows, &c, &err), E_USAGE);
    assert_non_null(strstr(err.text, "stored as codes"));
    assert_no_leftovers();
    param_table_free(&table);
}

// ---------------------------------------------------------------------------------------------
// Failures while writing

static int failing_rows(void *ctx, const Param *p, int64_t row0, int64_t n, float *out, Err *err) {
    (void)row0;
    for (int64_t i = 0; i < n * p->cols; i++) out[i] = p->role == ROLE_DOWN ? 3.4e38f : 0.5f;
    return p->role == ROLE_DOWN && ctx ? err_set(err, E_FAIL, "the source broke") : 0;
}

static void failed_writes(void **state) {
    (void)state;
    LlamaConfig c = small_config(false);
    QuantPlan plan;
    ParamTable table;
    Err err = {0};
    quant_plan_none(&plan);
    assert_int_equal(quant_scheme_from_name(&plan.linear, "int4wo-32", &err), 0);
    assert_int_equal(param_table_build(&table, &c, &plan, &err), 0);
    const char *bin = temp("failed.bin"), *dir = temp("failed-hf");
    for (int k = 0; k < 3; k++) {
        // 0: the source fails; 1: a value that bf16 does not hold; 2: a limit on file size, as a full disk does
        struct rlimit old;
        int code = k == 1 ? E_FORMAT : E_FAIL;
        const char *message = k == 0 ? "the source broke" : k == 1 ? "too large" : "cannot write";
        RowSource source = k == 2 ? random_rows : failing_rows;
        void *ctx = k == 1 ? NULL : &c;
        getrlimit(RLIMIT_FSIZE, &old);
        struct rlimit small = {100000, old.rlim_max};
        signal(SIGXFSZ, SIG_IGN);
        if (k == 2) setrlimit(RLIMIT_FSIZE, &small);
        int rc[3];
        char text[3][1024];
        rc[0] = model_write_bin(bin, &c, &plan, &table, NULL, DT_BF16, source, ctx, &err), strcpy(text[0], err.text);
        rc[1] = model_write_hf(dir, &c, &table, NULL, DT_BF16, source, ctx, &err), strcpy(text[1], err.text);
        rc[2] = model_write_packed(bin, &c, &plan, &table, NULL, DT_F32, source, ctx, NULL, NULL, &err);
        strcpy(text[2], err.text);
        setrlimit(RLIMIT_FSIZE, &old);
        for (int i = 0; i < 3; i++)
            if (rc[i] != code || !strstr(text[i], message))
                fail_msg("%d: writer %d gives %d '%s', expected %d '%s'", k, i, rc[i], text[i], code, message);
        assert_false(path_exists(bin) || path_exists(dir));
        assert_no_leftovers();
    }
    assert_int_equal(model_write_bin("/nonexistent/x.bin", &c, &plan, &table, NULL, DT_BF16, random_rows, &c, &err),
                     E_FAIL);
    assert_int_equal(model_write_bin(bin, &c, &plan, &table, NULL, DT_I8, random_rows, &c, &err), E_DTYPE);
    assert_int_equal(quant_spec_parse(&plan.linear.weight, "int4,group=48", false, &err), 0);
    assert_int_equal(model_write_packed(bin, &c, &plan, &table, NULL, DT_BF16, random_rows, &c, NULL, NULL, &err),
                     E_SHAPE);
    assert_no_leftovers();
    param_table_free(&table);
}

// Opening maps a file and reads its header, nothing more: a sparse file of 2.5 GB must not become resident.
static void opening_touches_no_data(void **state) {
    (void)state;
    LlamaConfig c;
    QuantPlan plan;
    ParamTable table;
    Err err = {0};
    quant_plan_none(&plan);
    assert_int_equal(llama_config_named(&c, "1B", &err), 0);
    assert_int_equal(param_table_build(&table, &c, &plan, &err), 0);
    char *header = malloc(1 << 20), *config = llama_config_to_json(&c, "bfloat16"), *quant = quant_plan_to_json(&plan);
    size_t n = (size_t)sprintf(header, "{\"__metadata__\":{\"format\":\"qllm.c\",\"version\":\"1\",");
    n += (size_t)sprintf(header + n, "\"packed\":\"false\",\"config\":\"");
    for (const char *s = config; *s; s++) {
        if (*s == '\n' || *s == '\t') continue;
        if (*s == '"') header[n++] = '\\';
        header[n++] = *s;
    }
    n += (size_t)sprintf(header + n, "\",\"quant\":\"");
    for (const char *s = quant; *s; s++) {
        if (*s == '"') header[n++] = '\\';
        header[n++] = *s;
    }
    n += (size_t)sprintf(header + n, "\"}");
    size_t at = 0;
    for (int i = 0; i < table.n; i++) {
        const Param *p = &table.p[i];
        size_t bytes = (size_t)(p->rows * p->cols) * 2;
        n += (size_t)sprintf(header + n, ",\"%s\":{\"dtype\":\"BF16\",\"shape\":[", p->name);
        if (p->rows > 1) n += (size_t)sprintf(header + n, "%lld,", (long long)p->rows);
        n += (size_t)sprintf(header + n, "%lld],\"data_offsets\":[%zu,%zu]}", (long long)p->cols, at, at + bytes);
        at += bytes;
    }
    header[n++] = '}';
    const char *path = temp("sparse.bin");
    FILE *f = fopen(path, "wb");
    uint64_t len = n;
    fwrite(&len, 8, 1, f);
    fwrite(header, 1, n, f);
    fclose(f);
    if (truncate(path, (off_t)(8 + n + at))) {
        print_message("skipped: no sparse file of %zu bytes here\n", at);
        skip();
    }
    ModelFile m;
    size_t before = peak_rss_bytes();
    double start = now_seconds();
    if (model_open(&m, path, &err)) fail_msg("%s", err.text);
    print_message("opened %.1f GB in %.1f ms\n", (double)at * 1e-9, 1e3 * (now_seconds() - start));
    assert_true(peak_rss_bytes() - before < 32u << 20);
    assert_int_equal(m.config.V, 128256);
    model_close(&m);
    unlink(path);
    free(header);
    free(config);
    free(quant);
    param_table_free(&table);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(bin_round_trip), cmocka_unit_test(packs_as_fake_quantization),
    cmocka_unit_test(packs_large_tensors), cmocka_unit_test(tied_table_stored_once),
    cmocka_unit_test(packs_the_same_from_exports), cmocka_unit_test(hf_round_trip),
    cmocka_unit_test(hf_refuses_to_overwrite), cmocka_unit_test(strange_models), cmocka_unit_test(damaged_values),
    cmocka_unit_test(trained_rows_round_trip), cmocka_unit_test(damaged_rows), cmocka_unit_test(failed_rows),
    cmocka_unit_test(strange_places), cmocka_unit_test(doubled_tensor), cmocka_unit_test(damaged_bin),
    cmocka_unit_test(checksum),
    cmocka_unit_test(failed_writes), cmocka_unit_test(opening_touches_no_data),
};
TEST_MAIN(tests)
