// The linears: three matrix products each, through oneDNN where the build has it, else by the tiles of tile.h.
//
//   forward  y  (N, OC) = x (N, C) . w (OC, C)^T      backward  dx (N, C)  = dy (N, OC) . w (OC, C)
//                                                               dw (OC, C) = dy (N, OC)^T . x (N, C)
//
// All are c (M, N) = a (M, K) . b (K, N) with a or b read transposed; no operand is ever copied to be transposed.
// Evaluation must equal the trainer's validation bit for bit whatever the batch, so a row of a forward may not depend
// on how many rows stand beside it. The built-in product has that by construction (tile.h). oneDNN's brgemm sums the
// k of a forward in one order for every M and thread count; nothing in its documentation promises that, so
// test_ops_matmul demands it.
#include "cpu/cpu.h"
#include "cpu/matmul.h"
#include "cpu/tile.h"

typedef struct {
    bool ta, tb;            // a is stored (K, M), b is stored (N, K)
    bool out_f32;           // c is f32, else X
    bool accumulate;        // c += (f32 only)
    bool scaled;            // column n of the f32 sum is multiplied by scale[n] before it is rounded
    int64_t M, N, K;
    int64_t lda;            // values from one k of a to the next where ta: M, or more for a part of the rows
    const int8_t *codes;    // what b is made from, in working memory, or NULL
} Product;

// Codes as X: exact.
static void widen_codes(floatX *y, const int8_t *codes, int64_t n) {
    int64_t whole = n / 32;
#pragma omp parallel for
    for (int64_t i = 0; i < whole; i++)
        v32_storex(y + i * 32, v16_load_i8(codes + i * 32, 16), v16_load_i8(codes + i * 32 + 16, 16));
    for (int64_t i = whole * 32; i < n; i++) y[i] = f2x(codes[i]);
}
static size_t codes_bytes(const Product *p) {
    return p->codes ? ((size_t)p->N * (size_t)p->K * sizeof(floatX) + 63) & ~(size_t)63 : 0;
}

#ifdef HAVE_DNNL
// ---------------------------------------------------------------------------------------------
// oneDNN. Creating a primitive compiles code (milliseconds), so primitives are kept by shape. The C interface of
// version 3 hands out memory descriptors by pointer where version 2 has a struct.
#include <dnnl.h>

typedef struct {
    Product what;
    dnnl_data_type_t type;  // of a and b
    int threads;            // a primitive is planned for a number of threads
    bool used;
    dnnl_primitive_t prim;
    dnnl_memory_t scale;
    size_t scratch_bytes;
} Cached;

#define CACHE_SIZE 512      // a training run uses some twenty shapes, evaluation one more for each length of a text
static Cached cache[CACHE_SIZE];
static int cache_used;
static dnnl_engine_t engine;
static dnnl_stream_t stream;

#if DNNL_VERSION_MAJOR >= 3
#define DESC(d) (d)
static dnnl_status_t make_desc(dnnl_memory_desc_t *d, int64_t rows, int64_t cols, dnnl_data_type_t t, int64_t s0,
                               int64_t s1) {
    dnnl_dims_t dims = {rows, cols}, strides = {s0, s1};
    return dnnl_memory_desc_create_with_strides(d, 2, dims, t, strides);
}
static void free_desc(dnnl_memory_desc_t d) { dnnl_memory_desc_destroy(d); }
static dnnl_status_t append_sum(dnnl_post_ops_t p) {
    return dnnl_post_ops_append_sum(p, 1.0f, 0, dnnl_data_type_undef);
}
static dnnl_status_t make_matmul(dnnl_primitive_desc_t *pd, dnnl_memory_desc_t a, dnnl_memory_desc_t b,
                                 dnnl_memory_desc_t c, dnnl_primitive_attr_t attr) {
    return dnnl_matmul_primitive_desc_create(pd, engine, a, b, NULL, c, attr);
}
static size_t desc_size(const_dnnl_memory_desc_t d) { return dnnl_memory_desc_get_size(d); }
#else
#define DESC(d) (&(d))
static dnnl_status_t make_desc(dnnl_memory_desc_t *d, int64_t rows, int64_t cols, dnnl_data_type_t t, int64_t s0,
                               int64_t s1) {
    dnnl_dims_t dims = {rows, cols}, strides = {s0, s1};
    return dnnl_memory_desc_init_by_strides(d, 2, dims, t, strides);
}
static void free_desc(dnnl_memory_desc_t d) { (void)d; }
static dnnl_status_t append_sum(dnnl_post_ops_t p) { return dnnl_post_ops_append_sum(p, 1.0f); }
static dnnl_status_t make_matmul(dnnl_primitive_desc_t *pd, dnnl_memory_desc_t a, dnnl_memory_desc_t b,
                                 dnnl_memory_desc_t c, dnnl_primitive_attr_t attr) {
    dnnl_matmul_desc_t desc;
    dnnl_status_t s = dnnl_matmul_desc_init(&desc, &a, &b, NULL, &c);
    return s ? s : dnnl_primitive_desc_create(pd, &desc, attr, engine, NULL);
}
static size_t desc_size(const dnnl_memory_desc_t *d) { return dnnl_memory_desc_get_size(d); }
#endif

#ifndef PRECISION_FP32
// bf16 only where the processor multiplies it: elsewhere oneDNN is slow at it, or does not do it.
static bool dnnl_has_bf16(void) {
    return ((unsigned)dnnl_get_effective_cpu_isa() & dnnl_cpu_isa_avx512_core_bf16) == dnnl_cpu_isa_avx512_core_bf16;
}
#endif

static void cached_free(Cached *e) {
    if (e->scale) dnnl_memory_destroy(e->scale);
    if (e->prim) dnnl_primitive_destroy(e->prim);
    *e = (Cached){0};
}

static dnnl_status_t cached_fill(Cached *e) {
    const Product *p = &e->what;
    dnnl_status_t s = dnnl_success;
    if (!engine && (s = dnnl_engine_create(&engine, dnnl_cpu, 0))) return s;
    if (!stream && (s = dnnl_stream_create(&stream, engine, dnnl_stream_default_flags))) return s;
    dnnl_data_type_t out = p->out_f32 || e->type == dnnl_f32 ? dnnl_f32 : dnnl_bf16;
    dnnl_memory_desc_t a, b, c, w;
    dnnl_primitive_attr_t attr = NULL;
    dnnl_post_ops_t post = NULL;
    dnnl_primitive_desc_t pd = NULL;
    if ((s = make_desc(&a, p->M, p->K, e->type, p->ta ? 1 : p->K, p->ta ? p->lda : 1))) return s;
    if ((s = make_desc(&b, p->K, p->N, e->type, p->tb ? 1 : p->N, p->tb ? p->K : 1))) goto free_a;
    if ((s = make_desc(&c, p->M, p->N, out, p->N, 1))) goto free_b;
    if ((s = make_desc(&w, 1, p->N, dnnl_f32, p->N, 1))) goto free_c;
    if ((s = dnnl_primitive_attr_create(&attr)) || (s = dnnl_post_ops_create(&post)) ||
        (s = dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user)) ||
        (p->scaled && (s = dnnl_post_ops_append_binary(post, dnnl_binary_mul, DESC(w)))) ||
        (p->accumulate && (s = append_sum(post))) || (s = dnnl_primitive_attr_set_post_ops(attr, post)) ||
        (s = make_matmul(&pd, a, b, c, attr)) || (s = dnnl_primitive_create(&e->prim, pd)) ||
        (p->scaled && (s = dnnl_memory_create(&e->scale, DESC(w), engine, DNNL_MEMORY_NONE))))
        goto done;
    e->scratch_bytes = (desc_size(dnnl_primitive_desc_query_md(pd, dnnl_query_scratchpad_md, 0)) + 63) & ~(size_t)63;
done:
    if (pd) dnnl_primitive_desc_destroy(pd);
    if (post) dnnl_post_ops_destroy(post);
    if (attr) dnnl_primitive_attr_destroy(attr);
    free_desc(w);
free_c:
    free_desc(c);
free_b:
    free_desc(b);
free_a:
    free_desc(a);
    return s;
}

static bool same_product(const Product *a, const Product *b) {
    return a->M == b->M && a->N == b->N && a->K == b->K && a->lda == b->lda && a->ta == b->ta && a->tb == b->tb &&
           a->out_f32 == b->out_f32 && a->accumulate == b->accumulate && a->scaled == b->scaled;
}

// Makes room for n more. All entries go at once: one taken out would break the probing.
static void cache_reserve(int n) {
    if (cache_used + n <= CACHE_SIZE * 3 / 4) return;
    for (size_t i = 0; i < CACHE_SIZE; i++)
        if (cache[i].used) cached_free(&cache[i]);
    cache_used = 0;
}

// The primitive of a product; the caller has reserved room for it.
static Cached *cached_get(const Product *p, dnnl_data_type_t type, int threads) {
    uint64_t h = (uint64_t)p->M * 0x9e3779b97f4a7c15u ^ (uint64_t)p->N * 0xc2b2ae3d27d4eb4fu ^ (uint64_t)p->K << 20;
    h ^= (uint64_t)(p->ta | p->tb << 1 | p->out_f32 << 2 | p->accumulate << 3 | p->scaled << 4) << 40;
    size_t i = (size_t)((h ^ h >> 29) * 0x9e3779b97f4a7c15u >> 32) % CACHE_SIZE;
    for (; cache[i].used; i = (i + 1) % CACHE_SIZE)
        if (same_product(&cache[i].what, p) && cache[i].type == type && cache[i].threads == threads) return &cache[i];
    cache[i] = (Cached){.what = *p, .type = type, .threads = threads, .used = true};
    dnnl_status_t s = cached_fill(&cache[i]);
    if (s) {
        cached_free(&cache[i]);
        ops_set_error(E_FAIL,
                      "oneDNN refuses a %lld x %lld x %lld matmul (status %d); build with NO_DNNL=1 to do without it",
                      (long long)p->M, (long long)p->N, (long long)p->K, (int)s);
        return NULL;
    }
    cache_used++;
    return &cache[i];
}

static void cached_run(const Cached *e, void *scratch, void *c, const void *a, const void *b, const float *scale) {
    const_dnnl_primitive_desc_t pd;
    dnnl_memory_t m[4] = {0};
    // Operands are only read; the interface has no const.
    void *data[4] = {(void *)(uintptr_t)a, (void *)(uintptr_t)b, c, scratch};
    static const dnnl_query_t query[4] = {dnnl_query_src_md, dnnl_query_weights_md, dnnl_query_dst_md,
                                          dnnl_query_scratchpad_md};
    dnnl_status_t s = dnnl_primitive_get_primitive_desc(e->prim, &pd);
    for (int i = 0; i < 4 && !s; i++)
        s = dnnl_memory_create(&m[i], dnnl_primitive_desc_query_md(pd, query[i], 0), engine, data[i]);
    if (!s && scale) s = dnnl_memory_set_data_handle(e->scale, (void *)(uintptr_t)scale);
    dnnl_exec_arg_t args[] = {{DNNL_ARG_SRC, m[0]}, {DNNL_ARG_WEIGHTS, m[1]}, {DNNL_ARG_DST, m[2]},
                              {DNNL_ARG_SCRATCHPAD, m[3]},
                              {DNNL_ARG_ATTR_MULTIPLE_POST_OP(0) | DNNL_ARG_SRC_1, e->scale}};
    if (!s) s = dnnl_primitive_execute(e->prim, stream, scale ? 5 : 4, args);
    if (!s) s = dnnl_stream_wait(stream);
    for (int i = 0; i < 4; i++)
        if (m[i]) dnnl_memory_destroy(m[i]);
    if (s) ops_set_error(E_FAIL, "oneDNN's matmul failed (status %d)", (int)s);
}

// brgemm may split a long sum over k among threads where a is transposed (or of one row, which looks the same to it),
// and then the bits depend on the number of threads. Planned for one thread it does not.
static bool splits_sum(const Product *p) { return p->K >= 2048 && !p->tb && (p->ta || p->M == 1); }

// How a product is run: at once, or where the sum would be split, in slices of rows, one a thread. brgemm sums in other
// blocks where M is no multiple of 16: slices are, and what M has beyond them is always a slice of its own.
typedef struct {
    int slices;
    int64_t rows;           // of a slice; the last ones have fewer
    int64_t even;           // M rounded down to a multiple of 16
    Cached *part, *last, *rest;
} Plan;

static int64_t slice_rows(const Plan *plan, const Product *p, int i) {
    int64_t first = i * plan->rows;
    if (first >= plan->even) return p->M - plan->even;
    return first + plan->rows <= plan->even ? plan->rows : plan->even - first;
}

static Cached *slice_primitive(const Plan *plan, const Product *p, int i) {
    int64_t rows = slice_rows(plan, p, i);
    return rows == plan->rows ? plan->part : i * plan->rows < plan->even ? plan->last : plan->rest;
}

static bool make_plan(Plan *plan, const Product *p, dnnl_data_type_t type) {
    int threads = cpu_max_threads();
    cache_reserve(3);
    if (!splits_sum(p)) {
        *plan = (Plan){.slices = 1, .rows = p->M, .even = p->M, .part = cached_get(p, type, threads)};
        return plan->part;
    }
    *plan = (Plan){.even = p->M & ~15ll};
    plan->rows = ((plan->even + threads - 1) / threads + 63) & ~63ll;
    if (plan->rows > plan->even) plan->rows = plan->even;
    int whole = plan->rows ? (int)((plan->even + plan->rows - 1) / plan->rows) : 0;
    plan->slices = whole + (p->M > plan->even);
    int64_t rows[3] = {plan->rows, whole ? plan->even - (whole - 1) * plan->rows : 0, p->M - plan->even};
    Cached **entry[3] = {&plan->part, &plan->last, &plan->rest};
#ifdef _OPENMP
    omp_set_num_threads(1);
#endif
    bool ok = true;
    for (int i = 0; i < 3 && ok; i++) {
        Product slice = *p;
        slice.M = rows[i];
        if (rows[i] && !(*entry[i] = cached_get(&slice, type, 1))) ok = false;
    }
#ifdef _OPENMP
    omp_set_num_threads(threads);
#endif
    return ok;
}

// Bytes of scratch for one slice.
static size_t plan_scratch(const Plan *plan) {
    const Cached *e[3] = {plan->part, plan->last, plan->rest};
    size_t most = 0;
    for (int i = 0; i < 3; i++)
        if (e[i] && e[i]->scratch_bytes > most) most = e[i]->scratch_bytes;
    return most;
}

static void plan_run(const Plan *plan, const Product *p, char *scratch, void *c, const void *a, const void *b,
                     const float *scale) {
    if (plan->slices == 1) {
        cached_run(plan->part ? plan->part : plan->rest, scratch, c, a, b, scale);
        return;
    }
    // Slices are of weight gradients: c is f32, a (K, M) has its rows side by side, nothing is scaled.
    size_t each = plan_scratch(plan), row = (size_t)p->N * sizeof(float), value = plan->part->type == dnnl_f32 ? 4 : 2;
#pragma omp parallel for schedule(static)
    for (int i = 0; i < plan->slices; i++) {
        size_t first = (size_t)(i * plan->rows < plan->even ? i * plan->rows : plan->even);
        cached_run(slice_primitive(plan, p, i), scratch + (size_t)i * each, (char *)c + first * row,
                   (const char *)a + first * value, b, NULL);
    }
}

#ifndef PRECISION_FP32
static void widen(float *y, const bf16 *x, int64_t n) {
    int64_t whole = n / 16;
#pragma omp parallel for
    for (int64_t i = 0; i < whole; i++) v16_store(y + i * 16, v16_load_bf16(x + i * 16, 16), 16);
    for (int64_t i = whole * 16; i < n; i++) y[i] = bf16_to_f32(x[i]);
}

static void narrow(bf16 *y, const float *x, int64_t n) {
    int64_t whole = n / 16;
#pragma omp parallel for
    for (int64_t i = 0; i < whole; i++) v16_store_bf16(y + i * 16, v16_load(x + i * 16, 16), 16);
    for (int64_t i = whole * 16; i < n; i++) y[i] = bf16_from_f32(x[i]);
}

// A bf16 product in f32: operands are widened, the result is rounded as f2x does.
static void widened_run(const Plan *plan, const Product *p, char *scratch, void *c, const bf16 *a, const bf16 *b,
                        const float *scale) {
    float *wa = (float *)(void *)(scratch + plan_scratch(plan) * (size_t)plan->slices), *wb = wa + p->M * p->K;
    float *wc = p->out_f32 ? c : wb + p->K * p->N;
    widen(wa, a, p->M * p->K);
    widen(wb, b, p->K * p->N);
    plan_run(plan, p, scratch, wc, wa, wb, scale);
    if (!p->out_f32) narrow(c, wc, p->M * p->N);
}
#endif

static void product(const Product *p, void *c, const floatX *a, const floatX *b, const float *scale) {
    Plan plan;
#ifdef PRECISION_FP32
    const bool wide = false;
    const dnnl_data_type_t type = dnnl_f32;
#else
    const bool wide = !dnnl_has_bf16();
    const dnnl_data_type_t type = wide ? dnnl_f32 : dnnl_bf16;
#endif
    if (!make_plan(&plan, p, type)) return;
    int64_t extra = wide ? p->M * p->K + p->K * p->N + (p->out_f32 ? 0 : p->M * p->N) : 0;
    size_t bytes = plan_scratch(&plan) * (size_t)plan.slices + (size_t)extra * sizeof(float) + codes_bytes(p);
    char *scratch = bytes ? cpu_workspace(bytes) : NULL;
    if (bytes && !scratch) return;
    if (p->codes) {
        b = (const floatX *)(const void *)scratch;
        widen_codes((floatX *)(void *)scratch, p->codes, p->N * p->K);
        scratch += codes_bytes(p);
    }
#ifndef PRECISION_FP32
    if (wide) {
        widened_run(&plan, p, scratch, c, a, b, scale);
        return;
    }
#endif
    plan_run(&plan, p, scratch, c, a, b, scale);
}

const char *cpu_matmul_description(void) {
    static char text[64];
    const dnnl_version_t *v = dnnl_version();
    const char *type = "fp32";
#ifndef PRECISION_FP32
    if (dnnl_has_bf16()) type = "bf16";
#endif
    snprintf(text, sizeof text, "oneDNN %d.%d.%d %s", v->major, v->minor, v->patch, type);
    return text;
}
#else
// ---------------------------------------------------------------------------------------------
// The built-in product. a is packed once for all, b by panels of 64 columns for all of K, which the tiles then read
// from the second-level cache (K up to some 4000) while their sums stay in registers. A task is a panel of columns
// for a block of rows.
#define PANEL 64            // columns
#define ROWS_TILE 96        // rows summed before they are written, in the first-level cache; a transposed a lies in
                            // such blocks, k after k, so that its units are read in order
#define ROWS_TASK (6 * ROWS_TILE)       // rows: enough that packing the panel costs little

static void pack_panel(unit_t *dst, const Product *p, const floatX *b, int64_t n0, int cols) {
    int K = (int)p->K;
    if (p->tb) {
        pack_along_columns(dst, PANEL, b + n0 * p->K, (size_t)K, cols, PANEL, K);
        return;
    }
    for (int k = 0; k < K; k += UNIT)
        pack_across(dst + (size_t)(k / UNIT) * PANEL, b + k * p->N + n0, k + 1 < K ? b + (k + 1) * p->N + n0 : NULL,
                    cols, PANEL);
}

static void write_rows(const Product *p, void *c, const float *sum, int64_t m0, int64_t rows, int64_t n0, int cols,
                       const float *scale) {
    for (int64_t m = 0; m < rows; m++)
        for (int n = 0; n < cols; n += 16) {
            int left = cols - n < 16 ? cols - n : 16;
            v16 v = v16_load(sum + m * PANEL + n, 16);
            int64_t at = (m0 + m) * p->N + n0 + n;
            if (p->scaled) v *= v16_load(scale + n0 + n, left);
            if (p->accumulate) v += v16_load((float *)c + at, left);
            if (p->out_f32) v16_store((float *)c + at, v, left);
            else v16_storex((floatX *)c + at, v, left);
        }
}

static void product(const Product *p, void *c, const floatX *a, const floatX *b, const float *scale) {
    int64_t units = (p->K + UNIT - 1) / UNIT, threads = cpu_max_threads();
    int64_t padded = (p->M + ROWS_TILE - 1) / ROWS_TILE * ROWS_TILE;
    char *scratch = cpu_workspace(codes_bytes(p) + (size_t)(units * (padded + threads * PANEL)) * sizeof(unit_t));
    if (!scratch) return;
    unit_t *pa = (unit_t *)(void *)(scratch + codes_bytes(p));
    if (p->codes) {
        b = (const floatX *)(const void *)scratch;
        widen_codes((floatX *)(void *)scratch, p->codes, p->N * p->K);
    }
    size_t am = p->ta ? 1 : (size_t)units, ak = p->ta ? ROWS_TILE : 1;
    int64_t panels = (p->N + PANEL - 1) / PANEL, blocks = (p->M + ROWS_TASK - 1) / ROWS_TASK;
#pragma omp parallel
    {
        unit_t *pb = pa + units * (padded + cpu_thread() * PANEL);
        float sum[ROWS_TILE * PANEL];
        if (p->ta) {
#pragma omp for
            for (int64_t m = 0; m < padded; m += ROWS_TILE) {
                int n = p->M - m < ROWS_TILE ? (int)(p->M - m) : ROWS_TILE;
                for (int64_t k = 0; k < units; k++) {
                    const floatX *row = a + k * UNIT * p->M + m;
                    pack_across(pa + m * units + k * ROWS_TILE, row, k * UNIT + 1 < p->K ? row + p->M : NULL, n,
                                ROWS_TILE);
                }
            }
        } else {
#pragma omp for
            for (int64_t m = 0; m < padded; m++) {
                if (m < p->M) pack_along(pa + m * units, a + m * p->K, (int)p->K);
                else memset(pa + m * units, 0, (size_t)units * sizeof *pa);
            }
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < panels * blocks; task++) {
            int64_t n0 = task / blocks * PANEL, m0 = task % blocks * ROWS_TASK;
            int64_t m1 = m0 + ROWS_TASK < p->M ? m0 + ROWS_TASK : p->M;
            int cols = p->N - n0 < PANEL ? (int)(p->N - n0) : PANEL;
            pack_panel(pb, p, b, n0, cols);
            for (int64_t m = m0; m < m1; m += ROWS_TILE) {
                int64_t rows = m1 - m < ROWS_TILE ? m1 - m : ROWS_TILE;
                tile_product(sum, PANEL, pa + m * units, am, ak, pb, PANEL, tile_pad_rows((int)rows), PANEL, (int)units,
                             TILE_SET, NULL);
                write_rows(p, c, sum, m, rows, n0, cols, scale);
            }
        }
    }
}

const char *cpu_matmul_description(void) { return "built-in matmul"; }
#endif

void cpu_linear_forward(floatX *y, const floatX *x, const floatX *w, const float *wscale, size_t N, int C, int OC) {
    Product p = {.tb = true, .scaled = wscale, .M = (int64_t)N, .N = OC, .K = C};
    if (N) product(&p, y, x, w, wscale);
}

void cpu_linear_forward_f32(float *y, const floatX *x, const floatX *w, const float *wscale, size_t N, int C, int OC) {
    Product p = {.tb = true, .out_f32 = true, .scaled = wscale, .M = (int64_t)N, .N = OC, .K = C};
    if (N) product(&p, y, x, w, wscale);
}

// out (N, C), C of the ld values of each row of `in`, = in * scale by column.
static void scale_columns(floatX *out, const floatX *in, size_t ld, const float *scale, size_t N, int C) {
#pragma omp parallel for
    for (size_t n = 0; n < N; n++)
        for (int c = 0; c < C; c += 16) {
            int left = C - c < 16 ? C - c : 16;
            v16 v = v16_loadx(in + n * ld + (size_t)c, left) * v16_load(scale + c, left);
            v16_storex(out + n * (size_t)C + (size_t)c, v, left);
        }
}

void cpu_linear_backward_input(floatX *dx, const floatX *dy, const floatX *w, const float *wscale, floatX *dy_scaled,
                               size_t N, int C, int OC) {
    if (wscale) {
        scale_columns(dy_scaled, dy, (size_t)OC, wscale, N, OC);
        dy = dy_scaled;
    }
    Product p = {.M = (int64_t)N, .N = C, .K = OC};
    if (N) product(&p, dx, dy, w, NULL);
}

void cpu_linear_backward_weight(float *dw, const floatX *dy, const floatX *x, size_t N, int C, int OC,
                                bool accumulate) {
    Product p = {.ta = true, .out_f32 = true, .accumulate = accumulate, .M = OC, .N = C, .K = (int64_t)N,
                 .lda = OC};
    if (N) product(&p, dw, dy, x, NULL);
    else if (!accumulate) memset(dw, 0, (size_t)OC * (size_t)C * sizeof *dw);
}

// ---------------------------------------------------------------------------------------------
// The linears with INT8 weights in floating point: the same products of the codes as X, which are exact.
//
// A table of more than PIECE_ROWS rows (the head) is taken in pieces, so that neither the widened codes nor dy * wscale
// travel through memory. Forward, a column's bits do not depend on the columns beside it, which test_ops_int8 demands;
// the scale multiplies the f32 sums as they leave the cache. Backward, the pieces' sums are added in f32.
#define PIECE_ROWS 4096

static void write_piece(float *y, const float *sum, const float *wscale, size_t N, size_t cols, size_t OC,
                        bool stream) {
    stream = stream && !((uintptr_t)y % 64) && OC % 16 == 0;
#pragma omp parallel
    {
#pragma omp for
        for (size_t n = 0; n < N; n++)
            for (size_t c = 0; c < cols; c += 16) {
                int left = cols - c < 16 ? (int)(cols - c) : 16;
                v16 v = v16_load(sum + n * cols + c, left) * v16_load(wscale + c, left);
                if (stream && left == 16) v16_stream(y + n * OC + c, v);
                else v16_store(y + n * OC + c, v, left);
            }
        stream_done();
    }
}

void cpu_linear_w8_forward(floatX *y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C,
                           int OC) {
    Product p = {.tb = true, .scaled = true, .M = (int64_t)N, .N = OC, .K = C, .codes = codes};
    if (N) product(&p, y, x, NULL, wscale);
}

void cpu_linear_w8_forward_f32(float *y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C,
                               int OC) {
    Product p = {.tb = true, .out_f32 = true, .scaled = true, .M = (int64_t)N, .N = OC, .K = C, .codes = codes};
    if (!N) return;
    if (OC <= PIECE_ROWS) {
        product(&p, y, x, NULL, wscale);
        return;
    }
    bool stream = N * (size_t)OC * sizeof *y >= CPU_STREAM_BYTES;
    float *sum = cpu_workspace_outer(N * PIECE_ROWS * sizeof *sum);
    if (!sum) return;
    p.scaled = false;
    for (int n = 0; n < OC; n += PIECE_ROWS) {
        p.N = OC - n < PIECE_ROWS ? OC - n : PIECE_ROWS;
        p.codes = codes + (size_t)n * (size_t)C;
        product(&p, sum, x, NULL, NULL);
        write_piece(y + n, sum, wscale + n, N, (size_t)p.N, (size_t)OC, stream);
    }
}

void cpu_linear_w8_backward_input(floatX *dx, const floatX *dy, const int8_t *codes, const float *wscale,
                                  floatX *dy_scaled, size_t N, int C, int OC) {
    Product p = {.M = (int64_t)N, .N = C, .K = OC, .codes = codes};
    if (!N) return;
    if (OC <= PIECE_ROWS) {
        scale_columns(dy_scaled, dy, (size_t)OC, wscale, N, OC);
        product(&p, dx, dy_scaled, NULL, NULL);
        return;
    }
    float *sum = cpu_workspace_outer(N * (size_t)C * sizeof *sum);
    if (!sum) return;
    p.out_f32 = true;
    for (int k = 0; k < OC; k += PIECE_ROWS) {
        p.K = OC - k < PIECE_ROWS ? OC - k : PIECE_ROWS;
        p.codes = codes + (size_t)k * (size_t)C;
        p.accumulate = k > 0;
        scale_columns(dy_scaled, dy + k, (size_t)OC, wscale + k, N, (int)p.K);
        product(&p, sum, dy_scaled, NULL, NULL);
    }
    int64_t n = (int64_t)(N * (size_t)C);
#pragma omp parallel for
    for (int64_t i = 0; i < n; i += 16) {
        int left = n - i < 16 ? (int)(n - i) : 16;
        v16_storex(dx + i, v16_load(sum + i, left), left);
    }
}
