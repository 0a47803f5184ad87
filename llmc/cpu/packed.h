// Codes in memory (quant.h), sixteen at a time.
#ifndef QLLM_CPU_PACKED_H
#define QLLM_CPU_PACKED_H
#include "cpu.h"

// How sixteen codes come out of their 2 * bits bytes. Code i begins at bit i * bits, in byte i * bits / 8, and ends
// there or in the next one. With AVX-512 each 32-bit lane takes these two bytes, shifts the code to its top, and back
// down.
typedef struct {
    int bits, sign;
#ifdef QLLM_AVX512
    __m512i pick, up, down;
#endif
} Unpack;

static inline Unpack unpack_init(int bits, int sign) {
    Unpack u = {.bits = bits, .sign = sign};
#ifdef QLLM_AVX512
    uint32_t pick[16], up[16], down[16];
    for (uint32_t i = 0, b = (uint32_t)bits; i < 16; i++) {
        uint32_t byte = i * b / 8, next = byte + 1 < 2 * b ? byte + 1 : byte;
        pick[i] = byte | next << 8 | 0x80800000u;           // an index with its top bit set picks a zero
        up[i] = 32 - b - i * b % 8;
        down[i] = 32 - b;
    }
    u.pick = _mm512_loadu_si512(pick);
    u.up = _mm512_loadu_si512(up);
    u.down = _mm512_loadu_si512(down);
#endif
    return u;
}

// Sixteen bytes of a row, of which `left` are still in it; zeros stand for the others.
#ifdef QLLM_AVX512
typedef __m128i Bytes16;
VEC Bytes16 bytes16(const uint8_t *src, size_t left) {
    if (__builtin_expect(left >= 16, 1)) return _mm_loadu_si128((const __m128i *)(const void *)src);
    return _mm_maskz_loadu_epi8(v16_mask((int)left), src);
}
VEC v16 unpack16(const uint8_t *src, size_t left, const Unpack *u) {
    __m512i w = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes16(src, left)), u->pick);
    w = _mm512_sllv_epi32(w, u->up);
    return (v16)_mm512_cvtepi32_ps(u->sign ? _mm512_srav_epi32(w, u->down) : _mm512_srlv_epi32(w, u->down));
}
#else
typedef struct { uint8_t b[16]; } Bytes16;
VEC Bytes16 bytes16(const uint8_t *src, size_t left) {
    Bytes16 v = {{0}};
    memcpy(v.b, src, left < 16 ? left : 16);
    return v;
}
VEC v16 unpack16(const uint8_t *src, size_t left, const Unpack *u) {
    Bytes16 bytes = bytes16(src, left);
    v16 v;
    for (int i = 0; i < 16; i++) {
        int at = i * u->bits, byte = at / 8, next = byte + 1 < 2 * u->bits ? byte + 1 : byte;
        int field = (bytes.b[byte] | bytes.b[next] << 8) >> (at % 8) & ((1 << u->bits) - 1);
        v[i] = (float)((field ^ u->sign) - u->sign);
    }
    return v;
}
#endif

// The way back: sixteen codes to 2 * bits bytes. Neighbours are added up, the right one shifted: two, four, and eight
// codes in 64 bits, whose bytes are then moved together.
typedef struct {
    int bits;
#ifdef QLLM_AVX512
    __m128i mask, pairs, fours, eights, together;
#endif
} Pack;

static inline Pack pack_init(int bits) {
    Pack p = {.bits = bits};
#ifdef QLLM_AVX512
    uint8_t together[16];
    for (int i = 0; i < 16; i++) together[i] = (uint8_t)(i < bits ? i : i < 2 * bits ? 8 + i - bits : 0x80);
    p.mask = _mm_set1_epi8((char)((1 << bits) - 1));
    p.pairs = _mm_set1_epi16((short)(1 | (1 << bits) << 8));
    p.fours = _mm_set1_epi32((int)(1u | (1u << 2 * bits) << 16));
    p.eights = _mm_cvtsi32_si128(4 * bits);
    p.together = _mm_loadu_si128((const __m128i *)(const void *)together);
#endif
    return p;
}

// n codes (whole numbers in f32) to (n * bits + 7) / 8 bytes at dst; bits behind the last one are 0. bits: p->bits, a
// constant where there is a loop of its own.
#ifdef QLLM_AVX512
VEC void pack16(uint8_t *dst, v16 q, int n, int bits, const Pack *p) {
    __m128i b = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)q));
    if (n < 16) b = _mm_maskz_mov_epi8(v16_mask(n), b);
    if (bits < 8) {
        b = _mm_maddubs_epi16(p->pairs, _mm_and_si128(b, p->mask));
        if (bits == 4) {
            b = _mm_packus_epi16(b, b);
        } else {
            b = _mm_madd_epi16(b, p->fours);
            __m128i right = _mm_sll_epi64(_mm_srli_epi64(b, 32), p->eights);
            b = _mm_or_si128(_mm_and_si128(b, _mm_set1_epi64x(0xffffffff)), right);
            b = _mm_shuffle_epi8(b, p->together);
        }
    }
    if (n == 16 && bits == 8) _mm_storeu_si128((__m128i *)(void *)dst, b);
    else if (n == 16 && bits == 4) _mm_storel_epi64((__m128i *)(void *)dst, b);
    else _mm_mask_storeu_epi8(dst, v16_mask((n * bits + 7) / 8), b);
}
#else
VEC void pack16(uint8_t *dst, v16 q, int n, int bits, const Pack *p) {
    uint8_t bytes[24];
    uint64_t mask = (1u << bits) - 1;
    (void)p;
    for (int half = 0; half < 16; half += 8) {
        uint64_t eight = 0;
        for (int i = 0; i < 8; i++)
            if (half + i < n) eight |= ((uint64_t)(int64_t)q[half + i] & mask) << i * bits;
        memcpy(bytes + half / 8 * bits, &eight, sizeof eight);
    }
    memcpy(dst, bytes, (size_t)((n * bits + 7) / 8));
}
#endif

// How the codes of one tensor are read.
typedef struct {
    int bits, sign;             // sign: value of the sign bit, 0 when unsigned
    size_t row_bytes;
    int64_t b0, b1, across;     // rows and columns of a block, blocks across a row
    Unpack unpack;
} Packed;

static inline int packed_init(Packed *p, const QuantSpec *s, int64_t rows, int64_t cols) {
    int64_t block[2];
    Err err;
    if (quant_block_shape(s, rows, cols, block, &err) < 0) {
        ops_set_error(err.code, "%s", err.text);
        return err.code;
    }
    *p = (Packed){.bits = s->bits, .sign = s->is_unsigned ? 0 : 1 << (s->bits - 1),
                  .row_bytes = quant_row_bytes(s->bits, cols), .b0 = block[0], .b1 = block[1],
                  .across = cols / block[1]};
    p->unpack = unpack_init(p->bits, p->sign);
    return 0;
}
#endif
