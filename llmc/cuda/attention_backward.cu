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
// tiles by cp.async into two stages of shared memory, the next while the one before is worked on. Bits depend on no
// tile size: every sum goes over its queries or keys in ascending slices of 16.
//   Count for head size 128, 16 rows x 32 columns of scores: dq 96 mma on 48 ldmatrix_x4; dk, dv 128 on 80. An SM's
//   shared memory gives an ldmatrix_x4 in 4 clocks; its tensor cores take an m16n8k16 in 1.6 by mma.sync (H100: about
//   62 % of the 990 TFLOP/s that wgmma has). 512 clocks of shared memory, and 45 more for what arrives in it, beside
//   360 of tensor cores, for 0.92 MFLOP of 7 products: at most 370 TFLOP/s on 132 SMs at 1.7 GHz, 265 of the 5
//   products that a backward is counted by. Arithmetic of p and ds, some 16 instructions for each of 2 x 512, is 130
//   clocks of the four schedulers, mma and ldmatrix 90. From L2, 2 KiB of streamed rows a tile of 128 queries or 64
//   keys: 192 and 128 FLOP a byte, about 2 TB/s.
// Longest blocks first: a causal triangle's tiles differ in length by their number.
//
// Plain kernels do the rest (the fp32 build, other head sizes, unaligned rows): small tiles in f32.
// Either way p and ds are rounded to X before they are multiplied on, as in the CPU wing; sums are f32.
#include "attention.cuh"

#define STATS_PAD 32                // rows of stats are padded to this with zeros, so that tiles read without looking

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
// Plain kernels: P x P threads, tiles of P queries and P keys, rows of HS + 1 floats (no bank conflicts). P is 16, less
// where six tiles would not fit into the 99 KiB of shared memory that every device since sm_80 gives a block.

template <int P>
static __device__ __forceinline__ void plain_load(float *tile, const floatX *rows, size_t ld, int valid, int HS) {
    for (int i = threadIdx.x; i < HS; i += P)
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

template <int P>
static __global__ void __launch_bounds__(P * P)
attention_dq_plain_kernel(floatX *dqkv, const floatX *dout, const floatX *qkv, const float2 *stats, unsigned heads,
                          AttentionShape s) {
    DYN_SHARED(float, shared);
    __shared__ float ds_s[P][P + 1];
    int row = s.HS + 1, y = threadIdx.y, x = threadIdx.x;
    float *q_s = shared, *do_s = q_s + P * row, *k_s = do_s + P * row, *v_s = k_s + P * row,
          *dq_s = v_s + P * row;
    size_t b = blockIdx.x % heads / s.NH;
    int h = (int)(blockIdx.x % heads) % s.NH, t0 = (int)(gridDim.x / heads - 1 - blockIdx.x / heads) * P;
    const floatX *base = qkv + b * s.T * s.ld, *k = base + (size_t)(s.NH + h / s.G) * s.HS,
                 *v = k + (size_t)s.NKV * s.HS;
    size_t at_q = t0 * s.ld + (size_t)h * s.HS;
    plain_load<P>(q_s, base + at_q, s.ld, s.T - t0, s.HS);
    plain_load<P>(do_s, dout + (b * s.T + t0) * s.ldo + (size_t)h * s.HS, s.ldo, s.T - t0, s.HS);
    for (int i = x; i < s.HS; i += P) dq_s[y * row + i] = 0.0f;
    float2 stat = stats[(b * s.NH + h) * s.Tp + t0 + y];
    for (int key0 = 0; key0 <= t0; key0 += P) {
        plain_load<P>(k_s, k + key0 * s.ld, s.ld, s.T - key0, s.HS);
        plain_load<P>(v_s, v + key0 * s.ld, s.ld, s.T - key0, s.HS);
        __syncthreads();                                       // the tiles are complete
        float p;
        plain_weights(&p, &ds_s[y][x], q_s + y * row, do_s + y * row, k_s + x * row, v_s + x * row, stat,
                      key0 + x <= t0 + y, &s);
        __syncthreads();                                       // so is ds
        for (int i = x; i < s.HS; i += P) {
            float sum = dq_s[y * row + i];
            for (int j = 0; j < P; j++) sum = fmaf(ds_s[y][j], k_s[j * row + i], sum);
            dq_s[y * row + i] = sum;
        }
        __syncthreads();                                       // all have read: the next may overwrite
    }
    if (t0 + y < s.T)
        for (int i = x; i < s.HS; i += P)
            dqkv[b * s.T * s.ld + at_q + y * s.ld + i] = f2x(dq_s[y * row + i] * s.scale);
}

template <int P>
static __global__ void __launch_bounds__(P * P)
attention_dkv_plain_kernel(floatX *dqkv, const floatX *dout, const floatX *qkv, const float2 *stats, unsigned heads,
                           AttentionShape s) {
    DYN_SHARED(float, shared);
    __shared__ float p_s[P][P + 1], ds_s[P][P + 1];
    int row = s.HS + 1, y = threadIdx.y, x = threadIdx.x;
    float *q_s = shared, *do_s = q_s + P * row, *k_s = do_s + P * row, *v_s = k_s + P * row,
          *dk_s = v_s + P * row, *dv_s = dk_s + P * row;
    size_t b = blockIdx.x % heads / s.NKV;
    int kh = (int)(blockIdx.x % heads) % s.NKV, key0 = (int)(blockIdx.x / heads) * P;
    const floatX *base = qkv + b * s.T * s.ld;
    size_t at_k = key0 * s.ld + (size_t)(s.NH + kh) * s.HS, at_v = at_k + (size_t)s.NKV * s.HS;
    plain_load<P>(k_s, base + at_k, s.ld, s.T - key0, s.HS);
    plain_load<P>(v_s, base + at_v, s.ld, s.T - key0, s.HS);
    for (int i = x; i < s.HS; i += P) dk_s[y * row + i] = dv_s[y * row + i] = 0.0f;
    for (int h = kh * s.G; h < (kh + 1) * s.G; h++)
        for (int t0 = key0; t0 < s.T; t0 += P) {
            plain_load<P>(q_s, base + t0 * s.ld + (size_t)h * s.HS, s.ld, s.T - t0, s.HS);
            plain_load<P>(do_s, dout + (b * s.T + t0) * s.ldo + (size_t)h * s.HS, s.ldo, s.T - t0, s.HS);
            __syncthreads();                                   // the tiles are complete
            plain_weights(&p_s[y][x], &ds_s[y][x], q_s + x * row, do_s + x * row, k_s + y * row, v_s + y * row,
                          stats[(b * s.NH + h) * s.Tp + t0 + x], key0 + y <= t0 + x && t0 + x < s.T, &s);
            __syncthreads();                                   // so are p and ds
            for (int i = x; i < s.HS; i += P) {
                float dk = dk_s[y * row + i], dv = dv_s[y * row + i];
                for (int j = 0; j < P; j++) {
                    dv = fmaf(p_s[y][j], do_s[j * row + i], dv);
                    dk = fmaf(ds_s[y][j], q_s[j * row + i], dk);
                }
                dk_s[y * row + i] = dk;
                dv_s[y * row + i] = dv;
            }
            __syncthreads();                                   // all have read: the next may overwrite
        }
    if (key0 + y < s.T)
        for (int i = x; i < s.HS; i += P) {
            floatX *out = dqkv + b * s.T * s.ld + y * s.ld + i;
            out[at_k] = f2x(dk_s[y * row + i] * s.scale);
            out[at_v] = f2x(dv_s[y * row + i]);
        }
}

template <int P>
static void plain_backward(floatX *dqkv, const floatX *dout, const floatX *qkv, const float2 *stats, int B,
                           const AttentionShape *s) {
    unsigned tiles = (unsigned)((s->T + P - 1) / P), q_heads = (unsigned)(B * s->NH),
             k_heads = (unsigned)(B * s->NKV);
    size_t tile = (size_t)P * (s->HS + 1) * sizeof(float);
    dim3 block(P, P);
    if (!allow_shared(attention_dq_plain_kernel<P>, 5 * tile)) return;
    if (!allow_shared(attention_dkv_plain_kernel<P>, 6 * tile)) return;
    LAUNCH(attention_dq_plain_kernel<P>, q_heads * tiles, block, 5 * tile, cuda_stream)
        (dqkv, dout, qkv, stats, q_heads, *s);
    CUDA_CHECK(cudaGetLastError());
    LAUNCH(attention_dkv_plain_kernel<P>, k_heads * tiles, block, 6 * tile, cuda_stream)
        (dqkv, dout, qkv, stats, k_heads, *s);
    CUDA_CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------
// Tensor cores. A warp's lane (g, t) holds of a (16, 8) result: rows g and g + 8, columns 2t and 2t + 1 (ptx.cuh).

#ifndef PRECISION_FP32
#define KEYS 64                     // keys in a tile of the dq kernel
#define ROWS 32                     // queries in a tile of the dk, dv kernel

// A warp's 16 rows of sums, times scale, to rows of device memory, `rows` of them; by way of `tile`, 16 rows of shared
// memory that only this warp uses, for 16-byte stores.
template <int HS>
static __device__ __forceinline__ void store_sums(bf16 *out, size_t ld, int rows, bf16 *tile,
                                                  const float (&sum)[HS / 8][4], float scale) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    __syncwarp();                                              // all lanes have read what the tile held
#pragma unroll
    for (int j = 0; j < HS / 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t two = pack_bf16(sum[j][2 * i] * scale, sum[j][2 * i + 1] * scale);
            vec_store<bf16, 2>(tile + (g + 8 * i) * TILE_LD(HS) + 8 * j + 2 * t, {{(bf16)two, (bf16)(two >> 16)}});
        }
    __syncwarp();                                              // the tile is complete
#pragma unroll
    for (int i = lane; i < 16 * (HS / 8); i += 32) {
        int r = i / (HS / 8), c = i % (HS / 8) * 8;
        if (r < rows) vec_store(out + r * ld + c, vec_load<bf16, 8>(tile + r * TILE_LD(HS) + c));
    }
}

// Grid: (b, h) fastest, the last tile of queries first.
template <int HS, int WARPS, int MIN_BLOCKS>
static __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
attention_dq_kernel(bf16 *dqkv, const bf16 *dout, const bf16 *qkv, const float2 *stats, unsigned heads,
                    AttentionShape s, float scale_log2) {
    const int CHUNK = HS <= 64 ? 16 : 32, QUERIES = 16 * WARPS, THREADS = 32 * WARPS, LD = TILE_LD(HS);
    static_assert(QUERIES <= 2 * KEYS, "q and do pass through the stages of k and v");
    DYN_SHARED(bf16, shared);                                  // two stages of k and v (KEYS, LD)
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    size_t b = blockIdx.x % heads / s.NH;
    int h = (int)(blockIdx.x % heads) % s.NH, t0 = (int)(gridDim.x / heads - 1 - blockIdx.x / heads) * QUERIES;
    int row0 = t0 + 16 * warp;                                 // the warp's first query
    const bf16 *q = qkv + b * s.T * s.ld + (size_t)h * HS, *k = qkv + b * s.T * s.ld + (size_t)(s.NH + h / s.G) * HS,
               *v = k + (size_t)s.NKV * HS;

    // q and do: to registers, for good.
    uint32_t q_frag[HS / 16][4], do_frag[HS / 16][4];
    copy_tile<QUERIES, HS, THREADS>(shared, q, s.ld, t0, s.T);
    copy_tile<QUERIES, HS, THREADS>(shared + QUERIES * LD, dout + b * s.T * s.ldo + (size_t)h * HS, s.ldo, t0, s.T);
    cp_async_commit();
    const float2 *stat_row = stats + (b * s.NH + h) * s.Tp;
    float2 stat[2] = {stat_row[min(row0 + g, s.T - 1)], stat_row[min(row0 + g + 8, s.T - 1)]};
    cp_async_wait<0>();
    __syncthreads();                                           // q and do are there
#pragma unroll
    for (int i = 0; i < HS / 16; i++) {
        frag_a(q_frag[i], shared, LD, 16 * warp, 16 * i);
        frag_a(do_frag[i], shared + QUERIES * LD, LD, 16 * warp, 16 * i);
    }
    __syncthreads();                                           // and read: k and v may overwrite them

    float dq[HS / 8][4] = {};
    int keys = min(s.T, t0 + QUERIES);
    copy_tile<KEYS, HS, THREADS>(shared, k, s.ld, 0, s.T);
    copy_tile<KEYS, HS, THREADS>(shared + KEYS * LD, v, s.ld, 0, s.T);
    cp_async_commit();
    for (int key0 = 0; key0 < keys; key0 += KEYS) {
        const bf16 *k_s = shared + key0 / KEYS % 2 * (2 * KEYS * LD), *v_s = k_s + KEYS * LD;
        cp_async_wait<0>();
        __syncthreads();                                       // this tile is there, and all are done with the other
        if (key0 + KEYS < keys) {
            bf16 *next = shared + (key0 / KEYS + 1) % 2 * (2 * KEYS * LD);
            copy_tile<KEYS, HS, THREADS>(next, k, s.ld, key0 + KEYS, s.T);
            copy_tile<KEYS, HS, THREADS>(next + KEYS * LD, v, s.ld, key0 + KEYS, s.T);
            cp_async_commit();
        }
#pragma unroll 1
        for (int c = 0; c < KEYS; c += CHUNK) {
            if (key0 + c > row0 + 15) break;                   // no query of the warp sees the rest
            float p[CHUNK / 8][4] = {}, ds[CHUNK / 8][4] = {}; // scores, then p; do v^T, then ds
#pragma unroll
            for (int i = 0; i < HS / 16; i++)
#pragma unroll
                for (int j = 0; j < CHUNK / 16; j++) {
                    uint32_t col[4];
                    frag_b(col, k_s, LD, c + 16 * j, 16 * i);
                    mma_pair(p[2 * j], p[2 * j + 1], q_frag[i], col);
                    frag_b(col, v_s, LD, c + 16 * j, 16 * i);
                    mma_pair(ds[2 * j], ds[2 * j + 1], do_frag[i], col);
                }
            if (key0 + c + CHUNK - 1 > row0)                   // some query does not see some key: its p is 2^-inf = 0
#pragma unroll
                for (int j = 0; j < CHUNK / 8; j++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        if (key0 + c + 8 * j + 2 * t + i % 2 > row0 + g + i / 2 * 8) p[j][i] = -INFINITY;
#pragma unroll
            for (int j = 0; j < CHUNK / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    p[j][i] = exp2_fast(fmaf(p[j][i], scale_log2, stat[i / 2].x));
                    ds[j][i] = p[j][i] * (ds[j][i] - stat[i / 2].y);
                }
#pragma unroll
            for (int j = 0; j < CHUNK / 16; j++) {
                uint32_t row[4], col[4];
                frag_from_sums(row, ds[2 * j], ds[2 * j + 1]);
#pragma unroll
                for (int i = 0; i < HS / 16; i++) {
                    frag_b_t(col, k_s, LD, c + 16 * j, 16 * i);
                    mma_pair(dq[2 * i], dq[2 * i + 1], row, col);
                }
            }
        }
    }
    __syncthreads();                                           // all are done with the tiles
    store_sums<HS>(dqkv + (b * s.T + row0) * s.ld + (size_t)h * HS, s.ld, s.T - row0, shared + 16 * warp * LD, dq,
                   s.scale);
}

// A step of a block of the dk, dv kernel: ROWS queries of head h, their do and stats, into a stage.
template <int HS, int THREADS>
static __device__ __forceinline__ void copy_queries(bf16 *stage, float2 *stat_s, const bf16 *dout, const bf16 *qkv,
                                                    const float2 *stats, size_t b, int h, int t0,
                                                    const AttentionShape *s) {
    copy_tile<ROWS, HS, THREADS>(stage, qkv + b * s->T * s->ld + (size_t)h * HS, s->ld, t0, s->T);
    copy_tile<ROWS, HS, THREADS>(stage + ROWS * TILE_LD(HS), dout + b * s->T * s->ldo + (size_t)h * HS, s->ldo, t0,
                                 s->T);
    if (threadIdx.x < ROWS / 2)
        cp_async16(stat_s + 2 * threadIdx.x, stats + (b * s->NH + h) * s->Tp + t0 + 2 * threadIdx.x);
    cp_async_commit();
}

// Grid: (b, kh) fastest, the first tile of keys first.
// Queries behind T come as zeros with stats 0: p = 1 and ds = 0, both times rows of zeros.
template <int HS, int WARPS, int MIN_BLOCKS>
static __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
attention_dkv_kernel(bf16 *dqkv, const bf16 *dout, const bf16 *qkv, const float2 *stats, unsigned heads,
                     AttentionShape s, float scale_log2) {
    const int TILE = 16 * WARPS, THREADS = 32 * WARPS, LD = TILE_LD(HS), STAGE = 2 * ROWS * LD;
    const bool KEEP_K = HS <= 64, KEEP_V = HS <= 48;           // in registers
    static_assert(TILE % ROWS == 0 && ROWS == STATS_PAD, "tiles of keys begin with a tile of queries");
    DYN_SHARED(bf16, shared);                                  // k, v (TILE, LD); two stages of q, do (ROWS, LD)
    bf16 *k_s = shared, *v_s = k_s + TILE * LD, *stages = v_s + TILE * LD;
    float2 *stat_s = (float2 *)(stages + 2 * STAGE);           // two stages of (ROWS)
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    size_t b = blockIdx.x % heads / s.NKV;
    int kh = (int)(blockIdx.x % heads) % s.NKV, first = (int)(blockIdx.x / heads) * TILE;
    int key0 = first + 16 * warp;                              // the warp's first key
    size_t at_k = b * s.T * s.ld + (size_t)(s.NH + kh) * HS, at_v = at_k + (size_t)s.NKV * HS;

    copy_tile<TILE, HS, THREADS>(k_s, qkv + at_k, s.ld, first, s.T);
    copy_tile<TILE, HS, THREADS>(v_s, qkv + at_v, s.ld, first, s.T);
    cp_async_commit();
    copy_queries<HS, THREADS>(stages, stat_s, dout, qkv, stats, b, kh * s.G, first, &s);
    uint32_t k_kept[KEEP_K ? HS / 16 : 1][4], v_kept[KEEP_V ? HS / 16 : 1][4];
    if (KEEP_K) {
        cp_async_wait<1>();
        __syncthreads();                                       // k and v are there
#pragma unroll
        for (int i = 0; i < HS / 16; i++) {
            frag_a(k_kept[i], k_s, LD, 16 * warp, 16 * i);
            if (KEEP_V) frag_a(v_kept[i], v_s, LD, 16 * warp, 16 * i);
        }
    }
    float dk[HS / 8][4] = {}, dv[HS / 8][4] = {};
    // The tiles of queries from `first` on, head after head.
    for (int h = kh * s.G, t0 = first, step = 0, next_t0; h < (kh + 1) * s.G; t0 = next_t0, step ^= 1) {
        const bf16 *q_s = stages + step * STAGE, *do_s = q_s + ROWS * LD;
        const float *stat = (const float *)(stat_s + step * ROWS);
        cp_async_wait<0>();
        __syncthreads();                                       // this stage is there, and all are done with the other
        next_t0 = t0 + ROWS;
        if (next_t0 >= s.T) {
            next_t0 = first;
            h++;
        }
        if (h < (kh + 1) * s.G)
            copy_queries<HS, THREADS>(stages + (step ^ 1) * STAGE, stat_s + (step ^ 1) * ROWS, dout, qkv, stats, b, h,
                                      next_t0, &s);
        if (t0 + ROWS - 1 < key0) continue;                    // none of these queries sees a key of the warp

        float p[ROWS / 8][4] = {}, ds[ROWS / 8][4] = {};       // transposed scores, then p; v do^T, then ds
#pragma unroll
        for (int i = 0; i < HS / 16; i++) {
            uint32_t k_frag[4], v_frag[4], col[4];
            if (!KEEP_K) frag_a(k_frag, k_s, LD, 16 * warp, 16 * i);
            if (!KEEP_V) frag_a(v_frag, v_s, LD, 16 * warp, 16 * i);
#pragma unroll
            for (int j = 0; j < ROWS / 16; j++) {
                frag_b(col, q_s, LD, 16 * j, 16 * i);
                mma_pair(p[2 * j], p[2 * j + 1], KEEP_K ? k_kept[i] : k_frag, col);
                frag_b(col, do_s, LD, 16 * j, 16 * i);
                mma_pair(ds[2 * j], ds[2 * j + 1], KEEP_V ? v_kept[i] : v_frag, col);
            }
        }
        if (key0 + 15 > t0)                                    // as in the dq kernel
#pragma unroll
            for (int j = 0; j < ROWS / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (key0 + g + i / 2 * 8 > t0 + 8 * j + 2 * t + i % 2) p[j][i] = -INFINITY;
#pragma unroll
        for (int j = 0; j < ROWS / 8; j++) {
            Vec<float, 4> two = vec_load<float, 4>(stat + 2 * (8 * j + 2 * t));     // -lse, D of two queries
#pragma unroll
            for (int i = 0; i < 4; i++) {
                p[j][i] = exp2_fast(fmaf(p[j][i], scale_log2, two.v[i % 2 * 2]));
                ds[j][i] = p[j][i] * (ds[j][i] - two.v[i % 2 * 2 + 1]);
            }
        }
#pragma unroll
        for (int j = 0; j < ROWS / 16; j++) {
            uint32_t p_frag[4], ds_frag[4], col[4];
            frag_from_sums(p_frag, p[2 * j], p[2 * j + 1]);
            frag_from_sums(ds_frag, ds[2 * j], ds[2 * j + 1]);
#pragma unroll
            for (int i = 0; i < HS / 16; i++) {
                frag_b_t(col, do_s, LD, 16 * j, 16 * i);
                mma_pair(dv[2 * i], dv[2 * i + 1], p_frag, col);
                frag_b_t(col, q_s, LD, 16 * j, 16 * i);
                mma_pair(dk[2 * i], dk[2 * i + 1], ds_frag, col);
            }
        }
    }
    // A warp's rows of k and v are its own.
    store_sums<HS>(dqkv + at_k + key0 * s.ld, s.ld, s.T - key0, k_s + 16 * warp * LD, dk, s.scale);
    store_sums<HS>(dqkv + at_v + key0 * s.ld, s.ld, s.T - key0, v_s + 16 * warp * LD, dv, 1.0f);
}

// Warps and blocks of an SM such that nothing spills: 65536 registers are 16 warps of 128, 12 of 168 or 8 of 255. A
// lane has HS registers of operands and HS / 2 of sums in the dq kernel, HS of sums in the other (and HS / 2 of k and v
// where they are kept), and scores and ds.
template <int HS>
static void mma_backward(bf16 *dqkv, const bf16 *dout, const bf16 *qkv, const float2 *stats, int B,
                         const AttentionShape *s) {
    const int dq_warps = HS <= 64 ? 8 : HS <= 96 ? 6 : HS == 112 ? 4 : 8, dq_min = HS == 128 ? 1 : 2;
    const int dkv_warps = HS <= 96 ? 6 : 4, dkv_min = 2;
    unsigned q_heads = (unsigned)(B * s->NH), k_heads = (unsigned)(B * s->NKV),
             q_tiles = (unsigned)(s->T + 16 * dq_warps - 1) / (16 * dq_warps),
             k_tiles = (unsigned)(s->T + 16 * dkv_warps - 1) / (16 * dkv_warps);
    size_t dq_bytes = 4 * tile_bytes(KEYS, HS),
           dkv_bytes = 2 * tile_bytes(16 * dkv_warps, HS) + 4 * tile_bytes(ROWS, HS) + 2 * ROWS * sizeof(float2);
    auto dq = attention_dq_kernel<HS, dq_warps, dq_min>;
    auto dkv = attention_dkv_kernel<HS, dkv_warps, dkv_min>;
    float scale_log2 = attention_scale_log2(HS);
    if (!allow_shared(dq, dq_bytes) || !allow_shared(dkv, dkv_bytes)) return;
    LAUNCH(dq, q_heads * q_tiles, 32 * dq_warps, dq_bytes, cuda_stream)
        (dqkv, dout, qkv, stats, q_heads, *s, scale_log2);
    CUDA_CHECK(cudaGetLastError());
    LAUNCH(dkv, k_heads * k_tiles, 32 * dkv_warps, dkv_bytes, cuda_stream)
        (dqkv, dout, qkv, stats, k_heads, *s, scale_log2);
    CUDA_CHECK(cudaGetLastError());
}
#endif

// ---------------------------------------------------------------------------------------------

template <int V>
static void launch_stats(float2 *stats, const floatX *dout, const floatX *o, const float *lse, int B,
                         const AttentionShape *s, float factor) {
    size_t rows = (size_t)B * s->Tp * s->NH, per_block = STATS_BLOCK * V / 16;
    LAUNCH(attention_stats_kernel<V>, (unsigned)((rows + per_block - 1) / per_block), STATS_BLOCK, 0, cuda_stream)
        (stats, dout, o, lse, rows, *s, factor);
    CUDA_CHECK(cudaGetLastError());
}

void cuda_attention_backward(floatX *dqkv, const floatX *dout, const floatX *qkv, const floatX *o, const float *lse,
                             int B, int T, int NH, int NKV, int HS) {
    if (B == 0 || T == 0) return;
    AttentionShape s = {T, (T + STATS_PAD - 1) / STATS_PAD * STATS_PAD, NH, NKV, HS, NH / NKV,
                        (size_t)(NH + 2 * NKV) * HS, (size_t)NH * HS, 1.0f / sqrtf((float)HS)};
    float2 *stats = (float2 *)cuda_workspace((size_t)B * NH * s.Tp * sizeof *stats);
    if (!stats) return;
    bool vec = rows_take_vec(HS, dout, o);
#ifndef PRECISION_FP32
    void (*mma)(bf16 *, const bf16 *, const bf16 *, const float2 *, int, const AttentionShape *) = nullptr;
    switch (vec && rows_take_vec(HS, dqkv, qkv) ? HS : 0) {
        case 16: mma = mma_backward<16>; break;
        case 32: mma = mma_backward<32>; break;
        case 48: mma = mma_backward<48>; break;
        case 64: mma = mma_backward<64>; break;
        case 80: mma = mma_backward<80>; break;
        case 96: mma = mma_backward<96>; break;
        case 112: mma = mma_backward<112>; break;
        case 128: mma = mma_backward<128>; break;
    }
    if (mma) {                      // its exponential is 2^x
        launch_stats<VEC_X>(stats, dout, o, lse, B, &s, LOG2E);
        mma(dqkv, dout, qkv, stats, B, &s);
        return;
    }
#endif
    if (vec) launch_stats<VEC_X>(stats, dout, o, lse, B, &s, 1.0f);
    else launch_stats<1>(stats, dout, o, lse, B, &s, 1.0f);
    if (HS <= 256) plain_backward<16>(dqkv, dout, qkv, stats, B, &s);
    else if (HS <= 512) plain_backward<8>(dqkv, dout, qkv, stats, B, &s);
    else plain_backward<4>(dqkv, dout, qkv, stats, B, &s);      // up to 1024, the largest that a model may have
}
