// What the files of comm share: comm.c (the interface), comm_mpi.c (MPI on a thread of its own), comm_guard.c (the
// watch).
#ifndef QLLM_COMM_IMPL_H
#define QLLM_COMM_IMPL_H
#include "comm.h"

// What every rank knows of every rank.
typedef struct {
    int32_t pid, machine;            // machine: the lowest rank on it
    char host[64];
    uint64_t cores[16];              // bit c: it may run on core c
} RankInfo;

typedef struct {
    int rank, size, local_rank, local_size, machines;
    int leader;                      // the lowest rank on this machine
    char library[64];                // "Open MPI 4.1.4"
} MpiWorld;

// --- comm_mpi.c --------------------------------------------------------------------------------------------------
// Whether the build has MPI; the functions below may only be called then.
extern const bool mpi_built;
// MPI_Init, communicators, and the lane: the thread that makes all calls of MPI from then on.
int mpi_start(int *argc, char ***argv, MpiWorld *world, Err *err);
void mpi_stop(void);                 // when nothing is under way; MPI_Finalize
void mpi_abort(int status);          // MPI_Abort: the last resort

typedef enum { T_ALL_GATHER, T_ALL_TO_ALL, T_BARRIER, T_BROADCAST, T_SEND, T_RECV } TransferKind;
typedef struct {
    TransferKind kind;
    void *recv;                      // T_BROADCAST: the data
    const void *send;
    size_t bytes;
    int peer;                        // T_BROADCAST: the root; T_SEND, T_RECV: the other one
} Transfer;

// Transfers of a queue run one after the other; those of different queues side by side, each with a communicator.
typedef enum { Q_DEVICE, Q_HOST, QUEUES } Queue;
uint64_t mpi_put(Queue q, const Transfer *t);            // its ticket: 1, 2, ...
int mpi_wait(Queue q, uint64_t ticket, Err *err);        // until it and all before it are done
double mpi_busy(Queue q);                                // seconds during which a transfer of the queue was under way
// Bytes of the largest message, and ranks (at most 8) to which messages are under way at once; tests make them small.
extern size_t mpi_piece;
extern int mpi_window;

// --- comm_guard.c ------------------------------------------------------------------------------------------------
// Every rank keeps a TCP connection to rank 0. One that ends without a goodbye means that the process has died.
typedef struct { uint8_t family, bytes[16]; } GuardAddress;       // 4 or 6
typedef struct {
    uint64_t token;                  // connections that do not bring it are dropped
    int32_t port, n;                 // port 0: rank 0 could not listen, and `why` tells
    GuardAddress address[16];
    char why[192];
} GuardPlace;

void guard_listen(GuardPlace *place, bool one_machine);                         // rank 0
int guard_connect(const GuardPlace *place, int rank, int size, Err *err);       // rank 0 waits for all others
int guard_watch(const RankInfo *who, int local_rank, Err *err);                 // starts the thread
bool guard_watching(void);
void guard_goodbye(void);            // all ranks call it after a barrier; returns when the watch is over
// Tells err, once among all ranks that meet an error now, and ends all of them.
#if defined(__GNUC__)
__attribute__((noreturn))
#endif
void guard_die(const Err *err);
// Where no watch is, at the start and at the very end: the process ends with `status` in so many seconds, after `line`
// (lasting; NULL: silently), unless this is called again before. 0 s: it does not.
void guard_deadline(unsigned seconds, const char *line, int status);
#endif
