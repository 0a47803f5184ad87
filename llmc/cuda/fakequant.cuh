// Fake quantization of a row that a block has just made: what the operations that produce a linear's input share
// (rmsnorm_fq, fakequant, swiglu_fq).
#ifndef QLLM_FAKEQUANT_CUH
#define QLLM_FAKEQUANT_CUH
#include "row.cuh"

QHD bool quant_is_on(const QuantSpec *s) { return s && s->bits; }

// A spec as kernels take it, by value: bits == 0 where there is none.
static inline QuantSpec spec_or_none(const QuantSpec *s) {
    QuantSpec none = {};
    return quant_is_on(s) ? *s : none;
}

// quant_minmax in one instruction a side. The sign of a zero may differ, which quant_choose does not look at.
static __device__ __forceinline__ void widen(float *mn, float *mx, float lo, float hi) {
    *mn = fminf(*mn, lo);
    *mx = fmaxf(*mx, hi);
}
static __device__ __forceinline__ void warp_minmax(float *mn, float *mx) {
    for (int bits = 16; bits; bits >>= 1)
        widen(mn, mx, __shfl_xor_sync(FULL_WARP, *mn, bits), __shfl_xor_sync(FULL_WARP, *mx, bits));
}

// Scale and zero point of the row whose least and greatest values, before or after their rounding to X, each thread of
// the block brings a share of. One warp computes them for all: three divisions a thread would cost the other warps as
// many instructions as a row's elements do. All threads call it, at most once in a kernel: a second call would need a
// barrier before it, so that nobody overwrites the shared memory while another still reads.
static __device__ QParams block_qparams(float mn, float mx, const QuantSpec *act) {
    __shared__ float part[2][32];                              // least and greatest of each warp
    __shared__ QParams params;
    int warps = (int)blockDim.x / 32;
    warp_minmax(&mn, &mx);
    if (threadIdx.x % 32 == 0) {
        part[0][threadIdx.x / 32] = mn;
        part[1][threadIdx.x / 32] = mx;
    }
    __syncthreads();                                           // part is complete
    if (threadIdx.x < 32) {
        bool there = (int)threadIdx.x < warps;
        mn = there ? part[0][threadIdx.x] : INFINITY;
        mx = there ? part[1][threadIdx.x] : -INFINITY;
        warp_minmax(&mn, &mx);
        if (threadIdx.x == 0) params = quant_choose(x2f(f2x(mn)), x2f(f2x(mx)), act, QD_X);
    }
    __syncthreads();                                           // params are there
    return params;
}

// quant_fake and quant_in_range of activations, whose zero point is of the integer domain, with what does not change
// along a row computed once. Codes are counted from the zero point: lo and hi are qmin - zp and qmax - zp.
template <int V, bool MASK>
static __device__ __forceinline__ void fakequant_loop(floatX *y, uint8_t *mask, const floatX *row, int C, float scale,
                                                      float lo, float hi) {
    float inv = 1.0f / scale;
    for (int c = threadIdx.x * V; c < C; c += blockDim.x * V) {
        Vec<floatX, V> v = vec_load<floatX, V>(row + c);
        Vec<uint8_t, V> m;
        float f[V];
#pragma unroll
        for (int i = 0; i < V; i++) {
            float q = rintf(x2f(v.v[i]) * inv);
            if (MASK) m.v[i] = q >= lo && q <= hi;
            f[i] = fmaf(min_nan_f32(max_nan_f32(q, lo), hi), scale, 0.0f);       // adding 0 turns -0 into 0
        }
        if (MASK) vec_store(mask + c, m);
        vec_store(y + c, to_x(f));
    }
}

// y (C) X = fq(row), mask (C) or NULL; mn and mx are this thread's share of row's span. Without quantization y is the
// row and the mask is 1. Each thread reads the very elements it wrote to row, so no barrier stands between; row may be
// y.
template <int V>
static __device__ __forceinline__ void fakequant_row(floatX *y, uint8_t *mask, const floatX *row, int C, float mn,
                                                     float mx, const QuantSpec *act) {
    if (quant_is_on(act)) {                                    // in all threads alike: all meet the barriers
        QParams p = block_qparams(mn, mx, act);
        float lo = (float)act->qmin - p.zp, hi = (float)act->qmax - p.zp;
        if (mask) fakequant_loop<V, true>(y, mask, row, C, p.scale, lo, hi);
        else fakequant_loop<V, false>(y, nullptr, row, C, p.scale, lo, hi);
        return;
    }
    for (int c = threadIdx.x * V; c < C; c += blockDim.x * V) {
        vec_store(y + c, vec_load<floatX, V>(row + c));
        if (!mask) continue;
        Vec<uint8_t, V> ones;
        for (int i = 0; i < V; i++) ones.v[i] = 1;
        vec_store(mask + c, ones);
    }
}
#endif
