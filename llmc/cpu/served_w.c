// Codes against inputs as they are: sums in f32. Codes of 4 and 8 bits stand in panels (panels.h); others, and groups
// that do not end where units do, as in files.
//
// Many tokens: codes are unpacked some rows at a time into working values that stay in cache, and multiplied as
// linear_forward multiplies them, so the bits are those of the trained arithmetic.
#include "served.h"
#include "packed.h"
#include "panels.h"

#define STREAM_TOKENS 8                             // most tokens for which codes are read as they stream
#define PIECE_BYTES ((size_t)4 << 20)               // working values of a piece

// Where things lie in the buffer: panels, or rows, scales and zero points as in files.
typedef struct {
    bool panels;
    Panels p;
    int64_t across;
    size_t scale, zero, bytes;
} Layout;

// False: these codes do not go into panels.
static bool panels_layout(Panels *p, const QuantSpec *wq, int64_t group, int64_t groups) {
    *p = (Panels){.bits = wq->bits, .scale_f32 = quant_is_int8_rows(wq), .groups = groups};
    if ((wq->bits != 4 && wq->bits != 8) || groups < 1) return false;
    int cols = panel_unit_cols(p);
    p->mid = wq->is_unsigned ? 1 << (wq->bits - 1) : 0;
    if (wq->zero == QZ_FLOAT) p->zero = PANEL_ZERO_FLOAT;
    else if (quant_has_zero(wq)) p->zero = PANEL_ZERO_INT;
    else if (quant_mid(wq) != (float)p->mid) return false;           // a lopsided range
    if ((groups > 1 && group % cols) || (p->scale_f32 && groups > 1)) return false;
    p->units = (group + cols - 1) / cols;
    p->head = p->zero == PANEL_SYMMETRIC ? UNIT_BYTES : 2 * UNIT_BYTES;
    p->group_bytes = (size_t)p->units * UNIT_BYTES;
    p->pair_bytes = p->head + 2 * p->group_bytes;
    p->panel_bytes = (size_t)(groups / 2) * p->pair_bytes + (groups % 2 ? p->head + p->group_bytes : 0);
    return true;
}

static bool layout(Layout *l, const QuantSpec *wq, int OC, int C) {
    int64_t block[2];
    Err err;
    if (quant_block_shape(wq, OC, C, block, &err) < 0 || block[0] != 1) return false;
    *l = (Layout){.across = C / block[1]};
    l->panels = panels_layout(&l->p, wq, block[1], l->across);
    if (l->panels) {
        l->bytes = (size_t)((OC + PANEL_ROWS - 1) / PANEL_ROWS) * l->p.panel_bytes;
        return true;
    }
    size_t scales = (size_t)OC * (size_t)l->across * sizeof(float);
    l->scale = ((size_t)OC * quant_row_bytes(wq->bits, C) + 63) & ~(size_t)63;
    l->zero = l->scale + scales;
    l->bytes = l->zero + (quant_has_zero(wq) ? scales : 0);
    return true;
}

size_t served_w_bytes(const QuantSpec *wq, int OC, int C) {
    Layout l;
    return layout(&l, wq, OC, C) ? l.bytes : 0;
}

// ---------------------------------------------------------------------------------------------
// Packing, and back.

// Eight nibbles: those of even columns to the low half, of odd columns to the high half; and back.
static uint32_t nibbles_apart(uint32_t v) {
    uint32_t even = v & 0x0f0f0f0fu, odd = v >> 4 & 0x0f0f0f0fu;
    even = (even | even >> 4) & 0x00ff00ffu;
    odd = (odd | odd >> 4) & 0x00ff00ffu;
    return ((even | even >> 8) & 0xffffu) | (odd | odd >> 8) << 16;
}
static uint32_t nibbles_together(uint32_t v) {
    uint32_t even = v & 0xffffu, odd = v >> 16;
    even = (even | even << 8) & 0x00ff00ffu;
    odd = (odd | odd << 8) & 0x00ff00ffu;
    even = (even | even << 4) & 0x0f0f0f0fu;
    odd = (odd | odd << 4) & 0x0f0f0f0fu;
    return even | odd << 4;
}

// The bits that codes and what panels hold of them differ in: the top one of unsigned codes.
static uint32_t top_bits(const Panels *p) { return !p->mid ? 0 : p->bits == 4 ? 0x88888888u : 0x80808080u; }

// Codes of `cols` columns of a row, which begin with a unit, to one lane: to dst, and on by units.
static void pack_group(char *dst, const uint8_t *src, const Panels *p, int64_t cols) {
    const uint32_t top = top_bits(p);
    const int per_unit = panel_unit_cols(p);
    for (int64_t c = 0; c < cols; c += per_unit, src += 4, dst += UNIT_BYTES) {
        uint32_t v = 0;
        int n = cols - c < per_unit ? (int)(cols - c) : per_unit;
        if (n == per_unit) {
            memcpy(&v, src, sizeof v);
            v ^= top;
        } else {
            memcpy(&v, src, quant_row_bytes(p->bits, n));
            v = (v ^ top) & ((1u << n * p->bits) - 1);
        }
        if (p->bits == 4) v = nibbles_apart(v);
        memcpy(dst, &v, sizeof v);
    }
}

static void unpack_group(uint8_t *dst, const char *src, const Panels *p, int64_t cols) {
    const uint32_t top = top_bits(p);
    const int per_unit = panel_unit_cols(p);
    for (int64_t c = 0; c < cols; c += per_unit, src += UNIT_BYTES, dst += 4) {
        uint32_t v;
        memcpy(&v, src, sizeof v);
        if (p->bits == 4) v = nibbles_together(v);
        v ^= top;
        int64_t left = cols - c;
        memcpy(dst, &v, left < per_unit ? quant_row_bytes(p->bits, left) : sizeof v);
    }
}

static void put_bf16(char *to, float v) {
    bf16 h = bf16_from_f32(v);
    memcpy(to, &h, sizeof h);
}
static float get_bf16(const char *from) {
    bf16 h;
    memcpy(&h, from, sizeof h);
    return bf16_to_f32(h);
}

// Lane r of a panel from one row's codes, scales and zero points.
static void pack_lane(char *panel, int r, const uint8_t *codes, const float *scale, const float *zero, const Panels *p,
                      int64_t group) {
    for (int64_t g = 0; g < p->groups; g++, codes += (size_t)group * (size_t)p->bits / 8) {
        char *head = panel + panel_head(p, g) + g % 2 * 32;
        if (p->scale_f32) memcpy(head + r * 4, &scale[g], sizeof *scale);
        else put_bf16(head + r * 2, scale[g]);
        if (p->zero == PANEL_ZERO_FLOAT) put_bf16(head + 64 + r * 2, zero[g]);
        if (p->zero == PANEL_ZERO_INT) {
            int16_t z = (int16_t)((int)zero[g] - p->mid);
            memcpy(head + 64 + r * 2, &z, sizeof z);
        }
        pack_group(panel + panel_codes(p, g) + r * 4, codes, p, group);
    }
}

static void unpack_lane(uint8_t *codes, float *scale, float *zero, const char *panel, int r, const Panels *p,
                        int64_t group) {
    for (int64_t g = 0; g < p->groups; g++, codes += (size_t)group * (size_t)p->bits / 8) {
        const char *head = panel + panel_head(p, g) + g % 2 * 32;
        if (p->scale_f32) memcpy(&scale[g], head + r * 4, sizeof *scale);
        else scale[g] = get_bf16(head + r * 2);
        if (p->zero == PANEL_ZERO_FLOAT) zero[g] = get_bf16(head + 64 + r * 2);
        if (p->zero == PANEL_ZERO_INT) {
            int16_t z;
            memcpy(&z, head + 64 + r * 2, sizeof z);
            zero[g] = (float)(z + p->mid);
        }
        unpack_group(codes, panel + panel_codes(p, g) + r * 4, p, group);
    }
}

void served_w_pack(void *served, const uint8_t *codes, const float *scale, const float *zero, const QuantSpec *wq,
                   int64_t row0, int64_t rows, int OC, int C) {
    Layout l;
    if (!layout(&l, wq, OC, C) || rows <= 0) return;
    char *base = served;
    size_t row_bytes = quant_row_bytes(wq->bits, C), across = (size_t)l.across;
    if (!l.panels) {
        memcpy(base + (size_t)row0 * row_bytes, codes, (size_t)rows * row_bytes);
        size_t at = (size_t)row0 * across * sizeof(float), bytes = (size_t)rows * across * sizeof(float);
        memcpy(base + l.scale + at, scale, bytes);
        if (row0 == 0) memset(base + (size_t)OC * row_bytes, 0, l.scale - (size_t)OC * row_bytes);
        if (zero && quant_has_zero(wq)) memcpy(base + l.zero + at, zero, bytes);
        return;
    }
    int64_t first = row0 / PANEL_ROWS, last = (row0 + rows - 1) / PANEL_ROWS;
#pragma omp parallel for schedule(static) if (rows * C >= CPU_MIN_PARALLEL)
    for (int64_t k = first; k <= last; k++) {
        int64_t r0 = k * PANEL_ROWS, r1 = r0 + PANEL_ROWS;
        char *panel = base + (size_t)k * l.p.panel_bytes;
        // The first to come makes zeros of what nobody writes: rows beyond OC, half a head.
        if (r0 >= row0 && r1 > OC) memset(panel, 0, l.p.panel_bytes);
        else if (r0 >= row0)
            for (int64_t g = 0; g < l.p.groups; g += 2) memset(panel + panel_head(&l.p, g), 0, l.p.head);
        for (int64_t r = r0 > row0 ? r0 : row0; r < r1 && r < row0 + rows; r++) {
            size_t i = (size_t)(r - row0);
            pack_lane(panel, (int)(r - r0), codes + i * row_bytes, scale + i * across, zero ? zero + i * across : NULL,
                      &l.p, C / l.across);
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Few tokens.

// Rows of x as the kernel reads them, and the sums of their groups. x itself where it needs no padding.
static bool panel_input(PanelInput *in, const floatX *x, const Panels *p, bool wide, size_t N, int C) {
    int64_t padded = p->groups * p->units * panel_unit_cols(p), group = C / p->groups;
    bool as_is = !wide && padded == C;
    size_t sums = p->zero == PANEL_ZERO_FLOAT ? N * (size_t)p->groups : 0, ld = (size_t)padded;
    size_t bytes = as_is ? 0 : N * ld * sizeof(float);
    *in = (PanelInput){.x = x, .ld = ld};
    if (bytes + sums == 0) return true;
    char *scratch = cpu_workspace(bytes + sums * sizeof(float));
    if (!scratch) return false;
    floatX *narrow = (floatX *)(void *)scratch;
    float *wider = (float *)(void *)scratch, *sum = (float *)(void *)(scratch + bytes);
    for (size_t t = 0; t < N && !as_is; t++) {
        const floatX *from = x + t * (size_t)C;
        if (wide) {
            for (int c = 0; c < C; c += 16) {
                int n = C - c < 16 ? C - c : 16;
                v16_store(wider + t * ld + (size_t)c, v16_loadx(from + c, n), n);
            }
            memset(wider + t * ld + (size_t)C, 0, (ld - (size_t)C) * sizeof *wider);
        } else {
            memcpy(narrow + t * ld, from, (size_t)C * sizeof *narrow);
            memset(narrow + t * ld + (size_t)C, 0, (ld - (size_t)C) * sizeof *narrow);
        }
    }
    if (!as_is && !wide) in->x = narrow;
    if (wide) in->x32 = wider;
    if (!sums) return true;
    in->sums = sum;
    for (size_t i = 0; i < sums; i++) {
        const floatX *from = x + i * (size_t)group;
        v16 s = {0};
        for (int64_t c = 0; c < group; c += 16)
            s += v16_loadx(from + c, group - c < 16 ? (int)(group - c) : 16);
        sum[i] = v16_sum(s);
    }
    return true;
}

static void panels_forward(floatX *y, float *y32, const floatX *x, const char *served, const Panels *p, size_t N,
                           int C, int OC) {
    PanelKernel kernel = panel_kernel(p);
    PanelInput in;
    if (!panel_input(&in, x, p, kernel.wide, N, C)) return;
    int panels = (OC + PANEL_ROWS - 1) / PANEL_ROWS;
#pragma omp parallel if ((size_t)OC * (size_t)C >= CPU_MIN_PARALLEL)
    {
        float out[PANEL_TOKENS * PANEL_ROWS];
        int first, last;
        cpu_share(&first, &last, panels);
        for (int k = first; k < last; k++) {
            const char *panel = served + (size_t)k * p->panel_bytes;
            int row = k * PANEL_ROWS, rows = OC - row < PANEL_ROWS ? OC - row : PANEL_ROWS;
            for (size_t t0 = 0, n; t0 < N; t0 += n) {
                n = N - t0 < PANEL_TOKENS ? N - t0 : PANEL_TOKENS;
                kernel.dot[n - 1](out, p, panel, &in, t0);
                for (size_t t = 0; t < n; t++) {
                    v16 v = v16_load(out + t * PANEL_ROWS, 16);
                    size_t at = (t0 + t) * (size_t)OC + (size_t)row;
                    if (y) v16_storex(y + at, v, rows);
                    else v16_store(y32 + at, v, rows);
                }
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Many tokens.

// Working memory of a piece: working values and row scales; where codes stand in panels, codes, scales and zero points
// as in files; and where there are several pieces, its columns of the result.
typedef struct {
    floatX *work;
    float *wscale, *scale, *zero;
    uint8_t *codes;
    char *result;
} Piece;

static size_t round64(size_t n) { return (n + 63) & ~(size_t)63; }

static bool piece_new(Piece *piece, const Layout *l, const QuantSpec *wq, size_t rows, size_t C, size_t result) {
    size_t work = round64(rows * C * sizeof(floatX)), wscale = round64(rows * sizeof(float));
    size_t scales = l->panels ? round64(rows * (size_t)l->across * sizeof(float)) : 0;
    size_t codes = l->panels ? round64(rows * quant_row_bytes(wq->bits, (int64_t)C)) : 0;
    char *at = cpu_workspace_outer(work + wscale + 2 * scales + codes + result);
    if (!at) return false;
    piece->work = (floatX *)(void *)at;
    piece->wscale = (float *)(void *)(at + work);
    piece->scale = (float *)(void *)(at + work + wscale);
    piece->zero = (float *)(void *)(at + work + wscale + scales);
    piece->codes = (uint8_t *)(at + work + wscale + 2 * scales);
    piece->result = at + work + wscale + 2 * scales + codes;
    return true;
}

// Working values of rows [row, row + rows) from panels, where that is fast. row is a multiple of PANEL_ROWS.
static bool unpack_panels(const Piece *piece, const char *base, const Layout *l, bool as_codes, int row, int rows,
                          int C) {
    int panels = (rows + PANEL_ROWS - 1) / PANEL_ROWS;
    bool done = true;
#pragma omp parallel for schedule(static) reduction(&& : done) if ((size_t)rows * (size_t)C >= CPU_MIN_PARALLEL)
    for (int k = 0; k < panels; k++) {
        int r = k * PANEL_ROWS, n = rows - r < PANEL_ROWS ? rows - r : PANEL_ROWS;
        done = done && panel_unpack(piece->work + (size_t)r * (size_t)C, piece->wscale + r,
                                    base + (size_t)((row + r) / PANEL_ROWS) * l->p.panel_bytes, &l->p, n, C, as_codes);
    }
    return done;
}

// Working values of rows [row, row + rows).
static void piece_unpack(const Piece *piece, const char *base, const Layout *l, const QuantSpec *wq, int row, int rows,
                         int C) {
    size_t row_bytes = quant_row_bytes(wq->bits, C), across = (size_t)l->across;
    if (!l->panels) {
        const float *scale = (const float *)(const void *)(base + l->scale) + (size_t)row * across;
        const float *zero = (const float *)(const void *)(base + l->zero) + (size_t)row * across;
        cpu_dequant_rows(piece->work, piece->wscale, (const uint8_t *)base + (size_t)row * row_bytes, scale,
                         quant_has_zero(wq) ? zero : NULL, wq, rows, C);
        return;
    }
    if (unpack_panels(piece, base, l, quant_works_as_codes(wq), row, rows, C)) return;
#pragma omp parallel for schedule(static) if ((size_t)rows * (size_t)C >= CPU_MIN_PARALLEL)
    for (int i = 0; i < rows; i++) {
        const char *panel = base + (size_t)((row + i) / PANEL_ROWS) * l->p.panel_bytes;
        unpack_lane(piece->codes + (size_t)i * row_bytes, piece->scale + (size_t)i * across,
                    piece->zero + (size_t)i * across, panel, (row + i) % PANEL_ROWS, &l->p, C / l->across);
    }
    cpu_dequant_rows(piece->work, piece->wscale, piece->codes, piece->scale, quant_has_zero(wq) ? piece->zero : NULL,
                     wq, rows, C);
}

// Rows of n bytes to rows that are ld bytes apart.
static void copy_rows(char *to, size_t ld, const char *from, size_t n, size_t rows) {
#pragma omp parallel for schedule(static) if (n * rows >= CPU_MIN_PARALLEL)
    for (size_t i = 0; i < rows; i++) memcpy(to + i * ld, from + i * n, n);
}

static void pieces_forward(floatX *y, float *y32, const floatX *x, const char *base, const Layout *l,
                           const QuantSpec *wq, size_t N, int C, int OC) {
    size_t most = PIECE_BYTES / sizeof(floatX) / (size_t)C / 64 * 64, value = y ? sizeof *y : sizeof *y32;
    if (most < 64) most = 64;
    if (most > (size_t)OC) most = (size_t)OC;
    bool as_codes = quant_works_as_codes(wq), whole = most == (size_t)OC;
    Piece piece;
    if (!piece_new(&piece, l, wq, most, (size_t)C, whole ? 0 : N * most * value)) return;
    for (int row = 0; row < OC; row += (int)most) {
        int rows = OC - row < (int)most ? OC - row : (int)most;
        char *to = y ? (char *)(y + row) : (char *)(y32 + row), *result = whole ? to : piece.result;
        const float *wscale = as_codes ? piece.wscale : NULL;
        piece_unpack(&piece, base, l, wq, row, rows, C);
        if (y) cpu_linear_forward((floatX *)(void *)result, x, piece.work, wscale, N, C, rows);
        else cpu_linear_forward_f32((float *)(void *)result, x, piece.work, wscale, N, C, rows);
        if (!whole) copy_rows(to, (size_t)OC * value, result, (size_t)rows * value, N);
    }
}

void served_w_forward(floatX *y, float *y32, const floatX *x, const void *served, const QuantSpec *wq, size_t N, int C,
                      int OC) {
    Layout l;
    if (!N || !layout(&l, wq, OC, C)) return;
    const char *base = served;
    if (N > STREAM_TOKENS) {
        pieces_forward(y, y32, x, base, &l, wq, N, C, OC);
    } else if (l.panels) {
        panels_forward(y, y32, x, base, &l.p, N, C, OC);
    } else {
        const float *scale = (const float *)(const void *)(base + l.scale);
        const float *zero = quant_has_zero(wq) ? (const float *)(const void *)(base + l.zero) : NULL;
        cpu_qmatvec(y, y32, x, served, scale, zero, wq, N, C, OC);
    }
}
