// What a sharded run will take, before a cluster is rented for it: memory of a rank, bytes on the wire, and the time of a
// step with what of it communication adds.
//   build/bf16/bench/shard_plan --model 8B --ranks 8
//   build/bf16/bench/shard_plan --model 405B --ranks 1024 --link 50 --batch 1 --seq-len 8192
//   build/bf16/bench/shard_plan --model 70B                (1 to 1,024 ranks)
//   build/bf16/bench/shard_plan --model 1B --scheme int8qt --master bf16-sr --optim-state int8
// Sizes are those that the trainer allocates and sends (llmc/shard.c lays them out; nothing is allocated here). Times
// replay the trainer's order of calls on two clocks, one that computes at --tflops and one that moves bytes at --link.
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "llmc/cli.h"
#include "llmc/llama.h"
#include "llmc/logger.h"
#include "llmc/shard.h"
#include "llmc/store.h"

static struct {
    const char *model, *scheme;
    int ranks, shard, gather, master, optim_state, B, T, grad_accum;
    double link, tflops, latency;
} run;

static const Option options[] = {
    {"--model",      OPT_STRING, &run.model,      "8B",       NULL, "a named shape: 1B, 8B, 70B, 405B, ..."},
    {"--ranks",      OPT_INT,    &run.ranks,      "0",        "0..65536", "ranks (0: 1, 2, 4, ... 1024)"},
    {"--shard",      OPT_ENUM,   &run.shard,      "full",     "none,optim,grad,full", "as the trainer's"},
    {"--gather",     OPT_ENUM,   &run.gather,     "quant",    "quant,full", "as the trainer's"},
    {"--scheme",     OPT_STRING, &run.scheme,     "8da4w-32", NULL, "as the trainer's"},
    {"--master",     OPT_ENUM,   &run.master,     "fp32",     "fp32,bf16-sr", "as the trainer's"},
    {"--optim-state", OPT_ENUM,  &run.optim_state, "fp32",    "fp32,bf16,int8,int4,fp8", "as the trainer's"},
    {"--batch",      OPT_INT,    &run.B,          "2",        "1..65536", "sequences in a micro-batch of a rank"},
    {"--seq-len",    OPT_INT,    &run.T,          "8192",     "1..1048576", "tokens in a sequence"},
    {"--grad-accum", OPT_INT,    &run.grad_accum, "1",        "1..65536", "micro-batches in a step"},
    {"--link",       OPT_FLOAT,  &run.link,       "0",        "0..1000000", "GB/s that a rank receives (0: 25, 50 and 400)"},
    {"--latency",    OPT_FLOAT,  &run.latency,    "30",       "0..1000000", "microseconds that a collective takes besides"},
    {"--tflops",     OPT_FLOAT,  &run.tflops,     "500",      "0.001..100000", "that a rank reaches in matmuls"},
};
#define N_OPTIONS ((int)(sizeof options / sizeof *options))

typedef struct { double compute, wire; } Clocks;               // when each is free, in seconds
typedef struct { double step, alone, waited; } StepTime;

typedef struct { double gather, gradients; int n; } Unit;     // bytes, and in how many collectives

static Unit unit(const Shard *s, int l) {
    Unit u;
    shard_plan_unit(s, l, &u.gather, &u.gradients, &u.n);
    return u;
}

// A collective of `bytes` begins when both clocks are free and ends after its time; it does not hold up the computing.
static double send(Clocks *c, double bytes, double link) {
    double start = c->wire > c->compute ? c->wire : c->compute;
    c->wire = start + (bytes > 0 ? bytes / link + run.latency * 1e-6 : 0);
    return c->wire;
}

static void wait_until(Clocks *c, double t, StepTime *st) {
    if (t <= c->compute) return;
    st->waited += t - c->compute;
    c->compute = t;
}

// One step in the order of train_llama_qat.c.
static StepTime step_time(const Shard *s, const LlamaConfig *c, double link) {
    double tokens = (double)run.B * run.T, flops = llama_train_flops_per_token(c, run.T) * tokens;
    double head = 2.0 * (double)c->V * c->C * tokens / (run.tflops * 1e12);
    double block = (flops / (run.tflops * 1e12) - 3 * head) / (3.0 * c->L);          // forward; the backward is twice that
    Unit blocks = unit(s, 0), embed = unit(s, SHARD_EMBED), ends = unit(s, c->L);
    bool full = s->level == SHARD_FULL, each = s->level >= SHARD_GRAD;
    Clocks k = {0};
    StepTime st = {0};
    double reduced = 0;                                                              // when the sum under way is there
    for (int micro = 0; micro < run.grad_accum; micro++) {
        bool first = micro == 0, last = micro == run.grad_accum - 1, gathers = full || first;
        for (int i = 0; i < embed.n && first; i++) wait_until(&k, send(&k, embed.gather / embed.n, link), &st);
        double there = gathers && first ? send(&k, blocks.gather, link) : 0;             // block 0 stays from micro-step on
        for (int l = 0; l < c->L; l++) {
            wait_until(&k, there, &st);
            there = 0;
            if (l + 1 < c->L && gathers) there = send(&k, blocks.gather, link);
            else if (l + 1 == c->L && first) there = send(&k, ends.gather / ends.n, link);
            k.compute += block;
        }
        wait_until(&k, there, &st);
        for (int i = 1; i < ends.n && first; i++) wait_until(&k, send(&k, ends.gather / ends.n, link), &st);
        k.compute += 3 * head;
        for (int i = 0; i < ends.n && last; i++) {
            wait_until(&k, reduced, &st);
            reduced = send(&k, ends.gradients / ends.n, link);
        }
        there = 0;
        for (int l = c->L - 1; l >= 0; l--) {
            wait_until(&k, there, &st);
            if (full && l > 0) there = send(&k, blocks.gather, link);
            k.compute += 2 * block;
            wait_until(&k, reduced, &st);
            if (each || last) reduced = send(&k, blocks.gradients, link);
        }
    }
    for (int i = 0; i <= embed.n; i++) {
        wait_until(&k, reduced, &st);
        if (i < embed.n) reduced = send(&k, embed.gradients / embed.n, link);
    }
    if (s->level == SHARD_NONE)                                                      // spread to all
        wait_until(&k, send(&k, blocks.gradients * c->L + embed.gradients + ends.gradients, link), &st);
    st.step = k.compute;
    st.alone = run.grad_accum * (3.0 * c->L * block + 3 * head);
    return st;
}

static int plan(const LlamaConfig *c, const QuantPlan *q, const ParamTable *table, int R, const double *links, int n_links,
                Err *err) {
    double most = 0, own = 0;                                                        // of the fullest rank
    Shard s;
    Store store;
    for (int r = R - 1; r >= 0; r--) {
        int rc = shard_plan(&s, c, q, table, (ShardLevel)run.shard, run.gather == 0, R, r, err);
        if (rc < 0 || (rc = store_plan(&store, &s, true, err)) < 0) return rc;
        double state = store.param_bytes + store.state_bytes;
        store_free(&store);
        own = fmax(own, state);
        most = fmax(most, state + s.memory.weights + s.memory.gradients + s.memory.own_gradients + s.memory.buffers);
        if (r > 0) shard_free(&s);
    }
    WireBytes w = shard_plan_wire(&s, run.grad_accum);
    char a[32], b[32], d[32], e[32], f[32], g[32], h[32], i[32];
    printf("%5d | %9s %9s %9s %9s %9s | %9s %9s %9s", R, fmt_bytes(a, own),
           fmt_bytes(b, s.memory.gradients + s.memory.own_gradients), fmt_bytes(d, s.memory.weights),
           fmt_bytes(e, s.memory.buffers), fmt_bytes(f, most), fmt_bytes(g, w.linears), fmt_bytes(h, w.others),
           fmt_bytes(i, w.gradients));
    for (int k = 0; k < n_links; k++) {
        StepTime st = step_time(&s, c, links[k] * 1e9);
        printf(" | %8.3f %5.1f%%", st.step, 100 * st.alone / st.step);
    }
    printf("\n");
    shard_free(&s);
    return 0;
}

static int run_plan(Err *err) {
    LlamaConfig c;
    QuantPlan q;
    ParamTable table;
    int rc = llama_config_named(&c, run.model, err);
    if (rc == 0) rc = quant_plan_from_options(&q, NULL, run.scheme, NULL, NULL, NULL, NULL, NULL, 0, err);
    if (rc == 0) rc = param_table_build(&table, &c, &q, err);
    if (rc < 0) return rc;
    param_table_formats(&table, (ParamFormat)run.master, (StateFormat)run.optim_state);
    double links[3] = {25, 50, 400};
    int n_links = run.link > 0 ? 1 : 3;
    if (run.link > 0) links[0] = run.link;
    char count[32];
    printf("%s: %s parameters, %s, masters %s, moments %s, --shard %s, --gather %s; %d x %d tokens x %d a rank and step; %g "
           "TFLOP/s a rank\n", run.model, fmt_count(count, (double)table.n_params), run.scheme,
           (const char *[]){"fp32", "bf16"}[run.master],
           (const char *[]){"fp32", "bf16", "int8", "int4", "fp8"}[run.optim_state],
           (const char *[]){"none", "optim", "grad", "full"}[run.shard], run.gather ? "full" : "quant", run.B, run.T,
           run.grad_accum, run.tflops);
    printf("memory of a rank without activations, bytes that it receives in a step; step in seconds, and the share of it "
           "that is not spent waiting\n");
    printf("%5s | %9s %9s %9s %9s %9s | %9s %9s %9s", "ranks", "state", "gradients", "weights", "on way", "all", "linears",
           "others", "gradients");
    for (int k = 0; k < n_links; k++) printf(" | %7.0f GB/s  ", links[k]);
    printf("\n");
    for (int R = run.ranks ? run.ranks : 1; rc == 0 && R <= (run.ranks ? run.ranks : 1024); R *= 2)
        rc = plan(&c, &q, &table, R, links, n_links, err);
    param_table_free(&table);
    return rc;
}

int main(int argc, char **argv) {
    program_name = "shard_plan";
    Err err = {0};
    if (cli_parse(options, N_OPTIONS, "usage: shard_plan [options]\nMemory, bytes and time of a sharded run.\n", NULL,
                  argc, argv, &err) < 0 || run_plan(&err) < 0)
        die(&err);
    return 0;
}
