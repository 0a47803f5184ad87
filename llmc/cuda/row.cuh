// What kernels that give a block to a row share: how many threads, where the row is kept, conversions.
#ifndef QLLM_ROW_CUH
#define QLLM_ROW_CUH
#include "ptx.cuh"

// A row that a kernel needs twice stays in shared memory up to this size, which every GPU since sm_80 has. A longer one
// is kept in the output instead, in the L2 cache: no row is too long.
#define ROW_SHARED_MAX ((size_t)96 << 10)
#define ROW_THREADS_MAX 1024

// Threads for a row of C values in vectors of V: two vectors a thread, but at most 256 threads, so that many rows are
// in flight on a multiprocessor, each in another phase, which keeps memory busy while some of them reduce. More where
// the row's shared memory would leave the 2048 threads of a multiprocessor unused, or where so few rows come (a token a
// sequence, in decoding) that what counts is how soon one is done.
static inline unsigned row_threads(size_t N, int C, int V, size_t shared) {
    int vecs = (C + V - 1) / V, warps = N < 512 ? (vecs + 31) / 32 : (vecs + 63) / 64;
    int most = N < 512 ? ROW_THREADS_MAX / 32 : 8;
    if (warps > most) warps = most;
    while (warps < ROW_THREADS_MAX / 32 && shared > (size_t)warps * 32 * 112) warps *= 2;
    return (unsigned)(warps < ROW_THREADS_MAX / 32 ? warps : ROW_THREADS_MAX / 32) * 32;
}

// Values rounded to X. A NaN may get another payload than f2x gives.
template <int V> static __device__ __forceinline__ Vec<floatX, V> to_x(const float (&f)[V]) {
    Vec<floatX, V> v;
#ifdef PRECISION_FP32
    for (int i = 0; i < V; i++) v.v[i] = f[i];
#else
    if constexpr (V % 2 == 0) {
#pragma unroll
        for (int i = 0; i < V; i += 2) {
            uint32_t two = pack_bf16(f[i], f[i + 1]);
            memcpy(&v.v[i], &two, sizeof two);
        }
    } else {
        for (int i = 0; i < V; i++) v.v[i] = f2x(f[i]);
    }
#endif
    return v;
}

// V f32 in loads of 16 bytes where V allows.
template <int V> static __device__ __forceinline__ void load_f32(float (&f)[V], const float *p) {
    constexpr int W = V % 4 == 0 ? 4 : 1;
#pragma unroll
    for (int i = 0; i < V; i += W) {
        Vec<float, W> v = vec_load<float, W>(p + i);
        for (int j = 0; j < W; j++) f[i + j] = v.v[j];
    }
}
template <int V> static __device__ __forceinline__ void store_f32(float *p, const float (&f)[V]) {
    constexpr int W = V % 4 == 0 ? 4 : 1;
#pragma unroll
    for (int i = 0; i < V; i += W) {
        Vec<float, W> v;
        for (int j = 0; j < W; j++) v.v[j] = f[i + j];
        vec_store(p + i, v);
    }
}
#endif
