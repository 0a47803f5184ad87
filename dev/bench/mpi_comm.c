// How fast do bytes go between ranks? mpirun -np N mpi_comm [MEGABYTES A RANK]; lines `result NAME VALUE UNIT`.
//
// The default is the gradient of a model of 135M parameters: 538 MB a rank. A reduce-scatter is comm_all_to_all and
// ops->sum_ranks, and stands beside MPI's own MPI_Reduce_scatter on the same bytes. memcpy: every rank copies as many
// bytes as it receives, all at the same time. Times are those of the slowest rank, the best of REPEATS (MPI's own
// reduce-scatter: of 2).
#include <stdlib.h>
#include "comm.h"
#include "device.h"
#ifdef HAVE_MPI
#include <mpi.h>
#endif

#define REPEATS 5

static Err err;
static int R;
static size_t n;                        // values a rank sends to each, a multiple of 16
static float *send, *recv, *sum;

static void exchange(void) { comm_wait(comm_all_to_all(recv, send, n * sizeof *send)); }
static void add(void) { ops->sum_ranks(sum, recv, n, R, n, false); }
static void exchange_and_add(void) {
    exchange();
    add();
}
static void gather(void) { comm_wait(comm_all_gather(recv, send, n * sizeof *send)); }
static void copy(void) { memcpy(recv, send, (size_t)R * n * sizeof *send); }
#ifdef HAVE_MPI
// The lane has nothing to do meanwhile, so MPI's calls are one after the other.
static void mpi_reduce_scatter(void) {
    if (R > 1) MPI_Reduce_scatter_block(send, sum, (int)n, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
}
#endif

static double slowest(void (*run)(void), int repeats) {
    double best = 1e30;
    for (int i = 0; i <= repeats; i++) {
        double *all = xmalloc((size_t)R * sizeof *all), most = 0;
        comm_barrier(&err);
        double t = now_seconds();
        run();
        t = now_seconds() - t;
        if (comm_host_all_gather(all, &t, sizeof t, &err) < 0) comm_die(&err);
        for (int r = 0; r < R; r++) most = all[r] > most ? all[r] : most;
        free(all);
        if (i && most < best) best = most;              // the first one touches the memory
    }
    return best;
}
static void result(const char *name, double value, const char *unit) {
    if (comm_rank() == 0) printf("result mpi_comm_%s_%d %.4g %s\n", name, R, value, unit);
}

int main(int argc, char **argv) {
    program_name = "mpi_comm";
    if (comm_init(&argc, &argv, &err) < 0) comm_die(&err);
    R = comm_size();
    double megabytes = argc > 1 ? atof(argv[1]) : 538;
    n = (size_t)(megabytes * 1e6 / 4 / R) / 16 * 16;
    void *p[3] = {0};
    if (n < 16 || n > INT32_MAX) comm_die((err_set(&err, E_USAGE, "usage: mpi_comm [MEGABYTES A RANK]"), &err));
    if (device_init("cpu", comm_default_threads(), &err) < 0) comm_die(&err);
    for (int i = 0; i < 3; i++)
        if (big_alloc(&p[i], (i < 2 ? (size_t)R : 1) * n * sizeof *send, "a buffer", &err) < 0) comm_die(&err);
    send = p[0], recv = p[1], sum = p[2];
    for (size_t i = 0; i < (size_t)R * n; i++) send[i] = (float)(i % 251);
    double bytes = (double)R * (double)n * sizeof *send, memory = slowest(copy, REPEATS), t;
    result("memcpy", bytes / memory / 1e9, "GB/s");
    t = slowest(gather, REPEATS);
    result("all_gather", bytes / t / 1e9, "GB/s");
    result("all_gather_to_memcpy", memory / t, "ratio");
    t = slowest(exchange, REPEATS);
    result("all_to_all", t, "s");
    result("all_to_all_to_memcpy", memory / t, "ratio");
    result("sum_ranks", slowest(add, REPEATS), "s");
    t = slowest(exchange_and_add, REPEATS);
    result("reduce_scatter", t, "s");
    result("reduce_scatter_to_memcpy", memory / t, "ratio");
#ifdef HAVE_MPI
    if (R > 1) {
        double theirs = slowest(mpi_reduce_scatter, 2);
        result("mpi_reduce_scatter", theirs, "s");
        result("reduce_scatter_to_mpi", theirs / t, "times_faster");
    }
#endif
    double busy, blocked;
    comm_times(&busy, &blocked);
    result("busy", busy, "s");
    comm_end();
    return 0;
}
