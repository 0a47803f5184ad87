// What the processor has.
#include "isa.h"
#include <stdlib.h>
#include <string.h>

static const char *const names[] = {"plain", "avx2", "avx512", "avx512-bf16"};
static int chosen = -1;

static CpuIsa widest(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return ISA_PLAIN;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512vnni"))
        return ISA_AVX2;
    return __builtin_cpu_supports("avx512bf16") ? ISA_AVX512_BF16 : ISA_AVX512;
#else
    return ISA_PLAIN;
#endif
}

CpuIsa cpu_isa(void) {
    if (chosen >= 0) return (CpuIsa)chosen;
    CpuIsa best = widest();
    const char *asked = getenv("QLLM_ISA");
    for (int i = 0; asked && i < (int)best; i++)
        if (!strcmp(asked, names[i])) best = (CpuIsa)i;
    chosen = (int)best;
    return best;
}

bool cpu_isa_use(CpuIsa isa) {
    if (isa > widest()) return false;
    chosen = (int)isa;
    return true;
}

const char *cpu_isa_name(CpuIsa isa) { return names[isa]; }
