// Served forms whose inputs are quantized by row (served_i.c): their layout, and the kernels that each kind of
// processor has of its own. All sums are integers and exact, and the f32 expressions after them are fixed, so kernels
// may cut and order the work as they are fast.
//
// Rows of the weight lie in blocks of 16. A block holds its codes, four columns (a unit) of a row in 32 bits, sixteen
// rows side by side, and after them scales, sums and zero points, each by groups (what shares a scale) of sixteen
// values:
//
//   bytes (5 to 8 bits): unit u of row r are 4 signed bytes, code less zero point, at (u * 16 + r) * 4
//   nibbles (2 to 4 bits): units 2p and 2p + 1 are 8 columns in 4 bytes at (p * 16 + r) * 4, unit 2p (columns 0, 2, 4,
//     6) in the low halves, unit 2p + 1 (columns 1, 3, 5, 7) in the high ones: packed int4 as it is in files. They are
//     unsigned; what is taken from them is IntLayout.zero_point, or the stored one.
//
//   64 bytes of nibbles     row 0                 row 1       ...  row 15
//   (columns 8p .. 8p + 7)  c1c0 c3c2 c5c4 c7c6 | the same  | ...
//
// Groups are padded to whole units (pairs of units for nibbles); padding of codes counts for nothing because inputs are
// 0 there. Inputs are unsigned bytes in the order of the weight's columns: code less zero point, plus `zero` of the
// row.
//   sum (qx - zx) (qw - zw) = sum xu w - zero * sum w       with xu = qx - zx + zero, w = qw - zw
#ifndef QLLM_CPU_SERVED_INT_H
#define QLLM_CPU_SERVED_INT_H
#include "cpu.h"

#define INT_ROWS 16                 // rows of a block
#define INT_TOKENS 4                // that `rows` takes at a time
#define INT_TILE 6                  // tokens of a tile
#define INT_PIECE_UNITS (1 << 14)   // a piece of a group: what one int32 sum takes, 2^16 columns

typedef struct {
    int OC, C, group, groups;       // columns of a group, groups of a row
    int units, pieces;              // of a group
    bool nibbles, own_zero;         // own_zero: zero points are stored (1 byte each, unsigned for nibbles)
    bool scale_bf16;                // else f32
    int zero_point;                 // where none are stored
    size_t scale, sum, zero, stride;    // bytes: offsets in a block, and from block to block; sums only of bytes
} IntLayout;

// Quantized tokens: codes (groups, units) of 4 bytes, `stride` bytes from token to token, and what belongs to each.
typedef struct {
    const uint8_t *codes;
    size_t stride;
    const int32_t *zero;
    const float *scale;
    const int32_t *rest;            // (tokens, groups * pieces): sums of codes less zero point; NULL for bytes without
                                    // own_zero
} IntTokens;

// Blocks of rows as tiles read them: bytes, and the sums and scales of their groups.
typedef struct {
    const uint8_t *codes, *scale;
    const int32_t *sum;
    size_t codes_stride, scale_stride, sum_stride;  // from block to block, in elements
} IntPanel;

// Where results go: one of the two, at the first token and row; ld from token to token.
typedef struct { floatX *y; float *y32; size_t ld; } IntOut;

typedef struct {
    // A row of x: codes in groups that lie group_stride bytes apart, its zero and scale.
    void (*quantize)(uint8_t *codes, size_t group_stride, int32_t *zero, float *scale, const floatX *x,
                     const IntLayout *l, const QuantSpec *act);
    // Sums of the codes of a row, less zero, by groups and pieces; groups without gaps.
    void (*rest)(int32_t *sums, const uint8_t *codes, int32_t zero, const IntLayout *l);
    // One block of rows, of which `rows` exist, by up to INT_TOKENS tokens: streams the block once.
    void (*rows)(const IntOut *out, const IntLayout *l, const uint8_t *block, const IntTokens *x, int tokens, int rows);
    // A block of nibbles as bytes, and the sums of its groups.
    void (*expand)(uint8_t *codes, int32_t *sum, const IntLayout *l, const uint8_t *block);
    // `blocks` blocks of a panel by up to INT_TILE tokens, whose codes are (groups, INT_TILE, units). No pieces, no
    // own_zero of bytes.
    void (*tile)(const IntOut *out, const IntLayout *l, const IntPanel *b, int blocks, const uint8_t *codes,
                 const int32_t *zero, const float *scale, int tokens, int rows);
    int blocks_grouped, blocks_whole;       // that a panel should have: several groups a row, one
} IntForm;

// NULL where the compiler could not make it.
extern const IntForm *const int_form_plain, *const int_form_avx2, *const int_form_avx512;
#endif
