// Codes of 4 bits in the order of PyTorch's tensor-core kernels, and back.
#include "tinygemm.h"

enum { TILE_ROWS = 8, TILE_COLS = 16, LANES = 32 };

static int check(int64_t N, int64_t K, int inner_k_tiles, Err *err) {
    if (inner_k_tiles != 2 && inner_k_tiles != 4 && inner_k_tiles != 8)
        return err_set(err, E_SHAPE, "%d inner k tiles: tinygemm's layout has 2, 4 or 8", inner_k_tiles);
    if (N < 1 || K < 1 || N % TILE_ROWS || K % (TILE_COLS * inner_k_tiles))
        return err_set(err, E_SHAPE,
                       "a weight of %lld x %lld does not fit tinygemm's tiles of %d rows and %d columns; pad it, or "
                       "take fewer inner k tiles",
                       (long long)N, (long long)K, TILE_ROWS, TILE_COLS * inner_k_tiles);
    return 0;
}

// Where the code of row n and column k lies.
typedef struct { int64_t word; int shift; } Place;

static Place place(int64_t n, int64_t k, int64_t K, int inner) {
    static const int nibble[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    int64_t span = TILE_COLS * inner, tile = n / TILE_ROWS * (K / span) + k / span;
    int kt = (int)(k % span / TILE_COLS), kk = (int)(k % TILE_COLS), lane = (int)(n % TILE_ROWS) * 4 + kk % 8 / 2;
    return (Place){(tile * LANES + lane) * (inner / 2) + kt / 2, 4 * nibble[kt % 2 * 4 + kk / 8 * 2 + kk % 2]};
}

int tinygemm_pack(uint32_t *packed, const uint8_t *codes, int64_t N, int64_t K, int inner_k_tiles, Err *err) {
    int rc = check(N, K, inner_k_tiles, err);
    if (rc < 0) return rc;
    memset(packed, 0, (size_t)N * (size_t)K / 2);
    for (int64_t n = 0; n < N; n++)
        for (int64_t k = 0; k < K; k++) {
            uint32_t code = codes[n * (K / 2) + k / 2] >> (k % 2 * 4) & 15u;
            Place p = place(n, k, K, inner_k_tiles);
            packed[p.word] |= code << p.shift;
        }
    return 0;
}

int tinygemm_unpack(uint8_t *codes, const uint32_t *packed, int64_t N, int64_t K, int inner_k_tiles, Err *err) {
    int rc = check(N, K, inner_k_tiles, err);
    if (rc < 0) return rc;
    memset(codes, 0, (size_t)N * (size_t)K / 2);
    for (int64_t n = 0; n < N; n++)
        for (int64_t k = 0; k < K; k++) {
            Place p = place(n, k, K, inner_k_tiles);
            codes[n * (K / 2) + k / 2] |= (uint8_t)((packed[p.word] >> p.shift & 15u) << (k % 2 * 4));
        }
    return 0;
}

void tinygemm_pack_scales(bf16 *pairs, const float *scale, const float *zero, int64_t N, int64_t groups) {
    for (int64_t n = 0; n < N; n++)
        for (int64_t g = 0; g < groups; g++) {
            pairs[(g * N + n) * 2] = bf16_from_f32(scale[n * groups + g]);
            pairs[(g * N + n) * 2 + 1] = bf16_from_f32(zero[n * groups + g]);
        }
}

void tinygemm_unpack_scales(float *scale, float *zero, const bf16 *pairs, int64_t N, int64_t groups) {
    for (int64_t n = 0; n < N; n++)
        for (int64_t g = 0; g < groups; g++) {
            scale[n * groups + g] = bf16_to_f32(pairs[(g * N + n) * 2]);
            zero[n * groups + g] = bf16_to_f32(pairs[(g * N + n) * 2 + 1]);
        }
}
