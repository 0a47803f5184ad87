// Serving: the quantized forward over a KV cache that generate and eval share.
#ifndef QLLM_INFER_H
#define QLLM_INFER_H
#include "checkpoint.h"
#include "llama.h"
#include "ops.h"

// ARITH_TRAINED runs the operations the trainer ran on the same working values: same bits as its validation.
// ARITH_SERVED keeps the codes packed and uses the fast kernels where they exist.
typedef enum { ARITH_TRAINED, ARITH_SERVED } Arithmetic;

typedef struct Infer Infer;

// Loads an open model. max_T: cache length in tokens; max_N: most tokens of one call (B*T).
// as_float: ignore the file's plan and run a float model.bin without fake quantization (its weights as they are).
int infer_new(Infer **out, const ModelFile *m, int B, int max_T, int max_N, Arithmetic arith, bool as_float, Err *err);
void infer_free(Infer *s);
void infer_reset(Infer *s);                              // empties the cache
int infer_position(const Infer *s);                      // tokens in the cache
size_t infer_weight_bytes(const Infer *s);               // as held in memory, embeddings apart from linears (lm-eval's size rule: head counted)
size_t infer_bytes_per_token(const Infer *s);            // weights read for one decoded token, cache not included
size_t infer_cache_bytes(const Infer *s);

// Appends T tokens for each of B sequences (tokens (B, T)) and runs the model over them.
//   logits: NULL, or (B, V) f32 of the last token of each sequence.
//   losses: NULL, or (B*T) f32, -log p(targets) for targets (B*T) (0 where target < 0).
int infer_forward(Infer *s, const int32_t *tokens, const int32_t *targets, int T, float *logits, float *losses, Err *err);
#endif
