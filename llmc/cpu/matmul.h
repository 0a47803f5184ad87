// What device.c tells the user about the matmuls of the CPU wing.
#ifndef QLLM_CPU_MATMUL_H
#define QLLM_CPU_MATMUL_H
// "oneDNN 2.6.3 bf16", "oneDNN 2.6.3 fp32" (also in a bf16 build on a processor without AVX512-BF16: operands are
// widened first) or "built-in matmul".
const char *cpu_matmul_description(void);
#endif
