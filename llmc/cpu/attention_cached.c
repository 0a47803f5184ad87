// Attention of serving: queries against the cache. Few rows of queries (query heads of a key head, times tokens) take a
// form of their own that reads the cache once, at the speed of memory:
//
//   The keys are cut into pieces of PIECE by their position. A piece is widened to f32, sixteen positions at a time,
//   and gives for each row the largest score m, the sum of e^(score - m) and that sum of values: all f32. Rows join
//   their pieces in ascending order. So the bits depend neither on the threads nor on the other rows, and a long
//   context keeps all threads busy however few heads there are.
//
// Many rows go to attention_forward, which an INT8 cache is widened for, one sequence at a time.
#include "cpu.h"

enum {
    FEW_ROWS = 16,          // most rows of one key head that take the form for few
    PIECE = 256,            // keys of a piece, a multiple of 16
    MIN_VALUES = 1 << 15    // fewer values of keys and values are read by one thread
};

typedef struct {
    const KvCache *cache;
    const floatX *qkv;
    floatX *o;
    int B, T, NH, G, pos;
    int rows, HP, pieces;   // rows of a key head; values of a head padded to whole vectors
    float *part;            // (B, NKV, pieces, rows, HP + 16): values of each row; then its largest score and sum
} Few;

typedef struct {
    float *q;               // (rows, HP), scaled
    float *tile;            // (16, HP) keys or values of sixteen positions; zeros behind HS
    float *score;           // (rows, PIECE)
} FewWork;

static size_t few_work(const Few *a, char *base, FewWork *w) {
    size_t HP = (size_t)a->HP, rows = (size_t)a->rows;
    float *p = (float *)(void *)base;
    w->q = p;
    w->tile = w->q + rows * HP;
    w->score = w->tile + 16 * HP;
    return (rows * HP + 16 * HP + rows * PIECE) * sizeof(float);
}

static int imin(int a, int b) { return a < b ? a : b; }

static float *part_of(const Few *a, int head, int piece, int row) {
    size_t at = ((size_t)head * (size_t)a->pieces + (size_t)piece) * (size_t)a->rows + (size_t)row;
    return a->part + at * (size_t)(a->HP + 16);
}

// The last key that a row sees.
static int last_of(const Few *a, int row) { return a->pos + row / a->G; }

static void scaled_queries(const Few *a, const FewWork *w, int b, int kh) {
    int HS = a->cache->HS, NKV = a->cache->NKV;
    size_t ld = (size_t)(a->NH + 2 * NKV) * (size_t)HS;
    v16 scale = v16_set1(1.0f / sqrtf((float)HS));
    for (int r = 0; r < a->rows; r++) {
        const floatX *q = a->qkv + ((size_t)b * (size_t)a->T + (size_t)(r / a->G)) * ld +
                          (size_t)((kh * a->G + r % a->G) * HS);
        for (int i = 0; i < HS; i += 16)
            v16_store(w->q + (size_t)r * (size_t)a->HP + i, v16_loadx(q + i, imin(16, HS - i)) * scale, 16);
    }
}

// Vectors i of n positions of the cache to f32; which: the head among the keys and values of a position.
VEC void widen_x(float *tile, const floatX *src, size_t width, int n, int HS, int HP) {
    for (int j = 0; j < n; j++, src += width) {
        __builtin_prefetch(src + 16 * width);
        __builtin_prefetch(src + 16 * width + 64 / sizeof *src);
        int i = 0;
        for (; i + 16 <= HS; i += 16) v16_store(tile + j * HP + i, v16_loadx(src + i, 16), 16);
        if (i < HS) v16_store(tile + j * HP + i, v16_loadx(src + i, HS - i), 16);
    }
}
VEC void widen_int8(float *tile, const int8_t *src, const float *scale, size_t width, int heads, int n, int HS,
                    int HP) {
    for (int j = 0; j < n; j++, src += width, scale += heads) {
        __builtin_prefetch(src + 16 * width);
        v16 s = v16_set1(*scale);
        int i = 0;
        for (; i + 16 <= HS; i += 16) v16_store(tile + j * HP + i, v16_roundx(v16_load_i8(src + i, 16) * s), 16);
        if (i < HS) v16_store(tile + j * HP + i, v16_roundx(v16_load_i8(src + i, HS - i) * s), 16);
    }
}
static void widen(const Few *a, float *tile, int b, int which, int first, int n) {
    const KvCache *k = a->cache;
    size_t heads = 2 * (size_t)k->NKV, width = heads * (size_t)k->HS;
    size_t place = (size_t)b * (size_t)k->max_T + (size_t)first, at = place * width + (size_t)(which * k->HS);
    if (k->format == KV_INT8)
        widen_int8(tile, (const int8_t *)k->values + at, k->scale + place * heads + (size_t)which, width, (int)heads, n,
                   k->HS, a->HP);
    else widen_x(tile, (const floatX *)k->values + at, width, n, k->HS, a->HP);
}

// Lane i: the sum of x[i]'s lanes, sixteen vectors at once: halves are added, two vectors to one.
#define FOLD(x, n, L, H) \
    for (int f = 0; f < (n); f++) (x)[f] = __builtin_shuffle((x)[2 * f], (x)[2 * f + 1], (v16i)L) + \
                                           __builtin_shuffle((x)[2 * f], (x)[2 * f + 1], (v16i)H)
#define LANES(...) {__VA_ARGS__}
VEC v16 fold16(v16 x[16]) {
    FOLD(x, 8, LANES(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
         LANES(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
    FOLD(x, 4, LANES(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
         LANES(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
    FOLD(x, 2, LANES(0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29),
         LANES(2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31));
    FOLD(x, 1, LANES(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
         LANES(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
    return x[0];
}
#undef FOLD
#undef LANES

// Scores of a row with the tile's sixteen keys.
static void score_tile(float *score, const float *q, const float *tile, int HP) {
    v16 x[16] = {{0}};
    for (int i = 0; i < HP; i += 16) {
        v16 qi = v16_load(q + i, 16);
        for (int j = 0; j < 16; j++) x[j] = v16_fma(qi, v16_load(tile + j * HP + i, 16), x[j]);
    }
    v16_store(score, fold16(x), 16);
}

// o += sum_j p[j] * tile[j], keys ascending, 64 values of the head at a time.
VEC void add_values(float *o, const float *p, const float *tile, int n, int HP, int vectors) {
    v16 sum[4];
    for (int i = 0; i < vectors; i++) sum[i] = v16_load(o + 16 * i, 16);
    for (int j = 0; j < n; j++) {
        v16 pj = v16_set1(p[j]);
        for (int i = 0; i < vectors; i++) sum[i] = v16_fma(pj, v16_load(tile + j * HP + 16 * i, 16), sum[i]);
    }
    for (int i = 0; i < vectors; i++) v16_store(o + 16 * i, sum[i], 16);
}
static void add_tile(float *o, const float *p, const float *tile, int n, int HP) {
    int i = 0;
    for (; i + 64 <= HP; i += 64) add_values(o + i, p, tile + i, n, HP, 4);
    for (; i < HP; i += 16) add_values(o + i, p, tile + i, n, HP, 1);
}

// Scores of n keys to weights: the largest to part[0], their sum to part[1]. score has room for whole vectors.
static void weights(float *score, int n, float *part) {
    v16 m = v16_set1(-INFINITY), sum = {0};
    for (int i = n; i & 15; i++) score[i] = -INFINITY;
    for (int i = 0; i < n; i += 16) m = v16_max(m, v16_load(score + i, 16));
    part[0] = v16_hmax(m);
    m = v16_set1(part[0]);
    for (int i = 0; i < n; i += 16) {
        v16 p = v16_exp(v16_load(score + i, 16) - m);
        sum += p;
        v16_store(score + i, p, 16);
    }
    part[1] = v16_sum(sum);
}

static void few_piece(const Few *a, const FewWork *w, int head, int piece) {
    int NKV = a->cache->NKV, b = head / NKV, kh = head % NKV, HP = a->HP;
    int first = piece * PIECE, keys = imin(PIECE, a->pos + a->T - first);
    scaled_queries(a, w, b, kh);
    for (int k = 0; k < keys; k += 16) {
        int n = imin(16, keys - k);
        widen(a, w->tile, b, kh, first + k, n);
        for (int r = 0; r < a->rows; r++)
            score_tile(w->score + r * PIECE + k, w->q + (size_t)r * (size_t)HP, w->tile, HP);
    }
    for (int r = 0; r < a->rows; r++) {
        float *part = part_of(a, head, piece, r);
        int seen = imin(keys, last_of(a, r) - first + 1);
        memset(part, 0, (size_t)HP * sizeof *part);
        if (seen > 0) weights(w->score + r * PIECE, seen, part + HP);
    }
    for (int k = 0; k < keys; k += 16) {
        int n = imin(16, keys - k);
        widen(a, w->tile, b, NKV + kh, first + k, n);
        for (int r = 0; r < a->rows; r++) {
            int seen = imin(n, last_of(a, r) - first - k + 1);
            if (seen > 0) add_tile(part_of(a, head, piece, r), w->score + r * PIECE + k, w->tile, seen, HP);
        }
    }
}

static void join_pieces(const Few *a, int head, int r) {
    int HS = a->cache->HS, NKV = a->cache->NKV, HP = a->HP, pieces = last_of(a, r) / PIECE + 1;
    float m = -INFINITY, sum = 0.0f;
    for (int p = 0; p < pieces; p++) m = fmaxf(m, part_of(a, head, p, r)[HP]);
    for (int p = 0; p < pieces; p++) {
        float *part = part_of(a, head, p, r);
        part[HP] = exp_f32(part[HP] - m);
        sum = fmaf(part[HP + 1], part[HP], sum);
    }
    floatX *o = a->o + (((size_t)(head / NKV) * (size_t)a->T + (size_t)(r / a->G)) * (size_t)a->NH +
                        (size_t)(head % NKV * a->G + r % a->G)) * (size_t)HS;
    for (int i = 0; i < HS; i += 16) {
        v16 v = {0};
        for (int p = 0; p < pieces; p++) {
            const float *part = part_of(a, head, p, r);
            v = v16_fma(v16_load(part + i, 16), v16_set1(part[HP]), v);
        }
        v16_storex(o + i, v / v16_set1(sum), imin(16, HS - i));
    }
}

static void attend_few(Few *a) {
    int heads = a->B * a->cache->NKV, tasks = heads * a->pieces;
    FewWork unused;
    size_t parts = (size_t)tasks * (size_t)a->rows * (size_t)(a->HP + 16) * sizeof(float);
    size_t work = (few_work(a, NULL, &unused) + 63) & ~(size_t)63;
    char *scratch = cpu_workspace(parts + (size_t)cpu_max_threads() * work);
    if (!scratch) return;
    a->part = (float *)(void *)scratch;
#pragma omp parallel if (tasks > 1 && 2 * (size_t)heads * (size_t)(a->pos + a->T) * (size_t)a->cache->HS >= MIN_VALUES)
    {
        FewWork w;
        few_work(a, scratch + parts + (size_t)cpu_thread() * work, &w);
#pragma omp for schedule(static)
        for (int i = 0; i < tasks; i++) few_piece(a, &w, i % heads, i / heads);
#pragma omp for schedule(static) nowait
        for (int i = 0; i < heads * a->rows; i++) join_pieces(a, i / a->rows, i % a->rows);
    }
}

// ---------------------------------------------------------------------------------------------
// Many rows.

// The first n positions of sequence b as X.
static void widen_sequence(floatX *wide, const KvCache *k, int b, int n) {
    size_t heads = 2 * (size_t)k->NKV, HS = (size_t)k->HS, width = heads * HS;
    const int8_t *codes = (const int8_t *)k->values + (size_t)b * (size_t)k->max_T * width;
    const float *scale = k->scale + (size_t)b * (size_t)k->max_T * heads;
#pragma omp parallel for schedule(static) if ((size_t)n * width >= CPU_MIN_PARALLEL)
    for (size_t h = 0; h < (size_t)n * heads; h++) {
        v16 s = v16_set1(scale[h]);
        for (size_t i = 0; i < HS; i += 16) {
            int left = HS - i < 16 ? (int)(HS - i) : 16;
            v16_storex(wide + h * HS + i, v16_load_i8(codes + h * HS + i, left) * s, left);
        }
    }
}

static void attend_many(floatX *o, const floatX *qkv, const KvCache *cache, int pos, int B, int T, int NH) {
    int HS = cache->HS, NKV = cache->NKV, ld = (NH + 2 * NKV) * HS, ldkv = 2 * NKV * HS, Tk = pos + T;
    size_t width = (size_t)ldkv;
    if (cache->format == KV_X) {
        const floatX *kv = cache->values;
        cpu_attention_forward(o, NULL, qkv, kv, kv + NKV * HS, B, T, Tk, NH, NKV, HS, NH * HS, ld, ldkv,
                              (size_t)cache->max_T * width);
        return;
    }
    floatX *wide = cpu_workspace_outer((size_t)Tk * width * sizeof *wide);
    for (int b = 0; wide && b < B; b++) {
        size_t n0 = (size_t)b * (size_t)T;
        widen_sequence(wide, cache, b, Tk);
        cpu_attention_forward(o + n0 * (size_t)(NH * HS), NULL, qkv + n0 * (size_t)ld, wide, wide + NKV * HS, 1, T, Tk,
                              NH, NKV, HS, NH * HS, ld, ldkv, 0);
    }
}

void cpu_attention_cached(floatX *o, const floatX *qkv, const KvCache *cache, const int32_t *pos, int B, int T,
                          int NH) {
    Few a = {.cache = cache, .qkv = qkv, .o = o, .B = B, .T = T, .NH = NH, .G = NH / cache->NKV, .pos = *pos};
    if (T > FEW_ROWS / a.G && T > 1) {
        attend_many(o, qkv, cache, *pos, B, T, NH);
        return;
    }
    a.rows = T * a.G;
    a.HP = (cache->HS + 15) & ~15;
    a.pieces = (a.pos + T + PIECE - 1) / PIECE;
    attend_few(&a);
}
