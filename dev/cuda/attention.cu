// Laboratory of attention forward: causal, grouped-query, bf16. What counts is the rate of the two products; FLOPs are
// those of the keys that a query sees. How to compile: common.h (in the fp32 build the first two alone).
//
//   1  a thread a query, online softmax in its own memory: every thread reads every key for itself
//   2  tiles of keys in shared memory, f32 without tensor cores: the wing's kernel for odd shapes
//   3  tensor cores, four warps of 16 queries; keys are loaded, waited for, used: nothing overlaps
//   4  the wing's with 64 queries a block: the next tile arrives by cp.async while this one is computed
//   5  the wing's with 128 queries a block: each fragment of keys and values serves two mma, which halves the load on
//      shared memory
#include "common.h"
#include "cuda/attention.cu"

#ifdef PRECISION_FP32
#define VARIANTS 2                  // tensor cores take bf16
#else
#define VARIANTS 5
#endif
#define HEAD 128

// ---------------------------------------------------------------------------------------------
// The reference, in double.

typedef struct { int B, T, NH, NKV; } Shape;

static void attention_cpu(floatX *o, const floatX *q, const floatX *k, const floatX *v, Shape s) {
    double *p = lab_array<double>((size_t)s.T), scale = 1 / sqrt((double)HEAD);
    size_t ldq = (size_t)s.NH * HEAD, ldkv = (size_t)s.NKV * HEAD;
    for (size_t row = 0; row < (size_t)s.B * s.T; row++)
        for (int h = 0; h < s.NH; h++) {
            size_t n = row % s.T + 1, first = row / s.T * s.T * ldkv + (size_t)(h / (s.NH / s.NKV)) * HEAD;
            double top = -INFINITY, sum = 0;
            for (size_t j = 0; j < n; j++) {
                p[j] = 0;
                for (int i = 0; i < HEAD; i++)
                    p[j] += scale * x2f(q[row * ldq + (size_t)h * HEAD + i]) * x2f(k[first + j * ldkv + i]);
                top = fmax(top, p[j]);
            }
            for (size_t j = 0; j < n; j++) sum += p[j] = exp(p[j] - top);
            for (int i = 0; i < HEAD; i++) {
                double x = 0;
                for (size_t j = 0; j < n; j++) x += p[j] / sum * x2f(v[first + j * ldkv + i]);
                o[row * ldq + (size_t)h * HEAD + i] = f2x((float)x);
            }
        }
    free(p);
}

// ---------------------------------------------------------------------------------------------
// Variants.

static __global__ void attention_1(Args a, size_t rows) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;   // (b, t, h)
    if (i >= rows) return;
    int h = (int)(i % a.NH), t = (int)(i / a.NH % a.T);
    const floatX *q = a.q + i / a.NH * a.ldq + (size_t)h * HEAD;
    size_t at = i / a.NH / a.T * a.skv + (size_t)(h / a.G) * HEAD;
    float o[HEAD] = {}, max = -INFINITY, sum = 0.0f;
    for (int j = 0; j <= t; j++) {
        float s = 0.0f;
        for (int c = 0; c < HEAD; c++) s = fmaf(x2f(q[c]), x2f(a.k[at + j * a.ldkv + c]), s);
        float top = max_nan_f32(max, s * a.scale), decay = exp2_fast(max - top), p = exp2_fast(s * a.scale - top);
        max = top;
        sum = fmaf(sum, decay, p);
        for (int c = 0; c < HEAD; c++) o[c] = fmaf(o[c], decay, p * x2f(a.v[at + j * a.ldkv + c]));
    }
    for (int c = 0; c < HEAD; c++) a.o[i / a.NH * a.ldo + (size_t)h * HEAD + c] = f2x(o[c] / sum);
}

#ifndef PRECISION_FP32
// Rows [row0, row0 + 64) into a tile by plain loads and stores of 16 bytes.
static __device__ void load_tile(bf16 *tile, const bf16 *m, size_t ld, int row0, int rows) {
    for (int i = threadIdx.x; i < 64 * HEAD / 8; i += WARPS * 32) {
        int r = i / (HEAD / 8), c = i % (HEAD / 8) * 8;
        Vec<bf16, 8> x = {};
        if (row0 + r < rows) x = vec_load<bf16, 8>(m + (row0 + r) * ld + c);
        vec_store(tile + r * TILE_LD(HEAD) + c, x);
    }
}

static __global__ void __launch_bounds__(WARPS * 32) attention_3(Args a) {
    const int LD = TILE_LD(HEAD);
    DYN_SHARED(bf16, qs);                                       // (64) queries, keys, values
    bf16 *ks = qs + 64 * LD, *vs = ks + 64 * LD;
    int b = blockIdx.x / a.NH, h = blockIdx.x % a.NH, t0 = (int)(gridDim.y - 1 - blockIdx.y) * 64;
    int row0 = threadIdx.x / 32 * 16, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    size_t at = b * a.skv + (size_t)(h / a.G) * HEAD, head = (size_t)b * a.T * a.ldq + (size_t)h * HEAD;
    load_tile(qs, a.q + head, a.ldq, t0, a.T);
    float o[HEAD / 8][4] = {}, max[2] = {-INFINITY, -INFINITY}, sum[2] = {}, decay[2];
    for (int j = 0; j < t0 + 64 && j < a.T; j += 64) {
        __syncthreads();                                        // all are done with the tile before
        load_tile(ks, a.k + at, a.ldkv, j, a.T);
        load_tile(vs, a.v + at, a.ldkv, j, a.T);
        __syncthreads();                                        // the tile is there
        float s[KT / 8][4] = {};
        uint32_t af[4], bf[4];
#pragma unroll
        for (int c = 0; c < HEAD; c += 16) {
            frag_a(af, qs, LD, row0, c);
#pragma unroll
            for (int n = 0; n < KT / 8; n += 2) {
                frag_b(bf, ks, LD, n * 8, c);
                mma_pair(s[n], s[n + 1], af, bf);
            }
        }
#pragma unroll
        for (int n = 0; n < KT / 8; n++)
#pragma unroll
            for (int z = 0; z < 4; z++)
                if (j + n * 8 + 2 * t + z % 2 > t0 + row0 + g + z / 2 * 8) s[n][z] = -INFINITY;
        softmax_step(s, max, sum, decay, a.scale);
#pragma unroll
        for (int n = 0; n < HEAD / 8; n++)
#pragma unroll
            for (int z = 0; z < 4; z++) o[n][z] *= decay[z / 2];
#pragma unroll
        for (int kk = 0; kk < KT / 16; kk++) {
            frag_from_sums(af, s[2 * kk], s[2 * kk + 1]);
#pragma unroll
            for (int n = 0; n < HEAD / 8; n += 2) {
                frag_b_t(bf, vs, LD, kk * 16, n * 8);
                mma_pair(o[n], o[n + 1], af, bf);
            }
        }
    }
    for (int z = 0; z < 2; z++) {
        int r = t0 + row0 + g + z * 8;
        sum[z] += __shfl_xor_sync(FULL_WARP, sum[z], 1);
        sum[z] += __shfl_xor_sync(FULL_WARP, sum[z], 2);
        if (r >= a.T) continue;
#pragma unroll
        for (int n = 0; n < HEAD / 8; n++)
            *(uint32_t *)(a.o + ((size_t)b * a.T + r) * a.ldo + (size_t)h * HEAD + n * 8 + 2 * t) =
                pack_bf16(o[n][2 * z] / sum[z], o[n][2 * z + 1] / sum[z]);
    }
}
#endif

static void launch(int variant, int block, const Args &a, int B) {
    size_t rows = (size_t)B * a.T * a.NH;
    switch (variant) {
    case 1:
        LAUNCH(attention_1, (unsigned)((rows + block - 1) / block), (unsigned)block, 0, cuda_stream)(a, rows);
        break;
    case 2: launch_plain<32, 32, 16>(a, B, HEAD); break;
#ifndef PRECISION_FP32
    case 3:
        if (allow_shared(attention_3, tile_bytes(3 * 64, HEAD)))
            LAUNCH(attention_3, dim3((unsigned)(B * a.NH), (unsigned)((a.T + 63) / 64)), WARPS * 32,
                   tile_bytes(3 * 64, HEAD), cuda_stream)(a);
        break;
    case 4: launch_mma_tile<HEAD, 1>(a, B); break;
    case 5: launch_mma_tile<HEAD, 2>(a, B); break;
#endif
    }
}

static void run(int variant) {
    static const Shape shapes[] = {{1, 1, 1, 1}, {1, 65, 4, 1}, {2, 130, 2, 2}, {1, 4096, 32, 8}};
    for (const Shape &s : shapes) {
        bool timed = s.T > 1000;                                // too much for the reference and the simulator
        if (timed && !LAB_GPU) continue;
        size_t n = (size_t)s.B * s.T * s.NH * HEAD, nkv = (size_t)s.B * s.T * s.NKV * HEAD;
        floatX *q = lab_random_x(n, 1, 1.5f), *k = lab_random_x(nkv, 2, 1.5f), *v = lab_random_x(nkv, 3, 1.0f);
        floatX *want = lab_array<floatX>(n);
        floatX *dq = lab_to_device(q, n), *dk = lab_to_device(k, nkv), *dv = lab_to_device(v, nkv);
        floatX *d_o = lab_device<floatX>(n);
        if (!timed) attention_cpu(want, q, k, v, s);
        size_t ldq = (size_t)s.NH * HEAD, ldkv = (size_t)s.NKV * HEAD;
        Args a = {d_o, nullptr, dq, dk, dv, s.T, s.T, s.NH, s.NH / s.NKV, ldq, ldq, ldkv, s.T * ldkv,
                  attention_scale_log2(HEAD), nullptr, nullptr, 0};
        for (int block : lab_blocks) {
            if (variant > 1 && block != lab_blocks[0]) break;   // these choose the block themselves
            if (!timed) {
                launch(variant, block, a, s.B);
                lab_check("o", d_o, want, n, 0.02);             // weights and output rounded to 8 bits
            } else {
                double t = lab_time([&] { launch(variant, block, a, s.B); });
                lab_report(variant, variant > 1 ? 0 : block, t, 0.0, 2.0 * (double)n * (s.T + 1));
            }
        }
        for (floatX *p : {dq, dk, dv, d_o}) LAB_CUDA(cudaFree(p));
        for (floatX *p : {q, k, v, want}) free(p);
    }
}

int main(int argc, char **argv) { return lab_main(argc, argv, VARIANTS, run); }
