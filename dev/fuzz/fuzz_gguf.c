// Any bytes as a GGUF file: refused with a message, or values, configuration and rows can be read.
#include <stdlib.h>
#include "checkpoint.h"
#include "gguf.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static volatile double sink;                     // keeps the reads
    Gguf g;
    Err err;
    if (gguf_parse(&g, data, size, "fuzz", &err)) return 0;
    for (int i = 0; i < g.n_values; i++) {
        const GgufValue *v = &g.values[i];
        for (uint64_t k = 0; v->type == GGUF_ARRAY && k < v->count && k < 16; k++) {
            size_t len = 0;
            const char *s = gguf_string_at(&g, v, v->count - 1 - k, &len);
            if (s && len) sink = s[0] + s[len - 1];
            sink = gguf_double_at(v, k) + (double)gguf_int_at(v, k);
        }
    }
    for (int i = 0; i < g.n_tensors; i++) {
        const GgufTensor *t = &g.tensors[i];
        int64_t rows = t->ne[1] * t->ne[2] * t->ne[3];
        float *row = xmalloc((size_t)t->ne[0] * sizeof *row);
        if (gguf_row(row, t, 0, &err) || gguf_row(row, t, rows - 1, &err)) abort();
        sink = row[t->ne[0] - 1];
        free(row);
    }
    LlamaConfig c;
    if (llama_config_from_gguf(&c, &g, &err) == 0 && llama_config_validate(&c, &err)) abort();
    gguf_close(&g);
    return 0;
}
