// generate: continues a prompt, chats, and measures how fast it does.
//
//   ./generate run1/model-8da4w-32.bin --prompt "Once upon a time"
//   ./generate SmolLM2-135M-Instruct/ --chat --system "You are brief."
//   ./generate run1/model-8da4w-32.bin --benchmark
//
// The text goes to stdout as it is made, the figures to stderr: the columns of torchao's table of Llama speeds
// (tokens a second, memory bandwidth, peak memory, model size), and the prompt's own speed before them. With
// --format json stdout has one JSON line a result and nothing else.
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "llmc/chat.h"
#include "llmc/checkpoint.h"
#include "llmc/cli.h"
#include "llmc/device.h"
#include "llmc/infer.h"
#include "llmc/json.h"
#include "llmc/logger.h"
#include "llmc/rng.h"
#include "llmc/sampler.h"
#include "llmc/tokenizer.h"

#define CTX_OF_MANY 4096         // context of --chat and --stdin, whose length is not known before

static struct {
    const char *prompt, *prompt_file, *device, *json, *template, *system;
    int max_new, top_k, ctx, arithmetic, kv, format, threads, prefill, runs, bench_prompt, bench_new, bos;
    int64_t seed;
    double temperature, top_p;
    bool ignore_eos, benchmark, chat, many, no_verify, served_cache;
    StringList stop;
} run;

static const Option options[] = {
    // name              type        where              default  allowed          help
    {"--prompt",         OPT_STRING, &run.prompt,       NULL,    NULL,            "text to continue (default: none, the model begins on its own)"},
    {"--prompt-file",    OPT_STRING, &run.prompt_file,  NULL,    NULL,            "read the prompt from a file"},
    {"--stdin",          OPT_FLAG,   &run.many,         "0",     NULL,            "many prompts, a line each: text, or JSON with a \"prompt\" (with --chat also \"messages\")"},
    {"--chat",           OPT_FLAG,   &run.chat,         "0",     NULL,            "talk with the model in its chat template: --prompt asks once, else lines of stdin are turns"},
    {"--template",       OPT_STRING, &run.template,     NULL,    CHAT_BUILT_IN,   "--chat: instead of the model's own template"},
    {"--system",         OPT_STRING, &run.system,       NULL,    NULL,            "--chat: what the system message says"},
    {"--stop",           OPT_LIST,   &run.stop,         NULL,    NULL,            "end the text before this one"},
    {"--max-new-tokens", OPT_INT,    &run.max_new,      "200",   "1..16777216",   "stop after so many tokens"},
    {"--temperature",    OPT_FLOAT,  &run.temperature,  "0.8",   "0..100",        "0: always the likeliest token"},
    {"--top-k",          OPT_INT,    &run.top_k,        "200",   "0..",           "draw from the k likeliest tokens (0: all)"},
    {"--top-p",          OPT_FLOAT,  &run.top_p,        "1",     "0..1",          "draw from the likeliest tokens that make up this probability"},
    {"--seed",           OPT_INT64,  &run.seed,         "1234",  "0..",           "the same seed gives the same text"},
    {"--ctx",            OPT_INT,    &run.ctx,          "0",     "0..1048576",    "context in tokens (0: what prompt and new tokens need, at most the model's; 4096 where that is not known)"},
    {"--kv",             OPT_ENUM,   &run.kv,           "x",     "x,int8",        "what keys and values are kept in: the type of activations, or INT8 at half the memory"},
    {"--bos",            OPT_ENUM,   &run.bos,          "auto",  "auto,yes,no",   "put the tokenizer's bos in front (auto: as its configuration says, else yes; a chat template has its own)"},
    {"--ignore-eos",     OPT_FLAG,   &run.ignore_eos,   "0",     NULL,            "go on after an end-of-text token"},
    {"--arithmetic",     OPT_ENUM,   &run.arithmetic,   "served", "trained,served", "codes unpacked as in training, or read packed by the fast kernels"},
    {"--device",         OPT_STRING, &run.device,       "auto",  NULL,            "auto (a GPU if there is one), cpu or cuda"},
    {"--threads",        OPT_INT,    &run.threads,      "0",     "0..4096",       "CPU threads (0: all cores)"},
    {"--prefill",        OPT_INT,    &run.prefill,      "512",   "1..65536",      "tokens of the prompt that are processed at a time"},
    {"--served-cache",   OPT_FLAG,   &run.served_cache, "0",     NULL,            "keep the codes in the kernels' order in MODEL.served, so that the next start is faster"},
    {"--no-verify",      OPT_FLAG,   &run.no_verify,    "0",     NULL,            "do not compare a model.bin with its checksum"},
    {"--format",         OPT_ENUM,   &run.format,       "table", "table,json",    "results on stdout as text and tables, or as JSON lines"},
    {"--json",           OPT_STRING, &run.json,         NULL,    NULL,            "append the figures and the text to this file as a JSON line"},
    {"--benchmark",      OPT_FLAG,   &run.benchmark,    "0",     NULL,            "no text: time a fixed prompt and print result lines"},
    {"--runs",           OPT_INT,    &run.runs,         "5",     "1..1000",       "benchmark: timed runs, after one that does not count"},
    {"--bench-prompt",   OPT_INT,    &run.bench_prompt, "128",   "1..1048576",    "benchmark: tokens in the prompt"},
    {"--bench-new",      OPT_INT,    &run.bench_new,    "256",   "2..1048576",    "benchmark: new tokens"},
};
#define N_OPTIONS ((int)(sizeof options / sizeof *options))
enum { FORMAT_TABLE, FORMAT_JSON };

// Where results go: the file of --json, and stdout as JSON lines (a log without a file where that was not asked for).
static JsonLog logs[2];
static double started;           // when the process began

// ---------------------------------------------------------------------------------------------
// Text out

// What has been made, and how much of it is written: text waits while it may be the beginning of a stop string, or of a
// character of which the other bytes are still to come. begins: it continues no other text.
typedef struct { char *all; size_t len, room, sent; bool quiet, begins, stopped; } TextOut;

static void text_append(TextOut *t, const char *s, size_t n) {
    if (t->len + n + 1 > t->room) {
        t->room = 2 * (t->len + n + 1);
        t->all = realloc(t->all, t->room);
        if (!t->all) abort();
    }
    if (n) memcpy(t->all + t->len, s, n);
    t->len += n;
    t->all[t->len] = 0;
}

static void text_send(TextOut *t, size_t upto) {
    if (!t->quiet) fwrite(t->all + t->sent, 1, upto - t->sent, stdout);
    t->sent = upto;
    if (!t->quiet) fflush(stdout);
}

// Where the first stop string begins in what is not written yet; t->len: there is none.
static size_t find_stop(const TextOut *t) {
    size_t first = t->len;
    for (int i = 0; i < run.stop.n; i++) {
        size_t n = strlen(run.stop.item[i]);
        const char *p = memmem(t->all + t->sent, t->len - t->sent, run.stop.item[i], n);
        if (p && (size_t)(p - t->all) < first) first = (size_t)(p - t->all);
    }
    return first;
}

// How much of the text is a whole number of characters and cannot be part of a stop string.
static size_t safe_end(const TextOut *t) {
    size_t end = t->len;
    for (int i = 0; i < run.stop.n; i++) {
        size_t n = strlen(run.stop.item[i]) - 1, most = n < t->len - t->sent ? n : t->len - t->sent;
        for (size_t k = most; k > 0 && t->len - k < end; k--)
            if (memcmp(t->all + t->len - k, run.stop.item[i], k) == 0) end = t->len - k;
    }
    for (size_t back = 1; back <= 3 && back <= end - t->sent; back++) {
        uint8_t c = (uint8_t)t->all[end - back];
        if ((c & 0xc0) == 0x80) continue;                     // the lead byte is further in front
        size_t need = c < 0xc0 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
        return need > back ? end - back : end;
    }
    return end;
}

static void text_out(TextOut *t, const char *s, size_t n) {
    text_append(t, s, n);
    size_t stop = find_stop(t);
    if (stop < t->len) {
        t->stopped = true;
        t->len = stop;
        t->all[stop] = 0;
    }
    text_send(t, t->stopped ? t->len : safe_end(t));
}

static void text_end(TextOut *t) {
    text_append(t, "", 0);
    text_send(t, t->len);
    if (!t->quiet) fputc('\n', stdout);
    if (!t->quiet) fflush(stdout);
}

// The text from `begin` on as a C string of UTF-8 (malloc'ed): a model may end within a character, and says any byte.
// What is no character, and NUL, becomes U+FFFD.
static char *text_said(const TextOut *t, size_t begin) {
    static const char mark[] = "\xef\xbf\xbd";
    char *said = xmalloc(3 * (t->len - begin) + 1), *to = said;
    for (size_t i = begin; i < t->len; i++) {
        size_t good = utf8_valid_prefix(t->all + i, t->len - i);
        for (; good > 0; good--, i++) {
            if (t->all[i]) *to++ = t->all[i];
            else to = mempcpy(to, mark, 3);
        }
        if (i < t->len) to = mempcpy(to, mark, 3);
    }
    *to = 0;
    return said;
}

// ---------------------------------------------------------------------------------------------
// Generation

// A loaded model and what its cache holds.
typedef struct {
    const char *path;
    ModelFile *m;
    Infer *s;
    ChatTemplate *chat;
    int ctx, end_token;              // the chat template's, -1
    int32_t *cached;                 // (ctx) tokens in the cache
    float *logits;
    double ready, first_token;       // seconds since the process began
} Session;

typedef struct {
    double first_token, prefill, decode, total;                // seconds
    int n_prompt, n_cached, n_new, n_decoded;                  // tokens; n_cached of the prompt were there already
    const char *finish;                                        // "eos", "stop", "length", "context"
} Timing;

static const char *scheme_name(const ModelFile *m) {
    return quant_plan_is_none(&m->plan) ? "base " FLOATX_NAME : m->plan.name;
}

static bool is_end(const Session *g, int token) {
    const ModelFile *m = g->m;
    for (int i = 0; i < m->config.n_eos; i++)
        if (token == m->config.eos[i]) return true;
    return token == g->end_token || (m->tokenizer && token == tokenizer_eos(m->tokenizer));
}

static int nothing_to_choose(int n_new, Err *err) {
    return err_set(err, E_FAIL, "every logit after %d new tokens is NaN or -infinity: the weights are damaged, or the "
                                "model overflows in %s", n_new, FLOATX_NAME);
}

// Runs the prompt from its token `keep` on; those before it are in the cache.
static int prefill(Session *g, const int32_t *prompt, int n_prompt, int keep, Err *err) {
    if (keep > 0) infer_rewind(g->s, keep);
    else infer_reset(g->s, 1);
    for (int i = keep; i < n_prompt; i += run.prefill) {
        int n = n_prompt - i < run.prefill ? n_prompt - i : run.prefill;
        int rc = infer_forward(g->s, prompt + i, NULL, n, i + n == n_prompt ? g->logits : NULL, NULL, err);
        if (rc < 0) return rc;
    }
    memcpy(g->cached, prompt, (size_t)n_prompt * sizeof *prompt);
    return 0;
}

// Runs the prompt, then one token at a time. With `out` the text is streamed; eos ends it unless ignored.
static int generate(Session *g, const int32_t *prompt, int n_prompt, int keep, int max_new, bool ignore_eos,
                    TextOut *out, Timing *t, Err *err) {
    Sampler sampler = {(float)run.temperature, run.top_k, (float)run.top_p, (uint64_t)run.seed};
    double start = now_seconds();
    *t = (Timing){.n_prompt = n_prompt, .n_cached = keep, .finish = "length"};
    int rc = prefill(g, prompt, n_prompt, keep, err);
    if (rc < 0) return rc;
    t->prefill = now_seconds() - start;
    int32_t token = sample_token(&sampler, g->logits, g->m->config.V, 0);
    double decode_start = now_seconds();
    t->first_token = decode_start - start;
    if (g->first_token == 0) g->first_token = decode_start - started;
    for (;;) {
        if (token < 0) return nothing_to_choose(t->n_new, err);
        if (!ignore_eos && is_end(g, token)) {
            t->finish = "eos";
            break;
        }
        t->n_new++;
        if (out && !tokenizer_is_special(g->m->tokenizer, token)) {
            size_t len;
            const char *piece = tokenizer_piece(g->m->tokenizer, token, t->n_new == 1 && out->begins, &len);
            text_out(out, piece, len);
            if (out->stopped) {
                t->finish = "stop";
                break;
            }
        }
        if (t->n_new == max_new) break;
        g->cached[infer_position(g->s)] = token;
        rc = infer_next(g->s, &sampler, (uint64_t)t->n_new, &token, err);
        if (rc < 0) return rc;
        t->n_decoded++;
    }
    t->decode = now_seconds() - decode_start;
    t->total = now_seconds() - start;
    return 0;
}

// ---------------------------------------------------------------------------------------------
// Figures

typedef struct { double prefill, decode, whole, bandwidth, first_token, peak_gb, size_gb; } Figures;

// whole: torchao's tokens a second, new tokens over all the time, the prompt's included. bandwidth: bytes read for a
// decoded token (its parameters, and the cache at its mean length) times decoded tokens a second.
static Figures figures_of(const Session *g, const Timing *t) {
    double peak = device_is_host() ? (double)peak_rss_bytes() : (double)infer_memory_bytes(g->s);
    Figures f = {.first_token = t->first_token, .peak_gb = peak / 1e9, .size_gb = (double)infer_size_bytes(g->s) / 1e9};
    f.prefill = (t->n_prompt - t->n_cached) / t->prefill;
    f.decode = t->n_decoded > 0 ? t->n_decoded / t->decode : NAN;
    f.whole = t->n_new / t->total;
    double length = t->n_prompt + 0.5 * (t->n_decoded + 1);
    double bytes = (double)infer_bytes_per_token(g->s) + length * (double)infer_cache_bytes_per_position(g->s);
    f.bandwidth = f.decode * bytes / 1e9;
    return f;
}

static void print_row(FILE *out, const char *technique, double speed, double bandwidth, const Figures *f) {
    fprintf(out, "| %-12s | %-13s | %-23s | %-16s | %-15s |\n", "Technique", "Tokens/Second", "Memory Bandwidth (GB/s)",
            "Peak Memory (GB)", "Model Size (GB)");
    fprintf(out, "| ------------ | ------------- | ----------------------- | ---------------- | --------------- |\n");
    fprintf(out, "| %-12s | %13.2f | %23.2f | %16.3f | %15.4f |\n", technique, speed, bandwidth, f->peak_gb,
            f->size_gb);
}

static void log_begin(JsonLog *log, const char *event, const Session *g) {
    jsonlog_begin(log, event);
    jsonlog_str(log, "model", g->path);
    jsonlog_str(log, "scheme", quant_plan_is_none(&g->m->plan) ? "none" : g->m->plan.name);
    jsonlog_str(log, "device", device_description());
    jsonlog_str(log, "kv", run.kv ? "int8" : "x");
}

static void log_memory(JsonLog *log, const Session *g, const Figures *f) {
    jsonlog_num(log, "peak_memory_gb", f->peak_gb);
    jsonlog_num(log, "model_size_gb", f->size_gb);
    jsonlog_num(log, "time_to_first_token_s", f->first_token);
    jsonlog_num(log, "start_to_ready_s", g->ready);
    jsonlog_num(log, "start_to_first_token_s", g->first_token);
}

// index: of many prompts, from 1; 0: there is one.
static void log_text(const Session *g, const Figures *f, const Timing *t, int index, const char *prompt,
                     const char *text) {
    for (int i = 0; i < 2; i++) {
        JsonLog *log = &logs[i];
        log_begin(log, "generate", g);
        if (index) jsonlog_int(log, "index", index);
        jsonlog_int(log, "prompt_tokens", t->n_prompt);
        jsonlog_int(log, "cached_tokens", t->n_cached);
        jsonlog_int(log, "new_tokens", t->n_new);
        jsonlog_num(log, "prefill_tokens_per_s", f->prefill);
        jsonlog_num(log, "decode_tokens_per_s", f->decode);
        jsonlog_num(log, "bandwidth_gb_per_s", f->bandwidth);
        log_memory(log, g, f);
        jsonlog_str(log, "finish", t->finish);
        jsonlog_str(log, "prompt", prompt);
        jsonlog_str(log, "text", text);
        jsonlog_end(log);
    }
}

// ---------------------------------------------------------------------------------------------
// Benchmark: torchao's measurement of latency. A fixed prompt of random ids, a run that does not count (caches fill,
// matmuls are prepared), then --runs of them.

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

typedef struct { double min, median, max, mean; } Spread;

// Of one figure, `at` bytes within Figures.
static Spread spread_of(const Figures *f, size_t at) {
    double *v = xmalloc((size_t)run.runs * sizeof *v), sum = 0;
    for (int r = 0; r < run.runs; r++) {
        memcpy(&v[r], (const char *)&f[r] + at, sizeof *v);
        sum += v[r];
    }
    qsort(v, (size_t)run.runs, sizeof *v, by_value);
    int mid = run.runs / 2;
    Spread s = {v[0], run.runs % 2 ? v[mid] : 0.5 * (v[mid - 1] + v[mid]), v[run.runs - 1], sum / run.runs};
    free(v);
    return s;
}
#define SPREAD(figures, field) spread_of(figures, offsetof(Figures, field))

static void print_benchmark(const Session *g, const Figures *f) {
    Spread decode = SPREAD(f, decode), whole = SPREAD(f, whole), filled = SPREAD(f, prefill),
           bandwidth = SPREAD(f, bandwidth), first = SPREAD(f, first_token);
    const Figures *last = &f[run.runs - 1];
    printf("# %s, %s: prompt of %d, %d new tokens, %d runs\n", g->path, device_description(), run.bench_prompt,
           run.bench_new, run.runs);
    print_row(stdout, scheme_name(g->m), whole.mean, whole.mean * last->size_gb, last);
    printf("\nTokens/Second: new tokens over the time of a whole run, the prompt included (mean). Memory Bandwidth:\n"
           "that times Model Size. Both as torchao defines them. Apart:\n");
    printf("%-26s %10s %10s %10s\n", "tokens a second", "min", "median", "max");
    printf("%-26s %10.2f %10.2f %10.2f\n", "whole run (as torchao)", whole.min, whole.median, whole.max);
    printf("%-26s %10.2f %10.2f %10.2f\n", "decoding alone", decode.min, decode.median, decode.max);
    printf("%-26s %10.2f %10.2f %10.2f\n", "prompt alone (prefill)", filled.min, filled.median, filled.max);
    printf("decoding reads %.2f GB/s, parameters and cache\n", bandwidth.median);
    printf("start-up: model ready after %.0f ms, first token after %.0f ms\n\n", 1e3 * g->ready, 1e3 * g->first_token);
    printf("result generate_prefill %.2f tok/s\n", filled.median);
    printf("result generate_decode %.2f tok/s\n", decode.median);
    printf("result generate_decode_min %.2f tok/s\n", decode.min);
    printf("result generate_decode_max %.2f tok/s\n", decode.max);
    printf("result generate_whole %.2f tok/s\n", whole.mean);
    printf("result generate_bandwidth %.3f GB/s\n", bandwidth.median);
    printf("result generate_bandwidth_max %.3f GB/s\n", bandwidth.max);
    printf("result generate_first_token %.2f ms\n", 1e3 * first.median);
    printf("result generate_start_ready %.2f ms\n", 1e3 * g->ready);
    printf("result generate_start_first_token %.2f ms\n", 1e3 * g->first_token);
    printf("result generate_peak_memory %.4f GB\n", last->peak_gb);
    printf("result generate_model_size %.4f GB\n", last->size_gb);
}

static void log_spread(JsonLog *log, const char *name, Spread s) {
    char key[64];
    snprintf(key, sizeof key, "%s_tokens_per_s", name);
    jsonlog_num(log, key, s.median);
    snprintf(key, sizeof key, "%s_tokens_per_s_min", name);
    jsonlog_num(log, key, s.min);
    snprintf(key, sizeof key, "%s_tokens_per_s_max", name);
    jsonlog_num(log, key, s.max);
}

static void log_benchmark(const Session *g, const Figures *f) {
    const Figures *last = &f[run.runs - 1];
    for (int i = 0; i < 2; i++) {
        JsonLog *log = &logs[i];
        log_begin(log, "benchmark", g);
        jsonlog_int(log, "prompt_tokens", run.bench_prompt);
        jsonlog_int(log, "new_tokens", run.bench_new);
        jsonlog_int(log, "runs", run.runs);
        log_spread(log, "prefill", SPREAD(f, prefill));
        log_spread(log, "decode", SPREAD(f, decode));
        log_spread(log, "whole", SPREAD(f, whole));
        jsonlog_num(log, "torchao_tokens_per_s", SPREAD(f, whole).mean);
        jsonlog_num(log, "torchao_bandwidth_gb_per_s", SPREAD(f, whole).mean * last->size_gb);
        jsonlog_num(log, "bandwidth_gb_per_s", SPREAD(f, bandwidth).median);
        log_memory(log, g, last);
        jsonlog_end(log);
    }
}

static int benchmark(Session *g, Err *err) {
    int32_t *prompt = xmalloc((size_t)run.bench_prompt * sizeof *prompt);
    for (int i = 0; i < run.bench_prompt; i++)
        prompt[i] = (int32_t)(philox(1, 0, (uint64_t)i).v[0] % (uint32_t)g->m->config.V);
    Figures *f = xcalloc((size_t)run.runs, sizeof *f);
    int rc = 0;
    for (int r = -1; rc == 0 && r < run.runs; r++) {
        Timing t;
        rc = generate(g, prompt, run.bench_prompt, 0, run.bench_new, true, NULL, &t, err);
        if (rc == 0 && r >= 0) f[r] = figures_of(g, &t);
    }
    if (rc == 0) {
        if (run.format == FORMAT_TABLE) print_benchmark(g, f);
        log_benchmark(g, f);
    }
    free(f);
    free(prompt);
    return rc;
}

// ---------------------------------------------------------------------------------------------
// Prompts

// Whether texts of this model begin with bos: tokenizer_config.json says so for some; the others' do where they have
// one.
static bool wants_bos(const Tokenizer *tok) {
    if (run.bos > 0) return run.bos == 1;
    char *config = tokenizer_config_json(tok);
    const char *key = config ? strstr(config, "\"add_bos_token\"") : NULL;
    const char *colon = key ? strchr(key, ':') : NULL;
    bool no = colon && strncmp(colon + 1 + strspn(colon + 1, " \t\n"), "false", 5) == 0;
    free(config);
    return !no;
}

static int check_text(const char *what, const char *text, size_t len, Err *err) {
    size_t good = utf8_valid_prefix(text, len);
    const char *nul = memchr(text, 0, good);
    if (nul) return err_set(err, E_USAGE, "%s has a NUL at byte %zu: it is no text", what, (size_t)(nul - text));
    if (good < len)
        return err_set(err, E_USAGE, "%s is not valid UTF-8: byte %zu is 0x%02x; convert it (iconv -t UTF-8)", what,
                       good, (unsigned)(uint8_t)text[good]);
    return 0;
}

typedef struct { int32_t *ids; int n; } Tokens;

static int encode(Tokens *out, const ModelFile *m, const char *text, size_t len, bool bos_first, Err *err) {
    int32_t *body;
    size_t n;
    int rc = tokenizer_encode(m->tokenizer, text, len, true, &body, &n, err);
    if (rc < 0) return rc;
    int bos = tokenizer_bos(m->tokenizer);
    int last = m->config.V - 1;
    for (size_t i = 0; i < n; i++) {
        if (body[i] <= last) continue;
        rc = err_set(err, E_FORMAT, "token %zu of the prompt is %d, but the model has ids 0 to %d: its tokenizer is another "
                                    "model's, or has tokens added that were never trained", i, body[i], last);
        free(body);
        return rc;
    }
    if (bos > last) bos = -1;
    // A prompt that spells bos out itself does not get a second one.
    if (bos < 0 || (n > 0 && body[0] == bos)) bos_first = false;
    if (n > INT32_MAX - 1) {
        free(body);
        return err_set(err, E_USAGE, "the prompt has %zu tokens, which is more than any context holds", n);
    }
    out->n = (int)n + bos_first;
    out->ids = xmalloc(((size_t)out->n + 1) * sizeof *out->ids);
    out->ids[0] = bos;
    if (n) memcpy(out->ids + bos_first, body, n * sizeof *body);
    free(body);
    if (out->n == 0) return err_set(err, E_USAGE, "the prompt has no tokens: there is nothing to continue");
    return 0;
}

// A text to continue; NULL: none, the model begins on its own.
static int plain_tokens(Tokens *out, const ModelFile *m, const char *text, size_t len, Err *err) {
    if (text && len == 0)
        return err_set(err, E_USAGE, "the prompt is empty: there is nothing to continue; leave it out, and the model "
                                     "begins on its own");
    if (!text && tokenizer_bos(m->tokenizer) < 0)
        return err_set(err, E_USAGE, "there is no prompt, and this model's tokenizer has no bos token to begin with; "
                                     "give --prompt TEXT");
    int rc = text ? check_text("the prompt", text, len, err) : 0;
    return rc < 0 ? rc : encode(out, m, text ? text : "", len, !text || wants_bos(m->tokenizer), err);
}

// What was said so far.
typedef struct { ChatMessage *m; int n, room; } Conversation;

static void say(Conversation *c, const char *role, const char *content) {
    if (c->n == c->room) {
        c->room = 2 * c->room + 8;
        c->m = realloc(c->m, (size_t)c->room * sizeof *c->m);
        if (!c->m) abort();
    }
    c->m[c->n++] = (ChatMessage){xstrdup(role), xstrdup(content)};
}

static void conversation_begin(Conversation *c) {
    *c = (Conversation){0};
    if (run.system) say(c, "system", run.system);
}

static void conversation_end(Conversation *c) {
    for (int i = 0; i < c->n; i++) {
        free((void *)(uintptr_t)c->m[i].role);
        free((void *)(uintptr_t)c->m[i].content);
    }
    free(c->m);
}

static int chat_tokens(Tokens *out, const Session *g, const Conversation *c, Err *err) {
    char *text;
    size_t len;
    int rc = 0;
    for (int i = 0; rc == 0 && i < c->n; i++)
        rc = check_text(c->m[i].role, c->m[i].content, strlen(c->m[i].content), err);
    if (rc == 0) rc = chat_render(g->chat, c->m, c->n, true, &text, &len, err);
    if (rc < 0) return rc;
    rc = encode(out, g->m, text, len, run.bos == 1, err);
    free(text);
    return rc;
}

// ---------------------------------------------------------------------------------------------
// Sessions

static int session_open(Session *g, int ctx, int most, Err *err) {
    char cache[1100];
    Err unkept;
    int64_t trained = g->m->config.max_T;
    if (ctx > trained)
        fprintf(stderr, "%s: --ctx %d is longer than the %lld positions this model was made for; quality will suffer\n",
                program_name, ctx, (long long)trained);
    size_t n = strlen(g->path);                      // a folder may have been given as DIR/
    snprintf(cache, sizeof cache, "%.*s.served", (int)(n - (n > 1 && g->path[n - 1] == '/')), g->path);
    g->ctx = ctx;
    InferOptions o = {.B = 1, .max_T = ctx, .max_N = run.prefill < most ? run.prefill : most,
                      .arith = run.arithmetic == 0 ? ARITH_TRAINED : ARITH_SERVED, .kv = run.kv ? KV_INT8 : KV_X,
                      .cache_path = run.served_cache ? cache : NULL, .cache_err = &unkept};
    int rc = infer_new(&g->s, g->m, &o, err);
    if (rc < 0) return rc;
    if (unkept.text[0]) fprintf(stderr, "%s: not kept: %s\n", program_name, unkept.text);
    g->cached = xmalloc((size_t)ctx * sizeof *g->cached);
    g->logits = xmalloc((size_t)g->m->config.V * sizeof *g->logits);
    g->ready = now_seconds() - started;
    return 0;
}

static void session_close(Session *g) {
    infer_free(g->s);
    chat_template_close(g->chat);
    free(g->cached);
    free(g->logits);
}

static int check_room(int n_prompt, int ctx, int64_t most, Err *err) {
    if (n_prompt <= ctx) return 0;           // the last new token needs no place in the cache
    return err_set(err, E_USAGE, "the prompt has %d tokens and the context %d: no room for a new one; shorten the "
                                 "prompt%s", n_prompt, ctx, ctx < most ? " or raise --ctx" : "");
}

// Continues the prompt, whose first `keep` tokens are in the cache, as far as the context goes.
static int answer(Session *g, const Tokens *prompt, int keep, TextOut *out, Timing *t, Err *err) {
    int room = g->ctx - prompt->n + 1, max_new = run.max_new < room ? run.max_new : room;
    int rc = generate(g, prompt->ids, prompt->n, keep, max_new, run.ignore_eos, out, t, err);
    text_end(out);
    if (rc == 0 && t->n_new == room && room < run.max_new && strcmp(t->finish, "length") == 0) {
        t->finish = "context";
        fprintf(stderr, "%s: the context of %d tokens is full\n", program_name, g->ctx);
    }
    return rc;
}

// ---------------------------------------------------------------------------------------------
// One prompt

static int read_prompt(char **text, size_t *len, Err *err) {
    *text = NULL;
    *len = 0;
    if (run.prompt && run.prompt_file) return err_set(err, E_USAGE, "--prompt and --prompt-file exclude each other");
    if (run.prompt_file) return file_read(text, len, run.prompt_file, (size_t)1 << 28, err);
    if (run.prompt) *len = strlen(*text = xstrdup(run.prompt));
    return 0;
}

static int run_prompt(Session *g, Err *err) {
    char *text;
    size_t len;
    Tokens prompt = {0};
    Conversation c = {0};
    TextOut out = {.quiet = run.format == FORMAT_JSON};
    Timing t;
    int rc = read_prompt(&text, &len, err);
    out.begins = g->chat || !text;
    if (rc == 0 && g->chat) {
        if (len) rc = check_text("the prompt", text, len, err);
        else rc = err_set(err, E_USAGE, "the prompt is empty: ask something");
        conversation_begin(&c);
        if (rc == 0) say(&c, "user", text);
        if (rc == 0) rc = chat_tokens(&prompt, g, &c, err);
    } else if (rc == 0) rc = plain_tokens(&prompt, g->m, text, len, err);
    int64_t wanted = (int64_t)prompt.n + run.max_new, most = g->m->config.max_T;
    int ctx = run.ctx ? run.ctx : (int)(wanted < most ? wanted : most);
    if (rc == 0) rc = check_room(prompt.n, ctx, most, err);
    if (rc == 0) rc = session_open(g, ctx, prompt.n, err);
    if (rc == 0) {
        if (!g->chat && len) {                       // what is continued is shown in front
            text_append(&out, text, len);
            text_send(&out, len);
        }
        size_t begin = out.len;
        rc = answer(g, &prompt, 0, &out, &t, err);
        if (rc == 0) {
            Figures f = figures_of(g, &t);
            if (run.format == FORMAT_TABLE) {
                fprintf(stderr, "\nprompt: %d tokens, %.1f tokens/s, first token after %.0f ms; %d new tokens\n",
                        t.n_prompt, f.prefill, 1e3 * f.first_token, t.n_new);
                print_row(stderr, scheme_name(g->m), f.decode, f.bandwidth, &f);
            }
            char *said = text_said(&out, begin);
            log_text(g, &f, &t, 0, text, said);
            free(said);
        }
    }
    conversation_end(&c);
    free(out.all);
    free(prompt.ids);
    free(text);
    return rc;
}

// ---------------------------------------------------------------------------------------------
// Lines of stdin: turns of a conversation, or prompts that have nothing to do with each other

// The next line without its end; false when there is none.
static bool read_line(char **line, size_t *room, size_t *len) {
    ssize_t n = getline(line, room, stdin);
    if (n < 0) return false;
    while (n > 0 && ((*line)[n - 1] == '\n' || (*line)[n - 1] == '\r')) n--;
    (*line)[n] = 0;
    *len = (size_t)n;
    return true;
}

// Why there are no more lines: the end of stdin, or an error of reading it.
static int lines_ended(Err *err) {
    return feof(stdin) ? 0 : err_set(err, E_FAIL, "stdin cannot be read: %s", strerror(errno));
}

static int open_for_many(Session *g, Err *err) {
    int most = (int)(g->m->config.max_T < CTX_OF_MANY ? g->m->config.max_T : CTX_OF_MANY);
    return session_open(g, run.ctx ? run.ctx : most, run.ctx ? run.ctx : most, err);
}

// One turn. Tokens that the cache holds already, which is all that was said before if the template spells it as the
// model did, are not run again.
static int turn(Session *g, Conversation *c, Err *err) {
    Tokens prompt = {0};
    TextOut out = {.quiet = run.format == FORMAT_JSON, .begins = true};
    Timing t;
    int keep = 0, rc = chat_tokens(&prompt, g, c, err);
    if (rc == 0) rc = check_room(prompt.n, g->ctx, g->m->config.max_T, err);
    if (rc == 0) {
        int had = infer_position(g->s);
        while (keep < had && keep < prompt.n - 1 && g->cached[keep] == prompt.ids[keep]) keep++;
        rc = answer(g, &prompt, keep, &out, &t, err);
    }
    if (rc == 0) {
        Figures f = figures_of(g, &t);
        char *said = text_said(&out, 0);
        log_text(g, &f, &t, 0, c->m[c->n - 1].content, said);
        say(c, "assistant", said);
        free(said);
    }
    free(out.all);
    free(prompt.ids);
    return rc;
}

static int run_chat(Session *g, Err *err) {
    Conversation c;
    char *line = NULL;
    size_t room = 0, len;
    bool person = isatty(STDIN_FILENO);
    conversation_begin(&c);
    int rc = open_for_many(g, err);
    while (rc == 0) {
        if (person) fprintf(stderr, "> ");
        if (!read_line(&line, &room, &len)) {
            rc = lines_ended(err);
            break;
        }
        if (len == 0) continue;
        rc = check_text("this line", line, len, err);
        if (rc == 0) {
            say(&c, "user", line);
            rc = turn(g, &c, err);
        }
    }
    if (person) fputc('\n', stderr);
    free(line);
    conversation_end(&c);
    return rc;
}

// {"role": ..., "content": ...} in a list. --system is put in front of those that do not begin with a system message.
static int read_messages(Conversation *c, const cJSON *list, Err *err) {
    const cJSON *k;
    if (!cJSON_IsArray(list)) return err_set(err, E_USAGE, "\"messages\" is not a list");
    const char *begins = json_string(cJSON_GetArrayItem(list, 0), "role");
    if (run.system && begins && strcmp(begins, "system") != 0) say(c, "system", run.system);
    cJSON_ArrayForEach(k, list) {
        const char *role = json_string(k, "role"), *content = json_string(k, "content");
        if (!role || !content)
            return err_set(err, E_USAGE, "a message without a \"role\" and a \"content\" that are strings");
        say(c, role, content);
    }
    return c->n ? 0 : err_set(err, E_USAGE, "\"messages\" is empty");
}

// The prompt of a line: its tokens, and the text that is shown and logged (malloc'ed).
static int line_prompt(Tokens *prompt, char **shown, const Session *g, const char *line, size_t len, Err *err) {
    cJSON *json = NULL;
    Conversation c = {0};
    int rc = len ? check_text("the line", line, len, err) : err_set(err, E_USAGE, "the prompt is empty");
    if (rc == 0 && line[0] == '{' && !(json = json_parse(line, len, "the line", err))) rc = E_FORMAT;
    const cJSON *messages = json ? cJSON_GetObjectItemCaseSensitive(json, "messages") : NULL;
    if (rc == 0 && messages && !g->chat) rc = err_set(err, E_USAGE, "\"messages\" are for --chat");
    const char *text = json ? json_string(json, "prompt") : line;
    if (rc == 0 && !messages && (!text || !*text))
        rc = err_set(err, E_USAGE, "%s", text ? "the prompt is empty" : "the JSON has no string \"prompt\"");
    if (rc == 0 && messages) rc = read_messages(&c, messages, err);
    else if (rc == 0 && g->chat) {
        conversation_begin(&c);
        say(&c, "user", text);
    }
    if (rc == 0) rc = g->chat ? chat_tokens(prompt, g, &c, err) : plain_tokens(prompt, g->m, text, strlen(text), err);
    if (rc == 0) rc = check_room(prompt->n, g->ctx, g->m->config.max_T, err);
    if (rc == 0) *shown = xstrdup(messages ? c.m[c.n - 1].content : text);
    conversation_end(&c);
    cJSON_Delete(json);
    return rc;
}

static void report_refused(int index, const Err *why) {
    for (int i = 0; i < 2; i++) {
        jsonlog_begin(&logs[i], "refused");
        jsonlog_int(&logs[i], "index", index);
        jsonlog_str(&logs[i], "error", why->text);
        jsonlog_end(&logs[i]);
    }
    fprintf(stderr, "%s: line %d: %s\n", program_name, index, why->text);
}

// A prompt that is refused does not keep the others from their answers; the status tells at the end.
static int run_many(Session *g, Err *err) {
    char *line = NULL;
    size_t room = 0, len;
    int refused = 0, first_code = 0, first_line = 0;
    int rc = open_for_many(g, err);
    for (int index = 1; rc == 0; index++) {
        if (!read_line(&line, &room, &len)) {
            rc = lines_ended(err);
            break;
        }
        Tokens prompt = {0};
        TextOut out = {.quiet = run.format == FORMAT_JSON, .begins = g->chat != NULL};
        Timing t;
        Err why = {0};
        char *text = NULL;
        int code = line_prompt(&prompt, &text, g, line, len, &why);
        if (code < 0) {
            report_refused(index, &why);
            if (refused++ == 0) { first_code = code; first_line = index; }
        } else {
            if (run.format == FORMAT_TABLE) printf("--- %d: %s\n", index, text);
            rc = answer(g, &prompt, 0, &out, &t, err);
            if (rc == 0) {
                Figures f = figures_of(g, &t);
                char *said = text_said(&out, 0);
                log_text(g, &f, &t, index, text, said);
                free(said);
            }
        }
        free(text);
        free(out.all);
        free(prompt.ids);
    }
    free(line);
    if (rc == 0 && refused)
        rc = err_set(err, first_code, "%d prompts were refused, the first in line %d", refused, first_line);
    return rc;
}

// ---------------------------------------------------------------------------------------------

static int check_options(Err *err) {
    if (run.no_verify && run.served_cache)
        return err_set(err, E_USAGE, "--served-cache knows its model by the checksum: leave out --no-verify");
    bool prompt = run.prompt || run.prompt_file;
    if (run.many && prompt)
        return err_set(err, E_USAGE, "--stdin reads the prompts: give no --prompt or --prompt-file with it");
    if (run.benchmark && (run.many || run.chat || prompt))
        return err_set(err, E_USAGE, "--benchmark has a prompt of its own: give no --prompt, --prompt-file, --stdin or "
                                     "--chat with it");
    if (run.benchmark && (run.ctx || run.ignore_eos || run.stop.n))
        return err_set(err, E_USAGE, "--benchmark runs --bench-prompt and --bench-new tokens, whatever they are: leave out "
                                     "--ctx, --ignore-eos and --stop");
    if (!run.chat && (run.template || run.system))
        return err_set(err, E_USAGE, "%s is for --chat", run.template ? "--template" : "--system");
    for (int i = 0; i < run.stop.n; i++) {
        if (!run.stop.item[i][0])
            return err_set(err, E_USAGE, "--stop \"\": every text begins with that; give the text to stop at");
        int rc = check_text("--stop", run.stop.item[i], strlen(run.stop.item[i]), err);
        if (rc < 0) return rc;
    }
    return run.system ? check_text("--system", run.system, strlen(run.system), err) : 0;
}

static int run_session(Session *g, Err *err) {
    if (run.benchmark) {
        int rc = session_open(g, run.bench_prompt + run.bench_new, run.bench_prompt, err);
        return rc < 0 ? rc : benchmark(g, err);
    }
    if (!g->m->tokenizer)
        return err_set(err, E_MISSING, "%s carries no tokenizer, so %s cannot be read: put its tokenizer.json beside "
                                       "it", g->m->path, run.chat ? "a conversation" : "a prompt");
    if (run.chat) {
        int rc = chat_template_open(&g->chat, g->m->tokenizer, run.template, err);
        if (rc < 0) return rc;
        g->end_token = chat_end_token(g->chat, g->m->tokenizer);
    }
    if (run.many) return run_many(g, err);
    if (run.chat && !run.prompt && !run.prompt_file) return run_chat(g, err);
    return run_prompt(g, err);
}

int main(int argc, char **argv) {
    // What the loader took before main is seen in the processor's time.
    started = now_seconds() - (double)clock() / CLOCKS_PER_SEC;
    program_name = "generate";
    Err err = {0};
    const char *model;
    static const char summary[] = "usage: generate MODEL [options]\n"
        "Continues a prompt, or chats. MODEL: a Hugging Face folder, a .gguf file, or a model.bin of this project.";
    if (cli_parse(options, N_OPTIONS, summary, &model, argc, argv, &err) < 0) die(&err);
    if (!model) {
        err_set(&err, E_USAGE, "which model? usage: generate MODEL --prompt TEXT (--help lists all options)");
        die(&err);
    }
    ModelFile m;
    Session g = {.path = model, .m = &m, .end_token = -1};
    if (check_options(&err) < 0 || device_init(run.device, run.threads, &err) < 0 ||
        jsonlog_open(&logs[0], run.json, true, &err) < 0 ||
        model_open_with(&m, model, run.no_verify ? MODEL_NO_VERIFY : 0, &err) < 0) die(&err);
    if (run.format == FORMAT_JSON) logs[1].f = stdout;
    int rc = run_session(&g, &err);
    if ((fflush(stdout) != 0 || ferror(stdout)) && rc == 0)
        rc = err_set(&err, E_FAIL, "the output could not be written; is the disk full or the pipe closed?");
    if (jsonlog_close(&logs[0]) != 0 && rc == 0)
        rc = err_set(&err, E_FAIL, "--json %s: results could not be written", run.json);
    if (rc < 0) die(&err);
    session_close(&g);
    model_close(&m);
    return 0;
}
