// Register tiles of an integer matrix product, and the packing that quantizes: tile.h's twin for INT8.
//
// C[m][n] (+)= sum over k of A(m, k) * B(k, n) in int32, exact. A unit is 4 bytes, four steps of k: A's are signed
// codes, broadcast from memory; B's are codes + 128, unsigned, which lie n after n. That is what vpdpbusd multiplies;
// where the processor lacks it, sums of 16-bit products do the same. The 128 is taken back by starting the sum of row m
// at -128 * (sum over k of A(m, k)): sums in between may wrap, the last one does not.
//
// Layouts are those of tile.h: along (k runs along the source's rows) and across (k runs across them; four rows
// interleaved).
#ifndef QLLM_CPU_TILE_INT8_H
#define QLLM_CPU_TILE_INT8_H
#include "optimizer.h"
#include "tile.h"

#define K4 4                // values in a unit
#define I8_OFFSET 0x80808080u

#if defined(QLLM_AVX512)
#define I8_W 16
#define I8_NV 4
typedef __m512i vi;
VEC vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
VEC void vi_store(void *p, vi v) { _mm512_storeu_si512(p, v); }
VEC vi vi_set1(uint32_t x) { return _mm512_set1_epi32((int)x); }
#if defined(__AVX512VNNI__)
VEC vi vi_dot(vi c, vi b, vi a) { return _mm512_dpbusd_epi32(c, b, a); }
#else
VEC vi vi_dot(vi c, vi b, vi a) {
    vi even = _mm512_madd_epi16(_mm512_and_si512(b, _mm512_set1_epi16(255)),
                                _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8));
    vi odd = _mm512_madd_epi16(_mm512_srli_epi16(b, 8), _mm512_srai_epi16(a, 8));
    return _mm512_add_epi32(c, _mm512_add_epi32(even, odd));
}
#endif
#elif defined(__AVX2__)
#define I8_W 8
#define I8_NV 2
typedef __m256i vi;
VEC vi vi_load(const void *p) { return _mm256_loadu_si256(p); }
VEC void vi_store(void *p, vi v) { _mm256_storeu_si256(p, v); }
VEC vi vi_set1(uint32_t x) { return _mm256_set1_epi32((int)x); }
#if defined(__AVXVNNI__)
VEC vi vi_dot(vi c, vi b, vi a) { return _mm256_dpbusd_avx_epi32(c, b, a); }
#else
VEC vi vi_dot(vi c, vi b, vi a) {
    vi even = _mm256_madd_epi16(_mm256_and_si256(b, _mm256_set1_epi16(255)),
                                _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8));
    vi odd = _mm256_madd_epi16(_mm256_srli_epi16(b, 8), _mm256_srai_epi16(a, 8));
    return _mm256_add_epi32(c, _mm256_add_epi32(even, odd));
}
#endif
#else
#define I8_W 4
#define I8_NV 2
typedef uint32_t vi __attribute__((vector_size(16)));
VEC vi vi_load(const void *p) { vi v; memcpy(&v, p, sizeof v); return v; }
VEC void vi_store(void *p, vi v) { memcpy(p, &v, sizeof v); }
VEC vi vi_set1(uint32_t x) { return (vi){x, x, x, x}; }
VEC vi vi_dot(vi c, vi b, vi a) {
    typedef int32_t vs __attribute__((vector_size(16)));
    vs s = (vs)a;
    for (int i = 0; i < K4; i++) c += (b >> (8 * i) & 255) * (vi)(s << (24 - 8 * i) >> 24);
    return c;
}
#endif

// sum (MR, NV * I8_W) int32 = start[m] + AB, or += AB where start is NULL. K in units.
VEC void i8_tile_kernel(int MR, int NV, int32_t *sum, size_t lds, const uint32_t *a, size_t am, size_t ak,
                        const uint32_t *b, size_t ldb, int K, const int32_t *start) {
    vi acc[TILE_ROWS][I8_NV];
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
        for (int n = 0; n < NV; n++)
            acc[m][n] = start ? vi_set1((uint32_t)start[m]) : vi_load(sum + (size_t)m * lds + (size_t)n * I8_W);
    for (int k = 0; k < K; k++) {
        vi bv[I8_NV];
#pragma GCC unroll 8
        for (int n = 0; n < NV; n++) bv[n] = vi_load(b + (size_t)k * ldb + (size_t)n * I8_W);
#pragma GCC unroll 8
        for (int m = 0; m < MR; m++) {
            vi av = vi_set1(a[(size_t)m * am + (size_t)k * ak]);
#pragma GCC unroll 8
            for (int n = 0; n < NV; n++) acc[m][n] = vi_dot(acc[m][n], bv[n], av);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
        for (int n = 0; n < NV; n++) vi_store(sum + (size_t)m * lds + (size_t)n * I8_W, acc[m][n]);
}

// One tile of mr rows (6 or 4, tile_rows) and N columns, a multiple of 16.
static inline void i8_tile(int mr, int N, int32_t *sum, size_t lds, const uint32_t *a, size_t am, size_t ak,
                           const uint32_t *b, size_t ldb, int K, const int32_t *start) {
    for (int n = 0, w; n < N; n += w * I8_W, b += w * I8_W, sum += w * I8_W) {
        w = (N - n) / I8_W;
        if (w > I8_NV) w = I8_NV;
        switch (mr * 8 + w) {
        case 6 * 8 + 1: i8_tile_kernel(6, 1, sum, lds, a, am, ak, b, ldb, K, start); break;
        case 6 * 8 + 2: i8_tile_kernel(6, 2, sum, lds, a, am, ak, b, ldb, K, start); break;
        case 4 * 8 + 1: i8_tile_kernel(4, 1, sum, lds, a, am, ak, b, ldb, K, start); break;
        case 4 * 8 + 2: i8_tile_kernel(4, 2, sum, lds, a, am, ak, b, ldb, K, start); break;
#if I8_NV == 4
        case 6 * 8 + 3: i8_tile_kernel(6, 3, sum, lds, a, am, ak, b, ldb, K, start); break;
        case 6 * 8 + 4: i8_tile_kernel(6, 4, sum, lds, a, am, ak, b, ldb, K, start); break;
        case 4 * 8 + 3: i8_tile_kernel(4, 3, sum, lds, a, am, ak, b, ldb, K, start); break;
        case 4 * 8 + 4: i8_tile_kernel(4, 4, sum, lds, a, am, ak, b, ldb, K, start); break;
#endif
        }
    }
}

// --- quantizing --------------------------------------------------------------------------------------------------
VEC v16 v16_from_i32(const int32_t *p) {
#ifdef QLLM_AVX512
    return (v16)_mm512_cvtepi32_ps(_mm512_loadu_si512(p));
#else
    v16 v;
    for (int i = 0; i < 16; i++) v[i] = (float)p[i];
    return v;
#endif
}

// Four rows of sixteen products value * inv as units of codes across them: int8_nearest's, as v16_store_i8 has them.
VEC void v16_store_codes_across(uint32_t *dst, v16 t0, v16 t1, v16 t2, v16 t3, uint32_t flip) {
#ifdef QLLM_AVX512
    const v16 t[4] = {t0, t1, t2, t3};
    __m512i q[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        q[i] = _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask((__m512)t[i], (__m512)t[i], _CMP_ORD_Q), (__m512)t[i]);
    // In each quarter: four bytes of row 0, of row 1, of row 2, of row 3. Then four units.
    __m512i rows = _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
    const __m512i zip = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    _mm512_storeu_si512(dst, _mm512_xor_si512(_mm512_shuffle_epi8(rows, zip), _mm512_set1_epi32((int)flip)));
#else
    int8_t c[4][16];
    v16_store_i8(c[0], t0, 16);
    v16_store_i8(c[1], t1, 16);
    v16_store_i8(c[2], t2, 16);
    v16_store_i8(c[3], t3, 16);
    for (int i = 0; i < 16; i++) {
        uint32_t u = (uint32_t)(uint8_t)c[0][i] | (uint32_t)(uint8_t)c[1][i] << 8 | (uint32_t)(uint8_t)c[2][i] << 16 |
                     (uint32_t)(uint8_t)c[3][i] << 24;
        dst[i] = u ^ flip;
    }
#endif
}

// Sum of the codes in n units that lie together.
static inline int32_t i8_sum(const uint32_t *u, int64_t n) {
    int32_t lanes[I8_W], s = 0;
    vi acc = vi_set1(0);
    int64_t i = 0;
    for (; i + I8_W <= n; i += I8_W) acc = vi_dot(acc, vi_set1(0x01010101u), vi_load(u + i));
    vi_store(lanes, acc);
    for (int l = 0; l < I8_W; l++) s += lanes[l];
    for (; i < n; i++)
        for (int b = 0; b < K4; b++) s += (int8_t)(u[i] >> (8 * b));
    return s;
}

// One row of n values, times mul where given, as units of codes along it; returns its scale.
static inline float i8_quantize_row(uint32_t *dst, const floatX *src, const float *mul, int64_t n) {
    v16 most = {0};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        v16 v = v16_loadx(src + i, 16);
        most = v16_max(v16_abs(mul ? v * v16_load(mul + i, 16) : v), most);
    }
    int left = (int)(n - i);
    if (left) {
        v16 v = v16_loadx(src + i, left);
        most = v16_max(v16_abs(mul ? v * v16_load(mul + i, left) : v), most);
    }
    float scale = int8_row_scale(v16_hmax(most));
    v16 inv = v16_set1(int8_row_inv(scale));
    int8_t *codes = (int8_t *)dst;
    for (i = 0; i + 16 <= n; i += 16) {
        v16 v = v16_loadx(src + i, 16);
        v16_store_i8(codes + i, (mul ? v * v16_load(mul + i, 16) : v) * inv, 16);
    }
    if (left) {
        v16 v = v16_loadx(src + i, left);
        v16_store_i8(codes + i, (mul ? v * v16_load(mul + i, left) : v) * inv, left);
    }
    for (i = n; i % K4; i++) codes[i] = 0;
    return scale;
}

// Rows k0 to k1 - 1 (k0 a multiple of 4) of `cols` columns (stride ld) as units across the rows at dst (units, ldd);
// columns up to the next multiple of 16 get code 0. inv (cols) as int8_row_inv. flip: I8_OFFSET for B, else 0. sum,
// where given, gets each column's sum of codes added.
static inline void i8_quantize_across(uint32_t *dst, size_t ldd, const floatX *src, size_t ld, const float *inv,
                                      int cols, int64_t k0, int64_t k1, uint32_t flip, int32_t *sum) {
    for (int64_t k = k0; k < k1; k += K4, dst += ldd)
        for (int c = 0; c < cols; c += 16) {
            int n = cols - c < 16 ? cols - c : 16;
            v16 t[K4], by = v16_load(inv + c, n);
            for (int i = 0; i < K4; i++) {
                const floatX *p = src + (size_t)(k + i) * ld + c;
                // rows some way ahead: each is a stream of its own, which the processor does not foresee
                __builtin_prefetch((const void *)((uintptr_t)p + 8 * ld * sizeof *p), 0, 3);
                t[i] = k + i < k1 ? v16_loadx(p, n) * by : (v16){0};
            }
            v16_store_codes_across(dst + c, t[0], t[1], t[2], t[3], flip);
            if (sum)
                for (int l = 0; l < 16; l += I8_W) {
                    vi s = vi_dot(vi_load(sum + c + l), vi_set1(0x01010101u), vi_load(dst + c + l));
                    vi_store(sum + c + l, s);
                }
        }
}

// --- packing codes -----------------------------------------------------------------------------------------------
// `cols` rows of n codes as B of a product over n: dst (units, ldd) with one column a row, columns cols..padded zero.
static inline void i8_pack_along_columns(uint32_t *dst, size_t ldd, const int8_t *src, int64_t n, int cols,
                                         int padded) {
    int64_t units = (n + K4 - 1) / K4;
    int c0 = 0;
#ifdef QLLM_AVX512
    for (; c0 + 16 <= cols; c0 += 16)
        for (int64_t j = 0; j < units; j += 16) {
            int64_t left = n - j * K4;
            __mmask64 m = left >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << left) - 1;
            __m512i r[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
                r[i] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(m, src + (c0 + i) * n + j * K4),
                                        _mm512_set1_epi32((int)I8_OFFSET));
            transpose_registers(r);
            int rows = units - j < 16 ? (int)(units - j) : 16;
            if (rows == 16) {
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++) _mm512_storeu_si512(dst + (size_t)(j + i) * ldd + c0, r[i]);
            } else {
                for (int i = 0; i < rows; i++) _mm512_storeu_si512(dst + (size_t)(j + i) * ldd + c0, r[i]);
            }
        }
#endif
    for (int c = c0; c < padded; c++)
        for (int64_t j = 0; j < units; j++) {
            uint32_t u = 0;
            for (int64_t k = j * K4; c < cols && k < n && k < (j + 1) * K4; k++)
                u |= (uint32_t)(uint8_t)src[c * n + k] << (8 * (k % K4));
            dst[(size_t)j * ldd + (size_t)c] = u ^ I8_OFFSET;
        }
}

// Rows k0 to k1 - 1 of `cols` codes (stride ld) as units across the rows; columns cols..padded zero.
static inline void i8_pack_across(uint32_t *dst, size_t ldd, const int8_t *src, size_t ld, int cols, int padded,
                                  int64_t k0, int64_t k1) {
    for (int64_t k = k0; k < k1; k += K4, dst += ldd) {
        const int8_t *r = src + (size_t)k * ld;
        int c = 0;
#ifdef QLLM_AVX512
        const __m128i offset = _mm_set1_epi8(-128);
        for (; k + K4 <= k1 && c + 16 <= cols; c += 16) {
            __m128i x[K4];
#pragma GCC unroll 4
            for (int i = 0; i < K4; i++)
                x[i] = _mm_xor_si128(offset, _mm_loadu_si128((const __m128i *)(const void *)(r + (size_t)i * ld + c)));
            __m128i lo01 = _mm_unpacklo_epi8(x[0], x[1]), lo23 = _mm_unpacklo_epi8(x[2], x[3]);
            __m128i hi01 = _mm_unpackhi_epi8(x[0], x[1]), hi23 = _mm_unpackhi_epi8(x[2], x[3]);
            __m128i *to = (__m128i *)(void *)(dst + c);
            _mm_storeu_si128(to, _mm_unpacklo_epi16(lo01, lo23));
            _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(lo01, lo23));
            _mm_storeu_si128(to + 2, _mm_unpacklo_epi16(hi01, hi23));
            _mm_storeu_si128(to + 3, _mm_unpackhi_epi16(hi01, hi23));
        }
#endif
        for (; c < padded; c++) {
            uint32_t u = 0;
            for (int i = 0; c < cols && i < K4 && k + i < k1; i++)
                u |= (uint32_t)(uint8_t)r[(size_t)i * ld + (size_t)c] << (8 * i);
            dst[c] = u ^ I8_OFFSET;
        }
    }
}
#endif
