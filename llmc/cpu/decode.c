// What decoding does around its matmuls: the cache, attention over it, the next token.
#include "cpu.h"
#include "sampler.h"

static size_t cache_width(const KvCache *c) { return 2 * (size_t)c->NKV * (size_t)c->HS; }

void cpu_rope_append(floatX *qkv, const KvCache *cache, const float *cos_t, const float *sin_t, const int32_t *pos,
                     int B, int T, int NH) {
    int HS = cache->HS, NKV = cache->NKV, ld = (NH + 2 * NKV) * HS;
    cpu_rope(qkv, cos_t, sin_t, (size_t)B * (size_t)T, T, *pos, ld, NH + NKV, HS, false);
    size_t width = cache_width(cache);
    for (int b = 0; b < B; b++)
        for (int t = 0; t < T; t++) {
            size_t place = (size_t)b * (size_t)cache->max_T + (size_t)(*pos + t);
            const floatX *kv = qkv + ((size_t)b * (size_t)T + (size_t)t) * (size_t)ld + (size_t)(NH * HS);
            if (cache->format == KV_X) {
                memcpy((floatX *)cache->values + place * width, kv, width * sizeof *kv);
                continue;
            }
            int8_t *codes = (int8_t *)cache->values + place * width;
            float *scale = cache->scale + place * 2 * (size_t)NKV;
            for (int h = 0; h < 2 * NKV; h++) {
                float amax = 0.0f;
                for (int i = 0; i < HS; i++) {
                    float a = fabsf(x2f(kv[h * HS + i]));
                    if (a > amax) amax = a;
                }
                scale[h] = int8_row_scale(amax);
                float inv = int8_row_inv(scale[h]);
                for (int i = 0; i < HS; i++) codes[h * HS + i] = int8_nearest(x2f(kv[h * HS + i]), inv);
            }
        }
}

void cpu_attention_cached(floatX *o, const floatX *qkv, const KvCache *cache, const int32_t *pos, int B, int T,
                          int NH) {
    int HS = cache->HS, NKV = cache->NKV, ld = (NH + 2 * NKV) * HS, Tk = *pos + T;
    size_t width = cache_width(cache), skv = (size_t)cache->max_T * width;
    const floatX *kv = cache->values;
    if (cache->format == KV_INT8) {
        floatX *wide = cpu_workspace_outer((size_t)B * skv * sizeof *wide);
        if (!wide) return;
        const int8_t *codes = cache->values;
        for (int b = 0; b < B; b++)
            for (size_t i = (size_t)b * skv; i < (size_t)b * skv + (size_t)Tk * width; i++)
                wide[i] = f2x((float)codes[i] * cache->scale[i / (size_t)HS]);
        kv = wide;
    }
    cpu_attention_forward(o, NULL, qkv, kv, kv + NKV * HS, B, T, Tk, NH, NKV, HS, NH * HS, ld, 2 * NKV * HS, skv);
}

void cpu_sample_next(DecodeState *state, float *logits, const Sampler *s, int V) {
    state->token = sample_token(s, logits, V, state->draw);
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

void cpu_compare_logits(float *kl, int32_t *same, const float *logits, const float *reference, size_t n, int V) {
    for (size_t r = 0; r < n; r++) {
        const float *a = logits + r * (size_t)V, *b = reference + r * (size_t)V;
        int ta = argmax_token(a, V), tb = argmax_token(b, V);
        same[r] = ta == tb;
        double za = 0.0, zb = 0.0, sum = 0.0;
        if (ta < 0 || tb < 0) {
            kl[r] = NAN;
            continue;
        }
        for (int v = 0; v < V; v++) {
            za += exp((double)(a[v] - a[ta]));
            zb += exp((double)(b[v] - b[tb]));
        }
        double la = (double)a[ta] + log(za), lb = (double)b[tb] + log(zb);
        for (int v = 0; v < V; v++) {
            double p = exp((double)b[v] - lb);
            if (p > 0.0) sum += p * (((double)b[v] - lb) - ((double)a[v] - la));
        }
        kl[r] = sum > 0.0 ? (float)sum : 0.0f;
    }
}
