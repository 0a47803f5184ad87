// What a rank keeps of every tensor for the update: the parameter as training stores it and AdamW's moments, for the
// rows of OwnTable.held, in the formats that the table says (Param.format, Param.state). A parameter that works as it
// is stored (INT8 codes; bf16 in a bf16 build, not fake-quantized) is not kept twice where a rank holds all of it: its
// store is the shard's place for the working weight.
#ifndef QLLM_STORE_H
#define QLLM_STORE_H
#include "shard.h"
#include "train_state.h"

typedef struct { StoredParam p; StoredState m, v; } StoredTensor;      // v: AdamW only

enum { STORE_MAX_ARRAYS = 6 };

struct Store {                           // Store: shard.h
    const Shard *shard;
    bool has_v;
    StoredTensor *t;                     // (own.held.n) formats from the start, pointers after store_alloc
    double param_bytes, state_bytes;     // what store_alloc takes, for the memory plan
    uint8_t *arena;                      // private, as what follows
    size_t arena_bytes;
    StateTensor *arrays[STORE_MAX_ARRAYS];      // (own.held.n) each
};

// has_v: AdamW; without, m alone is kept (SGD). shard must outlive the store; store_alloc comes after shard_alloc.
int store_plan(Store *s, const Shard *shard, bool has_v, Err *err);
int store_alloc(Store *s, Err *err);     // zeroed: moments begin as zero
void store_free(Store *s);

// Rows [row0, row0 + n) of those held of tensor i, as ops take them.
StoredParam store_param(const Store *s, int i, int64_t row0);
// Where the update of tensor i writes its working values (all rows held); NULL: nowhere, since it works as it is
// stored, or since all ranks get them from shard_weights_changed.
floatX *store_work(const Store *s, int i);
// Puts n rows of f32 values (host memory) at row0 of those held: as f32, as bf16 to nearest, or by int8_rows.
int store_set_rows(Store *s, int i, int64_t row0, int64_t n, const float *rows, Err *err);
// Puts codes and scales as they are (PARAM_INT8 only).
void store_set_codes(Store *s, int i, int64_t row0, int64_t n, const int8_t *codes, const float *scale);

// The arrays of a checkpoint: "master", "m", "v" and their scales where the formats have any. At most STORE_MAX_ARRAYS;
// what they point to belongs to the store.
int store_arrays(const Store *s, StateArray arrays[STORE_MAX_ARRAYS]);

// --- export: rank 0 reads whole tensors, the others lend their rows ------------------------------------------------
// RowSource (checkpoint.h) on rank 0; ctx is the Store: values as f32 (INT8: code * scale). The other ranks are in
// store_lend_rows meanwhile, until rank 0 calls store_rows_end.
int store_rows(void *ctx, const Param *p, int64_t row0, int64_t n, float *out, Err *err);
// CodeSource: codes (n, cols) and scale (n) of a PARAM_INT8 tensor.
int store_codes(void *ctx, const Param *p, int64_t row0, int64_t n, int8_t *codes, float *scale, Err *err);
int store_lend_rows(const Store *s, Err *err);
int store_rows_end(const Store *s, Err *err);
#endif
