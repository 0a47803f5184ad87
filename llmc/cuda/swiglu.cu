// swiglu_fq_forward and swiglu_backward (ops.h): a block a row, 16-byte loads and stores, nothing read or written
// twice:
// 3 N FF sizeof(floatX) forward, 5 backward. Forward, sm_90 issues 44 instructions an element (1 + e^x 14, the division
// 14, the quantization 9), which is 0.35 ms of an H100 for 16384 rows of 14336, where its memory takes 0.47: so the
// arithmetic is kept lean, and 56 warps a multiprocessor let the two overlap.
#include "fakequant.cuh"

// The row stays in shared memory (KEEP) between its computation and its quantization, or in y where it is too long.
template <int V, bool KEEP>
static __global__ void __launch_bounds__(ROW_THREADS_MAX)
swiglu_fq_forward_kernel(floatX *y, uint8_t *mask, const floatX *gateup, int FF, QuantSpec act) {
    DYN_SHARED(floatX, kept);                                  // (FF) if KEEP
    y += (size_t)blockIdx.x * FF;
    const floatX *gate = gateup + (size_t)blockIdx.x * 2 * FF, *up = gate + FF;
    floatX *row = KEEP ? kept : y;
    float mn = INFINITY, mx = -INFINITY;
    for (int c = threadIdx.x * V; c < FF; c += blockDim.x * V) {
        Vec<floatX, V> g = vec_load<floatX, V>(gate + c), u = vec_load<floatX, V>(up + c);
        float f[V];
#pragma unroll
        for (int i = 0; i < V; i++) {
            float x = x2f(g.v[i]);
            f[i] = x / one_plus_exp_f32(-x) * x2f(u.v[i]);       // NaN by way of x
            widen(&mn, &mx, f[i], f[i]);
        }
        vec_store(row + c, to_x(f));
    }
    fakequant_row<V>(y, mask ? mask + (size_t)blockIdx.x * FF : nullptr, row, FF, mn, mx, &act);
}

template <int V>
static void swiglu_fq(floatX *y, uint8_t *mask, const floatX *gateup, size_t N, int FF, const QuantSpec *act) {
    size_t bytes = (size_t)FF * sizeof(floatX), shared = bytes <= ROW_SHARED_MAX ? bytes : 0;
    auto kernel = shared ? swiglu_fq_forward_kernel<V, true> : swiglu_fq_forward_kernel<V, false>;
    if (!allow_shared(kernel, shared)) return;
    LAUNCH(kernel, (unsigned)N, row_threads(N, FF, V, shared), shared, cuda_stream)
        (y, mask, gateup, FF, spec_or_none(act));
    CUDA_CHECK(cudaGetLastError());
}
void cuda_swiglu_fq_forward(floatX *y, uint8_t *mask, const floatX *gateup, size_t N, int FF, const QuantSpec *act) {
    if (N == 0) return;
    if (rows_take_vec(FF, y, gateup, mask)) swiglu_fq<VEC_X>(y, mask, gateup, N, FF, act);
    else swiglu_fq<1>(y, mask, gateup, N, FF, act);
}

// y = g s u with s = sigmoid(g):  du = dy g s,  dg = dy u s (1 + g (1 - s)). A thread reads its elements before it
// writes them, so dgateup may be gateup.
template <int V>
static __global__ void __launch_bounds__(ROW_THREADS_MAX)
swiglu_backward_kernel(floatX *dgateup, const floatX *dy, const uint8_t *mask, const floatX *gateup, int FF) {
    size_t n = blockIdx.x;
    const floatX *gate = gateup + n * 2 * FF, *up = gate + FF;
    floatX *dgate = dgateup + n * 2 * FF, *dup = dgate + FF;
    dy += n * FF;
    if (mask) mask += n * FF;
    for (int c = threadIdx.x * V; c < FF; c += blockDim.x * V) {
        Vec<floatX, V> g = vec_load<floatX, V>(gate + c), u = vec_load<floatX, V>(up + c),
                       d = vec_load<floatX, V>(dy + c);
        Vec<uint8_t, V> m = {};
        if (mask) m = vec_load<uint8_t, V>(mask + c);
        float dg[V], du[V];
#pragma unroll
        for (int i = 0; i < V; i++) {
            float x = x2f(g.v[i]), s = 1.0f / one_plus_exp_f32(-x);   // NaN by way of x
            float ds = (mask && !m.v[i] ? 0.0f : x2f(d.v[i])) * s;
            dg[i] = ds * x2f(u.v[i]) * fmaf(x, 1.0f - s, 1.0f);
            du[i] = ds * x;
        }
        vec_store(dgate + c, to_x(dg));
        vec_store(dup + c, to_x(du));
    }
}

void cuda_swiglu_backward(floatX *dgateup, const floatX *dy, const uint8_t *mask, const floatX *gateup, size_t N,
                          int FF) {
    if (N == 0) return;
    bool vec = rows_take_vec(FF, dgateup, dy, gateup, mask);
    auto kernel = vec ? swiglu_backward_kernel<VEC_X> : swiglu_backward_kernel<1>;
    LAUNCH(kernel, (unsigned)N, row_threads(N, FF, vec ? VEC_X : 1, 0), 0, cuda_stream)(dgateup, dy, mask, gateup, FF);
    CUDA_CHECK(cudaGetLastError());
}
