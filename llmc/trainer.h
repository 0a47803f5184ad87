// What both trainers do around the model: options, start, data, signals, the memory plan, the step line, saves, the
// end.
// Checkpoints: train_state.h. The algorithm itself (forward, backward, update, the step loop) is spelled out in the
// trainers.
#ifndef QLLM_TRAINER_H
#define QLLM_TRAINER_H
#include "activations.h"
#include "checkpoint.h"
#include "cli.h"
#include "dataloader.h"
#include "llama.h"
#include "logger.h"
#include "quant.h"
#include "schedule.h"
#include "shard.h"
#include "store.h"
#include "tokenizer.h"
#include "train_state.h"

// SIGINT, SIGTERM and SIGUSR1 ask the loop to save and leave; another one, two seconds later or more, ends the process
// at once. SIGUSR1 is what mpirun and srun hand on to the ranks; told to end by another signal, they end the ranks
// within a second.
void trainer_catch_signals(void);
int trainer_signal(void);                      // the signal that came, or 0

// The memory plan, printed before anything is allocated.
typedef struct { const char *what; double fixed, per_sequence; } MemoryItem;   // bytes
// Prints the table for batches of B, its total (also to *planned) beside the device's memory, and the largest batch
// that fits. E_NOMEM, with that batch in the message, where the total is more than device_memory() can give.
int memory_plan_print(double *planned, const MemoryItem *items, int n, int B, FILE *out, Err *err);

// The step line and its JSON twin.
typedef struct {
    JsonLog *json;
    double flops_per_token, peak;              // peak <= 0: utilization is not printed
    const char *peak_source;
    int steps;                                 // of the whole run, for the time left
    double ema_seconds;
} StepLog;
typedef struct { int step; double loss, norm, lr, seconds; int64_t tokens; bool skipped; } StepReport;   // step counts from 1
void steplog_print(StepLog *log, const StepReport *r, bool show);

// ---------------------------------------------------------------------------------------------
// Options that both trainers have

typedef struct {
    const char *model, *init, *tokenizer, *train_data, *val_data, *out, *device, *comm, *profile;
    int master, optim_state, schedule, warmup, decay_steps, steps, B, T, grad_accum, val_every, val_batches, save_every,
        keep, recompute, threads, max_skips, log_every, shard;
    int64_t seed;
    double lr, min_lr, weight_decay, beta1, beta2, eps, clip;
    bool resume, hf, no_save, no_verify;
} TrainOptions;

// Entries of an option table (cli.h); o is a TrainOptions with static storage.
#define TRAIN_OPTIONS_DATA(o) \
    {"--model",        OPT_STRING, &o.model,        NULL,     NULL, "model to start from: Hugging Face folder, .gguf or model.bin"}, \
    {"--no-verify",    OPT_FLAG,   &o.no_verify,    "0",      NULL, "do not compare a model.bin with its checksum"}, \
    {"--init",         OPT_STRING, &o.init,         NULL,     NULL, "start from random weights of a named shape: tiny, 1M, 5M, 135M, 1B, ..."}, \
    {"--tokenizer",    OPT_STRING, &o.tokenizer,    NULL,     NULL, "tokenizer.json, or \"bytes\" (default: the model's own; bytes with --init)"}, \
    {"--train-data",   OPT_STRING, &o.train_data,   NULL,     NULL, ".txt, .jsonl or token shards (.bin): a file, folder or pattern"}, \
    {"--val-data",     OPT_STRING, &o.val_data,     NULL,     NULL, "held-out data of the same kinds"}, \
    {"--out",          OPT_STRING, &o.out,          "run",    NULL, "folder for logs, checkpoints and model.bin"}
#define TRAIN_OPTIONS_RUN(o) \
    {"--optim-state",  OPT_ENUM,   &o.optim_state,  "fp32",   "fp32,bf16,int8,int4,fp8", "what AdamW's moments are kept in (low bits: in blocks; small tensors fp32)"}, \
    {"--lr",           OPT_FLOAT,  &o.lr,           "2e-5",   "0..10", "peak learning rate"}, \
    {"--min-lr",       OPT_FLOAT,  &o.min_lr,       "0",      "0..10", "final learning rate of cosine, linear and wsd"}, \
    {"--schedule",     OPT_ENUM,   &o.schedule,     "cosine", "constant,cosine,linear,wsd", "after the warmup"}, \
    {"--warmup",       OPT_INT,    &o.warmup,       "0",      "0..", "steps of linear warmup"}, \
    {"--decay-steps",  OPT_INT,    &o.decay_steps,  "0",      "0..", "wsd: steps of final decay (0: a fifth of all)"}, \
    {"--steps",        OPT_INT,    &o.steps,        "100",    "1..100000000", "optimizer steps of the whole run"}, \
    {"--batch",        OPT_INT,    &o.B,            "4",      "1..65536", "sequences in a micro-batch of a rank, B"}, \
    {"--seq-len",      OPT_INT,    &o.T,            "512",    "1..131072", "tokens in a sequence, T"}, \
    {"--grad-accum",   OPT_INT,    &o.grad_accum,   "1",      "1..65536", "micro-batches in a step; gradients are weighted by tokens"}, \
    {"--weight-decay", OPT_FLOAT,  &o.weight_decay, "0.01",   "0..10", "of adamw, decoupled (sgd: L2); norms do not decay"}, \
    {"--beta1",        OPT_FLOAT,  &o.beta1,        "0.9",    "0..0.9999", "AdamW"}, \
    {"--beta2",        OPT_FLOAT,  &o.beta2,        "0.999",  "0..0.999999", "AdamW"}, \
    {"--eps",          OPT_FLOAT,  &o.eps,          "1e-8",   "1e-30..1", "AdamW"}, \
    {"--clip",         OPT_FLOAT,  &o.clip,         "1",      "0..1e9", "largest gradient norm (0: no clipping)"}, \
    {"--recompute",    OPT_ENUM,   &o.recompute,    "none",   "none,block", "what the backward computes again instead of keeping"}, \
    {"--val-every",    OPT_INT,    &o.val_every,    "100",    "0..", "validate every so many steps (0: only at the end)"}, \
    {"--val-batches",  OPT_INT,    &o.val_batches,  "0",      "0..", "batches of a validation on the way (0: all; the last is always over all)"}, \
    {"--save-every",   OPT_INT,    &o.save_every,   "0",      "0..", "write a checkpoint every so many steps (0: only when stopped)"}, \
    {"--keep",         OPT_INT,    &o.keep,         "1",      "0..", "checkpoints kept (0: all)"}, \
    {"--resume",       OPT_FLAG,   &o.resume,       "0",      NULL, "go on from the newest checkpoint in --out, bit for bit"}, \
    {"--hf",           OPT_FLAG,   &o.hf,           "0",      NULL, "at the end also write OUT/hf, a folder for transformers"}, \
    {"--no-save",      OPT_FLAG,   &o.no_save,      "0",      NULL, "write neither checkpoint nor model.bin: to measure speed"}, \
    {"--seed",         OPT_INT64,  &o.seed,         "1337",   "0..", "of weights, data order and rounding"}, \
    {"--max-skips",    OPT_INT,    &o.max_skips,    "10",     "1..", "stop after so many steps in a row without a finite loss and norm"}, \
    {"--log-every",    OPT_INT,    &o.log_every,    "1",      "1..", "print every so many steps (all of them are logged)"}, \
    {"--profile",      OPT_STRING, &o.profile,      NULL,     NULL, "at the end print the time of each operation, and write a timeline for ui.perfetto.dev to FILE"}, \
    {"--device",       OPT_STRING, &o.device,       "auto",   NULL, "auto (a GPU if there is one), cpu or cuda"}, \
    {"--shard",        OPT_ENUM,   &o.shard,        "auto",   "auto,none,optim,grad,full", "what ranks divide among themselves (auto: full, or none for one rank)"}, \
    {"--comm",         OPT_STRING, &o.comm,         "auto",   NULL, "what carries device memory between ranks: nccl, mpi or auto"}, \
    {"--threads",      OPT_INT,    &o.threads,      "0",      "0..4096", "CPU threads (0: all cores)"}

// ---------------------------------------------------------------------------------------------
// A run. Zeroed before; what it holds lives as long as the process. The calls come in the order in which they stand
// here.

typedef struct {
    const TrainOptions *o;
    LlamaConfig c;
    QuantPlan plan;              // set by the caller between trainer_begin and trainer_prepare, as
    Rounding rounding;           //   are these: how updated parameters are rounded that are not f32,
    const char *products;        //   which products are integer ones (TrainProgress),
    double served_bytes;         //   and, before trainer_alloc, what the caller takes for weights in served form
    ParamTable table;
    Shard shard;
    Store store;
    Acts acts;
    TrainProgress progress;
    JsonLog json;
    ModelFile file;              // with --model, until its weights are loaded
    Tokenizer *tok;
    TokenData train, val;
    // private
    const Option *options;
    int n_options;
    char *settings, *plan_json;
    DataLoader train_dl, val_dl;
    ActsShape shape;
    Schedule schedule;
    StepLog log;
    double peak, planned, began, busy0, blocked0, on_the_way, waited, profile_seconds;
    const char *peak_source;
    int32_t *tokens, *targets;
    int skips_in_a_row;
    int64_t profile_from, wire_from;
    bool stop, resumed;
} Trainer;

// Ranks, device and output folder; opens --model and sets t->c. options: the program's table, for logs.
int trainer_begin(Trainer *t, const TrainOptions *o, const Option *options, int n_options, Err *err);
// With t->plan set: the parameter table (parameters that are not INT8 rows kept in `others`), shard, store, tokenizer
// and data; checks that all ranks agree and prints what will run. has_v: AdamW.
int trainer_prepare(Trainer *t, ParamFormat others, bool gather_quantized, bool has_v, Err *err);
// Prints the memory plan and, if it fits, allocates everything and loads or draws the weights into the store.
int trainer_alloc(Trainer *t, ActsShape shape, Err *err);
// --resume, the log, what precedes the first step. The caller makes the working weights afterwards (shard_requantize).
int trainer_start(Trainer *t, Err *err);

// The loop: while (trainer_goes_on(t)) { begin_step; the step; end_step; validation if trainer_validates; save }.
bool trainer_goes_on(const Trainer *t);
// The batch, and the step's learning rate, count and seed, go to t->acts.
int trainer_begin_step(Trainer *t, Err *err);
// Whether device_step may record the step: not where each operation is timed, nor where ranks wait for others.
bool trainer_may_record(const Trainer *t);
// Waits for the step, counts, prints and logs it; the error of too many steps without a finite loss.
int trainer_end_step(Trainer *t, Err *err);
bool trainer_validates(const Trainer *t);
int trainer_save_if_due(Trainer *t, Err *err);

// A validation over the windows of the validation data in order, at most max_batches (0: all):
//   trainer_val_begin(t, &v, max); while (trainer_val_next(t, &v)) { forward; loss } trainer_val_end(t, &v, &loss, err);
// Rows past the last window do not count. The loss is the mean over tokens and ranks.
typedef struct { uint64_t batch, batches; int32_t *tokens, *targets; WireBytes wire; } Validation;
void trainer_val_begin(Trainer *t, Validation *v, int max_batches);
bool trainer_val_next(Trainer *t, Validation *v);
int trainer_val_end(Trainer *t, Validation *v, double *loss, Err *err);

// The last checkpoint, unless --no-save. Returns 1 where the run is done and its model is to be written and validated,
// 0 where it was stopped or nothing is saved.
int trainer_end(Trainer *t, Err *err);
// model.bin and, with --hf, the folder: floats as they work, INT8 weights as their codes.
int trainer_export(Trainer *t, Err *err);

// main of a trainer: ranks, options, run_training, an orderly end.
int trainer_main(int argc, char **argv, const Option *options, int n_options, const char *summary,
                 int (*run_training)(Err *err));
#endif
