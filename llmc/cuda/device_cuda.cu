// The GPU as device.h wants it: memory, copies, errors, and steps that become graphs.
//
// Everything but collectives (comm_nccl.cu) runs on one stream, cuda_stream, in the order in which it was asked for, so
// operations need no events among themselves, and the host waits in device_copy_out and device_sync only, and in
// device_copy_in for what is large.
#include "cuda.cuh"
#include "device.h"
#include "matmul.cuh"
#include <time.h>

#define OLDEST_CAPABILITY 80           // sm_80: bf16 mma, cp.async

cudaStream_t cuda_stream = 0;

static int capability;                 // 90 for 9.0
static int device;                     // number of the GPU

#ifdef __CUDACC__
// A kernel to ask the driver about: whether the program has code for this device.
static __global__ void probe_kernel(int *out) { *out = 1; }
#endif

static int count(void) {
    int n = 0;
    if (cudaGetDeviceCount(&n) == cudaSuccess) return n;
    (void)cudaGetLastError();
    return 0;
}

static bool available(int index, char *why, size_t size) {
    int n = 0, major = 0, minor = 0;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess || n == 0) {
        (void)cudaGetLastError();
        snprintf(why, size, "no usable GPU: %s", e != cudaSuccess ? cudaGetErrorString(e) : "the driver lists none");
        return false;
    }
    e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    if (e != cudaSuccess) {
        (void)cudaGetLastError();
        snprintf(why, size, "the GPU does not answer: %s", cudaGetErrorString(e));
        return false;
    }
    capability = 10 * major + minor;
    if (capability < OLDEST_CAPABILITY) {
        snprintf(why, size, "the GPU has compute capability %d.%d, and 8.0 or newer is needed", major, minor);
        return false;
    }
#ifdef __CUDACC__
    cudaFuncAttributes attributes;
    e = cudaSetDevice(index);
    if (e == cudaSuccess) e = cudaFuncGetAttributes(&attributes, probe_kernel);
    if (e != cudaSuccess) {
        (void)cudaGetLastError();
        snprintf(why, size, "this program has no code for compute capability %d.%d (%s); build with CUDA_ARCHS=%d",
                 major, minor, cudaGetErrorString(e), capability);
        return false;
    }
#endif
    return true;
}

static uint64_t identity_used;
static uint64_t identity(void) { return identity_used; }

static int init(int index, char *description, size_t size, Err *err) {
    cudaDeviceProp prop;
    cudaError_t e = cudaGetDeviceProperties(&prop, index);
    if (e == cudaSuccess) e = cudaSetDevice(index);
    device = index;
    if (e == cudaSuccess && !cuda_stream) e = cudaStreamCreateWithFlags(&cuda_stream, cudaStreamNonBlocking);
    if (e != cudaSuccess) return err_set(err, E_FAIL, "device cuda: %s", cudaGetErrorString(e));
    uint64_t half[2];
    memcpy(half, prop.uuid.bytes, sizeof half);
    identity_used = half[0] ^ half[1] * 0x9E3779B97F4A7C15u;
    snprintf(description, size, "%s: %s, %d multiprocessors, compute capability %d.%d, %s", ops_cuda.name, prop.name,
             prop.multiProcessorCount, prop.major, prop.minor, cuda_matmul_description());
    return 0;
}

static void enter_thread(void) { CUDA_CHECK(cudaSetDevice(device)); }

static void memory(double *free_bytes, double *total) {
    size_t f = 0, t = 0;
    CUDA_CHECK(cudaMemGetInfo(&f, &t));
    *free_bytes = (double)f;
    *total = (double)t;
}

static int alloc(void **out, size_t bytes, const char *what, Err *err) {
    cudaError_t e = cudaMalloc(out, bytes ? bytes : 1);
    if (e == cudaSuccess) e = cudaMemsetAsync(*out, 0, bytes, cuda_stream);
    if (e == cudaSuccess) return 0;
    (void)cudaGetLastError();
    if (e != cudaErrorMemoryAllocation)
        return err_set(err, E_FAIL, "%s: %zu bytes on the GPU: %s", what, bytes, cudaGetErrorString(e));
    size_t f = 0, t = 0;
    cudaMemGetInfo(&f, &t);
    return err_set(err, E_NOMEM, "%s: the GPU has no %zu bytes left (%zu of %zu are free); use a smaller batch, or "
                                 "--recompute block", what, bytes, f, t);
}

static void release(void *p) { CUDA_CHECK(cudaFree(p)); }

static void zero(void *p, size_t bytes) {
    if (bytes) CUDA_CHECK(cudaMemsetAsync(p, 0, bytes, cuda_stream));
}

// Set while there are collectives (comm_nccl.cu), which may be stuck and keep cuda_stream waiting for ever: called
// every few milliseconds while the host waits for the device, and when it has waited.
extern "C" {
extern void (*cuda_while_waiting)(void);
void (*cuda_while_waiting)(void) = nullptr;
}

static void wait(void) {
    if (!cuda_while_waiting) {
        CUDA_CHECK(cudaStreamSynchronize(cuda_stream));
        return;
    }
    const double begin = now_seconds();
    double called = begin;
    cudaError_t e;
    while ((e = cudaStreamQuery(cuda_stream)) == cudaErrorNotReady) {
        if (cudaPeekAtLastError() == cudaErrorNotReady) (void)cudaGetLastError();
        double now = now_seconds();
        if (now - called > 2e-3) {
            cuda_while_waiting();
            called = now;
        }
        // At first without sleep, then a few per cent of what has passed: short waits end at once.
        double nap = 0.05 * (now - begin);
        struct timespec t = {0, nap < 200e-6 ? (long)(1e9 * nap) : 200000};
        if (now - begin > 50e-6) nanosleep(&t, nullptr);
    }
    if (e != cudaSuccess)
        ops_set_error(E_FAIL, "%s:%d: waiting for the GPU: %s", __FILE__, __LINE__, cudaGetErrorString(e));
    cuda_while_waiting();
}
// A copy from or to memory that is not page-locked may keep the host in the driver until the stream has got there.
static void wait_before_copy(void) {
    if (cuda_while_waiting) wait();
}
// The host's bytes may change as soon as this returns, but a driver does not promise to have read memory by then that is
// not page-locked. So small copies go by way of page-locked memory, round and round, and the host waits once a round;
// large ones, which are weights being loaded, are waited for.
static void copy_in(void *dev, const void *host, size_t bytes) {
    static char *stage;
    static size_t used;
    const size_t size = (size_t)1 << 20;
    if (!bytes) return;
    if (!stage && cudaMallocHost((void **)&stage, size) != cudaSuccess) {
        (void)cudaGetLastError();
        stage = nullptr;
    }
    if (!stage || bytes > size / 2) {
        wait_before_copy();
        CUDA_CHECK(cudaMemcpyAsync(dev, host, bytes, cudaMemcpyHostToDevice, cuda_stream));
        wait();
        return;
    }
    if (bytes > size - used) {
        wait();                        // what was staged has arrived
        used = 0;
    }
    memcpy(stage + used, host, bytes);
    CUDA_CHECK(cudaMemcpyAsync(dev, stage + used, bytes, cudaMemcpyHostToDevice, cuda_stream));
    used += (bytes + 255) / 256 * 256;
    if (used > size) used = size;
}
static void copy_out(void *host, const void *dev, size_t bytes) {
    if (!bytes) return;
    wait_before_copy();
    CUDA_CHECK(cudaMemcpyAsync(host, dev, bytes, cudaMemcpyDeviceToHost, cuda_stream));
    wait();
}

// ---------------------------------------------------------------------------------------------
// Steps. The first run of a key is eager: working memory grows and matmuls choose their algorithms, which a recording
// may not do. The second is recorded.
static struct {
    uint64_t key;
    int runs;
    cudaGraphExec_t exec;
} recorded;

static bool record(void (*step)(void *ctx), void *ctx) {
    cudaGraph_t graph = nullptr;
    CUDA_CHECK(cudaStreamBeginCapture(cuda_stream, cudaStreamCaptureModeThreadLocal));
    step(ctx);
    cudaError_t e = cudaStreamEndCapture(cuda_stream, &graph);
    if (e == cudaSuccess) e = cudaGraphInstantiateWithFlags(&recorded.exec, graph, 0);
    if (graph) CUDA_CHECK(cudaGraphDestroy(graph));
    if (e == cudaSuccess) return true;
    ops_set_error(E_FAIL, "recording a step as a graph: %s; QLLM_NO_GRAPH=1 runs without", cudaGetErrorString(e));
    return false;
}

static void run_step(uint64_t key, void (*step)(void *ctx), void *ctx) {
    const char *off = getenv("QLLM_NO_GRAPH");
    if (off && *off && *off != '0') {
        step(ctx);
        return;
    }
    if (recorded.runs == 0 || recorded.key != key) {
        if (recorded.exec) CUDA_CHECK(cudaGraphExecDestroy(recorded.exec));
        recorded.exec = nullptr;
        recorded.key = key;
        recorded.runs = 1;
        step(ctx);
        return;
    }
    if (!recorded.exec && !record(step, ctx)) return;
    recorded.runs++;
    CUDA_CHECK(cudaGraphLaunch(recorded.exec, cuda_stream));
}

// ---------------------------------------------------------------------------------------------

static double peak_flops(const char **source) {
    static double best;
    if (source) *source = "best matmul of the build's type on this GPU";
    if (best <= 0) best = cuda_matmul_peak();
    return best;
}

// ---------------------------------------------------------------------------------------------
// Time marks are events. An event knows its distance to another one only, in single precision: distances are taken to
// an event made when the marks are read, whose time the host sees, so that they are short and do not add up.
static cudaEvent_t marks[DEVICE_MARKS];        // made when first used, then used again
static int n_marks;

int cuda_mark(cudaStream_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    if (n_marks == DEVICE_MARKS || cudaStreamIsCapturing(stream, &status) != cudaSuccess ||
        status != cudaStreamCaptureStatusNone) return -1;
    if (!marks[n_marks] && cudaEventCreateWithFlags(&marks[n_marks], cudaEventDefault) != cudaSuccess) {
        (void)cudaGetLastError();
        marks[n_marks] = nullptr;
        return -1;
    }
    CUDA_CHECK(cudaEventRecord(marks[n_marks], stream));
    return n_marks++;
}
static int mark(void) { return cuda_mark(cuda_stream); }

static int marks_read(double *seconds) {
    static cudaEvent_t anchor;
    int n = n_marks;
    n_marks = 0;
    if (!n) return 0;
    if (!anchor) CUDA_CHECK(cudaEventCreateWithFlags(&anchor, cudaEventDefault));
    wait();
    CUDA_CHECK(cudaDeviceSynchronize());       // marks stand on more than one stream
    double before = now_seconds();
    CUDA_CHECK(cudaEventRecord(anchor, cuda_stream));
    CUDA_CHECK(cudaEventSynchronize(anchor));
    double now = 0.5 * (before + now_seconds());
    for (int i = 0; i < n; i++) {
        float ms = 0.0f;
        CUDA_CHECK(cudaEventElapsedTime(&ms, marks[i], anchor));
        seconds[i] = now - 1e-3 * (double)ms;
    }
    return n;
}

void *cuda_workspace(size_t bytes, CudaWorkspace which) {
    static void *pointers[2];
    static size_t sizes[2];
    void *&p = pointers[which];
    size_t &size = sizes[which];
    if (bytes <= size) return p;
    wait();                            // what still runs may use the old one,
    recorded.runs = 0;                 // and so would a recorded step: it begins anew
    CUDA_CHECK(cudaFree(p));
    p = nullptr;
    size = 0;
    cudaError_t e = cudaMalloc(&p, bytes);
    if (e != cudaSuccess) {
        (void)cudaGetLastError();
        p = nullptr;
        ops_set_error(e == cudaErrorMemoryAllocation ? E_NOMEM : E_FAIL,
                      "working memory of an operation, %zu bytes: %s; use a smaller batch", bytes,
                      cudaGetErrorString(e));
        return nullptr;
    }
    size = bytes;
    return p;
}

extern "C" {
extern const DeviceWing device_wing_cuda;
const DeviceWing device_wing_cuda = {&ops_cuda, count,    available, init,     enter_thread, identity,
                                     memory,    alloc,    release,   zero,     copy_in,      copy_out,
                                     wait,      run_step, peak_flops, mark,    marks_read};
}
