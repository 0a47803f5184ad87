// Picks a backend and hands out its memory.
#ifndef QLLM_DEVICE_H
#define QLLM_DEVICE_H
#include "ops.h"
#ifdef __cplusplus
extern "C" {
#endif

// name: "auto" (a GPU that the build and the machine have, else the CPU), "cpu" or "cuda". threads: of the CPU wing, 0
// for all cores. Sets `ops`. "cuda" where there is no usable GPU is E_FAIL with the reason.
int device_init(const char *name, int threads, Err *err);
int device_threads(void);
const char *device_description(void);                       // "cpu: AMD EPYC ..., 2 threads, oneDNN 2.6.3 bf16"
// Whether the host may read and write device memory: true of the CPU.
bool device_is_host(void);
// Bytes that device_alloc could hand out now, and bytes there are in all.
void device_memory(double *available, double *total);
// Zeroed memory on the device; `what` names it in the message when there is none left.
int device_alloc(void **out, size_t bytes, const char *what, Err *err);
void device_free(void *p);
void device_zero(void *p, size_t bytes);
// Copies run in order with the operations. in: the host's bytes may change as soon as it returns. out: waits.
void device_copy_in(void *dev, const void *host, size_t bytes);
void device_copy_out(void *host, const void *dev, size_t bytes);
void device_wait(void);
// Waits for the device, then returns and clears the first error any operation met.
int device_sync(Err *err);
// Runs step(ctx), which calls operations and device_zero on the same memory in the same order each time. A GPU records
// it as a graph the second time it meets the same key and replays the graph from then on, which spares the cost of
// launching each kernel. Another key means that the step changed. QLLM_NO_GRAPH=1 in the environment turns that off.
void device_step(uint64_t key, void (*step)(void *ctx), void *ctx);
// Measured peak in FLOP/s (cached per process) and what it is: on the CPU the widest multiply-add of the build's type,
// register only ("avx512-bf16 vdpbf16ps", about 0.2 s); on a GPU the best bf16 matmul.
double device_peak_flops(const char **source);

// What a wing other than the CPU's brings; llmc/cuda/device_cuda.cu fills it in where it is linked.
typedef struct {
    const Ops *ops;
    // Whether there is a device that the wing can use; if not, why.
    bool (*available)(char *why, size_t size);
    int (*init)(char *description, size_t size, Err *err);
    void (*memory)(double *available, double *total);
    int (*alloc)(void **out, size_t bytes, const char *what, Err *err);
    void (*free)(void *p);
    void (*zero)(void *p, size_t bytes);
    void (*copy_in)(void *dev, const void *host, size_t bytes);
    void (*copy_out)(void *host, const void *dev, size_t bytes);
    void (*wait)(void);                  // reports through ops_set_error
    void (*step)(uint64_t key, void (*step)(void *ctx), void *ctx);
    double (*peak_flops)(const char **source);
} DeviceWing;
#ifdef __cplusplus
}
#endif
#endif
