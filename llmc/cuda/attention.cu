// attention_forward and attention_cached (ops.h): causal grouped-query attention with the online softmax of
// FlashAttention (Dao et al. 2022, 2023). Scores stay in registers or shared memory; the rows of a key head are read
// where they lie, by every query head of its group. Three kernels, chosen by shapes and alignment alone:
//
// 1. attention_forward_mma, for training and prompts (bf16, HS a multiple of 16 up to 128, rows on 16 bytes), on tensor
//    cores. A block of four warps computes 64 MT query rows of one head against all keys they see, a warp 16 MT
//    of them: scores, softmax and output never leave its registers. Keys and values come in tiles of 64 through two
//    stages of shared memory, copied asynchronously while the tile before is computed; one barrier a tile.
//    Work of a warp on a tile at HS = 128, MT = 2 (32 rows): 256 mma of 4096 operations, 80 ldmatrix of 512 bytes (each
//    fragment of K and V serves two), 2048 scores of about 15 instructions. So on an H100 two tiles of four warps keep
//    a multiprocessor's tensor cores busy for 3300 cycles (mma.sync reaches 62 % of their rate), its shared memory for
//    3070 (320 KiB read, 64 KiB arriving, 128 bytes a cycle), its four schedulers for about 2600. The three overlap
//    among the eight warps of two blocks. With MT = 1 each fragment serves one mma, shared memory takes 4600 for the
//    same work and binds.
//    The longest blocks (the last queries) come first, so that the short ones fill the end.
//
// 2. attention_decode, for a few tokens after a cache (bf16, the same conditions): split along the keys. See there.
//
// 3. attention_forward_plain, f32 without tensor cores: the fp32 build, and whatever the others do not take.
//
// attention_cached is the same with a cache's strides and the number of keys from device memory. In an INT8 cache
// kernel 2 makes bf16 of codes as it loads them; for the others the part of the cache that is in use is written out as
// X first.
//
// In each, key tiles start at multiples of a fixed size, a key that a row may not see has weight exactly 0, and a tile
// that it sees nothing of multiplies its sums by exactly 1: so the bits of a row depend neither on T (as long as the
// same kernel runs) nor on B. Kernels differ from each other by rounding: their sums have other orders.
//
// Arithmetic: scores q.k in f32; a weight is 2^(score * scale log2 e - max) by exp2_fast, one rounding inside by fmaf;
// sums of weights are f32 of the unrounded weights; kernels 1 and 2 round a weight to bf16 before it is multiplied with
// v, as the CPU wing does.
#include "attention.cuh"

typedef struct {
    floatX *o;
    float *lse;
    const floatX *q, *k, *v;
    int T, Tk, NH, G;               // G query heads share a key head
    size_t ldo, ldq, ldkv, skv;
    float scale;                    // attention_scale_log2
    const int32_t *pos;             // NULL, or of the first query: *pos + T keys instead of Tk
    const float *kv_scale;          // NULL, or of an INT8 cache, whose codes k and v are
    int max_T;                      // of that cache
} Args;

static __device__ __forceinline__ int keys_there(const Args &a) { return a.pos ? *a.pos + a.T : a.Tk; }

// Log-sum-exp of a row whose largest score is `max` in powers of two, and whose weights against it sum to `sum`.
static __device__ __forceinline__ float row_lse(float max, float sum) { return max * LN2 + log_f32(sum); }

#ifndef PRECISION_FP32
// ---------------------------------------------------------------------------------------------
// 1. Training and prompts.

// exp2_fast an instruction shorter, the integer going straight into the exponent: the same bits from -126 on, exactly 0
// below -127, but of NaN it makes a number. So the largest score carries NaN (max_nan_f32); a row's end looks there.
// (Here max_nan_f32 only keeps the compiler from spilling where fmaxf would do.)
static __device__ __forceinline__ float exp2_number(float x) {
    x = max_nan_f32(x, -127.0f);
    float t = x + 12582912.0f, p = exp2_part(x - (t - 12582912.0f));
    return f32_from_bits(f32_bits(p) + (f32_bits(t) << 23));
}

#define WARPS 4
#define KT 64                       // keys of a tile

// Scores s of 16 rows with N * 8 keys, of which this thread holds the columns 2t, 2t + 1 of rows g and g + 8, to
// weights against the largest score so far. max: of the unscaled scores; sum: this thread's columns only. decay: what
// the sums before this tile are to be multiplied with.
template <int N>
static __device__ __forceinline__ void softmax_step(float (&s)[N][4], float (&max)[2], float (&sum)[2],
                                                    float (&decay)[2], float scale) {
#pragma unroll
    for (int z = 0; z < 2; z++) {
        float top = max[z];
#pragma unroll
        for (int n = 0; n < N; n++) top = max_nan_f32(top, max_nan_f32(s[n][2 * z], s[n][2 * z + 1]));
        top = max_nan_f32(top, __shfl_xor_sync(FULL_WARP, top, 1));
        top = max_nan_f32(top, __shfl_xor_sync(FULL_WARP, top, 2));
        float m = top * scale, part = 0.0f;
        decay[z] = exp2_number(max[z] * scale - m);
        max[z] = top;
#pragma unroll
        for (int n = 0; n < N; n++) {
            s[n][2 * z] = exp2_number(fmaf(s[n][2 * z], scale, -m));
            s[n][2 * z + 1] = exp2_number(fmaf(s[n][2 * z + 1], scale, -m));
            part += s[n][2 * z] + s[n][2 * z + 1];
        }
        sum[z] = fmaf(sum[z], decay[z], part);
    }
}

template <int HS, int MT>
static __global__ void __launch_bounds__(WARPS * 32, 2) attention_forward_mma(Args a) {
    const int LD = TILE_LD(HS), QT = WARPS * 16 * MT, stage = 2 * KT * LD;
    __shared__ int place[3];                                    // registers are short: for the end of the kernel
    DYN_SHARED(bf16, qs);                                       // (QT) queries; two stages of (KT) keys, (KT) values
    bf16 *kvs = qs + QT * LD;
    int b = blockIdx.x / a.NH, h = blockIdx.x % a.NH, warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4,
        t = threadIdx.x % 4;
    const int Tk = keys_there(a);
    int t0 = (int)(gridDim.y - 1 - blockIdx.y) * QT, pos0 = Tk - a.T + t0;
    const bf16 *k = a.k + b * a.skv + (size_t)(h / a.G) * HS, *v = a.v + b * a.skv + (size_t)(h / a.G) * HS;
    int keys = min(pos0 + QT, Tk), tiles = (keys + KT - 1) / KT;
    if (threadIdx.x == 0) place[0] = b, place[1] = h, place[2] = t0;

    copy_tile<QT, HS, WARPS * 32>(qs, a.q + (size_t)b * a.T * a.ldq + (size_t)h * HS, a.ldq, t0, a.T);
    copy_tile<KT, HS, WARPS * 32>(kvs, k, a.ldkv, 0, Tk);
    copy_tile<KT, HS, WARPS * 32>(kvs + KT * LD, v, a.ldkv, 0, Tk);
    cp_async_commit();

    int row0 = warp * 16 * MT, pos = pos0 + row0;               // of the warp's first row
    float o[MT][HS / 8][4] = {}, max[MT][2], sum[MT][2] = {}, decay[MT][2];
#pragma unroll
    for (int i = 0; i < MT; i++) max[i][0] = max[i][1] = -INFINITY;

    for (int j = 0; j < tiles; j++) {
        const bf16 *ks = kvs + j % 2 * stage, *vs = ks + KT * LD;
        cp_async_wait<0>();
        __syncthreads();                                        // tile j is there, and all are done with j - 1
        if (j + 1 < tiles) {
            bf16 *next = kvs + (j + 1) % 2 * stage;
            copy_tile<KT, HS, WARPS * 32>(next, k, a.ldkv, (j + 1) * KT, Tk);
            copy_tile<KT, HS, WARPS * 32>(next + KT * LD, v, a.ldkv, (j + 1) * KT, Tk);
            cp_async_commit();
        }
        if (j * KT > pos + 16 * MT - 1) continue;               // the warp's rows see nothing of it

        float s[MT][KT / 8][4];
#pragma unroll
        for (int c = 0; c < HS; c += 16) {
            uint32_t af[MT][4], bf[4];
#pragma unroll
            for (int i = 0; i < MT; i++) frag_a(af[i], qs, LD, row0 + i * 16, c);
#pragma unroll
            for (int n = 0; n < KT / 8; n += 2) {
                frag_b(bf, ks, LD, n * 8, c);
#pragma unroll
                for (int i = 0; i < MT; i++)
                    if (c == 0) mma_pair_first(s[i][n], s[i][n + 1], af[i], bf);
                    else mma_pair(s[i][n], s[i][n + 1], af[i], bf);
            }
        }
        if (j * KT + KT - 1 > pos) {                            // the diagonal
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int n = 0; n < KT / 8; n++)
#pragma unroll
                    for (int z = 0; z < 4; z++)
                        if (j * KT + n * 8 + 2 * t + z % 2 > pos + i * 16 + g + z / 2 * 8) s[i][n][z] = -INFINITY;
        }
        bool same = true;
#pragma unroll
        for (int i = 0; i < MT; i++) {
            softmax_step(s[i], max[i], sum[i], decay[i], a.scale);
            same = same && decay[i][0] == 1.0f && decay[i][1] == 1.0f;
        }
        if (!__all_sync(FULL_WARP, same)) {                     // seldom once the largest scores have been seen
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int n = 0; n < HS / 8; n++)
#pragma unroll
                    for (int z = 0; z < 4; z++) o[i][n][z] *= decay[i][z / 2];
        }
        uint32_t p[MT][KT / 16][4];
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int kk = 0; kk < KT / 16; kk++) frag_from_sums(p[i][kk], s[i][2 * kk], s[i][2 * kk + 1]);
#pragma unroll
        for (int kk = 0; kk < KT / 16; kk++) {
            uint32_t bf[4];
#pragma unroll
            for (int n = 0; n < HS / 8; n += 2) {
                frag_b_t(bf, vs, LD, kk * 16, n * 8);
#pragma unroll
                for (int i = 0; i < MT; i++) mma_pair(o[i][n], o[i][n + 1], p[i][kk], bf);
            }
        }
    }

    // The warp's own queries in shared memory make way for its output, so that it leaves 16 bytes at a time.
    b = place[0], h = place[1], t0 = place[2];                  // there since the first tile's barrier
    __syncwarp();                                               // all lanes have read the queries
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int z = 0; z < 2; z++) {
            int r = row0 + i * 16 + g + z * 8;
            float total = sum[i][z];
            total += __shfl_xor_sync(FULL_WARP, total, 1);
            total += __shfl_xor_sync(FULL_WARP, total, 2);
            float inverse = max[i][z] != max[i][z] ? max[i][z] : 1.0f / total;
#pragma unroll
            for (int n = 0; n < HS / 8; n++)
                *(uint32_t *)(qs + r * LD + n * 8 + 2 * t) =
                    pack_bf16(o[i][n][2 * z] * inverse, o[i][n][2 * z + 1] * inverse);
            if (a.lse && t == 0 && t0 + r < a.T)
                a.lse[(size_t)blockIdx.x * a.T + t0 + r] = row_lse(max[i][z] * a.scale, total);
        }
    __syncwarp();                                               // and all have written
    for (int i = threadIdx.x % 32; i < 16 * MT * (HS / 8); i += 32) {
        int r = row0 + i / (HS / 8), c = i % (HS / 8) * 8;
        if (t0 + r < a.T)
            vec_store(a.o + ((size_t)b * a.T + t0 + r) * a.ldo + (size_t)h * HS + c,
                      vec_load<bf16, 8>(qs + r * LD + c));
    }
}

template <int HS, int MT> static size_t mma_shared(void) { return tile_bytes(WARPS * 16 * MT + 4 * KT, HS); }

template <int HS, int MT> static void launch_mma_tile(const Args &a, int B) {
    if (!allow_shared(attention_forward_mma<HS, MT>, mma_shared<HS, MT>())) return;
    dim3 grid((unsigned)B * (unsigned)a.NH, (unsigned)((a.T + WARPS * 16 * MT - 1) / (WARPS * 16 * MT)));
    LAUNCH((attention_forward_mma<HS, MT>), grid, WARPS * 32, (mma_shared<HS, MT>()), cuda_stream)(a);
}
// Tiles of 128 queries where there are enough of them for two on each multiprocessor and a block may have that much
// shared memory (not on consumer cards with HS = 128), else of 64: the bits are the same.
template <int HS> static void launch_mma(const Args &a, int B) {
    int device = 0, count = 1, shared = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    bool many = (int64_t)B * a.NH * ((a.T + 127) / 128) >= 2 * count;
    if (many && mma_shared<HS, 2>() <= (size_t)shared) launch_mma_tile<HS, 2>(a, B);
    else launch_mma_tile<HS, 1>(a, B);
}

// ---------------------------------------------------------------------------------------------
// 2. A few tokens after a cache: T tokens times G query heads are R <= 16 rows on a key head.
//
// The keys are cut into pieces of 128 that start at multiples of 128. A block takes a piece of one key head for all R
// rows, so K and V are read once; its four warps take 32 keys each. Both products are mma of the R rows padded to 16,
// whose operands go straight from memory to registers, 16 bytes a load, without shared memory: what a product sums
// over, and the columns of its result, may be in any order as long as both sides agree, so each lane's share is what 16
// bytes bring.
//   scores: lane (g, t) loads pieces t, t + 4, .. (8 values each) of key g; of a piece, words 0 and 1 are b of one mma,
//           words 2 and 3 of the next. The rows of q are loaded likewise as a.
//   output: lane (g, t) loads piece g + 8 j of keys 2t, 2t + 1, 2t + 8, 2t + 9; its value e is column g of a mma of its
//           own, to whose b two keys' values are zipped.
// Each piece leaves its largest score, sum and unscaled output per row in the workspace (f32, R * HS * 4 bytes for each
// 512 HS bytes of K and V read); attention_fold adds them in ascending order.
// At HS = 128 a block has 32 KiB on their way at a time and three share a multiprocessor; 16 KiB suffice for 3 TB/s.
// How many pieces there are is only known on the device where the position is: blocks enough to fill it take every
// splits-th piece each. That the grid is the same for every position lets a recorded step be replayed.

#define PIECE 128
#define DECODE_ROWS 16

typedef Vec<uint32_t, 4> Piece16;   // 8 bf16

// Row r of the R rows on key head kh: position r / G, head r % G.
static __device__ __forceinline__ size_t query_at(const Args &a, int b, int kh, int r, int HS, size_t ld) {
    return ((size_t)b * a.T + r / a.G) * ld + (size_t)(kh * a.G + r % a.G) * HS;
}

// Eight values of a row of keys or values: bf16 as they are, or INT8 codes times the row's scale, rounded.
template <bool INT8>
static __device__ __forceinline__ Piece16 load_eight(const bf16 *base, size_t at, const float *scale, size_t row) {
    Piece16 p;
    if constexpr (INT8) {
        Vec<int8_t, 8> q = vec_load<int8_t, 8>((const int8_t *)base + at);
        const float s = scale[row];
#pragma unroll
        for (int i = 0; i < 4; i++) p.v[i] = pack_bf16((float)q.v[2 * i] * s, (float)q.v[2 * i + 1] * s);
    } else {
        p = vec_load<uint32_t, 4>((const uint32_t *)(base + at));
    }
    return p;
}

// Partial results: out (heads * pieces, R, HS), stat (heads * pieces, R, 2): largest score in powers of two, sum;
// pieces: those that there may be.
template <int HS, bool INT8>
static __global__ void __launch_bounds__(PIECE, HS > 64 ? 3 : 4)                   // as registers allow
attention_decode(Args a, int pieces, int splits, float *out, float *stat) {
    const int ROUNDS = (HS + 31) / 32, SLICES = (HS + 63) / 64;
    DYN_SHARED(float, part);                                    // (4, R, HS): each warp's output
    __shared__ float warp_max[4][DECODE_ROWS], warp_sum[4][DECODE_ROWS];
    const int Tk = keys_there(a);
    int R = a.T * a.G, NKV = a.NH / a.G, head = blockIdx.x / splits;
    int b = head / NKV, kh = head % NKV, warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const size_t first = b * a.skv + (size_t)kh * HS;
    const float *scale = INT8 ? a.kv_scale + (size_t)b * a.max_T * 2 * NKV + kh : nullptr;

    for (int piece = blockIdx.x % splits; piece * PIECE < Tk; piece += splits) {
        int key0 = piece * PIECE + warp * 32;
        Piece16 kp[4][ROUNDS] = {};
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < ROUNDS; i++) {
                int key = key0 + n * 8 + g;
                if (key < Tk && (HS % 32 == 0 || (t + 4 * i) * 8 < HS))
                    kp[n][i] = load_eight<INT8>(a.k, first + key * a.ldkv + (t + 4 * i) * 8, scale,
                                                (size_t)key * 2 * NKV);
            }
        Piece16 qp[2][ROUNDS] = {};
#pragma unroll
        for (int z = 0; z < 2; z++)
#pragma unroll
            for (int i = 0; i < ROUNDS; i++)
                if (g + 8 * z < R && (HS % 32 == 0 || (t + 4 * i) * 8 < HS))
                    qp[z][i] = vec_load<uint32_t, 4>(
                        (const uint32_t *)(a.q + query_at(a, b, kh, g + 8 * z, HS, a.ldq) + (t + 4 * i) * 8));
        float s[4][4] = {};
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < ROUNDS; i++)
#pragma unroll
                for (int w = 0; w < 4; w += 2) {
                    uint32_t af[4] = {qp[0][i].v[w], qp[1][i].v[w], qp[0][i].v[w + 1], qp[1][i].v[w + 1]};
                    uint32_t bf[2] = {kp[n][i].v[w], kp[n][i].v[w + 1]};
                    mma_bf16(s[n], af, bf);
                }

        // The values of the first 16 keys are on their way while the largest score is found.
        Piece16 vp[2][SLICES][4] = {};
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int j = 0; j < SLICES; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int key = key0 + half * 16 + i / 2 * 8 + 2 * t + i % 2, c = (g + 8 * j) * 8;
                    if (key < Tk && (HS % 64 == 0 || c < HS))
                        vp[half][j][i] = load_eight<INT8>(a.v, first + key * a.ldkv + c, scale,
                                                          (size_t)(2 * key + 1) * NKV);
                }

        float max[2], sum[2] = {};
#pragma unroll
        for (int z = 0; z < 2; z++) {
            int pos = Tk - a.T + (g + 8 * z) / a.G;
            max[z] = -INFINITY;
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int y = 0; y < 2; y++) {
                    if (key0 + n * 8 + 2 * t + y > pos) s[n][2 * z + y] = -INFINITY;
                    max[z] = fmaxf(max[z], s[n][2 * z + y]);
                }
            max[z] = fmaxf(max[z], __shfl_xor_sync(FULL_WARP, max[z], 1));
            max[z] = fmaxf(max[z], __shfl_xor_sync(FULL_WARP, max[z], 2));
            if (t == 0) warp_max[warp][g + 8 * z] = max[z];
        }
        __syncthreads();                                            // each warp's largest scores are there
#pragma unroll
        for (int z = 0; z < 2; z++) {
            for (int w = 0; w < 4; w++) max[z] = fmaxf(max[z], warp_max[w][g + 8 * z]);
            max[z] *= a.scale;                                      // in powers of two
            float m = max[z] == -INFINITY ? 0.0f : max[z];          // a piece that the row sees nothing of: weights 0
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int y = 0; y < 2; y++) {
                    s[n][2 * z + y] = exp2_fast(fmaf(s[n][2 * z + y], a.scale, -m));
                    sum[z] += s[n][2 * z + y];
                }
            sum[z] += __shfl_xor_sync(FULL_WARP, sum[z], 1);
            sum[z] += __shfl_xor_sync(FULL_WARP, sum[z], 2);
            if (t == 0) warp_sum[warp][g + 8 * z] = sum[z];
        }

        float o[SLICES][8][4] = {};                             // [j][e]: columns 2t, 2t + 1 of rows g, g + 8 are the
#pragma unroll                                                  // values e of the pieces 2t + 8 j, 2t + 1 + 8 j
        for (int half = 0; half < 2; half++) {
            uint32_t af[4];
            frag_from_sums(af, s[2 * half], s[2 * half + 1]);
#pragma unroll
            for (int j = 0; j < SLICES; j++)
#pragma unroll
                for (int e = 0; e < 8; e++) {
                    const Piece16 *p = vp[half][j];
                    unsigned zip = e % 2 ? 0x7632 : 0x5410;         // upper or lower halves of two words
                    uint32_t bf[2] = {__byte_perm(p[0].v[e / 2], p[1].v[e / 2], zip),
                                      __byte_perm(p[2].v[e / 2], p[3].v[e / 2], zip)};
                    mma_bf16(o[j][e], af, bf);
                }
        }
#pragma unroll
        for (int j = 0; j < SLICES; j++)
#pragma unroll
            for (int z = 0; z < 4; z++) {
                int r = g + z / 2 * 8, c = (2 * t + z % 2 + 8 * j) * 8;
                if (r < R && (HS % 64 == 0 || c < HS))
#pragma unroll
                    for (int e = 0; e < 8; e += 4)
                        vec_store(part + (warp * R + r) * HS + c + e,
                                  Vec<float, 4>{{o[j][e][z], o[j][e + 1][z], o[j][e + 2][z], o[j][e + 3][z]}});
            }
        __syncthreads();                                            // each warp's sums and output are there
        for (int i = threadIdx.x; i < R * HS; i += PIECE)
            out[((size_t)head * pieces + piece) * R * HS + i] =
                part[i] + part[R * HS + i] + part[2 * R * HS + i] + part[3 * R * HS + i];
        if (warp == 0 && t == 0)
#pragma unroll
            for (int z = 0; z < 2; z++) {
                int r = g + 8 * z;
                if (r >= R) continue;
                float *p = stat + (((size_t)head * pieces + piece) * R + r) * 2;
                p[0] = max[z];
                p[1] = warp_sum[0][r] + warp_sum[1][r] + warp_sum[2][r] + warp_sum[3][r];
            }
        __syncthreads();                                            // and have been read
    }
}

// A block a row, a thread a value: the pieces' partial results, each brought to the row's largest score. A piece that
// the row sees nothing of has largest score -infinity and adds 0.
static __global__ void attention_fold(Args a, int HS, int pieces, const float *out, const float *stat) {
    int R = a.T * a.G, NKV = a.NH / a.G, head = blockIdx.x / R, r = blockIdx.x % R, d = threadIdx.x;
    const int there = (keys_there(a) + PIECE - 1) / PIECE;
    out += (size_t)head * pieces * R * HS + (size_t)r * HS + min(d, HS - 1);
    stat += ((size_t)head * pieces * R + r) * 2;
    float max = -INFINITY, sum = 0.0f, o = 0.0f;
    for (int i = d % 32; i < there; i += 32) max = fmaxf(max, stat[(size_t)i * R * 2]);
    for (int bits = 16; bits; bits >>= 1) max = fmaxf(max, __shfl_xor_sync(FULL_WARP, max, bits));
#pragma unroll 8
    for (int i = 0; i < there; i++) {
        float w = exp2_fast(stat[(size_t)i * R * 2] - max);
        sum = fmaf(stat[(size_t)i * R * 2 + 1], w, sum);
        o = fmaf(out[(size_t)i * R * HS], w, o);
    }
    int b = head / NKV, kh = head % NKV;
    if (d < HS) a.o[query_at(a, b, kh, r, HS, a.ldo) + d] = f2x(o / sum);
    if (a.lse && d == 0) a.lse[((size_t)b * a.NH + kh * a.G + r % a.G) * a.T + r / a.G] = row_lse(max, sum);
}

template <int HS> static void launch_decode(const Args &a, int B) {
    int pieces = ((a.pos ? a.max_T : a.Tk) + PIECE - 1) / PIECE, R = a.T * a.G, splits = pieces;
    size_t heads = (size_t)B * (a.NH / a.G), results = heads * pieces * R;
    if (a.pos) {                                                // four blocks a multiprocessor
        int device = 0, count = 1;
        CUDA_CHECK(cudaGetDevice(&device));
        CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
        size_t enough = (4 * (size_t)count + heads - 1) / heads;
        if (enough < (size_t)splits) splits = (int)enough;
    }
    float *out = (float *)cuda_workspace(results * (HS + 2) * sizeof(float));
    if (!out) return;
    auto kernel = a.kv_scale ? attention_decode<HS, true> : attention_decode<HS, false>;
    LAUNCH(kernel, (unsigned)(heads * splits), PIECE, (size_t)4 * R * HS * sizeof(float), cuda_stream)
        (a, pieces, splits, out, out + results * HS);
    LAUNCH(attention_fold, (unsigned)(heads * R), (HS + 31) / 32 * 32, 0, cuda_stream)
        (a, HS, pieces, out, out + results * HS);
}

template <int HS> static void launch_tensor(const Args &a, int B) {
    if (a.T * a.G <= DECODE_ROWS) launch_decode<HS>(a, B);
    else launch_mma<HS>(a, B);
}

static bool takes_tensor(const Args &a, int HS) {
    return HS % 16 == 0 && HS <= 128 && rows_take_vec(0, a.q, a.k, a.v, a.o) &&
           (a.ldo | a.ldq | a.ldkv | a.skv) % 8 == 0;
}
#endif

// ---------------------------------------------------------------------------------------------
// 3. Any head size, any alignment, f32.
//
// The query heads of a key head are more rows, as in the CPU wing (row r is position r / G, head r % G), so that a
// block reads each key once for all of them. A block of 256 threads takes ROWS of these rows, 256 / ROWS threads a row;
// a thread computes KEYS / (256 / ROWS) scores of its row and ACC values of its output, the values apart by the number
// of threads. Rows of keys have an odd stride in shared memory: threads at different keys meet different banks.

#define PLAIN_THREADS 256

template <int ROWS, int KEYS, int ACC>
static __global__ void __launch_bounds__(PLAIN_THREADS, ACC > 32 ? 1 : 3)   // left alone, sm_80 spills to fit four
attention_forward_plain(Args a, int HS, unsigned heads) {
    const int SIDE = PLAIN_THREADS / ROWS, EACH = KEYS / SIDE;
    DYN_SHARED(float, qs);                                      // (ROWS, HS); then (KEYS, HS | 1), (ROWS, KEYS + 1)
    float *kvs = qs + ROWS * HS, *ps = kvs + KEYS * (HS | 1);
    int NKV = a.NH / a.G, b = (int)(blockIdx.x % heads) / NKV, kh = (int)(blockIdx.x % heads) % NKV, ld = HS | 1;
    const int Tk = keys_there(a);
    int first = (int)(gridDim.x / heads - 1 - blockIdx.x / heads) * ROWS, rows = min(ROWS, a.T * a.G - first);
    const floatX *q = a.q + (size_t)b * a.T * a.ldq + (size_t)kh * a.G * HS;
    const floatX *k = a.k + b * a.skv + (size_t)kh * HS, *v = a.v + b * a.skv + (size_t)kh * HS;

    for (int i = threadIdx.x; i < ROWS * HS; i += PLAIN_THREADS) {
        int r = i / HS, c = i % HS;
        qs[i] = r < rows ? x2f(q[(size_t)((first + r) / a.G) * a.ldq + (first + r) % a.G * HS + c]) : 0.0f;
    }
    int r = threadIdx.x / SIDE, c = threadIdx.x % SIDE;
    int pos = Tk - a.T + (first + r) / a.G, last = Tk - a.T + (first + rows - 1) / a.G;
    float o[ACC] = {}, max = -INFINITY, sum = 0.0f;
    for (int j0 = 0; j0 <= last; j0 += KEYS) {
        __syncthreads();                                        // all have read the values before
        for (int i = threadIdx.x; i < KEYS * HS; i += PLAIN_THREADS) {
            int j = i / HS;
            kvs[j * ld + i % HS] = j0 + j < Tk ? x2f(k[(j0 + j) * a.ldkv + i % HS]) : 0.0f;
        }
        __syncthreads();                                        // keys, and at first queries, are there
        float s[EACH] = {}, top = max;
        for (int i = 0; i < HS; i++) {
            float x = qs[r * HS + i];
#pragma unroll
            for (int e = 0; e < EACH; e++) s[e] = fmaf(x, kvs[(c + e * SIDE) * ld + i], s[e]);
        }
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            if (j0 + c + e * SIDE > pos) s[e] = -INFINITY;
            top = fmaxf(top, s[e]);
        }
        for (int bits = SIDE / 2; bits; bits >>= 1) top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, bits));
        float m = top * a.scale, decay = exp2_fast(max * a.scale - m), part = 0.0f;
        max = top;
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            float p = exp2_fast(fmaf(s[e], a.scale, -m));
            part += p;
            ps[r * (KEYS + 1) + c + e * SIDE] = p;
        }
        sum = fmaf(sum, decay, part);
        __syncthreads();                                        // weights are there; all have read the keys
        for (int i = threadIdx.x; i < KEYS * HS; i += PLAIN_THREADS) {
            int j = i / HS;
            kvs[j * ld + i % HS] = j0 + j < Tk ? x2f(v[(j0 + j) * a.ldkv + i % HS]) : 0.0f;
        }
        __syncthreads();                                        // values are there
#pragma unroll
        for (int i = 0; i < ACC; i++) o[i] *= decay;
        for (int j = 0; j < KEYS; j++) {
            float p = ps[r * (KEYS + 1) + j];
#pragma unroll
            for (int i = 0; i < ACC; i++)
                if (c + i * SIDE < HS) o[i] = fmaf(p, kvs[j * ld + c + i * SIDE], o[i]);
        }
    }
    for (int bits = SIDE / 2; bits; bits >>= 1) sum += __shfl_xor_sync(FULL_WARP, sum, bits);
    if (r >= rows) return;
    int t = (first + r) / a.G, h = kh * a.G + (first + r) % a.G;
    if (a.lse && c == 0) a.lse[((size_t)b * a.NH + h) * a.T + t] = row_lse(max * a.scale, sum);
#pragma unroll
    for (int i = 0; i < ACC; i++)
        if (c + i * SIDE < HS)
            a.o[((size_t)b * a.T + t) * a.ldo + (size_t)h * HS + c + i * SIDE] = f2x(o[i] / sum);
}

template <int ROWS, int KEYS, int ACC> static void launch_plain(const Args &a, int B, int HS) {
    size_t smem = ((size_t)ROWS * HS + (size_t)KEYS * (HS | 1) + (size_t)ROWS * (KEYS + 1)) * sizeof(float);
    if (!allow_shared(attention_forward_plain<ROWS, KEYS, ACC>, smem)) return;
    unsigned heads = (unsigned)B * (unsigned)(a.NH / a.G), tiles = (unsigned)((a.T * a.G + ROWS - 1) / ROWS);
    LAUNCH((attention_forward_plain<ROWS, KEYS, ACC>), heads * tiles, PLAIN_THREADS, smem, cuda_stream)(a, HS, heads);
}

static void attention(const Args &a, int B, int HS) {
    bool done = false;
#ifndef PRECISION_FP32
    if (takes_tensor(a, HS)) {
        done = true;
        switch (HS) {
        case 16: launch_tensor<16>(a, B); break;
        case 32: launch_tensor<32>(a, B); break;
        case 48: launch_tensor<48>(a, B); break;
        case 64: launch_tensor<64>(a, B); break;
        case 80: launch_tensor<80>(a, B); break;
        case 96: launch_tensor<96>(a, B); break;
        case 112: launch_tensor<112>(a, B); break;
        default: launch_tensor<128>(a, B);
        }
    }
#endif
    if (!done) {
        if (HS <= 64) launch_plain<32, 32, 8>(a, B, HS);
        else if (HS <= 128) launch_plain<32, 32, 16>(a, B, HS);
        else if (HS <= 256) launch_plain<32, 32, 32>(a, B, HS);
        else launch_plain<16, 16, 64>(a, B, HS);                // up to 1024, the largest that a model may have
    }
    CUDA_CHECK(cudaGetLastError());
}

void cuda_attention_forward(floatX *o, float *lse, const floatX *q, const floatX *k, const floatX *v, int B, int T,
                            int Tk, int NH, int NKV, int HS, int ldo, int ldq, int ldkv, size_t skv) {
    if (B == 0 || T == 0) return;
    Args a = {o, lse, q, k, v, T, Tk, NH, NH / NKV, (size_t)ldo, (size_t)ldq, (size_t)ldkv, skv,
              attention_scale_log2(HS), nullptr, nullptr, 0};
    attention(a, B, HS);
}

// ---------------------------------------------------------------------------------------------
// The positions in use of an INT8 cache, as X: a block a position, a thread a value at a time.
static __global__ void __launch_bounds__(256)
widen_cache_kernel(floatX *wide, KvCache cache, const int32_t *pos, int T) {
    const size_t width = (size_t)2 * cache.NKV * cache.HS, first = (size_t)blockIdx.y * cache.max_T;
    for (int t = (int)blockIdx.x; t < *pos + T; t += (int)gridDim.x) {
        const size_t row = first + t;
        for (int i = (int)threadIdx.x; i < (int)width; i += 256)
            wide[row * width + i] = f2x((float)((const int8_t *)cache.values)[row * width + i] *
                                        cache.scale[row * 2 * cache.NKV + i / cache.HS]);
    }
}

void cuda_attention_cached(floatX *o, const floatX *qkv, const KvCache *cache, const int32_t *pos, int B, int T,
                           int NH) {
    if (B == 0 || T == 0) return;
    const int HS = cache->HS, NKV = cache->NKV;
    const size_t ldkv = (size_t)2 * NKV * HS, ldq = (size_t)(NH + 2 * NKV) * HS;
    const floatX *k = (const floatX *)cache->values;
    const bool codes = cache->format == KV_INT8;
    Args a = {o, nullptr, qkv, k, k + (size_t)NKV * HS, T, 0, NH, NH / NKV, (size_t)NH * HS, ldq, ldkv,
              (size_t)cache->max_T * ldkv, attention_scale_log2(HS), pos, nullptr, cache->max_T};
#ifndef PRECISION_FP32
    if (codes && T * a.G <= DECODE_ROWS && takes_tensor(a, HS)) {
        a.v = (const floatX *)((const int8_t *)cache->values + (size_t)NKV * HS);
        a.kv_scale = cache->scale;
        attention(a, B, HS);
        return;
    }
#endif
    if (codes) {
        floatX *wide = (floatX *)cuda_workspace((size_t)B * a.skv * sizeof *wide, OUTER);
        if (!wide) return;
        LAUNCH(widen_cache_kernel, dim3(grid_for((size_t)cache->max_T), (unsigned)B), 256, 0, cuda_stream)
            (wide, *cache, pos, T);
        CUDA_CHECK(cudaGetLastError());
        a.k = wide;
        a.v = wide + (size_t)NKV * HS;
    }
    attention(a, B, HS);
}
