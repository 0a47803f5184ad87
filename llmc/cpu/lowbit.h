// Sixteen lanes to and from the formats of optimizer.h: bytes, INT8 codes, bf16 with random bits, codes of block-wise
// states. The same bits as its scalar functions.
#ifndef QLLM_CPU_LOWBIT_H
#define QLLM_CPU_LOWBIT_H
#include "optimizer.h"
#include "vec.h"

VEC v16i v16i_set1(int x) { return (v16i){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
VEC v16 v16_to_f32(v16i x) { return __builtin_convertvector(x, v16); }

#ifdef QLLM_AVX512
VEC v16 v16_floor(v16 a) { return (v16)_mm512_roundscale_ps((__m512)a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
VEC v16i v16_truncate(v16 a) { return (v16i)_mm512_cvttps_epi32((__m512)a); }
VEC v16i v16i_select(v16i k, v16i a, v16i b) {
    return (v16i)_mm512_mask_mov_epi32((__m512i)b, _mm512_movepi32_mask((__m512i)k), (__m512i)a);
}
VEC v16i v16i_load_u8(const uint8_t *p, int n) { return (v16i)_mm512_cvtepu8_epi32(bytes_load(p, n)); }
// The lower byte of each lane.
VEC void v16i_store_u8(void *p, v16i v, int n) {
    __m128i b = _mm512_cvtepi32_epi8((__m512i)v);
    if (n == 16) _mm_storeu_si128((__m128i *)p, b);
    else _mm_mask_storeu_epi8(p, v16_mask(n), b);
}
VEC void v16i_store_u16(uint16_t *p, v16i v, int n) {
    __m256i b = _mm512_cvtepi32_epi16((__m512i)v);
    if (n == 16) _mm256_storeu_si256((__m256i *)(void *)p, b);
    else _mm256_mask_storeu_epi16(p, v16_mask(n), b);
}
// Lane i: table[k[i]], of 256.
VEC v16 v16_pick256(const float *table, v16i k) {
    __m512i i = (__m512i)k;
    __m512 t[8];
    for (int j = 0; j < 8; j++)
        t[j] = _mm512_permutex2var_ps(_mm512_loadu_ps(table + 32 * j), i, _mm512_loadu_ps(table + 32 * j + 16));
    __mmask16 b5 = _mm512_test_epi32_mask(i, _mm512_set1_epi32(32));
    __mmask16 b6 = _mm512_test_epi32_mask(i, _mm512_set1_epi32(64));
    for (int j = 0; j < 8; j += 2) t[j] = _mm512_mask_mov_ps(t[j], b5, t[j + 1]);
    for (int j = 0; j < 8; j += 4) t[j] = _mm512_mask_mov_ps(t[j], b6, t[j + 2]);
    return (v16)_mm512_mask_mov_ps(t[0], _mm512_test_epi32_mask(i, _mm512_set1_epi32(128)), t[4]);
}
#else
VEC v16 v16_floor(v16 a) {
    for (int i = 0; i < 16; i++) a[i] = floorf(a[i]);
    return a;
}
VEC v16i v16_truncate(v16 a) { return __builtin_convertvector(a, v16i); }
VEC v16i v16i_select(v16i k, v16i a, v16i b) { return (a & k) | (b & ~k); }
VEC v16i v16i_load_u8(const uint8_t *p, int n) {
    v16i v = {0};
    for (int i = 0; i < n; i++) v[i] = p[i];
    return v;
}
VEC void v16i_store_u8(void *p, v16i v, int n) {
    uint8_t *bytes = p;
    for (int i = 0; i < n; i++) bytes[i] = (uint8_t)v[i];
}
VEC void v16i_store_u16(uint16_t *p, v16i v, int n) {
    for (int i = 0; i < n; i++) p[i] = (uint16_t)v[i];
}
VEC v16 v16_pick256(const float *table, v16i k) {
    v16 v;
    for (int i = 0; i < 16; i++) v[i] = table[k[i] & 255];
    return v;
}
#endif

// The largest magnitude so far of each lane; NaN takes no part. Lanes from n on must be 0.
VEC v16 v16_amax(v16 amax, v16 x) { return v16_max(v16_abs(x), amax); }

// What v16_store_i8 stores as int8_stochastic's codes. words: 32 random bits a lane.
VEC v16 int8_stochastic16(v16 x, v16 inv, v16i words) {
    v16 u = v16_to_f32((v16i)((v16u)words >> 8)) * v16_set1(5.9604644775390625e-8f);
    return v16_floor(x * inv + u);
}

// bf16_stochastic: the bf16's bits in the lower halves. r: 16 random bits a lane.
VEC v16i bf16_stochastic16(v16 x, v16i r) {
    v16i u = (v16i)x, up = (r < (u & 0xffff)) & 0x10000;
    v16i special = (u & 0x7f800000) == 0x7f800000;
    v16i kept = (v16i)((v16u)v16_bf16_bits(x) >> 16), rounded = (v16i)((v16u)(u + up) >> 16);
    return v16i_select(special, kept, rounded);
}

// f8_e4m3_to_f32 of codes 0 to 255.
VEC v16 f8_to_f32_16(v16i code) {
    v16i a = code & 0x7f, sign = (v16i)((v16u)code << 24) & (int)0x80000000u;
    v16 sub = v16_to_f32(a) * v16_set1(0.001953125f);
    v16i bits = v16i_select(a < 8, (v16i)sub, (v16i)((v16u)a << 20) + 0x3c000000);
    return (v16)(v16i_select(a == 0x7f, v16i_set1(0x7fc00000), bits) | sign);
}
// f8_e4m3_from_f32 of numbers that are not NaN.
VEC v16i f8_from_f32_16(v16 x) {
    v16i u = (v16i)x, a = u & 0x7fffffff, sign = (v16i)((v16u)u >> 24) & 0x80;
    v16i normal = (a + 0x7ffff + ((a >> 20) & 1) - 0x3c000000) >> 20;
    v16i sub = v16_truncate(v16_rint(v16_min((v16)a, v16_set1(1.0f)) * v16_set1(512.0f)));
    v16i code = v16i_select(a < 0x3c800000, sub, normal);
    return v16i_select(a >= 0x43e00000, v16i_set1(0x7e), code) | sign;
}

// A map of states and a quick way to its codes. Its values lie on straight lines, one a decade, whose slopes fall: the
// least of the lines is the position of u among the codes (of magnitudes), but that a decade's first code begins late,
// by a fifth of a step (the lowest line is laid so that this holds there too). A quarter less is the code or, by one,
// too small; the edge above it decides. Codes are those of state_map_code.
typedef struct {
    const float *map, *edges;
    int values, lines;
    float middle;                    // the code of zero where there are negative values
    float slope[7], start[7];
    float top_slope, top_start;      // a steeper line to the edge of the value 1
    uint8_t planes[4][256];          // the values' bytes, lowest first
} StateMap;

static const float state_edges_s8[256] = {STATE_EDGES_S8}, state_edges_u8[256] = {STATE_EDGES_U8};
static const float state_edges_s4[16] = {STATE_EDGES_S4}, state_edges_u4[16] = {STATE_EDGES_U4};

static inline StateMap state_map_quick(StateFormat f, bool is_signed) {
    bool eight = f == STATE_INT8;
    StateMap q = {.map = state_map(f, is_signed), .values = eight ? 256 : 16, .lines = eight ? 7 : is_signed ? 3 : 1};
    q.edges = eight ? (is_signed ? state_edges_s8 : state_edges_u8) : is_signed ? state_edges_s4 : state_edges_u4;
    if (!eight && !is_signed) {                      // evenly spaced: code 0 is worth 1/16, its upper edge 1.5/16
        q.slope[0] = 16.0f;
        q.start[0] = -0.5f;
        return q;
    }
    if (is_signed) q.middle = (float)(q.values / 2 - 1);
    if (eight) {
        q.top_slope = is_signed ? 300.0f : 600.0f;
        q.top_start = (is_signed ? 128.2f : 255.2f) - q.edges[254] * q.top_slope;
        for (int c = 0; c < 256; c++)
            for (int b = 0; b < 4; b++) q.planes[b][c] = (uint8_t)(f32_bits(q.map[c]) >> 8 * b);
    }
    double decade = 1.0, steps = is_signed ? 1.0 : 2.0;
    for (int i = 1; i < q.lines; i++) decade /= 10.0;
    for (int i = 0; i < q.lines; i++, decade *= 10.0, steps *= 2.0) {
        double first = is_signed ? steps : steps - 1.0;                   // codes from zero's on
        q.slope[i] = (float)(steps / 0.9 / decade);
        q.start[i] = (float)(first - steps / 9.0);
    }
    if (eight) {                                     // from the edge above zero to the next one
        double e0 = q.edges[is_signed ? 127 : 0], e1 = is_signed ? 1e-6 : q.edges[1];
        q.slope[0] = (float)(0.8 / (e1 - e0));
        q.start[0] = (float)(1.2 - 0.8 * e0 / (e1 - e0));
    }
    return q;
}
// Is inlined with constant values and lines. u: at most 1 in magnitude, not NaN; below zero an unsigned code is 0.
VEC v16i state_codes16(const StateMap *q, int values, int lines, bool is_signed, v16 u) {
    v16 a = is_signed ? v16_abs(u) : v16_max(u, v16_set1(0.0f));
    v16 at = v16_fma(a, v16_set1(q->slope[0]), v16_set1(q->start[0]));
    for (int i = 1; i < lines; i++) at = v16_min(at, v16_fma(a, v16_set1(q->slope[i]), v16_set1(q->start[i])));
    at = at - v16_set1(0.25f);
    if (is_signed) at = (v16)((v16i)at ^ ((v16i)u & (int)0x80000000u)) + v16_set1(q->middle);
    v16i code = v16_truncate(at);                    // towards zero: between -1 and 0 the code is 0
    v16 edge = values == 256 ? v16_pick256(q->edges, code) : v16_pick(q->edges, code);
    return code - (u >= edge);
}
VEC v16 state_scaled16(v16 x, v16 s) { return v16_nan_to(x / s, v16_set1(0.0f)); }

// INT8 codes of n values x / s, n a multiple of 16.
VEC void state_codes8(uint8_t *codes, const StateMap *q, bool is_signed, const float *x, float s, int n) {
    int i = 0;
#ifdef QLLM_AVX512
    // x * inv is within 2^-22 of x / s, relatively, and its position within 2^-12 of the exact one: where all lanes are
    // farther than a margin of 2^-11 from an edge, codes follow from the positions alone. Else from the quotient, as
    // below; so also in blocks whose scale has a subnormal inverse. Positions are counted from a margin below zero.
    const float margin = 0x1p-11f;
    const __m512i one = _mm512_set1_epi32(1), twice = _mm512_set1_epi32((int)f32_bits(2.0f * margin));
    const v16 inv = v16_set1(1.0f / s), top_slope = v16_set1(q->top_slope), top_start = v16_set1(q->top_start + margin);
    const __m512 cap = _mm512_set1_ps(is_signed ? 128.5f : 255.5f), fifth = _mm512_set1_ps(0.2f);
    v16 slope[7], start[7];
    for (int k = 0; k < 7; k++) slope[k] = v16_set1(q->slope[k]), start[k] = v16_set1(q->start[k] + margin);
    for (; s < 0x1p100f && i < n; i += 16) {
        v16 u = v16_load(x + i, 16) * inv, a = v16_max(is_signed ? v16_abs(u) : u, v16_set1(0.0f));    // NaN: 0
        v16 line[7];
        for (int k = 0; k < 7; k++) line[k] = v16_fma(a, slope[k], start[k]);
        v16 low = v16_min(v16_min(line[0], line[1]), v16_min(line[2], line[3]));
        v16 at = v16_min(low, v16_min(v16_min(line[4], line[5]), line[6]));
        at = v16_max(at, v16_fma(a, top_slope, top_start));
        __mmask16 minus = is_signed ? _mm512_movepi32_mask((__m512i)u) : 0;
        __m512 most = is_signed ? _mm512_mask_mov_ps(cap, minus, _mm512_set1_ps(127.5f)) : cap;        // there is no -1
        at = v16_min(at, (v16)most);
        __m512i k = _mm512_cvttps_epi32((__m512)at), next = is_signed ? k : _mm512_add_epi32(k, one);
        __m512 past = _mm512_reduce_ps((__m512)at, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        __mmask16 first = _mm512_testn_epi32_mask(next, _mm512_sub_epi32(next, one));   // of a decade: powers of two
        __m512i edge = _mm512_castps_si512(_mm512_mask_sub_ps(past, first, past, fifth));
        if (__builtin_expect(_mm512_cmplt_epu32_mask(edge, twice) != 0, 0)) {           // 0 to 2 margins past an edge
            v16 exact = state_scaled16(v16_load(x + i, 16), v16_set1(s));
            v16i_store_u8(codes + i, state_codes16(q, 256, 7, is_signed, exact), 16);
            continue;
        }
        k = _mm512_mask_sub_epi32(k, _mm512_movepi32_mask(edge), k, one);               // below the late edge
        if (is_signed) k = _mm512_add_epi32(_mm512_mask_sub_epi32(k, minus, _mm512_setzero_si512(), k),
                                            _mm512_set1_epi32(127));
        v16i_store_u8(codes + i, (v16i)k, 16);
    }
#endif
    for (; i < n; i += 16)
        v16i_store_u8(codes + i,
                      state_codes16(q, 256, 7, is_signed, state_scaled16(v16_load(x + i, 16), v16_set1(s))), 16);
}

// Values of 64 INT8 codes, times s.
VEC void state_values64(float *out, const uint8_t *codes, const StateMap *q, v16 s) {
#if defined(QLLM_AVX512) && defined(__AVX512VBMI__)
    // Byte by byte, then joined: pairs and fours within parts of 16 bytes. The codes are dealt so that each quarter
    // comes out in order.
    const __m512i deal = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i k = _mm512_permutexvar_epi32(deal, _mm512_loadu_si512(codes)), b[4];
    __mmask64 upper = _mm512_movepi8_mask(k);
    for (int i = 0; i < 4; i++) {
        const uint8_t *p = q->planes[i];
        __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(p), k, _mm512_loadu_si512(p + 64));
        __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(p + 128), k, _mm512_loadu_si512(p + 192));
        b[i] = _mm512_mask_mov_epi8(low, upper, high);
    }
    __m512i l01 = _mm512_unpacklo_epi8(b[0], b[1]), h01 = _mm512_unpackhi_epi8(b[0], b[1]);
    __m512i l23 = _mm512_unpacklo_epi8(b[2], b[3]), h23 = _mm512_unpackhi_epi8(b[2], b[3]);
    v16_store(out, (v16)_mm512_unpacklo_epi16(l01, l23) * s, 16);
    v16_store(out + 16, (v16)_mm512_unpackhi_epi16(l01, l23) * s, 16);
    v16_store(out + 32, (v16)_mm512_unpacklo_epi16(h01, h23) * s, 16);
    v16_store(out + 48, (v16)_mm512_unpackhi_epi16(h01, h23) * s, 16);
#else
    for (int i = 0; i < 64; i += 16) v16_store(out + i, v16_pick256(q->map, v16i_load_u8(codes + i, 16)) * s, 16);
#endif
}

// Sixteen 4-bit codes, the first of a pair in the high nibble.
#ifdef QLLM_AVX512
VEC v16i nibbles_load(const uint8_t *p) {
    const __m128i low = _mm_set1_epi8(15);
    __m128i b = _mm_loadl_epi64((const __m128i *)(const void *)p);
    __m128i first = _mm_and_si128(_mm_srli_epi16(b, 4), low), second = _mm_and_si128(b, low);
    return (v16i)_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(first, second));
}
VEC void nibbles_store(uint8_t *p, v16i codes) {
    __m128i pairs = _mm_maddubs_epi16(_mm512_cvtepi32_epi8((__m512i)codes), _mm_set1_epi16(1 << 8 | 16));
    _mm_storel_epi64((__m128i *)(void *)p, _mm_packus_epi16(pairs, pairs));
}
#else
VEC v16i nibbles_load(const uint8_t *p) {
    v16i k;
    for (int j = 0; j < 16; j++) k[j] = p[j / 2] >> (j % 2 ? 0 : 4) & 15;
    return k;
}
VEC void nibbles_store(uint8_t *p, v16i codes) {
    for (int j = 0; j < 8; j++) p[j] = (uint8_t)(codes[2 * j] << 4 | codes[2 * j + 1]);
}
#endif
#endif
