// What decoding does around its matmuls (ops.h): keys and values into the cache, the next token; and the comparison of
// logits. Positions are read from device memory, so that a recorded step can be replayed.
#include "row.cuh"

// ---------------------------------------------------------------------------------------------
// rope_append. A warp a head: queries are rotated, keys too, and keys and values are copied to their place, as INT8
// where the cache is. A lane takes pairs (i, i + HS/2), or values, 32 apart; what it reads a second time it wrote
// itself.
#define HEAD_WARPS 8

static __global__ void __launch_bounds__(32 * HEAD_WARPS)
rope_append_kernel(floatX *qkv, KvCache cache, const float *cos_t, const float *sin_t, const int32_t *pos, int T,
                   int NH) {
    const int lane = threadIdx.x % 32, h = (int)blockIdx.y * HEAD_WARPS + (int)threadIdx.x / 32;
    const int HS = cache.HS, NKV = cache.NKV, half = HS / 2, heads = NH + 2 * NKV;
    if (h >= heads) return;                                     // whole warps
    const int at = *pos + (int)(blockIdx.x % (unsigned)T);
    floatX *x = qkv + ((size_t)blockIdx.x * heads + h) * HS;
    if (h < NH + NKV) {
        const float *cs = cos_t + (size_t)at * half, *sn = sin_t + (size_t)at * half;
        for (int i = lane; i < half; i += 32) {
            float a = x2f(x[i]), b = x2f(x[i + half]), c = cs[i], s = sn[i];
            x[i] = f2x(a * c - b * s);
            x[i + half] = f2x(b * c + a * s);
        }
    }
    if (h < NH) return;
    const size_t place = ((size_t)(blockIdx.x / (unsigned)T) * cache.max_T + at) * 2 * NKV + (h - NH);
    // The pairs again: in this order a lane's values are its own.
    if (cache.format == KV_X) {
        floatX *to = (floatX *)cache.values + place * HS;
        for (int i = lane; i < half; i += 32) {
            to[i] = x[i];
            to[i + half] = x[i + half];
        }
        if (HS % 2 && lane == 0) to[HS - 1] = x[HS - 1];
        return;
    }
    float most = 0.0f;                                          // fmaxf passes a NaN over
    for (int i = lane; i < half; i += 32) most = fmaxf(most, fmaxf(fabsf(x2f(x[i])), fabsf(x2f(x[i + half]))));
    if (HS % 2) most = fmaxf(most, fabsf(x2f(x[HS - 1])));
    for (int bits = 16; bits; bits >>= 1) most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, bits));
    float scale = int8_row_scale(most), inv = int8_row_inv(scale);
    int8_t *to = (int8_t *)cache.values + place * HS;
    for (int i = lane; i < half; i += 32) {
        to[i] = int8_nearest(x2f(x[i]), inv);
        to[i + half] = int8_nearest(x2f(x[i + half]), inv);
    }
    if (lane) return;
    if (HS % 2) to[HS - 1] = int8_nearest(x2f(x[HS - 1]), inv);
    cache.scale[place] = scale;
}

void cuda_rope_append(floatX *qkv, const KvCache *cache, const float *cos_t, const float *sin_t, const int32_t *pos,
                      int B, int T, int NH) {
    if (B == 0 || T == 0) return;
    dim3 grid((unsigned)B * (unsigned)T, (unsigned)((NH + 2 * cache->NKV + HEAD_WARPS - 1) / HEAD_WARPS));
    LAUNCH(rope_append_kernel, grid, 32 * HEAD_WARPS, 0, cuda_stream)(qkv, *cache, cos_t, sin_t, pos, T, NH);
    CUDA_CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------
// sample_next.
//
// Greedy: blocks find the largest logit of their part, and one block that of the parts. Else this block goes on, in
// passes over the logits, which the second-level cache holds: weights; the cuts by histograms in shared memory; the
// draw. Amounts are integers (sampler.h), so that the sums are sample_token's in any order, and so is the token.
#define THREADS 1024
#define PARTS 64                    // at most
#define PART_THREADS 256

struct Top { float logit; int token; };

// The larger one; of equals the first. token -1: none.
static __device__ __forceinline__ Top larger(Top a, Top b) {
    if (b.token < 0) return a;
    return a.token < 0 || b.logit > a.logit || (b.logit == a.logit && b.token < a.token) ? b : a;
}

// The largest of all threads', to all. Called once in a kernel.
static __device__ Top block_top(Top t) {
    __shared__ float logits[32];                               // of each warp
    __shared__ int tokens[32];
    for (int bits = 16; bits; bits >>= 1)
        t = larger(t, {__shfl_xor_sync(FULL_WARP, t.logit, bits), __shfl_xor_sync(FULL_WARP, t.token, bits)});
    if (threadIdx.x % 32 == 0) {
        logits[threadIdx.x / 32] = t.logit;
        tokens[threadIdx.x / 32] = t.token;
    }
    __syncthreads();                                           // parts are complete
    for (int w = 0; w < (int)blockDim.x / 32; w++) t = larger(t, {logits[w], tokens[w]});
    return t;
}

static __global__ void __launch_bounds__(PART_THREADS) top_kernel(Top *top, const float *logits, int V) {
    Top t = {-INFINITY, -1};
    for (int i = (int)(blockIdx.x * PART_THREADS + threadIdx.x); i < V; i += (int)gridDim.x * PART_THREADS)
        if (logits[i] > t.logit) t = {logits[i], i};           // never NaN or -infinity; ascending: the first of equals
    t = block_top(t);
    if (threadIdx.x == 0) top[blockIdx.x] = t;
}

// Sums over the block's threads of all `v` before this one; *total: of all. Begins and ends with a barrier.
static __device__ uint64_t block_before(uint64_t v, uint64_t *total) {
    __shared__ uint64_t part[THREADS / 32];
    uint64_t upto = v;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int d = 1; d < 32; d *= 2) {
        uint64_t lower = __shfl_up_sync(FULL_WARP, upto, d);
        if (lane >= d) upto += lower;
    }
    __syncthreads();                                           // the last call's parts have been read
    if (lane == 31) part[warp] = upto;
    __syncthreads();                                           // parts are complete
    uint64_t before = 0;
    *total = 0;
    for (int w = 0; w < THREADS / 32; w++) {
        before += w < warp ? part[w] : 0;
        *total += part[w];
    }
    return before + upto - v;
}

static __device__ uint64_t block_amount(const float *w, int V) {
    uint64_t sum = 0, total;
    for (int i = (int)threadIdx.x; i < V; i += THREADS) sum += sampler_amount(w[i]);
    block_before(sum, &total);
    return total;
}

static __device__ __forceinline__ uint64_t amount_of(float w, bool by_number) {
    return by_number ? 1 : sampler_amount(w);
}

#define DIGITS 2048
#define DIGITS_EACH (DIGITS / THREADS)

// keep_largest of sampler.c. Each thread holds two digits of a histogram, the first thread the largest ones: the digit
// at which the amount reaches `enough` is that of the thread whose running sum passes it.
static __device__ void keep_largest(float *w, int V, uint64_t enough, bool by_number) {
    __shared__ unsigned long long amount[DIGITS];
    __shared__ uint32_t found;                                 // digit of this pass
    __shared__ uint64_t found_above;
    uint32_t prefix = 0;
    uint64_t above = 0;
    for (int pass = 0; pass < 3; pass++) {
        const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
        const uint32_t mask = pass < 2 ? 2047u : 1023u, known = pass == 0 ? 0u : ~0u << (pass == 1 ? 21 : 10);
        __syncthreads();                                       // all have read what the pass before left
        for (int i = (int)threadIdx.x; i < DIGITS; i += THREADS) amount[i] = 0;
        if (threadIdx.x == 0) found = 0;
        __syncthreads();                                       // the histogram is empty
        for (int i = (int)threadIdx.x; i < V; i += THREADS) {
            uint32_t key = f32_bits(w[i]);
            if ((key & known) != prefix) continue;
            unsigned long long a = amount_of(w[i], by_number);
            if (a) atomicAdd(&amount[key >> shift & mask], a);
        }
        __syncthreads();                                       // and complete
        uint64_t mine[DIGITS_EACH], sum = 0, total;
        const int first = DIGITS - 1 - (int)threadIdx.x * DIGITS_EACH;
        for (int j = 0; j < DIGITS_EACH; j++) sum += mine[j] = amount[first - j];
        uint64_t upto = above + block_before(sum, &total);
        // The walk stops at the first digit, from the largest on, with which `enough` is reached; at 0 in any case.
        for (int j = 0; j < DIGITS_EACH; j++) {
            const uint32_t digit = (uint32_t)(first - j);
            const bool before = upto < enough || digit == mask;        // not reached by larger digits
            if (digit <= mask && before && (upto + mine[j] >= enough || digit == 0)) {
                found = digit;
                found_above = upto;
            }
            upto += mine[j];
        }
        __syncthreads();                                       // found is there
        prefix |= found << shift;
        above = found_above;
    }
    // Those above the cut stay; of those at it, as many as it takes, in order.
    const float cut = f32_from_bits(prefix);
    const uint64_t each = amount_of(cut, by_number);
    uint64_t left = above >= enough ? 0 : each ? (enough - above + each - 1) / each : (uint64_t)V, seen = 0;
    for (int from = 0; from < V; from += THREADS) {
        const int i = from + (int)threadIdx.x;
        const float v = i < V ? w[i] : 0.0f;
        const bool equal = i < V && f32_bits(v) == prefix;
        int count = __syncthreads_count(equal);
        uint64_t rank = seen;
        if (count && seen < left && seen + (uint64_t)count > left) {            // the last one kept is among these
            uint64_t total;
            rank += block_before(equal, &total);
        }
        if (i < V && (f32_bits(v) < prefix || (equal && rank >= left))) w[i] = 0.0f;
        seen += (uint64_t)count;
    }
    __syncthreads();                                           // the weights are as they stay
}

// The token at which the running sum of amounts comes to more than `draw`, which is less than their total. Two rounds:
// the part of V that holds it, of 1024, then within it.
static __device__ int find_draw(const float *w, int V, uint64_t draw) {
    __shared__ int place;
    __shared__ uint64_t rest;
    int from = 0, size = V;
    while (size > 1) {
        const int each = (size + THREADS - 1) / THREADS, first = from + (int)threadIdx.x * each;
        uint64_t sum = 0, total;
        for (int i = first; i < min(first + each, from + size); i++) sum += sampler_amount(w[i]);
        uint64_t before = block_before(sum, &total);
        if (before <= draw && draw < before + sum) {
            place = first;
            rest = draw - before;
        }
        __syncthreads();                                       // place is there
        size = min(each, from + size - place);
        from = place;
        draw = rest;
        __syncthreads();                                       // and read
    }
    return from;
}

static __global__ void __launch_bounds__(THREADS)
sample_kernel(DecodeState *state, float *logits, const Top *top, int parts, Sampler s, int V) {
    Top t = {-INFINITY, -1};
    if ((int)threadIdx.x < parts) t = top[threadIdx.x];
    t = block_top(t);
    int token = t.token;
    if (token >= 0 && s.temperature > 0.0f && t.logit < INFINITY) {    // the same in all threads
        for (int i = (int)threadIdx.x; i < V; i += THREADS)
            logits[i] = sampler_weight(logits[i], t.logit, s.temperature);
        __syncthreads();                                       // the weights are there
        if (s.top_k > 0 && s.top_k < V) keep_largest(logits, V, (uint64_t)s.top_k, true);
        uint64_t total = block_amount(logits, V);
        if (s.top_p < 1.0f) {
            keep_largest(logits, V, sampler_enough(s.top_p, total), false);
            total = block_amount(logits, V);
        }
        if (total) token = find_draw(logits, V, sampler_draw(s.seed, state->draw, total));
    }
    __syncthreads();                                           // all have read the state
    if (threadIdx.x) return;
    state->token = token;
    state->pos++;
    state->draw++;
}

void cuda_sample_next(DecodeState *state, float *logits, const Sampler *s, int V) {
    Top *top = (Top *)cuda_workspace(PARTS * sizeof *top);
    if (!top) return;
    int parts = (V + 4 * PART_THREADS - 1) / (4 * PART_THREADS);
    if (parts > PARTS) parts = PARTS;
    LAUNCH(top_kernel, (unsigned)parts, PART_THREADS, 0, cuda_stream)(top, logits, V);
    LAUNCH(sample_kernel, 1, THREADS, 0, cuda_stream)(state, logits, top, parts, *s, V);
    CUDA_CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------
// compare_logits: a block a row, in double, three passes over both.
#define COMPARE_THREADS 256
static __device__ double block_sum(double v) {
    __shared__ double part[32];
    for (int bits = 16; bits; bits >>= 1) v += __shfl_xor_sync(FULL_WARP, v, bits);
    __syncthreads();                                           // the last call's parts have been read
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();                                           // parts are complete
    double sum = 0.0;
    for (int w = 0; w < (int)blockDim.x / 32; w++) sum += part[w];
    return sum;
}

static __global__ void __launch_bounds__(COMPARE_THREADS)
compare_kernel(float *kl, int32_t *same, const float *logits, const float *reference, int V) {
    __shared__ Top tops[2][COMPARE_THREADS / 32];
    const float *z[2] = {logits + (size_t)blockIdx.x * V, reference + (size_t)blockIdx.x * V};
    Top top[2];
    // One after the other: two exponentials at once want more registers than their calls leave.
#pragma unroll 1
    for (int k = 0; k < 2; k++) {
        Top t = {-INFINITY, -1};
        for (int i = (int)threadIdx.x; i < V; i += COMPARE_THREADS)
            if (z[k][i] > t.logit) t = {z[k][i], i};
        for (int bits = 16; bits; bits >>= 1)
            t = larger(t, {__shfl_xor_sync(FULL_WARP, t.logit, bits), __shfl_xor_sync(FULL_WARP, t.token, bits)});
        if (threadIdx.x % 32 == 0) tops[k][threadIdx.x / 32] = t;
    }
    __syncthreads();                                           // tops are complete
    for (int k = 0; k < 2; k++) {
        top[k] = tops[k][0];
        for (int w = 1; w < COMPARE_THREADS / 32; w++) top[k] = larger(top[k], tops[k][w]);
    }
    if (threadIdx.x == 0) same[blockIdx.x] = top[0].token == top[1].token;
    if (top[0].token < 0 || top[1].token < 0) {                // in all threads alike
        if (threadIdx.x == 0) kl[blockIdx.x] = NAN;
        return;
    }
    double log_sum[2];
    for (int k = 0; k < 2; k++) {
        double sum = 0.0;
        for (int i = (int)threadIdx.x; i < V; i += COMPARE_THREADS) sum += exp((double)z[k][i] - (double)top[k].logit);
        log_sum[k] = (double)top[k].logit + log(block_sum(sum));
    }
    double sum = 0.0;
    for (int i = (int)threadIdx.x; i < V; i += COMPARE_THREADS) {
        double log_ref = (double)z[1][i] - log_sum[1], p = exp(log_ref);
        if (p > 0.0) sum += p * (log_ref - ((double)z[0][i] - log_sum[0]));
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) kl[blockIdx.x] = sum > 0.0 ? (float)sum : sum <= 0.0 ? 0.0f : NAN;
}

void cuda_compare_logits(float *kl, int32_t *same, const float *logits, const float *reference, size_t n, int V) {
    if (n == 0) return;
    LAUNCH(compare_kernel, (unsigned)n, COMPARE_THREADS, 0, cuda_stream)(kl, same, logits, reference, V);
    CUDA_CHECK(cudaGetLastError());
}
