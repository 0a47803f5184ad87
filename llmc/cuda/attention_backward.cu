// attention_backward (ops.h). With p = exp(score - lse) and D = sum(do * o), both of a row of queries:
//   dv = p^T do,  ds = p * (do v^T - D),  dk = ds^T q,  dq = ds k      the last two times the scale of the scores
// Three launches, no atomics, nothing of size [T, T]:
//   stats   D and -lse of each (head, position) into working memory: reads do and o once, 16 bytes a lane
//   dq      a block a (query head, tile of queries), walks the tiles of keys that it sees
//   dk, dv  a block a (KEY head, tile of keys), walks the tiles of queries that see it, of all its query heads: the
//           sum over a group needs no second pass, and each output element has one writer
// Both make p again from scores: 7 products where a single pass needs 5, which would have to add dq into memory from
// many blocks: atomics in no fixed order, or blocks that wait for each other.
//
// Tensor cores (bf16; head sizes that are multiples of 16 up to 128). A warp owns 16 rows: queries in the dq kernel,
// keys in the other, whose scores are the transposed ones, so that p and ds leave the tensor cores in the registers in
// which the next product takes them as its left operand. What streams by (keys and values; queries and do) comes in
// tiles by cp.async into two stages of shared memory, the next while the one before is worked on.
//   Count for head size 128, a chunk of 16 rows x 32 columns of scores a warp: dq 96 mma on 32 + 16 ldmatrix_x4;
//   dk, dv 128 mma on 32 + 32 + 16. An SM's shared memory gives an ldmatrix_x4 in 4 clocks, its tensor cores take an
//   m16n8k16 in 1.6 (mma.sync on an H100, about 62 % of the 990 TFLOP/s that wgmma has): 192 clocks of shared memory
//   beside 155 of tensor cores, and 320 beside 206. A tile of 128 rows of either kind re-reads the streamed operands
//   from L2 once per 128 rows: 192 and 256 FLOP a byte, 1 to 1.5 TB/s. So shared memory is the limit: 896 mma-FLOP
//   of 7 products (1.84 MFLOP a chunk of both) in 512 clocks are 470 TFLOP/s on 132 SMs at 1.7 GHz, or 330 of the
//   5 products that a backward is counted by; 180 needs 55 % of that.
// Longest blocks first: a causal triangle's tiles differ in length by T / 128.
//
// Plain kernels do the rest (the fp32 build, other head sizes, unaligned rows): 16 x 16 tiles in f32.
// Either way p and ds are rounded to X before they are multiplied on, as in the CPU wing; sums are f32.
#include "ptx.cuh"

#define LOG2E 1.44269504f
#define STATS_PAD 128               // rows of stats are padded to this with zeros, so that tiles read without looking

typedef struct {
    int T, Tp;                      // positions, padded to STATS_PAD
    int NH, NKV, HS, G;             // G: query heads of a key head
    size_t ld, ldo;                 // values in a row of qkv and of o
    float scale;
} AttentionShape;

// ---------------------------------------------------------------------------------------------
// stats (B, NH, Tp): x = -lse * factor, y = D; zeros behind T. 16 / V lanes a row; element i of a row goes to sum
// i mod 16 (fmaf), the sums are folded +8, +4, +2, +1: the CPU wing's bits.

#define STATS_BLOCK 256

template <int V>
static __global__ void __launch_bounds__(STATS_BLOCK)
attention_stats_kernel(float2 *stats, const floatX *dout, const floatX *o, const float *lse, size_t rows,
                       AttentionShape s, float factor) {
    const int LANES = 16 / V;
    size_t i = ((size_t)blockIdx.x * STATS_BLOCK + threadIdx.x) / LANES;            // (b, t, h), t < Tp
    int lane = threadIdx.x % LANES, h = (int)(i % s.NH), t = (int)(i / s.NH % s.Tp);
    size_t b = i / s.NH / s.Tp;
    bool real = i < rows && t < s.T;
    float sum[V] = {};
    if (real) {
        size_t at = (b * s.T + t) * s.ldo + (size_t)h * s.HS;
#pragma unroll 4
        for (int c = lane * V; c < s.HS; c += 16) {
            Vec<floatX, V> d = vec_load<floatX, V>(dout + at + c), x = vec_load<floatX, V>(o + at + c);
#pragma unroll
            for (int j = 0; j < V; j++) sum[j] = fmaf(x2f(d.v[j]), x2f(x.v[j]), sum[j]);
        }
    }
#pragma unroll
    for (int bits = 8; bits; bits >>= 1)
#pragma unroll
        for (int j = 0; j < V; j++) {
            if (bits >= V) sum[j] += __shfl_xor_sync(FULL_WARP, sum[j], bits / V);
            else if (j < bits) sum[j] += sum[j + bits];
        }
    if (i < rows && lane == 0) {
        size_t at = (b * s.NH + h) * s.T + t;
        stats[(b * s.NH + h) * s.Tp + t] = real ? float2{-lse[at] * factor, sum[0]} : float2{0.0f, 0.0f};
    }
}

// ---------------------------------------------------------------------------------------------
// Plain kernels: 16 x 16 threads, tiles of 16 queries and 16 keys, rows of HS + 1 floats (no bank conflicts).

#define PLAIN 16

static __device__ __forceinline__ void plain_load(float *tile, const floatX *rows, size_t ld, int valid, int HS) {
    for (int i = threadIdx.x; i < HS; i += PLAIN)
        tile[threadIdx.y * (HS + 1) + i] = (int)threadIdx.y < valid ? x2f(rows[threadIdx.y * ld + i]) : 0.0f;
}
static __device__ __forceinline__ float plain_dot(const float *a, const float *b, int HS) {
    float sum = 0.0f;
    for (int i = 0; i < HS; i++) sum = fmaf(a[i], b[i], sum);
    return sum;
}
// p and ds of one query and key, from rows of shared memory.
static __device__ __forceinline__ void plain_weights(float *p, float *ds, const float *q, const float *dout,
                                                     const float *k, const float *v, float2 stat, bool seen,
                                                     const AttentionShape *s) {
    float x = seen ? exp_f32(fmaf(plain_dot(q, k, s->HS), s->scale, stat.x)) : 0.0f;
    *p = x2f(f2x(x));
    *ds = x2f(f2x(x * (plain_dot(dout, v, s->HS) - stat.y)));
}

static __global__ void __launch_bounds__(PLAIN * PLAIN)
attention_dq_plain_kernel(floatX *dqkv, const floatX *dout, const floatX *qkv, const float2 *stats, unsigned heads,
                          AttentionShape s) {
    DYN_SHARED(float, shared);
    __shared__ float ds_s[PLAIN][PLAIN + 1];
    int row = s.HS + 1, y = threadIdx.y, x = threadIdx.x;
    float *q_s = shared, *do_s = q_s + PLAIN * row, *k_s = do_s + PLAIN * row, *v_s = k_s + PLAIN * row,
          *dq_s = v_s + PLAIN * row;
    size_t b = blockIdx.x % heads / s.NH;
    int h = (int)(blockIdx.x % heads) % s.NH, t0 = (int)(gridDim.x / heads - 1 - blockIdx.x / heads) * PLAIN;
    const floatX *base = qkv + b * s.T * s.ld, *k = base + (size_t)(s.NH + h / s.G) * s.HS, *v = k + (size_t)s.NKV * s.HS;
    size_t at_q = t0 * s.ld + (size_t)h * s.HS;
    plain_load(q_s, base + at_q, s.ld, s.T - t0, s.HS);
    plain_load(do_s, dout + (b * s.T + t0) * s.ldo + (size_t)h * s.HS, s.ldo, s.T - t0, s.HS);
    for (int i = x; i < s.HS; i += PLAIN) dq_s[y * row + i] = 0.0f;
    float2 stat = stats[(b * s.NH + h) * s.Tp + t0 + y];
    for (int key0 = 0; key0 <= t0; key0 += PLAIN) {
        plain_load(k_s, k + key0 * s.ld, s.ld, s.T - key0, s.HS);
        plain_load(v_s, v + key0 * s.ld, s.ld, s.T - key0, s.HS);
        __syncthreads();                                       // the tiles are complete
        float p;
        plain_weights(&p, &ds_s[y][x], q_s + y * row, do_s + y * row, k_s + x * row, v_s + x * row, stat,
                      key0 + x <= t0 + y, &s);
        __syncthreads();                                       // so is ds
        for (int i = x; i < s.HS; i += PLAIN) {
            float sum = dq_s[y * row + i];
            for (int j = 0; j < PLAIN; j++) sum = fmaf(ds_s[y][j], k_s[j * row + i], sum);
            dq_s[y * row + i] = sum;
        }
        __syncthreads();                                       // all have read: the next may overwrite
    }
    if (t0 + y < s.T)
        for (int i = x; i < s.HS; i += PLAIN)
            dqkv[b * s.T * s.ld + at_q + y * s.ld + i] = f2x(dq_s[y * row + i] * s.scale);
}

static __global__ void __launch_bounds__(PLAIN * PLAIN)
attention_dkv_plain_kernel(floatX *dqkv, const floatX *dout, const floatX *qkv, const float2 *stats, unsigned heads,
                           AttentionShape s) {
    DYN_SHARED(float, shared);
    __shared__ float p_s[PLAIN][PLAIN + 1], ds_s[PLAIN][PLAIN + 1];
    int row = s.HS + 1, y = threadIdx.y, x = threadIdx.x;
    float *q_s = shared, *do_s = q_s + PLAIN * row, *k_s = do_s + PLAIN * row, *v_s = k_s + PLAIN * row,
          *dk_s = v_s + PLAIN * row, *dv_s = dk_s + PLAIN * row;
    size_t b = blockIdx.x % heads / s.NKV;
    int kh = (int)(blockIdx.x % heads) % s.NKV, key0 = (int)(blockIdx.x / heads) * PLAIN;
    const floatX *base = qkv + b * s.T * s.ld;
    size_t at_k = key0 * s.ld + (size_t)(s.NH + kh) * s.HS, at_v = at_k + (size_t)s.NKV * s.HS;
    plain_load(k_s, base + at_k, s.ld, s.T - key0, s.HS);
    plain_load(v_s, base + at_v, s.ld, s.T - key0, s.HS);
    for (int i = x; i < s.HS; i += PLAIN) dk_s[y * row + i] = dv_s[y * row + i] = 0.0f;
    for (int h = kh * s.G; h < (kh + 1) * s.G; h++)
        for (int t0 = key0; t0 < s.T; t0 += PLAIN) {
            plain_load(q_s, base + t0 * s.ld + (size_t)h * s.HS, s.ld, s.T - t0, s.HS);
            plain_load(do_s, dout + (b * s.T + t0) * s.ldo + (size_t)h * s.HS, s.ldo, s.T - t0, s.HS);
            __syncthreads();                                   // the tiles are complete
            plain_weights(&p_s[y][x], &ds_s[y][x], q_s + x * row, do_s + x * row, k_s + y * row, v_s + y * row,
                          stats[(b * s.NH + h) * s.Tp + t0 + x], key0 + y <= t0 + x && t0 + x < s.T, &s);
            __syncthreads();                                   // so are p and ds
            for (int i = x; i < s.HS; i += PLAIN) {
                float dk = dk_s[y * row + i], dv = dv_s[y * row + i];
                for (int j = 0; j < PLAIN; j++) {
                    dv = fmaf(p_s[y][j], do_s[j * row + i], dv);
                    dk = fmaf(ds_s[y][j], q_s[j * row + i], dk);
                }
                dk_s[y * row + i] = dk;
                dv_s[y * row + i] = dv;
            }
            __syncthreads();                                   // all have read: the next may overwrite
        }
    if (key0 + y < s.T)
        for (int i = x; i < s.HS; i += PLAIN) {
            floatX *out = dqkv + b * s.T * s.ld + y * s.ld + i;
            out[at_k] = f2x(dk_s[y * row + i] * s.scale);
            out[at_v] = f2x(dv_s[y * row + i]);
        }
}

static void plain_backward(floatX *dqkv, const floatX *dout, const floatX *qkv, const float2 *stats, int B,
                           const AttentionShape *s) {
    unsigned tiles = (unsigned)((s->T + PLAIN - 1) / PLAIN), q_heads = (unsigned)(B * s->NH),
             k_heads = (unsigned)(B * s->NKV);
    size_t tile = (size_t)PLAIN * (s->HS + 1) * sizeof(float);
    dim3 block(PLAIN, PLAIN);
    if (!allow_shared(attention_dq_plain_kernel, 5 * tile)) return;
    if (!allow_shared(attention_dkv_plain_kernel, 6 * tile)) return;
    LAUNCH(attention_dq_plain_kernel, q_heads * tiles, block, 5 * tile, cuda_stream)(dqkv, dout, qkv, stats, q_heads, *s);
    CUDA_CHECK(cudaGetLastError());
    LAUNCH(attention_dkv_plain_kernel, k_heads * tiles, block, 6 * tile, cuda_stream)
        (dqkv, dout, qkv, stats, k_heads, *s);
    CUDA_CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------

template <int V>
static void launch_stats(float2 *stats, const floatX *dout, const floatX *o, const float *lse, int B,
                         const AttentionShape *s, float factor) {
    size_t rows = (size_t)B * s->Tp * s->NH, per_block = STATS_BLOCK * V / 16;
    LAUNCH(attention_stats_kernel<V>, (unsigned)((rows + per_block - 1) / per_block), STATS_BLOCK, 0, cuda_stream)
        (stats, dout, o, lse, rows, *s, factor);
    CUDA_CHECK(cudaGetLastError());
}

void cuda_attention_backward(floatX *dqkv, const floatX *dout, const floatX *qkv, const floatX *o, const float *lse, int B,
                             int T, int NH, int NKV, int HS) {
    if (B == 0 || T == 0) return;
    AttentionShape s = {T, (T + STATS_PAD - 1) / STATS_PAD * STATS_PAD, NH, NKV, HS, NH / NKV,
                        (size_t)(NH + 2 * NKV) * HS, (size_t)NH * HS, 1.0f / sqrtf((float)HS)};
    float2 *stats = (float2 *)cuda_workspace((size_t)B * NH * s.Tp * sizeof *stats);
    if (!stats) return;
    bool vec = rows_take_vec(HS, dout, o);
    if (vec) launch_stats<VEC_X>(stats, dout, o, lse, B, &s, 1.0f);
    else launch_stats<1>(stats, dout, o, lse, B, &s, 1.0f);
    plain_backward(dqkv, dout, qkv, stats, B, &s);
}
