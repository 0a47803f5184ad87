#include "trainer.h"
#include <signal.h>
#include <time.h>
#include <unistd.h>
#include "device.h"

// ---------------------------------------------------------------------------------------------
// Signals

static volatile sig_atomic_t caught;

static volatile time_t caught_at;

// A launcher and a terminal may hand on the same signal twice within moments: only a later one is impatience.
static void on_signal(int sig) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (caught && now.tv_sec - caught_at >= 2) _exit(128 + sig);
    if (!caught) caught_at = now.tv_sec;
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
        if (bytes == 0) continue;
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
                                     "smaller model, a shorter --seq-len, --recompute block, or more ranks with "
                                     "--shard full", need, have);
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
