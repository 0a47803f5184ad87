// Writes a model of random weights (those that --init begins with) and no tokenizer, for benchmarks of serving:
// random_model FILE SHAPE. SHAPE is one that --init knows; its head is as that says.
#include <stdlib.h>
#include "checkpoint.h"

// Rows of a tensor that was made once: random numbers cost more than writing them. Large tensors repeat a piece.
#define PIECE ((size_t)1 << 20)
typedef struct { float *values; const LlamaConfig *c; } Source;

static int rows(void *ctx, const Param *p, int64_t row0, int64_t n, float *out, Err *err) {
    (void)err;
    const Source *s = ctx;
    size_t count = (size_t)n * (size_t)p->cols, first = (size_t)row0 * (size_t)p->cols;
    if (param_is_norm(p)) param_init_random(out, p, s->c, 1, first, count);
    else for (size_t i = 0; i < count; i++) out[i] = s->values[(first + i) % PIECE];
    return 0;
}

int main(int argc, char **argv) {
    program_name = "random_model";
    Err err = {0};
    LlamaConfig c;
    QuantPlan plan;
    ParamTable table;
    quant_plan_none(&plan);
    if (argc != 3) {
        err_set(&err, E_USAGE, "usage: random_model FILE SHAPE (135M, 1B, ...)");
        die(&err);
    }
    if (llama_config_named(&c, argv[2], &err) < 0 || param_table_build(&table, &c, &plan, &err) < 0) die(&err);
    Source s = {.values = xmalloc(PIECE * sizeof(float)), .c = &c};
    param_init_random(s.values, param_get(&table, 0, ROLE_DOWN), &c, 1, 0, PIECE);
    if (model_write_bin(argv[1], &c, &plan, &table, NULL, DT_BF16, rows, &s, &err) < 0) die(&err);
    param_table_free(&table);
    free(s.values);
    return 0;
}
