// Sharding of parameters, gradients and optimizer state over ranks, by rows (FSDP, ZeRO). The model asks for a unit's
// weights and hands over its gradients; whether they are gathered, kept, or were always there is settled here. Units
// are the embedding (SHARD_EMBED), the blocks 0 .. L-1, and the head with the final norm (L).
//
//   level   each rank keeps whole                  and its own rows of
//   none    weights, gradients, optimizer state                                (all ranks update everything)
//   optim   weights, gradients                     optimizer state             (ZeRO 1)
//   grad    weights                                gradients, optimizer state  (ZeRO 2)
//   full    embedding, head and one block          weights too                 (ZeRO 3)
//
// Weights travel once after each update (full: each time a block is needed), one all-gather a block: as codes and
// scales where they are fake-quantized or INT8, which lose nothing, else as floatX. Gradients travel as f32, one
// all-to-all a block, and are added in rank order: after the last micro-step under none and optim, after each under grad
// and full; those of embedding, head and final norm always after the last. While a block is computed the next one's
// weights and the one before's gradients are on their way.
#ifndef QLLM_SHARD_H
#define QLLM_SHARD_H
#include "comm.h"
#include "llama.h"
#include "ops.h"
#include "split.h"

typedef enum { SHARD_NONE, SHARD_OPTIM, SHARD_GRAD, SHARD_FULL } ShardLevel;
#define SHARD_EMBED (-1)

typedef struct Store Store;    // store.h: the parameters that a rank keeps for its update

// The rows of every tensor that one rank holds of masters and optimizer state, in arenas of its own.
typedef struct {
    const ParamTable *table;   // the whole tensors
    ParamTable held;           // the same tensors with the rows held: rows (may be 0), offset, row_offset
    int64_t *row0;             // (table->n) the first row held
    RowSplit *split;           // (table->n) whose rows are whose, also where every rank holds all
    int R, rank;
    bool replicated;           // every rank holds every row: held equals table
} OwnTable;

// tied_head: a second quantized view of a tied table (NULL: none), whose blocks must stay on one rank too.
int own_table_build(OwnTable *o, const ParamTable *table, const QuantSpec *tied_head, int R, int rank, bool replicated,
                    Err *err);
void own_table_free(OwnTable *o);

// Bytes of one rank, and bytes that one rank receives, as shard_plan adds them up.
typedef struct {
    double weights, gradients;                      // whole ones, in places for what is gathered
    double own_gradients;                           // its rows
    double buffers;                                 // on the way: packed weights, gradients to send and received
} ShardMemory;
typedef struct { double linears, others, gradients; } WireBytes;

typedef struct ShardUnit ShardUnit;
typedef struct {
    const LlamaConfig *c;
    const QuantPlan *plan;
    ShardLevel level;
    bool gather_quantized;
    OwnTable own;
    ShardMemory memory;
    WireBytes wire;            // received since the start

    // What is private follows. Whole tensors lie at place[i] in work (bytes) and grad, under full all blocks at one.
    uint8_t *work;
    float *wscale, *grad;
    size_t *work_place, *row_place, *grad_place;    // (table->n)
    floatX *head;              // a tied table's second view, if it has one
    float *head_scale;
    float *scratch;            // bf16 parameters widened, before fake quantization; NULL where there are none
    float *own_grad;           // laid out by own.held; NULL where own rows are summed in place in grad
    ShardUnit *unit;           // (L + 2)
    uint8_t *wire_own, *wire_all;
    float *send, *receive;
    size_t n_work, n_rows, n_grad, n_scratch, own_bytes, all_bytes, grad_bytes;     // n_work: bytes
    bool fake_quant;
    bool block_scales;         // some linear is fake-quantized to codes: row scales of blocks are written and sent
    int held;                  // full: the block that lies in the blocks' place, or -1
    struct { int unit, chunk; CommTicket ticket; } gathering, reducing;   // unit -1: none
    bool reduce_adds;
    StepState *states;         // (R)
} Shard;

// Lays everything out for rank `rank` of R; allocates nothing on the device. c, plan and table must outlive it, and the
// table has its formats (param_table_formats). E_USAGE where only a part of a fused linear is INT8 rows.
int shard_plan(Shard *s, const LlamaConfig *c, const QuantPlan *plan, const ParamTable *table, ShardLevel level,
               bool gather_quantized, int R, int rank, Err *err);
// Bytes that a rank receives in one step of grad_accum micro-steps, with fake quantization on.
WireBytes shard_plan_wire(const Shard *s, int grad_accum);
// Of it, bytes of unit l each time it is gathered, and each time its gradients are summed (none: once more to spread),
// and in how many collectives.
void shard_plan_unit(const Shard *s, int l, double *gather, double *gradients, int *collectives);
int shard_alloc(Shard *s, Err *err);
void shard_free(Shard *s);

// --- what the model calls ----------------------------------------------------------------------------------------
// Before the forward of unit l: its weights are there, and unit l + 1 is on its way.
void shard_forward(Shard *s, int l);
// Before the backward of unit l: its weights are there, block l - 1 is on its way, and there is room for its gradients,
// those of norms zeroed where they begin. Returns whether gradients of linears are to be added to what is there.
bool shard_backward(Shard *s, int l, int micro);
// After the backward of unit l: its gradients go to whoever updates the rows. last: of the micro-steps.
void shard_gradients(Shard *s, int l, int micro, bool last);

// Where tensor i of the table (or its gradient) lies whole.
static inline floatX *shard_weight(const Shard *s, int i) { return (floatX *)(void *)(s->work + s->work_place[i]); }
// The same for a tensor of INT8 rows, whose working weight is its codes (Param.format PARAM_INT8).
static inline int8_t *shard_codes(const Shard *s, int i) { return (int8_t *)(s->work + s->work_place[i]); }
static inline float *shard_weight_scale(const Shard *s, int i) { return s->wscale + s->row_place[i]; }
static inline float *shard_gradient(const Shard *s, int i) { return s->grad + s->grad_place[i]; }
// The second view of a tied table whose head is INT8 rows (plan->tied_head): codes (V, C); scales are head_scale (V).
static inline int8_t *shard_head_codes(const Shard *s) { return (int8_t *)(void *)s->head; }

// --- what the update calls ---------------------------------------------------------------------------------------
// After the last micro-step: gradients of own rows are sums over all ranks.
void shard_finish_gradients(Shard *s);
// The gradient of own rows of tensor i, (own.held.p[i].rows, cols).
float *shard_own_gradient(const Shard *s, int i);
// state->grad_squares over all ranks, and their losses, tokens and wishes to stop.
void shard_sum_state(Shard *s, StepState *state, bool with_gradients);
// Whether the update is to write working weights itself, at shard_weight: no other rank waits for them.
static inline bool shard_updates_weights(const Shard *s) { return s->level == SHARD_NONE; }
// The parameters in the store (of this shard) have changed: whole weights are gathered anew when next asked for.
void shard_weights_changed(Shard *s, const Store *store, bool fake_quant);
// The same, with all working values made again from the store: fake quantization was switched on or off.
void shard_requantize(Shard *s, const Store *store, bool fake_quant);
#endif
