// The operations. Every operation is declared and documented here once; llmc/cpu/NAME.c and llmc/cuda/NAME.cu implement
// it. Model code calls ops->NAME and never sees a device, a rank or a stream.
//
// Conventions: outputs first, then inputs, then sizes. X means floatX (bf16, or f32 when built with PRECISION=fp32),
// statistics, losses, gradients of parameters and master weights are f32. N = B*T tokens. Tensors are row-major and do
// not overlap unless said. Every operation is deterministic: the same inputs give the same bits, whatever the number of
// threads. Pointers are device memory of the same backend. Sizes are checked when the model is built, so operations do
// not fail for them; what a library or the system refuses is kept as the backend's first error, which device_sync()
// returns once a step.
//
// Activation fake quantization belongs to the operation that produces a linear's input: where `act` is not NULL and has
// bits, each row (token) of the output, first rounded to X, is quantized and dequantized by quant.h with the row's own
// scale (and zero point), rounded to X. `mask`, when not NULL, receives one byte an element: 1 where the code lay
// within [qmin, qmax] before clamping (what --ste clip multiplies the gradient with).
#ifndef QLLM_OPS_H
#define QLLM_OPS_H
#include "common.h"
#include "optimizer.h"
#include "quant.h"
#include "sampler.h"
#include "split.h"
#ifdef __cplusplus
extern "C" {
#endif

// What changes from step to step. Lives in device memory; operations read it through a pointer, so that a step can be
// captured as a graph and skipped without the host looking.
typedef struct {
    int32_t t;              // optimizer steps done, this one included: 1 at the first update (skipped ones do not count);
                            // the caller's, no operation changes it
    float lr;
    float grad_scale;       // multiplies summed gradients: clip / tokens; written by global_norm
    float norm;             // global gradient norm before clipping, of the mean gradient; written by global_norm
    int32_t skip;           // 1: loss or norm is not finite, updates leave everything as it is; written by global_norm
    double loss_sum;        // sum of token losses since state_begin; written by loss_accumulate
    int64_t tokens;         // tokens that count in loss_sum
    double grad_squares;    // sum of squared gradients; added to by sum_squares
    int32_t stop;           // a rank asks all to stop after this step: bits that the caller sets, joined by state_sum
    uint64_t seed;          // for stochastic rounding
} StepState;

// double, so that 1 - beta is rounded once: 1 - 0.9 is 0.1f, and 1 - 0.9f is not.
typedef struct { double beta1, beta2, eps, weight_decay; } AdamWParams;

// Keys and values of one block as serving keeps them: for each sequence and position NKV keys, then NKV values, of HS.
//   KV_X     values (B, max_T, 2, NKV, HS) X
//   KV_INT8  values (B, max_T, 2, NKV, HS) int8, scale (B, max_T, 2, NKV) f32: each vector of HS is a row of INT8 as in
//            optimizer.h (int8_row_scale, int8_row_inv, int8_nearest of the values of X)
typedef enum { KV_X, KV_INT8 } KvFormat;
typedef struct { void *values; float *scale; KvFormat format; int max_T, NKV, HS; } KvCache;

// Where decoding stands, in device memory: what a recorded step reads and moves on.
typedef struct {
    int32_t pos;            // positions in the cache: that of the token that comes next
    int32_t token;          // chosen last, the next one's input
    uint64_t draw;          // of the random numbers: new tokens so far
} DecodeState;

typedef struct Ops {
    const char *name;       // "cpu", "cuda", "cudasim"

    // --- embedding -----------------------------------------------------------------------------------------------
    // out (N, C) X = wte[tokens[n]]; wte (V, C) X; tokens (N) i32 in [0, V).
    void (*embedding_forward)(floatX *out, const int32_t *tokens, const floatX *wte, size_t N, int C, int V);
    // dwte (V, C) f32 += dout (N, C) X scattered by token, tokens ascending by position.
    void (*embedding_backward)(float *dwte, const floatX *dout, const int32_t *tokens, size_t N, int C, int V);

    // --- normalization -------------------------------------------------------------------------------------------
    // rmsnorm_fq_forward: residual add, RMSNorm and activation fake quantization in one pass.
    //   res (N, C) X = bf(x + delta)          delta may be NULL, then res may be NULL too and x is normalized itself
    //   rstd (N) f32 = 1 / sqrt(mean(res^2) + eps)    may be NULL
    //   y (N, C) X   = fq(X(res * rstd * weight))     f32 inside, one rounding to X before fq
    // The sum of squares is f32 in 16 partial sums (element c goes to sum c mod 16, s = fmaf(v, v, s)), folded +8, +4,
    // +2, +1. res may be x. Where act is off, mask is all 1.
    void (*rmsnorm_fq_forward)(floatX *res, floatX *y, float *rstd, uint8_t *mask, const floatX *x, const floatX *delta,
                               const floatX *weight, size_t N, int C, float eps, const QuantSpec *act);
    // dres (N, C) X = bf(dres + dx); dweight (C) f32 += ; dy (N, C) X gradient of y, x = the normalized tensor (res
    // above). mask (N, C) or NULL multiplies dy.
    void (*rmsnorm_backward)(floatX *dres, float *dweight, const floatX *dy, const uint8_t *mask, const floatX *x,
                             const floatX *weight, const float *rstd, size_t N, int C);

    // --- linear --------------------------------------------------------------------------------------------------
    // linear_forward: y (N, OC) X = X( (x (N, C) X) . (w (OC, C) X)^T * wscale ), f32 accumulation.
    // wscale (OC) f32 or NULL: per-row scale of a weight that works as its integer codes.
    // Bits of a row do not depend on N or on the number of threads (on a GPU: among calls of at most 8 rows, and among
    // larger ones).
    void (*linear_forward)(floatX *y, const floatX *x, const floatX *w, const float *wscale, size_t N, int C, int OC);
    // The same with f32 output, for logits.
    void (*linear_forward_f32)(float *y, const floatX *x, const floatX *w, const float *wscale, size_t N, int C, int OC);
    // dx (N, C) X = (dy (N, OC) X * wscale) . w; wscale folds into dy, rounded to X, in dy_scaled (N, OC) X scratch
    // (NULL when wscale is NULL).
    void (*linear_backward_input)(floatX *dx, const floatX *dy, const floatX *w, const float *wscale, floatX *dy_scaled,
                                  size_t N, int C, int OC);
    // dw (OC, C) f32 = dy^T . x when accumulate is false, += when true.
    void (*linear_backward_weight)(float *dw, const floatX *dy, const floatX *x, size_t N, int C, int OC, bool accumulate);

    // --- linear with INT8 weights --------------------------------------------------------------------------------
    // codes (OC, C) int8, wscale (OC) f32: the weight is codes * wscale by row (optimizer.h, PARAM_INT8).
    // linear_w8_forward: y (N, OC) X = X( (x (N, C) X . codes^T) * wscale ): the bits that linear_forward gives for the
    // codes as X, which are exact. They become X in working memory, at most one tensor of them at a time.
    void (*linear_w8_forward)(floatX *y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C,
                              int OC);
    void (*linear_w8_forward_f32)(float *y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C,
                                  int OC);
    // dx (N, C) X = X(dy (N, OC) X * wscale) . codes; dy_scaled (N, OC) X scratch. Where OC is above 4096 a wing may
    // cut the sum there and add the pieces in f32, in order: rounding apart, what linear_backward_input gives.
    void (*linear_w8_backward_input)(floatX *dx, const floatX *dy, const int8_t *codes, const float *wscale,
                                     floatX *dy_scaled, size_t N, int C, int OC);
    // Integer products. A row of n values is quantized by int8_row_scale, int8_row_inv and int8_nearest (optimizer.h)
    // of the values of X. acc: the int32 sum, exact; sums over more than 2^16 products are cut into pieces of 2^16,
    // whose sums become f32 and are added in order. All bits are the same on every device and for any number of
    // threads.
    // linear_i8_forward: y (N, OC) X = X( (f32(acc) * sx) * wscale ), sx the scale of a row (token) of x.
    void (*linear_i8_forward)(floatX *y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C,
                              int OC);
    void (*linear_i8_forward_f32)(float *y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C,
                                  int OC);
    // dx (N, C) X = X( f32(acc) * sg ): rows (tokens) of the f32 products dy * wscale are quantized, and multiply
    // codes.
    void (*linear_i8_backward_input)(floatX *dx, const floatX *dy, const int8_t *codes, const float *wscale, size_t N,
                                     int C, int OC);
    // dw (OC, C) f32 = or += (f32(acc) * sg) * sx: columns of dy (N, OC) and of x (N, C) are quantized over all N
    // tokens, with scales sg (OC) and sx (C).
    void (*linear_i8_backward_weight)(float *dw, const floatX *dy, const floatX *x, size_t N, int C, int OC,
                                      bool accumulate);

    // --- attention -----------------------------------------------------------------------------------------------
    // rope: rotates heads in place. x (N, ldx) X: NH_rot heads of HS each at the start of each row (q heads then k
    // heads); element i and i + HS/2 form a pair (Hugging Face's rotate_half). Position of row n is pos0 + n % T.
    // cos_t, sin_t (>= pos0 + T, HS/2) f32. inverse rotates back (the backward).
    void (*rope)(floatX *x, const float *cos_t, const float *sin_t, size_t N, int T, int pos0, int ldx, int NH_rot, int HS,
                 bool inverse);
    // attention_forward: causal softmax(q k^T / sqrt(HS)) v, grouped-query: query head h reads key head h / (NH / NKV).
    //   o (B, T, NH*HS) X, row stride ldo;  lse (B, NH, T) f32 log-sum-exp of the scaled scores, or NULL
    //   q (B, T, NH*HS) X, row stride ldq;  k, v (B, Tk, NKV*HS) X, row stride ldkv, batch stride skv elements
    // Query t stands at position Tk - T + t and sees keys 0..that. Online softmax over key tiles that start at
    // multiples of a fixed size, so the bits of a row depend neither on T nor on B (on a GPU: among calls of at most 16
    // rows a key head, T * NH / NKV, and among larger ones). Never [T, T] in memory.
    void (*attention_forward)(floatX *o, float *lse, const floatX *q, const floatX *k, const floatX *v, int B, int T, int Tk,
                              int NH, int NKV, int HS, int ldo, int ldq, int ldkv, size_t skv);
    // attention_backward: dqkv (B*T, (NH+2*NKV)*HS) X from do, for a packed qkv of the same shape (q heads, k heads, v
    // heads).
    void (*attention_backward)(floatX *dqkv, const floatX *dout, const floatX *qkv, const floatX *o, const float *lse, int B,
                               int T, int NH, int NKV, int HS);
    // fakequant_forward: y (N, C) X = fq(x (N, C) X) by row; y may be x. For producers that do not see a whole token.
    void (*fakequant_forward)(floatX *y, uint8_t *mask, const floatX *x, size_t N, int C, const QuantSpec *act);
    // dx (N, C) X = mask ? dx : 0.
    void (*mask_backward)(floatX *dx, const uint8_t *mask, size_t N, int C);

    // --- feed-forward --------------------------------------------------------------------------------------------
    // y (N, FF) X = fq(X(silu(gate) * up)), gateup (N, 2*FF) X holds gate then up in each row. f32 inside.
    void (*swiglu_fq_forward)(floatX *y, uint8_t *mask, const floatX *gateup, size_t N, int FF, const QuantSpec *act);
    // dgateup (N, 2*FF) X from dy (N, FF) X, times mask where given; dgateup may be gateup.
    void (*swiglu_backward)(floatX *dgateup, const floatX *dy, const uint8_t *mask, const floatX *gateup, size_t N, int FF);

    // --- loss ----------------------------------------------------------------------------------------------------
    // classifier: cross entropy of logits (n, V) f32 against targets (n) i32, a target < 0 not counting.
    //   losses (n) f32 = log-sum-exp - logit[target], 0 where the target does not count
    //   dlogits (n, V) X = softmax - onehot, 0 where the target does not count; NULL: losses only.
    void (*classifier)(float *losses, floatX *dlogits, const float *logits, const int32_t *targets, size_t n, int V);
    // state->loss_sum += sum of losses in order, in double; state->tokens += number of targets >= 0.
    void (*loss_accumulate)(StepState *state, const float *losses, const int32_t *targets, size_t N);

    // --- update --------------------------------------------------------------------------------------------------
    // state->grad_squares += sum grad^2, grad (n) f32. Blocks of 2^16 are summed in double, each in 16 lanes folded +8,
    // +4, +2, +1; the blocks' sums are added in order, then to the state.
    void (*sum_squares)(StepState *state, const float *grad, size_t n);
    // Of what every rank found: loss_sum, tokens and grad_squares of state = sums over all[0], ..., all[R - 1] in this
    // order, stop = their bits together. all (R) in device memory, not state itself. The rest of state stays.
    void (*state_sum)(StepState *state, const StepState *all, int R);
    // state->norm = sqrt(grad_squares) / tokens, grad_scale = min(1, max_norm / norm) / tokens (max_norm <= 0: no
    // clipping), skip = loss or norm not finite, or no token counts (tokens 0); grad_scale is 0 then.
    void (*global_norm)(StepState *state, float max_norm);
    // adamw_fq: AdamW on a (rows, cols) tensor and its requantized working copy in the same pass.
    //   g = grad * grad_scale; f32 throughout, each operation rounded, in this order (torchao's low-bit optimizers):
    //   p -= (lr*wd)*p; m += (1-b1)*(g-m); v += (1-b2)*(g*g-v); p -= (lr*(m/bc1)) / (sqrt(v)/sqrt(bc2) + eps)
    //   with bc = 1 - pow_int_f32(b, t); then work, wscale as weight_fq below. Nothing changes when state->skip.
    // A scale of rows or blocks is made while they are in cache; one of the whole tensor takes a second pass.
    // work NULL: the update alone (wscale and wq are not read); others get the weights from weight_pack. rows may be 0.
    void (*adamw_fq)(float *master, float *m, float *v, floatX *work, float *wscale, const float *grad,
                     const StepState *state, const AdamWParams *h, const QuantSpec *wq, int64_t rows, int64_t cols);
    // sgd_fq: buf = momentum*buf + (g + wd*p) (torch.optim.SGD, no dampening); p -= lr*buf. work NULL as in adamw_fq.
    void (*sgd_fq)(float *master, float *buf, floatX *work, float *wscale, const float *grad, const StepState *state,
                   float momentum, float weight_decay, const QuantSpec *wq, int64_t rows, int64_t cols);
    // weight_fq: working values from masters; the one operation behind switching fake quantization on and off.
    //   w16 = bf16(master). wq NULL or bits == 0: work = X(master), wscale = 1.
    //   quant_works_as_codes(wq): work = code, wscale[row] = scale. Otherwise work = bf16(dequantized value), wscale =
    //   1.
    // Codes are quant_code's: a NaN weight is taken for zero, as the packed file takes it.
    // wscale (rows) f32 may be NULL when no row scale is wanted.
    void (*weight_fq)(floatX *work, float *wscale, const float *master, const QuantSpec *wq, int64_t rows, int64_t cols);
    // weight_ste_mask: --ste clip. grad (rows, cols) f32 = 0 where bf16(master)'s code lies outside [qmin, qmax]
    // unclamped.
    void (*weight_ste_mask)(float *grad, const float *master, const QuantSpec *wq, int64_t rows, int64_t cols);

    // adamw_low: the step of adamw_fq for what is kept in other formats (optimizer.h). The parameter and its moments
    // are read as f32, the moments stored anew by blocks, and the parameter as
    //   f32    itself
    //   bf16   rounded by `rounding`: bf16_stochastic, or to nearest
    //   INT8   a new scale from the new values of each row, and codes by `rounding`: int8_stochastic or int8_nearest
    // in place; what is in between is some rows at most, never the tensor. Then work (rows, cols) X and wscale as
    // adamw_fq, from the stored parameter; work NULL: no working values, as always for INT8, which works as it is.
    // tensor: its number in the parameter table; row0: where these rows begin in it (whole blocks of m and v).
    void (*adamw_low)(StoredParam p, StoredState m, StoredState v, floatX *work, float *wscale, const float *grad,
                      const StepState *state, const AdamWParams *h, const QuantSpec *wq, Rounding rounding, int tensor,
                      int64_t row0, int64_t rows, int64_t cols);
    // int8_rows: codes and scale (rows) of a parameter (f32 or bf16) by row, to nearest: how INT8 weights begin, and
    // each new view of a table for an INT8 head.
    void (*int8_rows)(int8_t *codes, float *scale, StoredParam from, int64_t rows, int64_t cols);
    // widen: out (n) f32 = in (n) bf16.
    void (*widen)(float *out, const bf16 *in, size_t n);

    // --- between ranks -------------------------------------------------------------------------------------------
    // A tensor's rows are dealt out by `split` (split.h). On the wire rank r's part lies at wire + r * stride bytes,
    // stride a multiple of 16. Rows [k0, k0 + kn) of each rank's own take part, where a rank has so many; k0 and kn are
    // multiples of split.unit. R, kn and counts may be such that a rank has none.
    //
    // rows_pack: wire <- rows of all ranks from a tensor (split.rows, row_bytes) of bytes; rows_unpack: back. Rows and
    // wire are aligned to 16 bytes or to row_bytes' largest power of two.
    void (*rows_pack)(void *wire, size_t stride, const void *tensor, const RowSplit *split, int64_t k0, int64_t kn,
                      size_t row_bytes);
    void (*rows_unpack)(void *tensor, const void *wire, size_t stride, const RowSplit *split, int64_t k0, int64_t kn,
                        size_t row_bytes);
    // weight_pack: codes, bf16 scales and zero points of `rows` rows of masters, laid out by quant_wire_layout for kn
    // >= rows rows: exactly those that weight_fq uses. wq has bits; rows are whole blocks.
    void (*weight_pack)(uint8_t *wire, const float *master, const QuantSpec *wq, int64_t rows, int64_t cols, int64_t kn);
    // weight_unpack: working values of those rows of the whole tensor, work (split.rows, cols) and wscale (split.rows)
    // or NULL, from every rank's part: the bits that weight_fq writes.
    void (*weight_unpack)(floatX *work, float *wscale, const uint8_t *wire, size_t stride, const RowSplit *split,
                          int64_t k0, int64_t kn, const QuantSpec *wq, int64_t cols);
    // sum_ranks: out (n) f32 = in[0] + in[1] + ... + in[R - 1] in this order, in[r] at in + r * stride values;
    // accumulate: out += that sum.
    void (*sum_ranks)(float *out, const float *in, size_t stride, int R, size_t n, bool accumulate);

    // --- serving -------------------------------------------------------------------------------------------------
    // dequant_rows: working values (rows, cols) X and wscale (rows) f32 or NULL of packed codes (quant.h), exactly
    // those weight_fq wrote in training. codes: rows of quant_row_bytes; scale, zero f32, one a block, (rows/b0,
    // cols/b1); zero NULL when symmetric. The tensor starts at a block boundary.
    void (*dequant_rows)(floatX *work, float *wscale, const uint8_t *codes, const float *scale, const float *zero,
                         const QuantSpec *wq, int64_t rows, int64_t cols);
    // embedding_q_forward: out (N, C) X = rows of a packed table by token: dequant_rows' values. codes, scale, zero of
    // the whole table (V, C), blocks within rows; tokens (N) i32 in [0, V).
    void (*embedding_q_forward)(floatX *out, const int32_t *tokens, const uint8_t *codes, const float *scale,
                                const float *zero, const QuantSpec *wq, size_t N, int C, int V);
    // qmatvec_forward: y (N, OC) X = x (N, C) X . w^T for few tokens, straight from packed codes: bound by the codes'
    // bytes. Sums of a block are f32 of x times integer code (less its integer zero point), 16 lanes apart, scaled once
    // a block; zero points of the float domain multiply the block's sum of x. So it differs from the trained arithmetic
    // by f32 rounding: |err| <= (C + 6) * 2^-23 * sum |x| |w| plus one rounding to X, where |w| is |code - mid| * scale
    // + |zero| in the float domain. It also keeps code * scale unrounded, which trained arithmetic rounds to bf16. Bits
    // of a token do not depend on N or on the number of threads.
    void (*qmatvec_forward)(floatX *y, const floatX *x, const uint8_t *codes, const float *scale, const float *zero,
                            const QuantSpec *wq, size_t N, int C, int OC);

    // Served form of a linear: its codes, scales and zero points in the order that this wing's kernels read, in one
    // buffer of device memory that only these operations look into. act: how rows of the input are quantized, NULL or
    // without bits for weight-only.
    // served_bytes: size of the buffer, a host function. 0: the wing has no such form (blocks of several rows; under a
    // quantized input zero points in the float domain, and sums that int32 might not hold); the caller unpacks instead.
    size_t (*served_bytes)(const QuantSpec *wq, const QuantSpec *act, int OC, int C);
    // served_pack: rows [row0, row0 + rows) of (OC, C) from packed codes (quant.h) and their f32 scales and zero points
    // (those of these rows; zero NULL when symmetric). Rows come in ascending order, all of them, row0 = 0 first. Scales
    // and zero points are bf16 values, as files hold them (f32 only where a row is one block), and may be kept as such.
    void (*served_pack)(void *served, const uint8_t *codes, const float *scale, const float *zero, const QuantSpec *wq,
                        const QuantSpec *act, int64_t row0, int64_t rows, int OC, int C);
    // served_forward: y (N, OC) X = x (N, C) X . w^T, any N.
    //   weight-only: for few tokens from the codes as they stream, in f32 with the error of qmatvec_forward above
    //   (|err| <= (C + 6) * 2^-23 * sum |x| |w| before the rounding to X); for many, unpacked in pieces that stay in
    //   cache and multiplied as linear_forward does. Which, depends on N alone.
    //   act: rows of x are quantized (quant.h, dtype of X) and multiplied in integers. acc of a block of the weight's
    //   row is the exact sum of (qx - zx) * (qw - zw) over it, as f32 (blocks above 2^16 columns: pieces of 2^16, their
    //   f32 sums added in order).
    //     one block a row:  y = X((f32(acc) * sx) * sw)
    //     several:          t = 0; t = fmaf(f32(acc_g), sw_g, t) for ascending g; y = X(t * sx)
    //   The same bits on every processor and wing, for any N and any number of threads.
    void (*served_forward)(floatX *y, const floatX *x, const void *served, const QuantSpec *wq, const QuantSpec *act,
                           size_t N, int C, int OC);
    void (*served_forward_f32)(float *y, const floatX *x, const void *served, const QuantSpec *wq, const QuantSpec *act,
                               size_t N, int C, int OC);
    // matvec_forward: linear_forward (without wscale) for few tokens, N <= 8: bound by the weight's bytes, with its own
    // order of f32 sums. Bits of a row do not depend on N or on the number of threads.
    void (*matvec_forward)(floatX *y, const floatX *x, const floatX *w, size_t N, int C, int OC);
    void (*matvec_forward_f32)(float *y, const floatX *x, const floatX *w, size_t N, int C, int OC);

    // rope_append: rope on the queries and keys of qkv (B*T, (NH + 2*NKV) * HS) X in place, then the keys and values of
    // each token to their place in the cache. Token t of sequence b stands at position *pos + t; pos is device memory,
    // so that a recorded decoding step can be replayed.
    void (*rope_append)(floatX *qkv, const KvCache *cache, const float *cos_t, const float *sin_t, const int32_t *pos,
                        int B, int T, int NH);
    // attention_cached: o (B*T, NH*HS) X, causal attention of the queries in qkv (as in rope_append, after it) over the
    // cache: attention_forward with Tk = *pos + T keys, which INT8 caches hold as X(code * scale). Its bits may depend
    // on T and B: few queries take a form of their own, with f32 weights.
    void (*attention_cached)(floatX *o, const floatX *qkv, const KvCache *cache, const int32_t *pos, int B, int T,
                             int NH);
    // sample_next: state->token = sample_token(s, logits (V) f32, V, state->draw) (sampler.h; logits are overwritten),
    // -1 when no logit is above -infinity. Then pos and draw go up by one.
    void (*sample_next)(DecodeState *state, float *logits, const Sampler *s, int V);
    // compare_logits: of logits and reference (n, V) f32, kl (n) f32 = sum_v p_ref (log p_ref - log p), never below 0,
    // and same (n) i32 = 1 where both have their largest logit, the first of equals, at the same token.
    void (*compare_logits)(float *kl, int32_t *same, const float *logits, const float *reference, size_t n, int V);
} Ops;

// One entry an operation, for tests that must cover all of them: X(name).
#define QLLM_OPS(X) \
    X(embedding_forward) X(embedding_backward) X(rmsnorm_fq_forward) X(rmsnorm_backward) X(linear_forward) \
    X(linear_forward_f32) X(linear_backward_input) X(linear_backward_weight) X(linear_w8_forward) \
    X(linear_w8_forward_f32) X(linear_w8_backward_input) X(linear_i8_forward) X(linear_i8_forward_f32) \
    X(linear_i8_backward_input) X(linear_i8_backward_weight) X(rope) X(attention_forward) \
    X(attention_backward) X(fakequant_forward) X(mask_backward) X(swiglu_fq_forward) X(swiglu_backward) X(classifier) \
    X(loss_accumulate) X(sum_squares) X(state_sum) X(global_norm) X(adamw_fq) X(sgd_fq) X(weight_fq) \
    X(weight_ste_mask) X(adamw_low) X(int8_rows) X(widen) X(rows_pack) X(rows_unpack) X(weight_pack) \
    X(weight_unpack) X(sum_ranks) X(dequant_rows) X(embedding_q_forward) X(qmatvec_forward) X(served_bytes) \
    X(served_pack) X(served_forward) X(served_forward_f32) X(matvec_forward) X(matvec_forward_f32) X(rope_append) \
    X(attention_cached) X(sample_next) X(compare_logits)

extern const Ops *ops;      // the backend that device_init chose
extern const Ops ops_cpu;   // llmc/cpu/

// The backend's first error since the last call, 0 if none (device.c forwards to it; operations report through this).
void ops_set_error(int code, const char *fmt, ...);

#ifdef __cplusplus
}
#endif
#endif
