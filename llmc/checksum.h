// A checksum of 64 bits at the speed of memory, for bytes that disks and networks may change (not for bytes that an
// adversary chooses). Eight lanes take turns with the words of the input, so that a core's multipliers are never idle.
// doc/formats.md gives the formula. Every step is invertible in the word and in the lane, so a change within one word,
// were it one bit, always changes the result.
#ifndef QLLM_CHECKSUM_H
#define QLLM_CHECKSUM_H
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    uint64_t lane[8], bytes;
    uint8_t rest[64];                    // bytes % 64 of them wait for more
} Checksum;

void checksum_begin(Checksum *s);
void checksum_add(Checksum *s, const void *data, size_t bytes);   // in pieces of any size
uint64_t checksum_end(const Checksum *s);
uint64_t checksum_of(const void *data, size_t bytes);
#ifdef __cplusplus
}
#endif
#endif
