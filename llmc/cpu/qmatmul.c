// Packed codes multiplied by a few tokens without unpacking them to memory.
#include "packed.h"
#include "served.h"

// Tokens that share one reading of the codes, rows whose sums run side by side, rows that a thread takes at a time.
#define TOKENS 4
#define ROWS 4
#define STRIP_ROWS 32

// What the rows share. x lies in scratch as f32, ldx values a token, zeros behind the last column; sums of x over each
// block, ld_sums a token, for the float domain, whose zero point multiplies them.
typedef struct {
    Packed pk;
    const uint8_t *codes;
    const float *scale, *zero;  // zero NULL when symmetric
    bool zero_is_float;
    float centre;               // what a code is counted from when no integer zero point says so
    float *x, *sums;
    size_t ldx, ld_sums;
    int64_t steps;              // loads of a row's codes a block
} Matvec;

// Values of the sixteen 4-bit fields, counted from `from`.
VEC v16 nibble_table(int sign, float from) {
    v16 t;
    for (int i = 0; i < 16; i++) t[i] = (float)((i ^ sign) - sign) - from;
    return t;
}

#ifdef QLLM_AVX512
// 32 codes of 4 bits by table: the even ones (low nibbles), then the odd ones. A permutation looks at the low four bits
// of its indices only.
VEC v16 nibbles_even(Bytes16 b, v16 table) {
    return (v16)_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(b), (__m512)table);
}
VEC v16 nibbles_odd(Bytes16 b, v16 table) {
    return (v16)_mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_cvtepu8_epi32(b), 4), (__m512)table);
}
VEC v16 signed16(Bytes16 b) { return (v16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b)); }
#else
VEC v16 nibbles_even(Bytes16 b, v16 table) {
    v16 v;
    for (int i = 0; i < 16; i++) v[i] = table[b.b[i] & 15];
    return v;
}
VEC v16 nibbles_odd(Bytes16 b, v16 table) {
    v16 v;
    for (int i = 0; i < 16; i++) v[i] = table[b.b[i] >> 4];
    return v;
}
VEC v16 signed16(Bytes16 b) {
    v16 v;
    for (int i = 0; i < 16; i++) v[i] = (float)(int8_t)b.b[i];
    return v;
}
#endif

// The kinds of codes that have a loop of their own.
typedef enum { CODES_4, CODES_S8, CODES_ANY, CODES_ANY_ZERO } CodesKind;   // the last: with integer zero points

// Rows r to r + rows - 1 against n tokens from x on: total[i * n + t] = sum over blocks of scale * sum (code - centre)
// * x, lanes apart. Several rows at a time, because one row's sum is a chain of multiply-adds that each wait for the
// last. All but mv, r and x are constants at most calls, and the loops over rows and tokens are unrolled: sums stay in
// registers. steps: vectors (4 bits: pairs of them) a block. guard: the tensor ends less than 16 bytes behind these
// rows. Without it a row's last load may run into the next row, which does no harm: x is zero there.
VEC void rows_dot(v16 *total, const Matvec *mv, int64_t r, const float *x, int rows, int n, CodesKind kind,
                  int64_t steps, bool guard) {
    const size_t ldx = mv->ldx, row_bytes = mv->pk.row_bytes;
    const size_t stride = kind == CODES_4 || kind == CODES_S8 ? 16 : 2 * (size_t)mv->pk.bits;
    const int64_t across = mv->pk.across;
    const Unpack unpack = mv->pk.unpack;
    const uint8_t *p = mv->codes + (size_t)r * row_bytes, *end = p + row_bytes, *ahead = p;
    const float *scale[ROWS], *zero[ROWS];
    const v16 centre = v16_set1(mv->centre), table = nibble_table(unpack.sign, mv->centre);
    v16 sum[ROWS * TOKENS];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
        int64_t first = (r + i) / mv->pk.b0 * across;
        scale[i] = mv->scale + first;
        zero[i] = kind == CODES_ANY_ZERO ? mv->zero + first : NULL;
    }
#pragma GCC unroll 16
    for (int k = 0; k < rows * n; k++) sum[k] = v16_set1(0.0f);
    for (int64_t g = 0; g < across; g++) {
        v16 acc[ROWS * TOKENS];
#pragma GCC unroll 16
        for (int k = 0; k < rows * n; k++) acc[k] = v16_set1(0.0f);
        for (int64_t step = 0; step < steps; step++) {
#pragma GCC unroll 4
            for (int i = 0; i < rows; i++) {
                const uint8_t *src = p + (size_t)i * row_bytes;
                size_t left = guard ? (size_t)(end - p) : 16;
                if (kind == CODES_4) {
                    Bytes16 b = bytes16(src, left);
                    v16 even = nibbles_even(b, table), odd = nibbles_odd(b, table);
#pragma GCC unroll 4
                    for (int t = 0; t < n; t++) {
                        acc[i * n + t] = v16_fma(even, v16_load(x + (size_t)t * ldx, 16), acc[i * n + t]);
                        acc[i * n + t] = v16_fma(odd, v16_load(x + (size_t)t * ldx + 16, 16), acc[i * n + t]);
                    }
                } else {
                    v16 q = kind == CODES_S8 ? signed16(bytes16(src, left)) : unpack16(src, left, &unpack);
                    q -= kind == CODES_ANY_ZERO ? v16_set1(zero[i][g]) : centre;
#pragma GCC unroll 4
                    for (int t = 0; t < n; t++)
                        acc[i * n + t] = v16_fma(q, v16_load(x + (size_t)t * ldx, 16), acc[i * n + t]);
                }
            }
            // The rows lie one behind the other, so what comes next is one stream, whichever row it belongs to.
            prefetch_ahead(ahead);
            ahead += (size_t)rows * stride;
            p += stride;
            x += kind == CODES_4 ? 32 : 16;
        }
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) {
            v16 s = v16_set1(scale[i][g]);
#pragma GCC unroll 4
            for (int t = 0; t < n; t++) sum[i * n + t] = v16_fma(acc[i * n + t], s, sum[i * n + t]);
        }
    }
#pragma GCC unroll 16
    for (int k = 0; k < rows * n; k++) total[k] = sum[k];
}

// One function for each kind and shape, so that each has the registers to itself.
typedef void (*DotFn)(v16 *total, const Matvec *mv, int64_t r, const float *x);
typedef struct { DotFn rows4, tokens4, last; } DotSet;    // four rows, one token; two rows, four tokens; one, guarded

#define DOT(name, kind, rows, n, guard) \
    static __attribute__((noinline)) void name(v16 *total, const Matvec *mv, int64_t r, const float *x) { \
        if (mv->steps == 1) rows_dot(total, mv, r, x, rows, n, kind, 1, guard); \
        else if (mv->steps == 2) rows_dot(total, mv, r, x, rows, n, kind, 2, guard); \
        else rows_dot(total, mv, r, x, rows, n, kind, mv->steps, guard); \
    }
#define DOT_SET(name, kind) \
    DOT(name##_rows4, kind, ROWS, 1, false) \
    DOT(name##_tokens4, kind, ROWS / 2, TOKENS, false) \
    DOT(name##_last, kind, 1, 1, true)
DOT_SET(dot_4, CODES_4)
DOT_SET(dot_s8, CODES_S8)
DOT_SET(dot_any, CODES_ANY)
DOT_SET(dot_any_zero, CODES_ANY_ZERO)
#define DOT_ENTRY(name) {name##_rows4, name##_tokens4, name##_last}
static const DotSet dot_sets[] = {
    [CODES_4] = DOT_ENTRY(dot_4),
    [CODES_S8] = DOT_ENTRY(dot_s8),
    [CODES_ANY] = DOT_ENTRY(dot_any),
    [CODES_ANY_ZERO] = DOT_ENTRY(dot_any_zero),
};

// The same of one row and one token for blocks that do not end where vectors do.
static float row_dot_odd(const Matvec *mv, int64_t r, const float *x, int64_t cols) {
    const Packed *pk = &mv->pk;
    const uint8_t *row = mv->codes + (size_t)r * pk->row_bytes;
    int64_t first = r / pk->b0 * pk->across;
    bool zero_is_int = mv->zero && !mv->zero_is_float;
    float acc = 0.0f, total = 0.0f;
    for (int64_t c = 0; c < cols; c += 16) {
        size_t byte = (size_t)c * (size_t)pk->bits / 8;
        v16 q = unpack16(row + byte, pk->row_bytes - byte, &pk->unpack);
        for (int i = 0; i < 16 && c + i < cols; i++) {
            int64_t g = first + (c + i) / pk->b1;
            acc = fmaf(q[i] - (zero_is_int ? mv->zero[g] : mv->centre), x[c + i], acc);
            if ((c + i + 1) % pk->b1) continue;
            total = fmaf(acc, mv->scale[g], total);
            acc = 0.0f;
        }
    }
    return total;
}

// The zero points of the float domain: what they add to the sums of row r and token t.
VEC v16 float_zeros(v16 total, const Matvec *mv, int64_t r, size_t t) {
    const float *z = mv->zero + r / mv->pk.b0 * mv->pk.across, *sums = mv->sums + t * mv->ld_sums;
    for (int64_t g = 0; g < mv->pk.across; g += 16) {
        int k = mv->pk.across - g < 16 ? (int)(mv->pk.across - g) : 16;
        total = v16_fma(v16_load(z + g, k), v16_load(sums + g, k), total);
    }
    return total;
}

// The result in X or, where x is NULL, in f32.
typedef struct { floatX *x; float *f32; } Output;

static void write_one(Output y, size_t at, float v) {
    if (y.x) y.x[at] = f2x(v);
    else y.f32[at] = v;
}

// Writes what a DotFn found for rows r.. and tokens t0..
static void write_rows(Output y, const Matvec *mv, const v16 *total, int64_t r, int rows, size_t t0, int n, int OC) {
    for (int t = 0; t < n; t++)
        for (int i = 0; i < rows; i++) {
            v16 v = total[i * n + t];
            if (mv->zero_is_float) v = float_zeros(v, mv, r + i, t0 + (size_t)t);
            write_one(y, (t0 + (size_t)t) * (size_t)OC + (size_t)(r + i), v16_sum(v));
        }
}

// Rows first to last - 1 against all tokens.
static void rows_all(Output y, const Matvec *mv, int64_t first, int64_t last, size_t N, int OC, CodesKind kind) {
    const DotSet *dot = &dot_sets[kind];
    v16 total[ROWS * TOKENS];
    int64_t r = first, unguarded = OC - (int64_t)((15 + mv->pk.row_bytes) / mv->pk.row_bytes);
    for (; r + ROWS <= last && r + ROWS <= unguarded; r += ROWS) {
        size_t t = 0;
        for (; t + TOKENS <= N; t += TOKENS)
            for (int half = 0; half < ROWS; half += ROWS / 2) {
                dot->tokens4(total, mv, r + half, mv->x + t * mv->ldx);
                write_rows(y, mv, total, r + half, ROWS / 2, t, TOKENS, OC);
            }
        for (; t < N; t++) {
            dot->rows4(total, mv, r, mv->x + t * mv->ldx);
            write_rows(y, mv, total, r, ROWS, t, 1, OC);
        }
    }
    for (; r < last; r++)
        for (size_t t = 0; t < N; t++) {
            dot->last(total, mv, r, mv->x + t * mv->ldx);
            write_rows(y, mv, total, r, 1, t, 1, OC);
        }
}

static void rows_odd(Output y, const Matvec *mv, int64_t first, int64_t last, size_t N, int C, int OC) {
    for (int64_t r = first; r < last; r++)
        for (size_t t = 0; t < N; t++) {
            v16 zeros = {0};
            if (mv->zero_is_float) zeros = float_zeros(zeros, mv, r, t);
            write_one(y, t * (size_t)OC + (size_t)r, row_dot_odd(mv, r, mv->x + t * mv->ldx, C) + v16_sum(zeros));
        }
}

void cpu_qmatvec_forward(floatX *y, const floatX *x, const uint8_t *codes, const float *scale, const float *zero,
                         const QuantSpec *wq, size_t N, int C, int OC) {
    cpu_qmatvec(y, NULL, x, codes, scale, zero, wq, N, C, OC);
}

void cpu_qmatvec(floatX *y, float *y32, const floatX *x, const uint8_t *codes, const float *scale, const float *zero,
                 const QuantSpec *wq, size_t N, int C, int OC) {
    Matvec mv = {.codes = codes, .scale = scale, .zero = zero, .zero_is_float = wq->zero == QZ_FLOAT,
                 .centre = quant_mid(wq)};
    if (packed_init(&mv.pk, wq, OC, C) < 0) return;
    CodesKind kind = CODES_ANY;
    if (zero && !mv.zero_is_float) kind = CODES_ANY_ZERO;
    else if (wq->bits == 4) kind = CODES_4;
    else if (wq->bits == 8 && !wq->is_unsigned) kind = CODES_S8;
    int step = kind == CODES_4 ? 32 : 16;
    bool aligned = mv.pk.b1 % step == 0 || mv.pk.across == 1, split = kind == CODES_4 && aligned;
    mv.steps = (mv.pk.b1 + step - 1) / step;
    mv.ldx = ((size_t)C + 31) / 32 * 32;
    mv.ld_sums = mv.zero_is_float ? (size_t)mv.pk.across : 0;
    float *scratch = cpu_workspace(N * (mv.ldx + mv.ld_sums) * sizeof(float));
    if (!scratch) return;
    mv.x = scratch;
    mv.sums = scratch + N * mv.ldx;
    for (size_t t = 0; t < N; t++) {
        const floatX *xt = x + t * (size_t)C;
        float *to = mv.x + t * mv.ldx, *sums = mv.sums + t * mv.ld_sums;
        int c = 0;
        for (; c + 32 <= C; c += 32)      // 4 bits: the even columns of each 32, then the odd ones
            for (int i = 0; i < 16; i++) {
                to[c + i] = x2f(xt[c + (split ? 2 * i : i)]);
                to[c + 16 + i] = x2f(xt[c + (split ? 2 * i + 1 : 16 + i)]);
            }
        for (size_t i = (size_t)c; i < mv.ldx; i++) to[i] = 0.0f;
        for (int i = 0; c + i < C; i++) to[split ? c + i % 2 * 16 + i / 2 : c + i] = x2f(xt[c + i]);
        for (size_t g = 0; g < mv.ld_sums; g++) {
            double sum = 0.0;
            for (int64_t k = 0; k < mv.pk.b1; k++) sum += (double)x2f(xt[(int64_t)g * mv.pk.b1 + k]);
            sums[g] = (float)sum;
        }
    }
    int64_t strips = (OC + STRIP_ROWS - 1) / STRIP_ROWS;
#pragma omp parallel for schedule(static) if ((size_t)OC * (size_t)C >= CPU_MIN_PARALLEL)
    for (int64_t k = 0; k < strips; k++) {
        int64_t first = k * STRIP_ROWS, last = first + STRIP_ROWS < OC ? first + STRIP_ROWS : OC;
        if (aligned) rows_all((Output){y, y32}, &mv, first, last, N, OC, kind);
        else rows_odd((Output){y, y32}, &mv, first, last, N, C, OC);
    }
}
