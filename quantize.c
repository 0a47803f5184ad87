// quantize: turns a model into packed codes by rounding to nearest.
//
//   ./quantize run1/model.bin                      the scheme is read from the file: writes run1/model-8da4w-32.bin
//   ./quantize SmolLM2-135M/ --scheme int4wo-64    any model, any scheme
//   ./quantize model-8da4w-32.bin --to gguf        and into the files of other engines: gguf, hf, dequantized
//
// Every quantized tensor is read as bf16 (what fake quantization trained with), a scale (and zero point) is chosen for
// each of its blocks, its codes are packed, and its error against the float weights is reported: the
// signal-to-quantization-noise ratio, 10 log10(sum w^2 / sum (w - q)^2), and the largest single error.
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "llmc/checkpoint.h"
#include "llmc/cli.h"
#include "llmc/export.h"
#include "llmc/logger.h"

enum { TO_BIN, TO_GGUF, TO_HF, TO_DEQUANTIZED };

static struct {
    const char *scheme, *weight, *activation, *embedding, *head, *out, *hf_out, *json;
    StringList rules;
    int dtype, to;
    bool quiet, allow_inexact, no_verify;
} run;

static const Option options[] = {
    // name          type        where            default  allowed  help
    {"--scheme",     OPT_STRING, &run.scheme,     NULL,    NULL,
     "none, int8wo, int8dq, int4wo-G, 8da4w-G, intB-G, int8qt, int8qt-int8 (default: the model's own)"},
    {"--weight",     OPT_STRING, &run.weight,     NULL,    NULL, "weights of linears instead: int4,group=32,symmetric"},
    {"--activation", OPT_STRING, &run.activation, NULL,    NULL, "and their inputs, as in int8,token,asymmetric"},
    {"--embedding",  OPT_STRING, &run.embedding,  NULL,    NULL, "the embedding table, as in int4,group=32"},
    {"--head",       OPT_STRING, &run.head,       NULL,    NULL, "the head of a tied table, as in int8,channel"},
    {"--rule",       OPT_LIST,   &run.rules,      NULL,    NULL,
     "PATTERN=SCHEME or 'PATTERN=WEIGHT;ACTIVATION' for linears by name; the last match wins"},
    {"--to",         OPT_ENUM,   &run.to,         "bin",   "bin,gguf,hf,dequantized",
     "our own file, GGUF (llama.cpp), a compressed-tensors folder (transformers, vLLM), or a folder of floats"},
    {"--allow-inexact", OPT_FLAG, &run.allow_inexact, "0", NULL,
     "with --to: write the nearest where the format cannot hold a value exactly"},
    {"--out",        OPT_STRING, &run.out,        NULL,    NULL,
     "file or folder to write (default: MODEL-SCHEME.bin, .gguf, -hf or -dequantized)"},
    {"--hf-out",     OPT_STRING, &run.hf_out,     NULL,    NULL, "also write a dequantized Hugging Face folder"},
    {"--dtype",      OPT_ENUM,   &run.dtype,      "auto",  "auto,bf16,f32",
     "of tensors that stay floats (auto: f32 in an fp32 build if the model has it, else bf16)"},
    {"--no-verify",  OPT_FLAG,   &run.no_verify,  "0",     NULL, "do not compare a model.bin with its checksum"},
    {"--json",       OPT_STRING, &run.json,       NULL,    NULL, "also write the table to this file"},
    {"--quiet",      OPT_FLAG,   &run.quiet,      "0",     NULL, "only the summary, and no progress"},
};
#define N_OPTIONS ((int)(sizeof options / sizeof *options))

static const char summary[] =
    "usage: quantize MODEL [options]\n"
    "Converts a model by round-to-nearest into packed codes.\n"
    "MODEL: a Hugging Face folder, a .gguf file, or a model.bin of this project. One that ./train_llama_qat wrote\n"
    "knows its scheme; the codes are those it was trained with.";

// ---------------------------------------------------------------------------------------------
// Files

static bool same_file(const char *a, const char *b) {
    struct stat sa, sb;
    return stat(a, &sa) == 0 && stat(b, &sb) == 0 && sa.st_dev == sb.st_dev && sa.st_ino == sb.st_ino;
}

// Whether `path` is the model or one of its files.
static bool is_input(const ModelFile *m, const char *path) {
    if (same_file(path, m->path)) return true;
    for (int i = 0; i < m->n_files; i++)
        if (same_file(path, m->files[i].path)) return true;
    return false;
}

static double file_bytes(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 ? (double)st.st_size : 0;
}

static double input_bytes(const ModelFile *m) {
    if (m->kind == MODEL_GGUF) return file_bytes(m->path);
    double sum = 0;
    for (int i = 0; i < m->n_files; i++) sum += file_bytes(m->files[i].path);
    return sum;
}

// run1/model.bin -> run1/model-8da4w-32.bin, SmolLM2/ -> SmolLM2-8da4w-32.bin. A packed model's name stays: it was
// given for its scheme.
static int default_out(char *out, size_t size, const ModelFile *m, const char *scheme, Err *err) {
    static const char *const ends[] = {".bin", ".gguf", "-hf", "-dequantized"};
    const char *model = m->path;
    size_t len = strlen(model);
    while (len > 1 && model[len - 1] == '/') len--;
    size_t base = len;
    while (base > 0 && model[base - 1] != '/') base--;
    size_t name = len - base;
    if (name == 0 || (name <= 2 && !strncmp(model + base, "..", name)))
        return err_set(err, E_USAGE, "%s has no name to derive the output's from; say --out FILE", model);
    static const char *const endings[] = {".bin", ".gguf"};
    for (int i = 0; i < 2; i++) {
        size_t n = strlen(endings[i]);
        if (name > n && !strncmp(model + len - n, endings[i], n)) {
            len -= n;
            break;
        }
    }
    bool named = m->packed || (run.to && !strcmp(scheme, "none"));
    if ((size_t)snprintf(out, size, "%.*s%s%s%s", (int)len, model, named ? "" : "-", named ? "" : scheme,
                         ends[run.to]) >= size)
        return err_set(err, E_USAGE, "the output's name would be longer than %zu bytes; say --out FILE", size);
    return 0;
}

static int check_outputs(const ModelFile *m, const char *out, Err *err) {
    const char *paths[] = {out, run.hf_out, run.json};
    for (int i = 0; i < 3; i++) {
        if (!paths[i]) continue;
        if (is_input(m, paths[i]))
            return err_set(err, E_USAGE, "%s is the model that is read; write somewhere else", paths[i]);
        for (int j = 0; j < i; j++)
            if (paths[j] && (!strcmp(paths[i], paths[j]) || same_file(paths[i], paths[j])))
                return err_set(err, E_USAGE, "%s would be written twice; give different names", paths[i]);
    }
    if (path_is_dir(out) && run.to <= TO_GGUF) return err_set(err, E_USAGE, "%s is a folder; --out names a file", out);
    return 0;
}

// ---------------------------------------------------------------------------------------------
// Progress: shown once the conversion has taken a second

static struct {
    pthread_mutex_t lock;
    char tensor[96];
    int64_t left;                                // rows of it not counted yet
    double done, start;
    bool shown;
    Progress bar;
} reading = {.lock = PTHREAD_MUTEX_INITIALIZER};

// Any thread reads. Tensors come one after the other; rows of one that is read twice count once.
static void count_rows(void *ctx, const Param *p, int64_t n) {
    (void)ctx;
    pthread_mutex_lock(&reading.lock);
    if (strcmp(reading.tensor, p->name)) {
        snprintf(reading.tensor, sizeof reading.tensor, "%s", p->name);
        reading.left = p->rows;
    }
    if (n > reading.left) n = reading.left;
    reading.left -= n;
    reading.done += (double)n * (double)p->cols;
    reading.shown |= now_seconds() - reading.start > 1;
    if (reading.shown) progress_update(&reading.bar, reading.done, p->name);
    pthread_mutex_unlock(&reading.lock);
}

static void reading_begin(ModelFile *m, const ParamTable *table, const QuantPlan *plan) {
    double values = 0;
    for (int i = 0; i < table->n; i++) values += (double)table->p[i].rows * (double)table->p[i].cols;
    if (m->config.tied && plan->tied_head.bits) values += (double)m->config.V * m->config.C;   // the table once more
    reading.start = now_seconds();
    progress_begin(&reading.bar, "quantize", values);
    if (!run.quiet) m->rows_read = count_rows;
}

static void reading_end(ModelFile *m, int rc) {
    m->rows_read = NULL;
    if (reading.shown && rc == 0) progress_end(&reading.bar);
    else progress_hide(&reading.bar);
}

// ---------------------------------------------------------------------------------------------
// The table

typedef struct { char name[96]; QuantSpec spec; int64_t rows, cols; PackReport r; } Row;
typedef struct { Row *row; int n, room; } Report;

// A row is printed as soon as its tensor is packed.
static void report_row(void *ctx, const PackReport *r) {
    Report *t = ctx;
    if (t->n == t->room) {
        Row *grown = xcalloc((size_t)(t->room = t->room ? 2 * t->room : 256), sizeof *grown);
        if (t->n) memcpy(grown, t->row, (size_t)t->n * sizeof *grown);
        free(t->row);
        t->row = grown;
    }
    Row *row = &t->row[t->n++];
    *row = (Row){.spec = *r->spec, .rows = r->p->rows, .cols = r->p->cols, .r = *r};
    snprintf(row->name, sizeof row->name, "%s", r->p->name);
    row->r.p = NULL, row->r.spec = NULL;         // theirs, not kept
    if (run.quiet) return;
    progress_hide(&reading.bar);
    if (t->n == 1)
        printf("%-46s %15s  %-26s %8s %11s %7s\n", "tensor", "shape", "scheme", "SQNR dB", "worst error", "of max");
    char shape[48], spec[QUANT_SPEC_TEXT];
    snprintf(shape, sizeof shape, "%lld x %lld", (long long)row->rows, (long long)row->cols);
    quant_spec_text(spec, sizeof spec, &row->spec);
    printf("%-46s %15s  %-26s %8.2f %11.4g %6.2f%%\n", row->name, shape, spec, r->sqnr_db, r->max_abs_err,
           r->amax > 0 ? 100 * r->max_abs_err / r->amax : 0.0);
    fflush(stdout);
}

typedef struct { double before, after, float_bytes, bytes, seconds; const Row *lowest, *worst; } Totals;

static Totals totals(const Report *t, const ModelFile *m, const char *out, double seconds) {
    Totals s = {.before = input_bytes(m), .after = file_bytes(out), .seconds = seconds};
    for (int i = 0; i < t->n; i++) {
        const Row *row = &t->row[i];
        // A tied head has codes of its own, but its floats are the embedding's.
        if (!m->config.tied || strcmp(row->name, "lm_head.weight")) s.float_bytes += (double)row->r.float_bytes;
        s.bytes += (double)row->r.bytes;
        if (!s.lowest || row->r.sqnr_db < s.lowest->r.sqnr_db) s.lowest = row;
        if (!s.worst || row->r.max_abs_err > s.worst->r.max_abs_err) s.worst = row;
    }
    return s;
}

static void print_totals(const Totals *s, const Report *t, const ModelFile *m, const QuantPlan *plan, const char *out) {
    char a[32], b[32], c[32];
    if (t->n) {
        printf("\n%d tensors quantized; lowest SQNR %.2f dB (%s), worst error %.4g (%s)\n", t->n, s->lowest->r.sqnr_db,
               s->lowest->name, s->worst->r.max_abs_err, s->worst->name);
        printf("quantized tensors  %10s -> %10s  %5.2f times smaller\n", fmt_bytes(a, s->float_bytes),
               fmt_bytes(b, s->bytes), s->float_bytes / s->bytes);
    }
    printf("file               %10s -> %10s  %5.2f times smaller\n", fmt_bytes(a, s->before), fmt_bytes(b, s->after),
           s->after > 0 ? s->before / s->after : 0.0);
    printf("%s -> %s (%s) in %s\n", m->path, out, plan->name, fmt_time(c, s->seconds));
}

static void json_bytes(FILE *f, double before, double after) {
    fputs("{\"before\": ", f);
    json_write_double(f, before);
    fputs(", \"after\": ", f);
    json_write_double(f, after);
    fputs(", \"ratio\": ", f);
    json_write_double(f, after > 0 ? before / after : NAN);
    fputc('}', f);
}

static void json_row(FILE *f, const Row *row) {
    char spec[QUANT_SPEC_TEXT];
    quant_spec_text(spec, sizeof spec, &row->spec);
    fputs("{\"name\": ", f);
    json_write_string(f, row->name);
    fprintf(f, ", \"shape\": [%lld, %lld], \"scheme\": ", (long long)row->rows, (long long)row->cols);
    json_write_string(f, spec);
    const struct { const char *key; double value; } numbers[] = {{"sqnr_db", row->r.sqnr_db},
        {"max_abs_err", row->r.max_abs_err}, {"amax", row->r.amax}};
    for (int i = 0; i < 3; i++) {
        fprintf(f, ", \"%s\": ", numbers[i].key);
        json_write_double(f, numbers[i].value);  // no noise at all: null
    }
    fprintf(f, ", \"float_bytes\": %zu, \"bytes\": %zu}", row->r.float_bytes, row->r.bytes);
}

static int write_json(const Totals *s, const Report *t, const ModelFile *m, const QuantPlan *plan, const char *out,
                      Err *err) {
    AtomicFile a;
    int rc = atomic_open(&a, run.json, err);
    if (rc) return rc;
    char *plan_text = quant_plan_to_json(plan);
    fputs("{\"model\": ", a.f);
    json_write_string(a.f, m->path);
    fputs(", \"out\": ", a.f);
    json_write_string(a.f, out);
    fprintf(a.f, ", \"plan\": %s, \"seconds\": ", plan_text);
    json_write_double(a.f, s->seconds);
    fputs(",\n \"file_bytes\": ", a.f);
    json_bytes(a.f, s->before, s->after);
    fputs(", \"quantized_bytes\": ", a.f);
    json_bytes(a.f, s->float_bytes, s->bytes);
    fputs(",\n \"tensors\": [", a.f);
    for (int i = 0; i < t->n; i++) {
        fputs(i ? ",\n  " : "\n  ", a.f);
        json_row(a.f, &t->row[i]);
    }
    fputs("]}\n", a.f);
    free(plan_text);
    if (ferror(a.f)) a.failed = 1;
    return atomic_commit(&a, err);
}

// ---------------------------------------------------------------------------------------------
// What is made of what

static DType float_dtype(const ModelFile *m) {
    if (run.dtype) return run.dtype == 1 ? DT_BF16 : DT_F32;
    if (sizeof(floatX) == 2) return DT_BF16;
    for (int i = 0; i < m->n_files; i++) {
        const StTensor *t = safetensors_find(&m->files[i], "model.norm.weight");
        if (t && t->dtype == DT_BF16) return DT_BF16;
    }
    return DT_F32;
}

static int choose_plan(QuantPlan *plan, const ModelFile *m, Err *err) {
    bool asked = run.scheme || run.weight || run.activation || run.embedding || run.head || run.rules.n;
    if (m->packed && run.to && !asked) {
        *plan = m->plan;
        return 0;
    }
    if (m->packed && quant_plan_has_rows(&m->plan))
        return err_set(err, E_USAGE, "%s is packed already (%s): INT8 rows are stored as codes; generate and eval read "
                       "it as it is", m->path, m->plan.name);
    if (m->packed)
        return err_set(err, E_USAGE, "%s is already quantized (%s); quantize the float model that it was made from",
                       m->path, m->plan.name);
    int rc = quant_plan_from_options(plan, &m->plan, run.scheme, run.weight, run.activation, run.embedding, run.head,
                                     run.rules.item, run.rules.n, err);
    if (rc) return rc;
    if (quant_plan_is_none(plan) && !asked && run.to == TO_BIN)
        return err_set(err, E_USAGE, "%s carries no quantization scheme; choose one, as in --scheme 8da4w-32 (or "
                       "int8wo, int8dq, int4wo-64, int3-32), or --scheme none for a float copy", m->path);
    if (!m->config.tied && run.head)
        return err_set(err, E_USAGE, "--head is for a head that shares the embedding's table; this model has its own: "
                       "use --rule 'lm_head.weight=%s'", run.head);
    if (!quant_plan_is_none(&m->plan) && !quant_plan_equal(plan, &m->plan))
        fprintf(stderr, "%s: note: the model was trained for %s, and is converted to %s\n", program_name, m->plan.name,
                plan->name);
    if (m->config.tied && plan->embedding.bits && !plan->tied_head.bits)
        fprintf(stderr, "%s: note: the embedding's table is also the head and is stored as floats, from which the "
                "embedding's codes are made at load; --head int8,channel packs both\n", program_name);
    return 0;
}

// ---------------------------------------------------------------------------------------------
// Exports

// The table of an export, and its sums.
typedef struct { FILE *json; int n, inexact; double bytes; } Exported;

static void export_row(void *ctx, const ExportRow *row) {
    Exported *t = ctx;
    t->bytes += (double)row->bytes;
    t->inexact += !row->exact;
    if (t->json) {
        fputs(t->n ? ",\n  {\"name\": " : "\n  {\"name\": ", t->json);
        json_write_string(t->json, row->name);
        fprintf(t->json, ", \"shape\": [%lld, %lld], \"form\": \"%s\", \"bytes\": %zu, \"exact\": %s, ",
                (long long)row->rows, (long long)row->cols, row->form, row->bytes, row->exact ? "true" : "false");
        fputs("\"max_abs_err\": ", t->json);
        json_write_double(t->json, row->max_err);
        fputc('}', t->json);
    }
    t->n++;
    if (run.quiet) return;
    if (t->n == 1) printf("%-46s %15s  %-12s %s\n", "tensor", "shape", "as", "values");
    char shape[48];
    snprintf(shape, sizeof shape, "%lld x %lld", (long long)row->rows, (long long)row->cols);
    printf("%-46s %15s  %-12s ", row->name, shape, row->form);
    if (row->exact) puts("exact");
    else printf("off by up to %.3g, %.3f%% of the largest\n", row->max_err,
                row->amax > 0 ? 100 * row->max_err / row->amax : 0.0);
}

static void export_note(void *ctx, const char *text) {
    (void)ctx;
    fflush(stdout);
    fprintf(stderr, "%s: note: %s\n", program_name, text);
}

static int export_as(int to, const char *out, const ModelFile *m, const ExportOptions *o, Err *err) {
    if (to == TO_GGUF) return export_gguf(out, m, o, err);
    return to == TO_HF ? export_compressed(out, m, o, err) : export_dequantized(out, m, o, err);
}

// The packed file is opened anew, so that what is exported is what it holds.
static int export_packed(int to, const char *out, const char *packed, const ExportOptions *o, Err *err) {
    ModelFile m;
    int rc = model_open(&m, packed, err);
    if (rc) return rc;
    rc = export_as(to, out, &m, o, err);
    model_close(&m);
    return rc;
}

static void count_inexact(void *ctx, const ExportRow *row) { *(int *)ctx += !row->exact; }

static int export_hf(const char *packed, Err *err) {
    int inexact = 0;
    ExportOptions o = {.dtype = run.dtype == 0 ? -1 : run.dtype == 1 ? DT_BF16 : DT_F32, .note = export_note,
                       .allow_inexact = true, .report = count_inexact, .ctx = &inexact};
    int rc = export_packed(TO_DEQUANTIZED, run.hf_out, packed, &o, err);
    if (rc == 0) printf("dequantized weights for transformers: %s\n", run.hf_out);
    if (rc == 0 && inexact)
        printf("%d of its tensors are rounded to bf16; --dtype f32 keeps their values\n", inexact);
    return rc;
}

static bool holds_bf16_only(const ModelFile *m) {
    bool wide = m->kind == MODEL_GGUF;
    for (int i = 0; i < m->n_files; i++)
        for (int k = 0; k < m->files[i].n; k++) wide = wide || m->files[i].tensors[k].dtype != DT_BF16;
    return !wide;
}

// A model that is to be quantized first is packed beside the export, into a file that goes again.
static int pack_and_export(ModelFile *m, const QuantPlan *plan, const char *out, const ExportOptions *o, Err *err) {
    char packed[1200];
    ParamTable table;
    size_t len = strlen(out);
    while (len > 1 && out[len - 1] == '/') len--;
    snprintf(packed, sizeof packed, "%.*s.packed-%ld", (int)len, out, (long)getpid());
    int rc = param_table_build(&table, &m->config, plan, err);
    if (rc) return rc;
    if (float_dtype(m) == DT_BF16 && !holds_bf16_only(m))
        export_note(NULL, "tensors that stay floats are rounded to bf16, as in a packed model.bin, and that is what "
                          "\"exact\" is measured from; --dtype f32 keeps them");
    rc = model_write_packed(packed, &m->config, plan, &table, m->tokenizer, float_dtype(m), model_row_source, m, NULL,
                            NULL, err);
    param_table_free(&table);
    if (rc == 0) rc = export_packed(run.to, out, packed, o, err);
    unlink(packed);
    return rc;
}

static int export_model(ModelFile *m, const QuantPlan *plan, const char *out, Err *err) {
    Exported t = {0};
    AtomicFile json;
    int rc = 0;
    double start = now_seconds();
    ExportOptions o = {.allow_inexact = run.allow_inexact, .report = export_row, .note = export_note, .ctx = &t};
    o.dtype = run.dtype == 0 ? -1 : run.dtype == 1 ? DT_BF16 : DT_F32;
    if (run.hf_out) return err_set(err, E_USAGE, "--hf-out goes with --to bin; --to dequantized writes such a folder");
    if (run.json) {
        if ((rc = atomic_open(&json, run.json, err))) return rc;
        t.json = json.f;
        fputs("{\"model\": ", t.json);
        json_write_string(t.json, m->path);
        fputs(", \"out\": ", t.json);
        json_write_string(t.json, out);
        fputs(",\n \"tensors\": [", t.json);
    }
    if (run.to == TO_DEQUANTIZED && run.dtype == 0 && quant_plan_is_none(plan)) o.dtype = float_dtype(m);
    rc = m->packed || quant_plan_is_none(plan) ? export_as(run.to, out, m, &o, err) :
        pack_and_export(m, plan, out, &o, err);
    if (run.json) {
        fputs("]}\n", t.json);
        if (ferror(t.json)) json.failed = 1;
        if (rc) atomic_abort(&json);
        else rc = atomic_commit(&json, err);
    }
    if (rc) return rc;
    char size[32], time[32];
    printf("%s%d tensors, %s%s; %s -> %s (%s) in %s\n", run.quiet ? "" : "\n", t.n, fmt_bytes(size, t.bytes),
           t.inexact ? "" : ", all exact", m->path, out, plan->name, fmt_time(time, now_seconds() - start));
    if (t.inexact)
        printf("%d of them are not exact: %s\n", t.inexact, run.quiet ? "without --quiet their largest errors are shown"
                                                                     : "see their largest errors above");
    return 0;
}

// ---------------------------------------------------------------------------------------------
// The conversion

static int quantize(ModelFile *m, Err *err) {
    QuantPlan plan;
    ParamTable table = {0};
    Report report = {0};
    char derived[1100];
    const char *out = run.out;
    int rc = choose_plan(&plan, m, err);
    if (rc) return rc;
    if (!out) {
        if ((rc = default_out(derived, sizeof derived, m, plan.name, err))) return rc;
        out = derived;
    }
    if ((rc = check_outputs(m, out, err))) return rc;
    if (run.to) return export_model(m, &plan, out, err);
    if ((rc = param_table_build(&table, &m->config, &plan, err))) return rc;

    double start = now_seconds();
    DType dtype = float_dtype(m);
    reading_begin(m, &table, &plan);
    if (quant_plan_is_none(&plan))
        rc = model_write_bin(out, &m->config, &plan, &table, m->tokenizer, dtype, model_row_source, m, err);
    else
        rc = model_write_packed(out, &m->config, &plan, &table, m->tokenizer, dtype, model_row_source, m, report_row,
                                &report, err);
    reading_end(m, rc);
    if (rc == 0) {
        Totals s = totals(&report, m, out, now_seconds() - start);
        print_totals(&s, &report, m, &plan, out);
        if (run.json) rc = write_json(&s, &report, m, &plan, out, err);
    }
    if (rc == 0 && run.hf_out) rc = export_hf(out, err);
    free(report.row);
    param_table_free(&table);
    return rc;
}

int main(int argc, char **argv) {
    program_name = "quantize";
    Err err = {0};
    const char *path;
    ModelFile m;
    if (cli_parse(options, N_OPTIONS, summary, &path, argc, argv, &err) < 0) die(&err);
    if (!path) {
        err_set(&err, E_USAGE, "which model? usage: quantize MODEL [--scheme NAME] (--help lists all options)");
        die(&err);
    }
    if (model_open_with(&m, path, MODEL_STREAM | (run.no_verify ? MODEL_NO_VERIFY : 0), &err) < 0) die(&err);
    int rc = quantize(&m, &err);
    model_close(&m);
    if (rc) die(&err);
    return 0;
}
