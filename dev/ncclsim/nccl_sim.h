// A stand-in for NCCL between simulated GPUs, over MPI: one GPU cannot hold two ranks of NCCL's, and there may be none.
// It has the few functions that comm_nccl.cu calls, by the names and with the values of nccl.h, and it is strict. What
// ranks ask for is compared before data move; whatever breaks a rule ends all of them, with a message that names the
// ranks, the number of the call and both calls:
//   - every rank makes the same calls in the same order, and as many of them: same operation, type, count;
//   - in a group each send has its receive with the same type and count, and each receive its send. (NCCL would let
//     ranks that exchange nothing leave out the call; here every rank makes it.)
//   - sends and receives stand in a group (NCCL would hang or run one after the other);
//   - buffers lie in device memory, each inside one allocation, and do not overlap but where an all-gather is in place;
//   - nothing is called after ncclCommDestroy or ncclCommAbort, nor on a stream that is being captured, and no
//     communicator is destroyed with work still in a stream;
//   - what is sent does not change, and what is received is not written to by others, until the stream has got there.
// Ranks on one device are refused with ncclInvalidUsage, as by NCCL. A call that another rank does not make is given up
// after NCCLSIM_TIMEOUT seconds (30).
//
// When. The data of a call leave as soon as all that the stream must wait for is done, which is done at once: memory
// that is sent too early, because a wait was forgotten, is sent with wrong bytes. The data arrive when the simulated
// stream gets there, which it does as late as cudasim.h says, and memory is poison until then: who reads too early
// reads poison. So no rank waits for another that waits for it, whatever else they wait for on the host.
#ifndef NCCL_SIM_H
#define NCCL_SIM_H
#include "cudasim.h"

typedef struct NcclSimComm *ncclComm_t;
#define NCCL_UNIQUE_ID_BYTES 128
typedef struct { char internal[NCCL_UNIQUE_ID_BYTES]; } ncclUniqueId;
enum ncclResult_t {
    ncclSuccess = 0, ncclUnhandledCudaError = 1, ncclSystemError = 2, ncclInternalError = 3, ncclInvalidArgument = 4,
    ncclInvalidUsage = 5, ncclRemoteError = 6, ncclInProgress = 7
};
enum ncclDataType_t {
    ncclInt8 = 0, ncclUint8 = 1, ncclInt32 = 2, ncclUint32 = 3, ncclInt64 = 4, ncclUint64 = 5, ncclFloat16 = 6,
    ncclFloat32 = 7, ncclFloat64 = 8, ncclBfloat16 = 9
};

extern "C" {
ncclResult_t ncclGetVersion(int *version);
const char *ncclGetErrorString(ncclResult_t result);
const char *ncclGetLastError(ncclComm_t comm);
ncclResult_t ncclGetUniqueId(ncclUniqueId *id);
// MPI_COMM_WORLD's ranks, all of them, by their numbers there.
ncclResult_t ncclCommInitRank(ncclComm_t *comm, int R, ncclUniqueId id, int rank);
ncclResult_t ncclCommDestroy(ncclComm_t comm);
ncclResult_t ncclCommAbort(ncclComm_t comm);
// NCCLSIM_ASYNC_ERROR=n in the environment: the network fails with the n-th call. Streams stick there until
// ncclCommAbort (the thread that runs them, that is: CUDASIM_ORDER=1 comes there last), and from that call on it is
// told here, NCCLSIM_ASYNC_AFTER seconds (0) after it was first asked for.
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *state);
ncclResult_t ncclGroupStart(void);
ncclResult_t ncclGroupEnd(void);
ncclResult_t ncclAllGather(const void *send, void *recv, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream);
ncclResult_t ncclSend(const void *send, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream);
ncclResult_t ncclRecv(void *recv, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream);
}
#endif
