// The CPU wing's table.
#include "cpu.h"
#include <stdlib.h>

#define ENTRY(name) .name = cpu_##name,
const Ops ops_cpu = {.name = "cpu", QLLM_OPS(ENTRY)};

typedef struct { void *memory; size_t capacity; } Buffer;

static void *grown(Buffer *b, size_t bytes) {
    if (bytes <= b->capacity) return b->memory;
    free(b->memory);
    b->capacity = 0;
    size_t want = (bytes + 4095) / 4096 * 4096;
    b->memory = aligned_alloc(4096, want);
    if (!b->memory) ops_set_error(E_NOMEM, "no memory for %zu bytes of scratch", want);
    else b->capacity = want;
    return b->memory;
}

void *cpu_workspace(size_t bytes) {
    static Buffer buffer;
    return grown(&buffer, bytes);
}

void *cpu_workspace_outer(size_t bytes) {
    static Buffer buffer;
    return grown(&buffer, bytes);
}
