// The order in which PyTorch's tensor-core kernels for 4-bit weights (tinygemm: aten int4mm, torchao's
// tensor-core-tiled layout) keep codes and their scales. Files of this project keep rows (quant.h); this is for those
// who read the other.
//
// Codes (N, K), 0..15, as int32 words [N/8][K/(16 I)][32][I/2] with I = inner_k_tiles, 2, 4 or 8: for each tile of 8
// rows and I tiles of 16 columns, the words that each of a warp's 32 lanes multiplies. With kt and kk the tile of
// column k among the I and its place there:
//   lane     n % 8 * 4 + kk % 8 / 2
//   word     kt / 2
//   nibble   (0, 4, 1, 5, 2, 6, 3, 7)[kt % 2 * 4 + kk / 8 * 2 + kk % 2], nibble 0 being bits 0 to 3
// Row 9, column 130 at I = 8: row tile 1, column tiles 1, kt 0, kk 2, so lane 5, word 0, nibble 0.
// Scales and zero points (the float domain's: quant.h) are bf16 pairs [K/G][N][2].
#ifndef QLLM_TINYGEMM_H
#define QLLM_TINYGEMM_H
#include "common.h"

// packed (N K / 8 words) from rows of packed codes (quant.h, 4 bits, K/2 bytes a row). E_SHAPE unless 8 divides N and
// 16 inner_k_tiles divides K.
int tinygemm_pack(uint32_t *packed, const uint8_t *codes, int64_t N, int64_t K, int inner_k_tiles, Err *err);
// And back.
int tinygemm_unpack(uint8_t *codes, const uint32_t *packed, int64_t N, int64_t K, int inner_k_tiles, Err *err);

// pairs (groups, N, 2) from scale and zero (N, groups) f32 with bf16 values, one after the other by row; and back.
void tinygemm_pack_scales(bf16 *pairs, const float *scale, const float *zero, int64_t N, int64_t groups);
void tinygemm_unpack_scales(float *scale, float *zero, const bf16 *pairs, int64_t N, int64_t groups);
#endif
