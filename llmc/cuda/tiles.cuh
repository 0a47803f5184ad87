// Tiles on tensor cores: what the matmuls of bf16 (matmul.cu) and of int8 (linear_int8.cu) share. A block of eight
// warps makes 128 x 128 of c = a . b, a warp 64 x 32 of that in 64 registers a thread; slices of 64 bytes of k (32
// bf16, 64 int8) pass through a ring of four buffers of 16 KiB, three of which are on their way while one is used. Two
// blocks share a multiprocessor: 128 registers a thread, 128 KiB. A slice of 16 KiB serves 2^20 operations of bf16, 64
// a byte, or twice that of int8: 6 TB/s from the second-level cache make 380 TFLOP/s, about what warp-wide mma (of
// sm_80) reaches on Hopper, half of what its own instructions do. Blocks run in bands of eight squares so that
// operands stay in that cache. This is for machines without the library and for shapes that it does not take.
//
// In shared memory a slice lies as in device memory, in chunks of 16 bytes (8 bf16, 16 int8), which ldmatrix reads 8 at
// a time, one from each of 8 rows. They are stored under another number, so that each 8 lie in 8 different groups of 4
// banks, as do the 8 that cp.async writes at a time:
//   stored (rows, K): row r, chunk j of 4:   at r * 4 + (j ^ (r / 2 % 4)); two rows fill the 32 banks
//   stored (K, rows): row k, chunk j of 16:  at k * 16 + (j ^ (k % 8));    a row fills them twice (bf16 alone: there is
//                                            no ldmatrix that transposes bytes)
// Example: stored (rows, K), chunk 0 of rows 0..7 lies at 0, 4, 9, 13, 18, 22, 27, 31: modulo 8 that is 0, 4, 1, 5, 2,
// 6, 3, 7. An instruction multiplies 32 bytes of k of both: 16 bf16 or 32 int8, and the fragments of both are the same
// registers of the same bytes.
#ifndef QLLM_TILES_CUH
#define QLLM_TILES_CUH
#include "ptx.cuh"

#define SQUARE 128
#define STAGES 4
#define TILE_THREADS 256
#define SLICE_BYTES 64
#define OPERAND_BYTES (SQUARE * SLICE_BYTES)
#define TILES_SHARED ((size_t)STAGES * 2 * OPERAND_BYTES)

// What differs between the types of operands: the sums, the instruction.
template <class T> struct TileSum { typedef float type; };
template <> struct TileSum<int8_t> { typedef int type; };
static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_bf16(d, a, b);
}
static __device__ __forceinline__ void mma(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_s8(d, a, b);
}

template <bool ALONG_K, class T> static __device__ __forceinline__ int chunk_at(int row, int j) {
    const int chunk = 16 / (int)sizeof(T);
    return chunk * (ALONG_K ? row * (SLICE_BYTES / 16) + (j ^ (row >> 1 & 3))
                            : row * (SQUARE / chunk) + (j ^ (row & 7)));
}

// One operand's slice: two chunks a thread. Rows of p lie ld values apart. VEC: they are aligned to 16 bytes, so that a
// chunk is one copy and exists as a whole or not at all; else values come one by one.
template <bool ALONG_K, bool VEC, class T>
static __device__ __forceinline__ void load_tile(T *s, const T *p, size_t row0, size_t rows, size_t k0, size_t K,
                                                 size_t ld) {
    const int chunk = 16 / (int)sizeof(T), slice = SLICE_BYTES / (int)sizeof(T);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int chunks = (ALONG_K ? slice : SQUARE) / chunk;
        int t = threadIdx.x + half * TILE_THREADS, r = t / chunks, j = t % chunks;
        size_t line = (ALONG_K ? row0 : k0) + r, at = (ALONG_K ? k0 : row0) + j * chunk;
        size_t lines = ALONG_K ? rows : K, length = ALONG_K ? K : rows;
        T *to = s + chunk_at<ALONG_K, T>(r, j);
        bool there = line < lines && at < length;
        const T *from = there ? p + line * ld + at : p;
        if (VEC) {
            cp_async16(to, from, there);
        } else {
            Vec<T, chunk> v = {};
            if (there)
                for (int i = 0; i < chunk; i++) if (at + i < length) v.v[i] = from[i];
            vec_store(to, v);
        }
    }
}

// 16 rows of a from row m on and 32 bytes of k from 32 kk on, in the layout of mma.
template <bool ALONG_K, class T>
static __device__ __forceinline__ void fragment_a(uint32_t (&r)[4], const T *s, int m, int kk) {
    int lane = threadIdx.x % 32, i = lane / 8, l = lane % 8;   // this lane's address is for row l of matrix i
    if (ALONG_K) ldmatrix_x4(r, s + chunk_at<true, T>(m + i % 2 * 8 + l, kk * 2 + i / 2));
    else ldmatrix_x4_trans(r, s + chunk_at<false, T>(kk * 16 + i / 2 * 8 + l, m / 8 + i % 2));
}
// 16 columns of b from n on: two fragments of 8.
template <bool ALONG_K, class T>
static __device__ __forceinline__ void fragment_b(uint32_t (&lo)[2], uint32_t (&hi)[2], const T *s, int n, int kk) {
    int lane = threadIdx.x % 32, i = lane / 8, l = lane % 8;
    uint32_t r[4];
    if (ALONG_K) ldmatrix_x4(r, s + chunk_at<true, T>(n + i / 2 * 8 + l, kk * 2 + i % 2));
    else ldmatrix_x4_trans(r, s + chunk_at<false, T>(kk * 16 + i % 2 * 8 + l, n / 8 + i / 2));
    lo[0] = r[0], lo[1] = r[1], hi[0] = r[2], hi[1] = r[3];
}

// This block's square of c (M, N): its first row and column. tile_blocks of them.
static inline unsigned tile_blocks(int64_t M, int64_t N) {
    return (unsigned)(((M + SQUARE - 1) / SQUARE) * ((N + SQUARE - 1) / SQUARE));
}
static __device__ __forceinline__ void tile_place(size_t *m0, size_t *n0, size_t M, size_t N) {
    unsigned down = (unsigned)((M + SQUARE - 1) / SQUARE), across = (unsigned)((N + SQUARE - 1) / SQUARE);
    unsigned band = blockIdx.x / (8 * across), within = blockIdx.x % (8 * across);
    unsigned high = down - band * 8 < 8 ? down - band * 8 : 8; // squares in this column of the band
    *m0 = (size_t)(band * 8 + within % high) * SQUARE;
    *n0 = (size_t)(within / high) * SQUARE;
}

// slice(step, sa, sb) for each slice of k in turn, with its operands in shared memory. a is stored (M, K), or (K, M)
// with TA; b (K, N), or (N, K) with TB; rows in memory lie lda and ldb values apart. ring: TILES_SHARED bytes.
template <bool TA, bool TB, bool VEC, class T, class Slice>
static __device__ __forceinline__ void tile_slices(T *ring, const T *a, const T *b, size_t m0, size_t n0, size_t M,
                                                   size_t N, size_t K, size_t lda, size_t ldb, Slice slice_of) {
    static_assert(sizeof(T) == 2 || (!TA && TB), "bytes are multiplied as they lie: along k");
    const int slice = SLICE_BYTES / (int)sizeof(T), operand = OPERAND_BYTES / (int)sizeof(T);
    int steps = (int)((K + slice - 1) / slice);

    auto fetch = [&](int step) {
        if (step < steps) {
            T *s = ring + step % STAGES * 2 * operand;
            load_tile<!TA, VEC>(s, a, m0, M, (size_t)step * slice, K, lda);
            load_tile<TB, VEC>(s + operand, b, n0, N, (size_t)step * slice, K, ldb);
        }
        cp_async_commit();                                     // an empty group keeps the count
    };
    for (int s = 0; s < STAGES - 1; s++) fetch(s);

    for (int step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();            // this slice is there for all, and all are done with the one before it
        fetch(step + STAGES - 1);   // which the new one replaces
        const T *sa = ring + step % STAGES * 2 * operand;
        slice_of(step, sa, sa + operand);
    }
}

// The fragments of 32 bytes of k that a warp needs: of its 64 rows of a, and of its 32 columns of b.
template <bool TA, bool TB, class T>
static __device__ __forceinline__ void tile_fragments(uint32_t (&fa)[4][4], uint32_t (&fb)[4][2], const T *sa,
                                                      const T *sb, int kk) {
    int warp = threadIdx.x / 32, wm = warp / 4 * 64, wn = warp % 4 * 32;
#pragma unroll
    for (int i = 0; i < 4; i++) fragment_a<!TA>(fa[i], sa, wm + i * 16, kk);
#pragma unroll
    for (int j = 0; j < 4; j += 2) fragment_b<TB>(fb[j], fb[j + 1], sb, wn + j * 8, kk);
}

// This thread's sums of its block's square.
template <bool TA, bool TB, bool VEC, class T, class Sum>
static __device__ __forceinline__ void tile_sums(Sum (&acc)[4][4][4], T *ring, const T *a, const T *b, size_t m0,
                                                 size_t n0, size_t M, size_t N, size_t K, size_t lda, size_t ldb) {
    tile_slices<TA, TB, VEC>(ring, a, b, m0, n0, M, N, K, lda, ldb, [&](int, const T *sa, const T *sb) {
#pragma unroll
        for (int kk = 0; kk < SLICE_BYTES / 32; kk++) {
            uint32_t fa[4][4], fb[4][2];
            tile_fragments<TA, TB>(fa, fb, sa, sb, kk);
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) mma(acc[i][j], fa[i], fb[j]);
        }
    });
}

// store(m, n, s0, s1) for this thread's pairs of sums, of c[m][n] and c[m][n + 1]; n is even. Columns may be beyond N.
template <class Sum, class Store>
static __device__ __forceinline__ void tile_store(const Sum (&acc)[4][4][4], size_t m0, size_t n0, size_t M,
                                                  Store store) {
    int warp = threadIdx.x / 32, wm = warp / 4 * 64, wn = warp % 4 * 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            size_t m = m0 + wm + i * 16 + h * 8 + lane / 4;
            if (m >= M) continue;
#pragma unroll
            for (int j = 0; j < 4; j++)
                store(m, n0 + wn + j * 8 + lane % 4 * 2, acc[i][j][2 * h], acc[i][j][2 * h + 1]);
        }
}

// One value, or two beside each other and aligned to both.
static __device__ __forceinline__ void store(floatX *p, float v) { *p = f2x(v); }
static __device__ __forceinline__ float load(const floatX *p) { return x2f(*p); }
#ifndef PRECISION_FP32
static __device__ __forceinline__ void store(float *p, float v) { *p = v; }
static __device__ __forceinline__ float load(const float *p) { return *p; }
#endif
static __device__ __forceinline__ void store_pair(float *p, float a, float b) { vec_store(p, Vec<float, 2>{{a, b}}); }
static __device__ __forceinline__ void store_pair(int *p, int a, int b) { vec_store(p, Vec<int, 2>{{a, b}}); }
static __device__ __forceinline__ void store_pair(bf16 *p, float a, float b) {
    *(uint32_t *)(void *)p = pack_bf16(a, b);
}
#endif
