// One step of AdamW: what the kernels that update masters (adamw.cu) and other stored formats (adamw_low.cu) share.
#ifndef QLLM_ADAMW_CUH
#define QLLM_ADAMW_CUH
#include "cuda.cuh"

// NONE, BF16: working values are made of masters as they are, in f32 or bf16; MASK: weight_ste_mask.
typedef enum { UPDATE_NONE, UPDATE_BF16, UPDATE_ADAMW, UPDATE_SGD, UPDATE_MASK } UpdateKind;

// What the caller fixes of an update, and what a step makes of it.
struct Hyper {
    float beta1, beta2;
    float decay;                 // weight decay
    float c1, c2, eps;           // AdamW: 1 - beta1, 1 - beta2; SGD: c1 = momentum
};
struct Step { float grad_scale, lr, decay, c1, c2, bc1, sqrt_bc2, eps; };

static inline Hyper adamw_hyper(const AdamWParams *h) {
    return {(float)h->beta1, (float)h->beta2, (float)h->weight_decay, (float)(1.0 - h->beta1), (float)(1.0 - h->beta2),
            (float)h->eps};
}

// False where the step is skipped; where nothing is updated, state may be NULL. All threads call it, once. The powers
// are a chain of up to 2 log2(t) products in double: two threads make them for all.
template <int KIND> static __device__ __forceinline__ bool step_begin(Step *s, const StepState *state, Hyper h) {
    if (KIND != UPDATE_ADAMW && KIND != UPDATE_SGD) return !state || !state->skip;
    if (state->skip) return false;
    s->grad_scale = state->grad_scale;
    s->lr = state->lr;
    s->decay = KIND == UPDATE_ADAMW ? state->lr * h.decay : h.decay;
    s->c1 = h.c1;
    s->c2 = h.c2;
    s->eps = h.eps;
    if (KIND == UPDATE_ADAMW) {
        __shared__ float correction[2];
        if (threadIdx.x == 0) correction[0] = 1.0f - pow_int_f32(h.beta1, state->t);
        if (threadIdx.x == blockDim.x - 1) correction[1] = sqrtf(1.0f - pow_int_f32(h.beta2, state->t));
        __syncthreads();                                       // both are there
        s->bc1 = correction[0];
        s->sqrt_bc2 = correction[1];
    }
    return true;
}

// m and v after a step of gradient g (not yet scaled), and p from what those two then are over their corrections.
static __device__ __forceinline__ void adamw_moments(float *m, float *v, float g, const Step *s) {
    g = g * s->grad_scale;
    *m = *m + s->c1 * (g - *m);
    *v = *v + s->c2 * (g * g - *v);
}
static __device__ __forceinline__ float adamw_weight(float p, float corrected_m, float corrected_root, const Step *s) {
    p = p - s->decay * p;
    return p - s->lr * corrected_m / (corrected_root + s->eps);
}
static __device__ __forceinline__ void adamw_value(float *p, float *m, float *v, float g, const Step *s) {
    adamw_moments(m, v, g, s);
    *p = adamw_weight(*p, *m / s->bc1, sqrtf(*v) / s->sqrt_bc2, s);
}

// Division of many by one. quotient(a, d) is a / d.by to the bit, in three instructions instead of eleven: with the
// rounded reciprocal y, a product and one correction by the exact remainder round as division does (P. Markstein,
// "Computation of elementary functions on the IBM RISC System/6000 processor", 1990). As long as nothing on the way
// leaves the range of normal numbers: the caller sees to that.
struct Divisor { float by, inv; };
QHD Divisor divisor(float by) {
    Divisor d = {by, 1.0f / by};
    return d;
}
QHD float quotient(float a, Divisor d) {
    float q = a * d.inv;
    return fmaf(fmaf(-q, d.by, a), d.inv, q);
}

// weight_fq of f32 or bf16 masters, unless state says to skip.
void stored_weight_fq(floatX *work, float *wscale, StoredParam from, const StepState *state, const QuantSpec *wq,
                      int64_t rows, int64_t cols);
#endif
