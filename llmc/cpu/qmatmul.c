// Packed codes: back to working values, and multiplied by a few tokens without unpacking them to memory.
#include "cpu.h"
#ifdef __BMI2__
#include <immintrin.h>
#endif

// How the codes of one tensor are read.
typedef struct {
    int bits, sign;             // sign: value of the sign bit, 0 when unsigned
    size_t row_bytes;
    int64_t b0, b1, across;     // rows and columns of a block, blocks across a row
} Packed;

static int packed_init(Packed *p, const QuantSpec *s, int64_t rows, int64_t cols) {
    int64_t block[2];
    Err err;
    if (quant_block_shape(s, rows, cols, block, &err) < 0) {
        ops_set_error(err.code, "%s", err.text);
        return err.code;
    }
    *p = (Packed){.bits = s->bits, .sign = s->is_unsigned ? 0 : 1 << (s->bits - 1),
                  .row_bytes = quant_row_bytes(s->bits, cols), .b0 = block[0], .b1 = block[1],
                  .across = cols / block[1]};
    return 0;
}

// Eight fields of `bits` bits, one to a byte.
VEC uint64_t spread8(uint64_t fields, int bits) {
#ifdef __BMI2__
    return _pdep_u64(fields, 0x0101010101010101u * (uint64_t)((1 << bits) - 1));
#else
    uint64_t bytes = 0;
    for (int i = 0; i < 8; i++) bytes |= (fields >> (i * bits) & (uint64_t)((1 << bits) - 1)) << (8 * i);
    return bytes;
#endif
}

// Sixteen codes from the 2 * bits bytes at src, `left` of them still in the row: a whole word is read where the row has
// it, and nothing behind its end. Codes beyond the row are what zero bits say.
VEC v16 unpack16(const uint8_t *src, size_t left, int bits, int sign) {
    uint64_t w[2] = {0, 0};
    size_t half = (size_t)bits;
    if (left >= half + 8) {
        memcpy(&w[0], src, 8);
        memcpy(&w[1], src + half, 8);
    } else {
        memcpy(&w[0], src, left < half ? left : half);
        if (left > half) memcpy(&w[1], src + half, left - half < half ? left - half : half);
    }
    uint64_t flip = 0x0101010101010101u * (uint64_t)sign;
    w[0] = spread8(w[0], bits) ^ flip;                 // with its sign bit flipped, a code is a byte from 0 up
    w[1] = spread8(w[1], bits) ^ flip;
    v16 v;
#ifdef QLLM_AVX512
    v = (v16)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_set_epi64x((long long)w[1], (long long)w[0])));
#else
    for (int i = 0; i < 16; i++) v[i] = (float)(w[i / 8] >> (8 * (i % 8)) & 255u);
#endif
    return v - v16_set1((float)sign);
}

// Working values of n codes in a row, from code number c on, that share one scale; blocks of sixteens.
VEC void dequant_span(floatX *work, const uint8_t *row, const Packed *pk, int64_t c, int64_t n, const BlockQuant *b,
                      bool as_codes, bool zero_is_float, float mid) {
    for (int64_t end = c + n; c < end; c += 16) {
        size_t byte = (size_t)c * (size_t)pk->bits / 8;
        v16 q = unpack16(row + byte, pk->row_bytes - byte, pk->bits, pk->sign);
        if (!as_codes) q = v16_work(v16_dequant(zero_is_float ? q : q - b->zp, b, zero_is_float, mid));
        v16_storex(work + c, q, end - c < 16 ? (int)(end - c) : 16);
    }
}

// One row of blocks that end anywhere.
static void dequant_odd(floatX *work, const uint8_t *row, const Packed *pk, const float *scale, const float *zero,
                        const QuantSpec *s, int64_t cols) {
    for (int64_t c = 0; c < cols; c++) {
        size_t byte = (size_t)(c & ~7) * (size_t)pk->bits / 8;       // eight codes start at a byte
        v16 q = unpack16(row + byte, pk->row_bytes - byte, pk->bits, pk->sign);
        QParams p = {scale[c / pk->b1], zero ? zero[c / pk->b1] : quant_mid(s)};
        work[c] = f2x(quant_dequant(q[c % 8], p, s, QD_BF16));
    }
}

void cpu_dequant_rows(floatX *work, float *wscale, const uint8_t *codes, const float *scale, const float *zero,
                      const QuantSpec *wq, int64_t rows, int64_t cols) {
    Packed pk;
    if (packed_init(&pk, wq, rows, cols) < 0) return;
    bool as_codes = quant_works_as_codes(wq);
    float mid = quant_mid(wq);
#pragma omp parallel for schedule(static) if (rows * cols >= CPU_MIN_PARALLEL)
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *row = codes + (size_t)r * pk.row_bytes;
        const float *s = scale + r / pk.b0 * pk.across, *z = zero ? zero + r / pk.b0 * pk.across : NULL;
        floatX *out = work + r * cols;
        if (wscale) wscale[r] = as_codes ? s[0] : 1.0f;
        if (pk.across > 1 && pk.b1 % 16) {
            dequant_odd(out, row, &pk, s, z, wq, cols);
            continue;
        }
        for (int64_t g = 0; g < pk.across; g++) {
            BlockQuant b = {.scale = v16_set1(s[g]), .zp = v16_set1(z ? z[g] : mid)};
            if (as_codes) dequant_span(out, row, &pk, g * pk.b1, pk.b1, &b, true, false, 0.0f);
            else if (wq->zero == QZ_FLOAT) dequant_span(out, row, &pk, g * pk.b1, pk.b1, &b, false, true, mid);
            else dequant_span(out, row, &pk, g * pk.b1, pk.b1, &b, false, false, 0.0f);
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Few tokens against packed codes.

// Tokens that share one reading of the codes.
#define TOKENS 4

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
} Matvec;

// Values of the sixteen 4-bit fields, counted from `from`.
VEC v16 nibble_table(int sign, float from) {
    v16 t;
    for (int i = 0; i < 16; i++) t[i] = (float)((i ^ sign) - sign) - from;
    return t;
}

// Sixteen bytes of a row, of which `left` are still in it; zeros stand for the others.
#ifdef QLLM_AVX512
typedef __m128i Bytes16;
VEC Bytes16 bytes16(const uint8_t *src, size_t left) {
    if (__builtin_expect(left >= 16, 1)) return _mm_loadu_si128((const __m128i *)(const void *)src);
    return _mm_maskz_loadu_epi8(v16_mask((int)left), src);
}
// 32 codes of 4 bits by table: the even ones (low nibbles), then the odd ones. A permutation looks at the low four bits
// of its indices only.
VEC v16 nibbles_even(Bytes16 b, v16 table) {
    return (v16)_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(b), (__m512)table);
}
VEC v16 nibbles_odd(Bytes16 b, v16 table) {
    return (v16)_mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_cvtepu8_epi32(b), 4), (__m512)table);
}
VEC v16 codes16(Bytes16 b, int sign) {
    return (v16)_mm512_cvtepi32_ps(sign ? _mm512_cvtepi8_epi32(b) : _mm512_cvtepu8_epi32(b));
}
#else
typedef struct { uint8_t b[16]; } Bytes16;
VEC Bytes16 bytes16(const uint8_t *src, size_t left) {
    Bytes16 v = {{0}};
    memcpy(v.b, src, left < 16 ? left : 16);
    return v;
}
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
VEC v16 codes16(Bytes16 b, int sign) {
    v16 v;
    for (int i = 0; i < 16; i++) v[i] = (float)((b.b[i] ^ sign) - sign);
    return v;
}
#endif

// Row r against n <= TOKENS tokens from xt on: total[t] = sum over blocks of scale * sum (code - centre) * x, lanes apart.
// bits (where it is 4 or 8), n and zero_is_int are constants where this is inlined, so that sums stay in registers.
VEC void row_dot(v16 *total, const Matvec *mv, int64_t r, const float *xt, int n, int bits, bool zero_is_int) {
    const size_t ldx = mv->ldx, row_bytes = mv->pk.row_bytes;
    const int64_t b1 = mv->pk.b1, across = mv->pk.across, first = r / mv->pk.b0 * across;
    const uint8_t *row = mv->codes + (size_t)r * row_bytes;
    const int sign = mv->pk.sign;
    v16 sum[TOKENS] = {{0}}, table = nibble_table(sign, mv->centre), from = v16_set1(mv->centre);
    for (int64_t g = 0; g < across; g++) {
        v16 acc[TOKENS] = {{0}};
        if (zero_is_int) {
            from = v16_set1(mv->zero[first + g]);
            if (bits == 4) table = nibble_table(sign, 0.0f) - from;
        }
        for (int64_t c = g * b1; c < (g + 1) * b1; c += bits == 4 ? 32 : 16) {
            size_t byte = (size_t)c * (size_t)bits / 8, left = row_bytes - byte;
            if (bits == 4) {
                Bytes16 b = bytes16(row + byte, left);
                v16 even = nibbles_even(b, table), odd = nibbles_odd(b, table);
                for (int t = 0; t < n; t++) {
                    acc[t] = v16_fma(even, v16_load(xt + (size_t)t * ldx + c, 16), acc[t]);
                    acc[t] = v16_fma(odd, v16_load(xt + (size_t)t * ldx + c + 16, 16), acc[t]);
                }
            } else {
                v16 q = bits == 8 ? codes16(bytes16(row + byte, left), sign) : unpack16(row + byte, left, bits, sign);
                q -= from;
                for (int t = 0; t < n; t++) acc[t] = v16_fma(q, v16_load(xt + (size_t)t * ldx + c, 16), acc[t]);
            }
        }
        v16 s = v16_set1(mv->scale[first + g]);
        for (int t = 0; t < n; t++) sum[t] = v16_fma(acc[t], s, sum[t]);
    }
    for (int t = 0; t < n; t++) total[t] = sum[t];
}

VEC void row_dot_tokens(v16 *total, const Matvec *mv, int64_t r, const float *xt, int n, int bits, bool zero_is_int) {
    switch (n) {
    case 1: row_dot(total, mv, r, xt, 1, bits, zero_is_int); break;
    case 2: row_dot(total, mv, r, xt, 2, bits, zero_is_int); break;
    case 3: row_dot(total, mv, r, xt, 3, bits, zero_is_int); break;
    default: row_dot(total, mv, r, xt, TOKENS, bits, zero_is_int);
    }
}

// The same for blocks that do not end where vectors do.
static void row_dot_odd(float *total, const Matvec *mv, int64_t r, const float *xt, int n, int64_t cols) {
    const Packed *pk = &mv->pk;
    const uint8_t *row = mv->codes + (size_t)r * pk->row_bytes;
    int64_t first = r / pk->b0 * pk->across;
    float acc[TOKENS] = {0};
    for (int64_t c = 0; c < cols; c += 16) {
        size_t byte = (size_t)c * (size_t)pk->bits / 8;
        v16 q = unpack16(row + byte, pk->row_bytes - byte, pk->bits, pk->sign);
        for (int i = 0; i < 16 && c + i < cols; i++) {
            int64_t g = (c + i) / pk->b1;
            float code = q[i] - (mv->zero && !mv->zero_is_float ? mv->zero[first + g] : mv->centre);
            bool last = (c + i + 1) % pk->b1 == 0;
            for (int t = 0; t < n; t++) {
                acc[t] = fmaf(code, xt[(size_t)t * mv->ldx + (size_t)(c + i)], acc[t]);
                if (last) total[t] = fmaf(acc[t], mv->scale[first + g], total[t]);
                if (last) acc[t] = 0.0f;
            }
        }
    }
}

VEC void rows_by_tokens(floatX *y, const Matvec *mv, int64_t r, size_t N, int OC, int64_t cols, int bits, bool aligned) {
    for (size_t t0 = 0; t0 < N; t0 += TOKENS) {
        int n = N - t0 < TOKENS ? (int)(N - t0) : TOKENS;
        const float *xt = mv->x + t0 * mv->ldx;
        v16 lanes[TOKENS] = {{0}};
        float total[TOKENS] = {0};
        if (!aligned) row_dot_odd(total, mv, r, xt, n, cols);
        else if (mv->zero && !mv->zero_is_float) row_dot_tokens(lanes, mv, r, xt, n, bits, true);
        else row_dot_tokens(lanes, mv, r, xt, n, bits, false);
        for (int t = 0; t < n; t++) {
            if (mv->zero_is_float) {
                const float *z = mv->zero + r / mv->pk.b0 * mv->pk.across, *sums = mv->sums + (t0 + (size_t)t) * mv->ld_sums;
                for (int64_t g = 0; g < mv->pk.across; g += 16) {
                    int k = mv->pk.across - g < 16 ? (int)(mv->pk.across - g) : 16;
                    lanes[t] = v16_fma(v16_load(z + g, k), v16_load(sums + g, k), lanes[t]);
                }
            }
            y[(t0 + (size_t)t) * (size_t)OC + (size_t)r] = f2x(total[t] + v16_sum(lanes[t]));
        }
    }
}

void cpu_qmatvec_forward(floatX *y, const floatX *x, const uint8_t *codes, const float *scale, const float *zero,
                         const QuantSpec *wq, size_t N, int C, int OC) {
    Matvec mv = {.codes = codes, .scale = scale, .zero = zero, .zero_is_float = wq->zero == QZ_FLOAT,
                 .centre = quant_mid(wq)};
    if (packed_init(&mv.pk, wq, OC, C) < 0) return;
    int bits = wq->bits, step = bits == 4 ? 32 : 16;
    bool aligned = mv.pk.b1 % step == 0 || mv.pk.across == 1;
    mv.ldx = ((size_t)C + 31) / 32 * 32;
    mv.ld_sums = mv.zero_is_float ? (size_t)mv.pk.across : 0;
    float *scratch = cpu_workspace(N * (mv.ldx + mv.ld_sums) * sizeof(float));
    if (!scratch) return;
    mv.x = scratch;
    mv.sums = scratch + N * mv.ldx;
    for (size_t t = 0; t < N; t++) {
        const floatX *xt = x + t * (size_t)C;
        float *to = mv.x + t * mv.ldx, *sums = mv.sums + t * mv.ld_sums;
        memset(to, 0, mv.ldx * sizeof(float));
        for (int c = 0; c < C; c++)       // 4 bits: the even columns of each 32, then the odd ones
            to[bits == 4 && aligned ? c / 32 * 32 + c % 2 * 16 + c % 32 / 2 : c] = x2f(xt[c]);
        for (size_t g = 0; g < mv.ld_sums; g++) {
            double sum = 0.0;
            for (int64_t c = 0; c < mv.pk.b1; c++) sum += (double)x2f(xt[(int64_t)g * mv.pk.b1 + c]);
            sums[g] = (float)sum;
        }
    }
#pragma omp parallel for schedule(static) if ((size_t)OC * (size_t)C >= CPU_MIN_PARALLEL)
    for (int64_t r = 0; r < OC; r++) {
        if (bits == 4) rows_by_tokens(y, &mv, r, N, OC, C, 4, aligned);
        else if (bits == 8) rows_by_tokens(y, &mv, r, N, OC, C, 8, aligned);
        else rows_by_tokens(y, &mv, r, N, OC, C, bits, aligned);
    }
}
