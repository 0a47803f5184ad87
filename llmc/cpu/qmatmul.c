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

static QParams packed_qparams(const float *scale, const float *zero, const QuantSpec *s, int64_t i) {
    return (QParams){.scale = scale[i], .zp = zero ? zero[i] : quant_mid(s)};
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
    uint8_t bytes[16];
    memcpy(bytes, w, 16);
    v16 v;
#ifdef QLLM_AVX512
    v = (v16)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)bytes)));
#else
    for (int i = 0; i < 16; i++) v[i] = (float)bytes[i];
#endif
    return v - v16_set1((float)sign);
}

void cpu_dequant_rows(floatX *work, float *wscale, const uint8_t *codes, const float *scale, const float *zero,
                      const QuantSpec *wq, int64_t rows, int64_t cols) {
    Packed pk;
    if (packed_init(&pk, wq, rows, cols) < 0) return;
    bool as_codes = quant_works_as_codes(wq), zero_is_float = wq->zero == QZ_FLOAT;
#pragma omp parallel for schedule(static) if (rows * cols >= CPU_MIN_PARALLEL)
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *row = codes + (size_t)r * pk.row_bytes;
        int64_t first = r / pk.b0 * pk.across, at = -1;
        BlockQuant b = {0};
        if (wscale) wscale[r] = as_codes ? scale[first] : 1.0f;
        for (int64_t c = 0; c < cols; c += 16) {
            size_t byte = (size_t)c * (size_t)pk.bits / 8;
            v16 q = unpack16(row + byte, pk.row_bytes - byte, pk.bits, pk.sign), v = q;
            int n = cols - c < 16 ? (int)(cols - c) : 16;
            // A block need not end with these sixteen: each of them is dequantized for each block it meets.
            for (int i = 0; !as_codes && i < n;) {
                int64_t block = (c + i) / pk.b1, end = (block + 1) * pk.b1 - c;
                if (block != at) b = block_quant(packed_qparams(scale, zero, wq, first + block), wq, QD_BF16);
                at = block;
                v16 d = v16_dequant(q, &b, zero_is_float, QD_BF16);
                if (i == 0 && end >= n) {
                    v = d;
                    break;
                }
                for (; i < n && i < end; i++) v[i] = d[i];
            }
            v16_storex(work + r * cols + c, v, n);
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

// Up to 16 bytes of a row, zeros behind its end.
typedef struct { uint8_t b[16]; } Bytes16;
VEC Bytes16 bytes16(const uint8_t *src, size_t left) {
    Bytes16 v = {{0}};
    if (left >= 16) memcpy(v.b, src, 16);
    else memcpy(v.b, src, left);
    return v;
}

// Values of the sixteen 4-bit fields, counted from `from`.
VEC v16 nibble_table(int sign, float from) {
    v16 t;
    for (int i = 0; i < 16; i++) t[i] = (float)((i ^ sign) - sign) - from;
    return t;
}

// 32 codes of 4 bits by table: the even ones (low nibbles) and the odd ones (high nibbles).
VEC void nibbles32(v16 *even, v16 *odd, Bytes16 b, v16 table) {
#ifdef QLLM_AVX512
    __m128i bytes;
    memcpy(&bytes, b.b, 16);
    __m512i w = _mm512_cvtepu8_epi32(bytes);         // a permutation looks at the low four bits of its indices only
    *even = (v16)_mm512_permutexvar_ps(w, (__m512)table);
    *odd = (v16)_mm512_permutexvar_ps(_mm512_srli_epi32(w, 4), (__m512)table);
#else
    for (int i = 0; i < 16; i++) {
        (*even)[i] = table[b.b[i] & 15];
        (*odd)[i] = table[b.b[i] >> 4];
    }
#endif
}

VEC v16 codes16(Bytes16 b, int sign) {
#ifdef QLLM_AVX512
    __m128i bytes;
    memcpy(&bytes, b.b, 16);
    return (v16)_mm512_cvtepi32_ps(sign ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#else
    v16 v;
    for (int i = 0; i < 16; i++) v[i] = (float)((b.b[i] ^ sign) - sign);
    return v;
#endif
}

// Row r against n <= TOKENS tokens from xt on: total[t] += sum over blocks of scale * sum (code - centre) * x, lanes apart.
// bits (where it is 4 or 8) and n are constants at the calls that matter.
VEC void row_dot(v16 *total, const Matvec *mv, int64_t r, const float *xt, int n, int bits) {
    const Packed *pk = &mv->pk;
    const uint8_t *row = mv->codes + (size_t)r * pk->row_bytes;
    int64_t first = r / pk->b0 * pk->across;
    bool zero_is_int = mv->zero && !mv->zero_is_float;
    v16 table = nibble_table(pk->sign, mv->centre), from = v16_set1(mv->centre);
    for (int64_t g = 0; g < pk->across; g++) {
        v16 acc[TOKENS] = {{0}};
        if (zero_is_int) {
            from = v16_set1(mv->zero[first + g]);
            table = nibble_table(pk->sign, mv->zero[first + g]);
        }
        for (int64_t c = g * pk->b1; c < (g + 1) * pk->b1; c += bits == 4 ? 32 : 16) {
            size_t byte = (size_t)c * (size_t)bits / 8, left = pk->row_bytes - byte;
            v16 q, odd = {0};
            if (bits == 4) nibbles32(&q, &odd, bytes16(row + byte, left), table);
            else if (bits == 8) q = codes16(bytes16(row + byte, left), pk->sign) - from;
            else q = unpack16(row + byte, left, bits, pk->sign) - from;
            for (int t = 0; t < n; t++) {
                const float *x = xt + (size_t)t * mv->ldx + c;
                acc[t] = v16_fma(q, v16_load(x, 16), acc[t]);
                if (bits == 4) acc[t] = v16_fma(odd, v16_load(x + 16, 16), acc[t]);
            }
        }
        v16 s = v16_set1(mv->scale[first + g]);
        for (int t = 0; t < n; t++) total[t] = v16_fma(acc[t], s, total[t]);
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
        else if (n == 1) row_dot(lanes, mv, r, xt, 1, bits);
        else row_dot(lanes, mv, r, xt, n, bits);
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
