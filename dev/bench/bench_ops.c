// How much of the memory's bandwidth do the operations on rows and elements reach?
//
// Peak: the best of copying with ordinary stores and with memcpy (which streams past the caches), all threads, bytes
// read plus bytes written. Tensors are at least four times the last-level cache, so every byte comes from memory; the
// logits and weights of one operation together are. Bytes of an operation are what its definition must move: every
// input element read once, every output written once, X = sizeof(floatX). What the caches fetch before a line is
// written is not counted. Each figure is the best of REPEATS runs. bench_ops [NAME] runs the operations whose name
// contains NAME.
#include <stdlib.h>
#include "cpu/cpu.h"
#include "device.h"
#include "rng.h"

#define REPEATS 7
enum { X = sizeof(floatX), C = 576, FF = 1536, V = 49152, HS = 64, GROUP = 32 };

static size_t N;                       // rows of C: N * C * X >= four times the last-level cache
static size_t total;                   // N * C
static floatX *a, *b, *c, *d, *small;  // (N, C) each; small: a row and more
static float *f0, *f1, *f2, *f3;       // (total) f32 each
static float *small_f;                 // (N)
static float *block_scales;            // (2 * total / 128)
static uint8_t *bytes;                 // (2 * total): masks, or codes
static int32_t *ids;
static StepState step = {.t = 3, .lr = 1e-4f, .grad_scale = 1e-3f, .tokens = 1};

static const QuantSpec act8 = {
    .bits = 8, .qmin = -128, .qmax = 127, .gran = QG_TOKEN, .mapping = QM_ASYMMETRIC, .eps = 0x1p-23f};
static const QuantSpec int4 = {.bits = 4, .qmin = -8, .qmax = 7, .gran = QG_GROUP, .group = GROUP, .eps = 0x1p-126f};
static const QuantSpec int3 = {.bits = 3, .qmin = -4, .qmax = 3, .gran = QG_GROUP, .group = GROUP, .eps = 0x1p-126f};
static const QuantSpec int8 = {.bits = 8, .qmin = -128, .qmax = 127, .gran = QG_CHANNEL, .eps = 0x1p-126f};
static const QuantSpec uint4 = {.bits = 4, .is_unsigned = 1, .qmax = 15, .gran = QG_GROUP, .group = GROUP,
                                .mapping = QM_ASYMMETRIC, .zero = QZ_FLOAT, .eps = 1e-6f};

static double best(void (*run)(void)) {
    run();
    double least = 1e30;
    for (int i = 0; i < REPEATS; i++) {
        double t = now_seconds();
        run();
        t = now_seconds() - t;
        least = t < least ? t : least;
    }
    return least;
}

static void copy_stores(void) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < total; i += 16) v16_store(f1 + i, v16_load(f0 + i, 16), 16);
}
static void copy_memcpy(void) {
    size_t part = total / 16;
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < 16; i++) memcpy(f1 + i * part, f0 + i * part, part * sizeof(float));
}
static void read_only(void) {
    float sum = 0.0f;
#pragma omp parallel for schedule(static) reduction(+ : sum)
    for (size_t i = 0; i < total / 16384; i++) {
        v16 s[4] = {{0}};
        for (size_t j = 0; j < 16384; j += 64)
            for (size_t k = 0; k < 4; k++) s[k] += v16_load(f0 + i * 16384 + j + k * 16, 16);
        sum += v16_sum(s[0] + s[1] + s[2] + s[3]);
    }
    step.norm = sum;
}

static void embedding_forward(void) { ops_cpu.embedding_forward(a, ids, b, N, C, (int)N); }
static void embedding_backward(void) { ops_cpu.embedding_backward(f0, a, ids, N, C, (int)N); }
static void rmsnorm(void) { ops_cpu.rmsnorm_fq_forward(a, b, f0, NULL, c, d, small, N, C, 1e-5f, NULL); }
static void rmsnorm_fq(void) { ops_cpu.rmsnorm_fq_forward(a, b, f0, NULL, c, d, small, N, C, 1e-5f, &act8); }
static void rmsnorm_backward(void) { ops_cpu.rmsnorm_backward(a, f1, b, NULL, c, small, f0, N, C); }
static void rope(void) { ops_cpu.rope(a, f0, f1, N, 2048, 0, C, C / HS, HS, false); }
static void fakequant(void) { ops_cpu.fakequant_forward(a, NULL, b, N, C, &act8); }
static void fakequant_mask(void) { ops_cpu.fakequant_forward(a, bytes, b, N, C, &act8); }
static void mask_backward(void) { ops_cpu.mask_backward(a, bytes, N, C); }
static void swiglu(void) { ops_cpu.swiglu_fq_forward(c, NULL, a, total / 2 / FF, FF, NULL); }
static void swiglu_fq(void) { ops_cpu.swiglu_fq_forward(c, NULL, a, total / 2 / FF, FF, &act8); }
static void swiglu_backward(void) { ops_cpu.swiglu_backward(b, c, NULL, a, total / 2 / FF, FF); }
static void classifier(void) { ops_cpu.classifier(f1, a, f0, ids, total / V, V); }
static void sum_squares(void) { ops_cpu.sum_squares(&step, f0, total); }
static const AdamWParams params = {0.9, 0.95, 1e-8, 0.1};
static void adamw_with(const QuantSpec *s) {
    step.skip = 0;
    step.grad_scale = 1e-3f;
    ops_cpu.adamw_fq(f0, f1, f2, a, NULL, f3, &step, &params, s, (int64_t)N, C);
}
static void adamw(void) { adamw_with(NULL); }
static void adamw_int4(void) { adamw_with(&int4); }
static void adamw_int8(void) { adamw_with(&int8); }
static void adamw_uint4(void) { adamw_with(&uint4); }
static void sgd(void) {
    step.skip = 0;
    ops_cpu.sgd_fq(f0, f1, a, NULL, f3, &step, 0.9f, 0.0f, NULL, (int64_t)N, C);
}
// Parameters in a, moments in b and c or f1 and f2, their scales and those of rows in small_f and small_f + N.
static StoredState moment(StateFormat f, void *narrow, float *wide, float *scale) {
    return (StoredState){.format = f, .data = f == STATE_F32 ? wide : narrow, .scale = scale};
}
static void low_with(ParamFormat pf, StateFormat sf) {
    step.skip = 0;
    step.grad_scale = 1e-3f;
    StoredParam p = {.format = pf, .data = pf == PARAM_F32 ? (void *)f0 : a, .scale = small_f};
    ops_cpu.adamw_low(p, moment(sf, b, f1, block_scales), moment(sf, c, f2, block_scales + total / 128),
                      NULL, NULL, f3, &step, &params, NULL, ROUND_STOCHASTIC, 1, 0, (int64_t)N, C);
}
static void low_f32(void) { low_with(PARAM_F32, STATE_F32); }
static void low_f32_int8(void) { low_with(PARAM_F32, STATE_INT8); }
static void low_bf16_f32(void) { low_with(PARAM_BF16, STATE_F32); }
static void low_bf16_int8(void) { low_with(PARAM_BF16, STATE_INT8); }
static void low_int8_f32(void) { low_with(PARAM_INT8, STATE_F32); }
static void low_int8_bf16(void) { low_with(PARAM_INT8, STATE_BF16); }
static void low_int8_int8(void) { low_with(PARAM_INT8, STATE_INT8); }
static void low_int8_int4(void) { low_with(PARAM_INT8, STATE_INT4); }
static void low_int8_fp8(void) { low_with(PARAM_INT8, STATE_FP8); }
static void int8_rows(void) {
    ops_cpu.int8_rows((int8_t *)bytes, small_f, (StoredParam){.format = PARAM_BF16, .data = a}, (int64_t)N, C);
}
static void weight_fq(void) { ops_cpu.weight_fq(a, NULL, f0, NULL, (int64_t)N, C); }
static void weight_fq_int4(void) { ops_cpu.weight_fq(a, NULL, f0, &int4, (int64_t)N, C); }
static void weight_fq_int8(void) { ops_cpu.weight_fq(a, NULL, f0, &int8, (int64_t)N, C); }
static void ste_mask(void) { ops_cpu.weight_ste_mask(f1, f0, &int4, (int64_t)N, C); }
// Two ranks. Every rank's part lies in `bytes`, gradients in f0.
static RowSplit two_ranks(void) { return (RowSplit){.rows = (int64_t)N, .unit = 1, .R = 2, .first = 0}; }
static size_t wire_stride(const QuantSpec *s) {
    int64_t block[2];
    Err err = {0};
    if (quant_block_shape(s, (int64_t)N / 2, C, block, &err) < 0) die(&err);
    return quant_wire_layout(s, (int64_t)N / 2, C, block).bytes;
}
static void pack_with(const QuantSpec *s) { ops_cpu.weight_pack(bytes, f0, s, (int64_t)N, C, (int64_t)N); }
static void pack_int4(void) { pack_with(&int4); }
static void pack_int8(void) { pack_with(&int8); }
static void pack_int3(void) { pack_with(&int3); }
static void pack_uint4(void) { pack_with(&uint4); }
static void unpack_with(const QuantSpec *s) {
    RowSplit split = two_ranks();
    ops_cpu.weight_unpack(a, small_f, bytes, wire_stride(s), &split, 0, (int64_t)N / 2, s, C);
}
static void unpack_int4(void) { unpack_with(&int4); }
static void unpack_int8(void) { unpack_with(&int8); }
static void unpack_int3(void) { unpack_with(&int3); }
static void unpack_uint4(void) { unpack_with(&uint4); }
static void rows_pack(void) {
    RowSplit split = two_ranks();
    ops_cpu.rows_pack(b, total / 2 * X, a, &split, 0, (int64_t)N / 2, C * X);
}
static void sum_2_ranks(void) { ops_cpu.sum_ranks(f1, f0, total / 2, 2, total / 2, false); }
static void sum_8_ranks(void) { ops_cpu.sum_ranks(f1, f0, total / 8, 8, total / 8, true); }
// As many rows of C codes as make the codes four times the cache; scales lie in f0.
static void dequant_int4(void) { ops_cpu.dequant_rows(a, NULL, bytes, f0, NULL, &int4, (int64_t)N, C); }
static void dequant_int8(void) { ops_cpu.dequant_rows(a, NULL, bytes, f0, NULL, &int8, (int64_t)N, C); }
enum { MATVEC_C = 1536 };
static size_t matvec_rows(int bits) { return 2 * total * 8 / (size_t)bits / MATVEC_C; }
static void qmatvec_with(const QuantSpec *s, size_t tokens) {
    const float *zero = s->zero == QZ_FLOAT ? f1 : NULL;
    ops_cpu.qmatvec_forward(a, b, bytes, f0, zero, s, tokens, MATVEC_C, (int)matvec_rows(s->bits));
}
static void qmatvec_int4(void) { qmatvec_with(&int4, 1); }
static void qmatvec_int8(void) { qmatvec_with(&int8, 1); }
static void qmatvec_uint4(void) { qmatvec_with(&uint4, 1); }
static void qmatvec_int3(void) { qmatvec_with(&int3, 1); }
static void qmatvec_int4_4(void) { qmatvec_with(&int4, 4); }

static size_t last_level_cache(void) {
    size_t largest = 0;
    for (int i = 0; i < 5; i++) {
        char path[96];
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", i);
        FILE *f = fopen(path, "r");
        unsigned long kib = 0;
        if (f && fscanf(f, "%luK", &kib) == 1 && kib * 1024 > largest) largest = kib * 1024;
        if (f) fclose(f);
    }
    return largest ? largest : (size_t)32 << 20;
}

static void *alloc_or_die(size_t size, const char *what) {
    Err err = {0};
    void *p;
    if (big_alloc(&p, size, what, &err) < 0) die(&err);
    return p;
}

int main(int argc, char **argv) {
    program_name = "bench_ops";
    Err err = {0};
    if (device_init("cpu", 0, &err) < 0) die(&err);
    size_t cache = last_level_cache();
    N = (4 * cache / X / C + 4095) / 4096 * 4096;
    total = N * C;
    floatX **xs[] = {&a, &b, &c, &d};
    float **fs[] = {&f0, &f1, &f2, &f3};
    for (int i = 0; i < 4; i++) {
        *xs[i] = alloc_or_die(total * X, "a tensor of the benchmark");
        *fs[i] = alloc_or_die(total * sizeof(float), "a tensor of the benchmark");
    }
    bytes = alloc_or_die(2 * total, "bytes");
    small = alloc_or_die((C + FF) * X, "weights");
    small_f = alloc_or_die(N * sizeof *small_f, "row scales");
    block_scales = alloc_or_die(total / 64 * sizeof *block_scales, "scales of blocks");
    ids = alloc_or_die(N * sizeof *ids, "token ids");
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < total; i++) {
        Philox r = philox(1, 1, i);
        float u = 2.0f * philox_uniform(r.v[0]) - 1.0f;
        a[i] = b[i] = f2x(4.0f * u), c[i] = d[i] = f2x(u);
        f0[i] = u, f1[i] = u * 0.01f, f2[i] = 1e-4f, f3[i] = u * 0.1f;
        bytes[i] = bytes[total + i] = (uint8_t)r.v[1] & 1;
    }
    for (size_t i = 0; i < C + FF; i++) small[i] = f2x(1.0f);
    for (size_t i = 0; i < N; i++) ids[i] = (int32_t)(philox(1, 2, i).v[0] % (N < V ? N : V));

    double copy1 = 2.0 * (double)total * sizeof(float) / best(copy_stores),
           copy2 = 2.0 * (double)total * sizeof(float) / best(copy_memcpy);
    double reading = (double)total * sizeof(float) / best(read_only), copying = copy1 > copy2 ? copy1 : copy2;
    printf("%s; tensors of %zu MiB and more, last-level cache %zu MiB\n", device_description(), total * X >> 20,
           cache >> 20);
    printf("result copy_bandwidth %.1f GB/s\n", copying / 1e9);
    printf("result read_bandwidth %.1f GB/s\n", reading / 1e9);
    printf("  (copy by stores %.1f GB/s, by memcpy %.1f GB/s)\n", copy1 / 1e9, copy2 / 1e9);

    double n = (double)total, half = n / 2, per256 = 8.0 / 256, per128 = 8.0 / 128;      // scales read and written
    double row4 = MATVEC_C / 2.0 + MATVEC_C / GROUP * 4.0, row8 = MATVEC_C + 4.0,
           row3 = MATVEC_C * 3 / 8.0 + MATVEC_C / GROUP * 4.0;
    // reads: true where the operation writes next to nothing, so that reading is its peak
    const struct { const char *name; void (*run)(void); double bytes; bool reads; } table[] = {
        {"embedding_forward", embedding_forward, 2 * n * X, false},               // wte rows, out
        {"embedding_backward", embedding_backward, n * (X + 8), false},           // dout, dwte read and written
        {"rmsnorm_forward", rmsnorm, 4 * n * X, false},                           // x, delta; res, y
        {"rmsnorm_fq_forward", rmsnorm_fq, 4 * n * X, false},
        {"rmsnorm_backward", rmsnorm_backward, 4 * n * X, false},                 // dy, x, dres read and written
        {"rope", rope, 2 * n * X, false},                                         // x read and written
        {"fakequant_forward", fakequant, 2 * n * X, false},                       // x, y
        {"fakequant_mask_forward", fakequant_mask, n * (2 * X + 1), false},       // x, y, mask
        {"mask_backward", mask_backward, n * (2 * X + 1), false},                 // dx read and written, mask
        {"swiglu_forward", swiglu, 3 * half * X, false},                          // gate, up, y
        {"swiglu_fq_forward", swiglu_fq, 3 * half * X, false},
        {"swiglu_backward", swiglu_backward, 5 * half * X, false},                // gate, up, dy; dgate, dup
        {"classifier", classifier, n * (4 + X), false},                           // logits, dlogits
        {"sum_squares", sum_squares, n * 4, true},                                // grad
        {"adamw", adamw, n * (28 + X), false},                                    // p, m, v read, written; grad, work
        {"adamw_fq_int4", adamw_int4, n * (28 + X), false},
        {"adamw_fq_int8", adamw_int8, n * (28 + X), false},
        {"adamw_fq_uint4_float", adamw_uint4, n * (28 + X), false},
        {"sgd", sgd, n * (20 + X), false},                                        // p, buf read and written, grad, work
        {"adamw_low_f32_f32", low_f32, n * 28, false},                            // as adamw, no work
        {"adamw_low_f32_int8", low_f32_int8, n * (16 + 2 * per256), false},
        {"adamw_low_bf16_f32", low_bf16_f32, n * 24, false},
        {"adamw_low_bf16_int8", low_bf16_int8, n * (12 + 2 * per256), false},
        {"adamw_low_int8_f32", low_int8_f32, n * 22, false},
        {"adamw_low_int8_bf16", low_int8_bf16, n * 14, false},
        {"adamw_low_int8_int8", low_int8_int8, n * (10 + 2 * per256), false},     // p, m, v read, written; grad
        {"adamw_low_int8_int4", low_int8_int4, n * (8 + 2 * per128), false},
        {"adamw_low_int8_fp8", low_int8_fp8, n * (10 + 2 * per256), false},
        {"int8_rows", int8_rows, n * (X + 1), false},                             // values, codes
        {"weight_copy", weight_fq, n * (4 + X), false},                           // master, work
        {"weight_fq_int4", weight_fq_int4, n * (4 + X), false},
        {"weight_fq_int8", weight_fq_int8, n * (4 + X), false},
        {"weight_ste_mask", ste_mask, n * 12, false},                             // master, grad read and written
        {"dequant_rows_int4", dequant_int4, n * (0.5 + 4.0 / GROUP + X), false},  // codes, scales, work
        {"dequant_rows_int8", dequant_int8, n * (1 + X), false},
        {"weight_pack_int4", pack_int4, n * (4 + 0.5 + 2.0 / GROUP), true},       // master, codes, scales
        {"weight_pack_int8", pack_int8, n * 5, false},
        {"weight_pack_int3", pack_int3, n * (4 + 0.375 + 2.0 / GROUP), true},
        {"weight_pack_uint4_float", pack_uint4, n * (4 + 0.5 + 4.0 / GROUP), true},
        {"weight_unpack_int4", unpack_int4, n * (0.5 + 2.0 / GROUP + X), false},  // codes, scales, work
        {"weight_unpack_int8", unpack_int8, n * (1 + X), false},
        {"weight_unpack_int3", unpack_int3, n * (0.375 + 2.0 / GROUP + X), false},
        {"weight_unpack_uint4_float", unpack_uint4, n * (0.5 + 4.0 / GROUP + X), false},
        {"rows_pack", rows_pack, 2 * n * X, false},                               // rows, wire
        {"sum_ranks_2", sum_2_ranks, half * 12, false},                           // two parts, their sum
        {"sum_ranks_8", sum_8_ranks, n / 8 * 40, false},                          // eight, the sum read and written
        {"qmatvec_int4", qmatvec_int4, (double)matvec_rows(4) * row4, true},      // codes, scales
        {"qmatvec_uint4_float", qmatvec_uint4, (double)matvec_rows(4) * (row4 + MATVEC_C / GROUP * 4.0), true},
        {"qmatvec_int8", qmatvec_int8, (double)matvec_rows(8) * row8, true},
        {"qmatvec_int3", qmatvec_int3, (double)matvec_rows(3) * row3, true},
        {"qmatvec_int4_4_tokens", qmatvec_int4_4, (double)matvec_rows(4) * row4, true},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        if (argc > 1 && !strstr(table[i].name, argv[1])) continue;
        double seconds = best(table[i].run), rate = table[i].bytes / seconds;
        printf("result op_%s_bandwidth_share %.2f ratio   (%.1f GB/s; %.1f bytes, %.2f ns an element)\n",
               table[i].name, rate / (table[i].reads ? reading : copying), rate / 1e9, table[i].bytes / n,
               1e9 * seconds / n);
        fflush(stdout);
    }
    return 0;
}
