// Ranks: the processes that train one model together, and the ways for bytes between them. MPI starts them and carries
// what lies in the host's memory; on GPUs NCCL carries what lies on the device. A program that no launcher started, or
// that was built without MPI, is one rank; everything here works then too.
//
// What computes on received bytes are operations (ops.h): a reduce-scatter is comm_all_to_all, then sum_ranks, which
// adds in rank order; an all-reduce is that and comm_all_gather. So sums have the same bits whatever carries the bytes.
#ifndef QLLM_COMM_H
#define QLLM_COMM_H
#include "common.h"
#ifdef __cplusplus
extern "C" {
#endif

// Takes part in the run that mpirun or srun started, as their environment says (a launcher's environment without MPI in
// the build is E_FAIL: each process would train alone). Starts the watch over the other ranks: when a process dies, all
// others print which one and end within seconds, nonzero (QLLM_WATCH=off in the environment does without). Call first
// of all in main; argc and argv may be changed.
int comm_init(int *argc, char ***argv, Err *err);
// Orderly end, which all ranks come to: waits for what is under way, and for them.
void comm_end(void);
int comm_rank(void);
int comm_size(void);
int comm_local_rank(void);                  // among the ranks on this machine
int comm_local_size(void);
// Threads that a rank should compute with where the ranks of a machine share its cores: cores / ranks. 0: as many as it
// sees, for one rank alone and for ranks that the launcher bound to cores of their own.
int comm_default_threads(void);
const char *comm_description(void);         // "2 ranks on 1 machine, MPI (Open MPI 4.1.4)"; "" for one rank

// Like die() (common.h), with the rank in the message, and all other ranks end too.
#if defined(__GNUC__)
__attribute__((noreturn))
#endif
void comm_die(const Err *err);

// --- device memory, on the way while the device computes ---------------------------------------------------------
// Which transport serves: "auto" (NCCL where every rank's device is a GPU of its own and the library is there, else
// MPI), "mpi" or "nccl". Call after device_init.
int comm_choose(const char *transport, Err *err);

// Collectives on device memory. All ranks call the same ones in the same order, with the same sizes. They begin when
// all that was asked of the device before is done, run in the order of their calls, and are done for all that is asked
// of the device after comm_wait(ticket); until then neither memory may be touched. Memory does not overlap.
typedef uint64_t CommTicket;                // tickets ascend; waiting for one waits for all before it
// recv (R, bytes) <- everyone's send (bytes), in rank order. send may be this rank's own place in recv.
CommTicket comm_all_gather(void *recv, const void *send, size_t bytes);
// recv (R, bytes): recv[q] <- this rank's part send[rank] of rank q's send (R, bytes).
CommTicket comm_all_to_all(void *recv, const void *send, size_t bytes);
// Failures are told through ops_set_error, so that device_sync returns them.
void comm_wait(CommTicket ticket);
// Seconds since the start of the process during which collectives were under way, and during which comm_wait blocked
// the host, or on GPUs over NCCL the device.
void comm_times(double *busy, double *blocked);

// --- host memory, blocking: start, saves, exports ----------------------------------------------------------------
int comm_barrier(Err *err);
int comm_host_broadcast(void *data, size_t bytes, int root, Err *err);
int comm_host_all_gather(void *recv, const void *send, size_t bytes, Err *err);
int comm_host_send(const void *data, size_t bytes, int to, Err *err);
int comm_host_recv(void *data, size_t bytes, int from, Err *err);
// All ranks must have the same text; else E_USAGE on every rank, naming `what` and the first rank that differs from 0.
int comm_check_same(const char *what, const char *text, Err *err);

// A transport for device memory other than MPI's; llmc/cuda/comm_nccl.cu fills it in where it is linked.
typedef struct {
    bool (*available)(char *why, size_t size);
    size_t id_bytes;                                                 // of what one rank makes and all need to meet
    int (*make_id)(void *id, Err *err);
    int (*init)(const void *id, int rank, int R, Err *err);
    void (*all_gather)(CommTicket t, void *recv, const void *send, size_t bytes);
    void (*all_to_all)(CommTicket t, void *recv, const void *send, size_t bytes);
    void (*wait)(CommTicket t);
    void (*times)(double *busy, double *blocked);
    void (*end)(void);
    void (*abort)(void);
    const char *(*description)(void);                                // "NCCL 2.27.3"
} CommWing;
#ifdef __cplusplus
}
#endif
#endif
