// Served forms kept in a file from run to run: a safetensors container with its own checksum, one tensor of bytes a
// linear. Whatever does not fit, whether damaged or of another model, is as if it were not there.
#ifndef QLLM_SERVED_CACHE_H
#define QLLM_SERVED_CACHE_H
#include "checkpoint.h"

typedef struct { const char *name; const void *data; size_t bytes; } ServedForm;

// Opens the forms of m that were written at path by this version for this processor. False: there are none.
bool served_cache_open(Safetensors *st, const char *path, const ModelFile *m);
// The form of a linear, aligned to 64 bytes; NULL where the file has none of this size.
const void *served_cache_find(const Safetensors *st, const char *name, size_t bytes);
// Writes n forms of m, whole or not at all.
int served_cache_write(const char *path, const ModelFile *m, const ServedForm *forms, int n, Err *err);
#endif
