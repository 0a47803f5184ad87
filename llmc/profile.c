#include "profile.h"
#include "device.h"
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum {
#define X(name) OP_##name,
    QLLM_OPS(X)
#undef X
    OP_COUNT
};
static const char *const op_names[OP_COUNT] = {
#define X(name) #name,
    QLLM_OPS(X)
#undef X
};

static const Ops *inner;
static Ops timed;
static double spent[OP_COUNT];
static long calls[OP_COUNT];

// A span whose marks are not read yet.
typedef struct { const char *what; int op, begin, end; } Pending;      // op -1: beside the operations
static Pending pending[DEVICE_MARKS / 2];
static int n_pending, depth;           // depth: operations that call others
static long unmarked;                  // there was no mark for them

// Spans come from the thread that computes and from one that communicates.
typedef struct { const char *what; int lane; double t0, t1; } Span;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Span *spans;
static size_t n_spans, max_spans, left_out;
static bool on;
static char path[1024];
static int rank_shown;

static void span_add(const char *what, int lane, double t0, double t1) {
    pthread_mutex_lock(&lock);
    if (on && n_spans == max_spans && max_spans < PROFILE_SPANS) {
        size_t more = max_spans ? 2 * max_spans : 4096;
        Span *p = realloc(spans, more * sizeof *p);
        if (p) spans = p, max_spans = more;
    }
    if (on && n_spans < max_spans) spans[n_spans++] = (Span){what, lane, t0, t1};
    else left_out += on;
    pthread_mutex_unlock(&lock);
}

void profile_span(const char *what, int lane, double t0, double t1) { span_add(what, lane, t0, t1); }

static void read_marks(void) {
    static double seconds[DEVICE_MARKS];
    int n = device_marks_read(seconds);
    for (int i = 0; i < n_pending; i++) {
        const Pending *p = &pending[i];
        if (p->begin >= n || p->end >= n) continue;
        double t0 = seconds[p->begin], t1 = seconds[p->end];
        if (p->op >= 0) spent[p->op] += t1 - t0;
        span_add(p->what, p->op >= 0 ? PROFILE_COMPUTE : PROFILE_COMMUNICATION, t0, t1);
    }
    n_pending = 0;
}

static void pending_add(const char *what, int op, int begin, int end) {
    if (begin >= 0 && end >= 0 && n_pending < DEVICE_MARKS / 2) pending[n_pending++] = (Pending){what, op, begin, end};
    else unmarked++;
}
static void beside(const char *what, int begin, int end) { pending_add(what, -1, begin, end); }

// Marks that an operation's own calls may take before the next one comes by here.
#define SPARE 64
static int op_begin(void) {
    if (!depth++ && n_pending > DEVICE_MARKS / 2 - SPARE) read_marks();
    return device_mark();
}
static void op_end(int op, int begin) {
    depth--;
    calls[op]++;
    pending_add(op_names[op], op, begin, device_mark());
}

#define TIMED(name, params, args) \
    static void timed_##name params { \
        int begin = op_begin(); \
        inner->name args; \
        op_end(OP_##name, begin); \
    }

TIMED(embedding_forward, (floatX * out, const int32_t *tokens, const floatX *wte, size_t N, int C, int V),
      (out, tokens, wte, N, C, V))
TIMED(embedding_backward, (float *dwte, const floatX *dout, const int32_t *tokens, size_t N, int C, int V),
      (dwte, dout, tokens, N, C, V))
TIMED(rmsnorm_fq_forward,
      (floatX * res, floatX *y, float *rstd, uint8_t *mask, const floatX *x, const floatX *delta, const floatX *weight,
       size_t N, int C, float eps, const QuantSpec *act),
      (res, y, rstd, mask, x, delta, weight, N, C, eps, act))
TIMED(rmsnorm_backward,
      (floatX * dres, float *dweight, const floatX *dy, const uint8_t *mask, const floatX *x, const floatX *weight,
       const float *rstd, size_t N, int C),
      (dres, dweight, dy, mask, x, weight, rstd, N, C))
TIMED(linear_forward, (floatX * y, const floatX *x, const floatX *w, const float *wscale, size_t N, int C, int OC),
      (y, x, w, wscale, N, C, OC))
TIMED(linear_forward_f32, (float *y, const floatX *x, const floatX *w, const float *wscale, size_t N, int C, int OC),
      (y, x, w, wscale, N, C, OC))
TIMED(linear_backward_input,
      (floatX * dx, const floatX *dy, const floatX *w, const float *wscale, floatX *dy_scaled, size_t N, int C, int OC),
      (dx, dy, w, wscale, dy_scaled, N, C, OC))
TIMED(linear_backward_weight, (float *dw, const floatX *dy, const floatX *x, size_t N, int C, int OC, bool accumulate),
      (dw, dy, x, N, C, OC, accumulate))
TIMED(linear_w8_forward,
      (floatX * y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C, int OC),
      (y, x, codes, wscale, N, C, OC))
TIMED(linear_w8_forward_f32,
      (float *y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C, int OC),
      (y, x, codes, wscale, N, C, OC))
TIMED(linear_w8_backward_input,
      (floatX * dx, const floatX *dy, const int8_t *codes, const float *wscale, floatX *dy_scaled, size_t N, int C,
       int OC),
      (dx, dy, codes, wscale, dy_scaled, N, C, OC))
TIMED(linear_i8_forward,
      (floatX * y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C, int OC),
      (y, x, codes, wscale, N, C, OC))
TIMED(linear_i8_forward_f32,
      (float *y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C, int OC),
      (y, x, codes, wscale, N, C, OC))
TIMED(linear_i8_backward_input,
      (floatX * dx, const floatX *dy, const int8_t *codes, const float *wscale, size_t N, int C, int OC),
      (dx, dy, codes, wscale, N, C, OC))
TIMED(linear_i8_backward_weight,
      (float *dw, const floatX *dy, const floatX *x, size_t N, int C, int OC, bool accumulate),
      (dw, dy, x, N, C, OC, accumulate))
TIMED(rope,
      (floatX * x, const float *cos_t, const float *sin_t, size_t N, int T, int pos0, int ldx, int NH_rot, int HS,
       bool inverse),
      (x, cos_t, sin_t, N, T, pos0, ldx, NH_rot, HS, inverse))
TIMED(attention_forward,
      (floatX * o, float *lse, const floatX *q, const floatX *k, const floatX *v, int B, int T, int Tk, int NH, int NKV,
       int HS, int ldo, int ldq, int ldkv, size_t skv),
      (o, lse, q, k, v, B, T, Tk, NH, NKV, HS, ldo, ldq, ldkv, skv))
TIMED(attention_backward,
      (floatX * dqkv, const floatX *dout, const floatX *qkv, const floatX *o, const float *lse, int B, int T, int NH,
       int NKV, int HS),
      (dqkv, dout, qkv, o, lse, B, T, NH, NKV, HS))
TIMED(fakequant_forward, (floatX * y, uint8_t *mask, const floatX *x, size_t N, int C, const QuantSpec *act),
      (y, mask, x, N, C, act))
TIMED(mask_backward, (floatX *dx, const uint8_t *mask, size_t N, int C), (dx, mask, N, C))
TIMED(swiglu_fq_forward, (floatX * y, uint8_t *mask, const floatX *gateup, size_t N, int FF, const QuantSpec *act),
      (y, mask, gateup, N, FF, act))
TIMED(swiglu_backward, (floatX *dgateup, const floatX *dy, const uint8_t *mask, const floatX *gateup, size_t N, int FF),
      (dgateup, dy, mask, gateup, N, FF))
TIMED(classifier, (float *losses, floatX *dlogits, const float *logits, const int32_t *targets, size_t n, int V),
      (losses, dlogits, logits, targets, n, V))
TIMED(loss_accumulate, (StepState * state, const float *losses, const int32_t *targets, size_t N),
      (state, losses, targets, N))
TIMED(sum_squares, (StepState * state, const float *grad, size_t n), (state, grad, n))
TIMED(state_sum, (StepState * state, const StepState *all, int R), (state, all, R))
TIMED(global_norm, (StepState * state, float max_norm), (state, max_norm))
TIMED(adamw_fq,
      (float *master, float *m, float *v, floatX *work, float *wscale, const float *grad, const StepState *state,
       const AdamWParams *h, const QuantSpec *wq, int64_t rows, int64_t cols),
      (master, m, v, work, wscale, grad, state, h, wq, rows, cols))
TIMED(sgd_fq,
      (float *master, float *buf, floatX *work, float *wscale, const float *grad, const StepState *state,
       float momentum, float weight_decay, const QuantSpec *wq, int64_t rows, int64_t cols),
      (master, buf, work, wscale, grad, state, momentum, weight_decay, wq, rows, cols))
TIMED(weight_fq, (floatX *work, float *wscale, const float *master, const QuantSpec *wq, int64_t rows, int64_t cols),
      (work, wscale, master, wq, rows, cols))
TIMED(weight_ste_mask, (float *grad, const float *master, const QuantSpec *wq, int64_t rows, int64_t cols),
      (grad, master, wq, rows, cols))
TIMED(adamw_low,
      (StoredParam p, StoredState m, StoredState v, floatX *work, float *wscale, const float *grad,
       const StepState *state, const AdamWParams *h, const QuantSpec *wq, Rounding rounding, int tensor, int64_t row0,
       int64_t rows, int64_t cols),
      (p, m, v, work, wscale, grad, state, h, wq, rounding, tensor, row0, rows, cols))
TIMED(int8_rows, (int8_t *codes, float *scale, StoredParam from, int64_t rows, int64_t cols),
      (codes, scale, from, rows, cols))
TIMED(widen, (float *out, const bf16 *in, size_t n), (out, in, n))
TIMED(rows_pack,
      (void *wire, size_t stride, const void *tensor, const RowSplit *split, int64_t k0, int64_t kn, size_t row_bytes),
      (wire, stride, tensor, split, k0, kn, row_bytes))
TIMED(rows_unpack,
      (void *tensor, const void *wire, size_t stride, const RowSplit *split, int64_t k0, int64_t kn, size_t row_bytes),
      (tensor, wire, stride, split, k0, kn, row_bytes))
TIMED(weight_pack, (uint8_t * wire, const float *master, const QuantSpec *wq, int64_t rows, int64_t cols, int64_t kn),
      (wire, master, wq, rows, cols, kn))
TIMED(weight_unpack,
      (floatX * work, float *wscale, const uint8_t *wire, size_t stride, const RowSplit *split, int64_t k0, int64_t kn,
       const QuantSpec *wq, int64_t cols),
      (work, wscale, wire, stride, split, k0, kn, wq, cols))
TIMED(sum_ranks, (float *out, const float *in, size_t stride, int R, size_t n, bool accumulate),
      (out, in, stride, R, n, accumulate))
TIMED(dequant_rows,
      (floatX * work, float *wscale, const uint8_t *codes, const float *scale, const float *zero, const QuantSpec *wq,
       int64_t rows, int64_t cols),
      (work, wscale, codes, scale, zero, wq, rows, cols))
TIMED(qmatvec_forward,
      (floatX * y, const floatX *x, const uint8_t *codes, const float *scale, const float *zero, const QuantSpec *wq,
       size_t N, int C, int OC),
      (y, x, codes, scale, zero, wq, N, C, OC))

TIMED(embedding_q_forward,
      (floatX * out, const int32_t *tokens, const uint8_t *codes, const float *scale, const float *zero,
       const QuantSpec *wq, size_t N, int C, int V),
      (out, tokens, codes, scale, zero, wq, N, C, V))
static size_t timed_served_bytes(const QuantSpec *wq, const QuantSpec *act, int OC, int C) {
    return inner->served_bytes(wq, act, OC, C);          // no work of the device
}
TIMED(served_pack,
      (void *served, const uint8_t *codes, const float *scale, const float *zero, const QuantSpec *wq,
       const QuantSpec *act, int64_t row0, int64_t rows, int OC, int C),
      (served, codes, scale, zero, wq, act, row0, rows, OC, C))
TIMED(served_forward,
      (floatX * y, const floatX *x, const void *served, const QuantSpec *wq, const QuantSpec *act, size_t N, int C,
       int OC),
      (y, x, served, wq, act, N, C, OC))
TIMED(served_forward_f32,
      (float *y, const floatX *x, const void *served, const QuantSpec *wq, const QuantSpec *act, size_t N, int C,
       int OC),
      (y, x, served, wq, act, N, C, OC))
TIMED(matvec_forward, (floatX * y, const floatX *x, const floatX *w, size_t N, int C, int OC), (y, x, w, N, C, OC))
TIMED(matvec_forward_f32, (float *y, const floatX *x, const floatX *w, size_t N, int C, int OC), (y, x, w, N, C, OC))
TIMED(rope_append,
      (floatX * qkv, const KvCache *cache, const float *cos_t, const float *sin_t, const int32_t *pos, int B, int T,
       int NH),
      (qkv, cache, cos_t, sin_t, pos, B, T, NH))
TIMED(attention_cached,
      (floatX * o, const floatX *qkv, const KvCache *cache, const int32_t *pos, int B, int T, int NH),
      (o, qkv, cache, pos, B, T, NH))
TIMED(sample_next, (DecodeState * state, float *logits, const Sampler *s, int V), (state, logits, s, V))
TIMED(compare_logits, (float *kl, int32_t *same, const float *logits, const float *reference, size_t n, int V),
      (kl, same, logits, reference, n, V))

static void timeline_path(char *out, size_t size, const char *timeline, int rank) {
    if (rank > 0) snprintf(out, size, "%s.rank%d", timeline, rank);
    else snprintf(out, size, "%s", timeline);
}

int profile_begin(const char *timeline, int rank, Err *err) {
    path[0] = 0;
    rank_shown = rank;
    if (timeline) {
        if (strlen(timeline) + 16 > sizeof path)
            return err_set(err, E_USAGE, "timeline: a path of %zu bytes is too long, %zu are the most",
                           strlen(timeline), sizeof path - 17);
        timeline_path(path, sizeof path, timeline, rank);
        AtomicFile file;
        int rc = atomic_open(&file, path, err);
        if (rc < 0) return rc;
        atomic_abort(&file);
    }
    inner = ops;
    timed.name = inner->name;
#define X(name) timed.name = timed_##name;
    QLLM_OPS(X)
#undef X
    ops = &timed;
    device_span = beside;
    pthread_mutex_lock(&lock);
    on = true;
    pthread_mutex_unlock(&lock);
    profile_reset();
    return 0;
}

void profile_reset(void) {
    read_marks();
    for (int i = 0; i < OP_COUNT; i++) spent[i] = 0, calls[i] = 0;
    unmarked = 0;
    pthread_mutex_lock(&lock);
    n_spans = left_out = 0;
    pthread_mutex_unlock(&lock);
}

// ---------------------------------------------------------------------------------------------
// What went on beside the operations.
static int by_begin(const void *a, const void *b) {
    const Span *s = a, *t = b;
    // Of two that begin together the longer one is around the other.
    return s->t0 != t->t0 ? (s->t0 > t->t0) - (s->t0 < t->t0) : (s->t1 < t->t1) - (s->t1 > t->t1);
}

static void sort_spans(void) {
    if (n_spans) qsort(spans, n_spans, sizeof *spans, by_begin);
}

// For each kind of communication: how long, and how much of that operations ran. Spans are sorted.
static void print_beside(FILE *out, int steps) {
    typedef struct { const char *what; long n; double seconds, hidden; } Kind;
    Kind kinds[16];
    int n_kinds = 0;
    for (size_t i = 0, first = 0; i < n_spans; i++) {
        const Span *s = &spans[i];
        if (s->lane != PROFILE_COMMUNICATION) continue;
        // Operations follow one another: none of those that ended before an earlier span began matters to this one.
        double hidden = 0, to = s->t0;
        while (first < i && spans[first].t1 <= s->t0) first++;
        for (size_t j = first; j < n_spans && spans[j].t0 < s->t1; j++) {
            if (spans[j].lane != PROFILE_COMPUTE || spans[j].t1 <= to) continue;
            double from = spans[j].t0 > to ? spans[j].t0 : to;
            to = spans[j].t1 < s->t1 ? spans[j].t1 : s->t1;
            hidden += to - from;
        }
        int k = 0;
        while (k < n_kinds && strcmp(kinds[k].what, s->what)) k++;
        if (k == n_kinds) {
            if (n_kinds == (int)(sizeof kinds / sizeof *kinds)) continue;
            kinds[n_kinds++] = (Kind){s->what, 0, 0, 0};
        }
        kinds[k].n++;
        kinds[k].seconds += s->t1 - s->t0;
        kinds[k].hidden += hidden;
    }
    if (n_kinds) fprintf(out, "  %-24s %9s %10s %s\n", "beside them", "calls", "ms/step", "while operations ran");
    for (int k = 0; k < n_kinds; k++)
        fprintf(out, "  %-24s %9.0f %10.2f %6.1f%%\n", kinds[k].what, (double)kinds[k].n / steps,
                1e3 * kinds[k].seconds / steps, kinds[k].seconds > 0 ? 100 * kinds[k].hidden / kinds[k].seconds : 0.0);
}

void profile_print(FILE *out, int steps, double seconds) {
    double covered = 0;
    read_marks();
    fprintf(out, "profile of %d steps, %.1f ms a step\n  %-24s %9s %10s %7s\n", steps, 1e3 * seconds / steps,
            "operation", "calls", "ms/step", "share");
    for (int i = 0; i < OP_COUNT; i++) {
        if (!calls[i]) continue;
        covered += spent[i];
        fprintf(out, "  %-24s %9.0f %10.2f %6.1f%%\n", op_names[i], (double)calls[i] / steps, 1e3 * spent[i] / steps,
                100 * spent[i] / seconds);
    }
    fprintf(out, "  %-24s %9s %10.2f %6.1f%%\n", "(no operation)", "", 1e3 * (seconds - covered) / steps,
            100 * (seconds - covered) / seconds);
    pthread_mutex_lock(&lock);
    sort_spans();
    print_beside(out, steps);
    pthread_mutex_unlock(&lock);
    if (unmarked) fprintf(out, "  %ld calls were not timed: part of a recorded step, or too many at once\n", unmarked);
}

static void write_events(FILE *f) {
    static const char *const lanes[] = {"compute", "communication"};
    fprintf(f, "[{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":%d,\"args\":{\"name\":\"rank %d\"}}", rank_shown,
            rank_shown);
    for (int lane = 0; lane < 2; lane++)
        fprintf(f, ",\n{\"name\":\"thread_name\",\"ph\":\"M\",\"pid\":%d,\"tid\":%d,\"args\":{\"name\":\"%s\"}}",
                rank_shown, lane, lanes[lane]);
    for (size_t i = 0; i < n_spans; i++) {
        const Span *s = &spans[i];
        fprintf(f, ",\n{\"name\":\"%s\",\"ph\":\"X\",\"ts\":%.3f,\"dur\":%.3f,\"pid\":%d,\"tid\":%d}", s->what,
                1e6 * s->t0, 1e6 * (s->t1 - s->t0), rank_shown, s->lane);
    }
    fputs("]\n", f);
}

int profile_end(Err *err) {
    if (!on) return 0;
    read_marks();
    ops = inner;
    device_span = NULL;
    int rc = 0;
    pthread_mutex_lock(&lock);
    on = false;
    if (path[0]) {
        AtomicFile file;
        sort_spans();
        if ((rc = atomic_open(&file, path, err)) == 0) {
            write_events(file.f);
            if (ferror(file.f)) file.failed = errno ? errno : EIO;
            rc = atomic_commit(&file, err);
        }
        if (left_out)
            fprintf(stderr, "%s holds the first %zu spans; %zu later ones are left out\n", path, n_spans, left_out);
    }
    free(spans);
    spans = NULL;
    n_spans = max_spans = left_out = 0;
    pthread_mutex_unlock(&lock);
    return rc;
}
