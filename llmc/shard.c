#include "shard.h"
#include <stdlib.h>

// ---------------------------------------------------------------------------------------------
// Whose rows are whose

int own_table_build(OwnTable *o, const ParamTable *table, int R, int rank, bool replicated, Err *err) {
    *o = (OwnTable){.table = table, .R = R, .rank = rank, .replicated = replicated};
    o->row0 = xcalloc((size_t)table->n, sizeof *o->row0);
    o->split = xcalloc((size_t)table->n, sizeof *o->split);
    o->own = *table;
    o->own.p = xcalloc((size_t)table->n, sizeof *o->own.p);
    o->own.n_elements = o->own.n_rows = o->own.n_params = 0;
    for (int i = 0; i < table->n; i++) {
        Param *p = &o->own.p[i];
        *p = table->p[i];
        // A block of the embedding, the tied head among its views, and of anything else stays on one rank.
        int64_t block[2] = {1, 1};
        if (p->scheme.weight.bits) {
            int rc = quant_block_shape(&p->scheme.weight, p->rows, p->cols, block, err);
            if (rc < 0) { own_table_free(o); return rc; }
        }
        o->split[i] = (RowSplit){.rows = p->rows, .unit = block[0], .R = R, .first = i % R};
        if (!replicated) {
            o->row0[i] = split_begin(&o->split[i], rank);
            p->rows = split_count(&o->split[i], rank);
        }
        p->offset = o->own.n_elements;
        p->row_offset = o->own.n_rows;
        if (replicated) p->offset = table->p[i].offset;
        size_t size = (size_t)p->rows * (size_t)p->cols;
        o->own.n_params += size;
        o->own.n_elements = replicated ? table->n_elements : o->own.n_elements + ((size + 15) & ~(size_t)15);
        o->own.n_rows += (size_t)p->rows;
    }
    return 0;
}

void own_table_free(OwnTable *o) {
    free(o->own.p);
    free(o->row0);
    free(o->split);
    *o = (OwnTable){0};
}
