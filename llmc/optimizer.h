// What training keeps of a parameter: the parameter itself (f32, bf16 or INT8 rows) and AdamW's two moments, each in
// one of several formats. Sources: torchao's prototype/quantized_training (INT8 rows) and optim (states);
// doc/numerics.md states every rounding. This is the scalar arithmetic; adamw_low (ops.h) is the pass that uses it.
#ifndef QLLM_OPTIMIZER_H
#define QLLM_OPTIMIZER_H
#include "common.h"
#include "rng.h"
#include "state_maps.h"
#ifdef __cplusplus
extern "C" {
#endif

typedef enum { PARAM_F32, PARAM_BF16, PARAM_INT8 } ParamFormat;      // INT8: one f32 scale a row
typedef enum { STATE_F32, STATE_BF16, STATE_INT8, STATE_INT4, STATE_FP8 } StateFormat;
typedef enum { ROUND_STOCHASTIC, ROUND_NEAREST } Rounding;

// A parameter's rows, and a moment's, in device memory. What does not belong to the format is NULL.
//   PARAM_F32, PARAM_BF16   data (rows, cols)
//   PARAM_INT8              data (rows, cols) int8_t codes, scale (rows) f32: value = code * scale
//   STATE_F32, STATE_BF16   data (rows * cols)
//   STATE_INT8, STATE_FP8   data (rows * cols) bytes, scale (rows * cols / 256) f32
//   STATE_INT4              data (rows * cols / 2) bytes, the first of a pair in the high nibble, scale (rows * cols / 128)
// The blocks of states run through the rows as if they were one long row, from the tensor's first value.
typedef struct { ParamFormat format; void *data; float *scale; } StoredParam;
typedef struct { StateFormat format; void *data; float *scale; } StoredState;

// ---------------------------------------------------------------------------------------------
// Formats

QHD int state_block(StateFormat f) {                     // values that share a scale; 0: none
    return f == STATE_INT8 || f == STATE_FP8 ? 256 : f == STATE_INT4 ? 128 : 0;
}
// The format of a whole tensor of n values when f is asked for: small ones, and those that are not whole blocks, stay
// f32. (torchao decides by the rows of one rank, and keeps the parameter's dtype; here any number of ranks computes the
// same.)
QHD StateFormat state_format(StateFormat f, int64_t n) {
    int block = state_block(f);
    return n < 4096 || (block && n % block) ? STATE_F32 : f;
}
// Rows that are whole blocks: the smallest number that a rank can hold. It divides the rows of the tensor.
QHD int64_t state_unit(StateFormat f, int64_t cols) {
    int64_t block = state_block(f), a = block, b = cols;
    if (!block) return 1;
    while (b) { int64_t t = a % b; a = b; b = t; }
    return block / a;
}
QHD size_t state_data_bytes(StateFormat f, size_t n) {
    return f == STATE_F32 ? 4 * n : f == STATE_BF16 ? 2 * n : f == STATE_INT4 ? n / 2 : n;
}
QHD size_t state_scales(StateFormat f, size_t n) { return state_block(f) ? n / (size_t)state_block(f) : 0; }
QHD size_t param_value_bytes(ParamFormat f) { return f == PARAM_F32 ? 4 : f == PARAM_BF16 ? 2 : 1; }

// ---------------------------------------------------------------------------------------------
// States by blocks: value = map[code] * s, with one scale s a block; FP8: the e4m3 number times s. NaN is taken for
// zero and takes no part in amax. A block with an infinity has scale infinity, and decodes to infinities and NaN.

// The scale of a block from its largest magnitude.
QHD float state_scale(StateFormat f, float amax) {
    float s = amax > 1e-12f ? amax : 1e-12f;
    return f == STATE_FP8 ? s / 448.0f : s;
}
// Code of u among the n ascending values of a map: the largest value not above u (the first, if all are), or the next
// one if u lies in the middle between the two or above it.
QHD int state_map_code(const float *map, int n, float u) {
    int c = 0;
    for (int step = n / 2; step; step /= 2)
        if (u >= map[c + step]) c += step;
    int up = c + 1 < n ? c + 1 : c;
    return u - map[c] >= (map[up] - map[c]) * 0.5f ? up : c;
}
// The code of x in a block of scale s, and the value of a code. map: state_map(f, is_signed); not read for FP8.
QHD int state_code(StateFormat f, const float *map, float x, float s) {
    float u = x / s;
    if (u != u) u = 0.0f;
    return f == STATE_FP8 ? f8_e4m3_from_f32(u) : state_map_code(map, f == STATE_INT4 ? 16 : 256, u);
}
QHD float state_value(StateFormat f, const float *map, int code, float s) {
    return (f == STATE_FP8 ? f8_e4m3_to_f32((f8_e4m3)code) : map[code]) * s;
}
// The map of a format, m's (signed) or v's; NULL where there is none. Host memory.
static inline const float *state_map(StateFormat f, bool is_signed) {
    static const float s8[256] = {STATE_MAP_S8}, u8[256] = {STATE_MAP_U8};
    static const float s4[16] = {STATE_MAP_S4}, u4[16] = {STATE_MAP_U4};
    if (f == STATE_INT8) return is_signed ? s8 : u8;
    if (f == STATE_INT4) return is_signed ? s4 : u4;
    return NULL;
}

// ---------------------------------------------------------------------------------------------
// Stochastic rounding. Random bits are Philox's, keyed by the run's seed, the tensor (its number in the parameter
// table), the update t and the element: the same on any rank, thread or device.

QHD uint64_t rounding_stream(int tensor, int32_t t) {    // top bit and few tensors: apart from other uses of the seed
    return (uint64_t)1 << 63 | (uint64_t)(uint32_t)tensor << 32 | (uint32_t)t;
}
// INT8: element i takes 24 bits, word i % 4 of block i / 4.
QHD float rounding_uniform(uint64_t seed, uint64_t stream, uint64_t i) {
    return philox_uniform(philox(seed, stream, i / 4).v[i % 4]);
}
// bf16: element i takes 16 bits, the lower (even i) or upper half of word i / 2 % 4 of block i / 8.
QHD uint32_t rounding_bits16(uint64_t seed, uint64_t stream, uint64_t i) {
    uint32_t word = philox(seed, stream, i / 8).v[i / 2 % 4];
    return i % 2 ? word >> 16 : word & 0xffffu;
}

// f32 to bf16, away from zero with probability (lower 16 bits) / 65536; r in [0, 65536). NaN and infinity stay.
QHD bf16 bf16_stochastic(float x, uint32_t r) {
    uint32_t u = f32_bits(x);
    if ((u & 0x7f800000u) == 0x7f800000u) return bf16_from_f32(x);
    return (bf16)((u + (r < (u & 0xffffu) ? 0x10000u : 0u)) >> 16);
}

// INT8 rows. scale = amax / 127 in f32, not floored: a row of zeros has scale 0. A value's code is made with inv:
// nearest rint(x * inv), stochastic floor(x * inv + u), u in [0, 1), all in f32, then clamped to [-128, 127]. NaN is
// taken for zero and takes no part in amax. A row with an infinity has scale infinity, and decodes to NaN.
QHD float int8_row_scale(float amax) { return amax / 127.0f; }
QHD float int8_row_inv(float scale) { return 1.0f / (scale > 1e-12f ? scale : 1e-12f); }
QHD float int8_clamp(float q) { return q != q ? 0.0f : q < -128.0f ? -128.0f : q > 127.0f ? 127.0f : q; }
QHD int8_t int8_nearest(float x, float inv) { return (int8_t)int8_clamp(rintf(x * inv)); }
QHD int8_t int8_stochastic(float x, float inv, float u) { return (int8_t)int8_clamp(floorf(x * inv + u)); }

#ifdef __cplusplus
}
#endif
#endif
