// rope (ops.h): rotates in place; reads and writes NH_rot HS sizeof(floatX) bytes a row, cos and sin once a row from
// memory and for its other heads from the nearest cache. A block a row; a thread takes V pairs: 16 bytes from each half
// of a head.
#include "row.cuh"

#define BLOCK 256

template <int V>
static __global__ void __launch_bounds__(BLOCK)
rope_kernel(floatX *x, const float *cos_t, const float *sin_t, int T, int pos0, int ldx, int NH_rot, int half,
            bool inverse) {
    size_t pos = (size_t)pos0 + blockIdx.x % (unsigned)T;
    const float *cs = cos_t + pos * half, *sn = sin_t + pos * half;
    x += (size_t)blockIdx.x * ldx;
    int pieces = half / V;                                     // of a head
    for (int k = threadIdx.x; k < NH_rot * pieces; k += blockDim.x) {
        int h = k / pieces, i = (k - h * pieces) * V;
        floatX *a = x + h * 2 * half + i, *b = a + half;
        Vec<floatX, V> va = vec_load<floatX, V>(a), vb = vec_load<floatX, V>(b);
        float c[V], s[V], ra[V], rb[V];
        load_f32(c, cs + i);
        load_f32(s, sn + i);
#pragma unroll
        for (int j = 0; j < V; j++) {
            float p = x2f(va.v[j]), q = x2f(vb.v[j]), sj = inverse ? -s[j] : s[j];
            ra[j] = p * c[j] - q * sj;
            rb[j] = q * c[j] + p * sj;
        }
        vec_store(a, to_x(ra));
        vec_store(b, to_x(rb));
    }
}

void cuda_rope(floatX *x, const float *cos_t, const float *sin_t, size_t N, int T, int pos0, int ldx, int NH_rot,
               int HS, bool inverse) {
    int half = HS / 2;
    if (N == 0 || NH_rot == 0 || half == 0) return;
    bool vec = rows_take_vec(half, x, cos_t, sin_t) && ldx % VEC_X == 0;
    int work = NH_rot * (vec ? half / VEC_X : half), threads = (work + 31) / 32 * 32;
    auto kernel = vec ? rope_kernel<VEC_X> : rope_kernel<1>;
    LAUNCH(kernel, (unsigned)N, (unsigned)(threads < BLOCK ? threads : BLOCK), 0, cuda_stream)
        (x, cos_t, sin_t, T, pos0, ldx, NH_rot, half, inverse);
    CUDA_CHECK(cudaGetLastError());
}
