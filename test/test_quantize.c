// The conversion: what ./quantize writes is what the reference quantizer says, whatever file the model came from; what
// it prints is true; what it refuses leaves nothing behind. The test is the program, too: --as-program ARGUMENTS.
#include "test_common.h"
#define main quantize_main
#include "../quantize.c"
#undef main
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "json.h"

static const char *self;
static char dir[300];        // holds what the tests write

static const char *at(const char *name) {
    static char path[8][420];
    static int next;
    char *p = path[next++ % 8];
    snprintf(p, sizeof path[0], "%s/%s", dir, name);
    return p;
}

// Runs quantize in a process of its own; what it printed is in `printed`. Returns its exit status.
static char printed[65536];
static int program(const char *before, const char *fmt, ...) {
    char args[2000], command[3500];
    va_list list;
    va_start(list, fmt);
    vsnprintf(args, sizeof args, fmt, list);
    va_end(list);
    snprintf(command, sizeof command, "%s '%s' --as-program %s > '%s' 2>&1", before, self, args, at("printed"));
    int status = system(command);
    char *text;
    size_t len;
    Err err = {0};
    if (file_read(&text, &len, at("printed"), sizeof printed - 1, &err)) fail_msg("%s", err.text);
    memcpy(printed, text, len + 1);
    free(text);
    if (!WIFEXITED(status)) fail_msg("%s: did not exit\n%s", command, printed);
    return WEXITSTATUS(status);
}

static void succeeds(int status) {
    if (status) fail_msg("exit status %d: %s", status, printed);
}

static void fails(int status, int expected, const char *hint) {
    if (status != expected) fail_msg("exit status %d, expected %d: %s", status, expected, printed);
    if (!strstr(printed, hint)) fail_msg("\"%s\" is not in: %s", hint, printed);
}

static void open_model(ModelFile *m, const char *path) {
    Err err = {0};
    if (model_open(m, path, &err)) fail_msg("%s", err.text);
}

// ---------------------------------------------------------------------------------------------
// Models with weights that are no bf16 values, a row of zeros and an outlier among them.

static int made_rows(void *ctx, const Param *p, int64_t row0, int64_t n, float *out, Err *err) {
    (void)err;
    param_init_random(out, p, ctx, 7, (size_t)(row0 * p->cols), (size_t)(n * p->cols));
    for (int64_t r = row0; r < row0 + n; r++) {
        if (r == 1 && p->rows > 1) memset(out + (r - row0) * p->cols, 0, (size_t)p->cols * sizeof *out);
        if (r == 2) out[(r - row0) * p->cols + 5] = 3.1f;
    }
    return 0;
}

static LlamaConfig config(bool tied) {
    LlamaConfig c;
    Err err = {0};
    if (llama_config_named(&c, "tiny", &err)) fail_msg("%s", err.text);
    c.tied = tied;
    return c;
}

// Returns the path, good until the next model is made.
static const char *make_model(const char *name, const LlamaConfig *c, const QuantPlan *plan, DType dtype) {
    static char path[420];
    QuantPlan none;
    ParamTable table;
    Err err = {0};
    quant_plan_none(&none);
    LlamaConfig copy = *c;
    if (param_table_build(&table, c, plan ? plan : &none, &err)) fail_msg("%s", err.text);
    snprintf(path, sizeof path, "%s", at(name));
    if (model_write_bin(path, c, plan ? plan : &none, &table, NULL, dtype, made_rows, &copy, &err))
        fail_msg("%s", err.text);
    param_table_free(&table);
    return path;
}

// One parameter of the packed file against quant_tensor on bf16 of the weights. *sqnr is computed on the way.
static void check_param(const ModelFile *m, const Param *p, const QuantSpec *s, const LlamaConfig *c, double *sqnr) {
    Err err = {0};
    size_t n = (size_t)(p->rows * p->cols);
    Param from = *p;
    if (p->role == ROLE_HEAD && c->tied) {
        from.role = ROLE_EMBED;
        snprintf(from.name, sizeof from.name, "model.embed_tokens.weight");
    }
    float *x = malloc(n * sizeof *x), *w = malloc(n * sizeof *w), *back = malloc(n * sizeof *back);
    int16_t *codes = malloc(n * sizeof *codes), *row = malloc((size_t)p->cols * sizeof *row);
    QParams *qp = malloc(n * sizeof *qp);
    assert_true(x && w && back && codes && row && qp);
    LlamaConfig copy = *c;
    made_rows(&copy, &from, 0, p->rows, x, &err);
    // INT8 rows are made from the values themselves, a tied head's from the table as this build writes it.
    bool as_is = quant_is_int8_rows(s) && (p->role != ROLE_HEAD || !c->tied || sizeof(floatX) == 4);
    for (size_t i = 0; i < n; i++) w[i] = as_is ? x[i] : bf16_round(x[i]);
    if (quant_tensor(codes, qp, w, p->rows, p->cols, s, QD_BF16, &err)) fail_msg("%s", err.text);

    PackedTensor t;
    int rc = model_packed(m, p, &t, &err);
    if (rc != 1) fail_msg("%s is not packed: %d %s", p->name, rc, err.text);
    int64_t block[2];
    assert_int_equal(quant_block_shape(s, p->rows, p->cols, block, &err), 0);
    assert_int_equal(t.n_scales, p->rows / block[0] * (p->cols / block[1]));
    for (int64_t i = 0; i < t.n_scales; i++) {
        assert_int_equal(f32_bits(t.scale[i]), f32_bits(qp[i].scale));
        if (t.zero) assert_true(t.zero[i] == qp[i].zp);
    }
    assert_int_equal(t.zero != NULL, quant_has_zero(s));
    for (int64_t r = 0; r < p->rows; r++) {
        quant_unpack_row(row, t.codes + (size_t)r * quant_row_bytes(s->bits, p->cols), p->cols, s);
        assert_memory_equal(row, codes + r * p->cols, (size_t)p->cols * sizeof *row);
    }
    packed_tensor_free(&t);

    double signal = 0, noise = 0;
    QuantDType d = quant_works_as_codes(s) ? QD_F32 : QD_BF16;
    if (!(p->role == ROLE_HEAD && c->tied)) {    // a tied head has no rows of its own to read
        if (model_read_rows(m, p, 0, p->rows, back, &err)) fail_msg("%s", err.text);
        for (size_t i = 0; i < n; i++) {
            QParams q = qp[(int64_t)i / p->cols / block[0] * (p->cols / block[1]) + (int64_t)i % p->cols / block[1]];
            assert_true(back[i] == quant_dequant(codes[i], q, s, d));
            double e = (double)x[i] - (double)back[i];
            signal += (double)x[i] * (double)x[i];
            noise += e * e;
        }
    }
    *sqnr = noise > 0 ? 10 * log10(signal / noise) : INFINITY;
    free(x), free(w), free(back), free(codes), free(row), free(qp);
}

// Every parameter of the file, quantized or not; returns how many are packed. json: what --json wrote.
static int check_file(const char *path, const LlamaConfig *c, const char *json) {
    ModelFile m;
    ParamTable table;
    Err err = {0};
    open_model(&m, path);
    assert_true(m.packed);
    if (param_table_build(&table, c, &m.plan, &err)) fail_msg("%s", err.text);
    char *text;
    size_t len;
    if (file_read(&text, &len, json, 1 << 20, &err)) fail_msg("%s", err.text);
    cJSON *root = json_parse(text, len, json, &err);
    if (!root) fail_msg("%s\n%s", err.text, text);
    const cJSON *row = cJSON_GetObjectItem(root, "tensors")->child;

    Param head = {.name = "lm_head.weight", .role = ROLE_HEAD, .layer = -1, .rows = c->V, .cols = c->C};
    bool extra = c->tied && m.plan.tied_head.bits;
    int packed = 0;
    double values = 0, per_value = 0, before;           // the floats that were there before: a tied table once
    for (int i = 0; i < table.n + extra; i++) {
        const Param *p = i < table.n ? &table.p[i] : &head;
        const QuantSpec *s = p == &head ? &m.plan.tied_head : &p->scheme.weight;
        bool shared = p->role == ROLE_EMBED && c->tied && !m.plan.tied_head.bits;   // the head needs its floats
        if (!s->bits || shared) {
            PackedTensor t;
            assert_int_equal(model_packed(&m, p, &t, &err), 0);
            continue;
        }
        double sqnr;
        check_param(&m, p, s, c, &sqnr);
        packed++;
        assert_non_null(row);
        if (p != &head) values += (double)p->rows * (double)p->cols;
        assert_int_equal(json_double(row, "float_bytes", true, 0, 1e12, &per_value, &err), 0);
        per_value /= (double)p->rows * (double)p->cols;
        assert_string_equal(json_string(row, "name"), p->name);
        const cJSON *reported = cJSON_GetObjectItem(row, "sqnr_db");
        // Both sums run in double, in another order: a relative 1e-12 of a ratio is far below 1e-9 dB.
        if (isfinite(sqnr) && fabs(reported->valuedouble - sqnr) > 1e-9)
            fail_msg("%s: SQNR %.12f reported, %.12f computed", p->name, reported->valuedouble, sqnr);
        row = row->next;
    }
    assert_null(row);
    assert_int_equal(json_double(cJSON_GetObjectItem(root, "quantized_bytes"), "before", true, 0, 1e12, &before,
                                 &err), 0);
    assert_true(before == values * per_value);
    cJSON_Delete(root);
    free(text);
    param_table_free(&table);
    model_close(&m);
    return packed;
}

// ---------------------------------------------------------------------------------------------

static void test_every_scheme(void **state) {
    (void)state;
    static const struct { const char *options, *name; } schemes[] = {
        {"--scheme int8wo", "int8wo"}, {"--scheme int8dq", "int8dq"}, {"--scheme int4wo-32", "int4wo-32"},
        {"--scheme 8da4w-32", "8da4w-32"}, {"--scheme 8da4w-64", "8da4w-64"}, {"--scheme int2-16", "int2-16"},
        {"--scheme int3-32", "int3-32"}, {"--scheme int5-64", "int5-64"}, {"--scheme int6-32", "int6-32"},
        {"--scheme int7-8", "int7-8"}, {"--scheme int8-32", "int8-32"}, {"--scheme int8qt", "int8qt"},
        {"--scheme int8qt-int8", "int8qt-int8"}, {"--scheme int8qt --head int8,channel,rows", "int8qt"},
        {"--weight uint5,group=32,float --embedding int4,group=32 --head int8,channel", "custom"},
        {"--weight int4,group=16,asymmetric --head uint3,tensor", "custom"},
        {"--weight int4,block=2x16,symmetric-no-clip --embedding uint6,channel", "custom"},
        {"--weight int8,tensor --activation int8,token --embedding int8,block=43x64", "custom"},
        {"--scheme 8da4w-32 --rule '*.down_proj.*=int8wo' --rule 'model.layers.0.*=none'", "custom"}};
    for (int tied = 0; tied <= 1; tied++) {
        LlamaConfig c = config(tied);
        const char *model = make_model("model.bin", &c, NULL, DT_F32);
        for (size_t i = 0; i < sizeof schemes / sizeof *schemes; i++) {
            if (!tied && strstr(schemes[i].options, "--head")) continue;
            char out[100];
            snprintf(out, sizeof out, "model-%s.bin", schemes[i].name);
            succeeds(program("", "'%s' %s --json '%s'", model, schemes[i].options, at("report.json")));
            assert_true(strstr(printed, "file ") && strstr(printed, schemes[i].name));
            int packed = check_file(at(out), &c, at("report.json"));
            int expected = 7 * c.L + !tied;                  // the linears
            expected -= strstr(schemes[i].options, "--rule") ? 7 : 0;
            bool shared = tied && !strstr(schemes[i].options, "--head");
            expected += strstr(schemes[i].options, "--embedding") && !shared;
            expected += strstr(schemes[i].options, "--head") != NULL;
            assert_int_equal(packed, expected);
            assert_int_equal(unlink(at(out)), 0);
        }
    }
}

// The scheme is the file's, and the bf16 weights that the model is exported with give the same codes.
static void test_scheme_from_file(void **state) {
    (void)state;
    LlamaConfig c = config(true);
    QuantPlan plan;
    Err err = {0};
    static const char *const names[] = {"8da4w-32", "int4wo-64", "int8dq"};
    for (int i = 0; i < 3; i++) {
        assert_int_equal(quant_plan_from_options(&plan, NULL, names[i], NULL, NULL, NULL, NULL, NULL, 0, &err), 0);
        const char *model = make_model("trained.bin", &c, &plan, DT_F32);
        char out[100];
        snprintf(out, sizeof out, "trained-%s.bin", names[i]);
        succeeds(program("", "'%s' --dtype bf16 --json '%s' --quiet", model, at("report.json")));
        assert_null(strstr(printed, "q_proj.weight  "));
        check_file(at(out), &c, at("report.json"));

        succeeds(program("", "'%s' --scheme none --dtype bf16 --hf-out '%s'", model, at("hf")));
        assert_non_null(strstr(printed, "note"));            // not what the model was trained for
        succeeds(program("", "'%s/' --scheme %s", at("hf"), names[i]));
        char from_hf[100];
        snprintf(from_hf, sizeof from_hf, "hf-%s.bin", names[i]);
        Safetensors a, b;
        if (safetensors_open(&a, at(out), &err) || safetensors_open(&b, at(from_hf), &err)) fail_msg("%s", err.text);
        int compared = 0;
        for (int k = 0; k < a.n; k++) {
            const StTensor *t = safetensors_find(&b, a.tensors[k].name);
            assert_non_null(t);
            if (sizeof(floatX) == 4 && t->dtype == DT_F32) continue;
            assert_int_equal(t->bytes, a.tensors[k].bytes);
            assert_memory_equal(t->data, a.tensors[k].data, t->bytes);
            compared++;
        }
        assert_true(compared >= 14 * c.L);                   // codes and scales of every linear
        safetensors_close(&a);
        safetensors_close(&b);
    }
}

static void test_dequantized_export(void **state) {
    (void)state;
    LlamaConfig c = config(true);
    const char *model = make_model("export.bin", &c, NULL, DT_BF16);
    succeeds(program("", "'%s' --scheme int8wo --embedding int4,group=32 --head int8,channel --hf-out '%s'", model,
                     at("exported")));
    ModelFile packed, hf;
    ParamTable table;
    Err err = {0};
    open_model(&packed, at("export-custom.bin"));
    open_model(&hf, at("exported"));
    assert_true(quant_plan_is_none(&hf.plan));
    assert_false(hf.config.tied);                            // the head has values of its own now
    assert_int_equal(param_table_build(&table, &c, &packed.plan, &err), 0);
    for (int i = 0; i < table.n; i++) {
        const Param *p = &table.p[i];
        size_t n = (size_t)(p->rows * p->cols);
        float *a = malloc(n * sizeof *a), *b = malloc(n * sizeof *b);
        assert_true(a && b);
        assert_int_equal(model_read_rows(&packed, p, 0, p->rows, a, &err), 0);
        assert_int_equal(model_read_rows(&hf, p, 0, p->rows, b, &err), 0);
        for (size_t k = 0; k < n; k++) assert_true(bf16_round(a[k]) == b[k]);
        free(a), free(b);
    }
    param_table_free(&table);
    model_close(&packed);
    model_close(&hf);
    fails(program("", "'%s' --scheme int8wo --hf-out '%s'", at("exported"), at("exported")), 2, "is the model that");
}

static void test_float_copy(void **state) {
    (void)state;
    LlamaConfig c = config(false);
    const char *model = make_model("plain.bin", &c, NULL, DT_F32);
    succeeds(program("", "'%s' --scheme none --dtype f32 --out '%s'", model, at("copy.bin")));
    ModelFile m;
    open_model(&m, at("copy.bin"));
    assert_false(m.packed);
    assert_true(quant_plan_is_none(&m.plan));
    model_close(&m);
    Safetensors a, b;
    Err err = {0};
    if (safetensors_open(&a, model, &err) || safetensors_open(&b, at("copy.bin"), &err)) fail_msg("%s", err.text);
    assert_int_equal(a.n, b.n);
    for (int i = 0; i < a.n; i++) {
        assert_string_equal(a.tensors[i].name, b.tensors[i].name);
        assert_memory_equal(a.tensors[i].data, b.tensors[i].data, a.tensors[i].bytes);
    }
    safetensors_close(&a);
    safetensors_close(&b);
}

// Each ends with the right status, says what is wrong, and leaves neither an output nor a temporary file.
static void test_refusals(void **state) {
    (void)state;
    LlamaConfig c = config(true), untied = config(false);
    char model[420], packed[420], other[420];
    snprintf(model, sizeof model, "%s", make_model("m.bin", &c, NULL, DT_BF16));
    snprintf(other, sizeof other, "%s", make_model("untied.bin", &untied, NULL, DT_BF16));
    snprintf(packed, sizeof packed, "%s", at("m-int8wo.bin"));
    succeeds(program("", "'%s' --scheme int8wo", model));
    assert_int_equal(link(model, at("hard.bin")), 0);
    assert_int_equal(symlink(model, at("soft.bin")), 0);
    assert_int_equal(mkdir(at("folder"), 0777), 0);
    assert_int_equal(mkdir(at("left"), 0777), 0);

    fails(program("", "%s", ""), 2, "which model?");
    fails(program("", "'%s'", model), 2, "--scheme 8da4w-32");
    fails(program("", "'%s' --scheme 8da4w", model), 2, "did you mean 8da4w-32?");
    fails(program("", "'%s' --scheme int9wo", model), 2, "known: none, int8wo");
    fails(program("", "'%s' --sceme int8wo", model), 2, "--scheme");
    fails(program("", "'%s' --scheme 8da4w-48", model), 2, "48 does not divide");
    fails(program("", "'%s' --weight int4,block=5x3", model), 2, "5x3 does not divide");
    fails(program("", "'%s' --embedding int4,group=48", model), 2, "embed_tokens");
    fails(program("", "'%s' --weight int4,grp=32", model), 2, "unknown word");
    fails(program("", "'%s' --scheme int8wo --weight int4", model), 2, "give one");
    fails(program("", "'%s' --scheme int8wo --rule '*.q_proj.*=int8dq'", model), 2, "same input");
    fails(program("", "'%s' --scheme int8wo --dtype f16", model), 2, "bf16");
    fails(program("", "'%s' --scheme int8wo --head int8,channel", other), 2, "lm_head.weight=");
    fails(program("", "'%s' --scheme int4wo-32", packed), 2, "already quantized (int8wo)");
    succeeds(program("", "'%s' --scheme int8qt", model));
    fails(program("", "'%s'", at("m-int8qt.bin")), 2, "packed already (int8qt)");
    fails(program("", "'%s' --embedding int8,rows", model), 2, "embedding");
    fails(program("", "'%s' --scheme int8wo --activation int8,rows", model), 2, "not of int8,channel,symmetric");
    fails(program("", "'%s' --scheme int8wo --out '%s'", model, model), 2, "is the model that is read");
    fails(program("", "'%s' --scheme int8wo --out '%s'", model, at("hard.bin")), 2, "is the model that is read");
    fails(program("", "'%s' --scheme int8wo --out '%s'", model, at("soft.bin")), 2, "is the model that is read");
    fails(program("", "'%s' --scheme int8wo --json '%s'", model, model), 2, "is the model that is read");
    fails(program("", "'%s' --scheme int8wo --out '%s' --json '%s'", model, at("left/a"), at("left/a")), 2, "twice");
    fails(program("", "'%s' --scheme int8wo --out '%s'", model, at("folder")), 2, "is a folder");
    fails(program("", "'%s' --scheme int8wo --out '%s'", model, at("nowhere/a.bin")), 1, "nowhere");
    fails(program("", "'%s' --scheme int8wo --out '%s'", at("missing.bin"), at("left/a")), 1, "missing.bin");
    // 8 blocks of 512 bytes are not enough for the file: the write fails as on a full disk.
    fails(program("trap '' XFSZ; ulimit -f 8;", "'%s' --scheme int8wo --out '%s'", model, at("left/b")), 1, "left/b");

    FILE *f = fopen(packed, "r+b");                          // one bit of the last tensor
    assert_true(f && fseek(f, -1, SEEK_END) == 0);
    int byte = fgetc(f);
    assert_true(fseek(f, -1, SEEK_END) == 0 && fputc(byte ^ 1, f) != EOF && fclose(f) == 0);
    fails(program("", "'%s' --scheme int8wo", packed), 1, "--no-verify");
    fails(program("", "'%s' --scheme int4wo-32 --no-verify", packed), 2, "already quantized (int8wo)");

    char command[600];
    snprintf(command, sizeof command, "[ -z \"$(ls -A '%s')\" ] && ! ls '%s' | grep -q tmp-", at("left"), dir);
    assert_int_equal(system(command), 0);
    ModelFile m;
    open_model(&m, model);                                   // still whole
    model_close(&m);
}

// A model that another program writes to while it is converted: nothing is written.
static const char *touched;
static void touch(void *ctx, const Param *p, int64_t n) {
    (void)ctx, (void)p, (void)n;
    FILE *f = fopen(touched, "r+b");
    assert_true(f && fseek(f, -1, SEEK_END) == 0);
    int byte = fgetc(f);
    assert_true(fseek(f, -1, SEEK_END) == 0 && fputc(byte ^ 1, f) != EOF && fclose(f) == 0);
}
static void test_changed_while_read(void **state) {
    (void)state;
    LlamaConfig c = config(true);
    QuantPlan plan;
    ParamTable table;
    ModelFile m;
    Err err = {0};
    touched = make_model("touched.bin", &c, NULL, DT_BF16);
    const struct timespec before[2] = {{.tv_sec = 1000000000}, {.tv_sec = 1000000000}};   // file clocks are coarse
    assert_int_equal(utimensat(AT_FDCWD, touched, before, 0), 0);
    if (model_open_with(&m, touched, MODEL_STREAM, &err)) fail_msg("%s", err.text);
    m.rows_read = touch;
    quant_plan_none(&plan);
    assert_int_equal(quant_scheme_from_name(&plan.linear, "8da4w-32", &err), 0);
    assert_int_equal(param_table_build(&table, &c, &plan, &err), 0);
    assert_int_equal(model_write_packed(at("torn.bin"), &c, &plan, &table, NULL, DT_BF16, model_row_source, &m, NULL,
                                        NULL, &err), E_FORMAT);
    assert_non_null(strstr(err.text, "written to while"));
    assert_false(path_exists(at("torn.bin")));
    param_table_free(&table);
    model_close(&m);
}

static void test_default_names(void **state) {
    (void)state;
    static const struct { const char *model, *out; } names[] = {
        {"run1/model.bin", "run1/model-S.bin"}, {"SmolLM2/", "SmolLM2-S.bin"}, {"a/b//", "a/b-S.bin"},
        {"./x.gguf", "./x-S.bin"}, {"x.q8.gguf", "x.q8-S.bin"}, {".bin", ".bin-S.bin"}, {"model", "model-S.bin"},
        {"..", NULL}, {".", NULL}, {"../", NULL}, {"/", NULL}, {"", NULL}, {"a/..", NULL}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char out[100];
        Err err = {0};
        ModelFile m = {0};
        snprintf(m.path, sizeof m.path, "%s", names[i].model);
        int rc = default_out(out, sizeof out, &m, "S", &err);
        assert_int_equal(rc, names[i].out ? 0 : E_USAGE);
        if (names[i].out) assert_string_equal(out, names[i].out);
    }
    char out[10];
    ModelFile m = {.path = "model.bin"};
    assert_int_equal(default_out(out, sizeof out, &m, "8da4w-32", NULL), E_USAGE);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_every_scheme),       cmocka_unit_test(test_scheme_from_file),
    cmocka_unit_test(test_dequantized_export), cmocka_unit_test(test_float_copy),
    cmocka_unit_test(test_refusals),           cmocka_unit_test(test_default_names),
    cmocka_unit_test(test_changed_while_read),
};

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "--as-program")) return quantize_main(argc - 1, argv + 1);
    self = argv[0];
    snprintf(dir, sizeof dir, "%s", test_tmpdir());
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL) != 0;
}
