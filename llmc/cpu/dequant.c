// Packed codes back to working values: from a packed file, and from other ranks.
#include "packed.h"

// Working value of sixteen codes; the flags are constants where this is inlined.
VEC v16 dequant_step(const uint8_t *row, const Packed *pk, const Unpack *unpack, int64_t c, const BlockQuant *b,
                     bool as_codes, bool zero_is_float, float mid) {
    size_t byte = (size_t)c * (size_t)unpack->bits / 8;
    v16 q = unpack16(row + byte, pk->row_bytes - byte, unpack);
    return as_codes ? q : v16_work(v16_dequant(zero_is_float ? q : q - b->zp, b, zero_is_float, mid));
}

// One row of blocks of sixteens, or of one block.
VEC void dequant_row(floatX *work, const uint8_t *row, const Packed *pk, const float *scale, const float *zero,
                     bool as_codes, bool zero_is_float, float mid) {
    const Unpack unpack = pk->unpack;
    for (int64_t g = 0, c = 0; g < pk->across; g++) {
        BlockQuant b;
        b.scale = v16_set1(scale[g]);
        b.zp = v16_set1(zero ? zero[g] : mid);
        int64_t end = (g + 1) * pk->b1;
        for (; c + 32 <= end; c += 32) {
            prefetch_ahead(work + c);
            v16 lo = dequant_step(row, pk, &unpack, c, &b, as_codes, zero_is_float, mid);
            v16 hi = dequant_step(row, pk, &unpack, c + 16, &b, as_codes, zero_is_float, mid);
            v32_storex(work + c, lo, hi);
        }
        for (; c < end; c += 16) {
            v16 v = dequant_step(row, pk, &unpack, c, &b, as_codes, zero_is_float, mid);
            v16_storex(work + c, v, end - c < 16 ? (int)(end - c) : 16);
        }
        c = end;
    }
}

// One row of blocks that end anywhere.
VEC void dequant_odd(floatX *work, const uint8_t *row, const Packed *pk, const float *scale, const float *zero,
                     bool zero_is_float, float mid) {
    const Unpack unpack = pk->unpack;
    int64_t cols = pk->across * pk->b1, left = pk->b1, g = 0;
    for (int64_t c = 0; c < cols; c += 16) {
        int n = cols - c < 16 ? (int)(cols - c) : 16;
        v16 lane_scale = {0}, lane_zero = {0};
        for (int i = 0; i < n; i++) {
            lane_scale[i] = scale[g];
            lane_zero[i] = zero ? zero[g] : mid;
            if (--left == 0) left = pk->b1, g++;
        }
        BlockQuant b;
        b.scale = lane_scale;
        b.zp = lane_zero;
        v16_storex(work + c, dequant_step(row, pk, &unpack, c, &b, false, zero_is_float, mid), n);
    }
}

// One row of pk->across blocks.
static void dequant_blocks(floatX *work, const uint8_t *row, const Packed *pk, const float *scale, const float *zero,
                           const QuantSpec *s) {
    float mid = quant_mid(s);
    bool zero_is_float = s->zero == QZ_FLOAT;
    if (pk->across > 1 && pk->b1 % 16) dequant_odd(work, row, pk, scale, zero, zero_is_float, mid);
    else if (quant_works_as_codes(s)) dequant_row(work, row, pk, scale, zero, true, false, mid);
    else if (zero_is_float) dequant_row(work, row, pk, scale, zero, false, true, mid);
    else dequant_row(work, row, pk, scale, zero, false, false, mid);
}

void cpu_dequant_rows(floatX *work, float *wscale, const uint8_t *codes, const float *scale, const float *zero,
                      const QuantSpec *wq, int64_t rows, int64_t cols) {
    Packed pk;
    if (packed_init(&pk, wq, rows, cols) < 0) return;
    bool as_codes = quant_works_as_codes(wq);
#pragma omp parallel for schedule(static) if (rows * cols >= CPU_MIN_PARALLEL)
    for (int64_t r = 0; r < rows; r++) {
        const float *s = scale + r / pk.b0 * pk.across, *z = zero ? zero + r / pk.b0 * pk.across : NULL;
        if (wscale) wscale[r] = as_codes ? s[0] : 1.0f;
        dequant_blocks(work + r * cols, codes + (size_t)r * pk.row_bytes, &pk, s, z, wq);
    }
}

// ---------------------------------------------------------------------------------------------
// From the wire, where scales are bf16 and zero points bf16 or bytes: they are widened for some blocks at a time, of
// which a multiple of eight begins at a byte.
#define WIDEN 256

typedef struct {
    Packed pk;
    QuantWire at;
    const QuantSpec *s;
} WireCodes;

// Row k of one rank's part.
static void dequant_wire_row(floatX *work, float *wscale, const uint8_t *part, const WireCodes *w, int64_t k) {
    float scale[WIDEN], zero[WIDEN];
    const int64_t first = k / w->pk.b0 * w->pk.across;
    const bf16 *scales = (const bf16 *)(const void *)(part + w->at.scale) + first;
    const bf16 *float_zeros = (const bf16 *)(const void *)(part + w->at.zero) + first;
    const uint8_t *int_zeros = part + w->at.zero + first;
    const bool has_zero = quant_has_zero(w->s);
    const float sign = w->s->is_unsigned ? 0.0f : 256.0f;
    for (int64_t g = 0; g < w->pk.across; g += WIDEN) {
        int blocks = w->pk.across - g < WIDEN ? (int)(w->pk.across - g) : WIDEN;
        for (int i = 0; i < blocks; i++) scale[i] = bf16_to_f32(scales[g + i]);
        if (w->s->zero == QZ_FLOAT)
            for (int i = 0; i < blocks; i++) zero[i] = bf16_to_f32(float_zeros[g + i]);
        else if (has_zero)
            for (int i = 0; i < blocks; i++) zero[i] = (float)int_zeros[g + i] - (int_zeros[g + i] > 127 ? sign : 0.0f);
        if (wscale && g == 0) *wscale = quant_works_as_codes(w->s) ? scale[0] : 1.0f;
        size_t byte = (size_t)(g * w->pk.b1) * (size_t)w->pk.bits / 8;
        Packed piece = w->pk;
        piece.across = blocks;
        piece.row_bytes -= byte;
        dequant_blocks(work + g * w->pk.b1, part + w->at.codes + (size_t)k * w->pk.row_bytes + byte, &piece, scale,
                       has_zero ? zero : NULL, w->s);
    }
}

void cpu_weight_unpack(floatX *work, float *wscale, const uint8_t *wire, size_t stride, const RowSplit *split,
                       int64_t k0, int64_t kn, const QuantSpec *wq, int64_t cols) {
    WireCodes w = {.s = wq};
    int64_t total = cpu_window_rows(split, k0, kn);
    if (total == 0 || packed_init(&w.pk, wq, split->rows, cols) < 0) return;
    w.at = quant_wire_layout(wq, kn, cols, (int64_t[]){w.pk.b0, w.pk.b1});
    int threads = cpu_max_threads();
#pragma omp parallel for schedule(static) if (total * cols >= CPU_MIN_PARALLEL)
    for (int t = 0; t < threads; t++) {
        RowRun run = {.rank = -1};
        while (cpu_next_run(&run, split, k0, kn, total * t / threads, total * (t + 1) / threads))
            for (int64_t i = 0; i < run.n; i++)
                dequant_wire_row(work + (run.row + i) * cols, wscale ? wscale + run.row + i : NULL,
                                 wire + (size_t)run.rank * stride, &w, run.k + i);
    }
}
