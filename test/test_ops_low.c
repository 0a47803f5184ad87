// adamw_low, int8_rows and widen in the CPU wing against optimizer.h, value by value: every pair of formats, odd
// shapes, parts of a tensor, threads, rows that hurt.
#include "cpu/lowbit.h"
#include "cpu/philox.h"
#include "ops_common.h"

static const Ops *const o = &ops_cpu;
static const AdamWParams params = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1};
static const ParamFormat param_formats[] = {PARAM_F32, PARAM_BF16, PARAM_INT8};
static const StateFormat state_formats[] = {STATE_F32, STATE_BF16, STATE_INT8, STATE_INT4, STATE_FP8};
enum { TENSOR = 5, SEED = 4711 };
#define EACH(T, x, list) for (size_t x##_i = 0; x##_i < sizeof list / sizeof *list; x##_i++) \
                             for (T x = list[x##_i], *x##_once = &x; x##_once; x##_once = NULL)

// A tensor as it is kept, in buffers of the exact size.
typedef struct { int64_t rows, cols; StoredParam p; StoredState m, v; } Kept;

static size_t values(const Kept *k) { return (size_t)(k->rows * k->cols); }
static void kept_alloc(StoredState *s, StateFormat f, size_t n) {
    size_t scales = state_scales(f, n);
    *s = (StoredState){.format = f, .data = must_alloc(state_data_bytes(f, n))};
    memset(s->data, 0, state_data_bytes(f, n));
    if (state_block(f)) s->scale = memset(must_alloc(scales * sizeof(float)), 0, scales * sizeof(float));
}
static Kept kept_new(ParamFormat pf, StateFormat mf, StateFormat vf, int64_t rows, int64_t cols, const float *start) {
    Kept k = {.rows = rows, .cols = cols, .p = {.format = pf}};
    size_t n = values(&k);
    k.p.data = must_alloc(n * param_value_bytes(pf));
    if (pf == PARAM_INT8) {
        k.p.scale = must_alloc((size_t)rows * sizeof(float));
        const StoredParam from = {.format = PARAM_F32, .data = (float *)(uintptr_t)start};
        o->int8_rows(k.p.data, k.p.scale, from, rows, cols);
    }
    for (size_t i = 0; i < n; i++) {
        if (pf == PARAM_F32) ((float *)k.p.data)[i] = start[i];
        if (pf == PARAM_BF16) ((bf16 *)k.p.data)[i] = bf16_from_f32(start[i]);
    }
    kept_alloc(&k.m, state_format(mf, (int64_t)n), n);
    kept_alloc(&k.v, state_format(vf, (int64_t)n), n);
    return k;
}
static StoredState state_copy(const StoredState *s, size_t n) {
    StoredState c = {.format = s->format, .data = copy_of(s->data, state_data_bytes(s->format, n))};
    if (s->scale) c.scale = copy_of(s->scale, state_scales(s->format, n) * sizeof(float));
    return c;
}
static Kept kept_copy(const Kept *k) {
    Kept c = *k;
    c.p.data = copy_of(k->p.data, values(k) * param_value_bytes(k->p.format));
    if (k->p.scale) c.p.scale = copy_of(k->p.scale, (size_t)k->rows * sizeof(float));
    c.m = state_copy(&k->m, values(k));
    c.v = state_copy(&k->v, values(k));
    return c;
}
static void kept_free(Kept *k) {
    free(k->p.data), free(k->p.scale), free(k->m.data), free(k->m.scale), free(k->v.data), free(k->v.scale);
}
static void expect_state(const StoredState *got, const StoredState *want, size_t n, const char *what, const Kept *k) {
    int r = (int)k->rows, c = (int)k->cols;
    char text[96];
    snprintf(text, sizeof text, "%s of format %d, parameter %d", what, got->format, k->p.format);
    if (got->scale)
        expect_same(got->scale, want->scale, state_scales(got->format, n) * sizeof(float), text, r, c);
    expect_same(got->data, want->data, state_data_bytes(got->format, n), text, r, c);
}
static void expect_kept(const Kept *got, const Kept *want) {
    int r = (int)got->rows, c = (int)got->cols;
    if (got->p.scale) expect_same(got->p.scale, want->p.scale, (size_t)r * sizeof(float), "row scales", r, c);
    expect_same(got->p.data, want->p.data, values(got) * param_value_bytes(got->p.format), "parameter", r, c);
    expect_state(&got->m, &want->m, values(got), "first moment", got);
    expect_state(&got->v, &want->v, values(got), "second moment", got);
}

// --- the reference ---------------------------------------------------------------------------------------------------

static float param_value(const Kept *k, size_t i) {
    if (k->p.format == PARAM_F32) return ((const float *)k->p.data)[i];
    if (k->p.format == PARAM_BF16) return bf16_to_f32(((const bf16 *)k->p.data)[i]);
    return (float)((const int8_t *)k->p.data)[i] * k->p.scale[i / (size_t)k->cols];
}
static void state_values(float *x, const StoredState *s, bool is_signed, size_t n) {
    const float *map = state_map(s->format, is_signed);
    for (size_t i = 0; i < n; i++) {
        if (s->format == STATE_F32) {
            x[i] = ((const float *)s->data)[i];
        } else if (s->format == STATE_BF16) {
            x[i] = bf16_to_f32(((const bf16 *)s->data)[i]);
        } else {
            const uint8_t *codes = s->data;
            int code = s->format == STATE_INT4 ? (i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4) : codes[i];
            x[i] = state_value(s->format, map, code, s->scale[i / (size_t)state_block(s->format)]);
        }
    }
}
static void state_keep(const StoredState *s, bool is_signed, const float *x, size_t n) {
    const float *map = state_map(s->format, is_signed);
    size_t block = (size_t)state_block(s->format);
    uint8_t *codes = s->data;
    float amax = 0.0f;
    for (size_t i = 0; i < n; i++) {
        if (s->format == STATE_F32) ((float *)s->data)[i] = x[i];
        if (s->format == STATE_BF16) ((bf16 *)s->data)[i] = bf16_from_f32(x[i]);
        if (!block) continue;
        if (i % block == 0) {
            amax = 0.0f;
            for (size_t j = i; j < i + block; j++) amax = fabsf(x[j]) > amax ? fabsf(x[j]) : amax;
            s->scale[i / block] = state_scale(s->format, amax);
        }
        int code = state_code(s->format, map, x[i], s->scale[i / block]);
        if (s->format != STATE_INT4) codes[i] = (uint8_t)code;
        else codes[i / 2] = (uint8_t)(i % 2 ? (codes[i / 2] & 0xf0) | code : code << 4);
    }
}
static void param_keep(const Kept *k, const float *x, Rounding rounding, uint64_t stream, size_t first) {
    size_t n = values(k), cols = (size_t)k->cols;
    float inv = 0.0f;
    for (size_t i = 0; i < n; i++) {
        uint64_t at = first + i;
        bool nearest = rounding == ROUND_NEAREST;
        if (k->p.format == PARAM_F32) ((float *)k->p.data)[i] = x[i];
        if (k->p.format == PARAM_BF16)
            ((bf16 *)k->p.data)[i] =
                nearest ? bf16_from_f32(x[i]) : bf16_stochastic(x[i], rounding_bits16(SEED, stream, at));
        if (k->p.format != PARAM_INT8) continue;
        if (i % cols == 0) {
            float amax = 0.0f;
            for (size_t j = i; j < i + cols; j++) amax = fabsf(x[j]) > amax ? fabsf(x[j]) : amax;
            k->p.scale[i / cols] = int8_row_scale(amax);
            inv = int8_row_inv(k->p.scale[i / cols]);
        }
        ((int8_t *)k->p.data)[i] =
            nearest ? int8_nearest(x[i], inv) : int8_stochastic(x[i], inv, rounding_uniform(SEED, stream, at));
    }
}
static void twin(const Kept *k, const float *grad, const StepState *s, Rounding rounding, int64_t row0) {
    size_t n = values(k);
    float *p = must_alloc(n * 4), *m = must_alloc(n * 4), *v = must_alloc(n * 4), lr = s->lr;
    float bc1 = 1.0f - pow_int_f32((float)params.beta1, s->t), bc2 = 1.0f - pow_int_f32((float)params.beta2, s->t);
    state_values(m, &k->m, true, n);
    state_values(v, &k->v, false, n);
    for (size_t i = 0; i < n; i++) {
        float g = grad[i] * s->grad_scale;
        p[i] = param_value(k, i);
        p[i] = p[i] - (lr * (float)params.weight_decay) * p[i];
        m[i] = m[i] + (float)(1.0 - params.beta1) * (g - m[i]);
        v[i] = v[i] + (float)(1.0 - params.beta2) * (g * g - v[i]);
        p[i] = p[i] - (lr * (m[i] / bc1)) / (sqrtf(v[i]) / sqrtf(bc2) + (float)params.eps);
    }
    state_keep(&k->m, true, m, n);
    state_keep(&k->v, false, v, n);
    param_keep(k, p, rounding, rounding_stream(TENSOR, s->t), (size_t)(row0 * k->cols));
    free(p), free(m), free(v);
}

// --- tests -----------------------------------------------------------------------------------------------------------

static void run(const Kept *k, floatX *work, float *wscale, const float *grad, const StepState *s, const QuantSpec *wq,
                Rounding rounding, int64_t row0) {
    o->adamw_low(k->p, k->m, k->v, work, wscale, grad, s, &params, wq, rounding, TENSOR, row0, k->rows, k->cols);
}
static StepState step_state(int t) {
    return (StepState){.t = t, .lr = 1e-2f / (float)t, .grad_scale = 0.37f, .seed = SEED};
}
// Gradients of many magnitudes: moments then take all codes.
static void gradients(float *g, size_t n) {
    fill_f32(g, n, 1.0f);
    for (size_t i = 0; i < n; i++) g[i] *= powf(10.0f, -6.0f * philox_uniform(philox(3, stream_of_tests, i).v[0]));
}

static const int tensors[][2] = {{1, 1},    {3, 7},    {1, 4096}, {16, 256}, {8, 576},    {256, 17},
                                 {37, 608}, {64, 608}, {2, 2304}, {33, 512}, {4096, 1}, {1, 12289}};
#define N_TENSORS (sizeof tensors / sizeof *tensors)

static void check_tensor(ParamFormat pf, StateFormat mf, StateFormat vf, int rows, int cols, Rounding rounding) {
    size_t n = (size_t)rows * (size_t)cols;
    float *start = new_f32(n, 0.1f), *grad = must_alloc(n * sizeof *grad);
    Kept got = kept_new(pf, mf, vf, rows, cols, start), want = kept_copy(&got);
    const int64_t row0 = 3 * state_unit(got.m.format, cols) * state_unit(got.v.format, cols);
    for (int t = 1; t <= 3; t++) {
        StepState s = step_state(t);
        gradients(grad, n);
        run(&got, NULL, NULL, grad, &s, NULL, rounding, row0);
        twin(&want, grad, &s, rounding, row0);
        expect_kept(&got, &want);
    }
    // A skipped step leaves all as it is.
    StepState skip = step_state(4);
    skip.skip = 1;
    grad[0] = NAN;
    run(&got, NULL, NULL, grad, &skip, NULL, rounding, row0);
    expect_kept(&got, &want);
    kept_free(&got), kept_free(&want), free(start), free(grad);
}

static void test_formats(void **state) {
    (void)state;
    for (size_t k = 0; k < N_TENSORS; k++)
        EACH(ParamFormat, pf, param_formats)
            EACH(StateFormat, sf, state_formats)
                check_tensor(pf, sf, sf, tensors[k][0], tensors[k][1], ROUND_STOCHASTIC);
    EACH(ParamFormat, pf, param_formats) check_tensor(pf, STATE_INT8, STATE_INT8, 8, 576, ROUND_NEAREST);
    EACH(StateFormat, mf, state_formats)
        EACH(StateFormat, vf, state_formats) check_tensor(PARAM_INT8, mf, vf, 16, 288, ROUND_STOCHASTIC);
    Kept none = {.cols = 576, .p = {.format = PARAM_INT8}, .m = {.format = STATE_INT8}, .v = {.format = STATE_INT8}};
    StepState s = step_state(1);
    run(&none, NULL, NULL, NULL, &s, NULL, ROUND_STOCHASTIC, 0);      // a rank with no rows
}

// With everything in f32, and working values: the very bits of adamw_fq.
#define SPEC(b, uns, lo, hi, g, group_, b0, b1, map, zp, e) \
    {.bits = b, .is_unsigned = uns, .qmin = lo, .qmax = hi, .gran = g, .group = group_, .block = {b0, b1}, \
     .mapping = map, .zero = zp, .eps = e}
#define TINY 0x1p-126f
static const QuantSpec specs[] = {
    {.bits = 0},
    SPEC(4, 0, -8, 7, QG_GROUP, 32, 0, 0, QM_SYMMETRIC, QZ_INT, TINY),
    SPEC(8, 0, -128, 127, QG_CHANNEL, 0, 0, 0, QM_SYMMETRIC, QZ_INT, TINY),
    SPEC(4, 1, 0, 15, QG_GROUP, 32, 0, 0, QM_ASYMMETRIC, QZ_FLOAT, 1e-6f),
    SPEC(8, 0, -127, 127, QG_TENSOR, 0, 0, 0, QM_SYMMETRIC, QZ_INT, TINY),
    SPEC(5, 0, -16, 15, QG_BLOCK, 0, 2, 16, QM_SYMMETRIC, QZ_INT, TINY),
    SPEC(8, 1, 0, 255, QG_BLOCK, 0, 3, 4, QM_ASYMMETRIC, QZ_INT, TINY),
};
static void test_working_values(void **state) {
    (void)state;
    static const int sizes[][2] = {{1, 96}, {6, 576}, {12, 384}, {48, 576}, {4, 32}};
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++)
        for (size_t q = 0; q < sizeof specs / sizeof *specs; q++) {
            int rows = sizes[k][0], cols = sizes[k][1];
            size_t n = (size_t)rows * (size_t)cols;
            int64_t block[2];
            if (specs[q].bits && quant_block_shape(&specs[q], rows, cols, block, NULL) < 0) continue;
            EACH(ParamFormat, pf, param_formats)
                EACH(StateFormat, sf, state_formats) {
                    if (pf == PARAM_INT8) continue;
                    float *start = new_f32(n, 0.1f), *grad = must_alloc(n * sizeof *grad), *stored = must_alloc(n * 4);
                    Kept got = kept_new(pf, sf, sf, rows, cols, start), want = kept_copy(&got);
                    floatX *work = must_alloc(n * sizeof *work), *work2 = must_alloc(n * sizeof *work);
                    float *wscale = must_alloc((size_t)rows * 4), *wscale2 = must_alloc((size_t)rows * 4);
                    for (int t = 1; t <= 2; t++) {
                        StepState s = step_state(t);
                        gradients(grad, n);
                        run(&got, work, wscale, grad, &s, &specs[q], ROUND_STOCHASTIC, 0);
                        if (pf == PARAM_F32 && got.m.format == STATE_F32) {
                            o->adamw_fq(want.p.data, want.m.data, want.v.data, work2, wscale2, grad, &s, &params,
                                        &specs[q], rows, cols);
                        } else {
                            twin(&want, grad, &s, ROUND_STOCHASTIC, 0);
                            for (size_t i = 0; i < n; i++) stored[i] = param_value(&want, i);
                            o->weight_fq(work2, wscale2, stored, &specs[q], rows, cols);
                        }
                        expect_kept(&got, &want);
                        expect_same(work, work2, n * sizeof *work, "working values", rows, cols);
                        expect_same(wscale, wscale2, (size_t)rows * 4, "their row scales", rows, cols);
                    }
                    run(&got, work, NULL, grad, &(StepState){.t = 3, .seed = SEED}, &specs[q], ROUND_STOCHASTIC, 0);
                    kept_free(&got), kept_free(&want);
                    free(start), free(grad), free(stored), free(work), free(work2), free(wscale), free(wscale2);
                }
        }
}

// Rows of `from` from r on, n of them, in place.
static StoredState state_rows(StoredState s, int64_t at) {
    s.data = (char *)s.data + state_data_bytes(s.format, (size_t)at);
    if (s.scale) s.scale += state_scales(s.format, (size_t)at);
    return s;
}
static Kept kept_rows(const Kept *from, int64_t r, int64_t n) {
    Kept k = *from;
    k.rows = n;
    k.p.data = (char *)k.p.data + (size_t)(r * k.cols) * param_value_bytes(k.p.format);
    if (k.p.scale) k.p.scale += r;
    k.m = state_rows(k.m, r * k.cols);
    k.v = state_rows(k.v, r * k.cols);
    return k;
}
// In parts, and by any number of threads: the same bits.
static void test_parts_and_threads(void **state) {
    (void)state;
    static const int sizes[][2] = {{64, 608}, {1280, 17}};
    for (size_t k = 0; k < 2; k++)
        EACH(ParamFormat, pf, param_formats)
            EACH(StateFormat, sf, state_formats) {
                int rows = sizes[k][0], cols = sizes[k][1];
                size_t n = (size_t)rows * (size_t)cols;
                float *start = new_f32(n, 0.1f), *grad = must_alloc(n * sizeof *grad);
                Kept whole = kept_new(pf, sf, sf, rows, cols, start);
                Kept part = kept_copy(&whole), three = kept_copy(&whole);
                int64_t cut = rows / 2 / state_unit(whole.m.format, cols) * state_unit(whole.m.format, cols);
                assert_true(cut > 0 && cut < rows);
                for (int t = 1; t <= 2; t++) {
                    StepState s = step_state(t);
                    gradients(grad, n);
                    set_threads(1);
                    run(&whole, NULL, NULL, grad, &s, NULL, ROUND_STOCHASTIC, 0);
                    set_threads(3);
                    run(&three, NULL, NULL, grad, &s, NULL, ROUND_STOCHASTIC, 0);
                    set_threads(2);
                    Kept lower = kept_rows(&part, 0, cut), upper = kept_rows(&part, cut, rows - cut);
                    run(&upper, NULL, NULL, grad + cut * cols, &s, NULL, ROUND_STOCHASTIC, cut);
                    run(&lower, NULL, NULL, grad, &s, NULL, ROUND_STOCHASTIC, 0);
                    expect_kept(&three, &whole);
                    expect_kept(&part, &whole);
                }
                kept_free(&whole), kept_free(&part), kept_free(&three), free(start), free(grad);
            }
}

// Rows and blocks of zeros, of one value, with NaN and infinity, subnormal and huge.
static void test_rows_that_hurt(void **state) {
    (void)state;
    enum { R = 16, C = 512, N = R * C };
    float *start = new_f32(N, 0.1f), *grad = new_f32(N, 1.0f);
    for (int c = 0; c < C; c++) {
        start[0 * C + c] = 0.0f, grad[0 * C + c] = c % 2 ? -0.0f : 0.0f;
        start[1 * C + c] = 0.25f, grad[1 * C + c] = 0.0f;
        start[2 * C + c] = f32_from_bits((uint32_t)c);
        grad[3 * C + c] = f32_from_bits(0x0d000000u + (uint32_t)c);
        start[4 * C + c] = 1e37f, grad[4 * C + c] = 1e18f;
    }
    grad[5 * C + 17] = NAN, start[6 * C + 400] = NAN;
    grad[7 * C + 3] = INFINITY, start[8 * C + 9] = -INFINITY, grad[9 * C + 300] = -INFINITY;
    EACH(ParamFormat, pf, param_formats)
        EACH(StateFormat, sf, state_formats) {
            Kept got = kept_new(pf, sf, sf, R, C, start), want = kept_copy(&got);
            for (int t = 1; t <= 2; t++) {
                StepState s = step_state(t);
                run(&got, NULL, NULL, grad, &s, NULL, ROUND_STOCHASTIC, 0);
                twin(&want, grad, &s, ROUND_STOCHASTIC, 0);
                for (size_t i = 0; i < N; i++) {
                    expect_same_f32(param_value(&got, i), param_value(&want, i), "parameter", i);
                    if (pf == PARAM_INT8) assert_int_equal(((int8_t *)got.p.data)[i], ((int8_t *)want.p.data)[i]);
                }
                if (state_block(got.m.format)) {
                    expect_state(&got.m, &want.m, N, "first moment", &got);
                    expect_state(&got.v, &want.v, N, "second moment", &got);
                }
                if (pf != PARAM_INT8) continue;
                const int8_t *codes = got.p.data;
                assert_true(got.p.scale[0] == 0.0f);                     // zeros stay zeros, with scale 0
                for (int c = 0; c < C; c++) assert_int_equal(codes[c], 0);
                assert_int_equal(codes[5 * C + 17], 0);                  // NaN is taken for zero
                assert_true(isfinite(got.p.scale[5]) && got.p.scale[5] > 0.0f);
            }
            kept_free(&got), kept_free(&want);
        }
    free(start), free(grad);
}

static void test_int8_rows(void **state) {
    (void)state;
    for (size_t k = 0; k < N_SHAPES; k++) {
        int rows = shapes[k][0], cols = shapes[k][1];
        size_t n = (size_t)rows * (size_t)cols;
        float *x = new_f32(n, 0.1f);
        bf16 *h = must_alloc(n * sizeof *h);
        if (rows > 2) memset(x + cols, 0, (size_t)cols * sizeof *x), x[2 * cols] = NAN;
        if (rows > 3) x[4 * cols - 1] = -INFINITY;
        for (size_t i = 0; i < n; i++) h[i] = bf16_from_f32(x[i]);
        for (int from_bf16 = 0; from_bf16 < 2; from_bf16++) {
            int8_t *codes = must_alloc(n);
            float *scale = must_alloc((size_t)rows * sizeof *scale);
            StoredParam from = {.format = from_bf16 ? PARAM_BF16 : PARAM_F32, .data = from_bf16 ? (void *)h : x};
            o->int8_rows(codes, scale, from, rows, cols);
            for (int r = 0; r < rows; r++) {
                float amax = 0.0f;
                for (int c = 0; c < cols; c++) {
                    float a = fabsf(from_bf16 ? bf16_to_f32(h[r * cols + c]) : x[r * cols + c]);
                    amax = a > amax ? a : amax;
                }
                expect_same_f32(scale[r], int8_row_scale(amax), "row scale", (size_t)r);
                for (int c = 0; c < cols; c++) {
                    float a = from_bf16 ? bf16_to_f32(h[r * cols + c]) : x[r * cols + c];
                    assert_int_equal(codes[r * cols + c], int8_nearest(a, int8_row_inv(scale[r])));
                }
            }
            if (rows > 3) {                          // an infinity makes all of its row NaN
                assert_true(isinf(scale[3]));
                for (int c = 0; c < cols; c++) assert_true(isnan((float)codes[3 * cols + c] * scale[3]));
            }
            free(codes), free(scale);
        }
        float *wide = must_alloc(n * sizeof *wide);
        o->widen(wide, h, n);
        for (size_t i = 0; i < n; i++) expect_same_f32(wide[i], bf16_to_f32(h[i]), "widened value", i);
        free(x), free(h), free(wide);
    }
    o->int8_rows(NULL, NULL, (StoredParam){.format = PARAM_BF16}, 0, 7);
}

// --- the pieces ------------------------------------------------------------------------------------------------------

static void test_philox(void **state) {
    (void)state;
    static const uint64_t firsts[] = {0, 1, 7, 0xfffffffcu, 0xffffffffu, 0x123456789abcdefu, UINT64_MAX - 3};
    EACH(uint64_t, first, firsts)
        for (int n = 1; n <= 200; n += 33) {
            uint32_t words[256];
            uint64_t seed = 0x9e3779b97f4a7c15u * (uint64_t)n, stream = rounding_stream(n, 7);
            PhiloxKeys keys;
            philox_keys(&keys, seed);
            philox_fill(words, &keys, stream, first, n);
            for (int i = 0; i < n; i++)
                assert_int_equal(words[i], philox(seed, stream, first + (uint64_t)i / 4).v[i % 4]);
        }
}

static void expect_codes(StateFormat f, bool is_signed, const StateMap *q, const float *u) {
    bool eight = f == STATE_INT8;
    v16i got = f == STATE_FP8 ? f8_from_f32_16(v16_load(u, 16))
                              : state_codes16(q, q->values, q->lines, is_signed, v16_load(u, 16));
    if (eight) {
        uint8_t quick[16];
        state_codes8(quick, q, is_signed, u, 1.0f, 16);
        for (int i = 0; i < 16; i++) assert_int_equal(quick[i], got[i]);
    }
    for (int i = 0; i < 16; i++) {
        int want = state_code(f, state_map(f, is_signed), u[i], 1.0f);
        if ((got[i] & 255) != want)
            fail_msg("%s%s: code of %.9g (%08x) is %d, expected %d", f == STATE_FP8 ? "e4m3" : eight ? "int8" : "int4",
                     is_signed ? " signed" : "", (double)u[i], f32_bits(u[i]), got[i] & 255, want);
    }
}
// The quick way with an inverse that is not exact.
static void expect_scaled(bool is_signed, const StateMap *q, const float *x, float scale) {
    uint8_t got[16];
    state_codes8(got, q, is_signed, x, scale, 16);
    for (int i = 0; i < 16; i++)
        assert_int_equal(got[i], state_code(STATE_INT8, state_map(STATE_INT8, is_signed), x[i], scale));
}
// Sixteen codes at once: around every edge and value, and a million numbers of all magnitudes.
static void test_codes(void **state) {
    (void)state;
    static const StateFormat formats[] = {STATE_INT8, STATE_INT4, STATE_FP8};
    EACH(StateFormat, f, formats)
        for (int is_signed = 0; is_signed < 2; is_signed++) {
            StateMap q = state_map_quick(f, is_signed);
            for (int c = 0; c < q.values; c++) {
                float u[16];
                for (int i = 0; i < 16; i++) {
                    float around = f == STATE_FP8 ? 0.0625f * (float)(c + 1) : i < 8 ? q.edges[c] : q.map[c];
                    float x = isinf(around) ? 1.0f : f32_from_bits(f32_bits(around) + (uint32_t)(i % 8) - 4u);
                    u[i] = x != x || (f != STATE_FP8 && fabsf(x) > 1.0f) ? 0.0f : x;
                }
                expect_codes(f, is_signed, &q, u);
            }
            for (uint64_t k = 0; k < 1000000 / 16; k++) {
                float u[16];
                for (uint64_t i = 0; i < 16; i++) {
                    Philox r = philox(8, (uint64_t)f, k * 16 + i);
                    u[i] = ldexpf(philox_uniform(r.v[0]), -(int)(r.v[1] % 32)) * (f == STATE_FP8 ? 448.1f : 1.0f);
                    if (r.v[2] & 1) u[i] = -u[i];
                }
                expect_codes(f, is_signed, &q, u);
                if (f != STATE_INT8) continue;
                // The same in blocks of many scales, in part just beside an edge.
                float scale = ldexpf(1.0f + philox_uniform(philox(9, 0, k).v[0]), (int)(k % 120) - 40);
                for (int i = 0; i < 16; i++) {
                    float edge = q.edges[(k + 16 * (uint64_t)i) % 255];
                    u[i] = scale * (i % 2 ? u[i] : f32_from_bits(f32_bits(edge) + (uint32_t)(k % 7) - 3u));
                    if (!(fabsf(u[i]) <= scale)) u[i] = k % 2 ? scale : -scale;
                }
                if (k % 64 == 0) u[k / 64 % 16] = NAN;
                expect_scaled(is_signed, &q, u, scale);
            }
        }
    for (int i = 0; i < 256; i += 16) {
        v16i codes;
        for (int j = 0; j < 16; j++) codes[j] = i + j;
        v16 got = f8_to_f32_16(codes);
        for (int j = 0; j < 16; j++) expect_same_f32(got[j], f8_e4m3_to_f32((f8_e4m3)(i + j)), "e4m3", (size_t)(i + j));
    }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_philox),
    cmocka_unit_test(test_codes),
    cmocka_unit_test(test_int8_rows),
    cmocka_unit_test(test_formats),
    cmocka_unit_test(test_working_values),
    cmocka_unit_test(test_parts_and_threads),
    cmocka_unit_test(test_rows_that_hurt),
};
TEST_MAIN(tests)
