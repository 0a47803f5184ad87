// Picks a backend and hands out its memory.
#ifndef QLLM_DEVICE_H
#define QLLM_DEVICE_H
#include "ops.h"
#ifdef __cplusplus
extern "C" {
#endif

// Before device_init, in a program of several ranks: this is rank local_rank of the local_size on this machine. Of its
// n GPUs it takes number local_rank % n, and device_memory tells this rank's part of what ranks share: a GPU, or the
// memory of the host. A program that never calls it is alone and takes GPU 0.
void device_choose(int local_rank, int local_size);
// name: "auto" (a GPU that the build and the machine have, else the CPU), "cpu" or "cuda". threads: of the CPU wing, 0
// for all cores. Sets `ops`. "cuda" where there is no usable GPU is E_FAIL with the reason.
int device_init(const char *name, int threads, Err *err);
int device_threads(void);
int device_index(void);                                     // number of the GPU, -1 on the CPU
uint64_t device_identity(void);                             // the same for the same GPU of a machine only; 0 on the CPU
// Ranks that compute on this device, this one included: as device_choose lets it suppose, until they have told each other
// (a launcher may show each rank another GPU as its only one).
int device_sharers(void);
void device_shared_by(int ranks);
// A thread that did not call device_init calls this before it touches the device's memory.
void device_enter_thread(void);
const char *device_description(void);                       // "cpu: AMD EPYC ..., 2 threads, oneDNN 2.6.3 bf16"
// Whether the host may read and write device memory: true of the CPU.
bool device_is_host(void);
// Bytes that device_alloc could hand out now, and bytes there are in all, both divided by the ranks that share them.
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


// Time marks, for profiles. A mark is reached when all that was asked of the device before it is done; setting one
// waits for nothing. Marks are numbered from 0 since device_marks_read, at most DEVICE_MARKS of them; -1: there is no
// room, or a step is being recorded. Only the thread that computes sets and reads them.
#define DEVICE_MARKS 16384
int device_mark(void);
// Waits for the device, writes the time of each mark, in seconds on now_seconds()'s clock, and begins anew. Returns how
// many there were.
int device_marks_read(double seconds[DEVICE_MARKS]);
// A wing that computes or copies beside the operations tells whoever profiles, if anybody does (else NULL): what (text
// that stays) was done between two marks.
extern void (*device_span)(const char *what, int begin, int end);

// What a wing other than the CPU's brings; llmc/cuda/device_cuda.cu fills it in where it is linked.
typedef struct {
    const Ops *ops;
    int (*count)(void);                  // devices
    // Whether device number `index` is one that the wing can use; if not, why.
    bool (*available)(int index, char *why, size_t size);
    int (*init)(int index, char *description, size_t size, Err *err);
    void (*enter_thread)(void);
    uint64_t (*identity)(void);
    void (*memory)(double *available, double *total);
    int (*alloc)(void **out, size_t bytes, const char *what, Err *err);
    void (*free)(void *p);
    void (*zero)(void *p, size_t bytes);
    void (*copy_in)(void *dev, const void *host, size_t bytes);
    void (*copy_out)(void *host, const void *dev, size_t bytes);
    void (*wait)(void);                  // reports through ops_set_error
    void (*step)(uint64_t key, void (*step)(void *ctx), void *ctx);
    double (*peak_flops)(const char **source);
    int (*mark)(void);
    int (*marks_read)(double *seconds);
} DeviceWing;
#ifdef __cplusplus
}
#endif
#endif
