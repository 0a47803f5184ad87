// rmsnorm_fq_forward (ops.h): residual add, RMSNorm and activation fake quantization in one pass over memory.
// A block a row. The row stays in shared memory from the first load to the last store: each byte of x, delta and weight
// is read once and each of res and y written once, (4 N C + C) sizeof(floatX) in all with a delta.
//
// The sum of squares keeps the order that ops.h fixes, so that CPU and GPU agree to the bit: element c belongs to
// partial sum c mod 16. Sixteen lanes of the first warp hold the sums and walk the row in shared memory, which is a
// chain of C/16 additions; blocks that share a multiprocessor hide its latency behind each other's loads and stores.
#include "fakequant.cuh"

#define BLOCK 256

template <int V>
static __global__ void __launch_bounds__(BLOCK)
rmsnorm_fq_forward_kernel(floatX *res, floatX *y, float *rstd, uint8_t *mask, const floatX *x, const floatX *delta,
                          const floatX *weight, int C, float eps, QuantSpec act) {
    DYN_SHARED(floatX, row);                                   // (C): the row of res, then of y before quantization
    __shared__ float row_rstd;
    size_t base = (size_t)blockIdx.x * C;

    // 1. Residual add.
    for (int c = threadIdx.x * V; c < C; c += BLOCK * V) {
        Vec<floatX, V> v = vec_load<floatX, V>(x + base + c);
        if (delta) {
            Vec<floatX, V> d = vec_load<floatX, V>(delta + base + c);
            for (int i = 0; i < V; i++) v.v[i] = f2x(x2f(v.v[i]) + x2f(d.v[i]));
        }
        if (res) vec_store(res + base + c, v);
        vec_store(row + c, v);
    }
    __syncthreads();                                           // the first warp reads what all have written

    // 2. Mean square.
    if (threadIdx.x < 16) {
        float sum = 0.0f;
        for (int c = threadIdx.x; c < C; c += 16) sum = fmaf(x2f(row[c]), x2f(row[c]), sum);
        for (int bits = 8; bits; bits >>= 1) sum += __shfl_xor_sync(0xffffu, sum, bits);
        if (threadIdx.x == 0) {
            row_rstd = 1.0f / sqrtf(sum / (float)C + eps);
            if (rstd) rstd[blockIdx.x] = row_rstd;
        }
    }
    __syncthreads();                                           // row_rstd is there; and row may be written again

    // 3. Normalize, scale, and quantize.
    float r = row_rstd, mn = INFINITY, mx = -INFINITY;
    for (int c = threadIdx.x * V; c < C; c += BLOCK * V) {
        Vec<floatX, V> v = vec_load<floatX, V>(row + c), w = vec_load<floatX, V>(weight + c);
        for (int i = 0; i < V; i++) {
            v.v[i] = f2x(x2f(v.v[i]) * r * x2f(w.v[i]));
            quant_minmax(&mn, &mx, x2f(v.v[i]));
        }
        vec_store(row + c, v);
    }
    fakequant_row<V>(y + base, mask ? mask + base : nullptr, row, C, mn, mx, &act);
}

void cuda_rmsnorm_fq_forward(floatX *res, floatX *y, float *rstd, uint8_t *mask, const floatX *x, const floatX *delta,
                             const floatX *weight, size_t N, int C, float eps, const QuantSpec *act) {
    if (N == 0) return;
    size_t bytes = (size_t)C * sizeof(floatX);
    bool vec = rows_take_vec(C, x, y, weight, res, delta) && rows_take_vec(C, mask);
    auto kernel = vec ? rmsnorm_fq_forward_kernel<VEC_X> : rmsnorm_fq_forward_kernel<1>;
    if (!allow_shared(kernel, bytes)) return;
    LAUNCH(kernel, (unsigned)N, BLOCK, bytes, cuda_stream)
        (res, y, rstd, mask, x, delta, weight, C, eps, spec_or_none(act));
    CUDA_CHECK(cudaGetLastError());
}
