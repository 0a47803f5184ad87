// Sharding of parameters, gradients and optimizer state over ranks, by rows (FSDP, ZeRO). The model asks for the weights
// of a unit (a block, the embedding, the head) and hands over its gradients; whether they are gathered, kept, or were
// always there is settled here. With one rank and --shard none nothing is copied and nothing waits.
//
//   level   each rank keeps whole                  and its own rows of
//   none    weights, gradients, optimizer state
//   optim   weights, gradients                     optimizer state             (ZeRO 1)
//   grad    weights                                gradients, optimizer state  (ZeRO 2)
//   full    embedding, head and one block          everything                  (ZeRO 3)
#ifndef QLLM_SHARD_H
#define QLLM_SHARD_H
#include "comm.h"
#include "llama.h"
#include "ops.h"
#include "split.h"

typedef enum { SHARD_NONE, SHARD_OPTIM, SHARD_GRAD, SHARD_FULL } ShardLevel;

// The rows of every tensor that one rank holds of masters and optimizer state, in arenas of its own.
typedef struct {
    const ParamTable *table;   // the whole tensors
    ParamTable own;            // the same tensors with the rows held: rows (may be 0), offset, row_offset
    int64_t *row0;             // (table->n) the first row held
    RowSplit *split;           // (table->n) whose rows are whose, also where every rank holds all
    int R, rank;
    bool replicated;           // every rank holds every row: own equals table
} OwnTable;

int own_table_build(OwnTable *o, const ParamTable *table, int R, int rank, bool replicated, Err *err);
void own_table_free(OwnTable *o);
#endif
