// rng.h's Philox, many blocks at once: the same bits.
#ifndef QLLM_CPU_PHILOX_H
#define QLLM_CPU_PHILOX_H
#include "rng.h"
#include "vec.h"

// Values that philox_fill makes at a time.
enum { PHILOX_GROUP = 128 };

typedef uint64_t v8u __attribute__((vector_size(64)));

VEC v8u v8u_set1(uint64_t x) { return (v8u){x, x, x, x, x, x, x, x}; }
// Products of the lower halves.
VEC v8u v8u_mul32(v8u a, v8u b) {
#ifdef QLLM_AVX512
    return (v8u)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// The keys of ten rounds, in all lanes.
typedef struct { v8u k[20]; } PhiloxKeys;

VEC void philox_keys(PhiloxKeys *keys, uint64_t seed) {
    for (uint32_t round = 0; round < 10; round++) {
        keys->k[2 * round] = v8u_set1((uint32_t)seed + round * 0x9E3779B9u);
        keys->k[2 * round + 1] = v8u_set1((uint32_t)(seed >> 32) + round * 0xBB67AE85u);
    }
}

// Thirty-two blocks from `block` on: 128 words, four a block. The counters are 32-bit numbers in 64-bit lanes, whose
// upper halves hold rests: a product leaves its lower half where it is needed next. Four chains of eight blocks at a
// time, since in each of them every operation waits for the one before.
VEC void philox32(uint32_t *out, const PhiloxKeys *keys, uint64_t stream, uint64_t block) {
    v8u c0[4], c1[4], c2[4], c3[4];
    for (int j = 0; j < 4; j++) {
        // Even lanes hold blocks 0 to 3, odd ones 4 to 7: pairs of words then come out in order.
        c0[j] = v8u_set1(block + 8 * (uint64_t)j) + (v8u){0, 4, 1, 5, 2, 6, 3, 7};
        c1[j] = c0[j] >> 32;
        c2[j] = v8u_set1(stream);
        c3[j] = v8u_set1(stream >> 32);
    }
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++)
        for (int j = 0; j < 4; j++) {
            v8u p0 = v8u_mul32(c0[j], v8u_set1(0xD2511F53u)), p1 = v8u_mul32(c2[j], v8u_set1(0xCD9E8D57u));
            c0[j] = (p1 >> 32) ^ c1[j] ^ keys->k[2 * round];
            c2[j] = (p0 >> 32) ^ c3[j] ^ keys->k[2 * round + 1];
            c1[j] = p1;
            c3[j] = p0;
        }
    for (int j = 0; j < 4; j++) {
        v8u lower = v8u_set1(0xffffffffu);
        v8u first = (c0[j] & lower) | c1[j] << 32, second = (c2[j] & lower) | c3[j] << 32;
        v8u even = __builtin_shuffle(first, second, (v8u){0, 8, 2, 10, 4, 12, 6, 14});
        v8u odd = __builtin_shuffle(first, second, (v8u){1, 9, 3, 11, 5, 13, 7, 15});
        memcpy(out + 32 * j, &even, sizeof even);
        memcpy(out + 32 * j + 16, &odd, sizeof odd);
    }
}

// At least n words of blocks from `block` on, in multiples of PHILOX_GROUP.
VEC void philox_fill(uint32_t *out, const PhiloxKeys *keys, uint64_t stream, uint64_t block, int n) {
    for (int i = 0; i < n; i += PHILOX_GROUP) philox32(out + i, keys, stream, block + (uint64_t)i / 4);
}
#endif
