// NCCL, which carries bytes between the memories of GPUs (comm.h), found when comm_choose asks for it: programs start
// on machines without it. The simulated build calls dev/ncclsim's stand-in by the same names.
//
// Collectives run on a stream of their own, of high priority, so that their few blocks get onto the GPU while a matmul
// fills it. Each begins when what cuda_stream was asked for before is done, and cuda_stream waits by an event for those
// whose results it needs; the host waits for nothing.
//
// Errors. When the network fails, NCCL says so to whoever asks, and its kernels go on waiting for the other side, and
// cuda_stream with them. So it is asked before each wait and, through cuda_while_waiting, as long as the host waits for
// the device; the first error is kept for device_sync and ends the communicator, which lets the streams run on.
//
// Settings of NCCL's worth knowing: NCCL_DEBUG=WARN or INFO says what goes wrong and which way the bytes take,
// NCCL_SOCKET_IFNAME=eth0 picks the network that ranks meet on, NCCL_IB_HCA=mlx5_0,mlx5_1 the InfiniBand adapters, and
// NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1 leaves out what hangs on a machine set up badly.
#include "comm.h"
#include "cuda.cuh"
#include "device.h"

#ifdef __CUDACC__
#include <dlfcn.h>
#include <stdlib.h>
#define HAVE_NCCL 1
// All that is used, as nccl.h has it, whether one is installed or not: an older one lacks some of it. Every
// libnccl.so.2 since 2.7, which brought ncclSend, takes calls compiled against any older header of version 2: the
// numbers of types and errors and the 128 bytes of an id are part of what "so.2" means.
typedef struct ncclComm *ncclComm_t;
typedef struct { char internal[128]; } ncclUniqueId;
typedef enum { ncclSuccess = 0, ncclInProgress = 7 } ncclResult_t;
typedef enum { ncclUint8 = 1 } ncclDataType_t;
extern "C" {
ncclResult_t ncclGetVersion(int *version);
const char *ncclGetErrorString(ncclResult_t result);
const char *ncclGetLastError(ncclComm_t comm);
ncclResult_t ncclGetUniqueId(ncclUniqueId *id);
ncclResult_t ncclCommInitRank(ncclComm_t *comm, int R, ncclUniqueId id, int rank);
ncclResult_t ncclCommDestroy(ncclComm_t comm);
ncclResult_t ncclCommAbort(ncclComm_t comm);
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *state);
ncclResult_t ncclGroupStart(void);
ncclResult_t ncclGroupEnd(void);
ncclResult_t ncclAllGather(const void *send, void *recv, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream);
ncclResult_t ncclSend(const void *send, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream);
ncclResult_t ncclRecv(void *recv, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream);
}
#elif defined(HAVE_MPI)
#include "nccl_sim.h"
#define HAVE_NCCL 1
#endif

#ifdef HAVE_NCCL
extern "C" void (*cuda_while_waiting)(void);                   // device_cuda.cu
#define FUNCTIONS(X) \
    X(ncclGetVersion) X(ncclGetErrorString) X(ncclGetUniqueId) X(ncclCommInitRank) X(ncclCommDestroy) \
    X(ncclCommAbort) X(ncclCommGetAsyncError) X(ncclGroupStart) X(ncclGroupEnd) X(ncclAllGather) X(ncclSend) X(ncclRecv)

static struct {
#define POINTER(name) decltype(&::name) name;
    FUNCTIONS(POINTER)
#undef POINTER
    decltype(&::ncclGetLastError) ncclGetLastError;            // since 2.13; NULL before
} nccl;

// The library, one way or the other; if it is not there, why.
static bool load(char *why, size_t size) {
#ifdef __CUDACC__
    static void *library;
    static const char *const names[] = {"libnccl.so.2", "libnccl.so"};
    static const struct { const char *variable, *below; } folders[] = {
        {"NCCL_HOME", "/lib/"}, {"NCCL_HOME", "/lib64/"}, {nullptr, ""},       // wherever the loader looks
        {"CUDA_HOME", "/lib64/"}, {"CUDA_HOME", "/lib/"}, {nullptr, "/usr/local/cuda/lib64/"},
        {nullptr, "/usr/local/cuda/lib/"}};
    for (size_t f = 0; f < sizeof folders / sizeof *folders && !library; f++)
        for (size_t n = 0; n < sizeof names / sizeof *names && !library; n++) {
            const char *home = folders[f].variable ? getenv(folders[f].variable) : "";
            char path[4096];
            if (!home || snprintf(path, sizeof path, "%s%s%s", home, folders[f].below, names[n]) >= (int)sizeof path)
                continue;
            library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        }
    if (!library) {
        snprintf(why, size, "libnccl.so.2 was not found: set NCCL_HOME, or apt-get install libnccl2");
        return false;
    }
#define FIND(name) \
    nccl.name = (decltype(&::name))dlsym(library, #name); \
    if (!nccl.name) { \
        snprintf(why, size, "the NCCL found has no %s: 2.7 or newer is needed", #name); \
        return false; \
    }
    nccl.ncclGetLastError = (decltype(&::ncclGetLastError))dlsym(library, "ncclGetLastError");
#else
    (void)why, (void)size;
#define FIND(name) nccl.name = name;
    nccl.ncclGetLastError = ncclGetLastError;
#endif
    FUNCTIONS(FIND)
#undef FIND
    return true;
}

#define RING 256                // tickets that have events of their own
static ncclComm_t comm;
static int rank, R;
static cudaStream_t stream;     // of the collectives
static cudaEvent_t asked;       // on cuda_stream: where a collective begins
// Of a ticket: from when to when it was under way, and cuda_stream waited for it. Their times are read when another
// ticket takes the place, if the device has got there by then.
typedef struct { cudaEvent_t begin, end; bool unread; } Interval;
static Interval under_way[RING], waits[RING];
typedef struct { double seconds; long n, read; } Spent;
static Spent busy, blocked;
static bool failed;             // an error was told: what follows is its consequence

static const char *details(void) {
    const char *text = nccl.ncclGetLastError ? nccl.ncclGetLastError(comm) : nullptr;
    return text ? text : "";
}
static bool nccl_check(ncclResult_t result, const char *call, int line) {
    if (result == ncclSuccess || result == ncclInProgress) return true;
    if (!failed)
        ops_set_error(E_FAIL, "%s:%d: %s: %s; %s (NCCL_DEBUG=WARN tells more)", __FILE__, line, call,
                      nccl.ncclGetErrorString(result), details());
    failed = true;
    return false;
}
#define NCCL_CHECK(name, args) nccl_check(nccl.name args, #name, __LINE__)

// What the GPU waits for comes to an end.
static void give_up(void) {
    ncclComm_t c = comm;
    failed = true;
    comm = nullptr;
    if (c) (void)nccl.ncclCommAbort(c);
}
// Whether something went wrong under way; then the communicator is given up. On the thread that made it, and makes all
// calls: others that wait for the device go on when that one has looked.
static thread_local bool is_ours;
static void look(void) {
    if (!comm || !is_ours) return;
    ncclResult_t state = ncclSuccess;
    if (!failed && NCCL_CHECK(ncclCommGetAsyncError, (comm, &state)))
        (void)nccl_check(state, "a collective under way", __LINE__);
    if (failed) give_up();
}

static bool available(char *why, size_t size) {
    if (device_is_host()) {
        snprintf(why, size, "NCCL moves bytes between GPUs, and the device is the CPU");
        return false;
    }
    if (device_sharers() > 1) {
        snprintf(why, size, "%d ranks share GPU %d, and NCCL takes one rank a GPU", device_sharers(), device_index());
        return false;
    }
    return load(why, size);
}

static const char *description(void) {
    static char text[32];
    int v = 0;
    if (!NCCL_CHECK(ncclGetVersion, (&v))) return "NCCL";
    if (v < 10000) snprintf(text, sizeof text, "NCCL %d.%d.%d", v / 1000, v / 100 % 10, v % 100);      // until 2.8
    else snprintf(text, sizeof text, "NCCL %d.%d.%d", v / 10000, v / 100 % 100, v % 100);
    return text;
}

static void read_interval(Interval *v, Spent *spent) {
    float ms = 0.0f;
    cudaError_t e = v->unread ? cudaEventQuery(v->end) : cudaErrorNotReady;
    if (e == cudaSuccess) e = cudaEventElapsedTime(&ms, v->begin, v->end);
    if (e == cudaSuccess) {
        spent->seconds += 1e-3 * (double)ms;
        spent->read++;
        v->unread = false;
    } else if (cudaPeekAtLastError() == cudaErrorNotReady) {
        (void)cudaGetLastError();      // that it is not there yet is no error; others stay
    }
}
static void begin_interval(Interval *v, cudaStream_t s, Spent *spent) {
    read_interval(v, spent);
    CUDA_CHECK(cudaEventRecord(v->begin, s));
    v->unread = true;
    spent->n++;
}
// Those that were not read were like the others.
static double total(Interval ring[RING], Spent *spent) {
    for (int i = 0; i < RING; i++) read_interval(&ring[i], spent);
    return spent->read ? spent->seconds * (double)spent->n / (double)spent->read : 0.0;
}
static void times(double *busy_seconds, double *blocked_seconds) {
    *busy_seconds = total(under_way, &busy);
    *blocked_seconds = total(waits, &blocked);
}

static int make_id(void *id, Err *err) {
    ncclUniqueId made;
    ncclResult_t result = nccl.ncclGetUniqueId(&made);
    if (result != ncclSuccess)
        return err_set(err, E_FAIL, "NCCL makes no id for ranks to meet by: %s; %s; NCCL_SOCKET_IFNAME picks the "
                                    "network", nccl.ncclGetErrorString(result), details());
    memcpy(id, &made, sizeof made);
    return 0;
}

static int init(const void *id, int rank_, int R_, Err *err) {
    ncclUniqueId made;
    memcpy(&made, id, sizeof made);
    rank = rank_;
    R = R_;
    failed = false;
    is_ours = true;
    ncclResult_t result = nccl.ncclCommInitRank(&comm, R, made, rank);
    if (result != ncclSuccess) {
        comm = nullptr;
        return err_set(err, E_FAIL, "NCCL does not start between %d ranks: %s; %s; NCCL_DEBUG=INFO tells more, --comm "
                                    "mpi goes another way", R, nccl.ncclGetErrorString(result), details());
    }
    int least = 0, greatest = 0;
    cudaError_t e = cudaDeviceGetStreamPriorityRange(&least, &greatest);
    if (e == cudaSuccess) e = cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest);
    if (e == cudaSuccess) e = cudaEventCreateWithFlags(&asked, cudaEventDisableTiming);
    for (Interval *ring : {under_way, waits})
        for (int i = 0; i < RING && e == cudaSuccess; i++) {
            ring[i].unread = false;
            e = cudaEventCreateWithFlags(&ring[i].begin, cudaEventDefault);
            if (e == cudaSuccess) e = cudaEventCreateWithFlags(&ring[i].end, cudaEventDefault);
        }
    if (e != cudaSuccess) return err_set(err, E_FAIL, "a stream for communication: %s", cudaGetErrorString(e));
    cuda_while_waiting = look;
    return 0;
}

// Before a collective: it comes after all that the device was asked for. False where it cannot be.
static bool begin(CommTicket t, int *mark) {
    *mark = -1;
    if (failed || !comm) return false;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    CUDA_CHECK(cudaStreamIsCapturing(cuda_stream, &status));
    if (status != cudaStreamCaptureStatusNone) {
        ops_set_error(E_FAIL, "a collective inside a step that is being recorded: steps of several ranks are not "
                              "passed to device_step");
        return false;
    }
    CUDA_CHECK(cudaEventRecord(asked, cuda_stream));
    CUDA_CHECK(cudaStreamWaitEvent(stream, asked, 0));
    begin_interval(&under_way[t % RING], stream, &busy);
    if (device_span) *mark = cuda_mark(stream);
    return true;
}
// And after it, when no group is open that a communicator must outlive.
static void end_of(CommTicket t, const char *what, int mark) {
    if (device_span) device_span(what, mark, cuda_mark(stream));
    CUDA_CHECK(cudaEventRecord(under_way[t % RING].end, stream));
    if (failed) give_up();
}

static void all_gather(CommTicket t, void *recv, const void *send, size_t bytes) {
    int mark;
    if (!begin(t, &mark)) return;
    if (bytes) NCCL_CHECK(ncclAllGather, (send, recv, bytes, ncclUint8, comm, stream));
    end_of(t, "all_gather", mark);
}

static void all_to_all(CommTicket t, void *recv, const void *send, size_t bytes) {
    int mark;
    if (!begin(t, &mark)) return;
    if (bytes) {
        const char *from = (const char *)send;
        char *to = (char *)recv;
        size_t own = (size_t)rank * bytes;
        CUDA_CHECK(cudaMemcpyAsync(to + own, from + own, bytes, cudaMemcpyDeviceToDevice, stream));
        bool ok = NCCL_CHECK(ncclGroupStart, ());
        // Each rank begins with the next one, so that not all send to the same rank at a time.
        for (int i = 1; i < R && ok; i++) {
            int next = (rank + i) % R, last = (rank - i + R) % R;
            ok = NCCL_CHECK(ncclSend, (from + (size_t)next * bytes, bytes, ncclUint8, next, comm, stream)) &&
                 NCCL_CHECK(ncclRecv, (to + (size_t)last * bytes, bytes, ncclUint8, last, comm, stream));
        }
        NCCL_CHECK(ncclGroupEnd, ());
    }
    end_of(t, "all_to_all", mark);
}

// The event of a ticket RING ago was recorded anew by a later one: waiting for that is enough.
static void wait(CommTicket t) {
    look();
    if (failed || !comm) return;
    begin_interval(&waits[t % RING], cuda_stream, &blocked);
    CUDA_CHECK(cudaStreamWaitEvent(cuda_stream, under_way[t % RING].end, 0));
    CUDA_CHECK(cudaEventRecord(waits[t % RING].end, cuda_stream));
}

// An orderly end waits for the others, who may be gone: not after an error.
static void end(void) {
    if (!cuda_while_waiting) return;
    device_wait();                     // it looks, and cuda_stream waits for what was asked for last
    cuda_while_waiting = nullptr;
    CUDA_CHECK(cudaStreamSynchronize(stream));
    if (comm) NCCL_CHECK(ncclCommDestroy, (comm));
    comm = nullptr;
    for (Interval *ring : {under_way, waits})
        for (int i = 0; i < RING; i++) {
            CUDA_CHECK(cudaEventDestroy(ring[i].begin));
            CUDA_CHECK(cudaEventDestroy(ring[i].end));
        }
    CUDA_CHECK(cudaEventDestroy(asked));
    CUDA_CHECK(cudaStreamDestroy(stream));
}

static const size_t id_bytes = sizeof(ncclUniqueId);
static_assert(sizeof(ncclUniqueId) == 128 && ncclUint8 == 1 && ncclSuccess == 0 && ncclInProgress == 7,
              "the stand-in and what is declared here are what nccl.h says");
#else
static const size_t id_bytes = 0;
static bool available(char *why, size_t size) {
    snprintf(why, size, "the simulator's NCCL needs MPI, which this build has not");
    return false;
}
static int make_id(void *, Err *err) { return err_set(err, E_FAIL, "built without NCCL"); }
static int init(const void *, int, int, Err *err) { return err_set(err, E_FAIL, "built without NCCL"); }
static void all_gather(CommTicket, void *, const void *, size_t) {}
static void all_to_all(CommTicket, void *, const void *, size_t) {}
static void wait(CommTicket) {}
static void times(double *, double *) {}
static void end(void) {}
static void give_up(void) {}
static const char *description(void) { return "no NCCL"; }
#endif

extern "C" {
extern const CommWing comm_wing_nccl;
const CommWing comm_wing_nccl = {available, id_bytes, make_id, init, all_gather, all_to_all, wait, times, end,
                                 give_up,   description};
}
