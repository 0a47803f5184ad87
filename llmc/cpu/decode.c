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

enum { RUN = 1024, MOST_GROUPS = 4096, MOST_CANDIDATES = 1024 };

// Logits to weights (sampler_weight). A group is a lane of a run of RUN weights: largest, of all groups.
static int weights_of(float *x, int V, float top, float temperature, float *largest) {
    int groups = 0;
    v16 t = v16_set1(top), by = v16_set1(temperature), zero = {0};
    for (int at = 0; at < V; at += RUN) {
        v16 m = {0};
        for (int i = at; i < V && i < at + RUN; i += 16) {
            int n = V - i < 16 ? V - i : 16;
            v16 w = v16_nan_to(v16_exp((v16_load(x + i, n) - t) / by), zero);
            v16_store(x + i, w, n);
            for (int k = n; k < 16; k++) w[k] = 0.0f;
            m = v16_max(m, w);
        }
        if (groups < MOST_GROUPS) v16_store(largest + groups, m, 16);
        groups += 16;
    }
    return groups;
}

// The k-th largest of n values, which are reordered: what is larger goes to the front.
static float kth_largest(float *x, int n, int k) {
    for (int first = 0, last = n - 1; first < last;) {
        float pivot = x[(first + last) / 2];
        int i = first, j = last;
        while (i <= j) {
            while (x[i] > pivot) i++;
            while (x[j] < pivot) j--;
            if (i > j) break;
            float swap = x[i];
            x[i++] = x[j];
            x[j--] = swap;
        }
        if (k - 1 <= j) last = j;
        else if (k - 1 >= i) first = i;
        else break;
    }
    return x[k - 1];
}

// Indices of the weights from `least` on, in order: their number, or -1 where there are more than fit.
static int candidates(int *index, const float *w, int V, float least) {
    int n = 0;
    for (int at = 0; at < V; at += 64) {
        int end = V - at < 64 ? V : at + 64;
        v16 m = {0};
        for (int i = at; i < end; i += 16) m = v16_max(v16_load(w + i, end - i < 16 ? end - i : 16), m);
        if (v16_hmax(m) < least) continue;
        for (int i = at; i < end; i++) {
            if (w[i] < least) continue;
            if (n == MOST_CANDIDATES) return -1;
            index[n++] = i;
        }
    }
    return n;
}

// sample_token. The k-th largest of the groups' largest weights is no more than the k-th largest of all, so top_k cuts
// among the few weights from there on.
static int next_token(const Sampler *s, float *x, int V, uint64_t draw) {
    float largest[MOST_GROUPS];
    int best = cpu_argmax(x, V), index[MOST_CANDIDATES];
    if (best < 0 || !(s->temperature > 0.0f) || isinf(x[best])) return best;
    int groups = weights_of(x, V, x[best], s->temperature, largest), k = s->top_k, n = -1;
    if (k > 0 && k < V && k <= groups && groups <= MOST_GROUPS)
        n = candidates(index, x, V, kth_largest(largest, groups, k));
    if (n >= k) {
        for (int i = 0; i < n; i++) x[i] = x[index[i]];
        int drawn = sample_weights(s, x, n, draw);
        return drawn < 0 ? best : index[drawn];
    }
    int drawn = sample_weights(s, x, V, draw);
    return drawn < 0 ? best : drawn;
}

void cpu_sample_next(DecodeState *state, float *logits, const Sampler *s, int V) {
    state->token = next_token(s, logits, V, state->draw);
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
