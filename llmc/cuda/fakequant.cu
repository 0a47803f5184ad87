// fakequant_forward (ops.h): a block a row, the row kept in shared memory so that it is read once.
#include "fakequant.cuh"

#define BLOCK 256

template <int V>
static __global__ void __launch_bounds__(BLOCK)
fakequant_forward_kernel(floatX *y, uint8_t *mask, const floatX *x, int C, QuantSpec act) {
    DYN_SHARED(floatX, row);                                   // (C)
    size_t base = (size_t)blockIdx.x * C;
    float mn = INFINITY, mx = -INFINITY;
    for (int c = threadIdx.x * V; c < C; c += BLOCK * V) {
        Vec<floatX, V> v = vec_load<floatX, V>(x + base + c);
        for (int i = 0; i < V; i++) quant_minmax(&mn, &mx, x2f(v.v[i]));
        vec_store(row + c, v);
    }
    fakequant_row<V>(y + base, mask ? mask + base : nullptr, row, C, mn, mx, &act);
}

void cuda_fakequant_forward(floatX *y, uint8_t *mask, const floatX *x, size_t N, int C, const QuantSpec *act) {
    if (N == 0) return;
    size_t bytes = (size_t)C * sizeof(floatX);
    auto kernel = rows_take_vec(C, x, y, mask) ? fakequant_forward_kernel<VEC_X> : fakequant_forward_kernel<1>;
    if (!allow_shared(kernel, bytes)) return;
    LAUNCH(kernel, (unsigned)N, BLOCK, bytes, cuda_stream)(y, mask, x, C, spec_or_none(act));
    CUDA_CHECK(cudaGetLastError());
}
