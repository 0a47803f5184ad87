// Any bytes as a model file (model.bin or GGUF) through model_open: refused, or every tensor can be read to its last row.
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include "checkpoint.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static int fd = -1;                          // one file in memory, rewritten for each input
    char path[64];
    ModelFile m;
    ParamTable table;
    Err err;
    if (size > 1 << 17) return 0;
    if (fd < 0) fd = memfd_create("model", 0);
    if (fd < 0 || ftruncate(fd, 0) || pwrite(fd, data, size, 0) != (ssize_t)size) abort();
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (model_open_with(&m, path, MODEL_NO_VERIFY, &err)) return 0;     // whoever forges a file forges its checksum
    if (param_table_build(&table, &m.config, m.packed ? &m.plan : NULL, &err)) abort();
    Param head = {.name = "lm_head.weight", .role = ROLE_HEAD, .layer = -1, .rows = m.config.V, .cols = m.config.C};
    bool tied_head = m.packed && m.config.tied && m.plan.tied_head.bits;
    for (int i = 0; i < table.n + tied_head; i++) {
        const Param *p = i < table.n ? &table.p[i] : &head;
        PackedTensor t;
        float *row = xmalloc((size_t)p->cols * sizeof *row);
        int rc = model_read_rows(&m, p, p->rows - 1, 1, row, &err);
        if (rc && rc != E_FORMAT) abort();       // only damaged values may stop it now
        if (model_packed(&m, p, &t, &err) == 1) packed_tensor_free(&t);
        free(row);
    }
    param_table_free(&table);
    model_close(&m);
    return 0;
}
