// Which instructions this processor has, for kernels that are built in several forms whatever -march says. Integer
// products give the same bits in all forms; sums in f32 are held to the same bound.
#ifndef QLLM_CPU_ISA_H
#define QLLM_CPU_ISA_H
#include <stdbool.h>

// PLAIN: C. AVX2: with FMA. AVX512: F, BW, DQ, VL, VNNI. AVX512_BF16: and vdpbf16ps.
typedef enum { ISA_PLAIN, ISA_AVX2, ISA_AVX512, ISA_AVX512_BF16 } CpuIsa;

// The widest that the processor has, or the narrower one that QLLM_ISA=plain|avx2|avx512 in the environment names; read
// once.
CpuIsa cpu_isa(void);
// For tests: this form from now on, where the processor has it. Returns false where it does not.
bool cpu_isa_use(CpuIsa isa);
const char *cpu_isa_name(CpuIsa isa);
#endif
