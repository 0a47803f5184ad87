// Laboratory of rmsnorm_fq_forward: res = bf(x + delta), RMSNorm, and 8-bit fake quantization a row, in the order of
// additions that ops.h fixes, so every variant must give the bits of the reference. How to compile: common.h.
//
//   1  a thread a row: three walks through memory, no two neighbours read neighbouring bytes
//   2  a warp a row: neighbouring lanes read neighbouring elements, and lane i < 16 owns partial sum i, so the order of
//      the sum costs nothing; still three walks, two bytes a lane
//   3  a block a row, 16-byte loads; the row is read again from memory (or cache) for the sum and for the quantization
//   4  the row stays in shared memory: memory is read once and written once
//   5  the chain of the sum, the one thing that a block waits for, works on registers while the next values come from
//      shared memory
//   6  one warp computes the row's scale for the block: three divisions a thread were as many instructions as
//      the elements of a thread
//   7  the wing's: fewer instructions an element (packed conversions, constants outside the loop), and it chooses the
//      block itself
#include "common.h"
#include "cuda/rmsnorm.cu"

#define VARIANTS 7

// ---------------------------------------------------------------------------------------------
// The reference.

static void rmsnorm_cpu(floatX *res, floatX *y, float *rstd, const floatX *x, const floatX *delta, const floatX *weight,
                        size_t N, int C, float eps, const QuantSpec *act) {
    for (size_t n = 0; n < N; n++, res += C, y += C, x += C, delta += C) {
        float s[16] = {};
        for (int c = 0; c < C; c++) {
            res[c] = f2x(x2f(x[c]) + x2f(delta[c]));
            s[c % 16] = fmaf(x2f(res[c]), x2f(res[c]), s[c % 16]);
        }
        for (int h = 8; h; h /= 2)
            for (int i = 0; i < h; i++) s[i] += s[i + h];
        rstd[n] = 1.0f / sqrtf(s[0] / (float)C + eps);
        float mn = INFINITY, mx = -INFINITY;
        for (int c = 0; c < C; c++) {
            y[c] = f2x(x2f(res[c]) * rstd[n] * x2f(weight[c]));
            quant_minmax(&mn, &mx, x2f(y[c]));
        }
        QParams p = quant_choose(mn, mx, act, QD_X);
        for (int c = 0; c < C; c++) y[c] = f2x(quant_fake(x2f(y[c]), p, act, QD_X));
    }
}

// ---------------------------------------------------------------------------------------------
// Variants.

static __device__ __forceinline__ float rstd_of(float sum, int C, float eps) {
    return 1.0f / sqrtf(sum / (float)C + eps);
}

static __global__ void rmsnorm_1(floatX *res, floatX *y, float *rstd, const floatX *x, const floatX *delta,
                                 const floatX *weight, size_t N, int C, float eps, QuantSpec act) {
    size_t n = (size_t)blockIdx.x * blockDim.x + threadIdx.x, base = n * C;
    if (n >= N) return;
    float s[16] = {}, mn = INFINITY, mx = -INFINITY;
    for (int from = 0; from < C; from += 16)
#pragma unroll
        for (int i = 0; i < 16; i++) {                         // unrolled, so that s stays in registers
            size_t at = base + from + i;
            if (from + i >= C) continue;
            res[at] = f2x(x2f(x[at]) + x2f(delta[at]));
            s[i] = fmaf(x2f(res[at]), x2f(res[at]), s[i]);
        }
#pragma unroll
    for (int h = 8; h; h /= 2)
#pragma unroll
        for (int i = 0; i < h; i++) s[i] += s[i + h];
    float r = rstd_of(s[0], C, eps);
    rstd[n] = r;
    for (int c = 0; c < C; c++) {
        y[base + c] = f2x(x2f(res[base + c]) * r * x2f(weight[c]));
        quant_minmax(&mn, &mx, x2f(y[base + c]));
    }
    QParams p = quant_choose(mn, mx, &act, QD_X);
    for (int c = 0; c < C; c++) y[base + c] = f2x(quant_fake(x2f(y[base + c]), p, &act, QD_X));
}

static __global__ void rmsnorm_2(floatX *res, floatX *y, float *rstd, const floatX *x, const floatX *delta,
                                 const floatX *weight, size_t N, int C, float eps, QuantSpec act) {
    size_t n = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, base = n * C;
    int lane = (int)threadIdx.x % 32;
    if (n >= N) return;                                        // whole warps
    float sum = 0.0f, mn = INFINITY, mx = -INFINITY;
    for (int from = 0; from < C; from += 32) {
        int c = from + lane;
        float v = 0.0f;
        if (c < C) {
            floatX r = f2x(x2f(x[base + c]) + x2f(delta[base + c]));
            res[base + c] = r;
            v = x2f(r);
        }
        // Lane i < 16 takes its own element, then that of lane i + 16.
        float upper = __shfl_sync(FULL_WARP, v, lane + 16);
        sum = fmaf(v, v, sum);
        sum = fmaf(upper, upper, sum);
    }
    for (int bits = 8; bits; bits >>= 1) sum += __shfl_xor_sync(FULL_WARP, sum, bits);
    float r = rstd_of(__shfl_sync(FULL_WARP, sum, 0), C, eps);
    if (lane == 0) rstd[n] = r;
    for (int c = lane; c < C; c += 32) {
        y[base + c] = f2x(x2f(res[base + c]) * r * x2f(weight[c]));
        quant_minmax(&mn, &mx, x2f(y[base + c]));
    }
    warp_minmax(&mn, &mx);
    QParams p = quant_choose(mn, mx, &act, QD_X);
    for (int c = lane; c < C; c += 32) y[base + c] = f2x(quant_fake(x2f(y[base + c]), p, &act, QD_X));
}

// Variants 3 to 6. KEEP: the row stays in shared memory. BATCH: the chain's values come in batches, one ahead.
// ONE_WARP: that computes the scale.
template <bool KEEP, bool BATCH, bool ONE_WARP>
static __global__ void __launch_bounds__(1024)
rmsnorm_block(floatX *res, floatX *y, float *rstd, const floatX *x, const floatX *delta, const floatX *weight, size_t,
              int C, float eps, QuantSpec act) {
    DYN_SHARED(floatX, kept);
    __shared__ float row_rstd, part[2][32];
    size_t base = (size_t)blockIdx.x * C;
    int step = (int)blockDim.x * VEC_X, first = (int)threadIdx.x * VEC_X;
    x += base, delta += base, res += base, y += base;
    for (int c = first; c < C; c += step) {
        Vec<floatX, VEC_X> v = vec_load<floatX, VEC_X>(x + c), d = vec_load<floatX, VEC_X>(delta + c);
        for (int i = 0; i < VEC_X; i++) v.v[i] = f2x(x2f(v.v[i]) + x2f(d.v[i]));
        vec_store(res + c, v);
        if (KEEP) vec_store(kept + c, v);
    }
    __syncthreads();                                           // the row is complete
    const floatX *row = KEEP ? kept : res;
    if (threadIdx.x < 16) {
        float sum = 0.0f;
        int c = threadIdx.x;
        if (BATCH) {
            int whole = C / 128 * 128;
            float now[8] = {}, next[8];
            if (c < whole)
                for (int i = 0; i < 8; i++) now[i] = x2f(row[c + 16 * i]);
            for (; c < whole; c += 128) {
                bool more = c + 128 < whole;
#pragma unroll
                for (int i = 0; i < 8; i++) next[i] = more ? x2f(row[c + 128 + 16 * i]) : 0.0f;
#pragma unroll
                for (int i = 0; i < 8; i++) sum = fmaf(now[i], now[i], sum);
#pragma unroll
                for (int i = 0; i < 8; i++) now[i] = next[i];
            }
        }
#pragma unroll 1
        for (; c < C; c += 16) sum = fmaf(x2f(row[c]), x2f(row[c]), sum);
        for (int bits = 8; bits; bits >>= 1) sum += __shfl_xor_sync(0xffffu, sum, bits);
        if (threadIdx.x == 0) rstd[blockIdx.x] = row_rstd = rstd_of(sum, C, eps);
    }
    __syncthreads();                                           // row_rstd is there
    float r = row_rstd, mn = INFINITY, mx = -INFINITY;
    floatX *out = KEEP ? kept : y;
    for (int c = first; c < C; c += step) {
        Vec<floatX, VEC_X> v = vec_load<floatX, VEC_X>(row + c), w = vec_load<floatX, VEC_X>(weight + c);
        for (int i = 0; i < VEC_X; i++) {
            v.v[i] = f2x(x2f(v.v[i]) * r * x2f(w.v[i]));
            quant_minmax(&mn, &mx, x2f(v.v[i]));
        }
        vec_store(out + c, v);
    }
    QParams p;
    if (ONE_WARP) {
        p = block_qparams(mn, mx, &act);
    } else {
        warp_minmax(&mn, &mx);
        if (threadIdx.x % 32 == 0) {
            part[0][threadIdx.x / 32] = mn;
            part[1][threadIdx.x / 32] = mx;
        }
        __syncthreads();                                       // part is complete
        for (int w = 0; w < (int)blockDim.x / 32; w++) widen(&mn, &mx, part[0][w], part[1][w]);
        p = quant_choose(mn, mx, &act, QD_X);
    }
    for (int c = first; c < C; c += step) {
        Vec<floatX, VEC_X> v = vec_load<floatX, VEC_X>(out + c);
        for (int i = 0; i < VEC_X; i++) v.v[i] = f2x(quant_fake(x2f(v.v[i]), p, &act, QD_X));
        vec_store(y + c, v);
    }
}

typedef void (*Kernel)(floatX *, floatX *, float *, const floatX *, const floatX *, const floatX *, size_t, int, float,
                       QuantSpec);
static const struct { Kernel kernel; int rows_a_block_of_32; bool keep; } variants[VARIANTS - 1] = {
    {rmsnorm_1, 32, false},
    {rmsnorm_2, 1, false},
    {rmsnorm_block<false, false, false>, 0, false},
    {rmsnorm_block<true, false, false>, 0, true},
    {rmsnorm_block<true, true, false>, 0, true},
    {rmsnorm_block<true, true, true>, 0, true}};

// ---------------------------------------------------------------------------------------------
// Shapes of a 135M, a 1B and an 8B Llama; 16384 tokens.

static const int widths[] = {576, 2048, 4096};
static const size_t N = LAB_GPU ? 16384 : 5;

struct Data { floatX *x, *delta, *weight, *res, *y; float *rstd; };

static void launch(int variant, int block, const Data &d, int C, const QuantSpec *act) {
    if (variant == VARIANTS) {
        cuda_rmsnorm_fq_forward(d.res, d.y, d.rstd, NULL, d.x, d.delta, d.weight, N, C, 1e-5f, act);
        return;
    }
    auto &v = variants[variant - 1];
    size_t rows = v.rows_a_block_of_32 ? (size_t)v.rows_a_block_of_32 * (size_t)(block / 32) : 1;
    size_t shared = v.keep ? (size_t)C * sizeof(floatX) : 0;
    LAUNCH(v.kernel, (unsigned)((N + rows - 1) / rows), (unsigned)block, shared, cuda_stream)
        (d.res, d.y, d.rstd, d.x, d.delta, d.weight, N, C, 1e-5f, *act);
}

static void run(int variant) {
    QuantSpec act = {};                                        // int8,token,asymmetric
    act.bits = 8;
    act.qmin = -128;
    act.qmax = 127;
    act.gran = QG_TOKEN;
    act.mapping = QM_ASYMMETRIC;
    act.eps = 1.1920929e-7f;
    for (int C : widths) {
        size_t n = N * (size_t)C;
        floatX *x = lab_random_x(n, 1, 2.0f), *delta = lab_random_x(n, 2, 1.0f),
               *weight = lab_random_x((size_t)C, 3, 1.5f), *res = lab_array<floatX>(n), *y = lab_array<floatX>(n);
        float *rstd = lab_array<float>(N);
        rmsnorm_cpu(res, y, rstd, x, delta, weight, N, C, 1e-5f, &act);
        Data d = {lab_to_device(x, n), lab_to_device(delta, n), lab_to_device(weight, (size_t)C), lab_device<floatX>(n),
                  lab_device<floatX>(n), lab_device<float>(N)};
        if (LAB_GPU) printf("C = %d\n", C);
        for (int block : lab_blocks) {
            if (variant == VARIANTS && block != lab_blocks[0]) break;
            launch(variant, block, d, C, &act);
            bool ok = lab_check("res", d.res, res, n, 0.0);
            ok = lab_check("y", d.y, y, n, 0.0) && ok;
            ok = lab_check("rstd", d.rstd, rstd, N, 0.0) && ok;
            if (!ok) printf("  variant %d, block %d, C %d\n", variant, block, C);
            double s = lab_time([&] { launch(variant, block, d, C, &act); });
            lab_report(variant, variant == VARIANTS ? 0 : block, s, (4.0 * (double)n + C) * sizeof(floatX), 0.0);
        }
        for (void *p : {(void *)d.x, (void *)d.delta, (void *)d.weight, (void *)d.res, (void *)d.y, (void *)d.rstd})
            LAB_CUDA(cudaFree(p));
        for (void *p : {(void *)x, (void *)delta, (void *)weight, (void *)res, (void *)y, (void *)rstd}) free(p);
    }
}

int main(int argc, char **argv) { return lab_main(argc, argv, VARIANTS, run); }
