#include "store.h"
#include <stdlib.h>
#include <string.h>
#include "device.h"

// Whether the shard's place for the working weight is the store of tensor i: nobody else holds other rows of it, and it
// works as it is stored.
static bool works_as_stored(const Store *s, int i) {
    const Param *p = &s->shard->own.table->p[i];
    if (s->shard->level != SHARD_NONE) return false;
    return p->format == PARAM_INT8 || (p->format == PARAM_BF16 && sizeof(floatX) == sizeof(bf16) &&
                                       !p->scheme.weight.bits);
}

// ---------------------------------------------------------------------------------------------
// Memory

// Pieces of the arena in order; with base NULL they are only counted.
typedef struct { uint8_t *base; size_t end; } Cut;

static void *cut(Cut *c, size_t bytes) {
    uint8_t *p = c->base && bytes ? c->base + c->end : NULL;
    c->end += (bytes + 63) & ~(size_t)63;
    return p;
}

static size_t values_held(const Store *s, int i) {
    const Param *p = &s->shard->own.held.p[i];
    return (size_t)p->rows * (size_t)p->cols;
}

static StoredState cut_state(const Store *s, Cut *c, StoredState before, int i, bool scales) {
    const Param *p = &s->shard->own.held.p[i];
    StoredState x = before;
    x.format = p->state;
    if (scales) x.scale = cut(c, state_scales(p->state, values_held(s, i)) * sizeof *x.scale);
    else x.data = cut(c, state_data_bytes(p->state, values_held(s, i)));
    return x;
}

// What is of one kind lies together, so that a checkpoint's copy takes it in one piece.
static void lay_out(Store *s, uint8_t *base) {
    Cut c = {.base = base};
    const ParamTable *held = &s->shard->own.held;
    for (int scales = 0; scales < 2; scales++)
        for (int i = 0; i < held->n; i++) {
            const Param *p = &held->p[i];
            StoredParam *x = &s->t[i].p;
            x->format = p->format;
            if (works_as_stored(s, i)) {
                if (!base) continue;
                x->data = shard_weight(s->shard, i);
                if (x->format == PARAM_INT8) x->scale = shard_weight_scale(s->shard, i);
            } else if (!scales) {
                x->data = cut(&c, values_held(s, i) * param_value_bytes(p->format));
            } else if (p->format == PARAM_INT8) {
                x->scale = cut(&c, (size_t)p->rows * sizeof *x->scale);
            }
        }
    s->param_bytes = (double)c.end;
    for (int v = 0; v <= s->has_v; v++)
        for (int scales = 0; scales < 2; scales++)
            for (int i = 0; i < held->n; i++) {
                StoredState *x = v ? &s->t[i].v : &s->t[i].m;
                *x = cut_state(s, &c, *x, i, scales);
            }
    s->state_bytes = (double)c.end - s->param_bytes;
    s->arena_bytes = c.end;
}

int store_plan(Store *s, const Shard *shard, bool has_v, Err *err) {
    size_t n = (size_t)shard->own.held.n;
    *s = (Store){.shard = shard, .has_v = has_v, .t = xcalloc(n, sizeof *s->t)};
    for (int i = 0; i < shard->own.held.n; i++) {
        const Param *p = &shard->own.table->p[i];
        int64_t unit = state_unit(p->state, p->cols);
        if (shard->own.split[i].unit % unit == 0) continue;
        store_free(s);
        return err_set(err, E_SHAPE, "%s: blocks of its moments take %lld rows, which ranks would divide", p->name,
                       (long long)unit);
    }
    for (int a = 0; a < STORE_MAX_ARRAYS; a++) s->arrays[a] = xcalloc(n, sizeof *s->arrays[a]);
    lay_out(s, NULL);
    return 0;
}

int store_alloc(Store *s, Err *err) {
    void *arena;
    int rc = device_alloc(&arena, s->arena_bytes ? s->arena_bytes : 64, "weights and optimizer state", err);
    if (rc < 0) return rc;
    s->arena = arena;
    lay_out(s, s->arena);
    return 0;
}

void store_free(Store *s) {
    if (s->arena) device_free(s->arena);
    for (int a = 0; a < STORE_MAX_ARRAYS; a++) free(s->arrays[a]);
    free(s->t);
    *s = (Store){0};
}

// ---------------------------------------------------------------------------------------------
// Rows

static void *advance(void *data, int64_t bytes) { return data ? (uint8_t *)data + bytes : NULL; }

StoredParam store_param(const Store *s, int i, int64_t row0) {
    StoredParam x = s->t[i].p;
    int64_t cols = s->shard->own.held.p[i].cols;
    x.data = advance(x.data, row0 * cols * (int64_t)param_value_bytes(x.format));
    if (x.scale) x.scale += row0;
    return x;
}

floatX *store_work(const Store *s, int i) {
    return shard_updates_weights(s->shard) && !works_as_stored(s, i) ? shard_weight(s->shard, i) : NULL;
}

int store_set_rows(Store *s, int i, int64_t row0, int64_t n, const float *rows, Err *err) {
    StoredParam to = store_param(s, i, row0);
    int64_t cols = s->shard->own.held.p[i].cols;
    size_t values = (size_t)(n * cols);
    if (!values) return 0;
    if (to.format == PARAM_F32) {
        device_copy_in(to.data, rows, values * sizeof *rows);
    } else if (to.format == PARAM_BF16) {
        bf16 *rounded = xmalloc(values * sizeof *rounded);
        for (size_t k = 0; k < values; k++) rounded[k] = bf16_from_f32(rows[k]);
        device_copy_in(to.data, rounded, values * sizeof *rounded);
        free(rounded);
    } else {
        void *wide;
        int rc = device_alloc(&wide, values * sizeof *rows, "a tile of weights", err);
        if (rc < 0) return rc;
        device_copy_in(wide, rows, values * sizeof *rows);
        ops->int8_rows(to.data, to.scale, (StoredParam){.format = PARAM_F32, .data = wide}, n, cols);
        device_free(wide);
    }
    return 0;
}

void store_set_codes(Store *s, int i, int64_t row0, int64_t n, const int8_t *codes, const float *scale) {
    StoredParam to = store_param(s, i, row0);
    if (!n) return;
    device_copy_in(to.data, codes, (size_t)(n * s->shard->own.held.p[i].cols));
    device_copy_in(to.scale, scale, (size_t)n * sizeof *scale);
}

// ---------------------------------------------------------------------------------------------
// Checkpoints

static StateTensor moment_values(const Param *p, StoredState x) {
    static const DType types[] = {[STATE_F32] = DT_F32, [STATE_BF16] = DT_BF16, [STATE_INT8] = DT_U8,
                                  [STATE_INT4] = DT_U8, [STATE_FP8] = DT_U8};
    int64_t unit = state_unit(x.format, p->cols);
    size_t bytes = state_data_bytes(x.format, (size_t)(unit * p->cols));
    return (StateTensor){types[x.format], unit, (int64_t)(bytes / dtype_size(types[x.format])), x.data};
}

static StateTensor moment_scales(const Param *p, StoredState x) {
    int64_t unit = state_unit(x.format, p->cols);
    return (StateTensor){DT_F32, unit, (int64_t)state_scales(x.format, (size_t)(unit * p->cols)), x.scale};
}

int store_arrays(const Store *s, StateArray arrays[STORE_MAX_ARRAYS]) {
    static const char *const names[STORE_MAX_ARRAYS] = {"master", "master_scale", "m", "m_scale", "v", "v_scale"};
    static const DType types[] = {[PARAM_F32] = DT_F32, [PARAM_BF16] = DT_BF16, [PARAM_INT8] = DT_I8};
    int n = 0;
    for (int a = 0; a < (s->has_v ? STORE_MAX_ARRAYS : STORE_MAX_ARRAYS - 2); a++) {
        bool any = false;
        for (int i = 0; i < s->shard->own.held.n; i++) {
            const Param *p = &s->shard->own.held.p[i];
            const StoredTensor *t = &s->t[i];
            StoredState moment = a < 4 ? t->m : t->v;
            s->arrays[a][i] = a == 0 ? (StateTensor){types[t->p.format], 1, p->cols, t->p.data}
                              : a == 1 ? (StateTensor){DT_F32, 1, t->p.format == PARAM_INT8, t->p.scale}
                              : a % 2 == 0 ? moment_values(p, moment) : moment_scales(p, moment);
            any = any || s->arrays[a][i].values;
        }
        if (any) arrays[n++] = (StateArray){names[a], s->arrays[a]};
    }
    return n;
}

// ---------------------------------------------------------------------------------------------
// Export

typedef struct { int64_t tensor, row0, n, codes; } RowRequest;       // n 0: no more

// Rows of those held, for the host.
static void copy_codes(const Store *s, int i, int64_t row0, int64_t n, int8_t *codes, float *scale) {
    StoredParam from = store_param(s, i, row0);
    device_copy_out(codes, from.data, (size_t)(n * s->shard->own.held.p[i].cols));
    device_copy_out(scale, from.scale, (size_t)n * sizeof *scale);
}

static void copy_values(const Store *s, int i, int64_t row0, int64_t n, float *out) {
    StoredParam from = store_param(s, i, row0);
    int64_t cols = s->shard->own.held.p[i].cols;
    size_t values = (size_t)(n * cols);
    if (from.format == PARAM_F32) {
        device_copy_out(out, from.data, values * sizeof *out);
    } else if (from.format == PARAM_BF16) {
        bf16 *narrow = xmalloc(values * sizeof *narrow);
        device_copy_out(narrow, from.data, values * sizeof *narrow);
        for (size_t k = 0; k < values; k++) out[k] = bf16_to_f32(narrow[k]);
        free(narrow);
    } else {
        int8_t *codes = xmalloc(values);
        float *scale = xmalloc((size_t)n * sizeof *scale);
        copy_codes(s, i, row0, n, codes, scale);
        for (size_t k = 0; k < values; k++) out[k] = (float)codes[k] * scale[k / (size_t)cols];
        free(codes);
        free(scale);
    }
}

// Rows of the whole tensor, as values (codes NULL) or as codes and scales, from whichever ranks hold them.
static int read_rows(const Store *s, const Param *p, int64_t row0, int64_t n, float *out, int8_t *codes, float *scale,
                     Err *err) {
    const OwnTable *o = &s->shard->own;
    int i = (int)(p - o->table->p);
    int64_t cols = p->cols;
    for (int64_t row = row0; row < row0 + n;) {
        int q = o->rank;
        int64_t begin = o->row0[i], end = begin + o->held.p[i].rows, done = row - row0;
        for (int k = 0; k < o->R && !(row >= begin && row < end); k++) {
            q = k;
            begin = split_begin(&o->split[i], k);
            end = begin + split_count(&o->split[i], k);
        }
        RowRequest want = {i, row, (end < row0 + n ? end : row0 + n) - row, codes != NULL};
        if (q == o->rank) {
            if (codes) copy_codes(s, i, row - begin, want.n, codes + done * cols, scale + done);
            else copy_values(s, i, row - begin, want.n, out + done * cols);
        } else {
            size_t values = (size_t)(want.n * cols);
            int rc = comm_host_send(&want, sizeof want, q, err);
            if (rc == 0 && codes) rc = comm_host_recv(codes + done * cols, values, q, err);
            if (rc == 0 && codes) rc = comm_host_recv(scale + done, (size_t)want.n * sizeof *scale, q, err);
            if (rc == 0 && !codes) rc = comm_host_recv(out + done * cols, values * sizeof *out, q, err);
            if (rc < 0) return rc;
        }
        row += want.n;
    }
    return 0;
}

int store_rows(void *ctx, const Param *p, int64_t row0, int64_t n, float *out, Err *err) {
    return read_rows(ctx, p, row0, n, out, NULL, NULL, err);
}

int store_codes(void *ctx, const Param *p, int64_t row0, int64_t n, int8_t *codes, float *scale, Err *err) {
    return read_rows(ctx, p, row0, n, NULL, codes, scale, err);
}

int store_lend_rows(const Store *s, Err *err) {
    const OwnTable *o = &s->shard->own;
    if (o->replicated) return 0;
    for (;;) {
        RowRequest want;
        int rc = comm_host_recv(&want, sizeof want, 0, err);
        if (rc < 0) return rc;
        if (!want.n) return 0;
        int i = (int)want.tensor;
        int64_t row = want.row0 - o->row0[i];
        size_t values = (size_t)(want.n * o->held.p[i].cols);
        float *rows = xmalloc((want.codes ? (size_t)want.n : values) * sizeof *rows);
        if (want.codes) {
            int8_t *codes = xmalloc(values);
            copy_codes(s, i, row, want.n, codes, rows);
            rc = comm_host_send(codes, values, 0, err);
            if (rc == 0) rc = comm_host_send(rows, (size_t)want.n * sizeof *rows, 0, err);
            free(codes);
        } else {
            copy_values(s, i, row, want.n, rows);
            rc = comm_host_send(rows, values * sizeof *rows, 0, err);
        }
        free(rows);
        if (rc < 0) return rc;
    }
}

int store_rows_end(const Store *s, Err *err) {
    int rc = 0;
    for (int q = 1; q < s->shard->own.R && rc == 0 && !s->shard->own.replicated; q++)
        rc = comm_host_send(&(RowRequest){0}, sizeof(RowRequest), q, err);
    return rc;
}
