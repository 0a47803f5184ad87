// generate: continues a prompt.
//
//   ./generate run1/model-8da4w-32.bin --prompt "Once upon a time"
//
// The text goes to stdout as it is made, the figures to stderr: the columns of torchao's table of Llama speeds
// (tokens a second, memory bandwidth, peak memory, model size), and the prompt's own speed before them.
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "llmc/checkpoint.h"
#include "llmc/cli.h"
#include "llmc/device.h"
#include "llmc/infer.h"
#include "llmc/logger.h"
#include "llmc/rng.h"
#include "llmc/sampler.h"
#include "llmc/tokenizer.h"

static struct {
    const char *prompt, *prompt_file, *device, *json;
    int max_new, top_k, ctx, arithmetic, threads, prefill, runs, bench_prompt, bench_new, bos;
    int64_t seed;
    double temperature, top_p;
    bool ignore_eos, benchmark;
} run;

static const Option options[] = {
    // name              type        where             default  allowed           help
    {"--prompt",         OPT_STRING, &run.prompt,       NULL,    NULL,            "text to continue (default: none, the model begins on its own)"},
    {"--prompt-file",    OPT_STRING, &run.prompt_file,  NULL,    NULL,            "read the prompt from a file"},
    {"--max-new-tokens", OPT_INT,    &run.max_new,      "200",   "1..16777216",   "stop after so many tokens"},
    {"--temperature",    OPT_FLOAT,  &run.temperature,  "0.8",   "0..100",        "0: always the likeliest token"},
    {"--top-k",          OPT_INT,    &run.top_k,        "200",   "0..",           "draw from the k likeliest tokens (0: all)"},
    {"--top-p",          OPT_FLOAT,  &run.top_p,        "1",     "0..1",          "draw from the likeliest tokens that make up this probability"},
    {"--seed",           OPT_INT64,  &run.seed,         "1234",  "0..",           "the same seed gives the same text"},
    {"--ctx",            OPT_INT,    &run.ctx,          "0",     "0..1048576",    "context in tokens (0: what prompt and new tokens need, at most the model's)"},
    {"--bos",            OPT_ENUM,   &run.bos,          "auto",  "auto,yes,no",   "put the tokenizer's bos in front (auto: as its configuration says, else yes)"},
    {"--ignore-eos",     OPT_FLAG,   &run.ignore_eos,   "0",     NULL,            "go on after an end-of-text token"},
    {"--arithmetic",     OPT_ENUM,   &run.arithmetic,   "served", "trained,served", "codes unpacked as in training, or read packed by the fast kernels"},
    {"--device",         OPT_STRING, &run.device,       "auto",  NULL,            "auto (a GPU if there is one), cpu or cuda"},
    {"--threads",        OPT_INT,    &run.threads,      "0",     "0..4096",       "CPU threads (0: all cores)"},
    {"--prefill",        OPT_INT,    &run.prefill,      "512",   "1..65536",      "tokens of the prompt that are processed at a time"},
    {"--json",           OPT_STRING, &run.json,         NULL,    NULL,            "append the figures and the text to this file as a JSON line"},
    {"--benchmark",      OPT_FLAG,   &run.benchmark,    "0",     NULL,            "no text: time a fixed prompt and print result lines"},
    {"--runs",           OPT_INT,    &run.runs,         "5",     "1..1000",       "benchmark: timed runs, after one that does not count"},
    {"--bench-prompt",   OPT_INT,    &run.bench_prompt, "128",   "1..1048576",    "benchmark: tokens in the prompt"},
    {"--bench-new",      OPT_INT,    &run.bench_new,    "256",   "2..1048576",    "benchmark: new tokens"},
};
#define N_OPTIONS ((int)(sizeof options / sizeof *options))

// ---------------------------------------------------------------------------------------------
// Text out

// Bytes go out in whole UTF-8 characters: a token may end within one.
typedef struct { char pending[8]; size_t n; char *all; size_t len, room; } TextOut;

static size_t utf8_length(uint8_t lead) {
    return lead < 0xc0 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;   // stray bytes go out alone
}

static void text_emit(TextOut *t, const char *s, size_t n) {
    fwrite(s, 1, n, stdout);
    if (t->len + n + 1 > t->room) {
        t->room = 2 * (t->len + n + 1);
        t->all = realloc(t->all, t->room);
        if (!t->all) abort();
    }
    memcpy(t->all + t->len, s, n);
    t->len += n;
    t->all[t->len] = 0;
}

static void text_out(TextOut *t, const char *s, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (t->n > 0 && ((uint8_t)s[i] & 0xc0) != 0x80) {             // the character broke off
            text_emit(t, t->pending, t->n);
            t->n = 0;
        }
        t->pending[t->n++] = s[i];
        if (t->n >= utf8_length((uint8_t)t->pending[0])) {
            text_emit(t, t->pending, t->n);
            t->n = 0;
        }
    }
    fflush(stdout);
}

static void text_end(TextOut *t) {
    text_emit(t, t->pending, t->n);
    text_emit(t, "", 0);
    t->n = 0;
    fputc('\n', stdout);
    fflush(stdout);
}

// ---------------------------------------------------------------------------------------------
// Generation

typedef struct { double first_token, prefill, decode; int n_prompt, n_new, n_decoded; } Timing;   // seconds, tokens

static bool is_eos(const ModelFile *m, int token) {
    for (int i = 0; i < m->config.n_eos; i++)
        if (token == m->config.eos[i]) return true;
    return m->tokenizer && token == tokenizer_eos(m->tokenizer);
}

// Runs the prompt, then one token at a time. With `out` the text is streamed; eos ends it unless ignored.
static int generate(Infer *s, const ModelFile *m, const int32_t *prompt, int n_prompt, int max_new, bool ignore_eos,
                    float *logits,
                    TextOut *out, Timing *t, Err *err) {
    Sampler sampler = {(float)run.temperature, run.top_k, (float)run.top_p, (uint64_t)run.seed};
    double start = now_seconds();
    *t = (Timing){.n_prompt = n_prompt};
    infer_reset(s, 1);
    for (int i = 0; i < n_prompt; i += run.prefill) {
        int n = n_prompt - i < run.prefill ? n_prompt - i : run.prefill;
        int rc = infer_forward(s, prompt + i, NULL, n, i + n == n_prompt ? logits : NULL, NULL, err);
        if (rc < 0) return rc;
    }
    t->prefill = now_seconds() - start;
    double decode_start = 0;
    for (;;) {
        int32_t token = sample_token(&sampler, logits, m->config.V, (uint64_t)t->n_new);
        if (token < 0)
            return err_set(err, E_FAIL, "every logit after %d new tokens is NaN or -infinity: the weights are "
                                        "damaged, or the model overflows in %s", t->n_new, FLOATX_NAME);
        if (t->n_new == 0) {
            t->first_token = now_seconds() - start;
            decode_start = now_seconds();
        }
        if (!ignore_eos && is_eos(m, token)) break;
        t->n_new++;
        if (out && !tokenizer_is_special(m->tokenizer, token)) {
            size_t len;
            const char *piece = tokenizer_piece(m->tokenizer, token, t->n_new == 1 && out->len == 0, &len);
            text_out(out, piece, len);
        }
        if (t->n_new == max_new) break;
        int rc = infer_forward(s, &token, NULL, 1, logits, NULL, err);
        if (rc < 0) return rc;
        t->n_decoded++;
    }
    t->decode = now_seconds() - decode_start;
    return 0;
}

// ---------------------------------------------------------------------------------------------
// Figures

typedef struct { double prefill, decode, bandwidth, peak_gb, size_gb, first_token; } Figures;

// Bandwidth: bytes read for a token (its parameters, and the cache at its mean length) times tokens a second.
static Figures figures_of(const Infer *s, const Timing *t) {
    Figures f = {.first_token = t->first_token, .peak_gb = (double)peak_rss_bytes() / 1e9,
                 .size_gb = (double)infer_size_bytes(s) / 1e9};
    f.prefill = t->n_prompt / t->prefill;
    f.decode = t->n_decoded > 0 ? t->n_decoded / t->decode : NAN;
    double length = t->n_prompt + 0.5 * (t->n_decoded + 1);
    double bytes = (double)infer_bytes_per_token(s) + length * (double)infer_cache_bytes_per_position(s);
    f.bandwidth = f.decode * bytes / 1e9;
    return f;
}

static void print_table(const ModelFile *m, const Figures *f, const Timing *t) {
    fprintf(stderr, "\nprompt: %d tokens, %.1f tokens/s, first token after %.0f ms; %d new tokens\n", t->n_prompt,
            f->prefill,
            1e3 * f->first_token, t->n_new);
    fprintf(stderr, "| %-12s | %-13s | %-23s | %-16s | %-15s |\n", "Technique", "Tokens/Second",
            "Memory Bandwidth (GB/s)",
            "Peak Memory (GB)", "Model Size (GB)");
    fprintf(stderr, "| ------------ | ------------- | ----------------------- | ---------------- | --------------- "
                    "|\n");
    fprintf(stderr, "| %-12s | %13.2f | %23.2f | %16.3f | %15.4f |\n", quant_plan_is_none(&m->plan) ?
            "base " FLOATX_NAME : m->plan.name,
            f->decode, f->bandwidth, f->peak_gb, f->size_gb);
}

static void log_figures(JsonLog *log, const char *event, const char *model, const ModelFile *m, const Figures *f,
                        const Timing *t,
                        const char *prompt, const char *text) {
    jsonlog_begin(log, event);
    jsonlog_str(log, "model", model);
    jsonlog_str(log, "scheme", quant_plan_is_none(&m->plan) ? "none" : m->plan.name);
    jsonlog_str(log, "device", device_description());
    jsonlog_int(log, "prompt_tokens", t->n_prompt);
    jsonlog_int(log, "new_tokens", t->n_new);
    jsonlog_num(log, "prefill_tokens_per_s", f->prefill);
    jsonlog_num(log, "decode_tokens_per_s", f->decode);
    jsonlog_num(log, "bandwidth_gb_per_s", f->bandwidth);
    jsonlog_num(log, "peak_memory_gb", f->peak_gb);
    jsonlog_num(log, "model_size_gb", f->size_gb);
    jsonlog_num(log, "time_to_first_token_s", f->first_token);
    if (prompt) jsonlog_str(log, "prompt", prompt);
    if (text) jsonlog_str(log, "text", text);
    jsonlog_end(log);
}

// A fixed prompt of random ids, several runs: what `make bench` reports.
static int benchmark(Infer *s, const char *model, const ModelFile *m, float *logits, JsonLog *log, Err *err) {
    int32_t *prompt = xmalloc((size_t)run.bench_prompt * sizeof *prompt);
    for (int i = 0; i < run.bench_prompt; i++) prompt[i] = (int32_t)(philox(1, 0,
            (uint64_t)i).v[0] % (uint32_t)m->config.V);
    Figures sum = {0};
    Timing t;
    double slowest = INFINITY, fastest = 0;
    int rc = 0;
    for (int r = 0; rc == 0 && r <= run.runs; r++) {
        rc = generate(s, m, prompt, run.bench_prompt, run.bench_new, true, logits, NULL, &t, err);
        if (rc < 0 || r == 0) continue;          // the first run also builds the matmul primitives
        Figures f = figures_of(s, &t);
        sum.prefill += f.prefill / run.runs;
        sum.decode += f.decode / run.runs;
        sum.bandwidth += f.bandwidth / run.runs;
        sum.first_token += f.first_token / run.runs;
        sum.peak_gb = f.peak_gb;
        sum.size_gb = f.size_gb;
        slowest = f.decode < slowest ? f.decode : slowest;
        fastest = f.decode > fastest ? f.decode : fastest;
    }
    free(prompt);
    if (rc < 0) return rc;
    printf("# %s, %s, %s: prompt of %d, %d new tokens, mean of %d runs, decode %.2f to %.2f tokens/s\n", model,
           device_description(),
           quant_plan_is_none(&m->plan) ? FLOATX_NAME : m->plan.name, run.bench_prompt, run.bench_new, run.runs,
               slowest, fastest);
    printf("result generate_prefill %.2f tok/s\n", sum.prefill);
    printf("result generate_decode %.2f tok/s\n", sum.decode);
    printf("result generate_bandwidth %.3f GB/s\n", sum.bandwidth);
    printf("result generate_first_token %.2f ms\n", 1e3 * sum.first_token);
    printf("result generate_peak_memory %.4f GB\n", sum.peak_gb);
    printf("result generate_model_size %.4f GB\n", sum.size_gb);
    log_figures(log, "benchmark", model, m, &sum, &t, NULL, NULL);
    return 0;
}

// ---------------------------------------------------------------------------------------------
// The prompt

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

static int prompt_tokens(int32_t **ids, int *n, const ModelFile *m, const char *text, size_t len, Err *err) {
    if (!m->tokenizer)
        return err_set(err, E_MISSING, "%s carries no tokenizer, so a prompt cannot be read: put its tokenizer.json "
                                       "beside it", m->path);
    int32_t *body;
    size_t n_body;
    int bos = tokenizer_bos(m->tokenizer);
    bool with_bos = bos >= 0 && (wants_bos(m->tokenizer) || len == 0);
    if (len == 0 && bos < 0)
        return err_set(err, E_USAGE, "the prompt is empty and this model's tokenizer has no bos token to begin with; "
                                     "give --prompt TEXT");
    int rc = tokenizer_encode(m->tokenizer, text, len, true, &body, &n_body, err);
    if (rc < 0) return rc;
    // A prompt that spells bos out itself does not get a second one.
    if (n_body > 0 && body[0] == bos) with_bos = false;
    if (n_body > INT32_MAX - 1) {
        free(body);
        return err_set(err, E_USAGE, "the prompt has %zu tokens, which is more than any context holds", n_body);
    }
    *n = (int)n_body + with_bos;
    *ids = xmalloc(((size_t)*n + 1) * sizeof **ids);
    (*ids)[0] = bos;
    if (n_body) memcpy(*ids + with_bos, body, n_body * sizeof *body);
    free(body);
    return 0;
}

static int run_prompt(const char *model, ModelFile *m, Arithmetic arith, JsonLog *log, Err *err) {
    char *text = NULL;
    size_t len = 0;
    int rc = 0;
    if (run.prompt && run.prompt_file) return err_set(err, E_USAGE, "--prompt and --prompt-file exclude each other");
    if (run.prompt_file) rc = file_read(&text, &len, run.prompt_file, (size_t)1 << 28, err);
    else if (run.prompt) len = strlen(text = xstrdup(run.prompt));
    else text = xstrdup("");
    int32_t *prompt = NULL;
    int n_prompt = 0;
    if (rc == 0) rc = prompt_tokens(&prompt, &n_prompt, m, text, len, err);
    int64_t wanted = (int64_t)n_prompt + run.max_new, most = m->config.max_T;
    int ctx = run.ctx ? run.ctx : (int)(wanted < most ? wanted : most);
    if (rc == 0 && ctx > most)
        fprintf(stderr, "%s: --ctx %d is longer than the %lld positions this model was made for; quality will "
                        "suffer\n", program_name,
                ctx, (long long)most);
    if (rc == 0 && n_prompt >= ctx)
        rc = err_set(err, E_USAGE, "the prompt has %d tokens and the context %d: no room for a new one; shorten the "
                                   "prompt%s", n_prompt,
                     ctx, ctx < most ? " or raise --ctx" : "");
    Infer *s = NULL;
    TextOut out = {0};
    float *logits = xmalloc((size_t)m->config.V * sizeof *logits);
    if (rc == 0) rc = infer_new(&s, m, &(InferOptions){.B = 1, .max_T = ctx, .arith = arith,
                                     .max_N = run.prefill < n_prompt ? run.prefill : n_prompt}, err);
    if (rc == 0) {
        // The last new token needs no place in the cache.
        int room = ctx - n_prompt + 1, max_new = run.max_new < room ? run.max_new : room;
        Timing t;
        text_out(&out, text, len);
        rc = generate(s, m, prompt, n_prompt, max_new, run.ignore_eos, logits, &out, &t, err);
        text_end(&out);
        if (rc == 0) {
            if (t.n_new == room && room < run.max_new) fprintf(stderr, "%s: the context of %d tokens is full\n",
                                                               program_name, ctx);
            Figures f = figures_of(s, &t);
            print_table(m, &f, &t);
            log_figures(log, "generate", model, m, &f, &t, text, out.all + (len < out.len ? len : out.len));
        }
    }
    infer_free(s);
    free(out.all);
    free(logits);
    free(prompt);
    free(text);
    return rc;
}

static int run_benchmark(const char *model, ModelFile *m, Arithmetic arith, JsonLog *log, Err *err) {
    Infer *s = NULL;
    int most = run.bench_prompt < run.prefill ? run.bench_prompt : run.prefill;
    int rc = infer_new(&s, m, &(InferOptions){.B = 1, .max_T = run.bench_prompt + run.bench_new, .max_N = most,
                                                .arith = arith}, err);
    if (rc < 0) return rc;
    float *logits = xmalloc((size_t)m->config.V * sizeof *logits);
    rc = benchmark(s, model, m, logits, log, err);
    free(logits);
    infer_free(s);
    return rc;
}

int main(int argc, char **argv) {
    program_name = "generate";
    Err err = {0};
    const char *model;
    static const char summary[] = "usage: generate MODEL [options]\n"
        "Continues a prompt. MODEL: a Hugging Face folder, a .gguf file, or a model.bin of this project.";
    if (cli_parse(options, N_OPTIONS, summary, &model, argc, argv, &err) < 0) die(&err);
    if (!model) {
        err_set(&err, E_USAGE, "which model? usage: generate MODEL --prompt TEXT (--help lists all options)");
        die(&err);
    }
    JsonLog log;
    ModelFile m;
    Arithmetic arith = run.arithmetic == 0 ? ARITH_TRAINED : ARITH_SERVED;
    if (device_init(run.device, run.threads, &err) < 0 || jsonlog_open(&log, run.json, true, &err) < 0 ||
        model_open(&m, model, &err) < 0) die(&err);
    if ((run.benchmark ? run_benchmark : run_prompt)(model, &m, arith, &log, &err) < 0) die(&err);
    jsonlog_close(&log);
    model_close(&m);
    if (fflush(stdout) != 0) {
        err_set(&err, E_FAIL, "the output could not be written; is the disk full or the pipe closed?");
        die(&err);
    }
    return 0;
}
