// How close to the memory's read bandwidth do the linears of decoding run, one token at a time?
//
// All linears of a model's blocks and its head, each from its own memory, so that none is found in a cache. Bytes are
// those of the file: codes, bf16 scales and zero points, or bf16 weights. The ceiling is a streaming read by all
// threads of 256 MB, far more than the caches hold. Ceiling and schemes take turns. Other processes only ever add to a
// time, so the best of each linear, and of each piece of the stream, counts, and these are added up: what a token takes
// where nobody disturbs it.
//
//   bench_decode [THREADS [SECONDS a model [MODEL]]]
#include "device.h"
#include "quant.h"
#include <stdlib.h>

#define READ_BYTES ((size_t)256 << 20)
#define PIECE_BYTES ((size_t)4 << 20)
#define PIECES (READ_BYTES / PIECE_BYTES)
#define LEAST_ROUNDS 5

static uint32_t state = 1;
static uint32_t draw(void) {
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

static volatile uint64_t sink;

static void read_piece(const char *p) {
    typedef uint64_t v8 __attribute__((vector_size(64)));
    uint64_t total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total)
    for (size_t i = 0; i < PIECE_BYTES; i += 4096) {
        v8 s[4] = {0};
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

typedef struct { const char *name; int C, FF, q, kv, L, V; } Model;
// As many blocks of the larger one as memory can be asked for; they are alike.
static const Model models[] = {{"135m", 576, 1536, 576, 192, 30, 49152}, {"1b", 2048, 8192, 2048, 512, 4, 128256}};

static const char *const schemes[] = {"none", "int8wo", "int4-32", "int4wo-32", "8da4w-32", "int8dq"};
#define N_SCHEMES (sizeof schemes / sizeof *schemes)

enum { LINEARS = 4 };           // of a block, then the head
typedef struct {
    QuantScheme scheme;
    int OC[LINEARS + 1], C[LINEARS + 1], L;
    void *weight[32][LINEARS];
    void *head;
    size_t bytes;
    double best[32 * LINEARS + 1];      // seconds of each linear
} Decoder;

static void keep_best(double *best, double start) {
    double t = now_seconds() - start;
    if (*best == 0.0 || t < *best) *best = t;
}
static double sum(const double *t, size_t n) {
    double s = 0.0;
    for (size_t i = 0; i < n; i++) s += t[i];
    return s;
}
static double seconds_of(const Decoder *d) { return sum(d->best, (size_t)d->L * LINEARS + 1); }

static void *must(void *p, int rc, const Err *err) {
    if (rc < 0) {
        fprintf(stderr, "bench_decode: %s\n", err->text);
        exit(1);
    }
    return p;
}

static void *grab(size_t bytes) {
    Err err;
    void *p = NULL;
    int rc = device_alloc(&p, bytes, "weights", &err);
    return must(p, rc, &err);
}

// Any bits are codes and sensible bf16 weights do no harm; scales and zero points are bf16 values.
static void *new_weight(Decoder *d, int OC, int C) {
    const QuantSpec *s = &d->scheme.weight;
    size_t n = (size_t)OC * (size_t)C;
    if (!s->bits) {
        floatX *w = grab(n * sizeof *w);
        for (size_t i = 0; i < n; i++) w[i] = f2x((float)(draw() & 255) * 0.01f - 1.28f);
        d->bytes += n * sizeof *w;
        return w;
    }
    size_t code_bytes = (size_t)OC * quant_row_bytes(s->bits, C);
    size_t blocks = s->gran == QG_GROUP ? n / (size_t)s->group : (size_t)OC;
    uint8_t *codes = grab(code_bytes);
    float *scale = grab(blocks * sizeof *scale), *zero = grab(blocks * sizeof *zero);
    for (size_t i = 0; i < code_bytes; i++) codes[i] = (uint8_t)draw();
    for (size_t i = 0; i < blocks; i++) scale[i] = zero[i] = bf16_round(0.01f + (float)(draw() & 255) * 1e-4f);
    const QuantSpec *act = &d->scheme.act;
    void *served = grab(ops->served_bytes(s, act, OC, C));
    ops->served_pack(served, codes, scale, quant_has_zero(s) ? zero : NULL, s, act, 0, OC, OC, C);
    device_free(codes), device_free(scale), device_free(zero);
    d->bytes += code_bytes + blocks * (quant_has_zero(s) ? 4 : 2);
    return served;
}

static void decoder_new(Decoder *d, const Model *m, const char *scheme) {
    Err err;
    *d = (Decoder){.L = m->L,
                   .OC = {m->q + 2 * m->kv, m->C, 2 * m->FF, m->C, m->V}, .C = {m->C, m->q, m->C, m->FF, m->C}};
    must(NULL, quant_scheme_from_name(&d->scheme, scheme, &err), &err);
    for (int l = 0; l < d->L; l++)
        for (int i = 0; i < LINEARS; i++) d->weight[l][i] = new_weight(d, d->OC[i], d->C[i]);
    d->head = new_weight(d, d->OC[LINEARS], d->C[LINEARS]);
}

static void decoder_free(Decoder *d) {
    for (int l = 0; l < d->L; l++)
        for (int i = 0; i < LINEARS; i++) device_free(d->weight[l][i]);
    device_free(d->head);
}

static void decode(Decoder *d, floatX *y, float *logits, const floatX *x) {
    const QuantSpec *s = &d->scheme.weight, *act = &d->scheme.act;
    for (int l = 0; l < d->L; l++)
        for (int i = 0; i < LINEARS; i++) {
            double start = now_seconds();
            if (s->bits) ops->served_forward(y, x, d->weight[l][i], s, act, 1, d->C[i], d->OC[i]);
            else ops->matvec_forward(y, x, d->weight[l][i], 1, d->C[i], d->OC[i]);
            keep_best(&d->best[l * LINEARS + i], start);
        }
    double start = now_seconds();
    int C = d->C[LINEARS], V = d->OC[LINEARS];
    if (s->bits) ops->served_forward_f32(logits, x, d->head, s, act, 1, C, V);
    else ops->matvec_forward_f32(logits, x, d->head, 1, C, V);
    keep_best(&d->best[d->L * LINEARS], start);
}

static void run_model(const Model *m, const char *stream, double seconds) {
    static Decoder decoders[N_SCHEMES];
    int most = 2 * m->FF > m->C ? 2 * m->FF : m->C;
    floatX *x = grab((size_t)most * sizeof *x), *y = grab((size_t)most * sizeof *y);
    float *logits = grab((size_t)m->V * sizeof *logits);
    for (int i = 0; i < most; i++) x[i] = f2x((float)(draw() & 255) * 0.01f - 1.28f);
    for (size_t i = 0; i < N_SCHEMES; i++) decoder_new(&decoders[i], m, schemes[i]);
    double pieces[PIECES] = {0}, begin = now_seconds();
    for (int round = 0; round < LEAST_ROUNDS || now_seconds() - begin < seconds; round++)
        for (size_t i = 0; i < N_SCHEMES; i++) {
            for (size_t k = 0; k < PIECES; k++) {
                double start = now_seconds();
                read_piece(stream + k * PIECE_BYTES);
                keep_best(&pieces[k], start);
            }
            decode(&decoders[i], y, logits, x);
        }
    Err err;
    int rc = device_sync(&err);
    must(NULL, rc, &err);
    double ceiling = sum(pieces, PIECES), most_bandwidth = (double)READ_BYTES / ceiling * 1e-9;
    printf("%-5s ceiling %.1f GB/s\n", m->name, most_bandwidth);
    printf("%-5s %-10s %9s %9s %7s %s\n", "model", "scheme", "MB", "ms", "GB/s", "of the ceiling");
    for (size_t i = 0; i < N_SCHEMES; i++) {
        Decoder *d = &decoders[i];
        double bandwidth = (double)d->bytes / seconds_of(d) * 1e-9;
        printf("%-5s %-10s %9.1f %9.3f %7.1f %.3f\n", m->name, schemes[i], (double)d->bytes * 1e-6, seconds_of(d) * 1e3,
               bandwidth, bandwidth / most_bandwidth);
    }
    for (size_t i = 0; i < N_SCHEMES; i++)
        printf("result decode_linears_%s_%s %.3f of_ceiling\n", m->name, schemes[i],
               (double)decoders[i].bytes / seconds_of(&decoders[i]) * 1e-9 / most_bandwidth);
    for (size_t i = 0; i < N_SCHEMES; i++) decoder_free(&decoders[i]);
    device_free(x), device_free(y), device_free(logits);
}

int main(int argc, char **argv) {
    Err err;
    int rc = device_init("cpu", argc > 1 ? atoi(argv[1]) : 0, &err);
    must(NULL, rc, &err);
    double seconds = argc > 2 ? atof(argv[2]) : 3.0;
    char *stream = grab(READ_BYTES);
    memset(stream, 1, READ_BYTES);
    for (size_t i = 0; i < sizeof models / sizeof *models; i++)
        if (argc < 4 || !strcmp(argv[3], models[i].name)) run_model(&models[i], stream, seconds);
    device_free(stream);
    return 0;
}
