// Writes a model.bin of a named shape with random weights in bf16, so that benchmarks of quantize, generate and eval need
// no download: random_model SHAPE FILE. Weights are sums of four uniform numbers, of deviation 0.02: near enough to
// normal ones for scales and codes, and fast to make. There is no tokenizer in it.
#include "checkpoint.h"
#include "rng.h"

static int rows(void *ctx, const Param *p, int64_t row0, int64_t n, float *out, Err *err) {
    (void)ctx, (void)err;
    const float step = 0.02f / 37837.0f;                 // deviation of a sum of four 16-bit numbers
    const uint64_t stream = (uint64_t)p->role + (uint64_t)(p->layer + 1) * ROLE_COUNT;
    #pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n * p->cols; i += 2) {
        Philox r = philox(11, stream, (uint64_t)(row0 * p->cols + i));
        for (int j = 0; j < 2 && i + j < n * p->cols; j++) {
            uint32_t a = r.v[2 * j], b = r.v[2 * j + 1];
            int32_t sum = (int32_t)((a & 0xffff) + (a >> 16) + (b & 0xffff) + (b >> 16)) - 131070;
            out[i + j] = param_is_norm(p) ? 1.0f : step * (float)sum;
        }
    }
    return 0;
}

int main(int argc, char **argv) {
    program_name = "random_model";
    Err err = {0};
    LlamaConfig c;
    QuantPlan plan;
    ParamTable table;
    if (argc != 3) {
        err_set(&err, E_USAGE, "usage: random_model SHAPE FILE (%s)", llama_config_names());
        die(&err);
    }
    quant_plan_none(&plan);
    if (llama_config_named(&c, argv[1], &err) || param_table_build(&table, &c, &plan, &err) ||
        model_write_bin(argv[2], &c, &plan, &table, NULL, DT_BF16, rows, NULL, &err))
        die(&err);
    param_table_free(&table);
    return 0;
}
