// Picks a backend and hands out its memory.
#include "device.h"
#include "cpu/isa.h"
#include "cpu/matmul.h"
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

const Ops *ops;
static char description[256];
static int threads_used = 1;
static int local_rank, local_size = 1;      // device_choose
static int index_used = -1, sharers = 1;

// The CUDA wing is linked into a program or it is not: a weak symbol is NULL where it is missing.
extern const DeviceWing device_wing_cuda __attribute__((weak));
static const DeviceWing *wing;      // NULL: the CPU

// The first error wins: what follows is mostly its consequence. Operations may meet one on any thread.
static Err first_error;
static atomic_int error_state;      // 0 none, 1 being written, 2 there

void ops_set_error(int code, const char *fmt, ...) {
    int none = 0;
    if (!atomic_compare_exchange_strong(&error_state, &none, 1)) return;
    va_list args;
    va_start(args, fmt);
    first_error.code = code;
    vsnprintf(first_error.text, sizeof first_error.text, fmt, args);
    va_end(args);
    atomic_store(&error_state, 2);
}

void device_wait(void) {
    if (wing) wing->wait();
}

int device_sync(Err *err) {
    device_wait();
    if (atomic_load(&error_state) != 2) return 0;
    Err e = first_error;
    atomic_store(&error_state, 0);
    return err_set(err, e.code, "%s", e.text);
}

static void cpu_model(char *name, size_t size) {
    snprintf(name, size, "unknown processor");
    FILE *f = fopen("/proc/cpuinfo", "r");
    if (!f) return;
    char line[256];
    while (fgets(line, sizeof line, f)) {
        char *value = strchr(line, ':');
        if (strncmp(line, "model name", 10) != 0 || !value) continue;
        value += 1 + strspn(value + 1, " \t");
        value[strcspn(value, "\n")] = 0;
        snprintf(name, size, "%s", value);
        break;
    }
    fclose(f);
}

static void cpu_init(int threads) {
#ifdef _OPENMP
    if (threads) omp_set_num_threads(threads);
    else omp_set_num_threads(omp_get_num_procs());
    threads_used = omp_get_max_threads();
#else
    (void)threads;
#endif
    (void)cpu_isa();                             // chosen, and said, before threads ask
    char model[128];
    cpu_model(model, sizeof model);
    snprintf(description, sizeof description, "cpu: %s, %d thread%s, %s", model, threads_used,
             threads_used == 1 ? "" : "s", cpu_matmul_description());
    wing = NULL;
    ops = &ops_cpu;
    index_used = -1;
    sharers = local_size;
}

void device_choose(int rank, int size) {
    local_rank = rank;
    local_size = size;
}

int device_init(const char *name, int threads, Err *err) {
    if (threads < 0 || threads > 1024)
        return err_set(err, E_USAGE, "threads: %d is not between 0 (all cores) and 1024", threads);
#ifndef _OPENMP
    if (threads > 1)
        return err_set(err, E_USAGE, "threads: this build has no OpenMP and runs on one thread, not %d", threads);
#endif
    bool automatic = !name || !strcmp(name, "auto"), cuda = !automatic && !strcmp(name, "cuda");
    if (!automatic && !cuda && strcmp(name, "cpu"))
        return err_set(err, E_USAGE, "device %s: unknown; use auto, cpu or cuda", name);
    if (cuda && !&device_wing_cuda)
        return err_set(err, E_FAIL, "device cuda: this build has no CUDA wing; use --device cpu, or build where nvcc is "
                                     "(make CUDA_HOME=...)");
    if ((automatic || cuda) && &device_wing_cuda) {
        char why[192];
        int n = device_wing_cuda.count(), index = n > 0 ? local_rank % n : 0;
        if (device_wing_cuda.available(index, why, sizeof why)) {
            cpu_init(threads);                      // the host's share of the work uses threads too
            int rc = device_wing_cuda.init(index, description, sizeof description, err);
            if (rc < 0) return rc;
            wing = &device_wing_cuda;
            ops = wing->ops;
            index_used = index;
            sharers = (local_size - index + n - 1) / n;    // local ranks index, index + n, ...
            return 0;
        }
        if (cuda) return err_set(err, E_FAIL, "device cuda: %s; use --device cpu", why);
    }
    cpu_init(threads);
    return 0;
}

int device_threads(void) { return threads_used; }
const char *device_description(void) { return description; }
bool device_is_host(void) { return !wing; }
int device_index(void) { return index_used; }
uint64_t device_identity(void) { return wing ? wing->identity() : 0; }
int device_sharers(void) { return sharers; }
void device_shared_by(int n) { sharers = n; }
void device_enter_thread(void) {
    if (wing) wing->enter_thread();
}

void device_memory(double *available, double *total) {
    if (wing) {
        wing->memory(available, total);
    } else {
        *total = (double)physical_memory_bytes();
        *available = *total * 0.98;
    }
    *available /= sharers;
    *total /= sharers;
}
int device_alloc(void **out, size_t bytes, const char *what, Err *err) {
    return wing ? wing->alloc(out, bytes, what, err) : big_alloc(out, bytes, what, err);
}
void device_free(void *p) {
    if (wing) wing->free(p);
    else free(p);
}
void device_zero(void *p, size_t bytes) {
    if (wing) wing->zero(p, bytes);
    else memset(p, 0, bytes);
}
void device_copy_in(void *dev, const void *host, size_t bytes) {
    if (wing) wing->copy_in(dev, host, bytes);
    else memcpy(dev, host, bytes);
}
void device_copy_out(void *host, const void *dev, size_t bytes) {
    if (wing) wing->copy_out(host, dev, bytes);
    else memcpy(host, dev, bytes);
}
void device_step(uint64_t key, void (*step)(void *ctx), void *ctx) {
    if (wing) wing->step(key, step, ctx);
    else step(ctx);
}

// ---------------------------------------------------------------------------------------------
// Time marks: what the CPU was asked for is done when it returns.
void (*device_span)(const char *what, int begin, int end);
static double marks[DEVICE_MARKS];
static int n_marks;

int device_mark(void) {
    if (wing) return wing->mark();
    if (n_marks == DEVICE_MARKS) return -1;
    marks[n_marks] = now_seconds();
    return n_marks++;
}
int device_marks_read(double seconds[DEVICE_MARKS]) {
    if (wing) return wing->marks_read(seconds);
    int n = n_marks;
    memcpy(seconds, marks, (size_t)n * sizeof *marks);
    n_marks = 0;
    return n;
}

// ---------------------------------------------------------------------------------------------
// The arithmetic peak: independent chains of multiply-adds in registers, sixteen being more than pipelines of up to six
// cycles that take two instructions a cycle need.
#define CHAINS 16

// Rounds of CHAINS multiply-adds; returns a sum so that none can be left out.
#if defined(__AVX512BF16__) && defined(__AVX512F__) && !defined(PRECISION_FP32)
#define PEAK_SOURCE "avx512-bf16 vdpbf16ps"
#define PEAK_FLOPS_EACH 64.0            // 16 lanes of two multiplications and two additions
static float peak_rounds(int rounds) {
    __m512 c[CHAINS];
    __m512bh a = (__m512bh)_mm512_set1_epi32(0x3c003c00), b = (__m512bh)_mm512_set1_epi32(0x3f803f80);
#pragma GCC unroll 16
    for (int i = 0; i < CHAINS; i++) c[i] = _mm512_set1_ps((float)i);
    for (int r = 0; r < rounds; r++) {
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; i++) c[i] = _mm512_dpbf16_ps(c[i], a, b);
    }
    __m512 s = c[0];
    for (int i = 1; i < CHAINS; i++) s = _mm512_add_ps(s, c[i]);
    return _mm512_reduce_add_ps(s);
}
#elif defined(__AVX512F__)
#define PEAK_SOURCE "avx512 vfmadd"
#define PEAK_FLOPS_EACH 32.0
static float peak_rounds(int rounds) {
    __m512 c[CHAINS], a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(0.25f);
#pragma GCC unroll 16
    for (int i = 0; i < CHAINS; i++) c[i] = _mm512_set1_ps((float)i);
    for (int r = 0; r < rounds; r++) {
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; i++) c[i] = _mm512_fmadd_ps(c[i], a, b);
    }
    __m512 s = c[0];
    for (int i = 1; i < CHAINS; i++) s = _mm512_add_ps(s, c[i]);
    return _mm512_reduce_add_ps(s);
}
#elif defined(__AVX2__) && defined(__FMA__)
#define PEAK_SOURCE "avx2 vfmadd"
#define PEAK_FLOPS_EACH 16.0
#undef CHAINS
#define CHAINS 12                       // of 16 registers
static float peak_rounds(int rounds) {
    __m256 c[CHAINS], a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0.25f);
#pragma GCC unroll 16
    for (int i = 0; i < CHAINS; i++) c[i] = _mm256_set1_ps((float)i);
    for (int r = 0; r < rounds; r++) {
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; i++) c[i] = _mm256_fmadd_ps(c[i], a, b);
    }
    __m256 s = c[0];
    for (int i = 1; i < CHAINS; i++) s = _mm256_add_ps(s, c[i]);
    float lane[8], sum = 0;
    _mm256_storeu_ps(lane, s);
    for (int i = 0; i < 8; i++) sum += lane[i];
    return sum;
}
#else
#define PEAK_SOURCE "compiler's 4-lane multiply and add"
#define PEAK_FLOPS_EACH 8.0
static float peak_rounds(int rounds) {
    typedef float v4 __attribute__((vector_size(16)));
    v4 c[CHAINS], a = {0.5f, 0.5f, 0.5f, 0.5f}, b = {0.25f, 0.25f, 0.25f, 0.25f};
#pragma GCC unroll 16
    for (int i = 0; i < CHAINS; i++) c[i] = b * (float)i;
    for (int r = 0; r < rounds; r++) {
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; i++) c[i] = c[i] * a + b;
    }
    v4 s = c[0];
    for (int i = 1; i < CHAINS; i++) s += c[i];
    return s[0] + s[1] + s[2] + s[3];
}
#endif

// Volatile, so that the compiler may not know that every call does the same and nobody reads it.
static volatile int peak_length = 300000;
static volatile float peak_sink;

double device_peak_flops(const char **source) {
    if (wing) return wing->peak_flops(source);
    static double best;
    if (source) *source = PEAK_SOURCE;
    if (best > 0) return best;
    // Every thread runs rounds of under a millisecond side by side with the others and counts its fastest, so that
    // another process which takes a core for a moment does not lower the figure. The round at whose end time is up is
    // left out: a neighbour on the same core may have stopped by then.
    double total = 0;
#pragma omp parallel reduction(+ : total)
    {
        double fastest = 0;
#pragma omp barrier
        for (double begin = now_seconds(), t0 = begin;;) {
            int rounds = peak_length;
            peak_sink = peak_rounds(rounds);
            double t1 = now_seconds(), flops = PEAK_FLOPS_EACH * CHAINS * rounds / (t1 - t0);
            if (t1 - begin > 0.2 && fastest > 0) break;
            if (flops > fastest) fastest = flops;
            t0 = t1;
        }
        total += fastest;
    }
    best = total;
    return best;
}
