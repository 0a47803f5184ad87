// Served forms kept in a file from run to run.
#include "served_cache.h"
#include <stdlib.h>
#include <string.h>
#include "cpu/isa.h"

#define KEY "qllm.served"
enum { VERSION = 1, ALIGN = 64 };       // VERSION: of the order in which served_pack puts things

// What the forms depend on. A model without a checksum of its own is known by its size and time.
static void identity(char *text, size_t size, const ModelFile *m) {
    const Safetensors *file = &m->files[0];
    const char *checksum = safetensors_meta(file, "checksum");
    snprintf(text, size, "%d %s %s %zu-byte %zu %s %lld", VERSION, QLLM_VERSION, cpu_isa_name(cpu_isa()),
             sizeof(floatX), file->map.size, checksum ? checksum : "-",
             checksum ? 0LL : (long long)file->map.written);
}

static size_t padded(size_t bytes) { return (bytes + ALIGN - 1) / ALIGN * ALIGN; }

bool served_cache_open(Safetensors *st, const char *path, const ModelFile *m) {
    char expected[256];
    Err unread;
    identity(expected, sizeof expected, m);
    if (!path_exists(path) || safetensors_open(st, path, &unread) < 0) return false;
    const char *found = safetensors_meta(st, KEY);
    bool sealed = safetensors_meta(st, "checksum") != NULL;
    if (sealed && found && !strcmp(found, expected) && safetensors_verify(st, false, &unread) == 0) return true;
    safetensors_close(st);
    return false;
}

const void *served_cache_find(const Safetensors *st, const char *name, size_t bytes) {
    const StTensor *t = safetensors_find(st, name);
    if (!t || t->dtype != DT_U8 || t->ndim != 1 || (uint64_t)t->shape[0] != padded(bytes)) return NULL;
    return (uintptr_t)t->data % ALIGN ? NULL : t->data;
}

int served_cache_write(const char *path, const ModelFile *m, const ServedForm *forms, int n, Err *err) {
    static const char zeros[ALIGN];
    char text[256];
    identity(text, sizeof text, m);
    StWriter *w = st_writer_new();
    st_writer_meta(w, KEY, text);
    for (int i = 0; i < n; i++) {
        int64_t shape = (int64_t)padded(forms[i].bytes);
        st_writer_tensor(w, forms[i].name, DT_U8, 1, &shape);
    }
    st_writer_seal(w);
    int rc = st_writer_begin(w, path, err);
    if (rc < 0) {
        st_writer_abort(w);
        return rc;
    }
    for (int i = 0; i < n; i++) {
        st_writer_data(w, forms[i].data, forms[i].bytes);
        st_writer_data(w, zeros, padded(forms[i].bytes) - forms[i].bytes);
    }
    return st_writer_finish(w, err);
}
