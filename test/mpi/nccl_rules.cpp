// Mistakes in the use of NCCL, planted: mpirun -np 2 nccl_rules MISTAKE. The stand-in (dev/ncclsim) must end the ranks
// and say why; a program that comes to its end prints "not caught". `none` makes none, and `early` one that shows in
// the bytes. test/test_nccl.sh runs them.
#include "cuda/cuda.cuh"
#include "nccl_sim.h"
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>
#include <stdio.h>
#include <unistd.h>
#include <vector>

static int rank, R;
static ncclComm_t comm;
static cudaStream_t stream, other;
static char *a, *b, *c;                 // device memory
const size_t N = 64, SIZE = 4096;

static void must(ncclResult_t result) {
    if (result == ncclSuccess) return;
    fprintf(stderr, "rank %d: %s: %s\n", rank, ncclGetErrorString(result), ncclGetLastError(comm));
    MPI_Abort(MPI_COMM_WORLD, 4);
}
static void gather(size_t count, ncclDataType_t type = ncclUint8) {
    must(ncclAllGather(a, b, count, type, comm, stream));
}
// Everyone's part to everyone else; what rank 1 does otherwise is left to its arguments.
static void exchange(size_t receive = N, bool receives = true) {
    must(ncclGroupStart());
    for (int q = 0; q < R; q++) {
        if (q == rank) continue;
        must(ncclSend(a + (size_t)q * N, N, ncclUint8, q, comm, stream));
        if (receives) must(ncclRecv(c + (size_t)q * N, receive, ncclUint8, q, comm, stream));
    }
    must(ncclGroupEnd());
}
static void finish() { cudaStreamSynchronize(stream); }

static __global__ void set_kernel(char *p, int value, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) p[i] = (char)value;
}

int main(int argc, char **argv) {
    int provided = 0, failed = 0;
    MPI_Init_thread(&argc, &argv, MPI_THREAD_SERIALIZED, &provided);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &R);
    auto is = [&](const char *name) { return argc > 1 && !strcmp(argv[1], name); };
    cudasim_set_order(is("none") && argc > 2 ? (unsigned)atoi(argv[2]) : 1);
    cudaSetDevice(rank);
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking);
    for (char **p : {&a, &b, &c}) {
        cudaMalloc((void **)p, SIZE);
        cudaMemset(*p, rank + 1, SIZE);
    }
    cudaDeviceSynchronize();
    ncclUniqueId id;
    if (rank == 0 || is("other_id")) must(ncclGetUniqueId(&id));
    if (!is("other_id")) MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
    must(ncclCommInitRank(&comm, R, id, rank));
    gather(N);
    finish();
    std::vector<char> got(SIZE);
    const bool last = rank == R - 1;    // who makes the mistake, where one alone can

    if (is("none")) {
        exchange();
        gather(2);
        must(ncclGroupStart());         // different operations in one group, and one with itself
        must(ncclSend(a, 5, ncclFloat32, rank, comm, stream));
        must(ncclRecv(c, 5, ncclFloat32, rank, comm, stream));
        must(ncclAllGather(a + 1024, b, 32, ncclBfloat16, comm, stream));
        must(ncclGroupEnd());
        finish();
        cudaMemcpy(got.data(), b, SIZE, cudaMemcpyDeviceToHost);
        for (int q = 0; q < R; q++)
            for (size_t i = 0; i < 64; i++) failed += got[(size_t)q * 64 + i] != q + 1;
        cudaMemcpy(got.data(), c, 20, cudaMemcpyDeviceToHost);
        for (size_t i = 0; i < 20; i++) failed += got[i] != rank + 1;
    } else if (is("early")) {           // the sender's stream does not wait for what is computed on another
        LAUNCH(set_kernel, 1, 64, 0, other)(a, 10 + rank, (int)N);
        gather(N);
        finish();
        cudaMemcpy(got.data(), b, SIZE, cudaMemcpyDeviceToHost);
        failed = got[0] == 10;
    } else if (is("order")) {
        if (last) exchange();
        gather(N);
        if (!last) exchange();
    } else if (is("count")) {
        gather(last ? N : N + 1);
    } else if (is("type")) {
        gather(16, last ? ncclInt32 : ncclFloat32);
    } else if (is("no_group")) {
        must(ncclSend(a, N, ncclUint8, (rank + 1) % R, comm, stream));
        must(ncclRecv(c, N, ncclUint8, (rank + R - 1) % R, comm, stream));
    } else if (is("missing_receive")) {
        exchange(N, !last);
    } else if (is("unequal_bytes")) {
        exchange(last ? N - 1 : N);
    } else if (is("missing_self")) {
        must(ncclGroupStart());
        must(ncclSend(a, N, ncclUint8, rank, comm, stream));
        must(ncclGroupEnd());
    } else if (is("host_memory")) {
        must(ncclAllGather(got.data(), b, N, ncclUint8, comm, stream));
    } else if (is("past_the_end")) {
        must(ncclAllGather(a, b + SIZE - N, N, ncclUint8, comm, stream));
    } else if (is("overlap")) {
        must(ncclAllGather(a, a + 8, N, ncclUint8, comm, stream));
    } else if (is("freed")) {
        char *p = nullptr;
        cudaMalloc((void **)&p, SIZE);
        cudaMemset(p, 1, SIZE);
        cudaDeviceSynchronize();
        cudaFree(p);
        must(ncclAllGather(p, b, N, ncclUint8, comm, stream));
    } else if (is("destroyed")) {
        must(ncclCommDestroy(comm));
        gather(N);
    } else if (is("aborted")) {
        must(ncclCommAbort(comm));
        gather(N);
    } else if (is("destroyed_early")) {
        gather(N);
        must(ncclCommDestroy(comm));
    } else if (is("captured")) {
        cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
        gather(N);
    } else if (is("fewer")) {
        if (!last) gather(N);
        finish();
        must(ncclCommDestroy(comm));
    } else if (is("absent")) {
        if (last) sleep(20);
        gather(N);
    } else if (is("send_changed")) {
        gather(N);
        LAUNCH(set_kernel, 1, 64, 0, other)(a, 77, (int)N);
        cudaStreamSynchronize(other);
    } else if (is("receive_written")) {
        gather(N);
        LAUNCH(set_kernel, 1, 64, 0, other)(b, 77, (int)N);
        cudaStreamSynchronize(other);
    } else if (is("two_streams")) {
        must(ncclGroupStart());
        must(ncclSend(a, N, ncclUint8, (rank + 1) % R, comm, stream));
        must(ncclRecv(c, N, ncclUint8, (rank + R - 1) % R, comm, other));
        must(ncclGroupEnd());
    } else if (!is("other_id")) {
        fprintf(stderr, "no such mistake: %s\n", argc > 1 ? argv[1] : "");
        failed = 1;
    }
    finish();
    if (!is("none") && !is("early")) printf("not caught\n");
    else must(ncclCommDestroy(comm));
    MPI_Finalize();
    return failed != 0;
}
