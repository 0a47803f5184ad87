// What the laboratories share. A laboratory is one .cu file with a main: numbered variants of one kernel in rising
// cleverness, each checked against a plain CPU reference at every block size, then timed. Compiled by nvcc alone,
//   nvcc -O3 -arch=native -fmad=false -DQLLM_FMAD_FALSE -I. -Illmc -Idev/cuda dev/cuda/NAME.cu -o NAME && ./NAME 3
// or, to be checked without a GPU (small shapes, no times), against the simulator:
//   g++ -std=c++17 -O2 -march=native -ffp-contract=off -I. -Illmc -Idev/cudasim -Idev/cuda -x c++ dev/cuda/NAME.cu
//       dev/cudasim/cudasim.cpp dev/cudasim/stream.cpp -o NAME
// which is how make test-cudasim runs them all.
// An argument names the variant; without one, or with 0, all run. The exit status is 1 if a check failed.
//
//   static void run(int variant) {
//       for (int b = 0; b < LAB_BLOCKS; b++) {
//           launch(variant, lab_blocks[b], out, in, n);
//           lab_check("out", out, want, n, 0.0);
//           double s = lab_time([&] { launch(variant, lab_blocks[b], out, in, n); });
//           lab_report(variant, lab_blocks[b], s, bytes, 0.0);
//       }
//   }
//   int main(int argc, char **argv) { return lab_main(argc, argv, VARIANTS, run); }
#ifndef QLLM_LAB_COMMON_H
#define QLLM_LAB_COMMON_H
#include <algorithm>
#include <stdarg.h>
#include <stdio.h>
#include "cuda/cuda.cuh"

#ifdef __CUDACC__
#define LAB_GPU 1               // a size is LAB_GPU ? the real one : one that the simulator runs in a second
#else
#define LAB_GPU 0
#endif

static const int lab_blocks[] = {32, 64, 128, 256, 512, 1024};
#define LAB_BLOCKS ((int)(sizeof lab_blocks / sizeof lab_blocks[0]))

static int lab_failures;

// Stops the program: a laboratory has nothing to go on with.
#define LAB_CUDA(call) \
    do { \
        cudaError_t lab_error = (call); \
        if (lab_error != cudaSuccess) { \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(lab_error)); \
            exit(1); \
        } \
    } while (0)

// What a .cu file of the wing needs around it, so that a laboratory can include one as its last variant.
cudaStream_t cuda_stream = 0;
void ops_set_error(int, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fprintf(stderr, "\n");
    exit(1);
}
void *cuda_workspace(size_t bytes, CudaWorkspace) {
    static void *p;
    static size_t size;
    if (bytes <= size) return p;
    LAB_CUDA(cudaFree(p));
    LAB_CUDA(cudaMalloc(&p, bytes));
    size = bytes;
    return p;
}

// ---------------------------------------------------------------------------------------------
// Arrays.

static inline void *lab_host(size_t bytes) {
    void *p = calloc(bytes ? bytes : 1, 1);
    if (!p) {
        fprintf(stderr, "no %zu bytes of memory\n", bytes);
        exit(1);
    }
    return p;
}
template <class T> static inline T *lab_array(size_t n) { return (T *)lab_host(n * sizeof(T)); }
template <class T> static inline T *lab_device(size_t n) {
    void *p = NULL;
    LAB_CUDA(cudaMalloc(&p, n * sizeof(T)));
    return (T *)p;
}
template <class T> static inline T *lab_to_device(const T *host, size_t n) {
    T *p = lab_device<T>(n);
    LAB_CUDA(cudaMemcpy(p, host, n * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}
// Uniform in [-scale, scale), the same for the same (stream, i): a hash of both.
static inline float lab_random(uint32_t stream, uint64_t i, float scale) {
    uint64_t z = (i + 1) * 0x9e3779b97f4a7c15u + (uint64_t)stream * 0xd1342543de82ef95u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return scale * ((float)(z >> 40) * (2.0f / 16777216.0f) - 1.0f);
}
static inline floatX *lab_random_x(size_t n, uint32_t stream, float scale) {
    floatX *p = lab_array<floatX>(n);
    for (size_t i = 0; i < n; i++) p[i] = f2x(lab_random(stream, i, scale));
    return p;
}

// ---------------------------------------------------------------------------------------------
// Checks.

static inline double lab_value(float v) { return (double)v; }
#ifndef PRECISION_FP32
static inline double lab_value(floatX v) { return (double)x2f(v); }
#endif
static inline double lab_value(uint8_t v) { return v; }
static inline double lab_value(int32_t v) { return v; }

// got (n) on the device against want (n) on the host: |got - want| <= tol * max(1, |want|), tol 0 meaning equal values
// (any NaN equals any NaN). Prints the first difference and counts a failure. got is filled with 0xff bytes afterwards,
// so that the next kernel cannot pass on this one's results.
template <class T> static bool lab_check(const char *name, T *got, const T *want, size_t n, double tol) {
    T *h = lab_array<T>(n);
    size_t bad = 0, first = 0;
    LAB_CUDA(cudaGetLastError());
    LAB_CUDA(cudaMemcpy(h, got, n * sizeof(T), cudaMemcpyDeviceToHost));
    LAB_CUDA(cudaMemset(got, 0xff, n * sizeof(T)));
    for (size_t i = 0; i < n; i++) {
        double a = lab_value(h[i]), b = lab_value(want[i]), size = fabs(b) > 1.0 ? fabs(b) : 1.0;
        bool ok = a == b || (a != a && b != b) || fabs(a - b) <= tol * size;
        if (!ok && bad++ == 0) first = i;
    }
    if (bad) {
        printf("  %s: %zu of %zu differ, the first at %zu: %.9g, expected %.9g\n", name, bad, n, first,
               lab_value(h[first]), lab_value(want[first]));
        lab_failures++;
    }
    free(h);
    return bad == 0;
}

// ---------------------------------------------------------------------------------------------
// Times. The simulator knows none: there they are 0, and nothing is printed.

#define LAB_REPEATS 21

#ifdef __CUDACC__
static __global__ void lab_read_kernel(const uint4 *p, size_t n, unsigned *sink) {
    unsigned any = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        uint4 v = p[i];
        any |= v.x ^ v.y ^ v.z ^ v.w;
    }
    if (any == 0x12345678u) *sink = any;                        // never (p holds zeros), but the compiler cannot know
}

// Leaves nothing of the laboratory's data in the L2 cache. By reading, not by writing: written lines would still have
// to go to memory, at the expense of the kernel that is timed next.
static void lab_flush_l2(void) {
    static uint4 *p;
    static size_t n;
    if (!p) {
        int device = 0, l2 = 0;
        LAB_CUDA(cudaGetDevice(&device));
        LAB_CUDA(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device));
        n = ((size_t)l2 * 2 + (1 << 20)) / sizeof *p;
        p = lab_device<uint4>(n);
        LAB_CUDA(cudaMemset(p, 0, n * sizeof *p));
    }
    lab_read_kernel<<<1024, 256, 0, cuda_stream>>>(p, n, (unsigned *)p);
}

// Seconds between two events around f(), which launches on cuda_stream.
template <class F> static double lab_seconds(F f) {
    static cudaEvent_t a, b;
    if (!a) {
        LAB_CUDA(cudaEventCreate(&a));
        LAB_CUDA(cudaEventCreate(&b));
    }
    float ms = 0.0f;
    LAB_CUDA(cudaEventRecord(a, cuda_stream));
    f();
    LAB_CUDA(cudaEventRecord(b, cuda_stream));
    LAB_CUDA(cudaEventSynchronize(b));
    LAB_CUDA(cudaGetLastError());
    LAB_CUDA(cudaEventElapsedTime(&ms, a, b));
    return (double)ms * 1e-3;
}

// Seconds that f() takes with a cold L2 cache: the median of LAB_REPEATS, after two runs that do not count.
template <class F> static double lab_time(F f) {
    double t[LAB_REPEATS];
    for (int i = -2; i < LAB_REPEATS; i++) {
        lab_flush_l2();
        double s = lab_seconds(f);
        if (i >= 0) t[i] = s;
    }
    std::sort(t, t + LAB_REPEATS);
    return t[LAB_REPEATS / 2];
}

// For kernels of a few microseconds, where two events would weigh: f(0), f(1), .. f(n - 1) back to back, the time of
// one. f(i) works on the i-th of several copies of the data, together larger than the L2 cache, so that each is cold.
template <class F> static double lab_time_many(int n, F f) {
    return lab_time([&] { for (int i = 0; i < n; i++) f(i); }) / n;
}

// Bytes a second, read and written counted each, of the device's own copy: the ceiling of what is bound by memory.
static inline double lab_copy_bandwidth(void) {
    static double rate;
    if (rate == 0.0) {
        const size_t bytes = (size_t)256 << 20;
        char *a = lab_device<char>(bytes), *b = lab_device<char>(bytes);
        LAB_CUDA(cudaMemset(a, 1, bytes));
        rate = 2.0 * (double)bytes / lab_time([&] {
            LAB_CUDA(cudaMemcpyAsync(b, a, bytes, cudaMemcpyDeviceToDevice, cuda_stream));
        });
        LAB_CUDA(cudaFree(a));
        LAB_CUDA(cudaFree(b));
    }
    return rate;
}
#else
template <class F> static inline double lab_time(F) { return 0.0; }
template <class F> static inline double lab_time_many(int, F) { return 0.0; }
static inline double lab_copy_bandwidth(void) { return 0.0; }
#endif

// One line of the table: what moves `bytes` and computes `flops` in `seconds` (either 0 where it does not matter).
static inline void lab_report(int variant, int block, double seconds, double bytes, double flops) {
    if (seconds == 0.0) return;
    printf("variant %2d  block %4d  %9.2f us", variant, block, seconds * 1e6);
    if (bytes > 0.0)
        printf("  %7.1f GB/s  %5.1f%% of copy", bytes / seconds * 1e-9, 100.0 * bytes / seconds / lab_copy_bandwidth());
    if (flops > 0.0) printf("  %7.1f TFLOP/s", flops / seconds * 1e-12);
    printf("\n");
}

// Runs the variants 1..n that the arguments ask for and says how the checks went.
static inline int lab_main(int argc, char **argv, int n, void (*run)(int variant)) {
    int only = argc > 1 ? atoi(argv[1]) : 0;
    if (argc > 2 || only < 0 || only > n || (argc > 1 && only == 0 && strcmp(argv[1], "0") != 0)) {
        fprintf(stderr, "usage: %s [VARIANT, 1 to %d; 0: all]\n", argv[0], n);
        return 2;
    }
#ifdef __CUDACC__
    cudaDeviceProp prop;
    LAB_CUDA(cudaGetDeviceProperties(&prop, 0));
    printf("%s, a copy moves %.0f GB/s\n", prop.name, lab_copy_bandwidth() * 1e-9);
#endif
    for (int v = 1; v <= n; v++) {
        if (only && v != only) continue;
        int before = lab_failures;
        run(v);
        printf("%s variant %d\n", lab_failures == before ? "ok" : "not ok", v);
        fflush(stdout);
    }
    return lab_failures != 0;
}
#endif
