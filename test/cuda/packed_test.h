// Packed tensors for the tests of what reads them.
#ifndef QLLM_PACKED_TEST_H
#define QLLM_PACKED_TEST_H
#include "cuda_test.h"

struct PackedTest {
    QuantSpec spec;
    int64_t block[2];
    std::vector<uint8_t> codes;
    std::vector<float> scale, zero;         // zero is empty without zero points
};

// Random codes of the spec's range (its ends among them), scales and zero points; false where the blocks do not fit.
static inline bool packed_test(PackedTest *p, const char *text, int rows, int cols) {
    p->spec = spec(text, false);
    Err err;
    if (quant_block_shape(&p->spec, rows, cols, p->block, &err) < 0) return false;
    const QuantSpec *s = &p->spec;
    size_t bytes = quant_row_bytes(s->bits, cols), blocks = (size_t)(rows / p->block[0] * (cols / p->block[1]));
    p->codes.assign((size_t)rows * bytes, 0);
    std::vector<int16_t> row((size_t)cols);
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < cols; c++)
            row[(size_t)c] = (int16_t)(s->qmin + (int)(philox(7, 60, (uint64_t)r * (uint64_t)cols + (uint64_t)c).v[0] %
                                                       (unsigned)(s->qmax - s->qmin + 1)));
        quant_pack_row(p->codes.data() + (size_t)r * bytes, row.data(), cols, s->bits);
    }
    p->scale.resize(blocks);
    p->zero.resize(quant_has_zero(s) ? blocks : 0);
    for (size_t b = 0; b < blocks; b++) p->scale[b] = bf16_round(0.02f * (1.5f + uniform(61, b)));
    for (size_t b = 0; b < p->zero.size(); b++)
        p->zero[b] = s->zero == QZ_FLOAT ? bf16_round(0.3f * uniform(62, b))
                                         : (float)(s->qmin + (int)((size_t)(s->qmax - s->qmin) * (b % 7) / 6));
    return true;
}

// Widths that end within a byte, within eight codes, within a slot of 16 bytes; blocks of rows, of odd widths, and
// across slots; both signs; zero points of both kinds; every width.
static const char *const packed_specs[] = {
    "int8,channel", "int8,group=32", "int8,group=16,symmetric", "int8,tensor",
    "uint8,group=32,asymmetric", "uint8,group=32,float", "int8,channel,symmetric,range=-127..127",
    "uint4,group=32,float", "uint4,group=64,float", "int4,group=32", "int4,group=64,symmetric",
    "int4,channel", "uint4,group=32,asymmetric", "uint4,group=4,float", "int4,group=64,range=-7..7",
    "int4,group=32,range=-6..6", "int4,group=3", "int2,group=32", "int3,group=32", "uint2,group=9,float",
    "int5,block=2x16", "int6,channel", "int7,group=5", "uint3,channel,asymmetric",
    "uint6,block=3x7,asymmetric", "uint7,channel,float"};
static const int packed_shapes[][2] = {{1, 1}, {2, 7}, {6, 45}, {9, 64}, {3, 576}, {12, 2112}};     // rows, cols
#endif
