// Checkpoints that a run goes on from: OUT/step-N/ with the state of all ranks, and OUT/latest, which names the newest
// complete one. Each rank writes a file of its own rows; any number of ranks can read them. doc/formats.md describes the
// files.
#ifndef QLLM_TRAIN_STATE_H
#define QLLM_TRAIN_STATE_H
#include "llama.h"
#include "quant.h"
#include "shard.h"

// Everything besides the arrays that a run needs to go on bit for bit.
typedef struct {
    int64_t step;                              // optimizer steps done, skipped ones included
    int64_t t;                                 // AdamW's step count: updates that were made
    uint64_t loader_position;                  // windows handed out, by all ranks together
    int64_t tokens, skipped;
    uint64_t data_hash, seed;
    int T;
} TrainProgress;

// Masters and optimizer state: f32 in device memory, laid out by OwnTable.own. AdamW has master, m, v; SGD master, m.
typedef struct { const char *name; float *data; } StateArray;

// Before the first save or load of a run: rank 0 removes what a killed run left half written in OUT.
void train_state_clean(const char *out);
// Copies this rank's rows (of replicated state: its part by `split`) to host memory and returns; a thread writes, syncs
// and, on rank 0 once the files of all ranks are there, completes OUT/step-N, moves OUT/latest and removes all but the
// newest `keep` (0: keep all). Waits first for a save still under way. All ranks call it at the same step.
int train_state_save(const char *out, const TrainProgress *p, const LlamaConfig *c, const QuantPlan *plan,
                     const OwnTable *own, const StateArray *arrays, int n_arrays, int keep, Err *err);
// 0, or the error that writing met (the run should stop: each later save would meet it too). Does not wait.
int train_state_poll(Err *err);
// Waits for the save under way: this rank's file, and on rank 0 the complete checkpoint. Call comm_barrier afterwards
// where other ranks depend on it.
int train_state_finish(Err *err);
// Bytes of host memory that train_state_save takes for its copy.
size_t train_state_copy_bytes(const OwnTable *own, int n_arrays);
// Loads the checkpoint that OUT/latest names: the rows this rank holds, from whichever files have them, after checking
// the checksum of every file it reads. Configuration, scheme, T, data and seed must be those of this run.
// Returns 1 if one was loaded, 0 if there is none.
int train_state_load(const char *out, TrainProgress *p, const LlamaConfig *c, const QuantPlan *plan,
                     const OwnTable *own, const StateArray *arrays, int n_arrays, Err *err);
#endif
