// Codes against inputs that are quantized by row: integer products. served_int.h has the layout; here it is made, and
// work is dealt out to threads.
#include "packed.h"
#include "isa.h"
#include "served.h"
#include "served_int.h"

#define FEW 8                       // tokens up to which codes are streamed, for each INT_TOKENS of them
#define TILE_BYTES ((size_t)384 << 10)  // of inputs that stay in the second-level cache while panels pass over them
#define PARALLEL_CODES 65536        // codes from which threads are worth waking

static size_t round64(size_t n) { return (n + 63) & ~(size_t)63; }
static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static bool make_layout(IntLayout *l, const QuantSpec *wq, int OC, int C) {
    int64_t block[2];
    Err err;
    if (quant_block_shape(wq, OC, C, block, &err) < 0 || block[0] != 1) return false;
    *l = (IntLayout){.OC = OC, .C = C, .group = (int)block[1], .groups = C / (int)block[1], .nibbles = wq->bits <= 4};
    // Codes of bytes are counted from their zero points; those of 8 bits would not fit.
    l->own_zero = quant_has_zero(wq) && (l->nibbles || wq->bits == 8);
    if (!l->nibbles && l->own_zero && l->group > 1 << 15) return false;     // sums beyond int32
    l->zero_point = (int)quant_mid(wq) + (wq->is_unsigned ? 0 : 8);
    l->units = (int)(l->nibbles ? 2 * ceil_div(l->group, 8) : ceil_div(l->group, 4));
    l->pieces = (int)ceil_div(l->units, INT_PIECE_UNITS);
    l->scale_bf16 = l->groups > 1;
    size_t units = (size_t)l->units * (size_t)l->groups, groups = (size_t)l->groups;
    l->scale = units * (l->nibbles ? INT_ROWS * 2 : INT_ROWS * 4);
    l->sum = l->scale + round64(groups * INT_ROWS * (l->scale_bf16 ? 2 : 4));
    l->zero = l->sum + (l->nibbles ? 0 : groups * (size_t)l->pieces * INT_ROWS * sizeof(int32_t));
    l->stride = round64(l->zero + (l->own_zero ? groups * INT_ROWS : 0));
    return true;
}

size_t served_i_bytes(const QuantSpec *wq, int OC, int C) {
    IntLayout l;
    return make_layout(&l, wq, OC, C) ? (size_t)ceil_div(OC, INT_ROWS) * l.stride : 0;
}

// --- packing -----------------------------------------------------------------------------------------------------
// Rows of codes and their scales and zero points, by groups.
typedef struct { const uint8_t *codes; const float *scale, *zero; } Rows;

// Zero point of a group as it is taken from codes: counted as the stored ones are.
static int zero_of(const IntLayout *l, const QuantSpec *wq, const float *zero, int g) {
    int z = zero ? (int)zero[g] : (int)quant_mid(wq);
    return z + (wq->is_unsigned ? 0 : l->nibbles ? 8 : 0);
}

// Nibbles that are packed as in the file, eight columns in 32 bits: only their order by rows changes.
static void pack_words(uint8_t *dst, const uint8_t *codes, const IntLayout *l, const QuantSpec *wq) {
    uint32_t flip = wq->is_unsigned ? 0 : 0x88888888u;
    for (int p = 0; p < l->C / 8; p++) {
        uint32_t u;
        memcpy(&u, codes + (size_t)p * sizeof u, sizeof u);
        u ^= flip;
        memcpy(dst + (size_t)p * 64, &u, sizeof u);
    }
}

static void pack_nibbles(uint8_t *dst, const int16_t *q, const IntLayout *l, const QuantSpec *wq) {
    int pairs = l->units / 2;
    for (int g = 0; g < l->groups; g++, q += l->group)
        for (int p = 0; p < pairs; p++, dst += 64)
            for (int i = 0; i < 4; i++) {
                int c = 8 * p + 2 * i, low = c < l->group ? q[c] + (wq->is_unsigned ? 0 : 8) : 0;
                int high = c + 1 < l->group ? q[c + 1] + (wq->is_unsigned ? 0 : 8) : 0;
                dst[i] = (uint8_t)(low | high << 4);
            }
}

// Codes less zero points, and sums of pieces.
static void pack_bytes(uint8_t *dst, uint8_t *sums, const int16_t *q, const float *zero, const IntLayout *l,
                       const QuantSpec *wq) {
    for (int g = 0; g < l->groups; g++, q += l->group)
        for (int p = 0; p < l->pieces; p++, sums += INT_ROWS * sizeof(int32_t)) {
            int z = l->own_zero ? (wq->is_unsigned ? 128 : 0) : zero_of(l, wq, zero, g);
            int c0 = p * INT_PIECE_UNITS * 4, c1 = c0 + INT_PIECE_UNITS * 4;
            if (c1 > l->group) c1 = l->group;
            int32_t sum = 0;
            for (int c = c0; c < c1; c += 4, dst += 64) {
                int n = c1 - c < 4 ? c1 - c : 4;
                int8_t b[4] = {0};
                for (int i = 0; i < n; i++) sum += b[i] = (int8_t)(q[c + i] - z);
                memcpy(dst, b, sizeof b);
            }
            memcpy(sums, &sum, sizeof sum);
        }
}

// Signed bytes with the zero point 0, four columns in 32 bits.
static void pack_signed_bytes(uint8_t *dst, uint8_t *sums, const uint8_t *codes, const IntLayout *l) {
    for (int g = 0; g < l->groups; g++, codes += l->group, sums += INT_ROWS * sizeof(int32_t)) {
        int32_t sum = 0;
        for (int c = 0; c < l->group; c++) sum += (int8_t)codes[c];
        memcpy(sums, &sum, sizeof sum);
        for (int c = 0; c < l->group; c += 4, dst += 64) memcpy(dst, codes + c, 4);
    }
}

static void pack_row(uint8_t *block, int r, const Rows *from, int16_t *q, const IntLayout *l, const QuantSpec *wq) {
    uint8_t *codes = block + r * 4, *sums = block + l->sum + (size_t)r * sizeof(int32_t);
    if (wq->bits == 4 && l->group % 8 == 0) pack_words(codes, from->codes, l, wq);
    else if (!l->nibbles && wq->bits == 8 && !wq->is_unsigned && !l->own_zero && quant_mid(wq) == 0.0f &&
             l->group % 4 == 0 && l->pieces == 1)
        pack_signed_bytes(codes, sums, from->codes, l);
    else {
        quant_unpack_row(q, from->codes, l->C, wq);
        if (l->nibbles) pack_nibbles(codes, q, l, wq);
        else pack_bytes(codes, sums, q, from->zero, l, wq);
    }
    for (int g = 0; g < l->groups; g++) {
        size_t at = (size_t)g * INT_ROWS + (size_t)r;
        bf16 h = bf16_from_f32(from->scale[g]);
        if (l->scale_bf16) memcpy(block + l->scale + at * sizeof h, &h, sizeof h);
        else memcpy(block + l->scale + at * sizeof(float), &from->scale[g], sizeof(float));
        if (!l->own_zero) continue;
        int z = zero_of(l, wq, from->zero, g) - (!l->nibbles && wq->is_unsigned ? 128 : 0);
        block[l->zero + at] = (uint8_t)z;
    }
}

void served_i_pack(void *served, const uint8_t *codes, const float *scale, const float *zero, const QuantSpec *wq,
                   int64_t row0, int64_t rows, int OC, int C) {
    IntLayout l;
    if (!make_layout(&l, wq, OC, C) || rows < 1) return;
    size_t row_bytes = quant_row_bytes(wq->bits, C);
    int16_t *scratch = cpu_workspace((size_t)cpu_max_threads() * (size_t)C * sizeof *scratch);
    if (!scratch) return;
    if (!quant_has_zero(wq)) zero = NULL;
    int64_t end = row0 + rows;
#pragma omp parallel for schedule(static) if ((size_t)rows * (size_t)C >= CPU_MIN_PARALLEL)
    for (int64_t b = row0 / INT_ROWS; b < ceil_div(end, INT_ROWS); b++) {
        uint8_t *block = (uint8_t *)served + (size_t)b * l.stride;
        int64_t first = b * INT_ROWS;
        // Rows come in ascending order: who writes a block's first one clears what no row will fill.
        if (row0 <= first && OC - first < INT_ROWS) memset(block, 0, l.stride);
        for (int64_t r = first > row0 ? first : row0; r < first + INT_ROWS && r < end; r++) {
            size_t i = (size_t)(r - row0), at = i * (size_t)l.groups;
            Rows from = {codes + i * row_bytes, scale + at, zero ? zero + at : NULL};
            pack_row(block, (int)(r - first), &from, scratch + (size_t)cpu_thread() * (size_t)C, &l, wq);
        }
    }
}

// --- products ----------------------------------------------------------------------------------------------------
static const IntForm *choose_form(void) {
    CpuIsa isa = cpu_isa();
    if (isa >= ISA_AVX512 && int_form_avx512) return int_form_avx512;
    return isa >= ISA_AVX2 && int_form_avx2 ? int_form_avx2 : int_form_plain;
}

typedef struct {
    const IntForm *form;
    const IntLayout *l;
    const QuantSpec *act;
    const floatX *x;
    const uint8_t *served;
    IntOut out;
    int64_t N, blocks;              // tokens; blocks of rows
} Product;

static IntOut out_at(const Product *p, int64_t token, int64_t row) {
    IntOut o = p->out;
    size_t at = (size_t)token * o.ld + (size_t)row;
    if (o.y) o.y += at;
    else o.y32 += at;
    return o;
}

static int rows_left(const Product *p, int64_t block, int64_t blocks) {
    int64_t left = p->l->OC - block * INT_ROWS;
    return (int)(left < blocks * INT_ROWS ? left : blocks * INT_ROWS);
}

// Tokens as `rows` reads them, in working memory.
typedef struct { uint8_t *codes; size_t stride; int32_t *zero, *rest; float *scale; } FewTokens;

static void quantize_few(const Product *p, const FewTokens *f, int64_t n) {
    const IntLayout *l = p->l;
    uint8_t *codes = f->codes + (size_t)n * f->stride;
    p->form->quantize(codes, (size_t)l->units * 4, f->zero + n, f->scale + n, p->x + (size_t)n * (size_t)l->C, l,
                      p->act);
    if (f->rest) p->form->rest(f->rest + n * l->groups * l->pieces, codes, f->zero[n], l);
}

// Each block of rows is read from memory once, whatever the number of tokens.
static void product_few(const Product *p) {
    const IntLayout *l = p->l;
    size_t stride = round64((size_t)l->units * (size_t)l->groups * 4), codes = (size_t)p->N * stride;
    size_t each = round64((size_t)p->N * 4), sums = (size_t)l->groups * (size_t)l->pieces;
    bool rest = l->own_zero || l->nibbles;
    uint8_t *at = cpu_workspace(codes + 2 * each + (rest ? (size_t)p->N * sums * 4 : 0));
    if (!at) return;
    FewTokens f = {at, stride, (int32_t *)(void *)(at + codes),
                   rest ? (int32_t *)(void *)(at + codes + 2 * each) : NULL, (float *)(void *)(at + codes + each)};
    if (p->N == 1) quantize_few(p, &f, 0);
#pragma omp parallel if ((size_t)l->OC * (size_t)l->C >= PARALLEL_CODES)
    {
        if (p->N > 1) {
#pragma omp for schedule(static)
            for (int64_t n = 0; n < p->N; n++) quantize_few(p, &f, n);
        }
#pragma omp for schedule(static)
        for (int64_t b = 0; b < p->blocks; b++)
            for (int64_t n = 0; n < p->N; n += INT_TOKENS) {
                IntTokens x = {f.codes + (size_t)n * stride, stride, f.zero + n, f.scale + n,
                               f.rest ? f.rest + (size_t)n * sums : NULL};
                int tokens = p->N - n < INT_TOKENS ? (int)(p->N - n) : INT_TOKENS;
                IntOut o = out_at(p, n, b * INT_ROWS);
                p->form->rows(&o, l, p->served + (size_t)b * l->stride, &x, tokens, rows_left(p, b, 1));
            }
    }
}

// Working memory of product_tiles.
typedef struct {
    size_t tile, panel_codes, panel, bytes; // a tile of tokens; a panel made of nibbles, and its part that is codes
    uint8_t *codes;
    int32_t *zero;
    float *scale;
    uint8_t *panels;                        // of each thread
} TileMemory;

static bool tile_memory(TileMemory *t, const Product *p, int64_t tiles, int width) {
    const IntLayout *l = p->l;
    size_t row = (size_t)l->units * (size_t)l->groups * 4, tokens = (size_t)tiles * INT_TILE;
    t->tile = row * INT_TILE;
    t->panel_codes = row * INT_ROWS;
    t->panel = l->nibbles ? (size_t)width * (t->panel_codes + (size_t)l->groups * INT_ROWS * 4) : 0;
    size_t codes = round64((size_t)tiles * t->tile), each = round64(tokens * 4);
    char *at = cpu_workspace(codes + 2 * each + (size_t)cpu_max_threads() * round64(t->panel));
    if (!at) return false;
    t->codes = (uint8_t *)at;
    t->zero = (int32_t *)(void *)(at + codes);
    t->scale = (float *)(void *)(at + codes + each);
    t->panels = (uint8_t *)at + codes + 2 * each;
    return true;
}

// The panel of blocks b to b + n - 1: of bytes as it lies, of nibbles in the thread's memory.
static IntPanel make_panel(const Product *p, const TileMemory *t, int64_t b, int n) {
    const IntLayout *l = p->l;
    const uint8_t *block = p->served + (size_t)b * l->stride;
    IntPanel panel = {block, block + l->scale, (const int32_t *)(const void *)(block + l->sum), l->stride, l->stride,
                      l->stride / sizeof(int32_t)};
    if (!l->nibbles) return panel;
    uint8_t *own = t->panels + (size_t)cpu_thread() * round64(t->panel);
    size_t sums = (size_t)l->groups * INT_ROWS;
    int32_t *sum = (int32_t *)(void *)(own + (size_t)n * t->panel_codes);
    for (int i = 0; i < n; i++)
        p->form->expand(own + (size_t)i * t->panel_codes, sum + (size_t)i * sums, l, block + (size_t)i * l->stride);
    panel.codes = own;
    panel.codes_stride = t->panel_codes;
    panel.sum = sum;
    panel.sum_stride = sums;
    return panel;
}

static void quantize_tile(const Product *p, const TileMemory *t, int64_t i) {
    const IntLayout *l = p->l;
    size_t units = (size_t)l->units * 4, n0 = (size_t)i * INT_TILE;
    for (size_t m = 0; m < INT_TILE; m++) {
        uint8_t *codes = t->codes + (size_t)i * t->tile + m * units;
        if (n0 + m < (size_t)p->N) {
            p->form->quantize(codes, INT_TILE * units, t->zero + n0 + m, t->scale + n0 + m,
                              p->x + (n0 + m) * (size_t)l->C, l, p->act);
            continue;
        }
        for (int g = 0; g < l->groups; g++) memset(codes + (size_t)g * INT_TILE * units, 0, units);
        t->zero[n0 + m] = 0;
        t->scale[n0 + m] = 0.0f;
    }
}

// Tasks are panels of rows by as many tokens as stay in cache.
static void product_tiles(const Product *p) {
    const IntLayout *l = p->l;
    int width = l->groups > 1 ? p->form->blocks_grouped : p->form->blocks_whole;
    int64_t tiles = ceil_div(p->N, INT_TILE), panels = ceil_div(p->blocks, width);
    TileMemory t;
    if (!tile_memory(&t, p, tiles, width)) return;
    int64_t most = (int64_t)(TILE_BYTES / t.tile);
    int64_t parts = ceil_div(tiles, most < 16 ? 16 : most), each = ceil_div(tiles, parts);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tiles; i++) quantize_tile(p, &t, i);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < parts * panels; task++) {
            int64_t b = task % panels * width, i0 = task / panels * each;
            int n = p->blocks - b < width ? (int)(p->blocks - b) : width;
            IntPanel panel = make_panel(p, &t, b, n);
            for (int64_t i = i0; i < i0 + each && i < tiles; i++) {
                int64_t m = i * INT_TILE;
                IntOut o = out_at(p, m, b * INT_ROWS);
                p->form->tile(&o, l, &panel, n, t.codes + (size_t)i * t.tile, t.zero + m, t.scale + m,
                              p->N - m < INT_TILE ? (int)(p->N - m) : INT_TILE, rows_left(p, b, n));
            }
        }
    }
}

void served_i_forward(floatX *y, float *y32, const floatX *x, const void *served, const QuantSpec *wq,
                      const QuantSpec *act, size_t N, int C, int OC) {
    IntLayout l;
    if (!N || !make_layout(&l, wq, OC, C)) return;
    Product p = {choose_form(), &l, act, x, served, {y, y32, (size_t)OC}, (int64_t)N, ceil_div(OC, INT_ROWS)};
    if (N <= FEW || l.pieces > 1 || (l.own_zero && !l.nibbles)) product_few(&p);
    else product_tiles(&p);
}
