// eval: scores a model.
//
//   ./eval run1/model-8da4w-32.bin --wikitext wiki.test.raw --hellaswag hellaswag_val_full.txt --limit 400
//   ./eval run1/model-8da4w-32.bin --wikitext wiki.test.raw --reference run1/model.bin
//   mpirun -np 4 ./eval run1/model.bin --hellaswag hellaswag_val_full.txt
//
// Each task is one function: texts in, losses of their tokens from infer_forward, sums in double in the order of the
// text, one line of results. What the numbers mean is lm-evaluation-harness's (llmc/metrics.h); the validation loss is
// the trainer's, to the bit. Ranks take batches of windows or tasks in turn and give each other what came of them, so
// that the digits do not depend on their number.
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "llmc/checkpoint.h"
#include "llmc/cli.h"
#include "llmc/comm.h"
#include "llmc/dataloader.h"
#include "llmc/device.h"
#include "llmc/infer.h"
#include "llmc/logger.h"
#include "llmc/metrics.h"
#include "llmc/profile.h"
#include "llmc/safetensors.h"
#include "llmc/tokenizer.h"

static struct {
    const char *wikitext, *text, *hellaswag, *val_data, *reference, *tokens, *logits_out, *device, *json, *profile;
    int limit, seq_len, batch, step, arithmetic, kv, threads;
    bool as_float, add_bos, served_cache, no_verify, peak;
} run;

static const Option options[] = {
    // name            type        where             default    allowed           help
    {"--wikitext",     OPT_STRING, &run.wikitext,    NULL,      NULL,             "wiki.test.raw: word and byte perplexity, bits per byte as lm-eval defines them"},
    {"--text",         OPT_STRING, &run.text,        NULL,      NULL,             "any text: token perplexity over windows of the whole raw text, not overlapping"},
    {"--hellaswag",    OPT_STRING, &run.hellaswag,   NULL,      NULL,             "HellaSwag tasks as JSON lines or in the six-line text form: acc and acc_norm"},
    {"--limit",        OPT_INT,    &run.limit,       "0",       "0..",            "only so many HellaSwag tasks and wikitext pages (0: all)"},
    {"--val-data",     OPT_STRING, &run.val_data,    NULL,      NULL,             "held-out data of the trainer: the loss of its validation, same windows, same bits"},
    {"--reference",    OPT_STRING, &run.reference,   NULL,      NULL,             "a model to compare with over --wikitext, --text and --val-data, in trained arithmetic (floats without fake quantization): KL divergence, top-1 agreement"},
    {"--seq-len",      OPT_INT,    &run.seq_len,     "0",       "0..1048576",     "tokens in a window (0: the model's context, at most 2048; with --val-data 512)"},
    {"--batch",        OPT_INT,    &run.batch,       "0",       "0..65536",       "windows, or HellaSwag tasks, at a time (0: about 4096 tokens; 4 tasks, on a GPU 16)"},
    {"--step",         OPT_INT,    &run.step,        "0",       "0..1048576",     "tokens of a window in one call (0: all). 1 with served arithmetic: as generate decodes"},
    {"--arithmetic",   OPT_ENUM,   &run.arithmetic,  "trained", "trained,served", "codes unpacked as in training, or read packed by the fast kernels"},
    {"--kv",           OPT_ENUM,   &run.kv,          "x",       "x,int8",         "the KV cache in the build's type or in INT8 (with served arithmetic)"},
    {"--served-cache", OPT_FLAG,   &run.served_cache,"0",       NULL,             "keep the weights as served arithmetic reads them in MODEL.served, for the next start"},
    {"--float",        OPT_FLAG,   &run.as_float,    "0",       NULL,             "ignore the scheme of a float model.bin: no fake quantization"},
    {"--add-bos",      OPT_FLAG,   &run.add_bos,     "0",       NULL,             "put bos before HellaSwag contexts (lm-eval's add_bos_token)"},
    {"--tokens",       OPT_STRING, &run.tokens,      NULL,      "1,2,3",          "token ids to run instead of a text; prints the likeliest next token"},
    {"--logits-out",   OPT_STRING, &run.logits_out,  NULL,      NULL,             "with --tokens: write logits (tokens, vocabulary) as f32 safetensors"},
    {"--json",         OPT_STRING, &run.json,        NULL,      NULL,             "append results to this file as JSON lines"},
    {"--peak",         OPT_FLAG,   &run.peak,        "0",       NULL,             "measure the arithmetic peak, and print each task's share of it"},
    {"--profile",      OPT_STRING, &run.profile,     NULL,      NULL,             "print the time of each operation, and write a timeline for ui.perfetto.dev to FILE"},
    {"--no-verify",    OPT_FLAG,   &run.no_verify,   "0",       NULL,             "do not compare a model.bin with its checksum"},
    {"--device",       OPT_STRING, &run.device,      "auto",    NULL,             "auto (a GPU if there is one), cpu or cuda"},
    {"--threads",      OPT_INT,    &run.threads,     "0",       "0..4096",        "CPU threads (0: all cores)"},
};
#define N_OPTIONS ((int)(sizeof options / sizeof *options))

// What a task asked of the model, counted as trainers count it (forward: 2 FLOPs a parameter in matmuls and token, and
// causal attention), once, whatever is padded or run again; the head for rows that are scored.
// Loading and tokenizing stand apart from running; processor: seconds that all threads of this rank ran.
typedef struct { double began, tokenizing, loading, running, processor, tokens, flops; } Work;

typedef struct {
    const char *path, *scheme, *cache_path;
    ModelFile *m, *ref_file;     // ref_file NULL: no reference
    const char *ref_scheme;
    int M, B;                    // window length and windows at a time
    Infer *s, *ref;              // as the task under way needs them
    int made_B, made_T, made_N;
    Work work;
    double seconds;              // of all tasks
    double peak;
    const char *peak_source;
    JsonLog *log;
} Eval;

// ---------------------------------------------------------------------------------------------
// The model, and what every task reports

// The model, and its reference where there is to be one, with room for B sequences of T tokens, N tokens a call.
static int load(Eval *e, int B, int T, int N, bool compare, Err *err) {
    bool loaded = e->s != NULL;
    double began = now_seconds();
    Err unkept;
    if (loaded && e->made_B == B && e->made_T == T && e->made_N == N && (!compare || e->ref)) return 0;
    infer_free(e->s);
    infer_free(e->ref);
    e->s = e->ref = NULL;
    InferOptions o = {.B = B, .max_T = T, .max_N = N, .arith = run.arithmetic == 0 ? ARITH_TRAINED : ARITH_SERVED,
                      .kv = run.kv == 0 ? KV_X : KV_INT8, .as_float = run.as_float, .cache_path = e->cache_path,
                      .cache_err = comm_rank() == 0 ? &unkept : NULL};
    int rc = infer_new(&e->s, e->m, &o, err);
    if (rc < 0) return rc;
    if (o.cache_err && unkept.text[0]) fprintf(stderr, "%s: not kept: %s\n", program_name, unkept.text);
    InferOptions r = {.B = B, .max_T = T, .max_N = N, .arith = ARITH_TRAINED, .as_float = e->ref_file &&
                      !e->ref_file->packed};
    if (compare && (rc = infer_new(&e->ref, e->ref_file, &r, err)) < 0) return rc;
    e->made_B = B;
    e->made_T = T;
    e->made_N = N;
    e->work.loading = now_seconds() - began;
    char size[32], mem[32];
    if (!loaded)
        printf("%s: %s, %s arithmetic, %s%s%s; model size %s, %s in use\n", e->path, e->scheme,
               run.arithmetic == 0 ? "trained" : "served", device_description(), comm_size() > 1 ? "; " : "",
               comm_description(), fmt_bytes(size, (double)infer_size_bytes(e->s)),
               fmt_bytes(mem, (double)infer_memory_bytes(e->s) + (e->ref ? (double)infer_memory_bytes(e->ref) : 0.0)));
    if (!loaded && e->ref) printf("reference: %s, %s, trained arithmetic\n", e->ref_file->path, e->ref_scheme);
    return 0;
}

static void work_begin(Eval *e) { e->work = (Work){.began = now_seconds()}; }

static double processor_seconds(void) {
    struct timespec t;
    return clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t) == 0 ? (double)t.tv_sec + 1e-9 * (double)t.tv_nsec : 0.0;
}

// Around what a task runs: begin counts from now, end up to now.
static void running_begin(Eval *e) {
    e->work.running = -now_seconds();
    e->work.processor = -processor_seconds();
}

static void running_end(Eval *e) {
    e->work.running += now_seconds();
    e->work.processor += processor_seconds();
}

// Positions [from, to) of one sequence, `scored` of whose rows have a target.
static void work_add(Eval *e, int from, int to, int scored) {
    const LlamaConfig *c = &e->m->config;
    double block = (double)c->C * (double)c->HS * (2.0 * c->NH + 2.0 * c->NKV) + 3.0 * c->C * c->FF, n = to - from;
    double seen = (double)to * to - (double)from * from;             // keys, about, twice
    e->work.tokens += n;
    e->work.flops += (e->ref ? 2 : 1) * (c->L * (2 * block * n + 2.0 * c->NH * c->HS * seen) +
                                         2.0 * c->V * c->C * scored);
}

static void log_begin(const Eval *e, const char *task, const char *data) {
    jsonlog_begin(e->log, task);
    jsonlog_str(e->log, "model", e->path);
    jsonlog_str(e->log, "scheme", e->scheme);
    jsonlog_str(e->log, "arithmetic", run.arithmetic == 0 ? "trained" : "served");
    jsonlog_str(e->log, "precision", FLOATX_NAME);
    jsonlog_str(e->log, "kv", run.kv == 0 ? FLOATX_NAME : "int8");
    jsonlog_str(e->log, "data", data);
    jsonlog_int(e->log, "seq_len", e->M);
    jsonlog_int(e->log, "ranks", comm_size());
    jsonlog_int(e->log, "model_bytes", (long long)infer_size_bytes(e->s));
}

// The last line of a task, and the end of its JSON line.
static void report_end(Eval *e) {
    const Work *w = &e->work;
    double seconds = now_seconds() - w->began, rate = w->flops / w->running;
    char took[32], speed[32];
    printf("  time              %s, of it loading %.2f s, tokenizing %.2f s; %s tok/s", fmt_time(took, seconds),
           w->loading, w->tokenizing, fmt_count(speed, w->tokens / w->running));
    if (e->peak > 0)
        printf(", %.3f of the peak of %.0f GFLOP/s (%s)", rate / e->peak, e->peak / 1e9, e->peak_source);
    printf("\n");
    e->seconds += seconds;
    jsonlog_num(e->log, "seconds", seconds);
    jsonlog_num(e->log, "loading_seconds", w->loading);
    jsonlog_num(e->log, "tokenizing_seconds", w->tokenizing);
    jsonlog_num(e->log, "running_seconds", w->running);
    jsonlog_num(e->log, "processor_seconds", w->processor);
    jsonlog_num(e->log, "tokens_run", w->tokens);
    jsonlog_num(e->log, "tokens_per_second", w->tokens / w->running);
    jsonlog_num(e->log, "flops_per_second", rate);
    if (e->peak > 0) jsonlog_num(e->log, "peak_flops", e->peak);
    if (e->peak > 0) jsonlog_num(e->log, "peak_share", rate / e->peak);
    jsonlog_end(e->log);
}

// Texts that a window cannot begin with nothing before need a token to predict the first from: bos, else eos.
static int prefix_token(const Eval *e) {
    int bos = tokenizer_bos(e->m->tokenizer), eos = tokenizer_eos(e->m->tokenizer);
    return bos >= 0 ? bos : eos >= 0 ? eos : 0;
}

static int encode(const Eval *e, const char *text, size_t len, int32_t **ids, size_t *n, Err *err) {
    return tokenizer_encode(e->m->tokenizer, text, len, false, ids, n, err);
}

// ---------------------------------------------------------------------------------------------
// Ranks

static bool my_turn(size_t batch) { return batch % (size_t)comm_size() == (size_t)comm_rank(); }

// Results that each rank has some of, and zeros for the others': all of them, in place on every rank.
static int join_results(void *results, size_t bytes, Err *err) {
    if (comm_size() == 1) return 0;
    enum { PIECE = 1 << 20 };
    size_t R = (size_t)comm_size();
    uint8_t *all = xmalloc(R * PIECE), *own = results;
    int rc = 0;
    for (size_t at = 0; rc == 0 && at < bytes; at += PIECE) {
        size_t n = bytes - at < PIECE ? bytes - at : PIECE;
        rc = comm_host_all_gather(all, own + at, n, err);
        for (size_t r = 0; rc == 0 && r < R; r++)
            for (size_t i = 0; i < n; i++) own[at + i] |= all[r * n + i];
    }
    free(all);
    return rc;
}

// Of all ranks together.
static int measure_peak(Eval *e, Err *err) {
    double *all = xcalloc((size_t)comm_size(), sizeof *all), own = device_peak_flops(&e->peak_source);
    int rc = comm_host_all_gather(all, &own, sizeof own, err);
    for (int r = 0; r < comm_size(); r++) e->peak += all[r];
    free(all);
    return rc;
}

// What ranks read must be the same, or their batches are not.
static int check_same_work(const char *what, size_t batches, uint64_t tokens, Err *err) {
    char text[96];
    snprintf(text, sizeof text, "%zu batches, %llu tokens", batches, (unsigned long long)tokens);
    return comm_check_same(what, text, err);
}

// ---------------------------------------------------------------------------------------------
// Windows of text: the common part of --wikitext, --text and --val-data

// Inputs in[0, len), targets out[0, len), of which those from `unscored` on count; their results stand from `at` on.
typedef struct { const int32_t *in, *out; int len, unscored; size_t at; } Job;
// All windows of a task, in the order of the text, and what came of their scored tokens; the last three arrays where
// there is a reference.
typedef struct {
    Job *job;
    size_t n, room, scored;
    float *loss, *ref_loss, *kl, *same;
} Windows;

static int add_window(Windows *w, const int32_t *in, int len, int unscored, Err *err) {
    if (w->n == w->room) {
        size_t room = w->room ? 2 * w->room : 256;
        Job *more = realloc(w->job, room * sizeof *more);
        if (!more) return err_set(err, E_NOMEM, "no memory for %zu windows", room);
        w->job = more;
        w->room = room;
    }
    w->job[w->n++] = (Job){in, in + 1, len, unscored, w->scored};
    w->scored += (size_t)(len - unscored);
    return 0;
}

static void windows_free(Windows *w) {
    free(w->job);
    free(w->loss);               // the others lie behind it
    *w = (Windows){0};
}

static int by_length(const void *a, const void *b) {
    const Job *x = *(const Job *const *)a, *y = *(const Job *const *)b;
    return x->len != y->len ? (x->len < y->len) - (x->len > y->len) : (x->at > y->at) - (x->at < y->at);
}

// What goes in and out of one call.
typedef struct { int32_t *in, *out, *same; float *losses, *ref_losses, *kl; } Call;

static Call call_new(size_t N) {
    return (Call){xmalloc(N * 4), xmalloc(N * 4), xmalloc(N * 4), xmalloc(N * 4), xmalloc(N * 4), xmalloc(N * 4)};
}

static void call_free(Call *c) {
    free(c->in);
    free(c->out);
    free(c->same);
    free(c->losses);
    free(c->ref_losses);
    free(c->kl);
}

// The windows go through the model in one call, or in steps over its cache.
static int run_batch(const Eval *e, Windows *w, const Job *const *row, int rows, Call *c, Err *err) {
    int longest = row[0]->len, step = run.step ? run.step : longest;
    infer_reset(e->s, rows);
    if (e->ref) infer_reset(e->ref, rows);
    for (int at = 0; at < longest; at += step) {
        int T = longest - at < step ? longest - at : step;
        for (int b = 0; b < rows; b++)
            for (int k = 0, t = at; k < T; k++, t++) {
                c->in[b * T + k] = t < row[b]->len ? row[b]->in[t] : 0;
                c->out[b * T + k] = t < row[b]->len && t >= row[b]->unscored ? row[b]->out[t] : -1;
            }
        int rc = e->ref ? infer_compare(e->s, e->ref, c->in, c->out, T, c->losses, c->ref_losses, c->kl, c->same, err)
                        : infer_forward(e->s, c->in, c->out, T, NULL, c->losses, err);
        if (rc < 0) return rc;
        for (int i = 0; i < rows * T; i++) {
            if (c->out[i] < 0) continue;
            size_t to = row[i / T]->at + (size_t)(at + i % T - row[i / T]->unscored);
            w->loss[to] = c->losses[i];
            if (!e->ref) continue;
            w->ref_loss[to] = c->ref_losses[i];
            w->kl[to] = c->kl[i];
            w->same[to] = (float)c->same[i];
        }
    }
    return 0;
}

// Runs all windows, longest first so that those of a batch are of like length. Batches are the same whatever the ranks.
static int run_windows(Eval *e, Windows *w, const char *what, Err *err) {
    const Job **order = xmalloc(w->n * sizeof *order);
    for (size_t i = 0; i < w->n; i++) order[i] = &w->job[i];
    qsort(order, w->n, sizeof *order, by_length);
    int longest = order[0]->len, B = w->n < (size_t)e->B ? (int)w->n : e->B;
    int step = run.step && run.step < longest ? run.step : longest;
    size_t arrays = e->ref_file ? 4 : 1, batches = (w->n + (size_t)B - 1) / (size_t)B;
    w->loss = xcalloc(w->scored, arrays * sizeof *w->loss);
    w->ref_loss = w->loss + w->scored;
    w->kl = w->ref_loss + w->scored;
    w->same = w->kl + w->scored;
    Call call = call_new((size_t)B * (size_t)step);
    int rc = check_same_work(what, batches, w->scored, err);
    if (rc == 0) rc = load(e, B, longest, B * step, e->ref_file != NULL, err);
    for (size_t i = 0; rc == 0 && i < w->n; i++)
        work_add(e, 0, order[i]->len, order[i]->len - order[i]->unscored);
    double done = 0, start = now_seconds();
    running_begin(e);
    Progress bar;
    progress_begin(&bar, what, e->work.tokens);
    for (size_t k = 0; rc == 0 && k < batches; k++) {
        const Job **row = order + k * (size_t)B;
        int rows = w->n - k * (size_t)B < (size_t)B ? (int)(w->n - k * (size_t)B) : B;
        if (my_turn(k)) rc = run_batch(e, w, row, rows, &call, err);
        for (int b = 0; b < rows; b++) done += row[b]->len;
        char rate[32], suffix[64];
        snprintf(suffix, sizeof suffix, "%s tok/s", fmt_count(rate, done / (now_seconds() - start)));
        if (comm_rank() == 0) progress_update(&bar, done, suffix);
    }
    if (comm_rank() == 0) progress_end(&bar);
    if (rc == 0) rc = join_results(w->loss, arrays * w->scored * sizeof *w->loss, err);
    running_end(e);
    if (rc == 0) rc = model_unchanged(e->m, err);
    if (rc == 0 && e->ref_file) rc = model_unchanged(e->ref_file, err);
    call_free(&call);
    free(order);
    return rc;
}

// Sum of -loss, window by window.
static double log_likelihood(const Windows *w, const float *loss) {
    double sum = 0;
    for (size_t i = 0; i < w->n; i++) {
        double one = 0;
        size_t n = (size_t)(w->job[i].len - w->job[i].unscored);
        for (size_t t = 0; t < n; t++) one -= (double)loss[w->job[i].at + t];
        sum += one;
    }
    return sum;
}

// With a reference: how far from it, as text and into the JSON line that log_begin began.
static void report_distance(const Eval *e, Windows *w) {
    if (!e->ref_file) return;
    size_t *count = xmalloc(w->n * sizeof *count);
    for (size_t i = 0; i < w->n; i++) count[i] = (size_t)(w->job[i].len - w->job[i].unscored);
    double ref_loss = -log_likelihood(w, w->ref_loss) / (double)w->scored;
    Distance d;
    distance_measure(&d, w->kl, w->loss, w->ref_loss, w->same, count, w->n);
    free(count);
    printf("  reference         %.4f token perplexity; ratio %.5f +- %.5f\n", exp(ref_loss), d.ratio, d.ratio_stderr);
    printf("  kl_divergence     %.6f +- %.6f nats a token; median %.6f, 99 %% below %.6f, largest %.4f\n", d.kl_mean,
           d.kl_stderr, d.kl_median, d.kl_p99, d.kl_max);
    printf("  same_top1         %.5f +- %.5f\n", d.same, d.same_stderr);
    jsonlog_str(e->log, "reference", e->ref_file->path);
    jsonlog_num(e->log, "reference_token_perplexity", exp(ref_loss));
    jsonlog_num(e->log, "perplexity_ratio", d.ratio);
    jsonlog_num(e->log, "perplexity_ratio_stderr", d.ratio_stderr);
    jsonlog_num(e->log, "kl", d.kl_mean);
    jsonlog_num(e->log, "kl_stderr", d.kl_stderr);
    jsonlog_num(e->log, "kl_median", d.kl_median);
    jsonlog_num(e->log, "kl_p99", d.kl_p99);
    jsonlog_num(e->log, "kl_max", d.kl_max);
    jsonlog_num(e->log, "same_top1", d.same);
    jsonlog_num(e->log, "same_top1_stderr", d.same_stderr);
}

// ---------------------------------------------------------------------------------------------
// Wikitext

// Tokens of a page behind the prefix: *sequence, n + 1 of them.
static int encode_page(const Eval *e, const TextSpan *page, int32_t **sequence, size_t *n, Err *err) {
    size_t len;
    char *text = wikitext_detokenize(page->s, page->len, &len);
    int32_t *ids;
    int rc = encode(e, text, len, &ids, n, err);
    free(text);
    if (rc < 0) return rc;
    *sequence = xmalloc((*n + 1) * sizeof **sequence);
    (*sequence)[0] = prefix_token(e);
    if (*n) memcpy(*sequence + 1, ids, *n * sizeof *ids);
    free(ids);
    return 0;
}

static int eval_wikitext(Eval *e, Err *err) {
    FileMap map;
    work_begin(e);
    int rc = file_map(&map, run.wikitext, err);
    if (rc < 0) return rc;
    TextSpan *pages;
    int n_pages = wikitext_pages(&pages, (const char *)map.data, map.size);
    if (run.limit > 0 && n_pages > run.limit) n_pages = run.limit;
    int32_t **sequence = xcalloc((size_t)n_pages + 1, sizeof *sequence);
    TextScore score = {0};
    Windows w = {0};
    for (int i = 0; rc == 0 && i < n_pages; i++) {
        size_t n;
        rc = encode_page(e, &pages[i], &sequence[i], &n, err);
        if (rc < 0) break;
        score.words += count_words(pages[i].s, pages[i].len);
        score.bytes += pages[i].len;
        score.tokens += n;
        for (size_t k = 0; rc == 0 && k < rolling_window_count(n, e->M); k++) {
            Window r = rolling_window(n, e->M, k);
            rc = add_window(&w, sequence[i] + r.begin, r.len, r.len - r.scored, err);
        }
    }
    e->work.tokenizing = now_seconds() - e->work.began;
    if (rc == 0 && w.n == 0)
        rc = err_set(err, E_USAGE, "%s: no text in it; expected wikitext's raw test file", run.wikitext);
    if (rc == 0) rc = run_windows(e, &w, "wikitext", err);
    if (rc == 0) {
        score.loglik = log_likelihood(&w, w.loss);
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
        report_distance(e, &w);
        report_end(e);
    }
    for (int i = 0; i < n_pages; i++) free(sequence[i]);
    free(sequence);
    windows_free(&w);
    free(pages);
    file_unmap(&map);
    return rc;
}

// ---------------------------------------------------------------------------------------------
// Token perplexity of a raw text

// Windows do not overlap: each token but the first is predicted once, from what its window holds before it.
static int eval_text(Eval *e, Err *err) {
    FileMap map;
    work_begin(e);
    int rc = file_map(&map, run.text, err);
    if (rc < 0) return rc;
    int32_t *ids = NULL;
    size_t n = 0;
    rc = encode(e, (const char *)map.data, map.size, &ids, &n, err);
    file_unmap(&map);
    if (rc < 0) return rc;
    e->work.tokenizing = now_seconds() - e->work.began;
    Windows w = {0};
    if (n < 2) rc = err_set(err, E_USAGE, "%s: %zu tokens; a perplexity needs two at least", run.text, n);
    for (size_t begin = 0; rc == 0 && begin < n - 1; begin += (size_t)e->M)
        rc = add_window(&w, ids + begin, n - 1 - begin < (size_t)e->M ? (int)(n - 1 - begin) : e->M, 0, err);
    if (rc == 0) rc = run_windows(e, &w, "text", err);
    if (rc == 0) {
        TextScore score = {.tokens = n - 1, .loglik = log_likelihood(&w, w.loss)};
        printf("text: token perplexity over windows of %d tokens, not overlapping, no bos: %.4f (loss %.6f, %zu "
               "tokens)\n", e->M,
               token_perplexity(&score), -score.loglik / (double)score.tokens, n - 1);
        log_begin(e, "text", run.text);
        jsonlog_num(e->log, "token_perplexity", token_perplexity(&score));
        jsonlog_num(e->log, "loss", -score.loglik / (double)score.tokens);
        jsonlog_int(e->log, "tokens", (long long)(n - 1));
        report_distance(e, &w);
        report_end(e);
    }
    windows_free(&w);
    free(ids);
    return rc;
}

// ---------------------------------------------------------------------------------------------
// HellaSwag

// Inputs of one ending: context and continuation without its last token, the last M of them; targets[i] is what input
// `first` + i predicts, n of them.
typedef struct { int32_t *ids; int len, first, n; const int32_t *targets; int32_t *whole; } Choice;
// A task: its endings share their first `shared` inputs; `tail` more are the most that one has.
typedef struct { Choice choice[4]; int shared, tail, index; } Task;

// before: tokens of the context.
static int encode_choice(const Eval *e, Choice *c, const int32_t *before, size_t n_before, const char *context,
                         const char *ending, Err *err) {
    size_t nc = strlen(context), ne = strlen(ending);
    char *text = xmalloc(nc + ne + 2);
    memcpy(text, context, nc);
    text[nc] = ' ';
    memcpy(text + nc + 1, ending, ne + 1);
    int32_t *all = NULL;
    size_t n_all = 0;
    int rc = encode(e, text, nc + 1 + ne, &all, &n_all, err);
    free(text);
    if (rc < 0) return rc;
    if (n_before > INT32_MAX / 4 || n_all > INT32_MAX / 4) {
        free(all);
        return err_set(err, E_USAGE, "a HellaSwag task of %zu tokens is too long", n_all);
    }
    // The context's own tokens, then what the whole has after as many.
    size_t prefix = n_before == 0 || run.add_bos, n_cont = n_all > n_before ? n_all - n_before : 0;
    size_t n = prefix + n_before + n_cont;
    c->whole = xmalloc((n + 1) * sizeof *c->whole);
    c->whole[0] = prefix_token(e);
    if (n_before) memcpy(c->whole + prefix, before, n_before * sizeof *before);
    if (n_cont) memcpy(c->whole + prefix + n_before, all + n_before, n_cont * sizeof *all);
    free(all);
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
    return 0;
}

static int encode_task(const Eval *e, Task *task, const HellaswagItem *it, int index, Err *err) {
    // Spaces at the end of the context belong to the continuation.
    size_t kept = strlen(it->context), n_before = 0;
    while (kept > 0 && it->context[kept - 1] == ' ') kept--;
    int32_t *before = NULL;
    int rc = encode(e, it->context, kept, &before, &n_before, err);
    for (int k = 0; rc == 0 && k < 4; k++)
        rc = encode_choice(e, &task->choice[k], before, n_before, it->context, it->ending[k], err);
    free(before);
    if (rc < 0) return rc;
    const Choice *c = task->choice;
    task->index = index;
    task->shared = c[0].first;
    for (int i = 1; i < 4; i++) {
        int same = 0, most = c[i].first < task->shared ? c[i].first : task->shared;
        while (same < most && c[i].ids[same] == c[0].ids[same]) same++;
        task->shared = same;
    }
    for (int i = 0; i < 4; i++)
        if (c[i].len - task->shared > task->tail) task->tail = c[i].len - task->shared;
    return 0;
}

static int by_shared(const void *a, const void *b) {
    const Task *x = a, *y = b;
    return x->shared != y->shared ? (x->shared < y->shared) - (x->shared > y->shared) : x->index - y->index;
}

static int by_tail(const void *a, const void *b) {
    const Task *x = a, *y = b;
    return x->tail != y->tail ? (x->tail < y->tail) - (x->tail > y->tail) : x->index - y->index;
}

// A batch begins with what the inputs of each task have in common, as far as the shortest goes; T inputs follow.
typedef struct { Task *task; int n, shared, T; } TaskBatch;

static TaskBatch task_batch(Task *tasks, int n) {
    TaskBatch b = {tasks, n, tasks[0].shared, 0};
    for (int i = 1; i < n; i++) b.shared = tasks[i].shared < b.shared ? tasks[i].shared : b.shared;
    for (int i = 0; i < n; i++)
        for (int k = 0; k < 4; k++)
            b.T = tasks[i].choice[k].len - b.shared > b.T ? tasks[i].choice[k].len - b.shared : b.T;
    return b;
}

// Tasks that stand beside each other after this are of like lengths: first by what is shared, then, a few batches at a
// time, by what is not.
static void order_tasks(Task *task, int n, int batch) {
    qsort(task, (size_t)n, sizeof *task, by_shared);
    for (int i = 0; i < n; i += 4 * batch)
        qsort(task + i, (size_t)(n - i < 4 * batch ? n - i : 4 * batch), sizeof *task, by_tail);
}

// Scores the four endings of each task: contexts run once, and the cache is forked.
static int score_batch(const Eval *e, const TaskBatch *b, Call *c, double (*scores)[4], Err *err) {
    int rc = 0, rows = 4 * b->n, T = b->T;
    infer_reset(e->s, b->shared > 0 ? b->n : rows);
    if (b->shared > 0) {
        for (int i = 0; i < b->n; i++)
            memcpy(c->in + i * b->shared, b->task[i].choice[0].ids, (size_t)b->shared * sizeof *c->in);
        if ((rc = infer_forward(e->s, c->in, NULL, b->shared, NULL, NULL, err)) < 0) return rc;
        infer_fork(e->s, 4);
    }
    for (int r = 0; r < rows; r++) {
        const Choice *choice = &b->task[r / 4].choice[r % 4];
        for (int t = 0; t < T; t++) {
            int at = b->shared + t, k = at - choice->first;
            c->in[r * T + t] = at < choice->len ? choice->ids[at] : 0;
            c->out[r * T + t] = k >= 0 && k < choice->n ? choice->targets[k] : -1;
        }
    }
    if (T > 0) rc = infer_forward(e->s, c->in, c->out, T, NULL, c->losses, err);
    for (int r = 0; rc == 0 && r < rows; r++) {
        double *score = &scores[b->task[r / 4].index][r % 4];
        for (int t = 0; t < T; t++) *score -= (double)c->losses[r * T + t];
    }
    return rc;
}

static int run_tasks(Eval *e, Task *task, int n, double (*scores)[4], Err *err) {
    // A few tasks are enough for a CPU's matmuls, and the more there are, the less alike their lengths.
    int each = run.batch ? run.batch : device_is_host() ? 4 : 16, most = 0, N = 0;
    if (each > n) each = n;
    int batches = (n + each - 1) / each;
    order_tasks(task, n, each);
    TaskBatch *batch = xmalloc((size_t)batches * sizeof *batch);
    for (int k = 0; k < batches; k++) {
        TaskBatch *b = &batch[k];
        *b = task_batch(task + k * each, n - k * each < each ? n - k * each : each);
        most = b->shared + b->T > most ? b->shared + b->T : most;
        int tokens = b->n * (4 * b->T > b->shared ? 4 * b->T : b->shared);
        N = tokens > N ? tokens : N;
    }
    uint64_t targets = 0;
    for (int i = 0; i < n; i++)
        for (int k = 0; k < 4; k++) targets += (uint64_t)task[i].choice[k].n;
    if (N < 4 * each) N = 4 * each;
    Call call = call_new((size_t)N);
    int rc = check_same_work("HellaSwag tasks", (size_t)batches, targets, err);
    if (rc == 0) rc = load(e, 4 * each, most > 0 ? most : 1, N, false, err);
    for (int i = 0; rc == 0 && i < n; i++) {
        work_add(e, 0, task[i].shared, 0);
        for (int k = 0; k < 4; k++) work_add(e, task[i].shared, task[i].choice[k].len, task[i].choice[k].n);
    }
    Progress bar;
    progress_begin(&bar, "hellaswag", n);
    running_begin(e);
    for (int k = 0, done = 0; rc == 0 && k < batches; k++) {
        if (my_turn((size_t)k)) rc = score_batch(e, &batch[k], &call, scores, err);
        done += batch[k].n;
        if (comm_rank() == 0) progress_update(&bar, done, "");
    }
    if (comm_rank() == 0) progress_end(&bar);
    if (rc == 0) rc = join_results(scores, (size_t)n * sizeof *scores, err);
    running_end(e);
    if (rc == 0) rc = model_unchanged(e->m, err);
    if (rc == 0 && e->ref_file) rc = model_unchanged(e->ref_file, err);
    call_free(&call);
    free(batch);
    return rc;
}

static int eval_hellaswag(Eval *e, Err *err) {
    Hellaswag h;
    work_begin(e);
    int rc = hellaswag_load(&h, run.hellaswag, run.limit, err);
    if (rc < 0) return rc;
    Task *task = xcalloc((size_t)h.n, sizeof *task);
    double (*scores)[4] = xcalloc((size_t)h.n, sizeof *scores);
    for (int i = 0; rc == 0 && i < h.n; i++) rc = encode_task(e, &task[i], &h.item[i], i, err);
    e->work.tokenizing = now_seconds() - e->work.began;
    if (rc == 0) rc = run_tasks(e, task, h.n, scores, err);
    if (rc == 0) {
        ChoiceScore score = {0};
        double sum = 0;                          // of all endings: moves with the slightest change of a score
        for (int i = 0; i < h.n; i++) {
            choice_add(&score, scores[i], h.item[i].chars, 4, h.item[i].label);
            for (int k = 0; k < 4; k++) sum += scores[i][k];
        }
        double acc = (double)score.right / score.n, norm = (double)score.right_norm / score.n;
        double acc_err = choice_stderr(score.n, score.right), norm_err = choice_stderr(score.n, score.right_norm);
        printf("hellaswag: %d tasks, 0-shot, %s%s\n", score.n,
               h.prepared ? "six-line text form (contexts not capitalized as lm-eval does)" :
                   "JSON lines, lm-eval's preprocessing",
               run.add_bos ? ", bos in front" : "");
        printf("  acc               %.4f +- %.4f\n  acc_norm          %.4f +- %.4f\n", acc, acc_err, norm, norm_err);
        log_begin(e, "hellaswag", run.hellaswag);
        jsonlog_str(e->log, "form", h.prepared ? "text" : "json");
        jsonlog_int(e->log, "tasks", score.n);
        jsonlog_num(e->log, "acc", acc);
        jsonlog_num(e->log, "acc_stderr", acc_err);
        jsonlog_num(e->log, "acc_norm", norm);
        jsonlog_num(e->log, "acc_norm_stderr", norm_err);
        jsonlog_num(e->log, "loglikelihood", sum);
        report_end(e);
    }
    for (int i = 0; i < h.n; i++)
        for (int k = 0; k < 4; k++) free(task[i].choice[k].whole);
    free(task);
    free(scores);
    hellaswag_free(&h);
    return rc;
}

// ---------------------------------------------------------------------------------------------
// The trainer's validation

// The windows of the loader in order, losses summed in double one after the other: the mean is that of the trainer's
// last validation, whatever the batch.
static int eval_validation(Eval *e, Err *err) {
    TokenData data;
    DataLoader dl;
    work_begin(e);
    int rc = token_data_load(&data, run.val_data, e->m->tokenizer, e->m->config.V, NULL, err);
    if (rc < 0) return rc;
    e->work.tokenizing = now_seconds() - e->work.began;
    Windows w = {0};
    rc = dataloader_init(&dl, &data, 1, e->M, false, 0, err);
    for (uint64_t k = 0; rc == 0 && k < dl.n_windows; k++) {
        size_t begin = (size_t)k * (size_t)e->M, left = data.n - 1 - begin;
        rc = add_window(&w, data.tokens + begin, left < (size_t)e->M ? (int)left : e->M, 0, err);
    }
    if (rc == 0) rc = run_windows(e, &w, "validation", err);
    if (rc == 0) {
        double sum = 0;
        for (size_t i = 0; i < w.scored; i++) sum += (double)w.loss[i];
        double loss = sum / (double)w.scored;
        uint64_t bits;
        memcpy(&bits, &loss, 8);
        printf("validation: %zu windows of %d, %zu tokens, batch %d\n", w.n, e->M, w.scored, e->B);
        printf("  loss              %.9f  (f32 %08x, f64 %016llx)\n  perplexity        %.4f\n", loss,
               f32_bits((float)loss), (unsigned long long)bits, exp(loss));
        log_begin(e, "validation", run.val_data);
        jsonlog_num(e->log, "val_loss", loss);
        char hex[32];
        snprintf(hex, sizeof hex, "%016llx", (unsigned long long)bits);
        jsonlog_str(e->log, "val_loss_bits", hex);
        jsonlog_num(e->log, "perplexity", exp(loss));
        jsonlog_int(e->log, "windows", (long long)w.n);
        jsonlog_int(e->log, "tokens", (long long)w.scored);
        report_distance(e, &w);
        report_end(e);
    }
    windows_free(&w);
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
    if (rc == 0) rc = load(e, 1, n, 1, false, err);
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

// The vocabularies of a model and its reference must be one, or a token is not the same in both.
static int check_reference(const Eval *e, Err *err) {
    const ModelFile *m = e->m, *r = e->ref_file;
    if (!run.wikitext && !run.text && !run.val_data)
        return err_set(err, E_USAGE, "--reference compares over --wikitext, --text or --val-data: give one of them");
    if (m->config.V != r->config.V)
        return err_set(err, E_USAGE, "--reference: %s has a vocabulary of %d tokens, %s one of %d: only models of the "
                                     "same vocabulary can be compared", m->path, m->config.V, r->path, r->config.V);
    if (m->tokenizer && r->tokenizer && tokenizer_hash(m->tokenizer) != tokenizer_hash(r->tokenizer))
        return err_set(err, E_USAGE, "--reference: %s (%s) and %s (%s) have different tokenizers, so their tokens are "
                                     "not the same: take the model that %s was made from", m->path,
                       tokenizer_name(m->tokenizer), r->path, tokenizer_name(r->tokenizer), m->path);
    if (r->config.max_T < e->M)
        fprintf(stderr, "%s: the reference was made for %d positions, fewer than the %d of --seq-len\n", program_name,
                r->config.max_T, e->M);
    return 0;
}

static int eval_all(Eval *e, Err *err) {
    ModelFile *m = e->m;
    bool text = run.wikitext || run.text || run.hellaswag;
    if (!text && !run.val_data && !run.tokens)
        return err_set(err, E_USAGE, "nothing to score: give --wikitext FILE, --hellaswag FILE, --text FILE, "
                                     "--val-data FILE or --tokens IDS");
    if (run.json && !text && !run.val_data)
        return err_set(err, E_USAGE, "--json is for scores, and --tokens has none; --logits-out keeps its logits");
    if (run.logits_out && !run.tokens) return err_set(err, E_USAGE, "--logits-out needs --tokens");
    if (run.tokens && comm_size() > 1)
        return err_set(err, E_USAGE, "--tokens is one sequence, which %d ranks cannot share: start eval without mpirun",
                       comm_size());
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
    int rc = e->ref_file ? check_reference(e, err) : 0;
    if (rc == 0 && run.peak) rc = measure_peak(e, err);
    if (rc == 0 && run.profile) rc = profile_begin(run.profile, comm_rank(), err);
    if (rc == 0 && run.tokens) rc = eval_tokens(e, err);
    if (rc == 0 && run.val_data) rc = eval_validation(e, err);
    if (rc == 0 && run.wikitext) rc = eval_wikitext(e, err);
    if (rc == 0 && run.text) rc = eval_text(e, err);
    if (rc == 0 && run.hellaswag) rc = eval_hellaswag(e, err);
    if (rc == 0 && run.profile) profile_print(stdout, 1, e->seconds);
    if (rc == 0 && run.profile) rc = profile_end(err);
    infer_free(e->s);
    infer_free(e->ref);
    return rc;
}

static const char *scheme_name(const ModelFile *m, bool as_float) {
    return quant_plan_is_none(&m->plan) || as_float ? "float " FLOATX_NAME : m->plan.name;
}

static int eval_models(const char *path, Err *err) {
    JsonLog log;
    ModelFile m, ref;
    int rc, flags = run.no_verify ? MODEL_NO_VERIFY : 0;
    char cache[1100];
    if (run.no_verify && run.served_cache)
        return err_set(err, E_USAGE, "--served-cache knows its model by the checksum: leave out --no-verify");
    char *settings = cli_json(options, N_OPTIONS);
    rc = comm_check_same("options", settings, err);
    free(settings);
    if (rc < 0) return rc;
    device_choose(comm_local_rank(), comm_local_size());
    if ((rc = device_init(run.device, run.threads ? run.threads : comm_default_threads(), err)) < 0) return rc;
    if ((rc = jsonlog_open(&log, comm_rank() == 0 ? run.json : NULL, true, err)) < 0) return rc;
    if ((rc = model_open_with(&m, path, flags, err)) < 0) return rc;
    if (run.reference && (rc = model_open_with(&ref, run.reference, flags, err)) < 0) return rc;
    size_t n = strlen(path);
    snprintf(cache, sizeof cache, "%.*s.served", (int)(n - (n > 1 && path[n - 1] == '/')), path);
    Eval e = {.path = path, .scheme = scheme_name(&m, run.as_float), .m = &m, .log = &log,
              .cache_path = run.served_cache ? cache : NULL};
    if (run.reference) {
        e.ref_file = &ref;
        e.ref_scheme = scheme_name(&ref, !ref.packed);
    }
    rc = eval_all(&e, err);
    if (jsonlog_close(&log) != 0 && rc == 0) rc = err_set(err, E_FAIL, "--json %s: results could not be written", run.json);
    model_close(&m);
    if (run.reference) model_close(&ref);
    if (rc == 0 && (fflush(stdout) != 0 || ferror(stdout)))
        rc = err_set(err, E_FAIL, "the results could not be written; is the disk full or the pipe closed?");
    return rc;
}

int main(int argc, char **argv) {
    program_name = "eval";
    Err err = {0};
    const char *model;
    static const char summary[] = "usage: eval MODEL [options]\n"
        "Scores a model. MODEL: a Hugging Face folder, a .gguf file, or a model.bin of this project.\n"
        "mpirun -np N eval MODEL ... shares the work among N ranks.";
    bool asks = false;
    for (int i = 1; i < argc; i++)
        asks = asks || !strcmp(argv[i], "--help") || !strcmp(argv[i], "-h") || !strcmp(argv[i], "--version");
    if (!asks && comm_init(&argc, &argv, &err) < 0) comm_die(&err);     // answers need no other ranks
    // One rank speaks for all.
    if (comm_rank() > 0 && !freopen("/dev/null", "w", stdout)) perror("/dev/null");
    if (cli_parse(options, N_OPTIONS, summary, &model, argc, argv, &err) < 0) comm_die(&err);
    if (!model) {
        err_set(&err, E_USAGE, "which model? usage: eval MODEL --wikitext FILE (--help lists all options)");
        comm_die(&err);
    }
    if (eval_models(model, &err) < 0 || comm_barrier(&err) < 0) comm_die(&err);
    comm_end();
    return 0;
}
