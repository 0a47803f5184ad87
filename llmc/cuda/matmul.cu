// linear_forward and linear_forward_f32 (ops.h), plainly: y = x . w^T by square tiles through shared memory, without
// tensor cores. It runs wherever CUDA runs and its bits are easy to state, which makes it the reference for a library's
// matmul:
//   y[n][o] = X( wscale[o] * s ),  s = 0, then s = fmaf(x[n][k], w[o][k], s) for k = 0, 1, .. C-1
// A block computes a TILE x TILE square of y, a thread a 4 x 4 square of that.
//
//   xs[k][n], ws[k][o]: a slice of DEPTH columns of x and of w, as f32, transposed so that the four values that a
//   thread needs for one k are one 16-byte read. Example: x[n0 + 5][k0 + 2] lies at xs[2][5].
#include "cuda.cuh"

#define TILE 64
#define DEPTH 16
#define SIDE 16                     // threads along each side of a block: TILE / 4
#define PAD 4                       // keeps rows 16-byte aligned and spreads the transposing stores over the banks

// Rows [row0, row0 + TILE) and columns [k0, k0 + DEPTH) of m (rows, C) into s[k][row]; zeros outside of m.
// 256 threads: each brings 4 neighbouring columns of one row.
static __device__ __forceinline__ void load_slice(float s[DEPTH][TILE + PAD], const floatX *m, size_t row0, size_t rows,
                                                  int k0, int C, bool vec) {
    int t = threadIdx.y * SIDE + threadIdx.x, r = t / (DEPTH / 4), k = t % (DEPTH / 4) * 4;
    Vec<floatX, 4> v = {};
    if (row0 + r < rows) {
        const floatX *p = m + (row0 + r) * C + k0 + k;
        if (vec && k0 + k < C) v = vec_load<floatX, 4>(p);      // C is a multiple of 4: all four columns or none
        else for (int i = 0; i < 4; i++) if (k0 + k + i < C) v.v[i] = p[i];
    }
    for (int i = 0; i < 4; i++) s[k + i][r] = x2f(v.v[i]);
}

static __device__ __forceinline__ void store(floatX *p, float v) { *p = f2x(v); }
#ifndef PRECISION_FP32
static __device__ __forceinline__ void store(float *p, float v) { *p = v; }
#endif

template <class Out>
static __global__ void __launch_bounds__(SIDE * SIDE)
linear_forward_kernel(Out *y, const floatX *x, const floatX *w, const float *wscale, size_t N, int C, int OC,
                      bool vec) {
    __shared__ __align__(16) float xs[DEPTH][TILE + PAD], ws[DEPTH][TILE + PAD];
    size_t n0 = (size_t)blockIdx.x * TILE, o0 = (size_t)blockIdx.y * TILE;
    float acc[4][4] = {};
    for (int k0 = 0; k0 < C; k0 += DEPTH) {
        load_slice(xs, x, n0, N, k0, C, vec);
        load_slice(ws, w, o0, OC, k0, C, vec);
        __syncthreads();                                       // the slices are complete
#pragma unroll
        for (int k = 0; k < DEPTH; k++) {                      // zeros beyond C leave every sum as it is
            Vec<float, 4> a = vec_load<float, 4>(&xs[k][threadIdx.y * 4]);
            Vec<float, 4> b = vec_load<float, 4>(&ws[k][threadIdx.x * 4]);
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) acc[i][j] = fmaf(a.v[i], b.v[j], acc[i][j]);
        }
        __syncthreads();                                       // all have read them: the next may overwrite
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            size_t n = n0 + threadIdx.y * 4 + i, o = o0 + threadIdx.x * 4 + j;
            if (n < N && o < (size_t)OC) store(&y[n * OC + o], wscale ? acc[i][j] * wscale[o] : acc[i][j]);
        }
}

template <class Out>
static void linear(Out *y, const floatX *x, const floatX *w, const float *wscale, size_t N, int C, int OC) {
    if (N == 0) return;
    dim3 grid((unsigned)((N + TILE - 1) / TILE), (unsigned)((OC + TILE - 1) / TILE)), block(SIDE, SIDE);
    LAUNCH(linear_forward_kernel<Out>, grid, block, 0, cuda_stream)
        (y, x, w, wscale, N, C, OC, C % 4 == 0 && rows_take_vec(0, x, w));
    CUDA_CHECK(cudaGetLastError());
}

void cuda_linear_forward(floatX *y, const floatX *x, const floatX *w, const float *wscale, size_t N, int C, int OC) {
    linear(y, x, w, wscale, N, C, OC);
}
void cuda_linear_forward_f32(float *y, const floatX *x, const floatX *w, const float *wscale, size_t N, int C, int OC) {
    linear(y, x, w, wscale, N, C, OC);
}
