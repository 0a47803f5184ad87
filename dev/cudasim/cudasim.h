// cudasim: runs CUDA kernels on the CPU, so that every .cu file is compiled, run and sanitized where there is no GPU.
// A .cu file includes llmc/cuda/cuda.cuh, which includes this header when the compiler is not nvcc. README.md here says
// how it works, what it catches and what it cannot. Compile with g++ -std=c++17 -x c++, link cudasim.cpp.
//
// What a kernel may use is what stands here, and no more: what is missing does not compile, rather than behave
// differently.
#ifndef CUDASIM_H
#define CUDASIM_H
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

// ---------------------------------------------------------------------------------------------
// Language.

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __constant__ static
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// One block runs at a time on one thread of the system, so a static variable is a block's shared memory. A thread-local
// one can be found by the run time, which poisons them all before each block. (A section of their own would do as well,
// but g++ ignores section attributes in templates.) AddressSanitizer guards only those that are not thread-local, so
// under it shared arrays have guards and no poison.
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static
#else
#define __shared__ static __thread
#endif

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };

extern uint3 threadIdx, blockIdx;      // of the running thread: set at every switch
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---------------------------------------------------------------------------------------------
// Runtime. Device memory is protected while no kernel runs: host code that touches it is stopped, as on a GPU.

enum cudaError_t {
    cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidMemcpyDirection = 21, cudaErrorNoDevice = 100, cudaErrorInvalidDevice = 101,
    cudaErrorInvalidResourceHandle = 400, cudaErrorIllegalState = 401, cudaErrorNotReady = 600,
    cudaErrorStreamCaptureUnsupported = 900, cudaErrorStreamCaptureInvalidated = 901,
    cudaErrorStreamCaptureUnmatched = 903, cudaErrorStreamCaptureUnjoined = 904,
    cudaErrorStreamCaptureIsolation = 905, cudaErrorStreamCaptureImplicit = 906, cudaErrorCapturedEvent = 907
};
enum cudaMemcpyKind : int {
    cudaMemcpyHostToHost = 0, cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
typedef struct CudasimStream *cudaStream_t;
typedef struct CudasimEvent *cudaEvent_t;
typedef struct CudasimGraph *cudaGraph_t;
typedef struct CudasimGraphExec *cudaGraphExec_t;

cudaError_t cudaMalloc(void **p, size_t bytes);                     // poisoned, not zeroed
cudaError_t cudaFree(void *p);
cudaError_t cudaMallocHost(void **p, size_t bytes);                 // what asynchronous copies read and write late
cudaError_t cudaFreeHost(void *p);
cudaError_t cudaMemcpy(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemset(void *p, int byte, size_t bytes);
cudaError_t cudaGetLastError(void);                                 // and clears it
cudaError_t cudaPeekAtLastError(void);
cudaError_t cudaDeviceSynchronize(void);
const char *cudaGetErrorString(cudaError_t e);
const char *cudaGetErrorName(cudaError_t e);

// The device: of compute capability 8.0, with few multiprocessors, so that kernels which fill the GPU with blocks loop in
// tests. CUDASIM_DEVICES in the environment says how many there are, of which a process uses one; 0 takes it away.
// CUDASIM_MEMORY sets a device's bytes (the machine's).
struct cudaUUID_t { char bytes[16]; };
struct cudaDeviceProp {
    char name[256];
    cudaUUID_t uuid;                            // CUDASIM_FIRST (0) + index: as if CUDA_VISIBLE_DEVICES began there
    int major, minor, multiProcessorCount, l2CacheSize, warpSize, maxThreadsPerBlock, maxThreadsPerMultiProcessor;
    int regsPerBlock, regsPerMultiprocessor, memoryBusWidth, ECCEnabled, integrated;
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
};
enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1, cudaDevAttrMaxSharedMemoryPerBlock = 8, cudaDevAttrWarpSize = 10,
    cudaDevAttrMultiProcessorCount = 16, cudaDevAttrL2CacheSize = 38, cudaDevAttrMaxThreadsPerMultiProcessor = 39,
    cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
cudaError_t cudaGetDeviceCount(int *n);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device);
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes);
cudaError_t cudaRuntimeGetVersion(int *version);
cudaError_t cudaDriverGetVersion(int *version);

// Streams. Order 0 (below) does everything at once, order 1 as late as it may: when the host waits for it, or when
// other work does. Random orders do some of what waits, of any stream, at each call. So what relies on an order that no
// stream and no event gives shows. Streams without cudaStreamNonBlocking and stream 0 wait for each other. Asynchronous
// copies read the host's memory late, page-locked or not: NVIDIA's documentation ("API synchronization behavior") only
// says that a driver might read the latter before the call returns. They write late what is from cudaMallocHost.
enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };
enum { cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2 };
cudaError_t cudaStreamCreate(cudaStream_t *s);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags);
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority);
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest);
cudaError_t cudaStreamDestroy(cudaStream_t s);
cudaError_t cudaStreamSynchronize(cudaStream_t s);
cudaError_t cudaStreamQuery(cudaStream_t s);
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags = 0);
cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind, cudaStream_t s = 0);
cudaError_t cudaMemcpy2DAsync(void *dst, size_t dst_pitch, const void *src, size_t src_pitch, size_t width, size_t rows,
                              cudaMemcpyKind kind, cudaStream_t s = 0);
cudaError_t cudaMemsetAsync(void *p, int byte, size_t bytes, cudaStream_t s = 0);
cudaError_t cudaEventCreate(cudaEvent_t *e);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t e);
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s = 0);
cudaError_t cudaEventSynchronize(cudaEvent_t e);
cudaError_t cudaEventQuery(cudaEvent_t e);
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end);

// Graphs. What is put on a capturing stream, or on one that waited for an event of it, is recorded and not done. As
// with the driver, whatever waits or allocates meanwhile is refused and ends the capture as invalid; a copy from or to
// memory that is not cudaMallocHost's is refused too, whose driver would record an address that the host may have left.
// Nodes of a graph run in any order that their streams and events allow (the scheduler's order picks one).
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal = 0, cudaStreamCaptureModeThreadLocal = 1, cudaStreamCaptureModeRelaxed = 2
};
enum cudaStreamCaptureStatus {
    cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1, cudaStreamCaptureStatusInvalidated = 2
};
cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph);
cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus *status);
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);

// ---------------------------------------------------------------------------------------------
// Scheduling. Order 0 always runs the lowest-numbered warp and lane that can run, 1 the highest, any other number is
// the seed of a random choice at every step; blocks follow the same rule. Even orders poison fresh memory with 0xff
// bytes (NaN), odd ones with 0x7e (8e37, which fminf and fmaxf do not swallow). CUDASIM_ORDER in the environment sets
// the first.
void cudasim_set_order(unsigned order);

namespace cudasim {
// Every call that waits carries its place in the source, for messages and to tell one barrier from another.
#define CUDASIM_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

enum Collective { SYNCWARP, SHUFFLE, BALLOT, EXCHANGE };
// Waits until every lane of mask has come; returns value of lane src (SHUFFLE) or the lanes whose value is not 0
// (BALLOT). EXCHANGE: value is the address of an Exchange, and the last lane to come runs its function over all 32.
uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, int src, const char *file, int line);
struct Exchange { void (*finish)(Exchange *const lanes[32]); };
// ptx.cuh says what these do.
void mma_bf16(float *d, const uint32_t *a, const uint32_t *b, const char *file, int line);
void mma_s8(int *d, const uint32_t *a, const uint32_t *b, const char *file, int line);
void ldmatrix_x4(uint32_t *r, const void *row, bool trans, const char *file, int line);
// A copy is made when it is waited for, at the latest possible time; until then its destination is poison.
void cp_async(void *smem, const void *gmem, int bytes, const char *file, int line);
void cp_async_commit();
void cp_async_wait(int newest);
int barrier_vote(int predicate, const char *file, int line);    // __syncthreads, and how many predicates were true
size_t launches();                     // kernels launched so far, those recorded or waiting in a stream too
int lane();
void maybe_switch();                   // a point where another thread may come first: atomics and fences
void *dyn_shared();

struct Launch {
    const char *name, *file;
    int line;
    dim3 grid, block;
    size_t smem;
    cudaStream_t stream;
    const void *kernel;
    std::shared_ptr<void> args;
    void (*body)(void *args);              // runs the kernel once, as the current thread
    void (*check)(const Launch &l);        // its arguments
};
void submit(const Launch &l);
cudaError_t set_max_dynamic_shared(const void *kernel, int bytes);
int max_dynamic_shared(const void *kernel);
void check_pointer(const Launch &l, int arg, const void *p);

template <class A> void check_argument(const Launch &l, int arg, const A &a) {
    if constexpr (std::is_pointer<A>::value) check_pointer(l, arg, (const void *)a);
    else (void)l, (void)arg, (void)a;
}

template <class... P> struct Launcher {
    void (*kernel)(P...);
    Launch l;
    struct Call { void (*kernel)(P...); std::tuple<P...> args; };
    static void body(void *args) { std::apply(((Call *)args)->kernel, ((Call *)args)->args); }
    static void check(const Launch &l) {
        int n = 0;
        std::apply([&](const P &...a) { (check_argument(l, n++, a), ...); }, ((Call *)l.args.get())->args);
        (void)n;
    }
    void operator()(P... args) {
        l.kernel = (const void *)kernel;
        l.args = std::make_shared<Call>(Call{kernel, std::tuple<P...>(args...)});
        l.body = body;
        l.check = check;
        submit(l);
    }
};
template <class... P>
Launcher<P...> launcher(void (*kernel)(P...), const char *name, dim3 grid, dim3 block, size_t smem, cudaStream_t stream,
                        CUDASIM_HERE) {
    return {kernel, {name, file, line, grid, block, smem, stream, nullptr, nullptr, nullptr, nullptr}};
}

template <class T> uint64_t pack(T v) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "shuffles move 4 or 8 bytes");
    uint64_t u = 0;
    memcpy(&u, &v, sizeof v);
    return u;
}
template <class T> T unpack(uint64_t u) { T v; memcpy(&v, &u, sizeof v); return v; }
template <class T> T shuffle(unsigned mask, T v, int src, const char *file, int line) {
    return unpack<T>(warp_collective(SHUFFLE, mask, pack(v), src, file, line));
}
}

template <class... P> cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
    return cudasim::set_max_dynamic_shared((const void *)kernel, bytes);
}

// What a compiler's resource report says is not known here: registers are 0.
struct cudaFuncAttributes {
    size_t sharedSizeBytes, localSizeBytes;
    int maxThreadsPerBlock, numRegs, maxDynamicSharedSizeBytes;
};
template <class... P> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, void (*kernel)(P...)) {
    *a = {0, 0, 1024, 0, cudasim::max_dynamic_shared((const void *)kernel)};
    return cudaSuccess;
}
// By threads alone; at least 1.
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void (*)(P...), int block_size, size_t) {
    *blocks = block_size > 0 && block_size <= 1024 ? 2048 / block_size : 0;
    return cudaSuccess;
}

#define LAUNCH(kernel, grid, block, smem, stream) cudasim::launcher(kernel, #kernel, grid, block, smem, stream)
#define DYN_SHARED(type, name) type *name = (type *)cudasim::dyn_shared()

// ---------------------------------------------------------------------------------------------
// Device functions.

void __syncthreads(CUDASIM_HERE);
static inline void __syncwarp(unsigned mask = 0xffffffffu, CUDASIM_HERE) {
    cudasim::warp_collective(cudasim::SYNCWARP, mask, 0, 0, file, line);
}
static inline void __threadfence() { cudasim::maybe_switch(); }
static inline void __threadfence_block() { cudasim::maybe_switch(); }

// A lane outside the segment of `width` lanes gives back the caller's own value, as the hardware does.
template <class T> T __shfl_sync(unsigned mask, T v, int src, int width = 32, CUDASIM_HERE) {
    int base = cudasim::lane() & ~(width - 1);
    return cudasim::shuffle(mask, v, base + (src & (width - 1)), file, line);
}
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, CUDASIM_HERE) {
    int self = cudasim::lane(), src = self - (int)delta;
    return cudasim::shuffle(mask, v, src < (self & ~(width - 1)) ? self : src, file, line);
}
template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, CUDASIM_HERE) {
    int self = cudasim::lane(), src = self + (int)delta;
    return cudasim::shuffle(mask, v, src > (self | (width - 1)) ? self : src, file, line);
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, CUDASIM_HERE) {
    int self = cudasim::lane(), src = self ^ bits;
    return cudasim::shuffle(mask, v, src > (self | (width - 1)) ? self : src, file, line);
}
static inline unsigned __ballot_sync(unsigned mask, int predicate, CUDASIM_HERE) {
    return (unsigned)cudasim::warp_collective(cudasim::BALLOT, mask, predicate != 0, 0, file, line);
}
static inline int __any_sync(unsigned mask, int predicate, CUDASIM_HERE) {
    return cudasim::warp_collective(cudasim::BALLOT, mask, predicate != 0, 0, file, line) != 0;
}
static inline int __all_sync(unsigned mask, int predicate, CUDASIM_HERE) {
    return cudasim::warp_collective(cudasim::BALLOT, mask, predicate == 0, 0, file, line) == 0;
}

// Nothing runs between a load and its store here, so an ordinary update is atomic. The type is that of the pointer.
namespace cudasim { template <class T> using Same = typename std::common_type<T>::type; }
#ifdef CUDASIM_RACE                    // which is not to take them for ordinary accesses
#define CUDASIM_NO_RACE __attribute__((noinline, no_sanitize_thread))
#else
#define CUDASIM_NO_RACE
#endif
#define CUDASIM_ATOMIC(name, updated) \
    template <class T> CUDASIM_NO_RACE T name(T *p, cudasim::Same<T> v) { \
        cudasim::maybe_switch(); \
        T old = *p; \
        *p = (T)(updated); \
        return old; \
    }
CUDASIM_ATOMIC(atomicAdd, old + v)
CUDASIM_ATOMIC(atomicMax, old < v ? v : old)
CUDASIM_ATOMIC(atomicMin, v < old ? v : old)
CUDASIM_ATOMIC(atomicOr, old | v)
CUDASIM_ATOMIC(atomicAnd, old & v)
CUDASIM_ATOMIC(atomicExch, v)
template <class T> CUDASIM_NO_RACE T atomicCAS(T *p, cudasim::Same<T> expected, cudasim::Same<T> v) {
    cudasim::maybe_switch();
    T old = *p;
    if (old == expected) *p = v;
    return old;
}
template <class T> T __ldg(const T *p) { return *p; }
template <class T> T __ldcs(const T *p) { return *p; }
template <class T, class U> void __stcs(T *p, U v) { *p = v; }

static inline int __syncthreads_count(int predicate, CUDASIM_HERE) {
    return cudasim::barrier_vote(predicate != 0, file, line);
}
static inline int __syncthreads_or(int predicate, CUDASIM_HERE) {
    return cudasim::barrier_vote(predicate != 0, file, line) != 0;
}
static inline int __syncthreads_and(int predicate, CUDASIM_HERE) {
    return cudasim::barrier_vote(predicate == 0, file, line) == 0;
}
static inline int __popc(unsigned v) { return __builtin_popcount(v); }
static inline int __ffs(int v) { return __builtin_ffs(v); }
static inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
static inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
static inline float __int_as_float(int u) { float f; memcpy(&f, &u, 4); return f; }
static inline int __float_as_int(float f) { int u; memcpy(&u, &f, 4); return u; }
// Bytes of (b, a), the lowest of a being byte 0: nibble i of the selector picks byte i of the result.
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    uint64_t both = (uint64_t)b << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) r |= (unsigned)(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return r;
}
static inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (int)(int8_t)(a >> 8 * i) * (int)(int8_t)(b >> 8 * i);
    return c;
}
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
#endif
