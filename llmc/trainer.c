#include "trainer.h"
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "device.h"
#include "json.h"
#include "safetensors.h"

// ---------------------------------------------------------------------------------------------
// Signals

static volatile sig_atomic_t caught;

static void on_signal(int sig) {
    if (caught) _exit(128 + sig);
    caught = sig;
}

void trainer_catch_signals(void) {
    struct sigaction sa = {.sa_handler = on_signal};
    sigemptyset(&sa.sa_mask);
    sigaction(SIGINT, &sa, NULL);
    sigaction(SIGTERM, &sa, NULL);
    sigaction(SIGUSR1, &sa, NULL);
}

int trainer_signal(void) { return caught; }

// ---------------------------------------------------------------------------------------------
// Memory plan

int memory_plan_print(double *planned, const MemoryItem *items, int n, int B, FILE *out, Err *err) {
    double fixed = 0, per_sequence = 0;
    char buf[32];
    fprintf(out, "memory plan\n");
    for (int i = 0; i < n; i++) {
        double bytes = items[i].fixed + items[i].per_sequence * B;
        fixed += items[i].fixed;
        per_sequence += items[i].per_sequence;
        fprintf(out, "  %-44s %12s\n", items[i].what, fmt_bytes(buf, bytes));
    }
    double total = fixed + per_sequence * B, available, all;
    device_memory(&available, &all);
    available *= 0.97;                 // for the operations' own working memory, and pages that end unused
    double largest = per_sequence > 0 ? fmax(0, floor((available - fixed) / per_sequence)) : 0;
    fprintf(out, "  %-44s %12s", "total", fmt_bytes(buf, total));
    fprintf(out, " of %s; a sequence costs", fmt_bytes(buf, all));
    fprintf(out, " %s, the largest batch that fits is %.0f\n", fmt_bytes(buf, per_sequence), largest);
    *planned = total;
    if (total <= available) return 0;
    char need[32], have[32];
    fmt_bytes(need, total);
    fmt_bytes(have, available);
    if (largest < 1)
        return err_set(err, E_NOMEM, "the memory plan needs %s and %s are available, too little for one sequence: use a "
                                     "smaller model, a shorter --seq-len or --recompute block", need, have);
    return err_set(err, E_NOMEM, "the memory plan needs %s and %s are available: the largest batch that fits is --batch "
                                 "%.0f; or use --recompute block", need, have, largest);
}

// ---------------------------------------------------------------------------------------------
// Step line

void steplog_print(StepLog *log, const StepReport *r, bool show) {
    double tok_s = (double)r->tokens / r->seconds, flops = tok_s * log->flops_per_token;
    // The first step also builds the matmul primitives; it does not enter the average.
    if (r->step > 1) log->ema_seconds = log->ema_seconds > 0 ? 0.9 * log->ema_seconds + 0.1 * r->seconds : r->seconds;
    double left = (log->steps - r->step) * (log->ema_seconds > 0 ? log->ema_seconds : r->seconds);
    if (show) {
        char rate[32], time[32], mem[32], util[48] = "mfu n/a";
        if (log->peak > 0) snprintf(util, sizeof util, "%.1f%% of peak", 100 * flops / log->peak);
        double used = (double)peak_rss_bytes(), available, all;
        if (!device_is_host()) {
            device_memory(&available, &all);
            used = all - available;
        }
        printf("step %5d/%d | loss %.4f | norm %.3f | lr %.2e | %.1f ms | %s tok/s | %s | mem %s | left %s%s\n",
               r->step, log->steps, r->loss, r->norm, r->lr, 1e3 * r->seconds, fmt_count(rate, tok_s), util,
               fmt_bytes(mem, used), fmt_time(time, left),
               r->skipped ? " | SKIPPED: not finite" : "");
        fflush(stdout);
    }
    jsonlog_begin(log->json, "step");
    jsonlog_int(log->json, "step", r->step);
    jsonlog_num(log->json, "loss", r->loss);
    jsonlog_num(log->json, "norm", r->norm);
    jsonlog_num(log->json, "lr", r->lr);
    jsonlog_num(log->json, "ms", 1e3 * r->seconds);
    jsonlog_num(log->json, "tok_per_s", tok_s);
    jsonlog_int(log->json, "tokens", r->tokens);
    if (log->peak > 0) jsonlog_num(log->json, "peak_share", flops / log->peak);
    jsonlog_int(log->json, "peak_rss", (long long)peak_rss_bytes());
    if (r->skipped) jsonlog_int(log->json, "skipped", 1);
    jsonlog_end(log->json);
}

// ---------------------------------------------------------------------------------------------
// Checkpoints

// Arrays live on the device; they pass through a host buffer of this many values.
#define PIECE ((size_t)1 << 20)

static void tensor_name(char *buf, size_t size, const char *array, const Param *p) {
    snprintf(buf, size, "%s.%s", array, p->name);
}

static char *progress_to_json(const TrainProgress *p) {
    char *text = xmalloc(512);
    // 64-bit values as strings: a JSON number is a double.
    snprintf(text, 512,
             "{\"step\": %lld, \"t\": %lld, \"loader_position\": \"%llu\", \"tokens\": \"%lld\", \"skipped\": %lld, "
             "\"data_hash\": \"%llu\", \"seed\": \"%llu\", \"seq_len\": %d}",
             (long long)p->step, (long long)p->t, (unsigned long long)p->loader_position, (long long)p->tokens,
             (long long)p->skipped, (unsigned long long)p->data_hash, (unsigned long long)p->seed, p->T);
    return text;
}

static uint64_t json_u64(const cJSON *o, const char *key) {
    const char *s = json_string(o, key);
    return s ? strtoull(s, NULL, 10) : 0;
}

static int progress_from_json(TrainProgress *p, const char *text, Err *err) {
    cJSON *o = json_parse(text, strlen(text), "checkpoint", err);
    if (!o) return E_FORMAT;
    int64_t T = 0;
    *p = (TrainProgress){0};
    int rc = json_int(o, "step", true, 0, INT32_MAX, &p->step, err);
    if (rc == 0) rc = json_int(o, "t", true, 0, INT32_MAX, &p->t, err);
    if (rc == 0) rc = json_int(o, "skipped", true, 0, INT32_MAX, &p->skipped, err);
    if (rc == 0) rc = json_int(o, "seq_len", true, 1, INT32_MAX, &T, err);
    p->T = (int)T;
    p->loader_position = json_u64(o, "loader_position");
    p->tokens = (int64_t)json_u64(o, "tokens");
    p->data_hash = json_u64(o, "data_hash");
    p->seed = json_u64(o, "seed");
    cJSON_Delete(o);
    return rc;
}

static int write_state_file(const char *path, const TrainProgress *p, const LlamaConfig *c, const QuantPlan *plan,
                            const ParamTable *table, const StateArray *arrays, int n_arrays, Err *err) {
    StWriter *w = st_writer_new();
    char *config = llama_config_to_json(c, "float32"), *quant = quant_plan_to_json(plan),
         *progress = progress_to_json(p);
    st_writer_meta(w, "format", "qllm.c training state");
    st_writer_meta(w, "config", config);
    st_writer_meta(w, "quant", quant);
    st_writer_meta(w, "progress", progress);
    free(config); free(quant); free(progress);
    char name[128];
    for (int a = 0; a < n_arrays; a++)
        for (int i = 0; i < table->n; i++) {
            tensor_name(name, sizeof name, arrays[a].name, &table->p[i]);
            st_writer_tensor(w, name, DT_F32, 2, (int64_t[2]){table->p[i].rows, table->p[i].cols});
        }
    int rc = st_writer_begin(w, path, err);
    if (rc < 0) { st_writer_abort(w); return rc; }
    float *piece = xmalloc(PIECE * sizeof *piece);
    for (int a = 0; a < n_arrays; a++)
        for (int i = 0; i < table->n; i++) {
            size_t total = (size_t)table->p[i].rows * (size_t)table->p[i].cols;
            for (size_t k = 0; k < total; k += PIECE) {
                size_t n = total - k < PIECE ? total - k : PIECE;
                device_copy_out(piece, arrays[a].data + table->p[i].offset + k, n * sizeof *piece);
                st_writer_data(w, piece, n * sizeof *piece);
            }
        }
    free(piece);
    return st_writer_finish(w, err);
}

static void remove_folder(const char *dir) {
    DIR *d = opendir(dir);
    if (!d) return;
    for (struct dirent *e; (e = readdir(d));) {
        char path[1400];
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        unlink(path);
    }
    closedir(d);
    rmdir(dir);
}

static void remove_old_checkpoints(const char *out, int64_t newest, int keep) {
    if (keep <= 0) return;
    int64_t steps[1024];
    int n = 0;
    DIR *d = opendir(out);
    if (!d) return;
    for (struct dirent *e; (e = readdir(d)) && n < 1024;) {
        char *end;
        if (strncmp(e->d_name, "step-", 5)) continue;
        long long s = strtoll(e->d_name + 5, &end, 10);
        if (*end == 0 && end != e->d_name + 5 && s <= newest) steps[n++] = s;
    }
    closedir(d);
    for (int i = 0; i < n; i++) {
        int newer = 0;
        for (int j = 0; j < n; j++) newer += steps[j] > steps[i];
        if (newer < keep) continue;
        char path[1100];
        snprintf(path, sizeof path, "%s/step-%lld", out, (long long)steps[i]);
        remove_folder(path);
    }
}

int train_state_save(const char *out, const TrainProgress *p, const LlamaConfig *c, const QuantPlan *plan,
                     const ParamTable *table, const StateArray *arrays, int n_arrays, int keep, Err *err) {
    char dir[1100], aside[1200], path[1300];
    snprintf(dir, sizeof dir, "%s/step-%lld", out, (long long)p->step);
    snprintf(aside, sizeof aside, "%s.tmp-%ld", dir, (long)getpid());
    remove_folder(aside);
    int rc = make_dir(aside, err);
    if (rc < 0) return rc;
    snprintf(path, sizeof path, "%s/state.safetensors", aside);
    rc = write_state_file(path, p, c, plan, table, arrays, n_arrays, err);
    if (rc < 0) { remove_folder(aside); return rc; }
    remove_folder(dir);                        // of an earlier run that passed this step
    if (rename(aside, dir)) {
        rc = err_set(err, E_FAIL, "cannot rename %s to %s: %s", aside, dir, strerror(errno));
        remove_folder(aside);
        return rc;
    }
    // Syncing the folder makes the rename last; the marker moves only afterwards.
    AtomicFile latest;
    snprintf(path, sizeof path, "%s/latest", out);
    if ((rc = atomic_open(&latest, path, err)) < 0) return rc;
    char text[64];
    int n = snprintf(text, sizeof text, "step-%lld\n", (long long)p->step);
    atomic_write(&latest, text, (size_t)n);
    if ((rc = atomic_commit(&latest, err)) < 0) return rc;
    remove_old_checkpoints(out, p->step, keep);
    return 0;
}

// The stored JSON texts are compared as they were written: the writer is deterministic.
static int check_same(const char *what, const char *stored, char *mine, const char *path, Err *err) {
    int rc = 0;
    if (!stored || strcmp(stored, mine))
        rc = err_set(err, E_USAGE,
                     "%s was written by a run with another %s; resume with the settings it was started with, "
                     "or choose another --out",
                     path, what);
    free(mine);
    return rc;
}

int train_state_load(const char *out, TrainProgress *p, const LlamaConfig *c, const QuantPlan *plan,
                     const ParamTable *table, const StateArray *arrays, int n_arrays, Err *err) {
    char path[1300], *name;
    size_t len;
    snprintf(path, sizeof path, "%s/latest", out);
    if (!path_exists(path)) return 0;
    int rc = file_read(&name, &len, path, 256, err);
    if (rc < 0) return rc;
    name[strcspn(name, "\r\n")] = 0;
    if (strncmp(name, "step-", 5) || strspn(name + 5, "0123456789") != strlen(name + 5) || !name[5]) {
        rc = err_set(err, E_FORMAT, "%s holds \"%.40s\"; expected step-N", path, name);
        free(name);
        return rc;
    }
    snprintf(path, sizeof path, "%s/%s/state.safetensors", out, name);
    free(name);

    Safetensors st;
    if ((rc = safetensors_open(&st, path, err)) < 0) return rc;
    const char *progress = safetensors_meta(&st, "progress");
    TrainProgress now = *p;
    if (!progress) rc = err_set(err, E_FORMAT, "%s: not a training state", path);
    else rc = progress_from_json(p, progress, err);
    if (rc == 0)
        rc = check_same("model configuration", safetensors_meta(&st, "config"), llama_config_to_json(c, "float32"),
                        path, err);
    if (rc == 0)
        rc = check_same("quantization scheme", safetensors_meta(&st, "quant"), quant_plan_to_json(plan), path, err);
    if (rc == 0 && (p->data_hash != now.data_hash || p->T != now.T || p->seed != now.seed))
        rc = err_set(err, E_USAGE,
                     "%s was written with other training data, --seq-len (%d) or --seed (%llu); resume with "
                     "the same, or choose another --out",
                     path, p->T, (unsigned long long)p->seed);
    for (int a = 0; a < n_arrays && rc == 0; a++)
        for (int i = 0; i < table->n && rc == 0; i++) {
            char tensor[128];
            const Param *q = &table->p[i];
            tensor_name(tensor, sizeof tensor, arrays[a].name, q);
            const StTensor *t = safetensors_find(&st, tensor);
            if (!t)
                rc =
                    err_set(err, E_MISSING, "%s: no tensor %s; was it written with another --optimizer?", path, tensor);
            else if (t->dtype != DT_F32 || t->ndim != 2 || t->shape[0] != q->rows || t->shape[1] != q->cols)
                rc = err_set(err, E_SHAPE, "%s: %s is not F32 of %lld by %lld", path, tensor, (long long)q->rows,
                             (long long)q->cols);
            else device_copy_in(arrays[a].data + q->offset, t->data, t->bytes);
        }
    safetensors_close(&st);
    return rc < 0 ? rc : 1;
}
