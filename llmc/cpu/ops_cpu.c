// The CPU wing's table.
#include "cpu.h"

#define ENTRY(name) .name = cpu_##name,
const Ops ops_cpu = {.name = "cpu", QLLM_OPS(ENTRY)};
