// Where the rows of each rank lie, for kernels (split.h, and the windows of ops.h's "between ranks").
#ifndef QLLM_RANKS_CUH
#define QLLM_RANKS_CUH
#include "cuda.cuh"

// A RowSplit and a window, with the divisions done: a thread that asks for its rank's rows pays a few additions. Ranks
// are the grid's y.
struct RankRows {
    int64_t unit, each;         // rows that every rank has
    int64_t k0, kn;
    int R, first, more;         // ranks first, first + 1, ... have a unit more, `more` of them
};

static inline RankRows rank_rows(const RowSplit *s, int64_t k0, int64_t kn) {
    int64_t units = s->rows / s->unit;
    return RankRows{s->unit, s->unit * (units / s->R), k0, kn, s->R, s->first, (int)(units % s->R)};
}

// The most rows that a rank has in the window.
static inline int64_t rank_rows_most(const RowSplit *s, int64_t k0, int64_t kn) {
    int64_t n = split_most(s) - k0;
    return n < 0 ? 0 : n < kn ? n : kn;
}

// How many rows rank r has in the window; *row: the first of them in the tensor.
static __device__ __forceinline__ int64_t rows_of_rank(const RankRows *p, int r, int64_t *row) {
    int turn = r - p->first, before = max(0, min(turn, p->more)), wrapped = p->first + p->more - p->R;
    if (wrapped > 0) before += min(r, wrapped);
    if (turn < 0) turn += p->R;
    *row = r * p->each + before * p->unit + p->k0;
    int64_t n = p->each + (turn < p->more ? p->unit : 0) - p->k0;
    return n < 0 ? 0 : n < p->kn ? n : p->kn;
}
#endif
