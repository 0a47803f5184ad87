// How close do the integer linears of serving run to what the machine can do?
//
// Few tokens: against a streaming read of as many bytes, from a buffer that no cache holds. Many tokens: against the
// peak of 8-bit products, found by a loop that only uses registers. Ceilings are measured between the shapes, in the
// same run; everything is the best of several repeats, since other processes only ever add to a time. Operations: 2 N C
// OC. Quantizing the inputs and rounding the outputs is part of the time.
//
//   bench_served_int [THREADS [PART OF A NAME]]
#include "cpu/isa.h"
#include "device.h"
#include "quant.h"
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

#define READ_BYTES ((size_t)256 << 20)

static uint32_t state = 1;

static uint32_t draw(void) {
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

static double best_of(void (*run)(const void *), const void *arg, double seconds, int least) {
    double best = INFINITY, begin = now_seconds();
    run(arg);
    for (int n = 0; n < least || now_seconds() - begin < seconds; n++) {
        double start = now_seconds();
        run(arg);
        double t = now_seconds() - start;
        if (t < best) best = t;
    }
    return best;
}

// --- ceilings ----------------------------------------------------------------------------------------------------
static volatile uint64_t sink;

static void read_all(const void *arg) {
    const char *p = arg;
    uint64_t total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total)
    for (size_t i = 0; i < READ_BYTES; i += 4096) {
        typedef uint64_t v8 __attribute__((vector_size(64)));
        v8 s[4] = {0};
        __builtin_prefetch(p + i + 8192);
        for (size_t j = 0; j < 4096; j += 256)
            for (size_t k = 0; k < 4; k++) {
                v8 v;
                memcpy(&v, p + i + j + k * 64, sizeof v);
                s[k] += v;
            }
        s[0] += s[1] + s[2] + s[3];
        for (int k = 0; k < 8; k++) total += s[0][k];
    }
    sink = total;
}

#define PEAK_ROUNDS 100000
static void multiply_registers(const void *arg) {
    (void)arg;
#if defined(__AVX512VNNI__)
    uint64_t total = 0;
#pragma omp parallel reduction(+ : total)
    {
        __m512i acc[12], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
        for (int i = 0; i < 12; i++) acc[i] = _mm512_set1_epi32(i);
        for (int n = 0; n < PEAK_ROUNDS; n++) {
#pragma GCC unroll 12
            for (int i = 0; i < 12; i++) acc[i] = _mm512_dpbusd_epi32(acc[i], a, b);
            __asm__ volatile("" : "+v"(a), "+v"(b));
        }
        for (int i = 0; i < 12; i++) total += (uint64_t)_mm512_reduce_add_epi32(acc[i]);
    }
    sink = total;
#endif
}

static double read_rate(const void *buffer) { return (double)READ_BYTES / best_of(read_all, buffer, 0.2, 5); }
static double peak_rate(int threads) {
#if defined(__AVX512VNNI__)
    return 2.0 * 64 * 12 * PEAK_ROUNDS * threads / best_of(multiply_registers, NULL, 0.1, 5);
#else
    (void)threads;
    return NAN;                         // known only where vpdpbusd is
#endif
}

// --- linears -----------------------------------------------------------------------------------------------------
typedef struct {
    const QuantScheme *scheme;
    int C, OC, copies;                  // copies: of the weight, so that none is still in cache when its turn comes
    size_t N, bytes;
    char *served;
    floatX *x, *y;
} Linear;

static void run_linear(const void *arg) {
    const Linear *l = arg;
    for (int i = 0; i < l->copies; i++)
        ops->served_forward(l->y, l->x, l->served + (size_t)i * l->bytes, &l->scheme->weight, &l->scheme->act, l->N,
                            l->C, l->OC);
}

static Linear new_linear(const QuantScheme *s, size_t N, int C, int OC, int copies) {
    Linear l = {.scheme = s, .C = C, .OC = OC, .copies = copies, .N = N};
    int64_t block[2];
    Err err;
    if (quant_block_shape(&s->weight, OC, C, block, &err) < 0) die(&err);
    size_t packed = (size_t)OC * quant_row_bytes(s->weight.bits, C), scales = (size_t)OC * (size_t)(C / block[1]);
    uint8_t *codes = xmalloc(packed);
    float *scale = xmalloc(scales * sizeof *scale);
    for (size_t i = 0; i < packed; i++) codes[i] = (uint8_t)draw();
    for (size_t i = 0; i < scales; i++) scale[i] = 0.0078125f;
    l.bytes = (ops->served_bytes(&s->weight, &s->act, OC, C) + 63) / 64 * 64;
    l.served = aligned_alloc(64, l.bytes * (size_t)copies);
    l.x = xmalloc(N * (size_t)C * sizeof *l.x);
    l.y = aligned_alloc(64, (N * (size_t)OC * sizeof *l.y + 63) / 64 * 64);
    if (!l.served || !l.y) abort();
    for (int i = 0; i < copies; i++)
        ops->served_pack(l.served + (size_t)i * l.bytes, codes, scale, NULL, &s->weight, &s->act, 0, OC, OC, C);
    for (size_t i = 0; i < N * (size_t)C; i++) l.x[i] = f2x((float)draw() / 8388608.0f - 1.0f);
    free(codes);
    free(scale);
    return l;
}

static void free_linear(Linear *l) {
    free(l->served);
    free(l->x);
    free(l->y);
}

int main(int argc, char **argv) {
    static const char *const schemes[] = {"8da4w-32", "8da4w-128", "int8dq"};
    static const int decode[][2] = {{576, 960}, {576, 3072}, {1536, 576}, {2048, 2048}, {2048, 16384}};     // C, OC
    static const int many[][3] = {{64, 576, 3072},  {256, 576, 960},  {256, 2048, 2048}, {2048, 576, 960},
                                  {2048, 576, 576}, {2048, 576, 3072}, {2048, 1536, 576}, {512, 2048, 8192}};
    int threads = argc > 1 ? atoi(argv[1]) : 0;
    const char *only = argc > 2 ? argv[2] : "";
    Err err;
    if (device_init("cpu", threads, &err) < 0) die(&err);
#ifdef _OPENMP
    threads = omp_get_max_threads();
#else
    threads = 1;
#endif
    printf("%s, %d threads, inputs %s\n", cpu_isa_name(cpu_isa()), threads, FLOATX_NAME);
    char *buffer = xmalloc(READ_BYTES);
    memset(buffer, 1, READ_BYTES);
    for (size_t i = 0; i < sizeof schemes / sizeof *schemes; i++) {
        QuantScheme s;
        if (quant_scheme_from_name(&s, schemes[i], &err) < 0) die(&err);
        for (size_t j = 0; j < sizeof decode / sizeof *decode; j++)
            for (size_t N = 1; N <= 8; N *= 2) {
                int C = decode[j][0], OC = decode[j][1];
                char name[96];
                snprintf(name, sizeof name, "served_%s_n%zu_c%d_oc%d_read", schemes[i], N, C, OC);
                if (!strstr(name, only)) continue;
                size_t bytes = ops->served_bytes(&s.weight, &s.act, OC, C);
                if (!bytes) continue;                   // groups that do not divide the row
                Linear l = new_linear(&s, N, C, OC, (int)((READ_BYTES / 2 + bytes - 1) / bytes));
                double ceiling = read_rate(buffer), t = best_of(run_linear, &l, 0.3, 3) / l.copies;
                double again = read_rate(buffer), rate = (double)bytes / t;
                if (again > ceiling) ceiling = again;
                printf("result %s %.3f ratio   # %.1f of %.1f GB/s, %.1f us\n", name, rate / ceiling, rate * 1e-9,
                       ceiling * 1e-9, t * 1e6);
                free_linear(&l);
            }
        for (size_t j = 0; j < sizeof many / sizeof *many; j++) {
            char name[96];
            snprintf(name, sizeof name, "served_%s_n%d_c%d_oc%d_peak", schemes[i], many[j][0], many[j][1], many[j][2]);
            if (!strstr(name, only)) continue;
            if (!ops->served_bytes(&s.weight, &s.act, many[j][2], many[j][1])) continue;
            Linear l = new_linear(&s, (size_t)many[j][0], many[j][1], many[j][2], 1);
            double peak = peak_rate(threads), t = best_of(run_linear, &l, 0.4, 3), again = peak_rate(threads);
            double rate = 2.0 * many[j][0] * many[j][1] * many[j][2] / t;
            if (again > peak) peak = again;
            printf("result %s %.3f ratio   # %.3f of %.3f TOP/s, %.1f us\n", name, rate / peak, rate * 1e-12,
                   peak * 1e-12, t * 1e6);
            free_linear(&l);
        }
    }
    free(buffer);
    return 0;
}
