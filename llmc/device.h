// Picks a backend and hands out its memory.
#ifndef QLLM_DEVICE_H
#define QLLM_DEVICE_H
#include "ops.h"
#ifdef __cplusplus
extern "C" {
#endif

// name: "auto" or "cpu" ("cuda" where the program was built with it). threads: 0 for all cores. Sets `ops`.
int device_init(const char *name, int threads, Err *err);
int device_threads(void);
const char *device_description(void);                       // "cpu: AMD EPYC ..., 2 threads, oneDNN 2.6.3 bf16"
// Zeroed memory on the device; `what` names it in the message when there is none left.
int device_alloc(void **out, size_t bytes, const char *what, Err *err);
void device_free(void *p);
void device_zero(void *p, size_t bytes);
void device_copy_in(void *dev, const void *host, size_t bytes);
void device_copy_out(void *host, const void *dev, size_t bytes);
// Waits for the device, then returns and clears the first error any operation met.
int device_sync(Err *err);
// Measured peak in FLOP/s of the widest multiply-add of the build's type, register only (cached per process), and what
// it is ("avx512-bf16 vdpbf16ps"). On the CPU about 0.2 s.
double device_peak_flops(const char **source);
#ifdef __cplusplus
}
#endif
#endif
