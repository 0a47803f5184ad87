// The ceiling of decoding: how fast all threads read memory from one end to the other.
//
//   read_bandwidth [BYTES [RUNS [THREADS]]]
//
// BYTES (default 512 MiB, and never below four times the last cache, so that memory is read and not the cache) are
// written once and then read RUNS times (default 20), each thread a part of them. Prints the fastest run, which is what
// the memory can do, and the median.
#include <stdlib.h>
#include <unistd.h>
#include "common.h"
#ifdef _OPENMP
#include <omp.h>
#endif

#define LANES 8                      // sums side by side: the adds must not be what is measured

static size_t last_cache(void) {
    long l3 = sysconf(_SC_LEVEL3_CACHE_SIZE), l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return l3 > 0 ? (size_t)l3 : l2 > 0 ? (size_t)l2 : (size_t)32 << 20;
}

static uint64_t sum_of(const uint64_t *p, size_t n) {
    typedef uint64_t Vector __attribute__((vector_size(64)));
    const Vector *v = (const Vector *)(const void *)p;
    Vector sum[LANES] = {{0}};
    for (size_t i = 0; i + LANES <= n / 8; i += LANES)
        for (size_t k = 0; k < LANES; k++) sum[k] += v[i + k];
    uint64_t s = 0;
    for (size_t k = 0; k < LANES; k++)
        for (int j = 0; j < 8; j++) s += sum[k][j];
    return s;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    program_name = "read_bandwidth";
    Err err = {0};
    long long bytes = argc > 1 ? atoll(argv[1]) : 512ll << 20, runs = argc > 2 ? atoll(argv[2]) : 20;
    int threads = argc > 3 ? atoi(argv[3]) : 0;
    if (argc > 4 || bytes < 1 || bytes > 1ll << 40 || runs < 1 || runs > 100000 || threads < 0 || threads > 4096) {
        err_set(&err, E_USAGE, "usage: read_bandwidth [BYTES [RUNS [THREADS]]]");
        die(&err);
    }
#ifdef _OPENMP
    if (threads) omp_set_num_threads(threads);
    threads = omp_get_max_threads();
#else
    threads = 1;
#endif
    size_t least = 4 * last_cache(), size = (size_t)bytes > least ? (size_t)bytes : least;
    size_t n = size / 8 / (size_t)threads / (8 * LANES) * (8 * LANES);        // of a thread
    size = n * 8 * (size_t)threads;
    void *memory;
    if (big_alloc(&memory, size, "the memory to read", &err) < 0) die(&err);
    uint64_t *p = memory, check = 0;
    double *seconds = xmalloc((size_t)runs * sizeof *seconds);
    // Written by the threads that will read it.
    #pragma omp parallel for schedule(static)
    for (int t = 0; t < threads; t++)
        for (size_t i = (size_t)t * n; i < ((size_t)t + 1) * n; i++) p[i] = i * 2654435761u + 1;
    for (long long r = 0; r < runs; r++) {
        double start = now_seconds();
        #pragma omp parallel for schedule(static) reduction(+ : check)
        for (int t = 0; t < threads; t++) check += sum_of(p + (size_t)t * n, n);
        seconds[r] = now_seconds() - start;
    }
    qsort(seconds, (size_t)runs, sizeof *seconds, ascending);
    printf("# %zu MB, %d threads, %lld runs, check %llu\n", size / 1000000, threads, runs, (unsigned long long)check);
    printf("result read_bandwidth %.3f GB/s\n", (double)size / seconds[0] / 1e9);
    printf("result read_bandwidth_median %.3f GB/s\n", (double)size / seconds[runs / 2] / 1e9);
    free(seconds);
    free(memory);
    return 0;
}
