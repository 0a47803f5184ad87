// Inside the CPU wing: the operations' names, and what several of them share. Semantics are documented in ops.h.
#ifndef QLLM_CPU_H
#define QLLM_CPU_H
#include "ops.h"
#include "vec.h"

void cpu_embedding_forward(floatX *out, const int32_t *tokens, const floatX *wte, size_t N, int C, int V);
void cpu_embedding_backward(float *dwte, const floatX *dout, const int32_t *tokens, size_t N, int C, int V);
void cpu_rmsnorm_fq_forward(floatX *res, floatX *y, float *rstd, uint8_t *mask, const floatX *x, const floatX *delta,
                            const floatX *weight, size_t N, int C, float eps, const QuantSpec *act);
void cpu_rmsnorm_backward(floatX *dres, float *dweight, const floatX *dy, const uint8_t *mask, const floatX *x,
                          const floatX *weight, const float *rstd, size_t N, int C);
void cpu_linear_forward(floatX *y, const floatX *x, const floatX *w, const float *wscale, size_t N, int C, int OC);
void cpu_linear_forward_f32(float *y, const floatX *x, const floatX *w, const float *wscale, size_t N, int C, int OC);
void cpu_linear_backward_input(floatX *dx, const floatX *dy, const floatX *w, const float *wscale, floatX *dy_scaled,
                               size_t N, int C, int OC);
void cpu_linear_backward_weight(float *dw, const floatX *dy, const floatX *x, size_t N, int C, int OC, bool accumulate);
void cpu_linear_w8_forward(floatX *y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C,
                           int OC);
void cpu_linear_w8_forward_f32(float *y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C,
                               int OC);
void cpu_linear_w8_backward_input(floatX *dx, const floatX *dy, const int8_t *codes, const float *wscale,
                                  floatX *dy_scaled, size_t N, int C, int OC);
void cpu_linear_i8_forward(floatX *y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C,
                           int OC);
void cpu_linear_i8_forward_f32(float *y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C,
                               int OC);
void cpu_linear_i8_backward_input(floatX *dx, const floatX *dy, const int8_t *codes, const float *wscale, size_t N,
                                  int C, int OC);
void cpu_linear_i8_backward_weight(float *dw, const floatX *dy, const floatX *x, size_t N, int C, int OC,
                                   bool accumulate);
void cpu_rope(floatX *x, const float *cos_t, const float *sin_t, size_t N, int T, int pos0, int ldx, int NH_rot, int HS,
              bool inverse);
void cpu_attention_forward(floatX *o, float *lse, const floatX *q, const floatX *k, const floatX *v, int B, int T,
                           int Tk, int NH, int NKV, int HS, int ldo, int ldq, int ldkv, size_t skv);
void cpu_attention_backward(floatX *dqkv, const floatX *dout, const floatX *qkv, const floatX *o, const float *lse,
                            int B, int T, int NH, int NKV, int HS);
void cpu_fakequant_forward(floatX *y, uint8_t *mask, const floatX *x, size_t N, int C, const QuantSpec *act);
void cpu_mask_backward(floatX *dx, const uint8_t *mask, size_t N, int C);
void cpu_swiglu_fq_forward(floatX *y, uint8_t *mask, const floatX *gateup, size_t N, int FF, const QuantSpec *act);
void cpu_swiglu_backward(floatX *dgateup, const floatX *dy, const uint8_t *mask, const floatX *gateup, size_t N,
                         int FF);
void cpu_classifier(float *losses, floatX *dlogits, const float *logits, const int32_t *targets, size_t n, int V);
void cpu_loss_accumulate(StepState *state, const float *losses, const int32_t *targets, size_t N);
void cpu_sum_squares(StepState *state, const float *grad, size_t n);
void cpu_state_sum(StepState *state, const StepState *all, int R);
void cpu_global_norm(StepState *state, float max_norm);
void cpu_adamw_fq(float *master, float *m, float *v, floatX *work, float *wscale, const float *grad,
                  const StepState *state, const AdamWParams *h, const QuantSpec *wq, int64_t rows, int64_t cols);
void cpu_sgd_fq(float *master, float *buf, floatX *work, float *wscale, const float *grad, const StepState *state,
                float momentum, float weight_decay, const QuantSpec *wq, int64_t rows, int64_t cols);
void cpu_weight_fq(floatX *work, float *wscale, const float *master, const QuantSpec *wq, int64_t rows, int64_t cols);
void cpu_weight_ste_mask(float *grad, const float *master, const QuantSpec *wq, int64_t rows, int64_t cols);
void cpu_adamw_low(StoredParam p, StoredState m, StoredState v, floatX *work, float *wscale, const float *grad,
                   const StepState *state, const AdamWParams *h, const QuantSpec *wq, Rounding rounding, int tensor,
                   int64_t row0, int64_t rows, int64_t cols);
void cpu_int8_rows(int8_t *codes, float *scale, StoredParam from, int64_t rows, int64_t cols);
void cpu_widen(float *out, const bf16 *in, size_t n);
void cpu_rows_pack(void *wire, size_t stride, const void *tensor, const RowSplit *split, int64_t k0, int64_t kn,
                   size_t row_bytes);
void cpu_rows_unpack(void *tensor, const void *wire, size_t stride, const RowSplit *split, int64_t k0, int64_t kn,
                     size_t row_bytes);
void cpu_weight_pack(uint8_t *wire, const float *master, const QuantSpec *wq, int64_t rows, int64_t cols, int64_t kn);
void cpu_weight_unpack(floatX *work, float *wscale, const uint8_t *wire, size_t stride, const RowSplit *split,
                       int64_t k0, int64_t kn, const QuantSpec *wq, int64_t cols);
void cpu_sum_ranks(float *out, const float *in, size_t stride, int R, size_t n, bool accumulate);
void cpu_dequant_rows(floatX *work, float *wscale, const uint8_t *codes, const float *scale, const float *zero,
                      const QuantSpec *wq, int64_t rows, int64_t cols);
void cpu_qmatvec_forward(floatX *y, const floatX *x, const uint8_t *codes, const float *scale, const float *zero,
                         const QuantSpec *wq, size_t N, int C, int OC);
void cpu_embedding_q_forward(floatX *out, const int32_t *tokens, const uint8_t *codes, const float *scale,
                             const float *zero, const QuantSpec *wq, size_t N, int C, int V);
size_t cpu_served_bytes(const QuantSpec *wq, const QuantSpec *act, int OC, int C);
void cpu_served_pack(void *served, const uint8_t *codes, const float *scale, const float *zero, const QuantSpec *wq,
                     const QuantSpec *act, int64_t row0, int64_t rows, int OC, int C);
void cpu_served_forward(floatX *y, const floatX *x, const void *served, const QuantSpec *wq, const QuantSpec *act,
                        size_t N, int C, int OC);
void cpu_served_forward_f32(float *y, const floatX *x, const void *served, const QuantSpec *wq, const QuantSpec *act,
                            size_t N, int C, int OC);
void cpu_matvec_forward(floatX *y, const floatX *x, const floatX *w, size_t N, int C, int OC);
void cpu_matvec_forward_f32(float *y, const floatX *x, const floatX *w, size_t N, int C, int OC);
void cpu_rope_append(floatX *qkv, const KvCache *cache, const float *cos_t, const float *sin_t, const int32_t *pos,
                     int B, int T, int NH);
void cpu_attention_cached(floatX *o, const floatX *qkv, const KvCache *cache, const int32_t *pos, int B, int T, int NH);
void cpu_sample_next(DecodeState *state, float *logits, const Sampler *s, int V);
void cpu_compare_logits(float *kl, int32_t *same, const float *logits, const float *reference, size_t n, int V);

// Below this many elements an operation runs on the calling thread: waking the others costs some microseconds.
#define CPU_MIN_PARALLEL 16384

// Working memory of one operation, kept from call to call and grown when a larger one comes, so that only the first
// step allocates. Operations run one at a time. NULL when there is none left; the error is then set.
void *cpu_workspace(size_t bytes);
// The same, for what must outlive calls that use cpu_workspace: a product in pieces.
void *cpu_workspace_outer(size_t bytes);

// Tensors of at least this many bytes are written past the caches (v16_stream).
#define CPU_STREAM_BYTES ((size_t)16 << 20)

#ifdef _OPENMP
#include <omp.h>
#endif
static inline int cpu_max_threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}
static inline int cpu_thread(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}
// The calling thread's part [*first, *last) of n things, inside a parallel region.
static inline void cpu_share(int *first, int *last, int n) {
#ifdef _OPENMP
    int64_t threads = omp_get_num_threads();
#else
    int64_t threads = 1;
#endif
    *first = (int)(n * (int64_t)cpu_thread() / threads);
    *last = (int)(n * ((int64_t)cpu_thread() + 1) / threads);
}

// dtype of the activations for quant.h.
#ifdef PRECISION_FP32
#define QD_X QD_F32
#else
#define QD_X QD_BF16
#endif

// ---------------------------------------------------------------------------------------------
// quant.h sixteen at a time, the same bits.

VEC v16 v16_round_d(v16 v, QuantDType d) { return d == QD_BF16 ? v16_bf16_round(v) : v; }

// quant_choose: scales and zero points of sixteen blocks from their smallest and largest values.
typedef struct { v16 scale, zp; } V16QParams;

VEC V16QParams v16_choose(v16 mn, v16 mx, const QuantSpec *s, QuantDType d) {
    v16 range = v16_set1((float)(s->qmax - s->qmin)), mid = v16_set1(quant_mid(s)), zero = {0};
    v16 qmin = v16_set1((float)s->qmin), qmax = v16_set1((float)s->qmax), eps = v16_set1(quant_round_d(s->eps, d));
    V16QParams p;
    v16 low = v16_keep_inside(mn, mn, v16_set1(-INFINITY), mx);      // no value: 0
    mx = v16_keep_inside(mx, mn, v16_set1(-INFINITY), mx);
    mn = low;
    if (s->zero == QZ_FLOAT) {
        p.scale = v16_max(eps, v16_round_d(v16_round_d(mx - mn, d) / range, d));
        p.zp = v16_round_d(mn + v16_round_d(p.scale * mid, d), d);
        return p;
    }
    mn = v16_min(mn, zero);
    mx = v16_max(mx, zero);
    if (s->mapping == QM_ASYMMETRIC) {
        p.scale = v16_max(eps, v16_round_d(v16_round_d(mx - mn, d) / range, d));
        v16 r = v16_round_d(qmin - v16_rint(v16_round_d(mn / p.scale, d)), d);
        p.zp = v16_nan_to(v16_min(qmax, v16_max(qmin, r)), qmin);
        return p;
    }
    v16 size = s->mapping == QM_SYMMETRIC_NO_CLIP ? v16_max(v16_round_d(mn / qmin, d), v16_round_d(mx / qmax, d))
                                                  : v16_round_d(v16_max(-mn, mx) / (range * v16_set1(0.5f)), d);
    p.scale = v16_max(eps, size);
    p.zp = mid;
    return p;
}

// What quantizing the values of blocks needs. Integer domain: codes are counted from the zero point, so lo and hi are
// qmin - zp and qmax - zp (whole numbers, exact), and a value is one product.
typedef struct {
    v16 scale, inv;
    v16 lo, hi;         // bounds of v16_unclamped
    v16 nan;            // what NaN is taken for where codes are stored
    v16 zp;
    v16 m;              // float domain: the value of code qmin
} BlockQuant;

VEC BlockQuant block_quant(V16QParams p, const QuantSpec *s, QuantDType d) {
    v16 qmin = v16_set1((float)s->qmin), qmax = v16_set1((float)s->qmax), zero = {0};
    BlockQuant b = {.scale = p.scale, .inv = v16_set1(1.0f) / p.scale, .zp = p.zp};
    v16 code;
    if (s->zero == QZ_FLOAT) {
        b.lo = qmin;
        b.hi = qmax;
        b.m = v16_round_d(p.zp - v16_round_d(p.scale * v16_set1(quant_mid(s)), d), d);
        code = v16_rint(v16_round_d(v16_round_d(zero - b.m, d) / p.scale, d));
    } else {
        b.lo = qmin - p.zp;
        b.hi = qmax - p.zp;
        b.m = zero;
        code = zero * b.inv;                                      // 0, or NaN
    }
    b.nan = v16_nan_to(v16_min(b.hi, v16_max(b.lo, code)), b.lo);
    return b;
}
// The same sixteen blocks in memory, and one of them in all lanes.
typedef struct { float scale[16], inv[16], lo[16], hi[16], nan[16], zp[16], m[16]; } BlockLanes;

VEC BlockLanes block_lanes(BlockQuant b) {
    BlockLanes l;
    v16_store(l.scale, b.scale, 16);
    v16_store(l.inv, b.inv, 16);
    v16_store(l.lo, b.lo, 16);
    v16_store(l.hi, b.hi, 16);
    v16_store(l.nan, b.nan, 16);
    v16_store(l.zp, b.zp, 16);
    v16_store(l.m, b.m, 16);
    return l;
}
VEC BlockQuant block_lane(const BlockLanes *l, int i) {
    return (BlockQuant){v16_set1(l->scale[i]), v16_set1(l->inv[i]), v16_set1(l->lo[i]), v16_set1(l->hi[i]),
                        v16_set1(l->nan[i]), v16_set1(l->zp[i]), v16_set1(l->m[i])};
}

// The code before clamping, counted from the zero point in the integer domain.
VEC v16 v16_unclamped(v16 x, const BlockQuant *b, bool zero_is_float, QuantDType d) {
    if (zero_is_float) return v16_rint(v16_round_d(v16_round_d(x - b->m, d) / b->scale, d));
    return v16_rint(x * b->inv);
}
VEC v16 v16_clamp_code(v16 u, const BlockQuant *b) { return v16_min(b->hi, v16_max(b->lo, u)); }
// Its value, before the rounding to d. The fused addition of 0 turns -0 (of codes rounded from below) into 0, as adding
// the zero point does in quant.h.
VEC v16 v16_dequant(v16 q, const BlockQuant *b, bool zero_is_float, float mid) {
    if (zero_is_float) return v16_fma(q - v16_set1(mid), b->scale, b->zp);
    return v16_fma(q, b->scale, v16_set1(0.0f));
}

// Working values of weights are bf16 values in both builds; bf16 stores round by themselves.
VEC v16 v16_work(v16 v) {
#ifdef PRECISION_FP32
    return v16_bf16_round(v);
#else
    return v;
#endif
}

// Smallest and largest value of each lane; NaN takes no part.
typedef struct { v16 lo, hi; } Range;

VEC Range range_empty(void) { return (Range){v16_set1(INFINITY), v16_set1(-INFINITY)}; }
VEC void range_add(Range *r, v16 v, int n) {
    if (n < 16)
        for (int i = n; i < 16; i++) v[i] = v[0];    // lanes beyond the span repeat its first value
    r->lo = v16_min(v, r->lo);
    r->hi = v16_max(v, r->hi);
}

// Activation fake quantization of one row (C) X with the given range (of f32 values before their rounding to X is as
// good: rounding keeps order). y may be x. For operations that have just written the row: it is read back from the
// nearest cache, so that quantizing costs no memory traffic.
void fakequant_row(floatX *y, uint8_t *mask, const floatX *x, int C, Range range, const QuantSpec *act);

// Rope on the first NH_rot heads of one row; cs, sn (HS/2) of its position.
void rope_row(floatX *row, const float *cs, const float *sn, int NH_rot, int HS, bool inverse);
// argmax_token (sampler.h), sixteen at a time.
int cpu_argmax(const float *logits, int V);

// The rows of a window that ranks have, counted through all ranks (ranks.c): how many there are, and those from `first`
// to last - 1 in runs that lie together. Start from rank -1; false: no more.
typedef struct {
    int rank;
    int64_t k, row, n;      // its rows k to k + n - 1 of the window, which are rows `row` and on of the tensor
    int64_t seen;
} RowRun;
int64_t cpu_window_rows(const RowSplit *split, int64_t k0, int64_t kn);
bool cpu_next_run(RowRun *run, const RowSplit *split, int64_t k0, int64_t kn, int64_t first, int64_t last);

static inline bool quant_is_on(const QuantSpec *s) { return s && s->bits; }
#endif
