// The first byte picks what the rest is: the lines of a .jsonl file, or a token shard.
#include <stdlib.h>
#include <string.h>
#include "dataloader.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (!size) return 0;
    int what = data[0] & 1;
    Err err;
    data++;
    size--;
    if (what) {
        const uint8_t *tokens;
        size_t n;
        int width;
        uint64_t sum = 0;
        if (shard_parse(data, size, "shard", &tokens, &n, &width, &err) < 0) return 0;
        for (size_t i = 0; i < n * (size_t)width; i++) sum += tokens[i];
        if (sum > (uint64_t)size * 255) abort();
        return 0;
    }
    for (size_t at = 0, end, line = 1; at < size; at = end + 1, line++) {
        const uint8_t *nl = memchr(data + at, '\n', size - at);
        char *text;
        size_t len;
        end = nl ? (size_t)(nl - data) : size;
        if (jsonl_text((const char *)data + at, end - at, "lines", line, &text, &len, &err) < 0) continue;
        if (text && strlen(text) != len) abort();
        free(text);
    }
    return 0;
}
