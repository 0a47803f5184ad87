// tinygemm's layout: single codes at the places that PyTorch's kernel source gives for them, there and back, scales,
// and shapes that have none.
#include "quant.h"
#include "test_common.h"
#include "tinygemm.h"

typedef struct { int n, k, row_tile, span, lane, word, nibble; } Example;

// inner_k_tiles 8.
static const Example examples[] = {
    {0, 0, 0, 0, 0, 0, 0},  {0, 1, 0, 0, 0, 0, 4},   {0, 8, 0, 0, 0, 0, 1},  {0, 9, 0, 0, 0, 0, 5},
    {0, 16, 0, 0, 0, 0, 2}, {0, 24, 0, 0, 0, 0, 3},  {0, 25, 0, 0, 0, 0, 7}, {3, 5, 0, 0, 14, 0, 4},
    {9, 130, 1, 1, 5, 0, 0}, {7, 127, 0, 0, 31, 3, 7},
};

static void places(void **state) {
    (void)state;
    enum { N = 16, K = 256, WORDS = N * K / 8 };
    Err err;
    for (size_t i = 0; i < sizeof examples / sizeof *examples; i++) {
        const Example *e = &examples[i];
        uint8_t codes[N * K / 2] = {0};
        uint32_t packed[WORDS];
        codes[e->n * (K / 2) + e->k / 2] = (uint8_t)(13 << e->k % 2 * 4);
        assert_int_equal(tinygemm_pack(packed, codes, N, K, 8, &err), 0);
        int at = ((e->row_tile * (K / 128) + e->span) * 32 + e->lane) * 4 + e->word;
        for (int w = 0; w < WORDS; w++)
            if (packed[w] != (w == at ? 13u << 4 * e->nibble : 0u))
                fail_msg("row %d, column %d: word %d is %08x", e->n, e->k, w, packed[w]);
    }
}

static void there_and_back(void **state) {
    (void)state;
    enum { N = 24, K = 384 };
    Err err;
    uint8_t codes[N * K / 2], back[N * K / 2];
    uint32_t packed[N * K / 8];
    for (size_t i = 0; i < sizeof codes; i++) codes[i] = (uint8_t)(i * 37 + i / 251);
    for (int inner = 2; inner <= 8; inner *= 2) {
        assert_int_equal(tinygemm_pack(packed, codes, N, K, inner, &err), 0);
        memset(back, 0xff, sizeof back);
        assert_int_equal(tinygemm_unpack(back, packed, N, K, inner, &err), 0);
        assert_memory_equal(back, codes, sizeof codes);
    }
}

static void scales(void **state) {
    (void)state;
    enum { N = 3, G = 2 };
    const float scale[N * G] = {0.5f, 1, 1.5f, 2, 2.5f, 3}, zero[N * G] = {-1, -2, -3, -4, -5, -6};
    bf16 pairs[N * G * 2];
    float s[N * G], z[N * G];
    tinygemm_pack_scales(pairs, scale, zero, N, G);
    const float want[N * G * 2] = {0.5f, -1, 1.5f, -3, 2.5f, -5, 1, -2, 2, -4, 3, -6};     // all rows of a group
    for (int i = 0; i < N * G * 2; i++) assert_true(bf16_to_f32(pairs[i]) == want[i]);
    tinygemm_unpack_scales(s, z, pairs, N, G);
    assert_memory_equal(s, scale, sizeof s);
    assert_memory_equal(z, zero, sizeof z);
}

static void refusals(void **state) {
    (void)state;
    Err err;
    uint8_t codes[8] = {0};
    uint32_t packed[2] = {0};
    assert_int_equal(tinygemm_pack(packed, codes, 7, 128, 8, &err), E_SHAPE);
    assert_non_null(strstr(err.text, "7 x 128"));
    assert_int_equal(tinygemm_pack(packed, codes, 8, 64, 8, &err), E_SHAPE);
    assert_int_equal(tinygemm_unpack(codes, packed, 8, 0, 2, &err), E_SHAPE);
    assert_int_equal(tinygemm_unpack(codes, packed, 8, 128, 3, &err), E_SHAPE);
    assert_non_null(strstr(err.text, "2, 4 or 8"));
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(places),
    cmocka_unit_test(there_and_back),
    cmocka_unit_test(scales),
    cmocka_unit_test(refusals),
};
TEST_MAIN(tests)
