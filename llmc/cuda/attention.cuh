// What attention forward and backward share: tiles of rows in shared memory, and the fragments that tensor cores take
// from them (ptx.cuh says which lane holds what). bf16 build only.
//
// A tile is ROWS rows of HS bf16 (one head of consecutive positions), each padded by 16 bytes to TILE_LD(HS) values.
// HS is a multiple of 16, so a row is an odd number of 16-byte pieces, and the eight rows that ldmatrix reads at once
// lie in eight different groups of four banks: no conflicts, and the addresses of a loop are a register plus constants.
// A tile's shared memory is tile_bytes(ROWS, HS), a multiple of 16.
//
// How to use it. Copy a tile with all threads of the block, commit, wait, barrier:
//     copy_tile<64, HS, THREADS>(ks, k + head, ldkv, first_key, Tk);   // rows Tk and on become zeros
//     cp_async_commit(); ... cp_async_wait<0>(); __syncthreads();
// Then a warp multiplies 16 rows by 16 columns at a time, over slices of 16 of what is summed:
//     uint32_t a[4], b[4];
//     frag_a(a, qs, TILE_LD(HS), row, c);         // A = rows row.. of a tile, summed over the columns: q in q k^T
//     frag_b(b, ks, TILE_LD(HS), key, c);         // B = rows key.. as columns, summed over the columns: k in q k^T
//     mma_pair(s[j], s[j + 1], a, b);             // s[j] (16, 8): keys key .. key + 7; s[j + 1]: the next 8
//     mma_pair_first(s[j], s[j + 1], a, b);       // in the first slice, instead of zeros in s
// What is summed over rows instead comes from the same tiles, transposed on the way:
//     frag_b_t(b, vs, TILE_LD(HS), key, c);       // B = columns c.. of rows key..: v in p v, k in ds k
//     frag_a_t(a, ps, ld, row, key);              // A = columns key.. as rows, summed over rows row..: p in p^T do
// The sums of one product become the A operand of the next without shared memory: two neighbouring (16, 8) sums are
// one (16, 16) operand, frag_from_sums(a, s[2 kk], s[2 kk + 1]).
#ifndef QLLM_ATTENTION_CUH
#define QLLM_ATTENTION_CUH
#include "ptx.cuh"

#define LOG2E 1.44269504f
#define LN2 0.693147181f

// The factor that turns q . k into the power of two of a weight: log2(e) / sqrt(HS). Computed on the host.
static inline float attention_scale_log2(int HS) { return LOG2E / sqrtf((float)HS); }

#ifndef PRECISION_FP32
#define TILE_LD(HS) ((HS) + 8)
#define tile_bytes(ROWS, HS) ((size_t)(ROWS) * TILE_LD(HS) * sizeof(bf16))

// Rows [row0, row0 + ROWS) of a head whose row 0 begins at m (16-byte aligned, ld a multiple of 8), as asynchronous
// copies by THREADS threads. Rows `rows` and behind are zeros, and are not read.
// Eight threads (or as many as a short row has pieces) walk a row: whole lines of 128 bytes, and few addresses to keep.
template <int ROWS, int HS, int THREADS>
static __device__ __forceinline__ void copy_tile(bf16 *tile, const bf16 *m, size_t ld, int row0, int rows) {
    const int pieces = HS / 8, side = pieces < 6 ? pieces : 8, step = THREADS / side;
    int c = (int)threadIdx.x % side * 8, first = (int)threadIdx.x / side;
    const bf16 *src = m + (size_t)(row0 + first) * ld + c;
    bf16 *dst = tile + first * TILE_LD(HS) + c;
#pragma unroll
    for (int r = 0; r < ROWS; r += step) {
        if (ROWS % step && first + r >= ROWS) break;
        bool valid = row0 + first + r < rows;
#pragma unroll
        for (int n = 0; n < pieces; n += side)
            if (pieces % side == 0 || c + n * 8 < HS)
                cp_async16(dst + r * TILE_LD(HS) + n * 8, src + (size_t)r * ld + n * 8, valid);
    }
}

// A (16, 16) = tile[row + i][column + j].
static __device__ __forceinline__ void frag_a(uint32_t (&a)[4], const bf16 *tile, int ld, int row, int column) {
    int lane = threadIdx.x % 32;
    ldmatrix_x4(a, tile + (row + lane % 16) * ld + column + lane / 16 * 8);
}
// A (16, 16) = tile[row + j][column + i].
static __device__ __forceinline__ void frag_a_t(uint32_t (&a)[4], const bf16 *tile, int ld, int row, int column) {
    int lane = threadIdx.x % 32;
    ldmatrix_x4_trans(a, tile + (row + lane / 16 * 8 + lane % 8) * ld + column + lane / 8 % 2 * 8);
}
// B (16, 16) = tile[row + j][column + i]: two operands of 8 columns, b[0], b[1] and b[2], b[3].
static __device__ __forceinline__ void frag_b(uint32_t (&b)[4], const bf16 *tile, int ld, int row, int column) {
    int lane = threadIdx.x % 32;
    ldmatrix_x4(b, tile + (row + lane / 16 * 8 + lane % 8) * ld + column + lane / 8 % 2 * 8);
}
// B (16, 16) = tile[row + i][column + j].
static __device__ __forceinline__ void frag_b_t(uint32_t (&b)[4], const bf16 *tile, int ld, int row, int column) {
    int lane = threadIdx.x % 32;
    ldmatrix_x4_trans(b, tile + (row + lane % 16) * ld + column + lane / 16 * 8);
}
// (left, right) (16, 16) += A . B.
static __device__ __forceinline__ void mma_pair(float (&left)[4], float (&right)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[4]) {
    uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
    mma_bf16(left, a, b0);
    mma_bf16(right, a, b1);
}
// (left, right) = A . B.
static __device__ __forceinline__ void mma_pair_first(float (&left)[4], float (&right)[4], const uint32_t (&a)[4],
                                                      const uint32_t (&b)[4]) {
    uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
    mma_bf16_first(left, a, b0);
    mma_bf16_first(right, a, b1);
}
// A (16, 16) = (left, right) rounded to bf16.
static __device__ __forceinline__ void frag_from_sums(uint32_t (&a)[4], const float (&left)[4],
                                                      const float (&right)[4]) {
    a[0] = pack_bf16(left[0], left[1]);
    a[1] = pack_bf16(left[2], left[3]);
    a[2] = pack_bf16(right[0], right[1]);
    a[3] = pack_bf16(right[2], right[3]);
}
#endif
#endif
