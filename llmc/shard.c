#include "shard.h"
#include <stdlib.h>
#include <string.h>
#include "device.h"
#include "store.h"

// ---------------------------------------------------------------------------------------------
// Whose rows are whose

static int64_t common_multiple(int64_t x, int64_t y) {
    int64_t a = x, b = y;
    while (b) { int64_t t = a % b; a = b; b = t; }
    return x / a * y;
}

// Rows of the smallest part of a tensor that one rank can quantize alone: whole blocks of its scales, and of those of
// its moments. All of them divide the rows, so their common multiple does.
static int rows_of_unit(int64_t *unit, const Param *p, const QuantSpec *also, Err *err) {
    const QuantSpec *specs[2] = {&p->scheme.weight, p->role == ROLE_EMBED ? also : NULL};
    *unit = state_unit(p->state, p->cols);
    for (int k = 0; k < 2; k++) {
        int64_t block[2];
        if (!specs[k] || !specs[k]->bits) continue;
        int rc = quant_block_shape(specs[k], p->rows, p->cols, block, err);
        if (rc < 0) return rc;
        *unit = common_multiple(*unit, block[0]);
    }
    return 0;
}

int own_table_build(OwnTable *o, const ParamTable *table, const QuantSpec *tied_head, int R, int rank, bool replicated,
                    Err *err) {
    size_t n = (size_t)table->n;
    *o = (OwnTable){.table = table, .R = R, .rank = rank, .replicated = replicated};
    o->row0 = xcalloc(n, sizeof *o->row0);
    o->split = xcalloc(n, sizeof *o->split);
    o->held = *table;
    o->held.p = xcalloc(n, sizeof *o->held.p);
    memcpy(o->held.p, table->p, n * sizeof *o->held.p);
    if (!replicated) o->held.n_elements = o->held.n_rows = o->held.n_params = 0;
    for (int i = 0; i < table->n; i++) {
        Param *p = &o->held.p[i];
        int64_t unit;
        int rc = rows_of_unit(&unit, p, tied_head, err);
        if (rc < 0) {
            own_table_free(o);
            return rc;
        }
        o->split[i] = (RowSplit){.rows = p->rows, .unit = unit, .R = R, .first = i % R};
        if (replicated) continue;
        o->row0[i] = split_begin(&o->split[i], rank);
        p->rows = split_count(&o->split[i], rank);
        p->offset = o->held.n_elements;
        p->row_offset = o->held.n_rows;
        size_t size = (size_t)p->rows * (size_t)p->cols;
        o->held.n_params += size;
        o->held.n_elements += (size + 15) & ~(size_t)15;
        o->held.n_rows += (size_t)p->rows;
    }
    return 0;
}

void own_table_free(OwnTable *o) {
    free(o->held.p);
    free(o->row0);
    free(o->split);
    *o = (OwnTable){0};
}

// ---------------------------------------------------------------------------------------------
// Units. A unit travels in chunks: a block in one; a table, whose size a buffer should not follow, in as many as keep a
// chunk about as large as a block. A chunk takes the rows [k0, k0 + kn) of every rank's own.

typedef struct {
    int i;                     // of the table
    bool head;                 // the second view of a tied table
    size_t at[2];              // where its part of a chunk begins: floats, codes
    size_t grad_at;
} Part;
typedef struct {
    int first, n;              // parts
    int64_t k0, kn;            // kn 0: all rows of each
    size_t stride[2], grad_stride;       // bytes of one rank's share: floats, codes
    size_t own;                          // where this rank's lies in wire_own
} Chunk;
struct ShardUnit {
    Part part[10];
    Chunk *chunk;
    int n_parts, n_chunks;
    bool valid;                // the gathered weights are those of the newest masters
};

static const Param *whole(const Shard *s, const Part *p) { return &s->own.table->p[p->i]; }
static int unit_of(int l) { return l + 1; }
static bool in_block(const Param *p) { return p->layer >= 0; }

static const QuantSpec *spec_of(const Shard *s, const Part *p) {
    return p->head ? &s->plan->tied_head : &whole(s, p)->scheme.weight;
}
// Whether a part is INT8 codes and scales, where it works and on the wire.
static bool is_int8(const Shard *s, const Part *p) {
    return p->head ? quant_is_int8_rows(&s->plan->tied_head) : whole(s, p)->format == PARAM_INT8;
}
// A fused linear (q, k, v; gate, up) reads the row scales of all its tensors if one works as codes: those of the others,
// which are 1, must be there too.
static bool has_scales(const Shard *s, const Part *p) {
    return quant_works_as_codes(spec_of(s, p)) || (s->block_scales && in_block(whole(s, p)));
}
// Codes go on the wire where fake quantization makes codes.
static bool as_codes(const Shard *s, const Part *p, bool fake_quant) {
    return s->gather_quantized && fake_quant && spec_of(s, p)->bits && !is_int8(s, p);
}
static size_t up16(size_t n) { return (n + 15) & ~(size_t)15; }
// Bytes of a row as it works.
static size_t row_bytes(const Shard *s, const Part *p) {
    return (size_t)whole(s, p)->cols * (is_int8(s, p) ? 1 : sizeof(floatX));
}
// Rows of a part in a chunk on the ranks that have most, and on rank r.
static int64_t part_rows(const Shard *s, const Chunk *k, const Part *p) {
    int64_t most = split_most(&s->own.split[p->i]);
    return k->kn ? (most - k->k0 < k->kn ? most - k->k0 : k->kn) : most;
}
static int64_t rank_rows(const Shard *s, const Chunk *k, const Part *p, int r) {
    int64_t n = split_count(&s->own.split[p->i], r) - k->k0, kn = part_rows(s, k, p);
    return n < 0 ? 0 : n < kn ? n : kn;
}
static size_t part_bytes(const Shard *s, const Part *p, int64_t rows, bool codes) {
    const Param *w = whole(s, p);
    const QuantSpec *spec = spec_of(s, p);
    int64_t block[2];
    if (codes && quant_block_shape(spec, w->rows, w->cols, block, NULL) == 0)
        return quant_wire_layout(spec, rows, w->cols, block).bytes;
    return up16((size_t)rows * row_bytes(s, p)) + up16((size_t)rows * 4 * has_scales(s, p));
}

// Room for `rows` rows of a part as f32, where it is kept as bf16.
static void plan_scratch(Shard *s, const Part *p, int64_t rows) {
    size_t n = (size_t)rows * (size_t)whole(s, p)->cols;
    if (whole(s, p)->format == PARAM_BF16 && n > s->n_scratch) s->n_scratch = n;
}

static void lay_out_chunk(Shard *s, ShardUnit *u, Chunk *k) {
    for (int j = k->first; j < k->first + k->n; j++) {
        Part *p = &u->part[j];
        int64_t rows = part_rows(s, k, p);
        for (int codes = 0; codes < 2; codes++) {
            p->at[codes] = k->stride[codes];
            k->stride[codes] += part_bytes(s, p, rows, as_codes(s, p, codes));
        }
        if (s->level != SHARD_NONE && as_codes(s, p, true)) plan_scratch(s, p, rows);
        p->grad_at = k->grad_stride;
        if (!p->head) k->grad_stride += up16((size_t)rows * (size_t)whole(s, p)->cols * 4);
    }
    size_t most = k->stride[0] > k->stride[1] ? k->stride[0] : k->stride[1], R = (size_t)s->own.R;
    k->own = s->own_bytes;
    s->own_bytes += most;
    if (R * most > s->all_bytes) s->all_bytes = R * most;
    if (R * k->grad_stride > s->grad_bytes) s->grad_bytes = R * k->grad_stride;
}

static void add_chunk(Shard *s, ShardUnit *u, Chunk k) {
    u->chunk = realloc(u->chunk, (size_t)(u->n_chunks + 1) * sizeof *u->chunk);
    if (!u->chunk) die(&(Err){E_NOMEM, "no memory for the plan of a unit"});
    u->chunk[u->n_chunks] = k;
    lay_out_chunk(s, u, &u->chunk[u->n_chunks++]);
}

static void add_part(ShardUnit *u, const ParamTable *t, int layer, ParamRole role, bool head) {
    u->part[u->n_parts++] = (Part){.i = (int)(param_get(t, layer, role) - t->p), .head = head};
}

// Part j of u by itself, in windows of rows that make chunks of about a block's size.
static void add_windows(Shard *s, ShardUnit *u, int j, size_t target) {
    const RowSplit *split = &s->own.split[u->part[j].i];
    size_t row = (size_t)whole(s, &u->part[j])->cols * 4 * (size_t)s->own.R;      // gradients are the widest
    int64_t most = split_most(split), kn = (int64_t)(target / row) / split->unit * split->unit;
    if (kn < split->unit) kn = split->unit;
    for (int64_t k0 = 0; k0 < most; k0 += kn) add_chunk(s, u, (Chunk){.first = j, .n = 1, .k0 = k0, .kn = kn});
}

static bool second_view(const Shard *s) { return s->c->tied && (s->plan->embedding.bits || s->plan->tied_head.bits); }

static void lay_out_units(Shard *s) {
    const ParamTable *t = s->own.table;
    s->unit = xcalloc((size_t)t->L + 2, sizeof *s->unit);
    for (int l = 0; l < t->L; l++) {
        ShardUnit *u = &s->unit[unit_of(l)];
        for (int r = ROLE_NORM1; r <= ROLE_DOWN; r++) add_part(u, t, l, (ParamRole)r, false);
        add_chunk(s, u, (Chunk){.n = u->n_parts});
    }
    size_t target = s->grad_bytes;
    ShardUnit *embed = &s->unit[unit_of(SHARD_EMBED)], *head = &s->unit[unit_of(t->L)];
    add_part(embed, t, -1, ROLE_EMBED, false);
    add_windows(s, embed, 0, target);
    // The table first: its first window is what is gathered ahead.
    if (!s->c->tied) add_part(head, t, -1, ROLE_HEAD, false);
    else if (second_view(s)) add_part(head, t, -1, ROLE_EMBED, true);
    if (head->n_parts) add_windows(s, head, 0, target);
    add_part(head, t, -1, ROLE_FINAL_NORM, false);
    add_chunk(s, head, (Chunk){.first = head->n_parts - 1, .n = 1});
}

// Places of whole tensors as in the table: groups, of tensors that a fused linear reads as one, at multiples of 64
// values. Where blocks come and go, there is one place for all of them, and what is outside follows.
typedef enum { PLACE_WORK, PLACE_ROWS, PLACE_GRAD } PlaceOf;

static size_t place_size(const Param *p, PlaceOf of) {
    if (of == PLACE_ROWS) return (size_t)p->rows;
    size_t n = (size_t)p->rows * (size_t)p->cols;
    return of == PLACE_GRAD ? n : n * (p->format == PARAM_INT8 ? 1 : sizeof(floatX));
}

static bool starts_group(const Param *p) { return p->role != ROLE_K && p->role != ROLE_V && p->role != ROLE_UP; }

static size_t round_up(size_t n, size_t align) { return (n + align - 1) / align * align; }

static size_t places(size_t *place, const ParamTable *t, bool one_block, PlaceOf of) {
    const size_t apart = of == PLACE_WORK ? 64 * sizeof(floatX) : 64, align = of == PLACE_ROWS ? 1 : apart;
    size_t end = 0, blocks_end = 0;
    for (int i = 0; i < t->n; i++) {
        const Param *p = &t->p[i];
        if (one_block && !in_block(p)) continue;
        if (one_block && p->role == ROLE_NORM1) end = 0;
        if (starts_group(p)) end = round_up(end, align);
        place[i] = end;
        end += place_size(p, of);
        if (end > blocks_end) blocks_end = end;
    }
    if (!one_block) return end;
    end = round_up(blocks_end, apart);
    for (int i = 0; i < t->n; i++) {
        if (in_block(&t->p[i])) continue;
        place[i] = end;
        end = round_up(end + place_size(&t->p[i], of), apart);
    }
    return end;
}

// A fused linear reads one kind of weights.
static int check_fused(const Param *p, Err *err) {
    if (starts_group(p) || (p->format == PARAM_INT8) == ((p - 1)->format == PARAM_INT8)) return 0;
    return err_set(err, E_USAGE, "%s and %s are read by one linear, but only one of them is trained as INT8 rows; let "
                   "one rule cover both", (p - 1)->name, p->name);
}

// Rows that a tile of f32 values has, of those that are quantized together.
static int64_t tile_rows(size_t values, const QuantSpec *spec, int64_t rows, int64_t cols) {
    int64_t block[2] = {1, 1};
    if (spec && spec->bits) quant_block_shape(spec, rows, cols, block, NULL);
    int64_t n = (int64_t)(values / (size_t)cols) / block[0] * block[0];
    return n < block[0] ? block[0] : n < rows ? n : rows;
}

// bf16 parameters that work as other values than their own pass through a tile of f32.
static void plan_tiles(Shard *s, const Part *p) {
    const Param *w = whole(s, p);
    if (spec_of(s, p)->bits || has_scales(s, p))
        plan_scratch(s, p, tile_rows((size_t)1 << 20, spec_of(s, p), w->rows, w->cols));
}

int shard_plan(Shard *s, const LlamaConfig *c, const QuantPlan *plan, const ParamTable *table, ShardLevel level,
               bool gather_quantized, int R, int rank, Err *err) {
    *s = (Shard){.c = c, .plan = plan, .level = level, .gather_quantized = gather_quantized, .held = -1,
                 .gathering = {.unit = -1}, .reducing = {.unit = -1}};
    int rc = own_table_build(&s->own, table, c->tied ? &plan->tied_head : NULL, R, rank, level == SHARD_NONE, err);
    for (int i = 0; i < table->n && rc == 0; i++) rc = check_fused(&table->p[i], err);
    if (rc < 0) {
        own_table_free(&s->own);
        return rc;
    }
    size_t n = (size_t)table->n;
    for (int i = 0; i < table->n; i++)
        s->block_scales = s->block_scales || (in_block(&table->p[i]) && table->p[i].format != PARAM_INT8 &&
                                              quant_works_as_codes(&table->p[i].scheme.weight));
    s->work_place = xcalloc(n, sizeof *s->work_place);
    s->row_place = xcalloc(n, sizeof *s->row_place);
    s->grad_place = xcalloc(n, sizeof *s->grad_place);
    s->n_work = places(s->work_place, table, level == SHARD_FULL, PLACE_WORK);
    s->n_rows = places(s->row_place, table, level == SHARD_FULL, PLACE_ROWS);
    s->n_grad = places(s->grad_place, table, level >= SHARD_GRAD, PLACE_GRAD);
    lay_out_units(s);
    for (int i = 0; i < table->n; i++) plan_tiles(s, &(Part){.i = i});
    if (second_view(s)) plan_tiles(s, &(Part){.i = 0, .head = true});
    if (level == SHARD_NONE) s->own_bytes = s->all_bytes = 0;
    if (level == SHARD_NONE && R == 1) s->grad_bytes = 0;
    size_t head_value = quant_is_int8_rows(&plan->tied_head) ? 1 : sizeof(floatX);
    double view = second_view(s) ? (double)c->V * c->C * (double)head_value + 4.0 * c->V : 0;
    s->memory = (ShardMemory){
        .weights = (double)s->n_work + 4.0 * (double)s->n_rows + view,
        .gradients = 4.0 * (double)s->n_grad,
        .own_gradients = level >= SHARD_GRAD ? 4.0 * (double)s->own.held.n_elements : 0,
        .buffers = (double)s->own_bytes + (double)s->all_bytes + 2.0 * (double)s->grad_bytes +
                   4.0 * (double)s->n_scratch,
    };
    return 0;
}

static int take(void *where, size_t n, size_t size, const char *what, Err *err) {
    size_t bytes;
    void *p = NULL;
    if (!mul_size(n, size, &bytes)) bytes = SIZE_MAX;
    int rc = bytes ? device_alloc(&p, bytes, what, err) : 0;
    memcpy(where, &p, sizeof p);
    return rc;
}

int shard_alloc(Shard *s, Err *err) {
    bool codes = quant_works_as_codes(&s->plan->tied_head);
    size_t V = second_view(s) ? (size_t)s->c->V : 0;
    size_t head_value = quant_is_int8_rows(&s->plan->tied_head) ? 1 : sizeof *s->head;
    int rc = take(&s->work, s->n_work, 1, "working weights", err);
    if (rc == 0) rc = take(&s->wscale, s->n_rows, sizeof *s->wscale, "row scales", err);
    if (rc == 0) rc = take(&s->head, V * (size_t)s->c->C, head_value, "head", err);
    if (rc == 0) rc = take(&s->head_scale, codes ? V : 0, sizeof *s->head_scale, "head scales", err);
    if (rc == 0) rc = take(&s->scratch, s->n_scratch, sizeof *s->scratch, "a tile of weights", err);
    if (rc == 0) rc = take(&s->grad, s->n_grad, sizeof *s->grad, "gradients", err);
    size_t own = s->level >= SHARD_GRAD ? s->own.held.n_elements : 0;
    if (rc == 0) rc = take(&s->own_grad, own, sizeof *s->own_grad, "gradients", err);
    if (rc == 0) rc = take(&s->wire_own, s->own_bytes, 1, "packed weights", err);
    if (rc == 0) rc = take(&s->wire_all, s->all_bytes, 1, "packed weights of all ranks", err);
    if (rc == 0) rc = take(&s->send, s->grad_bytes, 1, "gradients to send", err);
    if (rc == 0) rc = take(&s->receive, s->grad_bytes, 1, "gradients received", err);
    if (rc == 0) rc = take(&s->states, (size_t)s->own.R, sizeof *s->states, "step states", err);
    return rc;
}

void shard_free(Shard *s) {
    if (s->gathering.unit >= 0) comm_wait(s->gathering.ticket);
    if (s->reducing.unit >= 0) comm_wait(s->reducing.ticket);
    void *device[] = {s->work, s->wscale, s->head, s->head_scale, s->scratch, s->grad, s->own_grad,
                      s->wire_own, s->wire_all, s->send, s->receive, s->states};
    for (size_t i = 0; i < sizeof device / sizeof *device; i++)
        if (device[i]) device_free(device[i]);
    for (int u = 0; s->unit && u < s->own.table->L + 2; u++) free(s->unit[u].chunk);
    free(s->unit);
    free(s->work_place);
    free(s->row_place);
    free(s->grad_place);
    own_table_free(&s->own);
    *s = (Shard){0};
}

// ---------------------------------------------------------------------------------------------
// Weights

// `rows` rows of `bytes` each, as they are.
static void copy_rows(void *to, const void *from, int64_t rows, size_t bytes) {
    RowSplit all = {.rows = rows, .unit = 1, .R = 1};
    ops->rows_pack(to, up16((size_t)rows * bytes), from, &all, 0, rows, bytes);
}

// Working values, and scales where they are wanted, of rows that are f32 or bf16.
static void work_rows(const Shard *s, floatX *work, float *scale, StoredParam from, const QuantSpec *spec, int64_t rows,
                      int64_t cols) {
    if (from.format == PARAM_F32) {
        ops->weight_fq(work, scale, from.data, spec, rows, cols);
    } else if (scale || (spec && spec->bits)) {
        int64_t tile = tile_rows(s->n_scratch, spec, rows, cols);
        for (int64_t r = 0; r < rows; r += tile) {
            int64_t n = rows - r < tile ? rows - r : tile;
            ops->widen(s->scratch, (const bf16 *)from.data + r * cols, (size_t)(n * cols));
            ops->weight_fq(work + r * cols, scale ? scale + r : NULL, s->scratch, spec, n, cols);
        }
    } else if (sizeof *work == sizeof(bf16)) {
        copy_rows(work, from.data, rows, (size_t)cols * sizeof(bf16));
    } else {
        ops->widen((float *)(void *)work, from.data, (size_t)(rows * cols));
    }
}

// This rank's rows of a chunk, from the store to the wire.
static void pack_chunk(Shard *s, ShardUnit *u, const Chunk *k, const Store *store) {
    for (int j = k->first; j < k->first + k->n; j++) {
        const Part *p = &u->part[j];
        const QuantSpec *spec = s->fake_quant ? spec_of(s, p) : NULL;
        int64_t rows = rank_rows(s, k, p, s->own.rank), most = part_rows(s, k, p), cols = whole(s, p)->cols;
        uint8_t *wire = s->wire_own + k->own + p->at[s->fake_quant];
        if (!rows) continue;
        StoredParam from = store_param(store, p->i, k->k0);
        if (as_codes(s, p, s->fake_quant)) {
            if (from.format == PARAM_BF16) ops->widen(s->scratch, from.data, (size_t)(rows * cols));
            ops->weight_pack(wire, from.format == PARAM_BF16 ? s->scratch : from.data, spec, rows, cols, most);
            continue;
        }
        float *scale = has_scales(s, p) ? (float *)(void *)(wire + up16((size_t)most * row_bytes(s, p))) : NULL;
        if (from.format == PARAM_INT8) {
            copy_rows(wire, from.data, rows, (size_t)cols);
            copy_rows(scale, from.scale, rows, sizeof *scale);
        } else if (is_int8(s, p)) {
            ops->int8_rows((int8_t *)wire, scale, from, rows, cols);
        } else {
            work_rows(s, (floatX *)(void *)wire, scale, from, spec, rows, cols);
        }
    }
}

// Everyone's rows of a chunk, from the wire to where the whole tensor lies.
static void unpack_chunk(Shard *s, ShardUnit *u, const Chunk *k) {
    size_t stride = k->stride[s->fake_quant];
    for (int j = k->first; j < k->first + k->n; j++) {
        const Part *p = &u->part[j];
        const Param *w = whole(s, p);
        const RowSplit *split = &s->own.split[p->i];
        void *work = p->head ? s->head : shard_weight(s, p->i);
        float *scale = p->head ? s->head_scale : shard_weight_scale(s, p->i);
        const uint8_t *wire = s->wire_all + p->at[s->fake_quant];
        int64_t most = part_rows(s, k, p);
        if (as_codes(s, p, s->fake_quant)) {
            ops->weight_unpack(work, scale, wire, stride, split, k->k0, most, spec_of(s, p), w->cols);
            continue;
        }
        ops->rows_unpack(work, wire, stride, split, k->k0, most, row_bytes(s, p));
        if (has_scales(s, p))
            ops->rows_unpack(scale, wire + up16((size_t)most * row_bytes(s, p)), stride, split, k->k0, most, 4);
    }
}

static void count_weights(Shard *s, const ShardUnit *u, const Chunk *k) {
    for (int j = k->first; j < k->first + k->n; j++) {
        const Param *w = whole(s, &u->part[j]);
        double bytes = (double)(s->own.R - 1) * (double)part_bytes(s, &u->part[j], part_rows(s, k, &u->part[j]),
                                                                   as_codes(s, &u->part[j], s->fake_quant));
        if (in_block(w) && w->decay) s->wire.linears += bytes;
        else s->wire.others += bytes;
    }
}

static bool is_there(const Shard *s, int l) {
    if (s->level == SHARD_FULL && l >= 0 && l < s->c->L) return s->held == l;
    return s->unit[unit_of(l)].valid;
}

static void gather_begin(Shard *s, int l, int chunk) {
    ShardUnit *u = &s->unit[unit_of(l)];
    const Chunk *k = &u->chunk[chunk];
    s->gathering.unit = unit_of(l);
    s->gathering.chunk = chunk;
    s->gathering.ticket = comm_all_gather(s->wire_all, s->wire_own + k->own, k->stride[s->fake_quant]);
    count_weights(s, u, k);
}

static void gather_drop(Shard *s) {
    if (s->gathering.unit < 0) return;
    comm_wait(s->gathering.ticket);
    s->gathering.unit = -1;
}

static void gather(Shard *s, int l, int next) {
    if (s->level == SHARD_NONE) return;
    ShardUnit *u = &s->unit[unit_of(l)];
    if (!is_there(s, l)) {
        if (s->gathering.unit != unit_of(l)) {
            gather_drop(s);
            gather_begin(s, l, 0);
        }
        for (int i = 0; i < u->n_chunks; i++) {
            if (i > 0) gather_begin(s, l, i);
            comm_wait(s->gathering.ticket);
            unpack_chunk(s, u, &u->chunk[i]);
        }
        s->gathering.unit = -1;
        u->valid = true;
        if (l >= 0 && l < s->c->L) s->held = l;
    }
    if (next >= 0 && next <= s->c->L && s->gathering.unit < 0 && !is_there(s, next)) gather_begin(s, next, 0);
}

void shard_forward(Shard *s, int l) { gather(s, l, l + 1); }

void shard_weights_changed(Shard *s, const Store *store, bool fake_quant) {
    s->fake_quant = fake_quant;
    if (s->level == SHARD_NONE) {
        if (!second_view(s)) return;
        StoredParam table = store_param(store, 0, 0);
        const QuantSpec *spec = &s->plan->tied_head;
        if (quant_is_int8_rows(spec)) ops->int8_rows(shard_head_codes(s), s->head_scale, table, s->c->V, s->c->C);
        else work_rows(s, s->head, s->head_scale, table, fake_quant ? spec : NULL, s->c->V, s->c->C);
        return;
    }
    gather_drop(s);
    s->held = -1;
    for (int u = 0; u < s->c->L + 2; u++) {
        s->unit[u].valid = false;
        for (int k = 0; k < s->unit[u].n_chunks; k++) pack_chunk(s, &s->unit[u], &s->unit[u].chunk[k], store);
    }
}

static void unit_scales(float *scale, int64_t rows) {
    float *ones = xmalloc((size_t)rows * sizeof *ones);
    for (int64_t r = 0; r < rows; r++) ones[r] = 1;
    device_copy_in(scale, ones, (size_t)rows * sizeof *ones);
    free(ones);
}

void shard_requantize(Shard *s, const Store *store, bool fake_quant) {
    const ParamTable *t = s->own.table;
    for (int i = 0; i < t->n && s->level == SHARD_NONE; i++) {
        const Part p = {.i = i};
        StoredParam from = store_param(store, i, 0);
        if (from.data == (void *)shard_weight(s, i)) {                     // works as it is stored
            if (has_scales(s, &p) && from.format != PARAM_INT8) unit_scales(shard_weight_scale(s, i), t->p[i].rows);
            continue;
        }
        bool scaled = from.format == PARAM_F32 || has_scales(s, &p);
        work_rows(s, shard_weight(s, i), scaled ? shard_weight_scale(s, i) : NULL, from,
                  fake_quant ? &t->p[i].scheme.weight : NULL, t->p[i].rows, t->p[i].cols);
    }
    shard_weights_changed(s, store, fake_quant);
}

// ---------------------------------------------------------------------------------------------
// Gradients

static bool reduced_each_micro_step(const Shard *s, int l) { return s->level >= SHARD_GRAD && l >= 0 && l < s->c->L; }

bool shard_backward(Shard *s, int l, int micro) {
    gather(s, l, l - 1);
    ShardUnit *u = &s->unit[unit_of(l)];
    bool adds = micro > 0 && !reduced_each_micro_step(s, l);
    for (int j = 0; j < u->n_parts && !adds; j++) {
        const Param *w = whole(s, &u->part[j]);
        // Norms' and an embedding's gradients are added to; those of linears, also a tied table's, are overwritten.
        if (param_is_norm(w) || (w->role == ROLE_EMBED && !s->c->tied))
            device_zero(shard_gradient(s, u->part[j].i), (size_t)w->rows * (size_t)w->cols * sizeof(float));
    }
    return adds;
}

float *shard_own_gradient(const Shard *s, int i) {
    const Param *p = &s->own.table->p[i];
    if (s->own_grad) return s->own_grad + s->own.held.p[i].offset;
    return shard_gradient(s, i) + (size_t)s->own.row0[i] * (size_t)p->cols;
}

// This rank's rows of tensor i in whole gradients, or in own_grad, whoever else holds them.
static float *summed_rows(const Shard *s, int i) {
    if (s->own_grad) return s->own_grad + s->own.held.p[i].offset;
    return shard_gradient(s, i) + (size_t)split_begin(&s->own.split[i], s->own.rank) * (size_t)s->own.table->p[i].cols;
}

static void reduce_end(Shard *s) {
    if (s->reducing.unit < 0) return;
    ShardUnit *u = &s->unit[s->reducing.unit];
    const Chunk *k = &u->chunk[s->reducing.chunk];
    comm_wait(s->reducing.ticket);
    for (int j = k->first; j < k->first + k->n; j++) {
        const Part *p = &u->part[j];
        size_t cols = (size_t)whole(s, p)->cols, n = (size_t)rank_rows(s, k, p, s->own.rank) * cols;
        if (n && !p->head)
            ops->sum_ranks(summed_rows(s, p->i) + (size_t)k->k0 * cols, s->receive + p->grad_at / 4, k->grad_stride / 4,
                           s->own.R, n, s->reduce_adds);
    }
    s->reducing.unit = -1;
}

static void pack_gradients(const Shard *s, const ShardUnit *u, const Chunk *k) {
    for (int j = k->first; j < k->first + k->n; j++) {
        const Part *p = &u->part[j];
        if (p->head) continue;
        ops->rows_pack((uint8_t *)s->send + p->grad_at, k->grad_stride, shard_gradient(s, p->i), &s->own.split[p->i],
                       k->k0, part_rows(s, k, p), (size_t)whole(s, p)->cols * sizeof(float));
    }
}

void shard_gradients(Shard *s, int l, int micro, bool last) {
    if (!s->grad_bytes || (!last && !reduced_each_micro_step(s, l))) return;
    ShardUnit *u = &s->unit[unit_of(l)];
    for (int i = u->n_chunks - 1; i >= 0; i--) {         // what is large last: nothing waits for it at once
        const Chunk *k = &u->chunk[i];
        if (!k->grad_stride) continue;
        reduce_end(s);
        pack_gradients(s, u, k);
        s->reduce_adds = micro > 0 && reduced_each_micro_step(s, l);
        s->reducing.unit = unit_of(l);
        s->reducing.chunk = i;
        s->reducing.ticket = comm_all_to_all(s->receive, s->send, k->grad_stride);
        s->wire.gradients += (double)(s->own.R - 1) * (double)k->grad_stride;
    }
}

// Under none all ranks update all rows: what each summed goes to all.
static void spread_gradients(Shard *s) {
    for (int l = 0; l < s->c->L + 2; l++)
        for (int i = 0; i < s->unit[l].n_chunks; i++) {
            ShardUnit *u = &s->unit[l];
            const Chunk *k = &u->chunk[i];
            if (!k->grad_stride) continue;
            for (int j = k->first; j < k->first + k->n; j++) {
                // The same rows as a tensor of their own, which one rank sends.
                const Part *p = &u->part[j];
                int64_t rows = rank_rows(s, k, p, s->own.rank);
                size_t cols = (size_t)whole(s, p)->cols;
                RowSplit mine = {.rows = rows, .unit = 1, .R = 1};
                if (rows)
                    ops->rows_pack((uint8_t *)s->send + p->grad_at, k->grad_stride,
                                   summed_rows(s, p->i) + (size_t)k->k0 * cols, &mine, 0, rows, cols * sizeof(float));
            }
            comm_wait(comm_all_gather(s->receive, s->send, k->grad_stride));
            s->wire.gradients += (double)(s->own.R - 1) * (double)k->grad_stride;
            for (int j = k->first; j < k->first + k->n; j++) {
                const Part *p = &u->part[j];
                ops->rows_unpack(shard_gradient(s, p->i), (uint8_t *)s->receive + p->grad_at, k->grad_stride,
                                 &s->own.split[p->i], k->k0, part_rows(s, k, p),
                                 (size_t)whole(s, p)->cols * sizeof(float));
            }
        }
}

void shard_finish_gradients(Shard *s) {
    reduce_end(s);
    if (s->level == SHARD_NONE && s->own.R > 1) spread_gradients(s);
}

void shard_sum_state(Shard *s, StepState *state, bool with_gradients) {
    if (with_gradients && s->own_grad) {
        ops->sum_squares(state, s->own_grad, s->own.held.n_elements);
    } else if (with_gradients && s->own.R == 1) {
        ops->sum_squares(state, s->grad, s->n_grad);
    } else if (with_gradients) {
        for (int i = 0; i < s->own.table->n; i++) {
            const Param *p = &s->own.table->p[i];
            size_t n = (size_t)split_count(&s->own.split[i], s->own.rank) * (size_t)p->cols;
            if (n) ops->sum_squares(state, summed_rows(s, i), n);
        }
    }
    if (s->own.R == 1) return;
    comm_wait(comm_all_gather(s->states, state, sizeof *state));
    ops->state_sum(state, s->states, s->own.R);
}

// Of one gather and one sum of unit l.
static WireBytes unit_bytes(const Shard *s, int l) {
    WireBytes w = {0};
    const ShardUnit *u = &s->unit[unit_of(l)];
    double others = s->own.R - 1;
    for (int i = 0; i < u->n_chunks; i++) {
        const Chunk *k = &u->chunk[i];
        w.gradients += others * (double)k->grad_stride;
        for (int j = k->first; j < k->first + k->n; j++) {
            const Part *p = &u->part[j];
            double bytes = others * (double)part_bytes(s, p, part_rows(s, k, p), as_codes(s, p, true));
            if (in_block(whole(s, p)) && whole(s, p)->decay) w.linears += bytes;
            else w.others += bytes;
        }
    }
    return w;
}

void shard_plan_unit(const Shard *s, int l, double *gather, double *gradients, int *collectives) {
    *collectives = s->unit[unit_of(l)].n_chunks;
    WireBytes w = unit_bytes(s, l);
    *gather = s->level == SHARD_NONE ? 0 : w.linears + w.others;
    *gradients = w.gradients;
}

WireBytes shard_plan_wire(const Shard *s, int grad_accum) {
    WireBytes sum = {0};
    int L = s->c->L;
    for (int l = SHARD_EMBED; l <= L; l++) {
        WireBytes w = unit_bytes(s, l);
        double times = s->level == SHARD_NONE ? 0 : 1, sums = reduced_each_micro_step(s, l) ? grad_accum : 1;
        // Under full a block is gathered forward and backward; the last one stays between the two, and the first one
        // from a micro-step's backward to the next one's forward.
        if (s->level == SHARD_FULL && l >= 0 && l < L)
            times = L == 1 ? 1 : 2 * grad_accum - (l == L - 1 ? grad_accum : 0) - (l == 0 ? grad_accum - 1 : 0);
        if (s->level == SHARD_NONE && s->own.R > 1) sums = 2;
        sum.linears += times * w.linears;
        sum.others += times * w.others;
        sum.gradients += sums * w.gradients;
    }
    return sum;
}
