// AdamW on parameters and moments in the formats of optimizer.h: one pass over each tensor, in which a step of values
// is widened to f32, updated and stored while it is in the nearest cache.
#include "lowbit.h"
#include "philox.h"
#include "update.h"

// Values that are updated at a time: whole blocks of states.
enum { STEP = 256 };

// One tensor. Parameters are stored when all of a strip has its new values: for INT8 a row, whose scale they make; for
// working values the rows of a quantization block; else a step.
typedef struct {
    Update u;
    StoredParam p;
    StoredState m, v;
    StateMap map[2];                 // of v and of m
    const float *grad;
    floatX *work;
    float *wscale;
    const QuantSpec *wq;             // NULL: not quantized, or with a scale for the whole tensor, in a second pass
    int64_t cols, b0, b1;            // b0 0: strips are steps
    int64_t width;                   // values of a strip
    bool stochastic, range_wanted;
    PhiloxKeys keys;
    uint64_t stream, first;          // first: these rows' first value in the whole tensor
} Low;

// ---------------------------------------------------------------------------------------------
// Moments

// n values from `at` on as f32: in `buffer`, or where they are.
static float *state_load(float *buffer, const StoredState *s, const StateMap *q, size_t at, int n) {
    uint8_t *bytes = s->data;
    switch (s->format) {
    case STATE_F32:
        return (float *)s->data + at;
    case STATE_BF16:
        for (int i = 0; i < n; i += 16) {
            int k = n - i < 16 ? n - i : 16;
            v16_store(buffer + i, v16_load_bf16((const bf16 *)s->data + at + i, k), k);
        }
        break;
    case STATE_INT8:
        for (int i = 0; i < n; i += 64)
            state_values64(buffer + i, bytes + at + i, q, v16_set1(s->scale[(at + (size_t)i) / 256]));
        break;
    case STATE_INT4:
        for (int i = 0; i < n; i += 16) {
            v16 x = v16_pick(q->map, nibbles_load(bytes + (at + (size_t)i) / 2));
            v16_store(buffer + i, x * v16_set1(s->scale[(at + (size_t)i) / 128]), 16);
        }
        break;
    case STATE_FP8:
        for (int i = 0; i < n; i += 16) {
            v16 x = f8_to_f32_16(v16i_load_u8(bytes + at + i, 16));
            v16_store(buffer + i, x * v16_set1(s->scale[(at + (size_t)i) / 256]), 16);
        }
        break;
    }
    return buffer;
}

VEC float block_scale(const float *x, int n, StateFormat f) {
    v16 amax = {0};
    for (int i = 0; i < n; i += 16) amax = v16_amax(amax, v16_load(x + i, 16));
    return state_scale(f, v16_hmax(amax));
}

VEC void store_codes4(uint8_t *codes, const float *x, float scale, const StateMap *q, bool is_signed) {
    v16 s = v16_set1(scale);
    for (int i = 0; i < 128; i += 16) {
        v16 u = state_scaled16(v16_load(x + i, 16), s);
        nibbles_store(codes + i / 2, state_codes16(q, 16, is_signed ? 3 : 1, is_signed, u));
    }
}

// Stores what state_load gave and the update changed.
static void state_store(const StoredState *s, const StateMap *q, const float *x, size_t at, int n) {
    uint8_t *bytes = s->data;
    bool is_signed = q->middle != 0.0f;
    switch (s->format) {
    case STATE_F32:
        break;
    case STATE_BF16:
        for (int i = 0; i < n; i += 16) {
            int k = n - i < 16 ? n - i : 16;
            v16_store_bf16((bf16 *)s->data + at + i, v16_load(x + i, k), k);
        }
        break;
    case STATE_INT8:
        for (int i = 0; i < n; i += 256) {
            float scale = s->scale[(at + (size_t)i) / 256] = block_scale(x + i, 256, STATE_INT8);
            if (is_signed) state_codes8(bytes + at + i, q, true, x + i, scale, 256);
            else state_codes8(bytes + at + i, q, false, x + i, scale, 256);
        }
        break;
    case STATE_INT4:
        for (int i = 0; i < n; i += 128) {
            float scale = s->scale[(at + (size_t)i) / 128] = block_scale(x + i, 128, STATE_INT4);
            if (is_signed) store_codes4(bytes + (at + (size_t)i) / 2, x + i, scale, q, true);
            else store_codes4(bytes + (at + (size_t)i) / 2, x + i, scale, q, false);
        }
        break;
    case STATE_FP8:
        for (int i = 0; i < n; i += 256) {
            float scale = s->scale[(at + (size_t)i) / 256] = block_scale(x + i, 256, STATE_FP8);
            for (int j = i; j < i + 256; j += 16)
                v16i_store_u8(bytes + at + j, f8_from_f32_16(state_scaled16(v16_load(x + j, 16), v16_set1(scale))), 16);
        }
        break;
    }
}

// ---------------------------------------------------------------------------------------------
// Parameters

// n values from `at` on, of a tensor with cols columns, as f32.
static void param_load(float *out, const StoredParam *p, int64_t cols, size_t at, int n) {
    if (p->format == PARAM_INT8) {
        int64_t row = (int64_t)at / cols, c = (int64_t)at % cols;
        for (; n > 0; row++, c = 0) {
            int part = cols - c < n ? (int)(cols - c) : n;
            const int8_t *codes = (const int8_t *)p->data + row * cols + c;
            v16 s = v16_set1(p->scale[row]);
            for (int i = 0; i < part; i += 16) {
                int k = part - i < 16 ? part - i : 16;
                v16_store(out + i, v16_load_i8(codes + i, k) * s, k);
            }
            out += part;
            n -= part;
        }
        return;
    }
    for (int i = 0; i < n; i += 16) {
        int k = n - i < 16 ? n - i : 16;
        v16 x = p->format == PARAM_F32 ? v16_load((const float *)p->data + at + i, k)
                                       : v16_load_bf16((const bf16 *)p->data + at + i, k);
        v16_store(out + i, x, k);
    }
}

// The scale of a row of new values.
VEC float row_scale(const float *x, int64_t n) {
    v16 amax = {0};
    for (int64_t c = 0; c < n; c += 16) amax = v16_amax(amax, v16_load(x + c, n - c < 16 ? (int)(n - c) : 16));
    return int8_row_scale(v16_hmax(amax));
}
static void int8_row_nearest(int8_t *codes, const float *x, int64_t n, float scale) {
    v16 inv = v16_set1(int8_row_inv(scale));
    for (int64_t c = 0; c < n; c += 16) {
        int k = n - c < 16 ? (int)(n - c) : 16;
        v16_store_i8(codes + c, v16_load(x + c, k) * inv, k);
    }
}
// at: the row's first value in the whole tensor.
static void int8_row_stochastic(int8_t *codes, const float *x, int64_t n, float scale, const Low *l, uint64_t at) {
    uint32_t words[STEP + 2 * PHILOX_GROUP];
    v16 inv = v16_set1(int8_row_inv(scale));
    for (int64_t c = 0; c < n; c += STEP, at += STEP) {
        int part = n - c < STEP ? (int)(n - c) : STEP, skip = (int)(at % 4);
        philox_fill(words, &l->keys, l->stream, at / 4, skip + part);
        for (int i = 0; i < part; i += 16) {
            int k = part - i < 16 ? part - i : 16;
            v16i random;
            memcpy(&random, words + skip + i, sizeof random);
            v16_store_i8(codes + c + i, int8_stochastic16(v16_load(x + c + i, k), inv, random), k);
        }
    }
}
// Stores n values as bf16 and leaves in x what was stored.
static void bf16_store(bf16 *out, float *x, int64_t n, const Low *l, uint64_t at) {
    uint32_t words[STEP / 2 + 2 * PHILOX_GROUP];
    for (int64_t c = 0; c < n; c += STEP, at += STEP) {
        int part = n - c < STEP ? (int)(n - c) : STEP, skip = (int)(at % 8);
        if (l->stochastic) philox_fill(words, &l->keys, l->stream, at / 8, (skip + part + 1) / 2);
        for (int i = 0; i < part; i += 16) {
            int k = part - i < 16 ? part - i : 16;
            v16 value = v16_load(x + c + i, k);
            if (l->stochastic) {
                uint16_t r[16];
                v16i random = {0};
                memcpy(r, (const uint16_t *)words + skip + i, sizeof r);       // the lower half comes first
                for (int j = 0; j < 16; j++) random[j] = r[j];
                v16i_store_u16(out + c + i, bf16_stochastic16(value, random), k);
            } else {
                v16_store_bf16(out + c + i, value, k);
            }
            v16_store(x + c + i, v16_load_bf16(out + c + i, k), k);
        }
    }
}

// Stores the new parameters of a strip of n values, and makes working values of what is stored. at: the strip's first
// value among these rows.
static void strip_store(const Low *l, float *x, size_t at, int64_t n, Range *range) {
    if (l->p.format == PARAM_INT8) {
        int8_t *codes = (int8_t *)l->p.data + at;
        float scale = l->p.scale[(int64_t)at / l->cols] = row_scale(x, n);
        if (l->stochastic) int8_row_stochastic(codes, x, n, scale, l, l->first + at);
        else int8_row_nearest(codes, x, n, scale);
        return;
    }
    if (l->p.format == PARAM_F32) memcpy((float *)l->p.data + at, x, (size_t)n * sizeof *x);
    else bf16_store((bf16 *)l->p.data + at, x, n, l, l->first + at);
    if (l->range_wanted)
        for (int64_t i = 0; i < n; i += 16) {
            int k = n - i < 16 ? (int)(n - i) : 16;
            range_add(range, v16_load(x + i, k), k);
        }
    if (!l->work) return;
    if (l->b0) {
        const Update none = {.master = x};
        float *wscale = l->wscale ? l->wscale + (int64_t)at / l->cols : NULL;
        update_strip(&none, UPDATE_NONE, l->work + at, wscale, l->wq, 0, l->cols, l->b0, l->b1,
                     quant_works_as_codes(l->wq));
        return;
    }
    for (int64_t i = 0; i < n; i += 16) {
        int k = n - i < 16 ? (int)(n - i) : 16;
        v16_storex(l->work + at + i, v16_load(x + i, k), k);
    }
}

// ---------------------------------------------------------------------------------------------
// The pass

VEC void adamw_span(const Update *u, float *p, float *m, float *v, const float *grad, int n) {
    for (int i = 0; i < n; i += 16) {
        int k = n - i < 16 ? n - i : 16;
        prefetch_ahead(grad + i);
        v16 g = v16_load(grad + i, k) * v16_set1(u->grad_scale), mv = v16_load(m + i, k), vv = v16_load(v + i, k);
        v16_store(p + i, adamw16(u, v16_load(p + i, k), g, &mv, &vv), k);
        v16_store(m + i, mv, k);
        v16_store(v + i, vv, k);
    }
}

// Rows from `at` to `end` (values), whole blocks of states and whole strips. tile: a strip and a step of values.
static void low_rows(const Low *l, float *tile, size_t at, size_t end, Range *range) {
    float m_values[STEP], v_values[STEP];
    int64_t held = 0;                                // updated and not yet stored
    while (at < end) {
        int n = end - at < STEP ? (int)(end - at) : STEP;
        float *p = tile + held;
        param_load(p, &l->p, l->cols, at, n);
        float *m = state_load(m_values, &l->m, &l->map[1], at, n), *v = state_load(v_values, &l->v, &l->map[0], at, n);
        adamw_span(&l->u, p, m, v, l->grad + at, n);
        state_store(&l->m, &l->map[1], m, at, n);
        state_store(&l->v, &l->map[0], v, at, n);
        at += (size_t)n;
        held += n;
        int64_t stored = 0;
        while (held - stored >= l->width || (at == end && held > stored)) {
            int64_t w = held - stored < l->width ? held - stored : l->width;
            strip_store(l, tile + stored, at - (size_t)(held - stored), w, range);
            stored += w;
        }
        held -= stored;
        if (stored) memmove(tile, tile + stored, (size_t)held * sizeof *tile);
    }
}

// Working values of a tensor with one scale, from what is stored.
static void whole_tensor(const Low *l, const QuantSpec *wq, Range range, float *tiles, int64_t rows) {
    v16 lo = v16_bf16_round(v16_set1(v16_hmin(range.lo))), hi = v16_bf16_round(v16_set1(v16_hmax(range.hi)));
    BlockQuant b = block_quant(v16_choose(lo, hi, wq, QD_BF16), wq, QD_BF16);
    int64_t steps = (rows * l->cols + STEP - 1) / STEP, n = rows * l->cols;
#pragma omp parallel for schedule(static) if (n >= CPU_MIN_PARALLEL)
    for (int64_t k = 0; k < steps; k++) {
        float *tile = tiles + (size_t)cpu_thread() * STEP;
        int part = n - k * STEP < STEP ? (int)(n - k * STEP) : STEP;
        param_load(tile, &l->p, l->cols, (size_t)(k * STEP), part);
        quantize_span(l->work + k * STEP, tile, part, &b, wq, false);
    }
}

// What a tensor's strips are, and how many rows a thread takes at least. 0, or a negative code: the error is set.
static int low_plan(Low *l, int64_t *unit, const QuantSpec *wq, int64_t rows) {
    int64_t um = state_unit(l->m.format, l->cols), uv = state_unit(l->v.format, l->cols);
    *unit = um > uv ? um : uv;                       // powers of two
    l->width = l->p.format == PARAM_INT8 ? l->cols : STEP;
    if (!l->work || !quant_is_on(wq)) return 0;
    int64_t block[2];
    Err err;
    if (quant_block_shape(wq, rows, l->cols, block, &err) < 0) {
        ops_set_error(err.code, "%s", err.text);
        return err.code;
    }
    l->range_wanted = block[0] == rows && block[1] == l->cols && rows > 1;
    if (l->range_wanted) return 0;
    l->wq = wq;
    l->b0 = block[0];
    l->b1 = block[1];
    l->width = l->b0 * l->cols;
    int64_t both = *unit;
    while (both % l->b0) both += *unit;
    *unit = both;
    return 0;
}

void cpu_adamw_low(StoredParam p, StoredState m, StoredState v, floatX *work, float *wscale, const float *grad,
                   const StepState *state, const AdamWParams *h, const QuantSpec *wq, Rounding rounding, int tensor,
                   int64_t row0, int64_t rows, int64_t cols) {
    if (state->skip || rows == 0) return;
    Low l = {.u = adamw_update(state, h), .p = p, .m = m, .v = v, .grad = grad, .wscale = wscale, .cols = cols,
             .work = p.format == PARAM_INT8 ? NULL : work, .stochastic = rounding == ROUND_STOCHASTIC,
             .map = {state_map_quick(v.format, false), state_map_quick(m.format, true)},
             .stream = rounding_stream(tensor, state->t),
             .first = (uint64_t)row0 * (uint64_t)cols};
    philox_keys(&l.keys, state->seed);
    int64_t unit;
    if (low_plan(&l, &unit, wq, rows) < 0) return;
    // Each thread a tile of its own, some cache lines apart.
    size_t tile = ((size_t)l.width + 2 * STEP + 63) / 64 * 64;
    float *tiles = cpu_workspace((size_t)cpu_max_threads() * tile * sizeof *tiles);
    if (!tiles) return;
    Low pass = l;
    if (l.range_wanted) pass.work = NULL;
    int units = (int)((rows + unit - 1) / unit);
    Range all = range_empty();
#pragma omp parallel if (rows * cols >= CPU_MIN_PARALLEL)
    {
        int first, last;
        cpu_share(&first, &last, units);
        Range range = range_empty();
        int64_t begin = first * unit, end = last * unit < rows ? last * unit : rows;
        low_rows(&pass, tiles + (size_t)cpu_thread() * tile, (size_t)(begin * cols), (size_t)(end * cols), &range);
        if (l.range_wanted) {
#pragma omp critical
            {
                all.lo = v16_min(range.lo, all.lo);
                all.hi = v16_max(range.hi, all.hi);
            }
        }
    }
    if (l.range_wanted) whole_tensor(&l, wq, all, tiles, rows);
    if (l.work && wscale && !l.b0)
        for (int64_t r = 0; r < rows; r++) wscale[r] = 1.0f;
}

void cpu_int8_rows(int8_t *codes, float *scale, StoredParam from, int64_t rows, int64_t cols) {
    if (rows == 0) return;
    size_t tile = ((size_t)cols + 63) / 64 * 64;
    float *tiles = NULL;
    if (from.format != PARAM_F32 && !(tiles = cpu_workspace((size_t)cpu_max_threads() * tile * sizeof *tiles))) return;
#pragma omp parallel for schedule(static) if (rows * cols >= CPU_MIN_PARALLEL)
    for (int64_t r = 0; r < rows; r++) {
        const float *x = (const float *)from.data + r * cols;
        if (tiles) {
            float *own = tiles + (size_t)cpu_thread() * tile;
            for (int64_t c = 0; c < cols; c += STEP)
                param_load(own + c, &from, cols, (size_t)(r * cols + c), cols - c < STEP ? (int)(cols - c) : STEP);
            x = own;
        }
        scale[r] = row_scale(x, cols);
        int8_row_nearest(codes + r * cols, x, cols, scale[r]);
    }
}

void cpu_widen(float *out, const bf16 *in, size_t n) {
#pragma omp parallel for schedule(static) if (n >= CPU_MIN_PARALLEL)
    for (size_t i = 0; i < n; i += 16) {
        int k = n - i < 16 ? (int)(n - i) : 16;
        v16_store(out + i, v16_load_bf16(in + i, k), k);
    }
}
