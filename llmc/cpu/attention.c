// Causal grouped-query attention, forward and backward, in tiles (the online softmax of FlashAttention, Dao et al.
// 2022, and the backward of FlashAttention-2, Dao 2023). Nothing of size [T, T] is ever in memory.
//
// The query heads that share a key head are treated as more rows: a block of queries is QT positions times G heads, so
// that one packed tile of keys serves all of them and K, V are never replicated.
//
//   row r of a block  =  position r / G, head r % G          (G = 3: p0h0 p0h1 p0h2 p1h0 p1h1 ...)
//
// Keys come in tiles of KT that start at multiples of KT. A row's result is made from the same tiles by the same
// operations wherever the row stands in its block: keys it may not see enter with weight exactly 0, and a tile that it
// sees nothing of would multiply its sums by exactly 1. So the bits depend neither on T nor on B.
//
// Arithmetic: products by tile.h (bf16 operands or f32, f32 sums). With bf16 units the weights p and the score
// gradients are rounded to bf16 before they are multiplied on; row sums of p, the softmax and all accumulators are
// f32.
#include "cpu/cpu.h"
#include "cpu/tile.h"
#include <sched.h>
#include <stdatomic.h>

#define KT 64                   // keys in a tile
#define QROWS 64                // rows of a block of queries, about

typedef struct {
    int B, T, Tk, NH, NKV, HS;
    int G;                      // query heads of a key head
    int QT;                     // positions of a block
    int R;                      // rows of a block, padded for tile_product
    int HU, HP;                 // units of a head along its values; values of a head padded to whole vectors
    int blocks, tiles;          // of T and of Tk
    float scale;
} Shape;

static Shape make_shape(int B, int T, int Tk, int NH, int NKV, int HS) {
    Shape s = {.B = B, .T = T, .Tk = Tk, .NH = NH, .NKV = NKV, .HS = HS, .G = NH / NKV};
    s.QT = QROWS / s.G > 1 ? QROWS / s.G : 1;
    s.R = tile_pad_rows(s.QT * s.G);
    s.HU = HS / UNIT;
    s.HP = (HS + 15) & ~15;
    s.blocks = (T + s.QT - 1) / s.QT;
    s.tiles = (Tk + KT - 1) / KT;
    s.scale = 1.0f / sqrtf((float)HS);
    return s;
}

static int imin(int a, int b) { return a < b ? a : b; }

// Cuts pieces out of one allocation; every piece starts on a cache line.
static void *take(char **p, size_t bytes) {
    void *q = *p;
    *p += (bytes + 63) & ~(size_t)63;
    return q;
}

// Lanes whose key lies behind the row's last one get `x`.
VEC v16 mask_keys(v16 v, int key, int last, float x) {
    const v16i lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    v16i keep = lane + key <= last - (v16i){0};
    return (v16)(((v16i)v & keep) | ((v16i)v16_set1(x) & ~keep));
}

// One tile's keys for scores (units along the head, one key a column) and values for sums (units across keys).
static void pack_keys(const Shape *s, unit_t *kp, unit_t *vp, const floatX *k, const floatX *v, size_t ld, int tile) {
    int first = tile * KT, n = imin(KT, s->Tk - first);
    if (kp) pack_along_columns(kp, KT, k + (size_t)first * ld, ld, n, KT, s->HS);
    for (int i = 0; i < KT; i += UNIT) {
        unit_t *dst = vp + (size_t)(i / UNIT) * (size_t)s->HP;
        const floatX *row = v + (size_t)(first + i) * ld;
        if (i < n) pack_across(dst, row, i + 1 < n ? row + ld : NULL, s->HS, s->HP);
        else memset(dst, 0, (size_t)s->HP * sizeof *dst);
    }
}

// Rows of a block of queries as they are multiplied with keys; rows behind the last are zero.
static int gather_rows(const Shape *s, unit_t *dst, const floatX *x, size_t ld, int t0) {
    int rows = imin(s->QT, s->T - t0) * s->G, padded = tile_pad_rows(rows);
    for (int r = 0; r < rows; r++)
        pack_along(dst + (size_t)r * (size_t)s->HU, x + (size_t)(t0 + r / s->G) * ld + (size_t)(r % s->G * s->HS),
                   s->HS);
    memset(dst + (size_t)rows * (size_t)s->HU, 0, (size_t)(padded - rows) * (size_t)s->HU * sizeof *dst);
    return rows;
}

// ---------------------------------------------------------------------------------------------
// Forward.

typedef struct {
    unit_t *q, *k, *v;          // (R, HU), (HU, KT), (KT / UNIT, HP)
    unit_t *p;                  // (R, KT / UNIT)
    float *score;               // (R, KT)
    float *o;                   // (R, HP) sum of p v so far
    float *sum;                 // (R, 16) sum of p so far, by lane
    float *max, *decay;         // (R) largest score so far, scaled; factor of what was summed before the last tile
} ForwardWork;

static size_t forward_work(const Shape *s, char *base, ForwardWork *w) {
    char *p = base;
    size_t R = (size_t)s->R, HU = (size_t)s->HU, HP = (size_t)s->HP;
    w->q = take(&p, R * HU * sizeof(unit_t));
    w->k = take(&p, HU * KT * sizeof(unit_t));
    w->v = take(&p, KT / UNIT * HP * sizeof(unit_t));
    w->p = take(&p, R * (KT / UNIT) * sizeof(unit_t));
    w->score = take(&p, R * KT * sizeof(float));
    w->o = take(&p, R * HP * sizeof(float));
    w->sum = take(&p, R * 16 * sizeof(float));
    w->max = take(&p, R * sizeof(float));
    w->decay = take(&p, R * sizeof(float));
    return (size_t)(p - base);
}

// Scores of `rows` rows with `n` keys to weights against the new maximum; decay[r] is what the sums so far have to be
// multiplied with. pos0: position of the block's first row.
static void softmax_step(const Shape *s, ForwardWork *w, int rows, int n, int first_key, int pos0) {
    for (int r = 0; r < rows; r++) {
        int last = pos0 + r / s->G;
        float *row = w->score + r * KT;
        v16 m = v16_set1(-INFINITY);
        for (int i = 0; i < n; i += 16) {
            v16 x = v16_load(row + i, 16) * v16_set1(s->scale);
            if (first_key + i + 15 > last) x = mask_keys(x, first_key + i, last, -INFINITY);
            v16_store(row + i, x, 16);
            m = v16_max(m, x);
        }
        float top = v16_hmax(m), old = w->max[r];
        w->max[r] = top > old ? top : old;
        w->decay[r] = old - w->max[r];
    }
    for (int r = 0; r < rows; r += 16) {
        int left = imin(16, rows - r);
        v16_store(w->decay + r, v16_exp(v16_load(w->decay + r, left)), left);
    }
    for (int r = 0; r < rows; r++) {
        float *row = w->score + r * KT;
        v16 m = v16_set1(w->max[r]), total = v16_set1(0.0f);
        for (int i = 0; i < n; i += 16) {
            v16 p = v16_exp(v16_load(row + i, 16) - m);
            total += p;
            v16_store(row + i, p, 16);
        }
        float *sum = w->sum + (size_t)r * 16;
        v16_store(sum, v16_load(sum, 16) * v16_set1(w->decay[r]) + total, 16);
        pack_along_f32(w->p + (size_t)r * (KT / UNIT), row, (n + 31) & ~31);
    }
}

// Block `block` of head kh in batch b. kv: packed tiles of that head, or NULL: packed here as they come.
static void forward_block(const Shape *s, ForwardWork *w, floatX *o, float *lse, const floatX *q, const floatX *k,
                          const floatX *v, const unit_t *kv, int b, int kh, int block, int ldo, int ldq, int ldkv) {
    int t0 = block * s->QT, head0 = kh * s->G, pos0 = s->Tk - s->T + t0;
    size_t ktile = (size_t)s->HU * KT, vtile = (size_t)(KT / UNIT) * (size_t)s->HP;
    int rows = gather_rows(s, w->q, q + (size_t)b * (size_t)s->T * (size_t)ldq + (size_t)(head0 * s->HS), (size_t)ldq,
                           t0);
    int padded = tile_pad_rows(rows);
    memset(w->o, 0, (size_t)padded * (size_t)s->HP * sizeof *w->o);
    memset(w->sum, 0, (size_t)padded * 16 * sizeof *w->sum);
    for (int r = 0; r < padded; r++) w->max[r] = -INFINITY;
    int last_pos = pos0 + (rows - 1) / s->G;
    for (int tile = 0; tile * KT <= last_pos; tile++) {
        const unit_t *kt = kv ? kv + (size_t)tile * (ktile + vtile) : w->k, *vt = kv ? kt + ktile : w->v;
        if (!kv) pack_keys(s, w->k, w->v, k, v, (size_t)ldkv, tile);
        int n = imin(KT, (last_pos - tile * KT + 16) & ~15);    // keys that any of the rows sees
        tile_product(w->score, KT, w->q, (size_t)s->HU, 1, kt, KT, padded, n, s->HU, TILE_SET, NULL);
        softmax_step(s, w, padded, n, tile * KT, pos0);
        tile_product(w->o, (size_t)s->HP, w->p, KT / UNIT, 1, vt, (size_t)s->HP, padded, s->HP, n / UNIT,
                     TILE_SCALE_ADD, w->decay);
    }
    for (int r = 0; r < rows; r++) {
        int t = t0 + r / s->G, h = head0 + r % s->G;
        float sum = v16_sum(v16_load(w->sum + (size_t)r * 16, 16));
        if (lse) lse[((size_t)b * (size_t)s->NH + (size_t)h) * (size_t)s->T + (size_t)t] = w->max[r] + logf(sum);
        floatX *out = o + ((size_t)b * (size_t)s->T + (size_t)t) * (size_t)ldo + (size_t)(h * s->HS);
        for (int i = 0; i < s->HS; i += 16)
            v16_storex(out + i, v16_load(w->o + (size_t)r * (size_t)s->HP + i, 16) / v16_set1(sum),
                       imin(16, s->HS - i));
    }
}

void cpu_attention_forward(floatX *o, float *lse, const floatX *q, const floatX *k, const floatX *v, int B, int T,
                           int Tk, int NH, int NKV, int HS, int ldo, int ldq, int ldkv, size_t skv) {
    Shape s = make_shape(B, T, Tk, NH, NKV, HS);
    ForwardWork unused;
    size_t work = forward_work(&s, NULL, &unused), tile = (size_t)s.HU * KT + (size_t)(KT / UNIT) * (size_t)s.HP;
    // One block (a token generated after a cache): each tile is read once, so it is packed where it is used.
    bool pack = s.blocks > 1;
    size_t packed = pack ? (size_t)B * (size_t)NKV * (size_t)s.tiles * tile * sizeof(unit_t) : 0;
    char *scratch = cpu_workspace(packed + (size_t)cpu_max_threads() * work);
    if (!scratch) return;
    unit_t *kv = (unit_t *)(void *)scratch;
    size_t heads = (size_t)B * (size_t)NKV;
#pragma omp parallel
    {
        ForwardWork w;
        forward_work(&s, scratch + packed + (size_t)cpu_thread() * work, &w);
        if (pack) {
#pragma omp for schedule(static)
            for (size_t i = 0; i < heads * (size_t)s.tiles; i++) {
                size_t u = i / (size_t)s.tiles, at = u / (size_t)NKV * skv + u % (size_t)NKV * (size_t)HS;
                unit_t *dst = kv + i * tile;
                pack_keys(&s, dst, dst + (size_t)s.HU * KT, k + at, v + at, (size_t)ldkv, (int)(i % (size_t)s.tiles));
            }
        }
        // Long blocks (late ones) first, so that the threads end together.
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < heads * (size_t)s.blocks; i++) {
            size_t u = i % heads, at = u / (size_t)NKV * skv + u % (size_t)NKV * (size_t)HS;
            int block = s.blocks - 1 - (int)(i / heads);
            forward_block(&s, &w, o, lse, q, k + at, v + at, pack ? kv + u * (size_t)s.tiles * tile : NULL,
                          (int)(u / (size_t)NKV), (int)(u % (size_t)NKV), block, ldo, ldq, ldkv);
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Backward. With p = exp(score - lse) and D = sum(do * o):
//   dv = p^T do,  ds = p * (do v^T - D),  dk = ds^T q,  dq = ds k      the last two times the scale of the scores
//
// A task is a tile of keys of one key head: it walks the blocks of queries that see it, sums dk and dv in its own
// memory and adds to the blocks' dq. The tiles of a head come to a block in ascending order, the first one preparing
// it: each waits until the one before has done that block, so the sum does not depend on the threads. Tasks are
// handed out with ascending tiles, the heads side by side, so that a task waits for one that began before it (no
// deadlock: the first of the running tasks never waits), and seldom. As many heads as threads are under way at a
// time: their blocks then stay in the caches.

typedef struct {
    unit_t *q, *dout;           // (R, HU) rows, for scores and for dp
    unit_t *qx, *doutx;         // (R / UNIT, HP) across rows, for dk and dv
    float *lse, *dot;           // (R) log-sum-exp, D
    float *dq;                  // (R, HP)
} Block;

typedef struct {
    unit_t *k, *v, *kx;         // (HU, KT), (HU, KT), (KT / UNIT, HP)
    unit_t *px, *dsx;           // (R / UNIT, KT) across rows
    unit_t *ds;                 // (R, KT / UNIT) along keys
    float *score, *dp;          // (R, KT)
    float *dk, *dv;             // (KT, HP)
} BackwardWork;

static size_t make_block(const Shape *s, char *base, Block *w) {
    char *p = base;
    size_t R = (size_t)s->R, HU = (size_t)s->HU, HP = (size_t)s->HP;
    w->q = take(&p, R * HU * sizeof(unit_t));
    w->dout = take(&p, R * HU * sizeof(unit_t));
    w->qx = take(&p, R / UNIT * HP * sizeof(unit_t));
    w->doutx = take(&p, R / UNIT * HP * sizeof(unit_t));
    w->lse = take(&p, R * sizeof(float));
    w->dot = take(&p, R * sizeof(float));
    w->dq = take(&p, R * HP * sizeof(float));
    return (size_t)(p - base);
}

static size_t backward_work(const Shape *s, char *base, BackwardWork *w) {
    char *p = base;
    size_t R = (size_t)s->R, HU = (size_t)s->HU, HP = (size_t)s->HP;
    w->k = take(&p, HU * KT * sizeof(unit_t));
    w->v = take(&p, HU * KT * sizeof(unit_t));
    w->kx = take(&p, KT / UNIT * HP * sizeof(unit_t));
    w->px = take(&p, R / UNIT * KT * sizeof(unit_t));
    w->dsx = take(&p, R / UNIT * KT * sizeof(unit_t));
    w->ds = take(&p, R * (KT / UNIT) * sizeof(unit_t));
    w->score = take(&p, R * KT * sizeof(float));
    w->dp = take(&p, R * KT * sizeof(float));
    w->dk = take(&p, KT * HP * sizeof(float));
    w->dv = take(&p, KT * HP * sizeof(float));
    return (size_t)(p - base);
}

typedef struct {
    Shape s;
    floatX *dqkv;
    const floatX *dout, *qkv, *o;
    const float *lse;
    size_t ld, ldo;
} Backward;

// Everything a block of queries brings to its tiles of keys.
static void prepare_block(const Backward *a, const Block *w, int b, int kh, int block) {
    const Shape *s = &a->s;
    int t0 = block * s->QT;
    size_t n0 = (size_t)b * (size_t)s->T, head = (size_t)(kh * s->G * s->HS), HP = (size_t)s->HP;
    const floatX *q = a->qkv + n0 * a->ld + head, *dout = a->dout + n0 * a->ldo + head, *o = a->o + n0 * a->ldo + head;
    int rows = gather_rows(s, w->q, q, a->ld, t0), padded = tile_pad_rows(rows);
    gather_rows(s, w->dout, dout, a->ldo, t0);
    for (int r = 0; r < padded; r += UNIT) {
        const floatX *q1 = NULL, *d1 = NULL;
        if (r + 1 < rows) {
            size_t t = (size_t)(t0 + (r + 1) / s->G), h = (size_t)((r + 1) % s->G * s->HS);
            q1 = q + t * a->ld + h;
            d1 = dout + t * a->ldo + h;
        }
        unit_t *qx = w->qx + (size_t)(r / UNIT) * HP, *dx = w->doutx + (size_t)(r / UNIT) * HP;
        size_t t = (size_t)(t0 + r / s->G), h = (size_t)(r % s->G * s->HS);
        int n = r < rows ? s->HS : 0;
        pack_across(qx, q + (n ? t * a->ld + h : 0), q1, n, s->HP);
        pack_across(dx, dout + (n ? t * a->ldo + h : 0), d1, n, s->HP);
    }
    for (int r = 0; r < padded; r++) {
        w->lse[r] = INFINITY;                           // rows behind the last: p = 0
        w->dot[r] = 0.0f;
        if (r >= rows) continue;
        size_t t = (size_t)(t0 + r / s->G), h = (size_t)(kh * s->G + r % s->G);
        size_t at = t * a->ldo + (size_t)(r % s->G * s->HS);
        v16 sum = v16_set1(0.0f);
        for (int i = 0; i < s->HS; i += 16) {
            int n = imin(16, s->HS - i);
            sum = v16_fma(v16_loadx(dout + at + i, n), v16_loadx(o + at + i, n), sum);
        }
        w->dot[r] = v16_sum(sum);
        w->lse[r] = a->lse[((size_t)b * (size_t)s->NH + h) * (size_t)s->T + t];
    }
}

// p and ds of one block against the tile, in the layouts that the three sums read. n: keys looked at, 16 or more.
static void weights_of_block(const Shape *s, const BackwardWork *w, const Block *q, int rows, int n, int first_key,
                             int t0) {
    tile_product(w->score, KT, q->q, (size_t)s->HU, 1, w->k, KT, rows, n, s->HU, TILE_SET, NULL);
    tile_product(w->dp, KT, q->dout, (size_t)s->HU, 1, w->v, KT, rows, n, s->HU, TILE_SET, NULL);
    for (int r = 0; r < rows; r += 2) {                 // rows come in pairs: see pack_across_f32
        float *score = w->score + r * KT, *dp = w->dp + r * KT;
        int last[2] = {t0 + r / s->G, t0 + (r + 1) / s->G};
        unit_t *px = w->px + (size_t)(r / UNIT) * KT, *dsx = w->dsx + (size_t)(r / UNIT) * KT;
        for (int j = 0; j < n; j += 16) {
            v16 p[2], ds[2];
            for (int z = 0; z < 2; z++) {
                v16 x = v16_load(score + z * KT + j, 16);
                x = v16_exp(v16_fma(x, v16_set1(s->scale), v16_set1(-q->lse[r + z])));
                if (first_key + j + 15 > last[z]) x = mask_keys(x, first_key + j, last[z], 0.0f);
                p[z] = x;
                ds[z] = x * (v16_load(dp + z * KT + j, 16) - v16_set1(q->dot[r + z]));
                v16_store(dp + z * KT + j, ds[z], 16);
            }
            pack_across_f32(px + j, KT, p[0], p[1]);
            pack_across_f32(dsx + j, KT, ds[0], ds[1]);
        }
        // n may end in the middle of what pack_along_f32 takes at once: what is behind is not read.
        pack_along_f32(w->ds + (size_t)r * (KT / UNIT), dp, (n + 31) & ~31);
        pack_along_f32(w->ds + (size_t)(r + 1) * (KT / UNIT), dp + KT, (n + 31) & ~31);
    }
}

static void write_grad(floatX *dst, const float *src, int HS, float scale) {
    for (int i = 0; i < HS; i += 16) v16_storex(dst + i, v16_load(src + i, 16) * v16_set1(scale), imin(16, HS - i));
}

static void write_dq(const Backward *a, const Block *q, int b, int kh, int block) {
    const Shape *s = &a->s;
    int t0 = block * s->QT, rows = imin(s->QT, s->T - t0) * s->G;
    for (int r = 0; r < rows; r++) {
        size_t n = (size_t)b * (size_t)s->T + (size_t)(t0 + r / s->G);
        write_grad(a->dqkv + n * a->ld + (size_t)((kh * s->G + r % s->G) * s->HS), q->dq + (size_t)r * (size_t)s->HP,
                   s->HS, s->scale);
    }
}

static void wait_for(const atomic_int *done, int block) {
    for (int spin = 0; atomic_load_explicit(done, memory_order_acquire) <= block; spin++)
        if (spin > 1000) sched_yield();                 // more threads than cores: let the other one work
}

// One tile of keys. done: of this key head, blocks whose dq each tile has added to.
static void backward_tile(const Backward *a, const BackwardWork *w, char *blocks, size_t block_bytes, atomic_int *done,
                          int b, int kh, int tile) {
    const Shape *s = &a->s;
    int first_key = tile * KT, keys = imin(KT, s->T - first_key);
    size_t n0 = (size_t)b * (size_t)s->T, HP = (size_t)s->HP, first = n0 + (size_t)first_key;
    size_t at_k = (size_t)((s->NH + kh) * s->HS), at_v = at_k + (size_t)(s->NKV * s->HS);
    const floatX *k = a->qkv + n0 * a->ld + at_k, *v = a->qkv + n0 * a->ld + at_v;
    pack_keys(s, w->k, w->kx, k, k, a->ld, tile);
    pack_along_columns(w->v, KT, v + (size_t)first_key * a->ld, a->ld, keys, KT, s->HS);
    memset(w->dk, 0, KT * HP * sizeof *w->dk);
    memset(w->dv, 0, KT * HP * sizeof *w->dv);
    for (int block = first_key / s->QT; block < s->blocks; block++) {
        Block q;
        make_block(s, blocks + (size_t)block * block_bytes, &q);
        int t0 = block * s->QT, count = imin(s->QT, s->T - t0), rows = tile_pad_rows(count * s->G);
        int n = imin(KT, (t0 + count - first_key + 15) & ~15);          // keys the block sees of this tile
        if (tile == 0) prepare_block(a, &q, b, kh, block);
        else wait_for(&done[tile - 1], block);
        weights_of_block(s, w, &q, rows, n, first_key, t0);
        tile_product(w->dv, HP, w->px, 1, KT, q.doutx, HP, n, s->HP, rows / UNIT, TILE_ADD, NULL);
        tile_product(w->dk, HP, w->dsx, 1, KT, q.qx, HP, n, s->HP, rows / UNIT, TILE_ADD, NULL);
        tile_product(q.dq, HP, w->ds, KT / UNIT, 1, w->kx, HP, rows, s->HP, n / UNIT, tile ? TILE_ADD : TILE_SET, NULL);
        if (t0 + count <= first_key + KT) write_dq(a, &q, b, kh, block);
        atomic_store_explicit(&done[tile], block + 1, memory_order_release);
    }
    for (int i = 0; i < keys; i++) {
        floatX *dst = a->dqkv + (first + (size_t)i) * a->ld;
        write_grad(dst + at_k, w->dk + (size_t)i * HP, s->HS, s->scale);
        write_grad(dst + at_v, w->dv + (size_t)i * HP, s->HS, 1.0f);
    }
}

void cpu_attention_backward(floatX *dqkv, const floatX *dout, const floatX *qkv, const floatX *o, const float *lse,
                            int B, int T, int NH, int NKV, int HS) {
    Backward a = {.s = make_shape(B, T, T, NH, NKV, HS), .dqkv = dqkv, .dout = dout, .qkv = qkv, .o = o, .lse = lse,
                  .ld = (size_t)(NH + 2 * NKV) * (size_t)HS, .ldo = (size_t)NH * (size_t)HS};
    const Shape *s = &a.s;
    Block unused_block;
    BackwardWork unused_work;
    size_t block_bytes = make_block(s, NULL, &unused_block), work_bytes = backward_work(s, NULL, &unused_work);
    size_t heads = (size_t)B * (size_t)NKV, blocks = (size_t)s->blocks, tiles = (size_t)s->tiles;
    size_t done_bytes = (heads * tiles * sizeof(atomic_int) + 63) & ~(size_t)63;
    // Heads under way together, and twice as many places for their blocks: a head waits for the one that had its place.
    size_t together = (size_t)cpu_max_threads(), slots = heads < 2 * together ? heads : 2 * together;
    char *scratch = cpu_workspace(done_bytes + slots * blocks * block_bytes + (size_t)cpu_max_threads() * work_bytes);
    if (!scratch) return;
    atomic_int *done = (atomic_int *)(void *)scratch;
    char *first_block = scratch + done_bytes;
    for (size_t i = 0; i < heads * tiles; i++) atomic_init(&done[i], 0);
    atomic_size_t next = 0;
#pragma omp parallel
    {
        BackwardWork w;
        backward_work(s, first_block + slots * blocks * block_bytes + (size_t)cpu_thread() * work_bytes, &w);
        for (size_t i; (i = atomic_fetch_add(&next, 1)) < heads * tiles;) {
            size_t first = i / (together * tiles) * together, n = heads - first < together ? heads - first : together;
            size_t j = i - first * tiles, u = first + j % n;
            if (j < n && u >= slots) wait_for(&done[(u - slots + 1) * tiles - 1], s->blocks - 1);
            backward_tile(&a, &w, first_block + u % slots * blocks * block_bytes, block_bytes, done + u * tiles,
                          (int)(u / (size_t)NKV), (int)(u % (size_t)NKV), (int)(j / n));
        }
    }
}
