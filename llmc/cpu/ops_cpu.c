// The CPU wing's table.
#include "cpu.h"
#include <stdlib.h>

#define ENTRY(name) .name = cpu_##name,
const Ops ops_cpu = {.name = "cpu", QLLM_OPS(ENTRY)};

void *cpu_workspace(size_t bytes) {
    static void *buffer;
    static size_t capacity;
    if (bytes <= capacity) return buffer;
    free(buffer);
    capacity = 0;
    size_t want = (bytes + 4095) / 4096 * 4096;
    buffer = aligned_alloc(4096, want);
    if (!buffer) ops_set_error(E_NOMEM, "no memory for %zu bytes of scratch", want);
    else capacity = want;
    return buffer;
}
