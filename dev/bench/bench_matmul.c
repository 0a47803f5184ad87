// How close to the processor's arithmetic peak do the matmuls and the attention of the 135M shape run?
//
// The peak is measured in the same run by a register-only loop (device_peak_flops). Each shape runs at least REPEATS
// times and half a second; the best time counts, since other processes only ever add to it, and the median is shown
// beside it. FLOPs: 2 N C OC a product. Attention, causal: 2 products of 2 HS operations for each of T (T + 1) / 2
// pairs a head forward, 5 backward; the products that are recomputed for tiles' masked corners do not count.
//
// Linears with INT8 weights run beside them, quantizing and scaling included; their ratio is the time of the linear in
// X over theirs.
#include "device.h"
#include <stdlib.h>

#define REPEATS 10

static double peak;
static uint32_t state = 1;

static floatX *random_x(size_t n) {
    floatX *p = xmalloc(n * sizeof *p);
    for (size_t i = 0; i < n; i++) {
        state = state * 1664525u + 1013904223u;
        p[i] = f2x((float)(state >> 8) / 8388608.0f - 1.0f);
    }
    return p;
}

// Zeros, aligned as device memory is: large results may be written past the caches.
static float *aligned_f32(size_t n) {
    size_t bytes = (n * sizeof(float) + 63) / 64 * 64;
    float *p = aligned_alloc(64, bytes);
    if (!p) abort();
    memset(p, 0, bytes);
    return p;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

typedef struct { double best, median; } Times;

// Times `run(arg)` after one run that is not counted.
static Times measure(void (*run)(const void *), const void *arg) {
    enum { MOST = 1000 };
    static double t[MOST];
    run(arg);
    int n = 0;
    for (double begin = now_seconds(); n < MOST && (n < REPEATS || now_seconds() - begin < 0.5); n++) {
        double start = now_seconds();
        run(arg);
        t[n] = now_seconds() - start;
    }
    qsort(t, (size_t)n, sizeof *t, by_value);
    return (Times){t[0], t[n / 2]};
}

typedef struct {
    floatX *x, *w, *y, *dx, *dy_scaled;
    int8_t *codes;
    float *y32, *dw, *wscale;
    size_t N;
    int C, OC;
} Linear;

static void forward(const void *p) {
    const Linear *l = p;
    ops->linear_forward(l->y, l->x, l->w, NULL, l->N, l->C, l->OC);
}
static void forward_scaled(const void *p) {
    const Linear *l = p;
    ops->linear_forward(l->y, l->x, l->w, l->wscale, l->N, l->C, l->OC);
}
static void forward_f32(const void *p) {
    const Linear *l = p;
    ops->linear_forward_f32(l->y32, l->x, l->w, NULL, l->N, l->C, l->OC);
}
static void backward_input(const void *p) {
    const Linear *l = p;
    ops->linear_backward_input(l->dx, l->y, l->w, NULL, NULL, l->N, l->C, l->OC);
}
static void backward_weight(const void *p) {
    const Linear *l = p;
    ops->linear_backward_weight(l->dw, l->y, l->x, l->N, l->C, l->OC, false);
}
static void backward_weight_add(const void *p) {
    const Linear *l = p;
    ops->linear_backward_weight(l->dw, l->y, l->x, l->N, l->C, l->OC, true);
}

static void w8_forward(const void *p) {
    const Linear *l = p;
    ops->linear_w8_forward(l->y, l->x, l->codes, l->wscale, l->N, l->C, l->OC);
}
static void w8_forward_f32(const void *p) {
    const Linear *l = p;
    ops->linear_w8_forward_f32(l->y32, l->x, l->codes, l->wscale, l->N, l->C, l->OC);
}
static void w8_backward_input(const void *p) {
    const Linear *l = p;
    ops->linear_w8_backward_input(l->dx, l->y, l->codes, l->wscale, l->dy_scaled, l->N, l->C, l->OC);
}
static void i8_forward(const void *p) {
    const Linear *l = p;
    ops->linear_i8_forward(l->y, l->x, l->codes, l->wscale, l->N, l->C, l->OC);
}
static void i8_forward_f32(const void *p) {
    const Linear *l = p;
    ops->linear_i8_forward_f32(l->y32, l->x, l->codes, l->wscale, l->N, l->C, l->OC);
}
static void i8_backward_input(const void *p) {
    const Linear *l = p;
    ops->linear_i8_backward_input(l->dx, l->y, l->codes, l->wscale, l->N, l->C, l->OC);
}
static void i8_backward_weight(const void *p) {
    const Linear *l = p;
    ops->linear_i8_backward_weight(l->dw, l->y, l->x, l->N, l->C, l->OC, false);
}
static void i8_backward_weight_add(const void *p) {
    const Linear *l = p;
    ops->linear_i8_backward_weight(l->dw, l->y, l->x, l->N, l->C, l->OC, true);
}

typedef struct { const char *name; size_t N; int C, OC; bool head; } LinearShape;
typedef struct { double x, w8, i8; } LinearTimes;              // of the three products that a step takes

static LinearTimes bench_linear(const LinearShape *s) {
    size_t nx = s->N * (size_t)s->C, nw = (size_t)s->C * (size_t)s->OC, ny = s->N * (size_t)s->OC;
    Linear l = {random_x(nx), random_x(nw), random_x(ny), xcalloc(nx, sizeof(floatX)), xcalloc(ny, sizeof(floatX)),
                xmalloc(nw), aligned_f32(ny), aligned_f32(nw),
                xcalloc((size_t)s->OC, sizeof(float)), s->N, s->C, s->OC};
    for (int o = 0; o < s->OC; o++) l.wscale[o] = 0.01f;
    for (size_t i = 0; i < nw; i++) l.codes[i] = (int8_t)(x2f(l.w[i]) * 127);
    struct {
        const char *name;
        void (*run)(const void *), (*w8)(const void *), (*i8)(const void *);
        bool counts;
    } kind[] = {
        {"forward", s->head ? forward_f32 : forward, s->head ? w8_forward_f32 : w8_forward,
         s->head ? i8_forward_f32 : i8_forward, true},
        {"forward, row scales", forward_scaled, NULL, NULL, false},
        {"backward input", backward_input, w8_backward_input, i8_backward_input, true},
        {"backward weight", backward_weight, NULL, i8_backward_weight, !s->head},
        {"backward weight +=", backward_weight_add, NULL, i8_backward_weight_add, s->head},
    };
    double flops = 2.0 * (double)s->N * s->C * s->OC;
    LinearTimes total = {0};
    for (size_t k = 0; k < sizeof kind / sizeof *kind; k++) {
        Times t = measure(kind[k].run, &l), w8 = t, i8 = t;
        printf("  %-6s %4d -> %5d  N %4zu  %-19s %7.2f ms (median %7.2f)  %7.1f GFLOP/s  %.3f of peak", s->name,
               s->C, s->OC, s->N, kind[k].name, t.best * 1e3, t.median * 1e3, flops / t.best * 1e-9,
               flops / t.best / peak);
        if (kind[k].w8) {
            w8 = measure(kind[k].w8, &l);
            printf("; INT8 weights %7.2f ms, %.2f x", w8.best * 1e3, t.best / w8.best);
        }
        if (kind[k].i8) {
            i8 = measure(kind[k].i8, &l);
            printf("; integers %7.2f ms, %.2f x", i8.best * 1e3, t.best / i8.best);
        }
        printf("\n");
        if (kind[k].counts) {
            total.x += t.best;
            total.w8 += w8.best;
            total.i8 += i8.best;
        }
    }
    printf("result matmul_%s_peak_share %.3f ratio\n", s->name, 3 * flops / total.x / peak);
    printf("result matmul_%s_w8_speed %.3f ratio\n", s->name, total.x / total.w8);
    printf("result matmul_%s_int8_speed %.3f ratio\n", s->name, total.x / total.i8);
    free(l.x); free(l.w); free(l.y); free(l.dx); free(l.dy_scaled); free(l.codes); free(l.y32); free(l.dw);
    free(l.wscale);
    return total;
}

typedef struct {
    floatX *qkv, *o, *dout, *dqkv;
    float *lse;
    int B, T, NH, NKV, HS;
} Attention;

static void attention_forward(const void *p) {
    const Attention *a = p;
    int ld = (a->NH + 2 * a->NKV) * a->HS;
    const floatX *k = a->qkv + a->NH * a->HS, *v = k + a->NKV * a->HS;
    ops->attention_forward(a->o, a->lse, a->qkv, k, v, a->B, a->T, a->T, a->NH, a->NKV, a->HS, a->NH * a->HS, ld, ld,
                           (size_t)a->T * (size_t)ld);
}
static void attention_backward(const void *p) {
    const Attention *a = p;
    ops->attention_backward(a->dqkv, a->dout, a->qkv, a->o, a->lse, a->B, a->T, a->NH, a->NKV, a->HS);
}

static void bench_attention(const char *name, int B, int T, int NH, int NKV, int HS) {
    size_t rows = (size_t)B * (size_t)T, ld = (size_t)((NH + 2 * NKV) * HS), ldo = (size_t)(NH * HS);
    Attention a = {random_x(rows * ld), xcalloc(rows * ldo, sizeof(floatX)), random_x(rows * ldo),
                   xcalloc(rows * ld, sizeof(floatX)), xcalloc(rows * (size_t)NH, sizeof(float)), B, T, NH, NKV, HS};
    double product = 2.0 * HS * B * NH * (0.5 * T * (T + 1));
    Times f = measure(attention_forward, &a), b = measure(attention_backward, &a);
    const Times *times[] = {&f, &b};
    for (int i = 0; i < 2; i++) {
        double flops = (i ? 5 : 2) * product / times[i]->best;
        printf("  attention B %d T %4d NH %d NKV %d HS %3d  %-8s %7.2f ms (median %7.2f)  %7.1f GFLOP/s %.3f of peak\n",
               B, T, NH, NKV, HS, i ? "backward" : "forward", times[i]->best * 1e3, times[i]->median * 1e3,
               flops * 1e-9, flops / peak);
    }
    printf("result attention_fwd_bwd_%s_ms %.2f ms\n", name, (f.best + b.best) * 1e3);
    printf("result attention_fwd_bwd_%s_peak_share %.3f ratio\n", name, 7 * product / (f.best + b.best) / peak);
    free(a.qkv); free(a.o); free(a.dout); free(a.dqkv); free(a.lse);
}

int main(int argc, char **argv) {
    Err err;
    program_name = "bench_matmul";
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc > 2 || (argc == 2 && (argv[1][0] < '0' || argv[1][0] > '9'))) {
        err_set(&err, E_USAGE, "usage: bench_matmul [THREADS]");
        die(&err);
    }
    if (device_init("cpu", argc == 2 ? atoi(argv[1]) : 0, &err) < 0) die(&err);
    const char *source;
    peak = device_peak_flops(&source);
    printf("%s\npeak %.1f GFLOP/s (%s), build %s\n", device_description(), peak * 1e-9, source, FLOATX_NAME);
    static const LinearShape shapes[] = {
        {"qkv", 2048, 576, 960, false}, {"o", 2048, 576, 576, false}, {"gateup", 2048, 576, 3072, false},
        {"down", 2048, 1536, 576, false}, {"head", 512, 576, 49152, true},
    };
    LinearTimes step = {0};
    double flops = 0;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const LinearShape *s = &shapes[i];
        double times = s->head ? 2048.0 / (double)s->N : 30.0;  // 30 blocks; the head's chunks
        LinearTimes t = bench_linear(s);
        step.x += times * t.x;
        step.w8 += times * t.w8;
        step.i8 += times * t.i8;
        flops += times * 6.0 * (double)s->N * s->C * s->OC;
    }
    printf("  matmuls of a step of 2048 tokens: %.1f ms, %.1f GFLOP/s; INT8 weights %.1f ms, integers %.1f ms\n",
           step.x * 1e3, flops / step.x * 1e-9, step.w8 * 1e3, step.i8 * 1e3);
    printf("result matmul_135M_step_peak_share %.3f ratio\n", flops / step.x / peak);
    printf("result matmul_135M_step_w8_speed %.3f ratio\n", step.x / step.w8);
    printf("result matmul_135M_step_int8_speed %.3f ratio\n", step.x / step.i8);
    bench_attention("135M", 4, 512, 9, 3, 64);
    bench_attention("135M_T2048", 1, 2048, 9, 3, 64);
    bench_attention("HS128", 1, 1024, 8, 2, 128);
    if (device_sync(&err) < 0) die(&err);
    return 0;
}
