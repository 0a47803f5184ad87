// eval: scores a model.
//
//   ./eval run1/model-8da4w-32.bin --wikitext wiki.test.raw --hellaswag hellaswag_val_full.txt --limit 400
//
// Each task is one function: texts in, log-likelihoods from infer_forward, sums in double, one line of results.
// What the numbers mean is lm-evaluation-harness's (llmc/metrics.h); the validation loss is the trainer's, to the bit.
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "llmc/checkpoint.h"
#include "llmc/cli.h"
#include "llmc/dataloader.h"
#include "llmc/device.h"
#include "llmc/infer.h"
#include "llmc/logger.h"
#include "llmc/metrics.h"
#include "llmc/safetensors.h"
#include "llmc/tokenizer.h"

static struct {
    const char *wikitext, *text, *hellaswag, *val_data, *tokens, *logits_out, *device, *json;
    int limit, seq_len, batch, step, arithmetic, threads;
    bool as_float, add_bos;
} run;

static const Option options[] = {
    // name            type        where             default    allowed           help
    {"--wikitext",     OPT_STRING, &run.wikitext,    NULL,      NULL,             "wiki.test.raw: word and byte perplexity, bits per byte as lm-eval defines them"},
    {"--text",         OPT_STRING, &run.text,        NULL,      NULL,             "any text: token perplexity over windows of the whole raw text, not overlapping"},
    {"--hellaswag",    OPT_STRING, &run.hellaswag,   NULL,      NULL,             "HellaSwag tasks as JSON lines or in the six-line text form: acc and acc_norm"},
    {"--limit",        OPT_INT,    &run.limit,       "0",       "0..",            "only so many HellaSwag tasks and wikitext pages (0: all)"},
    {"--val-data",     OPT_STRING, &run.val_data,    NULL,      NULL,             "held-out data of the trainer: the loss of its validation, same windows, same bits"},
    {"--seq-len",      OPT_INT,    &run.seq_len,     "0",       "0..1048576",     "tokens in a window (0: the model's context, at most 2048; with --val-data 512)"},
    {"--batch",        OPT_INT,    &run.batch,       "0",       "0..65536",       "windows at a time (0: about 4096 tokens)"},
    {"--step",         OPT_INT,    &run.step,        "0",       "0..1048576",     "tokens of a window in one call (0: all). 1 with served arithmetic: as generate decodes"},
    {"--arithmetic",   OPT_ENUM,   &run.arithmetic,  "trained", "trained,served", "codes unpacked as in training, or read packed by the fast kernels"},
    {"--float",        OPT_FLAG,   &run.as_float,    "0",       NULL,             "ignore the scheme of a float model.bin: no fake quantization"},
    {"--add-bos",      OPT_FLAG,   &run.add_bos,     "0",       NULL,             "put bos before HellaSwag contexts (lm-eval's add_bos_token)"},
    {"--tokens",       OPT_STRING, &run.tokens,      NULL,      "1,2,3",          "token ids to run instead of a text; prints the likeliest next token"},
    {"--logits-out",   OPT_STRING, &run.logits_out,  NULL,      NULL,             "with --tokens: write logits (tokens, vocabulary) as f32 safetensors"},
    {"--json",         OPT_STRING, &run.json,        NULL,      NULL,             "append results to this file as JSON lines"},
    {"--device",       OPT_STRING, &run.device,      "auto",    NULL,             "auto (a GPU if there is one), cpu or cuda"},
    {"--threads",      OPT_INT,    &run.threads,     "0",       "0..4096",        "CPU threads (0: all cores)"},
};
#define N_OPTIONS ((int)(sizeof options / sizeof *options))

typedef struct {
    const char *path, *scheme;
    ModelFile *m;
    Infer *s;
    int M, B;                    // window length and windows at a time
    JsonLog *log;
} Eval;

static void log_begin(const Eval *e, const char *task, const char *data) {
    jsonlog_begin(e->log, task);
    jsonlog_str(e->log, "model", e->path);
    jsonlog_str(e->log, "scheme", e->scheme);
    jsonlog_str(e->log, "arithmetic", run.arithmetic == 0 ? "trained" : "served");
    jsonlog_str(e->log, "precision", FLOATX_NAME);
    jsonlog_str(e->log, "data", data);
    jsonlog_int(e->log, "seq_len", e->M);
}

// Texts that a window cannot begin with nothing before need a token to predict the first from: bos, else eos.
static int prefix_token(const Eval *e) {
    int bos = tokenizer_bos(e->m->tokenizer), eos = tokenizer_eos(e->m->tokenizer);
    return bos >= 0 ? bos : eos >= 0 ? eos : 0;
}

// ---------------------------------------------------------------------------------------------
// Windows of text: the common part of --wikitext and --text

// One row of a batch: inputs in[0, len), targets out[0, len) with -1 where nothing is scored.
typedef struct { const int32_t *in, *out; int len, unscored; double *loglik; } Job;

static int by_length(const void *a, const void *b) {
    const Job *x = a, *y = b;
    return (x->len < y->len) - (x->len > y->len);
}

// Runs the jobs, longest first so that those of a batch are of like length, and leaves each one's log-likelihood. A
// window goes through the model in one call, or in steps over its cache.
static int run_jobs(const Eval *e, Job *jobs, size_t n, const char *what, Err *err) {
    size_t most = (size_t)e->B * (size_t)e->M;
    int32_t *in = xmalloc(most * sizeof *in), *out = xmalloc(most * sizeof *out);
    float *losses = xmalloc(most * sizeof *losses);
    double total = 0, done = 0, start = now_seconds();
    qsort(jobs, n, sizeof *jobs, by_length);
    for (size_t i = 0; i < n; i++) {
        total += jobs[i].len;
        *jobs[i].loglik = 0;
    }
    Progress bar;
    progress_begin(&bar, what, total);
    int rc = 0;
    for (size_t i = 0; rc == 0 && i < n;) {
        int rows = n - i < (size_t)e->B ? (int)(n - i) : e->B, longest = jobs[i].len;
        int step = run.step ? run.step : longest;
        infer_reset(e->s, rows);
        for (int at = 0; rc == 0 && at < longest; at += step) {
            int T = longest - at < step ? longest - at : step;
            for (int b = 0; b < rows; b++)
                for (int k = 0, t = at; k < T; k++, t++) {
                    const Job *j = &jobs[i + (size_t)b];
                    in[b * T + k] = t < j->len ? j->in[t] : 0;
                    out[b * T + k] = t < j->len && t >= j->unscored ? j->out[t] : -1;
                }
            rc = infer_forward(e->s, in, out, T, NULL, losses, err);
            for (int b = 0; rc == 0 && b < rows; b++)
                for (int k = 0; k < T; k++) *jobs[i + (size_t)b].loglik -= (double)losses[b * T + k];
        }
        for (int b = 0; b < rows; b++, i++) done += jobs[i].len;
        char rate[32], suffix[64];
        snprintf(suffix, sizeof suffix, "%s tok/s", fmt_count(rate, done / (now_seconds() - start)));
        progress_update(&bar, done, suffix);
    }
    progress_end(&bar);
    free(in);
    free(out);
    free(losses);
    return rc;
}

static int encode(const Eval *e, const char *text, size_t len, int32_t **ids, size_t *n, Err *err) {
    return tokenizer_encode(e->m->tokenizer, text, len, false, ids, n, err);
}

// ---------------------------------------------------------------------------------------------
// Wikitext

static int eval_wikitext(Eval *e, Err *err) {
    FileMap map;
    int rc = file_map(&map, run.wikitext, err);
    if (rc < 0) return rc;
    TextSpan *pages;
    int n_pages = wikitext_pages(&pages, (const char *)map.data, map.size);
    if (run.limit > 0 && n_pages > run.limit) n_pages = run.limit;
    int32_t **sequence = xcalloc((size_t)n_pages + 1, sizeof *sequence);   // prefix + tokens of each page
    TextScore score = {0};
    Job *jobs = NULL;
    size_t n_jobs = 0, room = 0;
    for (int i = 0; rc == 0 && i < n_pages; i++) {
        size_t len, n;
        char *text = wikitext_detokenize(pages[i].s, pages[i].len, &len);
        int32_t *ids;
        rc = encode(e, text, len, &ids, &n, err);
        free(text);
        if (rc < 0) break;
        sequence[i] = xmalloc((n + 1) * sizeof **sequence);
        sequence[i][0] = prefix_token(e);
        if (n) memcpy(sequence[i] + 1, ids, n * sizeof *ids);
        free(ids);
        score.words += count_words(pages[i].s, pages[i].len);
        score.bytes += pages[i].len;
        score.tokens += n;
        size_t windows = rolling_window_count(n, e->M);
        if (n_jobs + windows > room) {
            room = 2 * (n_jobs + windows);
            Job *more = realloc(jobs, room * sizeof *jobs);
            if (!more) { rc = err_set(err, E_NOMEM, "no memory for %zu windows", room); break; }
            jobs = more;
        }
        for (size_t k = 0; k < windows; k++) {
            Window w = rolling_window(n, e->M, k);
            jobs[n_jobs++] = (Job){sequence[i] + w.begin, sequence[i] + w.begin + 1, w.len, w.len - w.scored, NULL};
        }
    }
    if (rc == 0 && n_jobs == 0)
        rc = err_set(err, E_USAGE, "%s: no text in it; expected wikitext's raw test file", run.wikitext);
    if (rc == 0) {
        double *loglik = xcalloc(n_jobs, sizeof *loglik);
        for (size_t k = 0; k < n_jobs; k++) jobs[k].loglik = &loglik[k];
        rc = run_jobs(e, jobs, n_jobs, "wikitext", err);
        for (size_t k = 0; k < n_jobs; k++) score.loglik += loglik[k];   // in the order of the text
        free(loglik);
    }
    if (rc == 0) {
        printf("wikitext: %d pages, %llu words, %llu bytes, %llu tokens, rolling windows of %d, prefix %s\n", n_pages,
               (unsigned long long)score.words, (unsigned long long)score.bytes, (unsigned long long)score.tokens, e->M,
               tokenizer_bos(e->m->tokenizer) >= 0 ? "bos" : "eos");
        printf("  word_perplexity   %.4f\n  byte_perplexity   %.6f\n  bits_per_byte     %.6f\n  token_perplexity  "
               "%.4f\n",
               word_perplexity(&score), byte_perplexity(&score), bits_per_byte(&score), token_perplexity(&score));
        log_begin(e, "wikitext", run.wikitext);
        jsonlog_num(e->log, "word_perplexity", word_perplexity(&score));
        jsonlog_num(e->log, "byte_perplexity", byte_perplexity(&score));
        jsonlog_num(e->log, "bits_per_byte", bits_per_byte(&score));
        jsonlog_num(e->log, "token_perplexity", token_perplexity(&score));
        jsonlog_num(e->log, "loglikelihood", score.loglik);
        jsonlog_int(e->log, "pages", n_pages);
        jsonlog_int(e->log, "words", (long long)score.words);
        jsonlog_int(e->log, "bytes", (long long)score.bytes);
        jsonlog_int(e->log, "tokens", (long long)score.tokens);
        jsonlog_end(e->log);
    }
    for (int i = 0; i < n_pages; i++) free(sequence[i]);
    free(sequence);
    free(jobs);
    free(pages);
    file_unmap(&map);
    return rc;
}

// ---------------------------------------------------------------------------------------------
// Token perplexity of a raw text

// Windows do not overlap: each token but the first is predicted once, from what its window holds before it.
static int eval_text(Eval *e, Err *err) {
    FileMap map;
    int rc = file_map(&map, run.text, err);
    if (rc < 0) return rc;
    int32_t *ids = NULL;
    size_t n = 0;
    rc = encode(e, (const char *)map.data, map.size, &ids, &n, err);
    file_unmap(&map);
    if (rc < 0) return rc;
    if (n < 2) {
        free(ids);
        return err_set(err, E_USAGE, "%s: %zu tokens; a perplexity needs two at least", run.text, n);
    }
    size_t windows = rolling_window_count(n - 1, e->M);
    Job *jobs = xmalloc(windows * sizeof *jobs);
    double *loglik = xcalloc(windows, sizeof *loglik);
    for (size_t k = 0; k < windows; k++) {
        size_t begin = k * (size_t)e->M, left = n - 1 - begin;
        jobs[k] = (Job){ids + begin, ids + begin + 1, left < (size_t)e->M ? (int)left : e->M, 0, &loglik[k]};
    }
    rc = run_jobs(e, jobs, windows, "text", err);
    TextScore score = {.tokens = n - 1};
    for (size_t k = 0; k < windows; k++) score.loglik += loglik[k];
    if (rc == 0) {
        printf("text: token perplexity over windows of %d tokens, not overlapping, no bos: %.4f (loss %.6f, %zu "
               "tokens)\n", e->M,
               token_perplexity(&score), -score.loglik / (double)score.tokens, n - 1);
        log_begin(e, "text", run.text);
        jsonlog_num(e->log, "token_perplexity", token_perplexity(&score));
        jsonlog_num(e->log, "loss", -score.loglik / (double)score.tokens);
        jsonlog_int(e->log, "tokens", (long long)(n - 1));
        jsonlog_end(e->log);
    }
    free(jobs);
    free(loglik);
    free(ids);
    return rc;
}

// ---------------------------------------------------------------------------------------------
// HellaSwag

// Inputs of one ending: context and continuation without its last token, the last M of them; targets[i] is what input
// `first` + i predicts, n of them.
typedef struct { int32_t *ids; int len, first, n; const int32_t *targets; int32_t *whole; } Choice;

static int encode_choice(const Eval *e, Choice *c, const char *context, const char *ending, Err *err) {
    *c = (Choice){0};
    // Spaces at the end of the context belong to the continuation.
    size_t nc = strlen(context), ne = strlen(ending), kept = nc;
    while (kept > 0 && context[kept - 1] == ' ') kept--;
    char *text = xmalloc(nc + ne + 2);
    memcpy(text, context, nc);
    text[nc] = ' ';
    memcpy(text + nc + 1, ending, ne + 1);
    int32_t *before = NULL, *all = NULL;
    size_t n_before = 0, n_all = 0;
    int rc = encode(e, text, kept, &before, &n_before, err);
    if (rc == 0) rc = encode(e, text, nc + 1 + ne, &all, &n_all, err);
    free(text);
    if (rc == 0 && (n_before > INT32_MAX / 4 || n_all > INT32_MAX / 4))
        rc = err_set(err, E_USAGE, "a HellaSwag task of %zu tokens is too long", n_all);
    if (rc == 0) {
        // The context's own tokens, then what the whole has after as many.
        size_t prefix = n_before == 0 || run.add_bos, n_cont = n_all > n_before ? n_all - n_before : 0;
        size_t n = prefix + n_before + n_cont;
        c->whole = xmalloc((n + 1) * sizeof *c->whole);
        c->whole[0] = prefix_token(e);
        if (n_before) memcpy(c->whole + prefix, before, n_before * sizeof *before);
        if (n_cont) memcpy(c->whole + prefix + n_before, all + n_before, n_cont * sizeof *all);
        int cut = n - 1 > (size_t)e->M ? (int)(n - 1) - e->M : 0;             // left-truncated
        c->ids = c->whole + cut;
        c->len = (int)(n - 1) - cut;
        c->first = (int)(prefix + n_before) - 1 - cut;
        c->targets = c->whole + prefix + n_before;
        c->n = (int)n_cont;
        if (c->first < 0) {                                                  // a continuation longer than the window
            c->targets -= c->first;
            c->n += c->first;
            c->first = 0;
        }
    }
    free(before);
    free(all);
    return rc;
}

// Scores the four endings. What their inputs have in common runs once, and the cache is forked.
static int score_item(const Eval *e, const Choice c[4], int32_t *in, int32_t *out, float *losses, double scores[4],
                      Err *err) {
    int shared = c[0].first, T = 0;
    for (int i = 1; i < 4; i++) {
        int same = 0, most = c[i].first < shared ? c[i].first : shared;
        while (same < most && c[i].ids[same] == c[0].ids[same]) same++;
        shared = same;
    }
    for (int i = 0; i < 4; i++) T = c[i].len - shared > T ? c[i].len - shared : T;
    infer_reset(e->s, shared > 0 ? 1 : 4);
    if (shared > 0) {
        int rc = infer_forward(e->s, c[0].ids, NULL, shared, NULL, NULL, err);
        if (rc < 0) return rc;
        infer_fork(e->s, 4);
    }
    for (int i = 0; i < 4; i++)
        for (int t = 0; t < T; t++) {
            int at = shared + t, k = at - c[i].first;
            in[i * T + t] = at < c[i].len ? c[i].ids[at] : 0;
            out[i * T + t] = k >= 0 && k < c[i].n ? c[i].targets[k] : -1;
        }
    int rc = T > 0 ? infer_forward(e->s, in, out, T, NULL, losses, err) : 0;
    for (int i = 0; i < 4; i++) {
        scores[i] = 0;
        for (int t = 0; rc == 0 && t < T; t++) scores[i] -= (double)losses[i * T + t];
    }
    return rc;
}

static int eval_hellaswag(Eval *e, Err *err) {
    Hellaswag h;
    int rc = hellaswag_load(&h, run.hellaswag, run.limit, err);
    if (rc < 0) return rc;
    ChoiceScore score = {0};
    size_t most = 4 * (size_t)e->M;
    int32_t *in = xmalloc(most * sizeof *in), *out = xmalloc(most * sizeof *out);
    float *losses = xmalloc(most * sizeof *losses);
    Progress bar;
    progress_begin(&bar, "hellaswag", h.n);
    for (int i = 0; rc == 0 && i < h.n; i++) {
        const HellaswagItem *it = &h.item[i];
        Choice c[4] = {{0}};
        double scores[4];
        for (int k = 0; rc == 0 && k < 4; k++) rc = encode_choice(e, &c[k], it->context, it->ending[k], err);
        if (rc == 0) rc = score_item(e, c, in, out, losses, scores, err);
        if (rc == 0) choice_add(&score, scores, it->chars, 4, it->label);
        for (int k = 0; k < 4; k++) free(c[k].whole);
        char suffix[64];
        snprintf(suffix, sizeof suffix, "acc %.4f  acc_norm %.4f", (double)score.right / (score.n ? score.n : 1),
                 (double)score.right_norm / (score.n ? score.n : 1));
        progress_update(&bar, i + 1, suffix);
    }
    progress_end(&bar);
    if (rc == 0) {
        double acc = (double)score.right / score.n, norm = (double)score.right_norm / score.n;
        double acc_err = choice_stderr(score.n, score.right), norm_err = choice_stderr(score.n, score.right_norm);
        printf("hellaswag: %d tasks, 0-shot, %s%s\n", score.n,
               h.prepared ? "six-line text form (contexts not capitalized as lm-eval does)" :
                   "JSON lines, lm-eval's preprocessing",
               run.add_bos ? ", bos in front" : "");
        printf("  acc       %.4f +- %.4f\n  acc_norm  %.4f +- %.4f\n", acc, acc_err, norm, norm_err);
        log_begin(e, "hellaswag", run.hellaswag);
        jsonlog_str(e->log, "form", h.prepared ? "text" : "json");
        jsonlog_int(e->log, "tasks", score.n);
        jsonlog_num(e->log, "acc", acc);
        jsonlog_num(e->log, "acc_stderr", acc_err);
        jsonlog_num(e->log, "acc_norm", norm);
        jsonlog_num(e->log, "acc_norm_stderr", norm_err);
        jsonlog_end(e->log);
    }
    hellaswag_free(&h);
    free(in);
    free(out);
    free(losses);
    return rc;
}

// ---------------------------------------------------------------------------------------------
// The trainer's validation

// The windows of the loader in order, losses summed in double one after the other: the mean is that of the trainer's
// last validation, whatever the batch.
static int eval_validation(Eval *e, Err *err) {
    TokenData data;
    DataLoader dl;
    int rc = token_data_load(&data, run.val_data, e->m->tokenizer, e->m->config.V, NULL, err);
    if (rc < 0) return rc;
    rc = dataloader_init(&dl, &data, e->B, e->M, false, 0, err);
    if (rc < 0) {
        token_data_free(&data);
        return rc;
    }
    size_t N = (size_t)e->B * (size_t)e->M;
    int32_t *in = xmalloc(N * sizeof *in), *out = xmalloc(N * sizeof *out);
    float *losses = xmalloc(N * sizeof *losses);
    double sum = 0;
    uint64_t tokens = 0;
    Progress bar;
    progress_begin(&bar, "validation", (double)dl.n_windows);
    for (uint64_t w = 0; rc == 0 && w < dl.n_windows; w += (uint64_t)e->B) {
        int rows = dl.n_windows - w < (uint64_t)e->B ? (int)(dl.n_windows - w) : e->B;
        dataloader_next(&dl, in, out);
        infer_reset(e->s, rows);                 // rows past the last window do not run
        rc = infer_forward(e->s, in, out, e->M, NULL, losses, err);
        for (int i = 0; rc == 0 && i < rows * e->M; i++) {
            sum += (double)losses[i];
            tokens += out[i] >= 0;
        }
        progress_update(&bar, (double)(w + (uint64_t)rows), "");
    }
    progress_end(&bar);
    if (rc == 0 && tokens == 0) rc = err_set(err, E_USAGE, "%s: no token to predict in it", run.val_data);
    if (rc == 0) {
        double loss = sum / (double)tokens;
        uint64_t bits;
        memcpy(&bits, &loss, 8);
        printf("validation: %llu windows of %d, %llu tokens, batch %d\n", (unsigned long long)dl.n_windows, e->M,
               (unsigned long long)tokens, e->B);
        printf("  loss        %.9f  (f32 %08x, f64 %016llx)\n  perplexity  %.4f\n", loss, f32_bits((float)loss),
               (unsigned long long)bits, exp(loss));
        log_begin(e, "validation", run.val_data);
        jsonlog_num(e->log, "val_loss", loss);
        char hex[32];
        snprintf(hex, sizeof hex, "%016llx", (unsigned long long)bits);
        jsonlog_str(e->log, "val_loss_bits", hex);
        jsonlog_num(e->log, "perplexity", exp(loss));
        jsonlog_int(e->log, "windows", (long long)dl.n_windows);
        jsonlog_int(e->log, "tokens", (long long)tokens);
        jsonlog_end(e->log);
    }
    free(in);
    free(out);
    free(losses);
    dataloader_free(&dl);
    token_data_free(&data);
    return rc;
}

// ---------------------------------------------------------------------------------------------
// Logits of given tokens

static int parse_tokens(int32_t **ids, int *n, const char *text, int most, int V, Err *err) {
    *ids = xmalloc((size_t)most * sizeof **ids);
    *n = 0;
    for (const char *s = text; ; s++) {
        char *end;
        long v = strtol(s, &end, 10);
        if (end == s || v < 0 || v > INT32_MAX || (*end && *end != ','))
            return err_set(err, E_USAGE, "--tokens %.200s: expected ids separated by commas, such as 1,2,3", text);
        if (v >= V)
            return err_set(err, E_USAGE, "--tokens: id %ld is not in the vocabulary, which has 0 to %d", v, V - 1);
        if (*n == most) return err_set(err, E_USAGE,
                                       "--tokens: more than %d ids; the context is no longer (--seq-len)", most);
        (*ids)[(*n)++] = (int32_t)v;
        if (!*end) return 0;
        s = end;
    }
}

// One token at a time: with --arithmetic trained the bits are those of one call over all of them.
static int eval_tokens(Eval *e, Err *err) {
    int32_t *ids;
    int n, V = e->m->config.V;
    float *logits = xmalloc((size_t)V * sizeof *logits);
    StWriter *w = NULL;
    int rc = parse_tokens(&ids, &n, run.tokens, e->M, V, err);
    infer_reset(e->s, 1);
    for (int i = 0; rc == 0 && i < n; i++) {
        rc = infer_forward(e->s, &ids[i], NULL, 1, logits, NULL, err);
        if (rc < 0 || !run.logits_out) continue;
        if (!w) {
            w = st_writer_new();
            int64_t shape[2] = {n, V};
            st_writer_tensor(w, "logits", DT_F32, 2, shape);
            rc = st_writer_begin(w, run.logits_out, err);
            if (rc < 0) continue;
        }
        st_writer_data(w, logits, (size_t)V * sizeof *logits);
    }
    if (w && rc == 0) rc = st_writer_finish(w, err);
    else if (w) st_writer_abort(w);
    if (rc == 0) {
        int best = 0;
        for (int i = 1; i < V; i++) best = logits[i] > logits[best] ? i : best;
        printf("tokens: %d given, likeliest next %d (logit %.6g)%s%s\n", n, best, (double)logits[best],
               run.logits_out ? ", logits in " : "", run.logits_out ? run.logits_out : "");
    }
    free(logits);
    free(ids);
    return rc;
}

// ---------------------------------------------------------------------------------------------

static int eval_all(Eval *e, Err *err) {
    ModelFile *m = e->m;
    bool text = run.wikitext || run.text || run.hellaswag;
    if (!text && !run.val_data && !run.tokens)
        return err_set(err, E_USAGE, "nothing to score: give --wikitext FILE, --hellaswag FILE, --text FILE, "
                                     "--val-data FILE or --tokens IDS");
    if (run.logits_out && !run.tokens) return err_set(err, E_USAGE, "--logits-out needs --tokens");
    if (text && !m->tokenizer)
        return err_set(err, E_MISSING, "%s carries no tokenizer, so texts cannot be read: put its tokenizer.json "
                                       "beside it", e->path);
    int wanted = run.val_data && !text ? 512 : 2048;
    e->M = run.seq_len ? run.seq_len : m->config.max_T < wanted ? m->config.max_T : wanted;
    if (e->M > m->config.max_T)
        fprintf(stderr, "%s: --seq-len %d is longer than the %d positions this model was made for; quality will "
                        "suffer\n", program_name,
                e->M, m->config.max_T);
    e->B = run.batch ? run.batch : e->M < 4096 ? 4096 / e->M : 1;
    if ((int64_t)e->B * e->M > INT32_MAX / 4) return err_set(err, E_USAGE,
                                                             "--batch %d of --seq-len %d is too much at once", e->B,
                                                                 e->M);
    int B = run.hellaswag && e->B < 4 ? 4 : e->B;
    if (!text && !run.val_data) B = 1;           // tokens come one by one
    Arithmetic arith = run.arithmetic == 0 ? ARITH_TRAINED : ARITH_SERVED;
    int rc = infer_new(&e->s, m, &(InferOptions){.B = B, .max_T = e->M, .max_N = B * e->M, .arith = arith,
                                                   .as_float = run.as_float}, err);
    if (rc < 0) return rc;
    char size[32], mem[32];
    printf("%s: %s, %s arithmetic, %s; model size %s, %s in use\n", e->path, e->scheme, run.arithmetic == 0 ?
           "trained" : "served",
           device_description(), fmt_bytes(size, (double)infer_size_bytes(e->s)),
               fmt_bytes(mem, (double)infer_memory_bytes(e->s)));
    if (rc == 0 && run.tokens) rc = eval_tokens(e, err);
    if (rc == 0 && run.val_data) rc = eval_validation(e, err);
    if (rc == 0 && run.wikitext) rc = eval_wikitext(e, err);
    if (rc == 0 && run.text) rc = eval_text(e, err);
    if (rc == 0 && run.hellaswag) rc = eval_hellaswag(e, err);
    infer_free(e->s);
    return rc;
}

int main(int argc, char **argv) {
    program_name = "eval";
    Err err = {0};
    const char *model;
    static const char summary[] = "usage: eval MODEL [options]\n"
        "Scores a model. MODEL: a Hugging Face folder, a .gguf file, or a model.bin of this project.";
    if (cli_parse(options, N_OPTIONS, summary, &model, argc, argv, &err) < 0) die(&err);
    if (!model) {
        err_set(&err, E_USAGE, "which model? usage: eval MODEL --wikitext FILE (--help lists all options)");
        die(&err);
    }
    JsonLog log;
    ModelFile m;
    if (device_init(run.device, run.threads, &err) < 0 || jsonlog_open(&log, run.json, true, &err) < 0 ||
        model_open(&m, model, &err) < 0) die(&err);
    bool plain = quant_plan_is_none(&m.plan) || run.as_float;
    Eval e = {.path = model, .scheme = plain ? "float " FLOATX_NAME : m.plan.name, .m = &m, .log = &log};
    if (eval_all(&e, &err) < 0) die(&err);
    jsonlog_close(&log);
    model_close(&m);
    if (fflush(stdout) != 0) {
        err_set(&err, E_FAIL, "the results could not be written; is the disk full or the pipe closed?");
        die(&err);
    }
    return 0;
}
