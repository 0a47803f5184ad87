#include "checksum.h"
#include <string.h>

// The fractions of the square roots of 2 and 3, made odd.
#define A 0x6a09e667f3bcc909ull
#define B 0xbb67ae8584caa73bull

static inline uint64_t mix(uint64_t h, uint64_t word) {
    h += word * A;
    return (h << 27 | h >> 37) * B;
}

static void stripes(uint64_t lane[8], const uint8_t *p, size_t n) {
    uint64_t h[8];
    memcpy(h, lane, sizeof h);
    for (; n; n--, p += 64) {
        uint64_t word[8];
        memcpy(word, p, sizeof word);
        for (int k = 0; k < 8; k++) h[k] = mix(h[k], word[k]);
    }
    memcpy(lane, h, sizeof h);
}

void checksum_begin(Checksum *s) {
    memset(s, 0, sizeof *s);
    for (int k = 0; k < 8; k++) s->lane[k] = A * (uint64_t)(k + 1);
}

void checksum_add(Checksum *s, const void *data, size_t bytes) {
    const uint8_t *p = data;
    if (!bytes) return;                                          // data may be NULL, which memcpy may not get
    size_t waiting = s->bytes % 64;
    s->bytes += bytes;
    if (waiting) {
        size_t n = bytes < 64 - waiting ? bytes : 64 - waiting;
        memcpy(s->rest + waiting, p, n);
        if (waiting + n < 64) return;
        stripes(s->lane, s->rest, 1);
        p += n;
        bytes -= n;
    }
    stripes(s->lane, p, bytes / 64);
    if (bytes % 64) memcpy(s->rest, p + bytes / 64 * 64, bytes % 64);
}

uint64_t checksum_end(const Checksum *s) {
    Checksum last = *s;
    size_t waiting = s->bytes % 64;
    if (waiting) {
        memset(last.rest + waiting, 0, 64 - waiting);
        stripes(last.lane, last.rest, 1);
    }
    uint64_t h = s->bytes;
    for (int k = 0; k < 8; k++) h = mix(h, last.lane[k]);
    h = (h ^ h >> 32) * A;
    return h ^ h >> 29;
}

uint64_t checksum_of(const void *data, size_t bytes) {
    Checksum s;
    checksum_begin(&s);
    checksum_add(&s, data, bytes);
    return checksum_end(&s);
}
