// What a training step computes with besides the weights: what the backward of each block reads again, and the
// gradients of activations. Letters: B batch, T sequence length, N = B*T tokens, C width, NH query heads, NKV key/value
// heads, HS head size, FF feed-forward width, V vocabulary.
#ifndef QLLM_ACTIVATIONS_H
#define QLLM_ACTIVATIONS_H
#include "llama.h"
#include "ops.h"

// What the backward of one block reads. fq is the activations' fake quantization, or nothing.
typedef struct {
    floatX *x;               // (N, C)              residual stream entering the block
    floatX *ln1;             // (N, C)              fq(rmsnorm(x)): input of q, k, v
    float *rstd1;            // (N)
    floatX *qkv;             // (N, (NH+2*NKV)*HS)  after rope: q heads, k heads, v heads
    floatX *att;             // (N, NH*HS)          attention output, before quantization
    floatX *attq;            // (N, NH*HS)          fq(att): input of o; the same memory as att without quantization
    float *lse;              // (B, NH, T)          log-sum-exp of the attention scores
    floatX *x2;              // (N, C)              residual stream after attention
    floatX *ln2;             // (N, C)              fq(rmsnorm(x2)): input of gate, up
    float *rstd2;            // (N)
    floatX *gateup;          // (N, 2*FF)
    floatX *ffn;             // (N, FF)             fq(silu(gate)*up): input of down
    uint8_t *mask1, *mask_att, *mask2, *mask_ffn;   // --ste clip: 1 where the code was not clipped; else NULL
} BlockActs;

typedef struct {
    int B, T, chunk;         // chunk: rows of logits at a time
    size_t N;
    bool recompute;          // --recompute block: only x is kept for each block, the rest is computed again
    BlockActs *block;        // (L)
    floatX *x_final;         // (N, C)   residual stream after the last block
    floatX *lnf;             // (N, C)   fq(rmsnorm(x_final)): input of the head
    float *rstdf;            // (N)
    uint8_t *maskf;
    floatX *delta;           // (N, C)   output of o or down, added to the residual by the next norm
    float *logits;           // (chunk, V) f32
    floatX *dlogits;         // (chunk, V)
    float *losses;           // (N)
    int32_t *tokens, *targets;   // (N) of the running micro-batch
    float *cos_t, *sin_t;    // (T, HS/2) of rope
    // backward
    floatX *dres;            // (N, C)   gradient of the residual stream
    floatX *dc;              // (N, max(C, NH*HS))   gradient of a norm's or attention's output
    floatX *dwide;           // (N, max(2*FF, (NH+2*NKV)*HS))
    floatX *dffn;            // (N, FF)
    floatX *scaled;          // (max(N * widest linear, chunk * V)) a gradient times row scales; NULL if not needed
    StepState *state;
    // private
    void **owned;
    int n_owned;
} Acts;

// What of it a program needs. Tokens of all micro-batches of a step lie one after the other, so that they are there
// before it begins.
typedef struct {
    int B, T, grad_accum;
    bool recompute;          // one full block for all layers
    bool quantized;          // inputs of linears may be fake-quantized: attq is not att
    bool masks;              // --ste clip
    bool row_scales;         // some linear's row scales fold into gradients: scaled
} ActsShape;

// Adds up the bytes of all of it.
double acts_bytes(const LlamaConfig *c, const ActsShape *shape);
// Allocates it and fills the rope tables.
int acts_alloc(Acts *s, const LlamaConfig *c, const ActsShape *shape, Err *err);
void acts_free(Acts *s);
#endif
