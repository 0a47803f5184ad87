// fakequant_forward and mask_backward (ops.h).
#include "fakequant.cuh"

#define BLOCK 256

// A block a row, which is read once and kept in shared memory (KEEP), or, where it is too long, read twice.
template <int V, bool KEEP>
static __global__ void __launch_bounds__(ROW_THREADS_MAX)
fakequant_forward_kernel(floatX *y, uint8_t *mask, const floatX *x, int C, QuantSpec act) {
    DYN_SHARED(floatX, row);                                   // (C) if KEEP
    size_t base = (size_t)blockIdx.x * C;
    float mn = INFINITY, mx = -INFINITY;
    for (int c = threadIdx.x * V; c < C; c += blockDim.x * V) {
        Vec<floatX, V> v = vec_load<floatX, V>(x + base + c);
        for (int i = 0; i < V; i++) widen(&mn, &mx, x2f(v.v[i]), x2f(v.v[i]));
        if (KEEP) vec_store(row + c, v);
    }
    fakequant_row<V>(y + base, mask ? mask + base : nullptr, KEEP ? row : x + base, C, mn, mx, &act);
}

template <int V>
static void fakequant(floatX *y, uint8_t *mask, const floatX *x, size_t N, int C, const QuantSpec *act) {
    size_t bytes = (size_t)C * sizeof(floatX), shared = bytes <= ROW_SHARED_MAX ? bytes : 0;
    auto kernel = shared ? fakequant_forward_kernel<V, true> : fakequant_forward_kernel<V, false>;
    if (!allow_shared(kernel, shared)) return;
    LAUNCH(kernel, (unsigned)N, row_threads(N, C, V, shared), shared, cuda_stream)(y, mask, x, C, spec_or_none(act));
    CUDA_CHECK(cudaGetLastError());
}
void cuda_fakequant_forward(floatX *y, uint8_t *mask, const floatX *x, size_t N, int C, const QuantSpec *act) {
    if (N == 0) return;
    if (rows_take_vec(C, x, y, mask)) fakequant<VEC_X>(y, mask, x, N, C, act);
    else fakequant<1>(y, mask, x, N, C, act);
}

// dx is written only where something is masked: a mask is nearly all ones, so this reads 2 + 1 bytes an element and
// writes hardly any. The last vector of a tensor that is no multiple of V is done by its thread alone.
template <int V>
static __global__ void __launch_bounds__(BLOCK) mask_backward_kernel(floatX *dx, const uint8_t *mask, size_t total) {
    size_t i = ((size_t)blockIdx.x * BLOCK + threadIdx.x) * V;
    if (i + V <= total) {
        Vec<uint8_t, V> m = vec_load<uint8_t, V>(mask + i);
        bool all = true;
        for (int j = 0; j < V; j++) all = all && m.v[j];
        if (all) return;
        Vec<floatX, V> v = vec_load<floatX, V>(dx + i);
        for (int j = 0; j < V; j++) v.v[j] = m.v[j] ? v.v[j] : (floatX)0;
        vec_store(dx + i, v);
        return;
    }
    for (; i < total; i++)
        if (!mask[i]) dx[i] = 0;
}

void cuda_mask_backward(floatX *dx, const uint8_t *mask, size_t N, int C) {
    size_t total = N * (size_t)C;
    if (total == 0) return;
    bool vec = rows_take_vec(0, dx) && (uintptr_t)mask % VEC_X == 0;
    size_t each = BLOCK * (size_t)(vec ? VEC_X : 1);
    auto kernel = vec ? mask_backward_kernel<VEC_X> : mask_backward_kernel<1>;
    LAUNCH(kernel, (unsigned)((total + each - 1) / each), BLOCK, 0, cuda_stream)(dx, mask, total);
    CUDA_CHECK(cudaGetLastError());
}
