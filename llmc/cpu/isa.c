// What the processor has.
#include "isa.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const names[] = {"plain", "avx2", "avx512", "avx512-bf16"};
static _Atomic int chosen = -1;         // the first to ask may be one of several threads: all find the same

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
    int i = 0;
    while (asked && i <= (int)best && strcmp(asked, names[i])) i++;
    if (asked && i > (int)best)
        fprintf(stderr, "warning: QLLM_ISA=%.40s is not one of this processor's; taking %s\n", asked, names[best]);
    else if (asked) best = (CpuIsa)i;
    chosen = (int)best;
    return best;
}

bool cpu_isa_use(CpuIsa isa) {
    if (isa > widest()) return false;
    chosen = (int)isa;
    return true;
}

const char *cpu_isa_name(CpuIsa isa) { return names[isa]; }
