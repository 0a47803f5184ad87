// The kernels of served_int.h, once for each kind of processor: served_int_plain.c, served_int_avx2.c and
// served_int_avx512.c choose the instructions and include this. Vectors are tile_int8.h's: I8_W lanes of 32 bits.
#include "served_int.h"
#include "tile_int8.h"

#define VECS (INT_ROWS / I8_W)      // vectors of sixteen rows

typedef int32_t vs __attribute__((vector_size(I8_W * 4)));
typedef uint32_t vu32 __attribute__((vector_size(I8_W * 4)));
typedef int8_t vb __attribute__((vector_size(I8_W * 4)));
typedef float vf __attribute__((vector_size(I8_W * 4)));

VEC vi vi_times(vi a, vi b) { return (vi)((vu32)a * (vu32)b); }
VEC vi vi_minus(vi a, vi b) { return (vi)((vu32)a - (vu32)b); }
VEC vi vi_plus(vi a, vi b) { return (vi)((vu32)a + (vu32)b); }
VEC vf vf_of(vi a) { return __builtin_convertvector((vs)a, vf); }
VEC uint32_t unit_at(const uint8_t *p) { uint32_t u; memcpy(&u, p, sizeof u); return u; }

#if defined(QLLM_AVX512)
VEC vf vf_set1(float x) { return (vf)_mm512_set1_ps(x); }
VEC vf vf_fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
VEC vf vf_load_bf16(const uint8_t *p) {
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p)), 16);
}
VEC vi vi_load_bytes(const uint8_t *p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
}
#elif defined(__AVX2__)
VEC vf vf_set1(float x) { return (vf)_mm256_set1_ps(x); }
VEC vf vf_fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
VEC vf vf_load_bf16(const uint8_t *p) {
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)), 16);
}
VEC vi vi_load_bytes(const uint8_t *p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p));
}
#else
VEC vf vf_set1(float x) { return (vf){x, x, x, x}; }
VEC vf vf_fma(vf a, vf b, vf c) {
    for (int i = 0; i < I8_W; i++) c[i] = fmaf(a[i], b[i], c[i]);
    return c;
}
VEC vf vf_load_bf16(const uint8_t *p) {
    bf16 h[I8_W];
    vf v = {0};
    memcpy(h, p, sizeof h);
    for (int i = 0; i < I8_W; i++) v[i] = bf16_to_f32(h[i]);
    return v;
}
VEC vi vi_load_bytes(const uint8_t *p) {
    vi v = {0};
    for (int i = 0; i < I8_W; i++) v[i] = p[i];
    return v;
}
#endif
VEC vf vf_load(const void *p) { vf v; memcpy(&v, p, sizeof v); return v; }

// c + unsigned bytes a times signed bytes w of at most 4 bits and a sign: pairs fit in 16 bits, 2 * 255 * 15 < 2^15.
#if defined(__AVX2__) && !defined(QLLM_AVX512)
VEC vi vi_dot_small(vi c, vi a, vi w) {
    return _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_maddubs_epi16(a, w), _mm256_set1_epi16(1)));
}
#else
VEC vi vi_dot_small(vi c, vi a, vi w) { return vi_dot(c, a, w); }
#endif

// The two units of a vector of nibbles, less the zero points in z.
VEC vi vi_low(vi v, vi z) { return (vi)((vb)(v & vi_set1(0x0f0f0f0fu)) - (vb)z); }
VEC vi vi_high(vi v, vi z) { return (vi)((vb)((vi)((vu32)v >> 4) & vi_set1(0x0f0f0f0fu)) - (vb)z); }
// Zero points of I8_W rows in every byte.
VEC vi zero_bytes(const IntLayout *l, const uint8_t *zero, int first) {
    if (!l->own_zero) return vi_set1((uint32_t)l->zero_point * 0x01010101u);
    return vi_times(vi_load_bytes(zero + first), vi_set1(0x01010101u));
}

VEC vf scales_at(const IntLayout *l, const uint8_t *scale, int group, int first) {
    size_t at = (size_t)group * INT_ROWS + (size_t)first;
    return l->scale_bf16 ? vf_load_bf16(scale + at * sizeof(bf16)) : vf_load(scale + at * sizeof(float));
}

// Less the zero points that `rest` is to be multiplied with.
VEC vi zero_of_rows(const IntLayout *l, const uint8_t *zero, int first, bool nibbles) {
    if (!l->own_zero) return vi_set1(0u - (uint32_t)l->zero_point);
    vi z = vi_load_bytes(zero + first);
    return vi_minus(vi_set1(0), nibbles ? z : vi_minus(z ^ vi_set1(128), vi_set1(128)));      // bytes are signed
}

// Sixteen results of one token, of which `rows` exist.
VEC void write_rows(const IntOut *out, size_t at, const vf *v, int rows) {
    v16 y;
    memcpy(&y, v, sizeof y);
    if (out->y) v16_storex(out->y + at, y, rows);
    else v16_store(out->y32 + at, y, rows);
}

// --- tokens ------------------------------------------------------------------------------------------------------
// Bytes of sixteen codes less zero point, plus `zero` (mod 256).
VEC void store_codes(uint8_t *dst, v16 t, int zero, bool nibbles, int n) {
#ifdef QLLM_AVX512
    __m128i q = _mm_add_epi8(_mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)t)), _mm_set1_epi8((char)zero));
    if (n < 16) q = _mm_maskz_mov_epi8(v16_mask(n), q);
    if (nibbles) q = _mm_shuffle_epi8(q, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    if (n == 16) {
        _mm_storeu_si128((__m128i *)(void *)dst, q);
        return;
    }
    int stored = nibbles ? (n + 7) & ~7 : (n + 3) & ~3;
    _mm_mask_storeu_epi8(dst, v16_mask(stored), q);
#else
    static const uint8_t order[16] = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
    int stored = nibbles ? (n + 7) & ~7 : (n + 3) & ~3;
    uint8_t q[16];
    t = v16_rint(t);
    for (int i = 0; i < 16; i++) q[i] = i < n ? (uint8_t)((int)t[i] + zero) : 0;
    for (int i = 0; i < stored; i++) dst[i] = q[nibbles ? order[i] : i];
#endif
}

// quant_code less the zero point: what all codes of a row need.
typedef struct { v16 inv, nan, lo, hi; } RowQuant;

VEC v16 counted_from_zero(const floatX *x, const RowQuant *q, int n) {
    return v16_min(q->hi, v16_max(q->lo, v16_nan_to(v16_loadx(x, n) * q->inv, q->nan)));
}

static void quantize(uint8_t *codes, size_t group_stride, int32_t *zero, float *scale, const floatX *x,
                     const IntLayout *l, const QuantSpec *act) {
    Range even = range_empty(), odd = even;
    int c = 0, step, groups = l->groups, group = l->group;
    for (; c + 32 <= l->C; c += 32) {
        range_add(&even, v16_loadx(x + c, 16), 16);
        range_add(&odd, v16_loadx(x + c + 16, 16), 16);
    }
    for (; c < l->C; c += step) {
        step = l->C - c < 16 ? l->C - c : 16;
        range_add(&even, v16_loadx(x + c, step), step);
    }
    QParams p = quant_choose(v16_hmin(v16_min(odd.lo, even.lo)), v16_hmax(v16_max(odd.hi, even.hi)), act, QD_X);
    RowQuant q = {v16_set1(act->mapping == QM_ROWS ? int8_row_inv(p.scale) : 1.0f / p.scale),
                  v16_set1((float)quant_code(NAN, p, act, QD_X) - p.zp), v16_set1((float)act->qmin - p.zp),
                  v16_set1((float)act->qmax - p.zp)};
    int z = (int)p.zp + (act->is_unsigned ? 0 : 128);
    *zero = z;
    *scale = p.scale;
    if (group_stride == (size_t)group && group % 8 == 0) {       // groups without padding, one after the other
        group *= groups;
        groups = 1;
    }
    for (int g = 0; g < groups; g++, x += group, codes += group_stride) {
        for (c = 0; c + 16 <= group; c += 16)
            store_codes(codes + c, counted_from_zero(x + c, &q, 16), z, l->nibbles, 16);
        if (c < group)
            store_codes(codes + c, counted_from_zero(x + c, &q, group - c), z, l->nibbles, group - c);
    }
}

static void rest(int32_t *sums, const uint8_t *codes, int32_t zero, const IntLayout *l) {
    for (int g = 0; g < l->groups; g++)
        for (int p = 0; p < l->pieces; p++, sums++) {
            int columns = l->group - p * INT_PIECE_UNITS * K4, units = l->units - p * INT_PIECE_UNITS;
            if (columns > INT_PIECE_UNITS * K4) columns = INT_PIECE_UNITS * K4;
            if (units > INT_PIECE_UNITS) units = INT_PIECE_UNITS;
            int n = units * K4, i = 0, sum = 0;
#if defined(__AVX2__)
            __m256i four = _mm256_setzero_si256();
            for (; i + 32 <= n; i += 32) {
                __m256i bytes = _mm256_loadu_si256((const __m256i *)(const void *)(codes + i));
                four = _mm256_add_epi64(four, _mm256_sad_epu8(bytes, _mm256_setzero_si256()));
            }
            __m128i two = _mm_add_epi64(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
            sum = _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 2);
#endif
            for (; i < n; i++) sum += codes[i];
            *sums = sum - zero * columns;
            codes += n;
        }
}

// --- few tokens --------------------------------------------------------------------------------------------------
// P pairs of units, of 64 bytes each. Two chains of sums, so that one need not wait for the other. The sum of the codes
// is that of bytes first: 8 codes below 16 fit.
VEC void pairs_of_nibbles(vi acc[][VECS], vi other[][VECS], vi sum[VECS], const uint8_t *codes, const uint8_t *x,
                          size_t stride, const int P, const int T) {
    const vi half = vi_set1(0x0f0f0f0fu);
#pragma GCC unroll 4
    for (int i = 0; i < P; i++) prefetch_ahead(codes + i * 64);
#pragma GCC unroll 4
    for (int r = 0; r < VECS; r++) {
        vi low[4], high[4];
        vb bytes = {0};
#pragma GCC unroll 4
        for (int i = 0; i < P; i++) {
            vi v = vi_load(codes + i * 64 + r * I8_W * 4);
            low[i] = v & half;
            high[i] = (vi)((vu32)v >> 4) & half;
            bytes += (vb)low[i] + (vb)high[i];
        }
        sum[r] = vi_dot_small(sum[r], vi_set1(0x01010101u), (vi)bytes);
#pragma GCC unroll 4
        for (int t = 0; t < T; t++)
#pragma GCC unroll 4
            for (int i = 0; i < P; i++) {
                const uint8_t *at = x + (size_t)t * stride + i * 2 * K4;
                acc[t][r] = vi_dot_small(acc[t][r], vi_set1(unit_at(at)), low[i]);
                other[t][r] = vi_dot_small(other[t][r], vi_set1(unit_at(at + K4)), high[i]);
            }
    }
}

VEC void rows_of_nibbles(vi acc[][VECS], vi sum[VECS], const uint8_t *codes, const uint8_t *x, size_t stride, int units,
                         const int T) {
    vi other[INT_TOKENS][VECS];
#pragma GCC unroll 4
    for (int r = 0; r < VECS; r++) {
        sum[r] = vi_set1(0);
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) other[t][r] = vi_set1(0);
    }
    int u = 0;
    for (; u + 8 <= units; u += 8) pairs_of_nibbles(acc, other, sum, codes + u * 32, x + u * K4, stride, 4, T);
    for (; u < units; u += 2) pairs_of_nibbles(acc, other, sum, codes + u * 32, x + u * K4, stride, 1, T);
#pragma GCC unroll 4
    for (int r = 0; r < VECS; r++)
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) acc[t][r] = vi_plus(acc[t][r], other[t][r]);
}

VEC void rows_of_bytes(vi acc[][VECS], const uint8_t *codes, const uint8_t *x, size_t stride, int units, const int T) {
    vi other[INT_TOKENS][VECS];             // a second chain of sums, so that one need not wait for the other
#pragma GCC unroll 4
    for (int t = 0; t < T; t++)
        for (int r = 0; r < VECS; r++) other[t][r] = vi_set1(0);
    int u = 0;
    for (; u + 2 <= units; u += 2, codes += 128) {
        prefetch_ahead(codes);
        prefetch_ahead(codes + 64);
#pragma GCC unroll 4
        for (int r = 0; r < VECS; r++) {
            vi a = vi_load(codes + r * I8_W * 4), b = vi_load(codes + 64 + r * I8_W * 4);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const uint8_t *at = x + (size_t)t * stride + (size_t)u * K4;
                acc[t][r] = vi_dot(acc[t][r], vi_set1(unit_at(at)), a);
                other[t][r] = vi_dot(other[t][r], vi_set1(unit_at(at + K4)), b);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < VECS; r++)
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            acc[t][r] = vi_plus(acc[t][r], other[t][r]);
            if (u == units) continue;
            const uint8_t *at = x + (size_t)t * stride + (size_t)u * K4;
            acc[t][r] = vi_dot(acc[t][r], vi_set1(unit_at(at)), vi_load(codes + r * I8_W * 4));
        }
}

VEC void rows_by(const IntOut *out, const IntLayout *l, const uint8_t *block, const IntTokens *x, int rows, const int T,
                 const bool nibbles) {
    const uint8_t *codes = block, *scale = block + l->scale, *zero = block + l->zero, *sums = block + l->sum;
    const uint8_t *xc = x->codes;
    vf total[INT_TOKENS][VECS], value[INT_TOKENS][VECS];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++)
        for (int r = 0; r < VECS; r++) total[t][r] = value[t][r] = vf_set1(0.0f);
    for (int g = 0; g < l->groups; g++, zero += l->own_zero ? INT_ROWS : 0) {
        for (int p = 0; p < l->pieces; p++, sums += INT_ROWS * sizeof(int32_t)) {
            int units = l->units - p * INT_PIECE_UNITS;
            if (units > INT_PIECE_UNITS) units = INT_PIECE_UNITS;
            vi acc[INT_TOKENS][VECS], sum[VECS];
#pragma GCC unroll 4
            for (int r = 0; r < VECS; r++) {
                vi z = zero_of_rows(l, zero, r * I8_W, nibbles);
                if (!nibbles) sum[r] = vi_load(sums + r * I8_W * 4);
#pragma GCC unroll 4
                for (int t = 0; t < T; t++)
                    acc[t][r] = x->rest ? vi_times(z, vi_set1((uint32_t)x->rest[(t * l->groups + g) * l->pieces + p]))
                                        : vi_set1(0);
            }
            if (nibbles) rows_of_nibbles(acc, sum, codes, xc, x->stride, units, T);
            else rows_of_bytes(acc, codes, xc, x->stride, units, T);
            codes += (size_t)units * (nibbles ? 32 : 64);
            xc += (size_t)units * K4;
#pragma GCC unroll 4
            for (int t = 0; t < T; t++)
#pragma GCC unroll 4
                for (int r = 0; r < VECS; r++) {
                    vi v = vi_minus(acc[t][r], vi_times(sum[r], vi_set1((uint32_t)x->zero[t])));
                    value[t][r] = p ? value[t][r] + vf_of(v) : vf_of(v);
                }
        }
        if (l->groups == 1) break;
        // The next block's scales, which are wanted with its first codes, and those of its codes that asking ahead of
        // this block's leaves out: as many as there are scales between the two.
        const uint8_t *here = scale + (size_t)g * INT_ROWS * sizeof(bf16);
        __builtin_prefetch(here + l->stride);
        prefetch_ahead(here);
#pragma GCC unroll 4
        for (int r = 0; r < VECS; r++) {
            vf s = scales_at(l, scale, g, r * I8_W);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) total[t][r] = vf_fma(value[t][r], s, total[t][r]);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
        vf sx = vf_set1(x->scale[t]);
#pragma GCC unroll 4
        for (int r = 0; r < VECS; r++)
            value[t][r] = l->groups == 1 ? value[t][r] * sx * scales_at(l, scale, 0, r * I8_W) : total[t][r] * sx;
        write_rows(out, (size_t)t * out->ld, value[t], rows);
    }
}

static void rows(const IntOut *out, const IntLayout *l, const uint8_t *block, const IntTokens *x, int tokens, int n) {
    switch (tokens * 2 + l->nibbles) {
    case 2: rows_by(out, l, block, x, n, 1, false); break;
    case 3: rows_by(out, l, block, x, n, 1, true); break;
    case 4: rows_by(out, l, block, x, n, 2, false); break;
    case 5: rows_by(out, l, block, x, n, 2, true); break;
    case 6: rows_by(out, l, block, x, n, 3, false); break;
    case 7: rows_by(out, l, block, x, n, 3, true); break;
    case 8: rows_by(out, l, block, x, n, 4, false); break;
    case 9: rows_by(out, l, block, x, n, 4, true); break;
    }
}

// --- many tokens -------------------------------------------------------------------------------------------------
static void expand(uint8_t *codes, int32_t *sum, const IntLayout *l, const uint8_t *block) {
    const uint8_t *zero = block + l->zero;
    for (int g = 0; g < l->groups; g++, zero += l->own_zero ? INT_ROWS : 0, sum += INT_ROWS) {
        vi z[VECS], s[VECS];
        int padding = l->units * K4 - l->group;
#pragma GCC unroll 4
        for (int r = 0; r < VECS; r++) {
            z[r] = zero_bytes(l, zero, r * I8_W);
            s[r] = vi_times(z[r] & vi_set1(255), vi_set1((uint32_t)padding));    // padding is 0 less the zero point
        }
        for (int u = 0; u < l->units; u += 2, block += 64, codes += 128)
#pragma GCC unroll 4
            for (int r = 0; r < VECS; r++) {
                vi v = vi_load(block + r * I8_W * 4), low = vi_low(v, z[r]), high = vi_high(v, z[r]);
                vi_store(codes + r * I8_W * 4, low);
                vi_store(codes + 64 + r * I8_W * 4, high);
                s[r] = vi_dot_small(vi_dot_small(s[r], vi_set1(0x01010101u), low), vi_set1(0x01010101u), high);
            }
#pragma GCC unroll 4
        for (int r = 0; r < VECS; r++) vi_store(sum + r * I8_W, s[r]);
    }
}

#ifdef QLLM_AVX512
#define BLOCKS_GROUPED 2
#define BLOCKS_WHOLE 4
#else
#define BLOCKS_GROUPED 1
#define BLOCKS_WHOLE 1
#endif

// M tokens by B blocks; whole: rows of one group.
VEC void tile_of(const IntOut *out, const IntLayout *l, const IntPanel *b, const uint8_t *x, const int32_t *zero,
                 const float *scale, int tokens, int rows, const int M, const int B, const bool whole) {
    const int V = B * VECS;
    int units = l->units;
    vf total[INT_TILE][BLOCKS_WHOLE * VECS];
    vi acc[INT_TILE][BLOCKS_WHOLE * VECS];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) total[m][v] = vf_set1(0.0f);
    const uint8_t *codes = b->codes;
    int g = 0;
    do {
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            vi s = vi_load(b->sum + (size_t)(v / VECS) * b->sum_stride + (size_t)g * INT_ROWS + v % VECS * I8_W);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) acc[m][v] = vi_times(s, vi_set1(0u - (uint32_t)zero[m]));
        }
#pragma GCC unroll 8
        for (int u = 0; u < units; u++, codes += 64) {
            vi w[BLOCKS_WHOLE * VECS];
#pragma GCC unroll 8
            for (int v = 0; v < V; v++)
                w[v] = vi_load(codes + (size_t)(v / VECS) * b->codes_stride + v % VECS * I8_W * 4);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                vi a = vi_set1(unit_at(x + ((size_t)m * (size_t)units + (size_t)u) * K4));
                // Registers hold one token's unit at a time: loading the next ones early would push sums to memory.
                __asm__ volatile("" ::: "memory");
#pragma GCC unroll 8
                for (int v = 0; v < V; v++)
                    acc[m][v] = l->nibbles ? vi_dot_small(acc[m][v], a, w[v]) : vi_dot(acc[m][v], a, w[v]);
            }
        }
        x += (size_t)INT_TILE * (size_t)units * K4;
        if (whole) break;
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            vf s = scales_at(l, b->scale + (size_t)(v / VECS) * b->scale_stride, g, v % VECS * I8_W);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) total[m][v] = vf_fma(vf_of(acc[m][v]), s, total[m][v]);
        }
    } while (++g < l->groups);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        if (m >= tokens) break;
        vf sx = vf_set1(scale[m]);
#pragma GCC unroll 8
        for (int n = 0; n < B; n++) {
            vf y[VECS];
#pragma GCC unroll 8
            for (int r = 0; r < VECS; r++) {
                const uint8_t *at = b->scale + (size_t)n * b->scale_stride;
                y[r] = whole ? vf_of(acc[m][n * VECS + r]) * sx * scales_at(l, at, 0, r * I8_W)
                             : total[m][n * VECS + r] * sx;
            }
            int left = rows - n * INT_ROWS;
            if (left > 0) write_rows(out, (size_t)m * out->ld + (size_t)n * INT_ROWS, y, left < 16 ? left : 16);
        }
    }
}

#define TILE(M, B, WHOLE) tile_of(&o, l, &p, x, zero + m, scale + m, tokens - m, rows, M, B, WHOLE)
#ifdef QLLM_AVX512
#define TILE_STEP INT_TILE
#define TILE_BY(B, WHOLE) \
    do { \
        if (tokens > 4) TILE(6, B, WHOLE); \
        else if (tokens > 2) TILE(4, B, WHOLE); \
        else TILE(2, B, WHOLE); \
    } while (0)
#else
#define TILE_STEP 2
#define TILE_BY(B, WHOLE) TILE(2, B, WHOLE)
#endif

static void tile(const IntOut *out, const IntLayout *l, const IntPanel *b, int blocks, const uint8_t *codes,
                 const int32_t *zero, const float *scale, int tokens, int rows) {
    for (int n = 0, w; n < blocks; n += w, rows -= w * INT_ROWS) {
        bool whole = l->groups == 1;
        w = blocks - n;
        if (w > (whole ? BLOCKS_WHOLE : BLOCKS_GROUPED)) w = whole ? BLOCKS_WHOLE : BLOCKS_GROUPED;
        if (w == 3) w = 2;
        IntPanel p = *b;
        p.codes += (size_t)n * b->codes_stride;
        p.scale += (size_t)n * b->scale_stride;
        p.sum += (size_t)n * b->sum_stride;
        for (int m = 0; m < tokens; m += TILE_STEP) {
            IntOut o = *out;
            size_t at = (size_t)m * out->ld + (size_t)n * INT_ROWS;
            if (o.y) o.y += at;
            else o.y32 += at;
            const uint8_t *x = codes + (size_t)m * (size_t)l->units * K4;
            if (w == 1 && whole) TILE_BY(1, true);
            else if (w == 1) TILE_BY(1, false);
#ifdef QLLM_AVX512
            else if (w == 2 && whole) TILE_BY(2, true);
            else if (w == 2) TILE_BY(2, false);
            else TILE_BY(4, true);
#endif
        }
    }
}

static const IntForm form = {quantize, rest, rows, expand, tile, BLOCKS_GROUPED, BLOCKS_WHOLE};
