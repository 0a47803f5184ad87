// The linears with integer products (linear_i8_*). All are c (M, N) = a (M, K) . b (K, N): a's rows are quantized while
// they are packed, b is the weight's codes or, for the weight gradient, activations quantized by column.
//
//   forward  y  (N, OC) = x (N, C) . codes (OC, C)^T      a: rows of x              b: codes, k along their rows
//   input    dx (N, C)  = dy (N, OC) . codes (OC, C)      a: rows of dy * wscale    b: codes, k across their rows
//   weight   dw (OC, C) = dy (N, OC)^T . x (N, C)         a: columns of dy          b: columns of x
//
// Sums are exact and the f32 expressions after them are fixed (ops.h), so tiles, blocks and threads may be cut as they
// are fast: the bits are the same. Where a is the larger operand, b is packed once for all and tasks are blocks of a's
// rows, packed by the thread that multiplies them; where b is (the head's logits), the other way round. Within a task k
// is cut so that a panel of b stays in the first-level cache while the block's rows pass over it; the sums of the block
// wait in the second.
#include "cpu/cpu.h"
#include "cpu/tile_int8.h"

#define PANEL 64                    // columns
#define ROWS_BLOCK 96               // rows of a block at most: a multiple of 6, 4 and 2
#define ROWS_BLOCK_LONG 240         // where each block packs b for itself
#define K_BLOCK 144                 // units of k at most
#define GROUP 16                    // panels whose sums are kept at a time
#define B_SHARED_MOST ((size_t)8 << 20)         // bytes; a larger b is packed by each block, a cut of k at a time
#define PIECE ((int64_t)1 << 16)    // products that an int32 sum takes

typedef struct {
    int64_t M, N, K;
    const floatX *a;
    const float *a_mul;             // (K): factors of a's rows before they are quantized, or NULL
    bool a_columns;                 // a is stored (K, M) and quantized by column
    const int8_t *codes;            // b is stored (N, K), or (K, N) where across; NULL: b_x (K, N) by column
    bool across;
    const floatX *b_x;
    const float *column_scale;      // (N) or NULL; where b is b_x, its columns' scales are made
    floatX *c;                      // one of the two
    float *c_f32;
    bool accumulate;                // c_f32 +=
    bool stream;                    // c_f32 is written past the caches
} Int8Product;

// Sizes, and where things lie in working memory.
typedef struct {
    int64_t units, pieces, panels;
    int rows, blocks;               // rows of a block, blocks of a
    bool by_columns;                // tasks are panels of b
    bool b_by_block;                // b is not packed for all: a long k, few columns (the head's input gradient)
    size_t a_block, b_panel;        // units of a packed block and a packed panel
    uint32_t *shared;               // the operand packed for all: panels of b, or blocks of a
    float *row_scale;               // (blocks * rows)
    int32_t *start;                 // (blocks, pieces, rows): -128 times the sum of a row's codes in a piece
    float *a_inv, *b_inv, *b_scale; // of columns
    char *own;                      // of each thread
    size_t own_bytes;
} Layout;

// A thread's own memory.
typedef struct {
    uint32_t *pack;                 // the block of a, or the panel of b
    int32_t *sum;                   // of the block and a group of panels: (panels, rows, PANEL)
    uint32_t *b;                    // a cut of k of a panel, where b_by_block
    float *total;                   // of the pieces before, the shape of sum
    float *amax;                    // largest magnitudes of columns
} Own;

static size_t round64(size_t n) { return (n + 63) & ~(size_t)63; }
static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// Floats and int32 in front of vectors that are read or written whole.
static size_t padded16(int64_t n) { return (size_t)(n + 15) & ~(size_t)15; }

static size_t own_pack_bytes(const Layout *l) { return round64((l->by_columns ? l->b_panel : l->a_block) * 4); }
static size_t own_sum_bytes(const Layout *l) {
    int64_t group = l->by_columns ? 1 : l->panels < GROUP ? l->panels : GROUP;
    return (size_t)(l->rows * group * PANEL) * 4;
}

static size_t own_b_bytes(const Layout *l) { return l->b_by_block ? (size_t)K_BLOCK * PANEL * 4 : 0; }

static bool make_layout(Layout *l, const Int8Product *p) {
    int64_t threads = cpu_max_threads();
    *l = (Layout){.units = ceil_div(p->K, K4), .pieces = ceil_div(p->K, PIECE), .panels = ceil_div(p->N, PANEL)};
    l->by_columns = p->N >= 16 * p->M;
    l->b_panel = (size_t)l->units * PANEL;
    l->b_by_block = !l->by_columns && p->across && l->panels <= GROUP &&
                    (size_t)l->panels * l->b_panel * 4 > B_SHARED_MOST;
    l->blocks = (int)ceil_div(p->M, l->b_by_block ? ROWS_BLOCK_LONG : ROWS_BLOCK);
    if (!l->by_columns) l->blocks = (int)(ceil_div(l->blocks, threads) * threads);     // as many for each thread
    // Rows of dw are read in whole vectors.
    l->rows = (int)(p->a_columns ? ceil_div(ceil_div(p->M, l->blocks), 16) * 16
                                 : tile_pad_rows((int)ceil_div(p->M, l->blocks)));
    l->blocks = (int)ceil_div(p->M, l->rows);
    l->a_block = round64((size_t)l->units * (size_t)l->rows * sizeof(uint32_t)) / sizeof(uint32_t);

    size_t shared = l->by_columns ? (size_t)l->blocks * l->a_block
                                  : l->b_by_block ? 0 : (size_t)l->panels * l->b_panel;
    size_t rows = (size_t)l->blocks * (size_t)l->rows;
    size_t a_columns = p->a_columns ? padded16(p->M) : 0, b_columns = p->b_x ? padded16(p->N) : 0;
    size_t amax = a_columns > b_columns ? a_columns : b_columns;
    l->own_bytes = own_pack_bytes(l) + own_sum_bytes(l) * (l->pieces > 1 ? 2 : 1) + own_b_bytes(l) + round64(amax * 4);
    size_t bytes = round64(shared * 4) + round64(rows * 4) + round64(rows * (size_t)l->pieces * 4) +
                   round64((a_columns + 2 * b_columns) * 4) + (size_t)threads * l->own_bytes;
    char *at = cpu_workspace(bytes);
    if (!at) return false;
    l->shared = (uint32_t *)(void *)at;
    l->row_scale = (float *)(void *)(at += round64(shared * 4));
    l->start = (int32_t *)(void *)(at += round64(rows * 4));
    l->a_inv = (float *)(void *)(at += round64(rows * (size_t)l->pieces * 4));
    l->b_inv = l->a_inv + a_columns;
    l->b_scale = l->b_inv + b_columns;
    l->own = at + round64((a_columns + 2 * b_columns) * 4);
    return true;
}

static Own thread_own(const Layout *l, int thread) {
    char *at = l->own + (size_t)thread * l->own_bytes;
    Own o = {.pack = (uint32_t *)(void *)at};
    o.sum = (int32_t *)(void *)(at += own_pack_bytes(l));
    if (l->pieces > 1) o.total = (float *)(void *)(at += own_sum_bytes(l));
    o.b = (uint32_t *)(void *)(at += own_sum_bytes(l));
    o.amax = (float *)(void *)(at + own_b_bytes(l));
    return o;
}

// Scales of columns from their largest magnitudes, NaN taking no part. All threads come here; each looks at its rows,
// then joins its columns. scale may be NULL.
static void column_scales(const Layout *l, const floatX *x, int64_t rows, int64_t cols, float *inv, float *scale) {
    int threads = 1, first, last;
#ifdef _OPENMP
    threads = omp_get_num_threads();
#endif
    float *own = thread_own(l, cpu_thread()).amax;
    memset(own, 0, padded16(cols) * sizeof *own);
    int64_t r0 = rows * cpu_thread() / threads, r1 = rows * (cpu_thread() + 1) / threads;
    for (int64_t r = r0; r < r1; r++)
        for (int64_t c = 0; c < cols; c += 16) {
            int n = cols - c < 16 ? (int)(cols - c) : 16;
            const floatX *at = x + r * cols + c;
            prefetch_ahead(at);
            v16_store(own + c, v16_max(v16_abs(v16_loadx(at, n)), v16_load(own + c, 16)), 16);
        }
#pragma omp barrier
    cpu_share(&first, &last, (int)padded16(cols) / 16);
    for (int c = first * 16; c < last * 16; c++) {
        float most = 0;
        for (int t = 0; t < threads; t++) {
            float m = thread_own(l, t).amax[c];
            if (m > most) most = m;
        }
        float s = int8_row_scale(most);
        inv[c] = int8_row_inv(s);
        if (scale) scale[c] = s;
        if (inv == l->a_inv && c < l->blocks * l->rows) l->row_scale[c] = s;
    }
#pragma omp barrier
}

static void pack_block(const Layout *l, const Int8Product *p, uint32_t *dst, int block) {
    int64_t m0 = (int64_t)block * l->rows;
    int rows = p->M - m0 < l->rows ? (int)(p->M - m0) : l->rows;
    int32_t *start = l->start + (size_t)block * (size_t)l->pieces * (size_t)l->rows;
    if (p->a_columns) {
        memset(start, 0, (size_t)l->pieces * (size_t)l->rows * sizeof *start);
        for (int64_t k = 0; k < p->K; k += PIECE) {
            int64_t end = k + PIECE < p->K ? k + PIECE : p->K;
            i8_quantize_across(dst + (size_t)(k / K4) * (size_t)l->rows, (size_t)l->rows, p->a + m0, (size_t)p->M,
                               l->a_inv + m0, rows, k, end, 0, start + k / PIECE * l->rows);
        }
        for (int64_t k = 0; k < l->units && padded16(rows) < (size_t)l->rows; k++)
            for (size_t m = padded16(rows); m < (size_t)l->rows; m++) dst[(size_t)(k * l->rows) + m] = 0;
        for (int64_t i = 0; i < l->pieces * l->rows; i++) start[i] *= -128;
        return;
    }
    for (int m = 0; m < l->rows; m++) {
        uint32_t *row = dst + (size_t)m * (size_t)l->units;
        if (m >= rows) memset(row, 0, (size_t)l->units * sizeof *row);
        l->row_scale[m0 + m] = m < rows ? i8_quantize_row(row, p->a + (m0 + m) * p->K, p->a_mul, p->K) : 0;
        for (int64_t i = 0; i < l->pieces; i++) {
            int64_t u0 = i * (PIECE / K4), u1 = u0 + PIECE / K4 < l->units ? u0 + PIECE / K4 : l->units;
            start[i * l->rows + m] = -128 * i8_sum(row + u0, u1 - u0);
        }
    }
}

static void pack_panel(const Int8Product *p, uint32_t *dst, int64_t panel) {
    int64_t n0 = panel * PANEL;
    int cols = p->N - n0 < PANEL ? (int)(p->N - n0) : PANEL, padded = (cols + 15) & ~15;
    if (p->across) i8_pack_across(dst, PANEL, p->codes + n0, (size_t)p->N, cols, padded, 0, p->K);
    else i8_pack_along_columns(dst, PANEL, p->codes + n0 * p->K, p->K, cols, padded);
}

// Units k0 to k1 - 1 of a panel of columns of b_x.
static void pack_columns(const Layout *l, const Int8Product *p, uint32_t *dst, int64_t panel, int64_t k0, int64_t k1) {
    int64_t n0 = panel * PANEL, last = k1 * K4 < p->K ? k1 * K4 : p->K;
    int cols = p->N - n0 < PANEL ? (int)(p->N - n0) : PANEL;
    i8_quantize_across(dst + (size_t)k0 * PANEL, PANEL, p->b_x + n0, (size_t)p->N, l->b_inv + n0, cols, k0 * K4, last,
                       I8_OFFSET, NULL);
}

// Sums of one tile to the result.
static void write_tile(const Int8Product *p, const int32_t *sum, const float *total, const float *row_scale,
                       const float *column_scale, int64_t m0, int rows, int64_t n0, int cols) {
    for (int m = 0; m < rows; m++) {
        v16 rs = v16_set1(row_scale[m]);
        int64_t at = (m0 + m) * p->N + n0;
        for (int n = 0; n < cols; n += 16) {
            int left = cols - n < 16 ? cols - n : 16;
            v16 v;
            if (total) v = v16_load(total + m * PANEL + n, 16);
            else v = v16_from_i32(sum + m * PANEL + n);
            v *= rs;
            if (column_scale) v *= v16_load(column_scale + n0 + n, left);
            if (p->accumulate) v += v16_load(p->c_f32 + at + n, left);
            if (p->stream && left == 16) v16_stream(p->c_f32 + at + n, v);
            else if (p->c_f32) v16_store(p->c_f32 + at + n, v, left);
            else v16_storex(p->c + at + n, v, left);
        }
    }
}

// Asks for what write_tile will add to, while the tile's sums are made.
static void prefetch_tile(const Int8Product *p, int64_t m0, int rows, int64_t n0, int cols) {
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < cols; n += 16) __builtin_prefetch(p->c_f32 + (m0 + m) * p->N + n0 + n, 1, 3);
}

// A piece's sums are complete: they are added to those of the pieces before.
static void add_piece(float *total, const int32_t *sum, int rows, bool first) {
    for (int i = 0; i < rows * PANEL; i += 16) {
        v16 v = v16_from_i32(sum + i);
        v16_store(total + i, first ? v : v16_load(total + i, 16) + v, 16);
    }
}

// Block `block` of a, packed at a, by the panels n0 to n1 - 1 of b, packed at b; NULL: they are packed here.
static void multiply(const Layout *l, const Int8Product *p, const Own *own, const uint32_t *a, int block,
                     const uint32_t *b, int64_t n0, int64_t n1) {
    int64_t m0 = (int64_t)block * l->rows, piece_units = PIECE / K4;
    int rows = p->M - m0 < l->rows ? (int)(p->M - m0) : l->rows, padded = tile_pad_rows(rows);
    size_t am = p->a_columns ? 1 : (size_t)l->units, ak = p->a_columns ? (size_t)l->rows : 1;
    const float *column_scale = p->b_x ? l->b_scale : p->column_scale;
    for (int64_t k = 0, units; k < l->units; k += units) {
        // Blocks of a piece that differ by one unit at most.
        int64_t piece = k / piece_units, from = piece * piece_units;
        int64_t left = (l->units - from < piece_units ? l->units : from + piece_units) - k;
        units = ceil_div(left, ceil_div(left, K_BLOCK));
        bool last = k + units == l->units, begins = k == from, ends = units == left;
        const int32_t *start = begins ? l->start + (block * l->pieces + piece) * l->rows : NULL;
        for (int64_t n = n0; n < n1; n++) {
            int cols = p->N - n * PANEL < PANEL ? (int)(p->N - n * PANEL) : PANEL;
            const uint32_t *panel;
            if (b) panel = b + (size_t)(n - n0) * l->b_panel + (size_t)k * PANEL;
            else {
                int64_t to = (k + units) * K4 < p->K ? (k + units) * K4 : p->K;
                i8_pack_across(own->b, PANEL, p->codes + n * PANEL, (size_t)p->N, cols, (cols + 15) & ~15, k * K4, to);
                panel = own->b;
            }
            size_t at = (size_t)((n - n0) * l->rows * PANEL);
            for (int m = 0, mr; m < padded; m += mr, at += (size_t)mr * PANEL) {
                mr = tile_rows(padded - m);
                float *total = l->pieces > 1 ? own->total + at : NULL;
                if (last && p->accumulate) prefetch_tile(p, m0 + m, rows - m < mr ? rows - m : mr, n * PANEL, cols);
                i8_tile(mr, (cols + 15) & ~15, own->sum + at, PANEL, a + (size_t)m * am + (size_t)k * ak, am, ak, panel,
                        PANEL, (int)units, start ? start + m : NULL);
                if (ends && total) add_piece(total, own->sum + at, mr, !piece);
                if (last)
                    write_tile(p, own->sum + at, total, l->row_scale + m0 + m, column_scale, m0 + m,
                               rows - m < mr ? rows - m : mr, n * PANEL, cols);
            }
        }
    }
}

// Dot products of `rows` packed rows of a, units apart, with one row of codes as it lies: its whole vectors of 4 * I8_W
// codes, then `tail`, what is left of it and zeros.
VEC void few_dots(uint32_t *sum, const uint32_t *a, size_t units, const int8_t *codes, int64_t vectors,
                  const uint32_t *tail, int rows) {
    const vi offset = vi_set1(I8_OFFSET);
    vi acc[4];
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) acc[m] = vi_set1(0);
    for (int64_t i = 0; i <= vectors; i++) {
        if (i == vectors && !tail) break;
        vi b = vi_load(i == vectors ? (const void *)tail : codes + i * I8_W * K4) ^ offset;
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) acc[m] = vi_dot(acc[m], b, vi_load(a + (size_t)m * units + i * I8_W));
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) {
        uint32_t lanes[I8_W];
        vi_store(lanes, acc[m]);
        sum[m] = 0;
        for (int i = 0; i < I8_W; i++) sum[m] += lanes[i];       // may wrap, as sums of tiles
    }
}

// The forward of a few tokens (decoding): codes are read once, as they lie. The sums are exact, so the bits are those
// of the tiles.
#define FEW_ROWS 8
static void product_few(const Int8Product *p) {
    int64_t vectors = p->K / (I8_W * K4), left = p->K - vectors * I8_W * K4, quads = (p->K + K4 - 1) / K4;
    size_t units = (size_t)(vectors + (left > 0)) * I8_W;
    uint32_t *a = cpu_workspace((size_t)p->M * units * sizeof *a), start[FEW_ROWS];
    float scale[FEW_ROWS];
    if (!a) return;
    for (int64_t m = 0; m < p->M; m++) {
        uint32_t *row = a + (size_t)m * units;
        scale[m] = i8_quantize_row(row, p->a + m * p->K, NULL, p->K);
        memset(row + quads, 0, (units - (size_t)quads) * sizeof *row);
        start[m] = -128u * (uint32_t)i8_sum(row, quads);
    }
#pragma omp parallel for schedule(static) if ((size_t)p->N * (size_t)p->K >= CPU_MIN_PARALLEL)
    for (int64_t n = 0; n < p->N; n++) {
        const int8_t *codes = p->codes + n * p->K;
        uint32_t rest[I8_W] = {0}, sum[FEW_ROWS], *tail = left ? rest : NULL;
        if (left) memcpy(rest, codes + p->K - left, (size_t)left);
        for (int m = 0, rows; m < (int)p->M; m += rows) {
            const uint32_t *from = a + (size_t)m * units;
            rows = p->M - m >= 4 ? 4 : p->M - m >= 2 ? 2 : 1;
            if (rows == 4) few_dots(sum + m, from, units, codes, vectors, tail, 4);
            else if (rows == 2) few_dots(sum + m, from, units, codes, vectors, tail, 2);
            else few_dots(sum + m, from, units, codes, vectors, tail, 1);
        }
        for (int64_t m = 0; m < p->M; m++) {
            float v = (float)(int32_t)(sum[m] + start[m]) * scale[m];
            if (p->column_scale) v *= p->column_scale[n];
            if (p->c_f32) p->c_f32[m * p->N + n] = v;
            else p->c[m * p->N + n] = f2x(v);
        }
    }
}

static void product(const Int8Product *p) {
    Layout l;
    if (!make_layout(&l, p)) return;
#pragma omp parallel
    {
        Own own = thread_own(&l, cpu_thread());
        if (p->a_columns) {
            column_scales(&l, p->a, p->K, p->M, l.a_inv, NULL);
            column_scales(&l, p->b_x, p->K, p->N, l.b_inv, l.b_scale);
        }
        if (l.by_columns) {
#pragma omp for
            for (int i = 0; i < l.blocks; i++) pack_block(&l, p, l.shared + (size_t)i * l.a_block, i);
#pragma omp for schedule(dynamic)
            for (int64_t n = 0; n < l.panels; n++) {
                if (p->b_x) pack_columns(&l, p, own.pack, n, 0, l.units);
                else pack_panel(p, own.pack, n);
                for (int i = 0; i < l.blocks; i++)
                    multiply(&l, p, &own, l.shared + (size_t)i * l.a_block, i, own.pack, n, n + 1);
            }
        } else {
            if (p->b_x) {
#pragma omp for
                for (int64_t k = 0; k < l.units; k += 16) {
                    int64_t end = k + 16 < l.units ? k + 16 : l.units;
                    for (int64_t n = 0; n < l.panels; n++)
                        pack_columns(&l, p, l.shared + (size_t)n * l.b_panel, n, k, end);
                }
            } else if (!l.b_by_block) {
#pragma omp for
                for (int64_t n = 0; n < l.panels; n++) pack_panel(p, l.shared + (size_t)n * l.b_panel, n);
            }
#pragma omp for schedule(dynamic)
            for (int i = 0; i < l.blocks; i++) {
                pack_block(&l, p, own.pack, i);
                for (int64_t n = 0, end; n < l.panels; n = end) {
                    end = n + GROUP < l.panels ? n + GROUP : l.panels;
                    const uint32_t *b = l.b_by_block ? NULL : l.shared + (size_t)n * l.b_panel;
                    multiply(&l, p, &own, own.pack, i, b, n, end);
                }
            }
        }
        if (p->stream) stream_done();
    }
}

// Whether the result is larger than the caches, and its vectors are aligned.
static bool streams(const Int8Product *p) {
    return (size_t)p->M * (size_t)p->N * sizeof *p->c_f32 >= CPU_STREAM_BYTES && !((uintptr_t)p->c_f32 % 64) &&
           p->N % 16 == 0;
}

static void forward(const Int8Product *p) {
    if (p->M <= FEW_ROWS && p->K <= PIECE) product_few(p);
    else product(p);
}

void cpu_linear_i8_forward(floatX *y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C,
                           int OC) {
    Int8Product p = {.M = (int64_t)N, .N = OC, .K = C, .a = x, .codes = codes, .column_scale = wscale, .c = y};
    if (N) forward(&p);
}

void cpu_linear_i8_forward_f32(float *y, const floatX *x, const int8_t *codes, const float *wscale, size_t N, int C,
                               int OC) {
    Int8Product p = {.M = (int64_t)N, .N = OC, .K = C, .a = x, .codes = codes, .column_scale = wscale, .c_f32 = y};
    p.stream = streams(&p);
    if (N) forward(&p);
}

void cpu_linear_i8_backward_input(floatX *dx, const floatX *dy, const int8_t *codes, const float *wscale, size_t N,
                                  int C, int OC) {
    Int8Product p = {.M = (int64_t)N, .N = C, .K = OC, .a = dy, .a_mul = wscale, .codes = codes, .across = true,
                     .c = dx};
    if (N) product(&p);
}

void cpu_linear_i8_backward_weight(float *dw, const floatX *dy, const floatX *x, size_t N, int C, int OC,
                                   bool accumulate) {
    Int8Product p = {.M = OC, .N = C, .K = (int64_t)N, .a = dy, .a_columns = true, .b_x = x, .c_f32 = dw,
                     .accumulate = accumulate};
    p.stream = !accumulate && streams(&p);
    if (N) product(&p);
    else if (!accumulate) memset(dw, 0, (size_t)OC * (size_t)C * sizeof *dw);
}
