// Packed codes of a tensor (quant.h) and the working values made of them.
#ifndef QLLM_PACKED_CUH
#define QLLM_PACKED_CUH
#include "row.cuh"

// How the codes of one tensor lie. C++ needs no more of a QuantSpec on the device.
struct Packed {
    int bits;
    uint32_t sign;              // value of a code's sign bit, 0 when unsigned
    float mid;                  // zero point of a symmetric spec; what codes count from in the float domain
    bool zero_is_float;
    size_t row_bytes;
    int b0, b1, across;         // rows and columns of a block, blocks across a row
};

static inline bool packed_init(Packed *p, const QuantSpec *s, int64_t rows, int64_t cols) {
    int64_t block[2];
    Err err;
    if (quant_block_shape(s, rows, cols, block, &err) < 0) {
        ops_set_error(err.code, "%s", err.text);
        return false;
    }
    *p = Packed{s->bits, s->is_unsigned ? 0u : 1u << (s->bits - 1), quant_mid(s), s->zero == QZ_FLOAT,
                quant_row_bytes(s->bits, cols), (int)block[0], (int)block[1], (int)(cols / block[1])};
    return true;
}

// Codes 8 unit .. 8 unit + 7 of a row, which begin at a byte, as a little-endian integer; zeros behind the row's end.
// BITS is the width where it makes one aligned load of it, else 0.
template <int BITS>
static __device__ __forceinline__ uint64_t load_codes8(const uint8_t *row, int unit, const Packed *pk) {
    if (BITS == 4) return ((const uint32_t *)row)[unit];
    if (BITS == 8) return ((const uint64_t *)row)[unit];
    uint64_t v = 0;
    size_t from = (size_t)unit * pk->bits, left = pk->row_bytes - from;
    for (size_t i = 0; i < (size_t)pk->bits && i < left; i++) v |= (uint64_t)row[from + i] << 8 * i;
    return v;
}
static __device__ __forceinline__ float code_at(uint64_t codes, int i, const Packed *pk) {
    uint32_t field = (uint32_t)(codes >> i * pk->bits) & ((1u << pk->bits) - 1);
    return (float)((int)(field ^ pk->sign) - (int)pk->sign);
}

// Whether working8 may take the rows WHOLE.
static inline bool packed_whole(const Packed *pk, const void *work, const void *codes, int64_t cols) {
    return cols % 8 == 0 && pk->b1 % 8 == 0 && (uintptr_t)work % 16 == 0 && (uintptr_t)codes % 8 == 0;
}

// Working values 8 unit .. 8 unit + 7 of a row (those that there are) from its codes; params(g) are those of the row's
// block g. WHOLE: eights of codes and of values are aligned, none of them is at a row's or block's end.
template <int BITS, bool WHOLE, class Params>
static __device__ __forceinline__ void working8(floatX *work, const uint8_t *codes, int unit, int cols,
                                                const Packed *pk, bool as_codes, Params params) {
    uint64_t eight = load_codes8<BITS>(codes, unit, pk);
    int c = unit * 8, n = WHOLE ? 8 : min(8, cols - c), g = c / pk->b1, left = WHOLE ? 8 : pk->b1 - c % pk->b1;
    QParams p = params(g);
    float f[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (!WHOLE && i < n && left-- == 0) {                   // a block that ends within the eight
            p = params(++g);
            left = pk->b1 - 1;
        }
        float q = code_at(eight, i, pk);
        // As quant_dequant; the store rounds to bf16.
        if (!as_codes) q = pk->zero_is_float ? fmaf(q - pk->mid, p.scale, p.zp) : (q - p.zp) * p.scale;
#ifdef PRECISION_FP32
        q = bf16_round(q);
#endif
        f[i] = q;
    }
    if (WHOLE) {
        Vec<floatX, 8> v = to_x(f);
#pragma unroll
        for (int i = 0; i < 8; i += VEC_X) {
            Vec<floatX, VEC_X> part;
            for (int j = 0; j < VEC_X; j++) part.v[j] = v.v[i + j];
            vec_store(work + c + i, part);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) if (i < n) work[c + i] = f2x(f[i]);
    }
}
#endif
