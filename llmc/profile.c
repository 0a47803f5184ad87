#include "profile.h"
#include "device.h"

enum {
#define X(name) OP_##name,
    QLLM_OPS(X)
#undef X
    OP_COUNT
};
static const char *const op_names[OP_COUNT] = {
#define X(name) #name,
    QLLM_OPS(X)
#undef X
};

static const Ops *inner;
static Ops timed;
static double spent[OP_COUNT];
static long calls[OP_COUNT];

#define TIMED(name, params, args) \
    static void timed_##name params { \
        double t0 = now_seconds(); \
        inner->name args; \
        device_wait(); \
        spent[OP_##name] += now_seconds() - t0; \
        calls[OP_##name]++; \
    }

TIMED(embedding_forward, (floatX * out, const int32_t *tokens, const floatX *wte, size_t N, int C, int V),
      (out, tokens, wte, N, C, V))
TIMED(embedding_backward, (float *dwte, const floatX *dout, const int32_t *tokens, size_t N, int C, int V),
      (dwte, dout, tokens, N, C, V))
TIMED(rmsnorm_fq_forward,
      (floatX * res, floatX *y, float *rstd, uint8_t *mask, const floatX *x, const floatX *delta, const floatX *weight,
       size_t N, int C, float eps, const QuantSpec *act),
      (res, y, rstd, mask, x, delta, weight, N, C, eps, act))
TIMED(rmsnorm_backward,
      (floatX * dres, float *dweight, const floatX *dy, const uint8_t *mask, const floatX *x, const floatX *weight,
       const float *rstd, size_t N, int C),
      (dres, dweight, dy, mask, x, weight, rstd, N, C))
TIMED(linear_forward, (floatX * y, const floatX *x, const floatX *w, const float *wscale, size_t N, int C, int OC),
      (y, x, w, wscale, N, C, OC))
TIMED(linear_forward_f32, (float *y, const floatX *x, const floatX *w, const float *wscale, size_t N, int C, int OC),
      (y, x, w, wscale, N, C, OC))
TIMED(linear_backward_input,
      (floatX * dx, const floatX *dy, const floatX *w, const float *wscale, floatX *dy_scaled, size_t N, int C, int OC),
      (dx, dy, w, wscale, dy_scaled, N, C, OC))
TIMED(linear_backward_weight, (float *dw, const floatX *dy, const floatX *x, size_t N, int C, int OC, bool accumulate),
      (dw, dy, x, N, C, OC, accumulate))
TIMED(rope,
      (floatX * x, const float *cos_t, const float *sin_t, size_t N, int T, int pos0, int ldx, int NH_rot, int HS,
       bool inverse),
      (x, cos_t, sin_t, N, T, pos0, ldx, NH_rot, HS, inverse))
TIMED(attention_forward,
      (floatX * o, float *lse, const floatX *q, const floatX *k, const floatX *v, int B, int T, int Tk, int NH, int NKV,
       int HS, int ldo, int ldq, int ldkv, size_t skv),
      (o, lse, q, k, v, B, T, Tk, NH, NKV, HS, ldo, ldq, ldkv, skv))
TIMED(attention_backward,
      (floatX * dqkv, const floatX *dout, const floatX *qkv, const floatX *o, const float *lse, int B, int T, int NH,
       int NKV, int HS),
      (dqkv, dout, qkv, o, lse, B, T, NH, NKV, HS))
TIMED(fakequant_forward, (floatX * y, uint8_t *mask, const floatX *x, size_t N, int C, const QuantSpec *act),
      (y, mask, x, N, C, act))
TIMED(mask_backward, (floatX *dx, const uint8_t *mask, size_t N, int C), (dx, mask, N, C))
TIMED(swiglu_fq_forward, (floatX * y, uint8_t *mask, const floatX *gateup, size_t N, int FF, const QuantSpec *act),
      (y, mask, gateup, N, FF, act))
TIMED(swiglu_backward, (floatX *dgateup, const floatX *dy, const uint8_t *mask, const floatX *gateup, size_t N, int FF),
      (dgateup, dy, mask, gateup, N, FF))
TIMED(classifier, (float *losses, floatX *dlogits, const float *logits, const int32_t *targets, size_t n, int V),
      (losses, dlogits, logits, targets, n, V))
TIMED(loss_accumulate, (StepState * state, const float *losses, const int32_t *targets, size_t N),
      (state, losses, targets, N))
TIMED(sum_squares, (StepState * state, const float *grad, size_t n), (state, grad, n))
TIMED(state_sum, (StepState * state, const StepState *all, int R), (state, all, R))
TIMED(global_norm, (StepState * state, float max_norm), (state, max_norm))
TIMED(adamw_fq,
      (float *master, float *m, float *v, floatX *work, float *wscale, const float *grad, const StepState *state,
       const AdamWParams *h, const QuantSpec *wq, int64_t rows, int64_t cols),
      (master, m, v, work, wscale, grad, state, h, wq, rows, cols))
TIMED(sgd_fq,
      (float *master, float *buf, floatX *work, float *wscale, const float *grad, const StepState *state,
       float momentum, float weight_decay, const QuantSpec *wq, int64_t rows, int64_t cols),
      (master, buf, work, wscale, grad, state, momentum, weight_decay, wq, rows, cols))
TIMED(weight_fq, (floatX *work, float *wscale, const float *master, const QuantSpec *wq, int64_t rows, int64_t cols),
      (work, wscale, master, wq, rows, cols))
TIMED(weight_ste_mask, (float *grad, const float *master, const QuantSpec *wq, int64_t rows, int64_t cols),
      (grad, master, wq, rows, cols))
TIMED(rows_pack,
      (void *wire, size_t stride, const void *tensor, const RowSplit *split, int64_t k0, int64_t kn, size_t row_bytes),
      (wire, stride, tensor, split, k0, kn, row_bytes))
TIMED(rows_unpack,
      (void *tensor, const void *wire, size_t stride, const RowSplit *split, int64_t k0, int64_t kn, size_t row_bytes),
      (tensor, wire, stride, split, k0, kn, row_bytes))
TIMED(weight_pack, (uint8_t * wire, const float *master, const QuantSpec *wq, int64_t rows, int64_t cols, int64_t kn),
      (wire, master, wq, rows, cols, kn))
TIMED(weight_unpack,
      (floatX * work, float *wscale, const uint8_t *wire, size_t stride, const RowSplit *split, int64_t k0, int64_t kn,
       const QuantSpec *wq, int64_t cols),
      (work, wscale, wire, stride, split, k0, kn, wq, cols))
TIMED(sum_ranks, (float *out, const float *in, size_t stride, int R, size_t n, bool accumulate),
      (out, in, stride, R, n, accumulate))
TIMED(dequant_rows,
      (floatX * work, float *wscale, const uint8_t *codes, const float *scale, const float *zero, const QuantSpec *wq,
       int64_t rows, int64_t cols),
      (work, wscale, codes, scale, zero, wq, rows, cols))
TIMED(qmatvec_forward,
      (floatX * y, const floatX *x, const uint8_t *codes, const float *scale, const float *zero, const QuantSpec *wq,
       size_t N, int C, int OC),
      (y, x, codes, scale, zero, wq, N, C, OC))

void profile_begin(void) {
    inner = ops;
    timed.name = inner->name;
#define X(name) timed.name = timed_##name;
    QLLM_OPS(X)
#undef X
    ops = &timed;
}

void profile_reset(void) {
    for (int i = 0; i < OP_COUNT; i++) spent[i] = 0, calls[i] = 0;
}

void profile_print(FILE *out, int steps, double seconds) {
    double covered = 0;
    fprintf(out, "profile of %d steps, %.1f ms a step\n  %-24s %9s %10s %7s\n", steps, 1e3 * seconds / steps,
            "operation", "calls", "ms/step", "share");
    for (int i = 0; i < OP_COUNT; i++) {
        if (!calls[i]) continue;
        covered += spent[i];
        fprintf(out, "  %-24s %9.0f %10.2f %6.1f%%\n", op_names[i], (double)calls[i] / steps, 1e3 * spent[i] / steps,
                100 * spent[i] / seconds);
    }
    fprintf(out, "  %-24s %9s %10.2f %6.1f%%\n", "(no operation)", "", 1e3 * (seconds - covered) / steps,
            100 * (seconds - covered) / seconds);
}
