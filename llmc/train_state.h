// Checkpoints that a run goes on from: OUT/step-N/ with the state of all ranks, and OUT/latest, which names the newest
// complete one. Each rank writes a file of its own rows; any number of ranks can read them. The files are described in
// doc/formats.md.
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
    Rounding rounding;                         // of parameters that are not f32
    const char *products;                      // which products are integer ones, "output grad_input"; NULL: none
} TrainProgress;

// One array of a checkpoint: what it holds of each tensor. A row of the array belongs to `unit` rows of the tensor and
// has `values` of dtype (F32, BF16, I8 or U8); values 0: it has nothing of this tensor. `data` is in device memory, the
// array rows of the tensor rows that OwnTable.held has, one after the other. unit divides the tensor's split.unit. In
// files such a tensor is (array rows, values).
typedef struct { DType dtype; int64_t unit, values; void *data; } StateTensor;
typedef struct { const char *name; const StateTensor *t; } StateArray;         // t (own->held.n)

// Before the first save or load of a run: rank 0 removes what a killed run left half written in OUT. No other rank may
// have begun to save.
void train_state_clean(const char *out);
// Copies this rank's rows (of replicated state: its part by `split`) to host memory and returns; a thread writes, syncs
// and, on rank 0 once the files of all ranks are there, completes OUT/step-N, moves OUT/latest and removes all but the
// newest `keep` (0: keep all). Waits first for a save still under way, and returns its error if it met one. All ranks
// call it at the same step; the step that was saved last is not saved again. Nothing of what is passed is needed after
// the return.
int train_state_save(const char *out, const TrainProgress *p, const LlamaConfig *c, const QuantPlan *plan,
                     const OwnTable *own, const StateArray *arrays, int n_arrays, int keep, Err *err);
// The same at the end of a run, and waits as train_state_finish does: on the CPU no copy is made.
int train_state_save_last(const char *out, const TrainProgress *p, const LlamaConfig *c, const QuantPlan *plan,
                          const OwnTable *own, const StateArray *arrays, int n_arrays, int keep, Err *err);
// 0, or the error that writing met (the run should stop: each later save would meet it too). Does not wait.
int train_state_poll(Err *err);
// Waits for the save under way: this rank's file, and on rank 0 the complete checkpoint. Call comm_barrier afterwards
// where other ranks depend on it. Returns the error that writing met and forgets it.
int train_state_finish(Err *err);
// Gives up the save under way, removes what was written of it and waits until that is done: for a rank that knows that
// another one failed, whose file rank 0 would wait for without end. A save that was complete by then stays.
void train_state_abandon(void);
// Bytes of host memory that train_state_save takes for its copy, at the first save, and keeps.
size_t train_state_copy_bytes(const OwnTable *own, const StateArray *arrays, int n_arrays);
// Loads the checkpoint that OUT/latest names, or the newest complete one if that file is missing: the rows this rank
// holds, from whichever files have them, after checking the checksum of every file it reads. Of the other files each
// rank checks a share, so that a damaged file is found by some rank: ranks must agree on the result. Configuration,
// scheme, formats (of the table), rounding, T, data and seed must be those of this run. Returns 1 if one was loaded, 0
// if there is none.
int train_state_load(const char *out, TrainProgress *p, const LlamaConfig *c, const QuantPlan *plan,
                     const OwnTable *own, const StateArray *arrays, int n_arrays, Err *err);

// ---------------------------------------------------------------------------------------------
// The marker, OUT/step-N/checkpoint.json: what the checkpoint is and of which files it consists.

enum { MARKER_MAX_ARRAYS = 8, MARKER_MAX_RANKS = 65536 };
#define MARKER_MAX_BYTES ((size_t)16 << 20)

typedef struct {
    TrainProgress progress;
    char *config, *quant;                      // JSON texts, compared as they were written
    char formats[160];                         // what masters and moments are kept in, compared as it was written
    char arrays[MARKER_MAX_ARRAYS][16];
    int n_arrays, ranks, n_tensors;
    struct { char name[96]; RowSplit split; } *tensors;              // (n_tensors)
    struct { uint64_t bytes, checksum; } *files;                     // (ranks)
} TrainMarker;

// The formats of a marker that does not say any.
#define TRAIN_FORMATS_F32 "masters fp32, moments fp32"

char *train_marker_to_json(const TrainMarker *m);                    // malloc'ed; ends with the checksum of the rest
// From outside: the checksum first, then every field's type and range. `what` names the file in messages.
int train_marker_parse(TrainMarker *m, const char *text, size_t len, const char *what, Err *err);
void train_marker_free(TrainMarker *m);

// "rank-00002-of-00008" and `end`.
void train_file_name(char *buf, size_t size, int rank, int ranks, const char *end);
// What the file of a rank says of itself, besides its tensors: the writer's metadata. The reader makes the same texts
// from the marker and compares. Texts are malloc'ed.
enum { TRAIN_FILE_META = 7 };
typedef struct { const char *key; char *text; } TrainFileMeta;
void train_file_meta(TrainFileMeta meta[TRAIN_FILE_META], const TrainMarker *m, int rank);
void train_file_meta_free(TrainFileMeta meta[TRAIN_FILE_META]);
#endif
