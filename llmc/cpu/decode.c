// What decoding does around its matmuls: what goes into the cache, the next token, rows of a packed table.
#include "cpu.h"
#include "sampler.h"

// One vector of the cache in codes and their scale.
static void append_int8(int8_t *codes, float *scale, const floatX *x, int HS) {
    v16 m = {0};
    for (int i = 0; i < HS; i += 16) m = v16_max(v16_abs(v16_loadx(x + i, HS - i < 16 ? HS - i : 16)), m);
    *scale = int8_row_scale(v16_hmax(m));
    v16 inv = v16_set1(int8_row_inv(*scale));
    for (int i = 0; i < HS; i += 16) {
        int n = HS - i < 16 ? HS - i : 16;
        v16_store_i8(codes + i, v16_loadx(x + i, n) * inv, n);
    }
}

void cpu_rope_append(floatX *qkv, const KvCache *cache, const float *cos_t, const float *sin_t, const int32_t *pos,
                     int B, int T, int NH) {
    int HS = cache->HS, NKV = cache->NKV, heads = 2 * NKV;
    size_t ld = (size_t)(NH + heads) * (size_t)HS, width = (size_t)(heads * HS), N = (size_t)B * (size_t)T;
    size_t half = (size_t)HS / 2;
#pragma omp parallel for schedule(static) if (N * ld >= CPU_MIN_PARALLEL)
    for (size_t n = 0; n < N; n++) {
        size_t at = (size_t)*pos + n % (size_t)T, place = n / (size_t)T * (size_t)cache->max_T + at;
        floatX *row = qkv + n * ld, *kv = row + (size_t)(NH * HS);
        rope_row(row, cos_t + at * half, sin_t + at * half, NH + NKV, HS, false);
        if (cache->format == KV_X) {
            memcpy((floatX *)cache->values + place * width, kv, width * sizeof *kv);
            continue;
        }
        for (int h = 0; h < heads; h++)
            append_int8((int8_t *)cache->values + place * width + h * HS, cache->scale + place * (size_t)heads + h,
                        kv + h * HS, HS);
    }
}

void cpu_sample_next(DecodeState *state, float *logits, const Sampler *s, int V) {
    // The same token as sample_token's, in one pass.
    state->token = s->temperature > 0.0f ? sample_token(s, logits, V, state->draw) : cpu_argmax(logits, V);
    state->pos++;
    state->draw++;
}

void cpu_embedding_q_forward(floatX *out, const int32_t *tokens, const uint8_t *codes, const float *scale,
                             const float *zero, const QuantSpec *wq, size_t N, int C, int V) {
    int64_t block[2];
    Err err;
    if (quant_block_shape(wq, V, C, block, &err) < 0) {
        ops_set_error(err.code, "%s", err.text);
        return;
    }
    size_t row_bytes = quant_row_bytes(wq->bits, C), across = (size_t)(C / block[1]);
    for (size_t n = 0; n < N; n++) {
        size_t row = (size_t)tokens[n];
        cpu_dequant_rows(out + n * (size_t)C, NULL, codes + row * row_bytes, scale + row * across,
                         zero ? zero + row * across : NULL, wq, 1, C);
    }
}
