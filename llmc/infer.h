// Serving: the quantized forward over a KV cache that generate and eval share.
#ifndef QLLM_INFER_H
#define QLLM_INFER_H
#include "checkpoint.h"
#include "llama.h"
#include "ops.h"

// ARITH_TRAINED runs the operations the trainer ran on the same working values: same bits as its validation.
// ARITH_SERVED keeps the codes packed and uses the fast kernels: weight-only schemes differ from trained by the rounding
// of sums, schemes that quantize activations multiply integers (what train_llama_qat --forward integer trains with: the
// same bits). Integer products of INT8 training (int8qt-int8) are the trainer's operation in both.
typedef enum { ARITH_TRAINED, ARITH_SERVED } Arithmetic;

typedef struct Infer Infer;

typedef struct {
    int B, max_T, max_N;     // most sequences at once; cache length in tokens; most tokens of one call (B*T)
    Arithmetic arith;
    KvFormat kv;             // KV_INT8 is for ARITH_SERVED
    bool as_float;           // ignore the file's plan and run a float model.bin without fake quantization
    // ARITH_SERVED on the CPU: a file that keeps the served forms from run to run, so that the next start maps them
    // instead of making them ("MODEL.served" beside the model). NULL: none. One that is missing, damaged, or of another
    // model, processor or version is made anew; where it cannot be written, infer_new goes on without it and says why in
    // cache_err, whose text is empty otherwise. cache_err NULL: the file is only read, since another rank writes it.
    const char *cache_path;
    Err *cache_err;
} InferOptions;

// Loads an open model, which must stay open as long as *out lives.
int infer_new(Infer **out, const ModelFile *m, const InferOptions *o, Err *err);
void infer_free(Infer *s);

// Empties the cache; the next calls bring n sequences, 1 <= n <= B (after infer_new: B).
void infer_reset(Infer *s, int n);
// Each sequence becomes `copies` of it with the same past, side by side (b goes on as b * copies and those after it),
// as far as B holds them: for contexts that each have several continuations.
void infer_fork(Infer *s, int copies);
// Forgets what follows the first `position` tokens of each sequence (no more than there are): a conversation goes on
// from there.
void infer_rewind(Infer *s, int position);
int infer_position(const Infer *s);                      // tokens in the cache

size_t infer_model_bytes(const Infer *s);                // parameters as held in memory, all of them
size_t infer_size_bytes(const Infer *s);                 // torchao's "model size": head counted, embedding not
size_t infer_bytes_per_token(const Infer *s);            // parameters read for one decoded token, cache not included
size_t infer_cache_bytes(const Infer *s);                // the whole cache
size_t infer_cache_bytes_per_position(const Infer *s);   // what a token adds, and each later one reads
size_t infer_memory_bytes(const Infer *s);               // everything that was allocated

// Appends T tokens for each of n sequences (tokens (n, T)) and runs the model over them.
//   logits: NULL, or (n, V) f32 of the last token of each sequence.
//   losses: NULL, or (n*T) f32, -log p(targets) for targets (n*T) (0 where target < 0; those rows skip the head).
// The bits of a row depend on its own tokens only: not on n, not on how a text is cut into calls (ARITH_TRAINED).
// Token ids and lengths are checked: E_USAGE, and nothing has changed.
int infer_forward(Infer *s, const int32_t *tokens, const int32_t *targets, int T, float *logits, float *losses,
                  Err *err);
// The same tokens through a model and a reference of the same vocabulary, which have been given the same calls before;
// neither's logits leave the device. All (n*T), 0 where the target is < 0: the losses of both, kl the divergence
// sum p_ref (log p_ref - log p) in nats, and same 1 where both hold the same token for the likeliest.
int infer_compare(Infer *s, Infer *ref, const int32_t *tokens, const int32_t *targets, int T, float *losses,
                  float *ref_losses, float *kl, int32_t *same, Err *err);
// One step of decoding, where there is one sequence: runs *token and leaves in its place the one that `sampler` chooses
// next (draw: how many were chosen before it), -1 when no logit is above -infinity. Nothing but the token leaves the
// device.
int infer_next(Infer *s, const Sampler *sampler, uint64_t draw, int32_t *token, Err *err);
#endif
