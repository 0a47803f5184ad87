// Quantizing the blocks of a weight tensor: what the kernels that make working values (adamw.cu) and those that make
// packed codes (weight_wire.cu) share, so that both make the same codes.
#ifndef QLLM_QUANTBLOCK_CUH
#define QLLM_QUANTBLOCK_CUH
#include "fakequant.cuh"
#include "ptx.cuh"

// Values rounded to bf16, two in one instruction where there are two.
template <int V> static __device__ __forceinline__ Vec<bf16, V> to_bf16(Vec<float, V> f) {
    Vec<bf16, V> h;
    if (V == 1) h.v[0] = bf16_from_f32(f.v[0]);
    for (int i = 0; i + 1 < V; i += 2) {
        uint32_t both = pack_bf16(f.v[i], f.v[i + 1]);
        h.v[i] = (bf16)both;
        h.v[i + 1] = (bf16)(both >> 16);
    }
    return h;
}
template <int V> static __device__ __forceinline__ Vec<float, V> from_bf16(Vec<bf16, V> h) {
    Vec<float, V> f;
    for (int i = 0; i < V; i++) f.v[i] = bf16_to_f32(h.v[i]);
    return f;
}

template <int V> static __device__ __forceinline__ void add_range(float *mn, float *mx, Vec<float, V> f) {
    for (int i = 0; i < V; i++) {                              // fminf and fmaxf pass a NaN over
        *mn = fminf(*mn, f.v[i]);
        *mx = fmaxf(*mx, f.v[i]);
    }
}

// The range of all threads' values, to all threads: exact in any order. Called by all, at most once in a kernel.
static __device__ void block_range(float *mn, float *mx) {
    __shared__ float part[2][32];                              // of each warp
    warp_minmax(mn, mx);
    if (threadIdx.x % 32 == 0) {
        part[0][threadIdx.x / 32] = *mn;
        part[1][threadIdx.x / 32] = *mx;
    }
    __syncthreads();                                           // part is complete
    for (int w = 0; w < (int)blockDim.x / 32; w++) widen(mn, mx, part[0][w], part[1][w]);
}

// What quantizing the values of one block takes: quant.h's steps with all that is the block's own done once. In the
// integer domain codes are counted from the zero point, and lo and hi are qmin - zp and qmax - zp (exact).
struct BlockQuant {
    float scale, inv, lo, hi;
    float nan;                   // what NaN is taken for
    float zp, m, mid;            // m: value of code qmin in the float domain
    bool zero_is_float, codes;
};

static __device__ __forceinline__ BlockQuant block_quant_of(QParams p, const QuantSpec *s, bool codes) {
    BlockQuant b = {p.scale, 1.0f / p.scale, (float)s->qmin, (float)s->qmax, 0.0f, p.zp, 0.0f, quant_mid(s),
                    s->zero == QZ_FLOAT, codes};
    float zero;                                                // where 0 lies; NaN in a block that decodes to NaN
    if (b.zero_is_float) {
        b.m = bf16_round(p.zp - bf16_round(p.scale * b.mid));
        zero = rintf(bf16_round(bf16_round(0.0f - b.m) / p.scale));
    } else {
        b.lo -= p.zp;
        b.hi -= p.zp;
        zero = 0.0f * b.inv;
    }
    b.nan = zero == zero ? quant_clampf(zero, b.lo, b.hi) : b.lo;
    return b;
}

static __device__ __forceinline__ BlockQuant block_quant(float mn, float mx, const QuantSpec *s, bool codes) {
    return block_quant_of(quant_choose(mn, mx, s, QD_BF16), s, codes);
}

// The code of a bf16 value before clamping.
static __device__ __forceinline__ float unclamped(float x, const BlockQuant *b) {
    if (b->zero_is_float) return rintf(bf16_round(bf16_round(x - b->m) / b->scale));
    return rintf(x * b->inv);
}
// And after: counted from the zero point in the integer domain.
static __device__ __forceinline__ float clamped(float x, const BlockQuant *b) {
    float q = unclamped(x, b);
    q = q == q ? q : b->nan;
    return fminf(fmaxf(q, b->lo), b->hi);
}

// Blocks of b0 rows by b1 columns, across of them side by side.
struct Blocks { size_t count, across, b0, b1, rows, cols; };

// Where element e of block k stands. Blocks of one row follow each other in memory.
static __device__ __forceinline__ size_t block_at(const Blocks *b, size_t k, size_t e) {
    if (b->b0 == 1) return k * b->b1 + e;
    return (k / b->across * b->b0 + e / b->b1) * b->cols + k % b->across * b->b1 + e % b->b1;
}
#endif
