// Any bytes as a safetensors file: refused with a message, or every tensor lies inside the input.
#include <stdlib.h>
#include "safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    Safetensors st;
    Err err;
    if (safetensors_parse(&st, data, size, "fuzz", &err)) return 0;
    for (int i = 0; i < st.n; i++) {
        const StTensor *t = &st.tensors[i];
        if (t->data < data || t->bytes > size || (size_t)(t->data - data) > size - t->bytes) abort();
        if (safetensors_find(&st, t->name) != t) abort();
    }
    safetensors_close(&st);
    return 0;
}
