// Any bytes as config.json and as a quantization plan: refused, or what is taken survives being written and read again.
#include <stdlib.h>
#include "llama.h"
#include "quant.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    LlamaConfig c, c2;
    QuantPlan plan, plan2;
    ParamTable table;
    Err err;
    if (size > 1 << 16) return 0;                    // length alone finds nothing new here
    if (llama_config_from_json(&c, (const char *)data, size, &err) == 0) {
        char *text = llama_config_to_json(&c, "bfloat16");
        if (llama_config_from_json(&c2, text, strlen(text), &err)) abort();
        if (c2.C != c.C || c2.L != c.L || c2.V != c.V || c2.HS != c.HS || c2.n_eos != c.n_eos) abort();
        free(text);
        if (c.L <= 8 && param_table_build(&table, &c, NULL, &err) == 0) param_table_free(&table);
    }
    if (quant_plan_from_json(&plan, (const char *)data, size, &err) == 0) {
        char *text = quant_plan_to_json(&plan);
        if (quant_plan_from_json(&plan2, text, strlen(text), &err)) abort();
        free(text);
    }
    return 0;
}
