// What a Llama is: its configuration, and the table of its parameters.
// Letters: B batch, T tokens in a sequence, C width (hidden_size), L layers, V vocabulary, NH query heads,
// NKV key/value heads, HS head size, FF width of the feed-forward (intermediate_size), N = B*T tokens.
#ifndef QLLM_LLAMA_H
#define QLLM_LLAMA_H
#include "common.h"
#include "optimizer.h"
#include "quant.h"

typedef enum { ROPE_DEFAULT, ROPE_LINEAR, ROPE_LLAMA3 } RopeScaling;

typedef struct {
    int C, L, NH, NKV, HS, FF, V;
    int max_T;                       // max_position_embeddings
    float norm_eps;                  // rms_norm_eps
    double rope_theta;
    RopeScaling rope_scaling;
    double rope_factor, rope_low_freq_factor, rope_high_freq_factor;
    int rope_original_max_T;
    bool tied;                       // tie_word_embeddings: the head reads the embedding table
    int bos, eos[8], n_eos;          // token ids, -1 and 0 where there is none
} LlamaConfig;

// Hugging Face config.json (LlamaForCausalLM). Unknown architectures, biases, other activations and impossible
// sizes are errors that name the field.
int llama_config_from_json(LlamaConfig *c, const char *text, size_t len, Err *err);
char *llama_config_to_json(const LlamaConfig *c, const char *torch_dtype);   // malloc'ed; what transformers reads
int llama_config_named(LlamaConfig *c, const char *name, Err *err);          // 135M, 1B, 8B, 8B-4, mini, tiny, ...
const char *llama_config_names(void);                                        // for messages
int llama_config_validate(const LlamaConfig *c, Err *err);

// Inverse frequencies of RoPE, HS/2 of them in f32, scaling applied (transformers' modeling_rope_utils).
void llama_rope_inv_freq(float *inv_freq, const LlamaConfig *c);
// cos and sin, (T, HS/2) f32 each, for positions 0..T-1.
void llama_rope_table(float *cos_t, float *sin_t, const LlamaConfig *c, int T);

// Parameters in matmuls, head included (a tied table counts once, as the head): the N of 6N FLOPs a token.
double llama_matmul_params(const LlamaConfig *c);
// Training FLOPs a token: 6 * matmul parameters + 6 * L * NH * HS * T (causal attention). Recomputation is not counted.
double llama_train_flops_per_token(const LlamaConfig *c, int T);

// ---------------------------------------------------------------------------------------------
// The parameter table. Parameters lie in one arena in this order; q,k,v are adjacent, and gate,up, so that one matmul
// does all of them. Offsets of groups are multiples of 64 elements.

typedef enum {
    ROLE_EMBED, ROLE_NORM1, ROLE_Q, ROLE_K, ROLE_V, ROLE_O, ROLE_NORM2, ROLE_GATE, ROLE_UP, ROLE_DOWN,
    ROLE_FINAL_NORM, ROLE_HEAD, ROLE_COUNT
} ParamRole;

typedef struct {
    char name[96];                   // Hugging Face name, "model.layers.3.self_attn.q_proj.weight"
    ParamRole role;
    int layer;                       // -1 outside the blocks
    int64_t rows, cols;              // (OC, C); norms are (1, C). Sharding splits rows.
    size_t offset;                   // elements from the start of the arena
    size_t row_offset;               // rows from the start of the per-row scales
    bool trainable, decay;           // norms do not decay
    QuantScheme scheme;              // of this tensor (embedding: .weight only)
    ParamFormat format;              // how training keeps it; PARAM_INT8 is also how it works
    StateFormat state;               // and AdamW's moments of it
} Param;

typedef struct {
    Param *p;                        // n of them, in arena order
    int n;
    size_t n_elements;               // arena length, padding included
    size_t n_rows;                   // length of the per-row scales
    size_t n_params;                 // without padding
    int L;
} ParamTable;

// Builds the table and looks up each tensor's scheme in the plan. Refuses a group that does not divide its row and
// q/k/v or gate/up with different activation schemes, since they share one input.
int param_table_build(ParamTable *t, const LlamaConfig *c, const QuantPlan *plan, Err *err);
// How training keeps the parameters (f32 with f32 moments after param_table_build): those whose scheme is
// quant_is_int8_rows as INT8, norms in f32, the others in `others`; moments in `state` where state_format allows. Norms
// are few and near 1, where a step of bf16 is 0.8 %: rounded stochastically they would wander by some percent in a few
// hundred steps, with nothing that pulls them back.
void param_table_formats(ParamTable *t, ParamFormat others, StateFormat state);
void param_table_free(ParamTable *t);
const Param *param_get(const ParamTable *t, int layer, ParamRole role);      // layer ignored outside the blocks; NULL if none
static inline bool param_is_norm(const Param *p) {
    return p->role == ROLE_NORM1 || p->role == ROLE_NORM2 || p->role == ROLE_FINAL_NORM;
}
const Param *param_find(const ParamTable *t, const char *name);

// How the embedding table is quantized. It is read row by row, with no matmul after it to apply a row's scale, so one
// scale a row becomes one group a row: the same codes and scale, but rows that work as values.
QuantSpec llama_embedding_spec(const QuantPlan *plan, const LlamaConfig *c);

// Random weights: normal(0, 0.02), output projections scaled by 1/sqrt(2L), norms one. Philox keyed by (seed, tensor,
// element): the same values whatever the order or the number of ranks. out: `n` values from element `first`, f32.
void param_init_random(float *out, const Param *p, const LlamaConfig *c, uint64_t seed, size_t first, size_t n);
#endif
