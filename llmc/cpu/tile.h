// Register tiles of a matrix product, and the operand layouts they read. Attention and the built-in matmul stand on
// this.
//
// A tile product is C[m][n] (+)= sum over k of A(m, k) * B(k, n) where one step of k is a unit of 4 bytes: two bf16
// values that one vdpbf16ps multiplies and adds in f32 (UNIT = 2, AVX512-BF16 and a bf16 build), or one f32 (UNIT = 1,
// everything else; bf16 inputs are widened when they are packed). A's units are broadcast from memory, so its strides
// are free; B's lie n after n. Each element of C is one chain of multiply-adds over ascending k, whatever tile it
// falls in: its bits depend on its own row and column only.
//
// The two layouts, for a source of rows x0, x1, ... of values (UNIT = 2):
//   along   unit j of row r  = (x_r[2j],  x_r[2j+1])        k runs along the source's rows: bytes as they are
//   across  unit n of pair p = (x_2p[n],  x_2p+1[n])        k runs across the source's rows: two rows interleaved
// e.g. across: values 1 2 3 4 over 5 6 7 8 become the units (1,5) (2,6) (3,7) (4,8).
#ifndef QLLM_CPU_TILE_H
#define QLLM_CPU_TILE_H
#include "vec.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(QLLM_AVX512) && defined(__AVX512BF16__) && !defined(PRECISION_FP32)
#define UNIT 2
typedef uint32_t unit_t;
#else
#define UNIT 1
typedef float unit_t;
#endif

// The vectors of a tile: full registers, since 24 accumulators of 64 bytes would not fit the 16 registers of AVX2.
#if defined(QLLM_AVX512)
#define TILE_W 16
#define TILE_NV 4            // vectors a tile is wide at most: 6 rows * 4 + 4 of B + 1 of A = 29 of 32 registers
typedef __m512 vt;
VEC vt vt_load(const float *p) { return _mm512_loadu_ps(p); }
VEC void vt_store(float *p, vt v) { _mm512_storeu_ps(p, v); }
VEC vt vt_scale(vt v, float s) { return _mm512_mul_ps(v, _mm512_set1_ps(s)); }
#if UNIT == 2
typedef __m512i vu;
VEC vu vu_load(const unit_t *p) { return _mm512_loadu_si512(p); }
VEC vu vu_set1(unit_t x) { return _mm512_set1_epi32((int)x); }
VEC vt vt_dot(vt c, vu a, vu b) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
#else
typedef __m512 vu;
VEC vu vu_load(const unit_t *p) { return _mm512_loadu_ps(p); }
VEC vu vu_set1(unit_t x) { return _mm512_set1_ps(x); }
VEC vt vt_dot(vt c, vu a, vu b) { return _mm512_fmadd_ps(a, b, c); }
#endif
#elif defined(__AVX2__) && defined(__FMA__)
#define TILE_W 8
#define TILE_NV 2
typedef __m256 vt;
typedef __m256 vu;
VEC vt vt_load(const float *p) { return _mm256_loadu_ps(p); }
VEC void vt_store(float *p, vt v) { _mm256_storeu_ps(p, v); }
VEC vt vt_scale(vt v, float s) { return _mm256_mul_ps(v, _mm256_set1_ps(s)); }
VEC vu vu_load(const unit_t *p) { return _mm256_loadu_ps(p); }
VEC vu vu_set1(unit_t x) { return _mm256_set1_ps(x); }
VEC vt vt_dot(vt c, vu a, vu b) { return _mm256_fmadd_ps(a, b, c); }
#else
#define TILE_W 4
#define TILE_NV 2
typedef float vt __attribute__((vector_size(16)));
typedef vt vu;
VEC vt vt_load(const float *p) { vt v; memcpy(&v, p, sizeof v); return v; }
VEC void vt_store(float *p, vt v) { memcpy(p, &v, sizeof v); }
VEC vt vt_scale(vt v, float s) { return v * s; }
VEC vu vu_load(const unit_t *p) { return vt_load(p); }
VEC vu vu_set1(unit_t x) { return (vu){x, x, x, x}; }
VEC vt vt_dot(vt c, vu a, vu b) { return c + a * b; }
#endif

#define TILE_ROWS 6          // rows of a tile: 6, or 4 where 6 does not come out

typedef enum { TILE_SET, TILE_ADD, TILE_SCALE_ADD } TileMode;   // C = AB, C += AB, C[m] = C[m] * scale[m] + AB

VEC void tile_kernel(int MR, int NV, float *c, size_t ldc, const unit_t *a, size_t am, size_t ak, const unit_t *b,
                     size_t ldb, int K, TileMode mode, const float *scale) {
    vt acc[TILE_ROWS][TILE_NV];
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
        for (int n = 0; n < NV; n++)
            acc[m][n] = mode == TILE_SET ? (vt){0} : vt_load(c + (size_t)m * ldc + (size_t)n * TILE_W);
    if (mode == TILE_SCALE_ADD) {
#pragma GCC unroll 8
        for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
            for (int n = 0; n < NV; n++) acc[m][n] = vt_scale(acc[m][n], scale[m]);
    }
    for (int k = 0; k < K; k++) {
        vu bv[TILE_NV];
#pragma GCC unroll 8
        for (int n = 0; n < NV; n++) bv[n] = vu_load(b + (size_t)k * ldb + (size_t)n * TILE_W);
#pragma GCC unroll 8
        for (int m = 0; m < MR; m++) {
            vu av = vu_set1(a[(size_t)m * am + (size_t)k * ak]);
#pragma GCC unroll 8
            for (int n = 0; n < NV; n++) acc[m][n] = vt_dot(acc[m][n], av, bv[n]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
        for (int n = 0; n < NV; n++) vt_store(c + (size_t)m * ldc + (size_t)n * TILE_W, acc[m][n]);
}

// Rows the next tile takes of `left` (even, at least 4): six, except where two rows would remain.
VEC int tile_rows(int left) { return left >= 6 && left != 8 ? 6 : 4; }
// Row counts are padded to what tile_rows can split.
VEC int tile_pad_rows(int rows) { return rows <= 4 ? 4 : (rows + 1) & ~1; }

// C (M, N) f32 with M from tile_pad_rows and N a multiple of 16, which TILE_W divides; K in units.
static inline void tile_product(float *c, size_t ldc, const unit_t *a, size_t am, size_t ak, const unit_t *b,
                                size_t ldb, int M, int N, int K, TileMode mode, const float *scale) {
    int nv = N / TILE_W, panels = (nv + TILE_NV - 1) / TILE_NV;
    for (int p = 0, n = 0; p < panels; p++) {
        int w = (nv - n + panels - p - 1) / (panels - p);       // widths that differ by one at most
        for (int m = 0, mr; m < M; m += mr) {
            mr = tile_rows(M - m);
            float *ct = c + (size_t)m * ldc + (size_t)n * TILE_W;
            const unit_t *at = a + (size_t)m * am, *bt = b + (size_t)n * TILE_W;
            const float *st = scale ? scale + m : NULL;
            switch (mr * 8 + w) {
            case 6 * 8 + 1: tile_kernel(6, 1, ct, ldc, at, am, ak, bt, ldb, K, mode, st); break;
            case 6 * 8 + 2: tile_kernel(6, 2, ct, ldc, at, am, ak, bt, ldb, K, mode, st); break;
            case 4 * 8 + 1: tile_kernel(4, 1, ct, ldc, at, am, ak, bt, ldb, K, mode, st); break;
            case 4 * 8 + 2: tile_kernel(4, 2, ct, ldc, at, am, ak, bt, ldb, K, mode, st); break;
#if TILE_NV == 4
            case 6 * 8 + 3: tile_kernel(6, 3, ct, ldc, at, am, ak, bt, ldb, K, mode, st); break;
            case 6 * 8 + 4: tile_kernel(6, 4, ct, ldc, at, am, ak, bt, ldb, K, mode, st); break;
            case 4 * 8 + 3: tile_kernel(4, 3, ct, ldc, at, am, ak, bt, ldb, K, mode, st); break;
            case 4 * 8 + 4: tile_kernel(4, 4, ct, ldc, at, am, ak, bt, ldb, K, mode, st); break;
#endif
            }
        }
        n += w;
    }
}

// --- packing: `along` ------------------------------------------------------------------------------------------
// n values of one row as (n + UNIT - 1) / UNIT units.
static inline void pack_along(unit_t *dst, const floatX *src, int n) {
#if UNIT == 2
    memcpy(dst, src, (size_t)(n / 2) * sizeof *dst);
    if (n & 1) dst[n / 2] = src[n - 1];
#else
    for (int i = 0; i < n; i++) dst[i] = x2f(src[i]);
#endif
}

// f32 values to units along the row; n a multiple of 32.
static inline void pack_along_f32(unit_t *dst, const float *src, int n) {
#if UNIT == 2
    for (int i = 0; i < n; i += 32)
        _mm512_storeu_si512(dst + i / 2,
                            (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(src + i + 16), _mm512_loadu_ps(src + i)));
#else
    memcpy(dst, src, (size_t)n * sizeof *dst);
#endif
}

#ifdef QLLM_AVX512
// 16 x 16 units, transposed.
VEC void transpose_registers(__m512i r[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512i a = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        __m512i c = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        __m512i d = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
        r[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

static inline void transpose_16x16(unit_t *dst, size_t ldd, const unit_t *const rows[16]) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(rows[i]);
    transpose_registers(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(dst + (size_t)i * ldd, r[i]);
}
#endif

// `rows` rows of n values (stride ld) as B of a product over n: dst (units of n, ldd) with one column a row, columns
// rows..padded zero.
static inline void pack_along_columns(unit_t *dst, size_t ldd, const floatX *src, size_t ld, int rows, int padded,
                                      int n) {
    int units = (n + UNIT - 1) / UNIT, r0 = 0;
#if defined(QLLM_AVX512) && (UNIT == 2 || defined(PRECISION_FP32))
    for (; r0 + 16 <= rows; r0 += 16) {
        int j = 0;
        for (; j + 16 <= n / UNIT; j += 16) {
            const unit_t *from[16];
            for (int i = 0; i < 16; i++) from[i] = (const unit_t *)(const void *)(src + (size_t)(r0 + i) * ld) + j;
            transpose_16x16(dst + (size_t)j * ldd + r0, ldd, from);
        }
        for (; j < units; j++)
            for (int i = 0; i < 16; i++) {
                int left = n - j * UNIT;
                pack_along(dst + (size_t)j * ldd + r0 + i, src + (size_t)(r0 + i) * ld + (size_t)j * UNIT,
                           left < UNIT ? left : UNIT);
            }
    }
#endif
    for (int r = r0; r < rows; r++)
        for (int j = 0; j < units; j++) {
            int left = n - j * UNIT;
            pack_along(dst + (size_t)j * ldd + r, src + (size_t)r * ld + (size_t)j * UNIT, left < UNIT ? left : UNIT);
        }
    for (int j = 0; j < units; j++)
        for (int r = rows; r < padded; r++) dst[(size_t)j * ldd + r] = 0;
}

// --- packing: `across` -----------------------------------------------------------------------------------------
// UNIT rows of n values (row1 NULL: zeros; ignored where UNIT is 1), units n..padded zero.
static inline void pack_across(unit_t *dst, const floatX *row0, const floatX *row1, int n, int padded) {
#if UNIT == 2
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512i lo = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)(row0 + i)));
        __m512i hi = row1 ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)(row1 + i)))
                          : _mm512_setzero_si512();
        _mm512_storeu_si512(dst + i, _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
    }
    for (; i < n; i++) dst[i] = row0[i] | (row1 ? (uint32_t)row1[i] << 16 : 0);
#else
    (void)row1;
    for (int i = 0; i < n; i++) dst[i] = x2f(row0[i]);
#endif
    for (int j = n; j < padded; j++) dst[j] = 0;
}

// 16 lanes of f32 from two rows, as units across them at dst, or at dst and dst + ld where a unit is one value.
VEC void pack_across_f32(unit_t *dst, size_t ld, v16 row0, v16 row1) {
#if UNIT == 2
    (void)ld;
    const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)row1, (__m512)row0);
    _mm512_storeu_si512(dst, _mm512_permutexvar_epi16(zip, both));
#else
    v16_store(dst, row0, 16);
    v16_store(dst + ld, row1, 16);
#endif
}
#endif
