// How the rows of a tensor are dealt out to ranks: in rank order, in whole units (rows that share a quantization scale),
// as even as can be. Which ranks get a unit more turns with `first`, so that tensors of one unit (norms, tensors with one
// scale) do not all fall to the same rank.
#ifndef QLLM_SPLIT_H
#define QLLM_SPLIT_H
#include "scalar.h"

typedef struct {
    int64_t rows, unit;      // unit divides rows
    int R, first;            // ranks; the first of those that get one unit more
} RowSplit;

// Rows of rank r.
QHD int64_t split_count(const RowSplit *s, int r) {
    int64_t units = s->rows / s->unit, more = units % s->R;
    int turn = r - s->first + (r < s->first ? s->R : 0);
    return s->unit * (units / s->R + (turn < more));
}

// First row of rank r.
QHD int64_t split_begin(const RowSplit *s, int r) {
    int64_t units = s->rows / s->unit, more = units % s->R, before = r - s->first, wrapped = s->first + more - s->R;
    before = before < 0 ? 0 : before < more ? before : more;           // of the ranks first, first + 1, ...
    if (wrapped > 0) before += r < wrapped ? r : wrapped;              // and of those round the corner: 0, 1, ...
    return s->unit * (r * (units / s->R) + before);
}

// Rows of the ranks that have most.
QHD int64_t split_most(const RowSplit *s) {
    int64_t units = s->rows / s->unit;
    return s->unit * ((units + s->R - 1) / s->R);
}
#endif
