// Fake quantization of a row that a block has just written to shared memory: what the operations that produce a
// linear's input share (rmsnorm_fq, fakequant, swiglu_fq).
#ifndef QLLM_FAKEQUANT_CUH
#define QLLM_FAKEQUANT_CUH
#include "cuda.cuh"

QHD bool quant_is_on(const QuantSpec *s) { return s && s->bits; }

// A spec as kernels take it, by value: bits == 0 where there is none.
static inline QuantSpec spec_or_none(const QuantSpec *s) {
    QuantSpec none = {};
    return quant_is_on(s) ? *s : none;
}

// Widens [*mn, *mx] to hold [lo, hi], which is empty (lo > hi) for a thread that had no value.
static __device__ __forceinline__ void widen(float *mn, float *mx, float lo, float hi) {
    *mn = lo < *mn ? lo : *mn;
    *mx = hi > *mx ? hi : *mx;
}

// The least and greatest of the values that each thread of the block brings, to all threads. Exact in any order. All
// threads call it, at most once in a kernel: a second call would need a barrier before it, so that nobody overwrites
// `part` while another still reads.
static __device__ void block_minmax(float *mn, float *mx) {
    __shared__ float part[2][32];                              // least and greatest of each warp
    for (int bits = 16; bits; bits >>= 1)
        widen(mn, mx, __shfl_xor_sync(FULL_WARP, *mn, bits), __shfl_xor_sync(FULL_WARP, *mx, bits));
    if (threadIdx.x % 32 == 0) {
        part[0][threadIdx.x / 32] = *mn;
        part[1][threadIdx.x / 32] = *mx;
    }
    __syncthreads();                                           // part is complete
    for (int w = 0; w < (int)blockDim.x / 32; w++) widen(mn, mx, part[0][w], part[1][w]);
}

// y (C) X = fq(row), mask (C) or NULL; mn and mx are this thread's share of row's span. Without quantization y is the
// row and the mask is 1. Each thread reads the very elements it wrote to row, so no barrier stands between.
template <int V>
static __device__ void fakequant_row(floatX *y, uint8_t *mask, const floatX *row, int C, float mn, float mx,
                                     const QuantSpec *act) {
    bool on = quant_is_on(act);                                // in all threads alike: all meet block_minmax's barrier
    QParams p = {};
    if (on) {
        block_minmax(&mn, &mx);
        p = quant_choose(mn, mx, act, QD_X);                   // each thread for itself: cheaper than a broadcast
    }
    for (int c = threadIdx.x * V; c < C; c += blockDim.x * V) {
        Vec<floatX, V> v = vec_load<floatX, V>(row + c);
        Vec<uint8_t, V> m;
        for (int i = 0; i < V; i++) {
            float f = x2f(v.v[i]);
            m.v[i] = !on || quant_in_range(f, p, act, QD_X);
            if (on) v.v[i] = f2x(quant_fake(f, p, act, QD_X));
        }
        vec_store(y + c, v);
        if (mask) vec_store(mask + c, m);
    }
}
#endif
